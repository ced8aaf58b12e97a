"""A row of results, the files that rows are kept in, and the table that people read."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from .contender import BASELINE, OURS, TORCHS

STATUSES = ("ok", "wrong", "out of memory", "failed", "unsupported", "unavailable")
BUSY_GOAL = 2.5  # times its quiet time that a cell of ours may take while another process has one core busy


@dataclass
class Row:
    """One contender on one cell, or on one step of a model. What was not measured is None, or "" for text."""

    suite: str
    contender: str
    status: str = "ok"  # one of STATUSES
    reason: str = ""  # why it is not "ok"
    case: str = ""  # BenchmarkCase.id, or the name of a model
    mode: str = ""
    device: str = ""
    dtype: str = ""
    variant: str = ""
    T: int | None = None
    B: int | None = None
    I: int | None = None
    H: int | None = None
    L: int | None = None
    D: int | None = None
    ran: str = ""  # the backend and its plan, or the library and its version
    median_ms: float | None = None  # of one call
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    calls: int | None = None  # in each sample
    ratio: float | None = None  # the median of torch's own layer over this one
    unit: str = "step"
    unit_us: float | None = None  # microseconds per unit: a time step of the batch; a character, word, ... of a model
    peak_mib: float | None = None  # that a call adds to the memory in use
    limit_share: float | None = None  # the least time that the machine could take, over the median
    gflop: float | None = None
    mbyte: float | None = None
    ceiling_gflops: float | None = None
    ceiling_gbs: float | None = None
    excess: float | None = None  # the worst error over what the rule allows
    busy_ms: float | None = None  # the median while another process has one core busy
    busy_factor: float | None = None  # that over the quiet median

    @property
    def ours(self) -> bool:
        """Whether the contender is a backend of fusedrnn."""
        return self.contender.startswith(OURS)

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies a row across files."""
        return self.case, self.mode, self.device, self.contender


_TYPES: dict[str, Any] = {"str": str, "int | None": int, "float | None": float}
_LATER = ("busy_ms", "busy_factor", "memory")  # columns that files of earlier versions lack


class Writer:
    """A CSV file that grows row by row, each with the provenance; what was written stays if the rest is cut off.

    With `append`, what is in the file stays as well, but for a last line that was cut off; columns that came later than
    the file are added to it.

    Raises:
        ValueError: the file to append to has other columns.
    """

    def __init__(self, path: Path, provenance: dict[str, str], append: bool = False) -> None:
        columns = [field.name for field in fields(Row)] + list(provenance)
        append = append and path.is_file()
        if append:
            text = path.read_bytes()
            path.write_bytes(text[: text.rfind(b"\n") + 1])
            head = text.decode(errors="replace").split("\n")[0].split(",")
            lacking = [name for name in _LATER if name in columns and name not in head]
            if head != [name for name in columns if name not in lacking]:
                raise ValueError(f"{path} has other columns than this version writes")
            if lacking:
                _widen(path, columns)
        self._file = path.open("a" if append else "w", newline="", encoding="utf-8")
        self._provenance = provenance
        self._csv = csv.DictWriter(self._file, columns, lineterminator="\n")
        if not append:
            self._csv.writeheader()
            self._file.flush()

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._csv.writerow({**asdict(row), **self._provenance})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _widen(path: Path, columns: Sequence[str]) -> None:
    """Adds columns to a CSV file, empty in the lines that are there. The file is whole at every moment."""
    partial = path.with_name(f"{path.name}.partial")
    with (
        path.open(newline="", encoding="utf-8") as before,
        partial.open("w", newline="", encoding="utf-8") as after,
    ):
        lines = csv.DictWriter(after, columns, restval="", lineterminator="\n")
        lines.writeheader()
        lines.writerows(csv.DictReader(before))
    partial.replace(path)


