"""The layers and cells as modules: the constructors, parameters, state_dicts and packing of torch's. No arithmetic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, wraps
from operator import is_
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import cells, dispatch, ops, validate
from .cells import Cell
from .forward import layers, step


def _with_signature_of(function: Any) -> Any:
    return wraps(function)


class _Layers(nn.RNNBase):
    """A stack of layers of one cell: everything but the class of torch's that it is an instance of.

    The weights are read at every forward, see `_layer_weights`, so that those replaced by parametrizations, weight
    dropping, adapters or functional_call are the ones that are used and that get gradients.
    """

    _cell: Cell

    @_with_signature_of(nn.LSTM.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mark_as_leaf(self)

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """The forward of torch's module, with more to ask for.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: h_0 [L*D, B, H]; of an LSTM (h_0 [L*D, B, P], c_0 [L*D, B, H]). Without B for unbatched input; zeros by
                default.
            lengths: [B] int64 or int32, each in 0..T; see `fusedrnn.functional.lstm`. An error with a PackedSequence,
                which has lengths of its own.
            reset: [T, B] bool ([B, T] with batch_first, [T] unbatched); where true, the state entering step t is
                zero. With a PackedSequence it is [T, B], T the longest length and B in the order before packing.
            return_states: also return an `RNNStates`, of an LSTM an `LSTMStates`, with every state of every layer.

        Returns:
            (output, h_n), of an LSTM (output, (h_n, c_n)), as torch's module; with return_states the states as well.

        Raises:
            ValueError, RuntimeError, TypeError: as `fusedrnn.functional.lstm`, `gru` and `rnn`.
        """
        if not isinstance(input, PackedSequence):
            return self._run(input, None, hx, lengths, reset, return_states)
        if lengths is not None:
            raise ValueError(
                "lengths must be None when input is a PackedSequence: its batch_sizes already say how long each "
                "sequence is; pass lengths with padded input instead"
            )
        return self._run_packed(input, hx, reset, return_states)

    def _run(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        hx: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        return_states: bool,
    ) -> Any:
        cls = type(self)
        if cls in BASES or _is_plain(cls):
            weights = _listed_weights(self)
        else:
            if batch_sizes is None and _overrides(cls, *_CHECKS):
                self._check_padded(input, hx)
            weights = _layer_weights(self)
        return layers(
            self._cell,
            input,
            weights,
            hx,
            self.num_layers,
            self.batch_first,
            self.dropout,
            self.training,
            self.bidirectional,
            batch_sizes,
            lengths,
            reset,
            return_states,
        )

    def _check_padded(self, input: Tensor, hx: Any) -> None:
        """Calls `check_forward_args`, of which a class has overridden a part, as torch does: with batched tensors."""
        if not isinstance(input, Tensor) or input.dim() not in (2, 3):
            return  # an error further on
        batch_dim = 0 if self.batch_first else 1
        unbatched, rows = input.dim() == 2, self.num_layers * (2 if self.bidirectional else 1)
        paired = self._cell.has_cell_state
        if hx is None:
            B = 1 if unbatched else input.shape[batch_dim]
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)
            states = [input.new_zeros(rows, B, size) for size in sizes[: 2 if paired else 1]]
        else:
            states = [hx] if isinstance(hx, Tensor) and not paired else hx
            if not isinstance(states, (tuple, list)) or any(s.dim() != input.dim() for s in states):
                return  # the same
            states = [s.unsqueeze(1) if unbatched else s for s in states]
        hidden: Any = tuple(states) if paired else states[0]
        self.check_forward_args(input.unsqueeze(batch_dim) if unbatched else input, hidden, None)

    def _run_packed(self, input: PackedSequence, hx: Any, reset: Tensor | None, return_states: bool) -> Any:
        """hx, reset and the states returned are in the order before packing, of which functions know nothing."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if not dispatch.is_recorded():
            validate.packed_indices("sorted_indices", sorted_indices, batch_sizes)
            validate.packed_indices("unsorted_indices", unsorted_indices, batch_sizes)
        if unsorted_indices is None and sorted_indices is not None:
            unsorted_indices = torch.empty_like(sorted_indices).scatter_(
                0, sorted_indices, torch.arange(len(sorted_indices), device=sorted_indices.device)
            )
        if sorted_indices is not None:
            if hx is not None:
                validate.packed_hx(self._cell, hx, len(sorted_indices))
                hx = self.permute_hidden(hx, sorted_indices)
            if reset is not None:
                validate.packed_reset(reset, len(batch_sizes), len(sorted_indices))
                reset = reset.index_select(1, sorted_indices)

        def pack(rows: Tensor) -> Any:
            return PackedSequence(rows, batch_sizes, sorted_indices, input.unsorted_indices)

        output, state, *states = self._run(data, batch_sizes, hx, None, reset, return_states)
        state = self.permute_hidden(state, unsorted_indices)
        if not return_states:
            return pack(output), state
        every = type(states[0])(*(tuple(pack(rows) for rows in part) for part in states[0]))
        return every.h[-1], state, every

    def __prepare_scriptable__(self) -> NoReturn:
        _refuse_script(self)


