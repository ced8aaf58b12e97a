"""The CUDA kernels on the host, every thread a fiber: against the reference in float64, under many schedules.

What they are compiled from, how a layer is put together and what it is held to stands in conftest.py.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCHEDULES = 50  # in which a launch without a synchronisation may fail; the fifth is the last that was needed
FEWER_SCHEDULES = 20  # in which a kernel gives the same bits
EXCHANGES = ["grid", "cluster"]
SANITIZED = "FUSEDRNN_CUDA_HOST_SANITIZE" in os.environ
MATHS = ["bf16", "fp64"] if SANITIZED else ["bf16", "fp16", "tf32", "fp32", "fp64"]
WIDE = [math for math in MATHS if math in ("bf16", "fp16", "tf32")]  # those with 16 batch rows at a time


@pytest.fixture(params=EXCHANGES)
def exchange(request):
    return request.param


@pytest.fixture(params=MATHS)
def math(request):
    return request.param


OTHERS = ["gru", "rnn_tanh", "rnn_relu"]  # cells but the LSTM
EVERYTHING = {"D": 2, "lengths": True, "reset": True, "strided": True}


def rows_of(math):
    return 16 if math in WIDE else 8


SIZES = [
    # T, B, H
    (1, 1, 1),
    (1, 3, 16),
    (2, 1, 33),
    (2, 9, 5),
    (7, 3, 16),
    (7, 9, 40),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(layer, kit, exchange, math, size):
    layer(kit.Problem(*size), kit.Plan(exchange, math)).check()


@pytest.mark.parametrize("math", WIDE)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 33), (7, 3, 40)], ids=str)
def test_sixteen_rows(layer, kit, exchange, math, size):
    layer(kit.Problem(*size), kit.Plan(exchange, math, rows=16)).check()


OPTIONS = {
    "bidirectional": {"D": 2},
    "no-states": {"states": False},
    "cell-states": {"cell_states": True},
    "strided": {"strided": True, "D": 2},
    "narrow-xg": {"wide": False},
    "lengths": {"lengths": True},
    "lengths-bidirectional": {"lengths": True, "D": 2, "cell_states": True},
    "reset": {"reset": True},
    "reset-bidirectional": {"reset": True, "D": 2},
    "everything": {"D": 2, "lengths": True, "reset": True, "cell_states": True, "strided": True},
    "projection": {"proj": 5},
    "projection-no-states": {"proj": 7, "states": False},
    "projection-everything": {
        "proj": 18,
        "D": 2,
        "lengths": True,
        "reset": True,
        "cell_states": True,
        "strided": True,
    },
}


@pytest.mark.parametrize("fuse_input", [False, True], ids=["", "fuse_input"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(layer, kit, exchange, math, options, fuse_input):
    layer(kit.Problem(5, 5, 19, **options), kit.Plan(exchange, math, tiles=2, fuse_input=fuse_input)).check()


@pytest.mark.parametrize("fuse_input", [False, True], ids=["", "fuse_input"])
@pytest.mark.parametrize("T", [1, 2])
def test_everything_in_few_steps(layer, kit, exchange, math, T, fuse_input):
    for name in ("everything", "projection-everything"):
        layer(kit.Problem(T, 3, 19, **OPTIONS[name]), kit.Plan(exchange, math, fuse_input=fuse_input)).check()


@pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize("I", [1, 8, 35, 64])
def test_input_sizes(layer, kit, exchange, math, I, aligned):
    problem = kit.Problem(3, 9, 19, I=I, aligned=aligned, D=2)
    plan = kit.Plan(exchange, math, tiles=2, splits=2, fuse_input=True, rows=rows_of(math))
    layer(problem, plan).check()
    layer(problem, kit.replace(plan, shared_input_blocks=2)).check()


@pytest.mark.parametrize("biases", ["", "ih", "hh"])
def test_biases(layer, kit, exchange, math, biases):
    layer(kit.Problem(2, 3, 19, D=2, biases=biases), kit.Plan(exchange, math, fuse_input=True)).check()


# (plan, H): tiles and splits of every shape, and weights in registers, in shared memory and streamed.
PLANS = {
    "one-block": ({"tiles": 5}, 40),
    "tiles-that-are-not-full": ({"tiles": 4}, 40),
    "two-splits": ({"splits": 2, "tiles": 2}, 40),
    "more-splits-than-k-blocks": ({"splits": 8}, 5),
    "shared": ({"splits": 1, "tiles": 3, "shared_blocks": 40}, 90),
    "streamed": ({"splits": 1, "tiles": 3}, 90),
    "shared-and-streamed": ({"splits": 2, "tiles": 3, "shared_blocks": 1}, 90),
}


@pytest.mark.parametrize(("options", "H"), PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("projected", [False, True], ids=["", "projected"])
def test_plans(layer, kit, exchange, math, options, H, projected):
    problem = kit.Problem(2, 3, H, D=2, proj=H * 2 // 3 if projected else 0, I=90)
    shared = options.get("shared_blocks", 0)
    plan = kit.Plan(exchange, math, shared_projection_blocks=shared, **options)
    layer(problem, plan).check()
    layer(problem, kit.replace(plan, fuse_input=True, shared_input_blocks=shared)).check()


@pytest.mark.parametrize("shared_blocks", [0, 2], ids=["streamed", "shared"])
@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("math", WIDE)
def test_more_k_blocks_than_registers(layer, host, kit, exchange, math, rows, shared_blocks):
    problem = kit.Problem(2, 2, 170 if math == "tf32" else 330)
    one = layer(problem, kit.Plan(exchange, math, tiles=4, rows=rows, shared_blocks=shared_blocks))
    for direction, plan in ((kit.FORWARD, one.plan), (kit.BACKWARD, one.backward_plan)):
        needs, _ = host.needs(direction, problem.sizes, host.struct(plan, direction, problem.H, problem.B))
        assert needs.streamed[0] > 0
    one.check()


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_take_slices_one_after_another(layer, kit, exchange, math, groups):
    """A group goes from the last step of a slice to the first of the next without waiting for the others."""
    problem = kit.Problem(3, 4 * rows_of(math) - 5, 19, D=2, lengths=True, reset=True)
    layer(problem, kit.Plan(exchange, math, rows=rows_of(math), groups=groups)).check()
    layer(problem, kit.Plan(exchange, math, rows=rows_of(math), groups=groups, fuse_input=True)).check()
    layer(kit.replace(problem, proj=9), kit.Plan(exchange, math, groups=groups)).check()


def test_idle_blocks(layer, kit, math):
    """A cluster of 8 of which 5 blocks have a tile."""
    layer(kit.Problem(4, 3, 40), kit.Plan("cluster", math, blocks=8)).check()
    layer(kit.Problem(4, 3, 40), kit.Plan("cluster", math, blocks=4, tiles=2, fuse_input=True)).check()
    layer(kit.Problem(4, 3, 40, proj=20), kit.Plan("cluster", math, blocks=8)).check()


def chunked(kit, math, proj=0, **options):
    """Of 8 rows, for layers with a projection, or as many as there can be."""
    return kit.Plan(
        "chunked", math, **{"rows": 8 if proj else rows_of(math), "blocks": 1, "chunk_blocks": 1, **options}
    )


# (plan, H, P): one tile after another and all at once, chunks of one K block, of several and of all, and splits of K
# that have different numbers of K blocks, or none.
CHUNKED = {
    "one-warp": ({}, 40, 0),
    "one-block-of-several": ({"blocks": 2, "tiles": 2}, 90, 0),
    "splits": ({"splits": 3, "chunk_blocks": 2}, 70, 0),
    "more-splits-than-k-blocks": ({"splits": 8}, 5, 0),
    "one-chunk": ({"blocks": 2, "chunk_blocks": 100}, 40, 0),
    "one-turn": ({"blocks": 5, "tiles": 2, "splits": 2}, 70, 0),
    "projected": ({"tiles": 2}, 70, 40),
    "projected-to-few": ({"blocks": 3, "splits": 2, "chunk_blocks": 2}, 70, 3),
}


@pytest.mark.parametrize(("options", "H", "proj"), CHUNKED.values(), ids=CHUNKED.keys())
def test_chunks(layer, kit, math, options, H, proj):
    for inputs in ({}, {"I": 3}, {"I": 90}):
        problem, plan = kit.Problem(3, 2, H, D=2, proj=proj, **inputs), chunked(kit, math, proj, **options)
        layer(problem, kit.replace(plan, fuse_input=bool(inputs))).check()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_in_chunks(layer, kit, math, size):
    layer(kit.Problem(*size), chunked(kit, math)).check()
    layer(kit.Problem(*size, I=9), chunked(kit, math, fuse_input=True)).check()


@pytest.mark.parametrize("fuse_input", [False, True], ids=["", "fuse_input"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_in_chunks(layer, kit, math, options, fuse_input):
    plan = chunked(kit, math, options.get("proj", 0), groups=1, fuse_input=fuse_input)
    layer(kit.Problem(4, 5, 19, **options), plan).check()


@pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize("I", [1, 8, 35, 200])
def test_input_sizes_in_chunks(layer, kit, math, I, aligned):
    """Fewer chunks than of h, as many, and more; each with a batch that does not fill the last slice."""
    problem = kit.Problem(3, rows_of(math) + 1, 70, I=I, aligned=aligned, D=2)
    layer(problem, chunked(kit, math, fuse_input=True, tiles=2, splits=2, groups=1)).check()


@pytest.mark.parametrize("biases", ["", "ih", "hh"])
def test_biases_in_chunks(layer, kit, math, biases):
    layer(kit.Problem(2, 3, 19, D=2, biases=biases), chunked(kit, math, fuse_input=True)).check()


@pytest.mark.parametrize("proj", [0, 37], ids=["", "projected"])
def test_chunks_give_the_same_bits(layer, kit, math, proj):
    """As a plan that has the whole operand in shared memory, and a warp for every tile, with the same splits of K."""
    for fuse_input in (False, True):
        problem = kit.Problem(3, 3, 70, D=2, proj=proj, lengths=True, reset=True, I=90)
        first, *others = (
            layer(problem, kit.replace(plan, fuse_input=fuse_input)).all()
            for plan in (
                kit.Plan("grid", math, splits=2),
                chunked(kit, math, proj, splits=2),
                chunked(kit, math, proj, splits=2, chunk_blocks=3, blocks=2, tiles=2),
            )
        )
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)


def test_inference_writes_no_more_than_outputs(layer, kit, exchange, math):
    one = layer(kit.Problem(4, 3, 19), kit.Plan(exchange, math))
    training, inference = one.forward()[0], one.forward(training=False)[0]
    assert inference.keys() == {"y", "hn", "cn"}
    assert all(torch.equal(inference[name], training[name]) for name in inference)


def test_plans_give_the_same_bits(layer, kit, exchange, math):
    """Groups, blocks, rows and where the weights lie do not change the order of any sum; only splits of K do, and the
    blocks of the backward in a cluster."""
    problem = kit.Problem(3, 9, 40, D=2)
    first, *others = (
        one.forward()[0] if exchange == "cluster" else one.all()
        for one in (
            layer(problem, kit.Plan(exchange, math, **options))
            for options in ({}, {"tiles": 3}, {"rows": rows_of(math)}, {"groups": 1}, {"tiles": 2, "shared_blocks": 3})
        )
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_plans_that_take_the_inputs_give_the_same_bits(layer, kit, exchange, math):
    problem, aligned = (kit.Problem(3, 9, 40, D=2, I=70, aligned=aligned) for aligned in (False, True))
    first, *others = (
        layer(problem, kit.Plan(exchange, math, fuse_input=True, **options)).forward()[0]
        for problem, options in (
            (problem, {}),
            (aligned, {}),
            (problem, {"tiles": 3, "shared_input_blocks": 2}),
            (aligned, {"rows": rows_of(math)}),
            (aligned, {"groups": 1, "tiles": 2, "shared_input_blocks": 100}),
        )
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


# Two slices for one group, idle warps, partial sums and both column tiles, in little time.
RACE = {"T": 3, "B": 9, "H": 20, "lengths": True, "reset": True, "aligned": True}


# Two turns of the backward, three of the forward.
CHUNKED_RACE = {"splits": 2, "groups": 1}


def race_plan(kit, exchange, math, **options):
    return kit.Plan(exchange, math, **{"tiles": 2, "splits": 2, "groups": 1, **options})


VARIANTS = [(math, {}) for math in MATHS] + [(math, {"proj": 17}) for math in MATHS] + [(m, {"rows": 16}) for m in WIDE]


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [{}, {"I": 3}, {"I": 37}], ids=["", "input", "inputs"])
@pytest.mark.parametrize(("math", "variant"), VARIANTS, ids=lambda part: part if part in MATHS else "".join(part))
def test_every_schedule_gives_the_same_bits(layer, kit, exchange, math, variant, inputs):
    """Of every kernel that is compiled."""
    problem = kit.Problem(**RACE, proj=variant.get("proj", 0), **inputs)
    same_in_every_schedule(
        layer(problem, race_plan(kit, exchange, math, rows=variant.get("rows", 8), fuse_input=bool(inputs)))
    )


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [{}, {"I": 37}], ids=["", "inputs"])
@pytest.mark.parametrize("proj", [0, 17], ids=["", "projected"])
def test_every_schedule_in_chunks_gives_the_same_bits(layer, kit, math, proj, inputs):
    problem = kit.Problem(**{**RACE, "T": 2, "B": rows_of(math) + 1}, proj=proj, **inputs)
    same_in_every_schedule(layer(problem, chunked(kit, math, proj, **CHUNKED_RACE, fuse_input=bool(inputs))))


def same_in_every_schedule(one):
    one.check()
    first = one.all()
    for seed in range(1, FEWER_SCHEDULES):
        made, _ = one.forward(seed)
        back, _ = one.backward(made, seed)
        for name, value in (made | back).items():
            assert torch.equal(value, first[name]), f"{name} with seed {seed}"


def scatter(kit, math, tiles=1, **options):
    """A forward plan, and one of the backward whose blocks exchange partial sums of dh, of as many tiles as can be."""
    few = math == "fp64" or (math == "tf32" and options.get("rows") == 16)
    tiles = min(tiles, 2) if few else tiles
    splits = 4 if tiles <= 2 else 2
    return kit.Plan("grid", math), kit.Plan("scatter", math, tiles=tiles, splits=splits, **options)


# In parts of dh: one block with all units and one with none, blocks whose last tile or last units do not exist.
SCATTERED = {
    "one-unit": ({"T": 1, "B": 1, "H": 1}, {}),
    "a-block-without-units": ({"T": 3, "B": 3, "H": 40}, {"blocks": 8}),
    "eight-blocks": ({"T": 2, "B": 3, "H": 128}, {}),
    "sixteen-blocks": ({"T": 2, "B": 2, "H": 256}, {}),
    "two-tiles": ({"T": 7, "B": 9, "H": 72}, {"tiles": 2}),
    "three-tiles": ({"T": 6, "B": 3, "H": 100}, {"tiles": 3}),
    "four-tiles": ({"T": 4, "B": 3, "H": 120}, {"tiles": 4}),
    "not-aligned": ({"T": 6, "B": 5, "H": 37}, {"tiles": 2}),
    "slices": ({"T": 5, "B": 21, "H": 24}, {"groups": 1}),
}


@pytest.mark.parametrize(("sizes", "options"), SCATTERED.values(), ids=SCATTERED)
def test_scatter(layer, kit, math, sizes, options):
    layer(kit.Problem(**sizes), *scatter(kit, math, **options)).check()


@pytest.mark.parametrize("options", [o for name, o in OPTIONS.items() if "proj" not in name])
@pytest.mark.parametrize("H", [16, 19])
def test_scatter_options(layer, kit, math, options, H):
    layer(kit.Problem(6, 5, H, **options), *scatter(kit, math)).check()


@pytest.mark.slow
@pytest.mark.parametrize("math", WIDE)
@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_scatter_of_sixteen_rows(layer, kit, math, tiles):
    problem = kit.Problem(5, 19, 100, D=2, lengths=True, reset=True, cell_states=True)
    layer(problem, *scatter(kit, math, tiles, rows=16, groups=1)).check()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 1, 9], ids=["streamed", "one-shared", "shared"])
def test_scatter_with_more_weights_than_registers(layer, host, kit, math, shared):
    """The weights of further tiles of dh in shared memory, or streamed."""
    bytes_ = 2 if math in ("bf16", "fp16") else 8 if math == "fp64" else 4
    problem = kit.Problem(2, 2, 16 * 40 if bytes_ < 8 else 16 * 20)
    tiles = 4 if bytes_ < 8 else 2
    plans = scatter(kit, math, tiles, blocks=16, shared_blocks=tiles * bytes_ * shared)
    needs, why = host.needs(kit.BACKWARD, problem.sizes, host.struct(plans[1], kit.BACKWARD, problem.H, problem.B))
    assert why is None
    assert (needs.streamed[0] > 0) == (shared < 9)
    layer(problem, *plans).check()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_every_schedule_of_scatter_gives_the_same_bits(layer, kit, math, tiles, rows):
    if rows > rows_of(math):
        return
    problem = kit.Problem(**{**RACE, "H": 20 * tiles, "T": 6})
    same_in_every_schedule(layer(problem, *scatter(kit, math, tiles, rows=rows, groups=1)))


def test_no_synchronisation_of_scatter_can_be_left_out(layer, kit):
    problem = kit.Problem(**{**RACE, "B": 20, "H": 64, "T": 7})
    streamed = kit.Problem(T=2, B=2, H=16 * 30)  # 8 tiles of dh and their 64 K blocks for a warp, of which 8 stay
    layers = [layer(problem, *scatter(kit, "bf16", 1, groups=1)), layer(streamed, *scatter(kit, "bf16", 4))]
    names = every_removal_is_caught(layers, "backward")
    assert "the thread's copies of weights" in names
    assert {"da is staged", "the parts of dh have come", "the first steps are copied"} <= names
    assert {"the thread's copies of the first steps", "the thread's copies of the step that comes"} <= names


# Of the other cells: (plan, problem), each with and without x in the launch. One block, clusters with idle blocks,
# splits with weights in registers, in shared memory and streamed, 16 rows, slices, chunks of one turn and of several.
OTHER_CELLS = {
    "one-block": ({"exchange": "grid", "math": "fp32", "tiles": 5}, {"T": 4, "B": 3, "H": 40}),
    "one-unit": ({"exchange": "cluster", "math": "bf16"}, {"T": 1, "B": 1, "H": 1}),
    "everything": ({"exchange": "cluster", "math": "fp64", "tiles": 2}, {"T": 5, "B": 5, "H": 19, **EVERYTHING}),
    "narrow-no-states": (
        {"exchange": "cluster", "math": "fp16", "blocks": 8},
        {"T": 3, "B": 3, "H": 40, "wide": False, "states": False, "biases": "hh"},
    ),
    "slices": (
        {"exchange": "cluster", "math": "tf32", "tiles": 4, "rows": 16, "groups": 1},
        {"T": 4, "B": 21, "H": 72, "D": 2, "lengths": True, "reset": True},
    ),
    "streamed": (
        {"exchange": "grid", "math": "bf16", "rows": 16, "tiles": 3, "splits": 2, "shared_blocks": 1},
        {"T": 2, "B": 9, "H": 600, "I": 90, "biases": "ih"},
    ),
    "splits": (
        {"exchange": "grid", "math": "fp64", "tiles": 2, "splits": 3, "groups": 1},
        {"T": 3, "B": 9, "H": 37, **EVERYTHING},
    ),
    "chunked": (
        {"exchange": "chunked", "math": "bf16", "blocks": 2, "tiles": 2, "splits": 2, "chunk_blocks": 1, "rows": 16},
        {"T": 4, "B": 17, "H": 150, "I": 90, **EVERYTHING},
    ),
    "chunks-of-one-turn": (
        {"exchange": "chunked", "math": "fp32", "blocks": 5, "tiles": 2, "chunk_blocks": 2},
        {"T": 3, "B": 2, "H": 70},
    ),
}


@pytest.mark.parametrize("cell", OTHERS)
@pytest.mark.parametrize(("plan", "sizes"), OTHER_CELLS.values(), ids=OTHER_CELLS)
def test_other_cells(layer, kit, cell, plan, sizes):
    if plan["math"] not in MATHS:
        pytest.skip("this build does not have that arithmetic")
    for fuse_input in (False, True):
        layer(kit.Problem(**sizes, cell=cell), kit.Plan(**plan, fuse_input=fuse_input)).check()


# By what a tile has of K blocks: whole ones, or such that the block's part of da ends within one.
SCATTERED_CELLS = [
    ("bf16", 1),
    ("bf16", 2),
    ("bf16", 3),
    ("bf16", 4),
    ("tf32", 1),
    ("tf32", 2),
    ("fp32", 3),
    ("fp64", 2),
]


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
@pytest.mark.parametrize(("math", "tiles"), [part for part in SCATTERED_CELLS if part[0] in MATHS])
def test_other_cells_scatter(layer, kit, math, tiles, cell):
    problem = kit.Problem(4, 11, 19 + 33 * tiles, cell=cell, **EVERYTHING)
    rows = rows_of(math) if tiles % 2 == 0 else 8
    layer(problem, *scatter(kit, math, tiles, rows=rows, groups=1)).check()


def test_another_cell_scatters_with_more_weights_than_registers(layer, host, kit):
    problem, plans = kit.Problem(2, 2, 16 * 20, cell="gru"), scatter(kit, "bf16", 4)
    one = layer(problem, *plans)
    struct = host.struct(one.backward_plan, kit.BACKWARD, problem.H, problem.B)
    assert host.needs(kit.BACKWARD, problem.sizes, struct)[0].streamed[0] > 0
    one.check()


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
@pytest.mark.parametrize("math", ["bf16", "fp64"])
def test_every_schedule_of_another_cell_gives_the_same_bits(layer, kit, exchange, math, cell):
    """In a cluster the backward scatters."""
    problem = kit.Problem(**RACE, cell=cell)
    same_in_every_schedule(
        layer(problem, race_plan(kit, exchange, math, rows=rows_of(math), fuse_input=exchange == "grid"))
    )


@pytest.mark.parametrize(("exchange", "direction"), [("cluster", "forward"), ("grid", "backward")])
def test_no_synchronisation_of_another_cell_can_be_left_out(layer, kit, exchange, direction):
    problem = kit.Problem(**{**RACE, "B": 20}, cell="gru")
    plans = [race_plan(kit, exchange, "bf16", rows=16, **options) for options in ({}, {"splits": 1, "tiles": 1})]
    every_removal_is_caught([layer(problem, plan) for plan in plans], direction)


def test_no_synchronisation_of_another_cell_that_scatters_can_be_left_out(layer, kit):
    """That the barriers are ready shows in a schedule in which one block sends before another has begun."""
    problem = kit.Problem(**{**RACE, "B": 20, "H": 64, "T": 7}, cell="gru")
    names = every_removal_is_caught([layer(problem, *scatter(kit, "bf16", 1, groups=1))], "backward")
    assert {"the barriers of the cluster are ready", "da is staged", "the first steps are copied"} <= names


# Variants of the LSTM, each with and without x in the launch: (cell, plan, problem). In a cluster without a projection
# the backward scatters. Every option, every exchange, 8 and 16 rows, slices, and with noise of one step for all.
LSTM_VARIANTS = {
    "peepholes": (
        "lstm_peephole",
        {"math": "bf16", "tiles": 2, "splits": 2, "rows": 16},
        {"T": 4, "B": 17, "H": 37, "cell_states": True, **EVERYTHING},
    ),
    "peepholes-scatter": ("lstm_peephole", {"exchange": "cluster", "math": "tf32"}, {"T": 3, "B": 3, "H": 40}),
    "zoneout-candidate": (
        "lstm+hcg",
        {"exchange": "cluster", "math": "tf32", "tiles": 3, "rows": 16, "groups": 1},
        {"T": 4, "B": 19, "H": 44, "cell_states": True, **EVERYTHING},
    ),
    "peepholes-zoneout-state": (
        "lstm_peephole+hcr",
        {"exchange": "cluster", "math": "bf16", "tiles": 4, "rows": 16},
        {"T": 4, "B": 19, "H": 70, **EVERYTHING},
    ),
    # Of one kind of noise alone, the others' addresses are its own.
    "zoneout-h": ("lstm+h", {"exchange": "cluster", "math": "bf16"}, {"T": 3, "B": 3, "H": 40, **EVERYTHING}),
    "zoneout-c": ("lstm_peephole+c", {"math": "bf16", "splits": 2}, {"T": 3, "B": 9, "H": 37, **EVERYTHING}),
    "candidate": ("lstm_coupled+g", {"math": "bf16", "rows": 16}, {"T": 3, "B": 17, "H": 37, **EVERYTHING}),
    "state": ("lstm_peephole+r", {"exchange": "cluster", "math": "bf16"}, {"T": 3, "B": 3, "H": 37, **EVERYTHING}),
    "evaluation": ("lstm+hc", {"math": "fp64", "groups": 1}, {"T": 3, "B": 9, "H": 19, "fixed_noise": True}),
    "coupled": ("lstm_coupled", {"exchange": "cluster", "math": "bf16"}, {"T": 5, "B": 3, "H": 40, "states": False}),
    "coupled-everything": (
        "lstm_peephole_coupled+hcg",
        {"exchange": "cluster", "math": "fp64", "tiles": 2},
        {"T": 4, "B": 9, "H": 19, "cell_states": True, **EVERYTHING},
    ),
    "projected": ("lstm_peephole+r", {"exchange": "cluster", "math": "bf16"}, {"T": 3, "B": 3, "H": 40, "proj": 21}),
    # In float64 what is the same at all steps is loaded where it is used.
    "projected-float64": (
        "lstm_peephole+r",
        {"exchange": "grid", "math": "fp64", "groups": 1},
        {"T": 4, "B": 9, "H": 40, "proj": 21, **EVERYTHING},
    ),
    "projected-float64-coupled": (
        "lstm_peephole_coupled+g",
        {"exchange": "cluster", "math": "fp64"},
        {"T": 4, "B": 3, "H": 40, "proj": 21, **EVERYTHING},
    ),
    "projected-float64-chunks": (
        "lstm_peephole+r",
        {"exchange": "chunked", "math": "fp64", "blocks": 2, "chunk_blocks": 2},
        {"T": 3, "B": 9, "H": 70, "proj": 33, **EVERYTHING},
    ),
    "projected-chunks": (
        "lstm_peephole_coupled+g",
        {"exchange": "chunked", "math": "tf32", "blocks": 2, "chunk_blocks": 2},
        {"T": 3, "B": 9, "H": 70, "proj": 33, **EVERYTHING},
    ),
    "chunked": (
        "lstm_peephole+hcr",
        {"exchange": "chunked", "math": "bf16", "blocks": 2, "splits": 2, "chunk_blocks": 1, "rows": 16, "groups": 1},
        {"T": 4, "B": 17, "H": 70, "cell_states": True, **EVERYTHING},
    ),
}


@pytest.mark.slow
@pytest.mark.cuda_variants
@pytest.mark.parametrize(("cell", "plan", "sizes"), LSTM_VARIANTS.values(), ids=LSTM_VARIANTS)
def test_variants_of_the_lstm(layer, kit, cell, plan, sizes):
    if plan["math"] not in MATHS:
        pytest.skip("this build does not have that arithmetic")
    for fuse_input in (False, True):
        layer(kit.Problem(**sizes, cell=cell), kit.Plan(**plan, fuse_input=fuse_input)).check()


def caught(one, direction, name, expected):
    """The first schedule in which the launch without the synchronisations of that name fails, and how."""
    for seed in range(SCHEDULES):
        try:
            if direction == "forward":
                outputs, launched = one.forward(seed, remove=name)
            else:
                outputs, launched = one.backward(expected, seed, remove=name)
        except RuntimeError as error:
            return str(error)
        assert name in launched.names
        if not all(torch.equal(value, expected[key]) for key, value in outputs.items()):
            return "other results"
    return None


# A cluster scatters in the backward without a projection, which has a test of its own.
REMOVALS = [
    (exchange, direction, fuse_input, proj)
    for exchange in EXCHANGES
    for direction, fuse_input in (("forward", False), ("forward", True), ("backward", False))
    for proj in (0, 17)
    if (exchange, direction, proj) != ("cluster", "backward", 0)
]


@pytest.mark.parametrize(("exchange", "direction", "fuse_input", "proj"), REMOVALS)
def test_no_synchronisation_can_be_left_out(layer, kit, exchange, direction, fuse_input, proj):
    """The test of the tests: each is removed in turn, and that has to be noticed. So none is redundant either."""
    problem = kit.Problem(**{**RACE, "B": 20}, proj=proj, I=37)
    rows = 8 if proj else 16
    plans = [
        race_plan(kit, exchange, "bf16", rows=rows, fuse_input=fuse_input, **options)
        for options in ({}, {"splits": 1, "tiles": 1})
    ]
    layers = [layer(problem, plan) for plan in plans]
    streams = fuse_input or (exchange, direction, proj) == ("grid", "backward", 0)
    if streams:  # more K blocks, of which most are streamed, than are on their way when the operand has come
        layers.append(layer(kit.replace(problem, **({"I": 250} if fuse_input else {"H": 100})), plans[1]))
    names = every_removal_is_caught(layers, direction)
    assert any("input" in name for name in names) == fuse_input
    assert ("the thread's copies of weights" in names) == streams


@pytest.mark.parametrize("proj", [0, 33], ids=["", "projected"])
@pytest.mark.parametrize(
    ("direction", "fuse_input"),
    [("forward", False), ("forward", True), ("backward", False)],
    ids=lambda part: str(part),
)
def test_no_synchronisation_in_chunks_can_be_left_out(layer, kit, direction, fuse_input, proj):
    problem = kit.Problem(**{**RACE, "B": 20, "H": 70}, proj=proj, I=90)
    plans = [
        chunked(kit, "bf16", proj, groups=1, fuse_input=fuse_input, **options)
        for options in ({"blocks": 2, "splits": 2}, {"tiles": 2})
    ]
    # More K blocks of weights in a part than are on their way when it has come.
    long = kit.replace(problem, T=2, B=2, H=200, proj=proj and 170)
    layers = [layer(problem, plan) for plan in plans]
    layers.append(layer(long, chunked(kit, "bf16", proj, blocks=4, chunk_blocks=8, fuse_input=fuse_input)))
    names = every_removal_is_caught(layers, direction)
    assert {"the chunk is copied", "the thread's copies of the chunk", "the thread's copies of weights"} <= names
    assert ("the chunk of the input is copied" in names) == fuse_input


def every_removal_is_caught(layers, direction):
    """In one of the layers each; returns the names of what was removed."""
    missed = {}
    for one in layers:
        expected = one.all()
        launched = (one.forward() if direction == "forward" else one.backward(expected))[1]
        assert len(launched.names) >= 4
        for name in launched.names:
            if missed.get(name, True):
                missed[name] = caught(one, direction, name, expected) is None
    assert not [name for name, not_found in missed.items() if not_found]
    return missed.keys()


def test_a_deadlock_is_reported_with_who_waits_where(host, kit):
    with pytest.raises(kit.LaunchError) as error:
        host.launch("fusedrnn_host_deadlock", None, 0, None)
    assert str(error.value).splitlines() == [
        "deadlock: no thread can run",
        "  block 1, threads 0 to 31: waiting at 'a barrier'",
        "  block 1, threads 32 to 63: waiting at 'what never comes'",
    ]


@pytest.mark.parametrize(("what", "why"), [(0, "it ends, and copies of it do not"), (1, "block 1 has ended before")])
def test_what_a_block_leaves_on_its_way_is_reported(host, kit, what, why):
    with pytest.raises(kit.LaunchError, match=why):
        host.launch("fusedrnn_host_left", ctypes.c_int(what), 0, None)


@pytest.mark.parametrize(
    ("sizes", "options", "why"),
    [
        ({"T": 0}, {}, "sizes must be positive"),
        ({"D": 3}, {}, "D 1 or 2"),
        ({"T": 1 << 31}, {}, "T must be below"),
        ({"P": 4}, {}, "P must be H without a projection"),
        ({"P": 41, "projected": 1}, {}, "P must be 1 to H"),
        ({"P": 4, "projected": 1}, {"rows": 16}, "rows must be 8 with a projection"),
        ({}, {"tiles": 3, "splits": 3}, "too many threads"),
        ({}, {"rows": 12}, "rows must be 8 or 16"),
        ({}, {"rows": 16, "math": "fp32"}, "rows must be 8"),
        ({}, {"blocks": 1}, "do not cover H"),
        ({}, {"blocks": 6, "exchange": "cluster"}, "2, 4, 8 or 16"),
        ({}, {"blocks": 32, "exchange": "cluster"}, "2, 4, 8 or 16"),
        ({}, {"blocks": 1, "tiles": 8, "exchange": "cluster"}, "2, 4, 8 or 16"),
        ({}, {"shared_blocks": -1}, "counts must be positive"),
        ({"I": 5}, {"shared_input_blocks": -1, "fuse_input": True}, "counts must be positive"),
        ({}, {"fuse_input": True}, "I must be 1 to 2^20"),
        ({"I": 5}, {"fuse_input": 2}, "fuse_input must be 0 or 1"),
        ({"I": 5}, {"shared_input_blocks": 2}, "shared_input_blocks without fuse_input"),
        ({"H": 1 << 21, "P": 1 << 21}, {"exchange": "chunked", "chunk_blocks": 1}, "H at most 2^20"),
        ({}, {"exchange": "chunked", "rows": 16}, "chunk_blocks must be 1 to 2^12"),
        ({}, {"exchange": "chunked", "rows": 16, "chunk_blocks": 1 << 13}, "chunk_blocks must be 1 to 2^12"),
        ({}, {"exchange": "chunked", "rows": 16, "chunk_blocks": -1}, "counts must be positive"),
        ({}, {"exchange": "chunked", "chunk_blocks": 1}, "as many as can be"),
        ({}, {"exchange": "chunked", "rows": 16, "chunk_blocks": 1, "shared_blocks": 1}, "all weights are streamed"),
        (
            {"I": 5},
            {"exchange": "chunked", "rows": 16, "chunk_blocks": 1, "fuse_input": True, "shared_input_blocks": 1},
            "all weights are streamed",
        ),
        ({}, {"chunk_blocks": 1}, "chunk_blocks without chunks"),
        ({}, {"exchange": "scatter", "tiles": 2}, "only the backward"),
        ({"H": 20000, "P": 20000}, {"blocks": 16, "tiles": 160, "exchange": "cluster"}, "too many threads"),
    ],
    ids=str,
)
def test_invalid_plans(host, kit, sizes, options, why):
    sizes = {"T": 3, "B": 4, "H": 40, "P": 40, "D": 1, **sizes}
    plan = host.struct(kit.Plan(**options), kit.FORWARD, sizes["H"], sizes["B"])
    assert why in host.needs(kit.FORWARD, kit.Sizes(**sizes), plan)[1]


@pytest.mark.parametrize(
    ("sizes", "options", "why"),
    [
        ({"P": 20, "projected": 1}, {"tiles": 1, "splits": 4}, "only the backward without a projection"),
        ({}, {"tiles": 2, "splits": 2}, "4 warps for each of 1 or 2 tiles"),
        ({}, {"tiles": 5, "splits": 2}, "too many threads"),
        ({}, {"tiles": 3, "splits": 2, "math": "fp64"}, "in float64 and in TF32"),
        ({}, {"tiles": 2, "splits": 4, "shared_blocks": 3}, "the weights of whole tiles"),
        ({}, {"tiles": 4, "splits": 2, "blocks": 1}, "2, 4, 8 or 16"),
        ({"H": 600, "P": 600}, {"tiles": 2, "splits": 4, "blocks": 16}, "do not cover H"),
        ({}, {"exchange": "cluster", "tiles": 2, "splits": 4}, "without a projection, a cluster scatters"),
    ],
    ids=str,
)
def test_invalid_plans_of_the_backward_in_a_cluster(host, kit, sizes, options, why):
    sizes = {"T": 3, "B": 4, "H": 40, "P": 40, "D": 1, **sizes}
    plan = host.struct(kit.Plan(**{"exchange": "scatter", **options}), kit.BACKWARD, sizes["H"], sizes["B"])
    assert why in host.needs(kit.BACKWARD, kit.Sizes(**sizes), plan)[1]


def test_needs(host, kit):
    """Sizes worked out by hand: bfloat16, H 512, a cluster of 8 blocks of 8 tiles, 8 rows."""
    sizes = kit.Sizes(T=9, B=16, H=512, P=512, D=2)
    plan = host.struct(kit.Plan("cluster", "bf16", tiles=8, rows=8, shared_blocks=10), kit.FORWARD, 512, 16)
    needs, why = host.needs(kit.FORWARD, sizes, plan)
    assert why is None
    assert list(needs.streamed) == [0, 0, 0]  # 16 K blocks, 6 of them in registers
    # 10 K blocks for each of 8 warps, two operands of 8 rows of 16 | 1 K blocks, staging, of each tile and row three
    # steps of xg in float and one of what is stored, all padded, and two barriers.
    steps = 8 * 8 * (3 * (4 * 8 * 4 + 16) + 6 * 8 * 2 + 16)
    assert needs.shared == 8 * 10 * 2048 + 2 * 8 * 17 * 64 + 8 * 8 * 16 + steps + 16
    assert (needs.exchanged, needs.flags, needs.blocks) == (0, 0, 2 * 2 * 8)
    assert needs.packed[0] == 2 * 4 * 512 * 512 * 2
    plan.exchange = 0
    needs, why = host.needs(kit.FORWARD, sizes, plan)
    assert (needs.exchanged, needs.flags) == (2 * 2 * 2 * 8 * 512 * 2, 2 * 2 * 8)


def test_needs_of_inputs(host, kit):
    """The same, bfloat16 and H 512, with x of 200 numbers: 400 bytes, 25 quads, 7 K blocks."""
    sizes = kit.Sizes(T=9, B=16, H=512, P=512, D=2, I=200)
    plan = kit.Plan("cluster", "bf16", tiles=8, rows=8, shared_blocks=10)
    alone, _ = host.needs(kit.FORWARD, sizes, host.struct(plan, kit.FORWARD, 512, 16))
    plan = host.struct(kit.replace(plan, fuse_input=True, shared_input_blocks=5), kit.FORWARD, 512, 16)
    needs, why = host.needs(kit.FORWARD, sizes, plan)
    assert why is None
    assert list(needs.streamed) == [0, 0, 2]
    assert needs.packed[2] == 2 * 7 * 64 * 4 * 512
    # 5 K blocks for each of 8 warps and a ring of 4, two buffers of 8 rows of 7 * 64 bytes; nothing of it is exchanged.
    assert needs.shared - alone.shared == 8 * (5 + 4) * 2048 + 2 * 8 * 7 * 64
    assert (needs.exchanged, needs.flags) == (alone.exchanged, alone.flags)
    assert host.needs(kit.BACKWARD, sizes, plan)[1] == "fuse_input is of the forward alone"


def test_needs_in_chunks(host, kit):
    """bfloat16 and H 20,000, 100 blocks of 8 tiles in 4 turns, 16 rows, chunks of 40 K blocks, two directions."""
    sizes = kit.Sizes(T=9, B=16, H=20000, P=20000, D=2)
    plan = host.struct(
        kit.Plan("chunked", "bf16", blocks=100, tiles=8, rows=16, chunk_blocks=40), kit.FORWARD, 20000, 16
    )
    needs, why = host.needs(kit.FORWARD, sizes, plan)
    assert why is None
    assert list(needs.streamed) == [625, 0, 0]
    assert needs.shared == 2 * 16 * 41 * 64 + 8 * 4 * 2048 + 8 * 8 * 16 + 16  # a ring for each warp
    # Two operands of 16 rows; and of every thread c and h of four columns, of each of its tiles.
    assert needs.exchanged == 2 * (2 * 16 * 20000 * 2 + 100 * 256 * 4 * 8 * 4)
    assert (needs.flags, needs.blocks) == (2 * 100, 2 * 100)


@pytest.mark.parametrize(("which", "dtype"), [(0, torch.bfloat16), (1, torch.float16)], ids=["bf16", "fp16"])
def test_conversions_are_torchs(host, which, dtype):
    bits = torch.arange(0, 1 << 32, 65521, dtype=torch.int64) - (1 << 31)
    values = bits.to(torch.int32).view(torch.float32)
    values = torch.cat([values, torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25])])
    ours = torch.empty_like(values)
    host.library.fusedrnn_host_convert(
        which, ctypes.c_int64(len(values)), ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(ours.data_ptr())
    )
    torch.testing.assert_close(ours, values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_tf32_is_the_nearest_of_eleven_bits(host):
    values = torch.randn(10000)
    ours = torch.empty_like(values)
    host.library.fusedrnn_host_convert(
        2, ctypes.c_int64(len(values)), ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(ours.data_ptr())
    )
    mantissa, exponent = torch.frexp(values.double())
    assert torch.equal(ours.double(), torch.ldexp((mantissa * 2**11).round(), exponent - 11))


@pytest.mark.compiles
@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_under_sanitizers(host):
    """The same tests, fewer of them, with a library built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = os.environ.get("CXX", "g++")
    preload = [
        subprocess.run([compiler, f"-print-file-name={name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan", "libstdc++")
    ]
    if not all(Path(path.strip()).is_absolute() for path in preload):
        pytest.skip(f"{compiler} has no AddressSanitizer")
    chosen = "test_sizes or test_options and everything or test_plans and not many or test_groups or test_idle"
    chosen += " or test_input_sizes or test_chunks"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(path.strip() for path in preload),
            "ASAN_OPTIONS": "detect_leaks=0",
            "FUSEDRNN_CUDA_HOST_SANITIZE": "1",
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
