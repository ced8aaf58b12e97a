"""The autograd.Function around the operators: what is saved, the backward, and the backward of the backward.

No kernels and no device branches here. A layer keeps the backend that ran its forward, because only that one
understands what it reserved.
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

    Forward-mode differentiation goes through the reference, whatever the backend.
    """
    needs_grad = wants_gradient(x, h0, c0, *weights)
    # The flag itself: before torch 2.12, Dynamo takes is_exporting() for true in torch.compile as well.
    if needs_grad and (torch.compiler._is_exporting_flag or torch.jit.is_tracing()):
        needs_grad = False  # what is recorded will be run and not trained: it should reserve nothing
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


def _is_forward_mode() -> bool:
    """Whether forward-mode differentiation, torch.func.jvp among it, may be at work, which no operator knows of."""
    return torch.autograd.forward_ad._current_level >= 0


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
            elif _is_forward_mode():
                grads = _gradients_of_given(ctx.cell, ctx.bidirectional, *tensors)
            elif torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
                apply = partial(LayerBackwardFunction.apply, ctx.backend, ctx.cell, ctx.bidirectional, needs)
                grads = _for_each(apply, tensors)
            else:
                grads = _for_each(partial(_run_backward, ctx.backend, ctx.cell, ctx.bidirectional, needs), tensors)
        dx, dh0, dc0, *dweights = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        if is_step:
            dx, dh0, dc0 = (None if grad is None else grad.squeeze(0) for grad in (dx, dh0, dc0))
        return None, None, None, None, dx, dh0, dc0, None, None, None, *dweights

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """All sequences in one batch; or where weights differ, one set of weights after another."""
        V, rows = info.batch_size, slice(_X, _WEIGHTS)
        if any(dim is not None for dim in in_dims[_WEIGHTS:]):
            each = [_apply(*batching.elements(arguments, in_dims, k)) for k in range(V)]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])
        merged = batching.merged(_FIXED[rows], arguments[rows], in_dims[rows], V)
        *results, reserve = _apply(*arguments[:_X], *merged.values(), *arguments[_WEIGHTS:])
        found, dims = batching.split(("y", "hn", "cn", "c"), results, merged["x"], V)
        return (*found, reserve), (*dims, None)  # of the merged batch: what a reserve means is the backend's own


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
    """Those of x, h0, c0 and the weights by the reference, of which any derivative can be taken."""

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
    """dy, dhn, dcn, dc, h0 and c0, with zeros for those that are None."""
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
        """Of sequences that forward has computed as one batch, the gradients in one as well; or one after another.

        Every element has gradients of the weights of its own.
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
            if is_merged:  # its reserve is that of all elements
                y, _, _, c, reserve = _apply(backend, cell, bidirectional, False, *gradients[_SAVED.index("x") :], *own)
            results.append(
                LayerBackwardFunction.apply(backend, cell, bidirectional, needs, *gradients, y, c, reserve, *own)
            )
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
