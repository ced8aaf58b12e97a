"""The Triton kernels: all results of a layer, forward and backward, in every regime that the planner knows.

On a GPU they run as they are. Elsewhere they run in Triton's interpreter, one program after another, which tests them
in two forms of launch: all steps in one launch where a program has all units, and one step, or one phase of it, for
each launch where there is a barrier. The tolerance is that of fusedrnn/testing.py; outputs are poisoned with NaN.
"""

import dataclasses
import importlib.util
import inspect
import math
from functools import partial

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import autograd, dispatch, gpu, ops, testing
from fusedrnn.cells import CELLS, VARIANTS
from fusedrnn.testing import Answer, Case

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Where there is no GPU, Triton is told to interpret before it sees a kernel, and while it runs one.

    Plans are those of TF32, as by default on a GPU; the interpreter multiplies them as IEEE float32.
    """
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("FUSEDRNN_FP32", "tf32")


@pytest.fixture
def launch(interpreter):
    from fusedrnn.kernels import launch

    assert launch.INTERPRETED != ON_GPU
    return launch


@pytest.fixture
def planner(launch):
    return launch.planner


def check(case):
    with fusedrnn.use_backend("triton"), testing.poisoned():
        ours = testing.evaluate(testing.call, fusedrnn.LSTM, case, DEVICE)
    expected = testing.answers(case, DEVICE)
    assert ours.keys() == expected.keys()
    for name, answer in expected.items():
        testing.assert_as_exact_as(f"{case.id}: {name}", ours[name], *answer)


class Layer(nn.Module):
    """One layer of any cell, without a module of its own, on one backend; its initial states are a parameter."""

    def __init__(self, cell, backend, case, I, H, _, *, bias, bidirectional, dtype, **__):
        super().__init__()
        self.cell, self.backend, self.two = cell, backend, bidirectional
        G, D = len(CELLS[cell].gates), 2 if bidirectional else 1
        sizes = [(G * H, I), (G * H, H), *[(G * H,)] * (2 if bias else 0)] * D
        self.weights = nn.ParameterList((2 * torch.rand(size) - 1).div(H**0.5).to(dtype) for size in sizes)
        self.h0 = nn.Parameter(torch.randn(D, case.B, H).to(dtype)) if case.hx else None

    def forward(self, inputs):
        y, hn, *_ = autograd.layer(
            self.backend,
            self.cell,
            inputs.x,
            [*self.weights],
            self.two,
            self.h0,
            None,
            inputs.lengths,
            inputs.reset,
            False,
        )
        return {"y": y, "hn": hn}


def check_cell(cell, case):
    """Holds a cell to the reference, which is held to torch's own modules elsewhere."""

    def evaluate(backend, **options):
        cls = partial(Layer, cell, backend, case)
        given = dataclasses.replace(case, hx=False)
        return testing.evaluate(lambda module, _, inputs: module(inputs), cls, given, DEVICE, **options)

    with testing.poisoned():
        ours = evaluate("triton")
    with testing.single_threaded():
        reference = evaluate("reference")
        exact, *nudged = (evaluate("reference", dtype=F64, nudge=nudge) for nudge in range(4))
    assert ours.keys() == exact.keys()
    for name, right in exact.items():
        rounding = max(testing._error(other[name], right) for other in nudged)
        testing.assert_as_exact_as(f"{cell}, {case.id}: {name}", ours[name], *Answer(reference[name], right, rounding))


def smaller(size, interpreted):
    """For a GPU, and for the interpreter, which takes seconds for what has many programs, steps or layers."""
    return size if ON_GPU else interpreted


