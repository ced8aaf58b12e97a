"""python -m fusedrnn bench micro: the kernels on the host, what nvcc makes of them, and what is made of results."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock
from fusedrnn.benchmarks import micro, on_a_gpu
from fusedrnn.benchmarks.micro import Measurement
from fusedrnn.kernels import plan as planner

from fusedrnn import cli

SCHEDULES = 8


@pytest.fixture(scope="session")
def host():
    """The program that runs the kernels on the host."""
    if shutil.which("g++") is None:
        pytest.skip("the host build of the microbenchmarks needs a C++ compiler, and there is none")
    folder = micro.ROOT / "build"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "micro.lock"):  # another process with tests may need it as well
        return micro.program(host=True)


def on_the_host(host, *arguments):
    done = subprocess.run([host, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, [micro.measurement(line) for line in lines[1:]]


# ------------------------------------------------------------------------------------------------ the kernels


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_kernels_end_and_count_right_under_every_schedule(host, seed):
    status, measured = on_the_host(host, "--seed", seed)
    assert [(m.name, m.variant, m.error) for m in measured if m.status != "ok"] == []
    assert status == 0
    assert {m.name for m in measured} == micro.NAMES.keys() - {"launch"}


SYNCHRONISATIONS = [
    ("grid_barrier", "the counter"),
    ("grid_barrier", "the flags of the group"),
    ("flag", "the flag of the partner"),
    ("sentinel", "the data of block 0"),
    ("grid_exchange", "the block's flag is released"),
    ("grid_exchange", "the flags of the group"),
    ("grid_exchange", "the thread's copies of the operand"),
    ("grid_exchange", "the operand itself"),
    ("grid_exchange", "the operand has come"),
    ("push", "the push of rank 0"),
    ("push", "the barriers of the cluster are ready"),
    ("push_bandwidth", "the operand has come"),
    ("cluster_exchange", "the operand has come"),
    ("cluster_exchange", "the operand is used"),
]


@pytest.mark.parametrize(("name", "removed"), SYNCHRONISATIONS)
def test_a_synchronisation_that_is_left_out_is_noticed(host, name, removed):
    """The test of the test before."""
    seen = (on_the_host(host, "--seed", seed, "--remove", removed, name)[0] for seed in range(60))
    assert any(status != 0 for status in seen)


def test_what_is_assumed_is_measured(host):
    """Every constant of the planner's but one finds its measurement among those that there are."""
    _, measured = on_the_host(host)
    lines = micro.assumptions({}, measured)[1:]
    assert len(lines) == len(micro.ASSUMPTIONS)
    assert [line[0] for line in lines if line[3] == "-"] == ["_GEMM, its launch"]


# ------------------------------------------------------------------------------------------------ what nvcc makes of it

