"""Fast path to the CPU kernels for plain calls in eager mode, where validation would cost more than a short step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from . import aten, autograd, dispatch, ops, stack, validate
from .autograd import wants_gradient
from .cells import CELLS, Cell
from .dispatch import TABLE
from .sequence import Form
from .tuning import choice


def attempt(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Any,
    num_layers: int = 1,
    batch_first: bool = False,
    bidirectional: bool = False,
    dims: int = 3,
    sample: Callable[[Form, int, tuple[int, int], Tensor], Tensor] | None = None,
) -> tuple[Any, Any] | Exception | None:
    """Runs layers (dims=3) or one time step (dims=2) on the CPU. sample: `Noise.draw`, for layers with noise.

    Returns:
        (y, last states) as torch returns them; for a step y is h. None if the call needs the slow path. An exception
        if the operator rejected the arguments: the slow path then validates and raises the detailed error, or this
        exception if validation finds nothing.
    """
    if type(input) is not Tensor or input.dim() != dims or not dispatch.is_plain_on_cpu(input):
        return None
    h0 = c0 = None
    paired = cell.carry == "cell"  # hx is (h0, c0)
    if hx is not None:
        if paired:
            if not (isinstance(hx, (tuple, list)) and len(hx) == 2) or hx[0] is None or hx[1] is None:
                return None
            h0, c0 = hx
        elif isinstance(hx, Tensor):
            h0 = hx
        else:
            return None
    x = input.transpose(0, 1) if batch_first else input
    try:
        train = wants_gradient(x, h0, c0, *weights)
        has_aten = cell.name in CELLS
        if not has_aten and cell.name not in TABLE["cpu"].cells:
            return None
        asks = has_aten and (
            input.numel() > choice.small[cell.name][train][dims == 2] or cell.name not in TABLE["cpu"].cells
        )
        if asks and dispatch.is_aten_faster(cell, input, weights, num_layers, batch_first, bidirectional, train):
            if dims == 2:
                validate.weight_shapes(cell, weights, 1, 1, x.shape[1])  # torch's own cell broadcasts a wrong bias
                hn, cn = aten.step(cell, x, weights, h0, c0)
                y = hn
            else:
                y, hn, cn = _aten_layers(cell, x, weights, h0, c0, num_layers, bidirectional)
                y = y.transpose(0, 1) if batch_first else y
            return y, (hn, cn) if paired else hn
        if train or sample is not None:
            if num_layers < 1 or len(weights) % num_layers:
                return None
            if not all(t is None or t.is_cpu for t in (h0, c0, *weights)):  # the operator also accepts meta tensors
                return None
            if dims == 2:
                hn, cn = autograd.step(cell.name, x, weights, h0, c0)
                return hn, (hn, cn) if paired else hn
            D = 2 if bidirectional else 1
            states = num_layers * D
            if not (h0 is None or len(h0) == states) or not (c0 is None or len(c0) == states):
                return None
            x = x.contiguous()
            draw = None
            if sample is not None:
                H, P = weights[1].shape[0] // len(cell.gates), weights[1].shape[1]
                draw = partial(sample, Form(*x.shape[:2]), D, (H, P), x)
            y, hn, cn, *_ = stack.run("cpu", cell, x, weights, h0, c0, num_layers, 0.0, bidirectional, draw=draw)
        else:
            y, hn, cn = ops.cpu_infer(cell.name, x, weights, num_layers, bidirectional, h0, c0)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return error
    return y.transpose(0, 1) if batch_first else y, (hn, cn) if paired else hn


def _aten_layers(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    num_layers: int,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's own layers, validated: they accept some inconsistent arguments."""
    D, form = 2 if bidirectional else 1, Form(x.shape[0], x.shape[1])
    validate.options(cell, weights, num_layers, D, 0.0)
    validate.layers(cell, x, weights, None, h0, c0, form, num_layers, D)
    return aten.layers(cell, x, None, weights, h0, c0, form.B, num_layers, 0.0, bidirectional)
