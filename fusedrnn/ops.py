"""torch.library operators: one forward and one backward per backend, all of the same schema, with fake kernels; and an
inference-only forward on the CPU.

An operator computes one layer over a whole sequence, both directions. It does not mutate its arguments and is not
differentiable itself: `autograd.py` wraps the pair. Importing this module loads the native libraries, and records the
reason for each that cannot be loaded; it never compiles anything and never fails.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import flops, gpu, onnx, reference, sources
from .cells import named
from .layout import split_directions

NAMESPACE = "fusedrnn"

# The schemas of operators.def. The CPU library, compiled with the same file, defines these operators for programs
# without Python; if it is not loaded they are defined here. All backends share the two schemas.
_SCHEMAS = {
    name: "".join(re.findall(r'"([^"]*)"', strings))
    for name, strings in re.findall(
        r'^OPERATOR\((\w+),\s*((?:"[^"]*"\s*)+)\)', Path(__file__).with_name("operators.def").read_text(), re.MULTILINE
    )
}
FORWARD_SCHEMA, BACKWARD_SCHEMA = _SCHEMAS["cpu_forward"], _SCHEMAS["cpu_backward"]
MAX_WEIGHTS = len(re.findall(r"Tensor\?? w\d", FORWARD_SCHEMA))
_BEFORE_WEIGHTS = (9, 15)  # arguments of a forward, whose third is `bidirectional`, and of a backward

_library = torch.library.Library(NAMESPACE, "DEF")
_ops = getattr(torch.ops, NAMESPACE)


def _define(backend: str, forward_fake: Callable[..., Any] | None = None) -> None:
    for name, schema, fake, position in (
        (f"{backend}_forward", FORWARD_SCHEMA, forward_fake or _forward_fake, 2),
        (f"{backend}_backward", BACKWARD_SCHEMA, _backward_fake, 6),
    ):
        _define_once(name, schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        _library.define(f"{name}.list{_listed(schema)}")
        _library.impl(f"{name}.list", _of_list(name, position), "CompositeImplicitAutograd")
    onnx.register(_library, f"{backend}_forward", _with_noise)


def _define_once(name: str, schema: str) -> None:
    """Defines an operator unless the native library has done so."""
    tag = torch.Tag.pt2_compliant_tag
    if hasattr(_ops, name):
        getattr(_ops, name).default.tags.append(tag)  # the stable ABI of torch before 2.12 has no tags
    else:
        _library.define(name + schema, tags=(tag,))


def _listed(schema: str) -> str:
    """The schema of the overload with weights and their gradients in lists."""
    schema = re.sub(r", Tensor\?? w\d+(=None)?", "", schema.replace("Tensor x, ", "Tensor x, Tensor[] weights, "))
    return re.sub(r"Tensor dw0.*", "Tensor[] dweights)", schema)


def _with_noise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adapts a function of (*arguments, *weights, noise=None) to the way torch calls an operator.

    Noise may be positional, after weights that are None.
    """

    @wraps(function)
    def run(*arguments: Any, noise: Tensor | None = None) -> Any:
        fixed = _BEFORE_WEIGHTS[type(arguments[2]) is not bool]
        if len(arguments) > fixed + MAX_WEIGHTS:
            *arguments, noise = arguments  # type: ignore[assignment]
        end = len(arguments)
        while end > fixed and arguments[end - 1] is None:
            end -= 1
        return function(*arguments[:end], noise=noise)

    return run


def _of_list(name: str, position: int) -> Callable[..., Any]:
    """The overload of an operator with a list of weights, at `position`, and a list of gradients."""

    def run(*arguments: Any, noise: Tensor | None = None) -> Any:
        if len(arguments) > _BEFORE_WEIGHTS[name.endswith("_backward")] + 1:
            *arguments, noise = arguments  # type: ignore[assignment]
        weights = arguments[position]
        given = {} if noise is None else {"noise": noise}
        results = getattr(_ops, name).default(*arguments[:position], *arguments[position + 1 :], *weights, **given)
        return (*results[:3], list(results[3 : 3 + len(weights)])) if name.endswith("_backward") else results

    return run


def _each_gradient(dx: Tensor, dh0: Tensor, dc0: Tensor, dweights: Sequence[Tensor]) -> tuple[Any, ...]:
    """The results of a backward operator."""
    return dx, dh0, dc0, *dweights, *[None] * (MAX_WEIGHTS - len(dweights))


