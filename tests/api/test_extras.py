"""What nn.LSTM does not have: lengths, reset and return_states.

The expectation is nn.LSTM all the same, run sequence by sequence, and step by step where the state is taken out or
reset: values and gradients in float64, on every backend that offers them.
"""

import math

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import ops, testing
from fusedrnn.testing import Case

T, B, I, H = 5, 4, 3, 4
LENGTHS = [3, 0, 5, 1]

OPTIONS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False, "bidirectional": True},
    "all of it": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True},
    "two layers": {"num_layers": 2, "proj_size": 2},
}
every_option = pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
with_hx = pytest.mark.parametrize("with_hx", [True, False], ids=["hx", "no hx"])


def leaf(*shape, device):
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)


def some_resets(device):
    """Every kind: at the first step, at the last, twice in a row, never, and all the time."""
    reset = torch.zeros(T, B, dtype=torch.bool, device=device)
    reset[0, 0] = reset[2, 0] = reset[3, 0] = reset[4, 1] = True
    reset[:, 3] = True
    return reset


def one_layer(module, layer, x, h0, c0, reset):
    """One layer of an nn.LSTM over one sequence x [n, I], a step at a time: every h_t [n, D*P] and c_t, and the last.

    Args: h0 [D, P], c0 [D, H], reset [n] bool.
    """
    D = 2 if module.bidirectional else 1
    ys, cs, hns, cns = [], [], [], []
    for d in range(D):
        weights = [getattr(module, name) for name in module._all_weights[layer * D + d]]
        h, c = h0[d].view(1, 1, -1), c0[d].view(1, 1, -1)
        steps = [None] * len(x)
        for t in reversed(range(len(x))) if d else range(len(x)):
            if reset[t]:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            _, h, c = torch._VF.lstm(
                x[t].view(1, 1, -1), (h, c), weights, module.bias, 1, 0.0, True, False, False
            )  # what nn.LSTM calls
            steps[t] = (h.flatten(), c.flatten())
        h_t, c_t = zip(*steps, strict=True) if steps else ((), ())
        ys.append(torch.stack(h_t) if steps else x.new_zeros(0, h.numel()))
        cs.append(torch.stack(c_t) if steps else x.new_zeros(0, c.numel()))
        hns.append(h.flatten())
        cns.append(c.flatten())
    return torch.cat(ys, -1), torch.cat(cs, -1), torch.stack(hns), torch.stack(cns)


def one_by_one(module, x, hx=None, lengths=None, reset=None):
    """The definition: nn.LSTM on each sequence by itself, cut to its length. x is [T, B, I], reset [T, B].

    Returns y [T, B, ...], (h_n, c_n), and every h_t and c_t of every layer, zero where a sequence has ended.
    """
    T, B, L, D = x.shape[0], x.shape[1], module.num_layers, 2 if module.bidirectional else 1
    P = module.proj_size or module.hidden_size
    h0, c0 = hx or (x.new_zeros(L * D, B, P), x.new_zeros(L * D, B, module.hidden_size))
    lengths = [T] * B if lengths is None else lengths
    reset = torch.zeros(T, B, dtype=torch.bool) if reset is None else reset
    columns = []
    for b, n in enumerate(lengths):
        y, parts = x[:n, b], []
        for layer in range(L):
            rows = slice(layer * D, (layer + 1) * D)
            parts.append(one_layer(module, layer, y, h0[rows, b], c0[rows, b], reset[:n, b]))
            y = parts[-1][0]
        columns.append(parts)

    def padded(layer, part):
        return torch.stack(
            [
                torch.nn.functional.pad(column[layer][part], (0, 0, 0, T - len(column[layer][part])))
                for column in columns
            ],
            1,
        )

    hs, cs = ([padded(layer, part) for layer in range(L)] for part in (0, 1))
    hn, cn = (torch.stack([torch.cat([p[part] for p in column]) for column in columns], 1) for part in (2, 3))
    return hs[-1], (hn, cn), (hs, cs)


def given(module, device, with_hx):
    """x, time-major, and hx or None."""
    L = module.num_layers * (2 if module.bidirectional else 1)
    x = leaf(T, B, I, device=device)
    return x, (leaf(L, B, module.proj_size or H, device=device), leaf(L, B, H, device=device)) if with_hx else None


