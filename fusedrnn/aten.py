"""The `aten` backend: the functions behind torch's recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import Cell

_VF: Any = torch._VF  # lstm, gru, rnn_tanh, rnn_relu, lstm_cell, ...: our cells have torch's names


def layers(
    cell: Cell,
    x: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    B: int,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A stack of layers: x [T, B, I], or with batch_sizes [N, I] -> y, hn and cn, None for a cell without cell state.

    torch's functions need tensors for all states. They get train=True wherever a gradient may be needed: cuDNN saves
    nothing for backward otherwise. A trace is for inference.
    """
    rows = num_layers * (2 if bidirectional else 1)
    options = (
        list(weights),
        len(weights) // rows >= 4,
        num_layers,
        float(dropout),
        dropout > 0 or (torch.is_grad_enabled() and not torch.jit.is_tracing()),
        bool(bidirectional),
    )
    h0 = x.new_zeros(rows, B, weights[1].shape[1]) if h0 is None else h0
    hx: Any = h0
    if cell.has_cell_state:
        c0 = x.new_zeros(rows, B, weights[1].shape[0] // len(cell.gates)) if c0 is None else c0
        hx = (h0, c0)
    function = getattr(_VF, cell.name)
    if batch_sizes is not None:
        y, hn, *cn = function(x, batch_sizes, hx, *options)
    else:
        y, hn, *cn = function(x, hx, *options, False)
    return y, hn, cn[0] if cn else None


def lacks_second_derivative(x: Tensor) -> bool:
    """Whether the layers have no second derivative on this device, as with cuDNN."""
    return x.is_cuda


def step(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One time step: x [B, I], h0 [B, H], c0 [B, C] -> hn and cn. torch validates shapes and dtypes."""
    if h0 is None:
        h0 = c0 = x.new_zeros(len(x), weights[1].shape[1])
    function = getattr(_VF, f"{cell.name}_cell")
    if cell.has_cell_state:
        return function(x, (h0, c0), *weights)
    return function(x, h0, *weights), None
