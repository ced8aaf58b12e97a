"""python -m fusedrnn bench gpu: parts in order and in time, what is kept when it is cut off, and a dry run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
from fusedrnn.benchmarks import session
from fusedrnn.benchmarks.session import Outcome, Part, Session

from fusedrnn import cli


def python(name, code, seconds=20.0, **options):
    return Part(name, f"what {name} does", seconds, ("-c", code), **options)


def statuses(made):
    return {name: outcome.status for name, outcome in made.outcomes.items()}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(session, "_LEAST", 0.1)
    monkeypatch.setattr(session, "_GRACE", 2.0)
    monkeypatch.setattr(session, "_RESERVE", 1.0)


@pytest.fixture(autouse=True)
def interruptible():
    """A shell ignores SIGINT in what it starts in the background, and what that starts inherits it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_every_part_has_an_outcome_and_a_log(tmp_path, capsys):
    todo = [
        python("good", "print('measured')"),
        python("bad", "import sys; print('some'); sys.exit('the reason')"),
        python("absent", "", skip="it is not installed"),
        python("closing", "print('closed')", last=True),
        python("after", "", last=True, needs=tmp_path / "grid" / "results.csv"),
    ]
    made = Session(tmp_path, todo, dry=True)
    made.run(60)
    assert statuses(made) == {
        "good": "passed",
        "bad": "failed",
        "absent": "skipped",
        "closing": "passed",
        "after": "skipped",
    }
    assert [outcome.name for outcome in made.failed] == ["bad"]
    assert made.outcomes["bad"].reason == "exit status 1: the reason"
    assert made.outcomes["absent"].reason == "it is not installed"
    assert made.outcomes["after"].reason == "there is no grid/results.csv"
    assert "measured" in (tmp_path / "logs" / "good.log").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert "| bad | what bad does | failed |" in summary
    assert "its numbers mean nothing" in summary
    assert session.read(tmp_path) == (list(made.outcomes.values()), True)


WRITES_AND_HANGS = """
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path({folder!r})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "child").write_text(str(child.pid))
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(600)
"""


def test_a_part_that_overruns_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_GRACE", 0.3)
    todo = [python("slow", WRITES_AND_HANGS.format(folder=str(tmp_path)), 3.0), python("next", "")]
    made = Session(tmp_path, todo, dry=True)
    begin = time.monotonic()
    made.run(5.0)
    assert time.monotonic() - begin < 300  # where the child sleeps 600, on a machine that may be busy
    assert statuses(made)["slow"] == "timed out"
    assert made.outcomes["slow"].reason.startswith("it was ended after ")
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # it is somebody else's to bury
        if not os.path.exists(f"/proc/{child}") or " Z " in open(f"/proc/{child}/stat").read():  # noqa: SIM115
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of the part still runs")


def test_a_part_is_asked_to_end_before_it_is_made_to(tmp_path):
    code = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('kept')"
    made = Session(tmp_path, [python("polite", code, 4.0)], dry=True)  # by when it has begun to sleep
    made.run(4.5)
    assert statuses(made) == {"polite": "timed out"}
    assert "kept" in (tmp_path / "logs" / "polite.log").read_text()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="it takes process_group of subprocess")
def test_a_part_is_ended_with_a_killed_session_by_what_ends_its_session(tmp_path):
    """So it is in the process session of the one that runs it, and yet a group of its own."""
    made = Session(tmp_path, [python("one", "import os; print(os.getsid(0), os.getpgid(0) == os.getpid())")], dry=True)
    made.run(60)
    assert (tmp_path / "logs" / "one.log").read_text().splitlines()[-1] == f"{os.getsid(0)} True"


def test_what_there_is_no_time_for_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_LEAST", 30.0)  # and a second more for the last part, to start Python in
    made = Session(tmp_path, [python("first", ""), python("last", "print(1)", last=True)], dry=True)
    made.run(0.0)
    assert statuses(made) == {"first": "not reached", "last": "passed"}
    assert made.outcomes["first"].reason == "there was no time left for it"
    assert [outcome.name for outcome in made.unfinished] == ["first"]


COUNTS = (
    "import pathlib; p = pathlib.Path({path!r}); p.write_text(p.read_text() + '{name} ' if p.exists() else '{name} ')"
)


def counting(tmp_path, name, more="", seconds=20.0, **options):
    code = COUNTS.format(path=str(tmp_path / "order"), name=name) + "\n" + more
    return python(name, code, seconds, **options)


