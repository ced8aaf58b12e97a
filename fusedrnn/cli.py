"""python -m fusedrnn: information about the installation, correctness checks, benchmarks and tuning."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from textwrap import indent
from typing import Any, TypeVar

import torch

from . import __version__, check, dispatch, ops, testing
from .check import Outcome
from .tuning import choice, profile

Item = TypeVar("Item")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: what follows the program's name; sys.argv[1:] by default.

    Returns:
        The exit status: 0, or 1 if a check failed; for `bench` and `tune` theirs. 130 after Ctrl-C (SIGINT); 141 if
        the reader of the output has ended (SIGPIPE), as in a shell.

    Raises:
        SystemExit: status 2 for wrong or missing arguments, status 0 after --help and --version.
    """
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit
        return 141
    return status


def _run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["bench"]:
        from .benchmarks import command  # not needed by the other commands

        return command.main(arguments[1:])
    if arguments[:1] == ["tune"]:
        from .tuning import command as tuning  # the same

        return tuning.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn", description="Fused LSTM, GRU and RNN layers for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"fusedrnn {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands")

    info = commands.add_parser("info", help="show versions, devices, and which backends are available and why not")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(command=_info)

    checks = commands.add_parser(
        "check",
        help="check this installation against differences and against torch's own layers",
        description="Check derivatives against finite differences, and all results against those of torch.nn: the "
        "error may be at most twice that of torch's own implementation in the same dtype, plus rounding.",
    )
    checks.add_argument(
        "--backend",
        action="append",
        type=_backend,
        metavar="NAME",
        help=f"check this one ({', '.join(dispatch.TABLE)}), and others if given again; by default all available",
    )
    checks.add_argument("--device", choices=testing.devices(), help="check on this device; by default on all")
    checks.add_argument("--quick", action="store_true", help="small sizes only, and derivatives in random directions")
    checks.add_argument(
        "--limit",
        type=_count,
        metavar="N",
        help="only N of the jobs that can run, from all over: those farthest apart first",
    )
    checks.add_argument("--json", action="store_true", help="print every outcome as JSON, and not a table")
    checks.add_argument("--record", metavar="FILE", help="append every outcome to this file as it comes, as JSON lines")
    checks.set_defaults(command=_check, error=checks.error)

    commands.add_parser("tune", help="measure what is fastest on this machine, for `auto` to know", add_help=False)
    commands.add_parser("bench", help="measure speed and memory against torch's own LSTM and others", add_help=False)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _backend(name: str) -> str:
    if name not in dispatch.TABLE:
        raise argparse.ArgumentTypeError(f"unknown backend {name!r}: expected one of {', '.join(dispatch.TABLE)}")
    reason = dispatch.backends()[name]
    if reason is not None:
        raise argparse.ArgumentTypeError(f"backend {name!r} is not available: {reason}")
    return name


def _info(options: argparse.Namespace) -> int:
    facts = _facts()
    print(json.dumps(facts, indent=2) if options.json else "\n".join(_lines(facts)))
    return 0


def _facts() -> dict[str, Any]:
    return {
        "versions": {
            "fusedrnn": __version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "triton": _triton_version(),
        },
        "devices": {device: _device_name(device) for device in testing.devices()},
        "threads": torch.get_num_threads(),
        "instruction set": _instruction_set(),
        "backends": {name: reason or "available" for name, reason in dispatch.backends().items()},
        "profiles": _profiles(),
        dispatch.ENVIRONMENT_VARIABLE: os.environ.get(dispatch.ENVIRONMENT_VARIABLE),
        profile.PROFILE_VARIABLE: os.environ.get(profile.PROFILE_VARIABLE),
        "build": ops.build_info(),
    }


def _profiles() -> dict[str, Any]:
    """For each device the profiles that `auto` uses, by precedence, and the files that it ignores."""
    found: dict[str, Any] = {}
    for device in testing.devices():
        table = choice.table(device, choice.which(device))
        found[device] = [
            str(source) for source in table.sources
        ] or "none: a rule decides; python -m fusedrnn tune measures"
        found |= {f"ignored {path}": reason for path, reason in table.ignored.items()}
    return found


def _instruction_set() -> str | None:
    """The instruction set of the cpu backend."""
    if ops.cpu_unavailable is not None:
        return None
    try:
        return torch.ops.fusedrnn.cpu_isa(None)
    except RuntimeError as error:  # FUSEDRNN_CPU_ISA names one that is not available
        return str(error)


def _triton_version() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def _device_name(device: str) -> str:
    if device == "cuda":
        return ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _lines(facts: dict[str, Any], margin: str = "") -> Iterator[str]:
    width = max(len(name) for name in facts)
    for name, fact in facts.items():
        if isinstance(fact, dict) and fact:
            yield f"{margin}{name}"
            yield from _lines(fact, margin + "  ")
        else:
            text = ("; " if name in testing.devices() else " ").join(fact) if isinstance(fact, list) else fact
            yield f"{margin}{name:{width}}  {'none' if text in (None, '', {}) else text}"


