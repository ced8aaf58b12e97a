"""The planner: tiles, number of programs, and resident weights of a layer on a GPU, by a cost model without autotuning.

Pure arithmetic on the data of device.py: no Triton, no GPU. Times are in microseconds, sizes in bytes.

    python -m fusedrnn.kernels.plan            the predictions for an H200, as a table; --device NAME for another

The model of one step of one program:

    step = barrier + latency + max(states, weights, arithmetic, pipeline) + cell

    barrier      the grid barrier of a group, once, or twice with a projection
    latency      of the first load of states from L2
    states       load of BATCH rows of the exchanged states from L2
    weights      resident: from shared memory; streamed: from L2, whose bandwidth all programs share
    arithmetic   the matrix instructions over the padded tile
    pipeline     streamed: the chunks in sequence, with `stages` - 1 loads in flight
    cell         elementwise operations with their loads and stores

A launch takes steps * items / groups of them, where an item is a direction and BATCH rows, and groups run concurrently.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ..cells import named
from .device import DEVICES, H200, Device, cdiv, power_of_2
from .device import Shape as _Shape

WARPS = 8
_RESERVED_SHARED = 1024  # of each block, by the driver, on sm_90 and later


# The device for Triton's interpreter: few programs, because it runs them sequentially.
INTERPRETER = H200._replace(name="Triton's interpreter", multiprocessors=16)


_STATE_LATENCY = 0.5  # microseconds from the end of a barrier to the first state in a register
_CHUNK_LATENCY = 0.3  # microseconds from L2 into shared memory for a chunk, without contention
_L2_PER_CLOCK, _SHARED_PER_CLOCK = 64, 128  # bytes, per multiprocessor
_CELL_CLOCKS = 0.4  # for each element of a tile
# Multiply-adds per clock and multiprocessor, by what operands are multiplied in.
_RATES = {"16": 1024.0, "tf32": 512.0, "tf32x3": 512.0 / 3, "ieee": 96.0}


class Shape(_Shape):
    """One launch, with derived sizes of these kernels."""

    __slots__ = ()

    @property
    def aligned(self) -> bool:
        """Whether the loads of rows can be vectorised."""
        return self.H % 16 == 0 and self.P % 16 == 0

    @property
    def gates(self) -> int:
        return len(named(self.cell).gates)

    @property
    def maps(self) -> int:
        """Columns for each unit of the forward's products; those of maps that have none are masked."""
        maps = len(named(self.cell).read)
        return 1 if maps == 1 else 4  # cells.columns

    @property
    def extras(self) -> int:
        """Registers of a unit beside its maps: two for parameters, one for each kind of noise."""
        cell = named(self.cell)
        return 2 * bool(cell.parameters) + len(cell.noise)

    @property
    def apart(self) -> bool:
        """Whether some maps have no input product: their separate bias and masked columns take registers."""
        return self.maps > self.gates

    @property
    def rate(self) -> float:
        return _RATES["16" if self.itemsize == 2 else self.precision]

    @property
    def weight_itemsize(self) -> int:
        """Bytes that an element of a weight takes in shared memory: two TF32 numbers for the 3-pass form."""
        return self.itemsize * (2 if self.itemsize == 4 and self.precision == "tf32x3" else 1)


@dataclass(frozen=True)
class Plan:
    """The launch of one kernel; the fields from `batch` to `precision` are its constants (forward.py, affine.py)."""

    cell: str
    batch: int
    units: int
    columns: int
    chunk: int
    split: int
    ahead: int
    resident: int
    streamed: bool
    resident_hr: int
    resident_ih: int
    programs: int
    carried: bool
    precision: str
    stages: int
    groups: int
    shared: int  # upper bound of the bytes of shared memory
    step: float  # predicted
    launch: float  # predicted, for all steps

    @property
    def fuse_input(self) -> bool:
        """Whether the launch multiplies x with w_ih; otherwise a GEMM comes before."""
        return self.resident_ih > 0

    @property
    def regime(self) -> str:
        if self.carried:
            return "rows"
        return "streamed" if self.streamed else "resident"

    def constants(self, kernel: str) -> dict[str, int | bool | str]:
        """The compile-time constants of "forward" or "backward" from the plan, by name."""
        names = "batch units columns chunk split ahead resident streamed resident_hr programs carried"
        constants = {name.upper(): getattr(self, name) for name in names.split()}
        if kernel == "forward":
            constants["RESIDENT_IH"] = self.resident_ih
        return {**constants, "PRECISION": self.precision}

    @property
    def options(self) -> dict[str, int | bool]:
        """Compile and launch options. By default the assembler may spill to save registers."""
        return {
            "num_warps": WARPS,
            "num_stages": self.stages,
            "maxnreg": 255,
            "enable_fp_fusion": True,  # which Triton 3.10 turns off
            "launch_cooperative_grid": self.programs > 1,
        }

    @cached_property
    def keywords(self) -> dict[str, dict[str, int | bool | str]]:
        """For each kernel, the launch arguments that the plan determines, by name."""
        sync = {"PHASE": 0, "GRID_SYNC": self.programs > 1}
        return {kernel: {**self.constants(kernel), **sync, **self.options} for kernel in ("forward", "backward")}

    def __str__(self) -> str:
        explained = {
            "rows": "a program has whole rows and all weights, no barrier",
            "resident": "weights stay in shared memory",
            "streamed": "weights come from L2 at every step",
        }[self.regime]
        inputs = ", x in the launch" if self.fuse_input else ""
        return (
            f"{self.groups} x {self.programs} programs, {self.batch} rows x {self.units} units, {self.regime} "
            f"({explained}){inputs}, {self.shared // 1024} KiB, {self.step:.2f} us a step predicted"
        )


