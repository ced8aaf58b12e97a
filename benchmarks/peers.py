"""Other people's LSTMs, where they are installed, behind the parameters and the forward of nn.LSTM.

FlashRNN (github.com/NX-AI/flashrnn) and haste (github.com/lmnt-com/haste) compute one layer in one direction on a GPU;
ONNX Runtime runs its LSTM, GRU or RNN operator on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cases import BenchmarkCase
from .contender import Contender


def _missing(*modules: str) -> str | None:
    """Why one of the modules cannot be imported, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return f"{module} is not installed"
        except Exception as error:  # of a package that builds itself on import, anything
            return f"{module} cannot be imported: {error}"
    return None


def _version(package: str) -> str:
    return f"{package} {getattr(importlib.import_module(package), '__version__', 'of unknown version')}"


class _Operator(NamedTuple):
    """The ONNX operator of a cell."""

    name: str
    gates: tuple[int, ...]  # torch's, in its order
    attributes: dict[str, Any]


_OPERATORS = {
    "lstm": _Operator("LSTM", (0, 3, 1, 2), {}),  # i o f g
    "gru": _Operator("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z r n
    "rnn_tanh": _Operator("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": _Operator("RNN", (0,), {"activations": ["Relu"]}),
}


def onnxruntime(kind: str = "lstm") -> Contender:
    """ONNX Runtime's operator for a cell on the CPU, with as many threads as torch has."""

    def unsupported(cell: BenchmarkCase) -> str | None:
        if cell.device != "cpu":
            return "it is measured on the CPU"
        if cell.mode != "infer":
            return "it only infers"
        if cell.dtype != "float32":
            return "its operators compute float32"
        if cell.variant in ("packed", "reset"):
            return f"its operators have no {cell.variant} input"
        return None

    return Contender(
        "onnxruntime",
        {"lstm": OnnxRuntimeLSTM, "gru": OnnxRuntimeGRU}.get(kind, OnnxRuntimeRNN),
        lambda *_: _version("onnxruntime"),
        _missing("onnx", "onnxruntime"),
        unsupported,
        work=_run_session,
        own_allocator=True,
    )


class _Session(nn.RNNBase):
    """A session over one operator per layer, made of the weights at the first call."""

    session: Any = None

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None
    ) -> Any:
        feeds = self.feeds(input, hx, lengths)
        y, *last = map(torch.from_numpy, self.session.run(None, feeds))
        return y, tuple(last) if len(last) == 2 else last[0]

    def feeds(self, input: Tensor, hx: Any, lengths: Tensor | None) -> dict[str, Any]:
        """The inputs of the session, which is created on first use."""
        if self.session is None:
            self.session = _session(self, states=hx is not None, lengths=lengths is not None)
        feeds = {"x": input.numpy()}
        if hx is not None:
            feeds |= {name: s.numpy() for name, s in zip(("h0", "c0"), _states(hx), strict=False)}
        if lengths is not None:
            feeds["lengths"] = lengths.to(torch.int32).numpy()
        return feeds


class OnnxRuntimeLSTM(_Session, nn.LSTM):
    """ONNX Runtime's LSTM operators."""


class OnnxRuntimeGRU(_Session, nn.GRU):
    """ONNX Runtime's GRU operators."""


class OnnxRuntimeRNN(_Session, nn.RNN):
    """ONNX Runtime's RNN operators."""


def _states(hx: Any) -> tuple[Tensor, ...]:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _run_session(
    module: _Session, x: Tensor, hx: Any, options: dict[str, Any], streaming: bool
) -> Callable[[], object]:
    """Calls of the session alone, on arrays, as it is served: turning them into tensors and back is not its time."""
    feeds = module.feeds(x, hx, options.get("lengths"))

    def run() -> object:
        y, *last = module.session.run(None, feeds)
        if streaming:
            feeds.update(zip(("h0", "c0"), last, strict=False))
        return y

    return run


def _session(module: nn.RNNBase, states: bool, lengths: bool) -> Any:
    import onnx
    import onnxruntime  # type: ignore[import-untyped]
    from onnx import TensorProto, helper, numpy_helper

    L, D, H = module.num_layers, 2 if module.bidirectional else 1, module.hidden_size
    operator = _OPERATORS[module.mode.lower()]
    names = ("h", "c") if isinstance(module, nn.LSTM) else ("h",)
    nodes, constants = [], []

    def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        nodes.append(helper.make_node(operator, inputs, outputs, **attributes))

    def constant(name: str, values: Tensor) -> str:
        constants.append(numpy_helper.from_array(values.detach().contiguous().numpy(), name))
        return name

    def gates(values: Tensor) -> Tensor:
        own = values.chunk(len(operator.gates))
        return torch.cat([own[k] for k in operator.gates])

    def stacked(name: str, rows: range) -> list[Tensor]:
        suffixes = [f"l{row // D}" + ("_reverse" if row % D else "") for row in rows]
        return [gates(getattr(module, f"{name}_{suffix}")) for suffix in suffixes]

    constant("merged", torch.tensor([0, 0, -1]))
    for state in names if states else ():
        node("Split", [f"{state}0"], [f"{state}0_{k}" for k in range(L)], axis=0, num_outputs=L)
    below = "x"
    for k in range(L):
        rows = range(k * D, (k + 1) * D)
        biases = zip(stacked("bias_ih", rows), stacked("bias_hh", rows), strict=True)
        operands = [
            below,
            constant(f"w{k}", torch.stack(stacked("weight_ih", rows))),
            constant(f"r{k}", torch.stack(stacked("weight_hh", rows))),
            constant(f"b{k}", torch.stack([torch.cat(pair) for pair in biases])),
            "lengths" if lengths else "",
            *([f"{name}0_{k}" for name in names] if states else []),
        ]
        direction = "bidirectional" if D == 2 else "forward"
        attributes = {"hidden_size": H, "direction": direction, **operator.attributes}
        if "activations" in attributes:
            attributes["activations"] = attributes["activations"] * D
        node(operator.name, operands, [f"raw{k}", *(f"{name}n{k}" for name in names)], **attributes)
        node("Transpose", [f"raw{k}"], [f"rows{k}"], perm=[0, 2, 1, 3])  # [T, D, B, H] -> [T, B, D, H]
        below = "y" if k == L - 1 else f"y{k}"
        node("Reshape", [f"rows{k}", "merged"], [below])
    for state in names:
        node("Concat", [f"{state}n{k}" for k in range(L)], [f"{state}n"], axis=0)

    def value(name: str, kind: int, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    inputs = [value("x", TensorProto.FLOAT, "T", "B", module.input_size)]
    inputs += [
        value(name, TensorProto.FLOAT, L * D, "B", H) for name in ([f"{name}0" for name in names] if states else [])
    ]
    inputs += [value("lengths", TensorProto.INT32, "B")] if lengths else []
    outputs = [value("y", TensorProto.FLOAT, "T", "B", D * H)]
    outputs += [value(name, TensorProto.FLOAT, L * D, "B", H) for name in (f"{name}n" for name in names)]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Between two runs its threads would go on spinning, and take the core of the contender that comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _one_layer_on_a_gpu(cell: BenchmarkCase, dtypes: tuple[str, ...]) -> str | None:
    if cell.device != "cuda":
        return "it computes on a GPU"
    if cell.case.layers > 1 or cell.case.bidirectional:
        return "it has one layer and one direction"
    if cell.variant != "plain":
        return f"it has no {cell.variant} input"
    return None if cell.dtype in dtypes else f"it computes {', '.join(dtypes)}"


def flashrnn() -> Contender:
    """FlashRNN's fused CUDA kernel; its float32 multiplies in TF32."""
    return Contender(
        "FlashRNN",
        FlashRNN,
        lambda *_: f"{_version('flashrnn')}, cuda_fused",
        _missing("flashrnn"),
        lambda cell: _one_layer_on_a_gpu(cell, ("bfloat16", "float16", "tf32")),
    )


class FlashRNN(nn.LSTM):
    """The input affine by torch, which FlashRNN leaves to its user, and the recurrence by FlashRNN."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Any:  # type: ignore[override]
        function: Any = importlib.import_module("flashrnn").flashrnn
        function = getattr(function, "flashrnn", function)  # in some versions that is a module of the same name
        (T, B, _), H = input.shape, self.hidden_size
        w_ih, w_hh, b_ih, b_hh = self.parameters()
        affine = nn.functional.linear(input, w_ih).view(T, B, 4, 1, H).transpose(0, 1)
        weights, bias = w_hh.view(4, 1, H, H), (b_ih + b_hh).view(4, 1, H)
        states = None if hx is None else torch.stack([state[0] for state in hx]).view(2, B, 1, 1, H)
        dtype = str(input.dtype).removeprefix("torch.")
        values, last = function(
            affine, weights, bias, states=states, function="lstm", backend="cuda_fused", dtype=dtype
        )
        h, c = last.reshape(2, 1, B, H)
        return values[0].reshape(B, T, H).transpose(0, 1), (h, c)


def haste() -> Contender:
    """haste's LSTM, whose initial states are zeros."""

    def unsupported(cell: BenchmarkCase) -> str | None:
        return "its initial states are zeros" if cell.case.hx else _one_layer_on_a_gpu(cell, ("float32", "float64"))

    return Contender("haste", Haste, lambda *_: _version("haste_pytorch"), _missing("haste_pytorch"), unsupported)


class Haste(nn.LSTM):
    """haste's function on the parameters of an nn.LSTM; its gates stand in the order i g f o."""

    def forward(self, input: Tensor, hx: None = None) -> Any:  # type: ignore[override]
        function: Any = importlib.import_module("haste_pytorch.lstm").LSTMFunction
        w_ih, w_hh, b_ih, b_hh = self.parameters()
        i, f, g, o = torch.cat([w_ih, w_hh, (b_ih + b_hh).unsqueeze(1)], dim=1).chunk(4)
        kernel, recurrent, bias = torch.cat([i, g, f, o]).T.split([self.input_size, self.hidden_size, 1])
        nothing = input.new_empty(0)  # no zoneout
        operands = (input.contiguous(), kernel.contiguous(), recurrent.contiguous(), bias.flatten())
        h, c = function.apply(torch.is_grad_enabled(), 0.0, *operands, nothing)
        return h[1:], (h[-1:], c[-1:])
