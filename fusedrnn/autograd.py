"""The autograd.Function around the operators: what is saved, the backward, and the backward of the backward.

No kernels and no device branches here. A layer keeps the backend that ran its forward, because only that one
understands what it reserved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import ops, reference
from .cells import named
from .layout import split_directions

# The fixed arguments of LayerFunction.apply before the weights, and the first of them that can need a gradient.
_FIXED = ("backend", "cell", "bidirectional", "cell_states", "x", "h0", "c0", "lengths", "reset", "noise")
_X, _LENGTHS = _FIXED.index("x"), _FIXED.index("lengths")
_WEIGHTS = len(_FIXED)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether gradients are on, and one of the tensors wants one."""
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
    """One layer, differentiable where it has to be; the arguments are those of `ops.FORWARD_SCHEMA`.

    Returns:
        y [T, B, D*P], hn [D, B, P], cn [D, B, C], c [T, B, D*C] (meaningful with cell_states only); of packed rows
        y and c are [N, ...].

    Raises:
        NotImplementedError: inside torch.func.vmap, torch.func.jvp or a forward-mode dual level.
    """
    needs_grad = wants_gradient(x, h0, c0, *weights)
    # The flag itself: before torch 2.12, Dynamo takes is_exporting() for true in torch.compile as well.
    if needs_grad and (torch.compiler._is_exporting_flag or torch.jit.is_tracing()):
        needs_grad = False  # what is recorded will be run and not trained: it should reserve nothing
    with _autocast_off(x.device):
        if needs_grad or _is_transformed():
            y, hn, cn, c, _ = _apply(
                backend, cell, bidirectional, cell_states, x, h0, c0, lengths, reset, noise, *weights
            )
        else:
            y, hn, cn, c, _ = ops.forward_op(backend)(
                cell, x, bidirectional, h0, c0, lengths, reset, cell_states, False, *weights, **_given(noise)
            )
    return y, hn, cn, c


def step(
    backend: str, cell: str, x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One time step of one direction, differentiable, outside of autocast: x [B, I], h0 [B, P], c0 [B, C] -> hn, cn."""
    _, hn, cn, _, _ = _apply(backend, cell, False, False, x, h0, c0, None, None, None, *weights)
    return hn, cn


def _given(noise: Tensor | None) -> dict[str, Tensor]:
    """The noise as an operator takes it, which has a default for none."""
    return {} if noise is None else {"noise": noise}


def _apply(*arguments: Any) -> tuple[Tensor, ...]:
    """LayerFunction.apply, or of the same what is quickest where nothing is transformed or traced."""
    if torch._C._are_functorch_transforms_active():
        return _apply_transformed(*arguments)
    if torch.compiler.is_compiling():
        return ops.layer(ops.revision(), *arguments[:_WEIGHTS], arguments[_WEIGHTS:])
    return _EagerLayerFunction.apply(*arguments)


def _apply_transformed(*arguments: Any) -> tuple[Tensor, ...]:
    """Inside torch.func's transforms. torch has no rule for an autograd.Function in functionalize: nothing is mutated
    here, so that one is left for the call."""
    interpreter: Any = torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()
    if interpreter.key() != torch._C._functorch.TransformType.Functionalize:
        y, *others = LayerFunction.apply(*arguments)
        return y.clone(), *others  # which may be changed in place; see _EagerLayerFunction
    api = torch._subclasses.functional_tensor.FunctorchFunctionalizeAPI(interpreter)
    with api.redispatch_to_next():
        results: Any = _apply(*api.unwrap_tensors(arguments))
    return api.wrap_tensors(results)


def _autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """The arguments have got the dtypes they are to be computed in: nothing below may be cast again."""
    if torch._C._is_any_autocast_enabled() and ops.has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _is_transformed() -> bool:
    """Whether vmap or forward-mode differentiation may be at work, of which an operator by itself knows nothing."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _refuse_vmap(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "the forward of fusedrnn's layers cannot be batched by torch.func.vmap, neither over sequences nor over weights"
        ": give the sequences a batch dimension, and call the module once for each set of weights. Its backward can be "
        "(torch.func.jacrev)"
    )


