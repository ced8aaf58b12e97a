"""LSTM and LSTMCell as modules: nn.LSTM's constructor, parameters, state_dict and packing. No arithmetic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, wraps
from operator import is_
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, ops
from .functional import LSTMStates, lstm, lstm_cell


def _with_signature_of(function: Any) -> Any:
    return wraps(function)


class _LSTMForward(nn.RNNBase):
    """What `LSTM` and `CompilableLSTM` share: everything but the class they are an instance of.

    The weights are read at every forward, see `_lstm_weights`, so that those replaced by parametrizations, weight
    dropping, adapters or functional_call are the ones that are used and that get gradients.
    """

    @_with_signature_of(nn.LSTM.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mark_as_leaf(self)

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
        cls = type(self)
        if cls is LSTM or cls is CompilableLSTM or _is_plain(cls):
            weights = _listed_weights(self)
        else:
            if batch_sizes is None and _overrides(cls, *_CHECKS):
                self._check_padded(input, hx)
            weights = _lstm_weights(self)
        return lstm(
            input,
            weights,
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

    def _check_padded(self, input: Tensor, hx: Sequence[Tensor] | None) -> None:
        """Calls `check_forward_args`, of which a class has overridden a part, as nn.LSTM does: with batched tensors."""
        if not isinstance(input, Tensor) or input.dim() not in (2, 3):
            return  # an error further on
        batch_dim = 0 if self.batch_first else 1
        unbatched, rows = input.dim() == 2, self.num_layers * (2 if self.bidirectional else 1)
        if hx is None:
            B = 1 if unbatched else input.shape[batch_dim]
            hx = tuple(
                input.new_zeros(rows, B, size) for size in (self.proj_size or self.hidden_size, self.hidden_size)
            )
        elif not isinstance(hx, (tuple, list)) or any(s.dim() != input.dim() for s in hx):
            return  # the same
        elif unbatched:
            hx = tuple(s.unsqueeze(1) for s in hx)
        self.check_forward_args(input.unsqueeze(batch_dim) if unbatched else input, hx, None)

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

    def __prepare_scriptable__(self) -> NoReturn:
        _refuse_script(self)


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

    @_with_signature_of(nn.LSTMCell.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mark_as_leaf(self)

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: tuple[Tensor, Tensor] | Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step: input [B, I] or [I], hx (h [B, H], c [B, H]) or zeros -> (h', c'); see `functional.lstm_cell`."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        if type(self) is LSTMCell or _is_plain(type(self)):
            return lstm_cell(input, hx, *_parameters(self, names))
        return lstm_cell(input, hx, *(getattr(self, name) for name in names))

    def __prepare_scriptable__(self) -> NoReturn:
        _refuse_script(self)


def mark_as_leaf(module: nn.Module) -> None:
    """Makes torch.fx call the module instead of tracing into it, as it does with torch's own modules.

    Its tracers ask for `module.__module__`, which an instance may have as well as its class.
    """
    module.__dict__["__module__"] = nn.LSTM.__module__


def unmark_as_leaf(module: nn.Module) -> None:
    """Undoes `mark_as_leaf`."""
    module.__dict__.pop("__module__", None)


def _refuse_script(module: nn.Module) -> NoReturn:
    """torch.jit.script calls this before it compiles a module."""
    raise NotImplementedError(
        f"torch.jit.script cannot compile a {type(module).__name__} of fusedrnn: record the model with torch.jit.trace "
        "or torch.export instead, or give the module back to torch with fusedrnn.revert(model) before it is scripted"
    )


_FLAT_WEIGHTS = ("_flat_weights", "_update_flat_weights", "_init_flat_weights")
_ATTRIBUTES = ("__getattr__", "__getattribute__")
_CHECKS = (
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
)


@ops.constant
def _is_plain(cls: type) -> bool:
    """Whether a class leaves weights and checks to nn.LSTM, or to nn.LSTMCell."""
    return _overrides_nothing(cls)


@lru_cache(maxsize=1024)  # bounded: a parametrized module has a class of its own
def _overrides_nothing(cls: type) -> bool:
    computed = any(re.match("(weight|bias)_[ih]", name) for name in dir(cls))
    return not (computed or _overrides(cls, *_FLAT_WEIGHTS, *_ATTRIBUTES, *_CHECKS))


def _overrides(cls: type, *names: str) -> bool:
    base = nn.LSTMCell if issubclass(cls, nn.LSTMCell) else nn.LSTM
    return any(getattr(cls, name, None) is not getattr(base, name, None) for name in names)


def _lstm_weights(module: nn.RNNBase) -> Sequence[Any]:
    """The weights that nn.LSTM computes with, in the order of `all_weights`.

    That is `_flat_weights`, which nn.LSTM makes anew from the attributes where one of these is another tensor than
    before: so it is the attributes, unless the class computes the list, or somebody has changed it by hand.
    """
    if _overrides(type(module), *_FLAT_WEIGHTS):
        module._update_flat_weights()
        return module._flat_weights
    return _unless_changed_by_hand(module)


def _listed_weights(module: nn.RNNBase) -> Sequence[Any]:
    """The same for a plain class."""
    own = module.__dict__
    names, listed, parameters = own["_flat_weights_names"], own["_flat_weights"], own["_parameters"]
    # nn.Module takes longer to find them, and a single step feels it.
    for name, weight in zip(names, listed, strict=True):
        if parameters.get(name) is not weight or name in own:
            break
    else:
        return listed
    return _unless_changed_by_hand(module)


def _unless_changed_by_hand(module: nn.RNNBase) -> Sequence[Any]:
    """The attributes; or the list, where it differs from them and they are those that it was made from."""
    listed, weights = module._flat_weights, [getattr(module, name) for name in module._flat_weights_names]
    if all(map(is_, weights, listed)):
        return weights
    made_from = zip(module._flat_weight_refs, weights, strict=True)
    changed_by_hand = all(ref is None or ref() is weight for ref, weight in made_from)
    return listed if changed_by_hand else weights


def _parameters(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """What getattr(module, name) is for each of the names, where the class is plain; nn.Module takes microseconds to
    find a parameter, and a single step feels them."""
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
