"""examples/: each example of the gallery in its quick form, what it tells of its figure, its data, and the page."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))  # the examples import common.py

import common  # noqa: E402
import gallery  # noqa: E402
from PIL import Image  # noqa: E402

LARGEST_FIGURE = 60 * 1024  # bytes of a figure that is part of the repository


# For each example what its page says, on the numbers that it returns.
SAYS = {
    "bptt_by_hand": lambda n: max(n["differences"]["fusedrnn"].values()) < 1e-12 and n["apart"] < 1e-6,
    "vanishing_gradients": lambda n: n["first"]["rnn"] < n["first"]["lstm"] < n["first"]["lstm, forget bias 1"] / 1e3,
    "exploding_gradients": lambda n: n["jump"] > 1000 and n["largest"] > 10,
    "truncated_bptt": lambda n: n["carried"] < n["zeros"],
    "char_lm": lambda n: n["bits"][0] > n["bits"][2] and max(n["differences"].values()) < 1e-4,
    "cells_of_text": lambda n: n["correlation"]["place in the line"] > 0.2,
    "word_model": lambda n: n["sizes"]["tied"] < n["sizes"]["separate"],
    "temporal_order": lambda n: n["LSTM, lengths"] > 0.9,
    "echo": lambda n: min(n["lstm"]) > 0.95 > max(n["zeros"]),
    "seq2seq": lambda n: sum(n["right"]["with attention"]) > sum(n["right"]["without"]) and n["off"] < 1,
    "reading_programs": lambda n: n["losses"][-1] < 0.75 * n["losses"][0],
    "captioning": lambda n: n["on thing"] > 2 * n["by chance"],
    "tagging": lambda n: n["right"]["both directions"]["all"] > n["right"]["left to right"]["all"],
    "language_of_line": lambda n: sum(n["shares"].values()) / len(n["shares"]) > 0.5,
    "chaotic_series": lambda n: n["one step"] < 0.1 < n["last"],
    "lstm_variants": lambda n: max(map(max, n["bits"].values())) < 5 and len(n["bits"]) == 8,
    "memory_task": lambda n: n["with memory"] > 0.8 > 0.6 > n["without"],
}


def test_every_example_is_tested():
    assert list(SAYS) == gallery.NAMES
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert set(gallery.NAMES) <= scripts


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_an_example(name, tmp_path):
    result = importlib.import_module(name).main(["--quick", "--out", str(tmp_path / "new")])
    assert result.figure == tmp_path / "new" / f"{name}.png"
    with Image.open(result.figure) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert result.figure.stat().st_size <= LARGEST_FIGURE
    assert result.claims
    assert [claim for claim, holds in result.claims.items() if not holds] == []
    assert SAYS[name](result.numbers)


@pytest.mark.parametrize("name", SAYS)
def test_bad_arguments(name, tmp_path, capsys):
    main = importlib.import_module(name).main
    (tmp_path / "file").touch()
    for arguments, complaint in (
        (["--seed=-1"], "argument --seed: must be a whole number in 0.."),
        (["--steps=few"] if name != "word_model" else ["--passes=few"], "must be a whole number in "),
        (["--out", str(tmp_path / "file")], f"argument --out: {tmp_path / 'file'}: "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert complaint in capsys.readouterr().err


def test_an_example_as_a_script(tmp_path):
    command = [sys.executable, str(EXAMPLES / "vanishing_gradients.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "yes  a forget-gate bias of 1 keeps a thousand times more" in done.stdout
    assert f"figure: {tmp_path / 'vanishing_gradients.png'}" in done.stdout


def test_a_script_whose_claim_fails_ends_with_an_error(tmp_path, capsys):
    result = common.Result(tmp_path / "x.png", {}, {"this holds": True, "this does not": False})
    assert common.script(lambda: result) == 1
    assert "NO   this does not" in capsys.readouterr().out


def test_a_loss_that_is_no_number_ends_the_training(capsys):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="label: the loss is nan at step 0"):
        common.train(model, lambda: model(torch.full((1, 1), float("nan"))).sum(), 2, 0.1, "label")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_a_progress_bar_is_for_a_terminal(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(common.progress(3, "label")) == [0, 1, 2]
    assert ("100%" in stream.getvalue()) == stream.isatty()


def test_training_is_measured_before_it_and_after_each_part():
    model = torch.nn.Linear(1, 1)
    seen = []
    losses = common.train(
        model, lambda: model(torch.ones(1, 1)).square().sum(), 10, 0.1, "", measure=lambda: seen.append(1), parts=5
    )
    assert len(losses) == 10
    assert len(seen) == 6


def test_annealing_rises_and_falls_to_zero():
    factors = [common.annealing(step, 100) for step in range(101)]
    assert factors[9] == factors[10] == 1
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == 0
    assert common.annealing(0, 1) == 1


def test_the_page_is_what_the_examples_say():
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert page == gallery.page(), "examples/gallery.py --docs docs --only writes it"
    for name in gallery.NAMES:
        figure = ROOT / "docs" / "gallery" / f"{name}.png"
        assert 0 < figure.stat().st_size <= LARGEST_FIGURE, name


def test_smooth():
    assert common.smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_the_class_of_a_temporal_order_is_the_order():
    module = importlib.import_module("temporal_order")
    x, lengths, classes = module.batch(module.LEVELS["normal"], 8)
    left, same_lengths, _ = module.batch(module.LEVELS["normal"], 8, left=True)
    assert x[-1].sum() == (lengths == len(x)).sum()
    assert left[-1].sum() == 8
    for b, T in enumerate(lengths.tolist()):
        text = "".join(module.SYMBOLS[token] for token in x[:T, b].argmax(1).tolist())
        assert text[0] == "B"
        assert text[-1] == "E"
        order = "".join(symbol for symbol in text if symbol in "XY")
        assert list(module.CLASSES)[int(classes[b])] == order
    assert left.sum() == same_lengths.sum()


def test_the_gradient_by_hand_is_that_of_finite_differences():
    module = importlib.import_module("bptt_by_hand")
    torch.manual_seed(0)
    weights = module.initial_weights(V=3, H=4)
    tokens = torch.randint(3, (6, 2))
    x, targets = torch.nn.functional.one_hot(tokens[:-1], 3).double(), tokens[1:]
    _, gradients = module.by_hand(weights, x, targets)
    for name, gradient in zip(module.NAMES, gradients, strict=True):
        values, eps = getattr(weights, name).view(-1), 1e-6
        values[0] += eps
        above = module.forward(weights, x, targets)[0]
        values[0] -= 2 * eps
        below = module.forward(weights, x, targets)[0]
        values[0] += eps
        torch.testing.assert_close(gradient.reshape(-1)[0], (above - below) / (2 * eps), rtol=1e-6, atol=1e-9)


def test_tags_of_python():
    module = importlib.import_module("tagging")
    line = 'if x1 == "no":  # 3'
    ((found, tags),) = module.tagged_lines(line + "\n    pass\n")[:1]
    assert found == line
    letters = {"keyword": "k", "name": "n", "number": "1", "string": "s", "comment": "c", "operator": "o"}
    named = "".join(" " if tag == module.SPACE else letters[module.TAGS[tag]] for tag in tags)
    assert named == "kk nn oo sssso  c c"


def test_features_of_a_program_know_what_has_been_read_and_no_more():
    module = importlib.import_module("cells_of_text")
    found = {name: "".join(str(int(v)) for v in values) for name, values in module.features('  f("a")\nb\n').items()}
    assert found == {
        "in a string": "00001100000",
        "place in the line": "12345678010",
        "open brackets": "00011110000",
        "indentation": "12222222000",
    }


def test_a_sentence_says_what_is_in_the_picture():
    module = importlib.import_module("captioning")
    torch.manual_seed(0)
    batch = module.pictures(50, test=False)
    assert len(batch.images) == 50
    for image, sentence, covered in zip(batch.images, batch.sentences.T, batch.covered.transpose(0, 1), strict=True):
        words = [module.WORDS[word] for word in sentence]
        two = words[3] != "<end>"
        assert bool(covered[1].any()) == two
        assert words[-1] == "<end>"
        where = []  # the middle of the pixels of each thing's colour
        for k in (1, 5)[: 1 + two]:
            paint = torch.tensor(module.COLOURS[words[k]])[:, None, None]
            where.append((image == paint).all(0).nonzero().float().mean(0))
        if two and words[1] != words[5]:
            down, right = (where[1] - where[0]).tolist()
            assert (down > abs(right)) if words[3] == "above" else (right > abs(down))


def test_pairs_of_the_captions_test_are_in_no_picture_for_training():
    module = importlib.import_module("captioning")

    def pairs(test):
        _, words, _ = module.pictures(400, test)
        return {tuple(sentence) for sentence in words[[1, 2, 5, 6]].T.tolist()}

    assert not pairs(False) & pairs(True)


def test_mazes():
    module = importlib.import_module("memory_task")
    mazes = module.Mazes(2, corridor=1)
    mazes.sign = torch.tensor([module.LEFT, module.RIGHT])
    assert mazes.see().argmax(1).tolist() == [0, 1]
    rewards, ended = mazes.act(torch.tensor([module.FORWARD, module.LEFT]))
    assert not ended.any()
    torch.testing.assert_close(rewards, torch.tensor([0.0, -0.1]))
    assert mazes.see().argmax(1).tolist() == [module.SEES["junction"], 1]
    mazes.act(torch.tensor([module.FORWARD, module.FORWARD]))
    rewards, ended = mazes.act(torch.tensor([module.LEFT, module.LEFT]))
    assert ended.all()
    assert rewards.tolist() == [1.0, -1.0]
    assert mazes.place.tolist() == [0, 0]


def test_answers_are_collated_for_teacher_forcing():
    module = importlib.import_module("seq2seq")
    questions, lengths, given, targets = module.collate([("12", "21"), ("3", "3")], module.SYMBOLS)
    start, end = len(module.SYMBOLS), len(module.SYMBOLS) + 1
    assert lengths.tolist() == [2, 1]
    assert questions.T.tolist() == [[1, 2], [3, 0]]
    assert given[:, 0].tolist() == [start, 2, 1]
    assert targets.T.tolist() == [[2, 1, end], [3, end, module.NOTHING]]