class LayerFunction(torch.autograd.Function):
    """forward: (*_FIXED, *weights) -> y, hn, cn, c, reserve. See docs/math.md for both directions.

    Of a single step without lengths x, h0, c0, hn and cn may be without their first dimension: views made outside would
    be nodes of the graph, each of which a short step feels.
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
        # Not squeezed: a view that is made here may not be changed in place.
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
        with _autocast_off(x.device):
            if torch.compiler.is_compiling():
                grads: Sequence[Tensor] = _run_backward(ctx.backend, ctx.cell, ctx.bidirectional, needs, *tensors)
            elif torch.is_grad_enabled() or _is_transformed():
                apply = partial(LayerBackwardFunction.apply, ctx.backend, ctx.cell, ctx.bidirectional, needs)
                grads = _for_each(apply, tensors)
            else:
                grads = _for_each(partial(_run_backward, ctx.backend, ctx.cell, ctx.bidirectional, needs), tensors)
        dx, dh0, dc0, *dweights = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        if is_step:
            dx, dh0, dc0 = (None if grad is None else grad.squeeze(0) for grad in (dx, dh0, dc0))
        return None, None, None, None, dx, dh0, dc0, None, None, None, *dweights

    vmap = staticmethod(_refuse_vmap)


@cache
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, device=device)


class _Version:
    """Tells whether a tensor has been changed in place, and keeps nothing of its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._counter = tensor.detach()  # has the version of the tensor and of all its views
        self._counter.data = _nothing(tensor.device)
        self._seen = tensor._version

    def has_changed(self) -> bool:
        return self._counter._version != self._seen


class _EagerLayerFunction(torch.autograd.Function):
    """LayerFunction where nothing is transformed or traced.

    With a setup_context, `apply` reads and binds the signature of `forward` at every call, which takes 30 us. And y may
    be changed in place before the backward, which computes it again then.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = LayerFunction.forward(*arguments)
        y, *others = output
        returns_y = type(y) is Tensor and not _is_step(arguments[_X], arguments[_LENGTHS])
        # y.data has a version of its own, which nobody changes.
        LayerFunction.setup_context(ctx, arguments, (y.data, *others) if returns_y else output)
        ctx.y_version = _Version(y) if returns_y else None
        return output

    backward = staticmethod(LayerFunction.backward)


ops.implement_layer(lambda *arguments: _EagerLayerFunction.apply(*arguments[:_WEIGHTS], *arguments[_WEIGHTS]))


def _is_step(x: Tensor, lengths: Tensor | None) -> bool:
    return x.dim() == 2 and lengths is None


def unsqueezed(*tensors: Tensor | None) -> list[Any]:
    """What a single step has, with a dimension for time or layers; None stays."""
    return [None if t is None else t.unsqueeze(0) for t in tensors]


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


class LayerBackwardFunction(torch.autograd.Function):
    """The backward as a function of its own, so that it has a derivative: recomputed through the reference.

    Used only where a graph of the backward is asked for (create_graph); the first derivative still comes from the
    backend's own kernel.
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
        directions = split_directions(weights, ctx.bidirectional, cell)
        B, D = reference.batch_size(x, lengths), len(directions)
        C, P = cell.cell_size(directions[0].hidden_size), directions[0].w_hh.shape[1]
        zeros = [y.new_zeros(size) for size in (y.shape, (D, B, P), (D, B, C), c.shape)]
        grad_outputs = tuple(zero if d is None else d for d, zero in zip((dy, dhn, dcn, dc), zeros, strict=True))
        states = (
            x.new_zeros(D, B, P) if h0 is None else h0,
            x.new_zeros(D, B, C) if c0 is None else c0,
        )

        def gradients(x: Tensor, h0: Tensor, c0: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            *grad_outputs, weights = *rest[:4], rest[4:]

            def outputs(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
                return reference.layer(cell, x, weights, ctx.bidirectional, h0, c0, lengths, reset, noise)[:4]

            return torch.func.vjp(outputs, x, h0, c0, *weights)[1](tuple(grad_outputs))

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
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One after another: every element has gradients of the weights of its own."""
        results = [
            LayerBackwardFunction.apply(
                backend,
                cell,
                bidirectional,
                needs,
                *(t if dim is None else t.select(dim, k) for t, dim in zip(arguments, in_dims[4:], strict=True)),
            )
            for k in range(info.batch_size)
        ]
        grads = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return grads, (0,) * len(grads)


# is_grads_batched and vectorize=True of torch.autograd are an older vmap, which asks no autograd.Function for a rule.
_LEVELS = range(64, 0, -1)  # how deep it can be nested


def _for_each(function: Callable[..., Sequence[Tensor | None]], tensors: Sequence[Tensor | None]) -> list[Any]:
    """function(*tensors), one element of that older vmap after another."""
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
    """What t consists of at a level of that vmap, in front; None where it does not have this level."""
    if not torch._C._functorch.is_legacy_batchedtensor(t):
        return None
    found = torch._remove_batch_dim(t, level, 0, 0)  # a tensor without this level is expanded, here to no element
    return found if len(found) else None