# A differentiable layer for torch.compile, implemented by autograd.py, with the arguments of LayerFunction. Dynamo
# traces the backward of an autograd.Function outside of autograd, so backend="eager" would lose second derivatives.
# AOTAutograd decomposes this operator into the pair of the backend. The argument `revision` enters the key of its disk
# cache, so another version of this package misses the cache.
_library.define(
    "layer(str revision, str backend, str cell, bool bidirectional, bool cell_states, Tensor x, Tensor? h0, "
    "Tensor? c0, Tensor? lengths, Tensor? reset, Tensor? noise, Tensor[] weights) "
    "-> (Tensor y, Tensor hn, Tensor cn, Tensor c, Tensor reserve)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def implement_layer(function: Callable[..., Any]) -> None:
    """Sets the implementation of `layer`, without its `revision`; called by autograd.py, which imports this module."""
    _library.impl("layer", lambda _, *arguments: function(*arguments), "CompositeImplicitAutograd")


@_with_noise
def _forward_fake(
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
    steps, B = x.shape[:-1], reference.batch_size(x, lengths)
    kind = named(cell)
    directions = split_directions(weights, bidirectional, kind)
    D, H, P = len(directions), directions[0].hidden_size, directions[0].w_hh.shape[1]
    C, S = kind.cell_size(H), len(kind.saved)
    return (
        x.new_empty(*steps, D * P),
        x.new_empty(D, B, P),
        x.new_empty(D, B, C),
        x.new_empty(*steps, D * C) if cell_states or reserve else x.new_empty(0),
        x.new_empty(D, *steps, S * H) if reserve else x.new_empty(0),
    )


@_with_noise
def _backward_fake(
    cell: str,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    bidirectional: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    c: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
    *weights: Tensor,
    noise: Tensor | None = None,
) -> tuple[Any, ...]:
    kind = named(cell)
    directions = split_directions(weights, bidirectional, kind)
    D, H, P = len(directions), directions[0].hidden_size, directions[0].w_hh.shape[1]
    B, C = reference.batch_size(x, lengths), kind.cell_size(H)
    shapes = [x.shape, (D, B, P), (D, B, C), *(weight.shape for weight in weights)]
    dx, dh0, dc0, *dweights = (
        x.new_empty(shape) if need else x.new_empty(0) for shape, need in zip(shapes, needs, strict=True)
    )
    return _each_gradient(dx, dh0, dc0, dweights)


@_with_noise
def _reference_forward(
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
    y, hn, cn, c, saved = reference.layer(named(cell), x, weights, bidirectional, h0, c0, lengths, reset, noise)
    empty = x.new_empty(0)
    return y, hn, cn, c if cell_states or reserve else empty, saved if reserve else empty.clone()


@_with_noise
def _reference_backward(
    cell: str,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    bidirectional: bool,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    c: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
    *weights: Tensor,
    noise: Tensor | None = None,
) -> tuple[Any, ...]:
    *states, dweights = reference.layer_backward(
        named(cell), dy, dhn, dcn, dc, x, weights, bidirectional, h0, c0, lengths, reset, y, c, reserve, noise
    )
    dx, dh0, dc0, *dweights = (
        grad.clone() if need else x.new_empty(0) for grad, need in zip([*states, *dweights], needs, strict=True)
    )
    return _each_gradient(dx, dh0, dc0, dweights)


def _masks_fake(seed: Tensor, numbers: int, p: Sequence[float], values: Sequence[float], float64: bool) -> Tensor:
    return seed.new_empty((len(p), numbers), dtype=torch.float64 if float64 else torch.float32)


def _masks_batched(_: Any, in_dims: Sequence[int | None], seeds: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    """The rule of vmap: the seeds of samples differ with randomness="different"."""
    assert in_dims[0] is not None
    return torch.stack([cpu_masks(seed, *arguments) for seed in seeds.unbind(in_dims[0])]), 0


_define("reference")
_library.impl("reference_forward", _reference_forward, "CompositeExplicitAutograd")
_library.impl("reference_backward", _reference_backward, "CompositeExplicitAutograd")


def launches(backend: str) -> ModuleType:
    """The launch module of a GPU backend, for gpu.py."""
    if backend == "cuda":
        from . import cuda as launch
    else:
        from .kernels import launch  # type: ignore[no-redef]  # imports Triton, which is slow
    return launch


def _define_gpu(backend: str) -> None:
    """Operators implemented by gpu.py; on the CPU for Triton's interpreter and the host build of csrc/cuda.

    They run without grad mode: an exported program may call them with grad mode enabled.
    """

    @_with_noise
    @torch.no_grad()
    def forward(*arguments: Any, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return gpu.forward(launches(backend), *arguments, noise=noise)

    @_with_noise
    @torch.no_grad()
    def backward(*arguments: Any, noise: Tensor | None = None) -> tuple[Any, ...]:
        return _each_gradient(*gpu.backward(launches(backend), *arguments, noise=noise))

    @_with_noise
    def forward_fake(
        cell: str, x: Tensor, *arguments: Any, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        y, hn, cn, c, saved = _forward_fake(cell, x, *arguments, noise=noise)
        return y, hn, cn, c, saved if gpu.reserves_gates(named(cell)) else x.new_empty(0)

    _define(backend, forward_fake)
    for key in ("CUDA", "CPU"):
        _library.impl(f"{backend}_forward", forward, key)
        _library.impl(f"{backend}_backward", backward, key)


def gpu_plans(
    backend: str,
    cell: str,
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    D: int,
    dtype: torch.dtype,
    ragged: bool,
    device: str,
) -> dict[str, Any]:
    """The plans of "cuda" or "triton" for one layer: "forward" and "backward".

    Raises:
        ValueError: no plan fits the GPU; or FUSEDRNN_FP32 is invalid, or not supported by the backend.
    """
    launch = launches(backend)
    shape = launch.Shape(T, B, I, H, P, D, dtype.itemsize, gpu.fp32_precision(), ragged, cell)
    return {kernel: launch.plan_for(kernel, shape, torch.device(device)) for kernel in ("forward", "backward")}


def _no_gpu() -> str | None:
    """Why no kernel of ours can run on a GPU of this machine, or None."""
    return _unfit_gpus() if torch.cuda.is_available() else "torch finds no GPU"


@cache
def _unfit_gpus() -> str | None:
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs"
    if all(torch.cuda.get_device_capability(k) < (8, 0) for k in range(torch.cuda.device_count())):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def constant(function: Any) -> Any:
    """torch.compiler.assume_constant_result without importing the compiler: Dynamo does not trace the calls."""
    function._dynamo_marked_constant = True
    return function


@constant
def revision() -> str:
    """A digest of the Python sources of this package, and of the operators' schemas."""
    return _revision()


@cache
def _revision() -> str:
    folder = Path(__file__).parent
    sources = sorted((*folder.glob("*.py"), *folder.glob("cells/*.py"), folder / "operators.def"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


exporting_onnx = constant(onnx.is_exporting)


@constant
def has_autocast(device_type: str) -> bool:
    """Whether autocast supports a device type; before torch 2.12, Dynamo cannot trace torch's own function."""
    return torch.amp.is_autocast_available(device_type)


_define_gpu("triton")


def triton_interpreted() -> bool:
    """Whether Triton would run its kernels in its interpreter, on the CPU: TRITON_INTERPRET=1 in the environment."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _c_compiler() -> str | None:
    """The C compiler that Triton would use to build its launcher, found as Triton does."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@constant
def triton_unavailable() -> str | None:
    """Why the Triton kernels cannot run here, or None. Does not load Triton."""
    if not _triton_installed():
        return "Triton is not installed (pip install triton)"
    if triton_interpreted():
        return None
    missing = _no_gpu()
    if missing is None and _c_compiler() is None:
        return "Triton needs a C compiler at its first launch: neither CC is set, nor are gcc or clang in PATH"
    return missing


_define_gpu("cuda")
_library.define(
    "cuda_launch_forward(int[] plan, Tensor? x, Tensor? xg, Tensor? w_ih0, Tensor? w_ih1, Tensor? b_ih0, "
    "Tensor? b_ih1, Tensor? b_hh0, Tensor? b_hh1, Tensor? w_hh0, Tensor? w_hh1, Tensor? w_hr0, Tensor? w_hr1, "
    "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, Tensor(a!) y, Tensor(b!) hn, Tensor(c!)? cn, "
    "Tensor(d!)? c, Tensor(e!)? saved, Tensor? w_p0=None, Tensor? w_p1=None, Tensor? noise_h=None, "
    "Tensor? noise_c=None, Tensor? noise_g=None, Tensor? noise_r=None) -> ()"
)
_library.define(
    "cuda_launch_backward(int[] plan, Tensor? dy, Tensor? dhn, Tensor? dcn, Tensor? dc, Tensor? w_hh0, "
    "Tensor? w_hh1, Tensor? w_hr0, Tensor? w_hr1, Tensor? c0, Tensor? lengths, Tensor? reset, Tensor? c, Tensor saved, "
    "Tensor(a!) da, Tensor(b!)? dh_out, Tensor(c!)? m, Tensor(d!)? dh0, Tensor(e!)? dc0, "
    "Tensor? w_p0=None, Tensor? w_p1=None, Tensor? noise_h=None, Tensor? noise_c=None, Tensor? noise_g=None, "
    "Tensor? noise_r=None) -> ()"
)
_library.define("cuda_occupancy(int device, int pass_, int[] sizes, int[] plan) -> (int, int)")
_library.define("cuda_obstacle(int device) -> str")
_library.define("cuda_device_type() -> str")


def build_info() -> dict[str, Any]:
    """Build information: compiler, flags, torch version, and the reason for each library that was not built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def stale(name: str) -> str | None:
    """Why the library "cpu" or "cuda" does not match the sources of the checkout; None if it does, or if there is no
    library or no sources."""
    root, folder = Path(__file__).resolve().parents[1], Path(__file__).parent
    built = build_info().get("sources", {}).get(name)
    if not (root / "csrc" / name).is_dir() or not any(folder.glob(f"_{name}*.so")) or built is None:
        return None
    if built == sources.digest(root, name):
        return None
    return f"fusedrnn/_{name} was built from other sources than those in csrc: build it again"


CUDA_LIBRARY_VARIABLE = "FUSEDRNN_CUDA_LIBRARY"


def _load(name: str) -> str | None:
    """Loads the native library `name`; returns None, or why it cannot be loaded.

    The environment variable FUSEDRNN_CUDA_LIBRARY names another file for "cuda", such as the debug build.
    """
    folder = Path(__file__).parent
    named = os.environ.get(CUDA_LIBRARY_VARIABLE, "") if name == "cuda" else ""
    candidates = [Path(named)] if named else sorted(folder.glob(f"_{name}*.so"))
    if not candidates:
        why = build_info().get("failures", {}).get(name, "it was not built")
        compiler = {"cpu": "a C++ compiler", "cuda": "nvcc"}[name]
        return (
            f"the native library fusedrnn/_{name} is not installed: {why}. Install again with {compiler} at hand: "
            "pip install --no-build-isolation . in a checkout of fusedrnn"
        )
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        return f"{candidates[0].name} cannot be loaded: {error.__cause__ or error} (torch {torch.__version__})"
    return None


cpu_unavailable = _load("cpu")
_define("cpu")
_define_once("cpu_masks", _SCHEMAS["cpu_masks"])
for _name, _schema in _SCHEMAS.items():
    if not hasattr(_ops, _name):
        _library.define(_name + _schema)
torch.library.register_fake(f"{NAMESPACE}::cpu_masks", _masks_fake, lib=_library)
torch.library.register_vmap(f"{NAMESPACE}::cpu_masks", _masks_batched, lib=_library)
_cuda_unloaded = _load("cuda")

BACKENDS = ("reference", "cuda", "triton", "cpu")
flops.register(
    {getattr(_ops, f"{name}_forward"): flops.forward for name in BACKENDS}
    | {getattr(_ops, f"{name}_backward"): flops.backward for name in BACKENDS}
    | {_ops.cpu_infer: flops.infer}
)


@constant
def cuda_device_type() -> str:
    """The device type of the CUDA library: "cuda", or "cpu" for the host build of the tests."""
    return "cuda" if _cuda_unloaded is not None else _ops.cuda_device_type()


@cache
def _cuda_obstacle() -> str | None:
    """Why the CUDA library cannot run on the GPU that is current at the first call, or None."""
    return _ops.cuda_obstacle(torch.cuda.current_device()) or None


@constant
def cuda_unavailable() -> str | None:
    """Why the C++ kernels cannot run here, or None."""
    if _cuda_unloaded is not None or cuda_device_type() == "cpu":
        return _cuda_unloaded
    return _no_gpu() or _cuda_obstacle()


def forward_op(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The forward operator of a backend; see FORWARD_SCHEMA."""
    if _tracing_state() is not None and onnx.is_exporting():
        onnx.register_symbolic(f"{NAMESPACE}::{backend}_forward")
    return _FORWARD[backend]


def backward_op(backend: str) -> Callable[..., tuple[Any, ...]]:
    """The backward operator of a backend; see BACKWARD_SCHEMA."""
    return _BACKWARD[backend]


_tracing_state = torch._C._get_tracing_state  # saves attribute lookups in a call of one time step
_FORWARD = {name: getattr(_ops, f"{name}_forward").default for name in BACKENDS}
_BACKWARD = {name: getattr(_ops, f"{name}_backward").default for name in BACKENDS}
cpu_infer = _ops.cpu_infer.default
cpu_masks = _ops.cpu_masks.default
layer = _ops.layer.default
