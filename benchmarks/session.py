"""Everything there is to find out on a machine with a GPU, in order of importance, within a time.

A session is a list of parts. Each is a command of its own in a process of its own, with a log and a budget of seconds;
one that overruns it is killed, and the next begins. The first of them are a smoke test: whether anything hangs or is
wrong, and what a step takes. What was measured is in the folder as soon as it was, and in an archive soon after;
session.json says of every part what became of it, also if the session itself is cut off: resumed, it goes on with the
parts that have no outcome, and `plans` and `grid` go on where they were. `Session.digest` is what is printed last.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fusedrnn
from fusedrnn import ops, sources

from . import micro, plans, predict, provenance, smoke
from .report import markdown

ROOT = Path(__file__).resolve().parents[1]
STATUSES = ("passed", "failed", "timed out", "cut off", "running", "skipped", "not reached")
_UNFINISHED = ("timed out", "cut off", "running", "not reached")
_LEAST = 5.0  # seconds: with less no part is begun
_GRACE = 8.0  # seconds that a part has to end by itself after it was interrupted
_RESERVE = 20.0  # seconds of the session that are kept for the report
_ARCHIVED_EVERY = 15.0  # seconds
_DRY_PATIENCE = 8  # times what a part has on a GPU: an interpreter computes, on a machine that may be busy
DIGEST = 10_000  # characters
_TOLD = 5000  # of these, of what failed
_KEPT = 4 << 20  # bytes: the end of a larger file is archived
# So that what a part starts is ended with it; and not by setsid, so that what ends a killed session ends its parts.
_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
_ERRORS = ("CUDA error", "has waited too long")  # of torch, whose exception may not repeat it, and of the debug build
DEBUG = ROOT / "build" / "debug" / "fusedrnn" / "_cuda.abi3.so"


@dataclass(frozen=True)
class Part:
    """One thing to find out."""

    name: str
    what: str
    seconds: float  # at most, each time that it is begun
    command: tuple[str, ...] = ()  # of `python -m`, or of a program by its path
    skip: str = ""  # why it is not done here
    environment: dict[str, str] = field(default_factory=dict)
    last: bool = False  # runs after all others, with reserved time
    needs: Path | None = None  # an output of another part
    smoke: bool = False  # whether it is of the smoke test


@dataclass
class Outcome:
    """The outcome of a part."""

    name: str
    status: str = "not reached"  # one of STATUSES
    reason: str = ""
    seconds: float = 0.0  # in which it ran, all times together
    times: int = 0  # that it was begun


# ------------------------------------------------------------------------------------------------ the parts

# The case for compute-sanitizer: both passes, with every option of a layer.
_SMALL = """
import sys, torch, fusedrnn
from fusedrnn import testing
with fusedrnn.use_backend(sys.argv[1]):
    for H in (30, 160):
        for dtype in (torch.float32, torch.bfloat16):
            case = testing.Case(4, 5, 7, H, dtype, bidirectional=True, lengths=True, reset=True, states=True)
            testing.evaluate(testing.call, fusedrnn.LSTM, case, "cuda")
