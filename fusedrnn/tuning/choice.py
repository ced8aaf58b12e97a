"""The order of backends for a call, from measured times.

The nearest few measurements of the same kind (`Key.kind`) count, weighted by the distance between the logarithms of
sizes. A backend comes before torch's own layer if it was at least as fast beyond the noise of the samples. Without near
measurements a fixed rule decides. The order depends only on shapes, dtype, mode, number of threads and files: the same
call in another process gets the same backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from heapq import nsmallest
from typing import NamedTuple

import torch

from ..cells import CELLS, VARIANTS, lstm_variant
from ..version import __version__
from . import machine, profile
from .profile import AHEAD, BASELINE, Key, Measurement, Ratio, Source, baseline

# Distance for a factor of 2 in each size.
_WEIGHTS = {"T": 0.25, "B": 1.0, "I": 0.5, "H": 1.0, "L": 0.25, "D": 1.0}
_NEIGHBOURS = 4
_FAR = 2.0  # measurements farther away are ignored
_ENOUGH = math.log(1.25)  # logarithms of ratios are clamped to this
_SMALL = 1 << 13  # the rule sends inputs with fewer elements to the cpu backend
_SMALLER = 8  # inputs smaller by this factor than any that torch's own layer won with go to the cpu backend


class Choice(NamedTuple):
    """The order for one call, and the reason."""

    order: tuple[str, ...]  # all backends; the first that supports the call runs it
    ratios: dict[str, Ratio]  # the expected ratio of each backend with near measurements
    reason: str  # one line


class Known(NamedTuple):
    """A measurement and its profile."""

    measurement: Measurement
    source: Source


@cache
def stand_in(cell: str) -> str:
    """The cell whose measurements count where `cell` has none.

    Of a variant of the LSTM that is the one with all options, whose kernels have every part of its own.
    """
    if cell in VARIANTS:
        gates, noise = VARIANTS[cell].gates, VARIANTS[cell].noise
        return lstm_variant(True, "f" not in gates, ("h", "c", "r" if "r" in noise else "g")).name
    return "rnn_tanh" if cell == "rnn_relu" else cell


class Table:
    """All measurements for one device and number of threads."""

    def __init__(self, here: machine.Machine, threads: int | None) -> None:
        versions = {"fusedrnn": __version__, "torch": torch.__version__}
        self._read(here, *profile.find(here, threads, versions))

    def _read(self, here: machine.Machine, sources: list[Source], ignored: dict[str, str]) -> None:
        self.machine, self.sources, self.ignored = here, sources, ignored
        self._kinds: dict[tuple[object, ...], dict[Key, Known]] = {}
        self._smalls: dict[tuple[str, str, bool, bool], int] = {}
        self._verdicts: dict[tuple[str, str], dict[str, str | None]] = {}  # (cell, dtype) -> backend -> failure
        for source in self.sources:
            for key, measurement in source.profile.measurements.items():
                self._kinds.setdefault(key.kind, {}).setdefault(key, Known(measurement, source))
            self._judge(source)

    def _judge(self, source: Source) -> None:
        """One failure disables a backend for a cell and dtype. The profile of higher precedence decides."""
        verdicts: dict[tuple[str, str], dict[str, str | None]] = {}
        for key, measurement in source.profile.measurements.items():
            verdict = verdicts.setdefault((key.cell, key.dtype), {})
            for name in measurement.ratios:
                verdict.setdefault(name, None)
            for name, reason in measurement.failures.items():
                verdict[name] = f"{reason} ({key.label}; {source.path.name})"
        for about, verdict in verdicts.items():
            self._verdicts[about] = verdict | self._verdicts.get(about, {})

    def verdict(self, name: str, dtype: str, cell: str = "lstm") -> tuple[bool, str | None]:
        """Whether there is a verdict on a backend in a dtype, and its failure or None."""
        verdict = self._verdicts.get((cell, dtype), {})
        if (
            cell in VARIANTS and name not in verdict
        ):  # of the same kernels; those of an RNN with relu differ from tanh's
            verdict = self._verdicts.get((stand_in(cell), dtype), {})
        return name in verdict, verdict.get(name)

    def choose(self, key: Key, names: Sequence[str]) -> Choice:
        """The order of all names for a call; failed backends come last."""
        choice = self._choose(key, names)
        wrong = [name for name in names if self.verdict(name, key.dtype, key.cell)[1] is not None]
        return choice._replace(order=(*(name for name in choice.order if name not in wrong), *wrong))

    def _choose(self, key: Key, names: Sequence[str]) -> Choice:
        near = self._near(key)
        if not near:
            ruled = _by_rule(key, self.machine, names)
            return Choice(ruled, {}, f"nothing like {key.label} has been measured here: a rule decides ({_ADVICE})")
        ratios = _expected(near)
        numbers = key.T * key.B * key.I
        if self.machine.device == "cpu" and numbers <= self.small(key.cell, key.dtype, key.train, key.step):
            return Choice(_first("cpu", names), ratios, f"{_described(near)}; what is so small runs on cpu")
        ahead = [name for name in ratios if _leads(name, near)]
        behind = [name for name in ratios if name not in ahead]
        order = [*_fastest(ahead, ratios), baseline(key.cell), *_fastest(behind, ratios)]
        order = [name for name in order if name in names]
        return Choice((*order, *(name for name in names if name not in order)), ratios, _described(near))

    def small(self, cell: str, dtype: str, train: bool, step: bool) -> int:
        """The input size in elements up to which the cpu backend is always the choice.

        It does not depend on the number of threads: all profiles have the same weight here.

        Args:
            cell, dtype, train, step: as in `Key`.
        """
        about = stand_in(cell), dtype, train, step
        if about not in self._smalls:
            self._smalls[about] = self._smallest_lost(*about)
        return self._smalls[about]

    def _smallest_lost(self, cell: str, dtype: str, train: bool, step: bool) -> int:
        limit = _SMALL
        for source in self.sources:
            for key, measurement in source.profile.measurements.items():
                if (stand_in(key.cell), key.dtype) != (cell, dtype):
                    continue
                if "cpu" in measurement.failures:
                    return -1
                lost = "cpu" in measurement.ratios and measurement.ratios["cpu"].low < AHEAD
                if lost and (key.train, key.step) == (train, step):
                    limit = min(limit, key.T * key.B * key.I // _SMALLER)
        return limit

    def overall(self, dtype: str, names: Sequence[str], cell: str = "lstm") -> tuple[str, ...]:
        """The order for calls of any shape: by the mean over all measurements in a dtype."""
        logs: dict[str, list[float]] = {baseline(cell): [0.0]}
        for known in self._kinds.values():
            for key, (measurement, _) in known.items():
                if (key.cell, key.dtype) in ((cell, dtype), (stand_in(cell), dtype)):
                    for name, ratio in measurement.ratios.items():
                        logs.setdefault(name, []).append(math.log(ratio.median))
        ranked = sorted((name for name in logs if name in names), key=lambda name: -sum(logs[name]) / len(logs[name]))
        return (*ranked, *(name for name in names if name not in ranked))

    def _near(self, key: Key) -> list[tuple[float, Known]]:
        """Weights and measurements of the nearest few, nearest first; empty if all are too far away."""
        near = self._nearest(key)
        return near or self._nearest(key._replace(cell=stand_in(key.cell)))

    def _nearest(self, key: Key) -> list[tuple[float, Known]]:
        known = self._kinds.get(key.kind, {})
        if key in known:
            return [(1.0, known[key])]
        here = _place(key)
        nearest = nsmallest(_NEIGHBOURS, ((math.dist(here, _place(other)), other) for other in known))
        if not nearest or nearest[0][0] > _FAR:
            return []
        return [(distance**-2, known[other]) for distance, other in nearest]


_ADVICE = "python -m fusedrnn tune measures"


@lru_cache(maxsize=8192)
def _place(key: Key) -> tuple[float, ...]:
    """The coordinates of a key, for distances to others of its kind."""
    return tuple(weight * math.log2(getattr(key, name)) for name, weight in _WEIGHTS.items())


def _expected(near: Sequence[tuple[float, Known]]) -> dict[str, Ratio]:
    """The weighted mean ratios of every backend in the measurements."""
    expected = {}
    for name in dict.fromkeys(name for _, known in near for name in known.measurement.ratios):
        found = [(weight, known.measurement.ratios[name]) for weight, known in near if name in known.measurement.ratios]
        total = sum(weight for weight, _ in found)
        low, median = (sum(weight * math.log(ratio[k]) for weight, ratio in found) / total for k in (0, 1))
        expected[name] = Ratio(math.exp(low), math.exp(median))
    return expected


def _leads(name: str, near: Sequence[tuple[float, Known]]) -> bool:
    """Whether a backend beats torch's own beyond the noise; a neighbour without it counts as slow."""
    lead = 0.0
    for weight, (measurement, _) in near:
        ratio = measurement.ratios.get(name)
        lead += weight * (-_ENOUGH if ratio is None else min(max(math.log(ratio.low / AHEAD), -_ENOUGH), _ENOUGH))
    return lead >= 0


