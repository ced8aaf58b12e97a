"""The CUDA kernels compiled for the host: the library that runs them on fibers, and a layer computed by them.

FUSEDRNN_CUDA_HOST_SANITIZE=1 takes the library that is built with AddressSanitizer and UndefinedBehaviorSanitizer; the
process then needs libasan preloaded (test_cuda_host.py starts itself that way).
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from fusedrnn import cuda_plan, gpu, reference, testing
from fusedrnn.cells import NOISE, RNN_RELU, Cell, named
from fusedrnn.layout import DirectionWeights, split_directions

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATOR = CSRC / "testing" / "cuda_emulator"
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-DFUSEDRNN_HOST_FEW"]
SANITIZED = "FUSEDRNN_CUDA_HOST_SANITIZE" in os.environ

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {"bf16": BF16, "fp16": F16, "tf32": F32, "fp32": F32, "fp64": F64}
MATHS = ["bf16", "fp64"] if SANITIZED else list(DTYPES)
EXCHANGES = ["grid", "cluster", "chunked", "scatter"]
FORWARD, BACKWARD = 0, 1
BODIES = ("bodies_lstm", "bodies_gru", "bodies_rnn", "harness", "runtime")
# Compiled as well where a test asks for them by the marker cuda_variants: see tests/conftest.py.
BODIES_OF_VARIANTS = ("bodies_peephole", "bodies_coupled")


def building() -> FileLock:
    """Held while something is compiled into build/cuda_host: other processes with tests wait, and find it there."""
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "lock")


def built(name: str, flags: list[str]) -> Path:
    """Compiles the host library unless one of the same sources and flags is there."""
    with building():
        if "FUSEDRNN_CUDA_HOST_VARIANTS" in os.environ:
            return _built(f"variants-{name}", [*flags, "-DFUSEDRNN_HOST_VARIANTS"], (*BODIES_OF_VARIANTS, *BODIES))
        return _built(name, flags, BODIES)


def _built(name: str, flags: list[str], bodies: tuple[str, ...]) -> Path:
    found = (path for folder in (CSRC / "cuda", CSRC / "cells", EMULATOR) for path in folder.glob("*"))
    sources = sorted(path for path in found if path.suffix in (".h", ".cpp"))
    digest = hashlib.sha256(" ".join(flags).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
    library = ROOT / "build" / "cuda_host" / f"{name}-{digest[:16]}.so"
    if library.is_file():
        return library
    for old in library.parent.glob(f"{name}-*"):
        old.unlink()
    partial, compiler = library.with_suffix(f".{os.getpid()}"), os.environ.get("CXX", "g++")

    def compiled(source: str) -> str:
        target = partial.with_name(f"{partial.name}.{source}.o")
        subprocess.run([compiler, *flags, "-c", str(EMULATOR / f"{source}.cpp"), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # the longest first
        objects = list(pool.map(compiled, bodies))
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", str(partial)], check=True)
    for made in objects:
        Path(made).unlink()
    partial.replace(library)
    return library


class _Mirror(ctypes.Structure):
    """A struct of csrc/cuda/params.h or plan.h, filled by name; tensors give their address."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(
            **{k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items() if v is not None}
        )


def mirror(name: str, **fields: Any) -> type[_Mirror]:
    return type(name, (_Mirror,), {"_fields_": list(fields.items())})


