"""python -m fusedrnn bench plans and predict: which plans are tried, how they are judged, and what models predict."""

import dataclasses
import importlib.util
import json
import os
import time

import pytest
import torch
from fusedrnn.benchmarks import plans, predict, provenance, results
from fusedrnn.benchmarks.contender import OURS
from fusedrnn.benchmarks.results import Row
from fusedrnn.kernels import plan as planner
from fusedrnn.kernels.plan import H200, Shape

import fusedrnn
from fusedrnn import cli, cuda_plan, ops

needs_cpu = pytest.mark.skipif(fusedrnn.backends()["cpu"] is not None, reason="the cpu backend is not available")


# ------------------------------------------------------------------------------------------------ plans


def test_each_plan_is_tried_once_and_its_prediction_is_no_part_of_it(monkeypatch):
    """A backend with two plans of a cell, for small and for large H, that predicts another time for every problem."""

    def plan(problem):
        return f"{'narrow' if problem.H < 512 else 'wide'}, 4 KiB, {problem.H / 100:.2f} us a step predicted"

    monkeypatch.setitem(fusedrnn.dispatch.TABLE, "reference", fusedrnn.dispatch.TABLE["reference"]._replace(plan=plan))
    found = plans.trials("reference", "cpu")
    assert sorted((trial.cell.case.cell, trial.cell.dtype, trial.plan) for trial in found) == [
        (cell, dtype, f"{width}, 4 KiB")
        for cell in ("gru", "lstm", "rnn_tanh")
        for dtype in ("bfloat16", "float32")
        for width in ("narrow", "wide")
    ]
    assert {trial.cell.mode for trial in found} == {"train"}


