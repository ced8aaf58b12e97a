"""A Markdown report from rows of results alone: where it was measured, means, losing cells, pictures, all rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .results import BUSY_GOAL, Row, baselines, beyond_goal, geometric_means, losses, rates, sheet, untried, worst_busy

_MEANING = """\
`ratio` is the median of {baseline} over this one: above 1 it is faster than that. `us/step` is the median over the time
steps of the sequence (for a whole model, over its characters, words or steps). `peak MiB` is what one call adds to the
memory in use. `limit` is the share of the machine's limit: the least time that its arithmetic and its memory allow,
over the median. How each is measured stands in docs/benchmarks.md.
"""
_MEANS_MEANING = """\
`at most` is what the mean would be with every cell at the machine's limit: nothing can be faster there, and in a single
cell nothing can be faster than {baseline} by more than one over the share that {baseline} has of the limit.
"""
_BUSY_MEANING = """\
`busy ms` is the median while another process, bound to one core, computes all the time; `busy/quiet` is that over
`median ms`, which was measured in the same rounds without it.
"""


def write(rows: Sequence[Row], provenance: dict[str, str], pictures: Sequence[Path], path: Path) -> None:
    """Writes the report next to its pictures."""
    baseline = baselines(rows)
    parts = ["# Benchmark", markdown(("", ""), [(name, value) for name, value in provenance.items() if value])]
    if ceilings := _ceilings(rows):
        parts += [f"Ceilings measured in the same run: {ceilings}."]
    if means := geometric_means(rows):
        heads = ("mode", "contender", f"ratio to {baseline}", "at most", "cells")
        lines = [
            (mean.mode, mean.contender, _times(mean.ratio), _times(mean.at_most), str(mean.cells)) for mean in means
        ]
        parts += ["## Geometric means", _MEANS_MEANING.format(baseline=baseline), markdown(heads, lines)]
    parts += ["## Cells that lose", "\n".join(f"- {line}" for line in losses(rows)) or "None."]
    if busy := worst_busy(rows):
        lines = [(name, f"{factor:.2f}", where, str(count)) for name, factor, where, count in busy]
        parts += ["## With another process busy on one core", _BUSY_MEANING]
        parts += [markdown(("contender", "worst busy/quiet", "where", "cells"), lines)]
        parts += [f"Cells of fusedrnn beyond {BUSY_GOAL}:"]
        parts += ["\n".join(f"- {line}" for line in beyond_goal(rows)) or "None."]
    if absent := untried(rows):
        parts += ["## Not measured", "\n".join(f"- {line}" for line in absent)]
    models = [row for row in rows if row.suite == "models"]
    if models:
        parts += [
            "## Whole models",
            markdown(("model", "mode", "LSTM", "speed", "ratio", "error of the losses / allowed"), _models(models)),
        ]
    if pictures:
        parts += ["## Pictures", "\n\n".join(f"![{picture.stem}]({picture.name})" for picture in pictures)]
    heads, *lines = sheet(rows)
    parts += ["## All rows", _MEANING.format(baseline=baseline), markdown(heads, lines)]
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def _ceilings(rows: Sequence[Row]) -> str:
    arithmetic = {row.dtype: row.ceiling_gflops for row in rows if row.ceiling_gflops}
    bandwidths = [row.ceiling_gbs for row in rows if row.ceiling_gbs]
    if not bandwidths:
        return ""
    products = ", ".join(f"{value:,.0f} GFLOP/s in {dtype}" for dtype, value in arithmetic.items())
    return f"{products}; {min(bandwidths):,.0f} to {max(bandwidths):,.0f} GB/s, depending on the amount of data"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _models(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Whole models: how fast, and the error of their losses over what is allowed."""
    speeds = {id(row): rate for row, rate in rates(rows)}
    return [
        (
            row.case,
            row.mode,
            row.contender,
            speeds.get(id(row), f"{row.status}: {row.reason}"),
            _times(row.ratio),
            "-" if row.excess is None else f"{row.excess:.2f}",
        )
        for row in rows
    ]


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, lines)])