def laid_out(values, module):
    return values.transpose(0, 1) if module.batch_first else values


def compare(theirs, ours, x, hx, lengths, reset, assert_same, gradients):
    """All that comes out, and the gradients of all of it."""
    y, state, states = one_by_one(theirs, x, hx, None if lengths is None else lengths.tolist(), reset)
    expected = laid_out(y, ours), state, [[laid_out(s, ours) for s in part] for part in states]
    call = laid_out(x, ours), hx
    options = {"lengths": lengths, "reset": None if reset is None else laid_out(reset, ours)}
    outputs = ours(*call, **options, return_states=True)
    assert_same(outputs, expected)
    assert_same(ours(*call, **options), expected[:2])
    inputs = [x, *(hx or ())]
    assert_same(
        gradients(outputs, [*inputs, *ours.parameters()]),
        gradients(expected, [*inputs, *theirs.parameters()]),
    )


@with_hx
@every_option
@pytest.mark.parametrize("lengths", [None, LENGTHS, [5, 5, 5, 5], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("with_reset", [True, False], ids=["reset", "no reset"])
def test_against_nn_lstm_one_by_one(ragged, twins, assert_same, gradients, options, with_hx, lengths, with_reset):
    theirs, ours = twins(I, H, device=ragged.device, **options)
    x, hx = given(ours, ragged.device, with_hx)
    lengths = None if lengths is None else torch.tensor(lengths, device=ragged.device)
    reset = some_resets(ragged.device) if with_reset else None
    compare(theirs, ours, x, hx, lengths, reset, assert_same, gradients)


def test_the_definition_itself_is_nn_lstm(twins, assert_same):
    """What the other tests here compare with, where nn.LSTM can be run at once."""
    theirs, _ = twins(I, H, num_layers=2, bidirectional=True, proj_size=2)
    x, hx = given(theirs, "cpu", True)
    assert_same(one_by_one(theirs, x, hx)[:2], theirs(x, hx))


# lengths


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_both_integer_types(ragged, twins, assert_same, dtype):
    _, ours = twins(I, H, device=ragged.device)
    x, hx = given(ours, ragged.device, True)
    lengths = torch.tensor(LENGTHS, device=ragged.device)
    assert_same(ours(x, hx, lengths=lengths.to(dtype)), ours(x, hx, lengths=lengths))


def test_lengths_may_be_strided(ragged, twins, assert_same):
    _, ours = twins(I, H, bidirectional=True, device=ragged.device)
    x, hx = given(ours, ragged.device, True)
    lengths = torch.tensor(LENGTHS, device=ragged.device)
    every_other = torch.stack([lengths, lengths * 0], 1)[:, 0]
    assert not every_other.is_contiguous()
    assert_same(ours(x, hx, lengths=every_other), ours(x, hx, lengths=lengths))


@every_option
@pytest.mark.parametrize("with_reset", [True, False], ids=["reset", "no reset"])
def test_what_lies_in_the_padding_has_no_influence(ragged, twins, gradients, options, with_reset):
    """NaN there comes out nowhere, neither in an output nor in a gradient; and the gradient of the padding is 0."""
    _, ours = twins(I, H, device=ragged.device, **options)
    x, hx = given(ours, ragged.device, True)
    lengths = torch.tensor(LENGTHS, device=ragged.device)
    exists = torch.arange(T, device=ragged.device).unsqueeze(1) < lengths
    call = {"lengths": lengths, "return_states": True}
    if with_reset:
        call["reset"] = laid_out(some_resets(ragged.device), ours)
    results = []
    for padding in (math.nan, 0.0, math.inf):
        filled = x.detach().masked_fill(~exists.unsqueeze(-1), padding).requires_grad_()
        outputs = ours(laid_out(filled, ours), hx, **call)
        results.append((outputs, gradients(outputs, [filled, *hx, *ours.parameters()])))
    for outputs, grads in results:
        y, state, states = outputs
        assert all(bool(t.isfinite().all()) for t in (y, *state, *grads))
        for values in (y, *states.h, *states.c):
            assert bool((laid_out(values, ours)[~exists] == 0).all())
        assert bool((grads[0][~exists] == 0).all())
    for outputs, grads in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[1], results[0][0][1], strict=True))
        assert torch.equal(outputs[0], results[0][0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


def test_the_gradient_of_an_output_in_the_padding_has_no_influence(ragged, twins):
    _, ours = twins(I, H, num_layers=2, bidirectional=True, device=ragged.device)
    x, _ = given(ours, ragged.device, False)
    lengths = torch.tensor(LENGTHS, device=ragged.device)
    padding = (torch.arange(T, device=ragged.device).unsqueeze(1) >= lengths).unsqueeze(-1)
    grads = []
    for value in (math.nan, 0.0):
        y, _, (hs, cs) = ours(x, lengths=lengths, return_states=True)
        outputs = [y, *hs, *cs]
        douts = [torch.ones_like(t).masked_fill(padding, value) for t in outputs]
        grads.append(torch.autograd.grad(outputs, [x, *ours.parameters()], douts))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_option
def test_a_sequence_of_length_zero_hands_its_state_through(ragged, twins, options):
    _, ours = twins(I, H, device=ragged.device, **options)
    x, hx = given(ours, ragged.device, True)
    lengths = torch.tensor(LENGTHS, device=ragged.device)
    y, state = ours(laid_out(x, ours), hx, lengths=lengths)
    assert bool((laid_out(y, ours)[:, 1] == 0).all())
    for final, initial in zip(state, hx, strict=True):
        assert torch.equal(final[:, 1], initial[:, 1])
        dinitial, dx = torch.autograd.grad(final[:, 1].sum(), (initial, x), retain_graph=True)
        assert torch.equal(dinitial[:, 1], torch.ones_like(dinitial[:, 1]))
        assert bool((dx[:, 1] == 0).all())


def test_lengths_and_an_empty_batch(ragged, twins):
    _, ours = twins(I, H, bidirectional=True, device=ragged.device)
    lengths = torch.zeros(0, dtype=torch.int64, device=ragged.device)
    reset = torch.zeros(T, 0, dtype=torch.bool, device=ragged.device)
    x = leaf(T, 0, I, device=ragged.device)
    y, (h, c), (hs, cs) = ours(x, lengths=lengths, reset=reset, return_states=True)
    assert (y.shape, h.shape, c.shape) == ((T, 0, 2 * H), (2, 0, H), (2, 0, H))
    assert (hs[0].shape, cs[0].shape) == ((T, 0, 2 * H), (T, 0, 2 * H))
    for parameter, grad in zip(ours.parameters(), torch.autograd.grad(y.sum(), list(ours.parameters())), strict=True):
        assert torch.equal(grad, torch.zeros_like(parameter))


def test_lengths_agree_with_a_packed_sequence(ragged, twins, assert_same, gradients):
    theirs, ours = twins(I, H, num_layers=2, bidirectional=True, proj_size=2, device=ragged.device)
    x, hx = given(ours, ragged.device, True)
    lengths = [3, 1, 5, 2]
    packed, state = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    expected = pad_packed_sequence(packed)[0], state
    outputs = ours(x, hx, lengths=torch.tensor(lengths, device=ragged.device))
    assert_same(outputs, expected)
    assert_same(
        gradients(outputs, [x, *hx, *ours.parameters()]),
        gradients(expected, [x, *hx, *theirs.parameters()]),
    )


# reset


def test_reset_at_the_first_step_forgets_hx(kernel, twins, assert_same):
    _, ours = twins(I, H, num_layers=2, device=kernel.device)
    x, hx = given(ours, kernel.device, True)
    reset = torch.zeros(T, B, dtype=torch.bool, device=kernel.device)
    reset[0] = True
    assert_same(ours(x, hx, reset=reset), ours(x))


def test_reset_splits_a_sequence_in_two(kernel, twins, assert_same):
    """Forward the second part starts anew; in the reverse direction the step of the reset itself does."""
    _, ours = twins(I, H, bidirectional=True, device=kernel.device)
    x, _ = given(ours, kernel.device, False)
    reset = torch.zeros(T, B, dtype=torch.bool, device=kernel.device)
    reset[3] = True
    y, _ = ours(x, reset=reset)
    assert_same(y[:3, :, :H], ours(x[:3])[0][..., :H])
    assert_same(y[3:, :, :H], ours(x[3:])[0][..., :H])
    assert_same(y[4:, :, H:], ours(x[4:])[0][..., H:])
    assert_same(y[:4, :, H:], ours(x[:4])[0][..., H:])


def test_reset_of_unbatched_input(kernel, twins, assert_same, gradients):
    theirs, ours = twins(I, H, num_layers=2, bidirectional=True, device=kernel.device)
    x, reset = leaf(T, I, device=kernel.device), some_resets(kernel.device)[:, 0]
    y, state, (hs, cs) = one_by_one(theirs, x.unsqueeze(1), reset=reset.unsqueeze(1))
    expected = y[:, 0], [s[:, 0] for s in state], [[s[:, 0] for s in part] for part in (hs, cs)]
    outputs = ours(x, reset=reset, return_states=True)
    assert_same(outputs, expected)
    assert_same(gradients(outputs, [x, *ours.parameters()]), gradients(expected, [x, *theirs.parameters()]))


def test_reset_may_be_strided_or_expanded(kernel, twins, assert_same):
    _, ours = twins(I, H, device=kernel.device)
    x, hx = given(ours, kernel.device, True)
    reset = some_resets(kernel.device)
    assert_same(ours(x, hx, reset=reset.T.contiguous().T), ours(x, hx, reset=reset))
    column = reset[:, :1]
    assert_same(ours(x, hx, reset=column.expand(T, B)), ours(x, hx, reset=column.repeat(1, B)))


# PackedSequence


@with_hx
@every_option
@pytest.mark.parametrize("lengths", [[3, 1, 5, 2], [5, 5, 5, 5]], ids=str)
def test_packed_with_reset_and_states(kernel, twins, assert_same, gradients, options, with_hx, lengths):
    """reset is [T, B] whatever batch_first says, and in the order of the batch before packing."""
    theirs, ours = twins(I, H, device=kernel.device, **options)
    x, hx = given(ours, kernel.device, with_hx)
    reset = some_resets(kernel.device)
    y, state, states = one_by_one(theirs, x, hx, lengths, reset)
    outputs = ours(pack_padded_sequence(x, lengths, enforce_sorted=False), hx, reset=reset, return_states=True)

    def unpacked(packed):
        assert isinstance(packed, PackedSequence)
        return pad_packed_sequence(packed)[0]

    expected = y, state, states
    padded = unpacked(outputs[0]), outputs[1], [[unpacked(s) for s in part] for part in outputs[2]]
    assert_same(padded, expected)
    inputs = [x, *(hx or ())]
    assert_same(
        gradients(padded, [*inputs, *ours.parameters()]),
        gradients(expected, [*inputs, *theirs.parameters()]),
    )


# return_states


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "proj_size": 2, "batch_first": True}], ids=str)
def test_states_are_the_outputs_and_end_in_the_final_states(kernel, twins, options):
    _, ours = twins(I, H, device=kernel.device, **options)
    x, hx = given(ours, kernel.device, True)
    y, (h, c), states = ours(laid_out(x, ours), hx, return_states=True)
    assert isinstance(states, fusedrnn.LSTMStates)
    assert len(states.h) == len(states.c) == ours.num_layers
    assert states.h[-1] is y
    for layer in range(ours.num_layers):
        assert torch.equal(laid_out(states.h[layer], ours)[-1], h[layer])
        assert torch.equal(laid_out(states.c[layer], ours)[-1], c[layer])


