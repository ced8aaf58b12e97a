"""Validation of arguments. Checks that torch's modules have too raise the same exception types with the same wording.

`forward` runs the checks in torch's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .cells import Cell
from .sequence import Form


class HiddenTypeError(TypeError, AttributeError):
    """hx is not a tensor, for a cell without cell state. nn.GRU and nn.RNN raise an AttributeError for this."""


def is_tensor(input: Any) -> None:
    """Validates the input of a layer or a cell."""
    if isinstance(input, torch.fx.Proxy):
        raise TypeError(
            "input must be a Tensor, got Proxy: torch.fx traces into this module, whose class is a subclass, and a "
            "recurrent layer cannot be traced; make it a leaf, by a Tracer whose is_leaf_module returns True for it"
        )
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")


def layer_input(cell: Cell, input: Any, batch_sizes: Any) -> None:
    """Validates the input of a layer, which may be the data of a PackedSequence."""
    is_tensor(input)
    if batch_sizes is not None:
        _packed(input, batch_sizes)
    elif input.dim() not in (2, 3):
        what = "" if cell.carry is not None else " tensor"  # nn.RNN's message has one more word
        raise ValueError(f"{cell.title}: Expected input to be 2D or 3D, got {input.dim()}D{what} instead")


def cell_input(cell: Cell, input: Any) -> None:
    """Validates the input of one time step."""
    is_tensor(input)
    if input.dim() not in (1, 2):
        raise ValueError(f"{cell.title}Cell: Expected input to be 1D or 2D, got {input.dim()}D instead")


def _packed(data: Tensor, batch_sizes: Any) -> None:
    """Validates a PackedSequence, which may have been built by hand."""
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"batch_sizes must be a Tensor, got {type(batch_sizes).__name__}")
    if batch_sizes.dtype != torch.int64:
        if torch.compiler._is_exporting_flag:  # torch gives the batch_sizes of its fake packed rows the dtype of data
            raise NotImplementedError(
                "torch.export, and torch.onnx.export with it, cannot follow pack_padded_sequence: give fusedrnn's "
                "modules padded input and lengths=... instead, which has the same results for any T and B"
            )
        raise TypeError(f"batch_sizes must be int64, got {batch_sizes.dtype}")
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes must be on the CPU, got {batch_sizes.device}")
    if batch_sizes.dim() != 1 or len(batch_sizes) == 0:
        raise RuntimeError(f"batch_sizes must have one entry per time step, got shape {list(batch_sizes.shape)}")
    if data.dim() != 2:
        raise RuntimeError(f"data of a PackedSequence must have 2 dimensions, got {data.dim()}")
    if dispatch.is_recorded():
        return
    batch_sizes[0].item()  # raises inside make_fx, where tolist would return the values of the example
    sizes = batch_sizes.tolist()
    if sizes[-1] <= 0 or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(f"batch_sizes must be positive and never grow, got {sizes}")
    if sum(sizes) != len(data):
        raise RuntimeError(f"batch_sizes must add up to the {len(data)} rows of data, got {sum(sizes)}")


def split_hx(cell: Cell, hx: Any, caller: str) -> tuple[Tensor | None, Tensor | None]:
    """h0 and c0, None where hx is; c0 is None for a cell without cell state."""
    if hx is None:
        return None, None
    if not cell.has_cell_state:
        if not isinstance(hx, Tensor):
            raise HiddenTypeError(_no_tensor(cell, hx))
        return hx, None
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple or a list of two Tensors (h_0, c_0), got {type(hx).__name__}")
    if len(hx) < 2:
        two_states(hx, caller)
    for index, state in enumerate(hx):
        if not isinstance(state, Tensor):
            raise TypeError(f"hx[{index}] must be a Tensor, got {type(state).__name__}")
    return hx[0], hx[1]


def _no_tensor(cell: Cell, hx: Any) -> str:
    got = type(hx).__name__
    if isinstance(hx, (tuple, list)):
        got += f" of {len(hx)}: there is no cell state in {cell.title} layers, (h_0, c_0) is what an LSTM takes"
    return f"hx must be a Tensor h_0, got {got}"


def two_states(hx: Any, caller: str) -> None:
    """Validates the number of states in the hx of a cell with a cell state."""
    if isinstance(hx, (tuple, list)) and len(hx) != 2:
        raise RuntimeError(f"{caller} expects two hidden states, hx = (h_0, c_0), got {len(hx)}")


def hx_dims(h0: Tensor | None, c0: Tensor | None, form: Form) -> None:
    """Validates the number of dimensions of a layer's states."""
    if h0 is None or (c0 is None and form.rows):  # nn.GRU and nn.RNN check the size only
        return
    dims, input = (2, "unbatched 2-D") if form.unbatched else (3, "batched 3-D")
    if c0 is None:
        if h0.dim() != dims:
            raise RuntimeError(f"For {input} input, hx should also be {dims}-D but got {h0.dim()}-D tensor")
    elif h0.dim() != dims or c0.dim() != dims:
        raise RuntimeError(
            f"For {input} input, hx and cx should also be {dims}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
        )