class _LSTMLayers(_Layers):
    """nn.LSTM's own methods, which a class that is not an nn.LSTM has to be given."""

    _cell = cells.LSTM
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden


class LSTM(_LSTMLayers, nn.LSTM):
    """Drop-in for torch.nn.LSTM: its constructor, attributes, parameters, state_dict, inputs, outputs and errors.

    `isinstance(module, torch.nn.LSTM)` holds. torch.compile breaks the graph at every nn.LSTM; use `CompilableLSTM`,
    or `fusedrnn.convert(model, compilable=True)`, where a whole graph is wanted.

    Args: torch.nn.LSTM's, positional or by keyword: input_size, hidden_size, num_layers, bias, batch_first, dropout,
    bidirectional, proj_size, device, dtype. Raises what torch.nn.LSTM raises.
    Example:
        >>> lstm = fusedrnn.LSTM(4, 8, num_layers=2, batch_first=True)
        >>> x, lengths = torch.randn(3, 7, 4), torch.tensor([7, 2, 0])
        >>> y, (hn, cn), states = lstm(x, lengths=lengths, return_states=True)
        >>> y.shape, hn.shape, len(states.h), states.c[0].shape
        (torch.Size([3, 7, 8]), torch.Size([2, 3, 8]), 2, torch.Size([3, 7, 8]))
    """


class CompilableLSTM(_LSTMLayers):
    """`LSTM` for torch.compile(fullgraph=True) and torch.export: the same in everything, but not an nn.LSTM.

    Dynamo refuses to trace whatever is an instance of nn.LSTM. This class derives from nn.RNNBase directly; state_dicts
    and parameters are interchangeable with `LSTM` and torch.nn.LSTM.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_Layers, nn.GRU):
    """Drop-in for torch.nn.GRU: its constructor, attributes, parameters, state_dict, inputs, outputs and errors.

    `isinstance(module, torch.nn.GRU)` holds; for whole graphs there is `CompilableGRU`.

    Args: torch.nn.GRU's, positional or by keyword: input_size, hidden_size, num_layers, bias, batch_first, dropout,
    bidirectional, device, dtype. Raises what torch.nn.GRU raises.
    Example:
        >>> gru, done = fusedrnn.GRU(4, 8), torch.rand(7, 3) < 0.2
        >>> y, hn = gru(torch.randn(7, 3, 4), torch.zeros(1, 3, 8), reset=done)
        >>> y.shape, hn.shape
        (torch.Size([7, 3, 8]), torch.Size([1, 3, 8]))
    """

    _cell = cells.GRU


class CompilableGRU(_Layers):
    """`GRU` for torch.compile(fullgraph=True) and torch.export: the same in everything, but not an nn.GRU."""

    _cell = cells.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


class _RNNLayers(_Layers):
    """Both plain RNNs: torch's module says which one in an attribute that may be set later."""

    @property
    def _cell(self) -> Cell:  # type: ignore[override]
        if self.mode not in _RNN_MODES:
            raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        return _RNN_MODES[self.mode]


