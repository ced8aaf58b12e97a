"""What a GPU backend does around its launch: the GEMMs over all time steps, and what makes tensors fit the kernels.

A backend's module supplies `Shape`, `plan_for`, `forward` and `backward`: kernels/launch.py for Triton, cuda.py for the
kernels in C++. Its launch computes the recurrence: from the input's affine maps xg to the states, and backward from the
states' gradients to da, those of the gates' affine maps. Everything that has no recurrence in it is a GEMM before or
after, by torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .layout import DirectionWeights, split_directions
from .reference import entering, existing, where_exists

FP32_VARIABLE = "FUSEDRNN_FP32"
FP32_PRECISIONS = ("ieee", "tf32", "tf32x3")
RESERVE_VARIABLE = "FUSEDRNN_RESERVE"
RESERVES = ("gates", "recompute")


def fp32_precision() -> str:
    """What float32 is multiplied in on a GPU, for the whole layer.

    It follows the switch that nn.LSTM follows there, torch.backends.cudnn.rnn.fp32_precision ("tf32" unless the user
    changed it, or the older torch.backends.cudnn.allow_tf32): "ieee", or "tf32", which rounds operands to 10 bits of
    mantissa. The environment variable FUSEDRNN_FP32 overrides it, and knows a third: "tf32x3" multiplies three times on
    the matrix units to come close to float32.

    Raises:
        ValueError: FUSEDRNN_FP32 is none of these.
    """
    override = os.environ.get(FP32_VARIABLE, "")
    if override:
        if override not in FP32_PRECISIONS:
            raise ValueError(f"{FP32_VARIABLE} must be one of {', '.join(FP32_PRECISIONS)}, got {override!r}")
        return override
    cudnn: Any = torch.backends.cudnn
    return "tf32" if cudnn.rnn.fp32_precision == "tf32" else "ieee"


def reserve() -> str:
    """What a forward keeps for its backward, beside its input, its output and c, in the environment's FUSEDRNN_RESERVE.

    "gates", where it is not set: 4H numbers a step and direction. "recompute": none; the backward computes the gates
    again, by one GEMM over all steps. A backward takes what its forward left, whatever the variable says by then;
    torch.compile takes what it says while it traces.

    Raises:
        ValueError: FUSEDRNN_RESERVE is neither.
    """
    chosen = os.environ.get(RESERVE_VARIABLE, "") or "gates"
    if chosen not in RESERVES:
        raise ValueError(f"{RESERVE_VARIABLE} must be one of {', '.join(RESERVES)}, got {chosen!r}")
    return chosen


# torch has one switch for the GEMMs of all threads. Ours take turns, or one would put back what another has set.
_gemm_switch = threading.Lock()


@contextmanager
def _gemms_in(precision: str, x: Tensor) -> Iterator[None]:
    """GEMMs inside compute float32 in TF32 or not, whatever they would outside: nn.LSTM's switch is the layer's."""
    if x.dtype != torch.float32 or x.device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    with _gemm_switch:
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _check_cell(cell: str) -> None:
    if cell != "lstm":
        raise NotImplementedError(f"the GPU backends have no kernel for the cell {cell}")


def _shape(launch: ModuleType, x: Tensor, directions: Sequence[DirectionWeights], ragged: bool) -> Any:
    T, B, I = x.shape
    P, H = _sizes(directions)
    return launch.Shape(T, B, I, H, P, len(directions), x.element_size(), fp32_precision(), ragged)


def forward(
    launch: ModuleType,
    cell: str,
    x: Tensor,
    bidirectional: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell_states: bool,
    for_backward: bool,
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.FORWARD_SCHEMA` by one launch; reserved are the gates [D, T, B, 4H], or nothing: see `reserve`."""
    _check_cell(cell)
    keep_gates = for_backward and reserve() == "gates"
    x, h0, c0, lengths, reset, *flat = _contiguous(x, h0, c0, lengths, reset, *weights)
    directions = split_directions(flat, bidirectional)
    (T, B, _), D, (P, H) = x.shape, len(directions), _sizes(directions)
    y, hn, cn = x.new_empty(T, B, D * P), x.new_empty(D, B, P), x.new_empty(D, B, H)
    c = x.new_empty(T, B, D * H) if cell_states or for_backward else None
    empty = x.new_empty(0)
    if B == 0:
        return y, hn, cn, empty if c is None else c, x.new_empty(D, T, B, 4 * H) if keep_gates else empty.clone()
    shape = _shape(launch, x, directions, lengths is not None or reset is not None)
    plan = launch.plan_for("forward", shape, x.device)
    xg = None
    if not plan.inputs:
        with _gemms_in(shape.precision, x):
            xg = _input_affine(where_exists(x, existing(T, lengths)), directions)
    # The kernel reads a tile of xg before it writes the same tile of the gates.
    gates = None if not keep_gates else xg if xg is not None else x.new_empty(D, T, B, 4 * H)
    w_ih, w_hh, b_ih, b_hh, w_hr = zip(*directions, strict=True)
    launch.forward(plan, x, xg, w_ih, b_ih, b_hh, w_hh, w_hr, h0, c0, lengths, reset, y, hn, cn, c, gates)
    return y, hn, cn, empty if c is None else c, empty.clone() if gates is None else gates


