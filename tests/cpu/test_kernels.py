"""The CPU kernels, on every instruction set that this machine has: all results of a layer, forward and backward.

The tolerance is derived (fusedrnn/testing.py): at most twice the error of torch's own LSTM in the same dtype. Output
buffers are poisoned with NaN, so that whatever a kernel leaves unwritten shows.
"""

import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from functools import cache

import pytest
import torch

import fusedrnn
from fusedrnn import autograd, ops, sequence, testing
from fusedrnn.cells import CELLS
from fusedrnn.testing import Case

pytestmark = pytest.mark.skipif(ops.cpu_unavailable is not None, reason=str(ops.cpu_unavailable))


def instruction_sets():
    if ops.cpu_unavailable is not None:
        return []
    best, found = torch.ops.fusedrnn.cpu_isa(None), []
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated"):
        try:
            found.append(torch.ops.fusedrnn.cpu_isa(name))
        except RuntimeError:  # this processor, or this build, does not have it
            continue
    torch.ops.fusedrnn.cpu_isa(best)
    return found


ISAS = instruction_sets()


@pytest.fixture(params=ISAS)
def isa(request):
    best = torch.ops.fusedrnn.cpu_isa(None)
    yield torch.ops.fusedrnn.cpu_isa(request.param)
    torch.ops.fusedrnn.cpu_isa(best)


MIB = 2**20
keep = torch.ops.fusedrnn.cpu_keep


@pytest.fixture(autouse=True)
def threads(one_thread):
    """Sets the number of threads. It begins as 2, which the larger ones of all problems here make use of."""
    torch.set_num_threads(2)
    return torch.set_num_threads


answers = cache(testing.answers)


def check(case):
    with fusedrnn.use_backend("cpu"), testing.poisoned():
        ours = testing.evaluate(testing.call, fusedrnn.LSTM, case)
    expected = answers(case)
    assert ours.keys() == expected.keys()
    for name, answer in expected.items():
        testing.assert_as_exact_as(f"{case.id}: {name}", ours[name], *answer)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Sizes around the widths of vectors, panels and tiles; every T, B and H of the grid occurs, and small T with large H.
SIZES = [
    # T, B, I, H
    (1, 1, 5, 1),
    (1, 3, 31, 30),
    (1, 17, 7, 64),
    (1, 1, 200, 129),
    (1, 3, 64, 512),
    (2, 1, 3, 1),
    (2, 17, 33, 129),
    (2, 3, 24, 512),
    (63, 1, 9, 129),
    (63, 3, 30, 64),
    (63, 17, 16, 30),
    (128, 1, 40, 64),
    (128, 3, 2, 30),
    (128, 17, 1, 1),
    (128, 3, 129, 129),
    (41, 13, 401, 100),  # the matrix products around the launch are cut along all of their dimensions
]


@pytest.mark.parametrize("case", [Case(*size) for size in SIZES], ids=lambda case: case.id)
def test_sizes_float32(isa, case):
    check(case)


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (1, 3, 31, 30),
        (2, 17, 33, 129),
        (63, 1, 9, 129),
        (63, 3, 30, 64),
        (21, 25, 402, 98),  # what is multiplied in pairs is cut along all of its dimensions, an odd number of rows too
    ],
    ids=str,
)
def test_sizes_other_dtypes(isa, size, dtype):
    check(Case(*size, dtype=dtype))


OPTIONS = {
    "layers": {"layers": 3},
    "bidirectional": {"bidirectional": True},
    "two-layers-bidirectional": {"layers": 2, "bidirectional": True},
    "no-bias": {"bias": False},
    "no-hx": {"hx": False},
    "projection": {"proj_size": 11},
    "projection-bidirectional-no-bias": {"proj_size": 11, "bidirectional": True, "bias": False},
    "batch-first": {"batch_first": True},
    "strided": {"strided": True},
    "packed": {"packed": True},
    "packed-bidirectional": {"packed": True, "bidirectional": True},
    "packed-projection-bidirectional": {"packed": True, "proj_size": 11, "bidirectional": True},
    "packed-reset-bidirectional": {"packed": True, "reset": True, "bidirectional": True, "states": True},
    "lengths": {"lengths": True},
    "lengths-bidirectional": {"lengths": True, "bidirectional": True},
    "lengths-projection-bidirectional": {"lengths": True, "proj_size": 11, "bidirectional": True},
    "reset": {"reset": True},
    "reset-bidirectional": {"reset": True, "bidirectional": True},
    "reset-projection": {"reset": True, "proj_size": 11},
    "states": {"states": True},
    "everything": {
        "layers": 2,
        "bidirectional": True,
        "proj_size": 11,
        "batch_first": True,
        "lengths": True,
        "reset": True,
        "states": True,
        "strided": True,
    },
}


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(isa, options, T):
    check(Case(T, 5, 7, 37, **options))


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["lengths-projection-bidirectional", "reset-bidirectional", "packed-projection-bidirectional", "everything"],
)
def test_options_other_dtypes(isa, name, dtype):
    check(Case(6, 5, 7, 37, dtype=dtype, **OPTIONS[name]))
    check(Case(3, 5, 7, 37, dtype=dtype, **OPTIONS[name]))  # short: no weights are packed


@pytest.mark.parametrize("name", OPTIONS)
def test_options_bfloat16(isa, name):
    """All of even sizes, whose products take pairs where the processor does, or some; with an odd number of rows."""
    options = {**OPTIONS[name], "dtype": BF16}
    check(Case(7, 5, 6, 38, **(options | {"proj_size": 12} if "proj_size" in options else options)))
    check(Case(7, 5, 6, 37, **(options | {"proj_size": 12} if "proj_size" in options else options)))
    check(Case(7, 5, 5, 38, **options))


# Of tiles of 16 rows, 32 inputs and 16 units: rows that fill one or two, or that two share; inputs and units that fill
# none; products that are cut along K, with rows and columns left over.
TILED = [
    Case(5, 15, 32, 48),
    Case(5, 16, 32, 64),
    Case(4, 17, 33, 40),
    Case(4, 31, 7, 100),
    Case(3, 33, 64, 17),
    Case(4, 40, 40, 129, bidirectional=True),
    Case(5, 20, 24, 200),
    Case(30, 40, 600, 40),
    Case(7, 2, 1100, 30),
    Case(9, 33, 20, 50, proj_size=20),
    Case(20, 35, 24, 72, layers=2, lengths=True, reset=True, states=True),
    Case(40, 17, 24, 72, bidirectional=True, packed=True, reset=True),
]


@pytest.mark.parametrize("count", [1, 2], ids=["one-thread", "two-threads"])
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.id)
def test_tiles(isa, threads, case, count):
    threads(count)
    check(dataclasses.replace(case, dtype=BF16))


def test_wide_bfloat16_gradients(isa):
    """Against float64 itself: with AMX, torch's own are wrong from H 1024 on, and say nothing of what is allowed."""
    case = Case(3, 16, 32, 1024, dtype=BF16)
    exact = testing.evaluate(testing.call_torch, torch.nn.LSTM, case, dtype=F64)
    with fusedrnn.use_backend("cpu"):
        ours = testing.evaluate(testing.call, fusedrnn.LSTM, case)
    for name, values in ours.items():
        assert (values.double() - exact[name]).norm() < 0.01 * exact[name].norm(), name


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] > 1 and size[1] > 1], ids=str)
def test_sizes_of_packed_input(isa, size):
    check(Case(*size, packed=True, bidirectional=True, reset=True))


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if "lengths" in options])
def test_lengths_where_padding_is_packed(isa, monkeypatch, name, T):
    monkeypatch.setattr(sequence, "_PACKING_FLOPS", 0)
    check(Case(T, 5, 7, 37, **OPTIONS[name]))


def test_padding_is_packed_where_there_is_much_of_it(isa, monkeypatch):
    """Which changes no bit, but of the gradients of the weights: they are sums in another order."""
    case, results, calls = Case(40, 16, 64, 129, bidirectional=True, lengths=True, reset=True, states=True), [], []
    packing = sequence.PackedRows
    monkeypatch.setattr(sequence, "PackedRows", lambda *given: calls.append(given) or packing(*given))
    for flops in (sequence._PACKING_FLOPS, math.inf):
        monkeypatch.setattr(sequence, "_PACKING_FLOPS", flops)
        with fusedrnn.use_backend("cpu"), testing.poisoned():
            results.append(testing.evaluate(testing.call, fusedrnn.LSTM, case))
        assert len(calls) == 1  # of the first
    packed, padded = results
    for name in ("y", "hn", "cn", "h_l0", "c_l0", "dx", "dh0", "dc0"):
        assert torch.equal(packed[name], padded[name]), name


