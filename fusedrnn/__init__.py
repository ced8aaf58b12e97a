"""Fused LSTM layers for PyTorch: a drop-in for torch.nn.LSTM. See README.md."""

from . import functional
from .convert import Report, convert, patch, revert
from .dispatch import Explanation, backends, explain, use_backend
from .functional import LSTMStates
from .module import LSTM, CompilableLSTM, LSTMCell
from .tuning.api import Tuning, tune
from .version import __version__ as __version__

__all__ = [
    "LSTM",
    "CompilableLSTM",
    "Explanation",
    "LSTMCell",
    "LSTMStates",
    "Report",
    "Tuning",
    "backends",
    "convert",
    "explain",
    "functional",
    "patch",
    "revert",
    "tune",
    "use_backend",
]
