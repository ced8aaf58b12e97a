"""The CUDA kernels compiled by nvcc for every architecture: registers, spills, and the instructions that they hold."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from fusedrnn.kernels.device import H200, Shape, cdiv

from fusedrnn import cuda_plan as planner
from fusedrnn.cells import VARIANTS

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}
MATHS = ["bf16", "fp16", "tf32", "fp32", "fp64"]
CELLS = {"0": "lstm", "1": "gru", "2": "rnn", "4": "peephole", "5": "coupled"}  # by the first kind of their kernels
# What is compiled here: all of the LSTM, and of the other cells those that are most likely to run out of registers.
COMPILED = {
    "lstm": MATHS,
    "gru": ["bf16", "tf32", "fp64"],
    "rnn": ["bf16", "fp64"],
    "peephole": ["bf16", "tf32", "fp64"],
    "coupled": ["bf16", "tf32"],
}
PROJECTING = ("lstm", "peephole", "coupled")  # have kernels with a projection
# Of the others `make kernels GRID=--quick` compiles those for one architecture: compiling is most of its time.
EVERYWHERE = [*(("lstm", math) for math in MATHS), ("peephole", "tf32")]  # the last is the one nearest to spilling

FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-Wall", "-Xptxas", "-v"]


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: in PATH, in CUDA_HOME, or the one that triton brings."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [shutil.which(name), shutil.which(name, path=f"{home}/bin")]
    try:
        import triton
    except ImportError:
        pass
    else:
        candidates.append(shutil.which(name, path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")))
    return next((found for found in candidates if found), None)


NVCC = tool("nvcc")
pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not here: the CUDA kernels are not compiled"),
    # Six minutes on two idle cores, and as long for the slow test; what has not changed is not compiled again.
    pytest.mark.timeout(1800),
]


def load(name):
    """A module of this folder: with --import-mode=importlib it cannot be imported."""
    spec = importlib.util.spec_from_file_location(f"fusedrnn_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sass = load("sass")


def kernel_name(mangled: str) -> str | None:
    math, cell = r"ILNS0_4MathE(?P<math>\d)E", r"NS0_10CellsAlikeILNS0_8CellKindE(?P<cell>\d)E.*?EE"
    if found := re.search(rf"BackwardScatter{math}{cell}ELi(?P<columns>\d)E", mangled):
        what = "backward scatter"
    elif found := re.search(
        rf"(?P<pass>Forward|Backward){math}{cell}ENS0_\d+(?P<exchange>Grid|Cluster|Chunked)ExchangeELi(?P<columns>\d)E"
        r"Lb(?P<projected>\d)E",
        mangled,
    ):
        what = f"{found['pass']} {found['exchange']}".lower()
    else:
        return None
    projected = " projected" if found.groupdict().get("projected") == "1" else ""
    return f"{CELLS[found['cell']]} {MATHS[int(found['math'])]} {what} rows{8 * int(found['columns'])}{projected}"


def resources(output: str) -> list[dict]:
    """What ptxas says of each kernel."""
    rows, row = [], {}
    for line in output.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            row = {"kernel": kernel_name(found[1]), "arch": found[2]}
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            row |= {"stack": int(found[1]), "spills": int(found[2]) + int(found[3])}
        elif (found := re.search(r"Used (\d+) registers", line)) and row.get("kernel"):
            rows.append(row | {"registers": int(found[1])})
    return rows


def compiled(source: str, architectures: list[str]) -> tuple[Path, list[dict]]:
    """The object of one source, and the resources of its kernels; compiled unless it has been before."""
    found = (path for folder in (SOURCES, SOURCES / "instances", SOURCES.parent / "cells") for path in folder.glob("*"))
    inputs = sorted(path for path in found if path.suffix in (".h", ".cuh"))
    inputs.append(SOURCES / f"{source}.cu")
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(json.dumps([FLAGS, version]).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    # By the numbers: cuobjdump -xelf sm_90a takes every architecture of an object with that in its name.
    folder = ROOT / "build" / "cuda_compile" / "-".join(name.removeprefix("sm_") for name in architectures)
    target = folder / f"{Path(source).name}-{digest.hexdigest()[:16]}.o"
    if not target.with_suffix(".json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{Path(source).name}-*"):
            old.unlink()
        codes = [f"-gencode=arch={ARCHITECTURES[real]},code={real}" for real in architectures]
        command = [NVCC, *FLAGS, *codes, "-c", str(SOURCES / f"{source}.cu"), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        output = result.stdout + result.stderr
        assert result.returncode == 0, output
        assert "warning" not in output, output
        target.with_suffix(".json").write_text(json.dumps(resources(output)))
    return target, json.loads(target.with_suffix(".json").read_text())


def all_compiled(architectures: dict[str, list[str]]) -> dict[str, tuple[Path, list[dict]]]:
    """Each source's object and the resources of its kernels, compiled two at a time."""
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(compiled, architectures.keys(), architectures.values())
        return dict(zip(architectures.keys(), made, strict=True))