# Few rows and much work: hidden units are shared between the threads, with a barrier at every step.
SHARED_UNITS = [
    Case(40, 1, 16, 200),
    Case(40, 1, 16, 200, bidirectional=True, lengths=True, reset=True),
    Case(40, 1, 16, 200, proj_size=70),
    Case(20, 2, 16, 400, proj_size=100, bidirectional=True, lengths=True, reset=True, states=True),
    Case(20, 3, 16, 512),
    Case(20, 3, 16, 400, proj_size=100, bidirectional=True, packed=True, reset=True, states=True),
    Case(9, 1, 16, 512, bidirectional=True),  # short: no weights are packed
]
# Short, and so wide that two threads share the rows.
SHARED_ROWS = [
    Case(4, 4, 30, 120),
    Case(5, 3, 7, 110, bidirectional=True, lengths=True, reset=True),
    Case(5, 3, 7, 110, bidirectional=True, packed=True, reset=True),
]


@pytest.mark.parametrize("case", SHARED_UNITS, ids=lambda case: case.id)
def test_shared_units(isa, threads, case):
    threads(2)
    D = 2 if case.bidirectional else 1
    plan = torch.ops.fusedrnn.cpu_plan("lstm", case.T, case.B, case.I, case.H, case.proj_size or case.H, D, F32)
    assert "hidden units" in plan
    check(case)


@pytest.mark.parametrize(
    ("H", "B", "count", "expected"),
    [
        (128, 64, 2, "2 threads by batch rows"),  # 256 KiB of weights: every core keeps them
        (128, 7, 2, "2 threads by hidden units"),  # too few rows for the time that reading the weights takes
        (120, 7, 2, "2 threads by batch rows"),
        (1024, 64, 2, "2 threads by hidden units"),
        (256, 1024, 64, "64 threads by batch rows"),  # of at most 32 blocks of units
        (2048, 1024, 16, "16 threads by hidden units"),
        (2048, 8, 16, "16 threads by hidden units"),  # fewer rows than threads
        (56, 1, 2, "2 threads by hidden units"),
        (48, 1, 2, "1 thread by batch rows"),  # whose steps take less than a barrier
        (32, 2, 8, "2 threads by batch rows"),
    ],
)
def test_what_is_shared(isa, threads, H, B, count, expected):
    threads(count)
    assert expected in torch.ops.fusedrnn.cpu_plan("lstm", 64, B, H, H, H, 1, F32)


def l2_bytes():
    """Of a core, at least 512 KiB: as csrc/cpu/plan.h has it."""
    found = subprocess.run(["getconf", "LEVEL2_CACHE_SIZE"], capture_output=True, text=True, check=False).stdout.strip()
    return max(512 << 10, int(found) if found.isdigit() else 0)