# A kernel's name as it is mangled, and how often an instruction stands in it at least: what is measured, in the width
# that is measured.
INSTRUCTIONS = {
    "14CounterBarrier": [(r"REDG?\.E\.ADD\.STRONG\.GPU", 2), (r"LDG\.E\.STRONG\.GPU", 2)],
    "11FlagBarrier": [(r"STG?\.E\.STRONG\.GPU", 2), (r"LDG\.E\.STRONG\.GPU", 2)],
    "12FlagPingPong": [(r"STG?\.E\.STRONG\.GPU", 2), (r"LDG\.E\.STRONG\.GPU", 2)],
    "16SentinelPingPong": [(r"STG\.E\.128", 2), (r"LDG\.E\.128\.STRONG\.GPU", 2)],
    "12FlagExchange": [(r"STG\.E\.128", 2), (r"LDG\.E\.STRONG\.GPU", 2), (r"LDGSTS\.E\.BYPASS\.128", 2)],
    "16SentinelExchange": [(r"STG\.E\.128", 2), (r"LDG\.E\.128\.STRONG\.GPU", 2), (r"STS\.128", 2)],
    "4ReadILNS0_4FromE0E": [(r"LDG\.E\.128\.NA\.CONSTANT|LDG\.E\.NA\.128\.CONSTANT", 8)],
    "4ReadILNS0_4FromE1E": [(r"LDGSTS\.E\.BYPASS\.128", 8)],
    "4ReadILNS0_4FromE2E": [(r"LDS\.128", 8)],
    "9L2Latency": [(r"LDG\.E\.128\.NA\.CONSTANT|LDG\.E\.NA\.128\.CONSTANT", 1)],
    "13MatrixProductILNS_4cuda8OperandsE0ELi8E": [(r"HMMA\.16816\.F32\.BF16", 8)],
    "13MatrixProductILNS_4cuda8OperandsE1ELi8E": [(r"HMMA\.16816\.F32 ", 8)],
    "13MatrixProductILNS_4cuda8OperandsE2ELi8E": [(r"HMMA\.1688\.F32\.TF32", 8)],
    "13MatrixProductILNS_4cuda8OperandsE0ELi1E": [(r"HMMA\.16816\.F32\.BF16", 1)],
    "11MultiplyAdd": [(r"FFMA", 8)],
}
CLUSTERED = {
    "14ClusterBarrierILb1E": [(r"UCGABAR_ARV", 2), (r"UCGABAR_WAIT", 2), (r"MEMBAR", 2)],
    "14ClusterBarrierILb0E": [(r"UCGABAR_ARV", 2), (r"UCGABAR_WAIT", 2)],
    "12PushPingPong": [(r"STAS\.128", 2), (r"SYNCS\.PHASECHK", 2)],
    "4PushILb0E": [(r"STAS\.128", 2), (r"SYNCS\.PHASECHK", 2)],
    "4PushILb1E": [(r"STAS\.128", 2), (r"SYNCS\.PHASECHK", 2)],
}


def cuobjdump():
    found = micro.cuda_tool("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is not here: what nvcc made is not read")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


@pytest.mark.compiles
@pytest.mark.timeout(300)
@pytest.mark.skipif(micro.cuda_tool("nvcc") is None, reason="nvcc is not here: the microbenchmarks are not compiled")
@pytest.mark.parametrize("architecture", micro.ARCHITECTURES)
def test_what_is_measured_is_in_the_machine_code(architecture):
    command = [cuobjdump(), "-sass", "-arch", architecture, str(micro.program())]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = {text.split("\n")[0]: text for text in re.split(r"\n\s*Function : ", sass)[1:]}
    expected = INSTRUCTIONS | ({} if architecture == "sm_80" else CLUSTERED)
    for kernel, instructions in expected.items():
        (code,) = (text for name, text in functions.items() if kernel in name)
        for instruction, count in instructions:
            assert len(re.findall(instruction, code)) >= count, f"{kernel}: {instruction}\n{code}"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{kernel} uses local memory"
        assert re.search(r"\bBRA\b", code), f"{kernel} has no loop"


# ---------------------------------------------------------------------------------------------- what is made of results


def test_latency_and_rates_of_samples():
    crossing = Measurement(
        "flag", work=2, iterations=1000, blocks=132, ns=(1.5e6, 1.7e6, 1.6e6), cycles=(2.4e6, 3e6, 2.8e6)
    )
    assert crossing.values == [0.75, 0.85, 0.8]
    assert (crossing.median, crossing.unit, crossing.clocks) == (0.8, "us", 1400.0)
    assert crossing.ghz == pytest.approx(1.75)
    read = Measurement("l2", quantity="bytes", work=131072, iterations=100, blocks=10, ns=(1e6,), cycles=(2e6,))
    assert read.values == [131.072]  # GB/s of all blocks
    assert read.clocks == pytest.approx(6.5536)  # bytes per clock of each
    row = crossing.row()
    assert (row["min"], row["median"], row["status"]) == (0.75, 0.8, "ok")
    assert row["p80"] == pytest.approx(0.83)


H200 = {"device": "NVIDIA H200", "capability": 90, "multiprocessors": 132, "shared": 232448, "clock_khz": 1980000}


