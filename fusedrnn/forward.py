"""One call of a stack of layers, or of one time step: validation, backend selection, computation, output layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aten, autograd, dispatch, fast_path, precision, sequence, stack, validate
from .autograd import unsqueezed
from .cells import Cell
from .noise import Noise
from .second_derivative import differentiable_twice


class LSTMStates(NamedTuple):
    """All hidden and cell states of all layers.

    h[l] and c[l] are those of layer l, in the layout of the output: [T, B, D*P] and [T, B, D*H], or [B, T, ...] with
    batch_first, or without B for unbatched input, or PackedSequences for packed input. The states are before dropout;
    h of the last layer is the output. Zero after the end of a sequence.
    """

    h: tuple[Tensor, ...]
    c: tuple[Tensor, ...]


class RNNStates(NamedTuple):
    """All hidden states of all layers of a GRU or RNN: `LSTMStates` without c."""

    h: tuple[Tensor, ...]


def layers(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Any = None,
    num_layers: int = 1,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    return_states: bool = False,
    noise: Noise | None = None,
) -> Any:
    """A stack of layers; the arguments are those of `functional.lstm`, `functional.gru` and `functional.rnn`."""
    cell = cell if noise is None else noise.cell(cell, training)
    sample = partial(noise.draw, cell, training) if noise is not None and cell.noise else None
    plain = batch_sizes is None and lengths is None and reset is None and not return_states
    if plain and 0 <= dropout <= 1 and (num_layers == 1 or not (training and dropout)):
        quick = fast_path.attempt(cell, input, weights, hx, num_layers, batch_first, bidirectional, sample=sample)
        if type(quick) is tuple:
            return quick
    else:
        quick = None
    validate.layer_input(cell, input, batch_sizes)
    form = sequence.form_of(input, batch_first, batch_sizes)
    h0, c0 = validate.split_hx(cell, hx, cell.title.lower())
    validate.hx_dims(h0, c0, form)
    D = 2 if bidirectional else 1
    validate.options(cell, weights, num_layers, D, dropout)
    h_dtype = None  # under autocast the output of a projection, a matrix product, is narrower than c
    projected = (len(weights) // (num_layers * D) - len(cell.parameters[:1])) % 2 == 1
    whole = not (form.batch_sizes is not None or projected or (form.rows and dispatch.EQUAL_PACKED_IS_WIDE))
    dtype = dispatch.autocast_dtype(cell, input, h0, c0, whole=whole)
    if dtype is not None:
        h_dtype = dispatch.product_dtype(input) if projected else None
        input, h0, c0 = precision.cast(dtype, input, h0, c0)
        weights = precision.cast_weights(dtype, weights)
    else:
        validate.input_dtype(input, weights)
    if form.unbatched:
        h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
    validate.layers(cell, input, weights, hx, h0, c0, form, num_layers, D)
    if lengths is not None:
        lengths = validate.lengths(lengths, form, input.device)
    if reset is not None:
        reset = validate.reset(reset, form, input.device)

    T, B, I = form.T, form.B, input.shape[-1]
    G = len(cell.gates)
    H, P = weights[1].shape[0] // G, weights[1].shape[1]
    packed, extras = form.batch_sizes is not None, (lengths is not None, reset is not None, return_states)
    train = autograd.wants_gradient(input, h0, c0, *weights)
    problem = dispatch.Problem(
        input.device.type, input.dtype, T, B, I, H, P, D, *extras, packed, cell.name, train, num_layers
    )
    backend = dispatch.select(problem)
    if isinstance(quick, Exception) and backend == "cpu":
        raise quick
    dropout = dropout if training else 0.0
    if backend == "aten":
        if form.rows and dispatch.EQUAL_PACKED_IS_WIDE:
            form = form._replace(batch_sizes=batch_sizes)
        y, hn, cn = _aten(cell, form, form.enter(input), weights, h0, c0, num_layers, dropout, bidirectional)
        return form.leave(y), _last(cell, hn, cn, form)
    if not dispatch.TABLE[backend].takes_packed:
        form = form._replace(padded=True)
    elif lengths is not None:
        flops = 2.0 * G * num_layers * D * H * (I + P)
        form = form._replace(packing=sequence.packing(form, lengths, flops))
    h0, c0, lengths, reset = form.sort(h0, c0, lengths, reset, input.device)
    x = form.enter(input)
    if torch.is_grad_enabled() and not dispatch.is_recorded() and any(w.requires_grad for w in weights):
        x = x.contiguous()  # as in torch: a batch_first input may be modified before the backward
    c_states = return_states and cell.has_cell_state
    draw = partial(sample, form, D, (H, P), input) if sample is not None else None
    y, hn, cn, hs, cs = stack.run(
        backend, cell, x, weights, h0, c0, num_layers, dropout, bidirectional, lengths, reset, c_states, draw
    )
    hn, cn = form.unsort(hn, cn)
    if h_dtype is not None:
        y, hn, *hs = precision.cast(h_dtype, y, hn, *hs)
    if not return_states:
        return form.leave(y), _last(cell, hn, cn, form)
    states: LSTMStates | RNNStates = RNNStates(tuple(form.leave(s) for s in hs))
    if cell.has_cell_state:
        states = LSTMStates(states.h, tuple(form.leave(s) for s in cs))
    return states.h[-1], _last(cell, hn, cn, form), states


def _aten(
    cell: Cell,
    form: sequence.Form,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's own layers, with second derivatives through the reference where torch has none: y, hn, cn or None."""

    def by_aten(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]) -> Sequence[Any]:
        return aten.layers(cell, x, form.batch_sizes, weights, h0, c0, form.B, num_layers, dropout, bidirectional)

    random = dropout > 0 and num_layers > 1  # cuDNN's dropout masks cannot be reproduced
    wanted = dispatch.is_eager() and not random and autograd.wants_gradient(x, h0, c0, *weights)
    if not (wanted and aten.lacks_second_derivative(x)):
        y, hn, cn = by_aten(x, h0, c0, list(weights))
        return y, hn, cn

    def again(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]) -> Sequence[Any]:
        lengths = form.sort(None, None, None, None, x.device)[2]
        return stack.run("reference", cell, x, weights, h0, c0, num_layers, 0.0, bidirectional, lengths)

    def of_tensors(compute: Any) -> Any:
        def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            own = iter(rest)
            states = [None if state is None else next(own) for state in (h0, c0)]
            return tuple(compute(x, *states, list(own))[: 3 if cell.has_cell_state else 2])

        return run

    tensors = [t for t in (x, h0, c0, *weights) if t is not None]
    y, hn, *cn = differentiable_twice(of_tensors(by_aten), of_tensors(again), tensors)
    return y, hn, cn[0] if cn else None


