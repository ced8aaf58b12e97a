"""Every form of input and every option of nn.LSTM: the same values and the same gradients, on every backend.

Float64 throughout: what a backend's rounding may amount to is the concern of test_kernels.py.
"""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import functional, testing
from fusedrnn.module import BASES

T, B, I, H = 4, 3, 3, 5

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "three layers": {"num_layers": 3},
    "projection": {"proj_size": 2},
    "projection without bias": {"proj_size": 2, "bias": False},
    "two layers both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "all of it": {"num_layers": 2, "bidirectional": True, "batch_first": True, "proj_size": 2, "dropout": 0.5},
    "all of it without bias": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False, "dropout": 0.5},
}


def leaf(*shape, device):
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)


def states(module, *batch, device):
    """h0, and c0 of an LSTM, as leaves, of a shape that may have more dimensions in the middle than the batch."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or H, H) if module.mode == "LSTM" else (H,)
    return [leaf(rows, *batch, size, device=device) for size in sizes]


def given(states):
    """hx as a module takes it."""
    first, *rest = states
    return (first, *rest) if rest else first


def padded(module, T, B, *rest, device):
    return leaf(*((B, T) if module.batch_first else (T, B)), *rest, device=device)


def whole(module, device):
    x, hx = padded(module, T, B, I, device=device), states(module, B, device=device)
    return [x, *hx], (x, given(hx))


def without_hx(module, device):
    x = padded(module, T, B, I, device=device)
    return [x], (x,)


def hx_is_a_list(module, device):
    x, hx = padded(module, T, B, I, device=device), states(module, B, device=device)
    return [x, *hx], (x, hx)


def unbatched(module, device):
    x, hx = leaf(T, I, device=device), states(module, device=device)
    return [x, *hx], (x, given(hx))


def unbatched_without_hx(module, device):
    x = leaf(T, I, device=device)
    return [x], (x,)


def one_step(module, device):
    x, hx = padded(module, 1, B, I, device=device), states(module, B, device=device)
    return [x, *hx], (x, given(hx))


def one_sequence(module, device):
    x, hx = padded(module, T, 1, I, device=device), states(module, 1, device=device)
    return [x, *hx], (x, given(hx))


def permuted(module, device):
    """Features first in memory: no dimension of the input is contiguous."""
    x = padded(module, T, B, I, device=device)
    view = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not view.is_contiguous()
    return [x], (view,)


def transposed_from_the_other_layout(module, device):
    x = leaf(*((T, B) if module.batch_first else (B, T)), I, device=device)
    return [x], (x.transpose(0, 1),)


def sliced_features(module, device):
    x = padded(module, T, B, 2 * I + 2, device=device)
    return [x], (x[..., 1 : 2 * I + 1 : 2],)


def every_other_step(module, device):
    x = padded(module, 2 * T, B, I, device=device)
    return [x], (x[:, 1::2] if module.batch_first else x[1::2],)


def some_of_the_batch(module, device):
    x = padded(module, T, B + 2, I, device=device)
    return [x], (x[1 : B + 1] if module.batch_first else x[:, 1 : B + 1],)


def expanded_over_the_batch(module, device):
    x = padded(module, T, 1, I, device=device)
    return [x], (x.expand(*((B, T) if module.batch_first else (T, B)), I),)


def states_by_index(module, device):
    """Picked out of a store of states, so that neither is contiguous."""
    x, store = padded(module, T, B, I, device=device), states(module, B, 2, device=device)
    picked = [s[:, :, 1] for s in store]
    assert not picked[0].is_contiguous()
    return [x, *store], (x, given(picked))


def states_transposed(module, device):
    x, store = padded(module, T, B, I, device=device), states(module, B, device=device)
    return [x, *store], (x, given(s.transpose(0, 2).contiguous().transpose(0, 2) for s in store))


def states_expanded_over_the_batch(module, device):
    x, store = padded(module, T, B, I, device=device), states(module, 1, device=device)
    return [x, *store], (x, given(s.expand(-1, B, -1) for s in store))


def states_from_one_tensor(module, device):
    """Unbound from one tensor where h and c are of one size; two slices of one where they are not."""
    x, P = padded(module, T, B, I, device=device), module.proj_size or H
    store = leaf(module.num_layers * (2 if module.bidirectional else 1), B, P + H, device=device)
    return [x, store], (x, store.split([P, H], dim=-1))


FORMS = [
    whole,
    without_hx,
    hx_is_a_list,
    unbatched,
    unbatched_without_hx,
    one_step,
    one_sequence,
    permuted,
    transposed_from_the_other_layout,
    sliced_features,
    every_other_step,
    some_of_the_batch,
    expanded_over_the_batch,
    states_by_index,
    states_transposed,
    states_expanded_over_the_batch,
    states_from_one_tensor,
]


def each_with_some(options, forms, some_options, some_forms):
    """Every option with some of the forms and every form with some of the options: enough, and quicker than all."""
    pairs = [(o, f) for o in options for f in some_forms] + [(o, f) for f in forms for o in some_options]
    return list(dict.fromkeys(pairs))


@pytest.mark.parametrize(
    ("options", "form"),
    each_with_some(OPTIONS, FORMS, ["plain", "all of it"], [whole, unbatched, permuted]),
)
def test_padded_and_unbatched(place, twins, assert_twins, options, form):
    theirs, ours = twins(I, H, device=place.device, **OPTIONS[options])
    assert_twins(theirs, ours, lambda: form(ours, place.device))


OTHER_OPTIONS = [name for name, o in OPTIONS.items() if "proj_size" not in o]
OTHER_FORMS = [form for form in FORMS if form not in (hx_is_a_list, states_from_one_tensor)]


@pytest.mark.parametrize(("options", "form"), each_with_some(OTHER_OPTIONS, OTHER_FORMS, ["plain"], [whole]))
def test_padded_and_unbatched_of_other_cells(other_place, twins, assert_twins, options, form):
    kind, place = other_place
    theirs, ours = twins(I, H, cls=kind.ours, device=place.device, **kind.options, **OPTIONS[options])
    assert_twins(theirs, ours, lambda: form(ours, place.device))


def test_other_cells_without_a_batch_and_step_by_step(other_place, twins, assert_same, gradients):
    """B = 0; states put in again; inference; no output shares memory with another or with hx; dropout's masks."""
    kind, place = other_place
    theirs, ours = twins(I, H, 2, cls=kind.ours, device=place.device, **kind.options)
    x, (h0,) = leaf(T, B, I, device=place.device), states(ours, B, device=place.device)
    y, h = ours(x[:, :0], h0[:, :0])
    assert (y.shape, h.shape) == ((T, 0, H), (2, 0, H))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients((y, h), list(ours.parameters())))
    outputs, hx = [], h0
    for step in x.split(1):
        y, hx = ours(step, hx)
        outputs.append(y)
    stepwise, at_once = (torch.cat(outputs), hx), theirs(x, h0)
    assert_same(stepwise, at_once)
    leaves = [x, h0]
    expected = gradients(at_once, [*leaves, *theirs.parameters()])
    assert_same(gradients(stepwise, [*leaves, *ours.parameters()]), expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, h = ours(x, h0)
            assert_same((y, h), at_once)
            assert not y.requires_grad
            kept, last = h.clone(), h0.clone()
            y.add_(1)
            assert torch.equal(h, kept)
            assert torch.equal(h0, last)
    for module in (ours, theirs):
        module.dropout = 0.5
    torch.manual_seed(1)
    expected = theirs(x, h0)
    torch.manual_seed(1)
    assert_same(ours(x, h0), expected)


def test_arguments_by_keyword(place, twins, assert_same):
    theirs, ours = twins(I, H, device=place.device)
    _, (x, hx) = whole(ours, place.device)
    assert_same(ours(input=x, hx=hx), theirs(input=x, hx=hx))
    assert_same(ours(hx=None, input=x), theirs(hx=None, input=x))


@pytest.mark.parametrize("options", OPTIONS)
def test_empty_batch(place, twins, gradients, options):
    theirs, ours = twins(I, H, device=place.device, **OPTIONS[options])
    x, hx = padded(ours, T, 0, I, device=place.device), states(ours, 0, device=place.device)
    for args, leaves in (((x,), [x]), ((x, given(hx)), [x, *hx])):
        (y, state), (expected, expected_state) = ours(*args), theirs(*args)
        for mine, other in zip((y, *state), (expected, *expected_state), strict=True):
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        inputs = [*leaves, *ours.parameters()]
        for input, grad in zip(inputs, gradients((y, state), inputs), strict=True):
            assert torch.equal(grad, torch.zeros_like(input))


def test_one_call_per_time_step(place, twins, assert_same, gradients):
    """As streaming and reinforcement learning do it: the states that come back are put in again."""
    theirs, ours = twins(I, H, num_layers=2, device=place.device)
    x = leaf(2 * T, B, I, device=place.device)
    outputs, hx = [], None
    for step in x.split(1):
        y, hx = ours(step, hx)
        outputs.append(y)
    stepwise, at_once = (torch.cat(outputs), hx), theirs(x)
    assert_same(stepwise, at_once)
    assert_same(
        gradients(stepwise, [x, *ours.parameters()]),
        gradients(at_once, [x, *theirs.parameters()]),
    )


def test_outputs_share_no_memory(place, twins):
    """Whoever changes one of them in place changes nothing else."""
    _, ours = twins(I, H, device=place.device)
    leaves, (x, hx) = one_step(ours, place.device)
    with torch.no_grad():
        y, (h, c) = ours(x, hx)
        kept = [t.clone() for t in (y, h, c, *leaves)]
        for changed in range(3):
            (y, h, c)[changed].add_(1)
            kept[changed].add_(1)
            assert all(torch.equal(t, k) for t, k in zip((y, h, c, *leaves), kept, strict=True))


def test_no_grad_and_inference_mode(place, twins, assert_same):
    theirs, ours = twins(I, H, num_layers=2, device=place.device)
    _, args = whole(ours, place.device)
    expected = theirs(*args)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, state = ours(*args)
        assert not any(t.requires_grad for t in (y, *state))
        assert_same((y, state), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outputs_and_gradients_have_the_dtype_of_the_input(kernel, dtype):
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True, proj_size=2, dtype=dtype, device=kernel.device)
    x = torch.randn(T, B, I, dtype=dtype, device=kernel.device, requires_grad=True)
    y, (h, c) = module(x)
    (y.sum() + h.sum() + c.sum()).backward()
    assert {t.dtype for t in (y, h, c, x.grad, *(p.grad for p in module.parameters()))} == {dtype}


# Packed sequences


def packed_sorted(x, batch_first):
    return pack_padded_sequence(x, [4, 2, 1], batch_first)


def packed_unsorted(x, batch_first):
    return pack_padded_sequence(x, [2, 4, 1], batch_first, enforce_sorted=False)


def packed_equal(x, batch_first):
    return pack_padded_sequence(x, [4, 4, 4], batch_first, enforce_sorted=False)


def packed_pairs(x, batch_first):
    return pack_padded_sequence(x, [3, 1, 3], batch_first, enforce_sorted=False)


def packed_one_step(x, batch_first):
    return pack_padded_sequence(x, [1, 1, 1], batch_first)


def packed_sequences(x, batch_first):
    parts = (x if batch_first else x.transpose(0, 1)).unbind(0)
    return pack_sequence([part[:n] for part, n in zip(parts, (1, 3, 4), strict=True)], enforce_sorted=False)


def by_hand(x, batch_first):
    rows = (x.transpose(0, 1) if batch_first else x).flatten(0, 1)[:7]
    return PackedSequence(rows, torch.tensor([3, 2, 1, 1]))


def by_hand_permuted(x, batch_first):
    rows = (x.transpose(0, 1) if batch_first else x).flatten(0, 1)[:7]
    return PackedSequence(rows, torch.tensor([3, 2, 1, 1]), torch.tensor([2, 0, 1], device=x.device))


def by_hand_strided(x, batch_first):
    rows = (x.transpose(0, 1) if batch_first else x).flatten(0, 1)[:7]
    return PackedSequence(rows.T.contiguous().T, torch.tensor([3, 2, 1, 1]))


PACKED = [
    packed_sorted,
    packed_unsorted,
    packed_equal,
    packed_pairs,
    packed_one_step,
    packed_sequences,
    by_hand,
    by_hand_permuted,
    by_hand_strided,
]


@pytest.mark.parametrize(
    ("options", "pack"),
    each_with_some(
        [name for name, o in OPTIONS.items() if not o.get("dropout")],
        PACKED,
        ["plain", "two layers both ways"],
        [packed_unsorted],
    ),
)
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "no hx"])
def test_packed(place, twins, assert_twins, options, with_hx, pack):
    theirs, ours = twins(I, H, device=place.device, **OPTIONS[options])

    def make():
        x = padded(ours, T, B, I, device=place.device)
        input = pack(x, ours.batch_first)
        hx = states(ours, B, device=place.device) if with_hx else []
        return [x, *hx], (input, tuple(hx)) if with_hx else (input,)

    assert_twins(theirs, ours, make)


