"""The planner of the Triton kernels, over a wide grid of problems and devices: what it chooses fits, and covers all."""

import importlib.util
import itertools
import types
from pathlib import Path

import pytest

if importlib.util.find_spec("fusedrnn.kernels") is None:
    pytest.skip("fusedrnn.kernels is not installed", allow_module_level=True)

from fusedrnn.kernels import plan as planner
from fusedrnn.kernels.device import DEVICES, H200, RTX4090, device_of
from fusedrnn.kernels.plan import Shape

SIZES = (1, 30, 64, 128, 200, 256, 512, 650, 768, 1024, 1536, 2048)
BATCHES = (1, 8, 17, 64, 256, 5000)
KINDS = ((2, "tf32"), (4, "tf32"), (4, "tf32x3"), (4, "ieee"))


def shapes():
    for H, B, (itemsize, precision), D, ragged in itertools.product(SIZES, BATCHES, KINDS, (1, 2), (False, True)):
        yield Shape(128, B, H, H, H, D, itemsize, precision, ragged)
        yield Shape(1, B, 7, H, max(1, H // 2), D, itemsize, precision, ragged)
        for cell in ("gru", "rnn_tanh"):
            yield Shape(128 if ragged else 1, B, H, H, H, D, itemsize, precision, ragged, cell)


def cdiv(a, b):
    return -(-a // b)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_every_plan_fits(pass_, device):
    for shape in shapes():
        plan = planner.plan(pass_, shape, device)
        assert plan.shared <= device.shared, (shape, plan)
        # All programs of a launch have to run at the same time: one on each multiprocessor.
        assert 1 <= plan.programs * plan.groups <= device.multiprocessors, (shape, plan)
        assert plan.units * plan.programs >= shape.H
        assert plan.columns * plan.programs >= shape.P if shape.projected else plan.columns == 0
        # 65536 registers, of which no thread has more than 255, hold the sums and a tile of everything else.
        assert plan.split * plan.batch * shape.maps * plan.units <= 32 * 1024
        assert 0 < plan.step < 2000
        assert plan.launch >= shape.T * plan.step


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_weights_are_all_resident_or_all_streamed(pass_):
    for shape in shapes():
        plan = planner.plan(pass_, shape, H200)
        K, K_hr = (shape.P, shape.H) if pass_ == "forward" else (shape.gates * shape.H, shape.P)
        if plan.carried:
            assert (plan.programs, plan.regime) == (1, "rows")
            assert plan.chunk == plan.units >= shape.H
            assert not shape.projected
        elif plan.streamed:
            assert (plan.resident, plan.resident_hr, plan.resident_ih, plan.regime) == (0, 0, 0, "streamed")
        else:
            assert plan.regime == "resident"
            assert plan.resident == cdiv(K, plan.chunk)
            assert plan.resident_hr == (cdiv(K_hr, plan.chunk) if shape.projected else 0)
            N = plan.columns or plan.units if pass_ == "backward" else shape.maps * plan.units
            assert plan.resident * plan.chunk * N * shape.itemsize <= plan.shared
        if plan.fuse_input:
            assert plan.resident_ih * plan.chunk >= shape.I


@pytest.mark.parametrize(
    ("H", "B", "itemsize", "precision", "forward", "backward"),
    [(64, 1, 2, "tf32", "rows", "rows"), (512, 16, 2, "tf32", "resident", "resident"),
     (1024, 1, 2, "tf32", "resident", None), (32, 16, 4, "tf32", "rows", "rows"),
     (32, 16, 4, "ieee", "streamed", "resident"), (256, 16, 4, "tf32", "resident", "resident"),
     (4096, 16, 2, "tf32", "streamed", "streamed")],
)  # fmt: skip
def test_regimes_on_an_h200(H, B, itemsize, precision, forward, backward):
    shape = Shape(128, B, H, H, H, 1, itemsize, precision)
    assert planner.plan("forward", shape, H200).regime == forward
    assert backward is None or planner.plan("backward", shape, H200).regime == backward


def test_one_step_takes_its_input_into_the_launch():
    assert planner.plan("forward", Shape(1, 1, 128, 128, 128, 1, 2, "tf32"), H200).fuse_input
    assert not planner.plan("forward", Shape(1000, 64, 4096, 128, 128, 1, 2, "tf32"), H200).fuse_input


def test_more_work_is_predicted_to_take_longer():
    for kernel in ("forward", "backward"):
        times = [
            planner.plan(kernel, Shape(128, 64, H, H, H, 1, 2, "tf32"), H200).launch for H in (64, 512, 2048, 4096)
        ]
        assert times == sorted(times)
        times = [planner.plan(kernel, Shape(128, B, 512, 512, 512, 1, 2, "tf32"), H200).launch for B in (16, 256, 4096)]
        assert times == sorted(times)


def test_fewer_gates_are_predicted_to_take_no_longer():
    for kernel, H in itertools.product(("forward", "backward"), (128, 512, 2048)):
        times = [
            planner.plan(kernel, Shape(128, 64, H, H, H, 1, 2, "tf32", cell=cell), H200).launch
            for cell in ("rnn_relu", "gru", "lstm")
        ]
        assert times == sorted(times)


def test_a_layer_too_large_for_the_device():
    with pytest.raises(ValueError, match=r"H = 100000, P = 100000 does not fit NVIDIA H200: 132 programs"):
        planner.plan("forward", Shape(1, 1, 1, 100_000, 100_000, 1, 2, "tf32"), H200)


def test_constants_do_not_follow_every_length_and_batch():
    """What is compiled is a function of few values of T and B: launch.py rounds them up to powers of 2."""
    for kernel, H in itertools.product(("forward", "backward"), (100, 512, 2048)):
        rounded = [1 << k for k in range(11)]
        found = {
            tuple(sorted(planner.plan(kernel, Shape(T, B, H, H, H, 1, 2, "tf32"), H200).constants(kernel).items()))
            for T, B in itertools.product(rounded, rounded)
        }
        assert len(found) <= 8, len(found)


def test_text():
    text = str(planner.plan("forward", Shape(128, 64, 512, 512, 512, 1, 2, "tf32"), H200))
    assert "programs" in text
    assert "us a step predicted" in text


PROPERTIES = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "clock_rate": 1_980_000,
              "shared_memory_per_block_optin": 232_448}  # fmt: skip


def test_device_of_the_driver():
    device = device_of(types.SimpleNamespace(**PROPERTIES))
    assert device == H200._replace(clock=1.98)
    smaller = device_of(types.SimpleNamespace(**{**PROPERTIES, "multi_processor_count": 114}))
    assert smaller.multiprocessors == 114


def test_unknown_device_takes_after_the_most_alike():
    unknown = types.SimpleNamespace(name="NVIDIA RTX A6000", major=8, minor=6, multi_processor_count=84)
    device = device_of(unknown)
    assert device.capability == 86
    assert (device.multiprocessors, device.shared) == (84, RTX4090.shared)
    assert not device.measured


def test_what_the_driver_does_not_say_is_0():
    silent = {**PROPERTIES, "clock_rate": 0, "shared_memory_per_block_optin": 0}
    assert device_of(types.SimpleNamespace(**silent)) == H200


def test_the_predictions_in_the_documentation_are_the_models():
    text = (Path(__file__).parents[2] / "docs" / "gpu_performance.md").read_text()
    assert planner.predictions(H200) in text


@pytest.mark.parametrize(
    ("itemsize", "precision", "aligned", "odd"),
    [(2, "tf32", 16896, 4224), (4, "tf32", 8448, 2112), (4, "ieee", 4224, 2112), (4, "tf32x3", 4224, 2112)],
)
def test_limits_of_h_that_the_readme_states(itemsize, precision, aligned, odd):
    for limit, largest in ((aligned, aligned), (odd, odd - 1)):
        for kernel in ("forward", "backward"):
            planner.plan(kernel, Shape(128, 16, largest, largest, largest, 1, itemsize, precision, True), H200)
        above = limit + (16 if largest == aligned else 1)
        with pytest.raises(ValueError, match="does not fit"):
            planner.plan("forward", Shape(128, 16, above, above, above, 1, itemsize, precision, True), H200)


def test_products_are_fused_with_sums_whatever_triton_does_by_itself():
    assert planner.plan("forward", Shape(128, 16, 64, 512, 512, 1, 2, "tf32"), H200).options["enable_fp_fusion"]


def test_a_streamed_step_takes_as_long_as_its_chunks_one_after_another():
    shape = Shape(128, 64, 1024, 1024, 1024, 1, 2, "tf32")
    plan = min((p for p in planner.plans("backward", shape, H200) if p.streamed), key=lambda p: p.launch)
    assert plan.step >= cdiv(4 * shape.H, plan.chunk) * planner._CHUNK_LATENCY / (plan.stages - 1)
