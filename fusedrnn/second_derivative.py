"""Second derivatives for torch's own layers where their kernels have none (cuDNN)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Outputs = Sequence[Tensor]
Layers = Callable[..., Outputs]


def differentiable_twice(layers: Layers, again: Layers, tensors: Sequence[Tensor]) -> Outputs:
    """layers(*tensors), differentiable twice.

    The first derivative is that of `layers`; with create_graph=True it is computed through `again`.

    Args:
        layers, again: functions with the same outputs; `again` is differentiable twice.
        tensors: their arguments, which may require gradients.
    """
    gradients = _Gradients()
    outputs = layers(*_Inputs.apply(gradients, again, *tensors))
    for k, output in enumerate(outputs):
        if output.requires_grad:
            output.register_hook(partial(gradients.note, k))
    return outputs


class _Gradients:
    """The gradients of the outputs in the running backward."""

    def __init__(self) -> None:
        self._task, self._grads = -1, dict[int, Tensor]()

    def note(self, k: int, grad: Tensor | None) -> None:
        if grad is None:  # an unused output
            return
        task = torch._C._current_graph_task_id()
        if task != self._task:  # another backward, possibly unfinished
            self._task, self._grads = task, {}
        self._grads[k] = grad

    def take(self) -> dict[int, Tensor]:
        """Output -> gradient of this backward; missing ones are zero."""
        grads = self._grads if torch._C._current_graph_task_id() == self._task else {}
        self._task, self._grads = -1, {}
        return grads


class _Inputs(torch.autograd.Function):
    """The identity. Its backward passes gradients on, or recomputes them through `again` with create_graph=True."""

    @staticmethod
    def forward(ctx: Any, gradients: _Gradients, again: Layers, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients, ctx.again = gradients, again
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_outputs = ctx.gradients.take()
        if torch.is_grad_enabled():
            grads = _again(ctx.again, ctx.saved_tensors, ctx.needs_input_grad[2:], of_outputs)
        return None, None, *grads


def _again(
    again: Layers, tensors: Sequence[Tensor], needed: Sequence[bool], of_outputs: dict[int, Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors that need one, as functions of the tensors and of the outputs' gradients."""
    outputs = again(*tensors)
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
    found = torch.autograd.grad(
        [outputs[k] for k in of_outputs], wanted, list(of_outputs.values()), create_graph=True, allow_unused=True
    )
    grads = iter(found)
    return tuple(next(grads) if need else None for need in needed)
