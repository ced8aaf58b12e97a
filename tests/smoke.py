"""What a wheel has to do where it is installed: `make wheel` runs this with the oldest and the newest torch.

Exits with an error if the native library is missing, or a layer's results or gradients are not torch's.
"""

import sys

import torch
from torch import nn

import fusedrnn


def gradients(layer, x):
    y, _ = layer(x)
    return y, torch.autograd.grad(y.square().sum(), list(layer.parameters()))


missing = fusedrnn.backends()["cpu"]
if missing is not None:
    sys.exit(f"the cpu backend is not available: {missing}")
with fusedrnn.use_backend("cpu"):
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        torch.manual_seed(0)
        layer, x = kind(33, 65, num_layers=2, bidirectional=True, dtype=torch.float64), torch.randn(9, 5, 33).double()
        expected = gradients(layer, x)
        torch.testing.assert_close(gradients(fusedrnn.convert(layer), x), expected)
        if not isinstance(layer, getattr(fusedrnn, kind.__name__)):
            sys.exit(f"{kind.__name__} was not converted")
print(f"fusedrnn {fusedrnn.__version__} computes with torch {torch.__version__}, Python {sys.version.split()[0]}")
