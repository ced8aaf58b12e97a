"""The part of a GPU backend around its launch: GEMMs over all time steps, and tensor layouts for the kernels.

A backend's module supplies `Shape`, `plan_for`, `forward`, `backward` and `CELLS`, the names of its cells:
kernels/launch.py for Triton, cuda.py for CUDA C++. The launch computes the recurrence: forward from the input
projection xg to the states, backward from the gradients of the states to da, the gradients of the affine maps.
Everything without a recurrence is a GEMM of torch before or after the launch.

The columns of xg [D, T, B, G*H] are in the order of the weights' rows. xg includes b_hh of gates whose two affine maps
are summed; the launch adds the rest of b_hh. The arguments c0, cn and c of a launch are the cell's carry: the cell
state; for a cell whose carry is h, h0 and y in place of c0 and c; for a cell without a carry, None. A launch takes the
multipliers of noise by name. Its backward sums the gradients of per-unit parameters over time in dp if the module says
so by `SUMS_PARAMETERS`.
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

from .cells import Cell, named
from .cells.spec import Blocks
from .layout import DirectionWeights, split_directions
from .reference import compute_dtype, entering, existing, where_exists

FP32_VARIABLE = "FUSEDRNN_FP32"
FP32_PRECISIONS = ("ieee", "tf32", "tf32x3")
RESERVE_VARIABLE = "FUSEDRNN_RESERVE"
RESERVES = ("gates", "recompute")


def fp32_precision() -> str:
    """The precision of float32 products on a GPU, for the whole layer.

    It follows torch.backends.cudnn.rnn.fp32_precision, as nn.LSTM does ("tf32" unless the user changed it, or the older
    torch.backends.cudnn.allow_tf32): "ieee", or "tf32", which rounds operands to 10 bits of mantissa. The environment
    variable FUSEDRNN_FP32 overrides it and has a third value: "tf32x3" uses three TF32 products to approach float32
    accuracy.

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
    """FUSEDRNN_RESERVE: what a forward saves for its backward beside its input, its output and c.

    "gates", where it is not set: what the cell saves, S*H numbers a step and direction. "recompute": none; the backward
    computes them again, by one GEMM over all steps. A backward takes what its forward left, whatever the variable says
    by then; torch.compile takes what it says while it traces.

    Raises:
        ValueError: FUSEDRNN_RESERVE is neither.
    """
    chosen = os.environ.get(RESERVE_VARIABLE, "") or "gates"
    if chosen not in RESERVES:
        raise ValueError(f"{RESERVE_VARIABLE} must be one of {', '.join(RESERVES)}, got {chosen!r}")
    return chosen


def reserves_gates(cell: Cell) -> bool:
    """Whether a forward saves the cell's values.

    With peepholes it always does, because the gates depend on c as well; and if only some maps are saved.
    """
    return reserve() == "gates" or bool(cell.parameters or cell.unread)


# torch's setting for GEMMs is shared by all threads: the lock keeps one thread from restoring another's value.
_gemm_switch = threading.Lock()


@contextmanager
def _gemms_in(precision: str, x: Tensor) -> Iterator[None]:
    """Context in which GEMMs use the layer's float32 precision instead of torch's setting for matmul."""
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


def _cell(launch: ModuleType, name: str) -> Cell:
    if name not in launch.CELLS:
        raise NotImplementedError(f"this backend has no kernel for the cell {name}, it has {', '.join(launch.CELLS)}")
    return named(name)


