"""Cells of one's own: what is written with `fusedrnn.cell` is what torch's layers are, and wrong ones are refused."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

F64 = torch.float64
EXAMPLE = Path(__file__).parents[1] / "examples" / "own_cell.py"


@fusedrnn.cell(gates=("i", "f", "g", "o"), state="c")
def lstm(x, u, c):
    i, f, g, o = (a + b for a, b in zip(x, u, strict=True))
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@fusedrnn.cell(gates=("r", "z", "n"), state="h")
def gru(x, u, h):
    r, z = (x.r + u.r).sigmoid(), (x.z + u.z).sigmoid()
    return (1 - z) * (x.n + r * u.n).tanh() + z * h


@fusedrnn.cell(gates=("h",))
def rnn(x, u):
    return (x.h + u.h).tanh()


@fusedrnn.cell(gates=("i", "g"), state="c", parameters=("p", "q"))
def with_parameters(x, u, c, p):
    i = (x.i + u.i + p.p * c).sigmoid()
    c = (1 - i) * c + i * (x.g + u.g).tanh()
    return c * (p.q * c).sigmoid(), c


def results(outputs, leaves):
    generator = torch.Generator().manual_seed(3)
    douts = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, douts)]


@pytest.mark.parametrize(
    ("cell", "theirs"), [(lstm, nn.LSTM), (gru, nn.GRU), (rnn, nn.RNN)], ids=["lstm", "gru", "rnn"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_written_anew_they_are_torchs(cell, theirs, packed):
    options = {"num_layers": 2, "bidirectional": True, "dtype": F64}
    module, torchs = fusedrnn.Recurrent(cell, 3, 5, **options), theirs(3, 5, **options)
    module.load_state_dict(torchs.state_dict())
    x = torch.randn(4, 3, 3, dtype=F64, requires_grad=True)
    states = [torch.randn(4, 3, 5, dtype=F64, requires_grad=True) for _ in range(2 if theirs is nn.LSTM else 1)]
    hx = tuple(states) if len(states) == 2 else states[0]

    def run(layer):
        if not packed:
            y, last = layer(x, hx)
        else:
            rows, last = layer(pack_padded_sequence(x, [2, 4, 3], enforce_sorted=False), hx)
            y = pad_packed_sequence(rows)[0]
        return results([y, *(last if isinstance(last, tuple) else [last])], [x, *states, *layer.parameters()])

    for ours, expected in zip(run(module), run(torchs), strict=True):
        torch.testing.assert_close(ours, expected)


def test_derivatives_of_both_orders_and_every_option():
    module = fusedrnn.Recurrent(with_parameters, 2, 3, bidirectional=True, dtype=F64)
    names = [name for name, _ in module.named_parameters()]
    assert list(module.weight_unit_l0_reverse.shape) == [6]
    lengths, reset = torch.tensor([2, 0, 3]), torch.rand(3, 3) < 0.3
    inputs = [torch.randn(3, 3, 2, dtype=F64), *torch.randn(2, 2, 3, 3, dtype=F64)]
    inputs = [t.detach().requires_grad_() for t in (*inputs, *module.parameters())]

    def run(x, h, c, *weights):
        parameters = dict(zip(names, weights, strict=True))
        y, (hn, cn) = torch.func.functional_call(module, parameters, (x, (h, c)), {"lengths": lengths, "reset": reset})
        return y, hn, cn

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_copies_pickles_and_compiled():
    torch._dynamo.reset()  # all modules share one forward, and Dynamo compiles that a few times only
    module, x = fusedrnn.Recurrent(gru, 3, 5, 2, dropout=0.5).eval(), torch.randn(4, 2, 3)
    y = module(x)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], y)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0], y)
    assert "<cell gru of gates r, z, n>, 3, 5, num_layers=2" in repr(module)
    assert fusedrnn.explain(module, x).backend == "reference"
    assert "no kernel for the cell gru" in fusedrnn.explain(module, x).reasons["cpu"]


def test_half_precision_is_computed_in_float32():
    module, x = fusedrnn.Recurrent(gru, 3, 40, dtype=torch.bfloat16), torch.randn(9, 2, 3, dtype=torch.bfloat16)
    ours, wide = module(x)[0], copy.deepcopy(module).float()(x.float())[0]
    assert (ours.float() - wide).abs().max() < 0.01


def mixes(x, u):
    return x.a.flip(-1)


def mixes_rows(x, u):
    return x.a + u.a.sum(0)


def shrinks(x, u):
    return x.a[:, :1]


def counts(x, u):
    return 1.0


def forgets_c(x, u, c):
    return x.a


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        (mixes, {}, ValueError, "mixes must be pointwise"),
        (mixes_rows, {}, ValueError, "mixes_rows must be pointwise"),
        (shrinks, {}, ValueError, r"shape of a map, \[B, H\], got \[2, 1\]"),
        (counts, {}, TypeError, "counts must return a Tensor for each state, got float"),
        (forgets_c, {"state": "c"}, TypeError, r"forgets_c must return \(h, c\), got Tensor"),
        (rnn, {"state": "x"}, ValueError, "state must be 'c', 'h' or None, got 'x'"),
        (rnn, {"gates": ()}, ValueError, "gates must have at least one name"),
        (rnn, {"gates": ("a", "a")}, ValueError, "names must differ"),
        (rnn, {"gates": ("class",)}, ValueError, "names of gates and parameters must be those of attributes"),
        (rnn, {"parameters": (1,)}, TypeError, "names must be str, got int"),
    ],
)
def test_functions_that_are_no_cells(function, options, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.cell(**{"gates": ("a",), **options})(function)


def test_what_is_no_cell_is_no_module():
    with pytest.raises(TypeError, match=r"made by fusedrnn\.cell, got function"):
        fusedrnn.Recurrent(mixes, 3, 5)
    with pytest.raises(ValueError, match="proj_size"):
        fusedrnn.Recurrent(gru, 3, 5, proj_size=2)


def test_the_example_learns():
    spec = importlib.util.spec_from_file_location("own_cell", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.train(example.coupled_with_peepholes, steps=4, updates=120) < 0.1
    assert len(EXAMPLE.read_text().splitlines()) <= 66
