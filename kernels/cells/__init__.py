"""The cells on tiles: their pointwise functions and the derivatives of those, one file for each kind.

    step(a, carry) -> m, the new carry, saved
    step_backward(saved, the carry that entered, the carry that left, dm, dcarry) -> da, the gradient of the carry

Functions with `operands` take three more arguments, each None where the cell has no such thing: its parameters, a tuple
of rows [1, UNITS], and the multipliers of zoneout of c and of dropout of the candidate. With parameters step_backward
returns one more result, a tuple of their gradients.

fusedrnn/cells says what these are, and what else makes a cell. Here a and da are tuples of M tiles, one for each map,
and saved is one of S. All tiles are float32 and of one shape; a cell without a carry gets zeros. The kernels are the
same for all cells, and take these functions as constants.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from ...cells import OWN, VARIANTS, named, obstacle
from ...cells.spec import Blocks
from . import gru, lstm, lstm_variants, own, rnn


class Cell(NamedTuple):
    """The two functions of a cell."""

    step: Callable[..., Any]
    step_backward: Callable[..., Any]
    operands: bool = False


_VARIANT = Cell(lstm_variants.step, lstm_variants.step_backward, operands=True)
_COUPLED = Cell(lstm_variants.step_coupled, lstm_variants.step_backward_coupled, operands=True)

CELLS = {
    "lstm": Cell(lstm.step, lstm.step_backward),
    "gru": Cell(gru.step, gru.step_backward),
    "rnn_tanh": Cell(rnn.step_tanh, rnn.step_backward_tanh),
    "rnn_relu": Cell(rnn.step_relu, rnn.step_backward_relu),
    **{name: _COUPLED if len(cell.gates) == 3 else _VARIANT for name, cell in VARIANTS.items()},
}


class Names:
    """The built-in cells, and custom cells with generated code."""

    def __contains__(self, name: object) -> bool:
        return name in CELLS or (name in OWN and obstacle(OWN[str(name)]) is None)

    def __iter__(self) -> Iterator[str]:
        return iter(CELLS)


@cache
def functions(name: str) -> Cell:
    """The functions of a cell."""
    if name in CELLS:
        return CELLS[name]
    return Cell(*own.functions(named(name)), operands=bool(named(name).parameters))


@cache
def constants(kernel: str, name: str) -> dict[str, Any]:
    """The compile-time constants of "forward" or "backward" that a cell decides, by name."""
    cell = named(name)
    step, step_backward, operands = functions(name)
    gates, maps = len(cell.gates), len(cell.maps)
    filled = [k for k, gate in enumerate(cell.recurrent) if gate is not None]
    # Assumed by the kernels: the backward has one product with h.
    assert filled == [*range(filled[0], filled[0] + gates)]
    both = {
        "GATES": gates,
        "SAVED": len(cell.saved),
        "CARRY": cell.carry,
        "PARAMETERS": len(cell.parameters),
        "OPERANDS": operands,
    }
    if kernel == "forward":
        blocks = {"INPUT": cell.input, "RECURRENT": cell.recurrent}
        return {**both, "STEP": step, **{key: columns(tuple(of[k] for k in cell.read)) for key, of in blocks.items()}}
    return {**both, "STEP": step_backward, "MAPS": maps, "FIRST": filled[0]}


def columns(blocks: Blocks) -> Blocks:
    """The maps of a unit as forward's products have them: one, or four, of which those that the cell lacks are None.

    Tiles are split into the maps by halves.
    """
    return blocks if len(blocks) == 1 else (*blocks, *[None] * (4 - len(blocks)))


def adds_bias(name: str) -> bool:
    """Whether the forward adds biases b_hh also where the input's product is given: there are maps without input."""
    return None in named(name).input
