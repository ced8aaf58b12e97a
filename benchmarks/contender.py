"""A contender: a class with the constructor, parameters and forward of torch's own layer, so that one rule
checks them all.

It may be unavailable here, or unable to do what a cell asks for: both are reasons to be told, never silence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from .cases import BenchmarkCase

BASELINE = "nn.LSTM"
# torch's own layer of each cell, which the others are set against.
TORCHS = {"lstm": BASELINE, "gru": "nn.GRU", "rnn_tanh": "nn.RNN", "rnn_relu": "nn.RNN"}
OURS = "fusedrnn "  # and the name of a backend


def _always(_: BenchmarkCase) -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute the layers of one cell."""

    name: str
    build: Callable[..., nn.Module]  # takes the arguments of torch's own layer
    ran: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], str]  # what computes module(*args, **options)
    unavailable: str | None = None
    unsupported: Callable[[BenchmarkCase], str | None] = _always
    active: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around calls and outside of their time
    # Where a module would add to its time, makes another call: of module, x, hx, options, and whether it streams.
    work: Callable[[Any, Any, Any, dict[str, Any], bool], Callable[[], object]] | None = None
    own_allocator: bool = False  # it keeps its memory from call to call, so that a peak would mean nothing
