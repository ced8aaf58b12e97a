"""lstm and lstm_cell as functions: validate, normalise the shapes, dispatch once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .autograd import lstm_layer

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
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], LSTMStates]:
    """A stack of LSTM layers over whole sequences (equations: torch.nn.LSTM, docs/lstm_math.md).

    Args:
        input: [T, B, I], or [B, T, I] with batch_first, or [T, I] unbatched; T > 0, B may be 0. float64, float32,
            bfloat16 or float16, the dtype of the weights unless autocast is on.
        weights: the tensors of nn.LSTM's state_dict in its order: for each layer and direction w_ih [4H, I or D*P],
            w_hh [4H, P], then b_ih [4H] and b_hh [4H] if there are biases, then w_hr [P, H] if there is a projection.
        hx: (h0 [L*D, B, P], c0 [L*D, B, H]), without B for unbatched input, or None for zeros.
        num_layers: L.
        batch_first: input, output, `reset` and the states of `return_states` carry B before T; hx never does.
        dropout: probability to zero an element of the output of each layer but the last, if training.
        training: whether dropout is applied.
        bidirectional: D is 2, every layer has a second direction that runs from the end.
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
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batched = input.dim() == 3
    h0, c0 = _split_hx(hx)
    if h0 is not None and c0 is not None:
        _check_dims(h0, c0, batched)
    D = 2 if bidirectional else 1
    _check_options(weights, num_layers, D, dropout)
    autocast_dtype = dispatch.autocast_dtype(input.device)
    if autocast_dtype is not None:
        input, h0, c0, *weights = _cast(autocast_dtype, input, h0, c0, *weights)
    elif input.dtype != weights[0].dtype:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weights[0].dtype}). "
            f"Convert input: input.to({weights[0].dtype}), or convert model: model.to({input.dtype})"
        )
    if not batched:
        input = input.unsqueeze(1)
        h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
    elif batch_first:
        input = input.transpose(0, 1)
    T, B, I = input.shape
    H, P = weights[1].shape[0] // 4, weights[1].shape[1]
    if weights[0].shape[1] != I:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {weights[0].shape[1]}, got {I}")
    for index, (state, size) in enumerate(((h0, (num_layers * D, B, P)), (c0, (num_layers * D, B, H)))):
        if state is not None and state.shape != size:
            raise RuntimeError(f"Expected hidden[{index}] size {size}, got {list(state.shape)}")
    _check_two(hx, "lstm")
    _check_alike(input, weights, h0, c0)
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    _check_weights(weights, num_layers, D, I)
    if lengths is not None:
        lengths = _check_lengths(lengths, T, B, batched, input.device)
    if reset is not None:
        reset = _check_reset(reset, T, B, batched, batch_first, input.device)

    backend = dispatch.select(
        dispatch.Problem(
            input.device.type, input.dtype, T, B, I, H, P, D, lengths is not None, reset is not None, return_states
        )
    )
    if backend == "aten":
        return _aten(input, weights, h0, c0, num_layers, dropout, training, bidirectional, batched, batch_first)

    count = len(weights) // num_layers
    y, hns, cns, hs, cs = input, [], [], [], []
    for k in range(num_layers):
        if k > 0 and training and dropout > 0:
            y = torch.nn.functional.dropout(y, dropout)
        y, hn, cn, c = lstm_layer(
            backend,
            y,
            weights[k * count : (k + 1) * count],
            bidirectional,
            None if h0 is None else h0[k * D : (k + 1) * D],
            None if c0 is None else c0[k * D : (k + 1) * D],
            lengths,
            reset,
            return_states,
        )
        hns.append(hn)
        cns.append(cn)
        hs.append(y)
        cs.append(c)
    hn, cn = (s[0] if num_layers == 1 else torch.cat(s) for s in (hns, cns))
    if not batched:
        hn, cn = hn.squeeze(1), cn.squeeze(1)
    state = (hn, cn)
    if not return_states:
        return _like_input(y, batched, batch_first), state
    states = LSTMStates(*(tuple(_like_input(s, batched, batch_first) for s in part) for part in (hs, cs)))
    return states.h[-1], state, states


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
        (h' [B, H], c' [B, H]), without B for unbatched input. Under autocast on the CPU the state keeps the dtype of
        hx (of input if hx is None), as nn.LSTMCell's does.

    Raises:
        TypeError, ValueError, RuntimeError: as `lstm`.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    batched = input.dim() == 2
    h, c = _split_pair(hx)
    for index, state in enumerate((h, c)):
        if state is not None and state.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
    if h is not None and c is not None and (h.dim() == 2, c.dim() == 2) != (batched, batched):
        raise RuntimeError(
            f"hx must be {input.dim()}-D as input is, but got ({h.dim()}-D, {c.dim()}-D) tensors for ({input.dim()}-D)"
        )
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    state_dtype = None
    if torch.is_autocast_enabled(input.device.type):
        if input.device.type == "cpu":
            state_dtype = input.dtype if h is None else h.dtype
            input, h, c = (None if s is None else s.to(w_ih.dtype) for s in (input, h, c))
        else:
            input, h, c, *weights = _autocast((input, h, c, *weights))
    if not batched:
        input, h, c = (None if s is None else s.unsqueeze(0) for s in (input, h, c))
    B, I = input.shape
    H = w_hh.shape[1]
    if w_ih.shape[1] != I:
        raise RuntimeError(f"input has inconsistent input_size: got {I} expected {w_ih.shape[1]}")
    for index, state in enumerate((h, c)):
        if state is not None and state.shape[0] != B:
            raise RuntimeError(f"Input batch size {B} doesn't match hidden{index} batch size {state.shape[0]}")
        if state is not None and state.shape[1] != H:
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {H}")
    _check_alike(input, weights, h, c)

    backend = dispatch.select(dispatch.Problem(input.device.type, input.dtype, 1, B, I, H, H, 1))
    if backend == "aten":
        h, c = (input.new_zeros(B, H) if s is None else s for s in (h, c))
        hn, cn = _VF.lstm_cell(input, (h, c), *weights)
    else:
        h, c = (None if s is None else s.unsqueeze(0) for s in (h, c))
        _, hn, cn, _ = lstm_layer(backend, input.unsqueeze(0), weights, False, h, c, None, None, False)
        hn, cn = hn[0], cn[0]
    if state_dtype is not None:
        hn, cn = hn.to(state_dtype), cn.to(state_dtype)
    return (hn, cn) if batched else (hn[0], cn[0])