def _fastest(names: Iterable[str], ratios: dict[str, Ratio]) -> list[str]:
    return sorted(names, key=lambda name: -ratios[name].median)


def _first(name: str, names: Sequence[str]) -> tuple[str, ...]:
    return (name, *(other for other in names if other != name))


def _by_rule(key: Key, here: machine.Machine, names: Sequence[str]) -> tuple[str, ...]:
    """The order without near measurements. On a GPU: torch's own, then verified backends.

    On a CPU our kernels, except for batched training in float32 on processors with AVX-512, where our kernels measured
    0.83 to 1.3 times the speed of torch's own.
    """
    if here.device != "cpu":
        return _first(BASELINE, names)
    plain = key.dtype == "float32" and not key.packed and not key.projected and key.T * key.B * key.I > _SMALL
    wide = here.family.endswith(("-amx", "-avx512", "-avx512_bf16"))
    batch = key.T > 1 and key.train and key.B >= 32 and key.H >= 192
    return _first(BASELINE if plain and wide and batch else "cpu", names)


def _described(near: Sequence[tuple[float, Known]]) -> str:
    (_, (measurement, source)), *others = near
    more = f" and {len(others)} more" if others else ""
    return f"measured at {measurement.key.label}{more}; {source}"


# The tables of this process.

