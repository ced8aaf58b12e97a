"""The Triton kernels, compiled ahead of time for sm_80 to sm_100: no spills, and resident means resident.

`python -m fusedrnn.kernels.compile` does the same over a wide grid; here it is a small one, and `make kernels` runs
both. pytest alone compiles two kernels, of which it reads what became of them.
"""

import importlib.util
import json
import re
import subprocess
import sys

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
def test_no_kernel_spills_or_exceeds_its_plan(compiled):
    status, rows = compiled
    assert [(row["variant"], row["failure"]) for row in rows if row["failure"]] == []
    assert status == 0
    assert all(0 < row["registers"] <= 255 for row in rows)
    # Both kernels, in every regime, for every generation.
    assert {row["regime"] for row in rows} == {"rows", "resident", "streamed"}
    for name in ("forward", "backward", "sm_80", "sm_89", "sm_90", "sm_100", "bf16", "tf32x3", "ieee", "projected"):
        assert any(name in row["variant"] for row in rows), name


ONE = """
import json
from fusedrnn.kernels import compile as ahead
from fusedrnn.kernels.forward import lstm_forward
from fusedrnn.kernels.backward import lstm_backward
from fusedrnn.kernels.plan import H200, Shape, plan
out = {}
for kernel in ("forward", "backward"):
    chosen = plan(kernel, Shape(128, 16, 5000, 512, 512, 1, 2, "tf32"), H200)
    assert chosen.regime == "resident", chosen
    resources = ahead.compile(ahead.Variant(kernel, 90, "bf16", 1, False, False, True, chosen))
    out[kernel] = {"ttgir": resources.ttgir, "ptx": resources.ptx, "resident": chosen.resident}
out["free"] = [[p.name for p in k.params if p.do_not_specialize] for k in (lstm_forward, lstm_backward)]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def representations(report, tmp_path_factory):
    saved = environment()
    return report(
        ONE.replace("import json", "import json, os; os.environ.pop('TRITON_INTERPRET', None)", 1),
        tmp_path_factory.mktemp("one"),
        **saved,
    )


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_resident_weights_are_loaded_before_the_loop_over_time(representations, pass_):
    ttgir, chunks = representations[pass_]["ttgir"], representations[pass_]["resident"]
    loop = ttgir.index("scf.for", ttgir.index("scf.for") + 1)  # the first is over items, the second over time
    operands = r"tt\.load .*tensor<8x\d+x\d+x!tt\.ptr<bf16>"  # what is split for eight warps: states, and weights
    assert chunks > 1
    assert len(re.findall(operands, ttgir[:loop])) == chunks
    assert len(re.findall(operands, ttgir[loop:])) == chunks
    assert ttgir.count(" = tt.dot ") == chunks


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_programs_meet_by_release_and_acquire(representations, pass_):
    ptx = representations[pass_]["ptx"]
    assert re.search(r"(red|atom)\S*\.release\.gpu|(atom|red)\.global\.gpu\.release", ptx)
    assert "ld.acquire.gpu.global.s32" in ptx
    assert "mma.sync" in ptx or "wgmma" in ptx


def test_lengths_and_batches_do_not_recompile(representations):
    for names in representations["free"]:
        assert set(names) == {"T", "B", "begin", "end"}
