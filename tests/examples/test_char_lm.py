"""examples/char_lm.py: the whole demonstration on a tiny budget, its training step, its sampling, its refusals."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fusedrnn

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

SCRIPT = Path(__file__).parents[2] / "examples" / "char_lm.py"
TINY = ["--steps", "4", "--hidden", "16", "--batch", "4", "--chunk", "8", "--length", "20"]


@pytest.fixture(scope="module")
def char_lm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("char_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.path.append(str(SCRIPT.parent))  # it imports common.py
    module = importlib.util.module_from_spec(spec)
    sys.modules["char_lm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, café\n" * 40, encoding="utf-8")
    return path


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_the_demonstration(char_lm: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    result = char_lm.main([*TINY, "--file", str(text), "--out", str(out)])
    assert result.figure == out / "char_lm.png"
    assert result.claims["the parameters are still the optimizer's own"]
    printed = capsys.readouterr().out
    width, height = png_size(out / "char_lm.png")
    assert min(width, height) > 100
    differences = re.findall(r"(?:outputs|gradients) +(\S+) at most", printed)
    assert len(differences) == 2
    assert all(0 <= float(difference) <= char_lm.TOLERANCE for difference in differences)
    assert "they agree" in printed
    assert len(re.findall(r"ratio \d+\.\d\dx", printed)) == 2
    assert len(re.findall(r"\d\.\d{3} bits per character of held-out text \(step [024]\)", printed)) == 3
    assert re.search(r"computed by (cpu|aten|cuda|triton|reference)\b", printed)


def test_it_runs_as_a_script_on_the_standard_library(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *TINY, "--characters", "20000", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "standard library" in done.stdout
    assert "%|" not in done.stderr, "a progress bar in a pipe"
    assert png_size(tmp_path / "char_lm.png")


def test_a_script_refuses_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--file", str(tmp_path / "gone.txt"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert not done.stdout
    usage, error = done.stderr.splitlines()
    assert usage.startswith("usage: char_lm.py")
    assert error == f"char_lm.py: error: {tmp_path / 'gone.txt'}: No such file or directory"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file is empty"),
        (b"text\0text" * 1000, "it is not text: it contains a NUL character"),
        ("café".encode("latin-1") * 1000, "it is not UTF-8 text: .*0xe9"),
        ("text".encode("utf-16") * 1000, "it is not UTF-8 text: invalid start byte, 0xff"),
        (b"0123456789" * 4, r"it is too short: of its 40 characters 32 are left .* --batch 4 takes 36"),
        (b"0", "it is too short: of its 1 characters 0 are left"),
    ],
    ids=["empty", "NUL", "latin-1", "utf-16", "short", "one character"],
)
def test_bad_files(
    char_lm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, complaint: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        char_lm.main([*TINY, "--file", str(path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"error: {re.escape(str(path))}: {complaint}", error)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_file(char_lm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        char_lm.main([*TINY, "--file", str(tmp_path)])
    assert stop.value.code == 2
    assert f"error: {tmp_path}: " in capsys.readouterr().err


def test_the_shortest_text_that_is_long_enough(char_lm: ModuleType) -> None:
    tokens = torch.arange(44)
    streams, held_out = char_lm.split_streams(tokens, batch=4, chunk=8)
    assert streams.shape == (9, 4)
    assert held_out.shape == (2, 4)
    assert streams[:, 1].tolist() == list(range(9, 18))
    with pytest.raises(char_lm.BadTextError, match="too short"):
        char_lm.split_streams(tokens[:-1], batch=4, chunk=8)


@pytest.mark.parametrize(
    ("argument", "value", "complaint"),
    [
        ("--temperature", "0", "must be a number > 0 .*got '0'"),
        ("--temperature", "-1", "must be a number > 0 .*got '-1'"),
        ("--temperature", "nan", "must be a number > 0 .*got 'nan'"),
        ("--temperature", "warm", "must be a number > 0 .*got 'warm'"),
        ("--seconds", "0", "must be a number > 0"),
        ("--seconds", "inf", "must be a number > 0"),
        ("--lr", "-0.1", "must be a number > 0"),
        ("--steps", "1", r"must be a whole number in 2\.\."),
        ("--hidden", "0", r"must be a whole number in 1\.\."),
        ("--hidden", "many", "must be a whole number in .*got 'many'"),
        ("--batch", "-3", r"must be a whole number in 1\.\."),
        ("--chunk", "2.5", r"must be a whole number in 1\.\."),
        ("--characters", "0", r"must be a whole number in 1\.\."),
        ("--length", "0", r"must be a whole number in 1\.\."),
        ("--seed", "-1", r"must be a whole number in 0\.\."),
        ("--seed", str(2**63), r"must be a whole number in 0\.\."),
        ("--device", "toaster", "'toaster' cannot be used"),
        ("--device", "meta", "'meta' cannot be used"),
        ("--device", "cuda:999", "'cuda:999' cannot be used"),
    ],
)
def test_bad_arguments(
    char_lm: ModuleType, capsys: pytest.CaptureFixture[str], argument: str, value: str, complaint: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        char_lm.main([f"{argument}={value}"])
    assert stop.value.code == 2
    assert re.search(f"error: argument {argument}: {complaint}", capsys.readouterr().err)


def test_seconds_and_steps_exclude_each_other(char_lm: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        char_lm.main(["--seconds", "1", "--steps", "4"])
    assert stop.value.code == 2
    assert "--steps: not allowed with argument --seconds" in capsys.readouterr().err


def test_out_is_a_file(char_lm: ModuleType, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        char_lm.main([*TINY, "--file", str(text), "--out", str(text)])
    assert stop.value.code == 2
    assert f"error: argument --out: {text}: " in capsys.readouterr().err


def test_a_disagreement_is_an_error(
    char_lm: ModuleType,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convert = fusedrnn.convert

    def convert_wrongly(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            model.lstm.weight_hh_l2[0, 0] += 0.1
        return convert(model)

    monkeypatch.setattr(char_lm.fusedrnn, "convert", convert_wrongly)
    assert char_lm.common.script(lambda: char_lm.main([*TINY, "--file", str(text), "--out", str(tmp_path)])) == 1
    assert "they disagree" in capsys.readouterr().err


def test_a_divergence_is_an_error(
    char_lm: ModuleType,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = char_lm.train_step
    monkeypatch.setattr(char_lm, "train_step", lambda *args: (float("nan"), step(*args)[1]))
    assert char_lm.common.script(lambda: char_lm.main([*TINY, "--file", str(text), "--out", str(tmp_path)])) == 1
    assert "try a smaller --lr" in capsys.readouterr().err


@pytest.fixture(params=["torch.nn", "fusedrnn"])
def model(request: pytest.FixtureRequest, char_lm: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    model = char_lm.CharLM(vocabulary=7, hidden=8)
    return model if request.param == "torch.nn" else fusedrnn.convert(model)


def test_chunks_carry_the_state(char_lm: ModuleType, model: torch.nn.Module) -> None:
    """With a learning rate of 0, chunk after chunk ends where the whole text at once ends."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    streams = torch.randint(7, (13, 3))
    chunks, state, losses = char_lm.endless_chunks(streams, 4), None, []
    for k in range(3):
        x, targets, at_beginning = next(chunks)
        assert at_beginning == (k == 0)
        assert torch.equal(x[1:], targets[:-1])
        loss, state = char_lm.train_step(model, optimizer, x, targets, state)
        losses.append(loss)
    assert next(chunks)[2]
    _, whole = model(streams[:12])
    for carried, expected in zip(state, whole, strict=True):
        torch.testing.assert_close(carried, expected)
    assert sum(losses) / 3 == pytest.approx(char_lm.bits_per_character(model, streams, 5), rel=1e-5)