I32, I64, P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
Sizes = mirror("Sizes", T=I64, B=I64, H=I64, P=I64, D=I64, projected=I64, I=I64)
Strides = mirror("Strides", d=I64, t=I64, b=I64)
Sequence = mirror("Sequence", lengths=P, reset=P)
Workspace = mirror("Workspace", exchanged=P, flags=P)
Needs = mirror("Needs", shared=I64, exchanged=I64, flags=I64, packed=I64 * 3, blocks=I64, streamed=I64 * 3)
Outcome = mirror("Outcome", error=P, names=P, bytes=I32, switches=ctypes.c_uint64)
Extras = mirror("Extras", w_p=P * 2, noise=P * 3, given=I32 * 4, noise_strides=Strides)
PlanStruct = mirror(
    "Plan",
    exchange=I32,
    math=I32,
    blocks=I32,
    tiles=I32,
    splits=I32,
    rows=I32,
    groups=I32,
    shared_blocks=I32,
    shared_projection_blocks=I32,
    fuse_input=I32,
    shared_input_blocks=I32,
    chunk_blocks=I32,
    cell=I32,
)
_common = {"sizes": Sizes, "sequence": Sequence, "plan": PlanStruct, "workspace": Workspace, "w_hh": P, "w_hr": P}
ForwardParams = mirror(
    "ForwardParams",
    **_common,
    xg=P,
    xg_strides=Strides,
    xg_wide=I32,
    h0=P,
    c0=P,
    y=P,
    y_strides=Strides,
    c=P,
    c_strides=Strides,
    hn=P,
    cn=P,
    saved=P,
    x=P,
    x_strides=Strides,
    w_ih=P,
    b_ih=P * 2,
    b_hh=P * 2,
    extras=Extras,
)
BackwardParams = mirror(
    "BackwardParams",
    **_common,
    dy=P,
    dy_strides=Strides,
    dc=P,
    dc_strides=Strides,
    dhn=P,
    dcn=P,
    c=P,
    c_strides=Strides,
    c0=P,
    saved=P,
    da=P,
    dh0=P,
    dc0=P,
    dh_out=P,
    m=P,
    extras=Extras,
)


def extras(w_p: list[int], noise: dict[str, int], other: int, strides: Any = None) -> Any:
    """What a variant of the LSTM takes: addresses of the peepholes of each direction, of each kind of noise, and of a
    number for where there is no noise."""
    default = next(iter(noise.values()), other)
    g_or_r = noise.get("g", noise.get("r", default))
    return Extras(
        w_p=(P * 2)(*w_p),
        noise=(P * 3)(noise.get("h", default), noise.get("c", default), g_or_r),
        given=(I32 * 4)(*[kind in noise for kind in NOISE]),
        noise_strides=strides,
    )


PackParams = mirror(
    "PackParams",
    sizes=Sizes,
    plan=PlanStruct,
    **{"pass": I32},
    stage=I32,
    w=P * 2,
    row_stride=I64,
    packed=P,
    threads=I64,
)


@dataclass(frozen=True)
class Plan:
    """A plan (csrc/cuda/plan.h); 0 for the counts that follow from the problem."""

    exchange: str = "grid"
    math: str = "bf16"
    blocks: int = 0  # as many as the tiles need
    tiles: int = 1
    splits: int = 1
    rows: int = 8
    groups: int = 0  # as many as there are slices
    shared_blocks: int = 0
    shared_projection_blocks: int = 0
    fuse_input: bool = False  # of the forward: x in the launch
    shared_input_blocks: int = 0
    chunk_blocks: int = 0
    cell: str = "lstm"  # that of the problem, in a layer

    @property
    def id(self) -> str:
        parts = [
            *([] if self.cell == "lstm" else [self.cell]),
            self.exchange,
            self.math,
            f"tiles{self.tiles}",
            f"splits{self.splits}",
            f"rows{self.rows}",
        ]
        parts += [f"groups{self.groups}"] if self.groups else []
        parts += [f"blocks{self.blocks}"] if self.blocks else []
        parts += [f"fuse_input{self.shared_input_blocks}"] if self.fuse_input else []
        parts += [f"chunks{self.chunk_blocks}"] if self.chunk_blocks else []
        return "-".join([*parts, f"shared{self.shared_blocks}"])


def backward_of(plan: Plan, problem: "Problem") -> Plan:
    """The plan of the backward beside one of the forward. In a cluster without a projection blocks exchange partial
    sums of dh, with as many tiles as they may have."""
    if plan.exchange != "cluster" or problem.proj:
        return plan
    tiles = min(plan.tiles, 2 if plan.math == "fp64" or (plan.math == "tf32" and plan.rows == 16) else 4)
    splits = 4 if tiles <= 2 else 2
    return replace(plan, exchange="scatter", blocks=0, tiles=tiles, splits=splits, shared_blocks=0)


