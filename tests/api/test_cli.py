"""python -m fusedrnn: what it prints, what it finds, and the status it exits with."""

import json
import subprocess
import sys

import pytest
import torch

import fusedrnn
from fusedrnn import check, cli, dispatch, ops
from fusedrnn.cells import CELLS


@pytest.fixture
def small(monkeypatch):
    """Two options of one cell at one size are enough to see what becomes of an outcome."""
    monkeypatch.setattr(check, "CELLS", ("lstm",))
    monkeypatch.setattr(check, "_OPTIONS", ({}, {"lengths": True}))
    monkeypatch.setattr(check, "_VARIANTS", ())
    monkeypatch.setattr(check, "_QUICK_SIZES", ((7, 3, 5, 33),))


def without(monkeypatch, name, **reasons):
    """Gives a backend reasons not to be available or not to support a problem."""
    functions = {key: lambda *_, reason=reason: reason for key, reason in reasons.items()}
    monkeypatch.setitem(dispatch.TABLE, name, dispatch.TABLE[name]._replace(**functions))


def rows(out):
    """The table as {(check, dtype, backend): (passed, failed, n/a)}."""
    table = [line.split() for line in out.splitlines() if " cpu " in line and len(line.split()) == 8]
    return {(row[0], row[1], row[2]): tuple(map(int, row[4:7])) for row in table}


# ------------------------------------------------------------------------------------------------ the commands


def test_no_command_prints_help():
    done = subprocess.run([sys.executable, "-m", "fusedrnn"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "info" in done.stdout
    assert "check" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"fusedrnn {fusedrnn.__version__}\n"


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["frobnicate"])
    assert exit.value.code == 2


# ------------------------------------------------------------------------------------------------ info


def test_info(capsys, monkeypatch):
    without(monkeypatch, "cuda", unavailable="there is a reason")
    monkeypatch.setenv("FUSEDRNN_BACKEND", "reference")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out.split("\nbuild")[0]  # which names libraries as well
    lines = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[-1] for line in text.splitlines()}
    assert lines["fusedrnn"] == fusedrnn.__version__
    assert lines["torch"]
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["cuda"] == "there is a reason"
    assert lines["reference"] == "available"
    assert lines["FUSEDRNN_BACKEND"] == "reference"


@pytest.mark.parametrize("command", ["info", "check", "tune", "bench", "bench compare"])
def test_what_a_command_finds_can_be_had_as_json(capsys, command):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command.split(), "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "\033" not in out  # no colours where there is no terminal


def test_info_json(capsys, monkeypatch):
    monkeypatch.delenv("FUSEDRNN_BACKEND", raising=False)
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["CUDA"] == torch.version.cuda
    assert list(facts["backends"]) == list(fusedrnn.backends())
    assert facts["build"] == ops.build_info()
    assert facts["FUSEDRNN_BACKEND"] is None
    assert (facts["instruction set"] is None) == (ops.cpu_unavailable is not None)


# ------------------------------------------------------------------------------------------------ check


@pytest.mark.slow
def test_quick_check_of_the_reference_passes(capsys, monkeypatch):
    """Of each check, dtype and cell one job, of derivatives two: together they take long."""
    groups = {}
    for job in check.jobs(["cpu"], quick=True):
        groups.setdefault((job.check, job.case.dtype, job.case.cell), []).append(job)
    monkeypatch.setattr(
        check,
        "jobs",
        lambda devices, quick: [job for jobs in groups.values() for job in jobs[: 1 + ("grad" in jobs[0].check)]],
    )
    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert set(rows(out)) == {
        ("gradcheck", "float64", "reference"),
        ("gradgradcheck", "float64", "reference"),
        *(
            (f"nn.{name}", dtype, "reference")
            for name in ("LSTM", "GRU", "RNN")
            for dtype in ("float64", "float32", "bfloat16", "float16")
        ),
    }
    assert all(passed > 0 and failed == skipped == 0 for passed, failed, skipped in rows(out).values())
    assert "not checked: aten: it was not asked for" in out
    assert err == ""


@pytest.mark.parametrize("quick", [True, False])
def test_every_cell_is_checked(quick):
    """In every dtype, and both derivatives; in full in every form as well."""
    jobs = check.jobs(["cpu"], quick)
    for cell in CELLS:
        own = [job for job in jobs if job.case.cell == cell]
        assert {job.check for job in own} >= {"gradcheck", "gradgradcheck", "reference"}
        assert {job.case.dtype for job in own} == set(check.DTYPES)
        assert any(job.case.lengths and job.case.reset and job.case.states for job in own)
        assert any(job.case.packed for job in own)
    variants = [job for job in jobs if job.case.variant]
    assert {job.check for job in variants} == {"gradcheck", "gradgradcheck", "reference"}
    options = {name for job in variants for name, _ in job.case.variant}
    assert options >= {"peephole", "coupled", "zoneout", "recurrent_dropout"}
    assert quick or "recurrent_dropout_mode" in options
    assert quick or len(jobs) > 3 * len(check.jobs(["cpu"], quick=True))