def test_a_session_goes_on_with_what_was_not_begun_and_then_with_what_did_not_end(tmp_path):
    before = [
        Outcome("done", "passed", times=1),
        Outcome("slow", "timed out", times=1),
        Outcome("wrong", "failed", times=1),
        Outcome("cut", "running", times=1),
    ]
    names = ["done", "slow", "wrong", "cut", "new"]
    made = Session(tmp_path, [counting(tmp_path, name) for name in names], True, before)
    assert statuses(made)["cut"] == "cut off"
    made.run(60)
    assert (tmp_path / "order").read_text().split() == ["new", "slow", "cut"]
    assert statuses(made) == {name: "failed" if name == "wrong" else "passed" for name in names}
    assert made.outcomes["slow"].times == 2


def test_a_part_that_is_asked_for_is_done_again(tmp_path):
    before = [Outcome("one", "passed", times=1), Outcome("two", "passed", times=1)]
    made = Session(tmp_path, [counting(tmp_path, name) for name in ("one", "two")], True, before)
    made.run(60, only=["two"])
    assert (tmp_path / "order").read_text().split() == ["two"]


def test_time_that_is_left_goes_to_what_did_not_end(tmp_path):
    """It sleeps at the first time, and ends at the second."""
    waits = f"import time\nif open({str(tmp_path / 'order')!r}).read().count('slow') == 1: time.sleep(600)"
    todo = [counting(tmp_path, "slow", waits, 2.0), counting(tmp_path, "quick")]
    made = Session(tmp_path, todo, dry=True)
    made.run(40)
    assert (tmp_path / "order").read_text().split() == ["slow", "quick", "slow"]
    assert statuses(made) == {"slow": "passed", "quick": "passed"}


HARD_KILL = """
import pathlib, sys
from fusedrnn.benchmarks.session import Part, Session
folder = pathlib.Path(sys.argv[1])
todo = [Part("one", "", 60, ("-c", "print(1)")), Part("two", "", 60, ("-c", "import time; time.sleep(20)"))]
Session(folder, todo, True).run(100)
"""


def test_a_session_that_is_killed_leaves_what_it_knew(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HARD_KILL, str(tmp_path)], stdout=subprocess.DEVNULL) as process:
        for _ in range(600):
            digest = tmp_path / "digest.txt"  # the last that is written
            if digest.is_file() and "running: two" in digest.read_text():
                break
            time.sleep(0.1)
        process.kill()
    assert {outcome.name: outcome.status for outcome in session.read(tmp_path)[0]} == {
        "one": "passed",
        "two": "running",
    }
    assert "| one |" in (tmp_path / "summary.md").read_text()
    assert "running: two" in digest.read_text()


def test_an_interrupted_session_says_so(tmp_path):
    """By SIGINT or SIGTERM: the part is ended, the closing ones are done."""
    code = f"import os, signal, time\nos.kill({os.getpid()}, signal.SIGINT)\ntime.sleep(600)"
    made = Session(tmp_path, [python("one", code), python("two", ""), python("end", "", last=True)], dry=True)
    with pytest.raises(KeyboardInterrupt):
        made.run(100)
    assert statuses(made) == {"one": "cut off", "two": "not reached", "end": "passed"}


# ------------------------------------------------------------------------------------------------ the command


def gpu(*arguments):
    before = signal.getsignal(signal.SIGTERM)
    try:
        return cli.main(["bench", "gpu", *map(str, arguments)])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_parts_stand_in_order_of_importance(capsys):
    assert gpu("--list") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    wanted = ["info", "torch", "exchange-cuda-grid", "exchange-cuda-cluster", "exchange-cuda-chunked", "micro"]
    wanted += ["steps-cuda"]
    wanted += ["plans-cuda", "ncu-cuda", "racecheck-cuda", "check-cuda", "grid", "predictions", "profile"]
    wanted += ["plans-triton", "racecheck-triton", "check-triton", "steps-triton", "grid-triton", "tests-gpu", "report"]
    assert [name for name in names if name in wanted] == wanted
    assert gpu("--list", "--json") == 0
    assert [part["name"] for part in json.loads(capsys.readouterr().out)["parts"]] == names
    assert {f"{tool}-{name}" for tool in ("memcheck", "racecheck", "synccheck") for name in ("cuda", "triton")} <= set(
        names
    )