def _split_pair(hx: Sequence[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple or a list of two Tensors (h_0, c_0), got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"lstm expects two hidden states, hx = (h_0, c_0), got {len(hx)}")
    for index, state in enumerate(hx):
        if not isinstance(state, Tensor):
            raise TypeError(f"hx[{index}] must be a Tensor, got {type(state).__name__}")
    return hx[0], hx[1]


def _split_hx(hx: Sequence[Tensor] | None, batched: bool) -> tuple[Tensor | None, Tensor | None]:
    h0, c0 = _split_pair(hx)
    if h0 is not None and c0 is not None:
        dims = 3 if batched else 2
        if h0.dim() != dims or c0.dim() != dims:
            raise RuntimeError(
                f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should "
                f"also be {dims}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
            )
    return h0, c0


def _autocast(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """What autocast does to the arguments of nn.LSTM: all but float64 become the autocast dtype."""
    assert tensors[0] is not None
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    cast = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
    return list(cast)  # type: ignore[arg-type]


def _check_alike(input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> None:
    named = [("hx[0]", h0), ("hx[1]", c0), *((f"weights[{k}]", weight) for k, weight in enumerate(weights))]
    for name, tensor in named:
        if tensor is None:
            continue
        if tensor.device != input.device:
            kind = "hidden" if name.startswith("hx") else "parameter"
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, found input tensor at {input.device} and "
                f"{kind} tensor {name} at {tensor.device}"
            )
        if tensor.dtype != input.dtype:
            raise RuntimeError(f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}")


def _check_lengths(lengths: Tensor, T: int, B: int, device: torch.device) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths must be int64 or int32, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths must have shape [{B}], one length per sequence, got {list(lengths.shape)}")
    if lengths.device != device:
        raise RuntimeError(f"lengths must be on the device of input, {device}, got {lengths.device}")
    if B > 0 and device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = lengths.min(), lengths.max()
        if low < 0 or high > T:
            raise ValueError(f"lengths must be in 0..{T}, the number of time steps, got {int(low)}..{int(high)}")
    return lengths.to(torch.int64)


def _check_reset(reset: Tensor, T: int, B: int, batched: bool, batch_first: bool, device: torch.device) -> Tensor:
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a Tensor, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be bool, got {reset.dtype}")
    expected = (T,) if not batched else (B, T) if batch_first else (T, B)
    if reset.shape != expected:
        raise ValueError(f"reset must have shape {list(expected)}, as input is laid out, got {list(reset.shape)}")
    if reset.device != device:
        raise RuntimeError(f"reset must be on the device of input, {device}, got {reset.device}")
    if not batched:
        return reset.unsqueeze(1)
    return reset.transpose(0, 1) if batch_first else reset


def _like_input(y: Tensor, batched: bool, batch_first: bool) -> Tensor:
    if not batched:
        return y.squeeze(1)
    return y.transpose(0, 1) if batch_first else y


def _aten(
    input: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batched: bool,
    batch_first: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """torch's own LSTM, on time-major input; it may not be given None for a state."""
    count = len(weights) // (num_layers * (2 if bidirectional else 1))
    B, P, H = input.shape[1], weights[1].shape[1], weights[1].shape[0] // 4
    rows = num_layers * (2 if bidirectional else 1)
    hx = tuple(input.new_zeros(rows, B, n) if s is None else s for s, n in ((h0, P), (c0, H)))
    y, hn, cn = _VF.lstm(
        input, hx, list(weights), count >= 4, num_layers, float(dropout), training, bidirectional, False
    )
    if not batched:
        hn, cn = hn.squeeze(1), cn.squeeze(1)
    return _like_input(y, batched, batch_first), (hn, cn)