def read(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows of a CSV file and their provenance.

    Raises:
        ValueError: it is not such a file.
        OSError: it cannot be read.
    """
    types = {field.name: _TYPES[str(field.type)] for field in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        missing = types.keys() - set(lines.fieldnames or ()) - set(_LATER)
        if missing:
            raise ValueError(f"{path} is not a file of results: it lacks the columns {', '.join(sorted(missing))}")
        rows, provenance = [], dict[str, str]()
        for line in lines:
            if None in line.values():  # the last one, where a run was killed as it wrote
                continue
            values: dict[str, Any] = {
                name: kind(line[name]) if kind is str or line.get(name) else None for name, kind in types.items()
            }
            rows.append(Row(**values))
            provenance = {name: text for name, text in line.items() if name not in types}
    return rows, provenance


def as_json(rows: Sequence[Row], provenance: dict[str, str]) -> str:
    """The rows as JSON."""
    return json.dumps({"provenance": provenance, "rows": [asdict(row) for row in rows]}, indent=1)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


_BUSY_COLUMNS = ("busy ms", "busy/quiet")
_COLUMNS = (
    *("case", "mode", "contender", "median ms", "p20", "p80"),
    *_BUSY_COLUMNS,
    *("ratio", "us/step", "peak MiB", "limit", ""),
)


def _cells(row: Row) -> tuple[str, ...]:
    """A row as text, under `_COLUMNS`."""
    note = "" if row.status == "ok" else f"{row.status}: {row.reason}"
    return (
        row.case,
        row.mode,
        row.contender,
        *map(_number, (row.median_ms, row.p20_ms, row.p80_ms, row.busy_ms)),
        "-" if row.busy_factor is None else f"{row.busy_factor:.2f}",
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        _number(row.unit_us),
        "-" if row.peak_mib is None else f"{row.peak_mib:,.1f}",
        "-" if row.limit_share is None else f"{_number(100 * row.limit_share, 2)}%",
        note,
    )


def tried(rows: Sequence[Row]) -> list[Row]:
    """The rows that can have a time: without unavailable contenders and unsupported cases."""
    return [row for row in rows if row.status not in ("unavailable", "unsupported")]


def untried(rows: Sequence[Row]) -> list[str]:
    """Contenders without a row in the table, with reasons; for the whole run, or for some cells."""
    lines = [f"{row.contender}: {row.reason}" for row in rows if row.status == "unavailable"]
    reasons = Counter((row.contender, row.reason) for row in rows if row.status == "unsupported")
    return lines + [f"{name}, {count} of the cells: {reason}" for (name, reason), count in reasons.items()]


def sheet(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Heads, then every row that was tried as text; the last column says what has no time, and why.

    The columns of a busy process are left out where no row has one.
    """
    busy = any(row.busy_ms is not None for row in rows)
    shown = [k for k, head in enumerate(_COLUMNS) if busy or head not in _BUSY_COLUMNS]
    return [tuple(line[k] for k in shown) for line in (_COLUMNS, *map(_cells, tried(rows)))]


def table(rows: Sequence[Row]) -> list[str]:
    """The sheet as lines of text."""
    lines = sheet(rows)
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]) - 1)]
    return [
        "  ".join(
            [*(f"{text:{'<' if k < 3 else '>'}{widths[k]}}" for k, text in enumerate(line[:-1])), line[-1]]
        ).rstrip()
        for line in lines
    ]


class Mean(NamedTuple):
    """The geometric mean of a contender's ratios to torch's own layer."""

    mode: str
    contender: str
    ratio: float
    at_most: float | None  # what it would be with every cell at the machine's limit; None without a limit
    cells: int


def baselines(rows: Sequence[Row]) -> str:
    """The names of torch's own layers among the contenders."""
    return ", ".join(dict.fromkeys(row.contender for row in rows if row.contender in TORCHS.values())) or BASELINE


