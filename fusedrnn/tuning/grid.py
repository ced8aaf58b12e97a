"""The default grid of sizes of `python -m fusedrnn tune`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .. import cells
from .choice import stand_in
from .profile import Key

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "tf32", "float16")}  # the defaults of each device

# T, B, I, H, L, D, the coarsest first: a run that is cut off has something of everything.
_COARSE = [(64, B, H, H) for H in (128, 512) for B in (1, 16, 64)]
_STEPS = [(1, B, H, H) for B in (1, 8, 64) for H in (64, 256, 1024)]
_BATCHES = [(64, B, H, H) for H in (64, 128, 256, 512, 1024) for B in (1, 4, 8, 16, 32, 64)]
_LENGTHS = [(T, B, H, H) for T in (4, 16, 256) for B, H in ((1, 128), (1, 512), (16, 256), (64, 256))]
_OPTIONS = [
    (64, 16, 256, 256, 2, 1),
    (64, 16, 256, 256, 1, 2),
    (64, 16, 256, 256, 2, 2),
    (64, 20, 192, 192, 2, 1),
    (64, 16, 64, 256),
    (64, 16, 512, 128),
    (64, 64, 64, 256),
]
_EXTREMES = [(1, 4096, 8, 8), (1, 65536, 8, 8), (64, 512, 8, 8), (64, 4096, 8, 8), (16384, 1, 2, 2), (64, 512, 32, 32)]
_PACKED = [(64, 16, 128, 128), (64, 32, 256, 256), (64, 32, 256, 256, 1, 2)]
_PROJECTED = [(64, 1, 256, 256), (64, 16, 256, 256), (64, 64, 512, 512)]
_CELLS = [(1, B, H, H) for B in (1, 16, 128) for H in (64, 256, 1024)]
_LARGE = [(64, B, H, H) for H in (256, 1024) for B in (128, 256)]


CELLS = ("lstm", "gru", "rnn_tanh")
VARIANTS = tuple(dict.fromkeys(map(stand_in, cells.VARIANTS)))  # of the LSTM, one for all that are like it


def cells_on(device: str) -> tuple[str, ...]:
    """The cells of the grid. On a CPU only one backend has kernels of the variants: there is nothing to choose."""
    return CELLS if device == "cpu" else (*CELLS, *VARIANTS)


def standard(device: str, dtypes: list[str], cell: str = "lstm") -> list[Key]:
    """All keys for a cell; on a GPU also larger batches. Cells other than the LSTM: layers only, and fewer sizes."""
    if cell in VARIANTS:
        return shapes(_COARSE, dtypes, cell=cell)
    if cell != "lstm":
        few = [*_COARSE, *_STEPS[::3], *((64, B, H, H) for H in (256, 1024) for B in (1, 16, 64)), *_OPTIONS[:2]]
        return shapes(few, dtypes, cell=cell)
    plain = [*_COARSE, *_STEPS, *_BATCHES, *_LENGTHS, *_OPTIONS, *_EXTREMES, *(_LARGE if device == "cuda" else [])]
    return [
        *shapes(plain, dtypes),
        *shapes(_PACKED, dtypes, packed=True),
        *shapes(_PROJECTED, dtypes, projected=True),
        *shapes(_CELLS, dtypes, step=True),
    ]


def quick(dtypes: list[str], cell: str = "lstm") -> list[Key]:
    """A few sizes spread over the grid."""
    return shapes([(1, 1, 128, 128), *_COARSE, (64, 32, 256, 256), (64, 8, 256, 256)], dtypes, cell=cell)


def shapes(sizes: Iterable[tuple[int, ...]], dtypes: list[str], **flags: Any) -> list[Key]:
    """Keys for sizes T, B, I, H and, unless they are 1, L and D, each once.

    Training and inference of a size are adjacent, because they share the results that they are checked against.
    """
    return list(dict.fromkeys(_keys(sizes, dtypes, flags)))


def _keys(sizes: Iterable[tuple[int, ...]], dtypes: list[str], flags: dict[str, Any]) -> Iterator[Key]:
    for T, B, I, H, *rest in sizes:
        L, D = (*rest, 1, 1)[:2]
        for dtype in dtypes:
            for train in (True, False):
                yield Key(dtype, train, T, B, I, H, L, D, **flags)
