"""Verifying and measuring: backends that are wrong, raise, hang, crash or are slow; the command; tune(model)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import cli, ops
from fusedrnn.tuning import api, choice, grid, profile, report, session, worker
from fusedrnn.tuning.profile import Key, Measurement, Ratio

pytestmark = pytest.mark.skipif(fusedrnn.backends()["cpu"] is not None, reason="the cpu backend is not available")

SMALL, OTHER = Key("float32", False, 3, 2, 4, 8), Key("float32", False, 3, 2, 4, 5)
QUICK = session.Settings(rounds=2, budget=0.0, limit=60.0)

# A worker whose cpu backend misbehaves where H is 5.
FAKE = """
import os, signal, time
import torch
from fusedrnn import ops
from fusedrnn.tuning import worker
forward, infer = ops._FORWARD["cpu"], ops.cpu_infer
def misbehave(results, H):
    if H == 5:
        {behaviour}
    return results
ops._FORWARD["cpu"] = lambda *rest: misbehave(forward(*rest), rest[-3].shape[-1])
ops.cpu_infer = lambda cell, x, weights, *rest: misbehave(infer(cell, x, weights, *rest), weights[1].shape[1])
worker.main()
"""


@pytest.fixture(autouse=True)
def forgotten():
    """What a test has measured counts for no other."""
    yield
    choice.forget()


class WorkerHere:
    """Answers as session.Worker does, without a process, which takes seconds to load torch."""

    def __init__(self, setup, command):
        self.setup = setup

    def ask(self, job, limit):
        settings = worker.run.Settings(self.setup["rounds"], self.setup["budget"], check_flops=1e9)
        key = profile.from_line(job["key"]).key
        return worker.measure(key, self.setup["device"], job["backends"], settings, lambda name: None)

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """Measures in this process: for tests of what is measured, and of what becomes of it."""
    monkeypatch.setattr(session, "Worker", WorkerHere)


def measured(keys, tmp_path=None, behaviour=None, **changes):
    """What comes of measuring keys, with a cpu backend that does as told."""
    settings, made = QUICK, []
    if behaviour is not None:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(behaviour=behaviour))
        settings = session.Settings(2, 0.0, changes.pop("limit", 60.0), (sys.executable, str(script)))
    session.measure(keys, "cpu", ["cpu"], made.append, settings, **changes)
    return made


# The worker.


@pytest.mark.parametrize(
    "key",
    [
        SMALL,
        SMALL._replace(train=True, L=2, D=2),
        Key("bfloat16", True, 3, 2, 4, 8, packed=True),
        Key("float32", True, 3, 2, 4, 8, projected=True),
        Key("float32", False, 1, 2, 4, 8),
        Key("float32", False, 1, 2, 4, 8, step=True),
        Key("float32", True, 1, 2, 4, 8, step=True),
        Key("float32", True, 3, 2, 4, 8, 2, 2, cell="gru"),
        Key("bfloat16", False, 3, 2, 4, 8, packed=True, cell="rnn_relu"),
        Key("float32", True, 1, 2, 4, 8, step=True, cell="gru"),
        Key("float32", False, 1, 2, 4, 8, step=True, cell="rnn_relu"),
    ],
    ids=lambda key: key.label,
)
def test_what_is_right_is_timed_against_torchs_own(key):
    at_work = []
    made = worker.measure(key, "cpu", ["cpu"], worker.run.Settings(2, 0.0, check_flops=1e9), at_work.append)
    assert made.key == key
    assert made.failures == {}
    assert made.ms.keys() == {"aten", "cpu"}
    assert 0 < made.ratios["cpu"].low <= made.ratios["cpu"].median
    assert made.samples >= 2
    assert set(at_work) == {"aten", "cpu"}


@pytest.mark.parametrize(
    "key",
    [
        Key("float32", True, 3, 2, 4, 8, 2, 2, cell="lstm_peephole+hcg"),
        Key("bfloat16", True, 3, 2, 4, 8, packed=True, cell="lstm_peephole_coupled+hcr"),
        Key("float32", False, 3, 2, 4, 8, cell="lstm_coupled"),
        Key("float32", True, 3, 2, 4, 8, projected=True, cell="lstm_peephole+g"),
    ],
    ids=lambda key: key.label,
)
def test_variants_are_timed_against_the_reference(key):
    made = worker.measure(key, "cpu", ["cpu"], worker.run.Settings(2, 0.0, check_flops=1e9), lambda _: None)
    assert made.failures == {}
    assert made.ms.keys() == {"reference", "cpu"}
    assert made.ratios.keys() == {"cpu"}


def test_a_wrong_variant_is_found(monkeypatch):
    layer = ops._FORWARD["cpu"]

    def slightly_wrong(*arguments, **noise):
        y, *rest = layer(*arguments, **noise)
        return (y * 1.01, *rest)

    monkeypatch.setitem(ops._FORWARD, "cpu", slightly_wrong)
    key = Key("float32", False, 3, 2, 4, 8, cell="lstm_peephole+hcg")
    made = worker.measure(key, "cpu", ["cpu"], worker.run.Settings(2, 0.0, check_flops=1e9), lambda _: None)
    assert "wrong" in made.failures["cpu"]


def test_one_step_of_a_variant_is_not_measured():
    key = Key("float32", False, 1, 2, 4, 8, step=True, cell="lstm_peephole")
    assert measured([key]) == [Measurement(key)]


def test_the_ratio_is_of_samples_next_to_each_other_and_knows_their_noise():
    drift = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert worker.ratio([2 * d for d in drift], drift) == pytest.approx((2.0, 2.0))
    low, median = worker.ratio([2.0, 2.2, 2.4, 2.6, 2.8], [2.0] * 5)
    assert median == pytest.approx(1.2)
    assert 1.0 < low < 1.2
    assert worker.ratio([3.0], [2.0]) == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize(
    ("ratio", "decided"),
    [((1.03, 1.1), True), ((0.98, 1.04), False), ((0.98, 1.02), False), ((0.9, 0.94), True), ((0.75, 0.9), False)],
)
def test_noise_leaves_undecided_what_has_the_bound_in_its_interval(ratio, decided):
    assert Ratio(*ratio).decided == decided


def test_a_backend_that_is_wrong_is_not_measured_again_in_its_dtype(tmp_path):
    keys = [SMALL, OTHER, SMALL._replace(B=3), OTHER._replace(dtype="float64", H=8)]
    first, wrong, right = measured(keys, tmp_path, "results = (results[0] * 1.1, *results[1:])")
    assert (first.key, first.failures) == (SMALL, {})
    assert wrong.key == OTHER
    assert wrong.ms == {}
    assert re.match(r"wrong: y: error .* times what is allowed", wrong.failures["cpu"])
    assert (right.key.dtype, right.failures) == ("float64", {}), "another dtype is another matter"


def test_a_backend_that_raises(tmp_path):
    made = measured([OTHER], tmp_path, 'raise RuntimeError("there is a reason")')
    assert made[0].failures == {"cpu": "failed: RuntimeError: there is a reason"}


@pytest.mark.slow
def test_a_backend_that_hangs_is_a_line_and_no_end(tmp_path):
    begin = time.monotonic()
    made = measured([OTHER, SMALL._replace(dtype="float64")], tmp_path, "time.sleep(1000)", limit=12.0)
    assert time.monotonic() - begin < 100
    assert made[0].failures == {"cpu": "hung: no answer within 12 seconds"}
    assert made[1].ms.keys() == {"aten", "cpu"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_backend_that_crashes_is_a_line_and_no_end(tmp_path):
    crash = 'print("last words", file=__import__("sys").stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)'
    made = measured([OTHER, SMALL._replace(dtype="float64")], tmp_path, crash)
    assert made[0].failures == {"cpu": f"crashed: the process ended with signal {int(signal.SIGSEGV)} (last words)"}
    assert made[1].ms.keys() == {"aten", "cpu"}


def test_a_backend_that_is_slow_loses(tmp_path):
    (made,) = measured([OTHER], tmp_path, "time.sleep(0.02)")
    assert made.ratios["cpu"].median < 0.5
    assert report.winner(made) == "aten"


def test_a_process_that_cannot_work_is_an_error(tmp_path):
    settings = session.Settings(command=(sys.executable, "-c", "raise SystemExit('no such luck')"))
    with pytest.raises(RuntimeError, match="no such luck"):
        session.measure([SMALL], "cpu", ["cpu"], print, settings)


def test_nothing_is_begun_when_the_time_is_over():
    assert measured([SMALL], until=time.monotonic() - 1) == []


# The command.


def tune(*arguments):
    return cli.main(["tune", "--device", "cpu", "--rounds", "2", "--time-budget", "0", *arguments])


def test_the_command_saves_what_calls_then_find(cache, capsys):
    lstm, x = fusedrnn.LSTM(4, 8), torch.randn(3, 2, 4)
    assert "nothing like" in fusedrnn.explain(lstm, x).measured
    assert tune("--shape", "3,2,4,8", "--dtype", "float32") == 0
    out, err = capsys.readouterr()
    header, *lines = out.splitlines()
    assert header.split()[:3] == ["dtype", "mode", "what"]
    assert [line.split()[:9] for line in lines[:2]] == [
        ["float32", mode, "layer", "3", "2", "4", "8", "1", "1"] for mode in ("train", "infer")
    ]
    assert lines[-1] == f"profile: {cache / os.listdir(cache)[0]}"
    assert [line.split(":")[0] for line in err.splitlines()] == ["size 1 of 2", "size 2 of 2"]
    explanation = fusedrnn.explain(lstm, x)
    assert "measured at T 3, B 2, I 4, H 8, float32, training" in explanation.measured
    assert "measured on this machine" in explanation.measured
    assert explanation.ratios.keys() == {"cpu"}
    assert cli.main(["info"]) == 0
    assert f"{os.listdir(cache)[0]}: measured on this machine" in capsys.readouterr().out


def test_the_command_goes_on_with_what_is_there(cache, capsys, here):
    assert tune("--shape", "3,2,4,8", "--dtype", "float32") == 0
    assert tune("--shape", "3,2,4,8", "--shape", "3,2,4,9", "--dtype", "float32", "--resume") == 0
    out = capsys.readouterr().out.split("profile: ")[1]
    assert " 9 " in out
    assert not re.search(r"layer +3 +2 +4 +8 ", out)
    (name,) = os.listdir(cache)
    assert len(profile.load(cache / name).measurements) == 4


def test_another_file_and_another_number_of_threads(cache, tmp_path, capsys):
    path = tmp_path / "p.json"
    assert tune("--shape", "3,2,4,8", "--dtype", "float32", "--threads", "2", "--out", str(path), "--json") == 0
    assert not cache.exists()
    assert profile.load(path).threads == 2
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"profile", "measurements", "left"}
    assert (found["profile"], found["left"]) == (str(path), 0)
    assert found["measurements"] == json.loads(path.read_text())["measurements"][::-1]


def test_what_takes_no_time_measures_nothing_and_says_so(cache, capsys):
    assert tune("--quick", "--seconds", "1e-9") == 0
    out = capsys.readouterr().out
    assert "nothing was measured" in out
    assert "--resume goes on" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3,2"], "expected T,B,I,H"),
        (["--dtype", "tf32"], "tf32 is what a GPU computes in"),
        (["--dtype", "int8"], "invalid choice"),
        (["--backend", "aten"], "aten cannot compute there"),
        (["--threads", "0"], "whole number from 1"),
    ],
)
def test_wrong_arguments(capsys, cache, arguments, message):
    with pytest.raises(SystemExit) as exit:
        tune(*arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_profile_that_cannot_be_written_is_said_before_anything_is_measured(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        tune("--out", str(tmp_path / "file" / "p.json"))
    assert "the profile cannot be written" in capsys.readouterr().err


def test_help_names_the_variable(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    assert "FUSEDRNN_CACHE_DIR" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupting_keeps_what_was_measured(tmp_path):
    path = tmp_path / "p.json"
    shapes = [part for H in range(5, 60) for part in ("--shape", f"3,2,4,{H}")]
    command = [sys.executable, "-m", "fusedrnn", "tune", "--device", "cpu", "--dtype", "float32", "--out", str(path)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell without job control has what it puts into the background, and all its children, ignore the signal.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*command, *shapes], **streams, preexec_fn=heeding) as process:
        end = time.monotonic() + 120
        while time.monotonic() < end and not (path.exists() and '"cell"' in path.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = profile.load(path).measurements
    assert 1 <= len(kept) < 55
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "--resume goes on" in out
    assert out.count("float32") == len(kept)


def test_the_grid_has_each_key_once_and_both_modes():
    for keys in (grid.standard("cpu", ["float32", "bfloat16"]), grid.quick(["float32"])):
        assert len(set(keys)) == len(keys)
        assert {key._replace(train=True) for key in keys} == {key for key in keys if key.train}
        assert {key._replace(train=False) for key in keys} == {key for key in keys if not key.train}
    assert {key.kind[2:] for key in keys} <= {key.kind[2:] for key in grid.standard("cpu", ["float32"])}


# The table.


def test_many_measurements_are_told_in_groups_and_failures_one_by_one():
    keys = grid.standard("cpu", ["float32"])
    made = [Measurement(key, {"aten": 2.0, "cpu": 1.0}, {"cpu": Ratio(1.9, 2.0)}) for key in keys]
    made[0] = Measurement(keys[0], {"aten": 2.0, "cpu": 4.0}, {"cpu": Ratio(0.5, 0.5)})
    lost = Measurement(keys[0]._replace(B=7), failures={"cpu": "crashed"})
    lines = report.table([*made, lost])
    assert len(lines) < 60
    assert lines[-1] == f"fastest: cpu {len(keys) - 1}, torch's own 1"
    assert "FAILED cpu: T 64, B 7, I 128, H 128, float32, training: crashed; it is not used in float32 here" in lines


# tune(model).


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(4, 8, batch_first=True, bidirectional=True)
        self.second = fusedrnn.LSTMCell(16, 5)
        self.norm = nn.BatchNorm1d(4)
        self.unused = nn.LSTM(4, 9)

    def forward(self, x, hx=None):
        x = self.norm(x.flatten(0, 1)).view_as(x)
        y, _ = self.first(x, hx)
        return self.second(y[:, -1])[0]


def test_tune_measures_what_a_model_calls(cache, here):
    model = Model().train()
    mean = model.norm.running_mean.clone()
    tuning = fusedrnn.tune(model, torch.randn(2, 3, 4), seconds=0.0)
    keys = {m.key for m in tuning.measurements}
    layer, cell = Key("float32", True, 3, 2, 4, 8, 1, 2), Key("float32", True, 1, 2, 16, 5, step=True)
    assert keys == {key._replace(train=train) for key in (layer, cell) for train in (True, False)}
    assert model.training
    assert model.norm.training
    assert torch.equal(model.norm.running_mean, mean), "it ran in evaluation mode"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert str(tuning.path) in str(tuning)
    assert (
        "measured at T 3, B 2, I 4, H 8, both directions"
        in fusedrnn.explain(model.first, torch.randn(2, 3, 4)).measured
    )


def test_tune_takes_keywords_packed_input_one_mode_and_a_file(tmp_path, here):
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    lstm = nn.LSTM(4, 8)
    tuning = fusedrnn.tune(lstm, {"input": packed}, modes=["infer"], seconds=0.0, out=tmp_path / "p.json")
    assert [m.key for m in tuning.measurements] == [Key("float32", False, 3, 2, 4, 8, packed=True)]
    assert tuning.path == tmp_path / "p.json"
    again = fusedrnn.tune(lstm, packed, modes=["infer"], seconds=0.0, out=str(tmp_path / "p.json"))
    assert [m.key for m in again.measurements] == [m.key for m in tuning.measurements]


def test_a_program_writes_a_profile_and_goes_on_with_it(tmp_path, here):
    first = api.write_profile(tmp_path / "p.json", "cpu", [SMALL])
    second = api.write_profile(str(tmp_path / "p.json"), "cpu", [SMALL, OTHER])
    assert [m.key for m in first.measurements] == [SMALL]
    assert [m.key for m in second.measurements] == [OTHER]
    assert profile.load(tmp_path / "p.json").measurements.keys() == {SMALL, OTHER}
    assert api.write_profile(tmp_path / "p.json", "cpu", seconds=-1.0).measurements == []


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(4, 4), {}, ValueError, "no LSTM, GRU or RNN of the model"),
        (nn.LSTM(4, 4), {"modes": ["fast"]}, ValueError, "modes must be of"),
        (print, {}, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_tune_refuses(model, options, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.tune(model, torch.randn(3, 2, 4), **options)