@pytest.mark.parametrize("B", [8, 64])
def test_rows_are_shared_if_the_weights_fit_a_cache(isa, threads, B):
    threads(2)
    half = l2_bytes() // 2
    most = max(512 << 10, half) if B == 64 else half - 1  # bytes; 16 * H * H of an LSTM in float32
    widest = math.isqrt(most // 16)
    for H, expected in ((widest, "2 threads by batch rows"), (widest + 1, "2 threads by hidden units")):
        assert expected in torch.ops.fusedrnn.cpu_plan("lstm", 64, B, H, H, H, 1, F32)


# One time step of more rows than dot products are for: 3 in bfloat16 with pairs or tiles, else 32. The workers that use
# weights pack them: for all rows or, with fewer panels or chunks of units than threads, for some of them. Of 193 rows,
# and with a projection, they are packed before. In the last case only those of the input's gradient are packed by
# workers.
STEPS = [
    Case(1, 9, 40, 70),
    Case(1, 33, 31, 70),
    Case(1, 192, 20, 100),
    Case(1, 192, 130, 65, bidirectional=True),
    Case(1, 50, 7, 37, bidirectional=True, lengths=True, reset=True, states=True),
    Case(1, 60, 24, 72, packed=True, reset=True, bidirectional=True),
    Case(1, 96, 5, 9, hx=False),
    Case(1, 40, 200, 260, bias=False),
    Case(1, 35, 300, 40, proj_size=20),
    Case(1, 193, 16, 40),
    Case(4, 48, 300, 24),
]

# Of at most 8 rows, or 3 in bfloat16 with pairs or tiles, the gradients of h0 and x are sums of rows of weights, 512
# columns at a time. In the last case only that of x is.
FEW_ROWS = [
    Case(1, 1, 530, 70),
    Case(1, 3, 530, 37, bidirectional=True),
    Case(1, 2, 24, 600, lengths=True, reset=True, states=True),
    Case(1, 3, 5, 263, packed=True, bidirectional=True),
    Case(1, 5, 65, 9, hx=False),
    Case(1, 8, 1100, 33, bias=False),
    Case(1, 9, 65, 33),
    Case(4, 2, 530, 24, bidirectional=True),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", [*STEPS, *FEW_ROWS, Case(1, 9, 30, 40, proj_size=20)], ids=lambda case: case.id)
def test_one_step(isa, threads, case, dtype):
    threads(3)
    check(dataclasses.replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", [F64, F16], ids=str)
@pytest.mark.parametrize("case", FEW_ROWS, ids=lambda case: case.id)
def test_few_rows_of_other_dtypes(isa, threads, case, dtype):
    threads(2)
    check(dataclasses.replace(case, dtype=dtype))


def test_a_step_without_inputs(isa):
    """The gradient of x is a product without columns."""
    cell, baseline = fusedrnn.LSTMCell(0, 70), torch.nn.LSTMCell(0, 70)
    baseline.load_state_dict(cell.state_dict())
    results = []
    for module in (cell, baseline):
        x, h = torch.zeros(40, 0, requires_grad=True), torch.linspace(-1, 1, 2800).view(40, 70).requires_grad_()
        with fusedrnn.use_backend("cpu"):
            hn, _ = module(x, (h, h))
        hn.sum().backward()
        results.append([hn, x.grad, h.grad, module.weight_hh.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", SHARED_ROWS, ids=lambda case: case.id)
def test_short_sequences_with_shared_rows(isa, threads, case):
    threads(2)
    D = 2 if case.bidirectional else 1
    plan = torch.ops.fusedrnn.cpu_plan("lstm", case.T, case.B, case.I, case.H, case.H, D, F32)
    assert "2 threads by batch rows" in plan
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        *SHARED_UNITS,
        *SHARED_ROWS,
        *STEPS,
        *FEW_ROWS,
        *(dataclasses.replace(case, dtype=BF16) for case in STEPS + FEW_ROWS),
        Case(30, 17, 24, 129, layers=2, bidirectional=True),
        Case(30, 17, 24, 129, layers=2, bidirectional=True, packed=True, reset=True),
        Case(30, 17, 24, 130, layers=2, bidirectional=True, packed=True, reset=True, dtype=BF16),
        Case(40, 1, 16, 200, dtype=BF16),
        Case(20, 40, 30, 72, dtype=BF16),
        Case(1, 17, 200, 129),
        Case(1, 3, 5, 200, bidirectional=True),
        Case(1, 2, 64, 512),
        Case(7, 16, 8, 64),
    ],
    ids=lambda case: case.id,
)
def test_number_of_threads_does_not_change_a_bit(isa, threads, case):
    results = []
    for count in (1, 2, 3):
        threads(count)
        with fusedrnn.use_backend("cpu"):
            results.append(testing.evaluate(testing.call, fusedrnn.LSTM, case))
    for other in results[1:]:
        for name in other:
            assert torch.equal(results[0][name], other[name]), name


MANY_INPUTS = 400  # more than the launch projects itself: kFusedInputs in csrc/cpu/params.h
# Where nothing has to be kept: projected in the launch; and before it, as for so few rows, in parts that pass through a
# cache. Of sequences that end, only the rows that exist count for that.
WHOLE = [
    Case(67, 62, 5, 129),
    Case(67, 17, 24, 260, bidirectional=True, lengths=True, reset=True),
    Case(131, 17, 24, 260, bidirectional=True, packed=True, reset=True),
]
PARTS = [
    Case(4500, 3, 1, 40),
    Case(2500, 3, 2, 40, bidirectional=True, reset=True),
    Case(6000, 3, 2, 40, bidirectional=True, packed=True, reset=True),
]


@pytest.mark.parametrize(
    "case",
    [*WHOLE, *PARTS, *STEPS, *(dataclasses.replace(case, dtype=BF16) for case in STEPS)],
    ids=lambda case: case.id,
)
def test_inference_has_the_bits_of_training(isa, threads, case):
    threads(2)
    module, inputs = case.module(fusedrnn.LSTM), case.inputs()
    with fusedrnn.use_backend("cpu"), testing.poisoned():
        training = testing.call(module, case, inputs)
        with torch.no_grad():
            inference = testing.call(module, case, inputs)
    assert training["y"].requires_grad
    for name, values in inference.items():
        assert torch.equal(values, training[name]), name


def test_parts_in_bfloat16(isa):  # of which gates are kept in another dtype than their affine maps
    check(Case(67, 17, 24, 260, bidirectional=True, lengths=True, reset=True, dtype=BF16))


def test_a_narrow_state_keeps_infinities_and_nan(isa):
    """The products of pairs, too."""
    for value in (math.inf, -math.inf, math.nan):
        module, x = Case(8, 4, 6, 32, dtype=BF16).module(fusedrnn.LSTM), torch.zeros(8, 4, 6, dtype=BF16)
        x[3, 1, 2] = value
        with fusedrnn.use_backend("cpu"), torch.no_grad():
            y = module(x)[0]
        assert y[:, [0, 2, 3]].isfinite().all()
        assert y[:3].isfinite().all()
        assert bool(y[3:, 1].isnan().all()) == math.isnan(value)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_is_not_finite_is_that_where_nn_lstm_has_it(isa, odd_layer, bidirectional, assert_not_finite_as_nn_lstm):
    with fusedrnn.use_backend("cpu"):
        assert_not_finite_as_nn_lstm(*odd_layer, "cpu", bidirectional)


def test_same_bits_twice(isa):
    case = Case(30, 17, 24, 129, layers=2, bidirectional=True, lengths=True, reset=True)
    with fusedrnn.use_backend("cpu"):
        first, second = (testing.evaluate(testing.call, fusedrnn.LSTM, case) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ------------------------------------------------------------------------------------------------ every cell

OTHERS = ["gru", "rnn_tanh", "rnn_relu"]  # beside the LSTM, of which all else here is


def layer_weights(name, case):
    """Weights of one layer of a cell in torch's order, as torch draws them."""
    G, D = len(CELLS[name].gates), 2 if case.bidirectional else 1
    generator, bound = torch.Generator().manual_seed(case.seed), case.H**-0.5
    sizes = [(G * case.H, case.I), (G * case.H, case.H), *[(G * case.H,)] * (2 if case.bias else 0)] * D
    return [torch.empty(size).uniform_(-bound, bound, generator=generator).to(case.dtype) for size in sizes]


def inputs_of(case):
    """x, hx, lengths and reset of a case; of a packed one, the longest sequence first, x is a PackedSequence's rows."""
    x, hx, lengths, reset = case.inputs()
    if not case.packed:
        return x, hx, lengths, reset
    lengths, order = lengths.sort(descending=True)
    rows = torch.arange(case.T).unsqueeze(1) < lengths
    return x[:, order][rows], [s[:, order] for s in hx], lengths, None if reset is None else reset[:, order]


def evaluate_layer(backend, name, case, dtype=None, nudge=0):
    """As testing.evaluate, of one layer of a cell by a backend. What is packed are the rows of a PackedSequence."""
    x, hx, lengths, reset = inputs_of(case)
    signs = torch.Generator().manual_seed(nudge)

    def entering(values):
        values = values.detach().to(dtype or case.dtype, copy=True)
        if nudge:
            sign = torch.randint(0, 2, values.shape, generator=signs).mul_(2).sub_(1).to(values)
            values *= 1 + sign * testing.roundoff(case.dtype)
        return values

    leaves = {"x": x} | ({"h0": hx[0]} if case.hx else {}) | ({"c0": hx[1]} if case.hx and name == "lstm" else {})
    leaves |= {f"w{k}": weight for k, weight in enumerate(layer_weights(name, case))}
    leaves = {key: entering(leaf).requires_grad_() for key, leaf in leaves.items()}
    weights = [leaf for key, leaf in leaves.items() if key[0] == "w"]
    states = (leaves.get("h0"), leaves.get("c0"), lengths, reset)
    y, hn, cn, c = autograd.layer(
        backend, name, leaves["x"], weights, case.bidirectional, *states, name == "lstm" and case.states
    )
    outputs = {"y": y, "hn": hn} | ({"cn": cn} if name == "lstm" else {}) | ({"c": c} if c.numel() else {})
    if name != "lstm":
        assert cn.shape == (*hn.shape[:2], 0)
    random = torch.Generator().manual_seed(case.seed + 1)
    douts = [entering(torch.randn(out.shape, generator=random).to(case.dtype)) for out in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), douts)
    return {key: out.detach() for key, out in outputs.items()} | dict(
        zip(map("d{}".format, leaves), grads, strict=True)
    )


@cache
def layer_answers(name, case):
    """What the reference, in the dtype and in float64, holds a layer to."""
    measure = evaluate_layer("reference", name, case)
    exact, *nudged = (evaluate_layer("reference", name, case, F64, nudge) for nudge in range(4))
    return {
        key: (measure[key], exact[key], max(testing._error(other[key], exact[key]) for other in nudged))
        for key in exact
    }


def check_layer(name, case):
    with testing.poisoned():
        ours = evaluate_layer("cpu", name, case)
    expected = layer_answers(name, case)
    assert ours.keys() == expected.keys()
    for key, answer in expected.items():
        testing.assert_as_exact_as(f"{name} {case.id}: {key}", ours[key], *answer)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layers_float32(isa, name, size):
    check_layer(name, Case(*size))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "size", [(1, 3, 31, 30), (2, 17, 33, 129), (33, 1, 9, 129), (33, 3, 30, 64), (21, 25, 402, 98)]
)
def test_layers_of_other_dtypes(isa, name, size, dtype):
    check_layer(name, Case(*size, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 3, 7], ids=["one-step", "short", "packed-weights"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "options",
    [
        {"bidirectional": True},
        {"bias": False},
        {"hx": False},
        {"lengths": True, "bidirectional": True},
        {"reset": True, "bidirectional": True},
        {"lengths": True, "reset": True},
        {"packed": True, "bidirectional": True, "bias": False},
        {"packed": True, "reset": True, "bidirectional": True},
    ],
    ids="-".join,
)
def test_layer_options(isa, name, options, dtype, T):
    check_layer(name, Case(T, 5, 6, 37, dtype=dtype, **options))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("H", [1, 2, 3, 15, 16, 17, 31, 33, 47, 64, 65])
def test_layers_of_any_width(isa, name, H):
    """Of the maps of a row that is multiplied in pairs or tiles, a product takes some, wherever they begin and end."""
    check_layer(name, Case(6, 7, 5, H, dtype=BF16))
    check_layer(name, Case(6, 7, 5, H))


@pytest.mark.parametrize("count", [1, 2], ids=["one-thread", "two-threads"])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "case", [case for case in TILED if not case.proj_size and case.layers == 1], ids=lambda c: c.id
)
def test_layers_by_tiles(isa, threads, name, case, count):
    threads(count)
    check_layer(name, dataclasses.replace(case, dtype=BF16))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "case", [case for case in STEPS + FEW_ROWS[1:4] if not case.proj_size], ids=lambda case: case.id
)
def test_one_step_of_a_layer(isa, threads, name, case, dtype):
    threads(3)
    check_layer(name, dataclasses.replace(case, dtype=dtype))


# Units are shared between threads, or rows.
SHARED = [
    Case(40, 1, 16, 200),
    Case(40, 1, 16, 200, bidirectional=True, lengths=True, reset=True),
    Case(20, 3, 16, 512),
    Case(20, 4, 16, 400, bidirectional=True, packed=True, reset=True),
    Case(9, 1, 16, 512, bidirectional=True),
    Case(5, 3, 7, 110, bidirectional=True, lengths=True, reset=True),
    Case(40, 17, 24, 72, bidirectional=True, lengths=True, reset=True),
]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.id)
def test_layers_shared_by_threads(isa, threads, name, case):
    threads(2)
    check_layer(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.id)
