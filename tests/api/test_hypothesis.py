"""Shapes and options drawn by Hypothesis: against nn.LSTM and, for what that cannot do, against the definition.

Everything is in float64, where two orders of summation differ by some 1e-14 and whatever is wrong is wrong by more than
the 1e-10 that `assert_same` allows.
"""

from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import reference
from fusedrnn.cells import LSTM

# The fixtures of these tests are the same for every example: a backend, and functions.
EXAMPLES = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def layers(draw, max_layers=3):
    """Arguments of the constructor, T and B, whether hx is given, and a seed for all numbers."""
    H = draw(st.integers(1, 20))
    options = {
        "input_size": draw(st.integers(1, 9)),
        "hidden_size": H,
        "num_layers": draw(st.integers(1, max_layers)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "proj_size": draw(st.integers(0, H - 1)),
    }
    return SimpleNamespace(
        options=options,
        T=draw(st.integers(1, 12)),
        B=draw(st.integers(0, 7)),
        hx=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64)


def pair(drawn, device):
    """An nn.LSTM and a fusedrnn.LSTM of the same weights."""
    torch.manual_seed(drawn.seed)
    theirs = nn.LSTM(**drawn.options, dtype=torch.float64, device=device)
    ours = fusedrnn.LSTM(**drawn.options, dtype=torch.float64, device=device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(drawn, device, batched=True):
    """x and hx, as leaves, for T and B as drawn."""
    o = drawn.options
    H, rows = o["hidden_size"], o["num_layers"] * (2 if o["bidirectional"] else 1)
    batch = (drawn.B,) if batched else ()
    sizes = (*batch, drawn.T) if o["batch_first"] else (drawn.T, *batch)
    x = leaf(*sizes, o["input_size"])
    hx = (leaf(rows, *batch, o["proj_size"] or H), leaf(rows, *batch, H)) if drawn.hx else None
    x = x.to(device).requires_grad_()
    return x, hx and tuple(state.to(device).requires_grad_() for state in hx)


def padded_with(values, exists):
    """Padding of 100, which shows wherever it is read."""
    return values.detach().masked_fill(~exists.unsqueeze(-1), 100.0).requires_grad_()


def existing(drawn, lengths):
    """Which steps exist, laid out as x."""
    exists = torch.arange(drawn.T, device=lengths.device) < lengths.unsqueeze(1)
    return exists if drawn.options["batch_first"] else exists.T


@EXAMPLES
@given(drawn=layers(), form=st.sampled_from(["padded", "unbatched", "packed"]), data=st.data())
def test_equals_nn_lstm(kernel, assert_same, gradients, drawn, form, data):
    if form == "packed":
        drawn.B = max(drawn.B, 1)
        lengths = torch.tensor(data.draw(st.lists(st.integers(1, drawn.T), min_size=drawn.B, max_size=drawn.B)))
    theirs, ours = pair(drawn, kernel.device)
    x, hx = inputs(drawn, kernel.device, batched=form != "unbatched")
    results = []
    for module in (theirs, ours):
        packed = pack_padded_sequence(x, lengths, drawn.options["batch_first"], False) if form == "packed" else None
        outputs = module(x if packed is None else packed, hx)
        results.append((outputs, gradients(outputs, [x, *(hx or ()), *module.parameters()])))
    assert_same(results[1], results[0])


@EXAMPLES
@given(drawn=layers(), data=st.data())
def test_lengths_equal_packing(ragged, assert_same, gradients, drawn, data):
    """Padded input with `lengths`, against nn.LSTM on the PackedSequence of the same sequences."""
    drawn.B = max(drawn.B, 1)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, drawn.T), min_size=drawn.B, max_size=drawn.B)))
    first = drawn.options["batch_first"]
    theirs, ours = pair(drawn, ragged.device)
    x, hx = inputs(drawn, ragged.device)
    x = padded_with(x, existing(drawn, lengths.to(ragged.device)))
    packed, expected_state = theirs(pack_padded_sequence(x, lengths, first, enforce_sorted=False), hx)
    expected = (pad_packed_sequence(packed, first, total_length=drawn.T)[0], expected_state)
    outputs = ours(x, hx, lengths=lengths.to(ragged.device))
    assert_same(outputs, expected)
    leaves = [x, *(hx or ())]
    assert_same(gradients(outputs, [*leaves, *ours.parameters()]), gradients(expected, [*leaves, *theirs.parameters()]))


def by_definition(module, x, hx, lengths, reset, batch_first):
    """What the module returns with return_states, by layers of the reference that autograd differentiates."""
    y, reset = (x.transpose(0, 1), None if reset is None else reset.T) if batch_first else (x, reset)
    D, hs, cs, last = 2 if module.bidirectional else 1, [], [], []
    for layer in range(module.num_layers):
        rows = slice(layer * D, (layer + 1) * D)
        weights = [getattr(module, name) for names in module._all_weights[rows] for name in names]
        h0, c0 = (None, None) if hx is None else (state[rows] for state in hx)
        y, hn, cn, c, _ = reference.layer(LSTM, y, weights, D == 2, h0, c0, lengths, reset)
        last.append((hn, cn))
        hs.append(y.transpose(0, 1) if batch_first else y)
        cs.append(c.transpose(0, 1) if batch_first else c)
    return hs[-1], tuple(torch.cat(state) for state in zip(*last, strict=True)), (hs, cs)


@EXAMPLES
@given(drawn=layers(), with_lengths=st.booleans(), with_reset=st.booleans(), data=st.data())
def test_equals_the_definition(ragged, assert_same, gradients, drawn, with_lengths, with_reset, data):
    """All that is more than nn.LSTM: lengths that may be 0, resets, and the states of every step."""
    _, ours = pair(drawn, ragged.device)
    x, hx = inputs(drawn, ragged.device)
    lengths = reset = None
    if with_lengths:
        lengths = data.draw(st.lists(st.integers(0, drawn.T), min_size=drawn.B, max_size=drawn.B))
        lengths = torch.tensor(lengths, dtype=torch.int64, device=ragged.device)
        x = padded_with(x, existing(drawn, lengths))
    if with_reset:
        reset = torch.rand(x.shape[:2]).to(ragged.device) < data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    expected = by_definition(ours, x, hx, lengths, reset, drawn.options["batch_first"])
    outputs = ours(x, hx, lengths=lengths, reset=reset, return_states=True)
    assert_same(outputs, expected)
    leaves = [x, *(hx or ()), *ours.parameters()]
    assert_same(gradients(outputs, leaves), gradients(expected, leaves))
