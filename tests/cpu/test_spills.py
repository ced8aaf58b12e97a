"""The inner loops of the CPU kernels' products keep their sums in registers.

A compiler that runs out of them stores some to the stack in every round. That costs a third of the speed, and no test
of results sees it. The library is disassembled, and the loops of the functions named in panel.h and gemm.h are checked.
"""

import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import ops

# Functions, and how many multiply-adds a round of their loops has for one input: rows times vectors.
TALL, WIDE, SINGLE, DOTS = "add_tile<", "wide_tile<", "single_row_product<", "dot_tile<"
GEMM = "Gemm<"
LIBRARY = next(map(str, Path(fusedrnn.__file__).parent.glob("_cpu*.so")), None)
ISAS = {"avx512_bf16": 24, "avx512": 24, "avx2": 12}  # and the sums of a tile

pytestmark = [
    pytest.mark.skipif(ops.cpu_unavailable is not None, reason=str(ops.cpu_unavailable)),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump was not found: it comes with binutils"),
    pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "NO AVX", reason="not an x86-64 processor"),
]

MULTIPLY_ADD = re.compile(r"\s(vfn?madd\w+p[sd]|vdpbf16ps)\s")
TO_STACK = re.compile(r"\svmov\w+\s+%[xyz]mm\d+,\S*\(%r[sb]p[,)]")
FROM_STACK = re.compile(r"\sv\w+\s+\S*\(%r[sb]p[,)]")


@cache
def functions():
    """{isa: {name of a function: its lines}} of those that are named above."""
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    found, lines = defaultdict(dict), None
    for line in text.splitlines():
        head = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if head is not None:
            name = head.group(1)
            isa = next((isa for isa in ISAS if f"fusedrnn::{isa}::" in name.split("(")[0]), None)
            of_panels = any(part in name for part in (TALL, WIDE, SINGLE, DOTS))
            is_product = of_panels or (GEMM in name and "::product<" in name)
            lines = found[isa].setdefault(name, []) if isa is not None and is_product else None
        elif lines is not None:
            lines.append(line)
    return found


def loops(lines):
    """The innermost loops with multiply-adds in them, each as its lines."""
    at = {}
    for k, line in enumerate(lines):
        address = re.match(r"\s*([0-9a-f]+):", line)
        if address is None:
            continue
        at[int(address.group(1), 16)] = k
        jump = re.match(r"\s*[0-9a-f]+:\s+j\w+\s+([0-9a-f]+)\b", line)
        begin = at.get(int(jump.group(1), 16)) if jump is not None else None
        if begin is None:
            continue
        body = lines[begin : k + 1]
        is_inner = not any(re.search(r":\s+j\w+\s", other) for other in body[:-1])
        if is_inner and any(MULTIPLY_ADD.search(other) for other in body):
            yield body


@pytest.mark.parametrize("isa", ISAS)
def test_no_sum_is_stored_in_a_round(isa):
    ours = functions()[isa]
    rounds = {name: list(loops(lines)) for name, lines in ours.items()}
    for kind in (TALL, WIDE, SINGLE, DOTS, "::product<"):
        assert any(kind in name and found for name, found in rounds.items()), f"no loop of {kind} was found"
    largest = max(sum(bool(MULTIPLY_ADD.search(line)) for line in body) for found in rounds.values() for body in found)
    assert largest >= ISAS[isa]  # the loop of a whole tile is among them
    for name, found in rounds.items():
        for body in found:
            spills = [line for line in body if TO_STACK.search(line) or FROM_STACK.search(line)]
            assert not spills, f"{name}\n" + "\n".join(body)


@pytest.mark.parametrize("isa", ISAS)
def test_all_cells_share_the_products(isa):
    """Another cell adds no loop to those above, and none that could spill."""
    of_cells = [name for name in functions()[isa] if any(cell in name for cell in ("Lstm", "Gru", "Rnn"))]
    assert of_cells == []


def test_a_spill_would_be_seen():
    body = [
        "  10:\tvmovups (%rsi),%zmm1",
        "  14:\tvfmadd231ps %zmm4,%zmm1,%zmm3",
        "  1a:\tvmovaps %zmm3,0x40(%rsp)",
        "  20:\tjne    10 <f+0x10>",
    ]
    (found,) = loops(body)
    assert [line for line in found if TO_STACK.search(line)] == [body[2]]
    assert FROM_STACK.search("  30:\tvaddps 0x40(%rsp),%zmm1,%zmm2")
    assert not TO_STACK.search("  30:\tvmovaps %zmm3,0x40(%rdi)")