def test_number_of_threads_does_not_change_a_bit_of_a_layer(isa, threads, name, case, dtype):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(evaluate_layer("cpu", name, dataclasses.replace(case, dtype=dtype)))
    for other in results[1:]:
        for key in other:
            assert torch.equal(results[0][key], other[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", [case for case in (*WHOLE, *PARTS) if not case.lengths], ids=lambda case: case.id)
def test_inference_of_a_layer_has_the_bits_of_training(isa, threads, name, case, dtype):
    """In parts that pass through a cache as well as projected in the launch."""
    threads(2)
    case = dataclasses.replace(case, dtype=dtype)
    training = evaluate_layer("cpu", name, case)
    with testing.poisoned(), torch.no_grad():
        x, hx, lengths, reset = inputs_of(case)
        weights = layer_weights(name, case)
        y, hn, *_ = autograd.layer("cpu", name, x, weights, case.bidirectional, hx[0], None, lengths, reset, False)
    assert torch.equal(y, training["y"])
    assert torch.equal(hn, training["hn"])


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("T", [1, 12])
def test_layers_in_one_call(isa, threads, name, T):
    """cpu_infer gives the bits of the layers one by one."""
    threads(2)
    first, second = Case(T, 3, 20, 40, bidirectional=True), Case(T, 3, 80, 40, bidirectional=True, seed=1)
    (x, hx, *_), (_, other, *_) = first.inputs(), second.inputs()
    layers = [layer_weights(name, case) for case in (first, second)]
    h0 = torch.cat([hx[0], other[0]])
    y, hn, cn = torch.ops.fusedrnn.cpu_infer(name, x, [w for layer in layers for w in layer], 2, True, h0, None)
    for k, weights in enumerate(layers):
        x, own, *_ = autograd.layer("cpu", name, x, weights, True, h0[2 * k : 2 * k + 2], None, None, None, False)
        assert torch.equal(own, hn[2 * k : 2 * k + 2])
    assert torch.equal(x, y)
    assert cn.shape == (4, 3, 0)


# Layers with few inputs, whose maps are computed in the launch. Of two workers each has rows enough for that: half of
# them, or, in the last one, which share hidden units, all. Maps that are computed before it take enough memory to be
# kept.
FUSED_INPUTS = [
    Case(20, 12, 24, 40),
    Case(20, 14, 33, 37, bias=False, hx=False),
    Case(4, 60, 1, 70, bidirectional=True),
    Case(12, 13, 17, 48, lengths=True, reset=True, bidirectional=True),
    Case(24, 26, 5, 33, packed=True, reset=True),
    Case(6, 7, 8, 140),
]
FUSED_CELLS = [
    *[("lstm", dtype) for dtype in (F32, F64, BF16, F16)],
    *[("gru", dtype) for dtype in (F32, BF16)],
    ("rnn_tanh", F64),
    ("lstm_peephole", F32),
]


@pytest.mark.usefixtures("as_new")
@pytest.mark.parametrize(
    ("name", "dtype", "case"),
    [
        pytest.param(name, dtype, case, id=f"{name}-{dtype}-{case.id}")
        for name, dtype in FUSED_CELLS
        for case in FUSED_INPUTS
        if case.B != 7 or name == "lstm"
    ],
)
def test_the_input_projection_in_the_launch(isa, threads, name, case, dtype):
    """It gives the bits of the one before the launch: that of the same layer with more inputs, which are zeros."""
    threads(2)
    D = 2 if case.bidirectional else 1
    case = dataclasses.replace(case, dtype=dtype)
    x, hx, lengths, reset = inputs_of(case)
    h0, c0 = (hx[0], hx[1] if name.startswith("lstm") else None) if hx else (None, None)
    weights = layer_weights("lstm" if name.startswith("lstm") else name, case)
    if name == "lstm_peephole":
        of_direction = len(weights) // D
        peepholes = torch.linspace(-1, 1, 3 * case.H).to(dtype)
        weights = [w for d in range(D) for w in (*weights[d * of_direction : (d + 1) * of_direction], peepholes)]

    def run(x, weights):
        keep(0)
        keep(128 * MIB)
        with testing.poisoned():
            y = autograd.layer("cpu", name, x, weights, D == 2, h0, c0, lengths, reset, False)
        autograd.layer("cpu", name, x, weights, D == 2, h0, c0, lengths, reset, False)
        return y[:3], memory()

    def wider(numbers):
        return torch.cat([numbers, numbers.new_zeros(*numbers.shape[:-1], MANY_INPUTS - case.I)], -1)

    ours, bytes_of_ours = run(x, weights)
    widened = [wider(w) if w.dim() == 2 and w.size(1) == case.I != case.H else w for w in weights]
    theirs, bytes_of_theirs = run(wider(x), widened)
    for own, other in zip(ours, theirs, strict=True):
        assert torch.equal(own, other)
    if dtype in (F32, F64):  # other dtypes keep memory of x as well
        assert bytes_of_ours == 0 < bytes_of_theirs


# Stacks of layers that are computed at the same time: name, T, B, I, H, P, layers.
STACKS = [
    ("lstm", 100, 1, 24, 40, 40, 2),
    ("lstm", 61, 1, 64, 64, 64, 3),
    ("lstm", 90, 4, 7, 64, 64, 2),
    ("lstm", 100, 2, 16, 48, 20, 5),
    ("gru", 130, 1, 30, 40, 40, 2),
    ("rnn_tanh", 400, 3, 64, 64, 64, 2),
]


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_layers_at_the_same_time(isa, threads, stack, dtype):
    """They give the bits of layer after layer, as with one thread; and so do stacks that are not computed so."""
    name, T, B, I, H, P, layers = stack
    torch.manual_seed(0)
    kind = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU, "rnn_tanh": fusedrnn.RNN}[name]
    module = kind(I, H, layers, dtype=dtype, **({} if P == H else {"proj_size": P}))
    x, h0 = torch.randn(T, B, I, dtype=dtype), torch.randn(layers, B, P, dtype=dtype)
    hx = (h0, torch.randn(layers, B, H, dtype=dtype)) if name == "lstm" else h0
    threads(2)
    plan = torch.ops.fusedrnn.cpu_plan(name, T, B, I, H, P, 1, dtype, layers)
    # In bfloat16 if the output is what products take: pairs of numbers or, for tiles, 16 pairs.
    whole = {"amx": 32, "amx_emulated": 32, "avx512_bf16": 2}
    expected = dtype != BF16 or (isa in whole and P % whole[isa] == 0)
    assert ("layers at the same time" in plan) == expected
    with torch.no_grad(), fusedrnn.use_backend("cpu"), testing.poisoned():
        threads(1)
        y, states = module(x, hx)
        for count in (2, 3, 4) * 4:
            threads(count)
            own, others = module(x, hx)
            assert torch.equal(y, own)
            assert all(map(torch.equal, states, others))


def test_stacks_that_are_computed_layer_after_layer(threads):
    """Of one layer, of both directions, with few steps, one thread, or steps that are long without that."""

    def plan(T=100, B=1, H=40, D=1, layers=2):
        return torch.ops.fusedrnn.cpu_plan("lstm", T, B, H, H, H, D, F32, layers)

    threads(2)
    assert "layers at the same time, each by a thread" in plan()
    for change in ({"layers": 1}, {"D": 2}, {"T": 12}, {"H": 128}, {"B": 64}, {"B": 4, "H": 512}):
        assert "layers" not in plan(**change), change
    threads(1)
    assert "layers" not in plan()


def test_layers_at_the_same_time_if_the_weights_of_one_fit_a_cache(threads):
    threads(2)
    inputs = max(512 << 10, l2_bytes() // 2) // (4 * 256) - 64  # of float32, beside a state of 64
    for wider, dtype, fits in ((0, F32, True), (1, F32, False), (0, F64, False)):
        plan = torch.ops.fusedrnn.cpu_plan("lstm", 100, 4, inputs + wider, 64, 64, 1, dtype, 2)
        assert ("layers" in plan) == fits


def test_explain_tells_of_layers_at_the_same_time(threads):
    """Not in training, and not of float16, whose layers take another one's output in float32."""
    threads(2)
    stack, x = fusedrnn.LSTM(40, 40, num_layers=2), torch.randn(100, 1, 40)

    def tells(*arguments, **options):
        with fusedrnn.use_backend("cpu"):
            return "layers at the same time" in fusedrnn.explain(stack, *arguments, **options).plan

    assert not tells(x)  # of parameters that require a gradient
    with torch.no_grad():
        assert tells(x)
        assert not tells(x, lengths=torch.tensor([50]))
        stack.half()
        assert not tells(x.half())
        stack.bfloat16()
        plan = torch.ops.fusedrnn.cpu_plan("lstm", 100, 1, 40, 40, 40, 1, BF16, 2)
        assert tells(x.bfloat16()) == ("layers at the same time" in plan)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_finite_stays_in_its_sequence(isa, name):
    for value, dtype in itertools.product((math.inf, -math.inf, math.nan), (F32, BF16)):
        case = Case(8, 4, 6, 32, dtype=dtype, hx=False)
        x = torch.zeros(8, 4, 6, dtype=dtype)
        x[3, 1, 2] = value
        y = autograd.layer("cpu", name, x, layer_weights(name, case), False, None, None, None, None, False)[0]
        expected = autograd.layer("reference", name, x, layer_weights(name, case), False, *[None] * 4, False)[0]
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "change",
    [
        {"c0": torch.ones(1, 2, 4)},
        {"c0": torch.ones(1, 2, 0)},
        {"h0": torch.ones(1, 2, 5)},
        {"projection": torch.ones(3, 4)},
        {"w_hh": torch.ones(16, 4)},
        {"w_hh": torch.ones(12, 3)},
    ],
    ids="-".join,
)
def test_operator_refuses_what_a_cell_has_not(name, change):
    w_ih, w_hh, *_ = layer_weights(name, Case(3, 2, 5, 4))
    given = {"h0": None, "c0": None, "w_hh": w_hh, **change}
    weights = [w_ih, given["w_hh"], *([given["projection"]] if "projection" in change else [])]
    states = (given["h0"], given["c0"])
    with pytest.raises(RuntimeError):
        torch.ops.fusedrnn.cpu_forward(name, torch.ones(3, 2, 5), weights, False, *states, None, None, False, True)


def test_operator_names_a_cell_that_it_does_not_know():
    with pytest.raises(RuntimeError, match="the cpu backend has no kernel for the cell peephole"):
        torch.ops.fusedrnn.cpu_plan("peephole", 1, 1, 1, 1, 1, 1, F32)


def units_in_the_last_place(values, exact):
    """|values - exact| in units of the spacing of `values`' dtype at the exact value."""
    spacing = exact.to(values.dtype).abs()
    spacing = torch.nextafter(spacing, torch.full_like(spacing, math.inf)) - spacing
    return (values.double() - exact).abs() / spacing.double()


def activations(values):
    """sigmoid and tanh of [N] as the kernel computes them: the gates of a step whose only input is its bias."""
    given, N = len(values), len(values) | 1  # of an odd number of units they are reserved gate after gate
    values = torch.cat([values, values.new_zeros(N - given)])
    weights = [values.new_zeros(4 * N, 1), values.new_zeros(4 * N, 1), values.repeat(4), values.new_zeros(4 * N)]
    weights.append(values.new_zeros(1, N))
    x = values.new_zeros(1, 1, 1)
    gates = torch.ops.fusedrnn.cpu_forward("lstm", x, weights, False, None, None, None, None, True, True)[4].view(4, N)
    torch.testing.assert_close(gates[[1, 3]], gates[[0, 0]], rtol=0, atol=0, equal_nan=True)
    return gates[0, :given], gates[2, :given]


def test_activations_float32(isa):
    every = torch.arange(0, 1 << 32, 4093, dtype=torch.int64)  # bit patterns over the whole range, NaNs among them
    values = (every - (1 << 31)).to(torch.int32).view(torch.float32)
    values = values[values.isfinite()]
    sigmoid, tanh = activations(values)
    exact_sigmoid, exact_tanh = values.double().sigmoid(), values.double().tanh()
    assert units_in_the_last_place(tanh, exact_tanh).max() <= 2.5
    normal = values > -87
    assert units_in_the_last_place(sigmoid[normal], exact_sigmoid[normal]).max() <= 2
    assert (sigmoid.double() - exact_sigmoid)[~normal].abs().max() <= torch.finfo(torch.float32).tiny


def test_activations_float64(isa):
    import mpmath

    generator = torch.Generator().manual_seed(0)
    magnitude = torch.logspace(-300, 2.8, 1500, dtype=torch.float64)
    values = torch.cat([magnitude, -magnitude, 40 * torch.rand(3000, generator=generator, dtype=torch.float64) - 20])
    sigmoid, tanh = activations(values)
    with mpmath.workprec(200):
        numbers = [mpmath.mpf(value) for value in values.tolist()]
        ulp = [mpmath.mpf(math.ulp(float(mpmath.tanh(x)))) for x in numbers]
        worst_tanh = max(abs(t - mpmath.tanh(x)) / u for t, x, u in zip(tanh.tolist(), numbers, ulp, strict=True))
        exact = [1 / (1 + mpmath.exp(-x)) for x in numbers]
        worst_sigmoid = max(
            abs(s - e) / mpmath.mpf(math.ulp(float(e)))
            for s, e, x in zip(sigmoid.tolist(), exact, numbers, strict=True)
            if x > -708
        )
    assert worst_tanh <= 2.5
    assert worst_sigmoid <= 2


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_activations_at_the_edges(isa, dtype):
    edges = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype)
    sigmoid, tanh = activations(edges)
    assert sigmoid[0].isnan()
    assert tanh[0].isnan()
    assert sigmoid[1:].tolist() == [1.0, 0.0, 0.5, 0.5]
    assert tanh[1:].tolist() == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_narrow_numbers_are_stored_as_torch_stores_them(isa, dtype):
    """Every 16-bit number is read exactly, and float32 is rounded to nearest even: hn of a length 0 copies h0."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    H = len(numbers)
    x, lengths = torch.zeros(2, 1, 1, dtype=dtype), torch.tensor([0])
    weights = [torch.zeros(4 * H, 1, dtype=dtype), torch.zeros(4 * H, 1, dtype=dtype), torch.zeros(1, H, dtype=dtype)]
    h0, c0 = torch.zeros(1, 1, 1, dtype=dtype), numbers.view(1, 1, H)
    cn = torch.ops.fusedrnn.cpu_forward("lstm", x, weights, False, h0, c0, lengths, None, False, False)[2].view(H)
    assert torch.equal(cn.isnan(), numbers.isnan())
    finite = ~numbers.isnan()
    assert torch.equal(cn[finite].view(torch.int16), numbers[finite].view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounding_is_to_nearest_even(isa, dtype):
    """c_1 = f c_0 with f = sigmoid(c) a float32: stored as torch stores the same product."""
    generator = torch.Generator().manual_seed(0)
    H = 4096
    c0 = torch.randn(H, generator=generator).mul(2.0 ** torch.randint(-24, 15, (H,), generator=generator)).to(dtype)
    weights = [torch.zeros(4 * H, 1, dtype=dtype), torch.zeros(4 * H, 1, dtype=dtype), torch.zeros(1, H, dtype=dtype)]
    x = torch.zeros(1, 1, 1, dtype=dtype)
    cn = torch.ops.fusedrnn.cpu_forward(
        "lstm", x, weights, False, torch.zeros(1, 1, 1, dtype=dtype), c0.view(1, 1, H), None, None, False, False
    )[2]
    assert torch.equal(cn.view(H), (c0.float() * 0.5).to(dtype))  # all gates are sigmoid(0) = 1/2, g is 0


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


ONE_LAYER = """
import torch, fusedrnn
torch.manual_seed(0)
torch.set_num_threads(2)
lstm, x = fusedrnn.LSTM(16, 200), torch.randn(40, 1, 16, requires_grad=True)
def run():
    with fusedrnn.use_backend("cpu"):
        y, _ = lstm(x)
        return float(y.double().sum()), float(torch.autograd.grad(y.sum(), x)[0].double().sum())
