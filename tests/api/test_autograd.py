"""Differentiation: of every order, of what is needed and nothing more, and in all the ways that torch has for it."""

import copy
import inspect
from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, vjp, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import dispatch, ops, reference
from fusedrnn.cells import CELLS, LSTM

T, B, I, H = 5, 3, 4, 6


def random(*shape, device="cpu", requires_grad=False):
    return torch.randn(shape, dtype=torch.float64).to(device).requires_grad_(requires_grad)


def flat(nested):
    """The tensors of nested tuples, in order."""
    return [nested] if isinstance(nested, torch.Tensor) else [tensor for part in nested for tensor in flat(part)]


def build(place, *args, **options):
    return fusedrnn.LSTM(*(args or (I, H)), **options, dtype=torch.float64, device=place.device)


# Derivatives of every order


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_backward_in_train_and_eval_mode(kernel, twins, assert_twins, train):
    theirs, ours = twins(I, H, 2, bidirectional=True, device=kernel.device)

    def make():
        x = random(T, B, I, device=kernel.device, requires_grad=True)
        return [x], (x,)

    assert_twins(theirs.train(train), ours.train(train), make)


CHECKED = {
    "plain": ({}, {}),
    "everything": (
        {"bidirectional": True, "proj_size": 1},
        {"lengths": torch.tensor([3, 1]), "reset": torch.tensor([[0, 1], [1, 0], [0, 0]]) > 0, "return_states": True},
    ),
}


@pytest.mark.parametrize(("options", "extras"), CHECKED.values(), ids=CHECKED.keys())
def test_derivatives_against_differences(ragged, options, extras):
    lstm = build(ragged, 2, 2, **options)
    extras = {name: value.to(ragged.device) if name != "return_states" else value for name, value in extras.items()}
    D, P = (2, 1) if options else (1, 2)
    states = (random(D, 2, P, device=ragged.device), random(D, 2, 2, device=ragged.device))
    names = [name for name, _ in lstm.named_parameters()]
    leaves = [random(3, 2, 2, device=ragged.device), *states, *lstm.parameters()]

    def call(x, h0, c0, *weights):
        return tuple(flat(functional_call(lstm, dict(zip(names, weights, strict=True)), (x, (h0, c0)), extras)))

    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert gradcheck(call, leaves)
    if ragged.backend != "reference":  # whose second derivative is autograd's
        assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("more", [False, True], ids=["plain", "everything"])
def test_derivatives_of_other_cells_against_differences(other_kernel, more):
    """First and second, of layers and of one time step; third against the definition."""
    kind, place = other_kernel
    options = {"dtype": torch.float64, "device": place.device, **kind.options}
    module = kind.ours(2, 2, bidirectional=more, **options)
    extras = {k: v if k == "return_states" else v.to(place.device) for k, v in CHECKED["everything"][1].items()}
    h0, x = random(2 if more else 1, 2, 2, device=place.device), random(3, 2, 2, device=place.device)
    names = [name for name, _ in module.named_parameters()]

    def call(x, h0, *weights):
        arguments = dict(zip(names, weights, strict=True)), (x, h0), extras if more else {}
        return tuple(flat(functional_call(module, *arguments)))

    leaves = [leaf.detach().requires_grad_() for leaf in (x, h0, *module.parameters())]
    assert gradcheck(call, leaves)
    if place.backend != "reference":
        assert gradgradcheck(call, leaves)
    if more:
        results = []
        given = (CELLS[kind.cell], x, leaves[2:], True, h0, None, extras["lengths"], extras["reset"])
        for outputs in (call(leaves[0], leaves[1], *leaves[2:])[:2], reference.layer(*given)[:2]):
            given_leaves, orders = leaves[2:], []
            for _ in range(3):
                outputs = grad(sums(outputs), given_leaves, create_graph=True)
                orders.append(torch.cat([g.flatten() for g in outputs]))
            results.append(orders)
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        return
    step = kind.step(2, 3, **options)
    leaves = [random(2, n, device=place.device).requires_grad_() for n in (2, 3)] + list(step.parameters())

    def call_step(x, h, *weights):
        return functional_call(
            step, dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True)), (x, h)
        )

    assert gradcheck(call_step, leaves)
    assert gradgradcheck(call_step, leaves)


def sums(y):
    """A scalar whose derivatives of every order depend on every element of y, differently."""
    return sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).view_as(t)).sum() for t in y)