def test_states_are_those_before_dropout(kernel, twins):
    _, ours = twins(I, H, num_layers=2, dropout=0.5, device=kernel.device)
    x, _ = given(ours, kernel.device, False)
    trained = ours(x, return_states=True)[2]
    evaluated = ours.eval()(x, return_states=True)[2]
    assert torch.equal(trained.h[0], evaluated.h[0])
    assert not torch.equal(trained.h[1], evaluated.h[1])


def test_states_do_not_change_what_else_comes_out(kernel, twins):
    _, ours = twins(I, H, num_layers=2, bidirectional=True, device=kernel.device)
    x, hx = given(ours, kernel.device, True)
    y, (h, c), _ = ours(x, hx, return_states=True)
    for no_grad in (True, False):
        with torch.set_grad_enabled(not no_grad):
            expected, (expected_h, expected_c) = ours(x, hx)
        assert torch.equal(y, expected)
        assert torch.equal(h, expected_h)
        assert torch.equal(c, expected_c)


def test_gradient_of_one_cell_state(kernel, twins):
    """c_t depends on what comes before step t, and on nothing after it."""
    _, ours = twins(I, H, device=kernel.device)
    x, (h0, c0) = given(ours, kernel.device, True)
    c = ours(x, (h0, c0), return_states=True)[2].c[0]
    dx, dc0 = torch.autograd.grad(c[2].sum(), (x, c0))
    assert bool((dx[3:] == 0).all())
    assert bool((dx[:3] != 0).any(-1).all())
    assert bool((dc0 != 0).all())