@dataclass(frozen=True)
class Problem:
    """Sizes and options of a layer; everything random in it follows from the seed."""

    T: int
    B: int
    H: int
    D: int = 1
    proj: int = 0  # size of the projection, or none
    states: bool = True  # initial states, and gradients of the last ones
    lengths: bool = False
    reset: bool = False
    cell_states: bool = False  # every c_t is an output, and has a gradient
    strided: bool = False  # y and c are slices of larger tensors
    wide: bool = True  # xg in the dtype of the arithmetic
    I: int = 3
    aligned: bool = False  # rows of x begin at multiples of 16 bytes
    biases: str = "ih hh"  # those that are not zero, and given to a launch
    cell: str = "lstm"
    fixed_noise: bool = False  # the same at all steps
    seed: int = 0

    @property
    def id(self) -> str:
        flags = ("lengths", "reset", "cell_states", "strided", "aligned")
        sizes = [f"T{self.T}", f"B{self.B}", f"H{self.H}", *([f"P{self.proj}"] if self.proj else [])]
        parts = [*sizes, *(["bidirectional"] if self.D == 2 else [])]
        parts += ["" if self.states else "nostates", "" if self.wide else "narrow", f"I{self.I}"]
        return "-".join(part for part in [*parts, *(flag for flag in flags if getattr(self, flag))] if part)

    @property
    def kind(self) -> Cell:
        return named(self.cell)

    @property
    def P(self) -> int:  # noqa: N802 - the letter of docs/math.md
        """Size of what is fed back."""
        return self.proj or self.H

    @property
    def sizes(self) -> Any:
        return Sizes(T=self.T, B=self.B, H=self.H, P=self.P, D=self.D, projected=int(self.proj > 0), I=self.I)


class LaunchError(RuntimeError):
    """The host launch did not end; the message says why."""


@dataclass
class Launched:
    """What one launch tells beside its outputs."""

    names: list[str]
    switches: int


