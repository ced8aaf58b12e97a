"""Shared by tests, `check` and benchmarks: devices, cases and their inputs, torch's own results, the tolerance.

The tolerance is derived from the error of torch's own implementation in the same dtype:

    max |ours - exact|  <=  2 max |baseline - exact| + rounding

where `exact` is computed in float64 from the same inputs, rounded to the dtype. `rounding` is needed because torch's
error can be 0 by chance, as is common in a tensor of one element. It is the change of `exact` when every input is
perturbed, up or down, by `roundoff(dtype)`. Where terms cancel, this is far more than a unit in the last place of the
result, and no implementation can do better. If only `exact` is available, its largest element is assumed to change by
`roundoff(dtype)` of itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import aten, ops
from .cells import CELLS, GRU, LSTM, RNN_RELU, Cell

# torch's own layers, by the name of their cell.
LAYERS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
# Number of random perturbations in `answers`. Where an argument of relu is within 16-bit rounding of 0, its derivative
# is 0 or 1 depending on the rounding; it takes many perturbations to find that.
_NUDGES, _NUDGES_AT_A_KINK = 3, 16


def devices() -> list[str]:
    """The devices to test on: "cpu", and "cuda" if available."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@cache
def nn_lstm_autocasts() -> bool:
    """Whether nn.LSTM computes under CPU autocast to bfloat16. On processors without instructions for bfloat16 torch
    calls oneDNN all the same, which refuses."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.LSTM(1, 1)(torch.zeros(1, 1, 1))[0].dtype == torch.bfloat16
    except RuntimeError:
        return False


@contextmanager
def poisoned() -> Iterator[None]:
    """Context in which torch.empty and the CPU kernels fill new memory with NaN (integers: their largest value); the
    kernels do not pool memory meanwhile.

    It enables torch's deterministic mode for the whole process, for its filling of memory. Operators without a
    deterministic version only warn.
    """
    memory: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would also set an option of Inductor
    memory.fill_uninitialized_memory = True
    try:
        with nothing_kept(), _cpu_poisoned():
            yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def _cpu_poisoned() -> Iterator[None]:
    """Fills the memory that the CPU kernels allocate with NaN: they bypass torch.empty."""
    if ops.cpu_unavailable is not None:
        yield
        return
    torch.ops.fusedrnn.cpu_poison(True)
    try:
        yield
    finally:
        torch.ops.fusedrnn.cpu_poison(False)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Context without the CPU kernels' cache of packed weights and pool of memory, which are emptied."""
    if ops.cpu_unavailable is not None:
        yield
        return
    keep = torch.ops.fusedrnn.cpu_keep
    limit, *_ = keep()
    keep(0)
    try:
        yield
    finally:
        keep(limit)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Context in which torch uses one thread: many small problems are several times slower if threads share a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def roundoff(dtype: torch.dtype, cell: Cell = LSTM) -> float:
    """A bound on the roundings of one step, forward and backward, relative to its inputs.

    A rounding is half an eps. An LSTM in float32 has sixteen between the inputs of a step and da: two products, their
    sum, two biases, a nonlinearity, f * c and its sum with i * g, tanh and o * tanh(c); in the backward the sum dh,
    three products and a sum for dc, and one more for da. In float64 `exact` has as many roundings itself. bfloat16 and
    float16 are computed in float32, whose roundings are negligible; four stores round: h, c, the gates, the gradient.

    A GRU has as many: the path r * h_n, its sum with x_n, tanh, and (1 - z) * n + z * h is as long as that through c;
    h, the gates, h_n and the gradient are stored. An RNN has half: no state but h, and one product after dh. It stores
    only h and the gradient, but the next step depends on h alone: 16-bit dtypes count as for the other cells.
    """
    gated = cell in (LSTM, GRU)
    roundings = {64: 32 if gated else 16, 32: 16 if gated else 8, 16: 4}[torch.finfo(dtype).bits]
    return roundings * torch.finfo(dtype).eps / 2


