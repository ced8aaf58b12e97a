"""Launches of the C++ kernels in csrc/cuda: the same interface to gpu.py as kernels/launch.py has.

The library (csrc/cuda/torch/ops.cpp) takes a plan and tensors that exist, packs the weights for the pass, and launches.
Everything runs on the current stream of the tensors' device, nothing waits for the GPU, and all memory is torch's, so
that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cells import CELLS as _PLAIN
from .cells import NOISE, VARIANTS, named
from .cuda_plan import MATHS, PASSES, Plan, ranked
from .kernels.device import H200, Device, Shape, cdiv, device_of, power_of_2

__all__ = ["CELLS", "SUMS_PARAMETERS", "Plan", "Shape", "backward", "forward", "plan_for"]

CELLS = frozenset((*_PLAIN, *VARIANTS))
SUMS_PARAMETERS = False  # the backward leaves the gradients of peepholes to gpu.py

_ops: Any = torch.ops.fusedrnn


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
    noise: dict[str, Tensor] | None = None,
) -> None:
    """Launches the forward; shapes stand in `ForwardParams` of csrc/cuda/params.h. Weights: one of each direction.

    x, w_ih and the biases are read if plan.fuse_input, xg and what it lacks of b_hh otherwise; it may be saved. All
    tensors are contiguous. noise: multipliers [T, B, D*W] or [1, B, D*W] by name, as `cells.NOISE` has them.

    Raises:
        RuntimeError: a CUDA call failed; the message has its name.
    """
    of_state = _both(b_hh) if plan.fuse_input or None in named(plan.cell).input else (None, None)
    of_input = (x, None, *_both(w_ih), *_both(b_ih)) if plan.fuse_input else (None, xg, *[None] * 4)
    _ops.cuda_launch_forward(
        _fields(plan, y),
        *(*of_input, *of_state),
        *(*_both(w_hh), *_both(w_hr), h0, c0, lengths, reset),
        *(y, hn, cn, c, saved),
        *_extras(w_p, noise),
    )


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
    noise: dict[str, Tensor] | None = None,
) -> Tensor | None:
    """Launches the backward; shapes stand in `BackwardParams` of csrc/cuda/params.h. All tensors are contiguous.

    Returns:
        m [D, T, B, H], of which w_hr makes h, where there is a projection.

    Raises:
        RuntimeError: a CUDA call failed; the message has its name.
    """
    H = da.shape[3] // len(named(plan.cell).maps)
    m = None if dh_out is None else da.new_empty(*da.shape[:3], H)
    _ops.cuda_launch_backward(
        _fields(plan, da),
        *(dy, dhn, dcn, dc, *_both(w_hh), *_both(w_hr), c0, lengths, reset),
        *(c, saved, da, dh_out, m, dh0, dc0),
        *_extras(w_p, noise),
    )
    return m


def _extras(w_p: Sequence[Tensor | None], noise: dict[str, Tensor] | None) -> tuple[Tensor | None, ...]:
    """Peepholes of either direction, and the multipliers of each kind of noise, as a launch takes them."""
    return (*_both(w_p), *((noise or {}).get(kind) for kind in NOISE))


def _both(of_directions: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """One entry per direction; None for a missing one."""
    return of_directions[0], of_directions[1] if len(of_directions) == 2 else None


def _fields(plan: Plan, like: Tensor) -> list[int]:
    """The plan for a tensor [.., B, ..] of a launch: its own 16-bit dtype, and no more groups than slices."""
    B = like.shape[-2]
    fields = plan.fields
    if like.dtype == torch.float16:
        fields[1] = MATHS.index("fp16")
    fields[6] = min(plan.groups, cdiv(B, plan.rows))
    return fields


def plan_for(kernel: str, shape: Shape, device: torch.device) -> Plan:
    """The best plan of "forward" or "backward" that fits a device.

    T and B are rounded up to powers of 2 first, so that few plans are searched for.

    Raises:
        ValueError: no plan fits, or the kernels do not have this arithmetic.
    """
    shape = shape._replace(T=min(power_of_2(shape.T), 1024), B=power_of_2(shape.B))
    return _plan(kernel, shape, device_for(device))


# The device of the host build: few multiprocessors, since it runs one thread at a time.
HOST = H200._replace(name="the host build of the C++ kernels", multiprocessors=16)


def device_for(device: torch.device) -> tuple[int, Device]:
    """The index of a device, -1 for the host build, and what the planner knows of it."""
    if device.type == "cpu":
        return -1, HOST
    index = device.index if device.index is not None else torch.cuda.current_device()
    return index, _properties(index)


@lru_cache
def _properties(index: int) -> Device:
    return device_of(torch.cuda.get_device_properties(index))


@lru_cache(maxsize=1024)
def _plan(kernel: str, shape: Shape, device: tuple[int, Device]) -> Plan:
    return fitting(kernel, shape, device)[0]


def fitting(kernel: str, shape: Shape, device: tuple[int, Device]) -> list[Plan]:
    """The plans that fit a device, the one with the least predicted time first. The driver reports how many groups run
    concurrently.

    Raises:
        ValueError: no plan fits, or the kernels do not have this arithmetic.
    """
    index, known = device
    sizes = [shape.T, shape.B, shape.H, shape.P, shape.D, int(shape.projected), shape.I]

    def occupancy(plan: Plan) -> int:
        return _ops.cuda_occupancy(index, PASSES.index(kernel), sizes, plan.fields)[1]

    return ranked(kernel, shape, known, occupancy)