def layers(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Any,
    h0: Tensor | None,
    c0: Tensor | None,
    form: Form,
    num_layers: int,
    D: int,
) -> None:
    """Validates that input, states [L*D, B, ...] and weights of a stack of layers match."""
    if weights[0].shape[1] != input.shape[-1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {weights[0].shape[1]}, got {input.shape[-1]}"
        )
    _hx_sizes(cell, h0, c0, num_layers * D, form.B, (weights[1].shape[1], weights[1].shape[0] // len(cell.gates)))
    if cell.has_cell_state:
        two_states(hx, cell.title.lower())
    alike = are_alike(input, weights, h0, c0)
    if not alike:
        devices(input, weights, h0, c0)
    if form.T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if not alike:
        dtypes(input, weights, h0, c0)
    weight_shapes(cell, weights, num_layers, D, input.shape[-1])


def _hx_sizes(cell: Cell, h0: Tensor | None, c0: Tensor | None, rows: int, B: int, sizes: tuple[int, int]) -> None:
    """Validates the shapes of the states; rows: L*D, sizes: those of h and c."""
    for index, (s, size) in enumerate(zip((h0, c0), sizes, strict=True)):
        if s is not None and s.shape != (rows, B, size):
            name = f"hidden[{index}]" if cell.has_cell_state else "hidden"
            raise RuntimeError(f"Expected {name} size {(rows, B, size)}, got {list(s.shape)}")


def cell_hx_dims(cell: Cell, h: Tensor | None, c: Tensor | None, dims: int, hx: Any, caller: str) -> None:
    """Validates the number of dimensions of the states of one time step, given that of the input."""
    states = [s for s in (h, c) if s is not None]
    for index, state in enumerate(states):
        if state.dim() not in (1, 2):
            name = f"hx[{index}]" if cell.has_cell_state else "hidden"
            raise ValueError(f"{cell.title}Cell: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
    if cell.has_cell_state:
        two_states(hx, caller)
    if any(state.dim() != dims for state in states):
        got = ", ".join(f"{state.dim()}-D" for state in states)
        got = f"({got}) tensors" if cell.has_cell_state else f"a {got} tensor"
        raise RuntimeError(f"hx must be {dims}-D as input is, but got {got} for ({dims}-D)")


def cell_hx_sizes(h: Tensor | None, c: Tensor | None, B: int, H: int) -> None:
    """Validates the sizes of the states of one time step."""
    for index, state in enumerate((h, c)):
        if state is not None and state.shape[0] != B:
            raise RuntimeError(f"Input batch size {B} doesn't match hidden{index} batch size {state.shape[0]}")
        if state is not None and state.shape[1] != H:
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {H}")


def input_dtype(input: Tensor, weights: Sequence[Tensor]) -> None:
    """Validates the dtype of a layer's input."""
    if input.dtype != weights[0].dtype:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weights[0].dtype}). "
            f"Convert input: input.to({weights[0].dtype}), or convert model: model.to({input.dtype})"
        )


def options(cell: Cell, weights: Sequence[Tensor], num_layers: int, D: int, dropout: float) -> None:
    """Validates what a module's constructor already checks."""
    if num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in 0..1, got {dropout}")
    for k, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{k}] must be a Tensor, got {type(weight).__name__}")
    count, rest = divmod(len(weights), num_layers * D)
    more = 1 if cell.parameters else 0
    if rest or count - more not in ((2, 3, 4, 5) if cell.has_cell_state else (2, 4)):
        expected = f"{2 + more} to {5 + more}" if cell.has_cell_state else "2 or 4"
        raise ValueError(
            f"weights must hold {expected} tensors for each of {num_layers} layers and {D} directions, "
            f"got {len(weights)}"
        )
    for k in (0, 1):
        if weights[k].dim() != 2:
            raise ValueError(f"weights[{k}] must be 2-D, got {weights[k].dim()}-D")