def test_the_row_for_the_planner_is_what_was_measured(tmp_path, capsys):
    measured = [
        Measurement("grid_barrier", "counter", iterations=1000, blocks=128, group=64, ns=(9e5,), cycles=(1e6,)),
        Measurement("grid_barrier", "counter", iterations=1000, blocks=132, group=132, ns=(1.1e6,), cycles=(2.2e6,)),
        Measurement("grid_barrier", "flags", iterations=1000, blocks=132, group=132, ns=(7e5,), cycles=(1.4e6,)),
        Measurement("l2_bandwidth", "own, loads", "bytes", 1e6, 10, 132, ns=(3.3e5,), cycles=(6.6e5,)),
        Measurement("l2_bandwidth", "the same", "bytes", 1e6, 10, 132, ns=(1e5,), cycles=(2e5,)),
    ]
    row = micro.device_row(H200, measured)
    device = eval(row, vars(planner))
    assert device == planner.H200._replace(clock=2.0, l2=4.0e6, grid_barrier=1.1, measured=True)
    assert on_a_gpu._conclude(H200, measured, tmp_path) == 0
    assert row in capsys.readouterr().out
    assert row in (tmp_path / "micro.md").read_text()
    lines = {line[0]: line[2:] for line in micro.assumptions(H200, measured)}
    assert lines["Device.grid_barrier"] == (
        f"{planner.H200.grid_barrier:.4g}",
        "1.1",
        f"{1.1 / planner.H200.grid_barrier:.4g}",
    )
    assert lines["_RATES['16']"][1:] == ("-", "-")
    assert micro.device_row(H200, measured[3:]) is None
    assert micro.device_row({"device": "the host, on fibers"}, measured) is None, "a host tells nothing of a GPU"


def stub(path, body):
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)
    return path


DEVICE_LINE = f"echo '{json.dumps(H200)}'"
OK_LINE = """echo '{"name":"flag","ns":[1000],"cycles":[2000]}'"""


def test_a_kernel_that_hangs_or_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(micro, "TIMEOUT", 0.5)
    body = f"{DEVICE_LINE}\n[ $3 = push ] && exec sleep 60\n[ $3 = mma ] && echo cudaErrorX >&2 && exit 1\n{OK_LINE}"
    lines = list(micro.run(stub(tmp_path / "micro", body), ["push", "mma", "flag"], 5))
    assert [line.get("device") for line in lines] == ["NVIDIA H200", None, None, None]
    hung, failed, fine = (micro.measurement(line) for line in lines[1:])
    assert (hung.name, hung.error) == ("push", "it did not end within 0 s")
    assert (failed.name, failed.error) == ("mma", "cudaErrorX")
    assert fine.status == "ok"


def test_without_a_gpu_it_says_so(tmp_path):
    program = stub(tmp_path / "micro", "echo cudaGetDeviceProperties: cudaErrorNoDevice >&2\nexit 1")
    with pytest.raises(micro.UnavailableError, match="cudaErrorNoDevice"):
        list(micro.run(program, ["flag"], 5))


