"""A second derivative for torch's own layers where their kernels have none, as on a GPU (cuDNN)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Outputs = Sequence[Tensor]
Layers = Callable[..., Outputs]


def differentiable_twice(layers: Layers, again: Layers, tensors: Sequence[Tensor]) -> Outputs:
    """layers(*tensors), with a derivative that has derivatives.

    The derivative is that of `layers`. Where a graph of it is asked for (create_graph), it is computed by `again`.

    Args:
        layers, again: compute the same outputs from the same tensors; `again` by what can be differentiated twice.
        tensors: of which a gradient may be wanted.
    """
    gradients = _Gradients()
    outputs = layers(*_Inputs.apply(gradients, again, *tensors))
    for k, output in enumerate(outputs):
        if output.requires_grad:
            output.register_hook(partial(gradients.note, k))
    return outputs


class _Gradients:
    """Those of the outputs, in the backward that is going on."""

    def __init__(self) -> None:
        self._task, self._grads = -1, dict[int, Tensor]()

    def note(self, k: int, grad: Tensor | None) -> None:
        if grad is None:  # of an output that nobody uses
            return
        task = torch._C._current_graph_task_id()
        if task != self._task:  # another backward, which may not have come to its end
            self._task, self._grads = task, {}
        self._grads[k] = grad

    def take(self) -> dict[int, Tensor]:
        """Output -> gradient, of this backward; what it does not have is zero."""
        grads = self._grads if torch._C._current_graph_task_id() == self._task else {}
        self._task, self._grads = -1, {}
        return grads


class _Inputs(torch.autograd.Function):
    """Its arguments as they are. Their gradients are those that come, or, if these are to be differentiated, others."""

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