@pytest.mark.parametrize(
    ("options", "pack"), each_with_some(OTHER_OPTIONS, PACKED, ["two layers both ways"], [packed_unsorted])
)
def test_packed_of_other_cells(other_place, twins, assert_twins, options, pack):
    kind, place = other_place
    theirs, ours = twins(I, H, cls=kind.ours, device=place.device, **kind.options, **OPTIONS[options])

    def make():
        x, hx = padded(ours, T, B, I, device=place.device), states(ours, B, device=place.device)
        return [x, *hx], (pack(x, ours.batch_first), given(hx))

    assert_twins(theirs, ours, make)


@pytest.mark.parametrize("pack", PACKED)
def test_packed_output_reuses_what_the_input_came_with(place, pack):
    module = fusedrnn.LSTM(I, H, dtype=torch.float64, device=place.device)
    input = pack(padded(module, T, B, I, device=place.device), False)
    output, _ = module(input)
    assert isinstance(output, PackedSequence)
    assert output.batch_sizes is input.batch_sizes
    assert output.sorted_indices is input.sorted_indices
    assert output.unsorted_indices is input.unsorted_indices
    assert output.data.shape == (len(input.data), H)


def test_packed_without_unsorted_indices(place, twins, assert_same):
    """Taken apart and put together again: the inverse is found, and the states come back in the order of hx."""
    _, ours = twins(I, H, device=place.device)
    x, hx = padded(ours, T, B, I, device=place.device), states(ours, B, device=place.device)
    input = packed_unsorted(x, False)
    expected, expected_state = ours(input, tuple(hx))
    output, state = ours(input._replace(unsorted_indices=None), tuple(hx))
    assert_same((output, state), (expected, expected_state))
    assert output.unsorted_indices is None or torch.equal(output.unsorted_indices, input.unsorted_indices)


