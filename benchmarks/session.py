"""Everything there is to find out on a machine with a GPU, in order of importance, within a time.

A session is a list of parts. Each is a command of its own in a process of its own, with a log and a budget of seconds;
one that overruns it is killed, and the next begins. What was measured is in the folder as soon as it was, and
session.json says of every part what became of it, also if the session itself is cut off: resumed, it goes on with the
parts that have no outcome, and `plans` and `grid` go on where they were.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fusedrnn

from . import micro, plans, predict, provenance
from .report import markdown

ROOT = Path(__file__).resolve().parents[1]
STATUSES = ("passed", "failed", "timed out", "cut off", "running", "skipped", "not reached")
_UNFINISHED = ("timed out", "cut off", "running", "not reached")
_LEAST = 5.0  # seconds: with less no part is begun
_GRACE = 8.0  # seconds that a part has to end by itself after it was interrupted
_RESERVE = 20.0  # seconds of the session that are kept for the report


@dataclass(frozen=True)
class Part:
    """One thing to find out."""

    name: str
    what: str
    seconds: float  # at most, each time that it is begun
    command: tuple[str, ...] = ()  # of `python -m`, or of a program by its path
    skip: str = ""  # why it is not done here
    environment: dict[str, str] = field(default_factory=dict)
    last: bool = False  # after all others, every time, with time kept for it
    needs: Path | None = None  # that another part leaves


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    status: str = "not reached"  # one of STATUSES
    reason: str = ""
    seconds: float = 0.0  # in which it ran, all times together
    times: int = 0  # that it was begun


# ------------------------------------------------------------------------------------------------ the parts

# What compute-sanitizer watches: both passes, with everything that a layer can have.
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
    """Every part, in order of importance.

    Args:
        folder: where the results go.
        dry: the same parts in tiny sizes on the CPU, with the Triton kernels interpreted.
    """
    device = "cpu" if dry else "cuda"
    bench = ("-m", "fusedrnn", "bench")
    backends = _backends(dry)

    def check(name: str, skip: str = "", environment: dict[str, str] | None = None) -> Part:
        command = ["-m", "fusedrnn", "check", "--quick", "--device", device, "--backend", name]
        # Kernels that are compiled at their first call take longer than there is: from all over, as far as it gets.
        command += ["--record", str(folder / f"check-{name}.jsonl"), "--limit", "4" if dry else "1000"]
        what = f"gradcheck, gradgradcheck and comparison with nn.LSTM, quick, of {name}"
        return Part(f"check-{name}", what, 75, tuple(command), skip, environment or {})

    found = [Part("info", "versions, devices, backends and their reasons", 30, ("-m", "fusedrnn", "info", "--json"))]
    found += [check(name, skip, environment) for name, (skip, environment) in backends.items()]
    measuring = (*bench, "micro", "--out", str(folder / "micro"), *(("--host",) if dry else ()))
    skip = micro.unavailable(host=dry) or ""
    found.append(Part("micro", "microbenchmarks of what the planners assume", 75, measuring, skip))
    for name, (skip, environment) in backends.items():
        trying = (*bench, "plans", "--backend", name, "--device", device, "--out", str(folder / f"plans-{name}"))
        sizes = ("--shrink", "32", "--limit", "3") if dry else ()
        what = f"every plan of {name} against float64, forward and backward"
        found.append(Part(f"plans-{name}", what, 90, (*trying, *sizes), skip, environment))
    found.append(_grid(folder, backends, dry))
    results = folder / "grid" / "results.csv"
    predicting = (*bench, "predict", str(results), *(("--device", predict.planner.H200.name) if dry else ()))
    what = "what the planners predicted next to what was measured"
    found.append(Part("predictions", what, 20, predicting, last=True, needs=results))
    found += _tests(folder, dry, [] if dry else [name for name, (skip, _) in backends.items() if not skip])
    found += [check(name) for name in ("aten", "reference")]
    tool = micro.cuda_tool("compute-sanitizer")
    missing = "compute-sanitizer is not installed" if tool is None else "it watches a GPU" if dry else ""
    for kind in ("memcheck", "racecheck", "synccheck"):
        watched = (tool or "compute-sanitizer", "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", _SMALL)
        for name, (skip, environment) in backends.items():
            what = f"small cases of {name} under compute-sanitizer"
            found.append(Part(f"{kind}-{name}", what, 90, (*watched, name), skip or missing, environment))
    drawing = (*bench, "plot", str(results))
    return [*found, Part("report", "tables and pictures of the grid", 30, drawing, last=True, needs=results)]


def _backends(dry: bool) -> dict[str, tuple[str, dict[str, str]]]:
    """The backends with kernels for the device: why one is skipped, or "", and the environment that it needs."""
    if not dry:
        reasons = fusedrnn.backends()
        return {name: (reasons[name] or "", {}) for name in reasons if name not in ("cpu", "aten", "reference")}
    triton = "" if find_spec("triton") else "Triton is not installed"
    cpu = fusedrnn.backends()["cpu"] or ""
    return {"cpu": (cpu, {}), "triton": (triton, {"TRITON_INTERPRET": "1"})}


def _grid(folder: Path, backends: dict[str, tuple[str, dict[str, str]]], dry: bool) -> Part:
    usable = [name for name, (skip, _) in backends.items() if not skip]
    environment = {name: value for _, (_, variables) in backends.items() for name, value in variables.items()}
    command = ["-m", "fusedrnn", "bench", "--suite", "gpu", "--out", str(folder / "grid"), "--resume"]
    command += ["--baseline", "nn.LSTM", "--baseline", "FlashRNN", "--baseline", "haste"]
    command += [argument for name in usable for argument in ("--backend", name)]
    if dry:
        command += ["--device", "cpu", "--shrink", "32", "--dtype", "float32", "--limit", "3"]
        command += ["--rounds", "2", "--time-budget", "0"]
    else:
        command += ["--device", "cuda", "--rounds", "10", "--time-budget", "1"]
    skip = "" if usable else "no backend with kernels is available"
    return Part("grid", "the grid of sizes and dtypes against nn.LSTM", 200, tuple(command), skip, environment)


# What some tests need beside pytest; the others are run without it.
_NEEDED = {"tests/test_torch_samples.py": "expecttest", "tests/test_hypothesis.py": "hypothesis"}


def _tests(folder: Path, dry: bool, expected: list[str]) -> list[Part]:
    chosen = {
        "tests-gpu": ("CUDA graphs, streams, determinism", "tests/test_gpu.py", ""),
        "tests-torch": ("torch's samples of nn.LSTM, with their derivatives", "tests/test_torch_samples.py", "cuda"),
        "tests-triton": ("the tests of the Triton kernels", "tests/test_triton.py", ""),
        "tests": ("all tests that compute on a GPU", "tests", "cuda and not host"),
    }
    found = []
    for name, (what, path, words) in chosen.items():
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / path), "-m", "not compiles"]
        command += ["--override-ini=addopts=--import-mode=importlib -ra", f"--junitxml={folder / f'{name}.xml'}"]
        absent = [file for file, module in _NEEDED.items() if file != path and find_spec(module) is None]
        command += [f"--ignore={ROOT / file}" for file in absent]
        command += ["--collect-only"] if dry else ["-k", words] if words else []
        if not dry and path != "tests/test_gpu.py" and find_spec("xdist"):  # most of the time goes into compiling
            command += ["-n", str(plans.processes("cuda"))]
        expecting = {"FUSEDRNN_EXPECT": ",".join(expected)}
        found.append(Part(name, what, 90, tuple(command), _untestable(path), expecting))
    return found


def _untestable(path: str) -> str:
    missing = [module for module in ("pytest", _NEEDED.get(path, "pytest")) if find_spec(module) is None]
    if missing:
        return f"{missing[0]} is not installed"
    return "" if (ROOT / path).exists() else f"{path} is not here: run it in a checkout"


# ------------------------------------------------------------------------------------------------ a session


class Session:
    """A folder with parts that are done in order.

    Args:
        folder: where the results go; it exists.
        todo: all parts.
        dry: as in `parts`.
        before: what `read` returns for a session to go on with.
    """

    def __init__(self, folder: Path, todo: Sequence[Part], dry: bool, before: Sequence[Outcome] = ()) -> None:
        self.folder, self.parts, self._dry = folder, list(todo), dry
        earlier = {outcome.name: outcome for outcome in before}
        self.outcomes = {part.name: earlier.get(part.name, Outcome(part.name)) for part in todo}
        for outcome in self.outcomes.values():
            if outcome.status == "running":
                outcome.status, outcome.reason = "cut off", "the session ended while it ran"
        self._facts = provenance.collect("cpu" if dry else "cuda")
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
            # What is left goes to what did not end, as long as it gets on.
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
            process = subprocess.Popen(
                [*program, *part.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,  # not in a tree that is not installed, where half of the package would be found
                env=environment,
                start_new_session=True,  # so that what it starts is ended with it
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return "timed out", f"it was ended after {seconds:.0f} s"
            finally:
                _end(process)
        return ("passed", "") if status == 0 else ("failed", f"exit status {status}: {self._complaint(part)}")

    def _complaint(self, part: Part) -> str:
        text = (self.folder / "logs" / f"{part.name}.log").read_text(encoding="utf-8", errors="replace")
        return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "")

    def write(self) -> None:
        """session.json, which a later session reads, and summary.md, which people do."""
        state = {"dry": self._dry, "provenance": self._facts, "parts": [asdict(o) for o in self.outcomes.values()]}
        _replace(self.folder / "session.json", json.dumps(state, indent=1) + "\n")
        _replace(self.folder / "summary.md", self._summary())

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
