"""The definition of the layer in plain Python, and its backward written by hand.

All other backends are compared with this file. It is simple rather than fast: one direction is a loop over time around
`step`, and a step is the matrix products followed by the pointwise function of a cell (fusedrnn/cells). `layer` is
differentiable by autograd, to any order; `layer_backward` is the same derivative written by hand, so that a wrong
kernel can be told from wrong mathematics. The derivation is in docs/math.md, in the same letters.

Precision: bfloat16 and float16 are computed in float32. h_t is rounded to the dtype of x before the product, so that
the product reads the state that is returned; a cell's carry (c_t of an LSTM, h_t of a GRU) stays in float32 over the
whole sequence.

Letters beside those of layout.py: C is H for a cell with a cell state and 0 for others, whose layers take c0 = None and
return empty cn and c. S is the number of values per unit that the cell saves for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Cell
from .layout import DirectionWeights, split_directions
from .packing import PackedRows


class Trace(NamedTuple):
    """The results of one direction; all tensors but y are in the compute dtype."""

    y: Tensor  # [T, B, P], zero where the sequence has ended
    hn: Tensor  # [B, P]
    cn: Tensor  # [B, C]
    c: Tensor  # [T, B, C], zero where the sequence has ended
    saved: Tensor  # [T, B, S*H], zero where the sequence has ended


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the arithmetic is done in, for operands stored as `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def step(
    cell: Cell, x: Tensor, h: Tensor, carry: Tensor, w: DirectionWeights, noise: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One time step: x [B, I], h [B, P] and the carry [B, H], or [B, 0] -> h', the new carry, saved values [B, S*H].

    With w_hr, h' is projected: Sak et al. 2014 (arXiv 1402.1128). noise: the cell's multipliers, by name.
    """
    noise = noise or {}
    h_in = h * noise["r"] if "r" in noise else h
    a = cell.maps_of(x @ w.w_ih.T, cell.input) + cell.maps_of(h_in @ w.w_hh.T, cell.recurrent)
    if w.b_ih is not None and w.b_hh is not None:
        a = a + cell.maps_of(w.b_ih, cell.input) + cell.maps_of(w.b_hh, cell.recurrent)
    m, carry, saved = cell.step(a, carry, *((w.w_p, noise) if cell.has_operands else ()))
    if w.w_hr is not None:
        m = m @ w.w_hr.T
    if "h" in noise:
        m = noise["h"] * h + (1 - noise["h"]) * m
    return m, carry, saved


