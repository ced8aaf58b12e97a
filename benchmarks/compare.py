"""Two files of results against each other: what became faster or slower by more than the noise.

A time has changed if its middle part, from the 20th to the 80th percentile, no longer overlaps the old one, and its
median moved by more than a threshold. `relative` compares each time over that of torch's own layer in the same run
instead, which is what to look at if the machine itself was slower or faster, as the rows of that one tell.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .contender import TORCHS
from .results import Row

WORDS = ("slower", "faster", "same", "lost", "gained", "only in A", "only in B")


@dataclass(frozen=True)
class Change:
    """The comparison of one row."""

    row: Row  # of B, or of A where B has none
    word: str  # one of WORDS; lost: it had a time and was tried and has none now
    before: float | None = None  # medians, in ms or relative to torch's own layer
    after: float | None = None

    @property
    def regression(self) -> bool:
        """Whether fusedrnn became slower, or its result wrong."""
        return self.row.ours and self.word in ("slower", "lost")


def compare(before: Sequence[Row], after: Sequence[Row], threshold: float, relative: bool) -> list[Change]:
    """One change for every row with a time in either file."""
    old, new = ({row.key: row for row in rows if row.case} for rows in (before, after))
    changes = []
    for key in dict.fromkeys((*old, *new)):
        row = new.get(key) or old[key]
        a, b = (_spread(rows.get(key), rows, relative) for rows in (old, new))
        if a and b:
            changes.append(Change(row, _verdict(a, b, threshold), a[1], b[1]))
        elif a:
            changes.append(Change(row, "lost" if key in new else "only in A", before=a[1]))
        elif b:
            changes.append(Change(row, "gained" if key in old else "only in B", after=b[1]))
    return changes


def _spread(row: Row | None, rows: dict[tuple[str, ...], Row], relative: bool) -> tuple[float, float, float] | None:
    """p20, median and p80 of a row that has them; of a quotient, as far apart as the two together can be."""
    if row is None or row.status != "ok" or not (row.p20_ms and row.median_ms and row.p80_ms):
        return None
    times = row.p20_ms, row.median_ms, row.p80_ms
    if not relative:
        return times
    baselines = (rows.get((*row.key[:-1], name)) for name in dict.fromkeys(TORCHS.values()))
    base = _spread(next((row for row in baselines if row is not None), None), rows, relative=False)
    return (times[0] / base[2], times[1] / base[1], times[2] / base[0]) if base else None


def _verdict(a: tuple[float, float, float], b: tuple[float, float, float], threshold: float) -> str:
    if b[0] > a[2] and b[1] > a[1] * (1 + threshold):
        return "slower"
    if b[2] < a[0] and a[1] > b[1] * (1 + threshold):
        return "faster"
    return "same"


def lines(changes: Sequence[Change], relative: bool) -> list[str]:
    """The changed rows, the worst first, and the number of unchanged ones."""
    unit = "" if relative else " ms"

    def text(change: Change) -> str:
        row = change.row
        times = " -> ".join("-" if time is None else f"{time:.4g}{unit}" for time in (change.before, change.after))
        by = f" ({change.after / change.before:.2f} of the time)" if change.before and change.after else ""
        why = f" {row.status}: {row.reason}" if change.word == "lost" else ""
        return f"{change.word:9}  {row.case} {row.mode}, {row.contender}: {times}{by}{why}"

    def weight(change: Change) -> float:
        return -(change.after / change.before) if change.before and change.after else 0.0

    shown = sorted((c for c in changes if c.word != "same"), key=lambda c: (WORDS.index(c.word), weight(c)))
    same = sum(change.word == "same" for change in changes)
    regressions = sum(change.regression for change in changes)
    return [*map(text, shown), f"{same} of {len(changes)} rows are the same within noise; {regressions} regressions"]


def as_json(changes: Sequence[Change]) -> str:
    """Every change: the row's key and status, the word, and both medians."""
    names = ("case", "mode", "device", "contender", "status", "reason")
    rows = [{name: getattr(c.row, name) for name in names} for c in changes]
    found = [
        row | {"change": c.word, "regression": c.regression, "before": c.before, "after": c.after}
        for row, c in zip(rows, changes, strict=True)
    ]
    return json.dumps({"changes": found}, indent=2)
