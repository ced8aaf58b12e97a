"""Every plan that a backend chooses, or could, held to the rule of fusedrnn/testing.py: forward, and all gradients.

What is asked of a backend is the grid of sizes and dtypes that it is timed on, and options. Two problems that get the
same plan are one trial. Where a planner can be told which plan to take (`FORCED`), those that it does not choose
follow, one for each kernel that is compiled differently.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from fusedrnn.kernels import plan as planner
from fusedrnn.kernels.device import device_of

import fusedrnn
from fusedrnn import cuda, dispatch

from .cases import BenchmarkCase, cell
from .contender import OURS, Contender
from .contenders import entered
from .results import Row
from .run import blame, blank
from .verify import WrongError, products, worst_error

_DTYPES = ("bfloat16", "tf32", "float16", "float32")
_HIDDEN = (128, 256, 512, 768, 1024, 1536, 2048)
_BATCH = (1, 8, 16, 32, 64, 128, 256)
PATIENCE = 40.0  # seconds for a trial: Triton compiles two kernels in it
_PREDICTED = re.compile(r",? *[\d.]+ us a step predicted")


@dataclass(frozen=True)
class Trial:
    """One problem, and the plan that it is computed with."""

    backend: str
    cell: BenchmarkCase
    plan: str  # as `explain` shows it, without what it predicts
    forced: tuple[Any, Any] | None = None  # forward and backward, instead of those chosen

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifies a row of results as the outcome of this trial: its contender, case and `ran`."""
        return OURS + self.backend, self.cell.id, self.plan


def trials(backend: str, device: str, shrink: int = 1) -> list[Trial]:
    """The trials: chosen plans first, in a coarse grid, then the others.

    Args:
        backend: a name from `fusedrnn.backends()`, available here.
        device: where.
        shrink: divides B and H.
    """
    chosen: dict[str, Trial] = {}
    with fusedrnn.use_backend(backend):
        for made in _problems(device, shrink):
            case = made.case
            options = {"lengths": case.lengths, "reset": case.reset}
            sizes = (case.T, case.B, case.I, case.H, case.H, made.D)
            problem = dispatch.Problem(device, case.dtype, *sizes, cell=case.cell, **options)
            with products(made.tf32):
                if dispatch.supports(backend, problem) is None:
                    plan = _PREDICTED.sub("", dispatch.TABLE[backend].plan(problem))
                    chosen.setdefault(f"{case.cell} {made.dtype} {plan}", Trial(backend, made, plan))
    found = list(chosen.values())
    return [*found, *FORCED[backend](found, device)] if backend in FORCED else found


