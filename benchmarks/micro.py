"""Microbenchmarks of a GPU: what the planners' cost models assume, measured.

The kernels and the program that times them lie in benchmarks/cuda; this builds the program, runs it, and sets what it
says next to what kernels/plan.py assumes. The program is named after a digest of its sources: one that was built on
another machine is found by its name, and one of other sources is not. With --host the kernels run on the host, every
thread a fiber: whether they end and count right is real then, times are not.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import linear_regression, median
from types import SimpleNamespace
from typing import Any

from fusedrnn.kernels import plan as planner
from fusedrnn.kernels.device import device_of

from fusedrnn import cuda_plan

from .report import markdown
from .timing import percentiles

ROOT = Path(__file__).resolve().parents[1]
SOURCES, DEVICE = ROOT / "benchmarks" / "cuda", ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "csrc" / "testing" / "cuda_emulator"
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}
NVCC_FLAGS = ["-std=c++20", "-O3", "-cudart", "static", "-Xcompiler", "-Wall,-Wextra"]
NVCC_FLAGS += ["-Xcompiler", "-static-libstdc++,-static-libgcc"]
HOST_FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
NAMES = {
    "launch": "an empty kernel: one after another, waited for, in a graph",
    "grid_barrier": "the barrier of a group of blocks through L2: at a counter, or at flags",
    "flag": "a block hears from another through a flag in L2",
    "sentinel": "the same, polling the data",
    "grid_exchange": "a step of a grid-resident layer without its arithmetic: flags, or the data polled",
    "cluster_barrier": "the barrier of a cluster",
    "push": "16 bytes into another block's shared memory, and the barrier there",
    "push_bandwidth": "neighbours of a cluster push to each other",
    "cluster_exchange": "a step of a cluster-resident layer without its arithmetic",
    "l2_bandwidth": "reading what lies in L2",
    "l2_latency": "one load from L2 after another",
    "shared_bandwidth": "reading shared memory",
    "mma": "matrix instructions: bfloat16, float16, TF32",
    "mma_latency": "matrix instructions that wait for each other",
    "multiply_add": "float32 outside of the matrix unit",
}
TIMEOUT = 60.0  # seconds for all measurements of a name; they take about one


class UnavailableError(Exception):
    """There is no program, and none can be built; the message says why."""


def unavailable(host: bool = False) -> str | None:
    """Why there is no program and none can be built, or None."""
    entry = _entry(host)
    if not (entry.is_file() and DEVICE.is_dir()):
        return f"the sources of the microbenchmarks are not here ({entry.name}): run it in a checkout"
    target = _target(host)
    if target.is_file() or _compiler(host) is not None:
        return None
    return f"{target.relative_to(ROOT)} is not here, nor is {'a C++ compiler' if host else 'nvcc'} to build it with"


def program(host: bool = False) -> Path:
    """The program, built now unless it is there.

    Raises:
        UnavailableError: as `unavailable` says; or it does not compile.
    """
    reason = unavailable(host)
    if reason is not None:
        raise UnavailableError(reason)
    entry, target = _entry(host), _target(host)
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    flags = [*HOST_FLAGS, str(EMULATOR / "runtime.cpp")]
    if not host:
        flags = [*NVCC_FLAGS, *(f"-gencode=arch={v},code={r}" for r, v in ARCHITECTURES.items())]
    command = [str(_compiler(host)), *flags, str(entry), "-o", str(partial)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise UnavailableError(f"{entry.name} does not compile: {(built.stdout + built.stderr).strip()}")
    for old in target.parent.glob(f"{entry.stem}-*"):
        if old != partial:
            old.unlink()
    partial.replace(target)
    return target


def _entry(host: bool) -> Path:
    return SOURCES / ("micro_host.cpp" if host else "micro.cu")


def _target(host: bool) -> Path:
    """The path of the program built from these sources."""
    entry = _entry(host)
    inputs = [*sorted(SOURCES.glob("*.h")), DEVICE / "device.h", DEVICE / f"device_{'host' if host else 'ptx'}.h"]
    inputs += sorted(EMULATOR.glob("[rf]*")) if host else []  # runtime.h, runtime.cpp and fiber.h
    digest = hashlib.sha256(json.dumps([NVCC_FLAGS, ARCHITECTURES, HOST_FLAGS]).encode())
    for path in (*inputs, entry):
        digest.update(path.read_bytes())
    return ROOT / "build" / "micro" / f"{entry.stem}-{digest.hexdigest()[:16]}"


def _compiler(host: bool) -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) if host else cuda_tool("nvcc")


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: in PATH, or where CUDA_HOME says."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which(name) or shutil.which(name, path=f"{home / 'bin'}{os.pathsep}{home / name}")


@dataclass(frozen=True)
class Measurement:
    """One line of what the program prints: launches of one kernel, each a sample."""

    name: str
    variant: str = ""
    quantity: str = "latency"  # what `work` counts: crossings, "bytes" or "multiply-adds"
    work: float = 1.0  # of an iteration; of the rates, for each block
    iterations: int = 1
    blocks: int = 0
    group: int = 0  # blocks at the barrier
    threads: int = 0
    bytes: int = 0  # that a block reads, or a group exchanges, in an iteration
    ns: tuple[float, ...] = ()
    cycles: tuple[float, ...] = ()
    error: str = ""
    skipped: str = ""

    @property
    def status(self) -> str:
        """ "ok", "failed" or "skipped"."""
        return "failed" if self.error else "skipped" if self.skipped else "ok"

    @property
    def unit(self) -> str:
        """The unit of `values`: microseconds, or a rate of the whole device."""
        return {"latency": "us", "bytes": "GB/s", "multiply-adds": "GFMA/s"}[self.quantity]

    @property
    def values(self) -> list[float]:
        """A sample each."""
        count = self.work * self.iterations
        if self.quantity == "latency":
            return [ns / 1e3 / count for ns in self.ns]
        return [count * self.blocks / ns for ns in self.ns]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def clocks(self) -> float | None:
        """The median in clocks of a multiprocessor: of a latency how many, of a rate how much in each of them."""
        if not self.cycles:
            return None
        count = self.work * self.iterations
        return median(self.cycles) / count if self.quantity == "latency" else count / median(self.cycles)

    @property
    def ghz(self) -> float | None:
        """The clock of a multiprocessor while this was measured."""
        return median(self.cycles) / median(self.ns) if self.cycles else None

    def row(self) -> dict[str, Any]:
        """A line of the CSV file; "" for missing values."""
        row: dict[str, Any] = {name: getattr(self, name) for name in _IDENTITY}
        row |= {"unit": self.unit, "samples": len(self.ns), "status": self.status, "reason": self.error or self.skipped}
        row |= dict.fromkeys(("min", "p20", "median", "p80", "clocks", "ghz"), "")
        if self.ns:
            low, middle, high = percentiles(self.values)
            row |= {"min": min(self.values), "p20": low, "median": middle, "p80": high}
            row |= {"clocks": self.clocks or "", "ghz": self.ghz or ""}
        return row


_IDENTITY = ("name", "variant", "group", "blocks", "threads", "bytes", "iterations")
COLUMNS = (*_IDENTITY, "unit", "min", "p20", "median", "p80", "clocks", "ghz", "samples", "status", "reason")


def run(executable: Path, names: Sequence[str], samples: int, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """The lines that the program prints, as it prints them: a device, then measurements.

    Every name is a process of its own, with so many seconds, or TIMEOUT: a kernel that fails, or does not end, takes no
    other with it.

    Raises:
        UnavailableError: the program finds no GPU that it can use.
    """
    device_seen = False
    for name in names:
        host = executable.name.startswith("micro_host")
        command = [str(executable), *([] if host else ["--samples", str(samples)]), name]
        lines, reason = _lines(command, TIMEOUT if seconds is None else seconds)
        devices = [line for line in lines if "device" in line]
        if not devices:
            raise UnavailableError(reason or f"{executable.name} says nothing")
        yield from devices[: 0 if device_seen else 1]
        device_seen = True
        yield from (line for line in lines if "device" not in line)
        if reason is not None and not any(line.get("error") for line in lines):
            yield {"name": name, "error": reason, "ns": [], "cycles": []}


def _lines(command: list[str], seconds: float) -> tuple[list[dict[str, Any]], str | None]:
    """The output of a program, and its error."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, complaint = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            complaint = f"it did not end within {seconds:.0f} s"
    lines = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    failed = complaint.strip() or f"it ended with status {process.returncode}"
    return lines, failed if process.returncode != 0 else None