"""


def test_workers_that_cannot_run_at_the_same_time():
    """With one OpenMP thread for two workers, the second starts when the first has finished."""
    together = run_python(ONE_LAYER + "print(run())")
    apart = run_python(ONE_LAYER + "print(run())", OMP_THREAD_LIMIT="1")
    assert together.returncode == 0, together.stderr
    assert apart.returncode == 0, apart.stderr
    assert together.stdout == apart.stdout != ""


def test_layers_that_cannot_be_computed_at_the_same_time():
    """With one OpenMP thread the worker of the first layer computes all of them."""
    code = """
import torch, fusedrnn
torch.manual_seed(0)
torch.set_num_threads(2)
stack, x = fusedrnn.LSTM(16, 40, num_layers=3), torch.randn(100, 1, 16)
assert "at the same time" in torch.ops.fusedrnn.cpu_plan("lstm", 100, 1, 16, 40, 40, 1, torch.float32, 3)
with torch.no_grad(), fusedrnn.use_backend("cpu"):
    print(float(stack(x)[0].double().sum()))
"""
    together, apart = run_python(code), run_python(code, OMP_THREAD_LIMIT="1")
    assert together.returncode == 0, together.stderr
    assert apart.returncode == 0, apart.stderr
    assert together.stdout == apart.stdout != ""


def test_after_fork():
    """A child of a process that has used its threads, with one thread, the way DataLoader sets its workers up."""
    code = (
        ONE_LAYER
        + """
