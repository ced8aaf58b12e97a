"""The cells on tiles: their pointwise functions and the derivatives of those, one file for each kind.

    step(a, carry) -> m, the new carry, saved
    step_backward(saved, the carry that entered, the carry that left, dm, dcarry) -> da, the gradient of the carry

fusedrnn/cells says what these are, and what else makes a cell. Here a and da are tuples of M tiles, one for each map,
and saved is one of S. All tiles are float32 and of one shape; a cell without a carry gets zeros. The kernels are the
same for all cells, and take these functions as constants.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from ...cells import CELLS as DEFINITIONS
from . import gru, lstm, rnn


class Cell(NamedTuple):
    """The two functions of a cell."""

    step: Callable[..., Any]
    step_backward: Callable[..., Any]


CELLS = {
    "lstm": Cell(lstm.step, lstm.step_backward),
    "gru": Cell(gru.step, gru.step_backward),
    "rnn_tanh": Cell(rnn.step_tanh, rnn.step_backward_tanh),
    "rnn_relu": Cell(rnn.step_relu, rnn.step_backward_relu),
}


@cache
def constants(kernel: str, name: str) -> dict[str, Any]:
    """The compile-time constants of "forward" or "backward" that a cell decides, by name."""
    cell = DEFINITIONS[name]
    gates, maps = len(cell.gates), len(cell.maps)
    first = cell.recurrent.index(0)
    # What the kernels take for granted: tiles are split into the maps by halves, and backward has one product with h.
    assert maps in (1, 4)
    assert cell.recurrent == (*[None] * first, *range(gates), *[None] * (maps - gates - first))
    both = {"GATES": gates, "SAVED": len(cell.saved), "CARRY": cell.carry}
    if kernel == "forward":
        return {**both, "STEP": CELLS[name].step, "INPUT": cell.input, "RECURRENT": cell.recurrent}
    return {**both, "STEP": CELLS[name].step_backward, "MAPS": maps, "FIRST": first}


def adds_bias(name: str) -> bool:
    """Whether the forward adds biases b_hh also where the input's product is given: there are maps without input."""
    return None in DEFINITIONS[name].input
