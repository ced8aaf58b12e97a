"""The contenders: torch's own layer, also compiled, a loop over LSTMCell, the peers, and the backends of fusedrnn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import dispatch
from fusedrnn.cells import LSTM, VARIANTS

from . import peers
from .cases import BenchmarkCase
from .contender import BASELINE, OURS, TORCHS, Contender


class _AsWritten(nn.RNNBase):
    """The code a user writes around torch's own layer for `lengths` and `reset`."""

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Any:
        if lengths is not None:
            assert isinstance(input, Tensor)
            packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
            y, state = super().forward(packed, hx)
            return pad_packed_sequence(y, total_length=len(input))[0], state
        if reset is None:
            return super().forward(input, hx)
        assert isinstance(input, Tensor)
        h, c = _zeros(self, input)
        state: Any = hx if hx is not None else (h, c) if isinstance(self, nn.LSTM) else h
        outputs = []
        for x, keep in zip(input.unsqueeze(1), (~reset).unsqueeze(-1).to(input.dtype), strict=True):
            state = state * keep if isinstance(state, Tensor) else tuple(s * keep for s in state)
            y, state = super().forward(x, state)
            outputs.append(y)
        return torch.cat(outputs), state


class TorchLSTM(_AsWritten, nn.LSTM):
    """nn.LSTM."""


class TorchGRU(_AsWritten, nn.GRU):
    """nn.GRU."""


class TorchRNN(_AsWritten, nn.RNN):
    """nn.RNN."""


_TORCH_LAYERS = {"lstm": TorchLSTM, "gru": TorchGRU, "rnn_tanh": TorchRNN, "rnn_relu": TorchRNN}
_OUR_LAYERS = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU, "rnn_tanh": fusedrnn.RNN, "rnn_relu": fusedrnn.RNN}