def instances() -> dict[str, tuple[str, str]]:
    """The sources of kernels, with their cell and arithmetic."""
    return {f"instances/{cell}_{math}": (cell, math) for cell, maths in COMPILED.items() for math in maths}


@pytest.fixture(scope="module")
def objects():
    """What is compiled of each source: for sm_90a, and of EVERYWHERE for all architectures."""
    chosen = {source: [*ARCHITECTURES] if which in EVERYWHERE else ["sm_90a"] for source, which in instances().items()}
    return all_compiled({**chosen, "launch": [*ARCHITECTURES]})


def no_spills(objects, architectures, capsys):
    """No kernel of some sources spills or has a stack on any of the architectures; prints the table of all."""
    rows = [row for _, rows in objects.values() for row in rows]
    kernels = sorted({row["kernel"] for row in rows})
    with capsys.disabled():
        print(f"\n\n{'registers':44}" + "".join(f"{arch:>8}" for arch in architectures))
        for kernel in kernels:
            used = {row["arch"]: row["registers"] for row in rows if row["kernel"] == kernel}
            cells = [
                "-" if arch == "sm_80" and re.search("cluster|scatter", kernel) else used.get(arch, "")
                for arch in architectures
            ]
            print(f"{kernel:44}" + "".join(f"{cell:>8}" for cell in cells))
    assert not [row for row in rows if row["spills"] or row["stack"]]


def count_of_kernels(cell: str, math: str) -> int:
    """Of both passes: two exchanges with 8 or, on the matrix unit, 16 rows, and in chunks; all with a projection."""
    rows = 2 if math in ("bf16", "fp16", "tf32") else 1
    return 2 * (2 * rows + 1 + (3 if cell in PROJECTING else 0))


def test_registers_and_spills(objects, capsys):
    for source, which in instances().items():
        built = len(ARCHITECTURES) if which in EVERYWHERE else 1
        assert len(objects[source][1]) == count_of_kernels(*which) * built, source
    no_spills(objects, ARCHITECTURES, capsys)


@pytest.mark.slow
def test_registers_and_spills_of_other_cells_on_other_architectures(capsys):
    others = [arch for arch in ARCHITECTURES if arch != "sm_90a"]
    sources = {source: which for source, which in instances().items() if which not in EVERYWHERE}
    objects = all_compiled(dict.fromkeys(sources, others))
    for source, which in sources.items():
        assert len(objects[source][1]) == count_of_kernels(*which) * len(others), source
    no_spills(objects, others, capsys)