def layer(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    bidirectional: bool = False,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer over a whole sequence, both directions, differentiable by autograd.

    Args:
        cell: the cell.
        x: [T, B, I]; or [N, I], the rows of a PackedSequence, with non-increasing lengths whose first is T. Then y, c
            and saved have [N, ...] instead of [T, B, ...].
        weights: the layer's weights in torch's order and layout, direction after direction.
        bidirectional: whether `weights` includes a reverse direction.
        h0: [D, B, P] or None for zeros.
        c0: [D, B, C] or None for zeros.
        lengths: [B] int64; step t of sequence b exists if t < lengths[b]. The reverse direction starts at the last
            step. x is not read beyond the length, and y is zero there.
        reset: [T, B] bool; where true the state that enters step t is zero, in both directions.
        noise: the multipliers of a cell with noise, in its order, [K, T, B, D*H], or [K, 1, B, D*H], the same for all
            steps; for packed rows [K, N, D*H]. P in place of H if the cell's only noise is "r".

    Returns:
        y [T, B, D*P], hn [D, B, P], cn [D, B, C], c [T, B, D*C] (every c_t), saved [D, T, B, S*H].
    """
    if x.dim() == 2:
        packing = _packing(lengths)
        noise = _padded_noise(packing, noise)
        y, hn, cn, c, saved = layer(cell, packing.padded(x), weights, bidirectional, h0, c0, lengths, reset, noise)
        return packing.packed(y), hn, cn, packing.packed(c), packing.packed(saved)
    traces = [
        _direction(
            cell,
            x,
            w,
            h0[d] if h0 is not None else None,
            c0[d] if c0 is not None else None,
            lengths,
            reset,
            _of_steps(cell, noise, x.shape[0], 2 if bidirectional else 1, d),
            reverse=d == 1,
        )
        for d, w in enumerate(split_directions(weights, bidirectional, cell))
    ]
    y = torch.cat([trace.y for trace in traces], dim=-1)
    c = torch.cat([trace.c for trace in traces], dim=-1).to(x.dtype)
    hn = torch.stack([trace.hn for trace in traces]).to(x.dtype)
    cn = torch.stack([trace.cn for trace in traces]).to(x.dtype)
    saved = torch.stack([trace.saved for trace in traces]).to(x.dtype)
    return y, hn, cn, c, saved


def _direction(
    cell: Cell,
    x: Tensor,
    w: DirectionWeights,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    noise: list[dict[str, Tensor]],
    reverse: bool,
) -> Trace:
    T, B, _ = x.shape
    dtype = compute_dtype(x.dtype)
    w = _cast_weights(w, dtype)
    exists = existing(T, lengths)
    enters = _state_enters(exists, reset)
    xs = where_exists(x.to(dtype), exists)
    h = h0.to(dtype) if h0 is not None else xs.new_zeros(B, w.w_hh.shape[1])
    c = c0.to(dtype) if c0 is not None else xs.new_zeros(B, cell.cell_size(w.hidden_size))
    carry = h if cell.carry == "hidden" else c

    steps: list[tuple[Tensor, Tensor, Tensor]] = [(h, carry, carry)] * T
    for t in reversed(range(T)) if reverse else range(T):
        h_in, carry_in = (h, carry) if enters is None else (h.where(enters[t], 0.0), carry.where(enters[t], 0.0))
        h_out, carry_out, saved = step(cell, xs[t], h_in, carry_in, w, noise[t])
        h_out = h_out.to(x.dtype).to(dtype)
        if exists is None:
            h, carry = h_out, carry_out
        else:
            h, carry = h_out.where(exists[t], h), carry_out.where(exists[t], carry)
        steps[t] = (h_out, carry_out, saved)
    y, carries, saved = (where_exists(torch.stack(parts), exists) for parts in zip(*steps, strict=True))
    if cell.carry == "hidden":
        return Trace(y.to(x.dtype), h, c, xs.new_zeros(T, B, 0), saved)
    return Trace(y.to(x.dtype), h, carry, carries, saved)


def layer_backward(
    cell: Cell,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    bidirectional: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The derivative of `layer`, written by hand: backpropagation through time.

    Args:
        dy, dhn, dcn, dc: gradients of y [T, B, D*P], hn [D, B, P], cn [D, B, C] and c [T, B, D*C]; None for zeros.
        cell, x, weights, bidirectional, h0, c0, lengths, reset, noise: the arguments of `layer`.
        y, c, saved: the results of `layer`.

    Returns:
        dx [T, B, I], dh0 [D, B, P], dc0 [D, B, C], and a gradient for each of `weights`.
    """
    if x.dim() == 2:
        packing = _packing(lengths)
        dy, dc = (None if rows is None else packing.padded(rows) for rows in (dy, dc))
        x, y, c, saved = (packing.padded(rows) for rows in (x, y, c, saved))
        noise = _padded_noise(packing, noise)
        dx, dh0, dc0, dweights = layer_backward(
            cell, dy, dhn, dcn, dc, x, weights, bidirectional, h0, c0, lengths, reset, y, c, saved, noise
        )
        return packing.packed(dx), dh0, dc0, dweights
    T, B, I = x.shape
    dtype = compute_dtype(x.dtype)
    exists = existing(T, lengths)
    enters = _state_enters(exists, reset)
    xs = where_exists(x.to(dtype), exists)
    dx, dh0s, dc0s, dweights = xs.new_zeros(T, B, I), [], [], []
    for d, weights_d in enumerate(split_directions(weights, bidirectional, cell)):
        vs = _of_steps(cell, noise, T, 2 if bidirectional else 1, d)
        w = _cast_weights(weights_d, dtype)
        H, P = w.hidden_size, w.w_hh.shape[1]
        C = cell.cell_size(H)
        y_d, c_d = y[..., d * P : (d + 1) * P].to(dtype), c[..., d * C : (d + 1) * C].to(dtype)
        dy_d = dy[..., d * P : (d + 1) * P].to(dtype) if dy is not None else None
        dc_d = dc[..., d * C : (d + 1) * C].to(dtype) if dc is not None else None
        h = h0[d].to(dtype) if h0 is not None else xs.new_zeros(B, P)
        c_first = c0[d].to(dtype) if c0 is not None else xs.new_zeros(B, C)
        h_in, c_in = entering(y_d, h, exists, reset, d == 1), entering(c_d, c_first, exists, reset, d == 1)
        carry, carry_in = (y_d, h_in) if cell.carry == "hidden" else (c_d, c_in)

        dh = dhn[d].to(dtype) if dhn is not None else xs.new_zeros(B, P)  # gradient of the state that leaves step t
        dcarry = dcn[d].to(dtype) if dcn is not None else torch.zeros_like(carry[0])
        da, dh_out, m = xs.new_zeros(T, B, len(cell.maps) * H), xs.new_zeros(T, B, P), xs.new_zeros(T, B, H)
        dp = xs.new_zeros(B, len(cell.parameters) * H)
        for t in range(T) if d == 1 else reversed(range(T)):
            dh_t = dh if dy_d is None else dh + dy_d[t]
            dcarry_t = dcarry if dc_d is None else dcarry + dc_d[t]
            if exists is not None:  # saved is zero there as well, and so is everything computed from it
                dh_t, dcarry_t = dh_t.where(exists[t], 0.0), dcarry_t.where(exists[t], 0.0)
            dh_kept = dh_t * vs[t]["h"] if "h" in vs[t] else None
            dh_t = dh_t if dh_kept is None else dh_t * (1 - vs[t]["h"])
            dh_out[t] = dh_t
            dm = dh_t if w.w_hr is None else dh_t @ w.w_hr
            operands = (w.w_p, vs[t]) if cell.has_operands else ()
            da[t], dcarry_in, m[t], *dp_t = cell.step_backward(
                saved[d, t].to(dtype), carry_in[t], carry[t], dm, dcarry_t, *operands
            )
            if cell.parameters:
                dp += dp_t[0]
            dh_in = cell.rows_of(da[t], cell.recurrent) @ w.w_hh
            dh_in = dh_in * vs[t]["r"] if "r" in vs[t] else dh_in
            dh_in = dh_in if dh_kept is None else dh_in + dh_kept
            if enters is not None:
                dh_in, dcarry_in = dh_in.where(enters[t], 0.0), dcarry_in.where(enters[t], 0.0)
            if exists is not None:  # a step that does not exist passes the gradient through
                dh_in, dcarry_in = dh_in.where(exists[t], dh), dcarry_in.where(exists[t], dcarry)
            dh, dcarry = dh_in, dcarry_in

        da = da.flatten(0, 1)
        of_input, of_state = cell.rows_of(da, cell.input), cell.rows_of(da, cell.recurrent)
        dx += (of_input @ w.w_ih).view(T, B, I)
        if "r" in cell.noise:
            h_in = torch.stack([h_in[t] * vs[t]["r"] for t in range(T)])
        dw = [of_input.T @ xs.flatten(0, 1), of_state.T @ h_in.flatten(0, 1)]
        if w.b_ih is not None:
            dw += [of_input.sum(0), of_state.sum(0)]
        if w.w_hr is not None:
            dw += [dh_out.flatten(0, 1).T @ m.flatten(0, 1)]
        if cell.parameters:
            dw += [dp.sum(0)]
        dweights += [grad.to(x.dtype) for grad in dw]
        dh0s.append(dh + dcarry if cell.carry == "hidden" else dh)
        dc0s.append(dcarry if cell.has_cell_state else c_first)
    return dx.to(x.dtype), torch.stack(dh0s).to(x.dtype), torch.stack(dc0s).to(x.dtype), dweights


def batch_size(x: Tensor, lengths: Tensor | None) -> int:
    """B, from the arguments x and lengths of `layer`."""
    if x.dim() == 2:
        assert lengths is not None
        return lengths.shape[0]
    return x.shape[1]


def _packing(lengths: Tensor | None) -> PackedRows:
    assert lengths is not None
    return PackedRows(lengths, int(lengths[0]))


def _padded_noise(packing: PackedRows, noise: Tensor | None) -> Tensor | None:
    return packing.padded(noise) if noise is not None and noise.dim() == 3 else noise


def _of_steps(cell: Cell, noise: Tensor | None, T: int, D: int, d: int) -> list[dict[str, Tensor]]:
    """The noise of each step of one direction, by name."""
    if noise is None:
        return [{}] * T
    steps = noise.chunk(D, dim=-1)[d].expand(-1, T, -1, -1).unbind(1)
    return [dict(zip(cell.noise, step.unbind(0), strict=True)) for step in steps]


def entering(s: Tensor, s0: Tensor, exists: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """The state [T, B, N] entering each step, from the states s leaving each step and the initial state s0.

    Zero at a reset, and where no step exists.
    """
    if not reverse:
        came = torch.cat([s0.unsqueeze(0), s[:-1]])
    else:
        came = torch.cat([s[1:], s0.unsqueeze(0)])
        if exists is not None:  # the reverse direction starts at the last step that exists
            follows = torch.cat([exists[1:], torch.zeros_like(exists[:1])])
            came = came.where(follows, s0)
    return where_exists(came, _state_enters(exists, reset))


def _state_enters(exists: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """[T, B, 1] bool: whether step t of sequence b exists and is not reset. None: always."""
    if reset is None:
        return exists
    keep = ~reset.unsqueeze(-1)
    return keep if exists is None else keep & exists


def existing(T: int, lengths: Tensor | None) -> Tensor | None:
    """[T, B, 1] bool: whether step t of sequence b exists."""
    if lengths is None:
        return None
    return (torch.arange(T, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(-1)


def where_exists(values: Tensor, exists: Tensor | None) -> Tensor:
    """Values [T, B, N], set to zero where no step exists: padding may hold NaN, which must not enter a product.

    Zeros in the other operand are not enough: 0 * NaN is NaN, and torch's bfloat16 product reads past the end of its
    rows on some processors.
    """
    return values if exists is None else values.where(exists, 0.0)


def _cast_weights(w: DirectionWeights, dtype: torch.dtype) -> DirectionWeights:
    return DirectionWeights._make(weight.to(dtype) if weight is not None else None for weight in w)
