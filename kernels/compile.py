"""Compiles the kernels of a plan ahead of time, for any architecture, on a machine without a GPU.

    python -m fusedrnn.kernels.compile [--device NAME] [--quick]

prints registers, shared memory and spills of every plan that the planner chooses over a grid of problems.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .backward import lstm_backward
from .forward import lstm_forward
from .plan import Plan

KERNELS = {"forward": lstm_forward, "backward": lstm_backward}
_POINTERS = {"lengths": "*i64", "reset": "*i1", "carry": "*fp32", "counters": "*i32"}
_SIZES = ("T", "B", "I", "H", "P", "begin", "end")
_ALIGNED = ("I", "H", "P")  # the others are not specialised


class Resources(NamedTuple):
    """What a compiled kernel takes, as the driver will see it."""

    registers: int  # of each thread
    spilled: int  # bytes of each thread
    shared: int  # bytes of each block
    ptx: str


def compile(kernel: str, plan: Plan, capability: int, dtype: str, *, full: bool, aligned: bool, D: int, projected: bool) -> Resources:
    """Compiles one kernel.

    Args:
        kernel: "forward" or "backward".
        plan: its plan.
        capability: 90 for sm_90.
        dtype: Triton's name, "fp32", "bf16" or "fp16".
        full: with every optional tensor, or with none.
        aligned: whether I, H and P are multiples of 16.
        D, projected: directions, and whether there is a projection.
    """
    function = KERNELS[kernel]
    constants: dict[str, Any] = {**plan.constants(kernel), "D": D, "PHASE": 0, "MEET": plan.programs > 1}
    absent = {"carry"}
    if not projected:
        absent |= {"w_hr0", "w_hr1", "m", "dh_out"}
    absent |= {"xg"} if plan.inputs else {"x", "w_ih0", "w_ih1", "b_ih0", "b_ih1", "b_hh0", "b_hh1"}
    if not full:
        absent |= {"lengths", "reset", "h0", "c0", "dhn", "dcn", "dc", "dh0", "dc0"}
        absent |= {"c", "gates"} if kernel == "forward" else set()
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
    registers, spilled = _usage(compiled.asm["cubin"])
    return Resources(registers, spilled, compiled.metadata.shared, compiled.asm["ptx"])


def _usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return int(usage[1]), int(usage[2]) + int(usage[3])
