"""Long short-term memory; see fusedrnn/cells/lstm.py."""

import triton
import triton.language as tl  # noqa: F401  Triton's interpreter wants to see it

from .functions import sigmoid, tanh


@triton.jit
def step(a, c):
    i = sigmoid(a[0])
    f = sigmoid(a[1])
    g = tanh(a[2])
    o = sigmoid(a[3])
    c = f * c + i * g
    return o * tanh(c), c, (i, f, g, o)


@triton.jit
def step_backward(saved, c_in, c, dm, dc):
    i, f, g, o = saved
    tanh_c = tanh(c)
    dc = dc + dm * o * (1.0 - tanh_c * tanh_c)
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_in * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    da_o = dm * tanh_c * o * (1.0 - o)
    return (da_i, da_f, da_g, da_o), dc * f