class _Tile(NamedTuple):
    """Batch rows and units of a program, and the blocking of its products (affine.py)."""

    batch: int
    units: int
    split: int
    chunk: int
    ahead: int
    stages: int  # of the pipeline that streams weights, or 1 where they are resident


def _tiles(kernel: str, shape: Shape, device: Device) -> Iterator[_Tile]:
    """The tiles that spill no registers in the loop over time with Triton from 3.6 on, as compile.py shows.

    Lengths and resets take registers for masks, and row sizes that are no multiples of 16 an address per element. With
    resident weights all loads of states are in flight together: at most `held` bytes, fewer with separate maps.
    """
    plain = shape.itemsize == 4 and shape.precision == "ieee"  # no tensor cores: takes the most registers
    masks = ((3 if shape.apart else 2) if shape.ragged or plain else 1) * (shape.weight_itemsize // shape.itemsize)
    longest = max(shape.P, shape.H if shape.projected else 0) if kernel == "forward" else shape.gates * shape.H
    sums = kernel == "backward" and bool(named(shape.cell).parameters)  # of their gradients, for each element
    widths = (8, 16, 32) if shape.aligned and not (shape.projected or sums) else (8, 16)
    for batch, split, chunk in ((16, 8, 128), (32, 4, 64)):
        for units in widths if shape.extras <= 2 else (8,):
            held = _most_held(shape, device, batch, units) * 1024 // masks if shape.aligned else 8 * 1024
            if batch * cdiv(longest, chunk) * chunk * shape.weight_itemsize <= held:
                yield _Tile(batch, units, split, chunk, 3, 1)
    batches, widest, elements = ((16, 32, 64), 128, 2048) if shape.aligned else ((16,), 32, 512)
    if shape.itemsize == 4:
        shrink = {"tf32": 2, "tf32x3": 3, "ieee": 4}[shape.precision]
        widest, elements = max(widest // shrink, 16), max(elements // shrink, 256)
    elements = min(elements, 1024) if shape.extras > 2 else elements
    for batch in batches:
        for units in (8, 16, 32, 64, 128):
            if units <= widest and batch * units <= elements:
                wide = (
                    shape.aligned
                    and units <= 32
                    and not plain
                    and not (sums and shape.weight_itemsize > shape.itemsize)
                )
                chunk = (64 if shape.projected else 128) // shape.itemsize
                stages = 3 if plain and shape.projected and units > 16 else 4
                yield _Tile(batch, units, 1, chunk if wide else 16, 0, stages)


def _most_held(shape: Shape, device: Device, batch: int, units: int) -> int:
    """KiB of states that are on their way to resident weights."""
    if batch == 32 and units > 8:
        most = 24
    else:
        most = 64 if units <= (16 if device.capability < 100 else 8) else 48
    if shape.extras and units == 32:
        most = min(most, 24)
    elif shape.extras and (units == 16 or shape.itemsize > 2 or shape.extras > 2):
        most = min(most, 48)
    return most * 3 // 4 if shape.apart else most


def _most_carried(shape: Shape) -> int:
    """The maximum units of a program, apart from shared memory."""
    if shape.itemsize == 2:
        return 128 if shape.aligned and not shape.ragged else 64
    if shape.precision == "ieee":  # LLVM issue 220475: compiling such a kernel with Triton 3.9 ends the process
        return 0
    return 64 if shape.precision == "tf32" and shape.extras <= 2 else 32


_CARRIED = 16  # rows
_GEMM = 6.0  # launch overhead of the GEMM before


def plan(kernel: str, shape: Shape, device: Device) -> Plan:
    """The plan with the shortest predicted time.

    Args:
        kernel: "forward" or "backward".
        shape: the problem.
        device: the GPU.

    Raises:
        ValueError: no plan fits the device.
    """
    fitting = [p for p in plans(kernel, shape, device) if p.shared <= device.shared]
    if not fitting:
        raise ValueError(
            f"H = {shape.H}, P = {shape.P} does not fit {device.name}: {device.multiprocessors} programs at a time, "
            f"{device.shared // 1024} KiB of shared memory each"
        )
    return min(fitting, key=lambda p: p.launch)


def plans(kernel: str, shape: Shape, device: Device) -> Iterator[Plan]:
    """All candidates of `plan`; some need more shared memory than available."""
    if not shape.projected:
        yield from _carried(kernel, shape, device)
    for tile in _tiles(kernel, shape, device):
        yield from _shared(kernel, shape, device, tile)


def _carried(kernel: str, shape: Shape, device: Device) -> Iterator[Plan]:
    """Candidates in which one program owns all units."""
    units = max(16, power_of_2(shape.H))
    if units > _most_carried(shape):
        return
    weights = shape.gates * units * units
    groups = min(shape.D * cdiv(shape.B, _CARRIED), device.multiprocessors)
    for resident_ih in _resident_ih_candidates(kernel, shape, units):
        if resident_ih and units == _most_carried(shape):
            continue
        resident = weights + resident_ih * units * shape.maps * units
        shared = resident * shape.weight_itemsize + _staging(
            _Tile(_CARRIED, units, 1, units, 1, 1), shape.maps * units, shape
        )
        step = _Step(device, shape, _CARRIED, units, groups, barriers=0)
        yield _finish(
            Plan(
                cell=shape.cell,
                batch=_CARRIED,
                units=units,
                columns=0,
                chunk=units,
                split=1,
                ahead=1,
                resident=1,
                streamed=False,
                resident_hr=0,
                resident_ih=resident_ih,
                programs=1,
                carried=True,
                precision=shape.precision,
                stages=1,
                groups=groups,
                shared=shared,
                step=step.time(states=0, resident=resident, streamed=0, products=resident),
                launch=0.0,
            ),
            kernel,
            shape,
            device,
        )


def _shared(kernel: str, shape: Shape, device: Device, tile: _Tile) -> Iterator[Plan]:
    """Candidates in which programs share the units, with a grid barrier."""
    units = tile.units
    programs = cdiv(shape.H, units)
    if programs > device.multiprocessors:
        return
    columns = max(8, power_of_2(cdiv(shape.P, programs))) if shape.projected else 0
    # (N, K) of the product with w_hh, and of that with w_hr.
    hh, hr = ((shape.maps * units, shape.P), (columns, shape.H))
    if kernel == "backward":
        hh, hr = ((columns or units, shape.gates * shape.H), (units, shape.P))
    chunks, chunks_hr = cdiv(hh[1], tile.chunk), cdiv(hr[1], tile.chunk) if columns else 0
    weights = tile.chunk * (chunks * hh[0] + chunks_hr * hr[0])
    streamed = tile.stages > 1
    widest = max(hh[0], hr[0] if columns else 0)
    groups = min(shape.D * cdiv(shape.B, tile.batch), device.multiprocessors // programs)
    alone = streamed or units > 8  # x in the launch takes the registers that a tile of more units has left
    for resident_ih in (0,) if alone else _resident_ih_candidates(kernel, shape, tile.chunk):
        resident = resident_ih * tile.chunk * shape.maps * units + (0 if streamed else weights)
        step = _Step(device, shape, tile.batch, units, groups * programs, barriers=2 if columns else 1)
        yield _finish(
            Plan(
                cell=shape.cell,
                batch=tile.batch,
                units=units,
                columns=columns,
                chunk=tile.chunk,
                split=tile.split,
                ahead=min(tile.ahead, max(chunks, chunks_hr)),
                resident=0 if streamed else chunks,
                resident_hr=0 if streamed else chunks_hr,
                resident_ih=resident_ih,
                streamed=streamed,
                programs=programs,
                carried=False,
                precision=shape.precision,
                stages=tile.stages,
                groups=groups,
                shared=resident * shape.weight_itemsize + _staging(tile, widest, shape),
                step=step.time(
                    states=hh[1] + (hr[1] if columns else 0),
                    resident=resident,
                    streamed=weights if streamed else 0,
                    products=resident + (weights if streamed else 0),
                    pipeline=(chunks + chunks_hr) / (tile.stages - 1) if streamed else 0.0,
                ),
                launch=0.0,
            ),
            kernel,
            shape,
            device,
        )


def _resident_ih_candidates(kernel: str, shape: Shape, chunk: int) -> Iterator[int]:
    """Candidate values of `Plan.resident_ih`: none, with a GEMM before, or all if they are few."""
    yield 0
    aligned = shape.aligned and shape.I % 16 == 0
    most = 0 if shape.ragged or kernel == "backward" else 4 if aligned else 1
    if (
        (shape.apart or shape.extras) and not (aligned and shape.weight_itemsize == shape.itemsize)
    ) or shape.extras > 2:
        most = 0
    if cdiv(shape.I, chunk) <= most:
        yield cdiv(shape.I, chunk)


def _staging(tile: _Tile, widest: int, shape: Shape) -> int:
    """Shared memory besides the weights: operands in flight, and the exchange of parts and maps among warps."""
    states = (tile.ahead + 1) * tile.batch * tile.chunk * shape.weight_itemsize
    if tile.stages > 1:
        states += tile.stages * tile.chunk * (tile.batch + widest) * shape.itemsize
    return max(states, tile.split * tile.batch * widest * 4) + _RESERVED_SHARED


@dataclass(frozen=True)
class _Step:
    """The model of the step of one program."""

    device: Device
    shape: Shape
    batch: int
    units: int
    active: int  # programs that run at the same time
    barriers: int

    def time(self, states: int, resident: int, streamed: int, products: int, pipeline: float = 0.0) -> float:
        """Microseconds.

        Args:
            states: elements of a row from other programs.
            resident, streamed: elements of weights from shared memory, and from L2.
            products: elements of weights that are multiplied with `batch` rows.
            pipeline: number of chunks loaded in sequence.
        """
        device, clocks = self.device, self.device.clock * 1e3  # per microsecond
        barrier = self.barriers * (device.grid_barrier + _STATE_LATENCY) if states else 0.0
        l2 = min(_L2_PER_CLOCK * clocks, device.l2 / self.active)
        weights = resident * self.shape.weight_itemsize / (_SHARED_PER_CLOCK * clocks)
        loads = (streamed + states * self.batch) * self.shape.itemsize / l2
        arithmetic = max(16, self.batch) * products / (self.shape.rate * clocks)
        elements = self.batch * self.units
        cell = 0.15 + _CELL_CLOCKS * elements / clocks
        return barrier + max(weights, arithmetic, loads, pipeline * _CHUNK_LATENCY) + cell


def _finish(p: Plan, kernel: str, shape: Shape, device: Device) -> Plan:
    """The plan with the time of the whole launch, including the GEMM before it."""
    rounds = cdiv(shape.D * cdiv(shape.B, p.batch), p.groups)
    launch = shape.T * rounds * p.step
    if kernel == "forward" and not p.fuse_input:
        elements = shape.T * shape.B * shape.D * shape.gates * shape.H
        rate = 0.5 * shape.rate * device.multiprocessors * device.clock * 1e3
        launch += _GEMM + 2 * elements * shape.itemsize / device.l2 + elements * shape.I / rate
    return replace(p, launch=launch)


def predictions(device: Device) -> str:
    """Markdown: regime, programs and microseconds of a step, forward and backward, of one layer with I = H, T = 128."""
    lines = ["| dtype | H | B | forward | us | backward | us |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for dtype, itemsize, precision in (("bfloat16", 2, "tf32"), ("float32, TF32", 4, "tf32")):
        for H in (128, 256, 512, 768, 1024, 1536, 2048):
            for B in (1, 16, 64, 256):
                shape = Shape(128, B, H, H, H, 1, itemsize, precision)
                cells = []
                for kernel in ("forward", "backward"):
                    p = plan(kernel, shape, device)
                    rounds = cdiv(cdiv(B, p.batch), p.groups)
                    cells += [f"{p.regime}, {p.groups} x {p.programs}", f"{rounds * p.step:.1f}"]
                lines.append(f"| {dtype} | {H} | {B} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.kernels.plan", description="Print what is predicted.")
    parser.add_argument("--device", choices=[d.name for d in DEVICES], default=H200.name)
    name = parser.parse_args().device
    print(predictions(next(d for d in DEVICES if d.name == name)))