class CompiledLSTM(nn.LSTM):
    """nn.LSTM under torch.compile. `module.compile()` would not do: it leaves what is called an nn.LSTM untraced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch._dynamo.reset()  # after a few modules the compiler would give up and call nn.LSTM as it is
        self._compiled = torch.compile(lambda *operands: nn.LSTM.forward(self, *operands))

    def forward(self, *operands: Any) -> Any:
        return self._compiled(*operands)


class CellLoop(nn.LSTM):
    """A loop over the function of nn.LSTMCell, with the parameters of an nn.LSTM."""

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, reset: Tensor | None = None
    ) -> Any:
        h0, c0 = hx or _zeros(self, input)
        keeps: Any = [None] * len(input) if reset is None else (~reset).unsqueeze(-1).to(input.dtype)
        D, last = 2 if self.bidirectional else 1, []
        layer: Sequence[Tensor] = input.unbind()
        for k in range(self.num_layers):
            directions = []
            for row in range(k * D, (k + 1) * D):
                weights = [getattr(self, name) for name in self._all_weights[row]]
                h, c, order = h0[row], c0[row], -1 if row > k * D else 1
                outputs = []
                for x, keep in list(zip(layer, keeps, strict=True))[::order]:
                    if keep is not None:
                        h, c = h * keep, c * keep
                    h, c = torch._VF.lstm_cell(x, (h, c), *weights)
                    outputs.append(h)
                directions.append(outputs[::order])
                last.append((h, c))
            layer = directions[0] if D == 1 else [torch.cat(pair, -1) for pair in zip(*directions, strict=True)]
        hn, cn = (torch.stack(states) for states in zip(*last, strict=True))
        return torch.stack(list(layer)), (hn, cn)


def _zeros(module: nn.RNNBase, input: Tensor) -> tuple[Tensor, Tensor]:
    shape = module.num_layers * (2 if module.bidirectional else 1), input.shape[1], module.hidden_size
    return input.new_zeros(shape), input.new_zeros(shape)


def entered(
    backends: Sequence[str] | None = None, baselines: Sequence[str] | None = None, kind: str = LSTM.name
) -> list[Contender]:
    """The contenders in the order of the table: torch's own layer first and always, unavailable ones included.

    Args:
        backends: the backends of fusedrnn, and "auto" for what it chooses; by default those with kernels, that is all
            but `aten` and `reference`, or those two where there is nothing else.
        baselines: names of `BASELINES`, by default all.
        kind: which cell it is about, a name of `fusedrnn.cells.CELLS` or `VARIANTS`. Of others than the LSTM there are
            torch's own layer and ONNX Runtime among the baselines; of a variant there is the reference.
    """
    reasons = dispatch.backends()
    if backends is None:
        kernels = [name for name in reasons if name not in ("aten", "reference")]
        usable = [name for name in kernels if reasons[name] is None]
        backends = kernels if usable else list(reasons)
    chosen = [name for name in BASELINES if baselines is None or name in (BASELINE, *baselines)]
    if kind == LSTM.name:
        others = [BASELINES[name]() for name in chosen]
    elif kind in VARIANTS:
        others = [_backend("reference", None, kind)]
    else:
        others = [_torch(kind), *([peers.onnxruntime(kind)] if "onnxruntime" in chosen else [])]
    return [*others, *(_backend(name, reasons.get(name), kind) for name in backends)]


def _torch(kind: str = LSTM.name) -> Contender:
    return Contender(TORCHS[kind], _TORCH_LAYERS[kind], _torch_ran, unsupported=_baseline_unsupported)


def _torch_compile() -> Contender:
    return Contender("torch.compile", CompiledLSTM, _torch_ran, _no_compiler(), _compiled_unsupported, _tracing_lstms)


def _lstm_cell() -> Contender:
    return Contender("LSTMCell", CellLoop, _torch_ran, unsupported=_loop_unsupported)


BASELINES: dict[str, Callable[[], Contender]] = {
    BASELINE: _torch,
    "torch.compile": _torch_compile,
    "LSTMCell": _lstm_cell,
    "onnxruntime": peers.onnxruntime,
    "FlashRNN": peers.flashrnn,
    "haste": peers.haste,
}


def _backend(name: str, unavailable: str | None, kind: str) -> Contender:
    def ran(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> str:
        explanation = fusedrnn.explain(module, *args, **options)
        return f"{explanation.backend}: {explanation.plan}" if explanation.plan else str(explanation.backend)

    def unsupported(cell: BenchmarkCase) -> str | None:
        if name == "auto":
            return None
        case = cell.case
        extras = {"lengths": case.lengths, "reset": case.reset, "packed": case.packed, "cell": kind}
        sizes = (case.T, case.B, case.I, case.H, case.H, cell.D)
        with fusedrnn.use_backend(name):  # as it is measured: some run only where they are asked for
            return dispatch.supports(name, dispatch.Problem(cell.device, case.dtype, *sizes, **extras))

    layer = _OUR_LAYERS.get(kind, fusedrnn.LSTM)
    return Contender(OURS + name, layer, ran, unavailable, unsupported, active=lambda: fusedrnn.use_backend(name))


def _torch_ran(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    if next(module.parameters()).device.type == "cuda":
        return f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    return f"torch {torch.__version__}, oneDNN {'on' if torch.backends.mkldnn.is_available() else 'missing'}"


def _baseline_unsupported(cell: BenchmarkCase) -> str | None:
    if cell.case.reset and cell.case.bidirectional:
        return f"{TORCHS[cell.case.cell]} has no resets, and stepping it can only go one way"
    return None


def _loop_unsupported(cell: BenchmarkCase) -> str | None:
    return "the loop runs over sequences of one length" if cell.variant in ("packed", "lengths") else None


def _compiled_unsupported(cell: BenchmarkCase) -> str | None:
    return None if cell.variant == "plain" else "it is compiled for plain input only"


def _no_compiler() -> str | None:
    try:
        import torch._dynamo
    except ImportError as error:
        return str(error)
    return None if torch._dynamo.is_dynamo_supported() else "torch.compile does not run here"


@contextmanager
def _tracing_lstms() -> Iterator[None]:
    """The compiler refuses to trace an nn.LSTM unless told."""
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
