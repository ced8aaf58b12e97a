"""Variants of the long short-term memory without noise; see fusedrnn/cells/lstm_variants.py.

Coupled gates have a map and a saved value less; forward gives them a fourth map of zeros, which is not read. p: rows of
the peepholes, of i, f and o, or of i and o.
"""

import triton
import triton.language as tl  # noqa: F401  Triton's interpreter wants to see it

from .functions import sigmoid, tanh


@triton.jit
def step_peephole(a, c, p):
    i = sigmoid(a[0] + p[0] * c)
    f = sigmoid(a[1] + p[1] * c)
    g = tanh(a[2])
    c = f * c + i * g
    o = sigmoid(a[3] + p[2] * c)
    return o * tanh(c), c, (i, f, g, o)


@triton.jit
def step_coupled(a, c):
    i = sigmoid(a[0])
    g = tanh(a[1])
    o = sigmoid(a[2])
    c = (1.0 - i) * c + i * g
    return o * tanh(c), c, (i, g, o)


@triton.jit
def step_peephole_coupled(a, c, p):
    i = sigmoid(a[0] + p[0] * c)
    g = tanh(a[1])
    c = (1.0 - i) * c + i * g
    o = sigmoid(a[2] + p[1] * c)
    return o * tanh(c), c, (i, g, o)


@triton.jit
def step_backward_peephole(saved, c_in, c, dm, dc, p):
    i, f, g, o = saved
    tanh_c = tanh(c)
    da_o = dm * tanh_c * o * (1.0 - o)
    dc = dc + dm * o * (1.0 - tanh_c * tanh_c) + da_o * p[2]
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_in * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    return (da_i, da_f, da_g, da_o), dc * f + da_i * p[0] + da_f * p[1]


@triton.jit
def step_backward_coupled(saved, c_in, c, dm, dc):
    i, g, o = saved
    tanh_c = tanh(c)
    dc = dc + dm * o * (1.0 - tanh_c * tanh_c)
    da_i = dc * (g - c_in) * i * (1.0 - i)
    da_g = dc * i * (1.0 - g * g)
    da_o = dm * tanh_c * o * (1.0 - o)
    return (da_i, da_g, da_o), dc * (1.0 - i)


@triton.jit
def step_backward_peephole_coupled(saved, c_in, c, dm, dc, p):
    i, g, o = saved
    tanh_c = tanh(c)
    da_o = dm * tanh_c * o * (1.0 - o)
    dc = dc + dm * o * (1.0 - tanh_c * tanh_c) + da_o * p[1]
    da_i = dc * (g - c_in) * i * (1.0 - i)
    da_g = dc * i * (1.0 - g * g)
    return (da_i, da_g, da_o), dc * (1.0 - i) + da_i * p[0]
