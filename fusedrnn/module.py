"""The layers and cells as modules: torch's constructors, parameters, state_dicts and packing. No arithmetic."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import lru_cache, wraps
from operator import is_
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import cells, dispatch, ops, validate
from .cells import Cell, OwnCell
from .forward import layers, step
from .noise import Noise, noise_of


def _with_signature_of(function: Any) -> Any:
    return wraps(function)


def _and_signature_of(function: Any) -> Any:
    """Sets the signature: that of `function`, plus the keyword-only parameters of the decorated function."""

    def decorate(own: Any) -> Any:
        theirs = inspect.signature(function).parameters
        more = [
            p for p in inspect.signature(own).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in theirs
        ]
        *rest, last = theirs.values()
        given = [*rest, *more, last] if last.kind is last.VAR_KEYWORD else [*rest, last, *more]
        own.__signature__ = inspect.Signature(given)
        return own

    return decorate


class _Layers(nn.RNNBase):
    """Base class of the layers; subclasses add torch's class as a second base.

    Every forward reads the weights again, see `_layer_weights`: weights replaced by parametrizations, weight dropping,
    adapters or functional_call are used, and get the gradients.
    """

    _cell: Cell
    _noise: Noise | None = None

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
        """The forward of torch's module, with lengths, resets and all states.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: h_0 [L*D, B, H]; for an LSTM (h_0 [L*D, B, P], c_0 [L*D, B, H]). Without B for unbatched input; zeros by
                default.
            lengths: [B] int64 or int32, each in 0..T; see `fusedrnn.functional.lstm`. An error with a PackedSequence,
                which already has lengths.
            reset: [T, B] bool ([B, T] with batch_first, [T] unbatched); where true, the state entering step t is
                zero. For a PackedSequence [T, B], with T the longest length and B in the order before packing.
            return_states: also return all states of all layers, as an `RNNStates`, for an LSTM an `LSTMStates`.

        Returns:
            (output, h_n), for an LSTM (output, (h_n, c_n)), as torch's module; with return_states also the states.

        Raises:
            ValueError, RuntimeError, TypeError: see `fusedrnn.functional.lstm`, `gru` and `rnn`.
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
            self._noise,
        )

    def _check_padded(self, input: Tensor, hx: Any) -> None:
        """Calls `check_forward_args`, for classes that override a part of it, with batched tensors as torch does."""
        if not isinstance(input, Tensor) or input.dim() not in (2, 3):
            return  # validation raises later
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
                return  # validation raises later
            states = [s.unsqueeze(1) if unbatched else s for s in states]
        hidden: Any = tuple(states) if paired else states[0]
        self.check_forward_args(input.unsqueeze(batch_dim) if unbatched else input, hidden, None)

    def _run_packed(self, input: PackedSequence, hx: Any, reset: Tensor | None, return_states: bool) -> Any:
        """Permutes hx, reset and the returned states between the order before packing and the sorted order."""
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


