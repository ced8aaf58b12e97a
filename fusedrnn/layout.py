"""torch's recurrent modules: their cell, and the order and names of their weights.

Letters, here and everywhere: T time, B batch, I input, H hidden, P projection (P = H without one), L layers,
D directions, G gates. Each weight stacks the gates of its cell along its rows, in the order of `cells.Cell.gates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .cells import CELLS, GRU, LSTM, RNNS, Cell

_MODES = {cell.name.upper(): cell for cell in CELLS.values()}  # nn.RNNBase.mode


class DirectionWeights(NamedTuple):
    """The weights of one direction of one layer, in torch's own layout."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]
    w_p: Tensor | None = None  # [K*H], per-unit parameters, such as peepholes

    @property
    def hidden_size(self) -> int:
        return self.w_hh.shape[1] if self.w_hr is None else self.w_hr.shape[1]


def split_directions(weights: Sequence[Tensor], bidirectional: bool, cell: Cell = LSTM) -> list[DirectionWeights]:
    """Splits one layer's flat weights (torch's order) into its directions.

    The count per direction decides: 2 are w_ih and w_hh, 3 add w_hr, 4 add the biases, 5 add both. Cells with per-unit
    parameters have one more tensor, the last.
    """
    count = len(weights) // (2 if bidirectional else 1)
    directions = []
    for start in range(0, len(weights), count):
        rest = list(weights[start + 2 : start + count])
        w_p = rest.pop() if cell.parameters else None
        w_hr = rest.pop() if len(rest) % 2 else None
        b_ih, b_hh = rest if rest else (None, None)
        directions.append(DirectionWeights(weights[start], weights[start + 1], b_ih, b_hh, w_hr, w_p))
    return directions


def cell_of(module: nn.Module) -> Cell | None:
    """The cell of a recurrent module, a layer or one step (`is_step`); None for any other module.

    For an LSTM of this package the cell is the one without zoneout and recurrent dropout.
    """
    own = getattr(module, "_cell", None)
    if isinstance(own, Cell):
        return own
    if isinstance(module, nn.LSTMCell):
        return LSTM
    if isinstance(module, nn.GRUCell):
        return GRU
    if isinstance(module, nn.RNNCell):
        return RNNS.get(module.nonlinearity)
    mode = getattr(module, "mode", None)
    return _MODES.get(mode) if isinstance(mode, str) else None


def is_step(module: nn.Module) -> bool:
    """Whether a recurrent module computes one time step."""
    return isinstance(module, nn.RNNCellBase)