class Host:
    """The library; every method of the same name as a function of harness.cpp."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.fusedrnn_host_needs.restype = ctypes.c_char_p
        self.library.fusedrnn_host_sizeof.restype = ctypes.c_int64
        for which, struct in enumerate((ForwardParams, BackwardParams, PackParams, PlanStruct)):
            assert self.library.fusedrnn_host_sizeof(which) == ctypes.sizeof(struct), struct

    def struct(self, plan: Plan, direction: int, H: int, B: int) -> Any:
        """The plan for a pass, with the counts that follow from the problem."""
        units = 8 if direction == FORWARD else 16
        needed = -(-H // (units * plan.tiles))
        if plan.exchange in ("cluster", "scatter"):
            needed = max(2, 1 << (needed - 1).bit_length())
        return PlanStruct(
            exchange=EXCHANGES.index(plan.exchange),
            math=list(DTYPES).index(plan.math),
            blocks=plan.blocks or needed,
            tiles=plan.tiles,
            splits=plan.splits,
            rows=plan.rows,
            groups=plan.groups or -(-B // plan.rows),
            shared_blocks=plan.shared_blocks,
            shared_projection_blocks=plan.shared_projection_blocks,
            fuse_input=plan.fuse_input if direction == FORWARD else 0,
            shared_input_blocks=plan.shared_input_blocks if direction == FORWARD else 0,
            chunk_blocks=plan.chunk_blocks,
            cell=cuda_plan.kind_of(plan.cell),
        )

    def needs(self, direction: int, sizes: Any, plan: Any) -> tuple[Any, str | None]:
        needs = Needs()
        why = self.library.fusedrnn_host_needs(direction, ctypes.byref(sizes), ctypes.byref(plan), ctypes.byref(needs))
        return needs, why.decode() if why is not None else None

    def launch(self, name: str, params: Any, seed: int, remove: str | None) -> Launched:
        size = 1 << 14
        error, names = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
        outcome = Outcome(error=ctypes.addressof(error), names=ctypes.addressof(names), bytes=size)
        arguments = [] if params is None else [ctypes.byref(params), ctypes.c_uint64(seed), remove and remove.encode()]
        failed = getattr(self.library, name)(*arguments, ctypes.byref(outcome))
        if failed:
            raise LaunchError(error.value.decode())
        return Launched(names.value.decode().splitlines(), outcome.switches)

    def pack(self, direction: int, stage: int, sizes: Any, plan: Any, weights: list[Tensor], packed: Tensor) -> None:
        params = PackParams(
            sizes=sizes,
            plan=plan,
            **{"pass": direction},
            stage=stage,
            w=(P * 2)(*[w.data_ptr() for w in weights]),
            row_stride=weights[0].stride(0),
            packed=packed,
            threads=7,
        )
        self.library.fusedrnn_host_pack(ctypes.byref(params))

    def prepare(self, direction: int, sizes: Any, plan: Any, weights: list[DirectionWeights]) -> dict[str, Any]:
        """What the params of both passes have in common but the sequence, and under "alive" what it points to."""
        needs, why = self.needs(direction, sizes, plan)
        if why is not None:
            raise LaunchError(why)
        exchanged = torch.full((max(1, needs.exchanged),), 0xFF, dtype=torch.uint8)
        flags = torch.zeros(max(1, needs.flags), dtype=torch.int32)
        packed = [torch.full((bytes_,), 0xFF, dtype=torch.uint8) for bytes_ in needs.packed]
        self.pack(direction, 0, sizes, plan, [w.w_hh for w in weights], packed[0])
        if sizes.projected:
            self.pack(direction, 1, sizes, plan, [w.w_hr for w in weights], packed[1])
        if plan.fuse_input:
            self.pack(direction, 2, sizes, plan, [w.w_ih for w in weights], packed[2])
        fields = {"sizes": sizes, "plan": plan, "workspace": Workspace(exchanged=exchanged, flags=flags)}
        fields |= {"w_hh": packed[0], "w_hr": packed[1] if sizes.projected else None}
        fields |= {"w_ih": packed[2]} if plan.fuse_input else {}
        return {"fields": fields, "alive": [exchanged, flags, packed]}


@pytest.fixture(scope="session")
def host() -> Host:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the host build of the CUDA kernels needs a C++ compiler, and there is none")
    return Host(built("sanitized", [*FLAGS, *SANITIZE]) if SANITIZED else built("plain", FLAGS))


@cache
def tensors(problem: Problem, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs of a layer and the gradients of its outputs, for one dtype. x has NaN where no step exists."""
    p, generator = problem, torch.Generator().manual_seed(problem.seed)
    rows, has_c = len(p.kind.gates) * p.H, p.kind.has_cell_state

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    scale = p.H**-0.5
    weights = []
    for _ in range(p.D):
        weights += [random(rows, p.I, scale=1.2 * p.I**-0.5), random(rows, p.P, scale=scale)]
        weights += [random(rows, scale=0.3 * (name in p.biases)) for name in ("ih", "hh")]
        weights += [random(p.P, p.H, scale=1.5 * scale)] if p.proj else []
        weights += [random(len(p.kind.parameters) * p.H)] if p.kind.parameters else []
    given: dict[str, Any] = {"x": random(p.T, p.B, p.I), "weights": weights, "h0": None, "c0": None}
    given |= {"dy": random(p.T, p.B, p.D * p.P), "dhn": None, "dcn": None, "dc": None, "lengths": None, "reset": None}
    if p.states:
        given |= {name: random(p.D, p.B, p.P if "h" in name else p.H) for name in ("h0", "c0", "dhn", "dcn")}
        given |= {} if has_c else {"c0": None, "dcn": None}
    if p.cell_states and has_c:
        given["dc"] = random(p.T, p.B, p.D * p.H)
    if p.lengths:
        lengths = torch.randint(0, p.T + 1, (p.B,), generator=generator)
        lengths[-1] = p.T
        lengths[0] = 0 if p.B > 1 else p.T
        given["lengths"] = lengths
        given["x"] = given["x"].masked_fill(~(torch.arange(p.T).unsqueeze(1) < lengths).unsqueeze(-1), torch.nan)
    if p.reset:
        given["reset"] = torch.rand(p.T, p.B, generator=generator) < 0.4
    given["noise"] = noise_of(p, generator, reference.compute_dtype(dtype)) if p.kind.noise else None
    return given