def test_there_is_time_for_the_smoke_test_and_for_all_up_to_the_grid(tmp_path, monkeypatch):
    monkeypatch.undo()  # of the short waits
    found = session.parts(tmp_path, dry=False)
    first = [part for part in found if part.smoke]
    assert found[: len(first)] == first
    assert sum(part.seconds for part in first) <= 200 - session._LEAST
    grid = [part.name for part in found].index("grid")
    assert sum(part.seconds for part in found[: grid + 1]) <= 540 - session._RESERVE - session._LEAST


def test_the_debug_build_is_what_exchanges_are_tried_with(tmp_path, monkeypatch):
    library = tmp_path / "_cuda.abi3.so"
    library.touch()
    monkeypatch.setattr(session, "DEBUG", library)
    tried = {part.name: part for part in session.parts(tmp_path, dry=False)}
    assert tried["exchange-cuda-cluster"].environment["FUSEDRNN_CUDA_LIBRARY"] == str(library)
    assert tried["exchange-cuda-cluster"].environment["CUDA_LAUNCH_BLOCKING"] == "1"
    assert "FUSEDRNN_CUDA_LIBRARY" not in tried["plans-cuda"].environment


def test_what_triton_compiles_takes_no_time_from_the_cuda_kernels(tmp_path):
    tried = {part.name: part.command for part in session.parts(tmp_path, dry=False)}
    assert "triton" not in tried["steps-cuda"] + tried["grid"]
    assert "triton" in tried["steps-triton"]
    assert tried["grid-triton"][tried["grid-triton"].index("--backend") + 1] == "triton"


def test_a_tensor_has_an_allocation_of_its_own_under_the_sanitizers(tmp_path):
    watched = [part for part in session.parts(tmp_path, dry=False) if part.name.startswith(("memcheck", "racecheck"))]
    assert {part.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] for part in watched} == {"1"}


def test_the_profiler_knows_the_names_of_the_kernels(tmp_path):
    wanted = {part.name: part.command for part in session.parts(tmp_path, dry=False) if part.name.startswith("ncu")}
    regex = re.compile(wanted["ncu-cuda"][wanted["ncu-cuda"].index("--kernel-name") + 1].removeprefix("regex:"))
    launched = {"csrc/cuda/instances/instances.cuh": r"^__global__.* (\w+)\("}
    launched |= {f"kernels/{name}.py": r"^@triton.jit\(do_not.*\ndef (\w+)" for name in ("forward", "backward")}
    for path, pattern in launched.items():
        (name,) = re.findall(pattern, (session.ROOT / path).read_text(), re.MULTILINE)
        assert regex.fullmatch(name), name
    assert wanted["ncu-triton"][:-1] == wanted["ncu-cuda"][:-1]


def test_a_program_that_does_not_start_is_a_failed_part(tmp_path):
    tool = tmp_path / "ncu"
    tool.write_text("no program")
    made = Session(tmp_path, [Part("looking", "", 20.0, (str(tool),)), python("next", "")], dry=True)
    made.run(60)
    assert statuses(made) == {"looking": "failed", "next": "passed"}
    assert made.outcomes["looking"].reason.startswith("it was not started: ")


def test_the_digest_tells_failures_first_and_fits(tmp_path):
    hangs = "print('FAILED lstm, grid of 64')\nprint('Exception in aoti_torch: CUDA', 'error: it trapped')\n"
    hangs += "for k in range(2000): print('block 3 waits for the flags of the group', k)\nraise SystemExit(1)"
    todo = [python("good", ""), *(python(f"bad-{k}", hangs) for k in range(12)), python("absent", "", skip="no GPU")]
    made = Session(tmp_path, todo, dry=True)
    made.run(100)
    (tmp_path / "smoke").mkdir()
    ours = {"call": [2.0, 4.0], "launch": [1.5, 3.5], "predicted": [1.2, 2.0], "plans": ["1 x 8", "1 x 16"]}
    row = {"H": 512, "B": 16}
    theirs = {"float16": {"call": [2.1, 3.1]}, "bfloat16": {"call": [9.0, 9.9]}}
    rows = {"nn.LSTM": theirs}, {"cuda": ours}, {"cuda": {"error": "RuntimeError: trapped"}}
    lines = [json.dumps({**row, **more}) for more in rows]
    (tmp_path / "smoke" / "steps.jsonl").write_text("\n".join([*lines, '{"H": 51']))
    digest = made.digest()
    assert digest.startswith("FAILED bad-0: exit status 1: FAILED lstm, grid of 64")
    assert len(digest) <= session.DIGEST
    assert "    Exception in aoti_torch: CUDA error: it trapped" in digest
    assert "passed: good" in digest
    assert (
        " 512  16 cuda       1.50    1.20    2.00    2.10    9.00 |    3.50    2.00    4.00    3.10    9.90" in digest
    )
    assert "FAILED RuntimeError: trapped" in digest


