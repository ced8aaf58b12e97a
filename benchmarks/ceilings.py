"""Ceilings of the machine, measured in the same run: matrix products and memory bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .cases import DTYPES, BenchmarkCase
from .timing import Clock
from .verify import products

_SAMPLES = 5  # the best of which is the ceiling
_SAMPLE = 0.01  # seconds that one lasts at least
_SMALLEST, _LARGEST = 2**20, 2**28  # bytes of the arrays that the bandwidth of a CPU is measured on


class Limit(NamedTuple):
    """The least time that a cell can take here."""

    seconds: float
    flops_per_second: float  # the ceiling for the dtype of the cell
    bytes_per_second: float  # the ceiling for its amount of data


class Ceilings:
    """Measures a ceiling when it is first asked for, and on a CPU again for every cell: the best so far is the ceiling.

    A shared machine can be at two thirds of its speed for seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._best: dict[tuple[object, ...], float] = {}

    def limit(self, cell: BenchmarkCase) -> Limit:
        """The larger of the times for arithmetic and for bytes.

        The weights of a small layer stay in a CPU's caches from call to call, so that there the bandwidth is measured
        on as much data as the cell has; on a GPU, where the cache is overwritten, on more than fits into it.
        """
        dtypes = {cell.dtype}
        if cell.device == "cpu" and cell.dtype != "float64":
            dtypes.add("float32")  # in which the narrow ones may be computed as well
        arithmetic = max(self._arithmetic(cell.device, dtype) for dtype in dtypes)
        size = _LARGEST if cell.device == "cuda" else 2 ** math.ceil(math.log2(cell.bytes))
        bandwidth = self._bandwidth(cell.device, min(max(size, _SMALLEST), _LARGEST))
        return Limit(max(cell.flops / arithmetic, cell.bytes / bandwidth), arithmetic, bandwidth)

    def _arithmetic(self, device: str, dtype: str) -> float:
        return self._highest(device, dtype, lambda: self._measure_arithmetic(device, dtype))

    def _bandwidth(self, device: str, size: int) -> float:
        return self._highest(device, size, lambda: self._measure_bandwidth(device, size))

    def _highest(self, device: str, what: object, measure: Callable[[], float]) -> float:
        key = (device, what)
        if device == "cpu" or key not in self._best:
            self._best[key] = max(self._best.get(key, 0.0), measure())
        return self._best[key]

    def _measure_arithmetic(self, device: str, dtype: str) -> float:
        """Flops per second of a product of square matrices by the fastest of torch's libraries."""
        size = 8192 if device == "cuda" else 1024
        a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        ways: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
        if device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
            # mm goes to the BLAS torch was built with, which may not use all of the processor, and not to oneDNN.
            x, w = a.to_mkldnn(), b.to_mkldnn()
            ways.append(lambda: torch.ops.aten.mkldnn_linear(x, w))
        with products(dtype == "tf32"):
            return 2 * size**3 / min(self._least_seconds(way) for way in ways)

    def _measure_bandwidth(self, device: str, size: int) -> float:
        """Bytes per second of a = b + 3c, over three arrays of `size` bytes together."""
        count = size // 12
        a, b, c = (torch.ones(count, device=device) for _ in range(3))
        return 12 * count / self._least_seconds(lambda: torch.add(b, c, alpha=3, out=a))

    def _least_seconds(self, work: Callable[[], object]) -> float:
        once = min(self._clock.sample(work, 1) for _ in range(2))
        calls = max(1, math.ceil(_SAMPLE / max(once, 1e-9)))
        return min(self._clock.sample(work, calls) for _ in range(_SAMPLES))