def test_packed_and_padded_with_lengths_agree(place, twins, assert_same):
    _, ours = twins(I, H, num_layers=2, bidirectional=True, device=place.device)
    x = padded(ours, T, B, I, device=place.device)
    packed, state = ours(pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False))
    alone = [ours(x[:n, b]) for b, n in enumerate((2, 4, 1))]
    for b, (y, _) in enumerate(alone):
        assert_same(pad_packed_sequence(packed)[0][: len(y), b], y)
    for k in (0, 1):
        assert_same(state[k], torch.stack([hx[k] for _, hx in alone], dim=1))


# The functions


@pytest.mark.parametrize("options", OPTIONS)
def test_functional_lstm(place, twins, assert_same, options):
    """What the module calls, with the weights in the order of the state_dict; packed data in their own order."""
    theirs, ours = twins(I, H, device=place.device, **OPTIONS[options])
    own = {name: getattr(ours, name) for name in ("num_layers", "batch_first", "bidirectional")}
    weights = list(theirs.state_dict().values())
    _, (x, hx) = whole(ours, place.device)
    assert_same(functional.lstm(x, weights, hx, **own), theirs.eval()(x, hx))
    packed = packed_sorted(x, ours.batch_first)
    y, state = functional.lstm(packed.data, weights, hx, batch_sizes=packed.batch_sizes, **own)
    assert_same((y, state), theirs.eval()(packed, hx))