import os
before = run()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    os._exit(0 if run()[0] == before[0] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert run() == before
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


FORKS = """
import os, signal, sys, threading, time, torch, fusedrnn
torch.set_num_threads(1)
module, x = fusedrnn.LSTM(64, 64), torch.randn(40, 8, 64)

def forward(module):
    y = module(x)[0]
    with torch.no_grad():
        module(x)
    return y

def run(module):
    forward(module).sum().backward()

def work():
    own = fusedrnn.LSTM(64, 64)
    while True:
        run(own)
        with torch.no_grad():
            own.weight_hh_l0.mul_(0.999)  # other panels are kept at the next call

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
end = time.time() + 6
for k in range(300):
    if time.time() > end:
        break
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # ends a child that waits for ever
        torch.set_num_threads(1)
        forward(module)  # no backward: torch's engine has locks of its own, which a fork may leave held
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, f"child {k} waits for ever"
print(k, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(
    "FUSEDRNN_EXPECT_SANITIZED" in os.environ,
    reason="AddressSanitizer of GCC 12 has locks of its own that a fork may leave held",
)
def test_fork_while_other_threads_compute():
    """A child has none of the other threads, and what they were in the middle of is whole all the same."""
    result = run_python(FORKS)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 3


def test_instruction_set_by_environment():
    code = "import torch, fusedrnn; print(torch.ops.fusedrnn.cpu_isa(None))"
    assert run_python(code, FUSEDRNN_CPU_ISA="portable").stdout.strip() == "portable"
    unknown = run_python(code, FUSEDRNN_CPU_ISA="sse9")
    assert unknown.returncode != 0
    assert "portable" in unknown.stderr


@pytest.mark.skipif("FUSEDRNN_EXPECT_SANITIZED" not in os.environ, reason="not a run of `make sanitize`")
def test_the_sanitized_library_is_the_one_that_is_tested():
    assert any(flag.startswith("-fsanitize=") for flag in ops.build_info()["flags"])
    assert "sanitize" in ops.__file__


def arguments(T=3, B=2, I=5, H=4):
    weights = [torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H)]
    return {"x": torch.randn(T, B, I), "weights": weights, "h0": torch.randn(1, B, H), "c0": torch.randn(1, B, H)}


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.ones(3, 2, 6)},
        {"x": torch.ones(3, 2)},
        {"x": torch.ones(0, 2, 5)},
        {"x": torch.ones(3, 2, 5).double()},
        {"x": torch.ones(3, 2, 5, dtype=torch.int32)},
        {"h0": torch.ones(1, 3, 4)},
        {"c0": torch.ones(1, 2, 5)},
        {"c0": torch.ones(1, 2, 4).double()},
        {"weights": arguments()["weights"][:1]},
        {"weights": [*arguments()["weights"][:3], torch.ones(3)]},
        {"lengths": torch.tensor([1])},
        {"lengths": torch.tensor([1.0, 2.0])},
        {"reset": torch.zeros(2, 2, dtype=torch.bool)},
        {"reset": torch.zeros(3, 2)},
    ],
    ids="-".join,
)
def test_operator_refuses_what_it_would_read_out_of_bounds(change):
    given = {"lengths": None, "reset": None, **arguments(), **change}
    with pytest.raises(RuntimeError):
        torch.ops.fusedrnn.cpu_forward(
            "lstm",
            given["x"],
            given["weights"],
            False,
            given["h0"],
            given["c0"],
            given["lengths"],
            given["reset"],
            True,
            True,
        )


@pytest.mark.parametrize(
    ("lengths", "change"),
    [
        ([2, 2], {}),
        ([3, 3], {}),
        ([2, 3], {}),
        ([6, -1], {}),
        ([2**62, 2**62], {}),
        ([], {}),
        ([[3, 2]], {}),
        ([3.0, 2.0], {}),
        ([0, 0], {"x": torch.ones(0, 5)}),
        ([3, 2], {"h0": torch.ones(1, 3, 4)}),
        ([3, 2], {"reset": torch.zeros(2, 2, dtype=torch.bool)}),
        ([3, 2], {"x": torch.ones(5)}),
    ],
    ids=str,
)
def test_operator_refuses_lengths_that_do_not_fit_packed_rows(lengths, change):
    given = {"reset": None, **arguments(), "x": torch.ones(5, 5), **change}
    with pytest.raises(RuntimeError):
        torch.ops.fusedrnn.cpu_forward(
            "lstm",
            given["x"],
            given["weights"],
            False,
            given["h0"],
            given["c0"],
            torch.tensor(lengths),
            given["reset"],
            True,
            True,
        )


@pytest.mark.parametrize(("T", "B"), [(1, 3), (6, 1), (40, 1), (6, 4)])
def test_packed_rows_of_one_length_are_padded_ones(isa, threads, T, B):
    """Rows that lie as padded ones give the same bits; nobody calls the operator so."""
    threads(2)
    given, lengths = arguments(T, B, H=200), torch.full((B,), T)
    results = []
    for x in (given["x"], given["x"].flatten(0, 1)):
        with testing.poisoned():
            forward, weights = (x, False, given["h0"], given["c0"], lengths, None), given["weights"]
            y, hn, cn, c, reserve = ops.forward_op("cpu")("lstm", *forward, True, True, *weights)
            backward = ops.backward_op("cpu")("lstm", y, hn, cn, c, *forward, y, c, reserve, [True] * 7, *weights)
        results.append([t.flatten() for t in (y, hn, cn, c, reserve, *backward[:7])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_clamps_lengths():
    """The functional form refuses such lengths where it can see them; the kernel stays in bounds where it cannot."""
    given = arguments()
    run = torch.ops.fusedrnn.cpu_forward
    wild, tame = (
        run("lstm", given["x"], given["weights"], False, given["h0"], given["c0"], torch.tensor(n), None, True, True)
        for n in ([-5, 99], [0, 3])
    )
    for a, b in zip(wild, tame, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ kept weights


@pytest.fixture
def as_new():
    """Nothing is kept yet."""
    keep(0)
    assert keep(128 * MIB) == (128 * MIB, 0, 0)
    yield
    keep(128 * MIB)


def kept():
    return keep()[1]


def memory():
    return keep()[2]


def infer(module, x, **options):
    with torch.no_grad():
        return module(x, **options)


def infer_anew(module, x, **options):
    """The same with weights packed for this call."""
    with testing.nothing_kept():
        return infer(module, x, **options)


def assert_same(ours, theirs):
    (y, (h, c)), (other_y, (other_h, other_c)) = ours, theirs
    assert torch.equal(y, other_y)
    assert torch.equal(h, other_h)
    assert torch.equal(c, other_c)


def panel_bytes(module):
    """What a layer of whole panels takes: every matrix once."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters() if weight.dim() == 2)


@pytest.mark.usefixtures("as_new")
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 3, "bias": False}])
def test_every_number_that_changes_is_seen(isa, dtype, options):
    torch.manual_seed(0)
    module = fusedrnn.LSTM(6, 5, dtype=dtype, **options)
    x = torch.randn(9, 2, 6, dtype=dtype)
    matrices = [weight for weight in module.parameters() if weight.dim() == 2]
    before = infer(module, x)
    assert kept() > 0
    for weight in matrices:
        numbers = weight.data.view(-1)
        for k in range(0, len(numbers), 1 + len(numbers) // 40):
            old = numbers[k].item()
            numbers[k] = old + 4
            changed = infer(module, x)
            assert not torch.equal(changed[0], before[0])
            assert_same(changed, infer_anew(module, x))
            infer(module, x)
            numbers[k] = old
            assert_same(infer(module, x), before)


@pytest.mark.usefixtures("as_new")
@pytest.mark.parametrize("H", [16, 61, 200])
def test_the_least_change_anywhere_is_seen(isa, H):
    """One bit of one number, and two numbers that change places: of memory that is more than one piece and not even."""
    torch.manual_seed(0)
    module = fusedrnn.LSTM(H, H)
    x = torch.randn(20, 1, H) * 3
    bits = module.weight_hh_l0.data.view(-1).view(torch.int32)
    before = infer(module, x)
    # Neighbours, and numbers that a vector, several of them, or a row lie between.
    for near, k in itertools.product((1, 4, 8, 16, 32, 64, 128, H), [0, *torch.randint(len(bits), (4,)).tolist()]):
        far = (k + near) % len(bits)
        old = bits.clone()
        bits[k] ^= 1 << 22
        changed = infer(module, x)
        assert not torch.equal(changed[0], before[0])
        assert_same(changed, infer_anew(module, x))
        bits.copy_(old)
        infer(module, x)
        bits[k], bits[far] = old[far], old[k]
        swapped = infer(module, x)
        assert not torch.equal(swapped[0], before[0])
        assert_same(swapped, infer_anew(module, x))
        bits.copy_(old)
        assert_same(infer(module, x), before)


@pytest.mark.usefixtures("as_new")
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.weight_hh_l0.data.mul_(0.5),
        lambda module: module.weight_hh_l0.detach().numpy().fill(0.01),
        lambda module: module.weight_ih_l0.detach().zero_(),
        lambda module: module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}),
        lambda module: setattr(module, "weight_hh_l0", torch.nn.Parameter(module.weight_hh_l0 * 3)),
        lambda module: torch.optim.SGD(module.parameters(), lr=1e-2, weight_decay=10).step(),
    ],
    ids=["data", "numpy", "detach", "load_state_dict", "a new parameter", "optimizer"],
)
def test_whatever_changes_the_weights_is_seen(change):
    module, x = fusedrnn.LSTM(32, 32), torch.randn(30, 1, 32)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = infer(module, x)
    with torch.no_grad():
        change(module)
    after = infer(module, x)
    assert not torch.equal(after[0], before[0])
    assert_same(after, infer_anew(module, x))