class RNN(_RNNLayers, nn.RNN):
    """Drop-in for torch.nn.RNN: its constructor, attributes, parameters, state_dict, inputs, outputs and errors.

    `isinstance(module, torch.nn.RNN)` holds; for whole graphs there is `CompilableRNN`.

    Args: torch.nn.RNN's, positional or by keyword: input_size, hidden_size, num_layers, nonlinearity ("tanh" or
    "relu"), bias, batch_first, dropout, bidirectional, device, dtype. Raises what torch.nn.RNN raises.
    """


class CompilableRNN(_RNNLayers):
    """`RNN` for torch.compile(fullgraph=True) and torch.export: the same in everything, but not an nn.RNN."""

    nonlinearity: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        if len(args) > 3:
            nonlinearity, args = args[3], (*args[:3], *args[4:])
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in cells.RNNS:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(cells.RNNS[nonlinearity].name.upper(), *args, **kwargs)


class _Step(nn.RNNCellBase):
    """One time step of a cell: everything but the class of torch's that it is an instance of."""

    _cell: Cell

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: input [B, I] or [I], hx h [B, H] or zeros -> h'; of an LSTM hx is (h, c) and comes (h', c').

        See `functional.lstm_cell`, `gru_cell` and `rnn_cell`, also for what is raised.
        """
        if type(self) in BASES or _is_plain(type(self)):
            return step(self._cell, input, hx, *_parameters(self, _STEP_WEIGHTS))
        return step(self._cell, input, hx, *(getattr(self, name) for name in _STEP_WEIGHTS))

    def __prepare_scriptable__(self) -> NoReturn:
        _refuse_script(self)


class LSTMCell(_Step, nn.LSTMCell):
    """Drop-in for torch.nn.LSTMCell, by the same kernels as `LSTM`.

    Args: torch.nn.LSTMCell's, positional or by keyword: input_size, hidden_size, bias, device, dtype.
    """

    _cell = cells.LSTM

    @_with_signature_of(nn.LSTMCell.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mark_as_leaf(self)


class GRUCell(_Step, nn.GRUCell):
    """Drop-in for torch.nn.GRUCell, by the same kernels as `GRU`.

    Args: torch.nn.GRUCell's, positional or by keyword: input_size, hidden_size, bias, device, dtype.
    """

    _cell = cells.GRU

    @_with_signature_of(nn.GRUCell.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mark_as_leaf(self)


class RNNCell(_Step, nn.RNNCell):
    """Drop-in for torch.nn.RNNCell, by the same kernels as `RNN`.

    Args: torch.nn.RNNCell's, positional or by keyword: input_size, hidden_size, bias, nonlinearity ("tanh" or "relu"),
    device, dtype.
    """

    @_with_signature_of(nn.RNNCell.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mark_as_leaf(self)

    @property
    def _cell(self) -> Cell:  # type: ignore[override]
        if self.nonlinearity not in cells.RNNS:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return cells.RNNS[self.nonlinearity]


# torch's class that each of ours stands for.
BASES: dict[type, type] = {
    LSTM: nn.LSTM,
    CompilableLSTM: nn.LSTM,
    LSTMCell: nn.LSTMCell,
    GRU: nn.GRU,
    CompilableGRU: nn.GRU,
    GRUCell: nn.GRUCell,
    RNN: nn.RNN,
    CompilableRNN: nn.RNN,
    RNNCell: nn.RNNCell,
}
_RNN_MODES = {cell.name.upper(): cell for cell in cells.RNNS.values()}
_STEP_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


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
    """Whether a class leaves weights and checks to the class of torch's that it stands for."""
    return _overrides_nothing(cls)


@lru_cache(maxsize=1024)  # bounded: a parametrized module has a class of its own
def _overrides_nothing(cls: type) -> bool:
    computed = any(re.match("(weight|bias)_[ih]", name) for name in dir(cls))
    return not (computed or _overrides(cls, *_FLAT_WEIGHTS, *_ATTRIBUTES, *_CHECKS))


def _overrides(cls: type, *names: str) -> bool:
    base = next(theirs for ours, theirs in BASES.items() if issubclass(cls, ours))
    return any(getattr(cls, name, None) is not getattr(base, name, None) for name in names)


def _layer_weights(module: nn.RNNBase) -> Sequence[Any]:
    """The weights that torch's module computes with, in the order of `all_weights`.

    That is `_flat_weights`, which it makes anew from the attributes where one of these is another tensor than
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