def test_functional_lstm_cell(place, twins, assert_same):
    theirs, ours = twins(I, H, cls=fusedrnn.LSTMCell, device=place.device)
    _, (x, hx) = cell_batched(place.device)
    assert_same(functional.lstm_cell(x, hx, *ours.parameters()), theirs(x, hx))
    assert_same(functional.lstm_cell(x, None, *ours.parameters()), theirs(x))


def test_functional_gru_and_rnn(other_place, twins, assert_same):
    """Layers and one time step, with the weights in the order of the state_dict, and packed data."""
    kind, place = other_place
    name = kind.ours.__name__.lower()
    layers, step = getattr(functional, name), getattr(functional, f"{name}_cell")
    theirs, ours = twins(I, H, 2, cls=kind.ours, device=place.device, bidirectional=True, **kind.options)
    own = {"num_layers": 2, "bidirectional": True, **kind.options}
    weights = list(theirs.state_dict().values())
    _, (x, hx) = whole(ours, place.device)
    assert_same(layers(x, weights, hx, **own), theirs(x, hx))
    packed = packed_sorted(x, False)
    assert_same(layers(packed.data, weights, hx, batch_sizes=packed.batch_sizes, **own), theirs(packed, hx))
    theirs, ours = twins(I, H, cls=kind.step, device=place.device, **kind.options)
    x, h = leaf(B, I, device=place.device), leaf(B, H, device=place.device)
    for given_h in (h, None):
        assert_same(step(x, given_h, *ours.parameters(), **kind.options), theirs(x, given_h))


