"""The second derivative of torch's own layers where torch has none, as on a GPU."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import aten
from fusedrnn.second_derivative import differentiable_twice


def layers(x, w, b):
    return (x @ w).tanh(), x.sum(0) * w.sum() + b, w.exp()


class Once(torch.autograd.Function):
    """`layers`, with a derivative that has none."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w, b)
        return layers(x, w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        calls.append("once")
        with torch.enable_grad():
            tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            return grad(layers(*tensors), tensors, douts)


calls = []


def again(*tensors):
    calls.append("again")
    return layers(*tensors)


@pytest.fixture
def tensors():
    calls.clear()
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (4, 4), (4,))]


def twice(*tensors):
    return differentiable_twice(Once.apply, again, tensors)


def test_derivatives(tensors):
    assert gradcheck(twice, tensors)
    assert gradgradcheck(twice, tensors)


def test_third_derivative(tensors):
    def gradient(*tensors):
        outputs = layers(*tensors) if ours is None else twice(*tensors)
        return grad(outputs[0].sum(), tensors[0], create_graph=True)

    results = []
    for ours in (None, twice):  # noqa: B007 - `gradient` reads it
        (second,) = grad(gradient(*tensors)[0].square().sum(), tensors[0], create_graph=True)
        results.append(grad(second.square().sum(), tensors[1])[0])
    torch.testing.assert_close(*results)


def test_first_derivative_is_torchs_own(tensors):
    expected = grad(layers(*tensors)[0].sum(), tensors, allow_unused=True)
    found = grad(twice(*tensors)[0].sum(), tensors, allow_unused=True)
    assert calls == ["once"]
    torch.testing.assert_close(found[:2], expected[:2])


@pytest.mark.parametrize("used", [0, 1, 2])
@pytest.mark.parametrize("wanted", [0, 1])
def test_a_part_of_the_outputs_and_of_the_gradients(tensors, used, wanted):
    results = []
    for outputs in (layers(*tensors), twice(*tensors)):
        (first,) = grad(outputs[used].sum(), tensors[wanted], create_graph=True, allow_unused=True)
        if first is None:
            results.append(None)
            continue
        second = grad(first.square().sum(), tensors, allow_unused=True, materialize_grads=True)
        results.append((first, *second))
    torch.testing.assert_close(*results)


def test_a_backward_that_never_comes_to_the_inputs_leaves_nothing_behind(tensors):
    """Its gradients of outputs are of no concern to the next one."""
    expected = grad(layers(*tensors)[0].sum(), tensors[:2], create_graph=True)
    y, z, _ = twice(*tensors)
    grad(z.sum() * 7, z)
    found = grad(y.sum(), tensors[:2], create_graph=True)
    torch.testing.assert_close(found, expected)


def test_a_graph_that_is_kept_can_be_gone_through_again(tensors):
    expected = grad(layers(*tensors)[1].sum(), tensors[0], create_graph=True)
    y, z, _ = twice(*tensors)
    grad(y.sum(), tensors[0], retain_graph=True)
    found = grad(z.sum(), tensors[0], create_graph=True)
    torch.testing.assert_close(found, expected)


class LSTMOnce(torch.autograd.Function):
    """torch's own layers as on a GPU: their derivative has none."""

    @staticmethod
    def forward(ctx, own, options, x, h0, c0, *weights):
        ctx.own, ctx.options = own, options
        ctx.save_for_backward(x, h0, c0, *weights)
        return own(x, *options[0], (h0, c0), weights, *options[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        with torch.enable_grad():
            x, h0, c0, *weights = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            outputs = ctx.own(x, *ctx.options[0], (h0, c0), weights, *ctx.options[1])
            return None, None, *grad(outputs, [x, h0, c0, *weights], douts)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """nn.LSTM's derivative has none, and `fusedrnn` knows it."""
    own = torch._VF.lstm

    def once(input, *rest):
        packed = isinstance(rest[0], torch.Tensor)
        sizes, (hx, weights, *options) = (rest[:1], rest[1:]) if packed else ((), rest)
        return LSTMOnce.apply(own, (sizes, options), input, *hx, *weights)

    monkeypatch.setattr(torch._VF, "lstm", once)
    monkeypatch.setattr(aten, "lacks_second_derivative", lambda _: True)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}, {"batch_first": True, "bias": False}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["padded", "packed", "unbatched"])
def test_second_derivatives_of_torchs_own_layers(as_on_a_gpu, kind, options):
    lstm = fusedrnn.LSTM(3, 4, dtype=torch.float64, **options)
    x = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 1, 3, 2])

    def outputs():
        batch_first = options.get("batch_first", False)
        given = {
            "padded": lambda: x,
            "packed": lambda: pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False),
            "unbatched": lambda: x[0],
        }[kind]()
        y, (hn, cn) = lstm(given)
        return [y.data if kind == "packed" else y, hn, cn]

    def second():
        leaves = [x, *lstm.parameters()]
        first = grad(sum(t.square().sum() for t in outputs()), leaves, create_graph=True)
        return [*first, *grad(sum(g.square().sum() for g in first), leaves)]

    with fusedrnn.use_backend("reference"):
        expected = second()
    with fusedrnn.use_backend("aten"):
        torch.testing.assert_close(second(), expected)


def test_dropout_between_layers_has_no_second_derivative_there(as_on_a_gpu):
    """What was dropped cannot be dropped again. The first derivative is torch's own."""
    lstm = fusedrnn.LSTM(3, 4, 2, dropout=0.5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    with fusedrnn.use_backend("aten"):
        lstm(x)[0].sum().backward()
        (dx,) = grad(lstm(x)[0].sum(), x, create_graph=True)
        assert not dx.requires_grad
        (dx,) = grad(lstm.eval()(x)[0].sum(), x, create_graph=True)
        assert grad(dx.square().sum(), x)[0].isfinite().all()