PLANS = [
    # dtype, H, B, pass, exchange; of the LSTM
    ("bf16", 128, 16, "forward", "cluster"),
    ("bf16", 128, 16, "backward", "scatter"),
    ("bf16", 512, 16, "forward", "cluster"),
    ("bf16", 512, 16, "backward", "scatter"),
    ("bf16", 1024, 16, "forward", "grid"),
    ("bf16", 1024, 16, "backward", "grid"),
    ("tf32", 256, 16, "forward", "cluster"),
    ("tf32", 256, 16, "backward", "scatter"),
]
COUNTED_VARIANTS = ("lstm_peephole+hcg", "lstm_peephole_coupled+hcg")
OTHER_CELLS = [
    (cell, H, exchange)
    for H, exchange in ((512, "cluster"), (1024, "grid"))
    for cell in ("gru", "rnn_tanh", *COUNTED_VARIANTS)
]
OTHER_CELLS += [(cell, 128, "cluster") for cell in COUNTED_VARIANTS]
PLANS = [("lstm", *plan) for plan in PLANS] + [
    (cell, "bf16", H, 16, pass_, "scatter" if (pass_, exchange) == ("backward", "cluster") else exchange)
    for cell, H, exchange in OTHER_CELLS
    for pass_ in ("forward", "backward")
]