# Dropout


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2},
        {"num_layers": 3, "bidirectional": True},
        {"num_layers": 2, "batch_first": True},
        {"num_layers": 2, "proj_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("form", [whole, unbatched, permuted])
def test_dropout_draws_what_nn_lstm_draws(place, twins, assert_twins, options, dropout, form):
    theirs, ours = twins(I, H, dropout=dropout, device=place.device, **options)
    assert_twins(theirs, ours, lambda: form(ours, place.device))


@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("pack", [packed_unsorted, packed_equal])
def test_dropout_of_packed_input_draws_what_nn_lstm_draws(twins, assert_twins, dropout, pack):
    """On the CPU, where nothing is padded."""
    theirs, ours = twins(I, H, 3, dropout=dropout, bidirectional=True)

    def make():
        x = leaf(T, B, I, device="cpu")
        return [x], (pack(x, False),)

    assert_twins(theirs, ours, make)


@pytest.mark.parametrize("pack", [None, packed_unsorted, packed_equal])
def test_dropout_is_reproducible(place, pack):
    module = fusedrnn.LSTM(I, H, 2, dropout=0.5, dtype=torch.float64, device=place.device)
    x = padded(module, T, B, I, device=place.device)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        y = module(pack(x, False) if pack else x)[0]
        y = y.data if pack else y
        outputs.append([y, *torch.autograd.grad(y.sum(), list(module.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], outputs[1], strict=True))
    assert not torch.equal(outputs[0][0], outputs[2][0])


def test_dropout_is_off_in_eval_mode(place, twins, assert_same):
    theirs, ours = twins(I, H, 2, dropout=0.5, device=place.device)
    _, args = whole(ours, place.device)
    state = torch.get_rng_state()
    assert_same(ours.eval()(*args), theirs.eval()(*args))
    assert torch.equal(torch.get_rng_state(), state)


# Autocast

LOW = [torch.bfloat16, torch.float16]
UNDER_AUTOCAST = [torch.float32, *LOW]


def dtypes(outputs):
    first, rest = outputs
    return [t.dtype for t in (first, *(rest if isinstance(rest, tuple) else (rest,)))]


needs_autocast_of_nn_lstm = pytest.mark.skipif(
    not testing.nn_lstm_autocasts(), reason="nn.LSTM itself fails under autocast on this processor"
)


@needs_autocast_of_nn_lstm
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hx", [None, torch.float32, torch.bfloat16])
def test_autocast_dtypes_of_lstm(place, weights, x, hx):
    modules = [cls(I, H, device=place.device, dtype=weights) for cls in (fusedrnn.LSTM, nn.LSTM)]
    input = torch.randn(T, B, I, device=place.device, dtype=x)
    state = None if hx is None else (torch.randn(1, B, H, device=place.device, dtype=hx),) * 2
    with torch.autocast(place.device, torch.bfloat16):
        ours, theirs = (dtypes(module(input, state)) for module in modules)
    assert ours == theirs


@needs_autocast_of_nn_lstm
@pytest.mark.parametrize(("pack", "proj_size"), [(True, 0), (True, 2), (False, 2)], ids=["packed", "both", "projected"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal lengths", "other lengths"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
def test_autocast_dtypes_of_packed_and_projected_lstm(place, weights, x, equal, pack, proj_size):
    """nn.LSTM adds these up from operations that autocast casts one by one: the state stays as wide as it came."""
    options = {"num_layers": 2, "bidirectional": True, "proj_size": proj_size, "device": place.device, "dtype": weights}
    modules = [cls(I, H, **options) for cls in (fusedrnn.LSTM, nn.LSTM)]
    modules[0].load_state_dict(modules[1].state_dict())
    input = torch.randn(T, 3, I, device=place.device, dtype=x)
    if pack:
        input = pack_padded_sequence(input, torch.tensor([T, T, T] if equal else [T, 2, 1]))
    for hx in (None, torch.float32, torch.bfloat16):
        sizes = proj_size or H, H
        state = hx and tuple(torch.randn(4, 3, size, device=place.device, dtype=hx) for size in sizes)
        results = []
        with torch.autocast(place.device, torch.bfloat16):
            for module in modules:
                y, (hn, cn) = module(input, state)
                results.append([y.data if pack else y, hn, cn])
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
        torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize(("weights", "x"), list(itertools.product(UNDER_AUTOCAST, UNDER_AUTOCAST)))
def test_autocast_dtypes_of_lstm_cell(place, autocast, weights, x):
    modules = [cls(I, H, device=place.device, dtype=weights) for cls in (fusedrnn.LSTMCell, nn.LSTMCell)]
    input = torch.randn(B, I, device=place.device, dtype=x)
    for h, c in [(None, None), *itertools.product(UNDER_AUTOCAST, UNDER_AUTOCAST)]:
        hx = h and tuple(torch.randn(B, H, device=place.device, dtype=dtype) for dtype in (h, c))
        with torch.autocast(place.device, autocast):
            ours, theirs = (dtypes(module(input, hx)) for module in modules)
        assert ours == theirs


def torch_can_compute(dtype):
    """float16 on the CPU: torch has it for some processors only."""
    try:
        nn.GRUCell(I, H, dtype=dtype)(torch.randn(B, I, dtype=dtype))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "equal lengths", "one step"])
def test_autocast_dtypes_of_other_cells(other_place, autocast, form):
    """On the CPU a GRU's state is as wide as it came, in every form, and an RNN's is what the products are."""
    kind, place = other_place
    if not torch_can_compute(autocast):
        pytest.skip(f"torch itself does not compute {autocast} on this processor")
    cls = kind.step if form == "one step" else kind.ours
    for weights, x, hx in itertools.product(
        (torch.float32, autocast), (torch.float32, autocast), (None, torch.float32, autocast)
    ):
        modules = [c(I, H, **kind.options, device=place.device, dtype=weights) for c in (cls, BASES[cls])]
        modules[0].load_state_dict(modules[1].state_dict())
        input = torch.randn(
            *((T, 3, I) if form in ("padded", "packed", "equal lengths") else (B, I)), device=place.device, dtype=x
        )
        state = hx and torch.randn(
            *{"unbatched": (1, H), "one step": (B, H)}.get(form, (1, 3, H)), device=place.device, dtype=hx
        )
        if form in ("packed", "equal lengths"):
            input = pack_padded_sequence(input, torch.tensor([T, 2, 1] if form == "packed" else [T, T, T]))
        results = []
        with torch.autocast(place.device, autocast):
            for module in modules:
                y, *h = module(input, state) if form != "one step" else (module(input, state),)
                results.append([getattr(y, "data", y) if form in ("packed", "equal lengths") else y, *h])
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
        torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_autocast_leaves_float64(place, twins, assert_same):
    theirs, ours = twins(I, H, device=place.device)
    _, args = whole(ours, place.device)
    with torch.autocast(place.device, torch.bfloat16):
        assert_same(ours(*args), theirs(*args))
        with pytest.raises(
            RuntimeError, match=r"input must have the dtype of the weights, torch.bfloat16, got torch.f"
        ):
            fusedrnn.LSTM(I, H, device=place.device)(*args)
        with pytest.raises(
            RuntimeError, match=r"input must have the dtype of the weights, torch.bfloat16, got torch.i"
        ):
            fusedrnn.LSTM(I, H, device=place.device)(args[0].to(torch.int64))


def test_autocast_casts_the_arguments_and_nothing_inside(kernel):
    """Sums over the features stay in float32: the values are those of the module in bfloat16 without autocast."""
    module = fusedrnn.LSTM(64, 64, 2, bidirectional=True, device=kernel.device)
    low = fusedrnn.LSTM(64, 64, 2, bidirectional=True, device=kernel.device, dtype=torch.bfloat16)
    low.load_state_dict(module.state_dict())
    x = torch.randn(T, B, 64, device=kernel.device)
    with torch.autocast(kernel.device, torch.bfloat16):
        y, state = module(x)
        dweights = torch.autograd.grad(y.float().sum(), list(module.parameters()))  # inside: it is not cast either
    expected, expected_state = low(x.bfloat16())
    expected_dweights = torch.autograd.grad(expected.float().sum(), list(low.parameters()))
    assert all(torch.equal(a, b) for a, b in zip((y, *state), (expected, *expected_state), strict=True))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(dweights, expected_dweights, strict=True))
    assert {d.dtype for d in dweights} == {torch.float32}


def test_autocast_of_another_device_changes_nothing(place, twins, assert_same):
    other = "cuda" if place.device == "cpu" else "cpu"
    theirs, ours = twins(I, H, device=place.device)
    _, args = whole(ours, place.device)
    expected = theirs(*args)
    torch.set_autocast_enabled(other, True)
    try:
        assert_same(ours(*args), expected)
    finally:
        torch.set_autocast_enabled(other, False)


class Kept:
    """Bytes of what autograd keeps, each storage once."""

    def __init__(self, outputs):
        self.bytes, nodes, storages = 0, [t.grad_fn for t in outputs], {}
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            for name in dir(node):
                saved = getattr(node, name) if name.startswith("_saved") or name == "saved_tensors" else None
                for tensor in saved if isinstance(saved, tuple) else [saved]:
                    if isinstance(tensor, torch.Tensor):
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            following = {following for following, _ in node.next_functions if following is not None} - seen
            seen |= following
            nodes += following
        self.bytes = sum(storages.values())


@pytest.mark.parametrize("cls", [fusedrnn.LSTMCell, fusedrnn.LSTM, fusedrnn.CompilableLSTM])
def test_autocast_casts_a_weight_once(place, cls):
    """One step a call: all of them keep the same copy of the weights, which is autocast's own."""
    size, steps = 128, 20
    module = cls(size, size, device=place.device)
    x = torch.randn(1, 2, size, device=place.device).bfloat16()
    x = x[0] if cls is fusedrnn.LSTMCell else x
    copied = 2 * 2 * 4 * size * size  # bytes of the weights in bfloat16
    with torch.autocast(place.device, torch.bfloat16):
        for no_grad_first in (True, False):
            if no_grad_first:
                with torch.no_grad():
                    module(x)
            outputs, state = [], None
            for _ in range(steps):
                first, second = module(x, state)
                state = (first, second) if cls is fusedrnn.LSTMCell else second
                outputs.append(first)
        kept = Kept(outputs).bytes
        loss = sum(y.float().sum() for y in outputs)
    assert kept < steps * copied / 2  # a copy, and what each step keeps besides
    loss.backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("cls", [fusedrnn.LSTMCell, fusedrnn.LSTM])
def test_autocast_sees_a_weight_that_changed_since_it_was_left(kernel, cls):
    """Also through .data, which no counter notices; inside of one autocast nn.LSTM keeps the copy, and so do we."""
    module = cls(I, H, device=kernel.device)
    x = torch.randn(1, B, I, device=kernel.device) if cls is fusedrnn.LSTM else torch.randn(B, I, device=kernel.device)
    outputs = []
    for _ in range(2):
        with torch.autocast(kernel.device, torch.bfloat16):
            outputs.append(module(x)[0])
        for parameter in module.parameters():
            parameter.data.mul_(2)
    for parameter in module.parameters():
        parameter.data.mul_(0.5)
    fresh = cls(I, H, device=kernel.device)
    fresh.load_state_dict(module.state_dict())
    with torch.autocast(kernel.device, torch.bfloat16):
        assert torch.equal(outputs[1], fresh(x)[0])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("cls", [fusedrnn.LSTMCell, fusedrnn.LSTM])
def test_autocast_gradients_of_many_steps(kernel, cls):
    """With the cache, without it, and inside of checkpoint: of the same weights, to the rounding of bfloat16."""
    module = cls(I, H, device=kernel.device)
    x = torch.randn(6, 1, B, I, device=kernel.device)
    grads = []
    for way in ("cache", "no cache", "inference first", "hooks", "checkpoint"):
        module.zero_grad()
        with torch.autocast(kernel.device, torch.bfloat16, cache_enabled=way != "no cache"):
            if way == "inference first":
                with torch.inference_mode():
                    module(x[0, 0] if cls is fusedrnn.LSTMCell else x[0])

            def run(x):
                state, total = None, 0
                for step in x:
                    first, second = module(step[0] if cls is fusedrnn.LSTMCell else step, state)
                    state = (first, second) if cls is fusedrnn.LSTMCell else second
                    total = total + first.float().sum()
                return total

            hooks = torch.autograd.graph.save_on_cpu() if way == "hooks" else contextlib.nullcontext()
            with hooks:
                loss = checkpoint(run, x, use_reentrant=False) if way == "checkpoint" else run(x)
        loss.backward()
        grads.append([parameter.grad for parameter in module.parameters()])
    for other in grads[1:]:
        for mine, theirs in zip(grads[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


# The default device


@pytest.mark.parametrize("pack", [None, *PACKED])
@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "no hx"])
def test_default_device_other_than_the_datas(place, assert_same, pack, with_hx):
    """Whatever is made on the way is made where the data are, or where torch wants it."""
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64, device=place.device)
    x = padded(module, T, B, I, device=place.device)
    hx = tuple(states(module, B, device=place.device)) if with_hx else None
    input = pack(x, False) if pack else x
    expected = module(input, hx)
    try:
        torch.set_default_device("meta")
        found = module(input, hx)
    finally:
        torch.set_default_device(None)
    assert_same(found, expected)


