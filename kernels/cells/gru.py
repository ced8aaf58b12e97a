"""Gated recurrent unit; see fusedrnn/cells/gru.py."""

import triton
import triton.language as tl  # noqa: F401  Triton's interpreter wants to see it

from .functions import sigmoid, tanh


@triton.jit
def step(a, h):
    nx, r, z, nh = a
    r = sigmoid(r)
    z = sigmoid(z)
    n = tanh(nx + r * nh)
    h = (1.0 - z) * n + z * h
    return h, h, (n, r, z, nh)


@triton.jit
def step_backward(saved, h_in, h, dm, dh):
    n, r, z, nh = saved
    dh = dh + dm
    da_nx = dh * (1.0 - z) * (1.0 - n * n)
    da_r = da_nx * nh * r * (1.0 - r)
    da_z = dh * (h_in - n) * z * (1.0 - z)
    return (da_nx, da_r, da_z, da_nx * r), dh * z
