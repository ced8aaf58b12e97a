"""Compiles the kernels ahead of time, for any architecture, on a machine without a GPU.

    python -m fusedrnn.kernels.compile           every plan that the planner chooses over a wide grid of problems
    python -m fusedrnn.kernels.compile --quick   over a small one

prints the registers, the spilled bytes and the shared memory of each; the exit status is 1 if a kernel needs more
shared memory than its plan says, or accesses spilled registers in the loop over time. The planner's tiles are tuned for
Triton 3.6 to 3.9; spills with another release are printed but are no failure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..cells import NOISE, named
from . import cells
from . import plan as planner
from .backward import layer_backward
from .device import DEVICES, H100, Device
from .forward import layer_forward
from .plan import Plan, Shape

FITTED = ("3.6", "3.7", "3.8", "3.9")  # releases of Triton
KERNELS = {"forward": layer_forward, "backward": layer_backward}
_POINTERS = {"lengths": "*i64", "reset": "*i1", "carry": "*fp32", "counters": "*i32", "dp": "*fp32"}
_POINTERS |= {f"v_{name}": "*fp32" for name in NOISE}
_SIZES = ("T", "B", "I", "H", "P", "begin", "end")
_ALIGNED = ("I", "H", "P")  # the others are not specialised
_VARIANTS = ("lstm_peephole", "lstm+hcg", "lstm_peephole+hcg", "lstm_peephole_coupled+hcr")


class Variant(NamedTuple):
    """The compile-time parameters of a kernel."""

    kernel: str  # "forward" or "backward"
    capability: int  # 90 for sm_90
    dtype: str  # Triton's name: "fp32", "bf16" or "fp16"
    D: int
    projected: bool
    ragged: bool  # with lengths and resets
    states: bool  # with initial states, their gradients and that of c; otherwise with none but what training needs
    aligned: bool  # H, P and, where x is read, I are multiples of 16
    plan: Plan

    def __str__(self) -> str:
        p = self.plan
        options = [f"D{self.D}", *(name for name in ("projected", "ragged", "states") if getattr(self, name))]
        options += [] if self.aligned else ["unaligned"]
        size = f"{p.batch} x {p.units}" + (f" x {p.columns}" if p.columns else "")
        weights = f"{p.resident} chunks of {p.chunk}" if p.resident else f"chunks of {p.chunk}"
        weights += f", {p.resident_hr} of w_hr" if p.resident_hr else ""
        weights += f", {p.resident_ih} of w_ih" if p.resident_ih else ""
        name = self.kernel if p.cell == "lstm" else f"{self.kernel} {p.cell}"
        return (
            f"{name:8} sm_{self.capability:<3} {self.dtype} {p.precision if self.dtype == 'fp32' else '':6} "
            f"{p.regime:8} {size:12} {weights:24} {' '.join(options)}"
        )


class Resources(NamedTuple):
    """The resources of a compiled kernel."""

    registers: int  # of each thread
    spilled: int  # bytes of each thread
    spills: int  # instructions of the loop over time that read or write spilled registers
    shared: int  # bytes of each block
    ttgir: str  # Triton's last representation that still has tensors
    ptx: str


def compile(variant: Variant) -> Resources:
    """Compiles one kernel."""
    kernel, capability, dtype, D, projected, ragged, states, aligned, plan = variant
    function, cell = KERNELS[kernel], named(plan.cell)
    constants: dict[str, Any] = {
        **plan.constants(kernel),
        **cells.constants(kernel, plan.cell),
        "D": D,
        "PHASE": 0,
        "GRID_SYNC": plan.programs > 1,
        "ONCE": {*cell.noise} == {"r"},
    }
    absent = {"carry"} if plan.programs > 1 else {"carry", "counters"}
    if not projected:
        absent |= {"w_hr0", "w_hr1", "m", "dh_out"}
    absent |= {"xg"} if plan.fuse_input else {"x", "w_ih0", "w_ih1", "b_ih0", "b_ih1"}
    absent |= set() if plan.fuse_input or cells.adds_bias(plan.cell) else {"b_hh0", "b_hh1"}
    absent |= set() if cell.parameters else {"w_p0", "w_p1", "dp"}
    absent |= {f"v_{name}" for name in NOISE if name not in cell.noise}
    absent |= {"fed", "fed0"} if plan.carried or "r" not in cell.noise else set()
    absent |= set() if ragged else {"lengths", "reset"}
    absent |= set() if states else {"h0", "fed0", "c0", "dhn", "dcn", "dc", "dh0", "dc0"}
    if not cell.has_cell_state:
        absent |= {"cn", "dcn", "dc", "dc0"} | ({"c"} if kernel == "forward" else set())
    if cell.carry is None:
        absent |= {"c0", "c"}
    constants |= {name: None for name in absent if name in function.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in _SIZES else _POINTERS.get(name, f"*{dtype}")
        if name not in _SIZES or (name in _ALIGNED and aligned):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, {k: v for k, v in constants.items() if k in signature}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=plan.options)
    cubin = compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text := _read(cubin, "cuobjdump", "-res-usage"))
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    registers, spilled = int(usage[1]), int(usage[2]) + int(usage[3])
    spills = spills_in_steps(_read(cubin, "nvdisasm", "-c")) if spilled else 0
    return Resources(registers, spilled, spills, compiled.metadata.shared, compiled.asm["ttgir"], compiled.asm["ptx"])


def _read(cubin: bytes, tool: str, *options: str) -> str:
    """What a tool that Triton brings says of a kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def spills_in_steps(listing: str) -> int:
    """The instructions of a kernel that access local memory in the loop over time, which lies in that over the rows.

    Args:
        listing: of nvdisasm -c. A loop is what a branch backwards jumps over; all loops count if none lies in another.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    jumps = ((k, re.search(r"\bBRA\b.*?(\.L_\w+)", text)) for k, text in enumerate(instructions))
    begins = ((labels.get(jump[1], k), k) for k, jump in jumps if jump)
    loops = {(begin, k) for begin, k in begins if begin < k}  # without the branch to itself at the end of a kernel
    depths = [sum(begin <= k <= end for begin, end in loops) for k in range(len(instructions))]
    least = min(max(depths, default=0), 2)
    accesses = (k for k, text in enumerate(instructions) if re.search(r"\b(LDL|STL)\b", text))
    return sum(depths[k] >= max(least, 1) for k in accesses)


class Problem(NamedTuple):
    """A launch, and whether it is given initial states and asked for their gradients."""

    shape: Shape
    states: bool


def variants(devices: Sequence[Device], problems: Sequence[Problem]) -> Iterator[Variant]:
    """Both kernels for every problem on every device, without duplicates."""
    seen = set()
    for device, (shape, states), kernel in itertools.product(devices, problems, KERNELS):
        try:
            plan = planner.plan(kernel, shape, device)
        except ValueError:  # too large for the device: an error for users, too
            continue
        # Fields that do not affect the compilation.
        alike = replace(plan, programs=min(plan.programs, 2), groups=0, step=0.0, launch=0.0)
        dtype, aligned = (
            "bf16" if shape.itemsize == 2 else "fp32",
            shape.aligned and (not plan.fuse_input or shape.I % 16 == 0),
        )
        variant = Variant(
            kernel, device.capability, dtype, shape.D, shape.projected, shape.ragged, states, aligned, plan
        )
        if variant._replace(plan=alike) not in seen:
            seen.add(variant._replace(plan=alike))
            yield variant


def grid(quick: bool) -> list[Problem]:
    """The problems whose plans are compiled. Training, with T = 128, and T = 1, where x is part of the launch."""
    if quick:
        shapes = [Shape(128, B, H, H, H, 1, 2, "tf32") for H, B in ((64, 1), (512, 64), (1024, 1), (2048, 64))]
        shapes += [Shape(128, 64, 256, 256, 256, 2, 4, precision, True) for precision in ("tf32", "tf32x3", "ieee")]
        shapes += [Shape(128, 16, 32, 32, 32, 1, *kind) for kind in ((2, "tf32"), (4, "tf32"), (4, "ieee"))]
        shapes += [Shape(1, 1, 256, 256, 256, 1, 2, "tf32"), Shape(128, 32, 512, 512, 256, 2, 2, "tf32", True)]
        shapes += [Shape(128, 32, 650, 650, 650, 2, 2, "tf32", True)]
        shapes += [Shape(T, B, 512, 512, 512, 1, 2, "tf32", cell="gru") for T, B in ((128, 64), (1, 1))]
        shapes += [
            Shape(128, 16, 64, 64, 64, 2, 2, "tf32", True, "gru"),
            Shape(128, 1, 256, 256, 256, 1, 4, "tf32", cell="gru"),
        ]
        shapes += [Shape(128, 64, 256, 256, 256, 2, 4, "ieee", True, "gru")]
        shapes += [Shape(128, 64, 256, 256, 256, 2, 4, "tf32", True, "rnn_tanh")]
        shapes += [Shape(128, B, 512, 512, 512, 1, 2, "tf32", cell="lstm_peephole+hcg") for B in (1, 64)]
        shapes += [Shape(128, 64, 512, 512, 256, 2, 2, "tf32", True, "lstm_peephole+r")]
        shapes += [Shape(128, 64, 64, 64, 64, 2, 4, "tf32", True, "lstm_peephole_coupled+hcr")]
        given = Shape(128, 16, 512, 512, 512, 1, 2, "tf32")
        return [*(Problem(shape, shape.ragged) for shape in shapes), Problem(given, True)]
    problems = []
    kinds = ((2, "tf32"), (4, "tf32"), (4, "tf32x3"), (4, "ieee"))
    for H, B, kind in itertools.product((32, 64, 100, 128, 256, 512, 650, 1024, 2048), (1, 32, 128), kinds):
        problems += [Problem(Shape(128, B, H, H, H, 1, *kind), states) for states in (False, True)]
        problems.append(Problem(Shape(1, B, H, H, H, 1, *kind), True))
        problems += [Problem(Shape(128, B, H, H, P, 2, *kind, ragged=True), True) for P in (H, H // 2)]
    for cell, H, B, kind in itertools.product(("gru", "rnn_tanh"), (64, 100, 256, 512, 1024), (1, 64), kinds):
        problems.append(Problem(Shape(128, B, H, H, H, 1, *kind, cell=cell), False))
        problems.append(Problem(Shape(128, B, H, H, H, 2, *kind, ragged=True, cell=cell), True))
        problems.append(Problem(Shape(1, B, H, H, H, 1, *kind, cell=cell), True))
    for cell, H, B, kind in itertools.product(_VARIANTS, (64, 100, 256, 512, 1024), (1, 64), kinds):
        problems.append(Problem(Shape(128, B, H, H, H, 1, *kind, cell=cell), False))
        problems.append(Problem(Shape(128, B, H, H, H, 2, *kind, ragged=True, cell=cell), True))
        problems.append(Problem(Shape(1, B, H, H, H, 1, *kind, cell=cell), True))
    return problems


class Report(NamedTuple):
    """The outcome for one variant."""

    variant: Variant
    registers: int
    spilled: int
    spills: int
    shared: int

    @property
    def failure(self) -> str | None:
        if self.spills and ".".join(triton.__version__.split(".")[:2]) in FITTED:
            return f"accesses {self.spilled} spilled bytes {self.spills} times in the loop over time"
        if self.shared > self.variant.plan.shared:
            return f"takes {self.shared} bytes of shared memory, planned {self.variant.plan.shared}"
        return None

    def __str__(self) -> str:
        figures = f"{self.registers:4} {self.spilled:7} {self.shared:7} {self.variant.plan.shared:7}"
        return f"{figures}  {self.variant}{f'  <- {self.failure}' if self.failure else ''}"


def report(variant: Variant) -> Report:
    """Compiles a variant and returns its resources."""
    return Report(variant, *compile(variant)[:4])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.kernels.compile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small grid")
    parser.add_argument(
        "--device", action="append", choices=[d.name for d in DEVICES], help="by default one of each generation"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; by default one for each core")
    options = parser.parse_args(argv)
    names = options.device or [d.name for d in DEVICES if d is not H100]  # which is planned as an H200
    devices = [d for d in DEVICES if d.name in names]
    reports = []
    print("regs spilled  shared planned  kernel", file=sys.stderr)
    with ProcessPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(report, list(variants(devices, grid(options.quick)))):
            reports.append(outcome)
            print(outcome, file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        rows = [
            {**r._asdict(), "variant": str(r.variant), "regime": r.variant.plan.regime, "failure": r.failure}
            for r in reports
        ]
        print(json.dumps(rows))
    return 1 if any(outcome.failure for outcome in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