def test_results_are_there_as_soon_as_they_are_measured(tmp_path):
    writer = micro.Writer(tmp_path, {"commit": "abc"})
    writer.device(H200)
    writer.write(json.loads(OK_LINE[6:-1]))
    device, (measured,) = micro.read(tmp_path / "micro.jsonl")  # before it is closed
    assert device == H200
    assert (measured.name, measured.median) == ("flag", 1.0)
    head, row = (line.split(",") for line in (tmp_path / "micro.csv").read_text().splitlines())
    assert dict(zip(head, row, strict=True))["commit"] == "abc"
    writer.close()
    (tmp_path / "micro.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="is not a file of microbenchmarks"):
        micro.read(tmp_path / "micro.jsonl")


def test_neither_program_nor_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(micro, "cuda_tool", lambda name: None)
    monkeypatch.setattr(micro, "NVCC_FLAGS", ["--of-another-build"])
    with pytest.raises(micro.UnavailableError, match=r"build/micro/micro-\w+ is not here, nor is nvcc"):
        micro.program()
    monkeypatch.setattr(micro, "SOURCES", tmp_path)
    with pytest.raises(micro.UnavailableError, match="run it in a checkout"):
        micro.program()


def test_command_on_the_host(host, tmp_path, capsys):
    assert cli.main(["bench", "micro", "--host", "flag", "mma", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "release, acquire" in out
    assert {path.name for path in tmp_path.iterdir()} == {"micro.jsonl", "micro.csv", "micro.md"}
    report = (tmp_path / "micro.md").read_text()
    assert "Device.grid_barrier" in report
    assert "its times mean nothing" in report
    assert "measured=True" not in report


def test_what_was_measured_before_an_interruption_is_reported(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        yield H200
        yield json.loads(OK_LINE[6:-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(micro, "program", lambda host: tmp_path / "micro")
    monkeypatch.setattr(micro, "run", interrupted)
    assert cli.main(["bench", "micro", "--out", str(tmp_path)]) == 130
    written = (tmp_path / "micro.md").read_text()
    assert "| flag |" in written
    path = tmp_path / "micro.jsonl"
    path.write_text(path.read_text() + '{"name": "fl')  # killed as it wrote
    (tmp_path / "micro.md").unlink()
    assert cli.main(["bench", "micro", "--report", str(path)]) == 0
    assert (tmp_path / "micro.md").read_text() == written
    capsys.readouterr()
    assert cli.main(["bench", "micro", "--report", str(path), "--json"]) == 0
    assert "flag" in {measured["name"] for measured in json.loads(capsys.readouterr().out)["measurements"]}
    path.write_text("{}\nnot json\n")
    with pytest.raises(SystemExit):
        cli.main(["bench", "micro", "--report", str(path)])
    assert "is not a file of microbenchmarks" in " ".join(capsys.readouterr().err.split())


def test_command_with_a_name_that_there_is_not(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "micro", "warp"])
    assert exit.value.code == 2
    assert "unknown warp: expected some of launch, grid_barrier" in " ".join(capsys.readouterr().err.split())


def line_of(name, variant, group, size, us):
    return Measurement(name, variant, group=group, blocks=128, bytes=size, ns=(us * 1e3,), cycles=(us * 1.8e3,))


def test_constants_of_the_cuda_planner_are_taken_from_the_largest_group(capsys):
    """A time is one without a byte, and one for each: 0.6 us, and 20 bytes a clock at 1.8 GHz."""
    measured = [
        line_of("cluster_exchange", "push to all", group, size, 0.3 * (1 + (group == 16)) + size / (20 * 1.8e3))
        for group in (2, 16)
        for size in (4096, 16384, 32768)
    ]
    measured += [line_of("grid_exchange", "flags", 64, size, 1.1 + size / 9e4) for size in (4096, 16384)]
    found = {line[0]: line[3] for line in micro.assumptions({}, measured)[1:]}
    assert found["cuda_plan: Costs.cluster"] == "0.6"
    assert found["cuda_plan: _PEER_PER_CLOCK"] == "20"
    assert found["cuda_plan: Costs.grid"] == "1.1"
    assert found["cuda_plan: Costs.half"] == "-"


def test_clusters_that_fit_are_reported(tmp_path):
    device = {"device": "NVIDIA H200", "capability": 90, "multiprocessors": 132, "shared": 232448, "clock_khz": 1980000}
    micro.write_report({**device, "clusters": {"2": 66, "16": 7}}, [], tmp_path / "micro.md")
    assert "Clusters with 200 KiB a block that fit: 66 of 2, 7 of 16" in (tmp_path / "micro.md").read_text()


def test_a_wheel_has_kernels_to_measure_and_not_what_they_include(tmp_path, monkeypatch, capsys):
    shutil.copytree(micro.SOURCES, tmp_path / "benchmarks" / "cuda")
    for name, folder in (("ROOT", ""), ("SOURCES", "benchmarks/cuda"), ("DEVICE", "csrc/cuda")):
        monkeypatch.setattr(micro, name, tmp_path / folder)
    for arguments in (["micro"], ["gpu", "--prepare"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(["bench", *arguments])
        assert exit.value.code == 2
        assert "micro.cu): run it in a checkout" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["bench", "gpu", "--list", "--dry-run"]) == 0
    assert "micro_host.cpp): run it in a checkout" in capsys.readouterr().out