def test_of_a_large_file_the_end_is_archived(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_KEPT", 8)
    folder = tmp_path / "session"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "loud.log").write_text("loud " * 100 + "the end\n")
    session.pack(folder, tmp_path / "results.tar.gz")
    session.unpack(tmp_path / "results.tar.gz", tmp_path / "again")
    assert (tmp_path / "again" / "logs" / "loud.log").read_text() == "the end\n"


def test_everything_is_in_one_archive_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_ARCHIVED_EVERY", 0.05)
    folder, archive = tmp_path / "session", tmp_path / "back" / "results.tar.gz"
    folder.mkdir()
    archive.parent.mkdir()
    waits = f"import os, time\nwhile not os.path.exists({str(archive)!r}): time.sleep(0.01)\nprint('it is there')"
    made = Session(folder, [python("one", waits)], True, archive=archive)
    made.run(60)
    assert statuses(made) == {"one": "passed"}
    assert [path.name for path in archive.parent.iterdir()] == ["results.tar.gz"]
    again = tmp_path / "again"
    session.unpack(archive, again)
    assert session.read(again) == (list(made.outcomes.values()), True)
    assert "it is there" in (again / "logs" / "one.log").read_text()
    (tmp_path / "other").write_text("something else")
    with pytest.raises(ValueError, match="is not the archive of a session"):
        session.unpack(tmp_path / "other", again)


def test_a_session_goes_on_from_its_archive(tmp_path, capsys, monkeypatch):
    archive = tmp_path / "results.tar.gz"
    monkeypatch.setattr(session, "parts", lambda folder, dry: [counting(tmp_path, name) for name in ("one", "two")])
    assert gpu("--dry-run", "--out", tmp_path / "first", "--archive", archive, "--only", "one") == 0
    assert gpu("--dry-run", "--out", tmp_path / "second", "--archive", archive, "--resume") == 0
    assert (tmp_path / "order").read_text().split() == ["one", "two"]


def test_a_library_of_other_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(session.ops, "stale", lambda name: f"fusedrnn/_{name} was built from other sources")
    made = Session(tmp_path, [python("good", "")], dry=True)
    assert made.digest().startswith("STALE LIBRARY: fusedrnn/_cpu was built from other sources")


def test_a_debug_build_of_other_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(session.ops, "stale", lambda name: None)
    library = tmp_path / "debug" / "_cuda.abi3.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr(session, "DEBUG", library)
    built = {"this": session.sources.digest(session.ROOT, "cuda"), "another": "0" * 64}
    for digest in built.values():
        library.with_name("_build.json").write_text(json.dumps({"sources": {"cuda": digest}}))
        told = Session(tmp_path, [python("good", "")], dry=True).digest()
        assert told.startswith("STALE LIBRARY: the debug build") == (digest == built["another"])


