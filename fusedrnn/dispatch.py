"""Backend selection: the table of backends, the choice, and the reasons for it.

A backend requested by name that cannot run the call raises an error. Otherwise the first backend that supports the call
is selected, in an order that follows from measured times: see fusedrnn/tuning/choice.py.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import gpu, ops
from .cells import CELLS, LSTM, OWN, VARIANTS, Cell, named, obstacle
from .layout import cell_of, is_step
from .tuning import choice
from .tuning.profile import Key, Ratio

ENVIRONMENT_VARIABLE = "FUSEDRNN_BACKEND"
# Before torch 2.12, autocast does not cast the state of packed sequences, even if all have the same length.
EQUAL_PACKED_IS_WIDE = torch.__version__ < "2.12"  # as versions, not as texts
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """One call of a stack of layers: what decides whether a backend supports it, and how fast it is."""

    device: str  # a device type: "cpu", "cuda", ...
    dtype: torch.dtype
    T: int
    B: int
    I: int
    H: int
    P: int
    D: int
    lengths: bool = False
    reset: bool = False
    states: bool = False
    packed: bool = False  # a PackedSequence with sequences of different lengths
    cell: str = LSTM.name
    # These affect the speed only:
    train: bool = False  # a gradient may be asked for
    L: int = 1
    step: bool = False  # a call of a cell module, such as LSTMCell


class Backend(NamedTuple):
    """One row of the table."""

    name: str
    unavailable: Callable[[], str | None]  # why it is unavailable on this machine, or None
    unsupported: Callable[[Problem], str | None]  # why it cannot run the problem, or None
    plan: Callable[[Problem], str]
    takes_packed: bool = False  # takes the rows of a PackedSequence; otherwise they are padded
    cells: Container[str] = frozenset(CELLS)  # by name
    generates: bool = False  # code for cells of one's own


def _cpu_unsupported(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"it computes on the CPU, and the input is on {problem.device}"
    return _dtype_unsupported(problem) or _distrusted("cpu", problem)


def _aten_unsupported(problem: Problem) -> str | None:
    if problem.lengths or problem.reset or problem.states:
        asked = [name for name in ("lengths", "reset", "states") if getattr(problem, name)]
        names = ", ".join("return_states" if a == "states" else a for a in asked)
        return f"torch's own {named(problem.cell).title} has no {names}"
    if ops.exporting_onnx():
        return "torch writes its own layers to ONNX for one T; the operators of the others are written for any"
    return None


def _dtype_unsupported(problem: Problem) -> str | None:
    if problem.dtype not in FLOATING:
        return f"it computes float64, float32, bfloat16 and float16, not {problem.dtype}"
    return None


def _cuda_unsupported(problem: Problem) -> str | None:
    if problem.device != ops.cuda_device_type():
        return f"it computes on a GPU, and the input is on {problem.device}"
    return _unproven("cuda", problem) or _unplanned("cuda", problem)


def _triton_unsupported(problem: Problem) -> str | None:
    interpreted = ops.triton_interpreted()
    if problem.device != ("cpu" if interpreted else "cuda"):
        where = "on the CPU, in its interpreter" if interpreted else "on a GPU"
        return f"it computes {where}, and the input is on {problem.device}"
    if interpreted and forced() != "triton":
        return "its interpreter is for tests: it runs where it is asked for by name"
    if problem.dtype == torch.float64 and forced() == "triton":
        return "it computes float32, bfloat16 and float16; float64 is left to torch and to the reference"
    return _unproven("triton", problem) or _unplanned("triton", problem)


def _unproven(name: str, problem: Problem) -> str | None:
    if forced() == name or _is_verified(name, problem.device, problem.dtype, problem.cell):
        return _distrusted(name, problem)
    device = problem.device
    return f"it has not been verified on this device: python -m fusedrnn tune --device {device} does, and measures it"


@ops.constant
def _is_measured(device: str) -> bool:
    """Whether profiles can exist for this device type on this machine."""
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


@ops.constant
def _is_verified(name: str, device: str, dtype: torch.dtype, cell: str) -> bool:
    """Whether a profile in use has a verdict on a backend on this machine: verified, or failed."""
    if not _is_measured(device):
        return False
    return choice.table(device, choice.which(device)).verdict(name, _dtype_name(device, dtype), cell)[0]


def _distrusted(name: str, problem: Problem) -> str | None:
    """The failure of a backend on this machine that a profile in use records, or None."""
    return None if forced() == name else _fault(name, problem.device, problem.dtype, problem.cell)


@ops.constant
def _fault(name: str, device: str, dtype: torch.dtype, cell: str) -> str | None:
    if not _is_measured(device):
        return None
    reason = choice.table(device, choice.which(device)).verdict(name, _dtype_name(device, dtype), cell)[1]
    return None if reason is None else f"it failed verification on this machine: {reason}"


def _unplanned(name: str, problem: Problem) -> str | None:
    """Why a GPU backend has no plan for a problem, or None; with symbolic sizes the operator raises instead."""
    reason = _dtype_unsupported(problem)
    if reason is None and not torch.compiler.is_compiling() and problem.B > 0:
        try:
            _gpu_plans(name, problem)
        except ValueError as error:
            return str(error)
    return reason


def _gpu_plan(name: str, problem: Problem) -> str:
    return "; ".join(f"{kernel}: {plan}" for kernel, plan in _gpu_plans(name, problem).items())


def _gpu_plans(name: str, problem: Problem) -> dict[str, Any]:
    p = problem
    return ops.gpu_plans(
        name, p.cell, p.T, p.B, p.I, p.H, p.P, p.D, p.dtype, p.lengths or p.reset or p.packed, p.device
    )


def _cpu_plan(problem: Problem) -> str:
    p = problem
    # Otherwise one operator computes one layer.
    is_stack = not (p.train or p.lengths or p.reset or p.states or p.packed or "+" in p.cell)
    layers = p.L if is_stack else 1
    return torch.ops.fusedrnn.cpu_plan(p.cell, p.T, p.B, p.I, p.H, p.P, p.D, p.dtype, layers)


def _aten_plan(problem: Problem) -> str:
    return f"torch's own {named(problem.cell).title} for this device"


class _EveryCell:
    """A container of all cell names, custom cells included."""

    def __contains__(self, name: object) -> bool:
        return True


_ALL_CELLS = frozenset((*CELLS, *VARIANTS))

TABLE = {
    backend.name: backend
    for backend in (
        Backend("cuda", ops.cuda_unavailable, _cuda_unsupported, partial(_gpu_plan, "cuda"), cells=_ALL_CELLS),
        Backend(
            "triton",
            ops.triton_unavailable,
            _triton_unsupported,
            partial(_gpu_plan, "triton"),
            cells=_ALL_CELLS,
            generates=True,
        ),
        Backend("cpu", lambda: ops.cpu_unavailable, _cpu_unsupported, _cpu_plan, True, cells=_ALL_CELLS),
        Backend("aten", lambda: None, _aten_unsupported, _aten_plan),
        Backend(
            "reference",
            lambda: None,
            _dtype_unsupported,
            lambda _: "a Python loop over the time steps",
            cells=_EveryCell(),
        ),
    )
}

_NAMES = tuple(TABLE)

_default: str = os.environ.get(ENVIRONMENT_VARIABLE, "") or "auto"


@dataclass(eq=False)
class _Request:
    """An open `use_backend`."""

    name: str
    outer: _Request | None  # the one around it
    is_open: bool = True


_requests: list[_Request] = []  # the open ones, the newest last
_requests_lock = threading.Lock()
_own_request: ContextVar[_Request | None] = ContextVar("fusedrnn_use_backend", default=None)
# The newest request, or the default: threads started by DataParallel or autograd must see it too.
_forced: str = _default
_is_contested: bool = False  # whether requests are open that are not nested in each other


def forced() -> str:
    """The requested backend or "auto": of the innermost `use_backend` of this thread or task, else the newest."""
    if not _is_contested:
        return _forced
    request = _innermost(_own_request.get())
    return _forced if request is None else request.name


def _innermost(request: _Request | None) -> _Request | None:
    """The innermost open request, from `request` outwards."""
    while request is not None and not request.is_open:
        request = request.outer
    return request


def _count_requests() -> None:
    """Updates `_forced` and `_is_contested`."""
    global _forced, _is_contested
    nested, request = 0, _requests[-1] if _requests else None
    while request is not None:
        nested, request = nested + 1, _innermost(request.outer)
    _is_contested = nested < len(_requests)
    _forced = _requests[-1].name if _requests else _default


def product_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes matrix products on input's device; None if autocast is off."""
    if not torch._C._is_any_autocast_enabled():  # fast path
        return None
    device = input.device.type
    if not (ops.has_autocast(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


def autocast_dtype(cell: Cell, input: Tensor, h: Tensor | None, c: Tensor | None, *, whole: bool) -> torch.dtype | None:
    """The compute dtype of a layer or a time step under autocast; None if autocast is off for input's device.

    This is the autocast dtype, except for cells with a carry on the CPU, where autocast casts only the matrix products.
    There the carry, and so the state, has the wider of the autocast dtype and the dtype of the initial state (of input
    if there is none), and everything is computed in that dtype. An nn.LSTM is cast as a `whole` nevertheless, except
    nn.LSTMCell, packed sequences of different lengths, and projections.
    """
    dtype = product_dtype(input)
    if dtype is None or input.device.type != "cpu" or cell.carry is None or (whole and cell.has_cell_state):
        return dtype
    state = c if cell.has_cell_state else h
    state = input if state is None else state
    return dtype if state.dtype == torch.float64 else torch.promote_types(dtype, state.dtype)


def _check_name(name: str) -> None:
    if name != "auto" and name not in TABLE:
        raise ValueError(f"unknown backend {name!r}: expected one of auto, {', '.join(TABLE)}")


def supports(name: str, problem: Problem) -> str | None:
    """Why backend `name` cannot compute `problem`, or None if it can."""
    backend = TABLE[name]
    reason = backend.unavailable()
    return reason or _no_kernel(backend, problem.cell) or backend.unsupported(problem)


def _no_kernel(backend: Backend, cell: str) -> str | None:
    """Why a backend does not have a cell, or None."""
    if cell in backend.cells:
        return None
    reason = f"it has no kernel for the cell {cell}"
    if not backend.generates or cell not in OWN:
        return reason
    why = obstacle(OWN[cell])
    return None if why is None else f"{reason}, and can generate none: {why}"


def select(problem: Problem) -> str:
    """The backend for `problem`: the requested one, or the fastest that supports it.

    Raises:
        ValueError: there is no backend of the requested name.
        RuntimeError: the requested backend cannot compute this problem, or no backend can; the message says why.
    """
    asked = forced()
    if asked != "auto":
        _check_name(asked)
        reason = supports(asked, problem)
        if reason is not None:
            raise RuntimeError(f"backend {asked!r} was asked for and cannot run: {reason}")
        return asked
    for name in _order(problem):
        if supports(name, problem) is None:
            if name == "reference":
                _warn_of_the_reference(problem)
            return name
    reasons = "; ".join(f"{name}: {supports(name, problem)}" for name in TABLE)
    raise RuntimeError(f"no backend can compute this: {reasons}")


def _warn_of_the_reference(problem: Problem) -> None:
    """Warns that the reference, a Python loop, runs on a GPU, for options that torch's layers lack."""
    if problem.device != "cuda" or torch.compiler.is_compiling():
        return
    kernels = [name for name in TABLE if name not in ("cpu", "aten", "reference")]
    reasons = "; ".join(f"{name}: {supports(name, problem)}" for name in kernels)
    warnings.warn(
        "lengths, reset, return_states and variants of the LSTM are computed by a Python loop over the time steps on "
        f"{problem.device}, which is slow. What else there is: {reasons}. fusedrnn.use_backend or FUSEDRNN_BACKEND "
        "asks by name",
        RuntimeWarning,
        stacklevel=2,
    )


def _order(problem: Problem) -> tuple[str, ...]:
    """All backends, fastest first.

    Traced and compiled programs run with other shapes; on a CPU torch's own layers cannot be traced for any shape.
    """
    if not _goes_by_profile(problem):
        return _NAMES
    if not is_eager():
        return _NAMES if problem.device == "cpu" else _order_for_any_shape(problem.device, problem.dtype, problem.cell)
    return _choice(problem).order


def _goes_by_profile(problem: Problem) -> bool:
    """Whether measurements decide. Variants of the LSTM have one backend with kernels on a CPU, and two on a GPU."""
    is_choice = problem.cell in CELLS or (problem.cell in VARIANTS and problem.device != "cpu")
    return is_choice and _is_measured(problem.device)


@ops.constant
def _order_for_any_shape(device: str, dtype: torch.dtype, cell: str) -> tuple[str, ...]:
    return choice.table(device, choice.which(device)).overall(_dtype_name(device, dtype), _NAMES, cell)


def _choice(problem: Problem) -> choice.Choice:
    device = problem.device
    return choice.choose(device, choice.which(device), key_of(problem), _NAMES)


def key_of(p: Problem) -> Key:
    """The key of a problem in a profile; an empty batch counts as one sequence."""
    name, projected = _dtype_name(p.device, p.dtype), p.P != p.H
    return Key(name, p.train, p.T, max(p.B, 1), max(p.I, 1), p.H, p.L, p.D, p.step, p.packed, projected, p.cell)


def _dtype_name(device: str, dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and device == "cuda" and gpu.fp32_precision() != "ieee"
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


def is_aten_faster(
    cell: Cell,
    input: Tensor,
    weights: Sequence[Tensor],
    num_layers: int,
    batch_first: bool,
    bidirectional: bool,
    train: bool,
) -> bool:
    """Whether `select` returns "aten" for plain layers, or one time step, given that `is_plain_on_cpu(input)`.

    If the cpu backend has a kernel for the cell, call this only for inputs of more than `tuning.choice.small` elements.
    """
    if _forced != "auto":
        return False
    if cell.name not in TABLE["cpu"].cells:
        return True
    sizes = input.shape if not batch_first else (input.shape[1], input.shape[0], input.shape[2])
    which = choice.which("cpu"), choice.reads
    return _is_aten_faster(cell.name, input.dtype, sizes, weights[1].shape, num_layers, bidirectional, train, *which)


@lru_cache(maxsize=8192)
def _is_aten_faster(
    cell: str,
    dtype: torch.dtype,
    sizes: Sequence[int],
    w_hh: Sequence[int],
    num_layers: int,
    bidirectional: bool,
    train: bool,
    threads: int,
    reads: int,
) -> bool:
    """sizes: [T, B, I], or [B, I] for one time step."""
    *steps, B, I = sizes
    H, P = w_hh[0] // len(named(cell).gates), w_hh[1]
    if min(*sizes, H, P, num_layers) < 1:
        return False
    T, D = steps[0] if steps else 1, 2 if bidirectional else 1
    problem = Problem("cpu", dtype, T, B, I, H, P, D, cell=cell, train=train, L=num_layers, step=not steps)
    order = _choice(problem).order
    return order.index("aten") < order.index("cpu")


def is_plain_on_cpu(input: Tensor) -> bool:
    """Fast path of `select`: whether it returns "cpu", or "aten" if `is_aten_faster`, for any layer with this input,
    and no autocast, transform or trace is active."""
    return (
        input.is_cpu
        and (_forced == "auto" or _forced == "cpu")
        and not _is_contested
        and ops.cpu_unavailable is None
        and not _any_autocast()
        and is_eager()
    )


# Attribute lookups cost time in a call of one time step.
_any_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_any_transform = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling


def is_recorded() -> bool:
    """Whether the call is traced or compiled: then it must not depend on the values of the example."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor is batched by torch.func.vmap, also inside wrappers of other transforms."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return functorch.is_batchedtensor(tensor)


def is_eager() -> bool:
    """Whether no transform and no trace is active, so that decisions may depend on tensor values."""
    return (
        not _is_compiling()
        and _tracing_state() is None
        and not _any_transform()
        and torch.autograd.forward_ad._current_level < 0
    )


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it is available, otherwise the reason why not."""
    return {name: backend.unavailable() for name, backend in TABLE.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context in which all calls run on one backend; "auto" restores the automatic choice.

    Applies to the whole process. Threads and asyncio tasks inside a `use_backend` of their own use their innermost one;
    all others use the open one that was entered last.

    The backward of a layer always runs on the backend of its forward.

    Args:
        name: "auto", or a name from `backends()`.

    Raises:
        ValueError: there is no backend of this name.
        RuntimeError: it is unavailable; the message says why. Calls that it cannot compute raise a RuntimeError, too.
    Example:
        >>> x, lstm = torch.randn(5, 2, 4), fusedrnn.LSTM(4, 8)
        >>> with fusedrnn.use_backend("reference"):
        ...     y, (hn, cn) = lstm(x)
        >>> y.shape
        torch.Size([5, 2, 8])
    """
    _check_name(name)
    reason = TABLE[name].unavailable() if name != "auto" else None
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for and is not available: {reason}")
    with _compiled_request(name) if torch.compiler.is_compiling() else _request(name):
        yield


@contextmanager
def _compiled_request(name: str) -> Iterator[None]:
    """`use_backend` while Dynamo traces, which cannot trace locks."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def _request(name: str) -> Iterator[None]:
    request = _Request(name, _innermost(_own_request.get()))
    _own_request.set(request)
    with _requests_lock:
        _requests.append(request)
        _count_requests()
    try:
        yield
    finally:
        request.is_open = False
        with _requests_lock:
            _requests.remove(request)
            _count_requests()
        if _own_request.get() is request:  # false if another task closes the generator
            _own_request.set(request.outer)


@dataclass(frozen=True)
class Explanation:
    """The backend that a call would use, and why each other one was rejected. Printing it shows everything."""

    problem: Problem
    backend: str | None
    plan: str
    reasons: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)  # backend -> expected speed over the baseline's
    measured: str = ""  # which measurement and profile the ratios come from; or what decided instead

    def __str__(self) -> str:
        lines = [f"{self.backend or 'no backend'}: {self.plan}" if self.plan else f"{self.backend or 'no backend'}"]
        slower = "torch's own" if self.problem.cell in CELLS else "the reference"
        lines += [
            f"  {name} is {ratio.median:.2f} times as fast as {slower} ({ratio.low:.2f} at the least)"
            for name, ratio in self.ratios.items()
        ]
        lines += [f"  {self.measured}"] if self.measured else []
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    return_states: bool = False,
) -> Explanation:
    """Explains which backend `module(input, hx, ...)` would run on, without running it.

    Args:
        module: an LSTM, GRU, RNN, or a cell of these, of fusedrnn or of torch.nn; a module of torch.nn is treated as
            if it were converted.
        input, hx, lengths, reset, return_states: the arguments of the call.

    Returns:
        The backend, its plan, why each other backend was skipped or comes later in the order, and what the order
        follows from: the measured speed of each backend relative to torch's own layer, and where it was measured. The
        call is training if gradients are enabled and the input, hx or a parameter requires one, otherwise inference.

    Raises:
        TypeError: module is not one of these, or input is neither a tensor nor a PackedSequence.
    Example:
        >>> with fusedrnn.use_backend("reference"):
        ...     fusedrnn.explain(fusedrnn.GRU(4, 8), torch.randn(5, 2, 4)).backend
        'reference'
    """
    problem = problem_of(module, input, hx, lengths is not None, reset is not None, return_states)
    reasons = {name: reason for name in TABLE if (reason := supports(name, problem)) is not None}
    chosen = None
    asked = forced()
    made = _choice(problem) if asked == "auto" and _goes_by_profile(problem) and is_eager() else None
    if asked != "auto":
        _check_name(asked)
        reasons |= {name: f"{asked} was asked for" for name in TABLE if name != asked and name not in reasons}
        chosen = None if asked in reasons else asked
    else:
        chosen = next((name for name in _order(problem) if name not in reasons), None)
        reasons |= {name: f"{chosen} is preferred" for name in TABLE if name != chosen and name not in reasons}
    plan = TABLE[chosen].plan(problem) if chosen else ""
    if made is None:
        return Explanation(problem, chosen, plan, reasons)
    return Explanation(problem, chosen, plan, reasons, made.ratios, made.reason)


def problem_of(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    lengths: bool = False,
    reset: bool = False,
    return_states: bool = False,
) -> Problem:
    """The `Problem` of the call `module(input, hx, ...)`; raises what `explain` raises."""
    cell, step = cell_of(module), is_step(module)
    if cell is None:
        raise TypeError(f"module must be an LSTM, GRU or RNN, or a cell of one, got {type(module).__name__}")
    packed, whole = False, not (step or bool(getattr(module, "proj_size", 0)))
    if isinstance(input, PackedSequence) and not step:
        data, sizes = input.data, input.batch_sizes.tolist()
        T, B, packed = len(sizes), sizes[0], sizes[-1] < sizes[0]
        whole = whole and not (packed or EQUAL_PACKED_IS_WIDE)
    elif isinstance(input, Tensor):
        data = input
        T, B = _sizes(module, input, cell, step)
    else:
        expected = "a Tensor" if step else "a Tensor or a PackedSequence"
        raise TypeError(f"input must be {expected}, got {type(input).__name__}")
    noise = getattr(module, "_noise", None)
    cell = cell if noise is None else noise.cell(cell, module.training)
    states = [s for s in ([hx] if isinstance(hx, Tensor) else hx or ()) if isinstance(s, Tensor)]
    h, c, *_ = [*states, None, None]
    cast = autocast_dtype(cell, data, h, c if cell.has_cell_state else None, whole=whole)
    H = int(module.hidden_size)  # type: ignore[arg-type]
    leaves = (data, *states, *module.parameters())
    return Problem(
        device=data.device.type,
        dtype=data.dtype if cast is None or data.dtype == torch.float64 else cast,
        T=T,
        B=B,
        I=int(module.input_size),  # type: ignore[arg-type]
        H=H,
        P=int(getattr(module, "proj_size", 0) or H),
        D=2 if getattr(module, "bidirectional", False) else 1,
        lengths=lengths,
        reset=reset,
        states=return_states,
        packed=packed,
        cell=cell.name,
        train=torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves),
        L=int(getattr(module, "num_layers", 1)),
        step=step,
    )


def _sizes(module: nn.Module, input: Tensor, cell: Cell, step: bool) -> tuple[int, int]:
    """T and B of an input tensor of module."""
    batched = 2 if step else 3
    if input.dim() not in (batched - 1, batched):
        name = f"{cell.title}Cell" if step else cell.title
        raise ValueError(f"{name}: Expected input to be {batched - 1}D or {batched}D, got {input.dim()}D instead")
    if step:
        return 1, input.shape[0] if input.dim() == batched else 1
    T, B = (input.shape[0], 1) if input.dim() < batched else input.shape[:2]
    return (B, T) if module.batch_first and input.dim() == batched else (T, B)
