"""The tolerance rule, the poison, and torch's own answers: what the other tests take for granted."""

import math

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import testing
from fusedrnn.cells import CELLS
from fusedrnn.testing import Case, InexactError, assert_as_exact_as, excess

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def exact():
    return torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=F64)


# ------------------------------------------------------------------------------------------------ the rule


def test_same_as_torch_passes(exact):
    baseline = (exact * 1.01).float()
    assert assert_as_exact_as("y", baseline, baseline, exact) == pytest.approx(0.5, abs=1e-3)


def test_exact_passes(exact):
    assert excess(exact.clone(), exact, exact) == 0


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_three_times_the_error_of_torch_fails(exact, dtype):
    error = 0.05 * torch.ones_like(exact)
    baseline = (exact + error).to(dtype)
    assert excess((exact - 1.9 * error).to(dtype), baseline, exact) <= 1
    with pytest.raises(InexactError, match=r"^dx: error 0\.1.* times what is allowed.*torch's own error is 0\.05"):
        assert_as_exact_as("dx", (exact - 3 * error).to(dtype), baseline, exact)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_rounding_is_allowed_where_torch_is_exact_by_chance(dtype):
    exact = torch.tensor([0.75], dtype=F64)
    baseline = exact.to(dtype)
    eps = torch.finfo(dtype).eps
    assert excess((exact + eps).to(dtype), baseline, exact) <= 1
    assert excess((exact + 40 * eps).to(dtype), baseline, exact) > 1


def test_rounding_below_the_smallest_normal_number():
    exact = torch.tensor([2e-8], dtype=F64)
    assert excess(torch.zeros(1, dtype=F16), torch.zeros(1, dtype=F16), exact) <= 1
    assert excess(torch.full((1,), 1e-6, dtype=F16), torch.zeros(1, dtype=F16), exact) > 1


def test_rounding_given_by_the_caller(exact):
    ours = (exact + 1e-3).float()
    assert excess(ours, exact.float(), exact) > 1
    assert excess(ours, exact.float(), exact, rounding=2e-3) <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_a_number_fails_wherever_it_is_not_exact(exact, bad):
    ours, baseline = exact.float(), exact.float()
    ours[7] = bad
    assert excess(ours, baseline, exact) == math.inf
    with pytest.raises(InexactError, match=r"^y: error inf"):
        assert_as_exact_as("y", ours, baseline, exact)
    assert excess(baseline, ours, exact) == math.inf, "torch's answer measures nothing"
    exact[7] = bad
    assert excess(ours, ours, exact) <= 1
    assert excess(baseline, ours, exact) == math.inf


def test_wrong_dtype_fails(exact):
    with pytest.raises(InexactError, match=r"y: expected torch\.bfloat16, got torch\.float32"):
        assert_as_exact_as("y", exact.float(), exact.bfloat16(), exact)


@pytest.mark.parametrize("shape", [(50, 1), (1,), (25,), (1, 50)], ids=str)
def test_wrong_shape_fails(exact, shape):
    ours = exact.float()[: math.prod(shape)].reshape(shape)
    with pytest.raises(InexactError, match="y: shapes differ") as caught:
        assert_as_exact_as("y", ours, exact.float(), exact)
    assert caught.value.excess == math.inf


def test_empty_tensors_pass():
    assert excess(torch.empty(3, 0), torch.empty(3, 0), torch.empty(3, 0, dtype=F64)) == 0


def test_exact_must_be_float64(exact):
    with pytest.raises(ValueError, match=r"exact must be float64, got torch\.float32"):
        excess(exact, exact, exact.float())


# ------------------------------------------------------------------------------------------------ the poison


def allocations():
    like = torch.ones(3, 4)
    return torch.empty(5), torch.empty_like(like), like.new_empty(2, 2), torch.empty(3, dtype=BF16)


def test_poison_is_in_every_new_buffer():
    with testing.poisoned():
        assert all(tensor.isnan().all() for tensor in allocations())
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
        assert not torch.zeros(3).isnan().any()


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
@pytest.mark.parametrize("fill", [True, False])
def test_poison_leaves_the_process_as_it_was(mode, fill):
    memory, inductor = torch.utils.deterministic, torch._inductor.config
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
        number = torch.get_deterministic_debug_mode()
        with inductor.patch(deterministic=False):
            with pytest.raises(KeyError), testing.poisoned(), testing.poisoned():
                raise KeyError
            assert not inductor.deterministic
        assert (torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory) == (number, fill)
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = before[1]


