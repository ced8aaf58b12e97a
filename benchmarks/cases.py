"""Benchmark cases: a problem, a mode and a device; suites of cases; arithmetic and bytes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from fusedrnn import cells, testing
from fusedrnn.cells import CELLS, LSTM, Cell

MODES = ("infer", "forward", "train")  # without autograd; recorded by it; forward and backward
DTYPES = {
    "float32": torch.float32,  # products in float32, on a GPU as well
    "tf32": torch.float32,  # on a GPU, products in TensorFloat-32
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
VARIANTS = ("plain", "packed", "lengths", "reset")


@dataclass(frozen=True)
class Sequences(testing.Case):
    """A case as torch's own layer can be given it: where sequences end at different steps, each has at least one."""

    def inputs(self, device: str = "cpu", dtype: torch.dtype | None = None) -> testing.Inputs:
        if self.lengths:  # those of the packed twin, because pack_padded_sequence refuses a length of zero
            return replace(self, lengths=False, packed=True).inputs(device, dtype)
        return super().inputs(device, dtype)


@dataclass(frozen=True)
class BenchmarkCase:
    """One line of the benchmark, which every contender is measured on."""

    case: Sequences
    mode: str
    device: str = "cpu"
    tf32: bool = False

    @property
    def dtype(self) -> str:
        """A name of `DTYPES`."""
        return "tf32" if self.tf32 else str(self.case.dtype).removeprefix("torch.")

    @property
    def variant(self) -> str:
        """A name of `VARIANTS`."""
        return next((name for name in VARIANTS[1:] if getattr(self.case, name)), "plain")

    @property
    def streaming(self) -> bool:
        """One time step of inference: the state goes back in, and many calls are one sample."""
        return self.case.T == 1 and self.mode == "infer" and self.variant == "plain"

    @property
    def D(self) -> int:  # noqa: N802
        return 2 if self.case.bidirectional else 1

    @property
    def id(self) -> str:
        """The cell if it is no LSTM, sizes, variant and dtype, without the mode."""
        case = self.case
        parts = [] if case.cell == LSTM.name else [case.cell]
        parts += [f"T{case.T}", f"B{case.B}", f"I{case.I}", f"H{case.H}"]
        parts += [f"L{case.layers}"] if case.layers > 1 else []
        parts += ["D2"] if case.bidirectional else []
        parts += [] if self.variant == "plain" else [self.variant]
        return "-".join([*parts, self.dtype])

    @cached_property
    def steps(self) -> int:
        """Steps to compute, summed over the sequences of the batch."""
        if self.variant not in ("packed", "lengths"):
            return self.case.T * self.case.B
        lengths = self.case.inputs().lengths
        assert lengths is not None
        return int(lengths.sum())

    @property
    def gates(self) -> int:
        """Rows of the weights per hidden unit."""
        return len(CELLS[self.case.cell].gates)

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products; a backward has two for each of the forward."""
        case, inputs = self.case, [self.case.I, *[self.D * self.case.H] * (self.case.layers - 1)]
        forward = sum(2 * self.steps * self.D * self.gates * case.H * (I + case.H) for I in inputs)
        return forward * (3 if self.mode == "train" else 1)

    @property
    def bytes(self) -> float:
        """The least that has to be moved: weights and inputs read, outputs written; in training three times that.

        Training reads x, y, dy and the weights once more, and writes dx and dw. What is kept for the backward is left
        out, because an implementation may compute it again.
        """
        case, inputs = self.case, [self.case.I, *[self.D * self.case.H] * (self.case.layers - 1)]
        weights = sum(self.D * self.gates * case.H * (I + case.H + 2) for I in inputs)
        size = torch.empty(0, dtype=case.dtype).element_size()
        return size * (weights + self.steps * (case.I + self.D * case.H)) * (3 if self.mode == "train" else 1)


def cell(
    shape: tuple[int, ...],
    mode: str,
    dtype: str = "float32",
    variant: str = "plain",
    device: str = "cpu",
    kind: str = LSTM.name,
) -> BenchmarkCase:
    """A cell of sizes (T, B, I, H) or (T, B, I, H, L, D), with zeros for initial states unless it is streaming.

    Args:
        kind: a name of `fusedrnn.cells.CELLS` or `fusedrnn.cells.VARIANTS`.
    """
    T, B, I, H, L, D = (*shape, 1, 1)[:6]
    case = Sequences(T, B, I, H, DTYPES[dtype], L, D == 2, hx=False)
    if kind in cells.VARIANTS:
        case = replace(case, variant=tuple(_options_of(cells.VARIANTS[kind]).items()))
    else:
        case = replace(case, cell=kind)
    if variant != "plain":
        options: dict[str, Any] = {variant: True}
        case = replace(case, **options)
    made = BenchmarkCase(case, mode, device, tf32=dtype == "tf32")
    return replace(made, case=replace(case, hx=True)) if made.streaming else made


def _options_of(cell: Cell) -> dict[str, Any]:
    """Options of fusedrnn.LSTM for a variant, as it is in training."""
    options: dict[str, Any] = {"peephole": bool(cell.parameters), "coupled": "f" not in cell.gates}
    options["zoneout"] = (0.25 if "h" in cell.noise else 0.0, 0.25 if "c" in cell.noise else 0.0)
    if "g" in cell.noise or "r" in cell.noise:
        options |= {"recurrent_dropout": 0.25, "recurrent_dropout_mode": "state" if "r" in cell.noise else "candidate"}
    return options


def parse_shape(text: str) -> tuple[int, ...]:
    """T,B,I,H or T,B,I,H,L,D: time steps, batch, input size, hidden size, layers, directions.

    Raises:
        ValueError: it is not that.
    """
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (4, 5, 6) or min(shape) < 1 or (len(shape) == 6 and shape[5] > 2):
        raise ValueError(f"expected T,B,I,H or T,B,I,H,L,D, whole numbers from 1 with D at most 2, got {text!r}")
    return shape


def shrunk(cell: BenchmarkCase, factor: int) -> BenchmarkCase:
    """The cell with T, B, I and H divided by a factor, but H at least 2 and a sequence still one."""
    case = cell.case
    T, B, I, H = (max(size // factor, 1) for size in (case.T, case.B, case.I, case.H))
    return replace(cell, case=replace(case, T=T if case.T == 1 else max(T, 2), B=B, I=I, H=max(H, 2)))


def _quick(device: str) -> Iterator[BenchmarkCase]:
    for dtype in ("float32",) if device == "cpu" else ("bfloat16", "tf32"):
        yield cell((1, 1, 128, 128), "infer", dtype, device=device)
        for shape, variant in (
            ((100, 1, 128, 128), "plain"),
            ((25, 1, 128, 128), "plain"),
            ((25, 16, 128, 128), "plain"),
            ((25, 1, 256, 256), "plain"),
            ((25, 16, 256, 256), "plain"),
            ((50, 16, 128, 128, 2, 2), "lengths"),
        ):
            for mode in ("train", "infer"):
                yield cell(shape, mode, dtype, variant, device)


def _streaming(device: str) -> Iterator[BenchmarkCase]:
    for layers, B in ((1, 1), (2, 1), (1, 8)):
        for H in (64, 128, 256, 512, 1024):
            yield cell((1, B, H, H, layers, 1), "infer", "float32" if device == "cpu" else "bfloat16", device=device)


def _cpu(device: str) -> Iterator[BenchmarkCase]:
    def both(shape: tuple[int, ...], variant: str = "plain") -> Iterator[BenchmarkCase]:
        for mode in ("train", "infer"):
            yield cell(shape, mode, "float32", variant, device)

    for H in (64, 128, 256, 512):
        yield cell((1, 1, H, H), "infer", device=device)
    for H in (64, 128, 256, 512, 1024):
        yield from both((100, 1, H, H))
    for B in (1, 8, 16, 32, 64):
        for H in (128, 256, 512, 1024):
            yield from both((64, B, H, H))
    for B, H in ((1, 128), (16, 256)):
        for T in (10, 30, 100, 300):
            yield from both((T, B, H, H))
    for shape in (
        (100, 16, 256, 256, 2, 1),
        (100, 16, 256, 256, 1, 2),
        (100, 16, 256, 256, 2, 2),
        (35, 20, 200, 200, 2),
    ):
        yield from both(shape)
    for variant in ("packed", "lengths"):
        for D in (1, 2):
            yield from both((100, 32, 256, 256, 1, D), variant)
    yield from both((100, 16, 256, 256), "reset")


def _gpu(device: str) -> Iterator[BenchmarkCase]:
    """The most important first: a run that is cut off has a coarse grid of everything before the fine one."""
    dtypes = ("bfloat16", "tf32", "float16", "float32")

    def grid(
        T: int, B: tuple[int, ...], H: tuple[int, ...], dtypes: tuple[str, ...] = dtypes
    ) -> Iterator[BenchmarkCase]:
        for dtype in dtypes:
            for hidden in H:
                for batch in B:
                    for mode in ("train", "infer", "forward"):
                        yield cell((T, batch, hidden, hidden), mode, dtype, device=device)

    coarse, fine = ((1, 16, 64, 256), (128, 512, 768, 1024, 2048)), ((1, 8, 16, 32, 64, 128, 256), _GPU_HIDDEN)
    yield from grid(128, *coarse, ("bfloat16",))
    yield from grid(1024, (16,), (128, 512, 768, 1024, 2048), ("bfloat16",))
    yield from grid(128, (16, 256), (128, 512, 1024), dtypes[1:])
    for layers, D, variant in _GPU_OPTIONS:
        for dtype in ("bfloat16", "tf32"):
            for H in (256, 512, 1024):
                for mode in ("train", "infer", "forward"):
                    yield cell((128, 32, H, H, layers, D), mode, dtype, variant, device)
    yield from grid(128, *fine)
    yield from grid(1024, *fine)


_GPU_HIDDEN = (128, 256, 512, 768, 1024, 1536, 2048)
_GPU_OPTIONS = (
    (2, 1, "plain"),
    (1, 2, "plain"),
    (4, 1, "plain"),
    (1, 1, "lengths"),
    (1, 1, "reset"),
    (2, 2, "lengths"),
    (1, 1, "packed"),
)

SUITES: dict[str, Callable[[str], Iterator[BenchmarkCase]]] = {
    "quick": _quick,
    "cpu": _cpu,
    "gpu": _gpu,
    "streaming": _streaming,
}


def suite(name: str, device: str) -> list[BenchmarkCase]:
    """The cells of a suite on a device, each once, in the order in which they are measured."""
    return list(dict.fromkeys(SUITES[name](device)))
