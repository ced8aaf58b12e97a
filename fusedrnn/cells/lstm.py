"""Long short-term memory: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, as in nn.LSTM.

i, f, o = sigmoid(a_i, a_f, a_o), g = tanh(a_g), c = f * c' + i * g, m = o * tanh(c), for the previous cell state c'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Cell


def _step(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = a.chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat([i, f, g, o], dim=-1)


def _activate_(a: Tensor) -> None:
    i, f, g, o = a.chunk(4, dim=-1)
    i.sigmoid_()
    f.sigmoid_()
    g.tanh_()
    o.sigmoid_()


def _step_backward(saved: Tensor, c_in: Tensor, c: Tensor, dm: Tensor, dc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = saved.chunk(4, dim=-1)
    tanh_c = c.tanh()
    dc = dc + dm * o * (1 - tanh_c * tanh_c)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_in * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dm * tanh_c * o * (1 - o)
    return torch.cat([da_i, da_f, da_g, da_o], dim=-1), dc * f, o * tanh_c


LSTM = Cell(
    name="lstm",
    gates=("i", "f", "g", "o"),
    maps=("i", "f", "g", "o"),
    input=(0, 1, 2, 3),
    recurrent=(0, 1, 2, 3),
    saved=("i", "f", "g", "o"),
    carry="cell",
    step=_step,
    activate_=_activate_,
    step_backward=_step_backward,
)
