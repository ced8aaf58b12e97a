"""The planner of the C++ kernels, over a wide grid of problems and devices: what it chooses fits, and covers all; and
its copy of the arithmetic of csrc/cuda/plan.h gives the same numbers as the original."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from fusedrnn.kernels.device import A100, B200, DEVICES, H100, H200, RTX4090, Shape, cdiv

from fusedrnn import cuda_plan as planner
from fusedrnn.cuda_plan import COSTS, EXCHANGES, MATHS

HIDDEN = (1, 30, 128, 512, 650, 1024, 2048, 20_000, 1 << 20)
BATCHES = (1, 5000)
KINDS = ((2, "tf32"), (4, "tf32"), (4, "ieee"), (8, "ieee"))


OTHER_CELLS = ("gru", "rnn_tanh", "lstm_peephole+hcr", "lstm_coupled")


def shapes():
    for H, B, (itemsize, precision), D in itertools.product(HIDDEN, BATCHES, KINDS, (1, 2)):
        yield Shape(128, B, H, H, H, D, itemsize, precision)
        yield Shape(1, B, 7, H, max(1, H // 2), D, itemsize, precision, True)
    for cell, H, (itemsize, precision) in itertools.product(OTHER_CELLS, HIDDEN[1::2], KINDS):
        yield Shape(20, 17, 40, H, H, 1, itemsize, precision, cell=cell)


def fits_whole(kernel, shape, device):
    """Whether a slice of 8 rows of the operands has room, with something to spare for what goes with it, and with what
    each of the fewest warps has on its way: four K blocks of weights, and three steps of a tile."""
    products = planner.products(kernel, shape, planner.math_of(shape)).values()
    operands, weights = sum(p.stride for p in products), sum(4 * p.fragment for p in products)
    warps = cdiv(max(p.tiles for p in products), device.multiprocessors // shape.D)
    steps = 3 * 8 * (7 if kernel == "backward" else 5) * 16 * max(4, shape.itemsize)
    spare = 16 * 1024 + warps * (weights + steps)
    return 8 * operands + spare <= device.shared and 8 * 8 * device.multiprocessors // shape.D >= shape.H


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("pass_", planner.PASSES)
def test_every_plan_fits(pass_, device):
    chunked = 0
    for shape in shapes():
        plan = planner.plan(pass_, shape, device)
        is_chunked = plan.exchange == "chunked"
        chunked += is_chunked
        assert not (is_chunked and fits_whole(pass_, shape, device)), shape
        units = 8 if pass_ == "forward" else 16
        assert is_chunked or plan.blocks * plan.tiles * units >= shape.H
        assert is_chunked == (plan.chunk_blocks > 0)
        assert plan.threads <= 256
        assert plan.rows == 8 or (plan.math in ("bf16", "tf32") and not shape.projected)
        assert plan.groups <= cdiv(shape.B, plan.rows)
        assert plan.shared == planner.needs(pass_, shape, plan).shared <= device.shared
        # Of every thread 256 registers, at the most; of every block its shared memory and 1 KiB of the driver's.
        each = min(65536 // (256 * plan.threads), (device.shared + 1024) // (plan.shared + 1024))
        if plan.exchange in ("cluster", "scatter"):
            assert device.capability >= 90
            assert plan.blocks in (2, 4, 8, 16)
            assert plan.blocks <= each * device.multiprocessors // COSTS[device.name].gpcs
        else:
            assert shape.D * plan.groups * plan.blocks <= each * device.multiprocessors
        assert 0 < plan.step < (5000 if shape.H <= 2048 else 1e9)
        assert plan.launch >= shape.T * plan.step
    assert chunked > 50


def test_devices_without_clusters_never_get_one():
    for device in (A100, RTX4090):
        assert COSTS[device.name].widest == 0
        found = {
            p.exchange for shape in itertools.islice(shapes(), 60) for p in planner.plans("forward", shape, device)
        }
        assert found == {"grid"}


def test_a_cluster_of_16_only_where_it_is_known_to_be_allowed():
    shape = Shape(128, 8, 512, 512, 512, 1, 2, "tf32")
    assert max(p.blocks for p in planner.plans("forward", shape, H200) if p.exchange == "cluster") == 16
    unknown = H200._replace(name="another", capability=120)
    assert max(p.blocks for p in planner.plans("forward", shape, unknown) if p.exchange == "cluster") == 8


def test_no_cluster_of_one_block():
    """What st.async does there is undefined; the second block has no tile."""
    for kernel, H in itertools.product(planner.PASSES, (1, 8, 16, 30, 64)):
        found = [p for p in planner.plans(kernel, Shape(4, 8, 5, H, H, 1, 2, "tf32"), H200) if "cluster" in str(p)]
        assert found
        assert min(p.blocks for p in found) >= 2


def on_an_h100(plan):
    """Groups at the same time, as such a device reports them: not all of its 132 multiprocessors lie where clusters
    of 8 or 16 fit."""
    if plan.exchange in ("cluster", "scatter"):
        return {2: 66, 4: 32, 8: 15, 16: 7}[plan.blocks]
    return 132 // plan.blocks


@pytest.mark.parametrize("pass_", planner.PASSES)
@pytest.mark.parametrize("D", [1, 2])
def test_what_the_device_reports_decides_on_the_groups(pass_, D):
    for H, B in ((128, 256), (512, 64), (512, 128), (1024, 64)):
        shape = Shape(128, B, H, H, H, D, 2, "tf32")
        asked = planner.ranked(pass_, shape, H100, on_an_h100)
        for plan in asked:
            assert plan.at_once == on_an_h100(plan)
            assert D * plan.groups <= max(plan.at_once, D if plan.exchange in ("cluster", "scatter") else 0)
            waves = cdiv(cdiv(B, plan.rows), plan.groups) * cdiv(D * plan.groups, plan.at_once)
            assert plan.launch >= shape.T * waves * plan.step
        assert [p.launch for p in asked] == sorted(p.launch for p in asked)


def test_a_plan_of_which_fewer_groups_fit_falls_behind():
    """Sixteen clusters of eight blocks, of which the estimate says that they fit and the device that fifteen do."""
    shape = Shape(128, 128, 512, 512, 512, 1, 2, "tf32")
    of_eight = [
        next(p for p in ranking if (p.exchange, p.blocks, p.rows, p.fuse_input) == ("cluster", 8, 8, False))
        for ranking in (planner.ranked("forward", shape, H100), planner.ranked("forward", shape, H100, on_an_h100))
    ]
    assert [p.groups for p in of_eight] == [16, 15]
    assert of_eight[1].launch > of_eight[0].launch + 0.9 * shape.T * of_eight[0].step  # a second wave
    with pytest.raises(ValueError, match="has no room for a block"):
        planner.plan("forward", shape, H100, lambda plan: 0)


def test_an_unknown_device_takes_after_the_most_alike():
    device = H200._replace(name="NVIDIA H100 PCIe", multiprocessors=114)
    plan = planner.plan("forward", Shape(128, 8, 512, 512, 512, 1, 2, "tf32"), device)
    assert "costs estimated for NVIDIA H100 80GB HBM3" in str(plan)
    # Of eight groups of 14 multiprocessors, none has room for 16 blocks that take one each.
    whole = dataclasses.replace(plan, exchange="cluster", blocks=16, tiles=8, splits=1)
    assert (planner.at_a_time(whole, device), planner.at_a_time(whole, H200)) == (0, 8)


def mirrored(cuda_host, shape, plan):
    """Sizes and plan as C++ takes them."""
    sizes = cuda_host.Sizes(
        T=shape.T, B=shape.B, H=shape.H, P=shape.P, D=shape.D, projected=int(shape.projected), I=shape.I
    )
    names = [name for name, _ in cuda_host.PlanStruct._fields_]
    return sizes, cuda_host.PlanStruct(**dict(zip(names, plan.fields, strict=True)))


def variants(plan, pass_, projected):
    """The plan, and plans that the planner would not choose."""
    yield plan
    for math in MATHS:
        for exchange, splits, rows in itertools.product(EXCHANGES, (1, 2, 3), (8, 16)):
            kept = {"shared_blocks": 3, "shared_projection_blocks": 2}
            kept |= {"fuse_input": False, "shared_input_blocks": 0, "chunk_blocks": 0}
            if exchange == "chunked":
                kept |= {"shared_blocks": 0, "shared_projection_blocks": 0, "chunk_blocks": 5}
            bare = dataclasses.replace(plan, exchange=exchange, math=math, splits=splits, rows=rows, groups=2, **kept)
            if exchange == "scatter":
                if pass_ == "backward" and not projected and splits <= planner.most_scatter_tiles(math, rows):
                    bare = dataclasses.replace(bare, tiles=splits, splits=planner.scatter_splits(splits), blocks=4)
                    yield dataclasses.replace(bare, shared_blocks=2 * planner.scatter_blocks(bare))
                continue
            yield bare
            if pass_ == "forward":
                yield dataclasses.replace(bare, fuse_input=True, shared_input_blocks=0 if exchange == "chunked" else 4)


@pytest.mark.parametrize("pass_", planner.PASSES)
def test_needs_are_those_of_the_kernels(pass_, cuda_host):
    """Shared memory, exchanged bytes, flags, packed weights and streamed blocks, of valid plans and of others."""
    host = cuda_host.Host(cuda_host.built("plain", cuda_host.FLAGS))
    direction = planner.PASSES.index(pass_)
    compared = 0
    for shape in shapes():
        for plan in variants(next(planner.plans(pass_, shape, H100)), pass_, shape.projected):
            theirs, why = host.needs(direction, *mirrored(cuda_host, shape, plan))
            ours = planner.needs(pass_, shape, plan)
            assert ours.shared == theirs.shared, (shape, plan)
            assert (ours.exchanged, ours.flags) == (theirs.exchanged, theirs.flags), (shape, plan)
            there = (True, shape.projected, plan.fuse_input)
            packed = tuple(n if is_there else 0 for n, is_there in zip(theirs.packed, there, strict=True))
            assert ours.packed == packed, (shape, plan)
            assert ours.streamed == tuple(theirs.streamed), (shape, plan)
            compared += why is None
    assert compared > 2000


@pytest.mark.parametrize("device", [A100, H200, B200], ids=lambda device: device.name)
def test_every_plan_is_valid(device, cuda_host):
    host = cuda_host.Host(cuda_host.built("plain", cuda_host.FLAGS))
    for kernel, shape in itertools.product(planner.PASSES, itertools.islice(shapes(), 0, None, 7)):
        found = [planner.whole(kernel, shape, device), planner.chunked(kernel, shape, device)]
        if kernel == "forward":
            found.append(planner.chunked(kernel, shape, device, fuse_input=True))
        for plan in itertools.chain(*found):
            _, why = host.needs(planner.PASSES.index(kernel), *mirrored(cuda_host, shape, plan))
            assert why is None, (why, shape, plan)
            assert plan.shared <= device.shared


@pytest.mark.parametrize(
    ("H", "B", "itemsize", "precision", "forward", "backward"),
    [
        (128, 16, 2, "tf32", "cluster", "scatter"),
        (512, 64, 2, "tf32", "cluster", "scatter"),
        (256, 64, 4, "tf32", "cluster", "scatter"),
        (1024, 1, 2, "tf32", "grid", "grid"),
        (2048, 256, 2, "tf32", "grid, streamed", "grid, streamed"),
        (4096, 64, 2, "tf32", "grid, streamed", "chunked, streamed"),
        (9000, 64, 2, "tf32", "chunked, streamed", "chunked, streamed"),
    ],
)
def test_regimes_on_an_h200(H, B, itemsize, precision, forward, backward):
    shape = Shape(128, B, H, H, H, 1, itemsize, precision)
    assert planner.plan("forward", shape, H200).regime == forward
    assert planner.plan("backward", shape, H200).regime == backward


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_the_launch_takes_x_where_that_saves_time(device):
    """A GEMM before a few steps costs more than w_ih in each of them; before many, or with a wide x, it costs less."""

    def chosen(T, I):
        return planner.plan("forward", Shape(T, 64, I, 512, 512, 1, 2, "tf32"), device).fuse_input

    assert chosen(1, 256)
    assert chosen(4, 64)
    assert chosen(8, 32)
    assert not chosen(1024, 32)
    assert not chosen(1024, 4096)
    assert not chosen(64, 4096)


def test_x_comes_after_the_recurrent_weights_on_the_chip():
    """w_ih takes what w_hh leaves of shared memory; x of which no 8 rows fit there is left to a GEMM."""
    shape = Shape(128, 8, 1024, 1024, 1024, 1, 2, "tf32")
    with_x = [p for p in planner.plans("forward", shape, H200) if p.fuse_input]
    assert {p.shared_input_blocks > 0 for p in with_x} == {True, False}
    for p in with_x:
        streamed = planner.needs("forward", shape, p).streamed
        if streamed[planner.RECURRENT]:
            assert p.shared_input_blocks == 0
        if streamed[planner.INPUT]:  # another K block would not fit
            assert p.shared + p.tiles * p.splits * 2048 > H200.shared
    assert not any(p.fuse_input for p in planner.plans("backward", shape, H200))
    wide = Shape(128, 8, 100_000, 512, 512, 1, 2, "tf32")
    assert not any(p.fuse_input for p in planner.plans("forward", wide, H200))
    # But for a single step, for which there are plans in chunks.
    single = list(planner.plans("forward", wide._replace(T=1), H200))
    assert {p.fuse_input for p in single if p.exchange != "chunked"} == {False}
    assert {p.fuse_input for p in single if p.exchange == "chunked"} == {True}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_x_in_chunks_where_that_saves_time(device):
    """In layers that fit in no other way, where w_ih is small beside w_hh."""

    def chosen(T, I):
        plan = planner.plan("forward", Shape(T, 1, I, 10_000, 10_000, 1, 2, "tf32"), device)
        assert plan.exchange == "chunked"
        return plan.fuse_input

    roomy = device.shared > 128 << 10  # with less, the ring of w_ih and chunks of x make the chunks of h smaller
    assert chosen(1, 64) == roomy
    assert chosen(4, 64) == roomy
    assert not chosen(1, 10_000)
    assert not chosen(1024, 10_000)


KINDS_OF_CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu", "lstm+hg", "lstm_peephole_coupled"]


@pytest.mark.parametrize("cell", KINDS_OF_CELLS)
def test_products_have_the_rows_of_the_cell(cell):
    """bfloat16 and H 128: 16 tiles of 8 units, a segment for each gate; da of 16 units for each gate."""
    gates = {"lstm": 4, "lstm+hg": 4, "gru": 3, "lstm_peephole_coupled": 3}.get(cell, 1)
    shape = Shape(128, 16, 100, 128, 128, 1, 2, "tf32", cell=cell)
    forward = planner.products("forward", shape, "bf16", fuse_input=True)
    assert forward[planner.RECURRENT] == (16, gates, 16, 16)
    assert forward[planner.INPUT] == (16, gates, 13, 16)
    assert planner.products("backward", shape, "bf16")[planner.RECURRENT] == (8, 2, 8, 32 * gates)
    for kernel in planner.PASSES:
        plan = planner.plan(kernel, shape, H200)
        assert plan.cell == cell
        assert plan.fields[-1] == KINDS_OF_CELLS.index(cell)


def test_a_cell_of_fewer_rows_is_predicted_to_take_less():
    """And more of its weights stay on the chip."""
    for kernel, H in itertools.product(planner.PASSES, (512, 1024, 2048)):
        of_cell = [
            planner.plan(kernel, Shape(128, 64, H, H, H, 1, 2, "tf32", cell=cell), H200)
            for cell in ("rnn_tanh", "gru", "lstm")
        ]
        launches = [plan.launch for plan in of_cell]
        assert launches == sorted(launches), (kernel, H)
        packed = [
            sum(planner.needs(kernel, Shape(128, 64, H, H, H, 1, 2, "tf32", cell=plan.cell), plan).packed)
            for plan in of_cell
        ]
        assert packed == sorted(packed)


def test_more_work_is_predicted_to_take_longer():
    for kernel in planner.PASSES:
        of_h = [planner.plan(kernel, Shape(128, 64, H, H, H, 1, 2, "tf32"), H200).launch for H in (64, 512, 1024, 2048)]
        assert of_h == sorted(of_h)
        of_b = [planner.plan(kernel, Shape(128, B, 512, 512, 512, 1, 2, "tf32"), H200).launch for B in (8, 256, 4096)]
        assert of_b == sorted(of_b)


def test_a_gemm_a_step_is_faster_from_some_size_on():
    """The stars of the table: large layers and batches."""

    def slower(H, B, kernel="forward"):
        shape = Shape(128, B, H, H, H, 1, 2, "tf32")
        plan = planner.plan(kernel, shape, H200)
        return cdiv(cdiv(B, plan.rows), plan.groups) * plan.step > planner.gemm_step(shape, H200)

    assert not slower(512, 64)
    assert not slower(512, 64, "backward")
    assert slower(1024, 256)
    assert slower(2048, 64)
    assert slower(1024, 64, "backward")
    table = planner.predictions(H200)
    assert "| bfloat16 | 512 | 64 | cluster, 8 x 16 | 1.1 |" in table
    assert re.search(r"\| bfloat16 \| 2048 \| 64 \| [^|]* \| [0-9.]+ \\\* \|", table)


def test_a_layer_too_large_for_the_device():
    most = 1 << 20
    planner.plan("forward", Shape(1, 1, 1, most, most, 1, 2, "tf32"), H200)
    with pytest.raises(ValueError, match=r"H = 1048577 does not fit the C\+\+ kernels, which take up to 2\^20"):
        planner.plan("forward", Shape(1, 1, 1, most + 1, most + 1, 1, 2, "tf32"), H200)
    with pytest.raises(ValueError, match=r"H = 4096, P = 4096 does not fit small: it has no room for a block"):
        planner.plan("backward", Shape(1, 1, 1, 4096, 4096, 1, 8, "ieee"), H200._replace(name="small", shared=4096))


def test_what_the_kernels_do_not_multiply_in():
    with pytest.raises(ValueError, match="tf32x3"):
        planner.plan("forward", Shape(1, 1, 1, 8, 8, 1, 4, "tf32x3"), H200)
    assert planner.plan("forward", Shape(1, 1, 1, 8, 8, 1, 2, "tf32x3"), H200).math == "bf16"


def test_text():
    text = str(planner.plan("forward", Shape(128, 64, 512, 512, 512, 1, 2, "tf32"), H200))
    assert "blocks, a cluster each" in text
    assert "us a step predicted from costs estimated for NVIDIA H200" in text
    wide, single = Shape(1024, 64, 4096, 512, 512, 1, 2, "tf32"), Shape(1, 64, 512, 512, 512, 1, 2, "tf32")
    assert "x in the launch" not in str(planner.plan("forward", wide, H200))
    assert "x in the launch" in str(planner.plan("forward", single, H200))
    large = planner.plan("backward", Shape(8, 8, 512, 8192, 8192, 1, 2, "tf32"), H200)
    assert "blocks, exchanging through L2, in chunks, 16 rows" in str(large)


def test_the_predictions_in_the_documentation_are_the_models():
    text = (Path(__file__).parents[2] / "docs" / "gpu_performance.md").read_text()
    assert planner.predictions(H200) in text


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_where_chunked_plans_begin_is_what_the_readme_states(device):
    """Of both directions, forward and backward, in 16 bits, float32 and float64."""
    text = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    name = next(n for n in ("A100", "H100", "H200", "B200", "RTX 4090") if n in device.name)
    row = re.search(rf"\n  \| [^|]*{name}[^|]*\|([^\n]*) \|\n", text)
    cells = [[int(n.replace(",", "")) for n in cell.split(" and ")] for cell in row[1].split("|")]
    for kinds, limits in zip((((2, "tf32"),), ((4, "tf32"), (4, "ieee")), ((8, "ieee"),)), cells, strict=True):
        for (itemsize, precision), (kernel, limit) in itertools.product(
            kinds, zip(planner.PASSES, limits, strict=True)
        ):
            shape = Shape(128, 16, limit, limit, limit, 2, itemsize, precision)
            assert next(planner.whole(kernel, shape, device), None) is not None, (kernel, shape)
            beyond = shape._replace(H=limit + 1, P=limit + 1)
            assert planner.plan(kernel, beyond, device).regime == "chunked, streamed", (kernel, shape)