def test_default_device_other_than_the_datas_with_lengths(ragged, assert_same):
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64, device=ragged.device)
    x = padded(module, T, B, I, device=ragged.device)
    extras = {
        "lengths": torch.tensor([4, 0, 2], device=ragged.device),
        "reset": torch.rand(T, B, device=ragged.device) < 0.3,
    }
    results = []
    for device in (None, "meta"):
        try:
            torch.set_default_device(device)
            y, state = module(x, **extras)
            results.append([y, state, torch.autograd.grad(y.sum(), [x, *module.parameters()])])
        finally:
            torch.set_default_device(None)
    assert_same(results[1], results[0])


# The cell


def cell_batched(device):
    x, h, c = leaf(B, I, device=device), leaf(B, H, device=device), leaf(B, H, device=device)
    return [x, h, c], (x, (h, c))


def cell_without_hx(device):
    x = leaf(B, I, device=device)
    return [x], (x,)


def cell_unbatched(device):
    x, h, c = leaf(I, device=device), leaf(H, device=device), leaf(H, device=device)
    return [x, h, c], (x, [h, c])


def cell_unbatched_without_hx(device):
    x = leaf(I, device=device)
    return [x], (x,)


def cell_strided(device):
    x, h, c = leaf(I, B, device=device), leaf(B, 2, H, device=device), leaf(B, 2 * H, device=device)
    return [x, h, c], (x.T, (h[:, 1], c[:, ::2]))