@needs_cpu
def test_plans_are_tried_recorded_and_not_repeated(tmp_path, capsys, monkeypatch):
    arguments = ["bench", "plans", "--backend", "cpu", "--device", "cpu", "--shrink", "32", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--limit", "3"]) == 0
    rows, _ = results.read(tmp_path / "results.csv")
    assert [row.status for row in rows] == ["ok"] * len(rows)
    assert len(rows) >= 2
    assert all(row.contender == f"{OURS}cpu" and row.ran and row.excess is not None for row in rows)
    monkeypatch.setattr(plans, "attempt", lambda trial: pytest.fail(f"{trial} was tried before"))
    assert cli.main([*arguments, "--limit", "3"]) == 0
    assert f"{len(rows)} passed, 0 failed, 0 without an outcome" in capsys.readouterr().out
    assert cli.main([*arguments, "--limit", "3", "--json"]) == 0
    assert [plan["case"] for plan in json.loads(capsys.readouterr().out)["plans"]] == [row.case for row in rows]


@needs_cpu
def test_a_plan_that_is_wrong_or_fails_is_named(tmp_path, capsys, monkeypatch):
    right, calls = ops.forward_op("cpu"), []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            y, *rest = right(*arguments)
            return y * 1.5, *rest
        raise RuntimeError("CUDA error: the reason")

    monkeypatch.setitem(ops._FORWARD, "cpu", broken)
    arguments = ["--backend", "cpu", "--device", "cpu", "--shrink", "32", "--limit", "2", "--out", str(tmp_path)]
    assert cli.main(["bench", "plans", *arguments]) == 1
    wrong, failed, *_ = results.read(tmp_path / "results.csv")[0]
    assert (wrong.status, failed.status) == ("wrong", "failed")
    assert "y: error" in wrong.reason
    assert failed.reason == "RuntimeError: CUDA error: the reason"


@needs_cpu
def test_processes_share_the_trials():
    todo = plans.trials("cpu", "cpu", shrink=64)[:3]
    outcomes = {trial.key: row for trial, row in plans.run(todo, jobs=2)}
    assert outcomes.keys() == {trial.key for trial in todo}
    assert {row.status for row in outcomes.values()} == {"ok"}


class Calls:
    """What a process calls when a trial with it arrives there."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@needs_cpu
def test_a_process_that_dies_or_hangs_takes_no_other_trial_with_it():
    """Another has those that follow, and the trial that did not end has failed."""
    some = plans.trials("cpu", "cpu", shrink=64)[0]
    calls = {"dies": Calls(os._exit, 7), "computes": None, "hangs": Calls(time.sleep, 600), "computes too": None}
    todo = [dataclasses.replace(some, plan=name, forced=call) for name, call in calls.items()]
    rows = {trial.plan: row for trial, row in plans.run(todo, jobs=2, seconds=40.0)}
    assert {name: row.status for name, row in rows.items()} == {
        name: "ok" if call is None else "failed" for name, call in calls.items()
    }
    assert rows["dies"].reason == "its process ended with status 7"
    assert rows["hangs"].reason == "it did not end within 40 s"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and no interpreter")
def test_plans_that_are_not_chosen_are_forced(monkeypatch):
    """In Triton's interpreter: what is launched is the plan of the trial, and every kernel comes once."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from fusedrnn.kernels import launch

    launched, right = {}, launch._launch

    def spy(kernel, plan, *arguments):
        launched[kernel] = plan
        return right(kernel, plan, *arguments)

    monkeypatch.setattr(launch, "_launch", spy)
    found = plans.trials("triton", "cpu", shrink=64)
    forced = [trial for trial in found if trial.forced]
    assert len(forced) > len(found) - len(forced) > 0
    kernels = [(t.cell.dtype, t.cell.variant != "plain", *t.forced[0].constants("forward").items()) for t in forced]
    assert len(set(kernels)) > 4
    smallest = min(forced, key=lambda trial: trial.cell.case.B * trial.cell.case.H)
    row = plans.attempt(smallest)
    assert (row.status, row.reason) == ("ok", "")
    assert launched == {"forward": smallest.forced[0], "backward": smallest.forced[1]}
    plans.attempt(next(trial for trial in found if not trial.forced))
    assert launched["forward"] != smallest.forced[0]


# ------------------------------------------------------------------------------------------------ predictions


def row(contender="triton", mode="infer", median_ms=1.0, **more):
    sizes = {"T": 128, "B": 16, "I": 512, "H": 512, "L": 1, "D": 1, **more}
    names = {"case": "a case", "device": "cuda", "dtype": "bfloat16", "variant": "plain"}
    return Row("gpu", OURS + contender, mode=mode, median_ms=median_ms, **{**names, **sizes})


def test_a_prediction_is_the_launches_of_all_layers():
    forward, backward = (
        planner.plan(k, Shape(128, 16, 512, 512, 512, 1, 2, "ieee"), H200) for k in ("forward", "backward")
    )
    infer, train = row(median_ms=2 * forward.launch / 1e3), row(mode="train", median_ms=forward.launch / 4e3)
    (first, second) = predict.predictions([infer, train], H200)
    assert first.row is train, "the farthest from its model comes first"
    assert first.predicted_us == forward.launch + backward.launch
    assert (second.predicted_us, second.ratio) == (forward.launch, pytest.approx(2))
    assert second.regime == forward.regime

    layers = row(L=2, D=2, B=32, dtype="tf32", variant="lengths")
    above = [planner.plan("forward", Shape(128, 32, I, 512, 512, 2, 4, "tf32", True), H200) for I in (512, 1024)]
    (stacked,) = predict.predictions([layers], H200)
    assert stacked.predicted_us == sum(plan.launch for plan in above)


def test_each_backend_has_its_own_model():
    shape = Shape(128, 16, 512, 512, 512, 1, 2, "ieee")
    found = {one.row.contender: one for one in predict.predictions([row("triton"), row("cuda")], H200)}
    for name, model in (("triton", planner), ("cuda", cuda_plan)):
        plan = model.plan("forward", shape, H200)
        assert (found[OURS + name].predicted_us, found[OURS + name].regime) == (plan.launch, plan.regime)


def test_rows_without_a_time_or_a_model_have_no_prediction():
    rows = [row(median_ms=None), row("cpu"), Row("gpu", "nn.LSTM", median_ms=1.0)]
    assert predict.predictions(rows, H200) == []
    assert predict.without_model(rows) == ["cpu"]


def test_command_writes_predictions_next_to_the_results(tmp_path, capsys):
    path = tmp_path / "results.csv"
    writer = results.Writer(path, {"gpu": "NVIDIA H200"})
    writer.write([row(), row(mode="train", median_ms=3.0)])
    writer.close()
    assert cli.main(["bench", "predict", str(path)]) == 0
    assert "2 predictions" in capsys.readouterr().out
    assert cli.main(["bench", "predict", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], len(found["predictions"]), found["without_model"]) == ("NVIDIA H200", 2, [])
    text = (tmp_path / "predictions.md").read_text()
    assert "NVIDIA H200" in text
    assert text.count("| a case |") == 2
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 3
    path.write_text(path.read_text().replace("NVIDIA H200", "Another"))
    with pytest.raises(SystemExit):
        cli.main(["bench", "predict", str(path)])
    assert "does not know the device 'Another'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ provenance


def test_a_copy_without_history_knows_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.h").write_text("int a;")
    assert provenance._checkout() == ("", "")
    with pytest.raises(RuntimeError, match="not a checkout"):
        provenance.remember()
    monkeypatch.setattr(provenance, "_from_git", lambda: ("abc", "no"))
    note = provenance.remember()
    assert json.loads(note.read_text())["commit"] == "abc"
    monkeypatch.setattr(provenance, "_from_git", lambda: ("", ""))
    assert provenance._checkout() == ("abc", "no")
    (tmp_path / "csrc" / "a.h").write_text("int b;")
    assert provenance._checkout() == ("abc", "yes")