class Answer(NamedTuple):
    """The reference values of one tensor, and its rounding."""

    baseline: Tensor  # of torch's own implementation, or another baseline, in the dtype under test
    exact: Tensor  # float64
    rounding: float = 0.0  # change of `exact` when the inputs are perturbed by `roundoff`


class InexactError(AssertionError):
    """A tensor exceeds its tolerance; `excess` is its error over the tolerance."""

    def __init__(self, message: str, excess: float) -> None:
        super().__init__(message)
        self.excess = excess


def excess(ours: Tensor, baseline: Tensor, exact: Tensor, rounding: float = 0.0) -> float:
    """The error of `ours` over its tolerance: at most 1 for a correct result.

    Args:
        ours, baseline: of one shape and dtype.
        exact: float64, of the same shape.
        rounding: as in `Answer`; `roundoff` of the largest element of `exact` if that is more.

    Returns:
        A number >= 0; infinity for a wrong shape or dtype, and for a NaN or infinity in `ours` or `baseline` that is
        not in `exact`.

    Raises:
        ValueError: exact is not float64.
    """
    if exact.dtype != torch.float64:
        raise ValueError(f"exact must be float64, got {exact.dtype}")
    if ours.dtype != baseline.dtype or not ours.shape == baseline.shape == exact.shape:
        return math.inf
    error, allowed = _error(ours, exact), 2 * _error(baseline, exact) + _rounding(baseline.dtype, exact, rounding)
    return error / allowed if math.isfinite(allowed) else math.inf


def assert_as_exact_as(name: str, ours: Tensor, baseline: Tensor, exact: Tensor, rounding: float = 0.0) -> float:
    """Asserts that a tensor is within its tolerance.

    Args:
        name: its name in the message.
        ours, baseline, exact, rounding: as in `excess`.

    Returns:
        The excess, at most 1.

    Raises:
        InexactError: the tolerance is exceeded, or a shape or dtype is wrong; the message says by how much.
        ValueError: exact is not float64.
    """
    ratio = excess(ours, baseline, exact, rounding)
    if ratio <= 1:
        return ratio
    if ours.shape != exact.shape or baseline.shape != exact.shape:
        complaint = f"shapes differ: ours {list(ours.shape)}, torch's {list(baseline.shape)}, exact {list(exact.shape)}"
    elif ours.dtype != baseline.dtype:
        complaint = f"expected {baseline.dtype}, got {ours.dtype}"
    else:
        complaint = (
            f"error {_error(ours, exact):.3g} is {ratio:.3g} times what is allowed, of values up to "
            f"{_largest(exact):.3g}; torch's own error is {_error(baseline, exact):.3g}, and rounding is worth "
            f"{_rounding(baseline.dtype, exact, rounding):.3g}"
        )
    raise InexactError(f"{name}: {complaint}", ratio)


def _error(values: Tensor, exact: Tensor) -> float:
    """max |values - exact|, infinite where exactly one of them is NaN."""
    values = values.to(exact)
    same = (values == exact) | (values.isnan() & exact.isnan())
    differences = (values - exact).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0)
    return float(differences.max()) if differences.numel() else 0.0


def _largest(exact: Tensor) -> float:
    magnitudes = exact.abs().nan_to_num(nan=0.0, posinf=0.0)
    return float(magnitudes.max()) if magnitudes.numel() else 0.0


def _rounding(dtype: torch.dtype, exact: Tensor, rounding: float) -> float:
    # The spacing of subnormal numbers is constant.
    return max(rounding, roundoff(dtype) * max(_largest(exact), torch.finfo(dtype).smallest_normal))


class Inputs(NamedTuple):
    """The arguments of a module's call."""

    x: Tensor  # [T, B, I], or [B, T, I] with batch_first; NaN where no step exists
    hx: Any  # (h0 [L*D, B, P], c0 [L*D, B, H]), or h0 for a cell without cell state; or None
    lengths: Tensor | None  # [B] int64
    reset: Tensor | None  # [T, B] bool, laid out as x