class _Options:
    """The LSTM options that torch lacks, as attributes. They may be set later, except `peephole` and `coupled`."""

    peephole: bool = False
    coupled: bool = False
    zoneout: Any = 0.0
    recurrent_dropout: float = 0.0
    recurrent_dropout_mode: str = "candidate"
    forget_bias: float | None = None
    _cell: Cell = cells.LSTM  # computed at construction: a call of one time step is too short for it

    @property
    def _noise(self) -> Noise | None:
        if not (self.zoneout or self.recurrent_dropout):
            return None
        projected = getattr(self, "proj_size", 0) > 0
        return noise_of(self.zoneout, self.recurrent_dropout, self.recurrent_dropout_mode, projected)

    def _set_options(self, **options: Any) -> None:
        """Call before torch's constructor: that calls `reset_parameters`, which reads some of the options."""
        for name in ("peephole", "coupled"):
            if not isinstance(options[name], bool):
                raise TypeError(f"{name} must be a bool, got {type(options[name]).__name__}")
        forget_bias = options["forget_bias"]
        if forget_bias is not None and (isinstance(forget_bias, bool) or not isinstance(forget_bias, (int, float))):
            raise TypeError(f"forget_bias must be a number or None, got {type(forget_bias).__name__}")
        if forget_bias is not None and options["coupled"]:
            raise ValueError("forget_bias must be None with coupled=True: there is no forget gate, f = 1 - i")
        for name, value in options.items():
            if value != getattr(_Options, name):
                setattr(self, name, value)
        if self.peephole or self.coupled:
            self._cell = cells.lstm_variant(self.peephole, self.coupled)

    def _check_options(self) -> None:
        """Call after torch's constructor."""
        noise_of(self.zoneout, self.recurrent_dropout, self.recurrent_dropout_mode, getattr(self, "proj_size", 0) > 0)
        if self.forget_bias is not None and not self.bias:  # type: ignore[attr-defined]
            raise ValueError("forget_bias must be None with bias=False: there is no bias to set")

    def _resize(self, names: Sequence[str]) -> None:
        """With coupled gates: replaces weights and biases of four gates by uninitialised ones of three."""
        for name in names if self.coupled else ():
            of_four = getattr(self, name)
            setattr(self, name, nn.Parameter(of_four.new_empty(of_four.shape[0] // 4 * 3, *of_four.shape[1:])))

    def _peepholes(self, like: Tensor) -> nn.Parameter:
        """Uninitialised peepholes: [3H] in the order i, f, o; with coupled gates [2H], i, o."""
        return nn.Parameter(like.new_empty(len(self._cell.parameters) * self.hidden_size))  # type: ignore[attr-defined]

    def _set_forget_biases(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Sets the sum of b_ih and b_hh of each direction to `forget_bias`."""
        if self.forget_bias is None:
            return
        with torch.no_grad():
            for b_ih, b_hh in pairs:
                b_ih.chunk(4)[1].fill_(self.forget_bias)
                b_hh.chunk(4)[1].zero_()

    def _options_repr(self) -> str:
        named = ((name, getattr(self, name)) for name in VARIANT_OPTIONS)
        return "".join(f", {name}={value!r}" for name, value in named if value != getattr(_Options, name))

    def _explain_sizes(self, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Adds an error that says so if the state_dict is of an LSTM with another number of gates."""
        w_hh = next((w for name, w in state.items() if name.startswith(f"{prefix}weight_hh")), None)
        own = len(self._cell.gates)
        found = 0 if w_hh is None or w_hh.dim() != 2 else w_hh.shape[0] // self.hidden_size  # type: ignore[attr-defined]
        if found != own and {found, own} == {3, 4}:
            what = "has no forget gate (coupled=True)" if found == 3 else "has a forget gate"
            errors.append(f"the state_dict is of an LSTM that {what}, and this one has gates {self._cell.gates}")


VARIANT_OPTIONS = ("peephole", "coupled", "zoneout", "recurrent_dropout", "recurrent_dropout_mode", "forget_bias")


class _LSTMLayers(_Options, _Layers):  # type: ignore[override]
    """LSTM layers: options of the variants, and nn.LSTM's own methods for a class that is not an nn.LSTM."""

    @_and_signature_of(nn.LSTM.__init__)
    def __init__(
        self,
        *args: Any,
        peephole: bool = False,
        coupled: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str = "candidate",
        forget_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_options(
            peephole=peephole,
            coupled=coupled,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            recurrent_dropout_mode=recurrent_dropout_mode,
            forget_bias=forget_bias,
        )
        super().__init__(*args, **kwargs)
        self._check_options()
        if peephole or coupled:
            self._give_own_parameters()

    def _give_own_parameters(self) -> None:
        for names in self._all_weights:
            self._resize([name for name in names if not name.startswith("weight_hr")])
            if self.peephole:
                names.append(names[0].replace("weight_ih", "weight_peephole"))
                setattr(self, names[-1], self._peepholes(getattr(self, names[0])))
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.LSTM's initialisation; then `forget_bias`, if given, becomes the sum of both forget-gate biases."""
        super().reset_parameters()
        if self.bias:
            self._set_forget_biases([(getattr(self, names[2]), getattr(self, names[3])) for names in self._all_weights])

    def flatten_parameters(self) -> None:
        """nn.LSTM's, for cuDNN. Does nothing for peepholes and coupled gates, which cuDNN lacks."""
        if not (self.peephole or self.coupled):
            super().flatten_parameters()

    def extra_repr(self) -> str:
        return super().extra_repr() + self._options_repr()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if len(errors) > before:
            self._explain_sizes(state_dict, prefix, errors)

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden


class LSTM(_LSTMLayers, nn.LSTM):  # type: ignore[override]
    """Drop-in for torch.nn.LSTM: its constructor, attributes, parameters, state_dict, inputs, outputs and errors.

    `isinstance(module, torch.nn.LSTM)` holds. torch.compile breaks the graph at every nn.LSTM; for a whole graph use
    `CompilableLSTM` or `fusedrnn.convert(model, compilable=True)`.

    Args: torch.nn.LSTM's, positional or by keyword: input_size, hidden_size, num_layers, bias, batch_first, dropout,
    bidirectional, proj_size, device, dtype. Raises what torch.nn.LSTM raises. Keyword-only arguments select variants,
    in any combination (equations: fusedrnn/cells/lstm_variants.py); the defaults give nn.LSTM.

    Keyword Args:
        peephole: adds p_i * c_{t-1} to the gate i, p_f * c_{t-1} to f and p_o * c_t to o, elementwise. Parameters
            weight_peephole_l0, ... [3H] in the order i, f, o.
        coupled: f = 1 - i; weights and biases have three gates, i, g, o, [3H, ...], and peepholes are [2H]: i, o.
        zoneout: probability that a unit of h and of c keeps its old value at a step, or a pair (for h, for c). In
            evaluation both states are the mean of old and new with this weight. Not with proj_size.
        recurrent_dropout: dropout probability inside the recurrence, in training only.
        recurrent_dropout_mode: what is dropped: "candidate", units of g at each step (Semeniuta et al. 2016); or
            "state", units of h before the product with w_hh, the same units at all steps of a sequence (Gal and
            Ghahramani 2016).
        forget_bias: initial value of b_ih + b_hh of the forget gate; None: torch.nn.LSTM's initialisation. Not with
            bias=False or coupled.

    Masks come from torch's generator of the device. `peephole` and `coupled` are fixed; the other attributes may be set
    later. Raises TypeError and ValueError for invalid options and invalid combinations.

    Example:
        >>> lstm = fusedrnn.LSTM(4, 8, num_layers=2, batch_first=True)
        >>> x, lengths = torch.randn(3, 7, 4), torch.tensor([7, 2, 0])
        >>> y, (hn, cn), states = lstm(x, lengths=lengths, return_states=True)
        >>> y.shape, hn.shape, len(states.h), states.c[0].shape
        (torch.Size([3, 7, 8]), torch.Size([2, 3, 8]), 2, torch.Size([3, 7, 8]))
    """


class CompilableLSTM(_LSTMLayers):
    """`LSTM` for torch.compile(fullgraph=True) and torch.export: the same interface, but not an nn.LSTM.

    Dynamo does not trace instances of nn.LSTM, so this class derives from nn.RNNBase directly. state_dicts and
    parameters are interchangeable with `LSTM` and torch.nn.LSTM.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_Layers, nn.GRU):
    """Drop-in for torch.nn.GRU: its constructor, attributes, parameters, state_dict, inputs, outputs and errors.

    `isinstance(module, torch.nn.GRU)` holds; for whole graphs use `CompilableGRU`.

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
    """`GRU` for torch.compile(fullgraph=True) and torch.export: the same interface, but not an nn.GRU."""

    _cell = cells.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


class _RNNLayers(_Layers):
    """RNN layers; the attribute `mode` of torch's module, which may be set later, selects tanh or relu."""

    @property
    def _cell(self) -> Cell:  # type: ignore[override]
        if self.mode not in _RNN_MODES:
            raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        return _RNN_MODES[self.mode]


class RNN(_RNNLayers, nn.RNN):
    """Drop-in for torch.nn.RNN: its constructor, attributes, parameters, state_dict, inputs, outputs and errors.

    `isinstance(module, torch.nn.RNN)` holds; for whole graphs use `CompilableRNN`.

    Args: torch.nn.RNN's, positional or by keyword: input_size, hidden_size, num_layers, nonlinearity ("tanh" or
    "relu"), bias, batch_first, dropout, bidirectional, device, dtype. Raises what torch.nn.RNN raises.
    """


class CompilableRNN(_RNNLayers):
    """`RNN` for torch.compile(fullgraph=True) and torch.export: the same interface, but not an nn.RNN."""

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


class Recurrent(_Layers):
    """Layers of a custom cell made by `fusedrnn.cell`: everything that `LSTM` supports except projections.

    Runs on the reference, a Python loop over the time steps, on any device; twice differentiable if the cell is.

    Args:
        cell: the result of `fusedrnn.cell`.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for
            torch.nn.LSTM, the last seven positional or by keyword. hx is (h_0, c_0) for a cell with state="c", and h_0
            for others. Per-unit parameters are weight_unit_l0, ... [K*H], initialised like the other weights.

    Raises:
        TypeError: cell was not made by `fusedrnn.cell`.
    """

    def __init__(self, cell: OwnCell, input_size: int, hidden_size: int, *args: Any, **kwargs: Any) -> None:
        if not isinstance(cell, OwnCell):
            raise TypeError(f"cell must be made by fusedrnn.cell, got {type(cell).__name__}")
        _refuse_projection(kwargs)
        super().__init__("RNN_TANH", input_size, hidden_size, *args, **kwargs)
        self.cell, self.mode = cell, cell.definition.name
        for names in self._all_weights:
            for name in names:
                of_one = getattr(self, name)
                rows = len(cell.definition.gates) * hidden_size
                setattr(self, name, nn.Parameter(of_one.new_empty(rows, *of_one.shape[1:])))
            if cell.definition.parameters:
                names.append(names[0].replace("weight_ih", "weight_unit"))
                numbers = len(cell.definition.parameters) * hidden_size
                setattr(self, names[-1], nn.Parameter(getattr(self, names[0]).new_empty(numbers)))
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    @property
    def _cell(self) -> Cell:  # type: ignore[override]
        return self.cell.definition

    def _run(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        hx: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        return_states: bool,
    ) -> Any:
        return layers(
            self._cell,
            input,
            [getattr(self, name) for name in self._flat_weights_names],
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

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """Permutes the batch dimension of the states."""
        if permutation is None:
            return hx
        if self._cell.has_cell_state:
            return tuple(state.index_select(1, permutation) for state in hx)
        return hx.index_select(1, permutation)

    def flatten_parameters(self) -> None:
        """Does nothing: cuDNN has no such layers."""

    def extra_repr(self) -> str:
        return f"{self.cell!r}, {super().extra_repr()}"


class _Step(nn.RNNCellBase):
    """Base class of the cells, one time step; subclasses add torch's class as a second base."""

    _cell: Cell

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step: input [B, I] or [I], hx = h [B, H] or None for zeros -> h'; LSTM: hx = (h, c) -> (h', c').

        See `functional.lstm_cell`, `gru_cell` and `rnn_cell`, also for errors.
        """
        if type(self) in BASES or _is_plain(type(self)):
            return step(self._cell, input, hx, *_parameters(self, _STEP_WEIGHTS))
        return step(self._cell, input, hx, *(getattr(self, name) for name in _STEP_WEIGHTS))

    def __prepare_scriptable__(self) -> NoReturn:
        _refuse_script(self)


class LSTMCell(_Options, _Step, nn.LSTMCell):  # type: ignore[override]
    """Drop-in for torch.nn.LSTMCell, by the same kernels as `LSTM`.

    Args: torch.nn.LSTMCell's, positional or by keyword: input_size, hidden_size, bias, device, dtype. Keyword-only, as
    for `LSTM`: peephole (the parameter is weight_peephole), coupled, zoneout, recurrent_dropout of the candidate, and
    forget_bias. Every call draws new masks. recurrent_dropout_mode="state" is missing: a cell does not know where a
    sequence begins.
    """

    @_and_signature_of(nn.LSTMCell.__init__)
    def __init__(
        self,
        *args: Any,
        peephole: bool = False,
        coupled: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        forget_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_options(
            peephole=peephole,
            coupled=coupled,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            forget_bias=forget_bias,
        )
        super().__init__(*args, **kwargs)
        self._check_options()
        mark_as_leaf(self)
        if not (peephole or coupled):
            return
        self._resize(_STEP_WEIGHTS if self.bias else _STEP_WEIGHTS[:2])
        if peephole:
            self.weight_peephole = self._peepholes(self.weight_ih)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if self._cell is cells.LSTM and not (self.zoneout or self.recurrent_dropout):
            return super().forward(input, hx)
        w_p: Any = self.weight_peephole if self.peephole else None
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, w_p)
        return step(self._cell, input, hx, *weights, self._noise, self.training)

    def reset_parameters(self) -> None:
        """nn.LSTMCell's, and then `forget_bias`, as `LSTM` does."""
        super().reset_parameters()
        if self.bias:
            self._set_forget_biases([(self.bias_ih, self.bias_hh)])

    def extra_repr(self) -> str:
        return super().extra_repr() + self._options_repr()


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


# Our class -> the class of torch that it replaces.
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
    """Makes torch.fx treat the module as a leaf, as it does with torch's own modules.

    Tracers read `module.__module__`, which can be set on the instance.
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
    """Whether a class overrides neither the weights nor the checks of torch's class."""
    return _overrides_nothing(cls)


@lru_cache(maxsize=1024)  # bounded: a parametrized module has a class of its own
def _overrides_nothing(cls: type) -> bool:
    computed = any(re.match("(weight|bias)_[ihp]", name) for name in dir(cls))
    return not (computed or _overrides(cls, *_FLAT_WEIGHTS, *_ATTRIBUTES, *_CHECKS))


def _overrides(cls: type, *names: str) -> bool:
    base = next(theirs for ours, theirs in BASES.items() if issubclass(cls, ours))
    return any(getattr(cls, name, None) is not getattr(base, name, None) for name in names)


def _layer_weights(module: nn.RNNBase) -> Sequence[Any]:
    """The weights that torch's module would use, in the order of `all_weights`.

    torch uses `_flat_weights`, and rebuilds it when an attribute is set to another tensor. So the result is the
    attributes, unless the class computes the list or the user has modified it.
    """
    if _overrides(type(module), *_FLAT_WEIGHTS):
        module._update_flat_weights()
        return module._flat_weights
    return _unless_changed_by_hand(module)


def _listed_weights(module: nn.RNNBase) -> Sequence[Any]:
    """`_layer_weights` for a plain class."""
    own = module.__dict__
    names, listed, parameters = own["_flat_weights_names"], own["_flat_weights"], own["_parameters"]
    # nn.Module.__getattr__ is slower, which matters for a call of one time step.
    for name, weight in zip(names, listed, strict=True):
        if parameters.get(name) is not weight or name in own:
            break
    else:
        return listed
    return _unless_changed_by_hand(module)


def _unless_changed_by_hand(module: nn.RNNBase) -> Sequence[Any]:
    """The attributes; or `_flat_weights`, if it differs from them although they have not changed."""
    listed, weights = module._flat_weights, [getattr(module, name) for name in module._flat_weights_names]
    if all(map(is_, weights, listed)):
        return weights
    made_from = zip(module._flat_weight_refs, weights, strict=True)
    changed_by_hand = all(ref is None or ref() is weight for ref, weight in made_from)
    return listed if changed_by_hand else weights


def _parameters(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """getattr(module, name) for each name, without the microseconds of nn.Module.__getattr__; for plain classes."""
    own, parameters = module.__dict__, module._parameters
    weights = []
    for name in names:
        weight = own.get(name)
        if weight is None:
            weight = parameters.get(name)
        weights.append(getattr(module, name) if weight is None else weight)
    return weights