@pytest.mark.parametrize("wanted", ["everything", "no state", "input alone", "states alone"])
def test_derivatives_of_a_cell_against_differences(kernel, wanted):
    cell = fusedrnn.LSTMCell(2, 3, dtype=torch.float64, device=kernel.device)
    x, h, c = (random(2, n, device=kernel.device) for n in (2, 3, 3))
    cell.requires_grad_(wanted in ("everything", "no state"))
    x.requires_grad_(wanted != "states alone")
    if wanted in ("everything", "states alone"):
        h.requires_grad_()
        c.requires_grad_()
    tensors = [x, *([] if wanted == "no state" else [h, c]), *cell.parameters()]

    def call(x, *rest):
        hx = None if wanted == "no state" else rest[:2]
        weights = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), rest[-4:], strict=True))
        return functional_call(cell, weights, (x, hx))

    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors)
    h_next, _ = call(*tensors)
    h_next.sum().backward()  # the gradient of c is not there
    assert [t.grad is not None for t in tensors] == [t.requires_grad for t in tensors]


def test_third_derivatives(ragged, assert_same):
    lstm = build(ragged, 2, 3, bidirectional=True)
    x, h0, c0 = (random(*shape, device=ragged.device, requires_grad=True) for shape in ((3, 2, 2), *[(2, 2, 3)] * 2))
    lengths, reset = torch.tensor([3, 2]), torch.tensor([[0, 0], [0, 1], [1, 0]]) > 0
    lengths, reset = lengths.to(ragged.device), reset.to(ragged.device)
    weights = list(lstm.parameters())
    y, (hn, cn) = lstm(x, (h0, c0), lengths=lengths, reset=reset)
    results = []
    for outputs in ([y, hn, cn], reference.layer(LSTM, x, weights, True, h0, c0, lengths, reset)[:3]):
        leaves, orders = [x, h0, c0, *weights], []
        for _ in range(3):
            outputs = grad(sums(outputs), leaves, create_graph=True)
            orders.append(outputs)
        results.append(orders)
    assert_same(results[0], results[1])
    assert all(part.abs().max() > 1e-6 for part in results[0][2])


def test_gradient_penalty(kernel, twins, assert_same):
    """A loss that contains a gradient: parameters get theirs through both."""
    theirs, ours = twins(I, H, 2, device=kernel.device)
    x, results = random(T, B, I, device=kernel.device, requires_grad=True), []
    for module in (theirs, ours):
        y = module(x)[0]
        (dx,) = grad(y.square().sum(), x, create_graph=True)
        (y.sum() + dx.square().sum()).backward()
        results.append([dx, *(p.grad for p in module.parameters())])
    assert_same(results[1], results[0])


# What is needed, and nothing more


@pytest.fixture
def needs(monkeypatch):
    """Spies on the backward operators: for each layer, last layer first, what was asked for, and what came back."""
    calls, find = [], ops.backward_op

    def spied(backend):
        def run(*args):
            result = find(backend)(*args)
            calls.append((args[14], result[: len(args[14])]))
            return result

        return run

    monkeypatch.setattr(ops, "backward_op", spied)
    return calls


# (what requires a gradient) -> for each of 2 layers, first to last: x, h0, c0, w_ih, w_hh, b_ih, b_hh
NEEDED = {
    "x": (("x",), "1000000 1000000"),
    "h0": (("h0",), "0100000 1100000"),
    "c0": (("c0",), "0010000 1010000"),
    "weights": (("weight", "bias"), "0001111 1001111"),
    "all": (("x", "h0", "c0", "weight", "bias"), "1111111 1111111"),
    "frozen-biases": (("x", "weight"), "1001100 1001100"),
    "frozen-bias": (("weight", "bias_hh"), "0001101 1001101"),
    "last-layer": (("weight_ih_l1", "bias_hh_l1"), "0000000 0001001"),
    "first-layer": (("weight_hh_l0",), "0000100 1000000"),
}


@pytest.mark.parametrize(("wanted", "expected"), NEEDED.values(), ids=NEEDED.keys())
def test_only_the_gradients_that_are_needed_are_computed(kernel, twins, needs, assert_same, wanted, expected):
    theirs, ours = twins(I, H, 2, device=kernel.device)
    leaves = {"x": random(T, B, I), "h0": random(2, B, H), "c0": random(2, B, H)}
    leaves = {name: leaf.to(kernel.device) for name, leaf in leaves.items()}
    found = []
    for module in (theirs, ours):
        every = leaves | dict(module.named_parameters())
        for name, leaf in every.items():
            leaf.grad = None
            leaf.requires_grad_(name.startswith(wanted))
        y, (hn, cn) = module(leaves["x"], (leaves["h0"], leaves["c0"]))
        sums([y, hn, cn]).backward()
        found.append({name: leaf.grad for name, leaf in every.items()})
    for name, gradient in found[1].items():
        assert (gradient is not None) == name.startswith(wanted), name
    assert_same(*([g for g in grads.values() if g is not None] for grads in reversed(found)))
    masks = [mask for mask in expected.split() if "1" in mask]
    assert [("".join(str(int(need)) for need in asked)) for asked, _ in reversed(needs)] == masks
    for asked, results in needs:
        assert [result.numel() > 0 for result in results] == asked


