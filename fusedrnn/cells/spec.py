"""`Cell`: the affine maps that a cell reads, its carry, its pointwise function and the derivative of that.

Everything else of a recurrent layer (products, time steps, lengths, resets, layers, directions, dtypes) is the same for
all cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .program import Program

Blocks = tuple[int | None, ...]
Step = Callable[..., tuple[Tensor, Tensor, Tensor]]
StepBackward = Callable[..., tuple[Tensor, ...]]

# The effect of each multiplier, in the order of a cell's `noise`. v is the multiplier of a unit.
NOISE = {
    "h": "zoneout of h: h_t = v h_{t-1} + (1 - v) m_t, for m_t the hidden state that the cell gives",
    "c": "zoneout of c: c_t = v c_{t-1} + (1 - v) c, for c the cell state that m_t is made of",
    "g": "dropout of the candidate: v g_t stands for g_t",
    "r": "dropout of the state: v h_{t-1} stands for h_{t-1} in the product with w_hh",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of H hidden units.

    A weight or bias has a block of H rows for each of the G gates. The pointwise function reads M maps: a map is a
    gate's affine map of the input, of the previous state, or the sum of both. It saves S values per unit for its
    derivative.

    Attributes:
        name: in operators, profiles and messages; `mode` of torch's own module in lower case.
        gates: G names, in torch's order of the rows.
        maps: M names.
        input: for each map, the gate whose affine map of the input it includes; None for none.
        recurrent: for each map, the gate whose affine map of the previous state it includes; None for none.
        saved: S names.
        carry: the state besides h that is passed from step to step without rounding to the dtype of x: "cell", a
            separate state c with H numbers; "hidden", h itself; or None.
        step: (a [..., M*H], carry [..., H]) -> m [..., H], the new carry, saved [..., S*H]. m is the new hidden state,
            or the input of the projection. Without a carry both carries are [..., 0].
        activate_: replaces a [..., M*H] by the saved values, S*H = M*H, in place.
        step_backward: (saved, old carry, new carry, dm, dcarry) -> da [..., M*H], the gradient of the old carry, and m.
            dcarry is the gradient of the new carry, without the path through m.
        parameters: names of per-unit parameters, [K*H] together; empty for most cells.
        noise: the names in `NOISE` of the multipliers that a call of the layer takes, each [T, B, H], or [1, B, H] for
            all steps. "h" and "r" act on the hidden state of any cell, outside of the pointwise function.
        unread: names of the maps that the pointwise function does not read. Their gradient is zero.
        program: the recorded pointwise function of a custom cell, for code generation; or the reason why there is none.
        parameters_backward: (da, saved, old carry, new carry, a dict of noise) -> the gradient of the parameters
            [..., K*H] for each row, if it follows from these; else None.

    A cell with parameters, or with noise "c" or "g", has a `step` and a `step_backward` with two more arguments: the
    parameters [K*H] or None, and a dict of name -> multipliers [..., H]. Its `step_backward` returns one more result:
    the gradient of the parameters per row, [..., K*H], or None.
    """

    name: str
    gates: tuple[str, ...]
    maps: tuple[str, ...]
    input: Blocks
    recurrent: Blocks
    saved: tuple[str, ...]
    carry: Literal["cell", "hidden"] | None
    step: Step
    activate_: Callable[[Tensor], None]
    step_backward: StepBackward
    parameters: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    program: Program | str | None = None
    parameters_backward: Callable[..., Tensor] | None = None

    @property
    def title(self) -> str:
        """The class name of the layer, in torch.nn and in this package."""
        return self.name.replace("+", "_").replace("#", "_").split("_")[0].upper()

    @property
    def has_operands(self) -> bool:
        """Whether the pointwise function takes parameters or noise."""
        return bool(self.parameters) or "c" in self.noise or "g" in self.noise

    @property
    def has_cell_state(self) -> bool:
        return self.carry == "cell"

    def cell_size(self, hidden_size: int) -> int:
        """The size of c: H, or 0 for a cell without cell state."""
        return hidden_size if self.has_cell_state else 0

    @property
    def read(self) -> tuple[int, ...]:
        """Which of the maps the pointwise function reads."""
        return tuple(k for k, name in enumerate(self.maps) if name not in self.unread)

    def maps_of(self, rows: Tensor, blocks: Blocks, dim: int = -1) -> Tensor:
        """Moves affine maps [..., G*H] to the layout of the pointwise function, [..., M*H]; zeros in other maps."""
        if blocks == tuple(range(len(self.gates))):
            return rows
        each = rows.chunk(len(self.gates), dim)
        return torch.cat([torch.zeros_like(each[0]) if gate is None else each[gate] for gate in blocks], dim)

    def rows_of(self, da: Tensor, blocks: Blocks) -> Tensor:
        """The inverse of `maps_of`, for gradients: [..., M*H] -> [..., G*H]."""
        if blocks == tuple(range(len(self.gates))):
            return da
        each = da.chunk(len(self.maps), dim=-1)
        return torch.cat([each[blocks.index(gate)] for gate in range(len(self.gates))], dim=-1)