SIZES = [
    # T, B, I, H
    (1, 1, 5, 1),
    (1, 3, 31, 30),
    (1, 17, 300, 64),
    (2, 3, 24, 129),
    (2, 1, 3, smaller(512, 192)),
    (7, 17, 33, 30),
    (128, 3, 2, 30),
    pytest.param((smaller(63, 11), 1, 9, 64), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size):
    check(Case(*size))


@pytest.mark.parametrize("size", [SIZES[0], SIZES[2], SIZES[3], SIZES[5]], ids=str)
@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_sizes_of_other_cells(cell, size):
    check_cell(cell, Case(*size))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("size", smaller(SIZES[1:6], [*SIZES[1:4], SIZES[5]]), ids=str)
def test_sizes_in_16_bits(size, dtype):
    check(Case(*size, dtype=dtype))


OPTIONS = {
    "layers": {"layers": 3},
    "bidirectional": {"bidirectional": True},
    "no-bias": {"bias": False},
    "no-hx": {"hx": False},
    "projection": {"proj_size": 11},
    "projection-bidirectional-no-bias": {"proj_size": 11, "bidirectional": True, "bias": False},
    "batch-first-strided": {"batch_first": True, "strided": True},
    "packed-bidirectional": {"packed": True, "bidirectional": True},
    "lengths": {"lengths": True},
    "lengths-bidirectional": {"lengths": True, "bidirectional": True},
    "lengths-no-hx-bidirectional": {"lengths": True, "bidirectional": True, "hx": False},
    "reset": {"reset": True},
    "states": {"states": True},
    "everything": {
        "layers": smaller(2, 1),
        "bidirectional": True,
        "proj_size": 11,
        "batch_first": True,
        "lengths": True,
        "reset": True,
        "states": True,
        "strided": True,
    },
}
EVERYTHING = {"bidirectional": True, "lengths": True, "reset": True, "states": True}
OF_OTHER_CELLS = {
    name: OPTIONS[name]
    for name in ("bidirectional", "no-bias", "no-hx", "lengths", "lengths-no-hx-bidirectional", "reset")
} | {"everything": EVERYTHING}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    check(Case(5, 3, 7, 30, **options))


@pytest.mark.parametrize("options", OF_OTHER_CELLS.values(), ids=OF_OTHER_CELLS)
@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_options_of_other_cells(cell, options):
    check_cell(cell, Case(5, 3, 7, 30, **options))


@pytest.mark.parametrize(
    ("cell", "dtype", "options"),
    [("gru", BF16, EVERYTHING), ("gru", F16, {}), ("rnn_tanh", BF16, {}), ("rnn_relu", F16, EVERYTHING)],
    ids=str,
)
def test_other_cells_in_16_bits(cell, dtype, options):
    check_cell(cell, Case(3, 3, 7, 30, dtype=dtype, **options))


def test_the_derivative_of_relu():
    check_cell("rnn_relu", Case(4, 3, 7, 30))


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["projection", "lengths-bidirectional", "everything"])
def test_options_in_16_bits(name, dtype):
    check(Case(3, 3, 7, 30, dtype=dtype, **OPTIONS[name]))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {**EVERYTHING, "proj_size": 5}, {"bias": False, "hx": False}], ids=str)
