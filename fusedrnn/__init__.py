"""Fused LSTM, GRU and RNN layers for PyTorch: drop-ins for torch.nn's. See README.md."""

from . import functional
from .cells import cell
from .convert import Report, convert, patch, revert
from .dispatch import Explanation, backends, explain, use_backend
from .functional import LSTMStates, RNNStates
from .module import GRU, LSTM, RNN, CompilableGRU, CompilableLSTM, CompilableRNN, GRUCell, LSTMCell, Recurrent, RNNCell
from .tuning.api import Tuning, tune
from .version import __version__ as __version__

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CompilableGRU",
    "CompilableLSTM",
    "CompilableRNN",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "LSTMStates",
    "RNNCell",
    "RNNStates",
    "Recurrent",
    "Report",
    "Tuning",
    "backends",
    "cell",
    "convert",
    "explain",
    "functional",
    "patch",
    "revert",
    "tune",
    "use_backend",
]
