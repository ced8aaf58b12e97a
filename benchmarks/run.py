"""A run: every contender on a cell is built, checked, and only then timed, in turns with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import testing

from .cases import BenchmarkCase
from .ceilings import Ceilings, Limit
from .contender import TORCHS, Contender
from .memory import peak_bytes
from .results import Row
from .timing import Clock, Lane, percentiles, take_turns
from .verify import WrongError, products, worst_error


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    rounds: int = 20  # samples of each contender, at most
    budget: float = 5.0  # seconds for a cell: when they are over, a few rounds have to do
    time_wrong: bool = False  # time also what was found wrong; its rows are marked as such all the same
    busy: Callable[[], AbstractContextManager[Any]] | None = None  # all is timed in it as well; see `busy.process`
    check_flops: float = 1e10  # on a CPU as many time steps are checked as a forward of so many operations has


def measure(
    suite: str,
    cell: BenchmarkCase,
    contenders: Sequence[Contender],
    clock: Clock,
    ceilings: Ceilings,
    settings: Settings,
) -> list[Row]:
    """One row for each contender that is available."""
    present = [contender for contender in contenders if contender.unavailable is None]
    rows = [blank(suite, cell, contender) for contender in present]
    entered = {}
    for k, contender in enumerate(present):
        lane = prepare(cell, contender, rows[k], settings)
        if lane is not None:
            entered[k] = lane
    repeat = cell.device == "cpu" or cell.streaming
    take_turns(list(entered.values()), clock, settings.rounds, settings.budget, repeat, settings.busy)
    limit = ceilings.limit(cell) if entered else None
    for k, lane in entered.items():
        if lane.error is not None:
            blame(rows[k], lane.error)
        else:
            fill(rows[k], lane, units=cell.case.T)
            _fill_limit(rows[k], cell, limit)
    fill_ratios(rows)
    if cell.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def blank(suite: str, cell: BenchmarkCase, contender: Contender) -> Row:
    """The row of a contender that nothing is known of yet."""
    case = cell.case
    sizes: dict[str, Any] = {"T": case.T, "B": case.B, "I": case.I, "H": case.H, "L": case.layers, "D": cell.D}
    names: dict[str, Any] = {name: getattr(cell, name) for name in ("mode", "device", "dtype", "variant")}
    work: dict[str, Any] = {"gflop": cell.flops / 1e9, "mbyte": cell.bytes / 1e6}
    return Row(suite, contender.name, case=cell.id, **names, **sizes, **work)


def prepare(cell: BenchmarkCase, contender: Contender, row: Row, settings: Settings) -> Lane | None:
    """Builds a contender and holds it to the rule: what is to be timed, or None, and the row then says why not."""
    with products(cell.tf32):
        reason = contender.unsupported(cell)
    if reason is not None:
        row.status, row.reason = "unsupported", reason
        return None
    try:
        module = cell.case.module(contender.build, cell.device)
        try:
            row.excess = worst_error(cell, contender, module, settings.check_flops)
        except WrongError as error:
            row.status, row.reason, row.excess = "wrong", str(error), error.excess
            if not settings.time_wrong:
                return None
        x, hx, options = _arguments(cell)
        lane = Lane(_work(cell, contender, module, x, hx, options), lambda: _conditions(cell, contender))
        with lane.active():
            row.ran = contender.ran(module, (x, hx), options)
            lane.work()
            peak = None if contender.own_allocator else peak_bytes(lane.work, cell.device)
        row.peak_mib = None if peak is None else peak / 2**20
        return lane
    except Exception as error:  # of whatever kind: it is this contender that cannot do this cell
        blame(row, error)
        return None


def blame(row: Row, error: Exception) -> None:
    """Makes an error the outcome of a row."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    row.status = "out of memory" if out_of_memory else "failed"
    row.reason = message if out_of_memory else f"{type(error).__name__}: {message}"


def _arguments(cell: BenchmarkCase) -> tuple[Any, Any, dict[str, Any]]:
    """Input, hx and keywords; in a training cell the input is a leaf that wants its gradient."""
    x, hx, options = testing.arguments(cell.case, cell.case.inputs(cell.device))
    if cell.mode == "train":
        if isinstance(x, PackedSequence):
            x = PackedSequence(x.data.detach().requires_grad_(), *x[1:])
        else:
            x.requires_grad_()
    return x, hx, options


def _work(
    cell: BenchmarkCase, contender: Contender, module: nn.Module, x: Any, hx: Any, options: dict[str, Any]
) -> Callable[[], object]:
    """One call, as it is timed. Training is the forward and the gradient of y with respect to x and the parameters."""
    if contender.work is not None:
        return contender.work(module, x, hx, options, cell.streaming)
    if cell.streaming:
        return stream(module, x, hx)
    if cell.mode != "train":
        return lambda: module(x, hx, **options)
    packed = isinstance(x, PackedSequence)
    leaf = x.data if packed else x
    leaves = [leaf, *module.parameters()]
    dy = torch.randn(*leaf.shape[:-1], cell.D * (cell.case.proj_size or cell.case.H), device=leaf.device).to(leaf.dtype)

    def train() -> tuple[Tensor, ...]:
        y = module(x, hx, **options)[0]
        return torch.autograd.grad(y.data if packed else y, leaves, dy)

    return train


def stream(module: Callable[..., Any], x: Tensor, hx: Any) -> Callable[[], object]:
    """Calls that go on from one another: each gets the state that the one before returned."""
    state = hx

    def step() -> Tensor:
        nonlocal state
        y, state = module(x, state)
        return y

    return step


@contextmanager
def _conditions(cell: BenchmarkCase, contender: Contender) -> Iterator[None]:
    with contender.active(), products(cell.tf32), torch.set_grad_enabled(cell.mode != "infer"):
        yield


def fill(row: Row, lane: Lane, units: int) -> None:
    """Puts the times of a lane, of which each call computed some units, into its row."""
    low, median, high = lane.percentiles()
    row.p20_ms, row.median_ms, row.p80_ms = low * 1e3, median * 1e3, high * 1e3
    row.samples, row.calls = len(lane.seconds), lane.calls
    row.unit_us = median / units * 1e6
    if lane.busy_seconds:
        _, busy, _ = percentiles(lane.busy_seconds)
        row.busy_ms, row.busy_factor = busy * 1e3, busy / median


def _fill_limit(row: Row, cell: BenchmarkCase, limit: Limit | None) -> None:
    if limit is not None and row.median_ms:
        row.limit_share = limit.seconds / (row.median_ms / 1e3)
        row.ceiling_gflops, row.ceiling_gbs = limit.flops_per_second / 1e9, limit.bytes_per_second / 1e9


def fill_ratios(rows: Sequence[Row]) -> None:
    """Sets every row of a cell against that of torch's own layer, if that one has a time."""
    baseline = next((row.median_ms for row in rows if row.contender in TORCHS.values()), None)
    for row in rows:
        if baseline and row.median_ms:
            row.ratio = baseline / row.median_ms
