"""What the tests of the LSTM's variants and of custom cells share."""

import pytest
import torch


@pytest.fixture
def triton_device(monkeypatch):
    """The GPU, or the CPU for Triton's interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"