def test_chunks_cut_the_gradient(char_lm: ModuleType, model: torch.nn.Module) -> None:
    """The gradient of the second chunk takes the state it starts from as a constant."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first, second = torch.randint(7, (2, 5, 3))
    _, state = char_lm.train_step(model, optimizer, first[:-1], first[1:], None)
    assert not any(part.requires_grad for part in state)
    char_lm.train_step(model, optimizer, second[:-1], second[1:], state)
    cut = [parameter.grad.clone() for parameter in model.parameters()]

    def gradients(state: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(model(second[:-1], state)[0].flatten(0, 1), second[1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), char_lm.MAX_GRADIENT_NORM)
        return [parameter.grad.clone() for parameter in model.parameters()]

    torch.testing.assert_close(cut, gradients(state))
    _, uncut = model(first[:-1])
    assert any(not torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(cut, gradients(uncut), strict=True))


def test_the_gradient_is_clipped(char_lm: ModuleType, model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model.head.weight *= 1000
    x = torch.randint(7, (5, 3))
    char_lm.train_step(model, optimizer, x[:-1], x[1:], None)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm.item() == pytest.approx(char_lm.MAX_GRADIENT_NORM, rel=1e-3)


def test_training_learns_across_the_conversion(char_lm: ModuleType) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    words = ["gate", "cell", "state", "time"]
    text = " ".join(rng.choice(words) for _ in range(400))
    vocabulary = "".join(sorted(set(text)))
    tokens = torch.tensor([vocabulary.index(character) for character in text])
    streams, held_out = char_lm.split_streams(tokens, batch=8, chunk=10)
    model = char_lm.CharLM(len(vocabulary), hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    training = char_lm.Training(model, optimizer, char_lm.endless_chunks(streams, 10))
    bits = [char_lm.bits_per_character(model, held_out, 10)]
    for _ in range(2):
        training.run(60, 0.0, "")
        bits.append(char_lm.bits_per_character(model, held_out, 10))
        fusedrnn.convert(model)
    assert len(training.losses) == 120
    assert bits[0] > bits[1] > bits[2]
    assert bits[2] < 1.5


def test_sampling(char_lm: ModuleType, model: torch.nn.Module) -> None:
    vocabulary = "ab\néλ:_"
    written = char_lm.sample(model, vocabulary, 50, 1.0, seed=1)
    assert len(written) == 50
    assert set(written) <= set(vocabulary)
    assert written == char_lm.sample(model, vocabulary, 50, 1.0, seed=1)
    assert written != char_lm.sample(model, vocabulary, 50, 1.0, seed=2)


def test_sampling_follows_the_temperature(char_lm: ModuleType, model: torch.nn.Module) -> None:
    """Near 0 it always takes the likeliest character, whatever the seed; far above 1 it uses all of them."""
    vocabulary = "abcdefg"
    assert len({char_lm.sample(model, vocabulary, 20, 1e-300, seed) for seed in range(3)}) == 1
    assert set(char_lm.sample(model, vocabulary, 200, 1e6, seed=0)) == set(vocabulary)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be > 0"):
            char_lm.sample(model, vocabulary, 1, temperature, seed=0)


def test_a_prompt_is_read_first(char_lm: ModuleType, model: torch.nn.Module) -> None:
    """What follows a prompt is what follows it where the model has written it itself."""
    vocabulary = "abcdefg"
    written = char_lm.sample(model, vocabulary, 20, 1e-300, seed=0, prompt="b")
    assert char_lm.sample(model, vocabulary, 10, 1e-300, seed=0, prompt="b?" + written[:10]) == written[10:]


def test_sampling_passes_the_state_on(char_lm: ModuleType, model: torch.nn.Module) -> None:
    """Character by character it draws what the whole text at once would have given as the likeliest."""
    vocabulary = "abcdefg"
    written = char_lm.sample(model, vocabulary, 20, 1e-300, seed=0)
    tokens = torch.tensor([0, *(vocabulary.index(character) for character in written)])
    logits, _ = model(tokens[:-1].unsqueeze(1))
    assert logits[:, 0].argmax(-1).tolist() == tokens[1:].tolist()
