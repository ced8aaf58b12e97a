"""lstm and lstm_cell as functions: validate, normalise the shapes, dispatch once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import autograd, dispatch, ops
from .autograd import unsqueezed
from .packing import Packing
from .second_derivative import differentiable_twice
from .tuning import choice

_VF = torch._VF  # the functions behind nn.LSTM: torch's own path, our `aten` backend


class LSTMStates(NamedTuple):
    """Every hidden and every cell state of every layer.

    h[l] and c[l] belong to layer l and are laid out as the output is: [T, B, D*P] and [T, B, D*H], or [B, T, ...]
    with batch_first, or without B for unbatched input, or PackedSequences for packed input. They are the states
    before dropout; h of the last layer is the output. Zero where a sequence has ended.
    """

    h: tuple[Tensor, ...]
    c: tuple[Tensor, ...]


def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | Sequence[Tensor] | None = None,
    *,
    num_layers: int = 1,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], LSTMStates]:
    """A stack of LSTM layers over whole sequences (equations: torch.nn.LSTM, docs/lstm_math.md).

    Args:
        input: [T, B, I], or [B, T, I] with batch_first, or [T, I] unbatched, or with `batch_sizes` the data [N, I] of a
            PackedSequence; T > 0, B may be 0. float64, float32, bfloat16 or float16, the dtype of the weights unless
            autocast is on.
        weights: the tensors of nn.LSTM's state_dict in its order: for each layer and direction w_ih [4H, I or D*P],
            w_hh [4H, P], then b_ih [4H] and b_hh [4H] if there are biases, then w_hr [P, H] if there is a projection.
        hx: (h0 [L*D, B, P], c0 [L*D, B, H]), without B for unbatched input, or None for zeros.
        num_layers: L.
        batch_first: input, output, `reset` and the states of `return_states` carry B before T; hx never does.
        dropout: probability to zero an element of the output of each layer but the last, if training.
        training: whether dropout is applied.
        bidirectional: D is 2, every layer has a second direction that runs from the end.
        batch_sizes: [T] int64 on the CPU, where input is the data of a PackedSequence: how many sequences, longest
            first, there are at each step. T and B are then its length and its first element, and what has the layout of
            the input has [N, ...] for [T, B, ...]; hx and reset are in the order of the data.
        lengths: [B] int64 or int32 on input's device, each in 0..T: step t of sequence b exists where
            t < lengths[b]. Input is not read where no step exists and output is zero there; h_n and c_n are the
            states after the last step that exists, hx itself where the length is 0; the reverse direction starts at
            the last step that exists. No host synchronisation: values outside 0..T raise on the CPU and are clamped
            elsewhere.
        reset: [T, B] bool ([B, T] with batch_first, [T] unbatched) on input's device: where true, the state that
            enters step t is zero, in every layer and in both directions.
        return_states: also return every state of every layer.

    Returns:
        output [T, B, D*P] (or as input is laid out) and (h_n [L*D, B, P], c_n [L*D, B, H]); with return_states an
        `LSTMStates` as well.

    Raises:
        TypeError: an argument is not of its type.
        ValueError, RuntimeError: a shape, dtype, value or device does not fit; for what nn.LSTM checks too, its own
            exception type and wording. RuntimeError also if a backend was asked for and cannot compute this.
        NotImplementedError: inside torch.func.vmap or forward-mode differentiation.
    """
    plain = batch_sizes is None and lengths is None and reset is None and not return_states
    if plain and 0 <= dropout <= 1 and (num_layers == 1 or not (training and dropout)):
        quick = _short_way(input, weights, hx, num_layers, batch_first, bidirectional)
        if type(quick) is tuple:
            return quick
    else:
        quick = None
    form = _form_of(input, batch_first, batch_sizes)
    h0, c0 = _split_hx(hx, "lstm")
    _check_hx_dims(h0, c0, form)
    D = 2 if bidirectional else 1
    _check_options(weights, num_layers, D, dropout)
    h_dtype = None  # of what autocast makes narrower than c: the output of a projection is that of a matrix product
    projected = len(weights) // (num_layers * D) in (3, 5)
    is_wide = form.batch_sizes is not None or projected or (form.rows and dispatch.EQUAL_PACKED_IS_WIDE)
    dtype = dispatch.autocast_dtype(input, c0, wide=is_wide)
    if dtype is not None:
        h_dtype = dispatch.autocast_dtype(input) if projected else None
        input, h0, c0 = _cast(dtype, input, h0, c0)
        weights = _cast_weights(dtype, weights)
    elif input.dtype != weights[0].dtype:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weights[0].dtype}). "
            f"Convert input: input.to({weights[0].dtype}), or convert model: model.to({input.dtype})"
        )
    if form.unbatched:
        h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
    T, B, I = form.T, form.B, input.shape[-1]
    H, P = weights[1].shape[0] // 4, weights[1].shape[1]
    if weights[0].shape[1] != I:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {weights[0].shape[1]}, got {I}")
    for index, (s, size) in enumerate(((h0, (num_layers * D, B, P)), (c0, (num_layers * D, B, H)))):
        if s is not None and s.shape != size:
            raise RuntimeError(f"Expected hidden[{index}] size {size}, got {list(s.shape)}")
    _check_two(hx, "lstm")
    alike = _are_alike(input, weights, h0, c0)
    if not alike:
        _check_devices(input, weights, h0, c0)
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if not alike:
        _check_dtypes(input, weights, h0, c0)
    _check_weights(weights, num_layers, D, I)
    if lengths is not None:
        lengths = _check_lengths(lengths, form, input.device)
    if reset is not None:
        reset = _check_reset(reset, form, input.device)

    packed, extras = form.batch_sizes is not None, (lengths is not None, reset is not None, return_states)
    train = _wants_gradient(input, h0, c0, *weights)
    problem = dispatch.Problem(
        input.device.type, input.dtype, T, B, I, H, P, D, *extras, packed, "lstm", train, num_layers
    )
    backend = dispatch.select(problem)
    if isinstance(quick, Exception) and backend == "cpu":
        raise quick
    dropout = dropout if training else 0.0
    if backend == "aten":
        if form.rows and dispatch.EQUAL_PACKED_IS_WIDE:
            form = form._replace(batch_sizes=batch_sizes)
        y, hn, cn = _aten(input, form, weights, h0, c0, num_layers, dropout, bidirectional)
        return y, _squeezed(hn, cn, form)
    if not dispatch.TABLE[backend].takes_packed:
        form = form._replace(padded=True)
    elif lengths is not None:
        form = form._replace(packing=_packing(problem, num_layers, form, lengths))
    h0, c0, lengths, reset = _in_order(h0, c0, lengths, reset, form, input.device)
    x = _laid_in(input, form)
    if torch.is_grad_enabled() and not dispatch.is_recorded() and any(w.requires_grad for w in weights):
        x = x.contiguous()  # as nn.LSTM does, so that a batch_first input may be changed before the backward
    y, hn, cn, hs, cs = _stack(
        backend,
        x,
        weights,
        h0,
        c0,
        num_layers,
        dropout,
        bidirectional,
        lengths,
        reset,
        return_states,
    )
    hn, cn = _in_order_again(hn, cn, form)
    if h_dtype is not None:
        y, hn, *hs = _cast(h_dtype, y, hn, *hs)
    if not return_states:
        return _laid_out(y, form), _squeezed(hn, cn, form)
    states = LSTMStates(*(tuple(_laid_out(s, form) for s in part) for part in (hs, cs)))
    return states.h[-1], _squeezed(hn, cn, form), states


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One time step (torch.nn.LSTMCell).

    Args:
        input: [B, I], or [I] unbatched; B may be 0.
        hx: (h [B, H], c [B, H]), without B for unbatched input, or None for zeros.
        w_ih, w_hh, b_ih, b_hh: [4H, I], [4H, H], [4H] and [4H], gates in the order i, f, g, o; both biases or none.

    Returns:
        (h' [B, H], c' [B, H]), without B for unbatched input. Under autocast on the CPU they are of the wider of the
        autocast dtype and that of c (of input if hx is None), as nn.LSTMCell's are.

    Raises:
        TypeError, ValueError, RuntimeError: as `lstm`.
    """
    if (hx is None or type(hx) is tuple) and b_ih is not None and b_hh is not None:
        quick = _short_way(input, [w_ih, w_hh, b_ih, b_hh], hx, dims=2)
        if type(quick) is tuple:
            return quick[1]
    else:
        quick = None
    _check_input(input)
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    batched = input.dim() == 2
    h, c = _split_hx(hx, "lstm_cell")
    if h is not None and c is not None:
        _check_cell_hx_dims(h, c, input.dim(), hx)
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih and b_hh must be given both or not at all, got one of them")
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    _check_options(weights, 1, 1, 0.0)
    dtype = dispatch.autocast_dtype(input, c, wide=True)
    if dtype is not None:
        input, h, c = _cast(dtype, input, h, c)
        weights = _cast_weights(dtype, weights)
    if not batched:
        input, h, c = unsqueezed(input, h, c)
    (B, I), H = input.shape, w_hh.shape[1]
    if w_ih.shape[1] != I:
        raise RuntimeError(f"input has inconsistent input_size: got {I} expected {w_ih.shape[1]}")
    if h is not None and c is not None:
        _check_cell_hx_sizes(h, c, B, H)
    if not _are_alike(input, weights, h, c):
        _check_devices(input, weights, h, c)
        _check_dtypes(input, weights, h, c)
    _check_weights(weights, 1, 1, I)

    train = _wants_gradient(input, h, c, *weights)
    problem = dispatch.Problem(input.device.type, input.dtype, 1, B, I, H, H, 1, train=train, step=True)
    backend = dispatch.select(problem)
    if isinstance(quick, Exception) and backend == "cpu":
        raise quick
    if backend == "aten":
        h, c = (input.new_zeros(B, H) if s is None else s for s in (h, c))
        hn, cn = _VF.lstm_cell(input, (h, c), *weights)
    else:
        x, h, c = unsqueezed(input, h, c)
        _, hn, cn, _ = autograd.layer(backend, "lstm", x, weights, False, h, c, None, None, False)
        hn, cn = hn.squeeze(0), cn.squeeze(0)
    return (hn, cn) if batched else (hn.squeeze(0), cn.squeeze(0))


