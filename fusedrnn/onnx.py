"""ONNX export of our operators, for both of torch's exporters.

A layer becomes one LSTM, GRU or RNN node. Such a node has no projection, no reset and no c_t of every step, and ONNX
Runtime computes it in float32 only: a layer that needs one of these becomes a Scan node whose body is one time step.
bfloat16 and float16 are cast to float32 around the node, as in the kernels.

`torch.onnx.export(..., dynamo=True)` traces with ProxyTorchDispatchMode, which calls `_record` for our operators. The
TorchScript exporter (dynamo=False) calls the symbolic function `_symbolic`; it has no Scan. onnx and torch.onnx are
imported at the first export only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from . import reference
from .cells import Cell, named
from .layout import DirectionWeights, split_directions

_OPSET = 9  # of the symbolic function: what it writes is the same in every later one
_FLOAT, _INT32 = 1, 6  # of onnx.TensorProto


class _Node(NamedTuple):
    """The ONNX node of a cell."""

    name: str
    gates: tuple[int, ...]  # ours, in its order
    activation: str | None = None  # of each direction
    attributes: dict[str, int] = {}  # noqa: RUF012 - never modified
    negated: int | None = None  # place of a gate that is 1 - that gate of ours: sigmoid of the negated affine map
    peepholes: tuple[int, ...] = ()  # our parameters in its order; `negated` is a place among these, too


_NODES = {
    "lstm": _Node("LSTM", (0, 3, 1, 2), peepholes=(0, 2, 1)),  # i, o, f, c
    "lstm_coupled": _Node("LSTM", (0, 2, 0, 1), negated=2, peepholes=(0, 1, 0)),
    "gru": _Node("GRU", (1, 0, 2), attributes={"linear_before_reset": 1}),  # z, r, h
    "rnn_tanh": _Node("RNN", (0,), "Tanh"),
    "rnn_relu": _Node("RNN", (0,), "Relu"),
}


def _node(cell: Cell) -> _Node:
    """The node of a cell, without its noise."""
    return _NODES[cell.name.partition("+")[0].replace("_peephole", "")]


def _ordered(node: _Node, rows: Tensor, order: Sequence[int]) -> Tensor:
    """Rows [G*H, ...] in the order of ONNX, `node.gates` or `node.peepholes`."""
    blocks = rows.chunk(max(order) + 1)
    return torch.cat([-blocks[k] if place == node.negated else blocks[k] for place, k in enumerate(order)])


def is_exporting() -> bool:
    """Whether one of the exporters of torch.onnx.export is running."""
    module = sys.modules.get("torch.onnx")
    return module is not None and module.is_in_onnx_export()


def register(library: torch.library.Library, name: str, called: Callable[..., Any]) -> None:
    """Registers a forward operator of `ops.FORWARD_SCHEMA` with the dynamo exporter; `called` adapts `layer` to the
    calling convention of an operator."""
    record = partial(_record, called(layer))
    torch.library.register_torch_dispatch(f"{library.ns}::{name}", ProxyTorchDispatchMode, record, lib=library)


@cache
def register_symbolic(qualified_name: str) -> None:
    """Registers the operator with the TorchScript exporter, which is imported during an export."""
    torch.onnx.register_custom_op_symbolic(qualified_name, _symbolic, _OPSET)


def _record(
    compute: Callable[..., Any], mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> Any:
    """Records the call of an operator: as the nodes of `layer` for ONNX, otherwise as the operator itself."""
    if not is_exporting():
        return mode.__torch_dispatch__(op, types, args, kwargs or {})
    with mode:
        return compute(*args, **(kwargs or {}))


def layer(
    cell: str,
    x: Tensor,
    bidirectional: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell_states: bool,
    reserve: bool,
    *weights: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A forward operator in terms of ONNX: arguments and results are those of `ops.FORWARD_SCHEMA`.

    Raises:
        NotImplementedError: x is the data of a PackedSequence, which ONNX does not have; or there are random masks.
    """
    if x.dim() == 2:
        raise NotImplementedError(_PACKED)
    kind = named(cell)
    if noise is not None and ({"g", "r"} & {*kind.noise} or noise.shape[1] != 1):
        raise NotImplementedError(_RANDOM)
    directions = split_directions(weights, bidirectional, kind)
    D, B = len(directions), x.shape[1]
    h0 = x.new_zeros(D, B, directions[0].w_hh.shape[1]) if h0 is None else h0
    c0 = x.new_zeros(D, B, kind.cell_size(directions[0].hidden_size)) if c0 is None else c0
    cell_states = cell_states and kind.has_cell_state
    empty = x.new_empty(0)
    if _beyond_node(directions, x.dtype == torch.float64, reset is not None, cell_states, noise is not None):
        y, hn, cn, c = _scan_layer(kind, x, directions, h0, c0, lengths, reset, noise)
        return y, hn, cn, c if cell_states else empty, empty.clone()
    return *_node_layer(kind, x, directions, h0, c0, lengths), empty, empty.clone()


