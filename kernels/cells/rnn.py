"""The plain recurrent cell, with tanh or with relu; see fusedrnn/cells/rnn.py."""

import triton
import triton.language as tl

from .functions import tanh


@triton.jit
def step_tanh(a, carry):
    h = tanh(a[0])
    return h, carry, (h,)


@triton.jit
def step_backward_tanh(saved, carry_in, carry, dm, dcarry):
    h = saved[0]
    return (dm * (1.0 - h * h),), dcarry


@triton.jit
def step_relu(a, carry):
    h = tl.where(a[0] <= 0.0, 0.0, a[0])  # a NaN stays one
    return h, carry, (h,)


@triton.jit
def step_backward_relu(saved, carry_in, carry, dm, dcarry):
    return (dm * tl.where(saved[0] > 0.0, 1.0, 0.0),), dcarry