def step(
    cell: Cell,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_p: Tensor | None = None,
    noise: Noise | None = None,
    training: bool = False,
) -> Any:
    """One time step: `functional.lstm_cell` and its siblings, which say what the arguments are."""
    cell = cell if noise is None else noise.cell(cell, training)
    if b_ih is not None and b_hh is not None and type(hx) is not list and w_p is None and not cell.noise:
        quick = fast_path.attempt(cell, input, [w_ih, w_hh, b_ih, b_hh], hx, dims=2)
        if type(quick) is tuple:
            return quick[1]
    else:
        quick = None
    validate.cell_input(cell, input)
    batched = input.dim() == 2
    caller = f"{cell.title.lower()}_cell"
    h, c = validate.split_hx(cell, hx, caller)
    if h is not None:
        validate.cell_hx_dims(cell, h, c, input.dim(), hx, caller)
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih and b_hh must be given both or not at all, got one of them")
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_p) if w is not None]
    validate.options(cell, weights, 1, 1, 0.0)
    dtype = dispatch.autocast_dtype(cell, input, h, c, whole=False)
    if dtype is not None:
        input, h, c = precision.cast(dtype, input, h, c)
        weights = precision.cast_weights(dtype, weights)
    if not batched:
        input, h, c = unsqueezed(input, h, c)
    (B, I), H = input.shape, w_hh.shape[1]
    if w_ih.shape[1] != I:
        raise RuntimeError(f"input has inconsistent input_size: got {I} expected {w_ih.shape[1]}")
    validate.cell_hx_sizes(h, c, B, H)
    if not validate.are_alike(input, weights, h, c):
        validate.devices(input, weights, h, c)
        validate.dtypes(input, weights, h, c)
    validate.weight_shapes(cell, weights, 1, 1, I)

    train = autograd.wants_gradient(input, h, c, *weights)
    problem = dispatch.Problem(input.device.type, input.dtype, 1, B, I, H, H, 1, cell=cell.name, train=train, step=True)
    backend = dispatch.select(problem)
    if isinstance(quick, Exception) and backend == "cpu":
        raise quick
    hn: Tensor
    cn: Tensor | None
    if backend == "aten":
        hn, cn = aten.step(cell, input, weights, h, c)
    else:
        x, h, c = unsqueezed(input, h, c)
        drawn = None
        if noise is not None and cell.noise:
            drawn = noise.draw(cell, training, sequence.Form(1, B), 1, (H, H), input)
        _, hn, cn, _ = autograd.layer(backend, cell.name, x, weights, False, h, c, None, None, False, drawn)
        hn, cn = hn.squeeze(0), cn.squeeze(0)
    if not batched:
        hn, cn = hn.squeeze(0), None if cn is None else cn.squeeze(0)
    return (hn, cn) if cell.has_cell_state else hn


def _last(cell: Cell, hn: Tensor, cn: Tensor | None, form: sequence.Form) -> Any:
    """The last states as torch's module returns them."""
    if not cell.has_cell_state:
        return hn.squeeze(1) if form.unbatched else hn
    assert cn is not None
    return (hn.squeeze(1), cn.squeeze(1)) if form.unbatched else (hn, cn)
