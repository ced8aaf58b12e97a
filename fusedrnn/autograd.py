"""The autograd.Function around the operators: saved tensors, backward, and double backward.

No kernels and no device branches here. The backward runs on the backend of the forward: only that one can read the
reserve it saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import batching, ops, reference
from .cells import Cell, named
from .layout import split_directions

# The fixed arguments of LayerFunction.apply before the weights, and the first of them that can need a gradient.
_FIXED = ("backend", "cell", "bidirectional", "cell_states", "x", "h0", "c0", "lengths", "reset", "noise")
_X, _LENGTHS = _FIXED.index("x"), _FIXED.index("lengths")
_WEIGHTS = len(_FIXED)
# The tensors that LayerBackwardFunction.apply takes before the weights.
_SAVED = ("dy", "dhn", "dcn", "dc", "x", "h0", "c0", "lengths", "reset", "noise", "y", "c", "reserve")


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether gradients are enabled and one of the tensors requires one."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def layer(
    backend: str,
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    bidirectional: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell_states: bool,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer, differentiable if an argument requires a gradient; the arguments are those of `ops.FORWARD_SCHEMA`.

    Returns:
        y [T, B, D*P], hn [D, B, P], cn [D, B, C], c [T, B, D*C] (valid with cell_states only); for packed rows y and c
        are [N, ...].

    Forward-mode differentiation goes through the reference with every backend.
    """
    needs_grad = wants_gradient(x, h0, c0, *weights)
    # The private flag: before torch 2.12, Dynamo evaluates is_exporting() to True in torch.compile as well.
    if needs_grad and (torch.compiler._is_exporting_flag or torch.jit.is_tracing()):
        needs_grad = False  # exported and traced programs are for inference and need no reserve
    with _autocast_off(x.device):
        if _is_forward_mode():
            y, hn, cn, c, _ = reference.layer(named(cell), x, weights, bidirectional, h0, c0, lengths, reset, noise)
        elif needs_grad or torch._C._are_functorch_transforms_active():
            y, hn, cn, c, _ = _apply(
                backend, cell, bidirectional, cell_states, x, h0, c0, lengths, reset, noise, *weights
            )
        else:
            y, hn, cn, c, _ = ops.forward_op(backend)(
                cell, x, bidirectional, h0, c0, lengths, reset, cell_states, False, *weights, **_given(noise)
            )
    return y, hn, cn, c


