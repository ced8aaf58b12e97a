"""Cells of one's own: what is written with `fusedrnn.cell` is what torch's layers are, and wrong ones are refused."""

import copy
import importlib.util
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import testing
from fusedrnn.cells import program

F64 = torch.float64
EXAMPLE = Path(__file__).parents[2] / "examples" / "own_cell.py"


has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


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
    douts = [torch.randn(o.shape, generator=generator, dtype=F64).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, douts)]


@pytest.mark.parametrize(
    ("cell", "theirs"), [(lstm, nn.LSTM), (gru, nn.GRU), (rnn, nn.RNN)], ids=["lstm", "gru", "rnn"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_written_anew_they_are_torchs(cell, theirs, packed):
    options = {"num_layers": 2, "bidirectional": True, "dtype": F64}
    module, baseline = fusedrnn.Recurrent(cell, 3, 5, **options), theirs(3, 5, **options)
    module.load_state_dict(baseline.state_dict())
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

    for ours, expected in zip(run(module), run(baseline), strict=True):
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


def example():
    spec = importlib.util.spec_from_file_location("own_cell", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_maps_of_which_only_the_sum_is_read_are_one_map():
    """So a cell keeps no more than one that is built in."""
    cells = example()
    for made, maps, unread in [
        (lstm, ("s.i", "s.f", "s.g", "s.o"), ()),
        (gru, ("x.n", "s.r", "s.z", "u.n"), ()),
        (cells.mutant, ("x.z", "x.n", "s.r", "u.z", "u.n"), ("u.z",)),
    ]:
        assert (made.definition.maps, made.definition.unread) == (maps, unread)
        assert len(made.definition.saved) == len(maps) - len(unread)


COMPUTED = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "equal": lambda a, b: a == b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: ~a,
    "where": torch.where,
    **{name: getattr(torch, name) for name in ("abs", "exp", "log", "sqrt", "sin", "cos", "erf", "sigmoid", "tanh")},
}


def run_program(recorded, values):
    """The results and gradients of a program for tensors by name."""
    values = dict(values)

    def value(operand):
        return values[operand] if isinstance(operand, str) else torch.tensor(operand, dtype=F64)

    for line in (*recorded.forward, *recorded.backward):
        values[line.result] = COMPUTED[line.operation](*map(value, line.operands))
    return [value(operand) for operand in (*recorded.results, *recorded.gradients)]


FUNCTIONS = {
    "arithmetic": lambda a, b: (2 - a) * b / (1 + b * b) - (-a).abs() + torch.add(a, b, alpha=0.5) - a.sub(b, alpha=2),
    "functions": lambda a, b: a.exp() + (b * b + 1).log() + (a * a + 0.1).sqrt().reciprocal() + a.sin() * b.cos(),
    "powers": lambda a, b: a**2 + a**3 + (b * b + 1) ** -1.5 + (b * b + 1) ** 0.5 + b.square() + (b * b + 1).rsqrt(),
    "choices": lambda a, b: torch.where((a > 0) & (b < 1) | (a == b), a * b, torch.zeros_like(a)) + (a >= b) * a,
    "bounds": lambda a, b: a.clamp(-0.5, 0.5) + b.clamp(min=0) + a.clamp(max=0.3) + torch.minimum(a, b) + a.maximum(b),
    "conditions": lambda a, b: torch.where(~(a <= 0) & (b != a), a, 0.5 * b).masked_fill(a.logical_or(b < 0), 0.1),
    "rectifiers": lambda a, b: a.relu() + F.leaky_relu(b, 0.1) + F.elu(a) + F.hardtanh(b) + F.relu6(4 * a),
    "smooth": lambda a, b: F.silu(a) + F.softplus(b) + F.gelu(a) + F.logsigmoid(b) + F.hardswish(a) + F.softsign(b),
    "constants": lambda a, b: a * torch.tensor(0.5) + torch.full_like(b, 2.0) * b + torch.ones_like(a),
    "in place": lambda a, b: (a * b).mul_(2).add_(a),
    "detached": lambda a, b: a.detach() * b + a.float(),
    "no gradient": lambda a, b: b.detach() * 2 + 1,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_programs_compute_what_functions_do(function):
    cell = fusedrnn.cell(gates=("a",))(lambda x, u: function(x.a, u.a)).definition
    assert not isinstance(cell.program, str), cell.program
    a, b, dm = torch.randn(3, 5, 7, dtype=F64)
    inputs = [t.requires_grad_() for t in ((a, b) if len(cell.maps) == 2 else (a + b,))]
    expected = function(*inputs) if len(inputs) == 2 else function(inputs[0], torch.zeros_like(inputs[0]))
    gradients = [torch.zeros_like(t) for t in inputs]
    if expected.requires_grad:
        gradients = torch.autograd.grad(expected, inputs, dm, allow_unused=True, materialize_grads=True)
    found = run_program(cell.program, {**dict(zip(cell.maps, inputs, strict=True)), "dm": dm})
    for ours, theirs in zip(found, (expected, *gradients), strict=True):
        torch.testing.assert_close(ours.expand_as(theirs), theirs)


OUTSIDE = torch.ones(1)


def draws(x, u):
    return x.a * torch.rand_like(u.a).ge(-1)


def asks(x, u):
    return x.a if x.a.sum() < 1e9 else u.a


def counts_units(x, u):
    return x.a / x.a.shape[-1]


def reads_more(x, u):
    return x.a * OUTSIDE


def raises_to(x, u):
    return x.a.abs() ** u.a.abs()


def overwrites(x, u):
    return (x.a + 0).detach().add_(u.a)


def reads_five(x, u):
    return x.a * u.a * x.b * u.b * x.c


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (draws, "it calls rand_like"),
        (asks, "it calls sum"),
        (counts_units, "it does not do the same at each call, or for each size"),
        (reads_more, "it reads a tensor that is none of its arguments"),
        (raises_to, "pow with an exponent that is no constant"),
        (overwrites, "add_ changes an argument, or what it was made of, in place"),
        (reads_five, r"it reads 5 affine maps \(x.a, x.b, x.c, u.a, u.b\), and kernels have 1 to 4"),
    ],
)
def test_explain_names_what_has_no_code(function, why, triton_device):
    made = fusedrnn.cell(gates=("a", "b", "c") if function is reads_five else ("a",))(function)
    module, x = fusedrnn.Recurrent(made, 3, 5, device=triton_device), torch.randn(4, 2, 3, device=triton_device)
    reason = fusedrnn.explain(module, x).reasons["triton"]
    assert re.search(f"no kernel for the cell {function.__name__}#[0-9]+, and can generate none: {why}", reason)
    assert module(x)[0].shape == (4, 2, 5)
    with fusedrnn.use_backend("triton"), pytest.raises(RuntimeError, match=why):
        module(x)


@has_triton
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_operation_is_written_for_triton(function, triton_device, monkeypatch):
    """Also of what is not finite: each sequence has another number."""
    monkeypatch.setenv("FUSEDRNN_FP32", "ieee")
    made = fusedrnn.cell(gates=("a",))(lambda x, u: function(x.a, u.a))
    module = fusedrnn.Recurrent(made, 1, 1, bias=False, device=triton_device)
    torch.nn.init.ones_(module.weight_ih_l0)
    x = torch.tensor([0.0, 1.0, -1.0, 0.3, 1e-5, 30.0, torch.inf, -torch.inf, torch.nan], device=triton_device)
    h0 = torch.full((1, len(x), 1), 0.5, device=triton_device)

    def run(backend):
        given = x.clone().view(1, -1, 1).requires_grad_()
        with fusedrnn.use_backend(backend):
            return results([module(given, h0)[0]], [given])

    for ours, theirs in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_functions_above_have_every_operation():
    made = [fusedrnn.cell(gates=("a",))(lambda x, u, f=f: f(x.a, u.a)).definition for f in FUNCTIONS.values()]
    found = {line.operation for cell in made for line in (*cell.program.forward, *cell.program.backward)}
    assert found == program.OPERATIONS


@has_triton
@pytest.mark.parametrize(
    ("name", "units", "dtype"),
    [
        ("no_input_gate", 20, torch.bfloat16),
        ("coupled_with_peepholes", 20, torch.float32),
        ("mutant", 20, torch.float16),
        ("rnn", 20, torch.float32),
        ("with_parameters", 40, torch.float32),  # some programs
        ("mutant", 40, torch.float32),
    ],
)
def test_generated_kernels_compute_what_the_reference_does(name, units, dtype, triton_device):
    """With lengths, resets and initial states. The error is held to that of the reference in the same dtype."""
    cell = getattr(example(), name, None) or globals()[name]
    module = fusedrnn.Recurrent(cell, 5, units, bidirectional=True, device=triton_device, dtype=dtype)
    sizes = [(3, 3, 5), *[(2, 3, units)] * (2 if cell.definition.carry == "cell" else 1)]
    inputs = [torch.randn(size).to(triton_device, dtype) for size in sizes]
    calls = {"lengths": torch.tensor([2, 0, 3]).to(triton_device), "reset": (torch.rand(3, 3) < 0.3).to(triton_device)}

    def run(backend, dtype):
        own = copy.deepcopy(module).to(dtype)
        x, *states = (t.to(dtype).requires_grad_() for t in inputs)
        with fusedrnn.use_backend(backend), testing.poisoned():
            y, last = own(x, tuple(states) if len(states) == 2 else states[0], **calls)
        last = last if isinstance(last, tuple) else (last,)
        return results([y, *last], [x, *states, *own.parameters()])

    for our, their, right in zip(*(run("triton", dtype), run("reference", dtype), run("reference", F64)), strict=True):
        error, allowed = (our.double() - right).abs().max(), (their.double() - right).abs().max()
        assert error <= 2 * allowed + 16 * testing.roundoff(dtype) * right.abs().max()


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
    cells = example()
    assert cells.train(cells.coupled_with_peepholes, steps=4, updates=120) < 0.1
    assert len(EXAMPLE.read_text().splitlines()) <= 66
