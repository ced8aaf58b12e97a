"""Runs a stack of layers, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import autograd
from .cells import Cell


def run(
    backend: str,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    cell_states: bool = False,
    draw: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """x [T, B, I] -> y [T, B, D*P], hn [L*D, B, P], cn [L*D, B, C], and every layer's h and c [T, B, ...].

    Packed x is [N, I]; y, h and c are then [N, ...]. c is valid with cell_states only. draw() draws the noise of a
    layer, for a cell with noise.
    """
    name = cell.name
    noise: Callable[[], Tensor | None] = (lambda: None) if draw is None else draw
    if num_layers == 1:
        y, hn, cn, c = autograd.layer(
            backend, name, x, weights, bidirectional, h0, c0, lengths, reset, cell_states, noise()
        )
        return y, hn, cn, [y], [c]
    count, D = len(weights) // num_layers, 2 if bidirectional else 1
    h0s, c0s = ([None] * num_layers if s is None else s.split(D) for s in (h0, c0))
    y, hns, cns, hs, cs = x, [], [], [], []
    for k in range(num_layers):
        if k > 0 and dropout > 0:
            y = torch.nn.functional.dropout(y, dropout)
        own = weights[k * count : (k + 1) * count]
        y, hn, cn, c = autograd.layer(
            backend, name, y, own, bidirectional, h0s[k], c0s[k], lengths, reset, cell_states, noise()
        )
        hns.append(hn)
        cns.append(cn)
        hs.append(y)
        cs.append(c)
    return y, torch.cat(hns), torch.cat(cns), hs, cs