USED = {"y": [0], "hn": [1], "cn": [2], "y-cn": [0, 2], "hn-cn": [1, 2], "h-of-layer-0": [3], "c-of-layer-1": [6]}


@pytest.mark.parametrize("used", USED.values(), ids=USED.keys())
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "create_graph"])
def test_outputs_that_nobody_uses(kernel, assert_same, used, create_graph):
    lstm = build(kernel, I, H, 2)
    x = random(T, B, I, device=kernel.device, requires_grad=True)
    weights = list(lstm.parameters())
    h_l0, hn_l0, cn_l0, c_l0, _ = reference.layer(LSTM, x, weights[:4])
    h_l1, hn_l1, cn_l1, c_l1, _ = reference.layer(LSTM, h_l0, weights[4:])
    expected = [h_l1, torch.cat([hn_l0, hn_l1]), torch.cat([cn_l0, cn_l1]), h_l0, h_l1, c_l0, c_l1]
    results = []
    for outputs in (expected, flat(lstm(x, return_states=True))):
        loss = sums([outputs[k] for k in used])
        results.append(grad(loss, [x, *weights], create_graph=create_graph, allow_unused=True))
    assert [g is None for g in results[1]] == [g is None for g in results[0]]
    assert_same(*([g for g in grads if g is not None] for grads in reversed(results)))


def test_nothing_is_saved_where_nothing_is_needed(kernel):
    lstm = build(kernel).requires_grad_(False)
    outputs = lstm(random(T, B, I, device=kernel.device), return_states=True)
    y, (hn, cn), states = outputs
    for output in (y, hn, cn, *states.h, *states.c):
        assert not output.requires_grad
        assert output.grad_fn is None


def test_inference_mode(kernel, assert_same):
    lstm, x = build(kernel), random(T, B, I, device=kernel.device)
    with torch.inference_mode():
        y, (hn, cn) = lstm(x)
    assert y.is_inference()
    assert_same([y, hn, cn], lstm(x))


def saved_bytes(cls, device, **options):
    """Bytes of the storages that autograd packs in a forward, each storage once, without x's and the parameters'."""
    module, x = cls(8, 16, **options, device=device), torch.randn(20, 4, 8, device=device)
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = module(x)
    assert outputs[0].requires_grad
    return sum(storage.nbytes() for address, storage in kept.items() if address not in given)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "two-bidirectional"])
def test_memory_saved_for_backward(kernel, options):
    """For float32, T=20, B=4, I=8, H=16, what torch.autograd.graph.saved_tensors_hooks sees: no more than of nn.LSTM.

    Counted are the whole storages of all saved tensors, each once; not the input and the parameters, which live
    anyway. With oneDNN, nn.LSTM's are its outputs, states and the workspace that oneDNN fills in the forward, without
    it those of every operator of every step. Ours are for each unit and step the output, the cell and the four gates.
    """
    layers, D = options.get("num_layers", 1), 2 if options else 1
    ours = saved_bytes(fusedrnn.LSTM, kernel.device, **options)
    assert ours <= saved_bytes(nn.LSTM, kernel.device, **options)
    assert ours <= layers * D * (1 + 1 + 4) * 20 * 4 * 16 * 4


# The graph


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_a_weight_changed_in_place_is_noticed(kernel, name):
    lstm = build(kernel)
    y, _ = lstm(random(T, B, I, device=kernel.device))
    with torch.no_grad():
        getattr(lstm, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


IN_PLACE = {
    "one direction": {},
    "both directions": {"bidirectional": True},
    "both directions, batch first": {"bidirectional": True, "batch_first": True, "num_layers": 2},
    "projection": {"proj_size": 2},
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16},
    "packed": {},
    "packed, as long": {"bidirectional": True},
    "unbatched": {"bidirectional": True},
    "no oneDNN": {},
    "no sequences": {},
}


