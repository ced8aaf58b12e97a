"""LSTM and LSTMCell as modules: nn.LSTM's constructor, parameters, state_dict and packing. No arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import dispatch
from .functional import LSTMStates, lstm, lstm_cell


class _LSTMForward(nn.RNNBase):
    """What `LSTM` and `CompilableLSTM` share: everything but the class they are an instance of.

    The weights are read from the module's attributes at every forward, never from a list kept aside, so that weights
    replaced by parametrizations, weight dropping or functional_call are the ones that are used and that get gradients.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """torch.nn.LSTM's forward, with more to ask for.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), without B for unbatched input; zeros by default.
            lengths: [B] int64 or int32, each in 0..T; see `fusedrnn.functional.lstm`. An error with a PackedSequence,
                which has lengths of its own.
            reset: [T, B] bool ([B, T] with batch_first, [T] unbatched); where true, the state entering step t is
                zero. With a PackedSequence it is [T, B], T the longest length and B in the order before packing.
            return_states: also return an `LSTMStates` with every h_t and c_t of every layer.

        Returns:
            (output, (h_n, c_n)) as torch.nn.LSTM; with return_states (output, (h_n, c_n), states).

        Raises:
            ValueError, RuntimeError, TypeError: as `fusedrnn.functional.lstm`.
        """
        if not isinstance(input, PackedSequence):
            return self._lstm(input, None, hx, lengths, reset, return_states)
        if lengths is not None:
            raise ValueError(
                "lengths must be None when input is a PackedSequence: its batch_sizes already say how long each "
                "sequence is; pass lengths with padded input instead"
            )
        return self._forward_packed(input, hx, reset, return_states)

    def _lstm(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        hx: Sequence[Tensor] | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        return_states: bool,
    ) -> Any:
        return lstm(
            input,
            _weights(self, [name for names in self._all_weights for name in names]),
            hx,
            num_layers=self.num_layers,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset=reset,
            return_states=return_states,
        )

    def _forward_packed(
        self, input: PackedSequence, hx: Sequence[Tensor] | None, reset: Tensor | None, return_states: bool
    ) -> Any:
        """hx, reset and the states returned are in the order before packing, of which functional.lstm knows nothing."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if not dispatch.is_recorded():
            _check_indices("sorted_indices", sorted_indices, batch_sizes)
            _check_indices("unsorted_indices", unsorted_indices, batch_sizes)
        if unsorted_indices is None and sorted_indices is not None:
            unsorted_indices = torch.empty_like(sorted_indices).scatter_(
                0, sorted_indices, torch.arange(len(sorted_indices), device=sorted_indices.device)
            )
        if sorted_indices is not None:
            if hx is not None:
                _check_packed_hx(hx, len(sorted_indices))
                hx = self.permute_hidden(hx, sorted_indices)
            if reset is not None:
                _check_packed_reset(reset, len(batch_sizes), len(sorted_indices))
                reset = reset.index_select(1, sorted_indices)

        def pack(rows: Tensor) -> PackedSequence:
            return PackedSequence(rows, batch_sizes, sorted_indices, input.unsorted_indices)

        output, state, *states = self._lstm(data, batch_sizes, hx, None, reset, return_states)
        state = self.permute_hidden(state, unsorted_indices)
        if not return_states:
            return pack(output), state
        h, c = (tuple(pack(rows) for rows in part) for part in states[0])
        return h[-1], state, LSTMStates(h, c)  # type: ignore[arg-type]

    # nn.LSTM's own methods, which a class that is not an nn.LSTM has to be given.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden


class LSTM(_LSTMForward, nn.LSTM):
    """Drop-in for torch.nn.LSTM: its constructor, attributes, parameters, state_dict, inputs, outputs and errors.

    `isinstance(module, torch.nn.LSTM)` holds. torch.compile breaks the graph at every nn.LSTM; use `CompilableLSTM`,
    or `fusedrnn.convert(model, compilable=True)`, where a whole graph is wanted.

    Args: torch.nn.LSTM's, positional or by keyword: input_size, hidden_size, num_layers, bias, batch_first, dropout,
    bidirectional, proj_size, device, dtype. Raises what torch.nn.LSTM raises.
    """


class CompilableLSTM(_LSTMForward):
    """`LSTM` for torch.compile(fullgraph=True) and torch.export: the same in everything, but not an nn.LSTM.

    Dynamo refuses to trace whatever is an instance of nn.LSTM. This class derives from nn.RNNBase directly; state_dicts
    and parameters are interchangeable with `LSTM` and torch.nn.LSTM.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class LSTMCell(nn.LSTMCell):
    """Drop-in for torch.nn.LSTMCell, by the same kernels as `LSTM`.

    Args: torch.nn.LSTMCell's, positional or by keyword: input_size, hidden_size, bias, device, dtype.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: tuple[Tensor, Tensor] | Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step: input [B, I] or [I], hx (h [B, H], c [B, H]) or zeros -> (h', c'); see `functional.lstm_cell`."""
        return lstm_cell(input, hx, *_weights(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))


def _weights(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """What getattr(module, name) is for each of the names; nn.Module takes microseconds to find a parameter, and a
    single step feels them."""
    own, parameters = module.__dict__, module._parameters
    weights = []
    for name in names:
        weight = own.get(name)
        if weight is None:
            weight = parameters.get(name)
        weights.append(getattr(module, name) if weight is None else weight)
    return weights


def _check_indices(name: str, indices: Tensor | None, batch_sizes: Tensor) -> None:
    if indices is None or batch_sizes.dim() != 1 or len(batch_sizes) == 0:  # the latter is an error further on
        return
    B = int(batch_sizes[0])
    if indices.shape != (B,):
        raise RuntimeError(f"{name} of a PackedSequence must have shape [{B}], got {list(indices.shape)}")
    # Elsewhere than on the CPU a look at the values would wait for the device.
    if indices.device.type == "cpu" and sorted(indices.tolist()) != list(range(B)):
        raise RuntimeError(f"{name} of a PackedSequence must be a permutation of 0..{B - 1}, got {indices.tolist()}")


def _check_packed_hx(hx: Any, B: int) -> None:
    """Before hx is permuted, which is done to two of them only and would drop the rest of one that is too long."""
    if not isinstance(hx, (tuple, list)) or not all(isinstance(state, Tensor) for state in hx):
        raise TypeError(f"hx must be a tuple or a list of two Tensors (h_0, c_0), got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"lstm expects two hidden states, hx = (h_0, c_0), got {len(hx)}")
    for index, state in enumerate(hx):
        if state.dim() != 3 or state.shape[1] != B:
            raise RuntimeError(
                f"hx[{index}] must be [L*D, {B}, ...] for a PackedSequence of {B} sequences, got {list(state.shape)}"
            )


def _check_packed_reset(reset: Tensor, T: int, B: int) -> None:
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a Tensor, got {type(reset).__name__}")
    if reset.shape != (T, B):
        raise ValueError(f"reset must have shape {[T, B]} for this PackedSequence, got {list(reset.shape)}")
