"""What a contender is: a class with nn.LSTM's constructor, parameters and forward, so that one rule checks them all.

It may be unavailable here, or unable to do what a cell asks for: both are reasons to be told, never silence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from .cases import Cell

BASELINE = "nn.LSTM"
OURS = "fusedrnn "  # and the name of a backend


def _always(_: Cell) -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to compute an LSTM."""

    name: str
    build: Callable[..., nn.Module]  # takes nn.LSTM's arguments
    ran: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], str]  # what computes module(*args, **options)
    unavailable: str | None = None
    unsupported: Callable[[Cell], str | None] = _always
    active: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around calls and outside of their time
    # Where a module would add to its time, makes another call: of module, x, hx, options, and whether it streams.
    work: Callable[[Any, Any, Any, dict[str, Any], bool], Callable[[], object]] | None = None
    own_allocator: bool = False  # it keeps its memory from call to call, so that a peak would mean nothing