def noise_of(p: Problem, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Multipliers as `reference.layer` takes them: of zoneout 0 to 1, of dropout 0 or more than one."""
    width = p.P if p.kind.noise == ("r",) else p.H
    shape = (1 if p.fixed_noise else p.T, p.B, p.D * width)

    def multipliers(kind: str) -> Tensor:
        if kind in "hc":
            return torch.rand(shape, generator=generator)
        of = shape if kind == "g" else (1, *shape[1:])
        return ((torch.rand(of, generator=generator) < 0.6) * 1.5).expand(shape)

    return torch.stack([multipliers(kind) for kind in p.kind.noise]).to(dtype)


def by_reference(problem: Problem, given: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients by fusedrnn.reference, in the dtype of what is given."""
    forward = [given[name] for name in ("h0", "c0", "lengths", "reset")]
    both, noise = problem.D == 2, given["noise"]
    y, hn, cn, c, saved = reference.layer(problem.kind, given["x"], given["weights"], both, *forward, noise)
    douts = [given[name] for name in ("dy", "dhn", "dcn", "dc")]
    dx, dh0, dc0, dweights = reference.layer_backward(
        problem.kind, *douts, given["x"], given["weights"], both, *forward, y, c, saved, noise
    )
    named = {f"dweight{k}": dw for k, dw in enumerate(dweights)}
    of_c = {"cn": cn, "c": c, "dc0": dc0} if problem.kind.has_cell_state else {}
    return {"y": y, "hn": hn, "saved": saved, "dx": dx, "dh0": dh0, **of_c, **named}


def in_double(given: dict[str, Any], nudge: int = 0, by: float = 0.0) -> dict[str, Any]:
    """The same values in float64, each moved by a relative `by`, up or down."""
    signs = torch.Generator().manual_seed(nudge)

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(one) for one in value]
        if value is None or not value.is_floating_point():
            return value
        sign = torch.randint(0, 2, value.shape, generator=signs) * 2 - 1
        return value.double() * (1 + by * sign * (nudge != 0))

    return {name: convert(value) for name, value in given.items()}


@cache
def answers(problem: Problem, math: str) -> dict[str, testing.Answer]:
    """What each tensor of a layer is held to: the rule of fusedrnn.testing, with the reference as torch's.

    TensorFloat-32 rounds the operands of the recurrent product, w_hh and h or da, to 11 bits: on top of float32's.
    """
    dtype = DTYPES[math]
    given = tensors(problem, dtype)
    by = testing.roundoff(dtype, problem.kind) + (2 * 2**-11 if math == "tf32" else 0)
    kink = problem.cell == RNN_RELU.name and dtype in (BF16, F16)  # which testing.answers explains
    exact, *moved = (by_reference(problem, in_double(given, nudge, by)) for nudge in range(17 if kink else 4))
    own = by_reference(problem, given)
    return {
        name: testing.Answer(own[name], exact[name], max(float((m[name] - exact[name]).abs().max()) for m in moved))
        for name in exact
    }


