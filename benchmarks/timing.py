"""Time: contenders taking turns, run by run, on the clock of their device."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, Protocol

import torch

SAMPLE = 0.02  # seconds: shorter calls are repeated until a sample lasts this long
REST = 0.01  # seconds: the threads of the contender before, which may spin while they wait for work, go to sleep
ROUNDS = 5  # at the least, whatever the time
MOST_CALLS = 10_000  # in a sample


class Clock(Protocol):
    """How long work takes on a device."""

    def now(self) -> float:
        """Seconds, of the wall."""

    def rest(self) -> None:
        """Leaves the machine as if nothing had run before."""

    def sample(self, work: Callable[[], object], calls: int) -> float:
        """Seconds of one call, out of `calls` in a row."""


class CpuClock:
    """Wall time. A sample of several calls begins with one that is not counted, so that caches hold its own data."""

    def now(self) -> float:
        return time.perf_counter()

    def rest(self) -> None:
        time.sleep(REST)

    def sample(self, work: Callable[[], object], calls: int) -> float:
        if calls > 1:
            work()
        begin = self.now()
        for _ in range(calls):
            work()
        return (self.now() - begin) / calls


class CudaClock:
    """CUDA events around the calls, after the L2 cache was overwritten; the overwriting also hides the first launch."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties("cuda").L2_cache_size
        self._flush = torch.empty(2 * size, dtype=torch.int8, device="cuda")

    def now(self) -> float:
        return time.perf_counter()

    def rest(self) -> None:
        torch.cuda.synchronize()

    def sample(self, work: Callable[[], object], calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


def mark(clock: Clock) -> Any:
    """This moment on the clock of a device, for `between`."""
    if isinstance(clock, CpuClock):
        return clock.now()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Any, end: Any) -> float:
    """Seconds from one `mark` to another; waits for the second."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def clock(device: str) -> Clock:
    """The clock of "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else CpuClock()


@dataclass
class Lane:
    """One contender's work on a cell, and the seconds that a call of it took, sample by sample."""

    work: Callable[[], object]
    active: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around samples, outside of their time
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    busy_seconds: list[float] = field(default_factory=list)  # of the samples beside a busy process
    error: Exception | None = None

    def percentiles(self) -> tuple[float, float, float]:
        """The 20th, 50th and 80th percentile of the samples, of which there must be one or more."""
        return percentiles(self.seconds)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile of one or more samples."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths, halves = (quantiles(samples, n=n, method="inclusive") for n in (5, 2))
    return fifths[0], halves[0], fifths[3]


def take_turns(
    lanes: Sequence[Lane],
    clock: Clock,
    rounds: int,
    budget: float,
    repeat: bool = True,
    busy: Callable[[], AbstractContextManager[Any]] | None = None,
) -> None:
    """Samples every lane once in each round, every round beginning with another one.

    Args:
        lanes: `calls`, `seconds` and `error` are filled in. A lane that raises is out, and keeps the error.
        clock: the device's.
        rounds: how many at most.
        budget: seconds of wall time, after which no round begins unless there were fewer than `ROUNDS`.
        repeat: put as many calls into a sample as make it last `SAMPLE` seconds; otherwise one.
        busy: entered in every round, after it; all lanes are sampled in it once more, into `busy_seconds`.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        for lane in lanes:
            _attempt(lane, lambda lane=lane: _calibrate(lane, clock, repeat))  # type: ignore[misc]
        begin = clock.now()
        for k in range(rounds):
            if k >= ROUNDS and clock.now() - begin > budget:
                break
            first = k % len(lanes) if lanes else 0
            order = (*lanes[first:], *lanes[:first])
            _turn([(lane, lane.seconds) for lane in order], clock)
            if busy is not None:
                with busy():
                    _turn([(lane, lane.busy_seconds) for lane in order], clock)
    finally:
        if collecting:
            gc.enable()


def _turn(samples: Sequence[tuple[Lane, list[float]]], clock: Clock) -> None:
    for lane, seconds in samples:
        clock.rest()
        _attempt(lane, lambda lane=lane, to=seconds: to.append(clock.sample(lane.work, lane.calls)))  # type: ignore[misc]


def _calibrate(lane: Lane, clock: Clock, repeat: bool) -> None:
    lane.work()
    once = clock.sample(lane.work, 1)
    lane.calls = min(max(math.ceil(SAMPLE / max(once, 1e-9)), 1), MOST_CALLS) if repeat else 1


def _attempt(lane: Lane, step: Callable[[], None]) -> None:
    if lane.error is None:
        try:
            with lane.active():
                step()
        except Exception as error:  # of whatever kind: the others go on
            lane.error = error
