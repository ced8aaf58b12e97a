"""The whole models of the benchmark: the same training with and without fusedrnn, and what happens if it is not."""

import csv

import pytest
import torch
from fusedrnn.benchmarks import memory, models, results, run, timing, training
from fusedrnn.benchmarks.contender import BASELINE, OURS
from fusedrnn.benchmarks.training import Training
from torch import nn

import fusedrnn
from fusedrnn import cli, ops, testing

NAMES = ["character model", "word model", "tagger", "policy"]


@pytest.fixture(scope="module")
def tasks():
    return {task.name: task for task in models.tasks(16)}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(memory, "settle", lambda freed: "")  # the memory of this process is that of all tests
    monkeypatch.setattr(timing, "SAMPLE", 1e-4)
    monkeypatch.setattr(timing, "REST", 0.0)


def test_there_are_four(tasks):
    assert list(tasks) == NAMES


def test_sizes_are_those_of_the_goals():
    full = {task.name: task for task in models.tasks()}
    word = full["word model"].lstm
    assert (word.hidden_size, word.num_layers) == (650, 2)
    assert full["character model"].lstm.num_layers == 3
    assert full["tagger"].lstm.bidirectional
    assert full["policy"].acting.shape[:2] == (1, 1)


def test_weights_of_the_word_model_are_tied(tasks):
    model = tasks["word model"].build()
    shape = model.embedding.weight.shape
    assert [name for name, weight in model.named_parameters() if weight.shape == shape] == ["embedding.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_same_after_converting(tasks, name, place):
    """In float64, where two ways to compute differ by nothing that training could enlarge much."""
    task = tasks[name]
    expected = [step.step() for step in [Training(task, place.device, torch.float64)] for _ in range(4)]
    converted = Training(task, place.device, torch.float64, converted=True)
    assert not any(type(module) is nn.LSTM for module in converted.model.modules())
    if name == "policy" and place.backend == "aten":
        with pytest.raises(RuntimeError, match="no reset"):
            converted.step()
        return
    torch.testing.assert_close([converted.step() for _ in range(4)], expected, rtol=1e-9, atol=1e-9)
    assert expected[0] != expected[3]


def test_loss_falls(tasks):
    training = Training(tasks["character model"], "cpu")
    losses = [training.step() for _ in range(30)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_state_is_carried_and_its_history_cut(tasks):
    training = Training(tasks["character model"], "cpu")
    seen = []
    loss = training.model.loss
    training.model.loss = lambda batch, state: seen.append(state) or loss(batch, state)
    training.step()
    training.step()
    assert seen[0] is None
    assert seen[1][0].abs().sum() > 0
    assert not seen[1][0].requires_grad


def test_resets_separate_the_episodes_of_the_policy(tasks):
    """Stepped through time with its state, a policy says what it says of the whole sequence at once."""
    task = tasks["policy"]
    model = Training(task, "cpu", torch.float64).model
    seen, begins, *_ = training._moved(task.batches[1], "cpu", torch.float64)
    assert begins.any()
    with torch.no_grad():
        whole, _ = model(seen, begins)
        state, steps = None, []
        for t in range(len(seen)):
            y, state = model(seen[t : t + 1], begins[t : t + 1], state)
            steps.append(y)
        fused, _ = fusedrnn.convert(model)(seen, begins)
    torch.testing.assert_close(torch.cat(steps), whole)
    torch.testing.assert_close(fused, whole)


def test_rewards_are_for_naming_the_cue():
    for seen, begins, actions, rewards in models._episodes(20, 3, 2):
        cues = seen[:, :, 2:].argmax(-1)
        shown = begins & (seen[:, :, 2:].sum(-1) == 1)
        assert torch.equal(shown, begins)
        assert torch.equal(rewards[begins], (actions == cues)[begins].float())


def measure(task, backend, contenders):
    settings = run.Settings(rounds=2, budget=0.0)
    return training.measure(task, contenders, "cpu", timing.CpuClock(), settings, steps=3)


@pytest.fixture
def reference():
    from fusedrnn.benchmarks import contenders

    return contenders.entered(["reference"], [BASELINE])


def test_rows_of_a_model(tasks, quick, reference):
    rows, curves = measure(tasks["policy"], "reference", reference)
    assert [(row.contender, row.mode, row.status) for row in rows] == [
        (name, mode, "ok") for name in (BASELINE, OURS + "reference") for mode in ("train", "infer")
    ]
    for row in rows:
        assert row.unit_us > 0
        assert row.unit == "step"
    assert [curve.contender for curve in curves] == ["float64", BASELINE, OURS + "reference"]
    assert all(len(curve.losses) == 3 for curve in curves)
    rates = dict(zip(((r.contender, r.mode) for r in rows), (rate for _, rate in results.rates(rows)), strict=True))
    assert rates[BASELINE, "infer"].endswith(" steps per second")


def test_another_loss_curve_is_wrong_and_not_timed(tasks, quick, reference, monkeypatch):
    right = ops.forward_op("reference")

    def wrong(*arguments):
        y, *rest = right(*arguments)
        return y * (1 + 1e-3), *rest

    monkeypatch.setitem(ops._FORWARD, "reference", wrong)
    rows, _ = measure(tasks["tagger"], "reference", reference)
    theirs, ours = rows
    assert theirs.status == "ok"
    assert ours.status == "wrong"
    assert ours.excess > 1
    assert ours.median_ms is None


def test_a_model_that_fails_is_a_row(tasks, quick, reference, monkeypatch):
    monkeypatch.setitem(ops._FORWARD, "reference", lambda *_: torch.empty(2**50))
    (theirs, ours), _ = measure(tasks["tagger"], "reference", reference)
    assert theirs.status == "ok"
    assert ours.status == "out of memory"


def test_rounding_allows_what_float32_explains_and_little_more(tasks):
    task = tasks["character model"]
    exact, moved = (training._losses(Training(task, "cpu", torch.float64, nudge=k), 6) for k in (0, 1))
    change = float((moved - exact).abs().max())
    assert 0 < change < 1e-3
    baseline = training._losses(Training(task, "cpu"), 6)
    assert testing.excess(baseline, baseline, exact, change) < 1
    assert testing.excess(baseline + 1e-4, baseline, exact, change) > 1


def test_losses_are_written(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "tasks", lambda shrink, all=models.tasks: all(16)[2:3])
    arguments = ["--suite", "models", "--backend", "reference", "--baseline", BASELINE, "--steps", "2", "--rounds", "2"]
    assert cli.main(["bench", *arguments, "--out", str(tmp_path)]) == 0
    with (tmp_path / "losses.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["model"], line["step"]) for line in lines} == {("tagger", "1"), ("tagger", "2")}
    assert (tmp_path / "losses.png").is_file()
    assert "words per second" in (tmp_path / "report.md").read_text()