class Layer:
    """A layer computed by the kernels: forward(), then backward(), any number of times."""

    def __init__(self, host: Host, problem: Problem, plan: Plan, backward_plan: Plan | None = None) -> None:
        self.host, self.problem, self.plan = host, problem, replace(plan, cell=problem.cell)
        self.backward_plan = replace(backward_plan or backward_of(plan, problem), cell=problem.cell)
        self.dtype = DTYPES[plan.math]
        self.compute = reference.compute_dtype(self.dtype)
        self.given = tensors(problem, self.dtype)
        p = problem
        self.weights = split_directions(self.given["weights"], p.D == 2, p.kind)
        reset = self.given["reset"]
        self.reset = reset.to(torch.uint8).contiguous() if reset is not None else None
        self.sequence = Sequence(lengths=self.given["lengths"], reset=self.reset)
        # The affine map of the input, as the matrix product before the launch gives it; NaN where no step exists.
        maps = [
            self.given["x"].double() @ w.w_ih.double().T + gpu._bias_of_input(p.kind, w.b_ih.double(), w.b_hh.double())
            for w in self.weights
        ]
        self.xg = torch.stack(maps).to(self.compute if p.wide else self.dtype)
        # Rows of x among NaNs: as they come, at multiples of 16 bytes, or neither.
        pitch, begin = (-(-p.I // 8) * 8 + 16, 8) if p.aligned else (p.I + 2, 1) if p.strided else (p.I, 0)
        self.x = torch.full((p.T, p.B, pitch), torch.nan, dtype=self.dtype).narrow(2, begin, p.I)
        self.x.copy_(self.given["x"])

    def empty(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=self.dtype)

    def output(self, N: int) -> Tensor:
        """A tensor [T, B, D*N], perhaps a slice of a larger one."""
        p = self.problem
        if not p.strided:
            return self.empty(p.T, p.B, p.D * N)
        return self.empty(p.T, p.B, p.D * N + 3).narrow(2, 2, p.D * N)

    def inputs(self) -> dict[str, Any]:
        """What the forward takes of the input."""

        def pointers(name: str) -> Any:
            biases = [getattr(w, f"b_{name}") for w in self.weights] if name in self.problem.biases else []
            return (P * 2)(*[b.data_ptr() for b in biases])

        if not self.plan.fuse_input:
            strides = Strides(d=self.xg.stride(0), t=self.xg.stride(1), b=self.xg.stride(2))
            return {"xg": self.xg, "xg_strides": strides, "xg_wide": self.problem.wide, "b_hh": pointers("hh")}

        strides = Strides(d=0, t=self.x.stride(0), b=self.x.stride(1))
        return {"x": self.x, "x_strides": strides, "b_ih": pointers("ih"), "b_hh": pointers("hh")}

    def extras(self, other: Tensor) -> Any:
        """What either pass takes of a variant of the LSTM. other: of a number."""
        noise = self.given["noise"]
        w_p = [w.w_p.data_ptr() for w in self.weights if w.w_p is not None]
        if noise is None:
            return extras(w_p, {}, other.data_ptr())
        _, steps, B, width = noise.shape
        given = dict(zip(self.problem.kind.noise, noise, strict=True))
        strides = Strides(d=width // self.problem.D, t=B * width * (steps > 1), b=width)
        return extras(w_p, {kind: one.data_ptr() for kind, one in given.items()}, other.data_ptr(), strides)

    def carry(self, h: Tensor | None, c: Tensor | None) -> Tensor | None:
        """Of a hidden state and a cell state, what the cell carries."""
        return gpu._carry(self.problem.kind, h, c)

    def strides(self, values: Tensor | None, N: int) -> Any:
        """Of a tensor [T, B, D*N]."""
        return Strides() if values is None else Strides(d=N, t=values.stride(0), b=values.stride(1))

    def forward(
        self, seed: int = 0, remove: str | None = None, training: bool = True
    ) -> tuple[dict[str, Tensor], Launched]:
        p, given = self.problem, self.given
        plan = self.host.struct(self.plan, FORWARD, p.H, p.B)
        prepared = self.host.prepare(FORWARD, p.sizes, plan, self.weights)
        made = {"y": self.output(p.P), "hn": self.empty(p.D, p.B, p.P)}
        has_c = p.kind.has_cell_state
        made |= {"cn": self.empty(p.D, p.B, p.H)} if has_c else {}
        if training:
            made |= {"c": self.output(p.H)} if has_c else {}
            made |= {"saved": self.empty(p.D, p.T, p.B, len(p.kind.saved) * p.H)}
        params = ForwardParams(
            **prepared["fields"],
            **self.inputs(),
            sequence=self.sequence,
            h0=given["h0"],
            c0=self.carry(given["h0"], given["c0"]),
            y_strides=self.strides(made["y"], p.P),
            c_strides=self.strides(made.get("c"), p.H),
            extras=self.extras(prepared["fields"]["w_hh"]),
            **made,
        )
        return made, self.host.launch("fusedrnn_host_forward", params, seed, remove)

    def backward(
        self, made: dict[str, Tensor], seed: int = 0, remove: str | None = None
    ) -> tuple[dict[str, Tensor], Launched]:
        """made: the outputs of forward()."""
        p, given = self.problem, self.given
        plan = self.host.struct(self.backward_plan, BACKWARD, p.H, p.B)
        prepared = self.host.prepare(BACKWARD, p.sizes, plan, self.weights)
        carry = self.carry(made["y"], made.get("c"))
        back = {"da": self.empty(p.D, p.T, p.B, len(p.kind.maps) * p.H), "dh0": self.empty(p.D, p.B, p.P)}
        back |= {"dc0": self.empty(p.D, p.B, p.H)} if p.kind.has_cell_state else {}
        if p.proj:
            back |= {"dh_out": self.empty(p.D, p.T, p.B, p.P), "m": self.empty(p.D, p.T, p.B, p.H)}
        params = BackwardParams(
            **prepared["fields"],
            sequence=self.sequence,
            dy=given["dy"],
            dy_strides=self.strides(given["dy"], p.P),
            dc=given["dc"],
            dc_strides=self.strides(given["dc"], p.H),
            dhn=given["dhn"],
            dcn=given["dcn"],
            c=carry,
            c_strides=self.strides(carry, p.H),
            c0=self.carry(given["h0"], given["c0"]),
            saved=made["saved"],
            extras=self.extras(prepared["fields"]["w_hh"]),
            **back,
        )
        return back, self.host.launch("fusedrnn_host_backward", params, seed, remove)

    def gradients(self, made: dict[str, Tensor], back: dict[str, Tensor]) -> dict[str, Tensor]:
        """dx and the weights' gradients: the matrix products after the launch, in float64."""
        p, given = self.problem, self.given
        x, dx, dweights = given["x"].double().nan_to_num(nan=0.0).flatten(0, 1), 0.0, []
        states = given["h0"].double() if p.states else torch.zeros(p.D, p.B, p.P, dtype=F64)
        exists = reference.existing(p.T, given["lengths"])
        for d, w in enumerate(self.weights):
            da, y = back["da"][d].double(), made["y"][..., d * p.P : (d + 1) * p.P].double()
            v = {} if given["noise"] is None else gpu._multipliers(p.kind, given["noise"])
            v = {name: of.chunk(p.D, dim=-1)[d] for name, of in v.items()}
            h_in = reference.entering(y, states[d], exists, given["reset"], d == 1)
            h_in = (h_in * v["r"] if "r" in v else h_in).flatten(0, 1)
            of_input, of_state = (p.kind.rows_of(da, blocks) for blocks in (p.kind.input, p.kind.recurrent))
            dx = dx + of_input @ w.w_ih.double()
            of_input, of_state = of_input.flatten(0, 1), of_state.flatten(0, 1)
            dweights += [of_input.T @ x, of_state.T @ h_in, of_input.sum(0), of_state.sum(0)]
            if p.proj:
                dweights += [back["dh_out"][d].double().flatten(0, 1).T @ back["m"][d].double().flatten(0, 1)]
            if w.w_p is not None:
                c, saved = (made[name].double() for name in ("c", "saved"))
                c_d, c0 = c[..., d * p.H : (d + 1) * p.H], given["c0"]
                first = torch.zeros(p.B, p.H, dtype=F64) if c0 is None else c0[d].double()
                c_in = reference.entering(c_d, first, exists, given["reset"], d == 1)
                dweights += [gpu._gradient_of_parameters(p.kind, da, saved[d], c_in, c_d, v)]
        return {"dx": dx.to(self.dtype)} | {f"dweight{k}": dw.to(self.dtype) for k, dw in enumerate(dweights)}

    def all(self, seed: int = 0) -> dict[str, Tensor]:
        """Every output and gradient."""
        made, _ = self.forward(seed)
        back, _ = self.backward(made, seed)
        return made | back | self.gradients(made, back)

    def check(self, seed: int = 0) -> None:
        """Holds every output and gradient to the rule."""
        ours = self.all(seed)
        for name, answer in answers(self.problem, self.plan.math).items():
            baseline, exact, rounding = answer
            testing.assert_as_exact_as(
                f"{self.plan.id} {self.problem.id}: {name}", ours[name], baseline, exact, rounding
            )


@pytest.fixture
def layer(host: Host, one_thread: None) -> Any:
    def build(problem: Problem, plan: Plan, backward_plan: Plan | None = None) -> Layer:
        return Layer(host, problem, plan, backward_plan)

    return build


@pytest.fixture(scope="session")
def kit() -> Any:
    """What the tests need of this file: with --import-mode=importlib a test cannot import its conftest."""

    class Kit:
        pass

    kit = Kit()
    kit.Plan, kit.Problem, kit.LaunchError, kit.Sizes, kit.replace = Plan, Problem, LaunchError, Sizes, replace
    kit.answers, kit.FORWARD, kit.BACKWARD = answers, FORWARD, BACKWARD
    return kit
