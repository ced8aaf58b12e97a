"""The planner of the CUDA kernels: how blocks exchange states, the tiles of each warp, and where the weights reside,
by a cost model without autotuning.

Pure arithmetic: no GPU and no library. csrc/cuda/plan.h defines a plan and its resources; `needs` repeats that
arithmetic, and tests/cuda/test_cuda_plan.py compares the two. Times are in microseconds, sizes in bytes.

    python -m fusedrnn.cuda_plan               the predictions for an H200, as a table; --device NAME for another

The model of one step of one block:

    step = before + max(exchange, after) + max(operand, weights, arithmetic, latency) + partial

    before       elementwise operations and the send: clocks of a warp, counted in the machine code (PATHS)
    after        stores and loads between the send and the wait: likewise
    exchange     from the last block's results to the operand in the shared memory of every block: through distributed
                 shared memory (cluster, scatter), or through L2 and flags (grid), and the bytes of the operand
    operand      every warp reads it, and the resident weights, from shared memory
    weights      streamed from L2, whose bandwidth all blocks share
    arithmetic   multiply-adds of all warps
    latency      of the dependent matrix instructions of one warp, counted
    partial      the sum over the warps that split K

The cell determines the maps of a product, and what a step copies and stores; the clocks of PATHS are the LSTM's.

With a projection a step has two of each, except the cell. In a chunked plan a step has one product, one cell and one
read of the operand for each of a warp's tiles, and waits for the first chunk only; its weights count as if L2 held all
of them. A launch takes steps * rounds of these steps, where a round is as many slices of the batch as there are
concurrent groups. Before the first step the weights are packed, and the resident ones loaded.

The input projection is a GEMM before the launch, which also reads w_ih and writes xg, which the launch reads; or, in a
plan with fuse_input, a product with w_ih in every step. That product precedes the wait for h, and is free if the
exchange takes longer than the stores of the previous step. So the GEMM is saved where there are few steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from .cells import CELLS, Cell, named
from .kernels.device import A100, B200, DEVICES, H100, H200, RTX4090, Device, Shape, cdiv, most_alike, power_of_2

PASSES = ("forward", "backward")
EXCHANGES = ("grid", "cluster", "chunked", "scatter")
_IN_CLUSTERS = ("cluster", "scatter")
MATHS = ("bf16", "fp16", "tf32", "fp32", "fp64")


class Costs(NamedTuple):
    """Costs of a device beside those in `Device`. Rates are per clock and multiprocessor."""

    grid: float  # microseconds of an exchange through L2 and flags, without its bytes
    cluster: float  # of one through distributed shared memory; unused before sm_90
    gpcs: int  # groups of multiprocessors; a cluster fits into one
    widest: int  # most blocks of a cluster: 16 where the device allows non-portable sizes, 0 before sm_90
    half: float  # multiply-adds of the matrix instruction in 16 bits; TensorFloat-32 has half of that
    single: float  # multiply-adds in float32
    double: float  # and in float64
    measured: bool = False  # whether grid and cluster were measured on this device


# grid and cluster are estimates from the latencies of an H100 in arXiv 2402.13499: three of L2 and the barriers of a
# block, and one of distributed shared memory.
COSTS = {
    A100.name: Costs(1.5, 0.0, 7, 0, 1024, 64, 32),
    H100.name: Costs(1.3, 0.12, 8, 16, 1024, 128, 64),
    H200.name: Costs(1.3, 0.12, 8, 16, 1024, 128, 64),
    RTX4090.name: Costs(1.2, 0.0, 11, 0, 256, 128, 2),
    B200.name: Costs(1.4, 0.12, 8, 16, 1024, 128, 64),
}


@lru_cache
def costs_of(device: Device) -> Costs:
    """The costs of a device, or of the most similar one; clusters of 16 only in generations known to have them."""
    known = COSTS.get(device.name)
    if known is not None:
        return known
    like = most_alike(device.capability)
    same = device.capability // 10 == like.capability // 10
    return COSTS[like.name]._replace(widest=COSTS[like.name].widest if same else min(COSTS[like.name].widest, 8))


def kind_of(name: str) -> int:
    """The `CellKind` of csrc/cuda/cell.h: of a variant of the LSTM, by its gates."""
    variants = ("i", "f", "g", "o"), ("i", "g", "o")
    return list(CELLS).index(name) if name in CELLS else len(CELLS) + variants.index(named(name).gates)


@dataclass(frozen=True)
class Plan:
    """The launch of one kernel: the fields of `Plan` in csrc/cuda/plan.h, and the resources and predictions."""

    exchange: str
    math: str
    blocks: int  # of a group
    tiles: int
    splits: int
    rows: int
    groups: int  # of each direction
    shared_blocks: int
    shared_projection_blocks: int
    fuse_input: bool = False  # whether the launch multiplies x with w_ih; otherwise a GEMM comes before
    shared_input_blocks: int = 0
    chunk_blocks: int = 0  # K blocks of each warp in a chunk of the operand, where it comes in chunks
    cell: str = "lstm"
    streamed: int = 0  # K blocks of weights, of all matrices, that a warp loads in every step
    shared: int = 0  # bytes of shared memory of a block
    at_once: int = 0  # concurrent groups, over all directions
    step: float = 0.0  # predicted
    launch: float = 0.0  # predicted, for all steps
    costs: str = ""  # the source of the prediction

    @property
    def fields(self) -> list[int]:
        """The plan as the library's operators take it."""
        kinds = [EXCHANGES.index(self.exchange), MATHS.index(self.math)]
        counts = [self.blocks, self.tiles, self.splits, self.rows, self.groups]
        weights = [*self.shared_weights[:2], int(self.fuse_input), self.shared_input_blocks]
        return [*kinds, *counts, *weights, self.chunk_blocks, kind_of(self.cell)]

    @property
    def shared_weights(self) -> tuple[int, int, int]:
        """K blocks of each stage's weights that lie in shared memory."""
        return self.shared_blocks, self.shared_projection_blocks, self.shared_input_blocks

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.tiles * self.splits

    @property
    def regime(self) -> str:
        return self.exchange + (", with x" if self.fuse_input else "") + (", streamed" if self.streamed else "")

    def __str__(self) -> str:
        how = {
            "grid": "exchanging through L2",
            "cluster": "a cluster each, exchanging in shared memory",
            "chunked": "exchanging through L2, in chunks",
            "scatter": "a cluster each, summing dh in shared memory",
        }[self.exchange]
        where = "in part streamed from L2" if self.streamed else "resident on the chip"
        where += ", x in the launch" if self.fuse_input else ""
        return (
            f"{self.groups} groups of {self.blocks} blocks, {how}, {self.rows} rows, {self.tiles} x {self.splits} "
            f"warps, weights {where}, {self.shared // 1024} KiB, {self.step:.2f} us a step predicted from {self.costs}"
        )