torch.cuda.synchronize()
"""


def parts(folder: Path, dry: bool) -> list[Part]:
    """Every part, in order of importance: the smoke test, then the C++ kernels, the grid, Triton, and tests.

    Args:
        folder: where the results go.
        dry: the same parts in tiny sizes on the CPU, with the Triton kernels interpreted.
    """
    bench, backends = ("-m", "fusedrnn", "bench"), _backends(dry)
    found = _smoke_test(folder, backends, dry)
    results = folder / "grid" / "results.csv"
    first, *others = backends.items()
    found += _of_backend(folder, *first, dry)
    found.append(_grid(folder, "grid", *first, dry))
    predicting = (*bench, "predict", str(results), *(("--device", predict.planner.H200.name) if dry else ()))
    what = "what the planners predicted next to what was measured"
    found.append(Part("predictions", what, 20, predicting, last=True, needs=results))
    found.append(_profile(folder, backends, dry))
    for name, state in others:
        found += _of_backend(folder, name, state, dry)
        steps = _steps(folder, name, state, dry)
        found += [part for part in (steps,) if part.name not in {other.name for other in found}]
        found.append(_grid(folder, f"grid-{name}", name, state, dry))
    found += [_check(folder, name, dry) for name in ("aten", "reference")]
    for kind in ("memcheck", "synccheck"):
        found += [_sanitized(kind, name, skip, environment, dry) for name, (skip, environment) in backends.items()]
    # Its test of two launches at once comes last, as what is promised of that is written nowhere.
    found += _tests(folder, dry, [] if dry else [name for name, (skip, _) in backends.items() if not skip])
    drawing = (*bench, "plot", str(results))
    found.append(Part("report", "tables and pictures of the grid", 30, drawing, last=True, needs=results))
    return [replace(part, seconds=_DRY_PATIENCE * part.seconds) for part in found] if dry else found


def _smoke_test(folder: Path, backends: dict[str, tuple[str, dict[str, str]]], dry: bool) -> list[Part]:
    """The parts of the first 200 seconds, which decide whether the rest is run."""
    device = ("--device", "cpu" if dry else "cuda")
    program = ("-m", "fusedrnn.benchmarks.smoke")
    info = ("-m", "fusedrnn", "info", "--json")
    found = [Part("info", "versions, devices, backends and their reasons", 10, info, smoke=True)]
    what = "nn.LSTM alone, which needs no kernel of ours: whether torch and cuDNN work"
    found.append(Part("torch", what, 30, (*program, "torch", *device), smoke=True))
    for name in ("triton",) if dry else ("cuda",):
        skip, environment = backends.get(name, ("there is no such backend here", {}))
        environment = {**environment, "CUDA_LAUNCH_BLOCKING": "1"}  # an error is then that of the call that has it
        if name == "cuda" and DEBUG.is_file():
            environment[ops.CUDA_LIBRARY_VARIABLE] = str(DEBUG)
        for kind in smoke.KINDS[name]:
            what = f"{name}: small layers that exchange by {kind}, in the build that names what it waits for"
            command = (*program, "exchange", name, kind, *device)
            found.append(Part(f"exchange-{name}-{kind}", what, 16, command, skip, environment, smoke=True))
    measuring = ("-m", "fusedrnn", "bench", "micro", "--out", str(folder / "micro"), "--samples", "10")
    measuring += ("--seconds", "30" if dry else "8", *(("--host",) if dry else ()))
    skip = micro.unavailable(host=dry) or ""
    found.append(Part("micro", "microbenchmarks of what the planners assume", 45, measuring, skip, smoke=True))
    timed = "triton" if dry else "cuda"
    state = backends.get(timed, ("there is no such backend here", {}))
    return [*found, replace(_steps(folder, timed, state, dry), smoke=True)]


def _steps(folder: Path, name: str, state: tuple[str, dict[str, str]], dry: bool) -> Part:
    skip, environment = state
    command = ("-m", "fusedrnn.benchmarks.smoke", "steps", name, "--device", "cpu" if dry else "cuda")
    command += ("--out", str(folder / "smoke"))
    what = f"microseconds of a step of {name} by slope: measured, predicted, cuDNN"
    return Part(f"steps-{name}", what, 45, command, skip, environment)


def _of_backend(folder: Path, name: str, state: tuple[str, dict[str, str]], dry: bool) -> list[Part]:
    """Its plans, a look at its launches, races, and the check."""
    skip, environment = state
    device = "cpu" if dry else "cuda"
    trying = ("-m", "fusedrnn", "bench", "plans", "--backend", name, "--device", device)
    trying += ("--out", str(folder / f"plans-{name}"), *(("--shrink", "32", "--limit", "3") if dry else ()))
    what = f"every plan of {name} against float64, forward and backward"
    found = [Part(f"plans-{name}", what, 60, trying, skip, environment)]
    profiler = micro.cuda_tool("ncu")
    missing = skip or ("it looks at a GPU" if dry else "" if profiler else "ncu is not installed")
    looking = (
        profiler or "ncu",
        "--clock-control",
        "none",
        "--kernel-name",
        "regex:recurrence|layer_(forward|backward)",
    )
    looking += ("--launch-count", "2", "--set", "full", sys.executable, "-m", "fusedrnn.benchmarks.smoke", "once", name)
    what = f"one forward and one backward launch of {name} under Nsight Compute"
    found.append(Part(f"ncu-{name}", what, 30, looking, missing, environment))
    found.append(_sanitized("racecheck", name, skip, environment, dry))
    return [*found, _check(folder, name, dry, skip, environment)]


def _check(folder: Path, name: str, dry: bool, skip: str = "", environment: dict[str, str] | None = None) -> Part:
    command = ["-m", "fusedrnn", "check", "--quick", "--device", "cpu" if dry else "cuda", "--backend", name]
    # Kernels that are compiled at their first call take longer than there is: from all over, as far as it gets.
    command += ["--record", str(folder / f"check-{name}.jsonl"), "--limit", "4" if dry else "1000"]
    what = f"gradcheck, gradgradcheck and comparison with nn.LSTM, quick, of {name}"
    return Part(f"check-{name}", what, 45, tuple(command), skip, environment or {})


def _sanitized(kind: str, name: str, skip: str, environment: dict[str, str], dry: bool) -> Part:
    tool = micro.cuda_tool("compute-sanitizer")
    missing = skip or ("it watches a GPU" if dry else "" if tool else "compute-sanitizer is not installed")
    watched = (tool or "compute-sanitizer", "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", _SMALL, name)
    # An allocation of its own for each tensor: what is written beyond its end is not another's.
    environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(f"{kind}-{name}", f"small cases of {name} under compute-sanitizer", 45, watched, missing, environment)


def _backends(dry: bool) -> dict[str, tuple[str, dict[str, str]]]:
    """The backends with kernels for the device: why one is skipped, or "", and the environment that it needs."""
    if not dry:
        reasons = fusedrnn.backends()
        return {name: (reasons[name] or "", {}) for name in reasons if name not in ("cpu", "aten", "reference")}
    triton = "" if find_spec("triton") else "Triton is not installed"
    cpu = fusedrnn.backends()["cpu"] or ""
    return {"cpu": (cpu, {}), "triton": (triton, {"TRITON_INTERPRET": "1"})}


def _grid(folder: Path, part: str, name: str, state: tuple[str, dict[str, str]], dry: bool) -> Part:
    skip, environment = state
    command = ["-m", "fusedrnn", "bench", "--suite", "gpu", "--out", str(folder / part), "--resume"]
    command += ["--baseline", "nn.LSTM", "--baseline", "FlashRNN", "--baseline", "haste", "--backend", name]
    if dry:
        command += ["--device", "cpu", "--shrink", "32", "--dtype", "float32", "--limit", "3"]
        command += ["--rounds", "2", "--time-budget", "0"]
    else:
        command += ["--device", "cuda", "--rounds", "10", "--time-budget", "1"]
    what = f"the grid of sizes and dtypes, {name} against nn.LSTM"
    return Part(part, what, 120, tuple(command), skip, environment)


def _profile(folder: Path, backends: dict[str, tuple[str, dict[str, str]]], dry: bool) -> Part:
    usable = [name for name, (skip, variables) in backends.items() if not skip and not variables]
    command = ["-m", "fusedrnn", "tune", "--out", str(folder / "profile.json"), "--resume"]
    command += [argument for name in usable for argument in ("--backend", name)]
    small = ("--device", "cpu", "--shape", "3,2,4,5", "--dtype", "float32")
    command += small if dry else ("--device", "cuda", "--seconds", "80")
    skip = "" if usable else "no backend with kernels is available"
    return Part("profile", "a profile by which `auto` chooses on such a GPU", 90, tuple(command), skip)


# Needed by some tests beside pytest; without it the others run.
_NEEDED = {
    "tests/api/test_torch_samples.py": "expecttest",
    "tests/api/test_hypothesis.py": "hypothesis",
    "tests/ecosystem/test_onnx.py": "onnx",
}


def _tests(folder: Path, dry: bool, expected: list[str]) -> list[Part]:
    chosen = {
        "tests-torch": (
            "torch's samples of nn.LSTM, with derivatives",
            "tests/api/test_torch_samples.py",
            "cuda",
        ),
        "tests-triton": ("the tests of the Triton kernels", "tests/triton/test_triton.py", ""),
        "tests": ("all tests that compute on a GPU", "tests", "cuda and not host"),
        "tests-gpu": ("CUDA graphs, determinism, two streams at once", "tests/cuda/test_gpu.py", ""),
    }
    found = []
    for name, (what, path, words) in chosen.items():
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / path), "-m", "not compiles"]
        command += ["--override-ini=addopts=--import-mode=importlib -ra", f"--junitxml={folder / f'{name}.xml'}"]
        absent = [file for file, module in _NEEDED.items() if file != path and find_spec(module) is None]
        command += [f"--ignore={ROOT / file}" for file in absent]
        command += ["--collect-only"] if dry else ["-k", words] if words else []
        if not dry and path != "tests/cuda/test_gpu.py" and find_spec("xdist"):  # most of the time goes into compiling
            command += ["-n", str(plans.processes("cuda"))]
        expecting = {"FUSEDRNN_EXPECT": ",".join(expected)}
        found.append(Part(name, what, 90, tuple(command), _untestable(path), expecting))
    return found


def _untestable(path: str) -> str:
    missing = [module for module in ("pytest", _NEEDED.get(path, "pytest")) if find_spec(module) is None]
    if missing:
        return f"{missing[0]} is not installed"
    return "" if (ROOT / path).exists() else f"{path} is not here: run it in a checkout"


def _stale_debug() -> str | None:
    """As `ops.stale`, of the debug build."""
    note = DEBUG.with_name("_build.json")
    if not (DEBUG.is_file() and note.is_file() and (ROOT / "csrc" / "cuda").is_dir()):
        return None
    if json.loads(note.read_text(encoding="utf-8"))["sources"]["cuda"] == sources.digest(ROOT, "cuda"):
        return None
    return "the debug build of fusedrnn/_cuda is of other sources than those in csrc: build it again"


# ------------------------------------------------------------------------------------------------ a session


class Session:
    """A folder with parts that are done in order.

    Args:
        folder: where the results go; it exists.
        todo: all parts.
        dry: as in `parts`.
        before: what `read` returns for a session to go on with.
        archive: a file that the folder is packed into, every 15 seconds and at the end, or None.
    """

    def __init__(
        self,
        folder: Path,
        todo: Sequence[Part],
        dry: bool,
        before: Sequence[Outcome] = (),
        archive: Path | None = None,
    ) -> None:
        self.folder, self.parts, self._dry, self._archive = folder, list(todo), dry, archive
        earlier = {outcome.name: outcome for outcome in before}
        self.outcomes = {part.name: earlier.get(part.name, Outcome(part.name)) for part in todo}
        for outcome in self.outcomes.values():
            if outcome.status == "running":
                outcome.status, outcome.reason = "cut off", "the session ended while it ran"
        self._facts = provenance.collect("cpu" if dry else "cuda")
        self._stale = [why for why in (ops.stale("cpu"), ops.stale("cuda"), _stale_debug()) if why is not None]
        (folder / "logs").mkdir(exist_ok=True)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes.values() if outcome.status == "failed"]

    @property
    def unfinished(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes.values() if outcome.status in _UNFINISHED]

    def run(self, budget: float, only: Sequence[str] = ()) -> None:
        """Does what has no outcome yet: what was never begun first, then what was begun and did not end.

        Args:
            budget: seconds for all of it.
            only: do these, whatever became of them before.
        """
        with _archived(self.folder, self._archive):
            self._run_all(budget, only)

    def _run_all(self, budget: float, only: Sequence[str]) -> None:
        end = time.monotonic() + budget
        ordinary = [part for part in self.parts if not part.last and (not only or part.name in only)]
        fresh = [p for p in ordinary if only or self.outcomes[p.name].times == 0]
        begun = [p for p in ordinary if p not in fresh]
        closing = [part for part in self.parts if part.last and (not only or part.name in only)]
        reserve = _RESERVE if closing and not only else 0.0
        try:
            for part in (*fresh, *begun):
                if only or self.outcomes[part.name].status in (*_UNFINISHED, "skipped"):
                    self._do(part, end - reserve - time.monotonic())
            # The remaining time goes to unfinished parts, as long as they make progress.
            while not only and (stopped := self._to_go_on(ordinary)) and end - reserve - time.monotonic() > 4 * _LEAST:
                self._do(stopped, end - reserve - time.monotonic())
        finally:
            for part in closing:
                self._do(part, max(end - time.monotonic(), _LEAST + 1))
            self.write()

    def _to_go_on(self, ordinary: list[Part]) -> Part | None:
        """The part that did not end and was begun the fewest times."""
        stopped = [part for part in ordinary if self.outcomes[part.name].status == "timed out"]
        return min(stopped, key=lambda part: self.outcomes[part.name].times, default=None)

    def _do(self, part: Part, left: float) -> None:
        outcome = self.outcomes[part.name]
        if part.skip:
            outcome.status, outcome.reason = "skipped", part.skip
        elif part.needs is not None and not part.needs.is_file():
            outcome.status, outcome.reason = "skipped", f"there is no {part.needs.relative_to(self.folder)}"
        elif left < _LEAST:
            if outcome.times == 0:
                outcome.reason = "there was no time left for it"
        else:
            outcome.status, outcome.reason = "running", ""
            outcome.times += 1
            self.write()
            print(f"== {part.name}: {part.what} (at most {min(part.seconds, left):.0f} s) ==", flush=True)
            begin = time.monotonic()
            try:
                outcome.status, outcome.reason = self._run(part, min(part.seconds, left))
            except KeyboardInterrupt:
                outcome.status, outcome.reason = "cut off", "the session was interrupted"
                raise
            finally:
                outcome.seconds += time.monotonic() - begin
        print(f"   {outcome.status}{': ' if outcome.reason else ''}{outcome.reason}", flush=True)
        self.write()

    def _run(self, part: Part, seconds: float) -> tuple[str, str]:
        """Runs a command; returns a status and its reason."""
        program = () if Path(part.command[0]).is_absolute() else (sys.executable,)
        environment = {**os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
        with (self.folder / "logs" / f"{part.name}.log").open("ab") as log:
            log.write(f"$ {' '.join((*program, *part.command))[:2000]}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    [*program, *part.command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,  # not in a tree that is not installed, where half of the package would be found
                    env=environment,
                    **_GROUP,
                )
            except OSError as error:
                return "failed", f"it was not started: {error}"
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return "timed out", f"it was ended after {seconds:.0f} s"
            finally:
                _end(process)
        return ("passed", "") if status == 0 else ("failed", f"exit status {status}: {self._complaint(part)}")

    def _complaint(self, part: Part) -> str:
        return next((line.strip()[:200] for line in self._telling_lines(part.name, 1)), "")

    def digest(self) -> str:
        """A digest in at most DIGEST characters: failures, times of steps, then assumptions."""
        told = [f"STALE LIBRARY: {why}" for why in self._stale]
        wrong = [o for o in self.outcomes.values() if o.status in ("failed", "timed out", "cut off")]
        most, width = (6, 600) if len(wrong) < 3 else (4, 300) if len(wrong) < 8 else (2, 160)
        for outcome in wrong:
            told.append(f"{outcome.status.upper()} {outcome.name}: {outcome.reason}"[:300])
            told += [f"    {line[:width]}" for line in self._telling_lines(outcome.name, most)]
        pieces = ["\n".join(told)[:_TOLD] or "nothing failed"]
        for status in ("passed", "running", "skipped", "not reached"):
            names = [outcome.name for outcome in self.outcomes.values() if outcome.status == status]
            pieces.append(f"{status}: {', '.join(names) or '-'}"[:600])
        if steps := smoke.table(self.folder / "smoke" / "steps.jsonl"):
            pieces.append("microseconds a step, bfloat16\n" + "\n".join(steps))
        with suppress(OSError, ValueError):
            device, measured = micro.read(self.folder / "micro" / "micro.jsonl")
            pieces.append(f"clusters with 200 KiB that fit, by size: {device.get('clusters', '-')}")
            pieces.append("\n".join("  ".join(line) for line in micro.assumptions(device, measured)))
        return "\n\n".join(pieces)[:DIGEST]

    def _telling_lines(self, name: str, most: int) -> list[str]:
        """The first lines of a log that begin with FAILED or name an error of the device, then its last lines."""
        path = self.folder / "logs" / f"{name}.log"
        lines = [line for line in _end_of(path).decode(errors="replace").splitlines() if line.strip()]
        found = [k for k, line in enumerate(lines) if line.startswith("FAILED")][: -(-most // 2)]
        for error in _ERRORS:
            found += [k for k, line in enumerate(lines) if error in line and k not in found][:1]
        found = found[:most]
        last = [k for k in range(len(lines)) if k not in found][-(most - len(found)) :] if len(found) < most else []
        return [lines[k] for k in (*found, *last)]

    def write(self) -> None:
        """session.json, which a later session reads, and summary.md, which people do."""
        state = {"dry": self._dry, "provenance": self._facts, "parts": [asdict(o) for o in self.outcomes.values()]}
        _replace(self.folder / "session.json", json.dumps(state, indent=1) + "\n")
        _replace(self.folder / "summary.md", self._summary())
        _replace(self.folder / "digest.txt", self.digest() + "\n")

    def _summary(self) -> str:
        lines = []
        for part in self.parts:
            o = self.outcomes[part.name]
            lines.append((part.name, part.what, o.status, f"{o.seconds:.0f}", o.reason))
        title = "# A dry run on the CPU: its numbers mean nothing" if self._dry else "# A session on a GPU"
        pieces = [title, markdown(("", ""), [(name, value) for name, value in self._facts.items() if value])]
        pieces += ["## Parts", markdown(("part", "what", "status", "seconds", "why"), lines)]
        files = ["micro/micro.md", "grid/report.md", "grid/predictions.md"]
        there = [f"- [{name}]({name})" for name in files if (self.folder / name).is_file()]
        return "\n\n".join([*pieces, *(["## Reports", "\n".join(there)] if there else [])]) + "\n"


@contextmanager
def _archived(folder: Path, archive: Path | None) -> Iterator[None]:
    """Inside, and once more at the end, the folder is packed into the archive."""
    if archive is None:
        yield
        return
    over = threading.Event()

    def keep_packing() -> None:
        while not over.wait(_ARCHIVED_EVERY):
            pack(folder, archive)

    thread = threading.Thread(target=keep_packing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        pack(folder, archive)


def pack(folder: Path, archive: Path) -> None:
    """Packs what is in the folder at this moment; the archive is whole at every moment."""
    partial = archive.with_name(f"{archive.name}.partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path in (archive, partial):
                continue
            with suppress(FileNotFoundError):  # a file that is replaced just now
                content = _end_of(path)
                member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                member.size, member.mtime = len(content), int(time.time())
                tar.addfile(member, io.BytesIO(content))
    partial.replace(archive)


def _end_of(path: Path) -> bytes:
    """A file, or the end of a large one; nothing of one that is not there."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _KEPT, 0))
        return file.read()


def unpack(archive: Path, folder: Path) -> None:
    """The inverse of `pack`.

    Raises:
        OSError: the archive cannot be read.
        ValueError: it is something else.
    """
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is not the archive of a session: {error}") from error


def read(folder: Path) -> tuple[list[Outcome], bool]:
    """The outcomes of a session before, and whether it was a dry run.

    Raises:
        OSError: there is none in the folder.
        ValueError: its file is of something else.
    """
    try:
        state = json.loads((folder / "session.json").read_text(encoding="utf-8"))
        return [Outcome(**outcome) for outcome in state["parts"]], bool(state["dry"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'session.json'} is not the state of a session: {error}") from error


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a process and all that it started: asked first, so that it can write what it has."""
    # One that a driver holds on to cannot be killed, and is not waited for for ever.
    for number, seconds in ((signal.SIGINT, _GRACE), (signal.SIGKILL, 2 * _GRACE)):
        if process.poll() is None or number == signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def _replace(path: Path, text: str) -> None:
    """Writes a file that is whole at every moment."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