@pytest.mark.usefixtures("as_new")
def test_other_weights_at_the_same_address():
    """Memory that is freed and given to another layer: of another size, dtype or order of its matrices."""
    x = torch.randn(20, 1, 32)
    for _ in range(30):
        for sizes, options in (((32, 32), {}), ((32, 16), {}), ((32, 32), {"bidirectional": True})):
            module = fusedrnn.LSTM(*sizes, **options)
            assert_same(infer(module, x), infer_anew(module, x))
            infer(module, x)
            del module


@pytest.mark.usefixtures("as_new")
def test_an_instruction_set_has_its_own(threads):
    best = torch.ops.fusedrnn.cpu_isa(None)
    module, x = fusedrnn.LSTM(40, 40), torch.randn(20, 1, 40)
    expected = infer(module, x)
    torch.ops.fusedrnn.cpu_isa("portable")
    try:
        infer(module, x)
        portable = infer_anew(module, x)
        assert_same(infer(module, x), portable)
    finally:
        torch.ops.fusedrnn.cpu_isa(best)
    assert_same(infer(module, x), expected)


@pytest.mark.usefixtures("as_new")
def test_what_is_kept_and_what_is_not():
    module, x = fusedrnn.LSTM(64, 64), torch.randn(20, 2, 64)
    infer(module, x[:1])  # a step, whose weights are not packed
    infer(module, x[:8])  # as short
    assert kept() == 0
    module(x)  # training
    assert kept() == 0
    infer(module, x)
    infer(module, x)
    assert kept() == panel_bytes(module)
    infer(module, x, lengths=torch.tensor([20, 3]))  # another way to the same kernel
    assert kept() == panel_bytes(module)
    deep = fusedrnn.LSTM(64, 64, 3, bidirectional=True)
    infer(deep, x)
    assert kept() == panel_bytes(module) + panel_bytes(deep)


@pytest.mark.usefixtures("as_new")
def test_the_limit():
    x = torch.randn(20, 1, 64)
    modules = [fusedrnn.LSTM(64, 64) for _ in range(4)]
    size = panel_bytes(modules[0])
    keep(3 * size + 1)
    expected = [infer_anew(module, x) for module in modules]
    for order in itertools.permutations(range(4)):
        for k in order:
            assert_same(infer(modules[k], x), expected[k])
            assert kept() <= 3 * size
    assert kept() == 3 * size
    assert keep(2 * size)[1] == 2 * size
    assert keep(size - 1)[1] == 0
    assert_same(infer(modules[0], x), expected[0])
    assert kept() == 0  # too large a layer for the limit
    with pytest.raises(RuntimeError, match="limit must be 0 or more bytes, got -1"):
        keep(-1)


@pytest.mark.slow
@pytest.mark.usefixtures("as_new")
def test_the_limit_by_environment():
    code = """
import torch, fusedrnn
with torch.no_grad():
    fusedrnn.LSTM(64, 64)(torch.randn(20, 1, 64))
print(torch.ops.fusedrnn.cpu_keep()[1])
"""
    assert run_python(code).stdout.strip() == str(2 * 256 * 64 * 4)
    assert run_python(code, FUSEDRNN_CPU_KEEP_MIB="0").stdout.strip() == "0"
    for wrong in ("-1", "1.5"):
        result = run_python(code, FUSEDRNN_CPU_KEEP_MIB=wrong)
        assert result.returncode != 0
        assert f"FUSEDRNN_CPU_KEEP_MIB must be a whole number from 0, got '{wrong}'" in result.stderr


@pytest.mark.usefixtures("as_new")
@pytest.mark.parametrize("times", [1, 20])
def test_weights_that_change_while_they_are_packed(times):
    """Swapped for others and back by another thread: what is kept of a call in between is wrong for nobody else."""
    module, x = fusedrnn.LSTM(64, 512).requires_grad_(False), torch.randn(20, 1, 64)
    right = {name: weight.clone() for name, weight in module.state_dict().items()}
    other = {name: weight * 0.5 + 0.01 for name, weight in right.items()}
    expected = infer_anew(module, x)
    for k in range(15):
        module.load_state_dict(other)
        infer(module, x)
        module.load_state_dict(right)
        begin = threading.Event()

        def swap(pause=k % 10 * 2e-4, begin=begin):
            begin.wait()
            time.sleep(pause)
            for _ in range(times):
                module.load_state_dict(other)
                module.load_state_dict(right)

        swapping = threading.Thread(target=swap)
        swapping.start()
        begin.set()
        while swapping.is_alive():
            infer(module, x)
        swapping.join()
        assert_same(infer(module, x), expected)
        module.load_state_dict(other)
        assert_same(infer(module, x), infer_anew(module, x))
        module.load_state_dict(right)


@pytest.mark.usefixtures("as_new")
def test_many_threads():
    """Each with weights of its own that change, and one layer for all; while the limit moves."""
    torch.manual_seed(0)
    x, shared = torch.randn(20, 1, 48), fusedrnn.LSTM(48, 48)
    expected, wrong = infer_anew(shared, x), []

    def work(seed):
        module = fusedrnn.LSTM(48, 48)
        for k in range(60):
            with torch.no_grad():
                module.weight_hh_l0.data.mul_(0.99)
                now, again = module(x), module(x)
            if not torch.equal(now[0], again[0]) or not torch.equal(infer(shared, x)[0], expected[0]):
                wrong.append((seed, k))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for limit in (0, 30_000, 100_000, 128 * MIB):
            keep(limit)
    for worker in workers:
        worker.join()
    assert wrong == []


# ------------------------------------------------------------------------------------------------ kept memory