def geometric_means(rows: Sequence[Row]) -> list[Mean]:
    """For each mode and contender with ratios to torch's own layer; whole models are not among them."""
    groups: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    for row in rows:
        if row.contender in TORCHS.values() or row.suite == "models":
            continue
        if row.status == "ok" and row.ratio is not None:
            highest = row.ratio / row.limit_share if row.limit_share else None
            groups.setdefault((row.mode, row.contender), []).append((row.ratio, highest))
    means = []
    for key, found in groups.items():
        highest_ratios = [highest for _, highest in found if highest is not None]
        at_most = geometric_mean(highest_ratios) if len(highest_ratios) == len(found) else None
        means.append(Mean(*key, geometric_mean([ratio for ratio, _ in found]), at_most, len(found)))
    return means


def losses(rows: Sequence[Row]) -> list[str]:
    """Every row of ours that is slower than another contender, or has no time although it was tried."""
    found = []
    times = {(row.case, row.mode, row.contender): row.median_ms for row in rows if row.status == "ok" and row.median_ms}
    others = dict.fromkeys(row.contender for row in rows if not row.ours)
    for row in rows:
        if row.ours and row.status in ("wrong", "failed", "out of memory"):
            found.append(f"{row.case} {row.mode}, {row.contender}: {row.status}: {row.reason}")
        elif row.ours and row.status == "ok" and row.median_ms:
            for other in others:
                theirs = times.get((row.case, row.mode, other))
                if theirs is not None and theirs < row.median_ms:
                    ratio = theirs / row.median_ms
                    found.append(f"{row.case} {row.mode}, {row.contender}: {ratio:.2f}x of {other}")
    return found


def _busy(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """The rows that were timed beside a busy process, and their factors."""
    return [(row, row.busy_factor) for row in rows if row.status == "ok" and row.busy_factor is not None]


def worst_busy(rows: Sequence[Row]) -> list[tuple[str, float, str, int]]:
    """Contender, its worst factor beside a busy process, the cell that has it, and of how many."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for row, factor in _busy(rows):
        groups.setdefault(row.contender, []).append((factor, f"{row.case} {row.mode}"))
    return [(name, *max(group), len(group)) for name, group in groups.items()]


def beyond_goal(rows: Sequence[Row]) -> list[str]:
    """Every row of ours that a busy process slowed by more than `BUSY_GOAL`."""
    return [
        f"{row.case} {row.mode}, {row.contender}: {factor:.2f} times the quiet time"
        for row, factor in _busy(rows)
        if row.ours and factor > BUSY_GOAL
    ]


def rates(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """The rows of whole models that have a time, with how much they get through."""
    timed = [(row, row.unit_us) for row in rows if row.suite == "models" and row.unit_us]
    return [(row, f"{1e6 / unit_us:,.0f} {row.unit}s per second") for row, unit_us in timed]


def summary(rows: Sequence[Row]) -> list[str]:
    """The text after the table: rates of models, means, losing cells, the busy process, contenders not measured."""
    lines = []
    if models := rates(rows):
        lines += ["", "whole models:"]
        lines += [f"  {row.case}, {row.mode}, {row.contender}: {rate}" for row, rate in models]
    if means := geometric_means(rows):
        width = max(len(mean.contender) for mean in means)
        lines += ["", f"geometric mean of the ratios to {baselines(rows)}:"]
        lines += [
            f"  {mean.mode:8} {mean.contender:{width}}  {mean.ratio:.2f}x over {mean.cells}"
            + (f", at most {mean.at_most:.2f}x" if mean.at_most else "")
            for mean in means
        ]
    if lost := losses(rows):
        lines += ["", "slower than another contender, or without a time:", *(f"  {line}" for line in lost)]
    elif any(row.ours and row.status == "ok" for row in rows):
        lines += ["", "fusedrnn loses no cell"]
    if busy := worst_busy(rows):
        width = max(len(contender) for contender, *_ in busy)
        lines += ["", "with another process busy on one core, times the quiet time at worst:"]
        lines += [f"  {name:{width}}  {factor:.2f} over {count}, {where}" for name, factor, where, count in busy]
    if absent := untried(rows):
        lines += ["", "not measured:", *(f"  {line}" for line in absent)]
    return lines
