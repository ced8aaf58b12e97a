"""Pictures, drawn from rows of results alone: ratios over H and B, time against T and H, losses of whole models."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .results import Row

_PANELS = 9  # in one picture at most: those with the most points
_WORDS = {"infer": "inference", "forward": "forward", "train": "forward + backward"}


def missing() -> str | None:
    """Why nothing can be drawn here, or None."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed; it is in fusedrnn's extra `bench`"
    return None


def draw(rows: Sequence[Row], provenance: dict[str, str], folder: Path) -> list[Path]:
    """Writes every picture for which there are enough rows, and returns their paths."""
    plain = [row for row in rows if row.variant == "plain" and row.L == row.D == 1]
    machine = provenance.get("gpu") or provenance.get("cpu", "")
    footer = f"{machine}, {provenance.get('threads', '?')} threads, torch {provenance.get('torch', '?')}"
    written = []
    for mode in dict.fromkeys(row.mode for row in plain):
        of_mode = [row for row in plain if row.mode == mode]
        for contender in dict.fromkeys(row.contender for row in of_mode if row.ours):
            ours = [row for row in of_mode if row.contender == contender]
            written += _heat_maps(ours, contender, mode, footer, folder)
        for axis, others in (("T", ("B", "H")), ("H", ("T", "B"))):
            written += _lines(of_mode, axis, others, mode, footer, folder)
    return written


def draw_losses(path: Path) -> Path:
    """Draws what is in a file of losses, one panel for each model, next to it."""
    curves: dict[str, dict[str, list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            curves.setdefault(line["model"], {}).setdefault(line["contender"], []).append(float(line["loss"]))
    figure, panels = _panels(len(curves), width=4.2, height=3.2)
    for axes, (model, contenders) in zip(panels, curves.items(), strict=False):
        for k, (contender, losses) in enumerate(contenders.items()):
            axes.plot(range(1, len(losses) + 1), losses, linewidth=4.5 - 1.3 * min(k, 2), label=contender)
        axes.set(title=model, xlabel="training step", ylabel="loss")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle("The same training, on different LSTMs", fontsize=11)
    return _save(figure, path.with_suffix(".png"))


def _heat_maps(rows: Sequence[Row], contender: str, mode: str, footer: str, folder: Path) -> list[Path]:
    from matplotlib.colors import TwoSlopeNorm

    groups = _groups(rows, ("dtype", "T"))
    groups = {key: group for key, group in groups.items() if len({(r.H, r.B) for r in group}) >= 2}
    if not groups:
        return []
    batches, hiddens = (sorted({getattr(row, name) for row in rows}) for name in ("B", "H"))
    width, height = max(3.4, 0.75 * len(hiddens) + 1.3), max(2.4, 0.48 * len(batches) + 1.4)
    figure, panels = _panels(len(groups), width, height)
    norm = TwoSlopeNorm(0, -3, 3)  # log2 of the ratio: colours end at an eighth and at eight times
    image = None
    for axes, ((dtype, T), group) in zip(panels, groups.items(), strict=False):
        bs, hs = (sorted({getattr(row, name) for row in group}) for name in ("B", "H"))
        found = {(row.B, row.H): row for row in group}
        values = [[_log_ratio(found.get((b, h))) for h in hs] for b in bs]
        axes.set_facecolor("0.88")
        image = axes.imshow(values, cmap="RdBu", norm=norm, origin="lower", aspect="auto")
        for i, b in enumerate(bs):
            for j, h in enumerate(hs):
                row = found.get((b, h))
                style = {"color": "white" if abs(values[i][j]) > 1.7 else "black"}
                axes.text(j, i, _mark(row), ha="center", va="center", fontsize=9 if row and row.ratio else 7, **style)
        axes.set(xticks=range(len(hs)), yticks=range(len(bs)), xticklabels=hs, yticklabels=bs)
        axes.set(xlabel="H, hidden size", ylabel="B, batch", title=f"{dtype}, T {T}")
    bar = figure.colorbar(image, ax=panels, ticks=range(-3, 4), shrink=0.7, aspect=30, extend="both")
    bar.ax.set_yticklabels(["1/8x", "1/4x", "1/2x", "1x", "2x", "4x", "8x"])
    figure.suptitle(f"{contender}, {_WORDS[mode]}: how many times as fast as torch's own layer\n{footer}", fontsize=11)
    return [_save(figure, folder / f"ratio_{contender.replace(' ', '_')}_{mode}.png")]


def _log_ratio(row: Row | None) -> float:
    return math.nan if row is None or row.ratio is None or row.status != "ok" else math.log2(row.ratio)


def _mark(row: Row | None) -> str:
    if row is None:
        return ""
    return row.status.replace("of ", "of\n") if row.status != "ok" or row.ratio is None else f"{row.ratio:.2f}x"


def _lines(rows: Sequence[Row], axis: str, others: tuple[str, str], mode: str, footer: str, folder: Path) -> list[Path]:
    from matplotlib.ticker import LogLocator

    timed = [row for row in rows if row.status == "ok" and row.median_ms]
    groups = _groups(timed, ("dtype", *others))
    groups = {key: group for key, group in groups.items() if len({getattr(row, axis) for row in group}) >= 2}
    if not groups:
        return []
    shown = sorted(groups, key=lambda key: -len(groups[key]))[:_PANELS]
    figure, panels = _panels(len(shown), width=4.2, height=3.4)
    contenders = list(dict.fromkeys(row.contender for row in rows))
    for axes, key in zip(panels, (key for key in groups if key in shown), strict=False):
        for k, contender in enumerate(contenders):
            points = sorted((row for row in groups[key] if row.contender == contender), key=lambda r: getattr(r, axis))
            if not points:
                continue
            xs = [getattr(row, axis) for row in points]
            ours = points[0].ours
            style: dict[str, Any] = {"color": f"C{k}", "marker": "o", "markersize": 4}
            axes.plot(xs, [row.median_ms for row in points], linewidth=2.4 if ours else 1.3, label=contender, **style)
            low, high = [row.p20_ms for row in points], [row.p80_ms for row in points]
            axes.fill_between(xs, low, high, color=f"C{k}", alpha=0.2, linewidth=0)
        ticks = sorted({getattr(row, axis) for row in groups[key]})
        axes.set(xscale="log", yscale="log", xlabel={"T": "T, time steps", "H": "H, hidden size"}[axis])
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=9, rotation=45 if len(ticks) > 5 else 0)
        axes.set_xticks([], minor=True)
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        dtype, *sizes = key
        fixed = ", ".join(f"{name} {size}" for name, size in zip(others, sizes, strict=True))
        axes.set(ylabel="milliseconds per call", title=f"{dtype}, {fixed}")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4), fontsize=9)
    title = f"Time of {_WORDS[mode]} against {axis}: median, and 20th to 80th percentile"
    figure.suptitle(f"{title}\n{footer}", fontsize=11)
    return [_save(figure, folder / f"time_{axis}_{mode}.png")]


def _groups(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return dict(sorted(groups.items()))


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure, and its panels in reading order."""
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(columns * width, 6.4), rows * height + 0.9), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for surplus in panels[count:]:
        surplus.remove()
    return figure, panels[:count]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