def test_single_threaded_gives_the_threads_back():
    before = torch.get_num_threads()
    with testing.single_threaded():
        assert torch.get_num_threads() == 1
    with pytest.raises(KeyError), testing.single_threaded():
        raise KeyError
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------ cases

CASE = Case(6, 4, 3, 5)
OPTIONS = {
    "plain": {},
    "no bias, no hx": {"bias": False, "hx": False},
    "projection": {"proj_size": 2},
    "two layers, both directions": {"layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True, "bidirectional": True, "strided": True},
}


def case(**options):
    return Case(6, 4, 3, 5, **options)


def test_devices():
    assert testing.devices()[0] == "cpu"
    assert ("cuda" in testing.devices()) == torch.cuda.is_available()


def test_ids_tell_cases_apart():
    cases = [case(**options) for options in OPTIONS.values()]
    cases += [case(**{flag: True}) for flag in ("lengths", "packed", "reset", "states")]
    cases += [case(dtype=F16), case(seed=1)]
    assert len({c.id for c in cases}) == len(cases)
    assert case().id == "T6-B4-I3-H5-float32"
    assert case(cell="gru").id == "gru-T6-B4-I3-H5-float32"


def test_inputs_follow_from_the_seed():
    options = {"lengths": True, "reset": True}
    first, again, other = (case(seed=seed, **options).inputs() for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        a, b, c = (s if isinstance(s, tuple) else (s,) for s in (a, b, c))
        assert all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in zip(a, b, strict=True))
        assert not all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in zip(a, c, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_inputs_in_float64_are_those_of_the_dtype(dtype):
    stored, exact = case(dtype=dtype).inputs(), case(dtype=dtype).inputs(dtype=F64)
    assert stored.x.dtype == dtype
    assert exact.x.dtype == F64
    assert torch.equal(stored.x.double(), exact.x)
    assert torch.equal(stored.hx[1].double(), exact.hx[1])


def test_inputs_that_are_slices():
    x, (h0, c0), _, _ = case(strided=True).inputs()
    assert not any(tensor.is_contiguous() for tensor in (x, h0, c0))
    assert case().inputs().x.is_contiguous()


@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_have_nan_where_no_step_exists(batch_first):
    x, _, lengths, _ = case(lengths=True, batch_first=batch_first).inputs()
    assert lengths.min() == 0
    assert lengths.max() == 6
    x = x if batch_first else x.transpose(0, 1)
    for row, length in zip(x, lengths.tolist(), strict=True):
        assert not row[:length].isnan().any()
        assert row[length:].isnan().all()
    assert case(packed=True).inputs().lengths.min() == 1


def test_modules_have_the_weights_of_nn_lstm_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    ours, baseline = case(proj_size=2).module(fusedrnn.LSTM), case(proj_size=2).module()
    assert torch.equal(torch.get_rng_state(), before)
    assert type(baseline) is nn.LSTM
    for a, b in zip(ours.parameters(), baseline.parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ torch's answers


def assert_close(ours, baseline):
    assert ours.keys() == baseline.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], baseline[name], rtol=1e-12, atol=1e-12, msg=lambda m, k=name: f"{k}: {m}"
        )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_step_by_step_is_nn_lstm(options, packed):
    """Where nn.LSTM can do the whole sequence, lengths among it (those of a PackedSequence)."""
    whole = case(dtype=F64, packed=packed, **options)
    assert_close(
        testing.evaluate(testing._call_stepwise, nn.LSTM, whole), testing.evaluate(testing.call, nn.LSTM, whole)
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu"])
def test_step_by_step_is_torchs_own(cell, packed):
    for options in ({}, {"layers": 2, "bidirectional": True, "batch_first": True, "bias": False}):
        whole = case(dtype=F64, packed=packed, cell=cell, **options)
        found = testing.evaluate(testing._call_stepwise, None, whole)
        assert_close(found, testing.evaluate(testing.call, None, whole))
        assert list(found)[:4] == ["y", "hn", "dx", "dh0"]


def test_step_by_step_with_reset_starts_anew():
    case = Case(8, 1, 3, 5, dtype=F64, reset=True, seed=2)
    module, inputs = case.module(), case.inputs()
    starts = inputs.reset[:, 0].nonzero().flatten().tolist()
    assert len(starts) > 1
    assert starts[0] > 0
    ys, hx = [], inputs.hx
    for start, end in zip([0, *starts], [*starts, 8], strict=True):
        y, hx_end = module(inputs.x[start:end], hx if start == 0 else None)
        ys.append(y)
    outputs = testing.call_torch(module, case, inputs)
    assert_close(outputs, {"y": torch.cat(ys), "hn": hx_end[0], "cn": hx_end[1]})


def test_step_by_step_without_any_step_returns_hx():
    case = Case(5, 3, 3, 5, lengths=True, bidirectional=True)
    inputs = case.inputs()
    outputs = testing.call_torch(case.module(), case, inputs)
    assert inputs.lengths[0] == 0
    assert torch.equal(outputs["hn"][:, 0], inputs.hx[0][:, 0])
    assert torch.equal(outputs["cn"][:, 0], inputs.hx[1][:, 0])
    assert not outputs["y"][:, 0].any()


def test_step_by_step_returns_every_state():
    case = Case(5, 3, 3, 5, layers=2, states=True, batch_first=True)
    outputs = testing.call_torch(case.module(), case, case.inputs())
    assert list(outputs) == ["y", "hn", "cn", "h_l0", "c_l0", "h_l1", "c_l1"]
    assert torch.equal(outputs["h_l1"], outputs["y"])
    for k in range(2):
        assert torch.equal(outputs[f"h_l{k}"][:, -1], outputs["hn"][k])
        assert torch.equal(outputs[f"c_l{k}"][:, -1], outputs["cn"][k])


def test_a_kink_that_rounding_crosses_is_allowed_for():
    """relu of a number that is 0 but for its rounding: its derivative is 0 for one of two that are both right."""
    case = Case(20, 2, 9, 2, BF16, 2, True, hx=False, lengths=True, reset=True, seed=112, cell="rnn_relu")
    with fusedrnn.use_backend("reference"):
        ours = testing.evaluate(testing.call, fusedrnn.RNN, case)
    for name, answer in testing.answers(case).items():
        assert_as_exact_as(name, ours[name], *answer)


def test_cases_of_other_cells():
    """The default class and its nonlinearity, hx as a tensor, and states without c."""
    for cell, kind in (("gru", nn.GRU), ("rnn_tanh", nn.RNN), ("rnn_relu", nn.RNN)):
        some = Case(5, 3, 3, 5, cell=cell, states=True, layers=2)
        module, inputs = some.module(), some.inputs()
        assert type(module) is kind
        assert module.mode == cell.upper()
        assert inputs.hx.shape == (2, 3, 5)
        assert list(testing.call_torch(module, some, inputs)) == ["y", "hn", "h_l0", "h_l1"]
    assert testing.roundoff(F32, CELLS["rnn_tanh"]) < testing.roundoff(F32, CELLS["gru"]) == testing.roundoff(F32)


def test_evaluate_names_every_result():
    results = testing.evaluate(testing.call, nn.LSTM, case(bias=False))
    assert list(results) == ["y", "hn", "cn", "dx", "dh0", "dc0", "dweight_ih_l0", "dweight_hh_l0"]
    assert "dh0" not in testing.evaluate(testing.call, nn.LSTM, case(hx=False))
    assert {result.dtype for result in testing.evaluate(testing.call, nn.LSTM, case(), dtype=F64).values()} == {F64}


def test_nudged_inputs_move_the_results_a_little():
    exact, nudged, other = (testing.evaluate(testing.call, nn.LSTM, CASE, dtype=F64, nudge=n) for n in range(3))
    for name in exact:
        assert not torch.equal(nudged[name], other[name])
        assert (nudged[name] - exact[name]).abs().max() < 100 * testing.roundoff(F32) * exact[name].abs().max()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (5, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_is_as_exact_as_torch_says(cell, sizes, dtype):
    every = {"lengths": True, "reset": True, "states": True, "bidirectional": True}
    for seed in range(4 if cell == "lstm" else 2):
        case = Case(*sizes, dtype=dtype, seed=seed, cell=cell, **every)
        cls = getattr(fusedrnn, testing.LAYERS[cell].__name__)
        with fusedrnn.use_backend("reference"), testing.poisoned():
            ours = testing.evaluate(testing.call, cls, case)
        answers = testing.answers(case)
        assert ours.keys() == answers.keys()
        for name, answer in answers.items():
            assert_as_exact_as(f"{case.id}: {name}", ours[name], *answer)
