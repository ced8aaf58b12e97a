"""Casts of tensors to the compute dtype under autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """Casts as autocast does: not float64, and not other than floating-point dtypes."""
    return [t if t is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype) for t in tensors]


def cast_weights(dtype: torch.dtype, weights: Sequence[Tensor]) -> list[Any]:
    """`cast` for weights, through autocast's own cache of cast weights."""
    if not dispatch.is_eager() or not torch.is_autocast_cache_enabled() or torch.is_inference_mode_enabled():
        return cast(dtype, *weights)
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # such hooks decide what is stored
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
    """The cached copy of autocast, read from the saved tensors of a matrix product without rows."""
    rows = torch.empty(0, weight.shape[0], dtype=dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        product: Any = torch.matmul(rows, weight)
    return product.grad_fn._saved_mat2 if weight.dim() == 2 else product.grad_fn._saved_vec