def backward(
    launch: ModuleType,
    cell: str,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    bidirectional: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    c: Tensor,
    gates: Tensor,
    needs: Sequence[bool],
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`ops.BACKWARD_SCHEMA` by one launch, and GEMMs over what it leaves."""
    _check_cell(cell)
    dy, dhn, dcn, dc, x, h0, c0, lengths, reset, *flat = _contiguous(
        dy, dhn, dcn, dc, x, h0, c0, lengths, reset, *weights
    )
    directions = split_directions(flat, bidirectional)
    (T, B, _), D, (P, H) = x.shape, len(directions), _sizes(directions)
    needs_x, needs_h0, needs_c0, *needs_weights = needs
    empty = x.new_empty(0)
    if B == 0:
        shapes = [x.shape, (D, 0, P), (D, 0, H), *(weight.shape for weight in flat)]
        zeros = [x.new_zeros(shape) if need else empty.clone() for shape, need in zip(shapes, needs, strict=True)]
        return zeros[0], zeros[1], zeros[2], zeros[3:]
    shape = _shape(launch, x, directions, lengths is not None or reset is not None)
    steps = existing(T, lengths)
    if gates.numel() == 0 or any(needs_weights):
        x = where_exists(x, steps)
    if gates.numel() == 0:
        with _gemms_in(shape.precision, x):
            gates = _gates_again(x, directions, h0, steps, reset, y)
    da = x.new_empty(D, T, B, 4 * H)
    dh_out = x.new_empty(D, T, B, P) if shape.projected else None
    dh0 = x.new_empty(D, B, P) if needs_h0 else None
    dc0 = x.new_empty(D, B, H) if needs_c0 else None
    _, w_hh, _, _, w_hr = zip(*directions, strict=True)
    plan = launch.plan_for("backward", shape, x.device)
    m = launch.backward(plan, dy, dhn, dcn, dc, w_hh, w_hr, c0, lengths, reset, c, gates, da, dh_out, dh0, dc0)

    with _gemms_in(shape.precision, x):
        dx = _gradient_of_input(da, directions).view_as(x) if needs_x else empty
        needed, dweights = iter(needs_weights), []
        for d, w in enumerate(directions):
            a, y_d, c_d = da[d].flatten(0, 1), y[..., d * P : (d + 1) * P], c[..., d * H : (d + 1) * H]
            first = None if h0 is None else h0[d]
            dweights.append(a.T @ x.flatten(0, 1) if next(needed) else empty.clone())
            recurrent = next(needed)
            dweights.append(
                _gradient_of_recurrence(da[d], y_d, first, steps, reset, d == 1) if recurrent else empty.clone()
            )
            if w.b_ih is not None:
                dweights += [a.sum(0) if next(needed) else empty.clone() for _ in (w.b_ih, w.b_hh)]
            if dh_out is not None:
                m_d = _outputs_of_cell(c_d, gates[d]) if m is None else m[d]
                dweights.append(dh_out[d].flatten(0, 1).T @ m_d.flatten(0, 1) if next(needed) else empty.clone())
    return dx, empty.clone() if dh0 is None else dh0, empty.clone() if dc0 is None else dc0, dweights


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _sizes(directions: Sequence[DirectionWeights]) -> tuple[int, int]:
    return directions[0].w_hh.shape[1], directions[0].hidden_size


def _input_affine(x: Tensor, directions: Sequence[DirectionWeights]) -> Tensor:
    """xg [D, T, B, 4H] = x @ w_ih^T + b_ih + b_hh."""
    T, B, I = x.shape
    xg = x.new_empty(len(directions), T, B, 4 * directions[0].hidden_size)
    for d, w in enumerate(directions):
        out, rows = xg[d].view(T * B, -1), x.view(T * B, I)
        if w.b_ih is not None and w.b_hh is not None:
            torch.addmm(w.b_ih + w.b_hh, rows, w.w_ih.T, out=out)
        else:
            torch.mm(rows, w.w_ih.T, out=out)
    return xg


def _gates_again(
    x: Tensor,
    directions: Sequence[DirectionWeights],
    h0: Tensor | None,
    steps: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
) -> Tensor:
    """The gates [D, T, B, 4H] of a forward that did not keep them: x and the states that entered, in one product.

    x is zero where no step exists.
    """
    T, B, I = x.shape
    P, H = _sizes(directions)
    gates = x.new_empty(len(directions), T, B, 4 * H)
    for d, w in enumerate(directions):
        first = y.new_zeros(B, P) if h0 is None else h0[d]
        h_in = entering(y[..., d * P : (d + 1) * P], first, steps, reset, d == 1)
        entered, weight = torch.cat((x, h_in), dim=2).view(T * B, I + P), torch.cat((w.w_ih, w.w_hh), dim=1)
        out = gates[d].view(T * B, 4 * H)
        if w.b_ih is not None and w.b_hh is not None:
            torch.addmm(w.b_ih + w.b_hh, entered, weight.T, out=out)
        else:
            torch.mm(entered, weight.T, out=out)
        out[:, : 2 * H].sigmoid_()
        out[:, 2 * H : 3 * H].tanh_()
        out[:, 3 * H :].sigmoid_()
    return gates if steps is None else gates.masked_fill_(~steps, 0.0)


def _gradient_of_input(da: Tensor, directions: Sequence[DirectionWeights]) -> Tensor:
    """dx [T * B, I], summed over the directions."""
    dx = da[0].flatten(0, 1) @ directions[0].w_ih
    for d, w in enumerate(directions[1:], start=1):
        dx.addmm_(da[d].flatten(0, 1), w.w_ih)
    return dx


def _gradient_of_recurrence(
    da: Tensor, y: Tensor, h0: Tensor | None, steps: Tensor | None, reset: Tensor | None, reverse: bool
) -> Tensor:
    """dw_hh [4H, P] = sum over t of da_t^T h_in, where h_in is the state that enters step t."""
    if steps is not None or reset is not None:
        first = y.new_zeros(y.shape[1:]) if h0 is None else h0
        return da.flatten(0, 1).T @ entering(y, first, steps, reset, reverse).flatten(0, 1)
    # da against y, one step apart, without a copy of either.
    later, earlier = (da[:-1], y[1:]) if reverse else (da[1:], y[:-1])
    dw = later.flatten(0, 1).T @ earlier.flatten(0, 1)
    return dw if h0 is None else dw.addmm_(da[-1 if reverse else 0].T, h0)


def _outputs_of_cell(c: Tensor, gates: Tensor) -> Tensor:
    """m = o * tanh(c), of which w_hr makes h."""
    return gates[..., 3 * c.shape[-1] :] * c.tanh()