OF_OTHER_CELLS = [
    {"lengths": True},
    {"lengths": True, "hx": False, "bidirectional": True, "batch_first": True},
    {"reset": True, "bias": False},
    {"lengths": True, "reset": True, "states": True, "layers": 2, "bidirectional": True, "strided": True},
    {"packed": True, "reset": True, "states": True, "layers": 2, "bidirectional": True, "batch_first": True},
]


@pytest.mark.parametrize("options", OF_OTHER_CELLS, ids=lambda options: Case(5, 4, 3, 5, **options).id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_other_cells_against_torchs_one_by_one(other_kernel, options, dtype):
    """Values and gradients by the rule; torch's own is called one step at a time where it lacks what is asked for."""
    kind, place = other_kernel
    case = Case(5, 4, 3, 5, cell=kind.cell, dtype=dtype, **options)
    with testing.poisoned():
        found = testing.evaluate(testing.call, kind.ours, case, place.device)
    answers = testing.answers(case, place.device)
    assert found.keys() == answers.keys()
    assert {"y", "hn", "dx"} <= found.keys()
    assert not {"cn", "c_l0", "dc0"} & found.keys()
    for name, answer in answers.items():
        testing.assert_as_exact_as(name, found[name], *answer)


def test_states_of_other_cells(other_kernel):
    """A tuple of every layer's h under a name; the last one is the output, and their ends are h_n."""
    kind, place = other_kernel
    module = kind.ours(3, 5, 2, **kind.options, device=place.device)
    x, lengths = torch.randn(4, 2, 3, device=place.device), torch.tensor([4, 2], device=place.device)
    y, h, states = module(x, lengths=lengths, return_states=True)
    assert type(states) is fusedrnn.RNNStates
    assert states._fields == ("h",)
    assert y is states.h[-1]
    for layer, last in zip(states.h, h, strict=True):
        assert torch.equal(torch.stack([layer[3, 0], layer[1, 1]]), last)
        assert not layer[2:, 1].any()
    packed = pack_padded_sequence(x, lengths.cpu())
    data, _, of_rows = module(packed, return_states=True)
    assert all(torch.equal(rows.batch_sizes, packed.batch_sizes) for rows in of_rows.h)
    torch.testing.assert_close(pad_packed_sequence(data)[0], y)


# Errors


def sizes(**kwargs):
    return torch.tensor([5, 1, 2, 0], **kwargs)


def resets(*shape, **kwargs):
    return torch.zeros(*shape, dtype=kwargs.pop("dtype", torch.bool), **kwargs)


@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.CompilableLSTM])
@pytest.mark.parametrize(
    ("options", "call", "kind", "text"),
    [
        ({}, {"lengths": [5, 1, 2, 0]}, TypeError, "lengths must be a Tensor, got list"),
        ({}, {"lengths": sizes().float()}, TypeError, "lengths must be int64 or int32, got torch.float32"),
        ({}, {"lengths": sizes().bool()}, TypeError, "lengths must be int64 or int32, got torch.bool"),
        ({}, {"lengths": sizes()[:3]}, ValueError, r"lengths must have shape \[4\].*got \[3\]"),
        ({}, {"lengths": sizes()[:1]}, ValueError, r"lengths must have shape \[4\].*got \[1\]"),
        ({}, {"lengths": torch.tensor(5)}, ValueError, r"lengths must have shape \[4\].*got \[\]"),
        ({}, {"lengths": sizes().view(4, 1)}, ValueError, r"lengths must have shape \[4\].*got \[4, 1\]"),
        ({}, {"lengths": sizes() + 1}, ValueError, r"lengths must be in 0..5.*got 1..6"),
        ({}, {"lengths": sizes() - 1}, ValueError, r"lengths must be in 0..5.*got -1..4"),
        ({}, {"lengths": sizes(device="meta")}, RuntimeError, "lengths must be on the device of input, cpu, got meta"),
        ({"batch_first": True}, {"lengths": sizes()}, ValueError, r"lengths must have shape \[5\].*got \[4\]"),
        ({}, {"reset": [[True]]}, TypeError, "reset must be a Tensor, got list"),
        ({}, {"reset": resets(5, 4, dtype=torch.uint8)}, TypeError, "reset must be bool, got torch.uint8"),
        ({}, {"reset": resets(5, 4, dtype=torch.float32)}, TypeError, "reset must be bool, got torch.float32"),
        ({}, {"reset": resets(4, 5)}, ValueError, r"reset must have shape \[5, 4\].*got \[4, 5\]"),
        ({}, {"reset": resets(5, 1)}, ValueError, r"reset must have shape \[5, 4\].*got \[5, 1\]"),
        ({}, {"reset": resets(5)}, ValueError, r"reset must have shape \[5, 4\].*got \[5\]"),
        ({}, {"reset": resets(5, 4, 1)}, ValueError, r"reset must have shape \[5, 4\].*got \[5, 4, 1\]"),
        (
            {},
            {"reset": resets(5, 4, device="meta")},
            RuntimeError,
            "reset must be on the device of input, cpu, got meta",
        ),
        ({"batch_first": True}, {"reset": resets(4, 5)}, ValueError, r"reset must have shape \[5, 4\].*got \[4, 5\]"),
    ],
)
def test_errors(cls, options, call, kind, text):
    with pytest.raises(kind, match=text):
        cls(I, H, **options)(torch.zeros(5, 4, I), **call)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        ({"lengths": torch.tensor([3])}, ValueError, r"lengths must be None for unbatched input"),
        ({"reset": resets(5, 1)}, ValueError, r"reset must have shape \[5\].*got \[5, 1\]"),
        ({"reset": resets(4)}, ValueError, r"reset must have shape \[5\].*got \[4\]"),
    ],
)
def test_errors_of_unbatched_input(call, kind, text):
    with pytest.raises(kind, match=text):
        fusedrnn.LSTM(I, H)(torch.zeros(5, I), **call)