def _short_way(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Sequence[Tensor] | None,
    num_layers: int = 1,
    batch_first: bool = False,
    bidirectional: bool = False,
    dims: int = 3,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | Exception | None:
    """Layers, or with 2 dims a cell, on the CPU where only their results are asked for; None where that is not so.

    A short sequence takes less than all the questions that `lstm` asks. The operators make sure of shapes and dtypes by
    themselves, in fewer words: whoever gets their error instead of results asks all the questions, which find the
    words, and raises it where they find nothing wrong.
    """
    if type(input) is not Tensor or input.dim() != dims or not dispatch.is_plain_on_cpu(input):
        return None
    h0 = c0 = None
    if hx is not None:
        if not (isinstance(hx, (tuple, list)) and len(hx) == 2) or hx[0] is None or hx[1] is None:
            return None
        h0, c0 = hx
    x = input.transpose(0, 1) if batch_first else input
    try:
        train = _wants_gradient(x, h0, c0, *weights)
        if input.numel() > choice.small[train][dims == 2] and dispatch.is_torchs_faster(
            input, weights, num_layers, batch_first, bidirectional, train
        ):
            return _torchs_cell(input, weights, h0, c0) if dims == 2 else None
        if train:
            if num_layers < 1 or len(weights) % num_layers:
                return None
            if not all(t is None or t.is_cpu for t in (h0, c0, *weights)):  # meta tensors have an operator, too
                return None
            if dims == 2:
                hn, cn = autograd.step("cpu", "lstm", x, weights, h0, c0)
                return hn, (hn, cn)
            states = num_layers * (2 if bidirectional else 1)
            if not (h0 is None or c0 is None or len(h0) == len(c0) == states):
                return None
            x = x.contiguous()
            y, hn, cn, *_ = _stack("cpu", x, weights, h0, c0, num_layers, 0.0, bidirectional, None, None, False)
        else:
            y, hn, cn = ops.cpu_infer("lstm", x, weights, num_layers, bidirectional, h0, c0)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return error
    return y.transpose(0, 1) if batch_first else y, (hn, cn)


def _torchs_cell(
    input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """torch's own cell, which makes sure of shapes and dtypes by itself: it takes less than the questions would."""
    if h0 is None or c0 is None:
        h0 = c0 = input.new_zeros(len(input), weights[1].shape[1])
    hn, cn = _VF.lstm_cell(input, (h0, c0), *weights)
    return hn, (hn, cn)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Form(NamedTuple):
    """How an input is laid out, and how it is computed."""

    T: int
    B: int
    unbatched: bool = False
    batch_first: bool = False
    rows: bool = False  # of a PackedSequence
    batch_sizes: Tensor | None = None  # of the same, unless all of its sequences are as long
    padded: bool = False  # whether those are padded before they are computed
    packing: Packing | None = None  # how padded sequences of other lengths than T are packed before


def _form_of(input: Tensor, batch_first: bool, batch_sizes: Tensor | None) -> _Form:
    _check_input(input)
    if batch_sizes is not None:
        _check_packed(input, batch_sizes)
        if dispatch.is_recorded():
            B: Any = batch_sizes[0]  # a tensor, as sizes are in a trace
            return _Form(batch_sizes.shape[0], B, rows=True, batch_sizes=batch_sizes)
        sizes = _check_batch_sizes(input, batch_sizes)
        return _Form(len(sizes), sizes[0], rows=True, batch_sizes=batch_sizes if sizes[-1] < sizes[0] else None)
    if input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    if input.dim() == 2:
        return _Form(input.shape[0], 1, unbatched=True)
    if batch_first:
        return _Form(input.shape[1], input.shape[0], batch_first=True)
    return _Form(input.shape[0], input.shape[1])


def _check_input(input: Any) -> None:
    if isinstance(input, torch.fx.Proxy):
        raise TypeError(
            "input must be a Tensor, got Proxy: torch.fx traces into this module, whose class is a subclass, and an "
            "LSTM cannot be traced; make it a leaf, by a Tracer whose is_leaf_module returns True for it"
        )
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")


def _laid_in(input: Tensor, form: _Form) -> Tensor:
    """x as a layer takes it: [T, B, I], or packed rows, [N, I]."""
    if form.packing is not None:
        return form.packing.packed(input)
    if form.batch_sizes is not None:
        return pad_packed_sequence(PackedSequence(input, form.batch_sizes))[0] if form.padded else input
    if form.rows:  # packed and padded are the same rows in the same order
        return input.unflatten(0, (form.T, form.B))
    if form.unbatched:
        return input.unsqueeze(1)
    return input.transpose(0, 1) if form.batch_first else input


def _laid_out(y: Tensor, form: _Form) -> Tensor:
    """The inverse of `_laid_in`."""
    if form.packing is not None:
        return form.packing.padded(y)
    if form.batch_sizes is not None:
        return pack_padded_sequence(y, _packed_lengths(form)).data if form.padded else y
    if form.rows:
        return y.flatten(0, 1)
    if form.unbatched:
        return y.squeeze(1)
    return y.transpose(0, 1) if form.batch_first else y


_PACKING_FLOPS = 5e7  # of padding: where there is less, to pack takes longer than to compute it


def _packing(p: dispatch.Problem, num_layers: int, form: _Form, lengths: Tensor) -> Packing | None:
    """How to pack padded sequences, where that pays."""
    if not dispatch.is_eager():
        return None
    padding = p.T * p.B - int(lengths.sum())
    if padding == p.T * p.B or 8.0 * padding * num_layers * p.D * p.H * (p.I + p.P) < _PACKING_FLOPS:
        return None
    return Packing(lengths, p.T, form.batch_first)


def _in_order(
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    form: _Form,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """h0, c0, lengths and reset in the order in which the sequences are computed."""
    if form.batch_sizes is not None:
        return h0, c0, _packed_lengths(form).to(device), reset
    if form.packing is None:
        return h0, c0, lengths, reset
    h0, c0, reset = (None if t is None else t.index_select(1, form.packing.order) for t in (h0, c0, reset))
    return h0, c0, form.packing.lengths, None if reset is None else reset[: form.packing.steps]


def _in_order_again(hn: Tensor, cn: Tensor, form: _Form) -> tuple[Tensor, Tensor]:
    """The inverse of `_in_order`."""
    if form.packing is None:
        return hn, cn
    back = form.packing.order.argsort()
    return hn.index_select(1, back), cn.index_select(1, back)


def _packed_lengths(form: _Form) -> Tensor:
    """[B] int64 on the CPU."""
    assert form.batch_sizes is not None
    return (form.batch_sizes.unsqueeze(1) > torch.arange(form.B, device="cpu")).sum(0)


def _squeezed(hn: Tensor, cn: Tensor, form: _Form) -> tuple[Tensor, Tensor]:
    return (hn.squeeze(1), cn.squeeze(1)) if form.unbatched else (hn, cn)


def _stack(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The layers one after another: x [T, B, I] -> y [T, B, D*P], hn, cn [L*D, B, ...], and every layer's h and c.

    Of packed rows x is [N, I], and so are y, h and c.
    """
    if num_layers == 1:
        y, hn, cn, c = autograd.layer(backend, "lstm", x, weights, bidirectional, h0, c0, lengths, reset, cell_states)
        return y, hn, cn, [y], [c]
    count, D = len(weights) // num_layers, 2 if bidirectional else 1
    h0s, c0s = ([None] * num_layers if s is None else s.split(D) for s in (h0, c0))
    y, hns, cns, hs, cs = x, [], [], [], []
    for k in range(num_layers):
        if k > 0 and dropout > 0:
            y = torch.nn.functional.dropout(y, dropout)
        own = weights[k * count : (k + 1) * count]
        y, hn, cn, c = autograd.layer(
            backend, "lstm", y, own, bidirectional, h0s[k], c0s[k], lengths, reset, cell_states
        )
        hns.append(hn)
        cns.append(cn)
        hs.append(y)
        cs.append(c)
    return y, torch.cat(hns), torch.cat(cns), hs, cs


def _aten(
    input: Tensor,
    form: _Form,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own LSTM, which may not be given None for a state; y is laid out as the input is.

    It is told to be training wherever a gradient may be asked for: cuDNN keeps nothing for backward otherwise. A trace
    is run and not trained.
    """
    rows = num_layers * (2 if bidirectional else 1)
    count, P, H = len(weights) // rows, weights[1].shape[1], weights[1].shape[0] // 4
    h0, c0 = (input.new_zeros(rows, form.B, n) if s is None else s for s, n in ((h0, P), (c0, H)))
    training = dropout > 0 or (torch.is_grad_enabled() and not torch.jit.is_tracing())

    def torchs(input: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options = ((h0, c0), list(weights), count >= 4, num_layers, float(dropout), training, bidirectional)
        if form.batch_sizes is not None:
            return _VF.lstm(input, form.batch_sizes, *options)
        y, hn, cn = _VF.lstm(_laid_in(input, form), *options, False)
        return _laid_out(y, form), hn, cn

    tensors = (input, h0, c0, *weights)
    random = dropout > 0 and num_layers > 1  # what cuDNN dropped cannot be dropped again
    wanted = dispatch.is_eager() and not random and _wants_gradient(*tensors)
    if not (wanted and _lacks_second_derivative(input)):
        return torchs(*tensors)
    return differentiable_twice(torchs, partial(_by_reference, form, num_layers, bidirectional), tensors)


def _lacks_second_derivative(input: Tensor) -> bool:
    """Whether torch's own LSTM has none here: cuDNN's has not."""
    return input.is_cuda


def _by_reference(
    form: _Form, num_layers: int, bidirectional: bool, input: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_aten` computes, without dropout, by operators that have derivatives of every order."""
    form = form._replace(padded=True)
    h0_in, c0_in, lengths, _ = _in_order(h0, c0, None, None, form, input.device)
    x = _laid_in(input, form)
    y, hn, cn, *_ = _stack("reference", x, weights, h0_in, c0_in, num_layers, 0.0, bidirectional, lengths, None, False)
    return _laid_out(y, form), hn, cn


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """What autocast does: it leaves float64, and what is not floating point, as it is."""
    return [t if t is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype) for t in tensors]


def _cast_weights(dtype: torch.dtype, weights: Sequence[Tensor]) -> list[Any]:
    """The same for weights: autocast keeps its copy of each until it is left, and so do all the calls until then."""
    if not dispatch.is_eager() or not torch.is_autocast_cache_enabled() or torch.is_inference_mode_enabled():
        return _cast(dtype, *weights)
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # they say what is kept
        return _cast(dtype, *weights)
    return [_autocast_copy(dtype, w) if _has_autocast_copy(dtype, w) else _cast(dtype, w)[0] for w in weights]


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


def _split_hx(hx: Sequence[Tensor] | None, caller: str) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple or a list of two Tensors (h_0, c_0), got {type(hx).__name__}")
    if len(hx) < 2:
        _check_two(hx, caller)
    for index, state in enumerate(hx):
        if not isinstance(state, Tensor):
            raise TypeError(f"hx[{index}] must be a Tensor, got {type(state).__name__}")
    return hx[0], hx[1]


def _check_two(hx: Sequence[Tensor] | None, caller: str) -> None:
    if hx is not None and len(hx) != 2:
        raise RuntimeError(f"{caller} expects two hidden states, hx = (h_0, c_0), got {len(hx)}")


def _check_hx_dims(h0: Tensor | None, c0: Tensor | None, form: _Form) -> None:
    dims = 2 if form.unbatched else 3
    if h0 is not None and c0 is not None and (h0.dim() != dims or c0.dim() != dims):
        raise RuntimeError(
            f"For {'unbatched 2-D' if form.unbatched else 'batched 3-D'} input, hx and cx should "
            f"also be {dims}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
        )


def _check_cell_hx_dims(h: Tensor, c: Tensor, dims: int, hx: Any) -> None:
    for index, state in enumerate((h, c)):
        if state.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
    _check_two(hx, "lstm_cell")
    if h.dim() != dims or c.dim() != dims:
        raise RuntimeError(
            f"hx must be {dims}-D as input is, but got ({h.dim()}-D, {c.dim()}-D) tensors for ({dims}-D)"
        )


def _check_cell_hx_sizes(h: Tensor, c: Tensor, B: int, H: int) -> None:
    for index, state in enumerate((h, c)):
        if state.shape[0] != B:
            raise RuntimeError(f"Input batch size {B} doesn't match hidden{index} batch size {state.shape[0]}")
        if state.shape[1] != H:
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {H}")


def _check_packed(data: Tensor, batch_sizes: Tensor) -> None:
    """A PackedSequence may have been built by hand: its parts have to fit each other."""
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"batch_sizes must be a Tensor, got {type(batch_sizes).__name__}")
    if batch_sizes.dtype != torch.int64:
        raise TypeError(f"batch_sizes must be int64, got {batch_sizes.dtype}")
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes must be on the CPU, got {batch_sizes.device}")
    if batch_sizes.dim() != 1 or len(batch_sizes) == 0:
        raise RuntimeError(f"batch_sizes must have one entry per time step, got shape {list(batch_sizes.shape)}")
    if data.dim() != 2:
        raise RuntimeError(f"data of a PackedSequence must have 2 dimensions, got {data.dim()}")


def _check_batch_sizes(data: Tensor, batch_sizes: Tensor) -> list[int]:
    batch_sizes[0].item()  # raises inside of make_fx, to which tolist would give the values of its example
    sizes = batch_sizes.tolist()
    if sizes[-1] <= 0 or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(f"batch_sizes must be positive and never grow, got {sizes}")
    if sum(sizes) != len(data):
        raise RuntimeError(f"batch_sizes must add up to the {len(data)} rows of data, got {sum(sizes)}")
    return sizes


def _check_options(weights: Sequence[Tensor], num_layers: int, D: int, dropout: float) -> None:
    """What a module has made sure of before it comes here."""
    if num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in 0..1, got {dropout}")
    for k, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{k}] must be a Tensor, got {type(weight).__name__}")
    count, rest = divmod(len(weights), num_layers * D)
    if rest or count not in (2, 3, 4, 5):
        raise ValueError(
            f"weights must hold 2 to 5 tensors for each of {num_layers} layers and {D} directions, got {len(weights)}"
        )
    for k in (0, 1):
        if weights[k].dim() != 2:
            raise ValueError(f"weights[{k}] must be 2-D, got {weights[k].dim()}-D")


def _check_weights(weights: Sequence[Tensor], num_layers: int, D: int, I: int) -> None:
    count = len(weights) // (num_layers * D)
    H, P = weights[1].shape[0] // 4, weights[1].shape[1]
    biases = [(4 * H,), (4 * H,)] if count >= 4 else []
    projection = [(P, H)] if count in (3, 5) else []
    for layer in range(num_layers):
        w_ih = (4 * H, I if layer == 0 else D * P)
        shapes = [w_ih, (4 * H, P if projection else H), *biases, *projection] * D
        for k, shape in enumerate(shapes, layer * len(shapes)):
            if weights[k].shape != shape:
                raise ValueError(f"weights[{k}] must have shape {list(shape)}, got {list(weights[k].shape)}")


def _are_alike(input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> bool:
    device, dtype = input.device, input.dtype
    return all(t is None or (t.device == device and t.dtype == dtype) for t in (h0, c0, *weights))


def _named(weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> list[tuple[str, Tensor]]:
    states = [(f"hx[{k}]", state) for k, state in enumerate((h0, c0)) if state is not None]
    return states + [(f"weights[{k}]", weight) for k, weight in enumerate(weights)]


def _check_devices(input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> None:
    device = input.device
    for name, tensor in _named(weights, h0, c0):
        if tensor.device != device:
            kind = "hidden" if name.startswith("hx") else "parameter"
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, found input tensor at {device} and "
                f"{kind} tensor at {tensor.device} ({name})"
            )


def _check_dtypes(input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> None:
    dtype = weights[0].dtype
    for name, tensor in [("input", input), *_named(weights, h0, c0)]:
        if tensor.dtype != dtype:
            raise RuntimeError(f"{name} must have the dtype of the weights, {dtype}, got {tensor.dtype}")


def _check_lengths(lengths: Tensor, form: _Form, device: torch.device) -> Tensor:
    if form.unbatched:
        raise ValueError("lengths must be None for unbatched input: a [T, I] input is one sequence of length T")
    if form.rows:
        raise ValueError("lengths must be None for packed input: its batch_sizes say how long each sequence is")
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths must be int64 or int32, got {lengths.dtype}")
    if lengths.shape != (form.B,):
        raise ValueError(f"lengths must have shape [{form.B}], one length per sequence, got {list(lengths.shape)}")
    if lengths.device != device:
        raise RuntimeError(f"lengths must be on the device of input, {device}, got {lengths.device}")
    if form.B > 0 and device.type == "cpu" and not dispatch.is_recorded():
        low, high = lengths.min(), lengths.max()
        if low < 0 or high > form.T:
            raise ValueError(f"lengths must be in 0..{form.T}, the number of time steps, got {int(low)}..{int(high)}")
    return lengths.to(torch.int64)


def _check_reset(reset: Tensor, form: _Form, device: torch.device) -> Tensor:
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a Tensor, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be bool, got {reset.dtype}")
    expected = (form.T,) if form.unbatched else (form.B, form.T) if form.batch_first else (form.T, form.B)
    if reset.shape != expected:
        raise ValueError(f"reset must have shape {list(expected)}, as input is laid out, got {list(reset.shape)}")
    if reset.device != device:
        raise RuntimeError(f"reset must be on the device of input, {device}, got {reset.device}")
    if form.unbatched:
        return reset.unsqueeze(1)
    return reset.transpose(0, 1) if form.batch_first else reset