# The arithmetic of csrc/cuda/plan.h.

RECURRENT, PROJECTION, INPUT = range(3)  # the stages of a step: with w_hh, w_hr, w_ih
_QUAD = 16  # bytes that are loaded at a time
_K_BLOCK = 64  # bytes of an operand's row
_COLUMNS = 8  # batch rows of a matrix instruction
_STREAM_AHEAD, _STREAM_SLOTS = 3, 4  # K blocks of streamed weights on their way to a warp, and of its ring
_OUTPUTS = 16  # of a tile of the projection
_MOST_WARPS = 8
_MOST_HIDDEN = 1 << 20
_STORAGE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4, "fp64": 8}
_ON_MATRIX_UNIT = ("bf16", "fp16", "tf32")


def _stride(blocks: int) -> int:
    """Bytes from row to row of so many K blocks in shared memory."""
    return _K_BLOCK * (blocks | 1)


class Product(NamedTuple):
    """One of the products of a step."""

    tiles: int  # of its outputs
    segments: int  # groups of eight output rows in a tile
    senders: int  # tiles that its operand comes from; of x, its quads
    chunk: int  # bytes that each of these adds to a row of it

    @property
    def row(self) -> int:
        return self.senders * self.chunk

    @property
    def blocks(self) -> int:
        """K blocks."""
        return cdiv(self.row, _K_BLOCK)

    @property
    def stride(self) -> int:
        return _stride(self.blocks)

    @property
    def fragment(self) -> int:
        """Bytes of a tile's weights in one K block."""
        return self.segments * 32 * 16


class Needs(NamedTuple):
    """Resources of a plan; the last two for each stage."""

    shared: int  # bytes of a block
    exchanged: int  # bytes of workspace: operands through L2, and the state of tiles that share a warp
    flags: int
    packed: tuple[int, ...]  # bytes of the packed weights, all directions
    streamed: tuple[int, ...]  # K blocks that a warp loads in every step


def _filled(blocks: tuple[int | None, ...]) -> int:
    """Maps that a product fills, of `Cell.input` or `Cell.recurrent`."""
    return sum(gate is not None for gate in blocks)


def _unit_tiles(kernel: str, shape: Shape) -> int:
    """Tiles of hidden units."""
    return cdiv(shape.H, 8 if kernel == "forward" else 16)