def measurement(line: dict[str, Any]) -> Measurement:
    """A line of the program that is not the device's."""
    return Measurement(**{**line, "ns": tuple(line["ns"]), "cycles": tuple(line["cycles"])})


class Writer:
    """micro.jsonl, with every sample, and micro.csv, line by line as they are measured."""

    def __init__(self, folder: Path, provenance: dict[str, str]) -> None:
        self._raw = (folder / "micro.jsonl").open("w", encoding="utf-8")
        self._file = (folder / "micro.csv").open("w", newline="", encoding="utf-8")
        self._provenance = provenance
        self._csv = csv.DictWriter(self._file, [*COLUMNS, *provenance], lineterminator="\n")
        self._csv.writeheader()
        self.device({"provenance": provenance})

    def device(self, line: dict[str, Any]) -> None:
        self._raw.write(json.dumps(line) + "\n")
        self._raw.flush()

    def write(self, line: dict[str, Any]) -> None:
        self.device(line)
        self._csv.writerow({**measurement(line).row(), **self._provenance})
        self._file.flush()

    def close(self) -> None:
        self._raw.close()
        self._file.close()


def read(path: Path) -> tuple[dict[str, Any], list[Measurement]]:
    """The device and the measurements of a micro.jsonl, but for a last line that was cut off.

    Raises:
        ValueError: it is not such a file.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        device: dict[str, Any] = next((line for line in lines if "device" in line), {})
        return device, [measurement(line) for line in lines if "name" in line]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a file of microbenchmarks: {error}") from error


# ------------------------------------------------------------------------------------------------ what people read


def table(measurements: Iterable[Measurement]) -> list[tuple[str, ...]]:
    """A head and a line for each measurement."""
    lines: list[tuple[str, ...]] = [
        ("measurement", "variant", "group", "blocks", "threads", "bytes", "min", "median", "p80", "", "clocks", "")
    ]
    for m in measurements:
        row = m.row()
        figures = [f"{row[name]:.4g}" if row[name] != "" else "-" for name in ("min", "median", "p80")]
        sizes = [str(row[name]) for name in ("group", "blocks", "threads", "bytes")]
        clocks = "-" if m.clocks is None else f"{m.clocks:.4g}"
        note = "" if m.status == "ok" else f"{m.status}: {m.error or m.skipped}"
        lines.append((m.name, m.variant, *sizes, *figures, m.unit, clocks, note))
    return lines


@dataclass(frozen=True)
class Assumption:
    """A constant of kernels/plan.py or of cuda_plan.py, and how to find it in measurements."""

    constant: str
    unit: str
    assumed: Callable[[planner.Device], float]
    measured: Callable[[list[Measurement]], float]  # ValueError where what it needs was not measured


def _of(name: str, variant: str = "") -> Callable[[list[Measurement]], list[Measurement]]:
    """Measurements of a name whose variant begins like that, of as many blocks as there are."""

    def found(measurements: list[Measurement]) -> list[Measurement]:
        some = [m for m in measurements if m.name == name and m.variant.startswith(variant) and m.ns]
        most = max(m.blocks for m in some)
        return [m for m in some if m.blocks == most]

    return found


def _latency(name: str, variant: str = "") -> Callable[[list[Measurement]], float]:
    """The latency of the largest group."""
    return lambda all: max(_of(name, variant)(all), key=lambda m: m.group).median


def _per_clock(name: str, variant: str = "") -> Callable[[list[Measurement]], float]:
    return lambda all: max(m.clocks or 0.0 for m in _of(name, variant)(all))


def _l2(measurements: list[Measurement]) -> float:
    return max(m.median for m in _of("l2_bandwidth", "own")(measurements)) * 1e3  # GB/s in bytes per microsecond


def _l2_of_one(measurements: list[Measurement]) -> float:
    return max(m.clocks or 0.0 for m in measurements if m.name == "l2_bandwidth" and m.blocks == 1 and m.cycles)


def _line(name: str, variant: str, measurements: list[Measurement]) -> tuple[float, float]:
    """Microseconds without a byte, and bytes a microsecond, of the largest group that was measured at several sizes."""
    some = [m for m in measurements if m.name == name and m.variant.startswith(variant) and m.ns]
    sizes: dict[int, dict[int, float]] = {}
    for m in some:
        sizes.setdefault(m.group, {})[m.bytes] = m.median
    largest = max(group for group, found in sizes.items() if len(found) > 1)
    slope, intercept = linear_regression(list(sizes[largest]), list(sizes[largest].values()))
    return intercept, 1 / slope if slope > 0 else inf


def _without_bytes(name: str, variant: str) -> Callable[[list[Measurement]], float]:
    return lambda all: _line(name, variant, all)[0]


def _peer_bytes(measurements: list[Measurement]) -> float:
    """Bytes a clock that a block receives from its cluster."""
    return _line("cluster_exchange", "push", measurements)[1] / (1e3 * _clock(measurements))


def _clock(measurements: list[Measurement]) -> float:
    return median([m.ghz for m in measurements if m.ghz is not None and m.name != "launch"])


ASSUMPTIONS = (
    Assumption("Device.clock", "GHz", lambda d: d.clock, _clock),
    Assumption("Device.l2", "bytes per us", lambda d: d.l2, _l2),
    Assumption("Device.grid_barrier", "us", lambda d: d.grid_barrier, _latency("grid_barrier", "counter")),
    Assumption("_STATE_LATENCY", "us", lambda _: planner._STATE_LATENCY, _latency("l2_latency")),
    Assumption("_GEMM, its launch", "us", lambda _: planner._GEMM, _latency("launch", "one after another")),
    Assumption("_L2_PER_CLOCK", "bytes per clock of one SM", lambda _: planner._L2_PER_CLOCK, _l2_of_one),
    Assumption(
        "_SHARED_PER_CLOCK",
        "bytes per clock and SM",
        lambda _: planner._SHARED_PER_CLOCK,
        _per_clock("shared_bandwidth"),
    ),
    Assumption("_RATES['16']", "FMA per clock and SM", lambda _: planner._RATES["16"], _per_clock("mma", "bfloat16")),
    Assumption("_RATES['tf32']", "FMA per clock and SM", lambda _: planner._RATES["tf32"], _per_clock("mma", "tf32")),
    Assumption("_RATES['ieee']", "FMA per clock and SM", lambda _: planner._RATES["ieee"], _per_clock("multiply_add")),
    Assumption(
        "cuda_plan: Costs.grid", "us", lambda d: cuda_plan.costs_of(d).grid, _without_bytes("grid_exchange", "flags")
    ),
    Assumption(
        "cuda_plan: Costs.cluster",
        "us",
        lambda d: cuda_plan.costs_of(d).cluster,
        _without_bytes("cluster_exchange", "push"),
    ),
    Assumption("cuda_plan: _PEER_PER_CLOCK", "bytes per clock", lambda _: cuda_plan._PEER_PER_CLOCK, _peer_bytes),
    Assumption(
        "cuda_plan: Costs.half", "FMA per clock and SM", lambda d: cuda_plan.costs_of(d).half, _per_clock("mma", "bf")
    ),
    Assumption(
        "cuda_plan: Costs.single",
        "FMA per clock and SM",
        lambda d: cuda_plan.costs_of(d).single,
        _per_clock("multiply_add"),
    ),
)


def assumptions(device: dict[str, Any], measurements: list[Measurement]) -> list[tuple[str, ...]]:
    """A head and a line for each constant of the planners: assumed, measured, and measured over assumed.

    Those that no microbenchmark shows, `_CELL`, `_PARTIAL` and `_PACK` among them, have to come from what steps take.
    """
    lines: list[tuple[str, ...]] = [("constant", "unit", "assumed", "measured", "measured / assumed")]
    assumed_of = _planned(device)
    for assumption in ASSUMPTIONS:
        assumed = assumption.assumed(assumed_of)
        try:
            measured = assumption.measured(measurements)
        except ValueError:  # of a median or a maximum of nothing
            lines.append((assumption.constant, assumption.unit, f"{assumed:.4g}", "-", "-"))
            continue
        texts = (f"{number:.4g}" for number in (assumed, measured, measured / assumed))
        lines.append((assumption.constant, assumption.unit, *texts))
    return lines


def device_row(device: dict[str, Any], measurements: list[Measurement]) -> str | None:
    """The line for the table of devices in kernels/device.py, or None where not all of it was measured on a GPU."""
    if "capability" not in device:
        return None
    try:
        l2, barrier = _l2(measurements), _latency("grid_barrier", "counter")(measurements)
        clock = _clock(measurements)
    except ValueError:
        return None
    d = _planned(device)
    figures = f"{d.capability}, {d.multiprocessors}, {d.shared:_}, {clock:.3f}, {l2:.3g}, {barrier:.3g}"
    return f'Device("{d.name}", {figures}, measured=True)'


def _planned(device: dict[str, Any]) -> planner.Device:
    """The planner's description of a device; the host build stands for an H200."""
    if "capability" not in device:
        return planner.H200
    major, minor = divmod(device["capability"], 10)
    names = {"multi_processor_count": device["multiprocessors"], "shared_memory_per_block_optin": device["shared"]}
    names["clock_rate"] = device["clock_khz"]
    return device_of(SimpleNamespace(name=device["device"], major=major, minor=minor, **names))


def write_report(device: dict[str, Any], measurements: list[Measurement], path: Path) -> None:
    """Markdown: what is assumed next to what was measured, the line to paste, and all measurements."""
    assumed, measured = assumptions(device, measurements), table(measurements)
    title = f"# Microbenchmarks: {device.get('device', 'no device')}"
    parts = [title if "capability" in device else f"{title}: its times mean nothing"]
    parts += ["## What kernels/plan.py and cuda_plan.py assume", markdown(assumed[0], assumed[1:])]
    if clusters := device.get("clusters"):
        parts.append("Clusters with 200 KiB a block that fit: " + ", ".join(f"{n} of {k}" for k, n in clusters.items()))
    if row := device_row(device, measurements):
        parts += ["For the table of devices there:", f"```python\n{row}\n```"]
    parts += ["## Measured", markdown(measured[0], measured[1:])]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
