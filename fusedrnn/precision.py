"""The dtype that a call is computed in under autocast, and the copies of its tensors in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """What autocast does: it leaves float64, and what is not floating point, as it is."""
    return [t if t is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype) for t in tensors]


def cast_weights(dtype: torch.dtype, weights: Sequence[Tensor]) -> list[Any]:
    """The same for weights: autocast keeps its copy of each until it is left, and so do all the calls until then."""
    if not dispatch.is_eager() or not torch.is_autocast_cache_enabled() or torch.is_inference_mode_enabled():
        return cast(dtype, *weights)
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # they say what is kept
        return cast(dtype, *weights)
    return [_autocast_copy(dtype, w) if _has_autocast_copy(dtype, w) else cast(dtype, w)[0] for w in weights]


def _has_autocast_copy(dtype: torch.dtype, weight: Tensor) -> bool:
    return (
        isinstance(weight, torch.nn.Parameter)
        and weight.dtype == torch.float32
        and weight.requires_grad
        and weight.dim() in (1, 2)
        and dtype == torch.get_autocast_dtype(weight.device.type)
        and dtype != torch.float32
    )


def _autocast_copy(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """What autocast hands to the operators that it casts for: a product of no rows saves it for its backward."""
    rows = torch.empty(0, weight.shape[0], dtype=dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        product: Any = torch.matmul(rows, weight)
    return product.grad_fn._saved_mat2 if weight.dim() == 2 else product.grad_fn._saved_vec