reads = 0  # how often `forget` was called: part of the keys of caches of choices
# The least `Table.small` of all dtypes, by cell, train and step, once a table of the CPU has been read.
_UNREAD = dict.fromkeys(CELLS, ((-1, -1), (-1, -1)))
small = _UNREAD


def which(device: str) -> int | None:
    """The second key of a table: the number of threads of a CPU, the index of a GPU."""
    if device == "cuda":
        return torch.cuda.current_device()
    return torch.get_num_threads()


@lru_cache(maxsize=64)
def table(device: str, which: int | None) -> Table:
    """The table of a device type, "cpu" or "cuda"; read from files at the first call."""
    global small
    made = Table(machine.here(device), which if device == "cpu" else None)
    if device == "cpu":

        def least(cell: str, train: bool, step: bool) -> int:
            return min(made.small(cell, dtype, train, step) for dtype in ("float32", "float64", "bfloat16", "float16"))

        small = {
            cell: (
                (least(cell, False, False), least(cell, False, True)),
                (least(cell, True, False), least(cell, True, True)),
            )
            for cell in CELLS
        }
    return made


@lru_cache(maxsize=8192)
def choose(device: str, which: int | None, key: Key, names: tuple[str, ...]) -> Choice:
    """`Table.choose`, cached."""
    return table(device, which).choose(key, names)


def forget() -> None:
    """Clears all tables: the next call reads FUSEDRNN_PROFILE and the profiles again."""
    global small, reads
    table.cache_clear()
    choose.cache_clear()
    small, reads = _UNREAD, reads + 1
