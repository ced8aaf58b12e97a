"""What makes a cell: the affine maps it reads, the state it carries, its pointwise function and the derivative of it.

Everything else about a recurrent layer (products, time steps, lengths, resets, layers, directions, dtypes) is the same
for all cells, and asks a `Cell` for what it has to know.
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

# What a multiplier of each name does, in the order in which a cell has them. With v the multiplier of a unit:
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
    gate's affine map of the input, of the state that enters, or the sum of both. It keeps S values of each unit for
    its derivative.

    Attributes:
        name: in operators, profiles and messages; `mode` of torch's own module in lower case.
        gates: G names, in torch's order of the rows.
        maps: M names.
        input: for each map, the gate whose affine map of the input is in it; None for none.
        recurrent: the same of the state that enters.
        saved: S names.
        carry: what goes from step to step besides h and is not rounded to the dtype of x: "cell", a state of its own
            with H numbers (c); "hidden", h itself; or None.
        step: (a [..., M*H], carry [..., H]) -> m [..., H], the new carry, saved [..., S*H]. m is the new hidden state,
            or what a projection makes it of. Where there is no carry, it is [..., 0].
        activate_: a [..., M*H] becomes what is saved, S*H = M*H, in place.
        step_backward: (saved, the carry that entered, the carry that left, dm, dcarry) -> da [..., M*H], the gradient
            of the carry that entered, and m. dcarry is the gradient of the carry that left by all ways but m.
        parameters: names of the parameters that each unit has one of, [K*H] together; none for most cells.
        noise: the multipliers that a call of the layer is given, each [T, B, H] (a sequence may have one for all
            steps), by the names of `NOISE`. Those of "h" and "r" are about the hidden state, whatever the cell, and are
            applied around the pointwise function.
        unread: of the maps, those that the pointwise function does not read. Their gradient is zero.
        program: of a cell of one's own, its pointwise function for whoever generates code, or why there is none.
        parameters_backward: (da, saved, the carry that entered, the carry that left, a dict of noise) -> the gradient
            of the parameters [..., K*H] for each row, where it follows from these; else None.

    A cell with parameters, or with noise "c" or "g", has a `step` and a `step_backward` with two more arguments: the
    parameters [K*H] or None, and a dict of name -> multipliers [..., H]. Its `step_backward` returns one more result:
    the gradient of the parameters, [..., K*H] for each row, or None.
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
        """The name of torch's own class, which is that of the module of this package as well."""
        return self.name.replace("+", "_").replace("#", "_").split("_")[0].upper()

    @property
    def has_operands(self) -> bool:
        """Whether the pointwise function takes parameters or noise."""
        return bool(self.parameters) or "c" in self.noise or "g" in self.noise

    @property
    def has_cell_state(self) -> bool:
        return self.carry == "cell"

    def cell_size(self, hidden_size: int) -> int:
        """How many numbers c has: H, or 0 for a cell without."""
        return hidden_size if self.has_cell_state else 0

    @property
    def read(self) -> tuple[int, ...]:
        """Which of the maps the pointwise function reads."""
        return tuple(k for k, name in enumerate(self.maps) if name not in self.unread)

    def maps_of(self, rows: Tensor, blocks: Blocks, dim: int = -1) -> Tensor:
        """Affine maps [..., G*H] where the pointwise function reads them, [..., M*H]; zeros in maps that have none."""
        if blocks == tuple(range(len(self.gates))):
            return rows
        each = rows.chunk(len(self.gates), dim)
        return torch.cat([torch.zeros_like(each[0]) if gate is None else each[gate] for gate in blocks], dim)

    def rows_of(self, da: Tensor, blocks: Blocks) -> Tensor:
        """The inverse of `maps_of`: of gradients [..., M*H], those of the gates' affine maps, [..., G*H]."""
        if blocks == tuple(range(len(self.gates))):
            return da
        each = da.chunk(len(self.maps), dim=-1)
        return torch.cat([each[blocks.index(gate)] for gate in range(len(self.gates))], dim=-1)