def step(
    cell: str, x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One time step on the backend "cpu", differentiable; without autocast, transform or trace.

    Args: x [B, I], h0 [B, P], c0 [B, C]. Returns: hn [B, P], cn [B, C].
    """
    hn, cn = _EagerStepFunction.apply(cell, x, h0, c0, *weights)
    return hn, cn


def _given(noise: Tensor | None) -> dict[str, Tensor]:
    """The keyword argument of an operator for the noise; empty for none."""
    return {} if noise is None else {"noise": noise}


def _apply(*arguments: Any) -> tuple[Tensor, ...]:
    """LayerFunction.apply, or its faster eager form if no transform and no trace is active."""
    if torch._C._are_functorch_transforms_active():
        return _apply_transformed(*arguments)
    if torch.compiler.is_compiling():
        return ops.layer(ops.revision(), *arguments[:_WEIGHTS], arguments[_WEIGHTS:])
    return _EagerLayerFunction.apply(*arguments)


def _apply_transformed(*arguments: Any) -> tuple[Tensor, ...]:
    """`_apply` inside torch.func's transforms. functionalize has no rule for an autograd.Function; nothing is mutated
    here, so the call leaves that transform."""
    interpreter: Any = torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()
    if interpreter.key() != torch._C._functorch.TransformType.Functionalize:
        y, *others = LayerFunction.apply(*arguments)
        return y.clone(), *others  # y may be modified in place; see _EagerLayerFunction
    api = torch._subclasses.functional_tensor.FunctorchFunctionalizeAPI(interpreter)
    with api.redispatch_to_next():
        results: Any = _apply(*api.unwrap_tensors(arguments))
    return api.wrap_tensors(results)


def _autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Disables autocast: the arguments already have the compute dtype."""
    if torch._C._is_any_autocast_enabled() and ops.has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _is_forward_mode() -> bool:
    """Whether forward-mode differentiation (also torch.func.jvp) may be active; the operators do not support it."""
    return torch.autograd.forward_ad._current_level >= 0


class LayerFunction(torch.autograd.Function):
    """forward: (*_FIXED, *weights) -> y, hn, cn, c, reserve. See docs/math.md for both directions.

    For a single step without lengths x, h0, c0, hn and cn may lack their first dimension: views made outside would add
    nodes to the graph, which cost time in a short step.
    """

    @staticmethod
    def forward(
        backend: str,
        cell: str,
        bidirectional: bool,
        cell_states: bool,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        noise: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        forward, given = ops.forward_op(backend), _given(noise)
        if not _is_step(x, lengths):
            return forward(cell, x, bidirectional, h0, c0, lengths, reset, cell_states, True, *weights, **given)
        x, h0, c0 = unsqueezed(x, h0, c0)
        y, hn, cn, c, reserve = forward(
            cell, x, bidirectional, h0, c0, lengths, reset, cell_states, True, *weights, **given
        )
        # Not squeeze(): a view made here could not be modified in place.
        return y, hn.resize_(hn.shape[1:]), cn.resize_(cn.shape[1:]), c, reserve

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.cell, ctx.bidirectional = inputs[:3]
        y, _, _, c, reserve = output
        ctx.y_version = None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(reserve)
        ctx.save_for_backward(*inputs[_X:], y, c, reserve)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, dc: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        x, h0, c0, lengths, reset, noise, *weights, y, c, reserve = ctx.saved_tensors
        is_step = _is_step(x, lengths)
        if is_step:
            x, h0, c0, dhn, dcn = unsqueezed(x, h0, c0, dhn, dcn)
        if ctx.y_version is not None and ctx.y_version.has_changed():
            with torch.no_grad(), _autocast_off(x.device):
                forward = ops.forward_op(ctx.backend)
                arguments = (ctx.cell, x, ctx.bidirectional, h0, c0, lengths, reset, False, True, *weights)
                y = forward(*arguments, **_given(noise))[0]
        needed = ctx.needs_input_grad
        needs = [*needed[_X : _X + 3], *needed[_WEIGHTS:]]
        tensors = (dy, dhn, dcn, dc, x, h0, c0, lengths, reset, noise, y, c, reserve, *weights)
        grads = _backward_in_any_mode(ctx.backend, ctx.cell, ctx.bidirectional, needs, *tensors)
        dx, dh0, dc0, *dweights = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        if is_step:
            dx, dh0, dc0 = (None if grad is None else grad.squeeze(0) for grad in (dx, dh0, dc0))
        return None, None, None, None, dx, dh0, dc0, None, None, None, *dweights

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Runs all elements as one batch; or, if weights are batched, one set of weights after another."""
        V, rows = info.batch_size, slice(_X, _WEIGHTS)
        if any(dim is not None for dim in in_dims[_WEIGHTS:]):
            each = [_apply(*batching.elements(arguments, in_dims, k)) for k in range(V)]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])
        merged = batching.merged(_FIXED[rows], arguments[rows], in_dims[rows], V)
        *results, reserve = _apply(*arguments[:_X], *merged.values(), *arguments[_WEIGHTS:])
        found, dims = batching.split(("y", "hn", "cn", "c"), results, merged["x"], V)
        return (*found, reserve), (*dims, None)  # the reserve stays merged: its layout is the backend's own


@cache
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, device=device)


class _Version:
    """Detects in-place modification of a tensor without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._counter = tensor.detach()  # shares the version counter of the tensor and all its views
        self._counter.data = _nothing(tensor.device)
        self._seen = tensor._version

    def has_changed(self) -> bool:
        return self._counter._version != self._seen


class _EagerLayerFunction(torch.autograd.Function):
    """LayerFunction without transforms and traces.

    With a setup_context, `apply` reads and binds the signature of `forward` at every call, which takes 30 us. If y is
    modified in place before the backward, the backward recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = LayerFunction.forward(*arguments)
        y, *others = output
        returns_y = type(y) is Tensor and not _is_step(arguments[_X], arguments[_LENGTHS])
        # y.data has its own version counter, which stays unchanged.
        LayerFunction.setup_context(ctx, arguments, (y.data, *others) if returns_y else output)
        ctx.y_version = _Version(y) if returns_y else None
        return output

    backward = staticmethod(LayerFunction.backward)


class _EagerStepFunction(torch.autograd.Function):
    """One time step on the CPU, without transforms and traces: (cell, x, h0, c0, *weights) -> hn, cn.

    The operators take x, h0 and c0 of a step as they are: views, and results that a step does not need, would take
    longer than the kernels of a small one.
    """

    @staticmethod
    def forward(
        ctx: Any, cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, hn, cn, c, reserve = ops.forward_op("cpu")(cell, x, False, h0, c0, None, None, False, True, *weights)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, y, c, reserve, *weights)
        return hn, cn

    @staticmethod
    def backward(ctx: Any, dhn: Tensor | None, dcn: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, c0, y, c, reserve, *weights = ctx.saved_tensors
        cell, needs = ctx.cell, list(ctx.needs_input_grad[1:])
        if _is_plain_backward(dhn, dcn):
            grads: Sequence[Any] = ops.backward_op("cpu")(
                cell, None, dhn, dcn, None, x, False, h0, c0, None, None, y, c, reserve, needs, *weights
            )[: len(needs)]
        else:
            dhn, dcn, x, h0, c0, y, c = unsqueezed(dhn, dcn, x, h0, c0, y, c)
            tensors = (None, dhn, dcn, None, x, h0, c0, None, None, None, y, c, reserve, *weights)
            dx, dh0, dc0, *dweights = _backward_in_any_mode("cpu", cell, False, needs, *tensors)
            grads = *(None if grad is None else grad.squeeze(0) for grad in (dx, dh0, dc0)), *dweights
        return None, *(grad if need else None for grad, need in zip(grads, needs, strict=True))


ops.implement_layer(lambda *arguments: _EagerLayerFunction.apply(*arguments[:_WEIGHTS], *arguments[_WEIGHTS]))


def _is_step(x: Tensor, lengths: Tensor | None) -> bool:
    return x.dim() == 2 and lengths is None


def unsqueezed(*tensors: Tensor | None) -> list[Any]:
    """Adds the leading dimension of time or layers to each tensor; None stays None."""
    return [None if t is None else t.unsqueeze(0) for t in tensors]


def _is_plain_backward(*grads: Tensor | None) -> bool:
    """Whether a backward is neither differentiated nor transformed, compiled or run under autocast."""
    return not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or _is_forward_mode()
        or any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
    )


def _backward_in_any_mode(
    backend: str, cell: str, bidirectional: bool, needs: list[bool], *tensors: Tensor | None
) -> Sequence[Tensor | None]:
    """The gradients that `needs` names, from the tensors in _SAVED and the weights; differentiable if gradients are
    enabled."""
    x: Any = tensors[_SAVED.index("x")]
    with _autocast_off(x.device):
        if torch.compiler.is_compiling():
            return _run_backward(backend, cell, bidirectional, needs, *tensors)  # type: ignore[arg-type]
        if _is_forward_mode():
            return _gradients_of_given(cell, bidirectional, *tensors)  # type: ignore[arg-type]
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return _for_each(partial(LayerBackwardFunction.apply, backend, cell, bidirectional, needs), tensors)
        return _for_each(partial(_run_backward, backend, cell, bidirectional, needs), tensors)


def _run_backward(
    backend: str,
    cell: str,
    bidirectional: bool,
    needs: list[bool],
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    noise: Tensor | None,
    y: Tensor,
    c: Tensor,
    reserve: Tensor,
    *weights: Tensor,
) -> tuple[Tensor, ...]:
    arguments = (cell, dy, dhn, dcn, dc, x, bidirectional, h0, c0, lengths, reset, y, c, reserve, needs, *weights)
    grads = ops.backward_op(backend)(*arguments, **_given(noise))
    return grads[: len(needs)]


def _gradients(
    cell: Cell,
    bidirectional: bool,
    grad_outputs: Sequence[Tensor],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    noise: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The gradients of x, h0, c0 and the weights by the reference, differentiable to any order."""

    def outputs(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return reference.layer(cell, x, weights, bidirectional, h0, c0, lengths, reset, noise)[:4]

    return torch.func.vjp(outputs, x, h0, c0, *weights)[1](tuple(grad_outputs))


def _with_zeros(
    cell: Cell,
    given: Sequence[Tensor | None],
    x: Tensor,
    lengths: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    y: Tensor,
    c: Tensor,
) -> list[Tensor]:
    """dy, dhn, dcn, dc, h0 and c0, with zeros in place of None."""
    directions = split_directions(weights, bidirectional, cell)
    B, D, P = reference.batch_size(x, lengths), len(directions), directions[0].w_hh.shape[1]
    state, carry = (D, B, P), (D, B, cell.cell_size(directions[0].hidden_size))
    sizes = (y.shape, state, carry, c.shape, state, carry)
    return [x.new_zeros(size) if t is None else t for t, size in zip(given, sizes, strict=True)]


def _gradients_of_given(
    cell: str,
    bidirectional: bool,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    noise: Tensor | None,
    y: Tensor,
    c: Tensor,
    _: Tensor,
    *weights: Tensor,
) -> tuple[Tensor, ...]:
    """`_run_backward` by the reference."""
    given = dy, dhn, dcn, dc, h0, c0
    *grad_outputs, h0, c0 = _with_zeros(named(cell), given, x, lengths, weights, bidirectional, y, c)
    return _gradients(named(cell), bidirectional, grad_outputs, x, h0, c0, lengths, reset, noise, weights)


class LayerBackwardFunction(torch.autograd.Function):
    """The backward as an autograd.Function, so that it has a derivative, which is recomputed through the reference.

    Used only with create_graph=True; the first derivative still comes from the backend's kernel.
    """

    @staticmethod
    def forward(backend: str, cell: str, bidirectional: bool, needs: list[bool], *arguments: Any) -> tuple[Tensor, ...]:
        return _run_backward(backend, cell, bidirectional, needs, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.cell, ctx.bidirectional, ctx.needs, *arguments = inputs
        ctx.mark_non_differentiable(*(grad for grad, need in zip(output, ctx.needs, strict=True) if not need))
        ctx.save_for_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *ddgrads: Tensor) -> tuple[Tensor | None, ...]:
        dy, dhn, dcn, dc, x, h0, c0, lengths, reset, noise, y, c, _, *weights = ctx.saved_tensors
        cell = named(ctx.cell)
        given = dy, dhn, dcn, dc, h0, c0
        *grad_outputs, h_first, c_first = _with_zeros(cell, given, x, lengths, weights, ctx.bidirectional, y, c)
        states = h_first, c_first

        def gradients(x: Tensor, h0: Tensor, c0: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            *grad_outputs, weights = *rest[:4], rest[4:]
            return _gradients(cell, ctx.bidirectional, grad_outputs, x, h0, c0, lengths, reset, noise, weights)

        cotangents = tuple(
            dd if need else torch.zeros_like(like)
            for dd, need, like in zip(ddgrads, ctx.needs, [x, *states, *weights], strict=True)
        )
        with _autocast_off(x.device):
            pullback = torch.func.vjp(gradients, x, *states, *grad_outputs, *weights)[1]
            gx, gh0, gc0, *rest = _for_each(lambda *cotangents: pullback(cotangents), cotangents)
        g_outputs, g_weights = rest[:4], rest[4:]
        ddouts = [g if d is not None else None for g, d in zip(g_outputs, (dy, dhn, dcn, dc), strict=True)]
        return (
            None,
            None,
            None,
            None,
            *ddouts,
            gx,
            gh0 if h0 is not None else None,
            gc0 if c0 is not None else None,
            None,
            None,
            None,
            None,
            None,
            None,
            *g_weights,
        )

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        backend: str,
        cell: str,
        bidirectional: bool,
        needs: list[bool],
        *arguments: Any,
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """Gradients of all elements in one batch if the forward ran them as one, otherwise one after another.

        Every element has its own gradients of the weights.
        """
        V, dims, weights = info.batch_size, in_dims[4:], arguments[len(_SAVED) :]
        is_merged = dims[_SAVED.index("y")] is not None and all(dim is None for dim in dims[_SAVED.index("reserve") :])
        if is_merged:
            tensors = batching.merged(_SAVED[:-1], arguments, dims, V)
            layer = batching.MergedLayer(cell, bidirectional, tensors, weights, V)
            if not any(needs[3:]) or layer.has_weight_gradients():

                def run(needs: list[bool], x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
                    rest = {**tensors, "x": x, "reserve": arguments[_SAVED.index("reserve")]}.values()
                    return LayerBackwardFunction.apply(backend, cell, bidirectional, needs, *rest, *weights)

                return layer.backward(run, needs)
        results = []
        for k in range(V):
            *gradients, y, c, reserve = batching.elements(arguments, dims, k)[: len(_SAVED)]
            own = batching.elements(weights, dims[len(_SAVED) :], k)
            if is_merged:  # the reserve is that of all elements: run the forward of this one
                y, _, _, c, reserve = _apply(backend, cell, bidirectional, False, *gradients[_SAVED.index("x") :], *own)
            results.append(
                LayerBackwardFunction.apply(backend, cell, bidirectional, needs, *gradients, y, c, reserve, *own)
            )
        grads = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return grads, (0,) * len(grads)


# is_grads_batched and vectorize=True of torch.autograd use a legacy vmap, which has no rules of autograd.Functions.
_LEVELS = range(64, 0, -1)  # nesting levels of the legacy vmap


def _for_each(function: Callable[..., Sequence[Tensor | None]], tensors: Sequence[Tensor | None]) -> list[Any]:
    """function(*tensors), for one element of the legacy vmap after another."""
    batched = [t for t in tensors if t is not None and torch._C._functorch.is_legacy_batchedtensor(t)]
    if not batched:
        return list(function(*tensors))
    level = next(level for level in _LEVELS if any(_elements(t, level) is not None for t in batched))
    elements = [None if t is None else _elements(t, level) for t in tensors]
    count = next(len(t) for t in elements if t is not None)
    results = [
        _for_each(function, [t if every is None else every[k] for t, every in zip(tensors, elements, strict=True)])
        for k in range(count)
    ]
    return [
        None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
        for parts in zip(*results, strict=True)
    ]


def _elements(t: Tensor, level: int) -> Tensor | None:
    """t with the batch dimension of a level of the legacy vmap in front; None if t is not batched at this level."""
    if not torch._C._functorch.is_legacy_batchedtensor(t):
        return None
    found = torch._remove_batch_dim(t, level, 0, 0)  # expands a tensor without this level, here to size 0
    return found if len(found) else None