@dataclass(frozen=True)
class Case:
    """One problem: sizes, options, a dtype. Its random numbers depend on the seed only, and not on the device."""

    T: int
    B: int
    I: int
    H: int
    dtype: torch.dtype = torch.float32
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    batch_first: bool = False
    hx: bool = True  # initial states are given
    lengths: bool = False  # sequences of different lengths: the last one of length T, the first one of length 0
    packed: bool = False  # the input is a PackedSequence of such sequences, unsorted, each of at least one step
    reset: bool = False
    states: bool = False  # return_states
    strided: bool = False  # x, h0 and c0 are slices of larger tensors
    seed: int = 0
    cell: str = LSTM.name  # of `cells.CELLS`
    variant: tuple[tuple[str, Any], ...] = ()  # options of fusedrnn.LSTM that torch's lacks, by name

    @property
    def id(self) -> str:
        """The cell unless LSTM, the sizes, all options that are not the default, and the dtype."""
        parts = [] if self.cell == LSTM.name else [self.cell]
        parts += [f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        parts += [f"L{self.layers}"] if self.layers > 1 else []
        parts += [f"P{self.proj_size}"] if self.proj_size else []
        parts += [] if self.bias else ["nobias"]
        parts += [] if self.hx else ["nohx"]
        flags = ("bidirectional", "batch_first", "lengths", "packed", "reset", "states", "strided")
        parts += [flag for flag in flags if getattr(self, flag)]
        parts += [name if value is True else f"{name}={value}".replace(" ", "") for name, value in self.variant]
        parts += [f"seed{self.seed}"] if self.seed else []
        return "-".join([*parts, str(self.dtype).removeprefix("torch.")])

    def module(self, cls: Callable[..., nn.Module] | None = None, device: str = "cpu") -> nn.Module:
        """A module of the given class, by default torch's for the cell, with torch's initialisation."""
        own: dict[str, Any] = {"proj_size": self.proj_size, **dict(self.variant)} if self.cell == LSTM.name else {}
        if self.cell.startswith("rnn_"):
            own = {"nonlinearity": self.cell.removeprefix("rnn_")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = (LAYERS[self.cell] if cls is None else cls)(
                self.I,
                self.H,
                self.layers,
                bias=self.bias,
                batch_first=self.batch_first,
                bidirectional=self.bidirectional,
                dtype=self.dtype,
                **own,
            )
        return module.to(device)

    def inputs(self, device: str = "cpu", dtype: torch.dtype | None = None) -> Inputs:
        """The arguments of the module; in another dtype than the case's, the same values."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            margin = 1 if self.strided else 0
            larger = torch.randn(*shape[:-1], shape[-1] + 2 * margin, generator=generator)
            return larger.to(self.dtype).to(device, dtype).narrow(-1, margin, shape[-1])

        rows = self.layers * (2 if self.bidirectional else 1)
        sizes = (self.B, self.T) if self.batch_first else (self.T, self.B)
        x = random(*sizes, self.I)
        hx: Any = random(rows, self.B, self.proj_size or self.H) if self.hx else None
        if hx is not None and CELLS[self.cell].has_cell_state:
            hx = (hx, random(rows, self.B, self.H))
        lengths = reset = None
        if self.lengths or self.packed:
            lengths = torch.randint(1, self.T + 1, (self.B,), generator=generator)
            lengths[:1] = 1 if self.packed else 0
            lengths[-1:] = self.T
            lengths = lengths.to(device)
            x.masked_fill_(~_exists(self, lengths).unsqueeze(-1), math.nan)
        if self.reset:
            reset = (torch.rand(sizes, generator=generator) < 0.3).to(device)
        return Inputs(x, hx, lengths, reset)


def _exists(case: Case, lengths: Tensor) -> Tensor:
    """[T, B] bool, laid out as x: which steps exist."""
    steps = torch.arange(case.T, device=lengths.device)
    return steps < lengths.unsqueeze(1) if case.batch_first else steps.unsqueeze(1) < lengths


def arguments(case: Case, inputs: Inputs) -> tuple[Tensor | PackedSequence, Any, dict[str, Any]]:
    """The input, hx and keywords of the call, including fusedrnn's own keywords if the case needs them."""
    x, hx, lengths, reset = inputs
    options: dict[str, Any] = {}
    if reset is not None:
        options["reset"] = reset.T if case.packed and case.batch_first else reset
    if case.states:
        options["return_states"] = True
    if case.packed:
        assert lengths is not None
        return pack_padded_sequence(x, lengths.cpu(), case.batch_first, enforce_sorted=False), hx, options
    if lengths is not None:
        options["lengths"] = lengths
    return x, hx, options


Call = Callable[[Callable[..., Any], Case, Inputs], dict[str, Tensor]]


def call(module: Callable[..., Any], case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Calls a module with the arguments of the case. The masks of a variant depend on the seed of the case.

    Returns:
        y, hn, cn and, with states, h_l0, c_l0, h_l1, ...; packed results are padded with zeros. No cn and c for a cell
        without cell state.
    """

    def padded(values: Tensor | PackedSequence) -> Tensor:
        return pad_packed_sequence(values, case.batch_first)[0] if isinstance(values, PackedSequence) else values

    x, hx, options = arguments(case, inputs)
    with torch.random.fork_rng([inputs.x.device] if inputs.x.is_cuda else [], enabled=bool(case.variant)):
        if case.variant:
            torch.manual_seed(case.seed)
        y, last, *rest = module(x, hx, **options)
    outputs = {"y": padded(y), **_named_states(last, "hn", "cn")}
    for states in rest:
        for k, layer in enumerate(zip(*states, strict=True)):
            outputs |= {name: padded(state) for name, state in _named_states(layer, f"h_l{k}", f"c_l{k}").items()}
    return outputs


def _named_states(states: Any, h: str, c: str) -> dict[str, Any]:
    """Names the states of a layer, a tensor or a tuple of one or two; empty for None."""
    if states is None:
        return {}
    return dict(zip((h, c), (states,) if isinstance(states, Tensor) else states, strict=False))


def call_torch(module: Any, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """`call` for torch's own module, one time step at a time where it lacks an option of the case."""
    # torch passes float16 to oneDNN if the processor has instructions for it, and oneDNN may refuse.
    without_onednn = case.dtype == torch.float16 and inputs.x.device.type == "cpu"
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None) if without_onednn else nullcontext():
        if case.lengths or case.reset or case.states:
            return _call_stepwise(module, case, inputs)
        return call(module, case, inputs)


def _call_stepwise(module: Any, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    def transposed(values: Tensor) -> Tensor:
        return values.transpose(0, 1) if case.batch_first else values

    x, hx, lengths, reset = inputs
    T, B, D = case.T, case.B, 2 if case.bidirectional else 1
    rows, cell = case.layers * D, CELLS[case.cell]
    given = _named_states(hx, "h0", "c0")
    h0 = given.get("h0", x.new_zeros(rows, B, case.proj_size or case.H))
    c0 = given.get("c0", x.new_zeros(rows, B, cell.cell_size(case.H)))
    always = torch.ones(T, B, 1, dtype=torch.bool, device=x.device)
    exists = always if lengths is None else transposed(_exists(case, lengths)).unsqueeze(-1)
    keep = always if reset is None else ~transposed(reset).unsqueeze(-1)
    y = transposed(x).where(exists, 0.0)
    last, states = [], dict[str, Tensor]()
    for k in range(case.layers):
        traces = []
        for row in range(k * D, (k + 1) * D):
            weights = [getattr(module, name) for name in module._all_weights[row]]
            h, c = h0[row], c0[row]
            trace: list[tuple[Tensor, Tensor]] = [(h, c)] * T
            for t in reversed(range(T)) if row > k * D else range(T):
                h_in, c_in = (s.where(keep[t], 0.0).unsqueeze(0) for s in (h, c))
                _, h_t, c_t = aten.layers(cell, y[t : t + 1], None, weights, h_in, c_in, B, 1, 0.0, False)
                h = h_t[0].where(exists[t], h)
                c = c if c_t is None else c_t[0].where(exists[t], c)
                trace[t] = (h, c)
            traces.append([torch.stack(s).where(exists, 0.0) for s in zip(*trace, strict=True)])
            last.append((h, c))
        y, cs = (torch.cat(s, dim=-1) for s in zip(*traces, strict=True))
        states |= {f"h_l{k}": transposed(y), f"c_l{k}": transposed(cs)}
    hn, cn = (torch.stack(s) for s in zip(*last, strict=True))
    outputs = {"y": transposed(y), "hn": hn, "cn": cn, **(states if case.states else {})}
    return {name: values for name, values in outputs.items() if cell.has_cell_state or not name.startswith("c")}


def evaluate(
    caller: Call,
    cls: Callable[..., nn.Module] | None,
    case: Case,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    nudge: int = 0,
) -> dict[str, Tensor]:
    """All outputs of a case and, for random output gradients, the gradients of all inputs and weights.

    cuDNN computes float32 in IEEE precision here, not in TF32.

    Args:
        caller: `call`, `call_torch`, or a function with their signature.
        cls: the class of the module; None for torch's own.
        case: the problem.
        device: the device.
        dtype: the compute dtype if not the case's; the inputs are rounded to the case's dtype nevertheless.
        nudge: unless 0, the seed of the signs with which all inputs are perturbed by `roundoff`.

    Returns:
        The results of `caller`, and dx, dh0, dc0, dweight_ih_l0, ...: "d" and the name of the tensor.
    """
    module, inputs = case.module(cls, device).to(dtype), case.inputs(device, dtype)
    signs = torch.Generator().manual_seed(nudge)

    def nudged(values: Tensor) -> Tensor:
        if nudge:
            sign = torch.randint(0, 2, values.shape, generator=signs).mul_(2).sub_(1).to(values)
            values.mul_(1 + sign * roundoff(case.dtype, CELLS[case.cell]))
        return values

    leaves = {"x": inputs.x, **_named_states(inputs.hx, "h0", "c0"), **dict(module.named_parameters())}
    with torch.no_grad():
        leaves = {name: nudged(leaf).requires_grad_() for name, leaf in leaves.items()}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = caller(module, case, inputs)
        random = torch.Generator().manual_seed(case.seed + 1)
        douts = [nudged(torch.randn(y.shape, generator=random).to(case.dtype).to(y)) for y in outputs.values()]
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), douts)
    return {k: v.detach() for k, v in outputs.items()} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def answers(
    case: Case, device: str = "cpu", caller: Call | None = None, cls: Callable[..., nn.Module] | None = None
) -> dict[str, Answer]:
    """The reference values of each result of `evaluate`, for `excess(ours[name], *answers[name])`.

    Computed by torch's own module, or by the given class and caller (see `evaluate`)."""
    caller = call_torch if caller is None else caller
    kink = case.cell == RNN_RELU.name and case.dtype in (torch.bfloat16, torch.float16)
    nudges = _NUDGES_AT_A_KINK if kink else _NUDGES
    with single_threaded():
        baseline = evaluate(caller, cls, case, device)
        exact, *nudged = (evaluate(caller, cls, case, device, torch.float64, nudge) for nudge in range(nudges + 1))
    return {
        name: Answer(baseline[name], exact[name], max(_error(other[name], exact[name]) for other in nudged))
        for name in exact
    }
