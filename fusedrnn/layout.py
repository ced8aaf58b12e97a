"""Order and naming of LSTM weights: the only place that knows how nn.LSTM lays them out.

Letters, here and everywhere: T time, B batch, I input, H hidden, P projection (P = H without one), L layers,
D directions. Each weight stacks the four gates along its rows in the order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GATES = ("i", "f", "g", "o")


class DirectionWeights(NamedTuple):
    """The weights of one direction of one layer, in nn.LSTM's own layout."""

    w_ih: Tensor  # [4H, I]
    w_hh: Tensor  # [4H, P]
    b_ih: Tensor | None  # [4H]
    b_hh: Tensor | None  # [4H]
    w_hr: Tensor | None  # [P, H]

    @property
    def hidden_size(self) -> int:
        return self.w_hh.shape[0] // len(GATES)


def weight_names(layer: int, reverse: bool, bias: bool, proj: bool) -> list[str]:
    """nn.LSTM's parameter names for one direction of one layer, in its order."""
    names = ["weight_ih", "weight_hh"]
    if bias:
        names += ["bias_ih", "bias_hh"]
    if proj:
        names += ["weight_hr"]
    return [f"{name}_l{layer}{'_reverse' if reverse else ''}" for name in names]


def split_directions(weights: Sequence[Tensor], bidirectional: bool) -> list[DirectionWeights]:
    """Splits one layer's flat weights (nn.LSTM's order) into its directions.

    How many there are tells what they are: 2 a direction are w_ih and w_hh, 3 add w_hr, 4 add the biases, 5 both.
    """
    count = len(weights) // (2 if bidirectional else 1)
    directions = []
    for start in range(0, len(weights), count):
        rest = list(weights[start + 2 : start + count])
        w_hr = rest.pop() if count in (3, 5) else None
        b_ih, b_hh = rest if rest else (None, None)
        directions.append(DirectionWeights(weights[start], weights[start + 1], b_ih, b_hh, w_hr))
    return directions


def onnx_order(weight: Tensor) -> Tensor:
    """A weight or bias [4H, ...] with its gates in the order of ONNX's LSTM, which names g c: i, o, f, c."""
    H = weight.shape[0] // len(GATES)
    return torch.cat([weight[GATES.index(gate) * H :][:H] for gate in "iofg"])