@lru_cache(maxsize=1024)
def products(kernel: str, shape: Shape, math: str, fuse_input: bool = False) -> dict[int, Product]:
    """The products of a step, by stage."""
    size, forward, cell = _STORAGE[math], kernel == "forward", named(shape.cell)
    of_state, of_input = _filled(cell.recurrent), _filled(cell.input)
    units, outputs = _unit_tiles(kernel, shape), cdiv(shape.P, _OUTPUTS)
    h, own = (outputs, _OUTPUTS * size), (units, (8 if forward else 16 * of_state) * size)
    if not shape.projected:
        found = {RECURRENT: Product(units, of_state if forward else 2, *own)}
    elif forward:
        found = {RECURRENT: Product(units, of_state, *h), PROJECTION: Product(outputs, 2, *own)}
    else:
        found = {RECURRENT: Product(outputs, 2, *own), PROJECTION: Product(units, 2, *h)}
    if fuse_input:
        found[INPUT] = Product(units, of_input, cdiv(shape.I * size, _QUAD), _QUAD)
    return found


def is_variant(plan: Plan) -> bool:
    """Whether the cell is a variant of the LSTM, which has its peepholes and multipliers in registers."""
    return plan.cell not in CELLS


def register_blocks(plan: Plan, kernel: str, stage: int, projected: bool) -> int:
    """K blocks of weights that a warp keeps in registers."""
    forward, math, variant = kernel == "forward", plan.math, is_variant(plan)
    if stage == INPUT or plan.exchange == "chunked":
        return 0
    if math == "fp64":
        return 0 if projected or variant else 1
    if stage == PROJECTION:
        return 1
    if math == "fp32":
        return 2
    if projected:
        return 8 if not forward else 4 if variant and math != "tf32" else 5
    wide = plan.rows > _COLUMNS
    if forward:
        cell = named(plan.cell)
        if variant:
            return 1 if wide else 6 if len(cell.maps) == 3 else 4
        of_four = 2 if wide else 5 if math == "tf32" else 6
        of_tile = _filled(cell.recurrent)
        if len(cell.maps) > of_tile:
            return of_four - 1 if wide else of_four + 1
        return min(4 if wide else 8, of_four * 4 // of_tile)
    return 10 if not wide else 1 if math == "tf32" or variant else 3


# Plans with "scatter".


def most_scatter_tiles(math: str, rows: int) -> int:
    """The most tiles of a block."""
    return 2 if math == "fp64" or (math == "tf32" and rows > _COLUMNS) else 4


_STEPS_COPIED = 4


def scatter_splits(tiles: int) -> int:
    """Warps for each tile of a block."""
    return 4 if tiles <= 2 else 2


def scatter_blocks(plan: Plan) -> int:
    """K blocks of a block's part of da that is multiplied with w_hh."""
    return cdiv(plan.tiles * 16 * _filled(named(plan.cell).recurrent) * _STORAGE[plan.math], _K_BLOCK)


def scatter_outputs(shape: Shape, plan: Plan) -> tuple[int, int]:
    """Tiles of dh that a warp multiplies, and how many of which it has the weights in registers."""
    blocks = 8 if plan.math == "fp32" else 0
    if plan.math in _ON_MATRIX_UNIT:
        wide = 0 if plan.math == "tf32" or plan.tiles > 2 else 8
        less = 4 if is_variant(plan) and plan.math == "tf32" else 0
        blocks = wide if plan.rows > _COLUMNS else (16 if plan.tiles <= 2 else 12) - less
    return cdiv(cdiv(shape.H, 16), plan.tiles * plan.splits), min(4, blocks // scatter_blocks(plan))


def _needs_of_scatter(shape: Shape, plan: Plan) -> Needs:
    p = products("backward", shape, plan.math)[RECURRENT]
    blocks, columns = scatter_blocks(plan), plan.rows // _COLUMNS
    cell = named(plan.cell)
    others = plan.tiles * 16 * (len(cell.maps) - _filled(cell.recurrent)) * _STORAGE[plan.math]
    staged = _stride(blocks + cdiv(others, _K_BLOCK))
    shared = plan.tiles * plan.splits * plan.shared_blocks * p.fragment + 2 * plan.rows * staged
    shared += 2 * plan.blocks * plan.tiles * columns * 128 * (8 if plan.math == "fp64" else 4)
    shared += _STEPS_COPIED * plan.rows * _copied_row(16 * plan.tiles, plan) + 16
    outputs, in_registers = scatter_outputs(shape, plan)
    streamed = max(0, outputs - in_registers - plan.shared_blocks // blocks) * blocks
    shared += _ring(plan, p) if streamed else 0
    packed = shape.D * p.tiles * cdiv(p.senders, plan.tiles) * blocks * p.fragment
    return Needs(shared, 0, 0, (packed, 0, 0), (streamed, 0, 0))


def _ring(plan: Plan, p: Product) -> int:
    """Bytes of the rings of a block, through which weights are streamed."""
    return _STREAM_SLOTS * plan.tiles * plan.splits * p.fragment


def turns(tiles: int, plan: Plan) -> int:
    """Tiles of one warp."""
    return cdiv(tiles, plan.blocks * plan.tiles)


def _copied_arrays(cell: Cell) -> int:
    """Arrays that a backward step reads: saved values, carry, dy, and dc."""
    return len(cell.saved) + (cell.carry is not None) + 1 + cell.has_cell_state


def _copied_row(units: int, plan: Plan) -> int:
    """Bytes that a backward step reads for some units of a row."""
    return _copied_arrays(named(plan.cell)) * units * _STORAGE[plan.math] + _QUAD


def _step_bytes(kernel: str, plan: Plan) -> int:
    """Bytes for a tile and eight rows: three steps of xg and one of results, or three of the backward's inputs."""
    if kernel == "backward":
        return _COLUMNS * 3 * _copied_row(16, plan)
    cell = named(plan.cell)
    stored = (len(cell.saved) + 1 + cell.has_cell_state) * 8 * _STORAGE[plan.math] + 16
    return _COLUMNS * (3 * (len(cell.gates) * 8 * 4 + 16) + stored)


def needs(kernel: str, shape: Shape, plan: Plan) -> Needs:
    """The resources of a launch."""
    if plan.exchange == "scatter":
        return _needs_of_scatter(shape, plan)
    stages, warps = products(kernel, shape, plan.math, plan.fuse_input), plan.tiles * plan.splits
    exchanges = 2 if shape.projected else 1
    compute = 8 if plan.math == "fp64" else 4
    cell, backward = named(plan.cell), kernel == "backward"
    staged = [p.chunk for p in stages.values()] + backward * [16 * len(cell.maps) * _STORAGE[plan.math]]
    shared = warps * _COLUMNS * max(staged) + 16 * exchanges
    if plan.exchange != "chunked" and plan.math != "fp64" and not shape.projected:
        shared += plan.tiles * (plan.rows // _COLUMNS) * _step_bytes(kernel, plan)
    exchanged, packed, streamed = 0, [0, 0, 0], [0, 0, 0]
    for k, p in stages.items():
        buffers = 2 if plan.exchange != "grid" or k == INPUT else 1
        stride = _stride(plan.splits * plan.chunk_blocks) if plan.exchange == "chunked" else p.stride
        shared += warps * plan.shared_weights[k] * p.fragment + buffers * plan.rows * stride
        if plan.splits > 1 and k != INPUT:
            summed = len(cell.maps) if k == RECURRENT and not backward else p.segments
            shared += warps * (plan.rows // _COLUMNS) * summed * 2 * 32 * compute
        if plan.exchange != "cluster" and k != INPUT:
            exchanged += shape.D * plan.groups * 2 * plan.rows * p.row
        packed[k] = shape.D * p.tiles * p.blocks * p.fragment
        resident = register_blocks(plan, kernel, k, shape.projected) + plan.shared_weights[k]
        streamed[k] = max(0, cdiv(p.blocks, plan.splits) - resident)
        shared += _ring(plan, p) if streamed[k] else 0
    launched = shape.D * plan.groups * plan.blocks
    flags = 0 if plan.exchange == "cluster" else exchanges * launched
    if plan.exchange == "chunked":
        numbers = (plan.rows // _COLUMNS) * (8 if backward else 6 if shape.projected else 4)
        exchanged += launched * plan.threads * turns(_unit_tiles(kernel, shape), plan) * numbers * compute
    return Needs(shared, exchanged, flags, tuple(packed), tuple(streamed))


# Candidates.

_RESERVED_SHARED = 1024  # bytes that the driver takes beside each block's
_REGISTERS = 65536  # of a multiprocessor; a thread has 256 of them, at the most
_MOST_COUNTED = 1 << 20  # bytes that an mbarrier counts in a phase
_MOST_INPUTS = 1 << 20  # numbers of x


def math_of(shape: Shape) -> str:
    """The arithmetic of a shape; bfloat16 stands for float16 as well.

    Raises:
        ValueError: the precision of float32 is "tf32x3", which these kernels lack.
    """
    if shape.itemsize == 4:
        if shape.precision == "tf32x3":
            raise ValueError('the C++ kernels multiply float32 as "ieee" or "tf32", not as "tf32x3"')
        return "tf32" if shape.precision == "tf32" else "fp32"
    return {2: "bf16", 8: "fp64"}[shape.itemsize]


def at_a_time(plan: Plan, device: Device) -> int:
    """An estimate of the concurrent groups, over all directions, where there is no device to ask."""
    by_shared = (device.shared + _RESERVED_SHARED) // (plan.shared + _RESERVED_SHARED)
    resident = min(by_shared, _REGISTERS // (256 * plan.threads))
    if plan.exchange not in _IN_CLUSTERS:
        return resident * device.multiprocessors // plan.blocks
    gpcs = costs_of(device).gpcs
    return gpcs * (resident * (device.multiprocessors // gpcs) // plan.blocks)


# The concurrent groups of a plan, over all directions, as the driver reports them.
Occupancy = Callable[[Plan], int]


def plan(kernel: str, shape: Shape, device: Device, occupancy: Occupancy | None = None) -> Plan:
    """The plan with the least predicted time.

    Args:
        kernel: "forward" or "backward".
        shape: the problem.
        device: the GPU.
        occupancy: the concurrent groups of a plan on the device; estimated by `at_a_time` if None.

    Raises:
        ValueError: no plan fits the device, or the kernels lack this arithmetic.
    """
    return ranked(kernel, shape, device, occupancy)[0]


def ranked(kernel: str, shape: Shape, device: Device, occupancy: Occupancy | None = None) -> list[Plan]:
    """Every plan that fits the device, the one with the least predicted time first.

    Raises:
        ValueError: as of `plan`.
    """
    if shape.H > _MOST_HIDDEN:
        raise ValueError(f"H = {shape.H} does not fit the C++ kernels, which take up to 2^20 hidden units")
    found = sorted(plans(kernel, shape, device, occupancy), key=lambda p: p.launch)
    if not found:
        raise ValueError(f"H = {shape.H}, P = {shape.P} does not fit {device.name}: it has no room for a block")
    return found


def plans(kernel: str, shape: Shape, device: Device, occupancy: Occupancy | None = None) -> Iterator[Plan]:
    """Every plan that fits the device, with its prediction. Chunked plans only where no other fits; for a single step,
    which reuses no weights, also where no other plan takes x."""
    found = list(whole(kernel, shape, device, occupancy))
    yield from found
    for fuse_input in _fuse_input_candidates(kernel, shape):
        if not found or (shape.T == 1 and not any(p.fuse_input >= fuse_input for p in found)):
            yield from chunked(kernel, shape, device, fuse_input, occupancy)


def _fuse_input_candidates(kernel: str, shape: Shape) -> tuple[bool, ...]:
    """Candidate values of `Plan.fuse_input`."""
    return (False, True) if kernel == "forward" and 0 < shape.I <= _MOST_INPUTS else (False,)


def whole(kernel: str, shape: Shape, device: Device, occupancy: Occupancy | None = None) -> Iterator[Plan]:
    """Every plan with the whole operand in shared memory and one tile per warp."""
    math = math_of(shape)
    wide = math in _ON_MATRIX_UNIT and not shape.projected and shape.B > _COLUMNS
    tiles_of_units = _unit_tiles(kernel, shape)
    scatters = kernel == "backward" and not shape.projected
    if costs_of(device).widest and scatters:
        yield from _scattering(shape, device, occupancy)
    # "scatter" takes the place of "cluster" in such a backward (csrc/cuda/plan.h).
    for exchange in ("grid", "cluster") if costs_of(device).widest and not scatters else ("grid",):
        for tiles in range(1, _MOST_WARPS + 1):
            blocks = cdiv(tiles_of_units, tiles)
            if exchange == "cluster":
                blocks = max(2, power_of_2(blocks))  # PTX defines what blocks send to each other for two or more
                if blocks > costs_of(device).widest:
                    continue
            for splits in range(1, _MOST_WARPS // tiles + 1):
                for rows, fuse_input in product((8, 16) if wide else (8,), _fuse_input_candidates(kernel, shape)):
                    bare = Plan(exchange, math, blocks, tiles, splits, rows, 1, 0, 0, fuse_input, cell=shape.cell)
                    fitted = _fitted(kernel, shape, device, bare, occupancy)
                    if fitted is not None:
                        yield _predicted(kernel, shape, device, fitted)


def _scattering(shape: Shape, device: Device, occupancy: Occupancy | None) -> Iterator[Plan]:
    """Every backward plan whose blocks exchange partial sums of dh."""
    math = math_of(shape)
    for tiles in range(1, 5):
        blocks = max(2, power_of_2(cdiv(_unit_tiles("backward", shape), tiles)))
        if blocks > costs_of(device).widest:
            continue
        for rows in (8, 16) if math in _ON_MATRIX_UNIT and shape.B > _COLUMNS else (8,):
            if tiles > most_scatter_tiles(math, rows):
                continue
            bare = Plan("scatter", math, blocks, tiles, scatter_splits(tiles), rows, 1, 0, 0, cell=shape.cell)
            fitted = _fitted("backward", shape, device, bare, occupancy)
            if fitted is not None:
                yield _predicted("backward", shape, device, fitted)


def chunked(
    kernel: str, shape: Shape, device: Device, fuse_input: bool = False, occupancy: Occupancy | None = None
) -> Iterator[Plan]:
    """Every chunked plan, with as few tiles per warp as the multiprocessors allow and the largest chunks that fit."""
    math, most_blocks = math_of(shape), device.multiprocessors // shape.D
    rows, tiles_of_units = 16 if math in _ON_MATRIX_UNIT and not shape.projected else 8, _unit_tiles(kernel, shape)
    stages = products(kernel, shape, math, fuse_input).values()
    longest = max(p.blocks for p in stages)
    for tiles in range(1, _MOST_WARPS + 1) if most_blocks else ():
        blocks = cdiv(tiles_of_units, tiles * cdiv(tiles_of_units, tiles * most_blocks))
        for splits in range(1, _MOST_WARPS // tiles + 1):
            bare = Plan("chunked", math, blocks, tiles, splits, rows, 1, 0, 0, fuse_input, cell=shape.cell)
            bytes_of_one = len(stages) * 2 * rows * splits * _K_BLOCK
            fit, all_blocks = (device.shared - needs(kernel, shape, bare).shared) // bytes_of_one, cdiv(longest, splits)
            if fit < 1:
                continue
            chunk_blocks = cdiv(all_blocks, cdiv(all_blocks, fit))  # chunks of one size
            fitted = _fitted(kernel, shape, device, replace(bare, chunk_blocks=chunk_blocks), occupancy)
            if fitted is not None:
                yield _predicted(kernel, shape, device, fitted)


def _fitted(kernel: str, shape: Shape, device: Device, bare: Plan, occupancy: Occupancy | None) -> Plan | None:
    """`bare` with as many weights in shared memory and as many groups as fit, or None."""
    stages, alone = products(kernel, shape, bare.math, bare.fuse_input), needs(kernel, shape, bare)
    if bare.exchange == "cluster" and any(bare.rows * p.row >= _MOST_COUNTED for k, p in stages.items() if k != INPUT):
        return None
    # Weights that are not streamed need no ring: try all of them without rings first, then what fits beside the rings.
    rings = {k: _ring(bare, p) if alone.streamed[k] else 0 for k, p in stages.items()}
    free = device.shared - alone.shared + sum(rings.values())
    fitting = [0, 0, 0]
    for k, p in stages.items():
        bytes_of_one = bare.tiles * bare.splits * p.fragment
        step = scatter_blocks(bare) if bare.exchange == "scatter" else 1  # K blocks, of whole tiles
        later = sum(ring for j, ring in rings.items() if j > k)
        wanted = cdiv(alone.streamed[k], step) * step if bare.exchange != "chunked" else 0
        if wanted and wanted * bytes_of_one + later <= free:
            fitting[k] = wanted
        else:
            free -= rings[k]
            fitting[k] = min(wanted, max(0, free - later) // bytes_of_one) // step * step
        free -= fitting[k] * bytes_of_one
    if free < 0:
        return None
    plan = replace(bare, shared_blocks=fitting[0], shared_projection_blocks=fitting[1], shared_input_blocks=fitting[2])
    taken = needs(kernel, shape, plan)
    plan = replace(plan, shared=taken.shared, streamed=sum(taken.streamed))
    at_once = at_a_time(plan, device) if occupancy is None else occupancy(plan)
    groups = at_once // shape.D
    if plan.exchange in _IN_CLUSTERS:  # further clusters start as others end
        groups = max(groups, min(1, at_once))
    groups = min(groups, cdiv(shape.B, plan.rows))
    return replace(plan, groups=groups, at_once=at_once) if groups > 0 else None


# Predictions.

_L2_PER_CLOCK, _SHARED_PER_CLOCK = 64, 128  # bytes, per multiprocessor
_PEER_PER_CLOCK = 14  # the same, from blocks of the cluster: arXiv 2402.13499, of an H100


class Path(NamedTuple):
    """Clocks of a step of a warp with 8 rows, counted in the machine code by tests/cuda/sass.py, not measured."""

    before: float  # from the receive to the send, without the product
    after: float  # from the send to the next receive
    block: float  # of the product, for a K block with weights in registers
    shared_block: float  # with weights in shared memory
    streamed_block: float  # with streamed weights, including the copy of a later block
    instructions: float


PATHS = {
    "forward": Path(590, 590, 46, 113, 130, 370),
    "backward": Path(1060, 230, 25, 113, 130, 700),
    "backward, loaded": Path(2400, 3000, 60, 113, 130, 1700),  # in float64, with a projection and in chunks
    "scatter": Path(610, 230, 20, 150, 200, 300),
}
_L2_LATENCY = 280  # clocks of a copy from L2, without contention
_PROJECTED = 800  # more clocks after the send, with a projection
_COPIED_ROW = 35  # clocks to copy 32 quads of a row of the operand out of L2
_ROW_OF_X, _X = 230, 350  # clocks to copy as many quads of a row of x, and to wait for x
_TWO_PARTS, _PART = 130, 60  # clocks of the sum over two splits of K, and for each of more
_PACK, _GEMM = 3.0, 6.0  # microseconds of the launches before: packing a kind of weights, and a direction's GEMM


def _path(kernel: str, shape: Shape, p: Plan) -> str:
    """The entry of PATHS for a plan."""
    if kernel == "forward":
        return kernel
    loaded = shape.projected or p.exchange == "chunked" or p.math == "fp64"
    return "scatter" if p.exchange == "scatter" else "backward, loaded" if loaded else kernel


def _predicted(kernel: str, shape: Shape, device: Device, p: Plan) -> Plan:
    """The plan with its predicted times of a step and of the launch."""
    costs, clocks = costs_of(device), device.clock * 1e3  # per microsecond
    taken, warps = needs(kernel, shape, p), p.tiles * p.splits
    running = min(shape.D * p.groups, p.at_once)
    crowd = cdiv(running * p.blocks, device.multiprocessors)  # blocks per multiprocessor
    l2 = min(_L2_PER_CLOCK * clocks, device.l2 / min(running * p.blocks, device.multiprocessors))
    columns, path = p.rows // _COLUMNS, PATHS[_path(kernel, shape, p)]
    rate = {"fp32": costs.single, "fp64": costs.double, "tf32": costs.half / 2}.get(p.math, costs.half)
    stages = products(kernel, shape, p.math, p.fuse_input)

    def blocks(k: int) -> int:
        """K blocks of one warp."""
        if p.exchange == "scatter":
            return scatter_outputs(shape, p)[0] * scatter_blocks(p)
        return cdiv(stages[k].blocks, p.splits)

    def multiplying(k: int) -> float:
        """The product of a stage; x and chunks are read from L2 as well."""
        of = stages[k]
        block = blocks(k)
        operands = scatter_blocks(p) if p.exchange == "scatter" else block
        from_shared = warps * (operands * p.rows * _K_BLOCK + min(p.shared_weights[k], block) * of.fragment)
        from_l2 = warps * taken.streamed[k] * of.fragment
        from_l2 += p.rows * of.row if k == INPUT or p.exchange == "chunked" else 0
        in_shared, streamed = min(p.shared_weights[k], block), taken.streamed[k]
        latency = (block - in_shared - streamed) * path.block + in_shared * path.shared_block
        latency += streamed * max(path.streamed_block, _L2_LATENCY / _STREAM_AHEAD)
        other = max(
            crowd * from_shared / (_SHARED_PER_CLOCK * clocks),
            crowd * from_l2 / l2,
            latency / clocks if p.math in _ON_MATRIX_UNIT else 0.0,
        )
        return max(arithmetic(k), turns(of.tiles, p) * other)

    def arithmetic(k: int) -> float:
        """The multiply-adds of a stage."""
        of = stages[k]
        multiplied = warps * blocks(k) * 8 * of.segments * (_K_BLOCK // _STORAGE[p.math]) * p.rows
        return turns(of.tiles, p) * crowd * multiplied / (rate * clocks)

    def exchanging(k: int) -> float:
        operand = p.rows * stages[k].row
        if p.exchange == "chunked":
            operand = min(operand, p.rows * p.splits * p.chunk_blocks * _K_BLOCK)
        if p.exchange == "scatter":  # parts of dh of the block's units, from every block
            operand = p.blocks * p.rows * 16 * p.tiles * (8 if p.math == "fp64" else 4)
        if p.exchange not in _IN_CLUSTERS:
            return costs.grid + crowd * operand / l2
        return costs.cluster + crowd * operand / (_PEER_PER_CLOCK * clocks)

    def copying(k: int, each: float) -> float:
        """By the warps of a block, which share the rows."""
        return each * cdiv(p.rows, warps) * cdiv(stages[k].row, 32 * _QUAD) / clocks

    n_turns, parts_of_k = turns(_unit_tiles(kernel, shape), p), 2 if shape.projected else 1
    after = (path.after + (_PROJECTED if shape.projected else 0)) * columns / clocks
    of_x = multiplying(INPUT) + copying(INPUT, _ROW_OF_X) + _X / clocks if p.fuse_input else 0.0
    step = n_turns * path.before * (1 + columns) / 2 / clocks
    step += max(exchanging(RECURRENT), after + of_x / n_turns) + (n_turns - 1) * (after + of_x / n_turns)
    step += multiplying(RECURRENT)
    if shape.projected:
        step += exchanging(PROJECTION) + multiplying(PROJECTION)
    if p.exchange not in _IN_CLUSTERS:
        step += copying(RECURRENT, _COPIED_ROW)
    if p.splits > 1 and p.exchange != "scatter":
        step += parts_of_k * (_TWO_PARTS if p.splits == 2 else _PART * p.splits) / clocks
    step = max(step, n_turns * crowd * path.instructions * columns * warps / 4 / clocks)
    rounds = cdiv(cdiv(shape.B, p.rows), p.groups) * cdiv(shape.D * p.groups, running)
    launch = _PACK * len(stages) + 2 * sum(taken.packed) / device.l2 + shape.T * rounds * step
    for k in stages:  # loading the resident weights
        launch += p.groups * taken.packed[k] * (1 - taken.streamed[k] / blocks(k)) / device.l2
    if kernel == "forward" and not p.fuse_input:
        gates = len(named(shape.cell).gates)
        numbers = shape.D * shape.T * shape.B * gates * shape.H  # of xg, written and read
        everywhere = rate * clocks * device.multiprocessors
        weights = shape.D * gates * shape.H * shape.I
        launch += _GEMM * shape.D + (2 * numbers + weights) * shape.itemsize / device.l2
        launch += numbers * shape.I / everywhere
    return replace(p, step=step, launch=launch, costs=_described(device))


@lru_cache
def _described(device: Device) -> str:
    """The source of the costs of a device."""
    like = device.name if device.name in COSTS else most_alike(device.capability).name
    return f"costs {'measured' if COSTS[like].measured else 'estimated'} for {like}"


_TWO_LAUNCHES = 5.0  # microseconds of a GEMM and a pointwise kernel, without the arithmetic


def gemm_step(shape: Shape, device: Device) -> float:
    """An estimate of torch's microseconds for a step of the whole batch, of one pass, by a GEMM and a pointwise kernel.
    The matrix unit has twice the rate of "mma" there."""
    rate = 2 * costs_of(device).half / (1 if shape.itemsize == 2 else 2)
    multiplied = shape.D * shape.B * len(named(shape.cell).gates) * shape.H * shape.P
    return _TWO_LAUNCHES + multiplied / (rate * device.clock * 1e3 * device.multiprocessors)


def predictions(device: Device) -> str:
    """The table of docs/gpu_performance.md: steps of the whole batch, in microseconds; with a star where `gemm_step` is
    less."""
    lines = ["| dtype | H | B | forward | us | backward | us |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for dtype, itemsize in (("bfloat16", 2), ("float32, TF32", 4)):
        for H in (128, 256, 512, 768, 1024, 1536, 2048):
            for B in (1, 16, 64, 256):
                shape, cells = Shape(128, B, H, H, H, 1, itemsize, "tf32"), []
                for kernel in PASSES:
                    try:
                        p = plan(kernel, shape, device)
                    except ValueError:
                        cells += ["does not fit", ""]
                        continue
                    rounds = cdiv(cdiv(B, p.rows), p.groups)
                    slower = " \\*" if rounds * p.step > gemm_step(shape, device) else ""
                    cells += [f"{p.regime}, {p.groups} x {p.blocks}", f"{rounds * p.step:.1f}{slower}"]
                lines.append(f"| {dtype} | {H} | {B} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.cuda_plan", description="Print what is predicted.")
    parser.add_argument("--device", choices=[d.name for d in DEVICES], default=H200.name)
    name = parser.parse_args().device
    print(predictions(next(d for d in DEVICES if d.name == name)))