def everything(module, x):
    """Results and gradients of training."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y, (h, c) = module(x)
    (y.sin().sum() + h.sum() + (c * c).sum()).backward()
    return [y, h, c, x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.usefixtures("as_new")
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 40, "num_layers": 2}])
def test_what_was_left_in_memory_is_not_seen(isa, dtype, options):
    """Memory full of NaN from a call before it, of the same sizes and of others."""
    torch.manual_seed(0)
    module = fusedrnn.LSTM(70, 90, dtype=dtype, **options)
    for T, B in ((40, 3), (30, 8), (41, 3), (12, 2), (40, 3)):
        x = torch.randn(T, B, 70, dtype=dtype)
        keep(0)
        expected = everything(module, x)
        assert keep(128 * MIB) == (128 * MIB, 0, 0)
        everything(module, x * math.nan)
        module.zero_grad()
        assert memory() > 0
        for ours, theirs in zip(everything(module, x), expected, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.isfinite(infer(module, x)[0]).all()


@pytest.mark.usefixtures("as_new")
def test_memory_is_used_again_within_the_limit(threads):
    threads(1)  # of more, each takes its own, unless another has given back by then what it took
    module, x = fusedrnn.LSTM(128, 128), torch.randn(100, 4, 128)
    everything(module, x)
    everything(module, x)  # whose gradients are where some of the first ones' was worked in
    size = memory()
    assert size >= 4 * (100 * 4 * 4 * 128)  # what leads to it: the gradients of all gates
    for T in (100, 90, 100, 95):
        everything(module, x[:T])
        assert memory() == size
    threads(2)
    for T in (100, 90, 95) * 5:
        everything(module, x[:T])
        assert size <= memory() <= 2 * size
    for limit in (size // 2, size // 3, 0):
        assert keep(limit)[2] <= limit
        everything(module, x)
        assert memory() <= limit
    keep(128 * MIB)
    everything(fusedrnn.LSTM(8, 8), torch.randn(5, 1, 8))  # little is left to the allocator
    assert memory() == 0


pools = pytest.mark.skipif(
    torch.__version__.startswith("2.10."), reason="torch 2.10 does not tell when a tensor is let go of"
)


@pools
@pytest.mark.usefixtures("as_new")
def test_gradients_that_are_let_go_of_are_used_again(threads):
    threads(1)
    module, x = fusedrnn.LSTM(128, 128), torch.randn(30, 4, 128)
    everything(module, x)
    first = module.weight_hh_l0.grad
    where, view = first.data_ptr(), first[7:9]
    before = view.clone()
    first = None
    for _ in range(3):  # a view holds it
        everything(module, 2 * x)
        assert module.weight_hh_l0.grad.data_ptr() != where
        assert torch.equal(view, before)
    module.zero_grad()
    size = memory()
    view = None
    assert memory() == size + 4 * (4 * 128 * 128)
    taken = set()
    for _ in range(4):
        everything(module, x)
        taken |= {module.weight_hh_l0.grad.data_ptr(), module.weight_ih_l0.grad.data_ptr()}
    assert where in taken
    assert len(taken) <= 4  # and no new ones at every call


@pools
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 40}])
def test_gradients_in_memory_of_the_pool_are_like_others(dtype, options, tmp_path):
    module = fusedrnn.LSTM(150, 150, dtype=dtype, **options)
    *_, dx, dw_ih, dw_hh = everything(module, torch.randn(150, 4, 150, dtype=dtype))[:6]
    for gradient in (dx, dw_ih, dw_hh):
        assert gradient.device == torch.device("cpu")
        assert gradient.dtype == dtype
        assert gradient.is_contiguous()
        assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
        expected = gradient.clone()
        torch.save(gradient, tmp_path / "gradient.pt")
        for same in (torch.load(tmp_path / "gradient.pt"), copy.deepcopy(gradient), gradient.share_memory_()):
            assert torch.equal(same, expected)


def test_memory_of_results_is_torchs_own():
    """Whoever wants to may resize them."""
    y, (h, c) = fusedrnn.LSTM(128, 128)(torch.randn(60, 40, 128))
    for result in (y, h, c):
        assert result.untyped_storage().resizable()


@pytest.mark.usefixtures("as_new")
def test_what_was_kept_in_inference_mode_serves_training_as_well():
    module, x = fusedrnn.LSTM(MANY_INPUTS, 128), torch.randn(60, 4, MANY_INPUTS)
    expected = [tensor.clone() for tensor in everything(module, x)]
    keep(0)
    keep(128 * MIB)
    with torch.inference_mode():
        module(x)
        module(torch.randn(120, 4, MANY_INPUTS))
    assert kept() > 0
    assert memory() > 0
    for ours, theirs in zip(everything(module, x), expected, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.is_inference()


@pytest.mark.usefixtures("as_new")
def test_memory_of_many_threads():
    torch.manual_seed(0)
    modules = [fusedrnn.LSTM(64, H) for H in (64, 64, 80, 96)]
    inputs = [torch.randn(T, 4, 64) for T in (20, 24, 28, 32)]
    expected = [everything(module, x) for module, x in zip(modules, inputs, strict=True)]
    expected = [[tensor.clone() for tensor in tensors] for tensors in expected]
    wrong = []

    def work(k):
        for _ in range(25):
            ours = everything(modules[k], inputs[k])
            if not all(torch.equal(a, b) for a, b in zip(ours, expected[k], strict=True)):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(modules))]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for limit in (0, 200_000, 128 * MIB):
            keep(limit)
    for worker in workers:
        worker.join()
    assert wrong == []


def threefry(seed, counter, stream):
    """Threefry-2x32 with 20 rounds, by its paper (masks.h)."""
    key = [seed % 2**32, seed >> 32]
    key.append(key[0] ^ key[1] ^ 0x1BD11BDA)
    first, second = (counter + key[0]) % 2**32, (stream + key[1]) % 2**32
    for round, left in enumerate([13, 15, 26, 6, 17, 29, 16, 24, 13, 15, 26, 6, 17, 29, 16, 24, 13, 15, 26, 6], 1):
        first = (first + second) % 2**32
        second = (second << left | second >> (32 - left)) % 2**32 ^ first
        if round % 4 == 0:
            first = (first + key[round // 4 % 3]) % 2**32
            second = (second + key[(round // 4 + 1) % 3] + round // 4) % 2**32
    return first, second


def bits_of_a_mask(seed, numbers, stream):
    bits = []
    for block in range(-(-numbers // 64)):
        words = [threefry(seed, 16 * block + k, stream) for k in range(16)]
        words = [pair[0] for pair in words] + [pair[1] for pair in words]
        bits += [word % 2**16 for word in words] + [word >> 16 for word in words]
    return torch.tensor(bits[:numbers])


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("numbers", [0, 1, 63, 64, 200])
def test_masks_are_the_bits_of_threefry(isa, numbers, float64):
    assert threefry(0, 0, 0) == (0x6B200159, 0x99BA4EFE)  # the known answer of its authors
    seed, p, values = 0x0123456789ABCDEF, [0.3, 1.0, 0.0, 0.75], [1.0, 1.0, 1.0, 1 / 0.75]
    masks = ops.cpu_masks(torch.tensor([seed]), numbers, p, values, float64)
    dtype = torch.float64 if float64 else torch.float32
    for k, mask in enumerate(masks):
        ones = bits_of_a_mask(seed, numbers, k) < round(p[k] * 2**16)
        torch.testing.assert_close(mask, ones.to(dtype) * torch.tensor(values[k], dtype=dtype), rtol=0, atol=0)


def test_masks_do_not_depend_on_the_threads(threads):
    arguments = torch.tensor([-5]), 100_003, [0.3, 0.4, 0.5], [1.0, 1.0, 2.0], False
    masks = ops.cpu_masks(*arguments)
    threads(1)
    assert torch.equal(masks, ops.cpu_masks(*arguments))


def test_masks_of_wrong_arguments():
    seed = torch.tensor([1])
    for arguments, message in (
        ((seed.float(), 3, [0.1], [1.0], False), "int64"),
        ((seed, 3, [0.1], [], False), "for each mask"),
        ((seed, 3, [1.5], [1.0], False), "0..1"),
        ((seed, -1, [0.5], [1.0], False), "numbers"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.cpu_masks(*arguments)


def test_masks_under_torch_compile():
    def draw(seed, n):
        return ops.cpu_masks(seed, n, [0.5], [1.0], False) + 1

    seed = torch.tensor([3])
    assert torch.equal(torch.compile(draw, fullgraph=True, dynamic=True, backend="aot_eager")(seed, 77), draw(seed, 77))
    torch.library.opcheck(ops.cpu_masks, (seed, 100, [0.1], [1.0], True))