def _check(options: argparse.Namespace) -> int:
    devices = [options.device] if options.device else testing.devices()
    available = [name for name, reason in dispatch.backends().items() if reason is None]
    backends = list(dict.fromkeys(options.backend or available))
    for name in options.backend or []:
        smallest = (dispatch.Problem(device, torch.float32, T=1, B=1, I=1, H=1, P=1, D=1) for device in devices)
        with dispatch.use_backend(name):  # as `check` does: some backends run only when requested by name
            reasons = [dispatch.supports(name, problem) for problem in smallest]
        if None not in reasons:
            options.error(f"argument --backend: backend {name!r} cannot be checked here: {reasons[0]}")

    jobs = check.jobs(devices, options.quick)
    if options.limit is not None:
        jobs = list(islice((job for job in _spread(jobs) if check.applies(job, backends)), options.limit))
    outcomes: list[Outcome] = []
    with _record(options) as record:
        for job in _progress(jobs):
            made = check.run(job, backends)
            outcomes += made
            record(made)

    failures = [(o.job, o.backend, o.failure) for o in outcomes if o.failure is not None]
    checked = {o.backend for o in outcomes if o.inapplicable is None}
    idle = [name for name in options.backend or [] if name not in checked] if checked else backends
    if options.json:
        print(json.dumps({"outcomes": [_fields(o) for o in outcomes], "nothing_checked_on": idle}, indent=2))
        return 1 if failures or idle else 0
    print("\n".join(_table(outcomes)))
    for name, reason in dispatch.backends().items():
        if name not in backends:
            print(f"not checked: {name}: {reason or 'it was not asked for'}")
    inapplicable = Counter((o.backend, o.job.device, o.inapplicable) for o in outcomes if o.inapplicable is not None)
    for (backend, device, reason), count in inapplicable.items():
        print(f"n/a: {count} on {backend}, {device}: {reason}")
    for job, backend, failure in failures:
        print(f"FAILED {job.check} on {backend}, {job.device}: {job.case.id}\n{indent(failure, '  ')}")
    for name in idle:
        print(f"FAILED: nothing was checked on {name}: no job of these is one that it computes")
    return 1 if failures or idle else 0


def _spread(jobs: list[check.Job]) -> list[check.Job]:
    """Shuffles the jobs, so that every prefix is representative; jobs of a case, which share work, stay together."""
    cases: dict[tuple[Any, ...], list[check.Job]] = {}
    for job in jobs:
        cases.setdefault((job.case, job.device), []).append(job)
    groups = list(cases.values())
    stride = next(k for k in range(int(0.618 * len(groups)) + 1, 2 * len(groups) + 2) if math.gcd(k, len(groups)) == 1)
    return [job for k in range(len(groups)) for job in groups[k * stride % len(groups)]]


@contextmanager
def _record(options: argparse.Namespace) -> Iterator[Callable[[list[Outcome]], None]]:
    """A function that appends outcomes to the file of --record, if given; an interrupt keeps what was written."""
    if options.record is None:
        yield lambda outcomes: None
        return
    try:
        file = open(options.record, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        options.error(f"argument --record: {options.record}: {error.strerror}")

    def record(outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            file.write(json.dumps(_fields(outcome)) + "\n")
        file.flush()

    with file:
        yield record


def _fields(outcome: Outcome) -> dict[str, Any]:
    job = outcome.job
    of_job = {"check": job.check, "case": job.case.id, "device": job.device, "backend": outcome.backend}
    return of_job | {"excess": outcome.excess, "failure": outcome.failure, "inapplicable": outcome.inapplicable}


def _progress(items: list[Item]) -> Iterable[Item]:
    """The items, with a progress bar if the output is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return items
    return tqdm(items, file=sys.stderr, disable=None, leave=False, unit="job")


def _table(outcomes: list[Outcome]) -> list[str]:
    """One line for each check on each backend, with the largest error of a comparison over its tolerance."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        check_name, case, device, _ = outcome.job
        key: tuple[str, ...] = (check_name, str(case.dtype).removeprefix("torch."), outcome.backend, device)
        groups.setdefault(key, []).append(outcome)
    rows: list[tuple[str, ...]] = [("check", "dtype", "backend", "device", "passed", "failed", "n/a", "error/allowed")]
    for key, group in groups.items():
        failed, skipped = sum(o.failure is not None for o in group), sum(o.inapplicable is not None for o in group)
        excesses = [o.excess for o in group if o.excess is not None]
        counts = (str(len(group) - failed - skipped), str(failed), str(skipped))
        rows.append((*key, *counts, f"{max(excesses):.2f}" if excesses else "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{text:{'<' if k < 4 else '>'}{widths[k]}}" for k, text in enumerate(row)) for row in rows]