def _shape(launch: ModuleType, cell: Cell, x: Tensor, directions: Sequence[DirectionWeights], ragged: bool) -> Any:
    T, B, I = x.shape
    P, H = _sizes(directions)
    return launch.Shape(T, B, I, H, P, len(directions), x.element_size(), fp32_precision(), ragged, cell.name)


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
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.FORWARD_SCHEMA` by one launch; the reserve is the cell's saved values [D, T, B, S*H], or empty."""
    kind = _cell(launch, cell)
    keep = for_backward and reserves_gates(kind)
    x, h0, c0, lengths, reset, *flat = _contiguous(x, h0, c0, lengths, reset, *weights)
    directions = split_directions(flat, bidirectional, kind)
    (T, B, _), D, (P, H) = x.shape, len(directions), _sizes(directions)
    C, S = kind.cell_size(H), len(kind.saved)
    y, hn, cn = x.new_empty(T, B, D * P), x.new_empty(D, B, P), x.new_empty(D, B, C)
    c = x.new_empty(T, B, D * C) if cell_states or for_backward else None
    empty = x.new_empty(0)
    if B == 0:
        return y, hn, cn, empty if c is None else c, x.new_empty(D, T, B, S * H) if keep else empty.clone()
    shape = _shape(launch, kind, x, directions, lengths is not None or reset is not None)
    plan = launch.plan_for("forward", shape, x.device)
    xg = None
    if not plan.fuse_input:
        with _gemms_in(shape.precision, x):
            xg = _input_affine(kind, where_exists(x, existing(T, lengths)), directions)
    # If xg has as many columns, saved reuses its memory: the kernel reads a tile before it writes the same tile.
    fits = xg is not None and len(kind.gates) == S
    saved = None if not keep else xg if fits else x.new_empty(D, T, B, S * H)
    first, *carry = _carry(kind, h0, c0), cn if C else None, c if C else None
    w_ih, w_hh, b_ih, b_hh, w_hr, w_p = zip(*directions, strict=True)
    more: dict[str, Any] = {"w_p": w_p} if kind.parameters else {}
    if noise is not None:
        more["noise"] = _multipliers(kind, noise)
    launch.forward(plan, x, xg, w_ih, b_ih, b_hh, w_hh, w_hr, h0, first, lengths, reset, y, hn, *carry, saved, **more)
    return y, hn, cn, empty if c is None else c, empty.clone() if saved is None else saved


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
    saved: Tensor,
    needs: Sequence[bool],
    *weights: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`ops.BACKWARD_SCHEMA` by one launch, and GEMMs over its da."""
    kind = _cell(launch, cell)
    dy, dhn, dcn, dc, x, h0, c0, lengths, reset, y, *flat = _contiguous(
        dy, dhn, dcn, dc, x, h0, c0, lengths, reset, y, *weights
    )
    directions = split_directions(flat, bidirectional, kind)
    (T, B, _), D, (P, H) = x.shape, len(directions), _sizes(directions)
    C = kind.cell_size(H)
    needs_x, needs_h0, needs_c0, *needs_weights = needs
    empty = x.new_empty(0)
    if B == 0:
        shapes = [x.shape, (D, 0, P), (D, 0, C), *(weight.shape for weight in flat)]
        zeros = [x.new_zeros(shape) if need else empty.clone() for shape, need in zip(shapes, needs, strict=True)]
        return zeros[0], zeros[1], zeros[2], zeros[3:]
    shape = _shape(launch, kind, x, directions, lengths is not None or reset is not None)
    steps = existing(T, lengths)
    if saved.numel() == 0 or any(needs_weights):
        x = where_exists(x, steps)
    more: dict[str, Any] = {} if noise is None else {"noise": _multipliers(kind, noise)}
    dropped = more["noise"].get("r") if more else None
    if saved.numel() == 0:
        with _gemms_in(shape.precision, x):
            saved = _saved_again(kind, x, directions, h0, steps, reset, y, dropped)
    da = x.new_empty(D, T, B, len(kind.maps) * H)
    dh_out = x.new_empty(D, T, B, P) if shape.projected else None
    dh0 = x.new_empty(D, B, P) if needs_h0 else None
    dc0 = x.new_empty(D, B, C) if needs_c0 else None
    dcarry = (dcn, dc) if C else (None, None)
    first, carries = _carry(kind, h0, c0), _carry(kind, y, c)
    _, w_hh, _, _, w_hr, w_p = zip(*directions, strict=True)
    w_hh = tuple(_in_order_of_maps(w, kind.recurrent) for w in w_hh)
    plan = launch.plan_for("backward", shape, x.device)
    results = (da, dh_out, dh0, dc0 if C else None)
    dp = None
    if kind.parameters:
        more["w_p"] = w_p
    if kind.parameters and launch.SUMS_PARAMETERS and any(needs_weights[len(flat) // D - 1 :: len(flat) // D]):
        dp = more["dp"] = x.new_empty(D, B, len(kind.parameters) * H, dtype=torch.float32)
    m = launch.backward(plan, dy, dhn, *dcarry, w_hh, w_hr, first, lengths, reset, carries, saved, *results, **more)

    with _gemms_in(shape.precision, x):
        dx = _gradient_of_input(kind, da, directions).view_as(x) if needs_x else empty
        needed, dweights = iter(needs_weights), []
        for d, w in enumerate(directions):
            of_input, of_state = _window(da[d], kind.input), _window(da[d], kind.recurrent)
            y_d, c_d = y[..., d * P : (d + 1) * P], c[..., d * C : (d + 1) * C]
            first = None if h0 is None else h0[d]
            dweights.append(
                _in_order_of_gates(of_input.flatten(0, 1).T @ x.flatten(0, 1), kind.input)
                if next(needed)
                else empty.clone()
            )
            recurrent = next(needed)
            dweights.append(
                _in_order_of_gates(
                    _gradient_of_recurrence(of_state, y_d, first, steps, reset, d == 1, _of_direction(dropped, d, D)),
                    kind.recurrent,
                )
                if recurrent
                else empty.clone()
            )
            if w.b_ih is not None:
                wanted = (next(needed), next(needed))
                sums = da[d].flatten(0, 1).sum(0) if any(wanted) else empty
                for want, blocks in zip(wanted, (kind.input, kind.recurrent), strict=True):
                    dweights.append(kind.rows_of(sums, blocks).clone() if want else empty.clone())
            if dh_out is not None:
                m_d = _outputs_of_cell(c_d, saved[d]) if m is None else m[d]
                dweights.append(dh_out[d].flatten(0, 1).T @ m_d.flatten(0, 1) if next(needed) else empty.clone())
            if w.w_p is not None:
                if not next(needed):
                    dweights.append(empty.clone())
                elif dp is not None:
                    dweights.append(dp[d].sum(0).to(x.dtype))
                else:
                    entered = entering(c_d, c_d.new_zeros(B, C) if c0 is None else c0[d], steps, reset, d == 1)
                    v = {name: _of_direction(of, d, D) for name, of in more.get("noise", {}).items()}
                    dweights.append(_gradient_of_parameters(kind, da[d], saved[d], entered, c_d, v))
    return dx, empty.clone() if dh0 is None else dh0, empty.clone() if dc0 is None else dc0, dweights


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _multipliers(cell: Cell, noise: Tensor) -> dict[str, Tensor]:
    """The multipliers of each kind, [T, B, D*W] or [1, B, D*W], by name."""
    return dict(zip(cell.noise, noise.contiguous().unbind(0), strict=True))


def _of_direction(v: Tensor | None, d: int, D: int) -> Tensor | None:
    return None if v is None else v.chunk(D, dim=-1)[d]


def _dropped(h_in: Tensor, v: Tensor | None) -> Tensor:
    """States that enter, as the product takes them."""
    return h_in if v is None else (h_in * v).to(h_in.dtype)


def _carry(cell: Cell, h: Tensor | None, c: Tensor | None) -> Tensor | None:
    """The cell's carry: c, h or None."""
    return c if cell.carry == "cell" else h if cell.carry == "hidden" else None


def _sizes(directions: Sequence[DirectionWeights]) -> tuple[int, int]:
    return directions[0].w_hh.shape[1], directions[0].hidden_size


def _input_affine(cell: Cell, x: Tensor, directions: Sequence[DirectionWeights]) -> Tensor:
    """xg [D, T, B, G*H] = x @ w_ih^T + b_ih + b_hh, without b_hh of gates whose two affine maps are not summed."""
    T, B, I = x.shape
    xg = x.new_empty(len(directions), T, B, directions[0].w_ih.shape[0])
    for d, w in enumerate(directions):
        _affine(xg[d].view(T * B, -1), x.view(T * B, I), w.w_ih, _bias_of_input(cell, w.b_ih, w.b_hh))
    return xg


def _affine(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        torch.addmm(bias, rows, weight.T, out=out)
    else:
        torch.mm(rows, weight.T, out=out)


def _bias_of_input(cell: Cell, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    if b_ih is None or b_hh is None:
        return None
    if cell.input == cell.recurrent:
        return b_ih + b_hh
    bias, G = b_ih.clone(), len(cell.gates)
    for gate, (part, other) in enumerate(zip(bias.chunk(G), b_hh.chunk(G), strict=True)):
        if cell.input.index(gate) == cell.recurrent.index(gate):
            part += other
    return bias


def _saved_again(
    cell: Cell,
    x: Tensor,
    directions: Sequence[DirectionWeights],
    h0: Tensor | None,
    steps: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    dropped: Tensor | None,
) -> Tensor:
    """Recomputes the saved values [D, T, B, S*H] by GEMMs over x and the states entering each step.

    x is zero where no step exists. dropped: multipliers of the states.
    """
    T, B, I = x.shape
    P, H = _sizes(directions)
    maps = x.new_empty(len(directions), T, B, len(cell.maps) * H)
    for d, w in enumerate(directions):
        first = y.new_zeros(B, P) if h0 is None else h0[d]
        h_in = entering(y[..., d * P : (d + 1) * P], first, steps, reset, d == 1)
        h_in = _dropped(h_in, _of_direction(dropped, d, len(directions)))
        bias = None
        if w.b_ih is not None and w.b_hh is not None:
            bias = cell.maps_of(w.b_ih, cell.input) + cell.maps_of(w.b_hh, cell.recurrent)
        weight = torch.cat((cell.maps_of(w.w_ih, cell.input, 0), cell.maps_of(w.w_hh, cell.recurrent, 0)), dim=1)
        _affine(maps[d].view(T * B, -1), torch.cat((x, h_in), dim=2).view(T * B, I + P), weight, bias)
        cell.activate_(maps[d])
    return maps if steps is None else maps.masked_fill_(~steps, 0.0)


def _window(da: Tensor, blocks: Blocks) -> Tensor:
    """The columns [.., G*H] of da [.., M*H] whose maps have a block; these maps are adjacent."""
    filled = [k for k, gate in enumerate(blocks) if gate is not None]
    H = da.shape[-1] // len(blocks)
    return da[..., filled[0] * H : (filled[-1] + 1) * H]


def _in_order_of_maps(weight: Tensor, blocks: Blocks) -> Tensor:
    """The rows [G*H, ..] of a weight, with the gates in the order of `_window`."""
    gates = [gate for gate in blocks if gate is not None]
    return weight if gates == sorted(gates) else torch.cat([weight.chunk(len(gates))[gate] for gate in gates])


def _in_order_of_gates(dw: Tensor, blocks: Blocks) -> Tensor:
    """The inverse of `_in_order_of_maps`."""
    gates = [gate for gate in blocks if gate is not None]
    if gates == sorted(gates):
        return dw
    return torch.cat([dw.chunk(len(gates))[gates.index(gate)] for gate in range(len(gates))])


def _gradient_of_input(cell: Cell, da: Tensor, directions: Sequence[DirectionWeights]) -> Tensor:
    """dx [T * B, I], summed over the directions."""
    each = [
        (_window(da[d], cell.input).flatten(0, 1), _in_order_of_maps(w.w_ih, cell.input))
        for d, w in enumerate(directions)
    ]
    dx = each[0][0] @ each[0][1]
    for rows, weight in each[1:]:
        dx.addmm_(rows, weight)
    return dx


def _gradient_of_recurrence(
    da: Tensor,
    y: Tensor,
    h0: Tensor | None,
    steps: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    dropped: Tensor | None,
) -> Tensor:
    """dw_hh [G*H, P] = sum over t of da_t^T h_in, where h_in is the state that enters step t.

    da [T, B, G*H]: the gradients of the affine maps of the state, in torch's order of the gates. dropped: multipliers
    of the state.
    """
    if steps is not None or reset is not None or dropped is not None:
        first = y.new_zeros(y.shape[1:]) if h0 is None else h0
        return da.flatten(0, 1).T @ _dropped(entering(y, first, steps, reset, reverse), dropped).flatten(0, 1)
    # da against y, one step apart, without a copy of either.
    later, earlier = (da[:-1], y[1:]) if reverse else (da[1:], y[:-1])
    dw = later.flatten(0, 1).T @ earlier.flatten(0, 1)
    return dw if h0 is None else dw.addmm_(da[-1 if reverse else 0].T, h0)


def _outputs_of_cell(c: Tensor, saved: Tensor) -> Tensor:
    """m = o * tanh(c), the input of the projection w_hr. Only LSTMs have one; o is their last saved value."""
    return saved[..., -c.shape[-1] :] * c.tanh()


def _gradient_of_parameters(
    cell: Cell, da: Tensor, saved: Tensor, carry_in: Tensor, carry: Tensor, v: dict[str, Tensor | None]
) -> Tensor:
    """[K*H], summed over all steps and sequences in float32 at least.

    da [T, B, M*H], saved [T, B, S*H]; carry_in and carry [T, B, H]; v: the multipliers by name.
    """
    assert cell.parameters_backward is not None
    dp = cell.parameters_backward(da, saved, carry_in, carry, v)
    return dp.sum((0, 1), dtype=compute_dtype(da.dtype)).to(da.dtype)