def test_gates_computed_again(options, dtype, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_RESERVE", "recompute")
    check(Case(4, 3, 7, 14, dtype=dtype, **options))


@pytest.mark.parametrize(
    ("cell", "dtype", "options"),
    [("gru", F32, EVERYTHING), ("gru", BF16, {}), ("gru", F32, {"bias": False}), ("rnn_tanh", F32, EVERYTHING),
     ("rnn_relu", F32, {})],
    ids=str,
)  # fmt: skip
def test_what_other_cells_save_computed_again(cell, dtype, options, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_RESERVE", "recompute")
    check_cell(cell, Case(4, 3, 7, 14, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("reserve", ["gates", "recompute"])
def test_no_product_is_given_padding(reserve, dtype, launch, monkeypatch, assert_padding_is_not_read):
    monkeypatch.setenv("FUSEDRNN_RESERVE", reserve)
    assert_padding_is_not_read(partial(gpu.forward, launch), partial(gpu.backward, launch), dtype, DEVICE)


@pytest.mark.slow
def test_what_is_not_finite_is_that_where_nn_lstm_has_it(odd_layer, assert_not_finite_as_nn_lstm):
    with fusedrnn.use_backend("triton"):
        assert_not_finite_as_nn_lstm(*odd_layer, DEVICE, bidirectional=odd_layer[0] % 2 == 0, few=not ON_GPU)


PLAIN, PROJECTED = {}, {**EVERYTHING, "proj_size": 32}


@pytest.fixture
def force(launch, planner, monkeypatch):
    """Makes the planner choose the fewest programs of a regime with a barrier; returns what it chose, by kernel."""
    if ON_GPU:
        pytest.skip("plans the interpreter's device: a GPU has one of its own")

    def use(regime, groups):
        chosen = {}

        def plan(kernel, shape, device):
            found = [p for p in planner.plans(kernel, shape, device) if p.regime == regime and p.programs > 1]
            fewest = min(found, key=lambda p: p.programs)
            items = shape.D * -(-shape.B // fewest.batch)
            chosen[kernel] = dataclasses.replace(fewest, groups=1 if groups == "rounds" else items)
            return chosen[kernel]

        monkeypatch.setattr(launch, "_plan", plan)
        return chosen

    return use


def name_of(value):
    return str(value) if isinstance(value, (str, torch.dtype)) else "-".join(value) or "plain"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "groups", "dtype", "options"),
    [
        ("resident", "rounds", F32, PLAIN),
        ("resident", "groups", F32, EVERYTHING),
        ("resident", "groups", F32, PROJECTED),
        ("resident", "groups", BF16, PLAIN),
        ("resident", "rounds", BF16, PROJECTED),
        ("streamed", "rounds", F32, PLAIN),
        ("streamed", "groups", F32, EVERYTHING),
        ("streamed", "groups", F32, PROJECTED),
        ("streamed", "groups", BF16, EVERYTHING),
        ("streamed", "rounds", BF16, PROJECTED),
    ],
    ids=name_of,
)
def test_regimes(regime, groups, dtype, options, force):
    """Several programs share 80 units; items of the batch and directions go to groups side by side, or to one."""
    chosen = force(regime, groups)
    check(Case(2 if options is PROJECTED else 3, 20, 5, 80, dtype=dtype, **options))
    assert chosen.keys() == {"forward", "backward"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "regime", "groups", "dtype", "options"),
    [
        ("gru", "resident", "groups", F32, EVERYTHING),
        ("gru", "resident", "rounds", BF16, PLAIN),
        ("gru", "streamed", "rounds", F32, PLAIN),
        ("gru", "streamed", "groups", BF16, EVERYTHING),
        ("rnn_tanh", "resident", "groups", BF16, EVERYTHING),
        ("rnn_tanh", "streamed", "groups", F32, EVERYTHING),
    ],
    ids=name_of,
)
def test_regimes_of_other_cells(cell, regime, groups, dtype, options, force):
    chosen = force(regime, groups)
    check_cell(cell, Case(3, 20, 5, 80, dtype=dtype, **options))
    assert chosen.keys() == {"forward", "backward"}


def test_one_launch_over_all_steps_of_a_program_that_exchanges_with_itself(launch, planner, monkeypatch):
    """With a projection h is exchanged through memory even where there is but one program."""
    if ON_GPU:
        pytest.skip("plans the interpreter's device: a GPU has one of its own")
    monkeypatch.setattr(planner, "INTERPRETER", planner.INTERPRETER._replace(multiprocessors=1))
    plan = launch.plan_for("forward", launch.Shape(6, 3, 5, 16, 10, 2, 4, "ieee", True), torch.device("cpu"))
    assert plan.programs == 1
    assert not plan.carried
    check(Case(6, 3, 5, 16, proj_size=10, **EVERYTHING))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_input_affine_in_the_launch_and_before_it(cell, launch, planner, monkeypatch):
    """The planner has both, and both compute the same."""
    shape = launch.Shape(4, 3, 16, 16, 16, 2, 4, "tf32", cell=cell)
    device = launch._device(0) if ON_GPU else planner.INTERPRETER
    found = {plan.fuse_input: plan for plan in planner.plans("forward", shape, device) if plan.carried}
    assert found.keys() == {False, True}
    planned, case = launch._plan, Case(4, 3, 16, 16, bidirectional=True)
    for chosen in found.values():
        with monkeypatch.context() as patch:
            patch.setattr(
                launch,
                "_plan",
                lambda kernel, *rest, own=chosen: own if kernel == "forward" else planned(kernel, *rest),
            )
            check(case) if cell == "lstm" else check_cell(cell, case)


def activations(a, through):
    """sigmoid and tanh of a, as two units compute them: h = o * tanh(40) = o of the one, c = 1 * g of the other.

    a enters through "x", one value for each row, or through the "bias", where an infinity does not meet a weight of 0.
    """
    count = a.numel() if through == "bias" else 1
    gates = torch.tensor([[-100.0, 100.0, 0.0, math.nan], [100.0, -100.0, math.nan, 0.0]])  # NaN is where a belongs
    gates = gates.T.repeat_interleave(count, dim=1)
    asked = gates.isnan()
    weight = asked.flatten().float().unsqueeze(1) if through == "x" else torch.zeros(gates.numel(), 1)
    bias = gates.nan_to_num()
    if through == "bias":
        bias[2, count:], bias[3, :count] = a, a
    rows = a.view(1, -1, 1) if through == "x" else torch.zeros(1, 1, 1)
    c0 = torch.tensor([40.0, 0.0]).repeat_interleave(count).expand(1, rows.shape[1], -1)
    weights = [weight, torch.zeros(gates.numel(), 2 * count), bias.flatten(), torch.zeros(gates.numel())]
    moved = [t.contiguous().to(DEVICE) for t in (rows, c0, *weights)]
    x, c0, *weights = moved
    h, _, cn, *_ = torch.ops.fusedrnn.triton_forward("lstm", x, weights, False, None, c0, None, None, False, False)
    return h[0, :, :count].flatten().cpu(), cn[0, :, count:].flatten().cpu()


# Of tanh, in units of its last place. From 0.6 up it is 1 - 2 / (e^2a + 1), in which of a relative error of e^2a there
# is left 2 e^2a / (e^2a + 1)^2: at 0.6, where tanh is 0.54, 0.36. Here e^x is exact to a unit or so. On a GPU
# ex2.approx is off by 2^-22, and the product with log2(e) before it by another 0.7 * 2^-24: 1.7 units of tanh. The
# division (2 units of 0.46, so 1 of tanh) and two roundings add 2.
MOST_ULP = 5 if ON_GPU else 3


def test_activations():
    magnitude = torch.logspace(-30, 1.9, 700, base=10.0)
    a = torch.cat([magnitude, -magnitude, 4 * torch.rand(600) - 2])
    sigmoid, tanh = activations(a, "x")
    exact = a.double().tanh()
    ulp = torch.nextafter(exact.float().abs(), torch.tensor(math.inf)).double() - exact.float().abs().double()
    assert ((tanh.double() - exact).abs() / ulp).max() <= MOST_ULP
    assert (sigmoid.double() - a.double().sigmoid()).abs().max() <= 2 * torch.finfo(F32).eps


def test_activations_at_the_edges():
    a = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    sigmoid, tanh = activations(a, "bias")
    assert sigmoid[0].isnan()
    assert tanh[0].isnan()
    assert sigmoid[1:].tolist() == [1.0, 0.0, 0.5]
    assert tanh[1:].tolist() == [1.0, -1.0, 0.0]


def operator_arguments(T=3, B=2, I=5, H=4, D=2, device=DEVICE):
    weights = [
        w
        for _ in range(D)
        for w in (torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H))
    ]
    lengths, reset = torch.tensor([3, 1]), torch.rand(T, B) < 0.5
    tensors = (torch.randn(T, B, I), weights, D == 2, torch.randn(D, B, H), torch.randn(D, B, H), lengths, reset)
    moved = tuple(
        [w.to(device) for w in t] if isinstance(t, list) else t.to(device) if isinstance(t, torch.Tensor) else t
        for t in tensors
    )
    return (*moved, True, True)


def test_operators_pass_opcheck():
    x, weights, *options = operator_arguments()
    op, tests, given = torch.ops.fusedrnn, ("test_schema", "test_faketensor"), (x, *options[:5])
    torch.library.opcheck(op.triton_forward.default, ("lstm", x, *options, *weights), test_utils=tests)
    y, hn, cn, c, reserve = op.triton_forward("lstm", x, *options, *weights)
    needs = [True] * (3 + len(weights))
    backward = ("lstm", y, hn, cn, c, *given, y, c, reserve, needs, *weights)
    torch.library.opcheck(op.triton_backward.default, backward, test_utils=tests)
    fewer = ("lstm", y, None, None, None, *given, y, c, reserve, [k % 2 == 0 for k in range(len(needs))], *weights)
    torch.library.opcheck(op.triton_backward.default, fewer, test_utils=tests)


@pytest.mark.parametrize("cell", ["gru", "rnn_relu"])
@pytest.mark.parametrize("B", [0, 2])
def test_operators_of_other_cells_pass_opcheck(cell, B):
    T, I, H, G, D = 3, 5, 4, len(CELLS[cell].gates), 2
    weights = [w for _ in range(D) for w in (torch.randn(G * H, I), torch.randn(G * H, H), *torch.randn(2, G * H))]
    x, h0, *weights = (t.to(DEVICE) for t in (torch.randn(T, B, I), torch.randn(D, B, H), *weights))
    op, tests, given = torch.ops.fusedrnn, ("test_schema", "test_faketensor"), (x, True, h0, None, None, None)
    torch.library.opcheck(op.triton_forward.default, (cell, *given, True, True, *weights), test_utils=tests)
    y, hn, cn, c, reserve = op.triton_forward(cell, *given, True, True, *weights)
    assert (cn.shape, c.shape) == ((D, B, 0), (T, B, 0))
    for needs in ([True] * (3 + len(weights)), [k % 2 == 1 for k in range(3 + len(weights))]):
        backward = (cell, y, hn, None, None, *given, y, c, reserve, needs, *weights)
        torch.library.opcheck(op.triton_backward.default, backward, test_utils=tests)


def test_a_cell_that_a_backend_does_not_have(launch, monkeypatch):
    with fusedrnn.use_backend("triton"):
        assert {dispatch.supports("triton", problem(cell=cell)) for cell in (*CELLS, *VARIANTS)} == {None}
    x, weights = torch.randn(3, 2, 4), [torch.randn(12, 4), torch.randn(12, 4)]
    monkeypatch.setattr(launch, "CELLS", frozenset({"lstm"}))
    with pytest.raises(NotImplementedError, match="no kernel for the cell gru, it has lstm"):
        torch.ops.fusedrnn.triton_forward("gru", x, weights, False, None, None, None, None, False, False)


def test_empty_batch():
    with fusedrnn.use_backend("triton"):
        lstm = fusedrnn.LSTM(3, 4, bidirectional=True, device=DEVICE)
        x = torch.randn(5, 0, 3, device=DEVICE, requires_grad=True)
        y, _ = lstm(x)
        assert y.shape == (5, 0, 8)
        grads = torch.autograd.grad(y.sum(), [x, *lstm.parameters()])
    assert grads[0].shape == x.shape
    assert all(not grad.any() for grad in grads[1:])


def test_operator_clamps_lengths():
    x, weights, two, h0, c0, _, reset, *flags = operator_arguments()
    run = torch.ops.fusedrnn.triton_forward
    wild, tame = (
        run("lstm", x, weights, two, h0, c0, torch.tensor(n, device=DEVICE), reset, *flags) for n in ([-5, 99], [0, 3])
    )
    for a, b in zip(wild, tame, strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_twice(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_FP32", "tf32")
    case = Case(4, 5, 7, smaller(144, 40), **EVERYTHING)
    with fusedrnn.use_backend("triton"):
        first, second = (testing.evaluate(testing.call, fusedrnn.LSTM, case, DEVICE) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_what_is_not_asked_for_is_not_computed(launch, monkeypatch):
    """One launch forward and one backward for a bidirectional layer; xg's memory becomes that of the gates."""
    launches = []
    original = launch._launch
    monkeypatch.setattr(launch, "_launch", lambda kernel, *rest: launches.append(kernel) or original(kernel, *rest))
    lstm = fusedrnn.LSTM(3, 4, bidirectional=True, device=DEVICE)
    with fusedrnn.use_backend("triton"):
        y, _ = lstm(torch.randn(5, 2, 3, device=DEVICE))
        torch.autograd.grad(y.sum(), lstm.weight_hh_l0)
    assert launches == ["forward", "backward"]


class Spy:
    """In the place of a compiled kernel: what it is launched with, by the names of its parameters, and the options."""

    def __init__(self, function):
        self.signature, self.launched = inspect.signature(function.fn), []

    def __getitem__(self, grid):
        def launched(*arguments, **keywords):
            options = {name: keywords.pop(name) for name in keywords.keys() - self.signature.parameters.keys()}
            self.launched.append((grid, self.signature.bind(*arguments, **keywords).arguments, options))

        return launched


@pytest.mark.parametrize("H", [16, 200])
def test_what_a_launch_on_a_gpu_is_given(H, launch, planner, monkeypatch):
    """One launch over all steps, with counters of the barriers that are zero, and what the plan decides."""
    spies = {kernel: Spy(function) for kernel, function in launch._KERNELS.items()}
    monkeypatch.setattr(launch, "_KERNELS", spies)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_device", lambda index: planner.H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("FUSEDRNN_FP32", "ieee")
    T, B, I = 3, 20, 5
    case = Case(T, B, I, H, dtype=BF16, bidirectional=True)
    with fusedrnn.use_backend("triton"):
        testing.evaluate(testing.call, fusedrnn.LSTM, case, DEVICE)
    for kernel, spy in spies.items():
        plan = launch.plan_for(kernel, launch.Shape(T, B, I, H, H, 2, 2, "ieee"), torch.device(DEVICE))
        assert (plan.programs > 1) == (H > 16)
        ((grid, given, options),) = spy.launched
        assert grid == (plan.groups * plan.programs,)
        assert options == plan.options
        expected = {**plan.constants(kernel), "D": 2, "PHASE": 0, "GRID_SYNC": plan.programs > 1, "carry": None}
        expected |= {"T": T, "B": B, "H": H, "P": H, "begin": 0, "end": T if plan.carried else T + 1}
        expected |= {"I": I if plan.fuse_input else 0, "end": T} if kernel == "forward" else {}
        assert {name: given[name] for name in expected} == expected
        if plan.programs == 1:  # no tensor is kept: torch.compile would find a leak in the pool of its CUDA graphs
            assert given["counters"] is None
            continue
        assert given["counters"].dtype == torch.int32
        assert given["counters"].count_nonzero() == 0
        assert given["counters"].shape[0] == plan.groups


def test_explain_shows_both_plans():
    with fusedrnn.use_backend("triton"):
        explanation = fusedrnn.explain(fusedrnn.LSTM(3, 40, device=DEVICE), torch.randn(5, 2, 3, device=DEVICE))
    assert explanation.backend == "triton"
    assert "forward: 1 x 1 programs" in explanation.plan
    assert "backward: 1 x 1 programs" in explanation.plan
    assert "us a step predicted" in explanation.plan


def test_an_exported_program_runs_with_grad_mode_on():
    lstm = fusedrnn.CompilableLSTM(3, 4, device=DEVICE)
    x = torch.randn(5, 2, 3, device=DEVICE)
    with fusedrnn.use_backend("triton"):
        program = torch.export.export(lstm, (x,)).module()
        with torch.no_grad():
            expected = lstm(x)[0]
    assert torch.equal(program(x)[0].detach(), expected)


def problem(**changes):
    return dispatch.Problem(
        **{"device": DEVICE, "dtype": F32, "T": 2, "B": 2, "I": 3, "H": 4, "P": 4, "D": 1, **changes}
    )


def test_float64_is_left_to_others():
    with fusedrnn.use_backend("triton"):
        assert "float64" in dispatch.supports("triton", problem(dtype=F64))
        with pytest.raises(RuntimeError, match=r"'triton' was asked for and cannot run: .*float64"):
            fusedrnn.LSTM(3, 4, dtype=F64, device=DEVICE)(torch.randn(2, 2, 3, dtype=F64, device=DEVICE))


def test_a_layer_that_no_plan_fits():
    with fusedrnn.use_backend("triton"):
        assert "does not fit" in dispatch.supports("triton", problem(H=1 << 20, P=1 << 20))


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_the_interpreter_runs_only_where_it_is_asked_for():
    assert "asked for by name" in dispatch.supports("triton", problem())
    assert dispatch.select(problem()) != "triton"
    with fusedrnn.use_backend("triton"):
        assert dispatch.supports("triton", problem()) is None


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_gpu_and_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert fusedrnn.backends()["triton"] == "torch finds no GPU"
    with pytest.raises(RuntimeError, match="torch finds no GPU"), fusedrnn.use_backend("triton"):
        pass


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ops._triton_installed.cache_clear()
    assert "pip install triton" in fusedrnn.backends()["triton"]
    ops._triton_installed.cache_clear()


def test_without_a_c_compiler(monkeypatch):
    """Triton builds a launcher with one at its first launch."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "_no_gpu", lambda: None)
    monkeypatch.setenv("CC", "cc")
    assert ops.triton_unavailable() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "needs a C compiler" in ops.triton_unavailable()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.triton_unavailable() is None


@pytest.mark.parametrize(
    ("switch", "variable", "expected"),
    [
        ("tf32", None, "tf32"),
        ("ieee", None, "ieee"),
        ("tf32", "ieee", "ieee"),
        ("ieee", "tf32x3", "tf32x3"),
        ("ieee", "", "ieee"),
    ],
)
def test_fp32_precision(switch, variable, expected, monkeypatch):
    monkeypatch.delenv("FUSEDRNN_FP32", raising=False)
    if variable is not None:
        monkeypatch.setenv("FUSEDRNN_FP32", variable)
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision  # which in torch 2.10 cannot be deleted, as monkeypatch would
    rnn.fp32_precision = switch
    try:
        assert gpu.fp32_precision() == expected
    finally:
        rnn.fp32_precision = before


def test_older_switch(monkeypatch):
    monkeypatch.delenv("FUSEDRNN_FP32", raising=False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert gpu.fp32_precision() == "ieee"


def test_unknown_precision(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_FP32", "fp8")
    with pytest.raises(ValueError, match="one of ieee, tf32, tf32x3, got 'fp8'"):
        gpu.fp32_precision()
    with fusedrnn.use_backend("triton"), pytest.raises(RuntimeError, match="FUSEDRNN_FP32"):
        fusedrnn.LSTM(3, 4, device=DEVICE)(torch.randn(2, 2, 3, device=DEVICE))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_precisions(precision, monkeypatch):
    """The interpreter multiplies float32 alike in all of them; on a GPU the 3-pass form has to come close to IEEE."""
    monkeypatch.setenv("FUSEDRNN_FP32", precision)
    check(Case(3, 3, 7, smaller(144, 40), bidirectional=True))
