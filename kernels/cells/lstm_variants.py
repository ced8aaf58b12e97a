"""Variants of the long short-term memory; see fusedrnn/cells/lstm_variants.py.

p: rows of the peepholes, of i, f and o, or of i and o; v_c and v_g: multipliers, of zoneout of c and of the candidate;
each None where there are none. Coupled gates have a map and a saved value less; forward gives them a fourth map of
zeros, which is not read.
"""

import triton
import triton.language as tl

from .functions import sigmoid, tanh


@triton.jit
def step(a, c, p, v_c, v_g):
    return _step(a, c, p, v_c, v_g, False)


@triton.jit
def step_coupled(a, c, p, v_c, v_g):
    return _step(a, c, p, v_c, v_g, True)


@triton.jit
def step_backward(saved, c_in, c, dm, dc, p, v_c, v_g):
    return _step_backward(saved, c_in, c, dm, dc, p, v_c, v_g, False)


@triton.jit
def step_backward_coupled(saved, c_in, c, dm, dc, p, v_c, v_g):
    return _step_backward(saved, c_in, c, dm, dc, p, v_c, v_g, True)


@triton.jit
def _step(a, c_in, p, v_c, v_g, COUPLED: tl.constexpr):
    a_i = a[0]
    a_g = a[1 if COUPLED else 2]
    a_o = a[2 if COUPLED else 3]
    if p is not None:
        a_i += p[0] * c_in
    i = sigmoid(a_i)
    if COUPLED:
        f = 1.0 - i
    else:
        a_f = a[1]
        if p is not None:
            a_f += p[1] * c_in
        f = sigmoid(a_f)
    g = tanh(a_g)
    c = f * c_in + i * _candidate(g, v_g)
    if p is not None:
        a_o += p[1 if COUPLED else 2] * c
    o = sigmoid(a_o)
    c_out = c
    if v_c is not None:
        c_out = v_c * c_in + (1.0 - v_c) * c
    if COUPLED:
        saved = (i, g, o)
    else:
        saved = (i, f, g, o)
    return o * tanh(c), c_out, saved


@triton.jit
def _step_backward(saved, c_in, c, dm, dc_out, p, v_c, v_g, COUPLED: tl.constexpr):
    i = saved[0]
    g = saved[1 if COUPLED else 2]
    o = saved[2 if COUPLED else 3]
    if COUPLED:
        f = 1.0 - i
    else:
        f = saved[1]
    candidate = _candidate(g, v_g)
    dc = dc_out
    dc_in = dc_out  # by what zoneout keeps
    if v_c is not None:
        c = f * c_in + i * candidate  # what m is made of
        dc_in = v_c * dc_out
        dc = dc_out - dc_in
    tanh_c = tanh(c)
    da_o = dm * tanh_c * o * (1.0 - o)
    dc += dm * o * (1.0 - tanh_c * tanh_c)
    if p is not None:
        dc += da_o * p[1 if COUPLED else 2]
    da_g = dc * i * (1.0 - g * g)
    if v_g is not None:
        da_g *= v_g
    if COUPLED:
        da_i = dc * (candidate - c_in) * i * (1.0 - i)
        da = (da_i, da_g, da_o)
    else:
        da_i = dc * candidate * i * (1.0 - i)
        da_f = dc * c_in * f * (1.0 - f)
        da = (da_i, da_f, da_g, da_o)
    if v_c is not None:
        dc_in += dc * f
    else:
        dc_in = dc * f
    if p is None:
        return da, dc_in
    else:
        dc_in += da_i * p[0]
        if COUPLED:
            return da, dc_in, (da_i * c_in, da_o * c)
        else:
            return da, dc_in + da_f * p[1], (da_i * c_in, da_f * c_in, da_o * c)


@triton.jit
def _candidate(g, v_g):
    if v_g is None:
        return g
    else:
        return g * v_g