@pytest.mark.parametrize("sorted_", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        ({"lengths": torch.tensor([3, 1])}, ValueError, "lengths must be None when input is a PackedSequence"),
        ({"reset": [True]}, TypeError, "reset must be a Tensor, got list"),
        ({"reset": resets(3, 2, dtype=torch.uint8)}, TypeError, "reset must be bool, got torch.uint8"),
        ({"reset": resets(2, 3)}, ValueError, r"reset must have shape \[3, 2\].*got \[2, 3\]"),
        ({"reset": resets(4, 2)}, ValueError, r"reset must have shape \[3, 2\].*got \[4, 2\]"),
        ({"reset": resets(3, 3)}, ValueError, r"reset must have shape \[3, 2\].*got \[3, 3\]"),
        ({"reset": resets(3)}, ValueError, r"reset must have shape \[3, 2\].*got \[3\]"),
    ],
)
def test_errors_of_packed_input(sorted_, call, kind, text):
    lengths = [3, 1] if sorted_ else [1, 3]
    packed = pack_padded_sequence(torch.zeros(3, 2, I), lengths, enforce_sorted=sorted_)
    with pytest.raises(kind, match=text):
        fusedrnn.LSTM(I, H)(packed, **call)


def test_what_is_more_than_nn_lstm_is_keyword_only():
    with pytest.raises(TypeError):
        fusedrnn.LSTM(I, H)(torch.zeros(5, 4, I), None, sizes())
    with pytest.raises(TypeError):
        fusedrnn.LSTMCell(I, H)(torch.zeros(4, I), reset=resets(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_product_is_given_padding(backend, dtype, assert_padding_is_not_read):
    if backend == "cpu" and ops.cpu_unavailable is not None:
        pytest.skip(ops.cpu_unavailable)
    pairs = {
        "reference": (ops._reference_forward, ops._reference_backward),  # whose products are seen inside
        "cpu": (ops.forward_op("cpu"), ops.backward_op("cpu")),
    }
    assert_padding_is_not_read(*pairs[backend], dtype, "cpu")
