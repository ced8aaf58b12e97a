"""Predictions of a planner's cost model next to measured times, for every row of results."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from types import ModuleType

import torch
from fusedrnn.kernels import plan as planner
from fusedrnn.kernels.device import device_of

from fusedrnn import cuda_plan

from .cases import DTYPES
from .contender import OURS
from .report import markdown
from .results import Row

COLUMNS = ("case", "mode", "contender", "regime", "predicted us/step", "measured us/step", "measured / predicted")


@dataclass(frozen=True)
class Prediction:
    """One row of results and its model."""

    row: Row
    regime: str  # of the plans, forward and backward
    predicted_us: float  # of a whole call

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        assert self.row.median_ms is not None
        return self.row.median_ms * 1e3 / self.predicted_us

    def cells(self) -> tuple[str, ...]:
        """As text, under `COLUMNS`."""
        steps, measured = self.row.T or 1, self.predicted_us * self.ratio
        figures = (f"{us / steps:.3g}" for us in (self.predicted_us, measured))
        return self.row.case, self.row.mode, self.row.contender, self.regime, *figures, f"{self.ratio:.2f}"


def _by(model: ModuleType, row: Row, device: planner.Device) -> Prediction:
    """By the `plan` of a planner. The GEMMs after a backward launch are in no model."""
    T, B, first, H = (size or 0 for size in (row.T, row.B, row.I, row.H))
    D, precision = row.D or 1, "tf32" if row.dtype == "tf32" else "ieee"
    itemsize = torch.empty(0, dtype=DTYPES[row.dtype]).element_size()
    kernels = ("forward", "backward") if row.mode == "train" else ("forward",)
    total, regimes = 0.0, []
    for layer in range(row.L or 1):
        I = first if layer == 0 else D * H
        shape = planner.Shape(T, B, I, H, H, D, itemsize, precision, row.variant != "plain")
        plans = [model.plan(kernel, shape, device) for kernel in kernels]
        total += sum(plan.launch for plan in plans)
        regimes += [plan.regime for plan in plans]
    return Prediction(row, ", ".join(dict.fromkeys(regimes)), total)


MODELS: dict[str, Callable[[Row, planner.Device], Prediction]] = {
    "triton": partial(_by, planner),
    "cuda": partial(_by, cuda_plan),
}


def device_named(name: str) -> planner.Device:
    """A device that the planner knows, or the one that is here.

    Raises:
        ValueError: it is neither.
    """
    known = next((device for device in planner.DEVICES if device.name == name), None)
    if known is not None:
        return known
    if torch.cuda.is_available() and torch.cuda.get_device_name() == name:
        return device_of(torch.cuda.get_device_properties(0))
    raise ValueError(f"the planner does not know the device {name!r}, and it is not here")


def predictions(rows: Sequence[Row], device: planner.Device) -> list[Prediction]:
    """For each row of a backend with a model that has a time; the farthest from its model first."""
    timed = [row for row in rows if row.ours and row.status == "ok" and row.median_ms]
    found = []
    for row in timed:
        model = MODELS.get(row.contender.removeprefix(OURS))
        if model is not None:
            found.append(model(row, device))
    return sorted(found, key=lambda one: -max(one.ratio, 1 / one.ratio))


def without_model(rows: Sequence[Row]) -> list[str]:
    """The backends among the rows with a time that have no model."""
    names = dict.fromkeys(row.contender.removeprefix(OURS) for row in rows if row.ours and row.median_ms)
    return [name for name in names if name not in MODELS]


def write(found: Sequence[Prediction], device: planner.Device, folder: Path) -> None:
    """predictions.csv and predictions.md."""
    lines = [one.cells() for one in found]
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *lines])
    groups: dict[tuple[str, str, str], list[float]] = {}
    for one in found:
        groups.setdefault((one.row.contender, one.row.mode, one.regime), []).append(one.ratio)
    means = [(*key, f"{geometric_mean(ratios):.2f}", str(len(ratios))) for key, ratios in groups.items()]
    basis = "measured" if device.measured else "estimated"
    parts = [
        "# Predicted against measured",
        f"By each backend's planner for {device.name}; the constants for L2 and a grid barrier are {basis}.",
        markdown(("contender", "mode", "regime", "measured / predicted", "cells"), means),
        "The farthest from the model first:",
        markdown(COLUMNS, lines),
    ]
    (folder / "predictions.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