def cell_empty_batch(device):
    x, h, c = leaf(0, I, device=device), leaf(0, H, device=device), leaf(0, H, device=device)
    return [x, h, c], (x, (h, c))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "form",
    [cell_batched, cell_without_hx, cell_unbatched, cell_unbatched_without_hx, cell_strided, cell_empty_batch],
)
def test_cell(place, twins, assert_twins, form, bias):
    theirs, ours = twins(I, H, bias=bias, cls=fusedrnn.LSTMCell, device=place.device)
    assert_twins(theirs, ours, lambda: form(place.device))


def test_cell_in_a_loop(place, twins, assert_same, gradients):
    theirs, ours = twins(I, H, cls=fusedrnn.LSTMCell, device=place.device)
    x, results = leaf(T, B, I, device=place.device), []
    for cell in (theirs, ours):
        hx, steps = None, []
        for step in x:
            hx = cell(step, hx)
            steps.append(hx)
        results.append((steps, gradients(steps, [x, *cell.parameters()])))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "form",
    [cell_batched, cell_without_hx, cell_unbatched, cell_unbatched_without_hx, cell_strided, cell_empty_batch],
)
def test_step_of_other_cells(other_place, twins, assert_twins, form, bias):
    kind, place = other_place
    theirs, ours = twins(I, H, bias=bias, cls=kind.step, device=place.device, **kind.options)

    def make():
        leaves, (x, *hx) = form(place.device)
        return leaves[:2], (x, *(state[0] for state in hx))

    assert_twins(theirs, ours, make)


@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.LSTMCell])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_an_error_inside_of_an_operator_is_raised_as_it_is(cls, training):
    """And not taken for a wrong argument, after which the layer would be computed a second time."""
    called = []

    class Fails(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "fusedrnn":
                called.append(operator)
                raise RuntimeError("out of memory")
            return operator(*args, **(kwargs or {}))

    module = cls(3, 4).requires_grad_(training)
    x = torch.ones(2, 3) if cls is fusedrnn.LSTMCell else torch.ones(5, 2, 3)
    with Fails(), pytest.raises(RuntimeError, match="out of memory"), fusedrnn.use_backend("auto"):
        module(x)
    assert len(called) == 1
