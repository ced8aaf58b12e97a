"""The first questions to a GPU (benchmarks/smoke.py), asked of a CPU: what they find, and what they say of it."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from fusedrnn.benchmarks import plans, smoke, verify
from fusedrnn.benchmarks.smoke import Chosen

import fusedrnn
from fusedrnn.testing import Case

T, B, H = 3, 2, 5
CHOICE = Chosen(H, 4, {"forward": "the forward's plan", "backward": "the backward's plan"})


def trial(math):
    return Case(T, B, 4, H, smoke._MATHS[math][0]), math, CHOICE, f"lstm, grid of 4, {math}, H {H}, T {T}"


@pytest.fixture
def asked(monkeypatch):
    """`exchange` on the CPU by the reference: ours are its results as `change` leaves them, in TF32 or not."""

    def run(change, *maths, skip=0):
        computed = verify.evaluate

        def evaluate(case, tf32, device, cls):
            ours = computed(case, tf32, device, cls)
            change(ours, tf32)
            return ours

        monkeypatch.setattr(verify, "evaluate", evaluate)
        monkeypatch.setattr(smoke, "_trials", lambda *_: iter([trial(math) for math in maths]))
        monkeypatch.setitem(plans._FORCES, "reference", lambda *_: fusedrnn.use_backend("reference"))
        return smoke.exchange("reference", "grid", "cpu", skip)

    return run


def test_what_is_right_passes_in_every_arithmetic(asked, capsys):
    assert asked(lambda ours, tf32: None, *smoke._MATHS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [trial(math)[-1] for math in smoke._MATHS]
    assert all(re.search(r": ok, 0\.\d\d of", line) for line in lines)


def test_tf32_may_round_its_operands_and_float32_may_not(asked, capsys):
    def round_as_tf32(ours, tf32):
        ours["y"] *= 1 + 2.0**-11

    assert asked(round_as_tf32, "tf32", "float32") == 1
    in_tf32, begun, in_float32 = capsys.readouterr().out.splitlines()
    assert in_tf32.startswith("lstm, grid of 4, tf32, H 5, T 3: ok")
    assert begun == "lstm, grid of 4, float32, H 5, T 3: "
    assert in_float32.startswith("FAILED lstm, grid of 4, float32")


def test_a_failure_names_the_plans_and_the_first_wrong_element(asked, capsys):
    def break_two(ours, tf32):
        ours["y"][1, 1, 2] = float("nan")
        ours["y"][2, 0, 0] += 1
        ours["hn"][:] = 9

    assert asked(break_two, "float32") == 1
    _, line = capsys.readouterr().out.splitlines()
    assert "y: error inf" in line
    assert f"; 2 of {T * B * H} wrong, first [1, 1, 2]: nan, exactly " in line
    assert "wrong as well: hn; forward: the forward's plan; backward: the backward's plan" in line


def test_results_that_change_are_a_failure(asked, capsys):
    times = []

    def change(ours, tf32):
        times.append(None)
        ours["dx"][2, 1, 0] *= 1 + 2.0**-23 * (len(times) == 3)

    assert asked(change, "float32") == 1
    assert "AssertionError: dx differs from one time to the next, first at [2, 1, 0]" in capsys.readouterr().out


def test_another_process_goes_on_where_the_device_has_failed(asked, capsys, monkeypatch):
    def fail(ours, tf32):
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")

    started = []
    monkeypatch.setattr(plans, "responds", lambda device: False)
    monkeypatch.setattr(smoke.subprocess, "run", lambda command, **_: started.append(command))
    assert asked(fail, "bfloat16", "tf32", "float32", skip=1) == 1
    _, failed, said = capsys.readouterr().out.splitlines()
    assert failed.startswith("FAILED lstm, grid of 4, tf32")
    assert "CUDA error: an illegal memory access Compile with" in failed
    assert "another goes on" in said
    (command,) = started
    assert command[command.index("exchange") :] == ["exchange", "reference", "grid", "--device", "cpu", "--skip", "2"]


def test_torch_alone(capsys, monkeypatch):
    assert smoke.main(["torch", "--device", "cpu"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "ok"]

    def missing(*_):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")

    monkeypatch.setattr(smoke.nn, "LSTM", missing)
    assert smoke.main(["torch", "--device", "cpu"]) == 1
    assert "FAILED RuntimeError: cuDNN error" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["nn.LSTM", "triton"])
def test_steps_of_one_are_kept_where_the_other_fails(tmp_path, capsys, monkeypatch, broken):
    measured = {"call": [2.0, 4.0], "launch": [1.5, 3.5]}

    def fail(*_):
        raise RuntimeError("it fails")

    monkeypatch.setattr(smoke, "_slopes", fail if broken == "nn.LSTM" else lambda *_: measured)
    ours = {**measured, "predicted": [1.2, 2.0], "plans": ["1 x 8", "1 x 16"]}
    monkeypatch.setattr(smoke, "_ours", fail if broken == "triton" else lambda *_: ours)
    assert smoke.main(["steps", "triton", "--device", "cpu", "--out", str(tmp_path)]) == 1
    lines = smoke.table(tmp_path / "steps.jsonl")[1:]
    assert sum("FAILED RuntimeError: it fails" in line for line in lines) == 2
    assert sum("1.50    1.20    2.00 |" in line for line in lines) == (2 if broken == "nn.LSTM" else 0)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [next(name for name in row if name not in ("H", "B")) for row in rows] == ["nn.LSTM"] * 2 + ["triton"] * 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and no interpreter")
def test_exchanges_of_interpreted_kernels(tmp_path):
    """The command of a session, with the planner and the launches: of every cell, and where there are such plans."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fusedrnn.benchmarks.smoke", "exchange", "triton", "rows", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("lstm, rows of 1, bfloat16", "lstm, rows of 1, tf32", "gru", "rnn_tanh"):
        assert what in done.stdout