def weight_shapes(cell: Cell, weights: Sequence[Tensor], num_layers: int, D: int, I: int) -> None:
    """Validates the shapes of all weights, with H from the first w_hh."""
    count, G = len(weights) // (num_layers * D), len(cell.gates)
    H, P = weights[1].shape[0] // G, weights[1].shape[1]
    parameters = [(len(cell.parameters) * H,)] if cell.parameters else []
    count -= len(parameters)
    biases = [(G * H,), (G * H,)] if count >= 4 else []
    projection = [(P, H)] if count in (3, 5) else []
    for layer in range(num_layers):
        w_ih = (G * H, I if layer == 0 else D * P)
        shapes = [w_ih, (G * H, P if projection else H), *biases, *projection, *parameters] * D
        for k, shape in enumerate(shapes, layer * len(shapes)):
            if weights[k].shape != shape:
                raise ValueError(f"weights[{k}] must have shape {list(shape)}, got {list(weights[k].shape)}")


def are_alike(input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> bool:
    """Whether all tensors have the device and dtype of the input: then `devices` and `dtypes` pass."""
    device, dtype = input.device, input.dtype
    return all(t is None or (t.device == device and t.dtype == dtype) for t in (h0, c0, *weights))


def _named(weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> list[tuple[str, Tensor]]:
    states = [("hx", h0)] if c0 is None else [("hx[0]", h0), ("hx[1]", c0)]
    given = [(name, state) for name, state in states if state is not None]
    return given + [(f"weights[{k}]", weight) for k, weight in enumerate(weights)]


def devices(input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> None:
    """Validates that all tensors are on the input's device."""
    device = input.device
    for name, tensor in _named(weights, h0, c0):
        if tensor.device != device:
            kind = "hidden" if name.startswith("hx") else "parameter"
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, found input tensor at {device} and "
                f"{kind} tensor at {tensor.device} ({name})"
            )


def dtypes(input: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None) -> None:
    """Validates that all tensors have the dtype of the first weight."""
    dtype = weights[0].dtype
    for name, tensor in [("input", input), *_named(weights, h0, c0)]:
        if tensor.dtype != dtype:
            raise RuntimeError(f"{name} must have the dtype of the weights, {dtype}, got {tensor.dtype}")


def lengths(lengths: Any, form: Form, device: torch.device) -> Tensor:
    """Validates lengths and returns them as int64."""
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
    if form.B == 0 or device.type != "cpu" or dispatch.is_recorded():
        return lengths.to(torch.int64)
    if dispatch.is_batched(lengths):  # by vmap, where values cannot be read
        lengths = lengths.clamp(0, form.T)
    else:
        low, high = lengths.min(), lengths.max()
        if low < 0 or high > form.T:
            raise ValueError(f"lengths must be in 0..{form.T}, the number of time steps, got {int(low)}..{int(high)}")
    return lengths.to(torch.int64)


def reset(reset: Any, form: Form, device: torch.device) -> Tensor:
    """Validates reset and returns it as [T, B]."""
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


def packed_hx(cell: Cell, hx: Any, B: int) -> None:
    """Validates the states for a PackedSequence before the permutation, which would truncate too long ones."""
    if not cell.has_cell_state:
        if not isinstance(hx, Tensor):
            raise HiddenTypeError(_no_tensor(cell, hx))
        named = [("hx", hx)]
    else:
        if not isinstance(hx, (tuple, list)) or not all(isinstance(state, Tensor) for state in hx):
            raise TypeError(f"hx must be a tuple or a list of two Tensors (h_0, c_0), got {type(hx).__name__}")
        two_states(hx, "lstm")
        named = [(f"hx[{index}]", state) for index, state in enumerate(hx)]
    for name, state in named:
        if state.dim() != 3 or state.shape[1] != B:
            raise RuntimeError(
                f"{name} must be [L*D, {B}, ...] for a PackedSequence of {B} sequences, got {list(state.shape)}"
            )


def packed_reset(reset: Any, T: int, B: int) -> None:
    """Validates reset for a PackedSequence before the permutation."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a Tensor, got {type(reset).__name__}")
    if reset.shape != (T, B):
        raise ValueError(f"reset must have shape {[T, B]} for this PackedSequence, got {list(reset.shape)}")


def packed_indices(name: str, indices: Tensor | None, batch_sizes: Tensor) -> None:
    """Validates sorted_indices or unsorted_indices of a PackedSequence."""
    if indices is None or batch_sizes.dim() != 1 or len(batch_sizes) == 0:  # the latter raises later
        return
    B = int(batch_sizes[0])
    if indices.shape != (B,):
        raise RuntimeError(f"{name} of a PackedSequence must have shape [{B}], got {list(indices.shape)}")
    # Reading the values on another device would synchronise with it.
    if indices.device.type == "cpu" and sorted(indices.tolist()) != list(range(B)):
        raise RuntimeError(f"{name} of a PackedSequence must be a permutation of 0..{B - 1}, got {indices.tolist()}")
