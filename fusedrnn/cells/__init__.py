"""The cells: what a recurrent layer computes at each step, one file per cell; spec.py defines the class `Cell`."""

import copyreg

from .gru import GRU
from .lstm import LSTM
from .lstm_variants import VARIANTS, lstm_variant
from .own import OWN, OwnCell, cell, obstacle
from .rnn import RNN_RELU, RNN_TANH
from .spec import NOISE, Cell

CELLS = {cell.name: cell for cell in (LSTM, GRU, RNN_TANH, RNN_RELU)}  # those of torch
RNNS = {"tanh": RNN_TANH, "relu": RNN_RELU}  # by the `nonlinearity` of torch's modules


def named(name: str) -> Cell:
    """The cell of this name: one of torch's, a variant of the LSTM, or a custom cell.

    Raises:
        KeyError: there is no such cell.
    """
    for known in (CELLS, VARIANTS, OWN):
        if name in known:
            return known[name]
    raise KeyError(name)


copyreg.pickle(Cell, lambda cell: (named, (cell.name,)))  # its functions are not picklable

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "NOISE",
    "RNNS",
    "RNN_RELU",
    "RNN_TANH",
    "VARIANTS",
    "Cell",
    "OwnCell",
    "cell",
    "lstm_variant",
    "named",
    "obstacle",
]