@pytest.fixture(scope="module")
def machine_code(objects, tmp_path_factory):
    """A function of a cell and a dtype: their kernels for sm_90a, by their names, as sass.py reads them."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("cuobjdump and nvdisasm are not here: what nvcc made is not read")

    @cache
    def kernels(cell, math):
        name = f"{CELLS[str(planner.kind_of(cell))]}_{math}"
        folder = tmp_path_factory.mktemp(name)
        path = objects[f"instances/{name}"][0]
        subprocess.run([cuobjdump, "-xelf", "sm_90a", str(path)], cwd=folder, capture_output=True, check=True)
        command = [nvdisasm, "-hex", "-c", str(next(folder.iterdir()))]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {function.name: function for function in sass.functions(listing)}

    return kernels


def test_steps(machine_code, cuda_host, capsys):
    """Instructions, waits and clocks of a step of the best plan of each kind, by the count of sass.py. The path that
    is counted is that of the plan. A variant of the LSTM, with all that it may have, takes a tenth more than the plain
    one at most."""
    head = f"{'a step, counted':66}{'us':>6}{'model':>7}{'clocks':>8}{'issue':>7}{'instr.':>8}{'waits':>6}{'waited':>8}"
    lines, clocks = [head], {}
    for cell, math, H, B, pass_, exchange in PLANS:
        # With x in the launch a variant streams weights, which is not what is counted here.
        for fuse_input in (False, True) if pass_ == "forward" and cell not in VARIANTS else (False,):
            shape = Shape(128, B, H, H, H, 1, 4 if math == "tf32" else 2, "tf32", cell=cell)
            ranked = (p for p in planner.ranked(pass_, shape, H200) if not p.streamed)
            plan = next(p for p in ranked if (p.exchange, p.rows, p.fuse_input) == (exchange, 8, fuse_input))
            products = planner.products(pass_, shape, math, fuse_input)
            recurrent = products[planner.RECURRENT]
            received = plan.rows * (recurrent.row if exchange != "scatter" else plan.blocks * 16 * plan.tiles * 4)
            step = sass.step(machine_code(cell, math), cuda_host, pass_, shape, plan, received)
            count = step.count
            blocks = sum(p.blocks // plan.splits for p in products.values())
            if exchange == "scatter":
                outputs, _ = planner.scatter_outputs(shape, plan)
                blocks = outputs * planner.scatter_blocks(plan)
                assert count.pushes == outputs
            assert count.mma == blocks * 2 * cdiv(recurrent.segments, 2), (cell, math, H, pass_, plan)
            if exchange == "cluster":
                quads = 8 * recurrent.chunk // 16 * cdiv(recurrent.tiles, plan.tiles)
                assert count.pushes == cdiv(quads, 32), (math, H, pass_, plan)
            clocks.setdefault((cell, math, H, pass_), count.clocks)
            what = f"{cell} {math} H {H} B {B} {pass_}, {plan.regime}, "
            what += f"{plan.groups} x {plan.blocks} x {plan.tiles} x {plan.splits}"
            lines.append(
                f"{what:66}{step.microseconds:6.2f}{plan.step:7.2f}{count.clocks:8.0f}{step.issue:7.0f}"
                f"{count.instructions:8.0f}{count.waits:6.0f}{count.waited:8.0f}"
            )
    with capsys.disabled():
        print("\n\n" + "\n".join(lines))
    variants = [key for key in clocks if key[0] in COUNTED_VARIANTS]
    ratios = {key: clocks[key] / clocks[("lstm", *key[1:])] for key in variants}
    assert len(ratios) == 12
    assert max(ratios.values()) <= 1.1, ratios


@pytest.mark.parametrize("math", ["tf32", "fp32", "fp64"])
@pytest.mark.parametrize(
    ("pass_", "exchange"),
    [("forward", "cluster"), ("forward", "grid"), ("backward", "scatter"), ("backward", "grid")],
)
def test_the_step_of_every_arithmetic_is_counted(machine_code, cuda_host, math, pass_, exchange):
    """To the end of a launch, and on the way that numbers of a usual size take."""
    shape = Shape(128, 16, 64, 64, 64, 1, 8 if math == "fp64" else 4, "ieee" if math == "fp32" else "tf32")
    plan = next(p for p in planner.ranked(pass_, shape, H200) if (p.exchange, p.rows) == (exchange, 8))
    count = sass.step(machine_code("lstm", math), cuda_host, pass_, shape, plan, 0).count
    assert count.instructions > 100
    assert count.clocks > count.instructions
    assert count.calls == 0


INSTRUCTIONS = {
    "bf16": r"HMMA\.16816\.F32\.BF16",
    "fp16": r"HMMA\.16816\.F32 ",
    "tf32": r"HMMA\.1688\.F32\.TF32",
    "fp32": r"FFMA",
    "fp64": r"DFMA",
}


@pytest.mark.parametrize(("cell", "math"), [(cell, math) for cell, maths in COMPILED.items() for math in maths])
def test_instructions(objects, cell, math):
    """The arithmetic that each is for; in the kernels of clusters, remote stores that complete on an mbarrier."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not here: what nvcc made is not read")
    command = [cuobjdump, "-sass", "-arch", "sm_90a", str(objects[f"instances/{cell}_{math}"][0])]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", sass)[1:]
    assert len(functions) == (10 if math in ("bf16", "fp16", "tf32") else 6) + (6 if cell in PROJECTING else 0)
    for function in functions:
        assert re.search(INSTRUCTIONS[math], function), kernel_name(function)
        name = function.split("\n")[0]
        cluster = "ClusterExchange" in name
        assert bool(re.search(r"\bSTAS", function)) == cluster  # st.async
        assert bool(re.search(r"\bSYNCS", function)) == cluster  # mbarrier
        assert re.search(r"\bLDGSTS", function)  # cp.async
        assert not re.search(r"\b(LDL|STL)\b", function)  # local memory


def test_a_debug_build_names_the_wait_that_takes_too_long(tmp_path):
    """With a timeout compiled in, every wait can end the launch. Some time before, by the clock, a lane of the warp
    prints what it waits for."""
    ptx = tmp_path / "debug.ptx"
    flags = ["-std=c++20", "-arch=compute_90a", "-DFUSEDRNN_CUDA_TIMEOUT=4000000000LL"]
    subprocess.run([NVCC, *flags, "-ptx", str(SOURCES / "instances" / "rnn_fp64.cu"), "-o", str(ptx)], check=True)
    text = ptx.read_text()
    strings = {bytes(map(int, row.split(","))) for row in re.findall(r"\.b8 \S+\[\d+\] = \{([\d, ]+)\}", text)}
    for name in (b"the operand has come", b"the flags of the group"):
        assert any(name in string for string in strings)
    traps = re.findall(r"activemask\.b32.*?vprintf.*?%clock64.*?trap;", text, re.DOTALL)
    assert len(traps) == text.count("trap;") > 0
