"""Launches the kernels: selects a plan, allocates scratch memory, and passes the arguments.

Everything runs on the current stream of the tensors' device, without synchronisation and with torch's allocator, so
that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor

from ..cells import NOISE
from . import cells
from . import plan as planner
from .backward import layer_backward
from .device import Device, device_of, power_of_2
from .forward import layer_forward
from .plan import Plan, Shape

CELLS = cells.Names()
SUMS_PARAMETERS = True  # the backward sums the gradients of peepholes over time, in dp

# Triton's interpreter runs the programs of a launch sequentially, on CPU tensors: see forward.py.
INTERPRETED = not isinstance(layer_forward, triton.runtime.JITFunction)
if INTERPRETED:
    from .interpreter import repair

    repair()


def forward(
    plan: Plan,
    x: Tensor | None,
    xg: Tensor | None,
    w_ih: Sequence[Tensor],
    b_ih: Sequence[Tensor | None],
    b_hh: Sequence[Tensor | None],
    w_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor | None],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    hn: Tensor,
    cn: Tensor | None,
    c: Tensor | None,
    saved: Tensor | None,
    w_p: Sequence[Tensor | None] = (None,),
    noise: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Launches `layer_forward`, which documents shapes and outputs. Weights are sequences over the directions.

    x, w_ih and the biases are read if plan.fuse_input, xg otherwise, and b_hh if the cell has it apart. noise:
    multipliers by name. All tensors are contiguous.
    """
    T, B, _ = y.shape
    D, (P, H) = len(w_hh), _sizes(w_hh, w_hr)
    m = y.new_empty(D, B, H) if plan.columns else None
    if plan.fuse_input:
        inputs, I = (x, *_both(w_ih), *_both(b_ih), *_both(b_hh)), x.shape[2]  # type: ignore[union-attr]
    else:
        inputs, I = (*_NO_INPUTS, *(_both(b_hh) if cells.adds_bias(plan.cell) else (None, None))), 0
    fed = fed0 = None
    if "r" in noise and not plan.carried:
        fed, fed0 = torch.empty_like(y), None if h0 is None else _dropped(h0, noise["r"], lengths)
    weights, states = (*_both(w_hh), *_both(w_hr), *_both(w_p)), (h0, fed0, c0, lengths, reset)
    tensors = (*inputs, xg, *weights, *_multipliers(noise), *states, y, hn, cn, c, saved, m, fed)
    _launch("forward", plan, y, tensors, (T, B, I, H, P), T, D, _once(noise, T))


def backward(
    plan: Plan,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dc: Tensor | None,
    w_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor | None],
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    c: Tensor | None,
    saved: Tensor,
    da: Tensor,
    dh_out: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    w_p: Sequence[Tensor | None] = (None,),
    dp: Tensor | None = None,
    noise: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Launches `layer_backward`, which documents shapes and outputs. All tensors are contiguous.

    Returns None: the caller computes m = o * tanh(c) for the gradient of w_hr.
    """
    D, T, B, _ = da.shape
    P, H = _sizes(w_hh, w_hr)
    weights = (*_both(w_hh), *_both(w_hr), *_both(w_p), *_multipliers(noise))
    tensors = (dy, dhn, dcn, dc, *weights, c0, lengths, reset, c, saved, da, dh_out, dh0, dc0, dp)
    steps = T if plan.carried or dh0 is None else T + 1
    _launch("backward", plan, da, tensors, (T, B, H, P), steps, D, _once(noise, T))


def _sizes(w_hh: Sequence[Tensor], w_hr: Sequence[Tensor | None]) -> tuple[int, int]:
    P, projection = w_hh[0].shape[1], w_hr[0]
    return P, P if projection is None else projection.shape[1]


def _multipliers(noise: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(noise.get(name) for name in NOISE)


def _once(noise: Mapping[str, Tensor], T: int) -> bool:
    """Whether the multipliers are the same at all of T steps."""
    return T > 1 and any(len(v) == 1 for v in noise.values())


def _dropped(h0: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """h0 [D, B, P], multiplied by v [T, B, D*P] or [1, B, D*P] of the first step of each direction."""
    D, B, _ = h0.shape
    v = v.unflatten(-1, (D, -1))
    first = [v[0, :, 0]]
    if D == 2:
        last = lengths.clamp(1, len(v)) - 1 if lengths is not None else torch.full((B,), len(v) - 1, device=v.device)
        first.append(v[last, torch.arange(B, device=v.device), 1])
    return (h0 * torch.stack(first)).to(h0.dtype)


def _both(of_directions: Sequence[Any]) -> tuple[Any, Any]:
    return of_directions[0], of_directions[-1]


_KERNELS: dict[str, Any] = {"forward": layer_forward, "backward": layer_backward}
_NO_INPUTS = (None,) * 5  # x, w_ih and b_ih


def _launch(
    kernel: str,
    plan: Plan,
    like: Tensor,
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    steps: int,
    D: int,
    once: bool,
) -> None:
    """One launch over all steps, on the device of `like`; in the interpreter several.

    Args:
        tensors, sizes: the kernel's arguments before and after `carry` and `counters`.
    """
    function = _KERNELS[kernel][(plan.groups * plan.programs,)]
    if INTERPRETED:
        _interpret(function, kernel, plan, like, tensors, sizes, steps, D, once)
        return
    with torch.cuda.device_of(like):
        counters = None
        if plan.programs > 1:
            counters = torch.zeros(plan.groups, 32, dtype=torch.int32, device=like.device)
        constants = cells.constants(kernel, plan.cell)
        function(*tensors, None, counters, *sizes, 0, steps, D=D, ONCE=once, **constants, **plan.keywords[kernel])


def _interpret(
    function: Any,
    kernel: str,
    plan: Plan,
    like: Tensor,
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    steps: int,
    D: int,
    once: bool,
) -> None:
    """Programs with a grid barrier are launched for each step, and each phase of it."""
    constants = {
        **plan.constants(kernel),
        **cells.constants(kernel, plan.cell),
        "D": D,
        "ONCE": once,
        "GRID_SYNC": False,
    }
    constants["PRECISION"] = "ieee"  # what it multiplies float32 in
    if plan.programs == 1:
        function(*tensors, None, None, *sizes, 0, steps, PHASE=0, **constants)
        return
    B, H = sizes[1], sizes[-2]
    carry = torch.empty(2, D, B, H, dtype=torch.float32, device=like.device)
    for step in range(steps):
        for phase in (1, 2) if plan.columns else (0,):
            function(*tensors, carry, None, *sizes, step, step + 1, PHASE=phase, **constants)


@lru_cache
def _device(index: int) -> Device:
    return device_of(torch.cuda.get_device_properties(index))


@lru_cache(maxsize=4096)
def _plan(kernel: str, shape: Shape, device: Device) -> Plan:
    return _rounded_plan(kernel, shape._replace(T=min(power_of_2(shape.T), 1024), B=power_of_2(shape.B)), device)


@lru_cache(maxsize=1024)
def _rounded_plan(kernel: str, shape: Shape, device: Device) -> Plan:
    return planner.plan(kernel, shape, device)


def plan_for(kernel: str, shape: Shape, device: torch.device) -> Plan:
    """The plan of "forward" or "backward" on a device.

    T and B are rounded up to powers of 2 first, so that not every length and batch compiles a new kernel.

    Raises:
        ValueError: no plan fits.
    """
    if INTERPRETED:
        return _plan(kernel, shape, planner.INTERPRETER)
    return _plan(kernel, shape, _device(device.index if device.index is not None else torch.cuda.current_device()))