@pytest.fixture
def commands_here(monkeypatch):
    """Commands of `python -m fusedrnn` run in this process, but for `info`: each loads torch, which takes seconds."""
    in_process_of_its_own = Session._run

    def run(made, part, seconds):
        if part.name == "info" or part.command[:2] != ("-m", "fusedrnn"):
            return in_process_of_its_own(made, part, seconds)
        with (made.folder / "logs" / f"{part.name}.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            status = cli.main(list(part.command[2:]))
        return ("failed", f"exit status {status}") if status else ("passed", "")

    monkeypatch.setattr(Session, "_run", run)


def test_a_short_dry_run(tmp_path, capsys, monkeypatch, commands_here):
    """The same steps on the CPU: every part that was asked for has passed, or says why not."""
    monkeypatch.setattr(session, "_backends", lambda dry: {"cpu": ("", {}), "warp": ("there is no such backend", {})})
    asked = [
        "info",
        "torch",
        "steps-triton",
        "check-cpu",
        "plans-cpu",
        "plans-warp",
        "grid",
        "predictions",
        "profile",
        "memcheck-cpu",
        "report",
    ]
    arguments = ["--dry-run", "--out", tmp_path]
    assert gpu(*arguments, *(f"--only={name}" for name in asked)) == 0, capsys.readouterr().out
    outcomes = {outcome.name: outcome for outcome in session.read(tmp_path)[0]}
    assert {name: outcomes[name].status for name in asked} == {
        name: "skipped" if name in ("steps-triton", "plans-warp", "memcheck-cpu") else "passed" for name in asked
    }
    assert outcomes["plans-warp"].reason == "there is no such backend"
    for name in (
        "check-cpu.jsonl",
        "plans-cpu/results.csv",
        "grid/report.md",
        "grid/predictions.md",
        "profile.json",
        "summary.md",
    ):
        assert (tmp_path / name).stat().st_size > 0, name
    assert json.loads((tmp_path / "logs" / "info.log").read_text().split("\n", 1)[1])["backends"]
    assert "[grid/report.md](grid/report.md)" in (tmp_path / "summary.md").read_text()

    for more, message in (
        (arguments, "has a session"),
        (["--list", "--dry-run", "--only", "warp"], "unknown warp: expected some of info"),
    ):
        with pytest.raises(SystemExit) as exit:
            gpu(*more)
        assert exit.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif("cuda" in session.fusedrnn.testing.devices(), reason="there is a GPU")
def test_without_a_gpu(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        gpu("--out", tmp_path)
    assert exit.value.code == 2
    assert "--dry-run goes through the same steps on the CPU" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


INSTALLED = """
import contextlib, io, json, sys
for name in ("numpy", "matplotlib", "tqdm", "triton", "pytest"):
    sys.modules[name] = None
from fusedrnn import cli
def said(*arguments):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            status = cli.main(["bench", *arguments])
        except SystemExit as exit:
            status = exit.code
    return status, " ".join((output.getvalue() + errors.getvalue()).split())
commands = ["micro"], ["micro", "--host"], ["gpu", "--prepare"], ["gpu", "--dry-run", "--list"]
print(json.dumps([said(*command) for command in commands]))
"""


def test_an_installed_package_says_that_a_checkout_is_needed(tmp_path, report):
    """As a wheel lays it out, beside torch alone: no sources, no tests."""
    root = session.ROOT
    package = tmp_path / "site" / "fusedrnn"
    shutil.copytree(root / "fusedrnn", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for folder in ("benchmarks", "kernels"):
        shutil.copytree(
            root / folder, package / folder, ignore=shutil.ignore_patterns("cuda", "results", "__pycache__")
        )
    micro, host, prepare, listed = report(INSTALLED, tmp_path, PYTHONPATH=str(package.parent), PYTHONWARNINGS="ignore")
    for status, text in (micro, host, prepare):
        assert status == 2
        assert re.search(
            r"error: .*the sources of the microbenchmarks are not here \(micro\S*\): run it in a checkout", text
        )
    assert listed[0] == 0
    assert (
        "tests/triton/test_triton.py is not here: run it in a checkout" in listed[1]
        or "pytest is not installed" in listed[1]
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_is_built_for_a_gpu_is_packed():
    said = subprocess.run(["make", "-n", "gpu-build"], cwd=session.ROOT, capture_output=True, text=True, check=True)
    (packing,) = [line.split() for line in said.stdout.splitlines() if line.startswith("tar ")]
    assert packing[1:3] == ["-czf", "build/gpu.tar.gz"]
    wanted = ("fusedrnn/_build.json", "build/checkout.json", str(session.DEBUG.parent.relative_to(session.ROOT)))
    assert {*wanted, "build/micro", "fusedrnn/_*.so"} == set(packing[3:])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_make_target_needs_no_installation(tmp_path):
    """What it imports is the tree it stands in, by links, from a Python that has torch and no fusedrnn."""
    code = "import fusedrnn, fusedrnn.benchmarks.session as s, fusedrnn.kernels.plan; print(fusedrnn.__file__, s.ROOT)"
    arguments = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}", "GPU=--list --dry-run"]
    listed = subprocess.run(arguments, cwd=session.ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert listed.returncode == 0, listed.stderr
    assert "plans-triton" in listed.stdout
    assert not (tmp_path / "out").exists()
    links = session.ROOT / "build" / "links"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=links,
        env={**os.environ, "PYTHONPATH": str(links)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(links / "fusedrnn" / "__init__.py"), str(session.ROOT)]
