"""Gated recurrent unit: Cho et al. 2014 (arXiv 1406.1078), with the reset gate applied after the product as in nn.GRU.

r, z = sigmoid(a_r, a_z), n = tanh(a_nx + r * a_nh), h = (1 - z) * n + z * h', where h' is the previous hidden state.
The candidate n has separate affine maps of the input, a_nx, and of the state, a_nh. h' in z * h' is not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Cell


def _step(a: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nx, r, z, nh = a.chunk(4, dim=-1)
    r, z = r.sigmoid(), z.sigmoid()
    n = (nx + r * nh).tanh()
    h = (1 - z) * n + z * h
    return h, h, torch.cat([n, r, z, nh], dim=-1)


def _activate_(a: Tensor) -> None:
    nx, r, z, nh = a.chunk(4, dim=-1)
    r.sigmoid_()
    z.sigmoid_()
    nx.addcmul_(r, nh).tanh_()


def _step_backward(saved: Tensor, h_in: Tensor, h: Tensor, dm: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, r, z, nh = saved.chunk(4, dim=-1)
    dh = dh + dm
    da_nx = dh * (1 - z) * (1 - n * n)
    da_r = da_nx * nh * r * (1 - r)
    da_z = dh * (h_in - n) * z * (1 - z)
    return torch.cat([da_nx, da_r, da_z, da_nx * r], dim=-1), dh * z, h


GRU = Cell(
    name="gru",
    gates=("r", "z", "n"),
    maps=("nx", "r", "z", "nh"),
    input=(2, 0, 1, None),
    recurrent=(None, 0, 1, 2),
    saved=("n", "r", "z", "nh"),
    carry="hidden",
    step=_step,
    activate_=_activate_,
    step_backward=_step_backward,
)