def test_check_of_all_backends(capsys, small):
    assert cli.main(["check", "--quick", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    available = {name for name, reason in fusedrnn.backends().items() if reason is None}
    assert {backend for _, _, backend in rows(out)} == available
    for name, reason in fusedrnn.backends().items():
        assert reason is None or f"not checked: {name}: {reason}" in out


def test_a_gradient_that_is_off_fails_and_is_named(capsys, small, monkeypatch):
    right = ops.backward_op("reference")

    def wrong(*arguments):
        dx, *rest = right(*arguments)
        return dx * (1 + 1e-3), *rest

    monkeypatch.setitem(ops._BACKWARD, "reference", wrong)
    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED gradcheck on reference, cpu: T3-B3-I2-H2-float64\n" in out
    assert "inputs are x, h0, c0, weight_ih_l0" in out
    assert "FAILED nn.LSTM on reference, cpu: T7-B3-I5-H33-lengths-float32\n  dx: error " in out
    assert "dh0: error" not in out
    assert rows(out)["nn.LSTM", "float32", "reference"] == (0, 2, 0)
    assert rows(out)["nn.LSTM", "bfloat16", "reference"] == (2, 0, 0), "there it is less than what rounding is worth"


def test_a_second_derivative_that_is_off_fails(capsys, small, monkeypatch):
    right = fusedrnn.autograd.LayerBackwardFunction.backward

    def wrong(ctx, *ddgrads):
        return tuple(None if grad is None else grad * (1 + 1e-3) for grad in right(ctx, *ddgrads))

    monkeypatch.setattr(fusedrnn.autograd.LayerBackwardFunction, "backward", staticmethod(wrong))
    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert rows(out)["gradcheck", "float64", "reference"] == (2, 0, 0)
    assert rows(out)["gradgradcheck", "float64", "reference"] == (0, 2, 0)


def test_a_backend_that_raises_fails(capsys, small, monkeypatch):
    def broken(*_):
        raise AssertionError

    monkeypatch.setitem(ops._FORWARD, "reference", broken)
    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu"]) == 1
    assert all(passed == 0 and failed == 2 for passed, failed, _ in rows(capsys.readouterr().out).values())


def test_an_unwritten_buffer_fails(capsys, small, monkeypatch):
    right = ops.forward_op("reference")

    def wrong(*arguments):
        y, *rest = right(*arguments)
        return torch.cat([y[:1], torch.empty_like(y[1:])]), *rest

    monkeypatch.setitem(ops._FORWARD, "reference", wrong)
    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu"]) == 1
    assert "y: error inf" in capsys.readouterr().out


def test_what_torch_cannot_do_is_neither_passed_nor_failed(capsys, small, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("there is no second derivative")

    monkeypatch.setattr(check, "gradgradcheck", refuse)
    assert cli.main(["check", "--quick", "--backend", "aten", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert rows(out)["gradcheck", "float64", "aten"] == (1, 0, 1)
    assert rows(out)["gradgradcheck", "float64", "aten"] == (0, 0, 2)
    assert "n/a: 6 on aten, cpu: torch's own LSTM has no lengths" in out
    assert "n/a: 1 on aten, cpu: torch's own LSTM fails here as well: NotImplementedError: there is no second" in out

    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu"]) == 1
    assert rows(capsys.readouterr().out)["gradgradcheck", "float64", "reference"] == (0, 2, 0)


def test_check_without_tqdm(capsys, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["check", "--quick", "--backend", "aten", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("name", "reasons", "message"),
    [
        ("warp", {}, "unknown backend 'warp': expected one of cuda, triton, cpu, aten, reference"),
        ("triton", {"unavailable": "the reason"}, "backend 'triton' is not available: the reason"),
        (
            "aten",
            {"unsupported": "the reason"},
            "backend 'aten' cannot be checked here: the reason",
        ),
    ],
)
def test_a_backend_that_was_asked_for_is_never_left_out(capsys, monkeypatch, name, reasons, message):
    if reasons:
        without(monkeypatch, name, **reasons)
    with pytest.raises(SystemExit) as exit:
        cli.main(["check", "--quick", "--backend", name, "--backend", "reference"])
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_backend_that_runs_only_where_it_is_asked_for_is_checked(capsys, small, monkeypatch):
    def unless_forced(_):
        return None if dispatch.forced() == "reference" else "it has to be asked for"

    monkeypatch.setitem(dispatch.TABLE, "reference", dispatch.TABLE["reference"]._replace(unsupported=unless_forced))
    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu", "--limit", "2"]) == 0
    assert all(passed and not skipped for passed, _, skipped in rows(capsys.readouterr().out).values())


def test_backend_more_than_once(capsys, small):
    arguments = ["--backend", "aten", "--backend", "reference", "--backend", "aten"]
    assert cli.main(["check", "--quick", "--device", "cpu", *arguments]) == 0
    assert rows(capsys.readouterr().out)["nn.LSTM", "float32", "aten"] == (1, 0, 1)


def test_outcomes_are_recorded_as_they_come(capsys, small, tmp_path, monkeypatch):
    """Those before an interruption are there, and what a run before left stays."""
    path, right, calls = tmp_path / "outcomes.jsonl", check.run, []

    def interrupted(job, backends):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(job, backends)

    monkeypatch.setattr(check, "run", interrupted)
    arguments = ["check", "--quick", "--backend", "reference", "--device", "cpu", "--record", str(path)]
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["check"], line["backend"], line["failure"]) for line in lines] == [
        (job.check, "reference", None) for job in calls[:2]
    ]
    assert cli.main([*arguments, "--limit", "1"]) == 0
    assert len(path.read_text().splitlines()) == 3


def test_check_as_json(capsys, small):
    arguments = ["check", "--quick", "--backend", "reference", "--backend", "aten", "--device", "cpu", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nothing_checked_on"] == []
    assert {outcome["backend"] for outcome in found["outcomes"]} == {"aten", "reference"}
    assert all(outcome["failure"] is None for outcome in found["outcomes"])


def test_a_reader_that_has_ended():
    """As of `python -m fusedrnn info | head -1`: no trace of Python's, and the status of a shell."""
    command = [sys.executable, "-m", "fusedrnn", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_limit_takes_jobs_that_can_run(capsys, small, monkeypatch):
    def not_float64(problem):
        return "it has no float64" if problem.dtype == torch.float64 else None

    monkeypatch.setitem(dispatch.TABLE, "reference", dispatch.TABLE["reference"]._replace(unsupported=not_float64))
    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu", "--limit", "3"]) == 0
    found = rows(capsys.readouterr().out)
    assert sum(passed for passed, _, _ in found.values()) == 3
    assert all(key[1] != "float64" and skipped == 0 for key, (_, _, skipped) in found.items())


@pytest.mark.parametrize("limit", [[], ["--limit", "2"]])
def test_a_check_that_checked_nothing_fails(capsys, small, monkeypatch, limit):
    """The backend computes some problem, so it may be asked for, but none of those there are."""

    def tiny_only(problem):
        return "it is too large" if problem.H > 1 else None

    monkeypatch.setitem(dispatch.TABLE, "reference", dispatch.TABLE["reference"]._replace(unsupported=tiny_only))
    arguments = ["check", "--quick", "--device", "cpu", "--backend", "reference", *limit]
    assert cli.main(arguments) == 1
    assert "FAILED: nothing was checked on reference" in capsys.readouterr().out
    assert cli.main([*arguments, "--backend", "aten"]) == 1  # that another was is no excuse
    out = capsys.readouterr().out
    assert "FAILED: nothing was checked on reference" in out
    assert "nothing was checked on aten" not in out


def test_a_limit_takes_jobs_from_everywhere(capsys):
    assert cli.main(["check", "--quick", "--backend", "reference", "--device", "cpu", "--limit", "8"]) == 0
    found = rows(capsys.readouterr().out)
    assert sum(passed for passed, _, _ in found.values()) <= 8
    assert {key[0] for key in found} >= {"gradcheck", "nn.LSTM"}
    assert {key[1] for key in found} >= {"float64", "float32"}
    jobs = check.jobs(["cpu"], quick=True)
    assert sorted(map(jobs.index, cli._spread(jobs))) == list(range(len(jobs)))
    for wrong in ("0", "x"):
        with pytest.raises(SystemExit):
            cli.main(["check", "--limit", wrong])
        assert f"argument --limit: must be a whole number from 1, got '{wrong}'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["check", "--quick", "--backend", "reference", "--record", "nowhere/file"])
    assert "argument --record: nowhere/file" in capsys.readouterr().err
