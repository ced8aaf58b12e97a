"""The table at the end of a run: the fastest backend for each size, and its ratio."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .profile import AHEAD, BASELINE, Key, Measurement, Ratio, baseline

_MOST_ROWS = 60  # above this, rows are groups of measurements


def winner(measurement: Measurement) -> str:
    """The backend that a call with exactly this key runs on."""
    ahead = {name: ratio.median for name, ratio in measurement.ratios.items() if ratio.low >= AHEAD}
    return max(ahead, key=lambda name: ahead[name]) if ahead else baseline(measurement.key.cell)


def table(measurements: Iterable[Measurement]) -> list[str]:
    """A line for each measurement, or for each group if there are many; then the failures and a count."""
    found = list(measurements)
    timed = [m for m in found if m.ms]
    lines = _aligned(_single(timed) if len(timed) <= _MOST_ROWS else _grouped(timed)) if timed else []
    lines += [
        f"FAILED {name}: {m.key.label}: {reason}; it is not used in {m.key.dtype} here"
        for m in found
        for name, reason in m.failures.items()
    ]
    wins: dict[str, int] = {}
    for m in timed:
        wins[winner(m)] = wins.get(winner(m), 0) + 1
    told = ", ".join(f"{_name(name)} {count}" for name, count in sorted(wins.items(), key=lambda item: -item[1]))
    return [*lines, f"fastest: {told}" if wins else "nothing was measured"]


def _name(backend: str) -> str:
    return "torch's own" if backend == BASELINE else backend


def _single(timed: list[Measurement]) -> list[tuple[str, ...]]:
    names = _backends(timed)
    head = ("dtype", "mode", "what", "T", "B", "I", "H", "L", "D", "baseline ms")
    rows = [(*head, *(part for name in names for part in (f"{name} ms", "ratio", "at least")), "fastest")]
    for m in timed:
        key = m.key
        sizes = tuple(str(size) for size in (key.T, key.B, key.I, key.H, key.L, key.D))
        row = (key.dtype, _mode(key), _what(key), *sizes, f"{m.ms[baseline(key.cell)]:.3g}")
        for name in names:
            ratio = m.ratios.get(name)
            row += (f"{m.ms[name]:.3g}", *_told(ratio)) if ratio else ("", "", "")
        rows.append((*row, _name(winner(m))))
    return rows


def _grouped(timed: list[Measurement]) -> list[tuple[str, ...]]:
    names = _backends(timed)
    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for m in timed:
        steps = "1" if m.key.T == 1 else "> 1"
        groups.setdefault((m.key.dtype, _mode(m.key), _what(m.key), steps, str(m.key.B)), []).append(m)
    columns = tuple(part for name in names for part in (f"{name} wins", "mean", "least", "most"))
    rows = [("dtype", "mode", "what", "T", "B", "measured", "baseline wins", *columns)]
    for group, members in sorted(groups.items(), key=lambda item: (*item[0][:4], int(item[0][4]))):
        winners = [winner(m) for m in members]
        row = (*group, str(len(members)), str(winners.count(baseline(members[0].key.cell))))
        for name in names:
            ratios = [m.ratios[name].median for m in members if name in m.ratios]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
            row += (
                (str(winners.count(name)), *(f"{r:.2f}" for r in (mean, min(ratios), max(ratios))))
                if ratios
                else ("",) * 4
            )
        rows.append(row)
    return rows


def _backends(timed: list[Measurement]) -> list[str]:
    return list(dict.fromkeys(name for m in timed for name in m.ratios))


def _mode(key: Key) -> str:
    return "train" if key.train else "infer"


def _what(key: Key) -> str:
    flags = [name for name in ("packed", "projected") if getattr(key, name)]
    return " ".join([*flags, "cell" if key.step else "layer"])


def _told(ratio: Ratio) -> tuple[str, str]:
    return f"{ratio.median:.2f}", f"{ratio.low:.2f}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{text:{'<' if k < 3 else '>'}{widths[k]}}" for k, text in enumerate(row)).rstrip() for row in rows
    ]
