"""The Triton kernels, compiled ahead of time for sm_80 to sm_100: no spills in the loop, and resident means resident.

`python -m fusedrnn.kernels.compile` does the same over a wide grid; here it is a small one, and `make kernels` runs
both. pytest alone compiles two kernels, of which it reads what became of them.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """In a process of its own, as the kernels of this one may be the interpreter's."""
    result = subprocess.run(
        [sys.executable, "-m", "fusedrnn.kernels.compile", "--quick", "--json"],
        env=environment(),
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.stdout, result.stderr
    print(result.stderr)
    return result.returncode, json.loads(result.stdout)


def environment():
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.compiles
def test_no_kernel_spills_in_its_loop_or_exceeds_its_plan(compiled):
    status, rows = compiled
    assert [(row["variant"], row["failure"]) for row in rows if row["failure"]] == []
    assert status == 0
    assert all(0 < row["registers"] <= 255 for row in rows)
    # Both kernels, in every regime, for every generation.
    assert {row["regime"] for row in rows} == {"rows", "resident", "streamed"}
    for name in (
        "forward",
        "backward",
        "sm_80",
        "sm_89",
        "sm_90",
        "sm_100",
        "bf16",
        "tf32x3",
        "ieee",
        "projected",
        "gru",
        "rnn_tanh",
        "lstm_peephole+hcg",
    ):
        assert any(name in row["variant"] for row in rows), name


SPILLING = """
import json
from fusedrnn.kernels import compile as ahead
from fusedrnn.kernels.plan import H200, Plan, Shape
options = Plan.options.fget
Plan.options = property(lambda plan: {**options(plan), "maxnreg": 96})
(variant, _) = ahead.variants([H200], [ahead.Problem(Shape(128, 16, 512, 512, 512, 1, 2, "tf32"), False)])
outcome = ahead.report(variant)
print(json.dumps([outcome.spilled, outcome.spills, outcome.failure]))
"""


@pytest.mark.compiles
def test_spills_in_the_loop_over_time_are_found(tmp_path):
    """Of a kernel that has too few registers."""
    command = [sys.executable, "-c", SPILLING]
    result = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    spilled, spills, failure = json.loads(result.stdout)
    assert spilled > 100
    assert spills > 10
    assert failure == f"accesses {spilled} spilled bytes {spills} times in the loop over time"


OWN = """
import importlib.util, json, os, sys
os.environ.pop("TRITON_INTERPRET", None)
from fusedrnn.kernels import compile as ahead
from fusedrnn.kernels.plan import H200, Shape
spec = importlib.util.spec_from_file_location("own_cell", sys.argv[1])
cells = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cells)
out = {}
for cell in (cells.no_input_gate, cells.coupled_with_peepholes, cells.mutant):
    shapes = [Shape(128, 64, 64, 64, 64, 2, 2, "tf32", True), Shape(128, 16, 512, 512, 512, 1, 2, "tf32")]
    shapes += [Shape(128, 64, 1024, 1024, 1024, 1, 4, "tf32")]
    problems = [ahead.Problem(shape._replace(cell=cell.definition.name), True) for shape in shapes]
    for variant in ahead.variants([H200], problems):
        outcome = ahead.report(variant)
        out[str(variant)] = [outcome.failure, variant.plan.regime]
print(json.dumps(out))
"""


@pytest.mark.compiles
def test_generated_kernels_do_not_spill(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "own_cell.py"
    result = subprocess.run(
        [sys.executable, "-c", OWN, example],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {name: failure for name, (failure, _) in found.items() if failure} == {}
    assert len(found) == 18
    assert {regime for _, regime in found.values()} == {"rows", "resident", "streamed"}


ONE = """
import json
from fusedrnn.kernels import compile as ahead
from fusedrnn.kernels.forward import layer_forward
from fusedrnn.kernels.backward import layer_backward
from fusedrnn.kernels.plan import H200, Shape, plan, plans
out = {}
def compiled(name, kernel, shape, regime, states=False):
    chosen = plan(kernel, shape, H200)
    if chosen.regime != regime:
        chosen = min((p for p in plans(kernel, shape, H200) if p.regime == regime), key=lambda p: p.launch)
    dtype = "bf16" if shape.itemsize == 2 else "fp32"
    has = (shape.D, shape.projected, shape.ragged, states, True)
    resources = ahead.compile(ahead.Variant(kernel, 90, dtype, *has, chosen))
    out[name] = {"ttgir": resources.ttgir, "ptx": resources.ptx, "resident": chosen.resident}
for kernel in ("forward", "backward"):
    plain = Shape(128, 16, 5000, 512, 512, 1, 2, "tf32")
    compiled(kernel, kernel, plain, "resident")
    compiled(kernel + "-states", kernel, plain, "resident", True)
    compiled(kernel + "-streamed", kernel, plain._replace(B=64), "streamed")
    compiled(kernel + "-gru", kernel, plain._replace(cell="gru"), "resident", True)
    compiled(kernel + "-tf32", kernel, Shape(128, 16, 5000, 256, 256, 1, 4, "tf32"), "resident")
compiled("forward-ragged", "forward", plain._replace(D=2, ragged=True), "resident", True)
out["free"] = [[p.name for p in k.params if p.do_not_specialize] for k in (layer_forward, layer_backward)]
print(json.dumps(out))
"""
RESIDENT = [
    "forward",
    "forward-states",
    "forward-ragged",
    "forward-gru",
    "forward-tf32",
    "backward",
    "backward-states",
    "backward-gru",
    "backward-tf32",
]
STREAMED = ["forward-streamed", "backward-streamed"]


@pytest.fixture(scope="module")
def representations(report, tmp_path_factory):
    saved = environment()
    return report(
        ONE.replace("import json", "import json, os; os.environ.pop('TRITON_INTERPRET', None)", 1),
        tmp_path_factory.mktemp("one"),
        **saved,
    )


@pytest.mark.slow
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_resident_weights_are_loaded_before_the_loop_over_time(representations, pass_):
    ttgir, chunks = representations[pass_]["ttgir"], representations[pass_]["resident"]
    loop = ttgir.index("scf.for", ttgir.index("scf.for") + 1)  # the first is over items, the second over time
    operands = r"tt\.load .*tensor<8x\d+x\d+x!tt\.ptr<bf16>"  # what is split for eight warps: states, and weights
    assert chunks > 1
    assert len(re.findall(operands, ttgir[:loop])) == chunks
    assert len(re.findall(operands, ttgir[loop:])) == chunks
    assert ttgir.count(" = tt.dot ") == chunks


RELEASE = r"(?:red|atom)\S*\.release\.gpu\S*|(?:atom|red)\.global\.gpu\.release\S*"
ACQUIRE = r"ld\.acquire\.gpu\.global\.s32"
STATES = r"ld\.global\S*\.cg\S*|cp\.async\.c[ga]\S*"


BARRIER = r"bar\.sync|barrier\.sync\S*"
BRANCH = re.compile(r"(@\S+\s+)?bra(?:\.uni)?\s+(\$\w+)")


class Code:
    """Lines of PTX, and where control goes from each."""

    def __init__(self, ptx):
        self.lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
        self.labels = {line[:-1]: k for k, line in enumerate(self.lines) if re.fullmatch(r"\$\w+:", line)}

    def places(self, pattern):
        """The numbers of the lines where an instruction stands."""
        return [k for k, line in enumerate(self.lines) if re.match(rf"(?:@\S+\s+)?(?:{pattern})\s", line)]

    def reached(self, start, without):
        """The lines that may run after `start`, on ways on which none of the lines `without` lies before."""
        todo, seen = self._after(start), set()
        while todo:
            line = todo.pop()
            if line not in seen:
                seen.add(line)
                todo += [] if line in without else self._after(line)
        return seen

    def _after(self, k):
        branch = BRANCH.match(self.lines[k])
        if branch is None:
            return [] if self.lines[k].startswith("ret") else [k + 1] if k + 1 < len(self.lines) else []
        target = self.labels[branch[2]]
        return [target, k + 1] if branch[1] else [target]


@pytest.fixture
def code(representations, request):
    return Code(representations[request.node.callspec.params["name"]]["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RESIDENT, *STREAMED])
def test_states_are_read_after_the_acquire_and_published_before_the_release(code, name):
    """On all ways: from a release to a state past the wait; from a wait to a state, and from a store to a release, past
    a barrier."""
    (acquire,), (release,) = code.places(ACQUIRE), code.places(RELEASE)
    states, barriers = set(code.places(STATES)), set(code.places(BARRIER))
    guard = max(k for k in range(acquire) if BRANCH.match(code.lines[k]))  # over which all but one thread jump
    assert states
    assert states <= code.reached(guard, set())
    assert not states & code.reached(release, {guard})
    assert not states & code.reached(guard, barriers)
    assert not states & code.reached(acquire, barriers)
    published = {k for k in code.places(r"st\.global\S*") if release in code.reached(k, {guard})}
    assert published
    assert not [store for store in published if release in code.reached(store, barriers)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RESIDENT, *STREAMED])
def test_one_thread_looks_at_the_counter(representations, code, name):
    """The load that acquires stands in a loop, which all but one thread jump over."""
    (acquire,) = code.places(ACQUIRE)
    guard = max(k for k in range(acquire) if BRANCH.match(code.lines[k]))
    assert code.lines[guard].startswith("@")
    assert acquire in code.reached(acquire, set(code.places(BARRIER)))
    assert "%tid.x" in representations[name]["ttgir"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIDENT)
def test_states_are_loaded_16_bytes_at_a_time(representations, name):
    loads = re.findall(r"ld\.global\S*\.cg\S*", representations[name]["ptx"])
    assert loads
    assert {load.partition(".cg")[2] for load in loads} == {".v4.b32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_what_is_streamed_is_on_its_way_before_it_is_used(representations, name):
    ptx = representations[name]["ptx"]
    assert re.search(r"cp\.async\.c[ga]\.shared\.global", ptx)
    assert re.search(r"cp\.async\.wait_group\s+(0x)?[2-9]", ptx)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RESIDENT, *STREAMED])
def test_operands_in_tf32_are_rounded_and_others_are_not(representations, name):
    assert ("cvt.rna.tf32.f32" in representations[name]["ptx"]) == name.endswith("tf32")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RESIDENT, *STREAMED])
def test_products_are_of_the_matrix_unit(representations, name):
    assert "mma.sync" in representations[name]["ptx"] or "wgmma" in representations[name]["ptx"]


@pytest.mark.slow
def test_lengths_and_batches_do_not_recompile(representations):
    for names in representations["free"]:
        assert set(names) == {"T", "B", "begin", "end"}