@pytest.mark.parametrize("form", IN_PLACE)
def test_outputs_may_be_changed_in_place(place, form):
    """Then the gradients are those of the same change made apart."""
    if place.backend == "aten" and form == "one direction":
        pytest.skip("what oneDNN returns there is what its backward needs")
    options = {"dtype": torch.float32, "device": place.device, **IN_PLACE[form]}
    size = (T, I) if form == "unbatched" else (T, 0, I) if form == "no sequences" else (T, B, I)
    x = torch.randn(size, dtype=options["dtype"]).transpose(0, int(options.get("batch_first", False))).to(place.device)
    if form.startswith("packed"):
        x = pack_padded_sequence(x, [5, 4, 2] if form == "packed" else [5, 5, 5])
    theirs, ours = nn.LSTM(I, H, **options), fusedrnn.LSTM(I, H, **options)
    ours.load_state_dict(theirs.state_dict())
    grads = []
    for module, in_place in ((theirs, False), (ours, False), (ours, True)):
        with torch.backends.mkldnn.flags(enabled=form != "no oneDNN", allow_tf32=None):
            y, (h, c) = module(x)
        outputs = [y.data if isinstance(y, PackedSequence) else y, h, c]
        outputs = [t.mul_(0.5).relu_() if in_place else t.mul(0.5).relu() for t in outputs]
        grads.append(grad(sums(outputs), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(grads[1], grads[2], strict=True))
    # float32: two orders of the same sums; float16 rounds to 1e-3 at every step.
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if form == "float16" else {"rtol": 1e-4, "atol": 1e-4}
    for mine, other in zip(grads[2], grads[0], strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def keeps_storage():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@pytest.mark.parametrize("saved", [nullcontext, keeps_storage, torch.autograd.graph.save_on_cpu])
def test_an_output_changed_in_place_is_seen_whatever_saves_it(kernel, saved):
    """torch does not look for changes of what hooks have saved."""
    lstm, x = build(kernel, num_layers=2), random(T, B, I, device=kernel.device)
    weights = list(lstm.parameters())
    expected = grad(lstm(x)[0].relu().sum(), weights)
    for options in ({}, {"return_states": True}):
        with saved():
            y = lstm(x, **options)[0].relu_().sum()
        for _ in range(2):
            found = grad(y, weights, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_outputs_of_a_cell_may_be_changed_in_place(place, twins, assert_same):
    results = []
    for cell in twins(I, H, cls=fusedrnn.LSTMCell, device=place.device):
        for x in (random(B, I, device=place.device), random(I, device=place.device)):
            torch.manual_seed(1)
            h, c = cell(x.fill_(0.3))
            results.append(grad(sums([h.mul_(0.5).relu_(), c.relu_()]), list(cell.parameters())))
    assert_same(results[2:], results[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["batch first", "transposed"])
def test_an_input_that_nn_lstm_copies_may_be_changed(kernel, dtype, form):
    """It is not contiguous, seen with time first; a buffer is filled with the next batch, say, before the backward."""
    lstm = build(kernel, batch_first=form == "batch first").to(dtype)
    x = random(B, T, I, device=kernel.device).to(dtype)
    given = x if form == "batch first" else x.transpose(0, 1)
    expected = grad(lstm(given)[0].sum(), list(lstm.parameters()))
    y, _ = lstm(given)
    x.zero_()
    assert all(torch.equal(a, b) for a, b in zip(grad(y.sum(), list(lstm.parameters())), expected, strict=True))


def test_backward_twice(kernel):
    lstm = build(kernel, I, H, 2, bidirectional=True)
    x = random(T, B, I, device=kernel.device, requires_grad=True)
    y, (hn, cn) = lstm(x)
    loss, leaves = sums([y, hn, cn]), [x, *lstm.parameters()]
    first, second = (grad(loss, leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_accumulate(kernel, assert_same):
    lstm = build(kernel)
    one, two = random(T, B, I, device=kernel.device), random(T, B, I, device=kernel.device)
    expected = grad(sums([lstm(one)[0]]) + sums([lstm(two)[0]]), list(lstm.parameters()))
    for x in (one, two):
        sums([lstm(x)[0]]).backward()
    assert_same([p.grad for p in lstm.parameters()], expected)


def test_copies_have_gradients_of_their_own(kernel, assert_same):
    lstm, x = build(kernel), random(T, B, I, device=kernel.device)
    lstm(x)[0].sum().backward()
    before = [p.grad.clone() for p in lstm.parameters()]
    copied = copy.deepcopy(lstm)
    copied.zero_grad()
    (2 * copied(x)[0].sum()).backward()
    assert_same([p.grad for p in copied.parameters()], [2 * g for g in before])
    for parameter, gradient in zip(lstm.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_checkpoint(kernel, assert_same, reentrant):
    lstm = build(kernel, I, H, 2, bidirectional=True)
    x = random(T, B, I, device=kernel.device, requires_grad=True)
    results = []

    def run(x):
        return tuple(flat(lstm(x)))  # the reentrant form looks for tensors at the top only

    for call in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        x.grad = None
        lstm.zero_grad()
        outputs = call(x)
        sums(outputs).backward()
        results.append([*outputs, x.grad, *(p.grad for p in lstm.parameters())])
    assert_same(results[1], results[0])


def test_saved_tensors_may_be_moved_away(kernel, assert_same):
    lstm, x = build(kernel), random(T, B, I, device=kernel.device, requires_grad=True)
    leaves = [x, *lstm.parameters()]
    expected = grad(sums(lstm(x)[:1]), leaves)
    with torch.autograd.graph.save_on_cpu():
        y, _ = lstm(x)
    assert_same(grad(sums([y]), leaves), expected)


@pytest.mark.parametrize("count", [1, 2], ids=["one-each", "two-each"])
def test_two_threads_at_once(kernel, count):
    """Each runs forward and backward on a module of its own: the same bits as one after the other.

    With two threads of torch's for each, and so few rows of so many units, the CPU kernels share units between them.
    """
    torch.set_num_threads(count)
    modules = [build(kernel, 16, 200) for _ in range(2)]
    xs = [random(8, 1, 16, device=kernel.device) for _ in modules]

    def work(k, results):
        for _ in range(3):
            y, (hn, cn) = modules[k](xs[k])
            results.append([y, hn, cn, *grad(sums([y, hn, cn]), list(modules[k].parameters()))])

    together, apart = ([], []), ([], [])
    threads = [Thread(target=work, args=(k, together[k])) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        work(k, apart[k])
        assert len(together[k]) == 3
        for run, expected in zip(together[k], apart[k], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(run, expected, strict=True))


# Weights that are no parameters


def test_dropped_weights(kernel, twins, assert_same, gradients):
    """The recurrent weight is computed from a parameter and set as an attribute, as AWD-LSTM does."""
    results, x = [], random(T, B, I, device=kernel.device)
    mask = (torch.rand(4 * H, H) < 0.5).to(x)
    for module in twins(I, H, device=kernel.device):
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", raw)
        module.weight_hh_l0 = raw * mask
        outputs = module(x)
        results.append((outputs, gradients(outputs, list(module.parameters()))))
        assert raw in set(module.parameters())
    assert_same(results[1], results[0])


def test_weight_norm(kernel, twins, assert_same, gradients):
    results, x = [], random(T, B, I, device=kernel.device)
    for module in twins(I, H, device=kernel.device):
        for name in ("weight_hh_l0", "weight_ih_l0"):
            parametrizations.weight_norm(module, name)
        with torch.no_grad():
            module.parametrizations.weight_hh_l0.original0.mul_(1.5)
        outputs = module(x)
        results.append((outputs, gradients(outputs, list(module.parameters()))))
    assert len(results[0][1]) == 6
    assert_same(results[1], results[0])


def test_shared_weights(kernel, twins, assert_twins):
    """Both layers are the same parameters, and get the sum of the gradients."""
    theirs, ours = twins(H, H, 2, device=kernel.device)
    for module in (theirs, ours):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{name}_l1", getattr(module, f"{name}_l0"))
        assert len(list(module.parameters())) == 4

    def make():
        x = random(T, B, H, device=kernel.device, requires_grad=True)
        return [x], (x,)

    assert_twins(theirs, ours, make)


# torch.func


def functional(kernel, *args, **options):
    """A module's call as a function of its weights and of x, and what to call it with."""
    lstm = build(kernel, *args, **options)
    weights = {name: parameter.detach().clone() for name, parameter in lstm.named_parameters()}
    x = random(T, B, I, device=kernel.device)

    def call(weights, x):
        y, (hn, cn) = functional_call(lstm, weights, (x,))
        return y, hn, cn

    def loss(weights, x):
        return sums(call(weights, x))

    leaves = [tensor.clone().requires_grad_() for tensor in (*weights.values(), x)]
    outputs = call(dict(zip(weights, leaves, strict=False)), leaves[-1])
    return call, loss, weights, x, leaves, outputs


def test_functional_call_uses_the_weights_it_is_given(kernel, twins, assert_same):
    theirs, ours = twins(I, H, device=kernel.device)
    x = random(T, B, I, device=kernel.device)
    weights = {name: random(*p.shape, device=kernel.device) for name, p in ours.named_parameters()}
    before = ours(x)
    assert_same(functional_call(ours, weights, (x,)), functional_call(theirs, weights, (x,)))
    assert_same(ours(x), before)


def test_func_grad_and_vjp(kernel, assert_same):
    call, loss, weights, x, leaves, outputs = functional(kernel, I, H, 2, bidirectional=True)
    expected = grad(sums(outputs), leaves)
    dweights, dx = torch.func.grad(loss, argnums=(0, 1))(weights, x)
    assert_same([*dweights.values(), dx], expected)
    primals, pullback = vjp(call, weights, x)
    cotangents = grad(sums(outputs), outputs)
    dweights, dx = pullback(cotangents)
    assert_same(primals, outputs)
    assert_same([*dweights.values(), dx], expected)


def test_func_grad_of_grad(kernel, assert_same):
    _, loss, weights, x, leaves, outputs = functional(kernel)
    (dx,) = grad(sums(outputs), leaves[-1:], create_graph=True)
    expected = grad(dx.square().sum(), leaves)

    def penalty(weights, x):
        return torch.func.grad(loss, argnums=1)(weights, x).square().sum()

    dweights, ddx = torch.func.grad(penalty, argnums=(0, 1))(weights, x)
    assert_same([*dweights.values(), ddx], expected)


def two_layers(device):
    lstm = build(SimpleNamespace(device=device), 2, 3, 2, bidirectional=True, proj_size=2)
    return lambda x: torch.cat([part.flatten() for part in flat(lstm(x))]), random(3, 2, 2, device=device)


def packed_rows(device):
    lstm = build(SimpleNamespace(device=device), 2, 3, bidirectional=True)
    sizes = torch.tensor([2, 2, 1])

    def call(x):
        y, (hn, cn) = lstm(PackedSequence(x, sizes))
        return torch.cat([y.data.flatten(), hn.flatten(), cn.flatten()])

    return call, random(5, 2, device=device)


def with_lengths(device):
    lstm = build(SimpleNamespace(device=device), 2, 3, bidirectional=True)
    lengths = torch.tensor([1, 3], device=device)
    return lambda x: lstm(x, lengths=lengths)[0], random(3, 2, 2, device=device)


def unbatched(device):
    lstm = build(SimpleNamespace(device=device), 2, 3)
    return lambda x: lstm(x)[0], random(3, 2, device=device)


def single_step(device):
    lstm = build(SimpleNamespace(device=device), 2, 3)
    return lambda x: lstm(x)[1][1], random(1, 2, 2, device=device)


def one_cell(device):
    cell = fusedrnn.LSTMCell(2, 3, dtype=torch.float64, device=device)
    return lambda x: torch.cat(cell(x)), random(2, 2, device=device)


def skip_padded(kernel, form):
    if form is packed_rows and not dispatch.TABLE[kernel.backend].takes_packed:
        pytest.skip("padded for it, which torch's pad_packed_sequence cannot do inside of torch.func's transforms")


BATCHED = [two_layers, packed_rows, with_lengths, unbatched, single_step, one_cell]


@pytest.mark.parametrize("form", BATCHED, ids=[form.__name__ for form in BATCHED])
def test_jacobians(kernel, assert_same, form):
    """Whichever way all gradients of an output are asked for at once: those that are asked for one after another."""
    skip_padded(kernel, form)
    call, x = form(kernel.device)
    expected = jacobian(call, x)
    assert expected.abs().max() > 1e-3
    assert_same(torch.func.jacrev(call)(x), expected)
    assert_same(torch.func.jacrev(call, chunk_size=5)(x), expected)
    assert_same(jacobian(call, x, vectorize=True), expected)
    x = x.requires_grad_()
    y = call(x)
    units = torch.eye(y.numel(), dtype=y.dtype, device=y.device).view(-1, *y.shape)
    for create_graph in (True, False):
        (dx,) = grad(y, x, units, is_grads_batched=True, create_graph=create_graph)
        assert_same(dx.detach().view_as(expected), expected)


def each(call, *stacked):
    """What vmap is to return: the results of one element after another."""
    results = [call(*(t[k] for t in stacked)) for k in range(len(stacked[0]))]
    return (
        torch.stack(results)
        if isinstance(results[0], torch.Tensor)
        else [torch.stack(t) for t in zip(*results, strict=True)]
    )


@pytest.mark.parametrize("form", BATCHED, ids=[form.__name__ for form in BATCHED])
def test_vmap_over_data(kernel, assert_same, form):
    """Also in one another, under grad, and of the gradient of x."""
    skip_padded(kernel, form)
    call, x = form(kernel.device)
    loss = lambda x: call(x).square().sum()  # noqa: E731
    xs = torch.stack([x, 2 * x, -x])
    assert_same(vmap(call)(xs), each(call, xs))
    assert_same(vmap(call, in_dims=1, out_dims=1)(xs.transpose(0, 1)).transpose(0, 1), each(call, xs))
    with torch.no_grad():
        assert_same(vmap(vmap(call))(torch.stack([xs, xs / 2]))[1], each(call, xs / 2))
    gradients = each(torch.func.grad(loss), xs)
    assert_same(vmap(torch.func.grad(loss))(xs), gradients)
    assert_same(torch.func.grad(lambda xs: vmap(loss)(xs).sum())(xs), gradients)
    xs.requires_grad_()
    assert_same(grad(vmap(loss)(xs).sum(), xs)[0], gradients)
    assert_same(vmap(torch.func.jacrev(call))(xs), each(torch.func.jacrev(call), xs))


@pytest.mark.parametrize(
    "options", [{"num_layers": 2, "bidirectional": True}, {"bias": False}, {"proj_size": 2}], ids=str
)
def test_vmap_over_weights_and_gradients_of_each_sample(kernel, assert_same, options):
    call, loss, weights, x, _, _ = functional(kernel, I, H, **options)
    xs = torch.stack([x, 2 * x, -x])
    several = {name: torch.stack([w, w / 2, -w]) for name, w in weights.items()}
    one = [{name: w[k] for name, w in several.items()} for k in range(3)]
    assert_same(vmap(call, in_dims=(0, None))(several, x), each(lambda k: call(one[k], x), range(3)))
    assert_same(vmap(call)(several, xs), each(lambda k: call(one[k], xs[k]), range(3)))
    gradient = torch.func.grad(loss, argnums=(0, 1))

    def gradients(weights, x):
        dweights, dx = gradient(weights, x)
        return [*dweights.values(), dx]

    of_one_of_several = each(lambda k: gradients(one[k], xs[k]), range(3))
    assert_same(list(vmap(gradients)(several, xs)), of_one_of_several)
    assert_same(list(vmap(gradients, in_dims=(None, 0))(weights, xs)), each(lambda x: gradients(weights, x), xs))


def test_vmap_with_states_lengths_and_resets_of_each_element(kernel, assert_same):
    layer = build(kernel, I, H, bidirectional=True)
    weights = dict(layer.named_parameters())
    x, lengths = (
        random(3, T, B, I, device=kernel.device),
        torch.arange(3 * B, device=kernel.device).view(3, B) % (T + 1),
    )
    h0, c0 = random(3, 2, B, H, device=kernel.device), random(2, B, H, device=kernel.device)
    reset = torch.rand(3, T, B, device=kernel.device) < 0.3

    def loss(weights, x, h0, lengths, reset):
        arguments = {"lengths": lengths, "reset": reset}
        y, state = functional_call(layer, weights, (x, (h0, c0)), arguments)
        return sums([y, *state])

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))

    def flat(weights, *arguments):
        dweights, dx, dh0 = gradients(weights, *arguments)
        return [*dweights.values(), dx, dh0]

    found = vmap(lambda *arguments: flat(weights, *arguments))(x, h0, lengths, reset)
    assert_same(list(found), each(lambda *arguments: flat(weights, *arguments), x, h0, lengths, reset))
    of_states = vmap(lambda h0: loss(weights, x[0], h0, lengths[0], reset[0]))
    assert_same(of_states(h0), each(lambda h0: loss(weights, x[0], h0, lengths[0], reset[0]), h0))


def test_gradients_of_each_sample_are_one_backward(kernel, monkeypatch):
    """And so is the forward: operators are called as often as for one sample."""
    _, loss, weights, x, _, _ = functional(kernel)
    called = []
    for way in ("forward", "backward"):
        real = getattr(ops, f"{way}_op")
        monkeypatch.setattr(ops, f"{way}_op", lambda backend, real=real, way=way: called.append(way) or real(backend))
    vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, torch.stack([x] * 5))
    assert called == ["forward", "backward"]


@pytest.mark.parametrize("form", BATCHED, ids=[form.__name__ for form in BATCHED])
def test_forward_mode(kernel, assert_same, form):
    skip_padded(kernel, form)
    call, x = form(kernel.device)
    expected, v = jacobian(call, x), torch.randn_like(x)
    along = (expected * v).flatten(-x.dim()).sum(-1)
    y, tangent = torch.func.jvp(call, (x,), (v,))
    assert_same([y, tangent], [call(x), along])
    assert_same(torch.func.jacfwd(call)(x), expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, v)))
        assert_same([dual.primal, dual.tangent], [call(x), along])
        leaf = x.clone().requires_grad_()
        (dx,) = grad(call(forward_ad.make_dual(leaf, v)).square().sum(), leaf)
        assert_same(dx.detach(), jacobian(lambda x: call(x).square().sum(), x))


def test_forward_over_reverse(kernel, assert_same):
    call, loss, weights, x, _, _ = functional(kernel, I, 3, 2)
    x = x[:3, :2]
    gradient = lambda x: torch.func.grad(loss, argnums=1)(weights, x)  # noqa: E731
    second = jacobian(lambda x: jacobian(lambda x: loss(weights, x), x, create_graph=True), x)
    assert_same(torch.func.hessian(lambda x: loss(weights, x))(x), second)
    v = torch.randn_like(x)
    assert_same(torch.func.jvp(gradient, (x,), (v,))[1], (second * v).flatten(-x.dim()).sum(-1))
    y, pullback = vjp(lambda x: call(weights, x)[0], x)
    dy = torch.randn_like(y)
    assert_same(torch.func.jvp(lambda dy: pullback(dy)[0], (dy,), (dy,))[1], pullback(dy)[0])
    of_weights = torch.func.jvp(lambda weights: call(weights, x)[0], (weights,), (weights,))[1]
    jacobians = torch.func.jacrev(lambda weights: call(weights, x)[0])(weights)
    assert_same(of_weights, sum((jacobians[name] * w).flatten(y.dim()).sum(-1) for name, w in weights.items()))


def test_jacobian_of_weights(kernel, assert_same):
    """Each element of the output has gradients of the weights of its own."""
    call, _, weights, x, _, _ = functional(kernel, I, 2, num_layers=2)
    found = torch.func.jacrev(lambda weights: call(weights, x)[1])(weights)
    for name, weight in weights.items():
        expected = jacobian(lambda value, name=name: call({**weights, name: value}, x)[1], weight)
        assert_same(found[name], expected)


def test_transforms_of_other_cells(other_kernel, assert_same):
    """Batched gradients, torch.func's grad, and functionalize."""
    kind, place = other_kernel
    options = {"dtype": torch.float64, "device": place.device, **kind.options}
    layers, step = kind.ours(2, 3, 2, bidirectional=True, **options), kind.step(2, 3, **options)
    for call, x in (
        (lambda x: layers(x)[0], random(2, 2, 2, device=place.device)),
        (lambda x: layers(x)[1], random(1, 2, 2, device=place.device)),
        (step, random(2, 2, device=place.device)),
    ):
        expected = jacobian(call, x)
        assert expected.abs().max() > 1e-3
        assert_same(torch.func.jacrev(call)(x), expected)
        assert_same(jacobian(call, x, vectorize=True), expected)
        assert_same(torch.func.functionalize(call)(x), call(x))
        loss = lambda x, call=call: call(x).square().sum()  # noqa: E731 - it is given away at once
        assert_same(torch.func.grad(loss)(x), jacobian(loss, x))
        assert_same(torch.func.jacrev(torch.func.jacrev(loss))(x), hessian(loss, x))
        assert_same(torch.func.hessian(loss)(x), hessian(loss, x))
        assert_same(torch.func.jacfwd(call)(x), expected)
        xs = torch.stack([x, -2 * x])
        assert_same(vmap(call)(xs), each(call, xs))
    for module in (layers, step):
        weights = {name: p.detach() for name, p in module.named_parameters()}
        xs = random(3, 2, 2, device=place.device) if module is step else random(3, 4, 2, 2, device=place.device)

        def gradients(x, module=module, weights=weights):
            loss = lambda weights: sums(flat(functional_call(module, weights, (x,))))  # noqa: E731
            return list(torch.func.grad(loss)(weights).values())

        assert_same(list(vmap(gradients)(xs)), each(gradients, xs))


@pytest.mark.parametrize("form", BATCHED, ids=[form.__name__ for form in BATCHED])
def test_hessians(kernel, assert_same, form):
    skip_padded(kernel, form)
    call, x = form(kernel.device)

    def loss(x):
        return call(x).square().sum()

    expected = hessian(loss, x)
    assert_same(hessian(loss, x, vectorize=True), expected)
    assert_same(torch.func.jacrev(torch.func.jacrev(loss))(x), expected)

    def gradient(x):
        return jacobian(loss, x, create_graph=True, vectorize=True)

    assert_same(jacobian(gradient, x, vectorize=True), expected)


@pytest.mark.parametrize("form", BATCHED, ids=[form.__name__ for form in BATCHED])
def test_functionalize(kernel, assert_same, form):
    skip_padded(kernel, form)
    call, x = form(kernel.device)
    x.requires_grad_()
    y, expected = torch.func.functionalize(call)(x), call(x)
    assert_same(y, expected)
    assert_same(grad(sums([y]), x), grad(sums([expected]), x))
    assert_same(torch.func.grad(lambda x: sums([torch.func.functionalize(call)(x)]))(x), grad(sums([call(x)]), x))


def test_what_a_call_costs_in_training_is_not_reading_a_signature(monkeypatch):
    """torch's autograd.Function.apply reads and binds that of forward at every call, which takes 30 us."""
    lstm, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = lstm(x)[0]
    monkeypatch.setattr(inspect, "signature", lambda *_, **__: pytest.fail("a signature was read"))
    y, _ = lstm(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert all(weight.grad is not None for weight in lstm.parameters())


def test_a_tensor_that_has_left_its_transform():
    """torch.func wraps what it differentiates; whoever keeps the wrapper has a tensor like any other."""
    lstm, x, kept = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3), []

    def keep(x):
        kept.append(x)
        return x.sum()

    torch.func.grad(keep)(x)
    y, _ = lstm(kept[0])
    y.sum().backward()
    assert torch.equal(y, lstm(x)[0])
