"""The memory of a process that measures: what becomes of it when it is freed, and how much of it a call takes."""

import csv
import ctypes
import shutil
import subprocess
import sys

import pytest
import torch
from fusedrnn.benchmarks import ceilings, command, memory, results, timing
from fusedrnn.benchmarks.contender import BASELINE

from fusedrnn import cli, ops

SMALL = ["--shape", "3,2,4,5", "--rounds", "2", "--time-budget", "0", "--backend", "reference", "--baseline", BASELINE]

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system tells")
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="no other library is told")


@pytest.fixture
def settled(monkeypatch):
    """What the command settles, which would be for all tests; and samples are short."""
    found = []
    monkeypatch.setattr(memory, "settle", lambda freed: found.append(freed) or freed)
    monkeypatch.setattr(timing, "SAMPLE", 1e-4)
    monkeypatch.setattr(timing, "REST", 0.0)
    monkeypatch.setattr(ceilings, "_SAMPLE", 1e-4)
    return found


def bench(*arguments):
    return cli.main(["bench", "--device", "cpu", *SMALL, *map(str, arguments)])


# ------------------------------------------------------------------------------------------------ what is freed


@pytest.mark.slow
@glibc
@pytest.mark.parametrize("before", ["nothing", "a large piece"])
@pytest.mark.parametrize("freed", ["kept", "returned"])
def test_new_pages_do_not_depend_on_what_was_freed_before(freed, before):
    """Of memory that is freed and taken again. Left to itself, glibc keeps the 8 MiB and returns the 48.

    Of the first there are 2048 pages of 4 KiB, and four where the system makes larger ones. It is the median of many
    times, because now and then something small takes a part of what was freed.
    """
    code = f"""
import resource, statistics, torch
from fusedrnn.benchmarks import memory
def pages(mebibytes):
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebibytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin
assert memory.settle({freed!r}) == {freed!r}
{"torch.ones(24 * 2**18)" if before == "a large piece" else ""}
print(*(statistics.median(pages(mebibytes) for _ in range(25)) for mebibytes in (8, 48)))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    small, large = map(float, done.stdout.split())
    assert small == large == 0 if freed == "kept" else min(small, large) >= 4


def test_where_it_cannot_be_said_nothing_is_claimed(monkeypatch):
    class Other:
        """A C library without mallopt."""

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Other())
    assert memory.settle("kept") == ""


def test_what_is_refused_is_not_claimed(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def mallopt(what, value):
            asked.append((what, value))
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    assert memory.settle("returned") == ""
    assert asked


@pytest.mark.parametrize(("arguments", "freed"), [([], "kept"), (["--memory", "returned"], "returned")])
def test_a_run_settles_it_and_says_so(settled, tmp_path, arguments, freed):
    assert bench("--limit", 1, *arguments, "--out", tmp_path) == 0
    assert settled == [freed]
    assert results.read(tmp_path / "results.csv")[1]["memory"] == freed
    assert f"| memory | {freed} |" in (tmp_path / "report.md").read_text()


def test_what_cannot_become_of_it_is_an_error(settled, capsys):
    with pytest.raises(SystemExit):
        bench("--memory", "lost")
    assert "'lost' (choose from " in capsys.readouterr().err
    assert settled == []


def test_memory_of_a_gpu_is_torchs(settled, monkeypatch, tmp_path):
    class FoundError(Exception):
        pass

    def collect(device):
        assert device == "cuda"
        return {}

    def stop(*arguments):
        assert arguments[1]["memory"] == ""
        raise FoundError

    monkeypatch.setattr(command.testing, "devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(command.provenance, "collect", collect)
    monkeypatch.setattr(command.results, "Writer", stop)
    with pytest.raises(FoundError):
        cli.main(["bench", *SMALL, "--device", "cuda", "--out", str(tmp_path)])
    assert settled == []


def test_files_that_do_not_say_it_are_resumed_and_compared(settled, capsys, tmp_path):
    assert bench("--limit", 1, "--out", tmp_path / "old") == 0
    path = tmp_path / "old" / "results.csv"
    with path.open(newline="") as file:
        lines = [{name: text for name, text in line.items() if name != "memory"} for line in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    assert bench("--limit", 2, "--resume", "--out", tmp_path / "new") == 0
    with (tmp_path / "new" / "results.csv").open(newline="") as file:
        assert [line["memory"] for line in csv.DictReader(file)] == ["", "", "kept", "kept"]
    capsys.readouterr()
    cli.main(["bench", "compare", *(str(tmp_path / name / "results.csv") for name in ("old", "new"))])
    assert "note: memory is None in A and 'kept' in B" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ what is taken


@linux
def test_peak_memory_sees_every_allocator():
    size = 64 * 2**20
    assert memory.peak_bytes(lambda: torch.ones(size // 4).sum(), "cpu") == pytest.approx(size, rel=0.1)
    assert memory.peak_bytes(lambda: bytearray(size), "cpu") == pytest.approx(size, rel=0.1)
    assert memory.peak_bytes(lambda: None, "cpu") < size / 10


@linux
@pytest.mark.skipif(ops.cpu_unavailable is not None, reason=str(ops.cpu_unavailable))
def test_peak_memory_sees_what_is_kept(report, tmp_path):
    """In a process of its own: memory that other tests have freed, and that is still resident, would not be seen."""
    code = """
import json, torch, fusedrnn
from fusedrnn import testing
from fusedrnn.benchmarks import memory
module, x = fusedrnn.LSTM(256, 256), torch.randn(100, 32, 256)
def step(module=module, x=x):
    with fusedrnn.use_backend("cpu"):
        module(x)[0].sum().backward()
step(fusedrnn.LSTM(700, 300), torch.randn(60, 32, 700))  # what others left is not what a step takes
with testing.nothing_kept():
    pass
step()
_, _, kept = torch.ops.fusedrnn.cpu_keep()
peak = memory.peak_bytes(step, "cpu")
limit, _, again = torch.ops.fusedrnn.cpu_keep()
print(json.dumps([kept, peak, limit, again]))
"""
    kept, peak, limit, again = report(code, tmp_path)
    assert kept > 12 * 2**20
    assert peak > kept
    assert again > 0
    assert limit > 0