_PACKED = (
    "ONNX has no PackedSequence: give fusedrnn's modules padded input and lengths=... instead, which has the same "
    "results and can be exported for any T and B"
)
_RANDOM = (
    "zoneout and recurrent dropout draw masks while training, which ONNX's recurrent nodes do not have: call "
    "model.eval() before the export"
)


def _beyond_node(
    directions: Sequence[DirectionWeights], float64: bool, reset: bool, cell_states: bool, zoneout: bool
) -> list[str]:
    """The features of a layer that the ONNX node, as ONNX Runtime computes it, lacks."""
    found = {
        "a projection (proj_size)": directions[0].w_hr is not None,
        "float64": float64,
        "reset": reset,
        "the cell states of every step (return_states)": cell_states,
        "zoneout": zoneout,
    }
    return [what for what, there in found.items() if there]


def _node_layer(
    cell: Cell,
    x: Tensor,
    directions: Sequence[DirectionWeights],
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, hn, cn by one node; `_symbolic` is the same for the other exporter."""
    (T, B, _), D, H = x.shape, len(directions), directions[0].hidden_size
    node = _node(cell)

    def stacked(*weights: Tensor | None, order: Sequence[int] = node.gates) -> Tensor | None:
        given = [_ordered(node, w.float(), order) for w in weights if w is not None]
        return torch.stack(given) if given else None

    b_ih, b_hh = (stacked(*(getattr(w, name) for w in directions)) for name in ("b_ih", "b_hh"))
    inputs = (
        x.float(),
        stacked(*(w.w_ih for w in directions)),
        stacked(*(w.w_hh for w in directions)),
        None if b_ih is None or b_hh is None else torch.cat([b_ih, b_hh], dim=1),
        None if lengths is None else lengths.to(torch.int32),
        h0.float(),
        *([c0.float()] if cell.has_cell_state else []),
        *([stacked(*(w.w_p for w in directions), order=node.peepholes)] if cell.parameters else []),
    )
    states = [(D, B, H)] * (2 if cell.has_cell_state else 1)
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    if node.activation is not None:
        attributes["activations"] = [node.activation] * D
    y, hn, *rest = torch.onnx.ops.symbolic_multi_out(
        node.name,
        inputs,
        {**attributes, **node.attributes},
        dtypes=[torch.float32] * (1 + len(states)),
        shapes=[(T, D, B, H), *states],
    )
    y, hn = y.transpose(1, 2).flatten(2).to(x.dtype), hn.to(x.dtype)
    cn = rest[0].to(x.dtype) if rest else c0
    if lengths is not None:  # ONNX does not define the last states of a sequence of length 0
        begun = (lengths > 0).unsqueeze(-1)
        hn, cn = hn.where(begun, h0), cn.where(begun, c0)
    return y, hn, cn


def _scan_layer(
    cell: Cell,
    x: Tensor,
    directions: Sequence[DirectionWeights],
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, hn, cn and every c by a Scan node for each direction, whose body is `reference.step`."""
    dtype = reference.compute_dtype(x.dtype)
    exists, keep = reference.existing(x.shape[0], lengths), None if reset is None else ~reset.unsqueeze(-1)
    count = 2 if cell.has_cell_state else 1  # states: of a GRU the carry is h, and no cell rounds it here
    ys, hns, cns, cs = [], [], [], []
    for d, weights in enumerate(directions):
        given = [None if w is None else w.to(dtype) for w in weights]
        masks = [mask for mask in (exists, keep) if mask is not None]
        multipliers = [] if noise is None else [v.clone() for v in noise[:, 0].chunk(len(directions), dim=-1)[d]]

        def body(*arguments: Tensor, given: Any = given) -> list[Tensor]:
            states, x_t, own = arguments[:count], arguments[count], iter(arguments[count + 1 :])
            exists_t = None if exists is None else next(own)
            keep_t = None if keep is None else next(own)
            w = DirectionWeights._make(None if g is None else next(own) for g in given)
            noise_t = dict(zip(cell.noise, own, strict=True)) if noise is not None else None
            h_in, *c_in = (s if keep_t is None else s.where(keep_t, 0.0) for s in states)
            carry = c_in[0] if c_in else h_in
            h_out, carry, _ = reference.step(cell, x_t, h_in, carry, w, noise_t)
            left = [h_out, carry][:count]
            if exists_t is None:
                return [*left, *(s.clone() for s in left)]
            kept = [s.where(exists_t, before) for s, before in zip(left, states, strict=True)]
            return [*kept, *(s.where(exists_t, 0.0) for s in left)]

        sequences = [x.to(dtype), *masks]
        if d == 1:
            sequences = [s.flip(0) for s in sequences]
        init = [s[d].to(dtype).clone() for s in (h0, c0)[:count]]
        additional = (*(g for g in given if g is not None), *multipliers)
        results = torch.ops.higher_order.scan(body, init, sequences, additional)
        hns.append(results[0])
        cns.append(results[1] if count == 2 else c0[d])
        y, *every_c = (every.flip(0) if d == 1 else every for every in results[count:])
        ys.append(y)
        cs.append(every_c[0] if every_c else y[..., :0])
    y, c = (torch.cat(s, dim=-1).to(x.dtype) for s in (ys, cs))
    hn, cn = (torch.stack(s).to(x.dtype) for s in (hns, cns))
    return y, hn, cn, c


def _symbolic(
    g: Any,
    cell: Any,
    x: Any,
    bidirectional: Any,
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    cell_states: Any,
    reserve: Any,
    *weights: Any,
) -> tuple[Any, ...]:
    """`layer` for the TorchScript exporter: g is its graph, all else values in it."""
    from torch.onnx import JitScalarType

    symbolic_helper: Any = torch.onnx.symbolic_helper

    cell = named(symbolic_helper._get_const(cell, "s", "cell"))
    node = _node(cell)
    bidirectional, cell_states = (
        symbolic_helper._get_const(flag, "b", "flag") for flag in (bidirectional, cell_states)
    )
    h0, c0, lengths, reset, *given, noise = (
        None if symbolic_helper._is_none(value) else value for value in (h0, c0, lengths, reset, *weights)
    )
    if {"g", "r"} & {*cell.noise}:
        raise NotImplementedError(_RANDOM)
    if symbolic_helper._get_tensor_rank(x) == 2:
        raise NotImplementedError(_PACKED)
    dtype = JitScalarType.from_value(x)
    directions = split_directions([w for w in given if w is not None], bidirectional, cell)
    float64, cell_states = dtype == JitScalarType.DOUBLE, cell_states and cell.has_cell_state
    beyond = _beyond_node(directions, float64, reset is not None, cell_states, noise is not None)
    if beyond:
        raise NotImplementedError(
            f"ONNX's {node.name}, as ONNX Runtime has it, cannot say {' and '.join(beyond)}: use torch.onnx.export("
            "..., dynamo=True), which writes such a layer as a Scan; the TorchScript exporter (dynamo=False) cannot"
        )
    half, D = dtype in (JitScalarType.HALF, JitScalarType.BFLOAT16), len(directions)
    I, H = (symbolic_helper._get_tensor_sizes(weight)[1] for weight in (directions[0].w_ih, directions[0].w_hh))
    absent = g.op("prim::Constant")
    absent.setType(torch._C.OptionalType.ofTensor())

    def integers(*values: int) -> Any:
        return g.op("Constant", value_t=torch.tensor(values))

    def cast(value: Any, to: Any = _FLOAT) -> Any:
        return absent if value is None else g.op("Cast", value, to_i=to) if half else value

    def ordered(weight: Any, order: Sequence[int] = node.gates) -> Any:
        rows = torch.cat([torch.arange(k * H, (k + 1) * H) for k in order])
        gathered = g.op("Gather", cast(weight), g.op("Constant", value_t=rows), axis_i=0)
        if node.negated is None:
            return gathered
        sign = torch.tensor([-1.0 if place == node.negated else 1.0 for place in range(len(order))])
        sign = sign.repeat_interleave(H).unsqueeze(1)
        signed = g.op("Mul", g.op("Reshape", gathered, integers(len(order) * H, -1)), g.op("Constant", value_t=sign))
        return signed

    def stacked(*values: Any) -> Any:
        rows = [g.op("Reshape", value, integers(1, -1, *size)) for value, *size in values]
        return rows[0] if D == 1 else g.op("Concat", *rows, axis_i=0)

    w = stacked(*((ordered(d.w_ih), I) for d in directions))
    r = stacked(*((ordered(d.w_hh), H) for d in directions))
    b = absent
    if directions[0].b_ih is not None:
        b = stacked(*((g.op("Concat", ordered(d.b_ih), ordered(d.b_hh), axis_i=0),) for d in directions))
    peepholes = []
    if cell.parameters:
        peepholes = [stacked(*((ordered(d.w_p, node.peepholes),) for d in directions))]
    sequence_lens = absent if lengths is None else g.op("Cast", lengths, to_i=_INT32)
    direction = "bidirectional" if D == 2 else "forward"
    states = [h0, c0][: 2 if cell.has_cell_state else 1]
    attributes: dict[str, Any] = {f"{name}_i": value for name, value in node.attributes.items()}
    if node.activation is not None:
        attributes["activations_s"] = [node.activation] * D
    y, *last = g.op(
        node.name,
        *(cast(x), w, r, b, sequence_lens),
        *map(cast, states),
        *peepholes,
        hidden_size_i=H,
        direction_s=direction,
        **attributes,
        outputs=1 + len(states),
    )
    y = g.op("Reshape", g.op("Transpose", y, perm_i=[0, 2, 1, 3]), integers(0, 0, -1))
    y, *last = (cast(value, dtype.onnx_type()) for value in (y, *last))
    if lengths is not None:
        begun = g.op("Reshape", g.op("Greater", lengths, integers(0)), integers(1, -1, 1))
        zero = g.op("Constant", value_t=torch.zeros(1, dtype=dtype.dtype()))
        last = [g.op("Where", begun, s, zero if s0 is None else s0) for s, s0 in zip(last, states, strict=True)]
    empty = g.op("Constant", value_t=torch.empty(0))
    hn, cn = last if len(last) == 2 else (last[0], empty)
    return y, hn, cn, empty, empty
