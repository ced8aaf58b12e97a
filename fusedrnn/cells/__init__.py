"""The cells: what a recurrent layer computes at each step, one file for each kind; spec.py says what makes a cell."""

from .gru import GRU
from .lstm import LSTM
from .rnn import RNN_RELU, RNN_TANH
from .spec import Cell

CELLS = {cell.name: cell for cell in (LSTM, GRU, RNN_TANH, RNN_RELU)}
RNNS = {"tanh": RNN_TANH, "relu": RNN_RELU}  # by the `nonlinearity` of torch's modules

__all__ = ["CELLS", "GRU", "LSTM", "RNNS", "RNN_RELU", "RNN_TANH", "Cell"]
