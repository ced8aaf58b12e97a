"""Fused LSTM layers for PyTorch: a drop-in for torch.nn.LSTM. See README.md."""

from . import functional
from .convert import Report, convert, patch, revert
from .dispatch import Explanation, backends, explain, use_backend
from .functional import LSTMStates
from .module import LSTM, CompilableLSTM, LSTMCell

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "CompilableLSTM",
    "Explanation",
    "LSTMCell",
    "LSTMStates",
    "Report",
    "backends",
    "convert",
    "explain",
    "functional",
    "patch",
    "revert",
    "use_backend",
]
