"""The layers and cells as functions of their weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import forward
from .cells import GRU, LSTM, RNNS, Cell, lstm_variant
from .forward import LSTMStates, RNNStates
from .noise import noise_of

__all__ = ["LSTMStates", "RNNStates", "gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]


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
    peephole: bool = False,
    coupled: bool = False,
    zoneout: float | tuple[float, float] = 0.0,
    recurrent_dropout: float = 0.0,
    recurrent_dropout_mode: str = "candidate",
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], LSTMStates]:
    """A stack of LSTM layers over whole sequences (equations: torch.nn.LSTM, docs/math.md).

    Args:
        input: [T, B, I], or [B, T, I] with batch_first, or [T, I] unbatched, or with `batch_sizes` the data [N, I] of a
            PackedSequence; T > 0, B may be 0. float64, float32, bfloat16 or float16, the dtype of the weights unless
            autocast is on.
        weights: the tensors of nn.LSTM's state_dict in its order: for each layer and direction w_ih [4H, I or D*P],
            w_hh [4H, P], then b_ih [4H] and b_hh [4H] if there are biases, then w_hr [P, H] if there is a projection.
        hx: (h0 [L*D, B, P], c0 [L*D, B, H]), without B for unbatched input, or None for zeros.
        num_layers: L.
        batch_first: input, output, `reset` and the states of `return_states` have B before T; hx never does.
        dropout: probability to zero an element of the output of each layer but the last, if training.
        training: whether dropout is applied.
        bidirectional: D = 2, every layer has a reverse direction.
        batch_sizes: [T] int64 on the CPU, if input is the data of a PackedSequence: the number of sequences at each
            step, which are sorted by decreasing length. T is its length and B its first element. Output and states
            then have [N, ...] instead of [T, B, ...]; hx and reset are in the sorted order.
        lengths: [B] int64 or int32 on input's device, each in 0..T: step t of sequence b exists if t < lengths[b].
            Padding is never read, and the output is zero there. h_n and c_n are the states after the last step of each
            sequence, or hx if its length is 0; the reverse direction starts at the last step. No host synchronisation:
            values outside 0..T raise on the CPU and are clamped elsewhere, and where torch.func.vmap batches lengths.
        reset: [T, B] bool ([B, T] with batch_first, [T] unbatched) on input's device: where true, the state that
            enters step t is zero, in every layer and in both directions.
        return_states: also return every state of every layer.
        peephole: the last of the weights of each direction are peepholes, [3H] in the order i, f, o.
        coupled: f = 1 - i: weights and biases have 3H rows, gates in the order i, g, o, and peepholes are [2H]: i, o.
        zoneout, recurrent_dropout, recurrent_dropout_mode: see `fusedrnn.LSTM`; if not training, zoneout takes its
            expectation, and nothing is dropped.

    Returns:
        output [T, B, D*P] (or as input is laid out) and (h_n [L*D, B, P], c_n [L*D, B, H]); with return_states an
        `LSTMStates` as well.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError, RuntimeError: a wrong shape, dtype, value or device, with nn.LSTM's exception type and wording
            where it has the same check. RuntimeError also if the requested backend cannot compute the call.

    Example:
        >>> from fusedrnn import functional as F
        >>> x, weights = torch.randn(7, 3, 4), list(nn.LSTM(4, 8).parameters())
        >>> y, (hn, cn) = F.lstm(x, weights, lengths=torch.tensor([7, 2, 0]))
        >>> y.shape, hn.shape, y[2:, 1].count_nonzero().item()
        (torch.Size([7, 3, 8]), torch.Size([1, 3, 8]), 0)
    """
    cell, noise = LSTM, None
    if peephole or coupled:
        cell = lstm_variant(peephole, coupled)
    if zoneout or recurrent_dropout:
        projected = len(weights) // max(num_layers, 1) // (2 if bidirectional else 1) - peephole in (3, 5)
        noise = noise_of(zoneout, recurrent_dropout, recurrent_dropout_mode, projected)
    return forward.layers(
        cell,
        input,
        weights,
        hx,
        num_layers,
        batch_first,
        dropout,
        training,
        bidirectional,
        batch_sizes,
        lengths,
        reset,
        return_states,
        noise,
    )


def gru(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
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
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, RNNStates]:
    """A stack of GRU layers over whole sequences (equations: torch.nn.GRU, fusedrnn/cells/gru.py).

    Args:
        input: as of `lstm`.
        weights: the tensors of nn.GRU's state_dict in its order: for each layer and direction w_ih [3H, I or D*H],
            w_hh [3H, H], then b_ih [3H] and b_hh [3H] if there are biases; gates in the order r, z, n.
        hx: h0 [L*D, B, H], without B for unbatched input, or None for zeros. A tensor, no tuple: there is no c0.
        num_layers, batch_first, dropout, training, bidirectional, batch_sizes, lengths, reset, return_states: as of
            `lstm`.

    Returns:
        output [T, B, D*H] (or as input is laid out) and h_n [L*D, B, H]; with return_states an `RNNStates` as well.

    Raises:
        TypeError: an argument is not of its type. If that is hx, the error is an AttributeError too, as nn.GRU's is.
        ValueError, RuntimeError: as `lstm`; with the wording of nn.GRU.
    """
    return forward.layers(
        GRU,
        input,
        weights,
        hx,
        num_layers,
        batch_first,
        dropout,
        training,
        bidirectional,
        batch_sizes,
        lengths,
        reset,
        return_states,
    )


def rnn(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, RNNStates]:
    """A stack of plain recurrent layers over whole sequences (equations: torch.nn.RNN, fusedrnn/cells/rnn.py).

    Args:
        input: as of `lstm`.
        weights: the tensors of nn.RNN's state_dict in its order: for each layer and direction w_ih [H, I or D*H],
            w_hh [H, H], then b_ih [H] and b_hh [H] if there are biases.
        hx: h0 [L*D, B, H], without B for unbatched input, or None for zeros. A tensor, no tuple: there is no c0.
        nonlinearity: "tanh" or "relu".
        num_layers, batch_first, dropout, training, bidirectional, batch_sizes, lengths, reset, return_states: as of
            `lstm`.

    Returns:
        output [T, B, D*H] (or as input is laid out) and h_n [L*D, B, H]; with return_states an `RNNStates` as well.

    Raises:
        TypeError: an argument is not of its type. If that is hx, the error is an AttributeError too, as nn.RNN's is.
        ValueError, RuntimeError: as `lstm`; with the wording of nn.RNN.
    """
    return forward.layers(
        _rnn(nonlinearity),
        input,
        weights,
        hx,
        num_layers,
        batch_first,
        dropout,
        training,
        bidirectional,
        batch_sizes,
        lengths,
        reset,
        return_states,
    )


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_peephole: Tensor | None = None,
    coupled: bool = False,
) -> tuple[Tensor, Tensor]:
    """One time step (torch.nn.LSTMCell).

    Args:
        input: [B, I], or [I] unbatched; B may be 0.
        hx: (h [B, H], c [B, H]), without B for unbatched input, or None for zeros.
        w_ih, w_hh, b_ih, b_hh: [4H, I], [4H, H], [4H] and [4H], gates in the order i, f, g, o; both biases or none.
        w_peephole: [3H] in the order i, f, o, or None.
        coupled: f = 1 - i: weights and biases have 3H rows, gates in the order i, g, o, and peepholes are [2H]: i, o.

    Returns:
        (h' [B, H], c' [B, H]), without B for unbatched input. Under autocast on the CPU they are of the wider of the
        autocast dtype and that of c (of input if hx is None), as nn.LSTMCell's are.

    Raises:
        TypeError, ValueError, RuntimeError: as `lstm`.
    """
    cell = lstm_variant(w_peephole is not None, coupled) if w_peephole is not None or coupled else LSTM
    return forward.step(cell, input, hx, w_ih, w_hh, b_ih, b_hh, w_peephole)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One time step (torch.nn.GRUCell).

    Args:
        input: [B, I], or [I] unbatched; B may be 0.
        hx: h [B, H], without B for unbatched input, or None for zeros.
        w_ih, w_hh, b_ih, b_hh: [3H, I], [3H, H], [3H] and [3H], gates in the order r, z, n; both biases or none.

    Returns:
        h' [B, H], without B for unbatched input. Under autocast on the CPU it is of the wider of the autocast dtype
        and that of h (of input if hx is None), as nn.GRUCell's is.

    Raises:
        TypeError, ValueError, RuntimeError: as `gru`.

    Example:
        >>> from fusedrnn import functional as F
        >>> F.gru_cell(torch.randn(3, 4), torch.zeros(3, 8), *nn.GRUCell(4, 8).parameters()).shape
        torch.Size([3, 8])
    """
    return forward.step(GRU, input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One time step (torch.nn.RNNCell).

    Args:
        input: [B, I], or [I] unbatched; B may be 0.
        hx: h [B, H], without B for unbatched input, or None for zeros.
        w_ih, w_hh, b_ih, b_hh: [H, I], [H, H], [H] and [H]; both biases or none.
        nonlinearity: "tanh" or "relu".

    Returns:
        h' [B, H], without B for unbatched input. Under autocast it is of the autocast dtype, as nn.RNNCell's is.

    Raises:
        TypeError, ValueError, RuntimeError: as `rnn`.
    """
    return forward.step(_rnn(nonlinearity), input, hx, w_ih, w_hh, b_ih, b_hh)


def _rnn(nonlinearity: str) -> Cell:
    if nonlinearity not in RNNS:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return RNNS[nonlinearity]