def _problems(device: str, shrink: int) -> Iterator[BenchmarkCase]:
    dtypes = _DTYPES if device == "cuda" else ("float32", "bfloat16")

    def problem(
        T: int, B: int, H: int, dtype: str, variant: str = "plain", D: int = 1, kind: str = "lstm"
    ) -> BenchmarkCase:
        B, H = max(B // shrink, 1), max(H // shrink, 2)
        return cell((T, B, H, H, 1, D), "train", dtype, variant, device, kind)

    T = 128 if shrink == 1 else 4
    for dtype, H, B in itertools.product(dtypes, (128, 512, 1024, 2048), (1, 64, 256)):
        yield problem(T, B, H, dtype)
    for dtype, H, variant in itertools.product(dtypes, (100, 256, 1024), ("lengths", "reset")):
        yield problem(T, 32, H, dtype, variant, D=2)
    for dtype, H, kind in itertools.product(dtypes, (128, 1024), ("gru", "rnn_tanh")):
        yield problem(T, 64, H, dtype, kind=kind)
        yield problem(T, 32, H, dtype, "reset", D=2, kind=kind)
    for dtype, H, B in itertools.product(dtypes, _HIDDEN, _BATCH):
        yield problem(T, B, H, dtype)
        yield problem(1, B, H, dtype)


def _triton_trials(chosen: list[Trial], device: str) -> Iterator[Trial]:
    """Plans of the Triton kernels that fit and are not chosen: as many pairs as hold every kernel once."""
    from fusedrnn.kernels import launch

    there = planner.INTERPRETER if launch.INTERPRETED else device_of(torch.cuda.get_device_properties(0))

    def fitting(kernel: str, shape: planner.Shape) -> list[Any]:
        return [plan for plan in planner.plans(kernel, shape, there) if plan.shared <= there.shared]

    return _pairs(chosen, fitting, lambda kernel, plan: tuple(plan.constants(kernel).items()))


def _cuda_trials(chosen: list[Trial], device: str) -> Iterator[Trial]:
    """Trials of the C++ kernels, which take most of a plan at run time: every code path once."""
    there = cuda.device_for(torch.device(device))

    def way(kernel: str, plan: cuda.Plan) -> tuple[Any, ...]:
        return plan.regime, plan.math, plan.rows, plan.splits > 1, plan.tiles > 1, plan.blocks > 1

    return _pairs(chosen, lambda kernel, shape: cuda.fitting(kernel, shape, there), way)


def _pairs(
    chosen: list[Trial],
    fits: Callable[[str, planner.Shape], list[Any]],
    constants: Callable[[str, Any], tuple[Any, ...]],
) -> Iterator[Trial]:
    """Pairs of plans that fit, as many as hold once all that `constants` tells apart."""
    seen: set[tuple[Any, ...]] = set()
    for trial in chosen:
        case = trial.cell.case
        itemsize = torch.empty(0, dtype=case.dtype).element_size()
        precision = "tf32" if trial.cell.tf32 else "ieee"
        ragged = trial.cell.variant != "plain"
        sizes = (case.T, case.B, case.I, case.H, case.H, trial.cell.D)
        shape = planner.Shape(*sizes, itemsize, precision, ragged, case.cell)
        fitting = [fits(kernel, shape) for kernel in ("forward", "backward")]
        # The shorter list begins anew.
        for forward, backward in itertools.islice(
            zip(itertools.cycle(fitting[0]), itertools.cycle(fitting[1]), strict=False), max(map(len, fitting))
        ):
            new = {
                (kernel, case.cell, shape.itemsize, precision, ragged, constants(kernel, plan))
                for kernel, plan in (("forward", forward), ("backward", backward))
            }
            if not new <= seen:
                seen |= new
                plan = _PREDICTED.sub("", f"forward: {forward}; backward: {backward}")
                yield replace(trial, plan=plan, forced=(forward, backward))


def _forced_in_triton(forward: planner.Plan, backward: planner.Plan) -> AbstractContextManager[None]:
    from fusedrnn.kernels import launch

    return _forced(launch, forward, backward)


def _forced_in_cuda(forward: cuda.Plan, backward: cuda.Plan) -> AbstractContextManager[None]:
    return _forced(cuda, forward, backward)


@contextmanager
def _forced(module: Any, forward: Any, backward: Any) -> Iterator[None]:
    before = module.plan_for
    module.plan_for = lambda kernel, *_: forward if kernel == "forward" else backward
    try:
        yield
    finally:
        module.plan_for = before


# By backend: the trials of plans that it does not choose, and what makes it take them.
FORCED: dict[str, Callable[[list[Trial], str], Iterator[Trial]]] = {"triton": _triton_trials, "cuda": _cuda_trials}
_FORCES: dict[str, Callable[..., AbstractContextManager[None]]] = {
    "triton": _forced_in_triton,
    "cuda": _forced_in_cuda,
}


def forcing(backend: str, forward: Any, backward: Any) -> AbstractContextManager[None]:
    """A backend takes these plans, whatever the problem."""
    return _FORCES[backend](forward, backward)


def _row(trial: Trial) -> Row:
    """The row of a trial that nothing is known of yet; its `ran` is the plan."""
    row = blank("plans", trial.cell, _contender(trial))
    row.ran = trial.plan
    return row


def _contender(trial: Trial) -> Contender:
    return entered([trial.backend], [], trial.cell.case.cell)[-1]


def attempt(trial: Trial) -> Row:
    """The outcome of a trial, as a row of results without a time."""
    row, contender = _row(trial), _contender(trial)
    forced = forcing(trial.backend, *trial.forced) if trial.forced else nullcontext()
    try:
        with forced:
            row.excess = worst_error(trial.cell, contender, trial.cell.case.module(contender.build, trial.cell.device))
    except WrongError as error:
        row.status, row.reason, row.excess = "wrong", str(error), error.excess
    except Exception as error:  # of whatever kind: it is this plan that failed
        blame(row, error)
    return row


def _work(trials: Connection) -> None:
    """A process of its own: a row for each trial that it is sent, and whether the device has failed. Then it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ended by the one that started it
    usable = True
    while usable:
        trial = trials.recv()
        row, usable = attempt(trial), responds(trial.cell.device)
        trials.send((row, usable))


def responds(device: str) -> bool:
    """Whether the device still computes for this process. What kernels have printed is printed before."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except Exception:  # torch's own types for it differ from version to version
        return False
    finally:
        ctypes.CDLL(None).fflush(None)
    return True


@dataclass
class _Worker:
    """A process that tries plans, and what it is at."""

    process: Any
    trials: Connection
    trial: Trial
    until: float  # on the monotonic clock


def _started() -> tuple[Any, Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen
    return process, ours


def run(todo: list[Trial], jobs: int, seconds: float = PATIENCE) -> Iterator[tuple[Trial, Row]]:
    """Trials and their outcomes, as they come.

    Args:
        todo: what to try.
        jobs: processes that share the device, since most of the time goes into compiling; 1 for this one. One whose
            device has failed is replaced, and so is one that died or hangs: then the trial has failed.
        seconds: for one trial, and the start of its process, in a process of its own.
    """
    if jobs == 1:
        yield from ((trial, attempt(trial)) for trial in todo)
        return
    waiting, idle, workers = deque(todo), list[tuple[Any, Connection]](), list[_Worker]()
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                process, trials = idle.pop() if idle else _started()
                trial = waiting.popleft()
                trials.send(trial)
                workers.append(_Worker(process, trials, trial, time.monotonic() + seconds))
            patience = min(worker.until for worker in workers) - time.monotonic()
            ready = wait([worker.trials for worker in workers], max(patience, 0.0))
            for worker in [one for one in workers if one.trials in ready or one.until <= time.monotonic()]:
                workers.remove(worker)
                row, usable = _outcome(worker, seconds)
                if usable:
                    idle.append((worker.process, worker.trials))
                else:
                    worker.process.kill()
                yield worker.trial, row
    finally:
        for process, _ in [*idle, *((worker.process, worker.trials) for worker in workers)]:
            process.kill()


def _outcome(worker: _Worker, seconds: float) -> tuple[Row, bool]:
    """The row of a trial that has ended, or has to, and whether its process can go on."""
    try:
        if worker.trials.poll():
            return worker.trials.recv()
        reason = f"it did not end within {seconds:.0f} s"
    except (EOFError, OSError):
        worker.process.join(1.0)
        reason = f"its process ended with status {worker.process.exitcode}"
    row = _row(worker.trial)
    row.status, row.reason = "failed", reason
    return row, False


def processes(device: str) -> int:
    """The number of processes that share a device."""
    return min(8, max(1, (os.cpu_count() or 1) // 2)) if device == "cuda" else 1
