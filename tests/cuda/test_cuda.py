"""The cuda backend from the module down to its kernels: all results of a layer, forward and backward.

On a GPU it runs as it is. Elsewhere csrc/cuda/torch/ops.cpp is built over the host build of the kernels, in which every
thread is a fiber, and computes on tensors of the CPU: the same Python, the same operators, the same kernels; only the
launches themselves are others. The tolerance is that of fusedrnn/testing.py; outputs are poisoned with NaN.
"""

import copy
import dataclasses
import hashlib
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from fusedrnn.benchmarks import plans
from fusedrnn.benchmarks.cases import cell
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import cuda, cuda_plan, dispatch, gpu, ops, testing
from fusedrnn.testing import Case

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="session")
def host_library(cuda_host):
    """The operators of csrc/cuda/torch/ops.cpp on the CPU, loaded. Compiled if those of these sources are not there."""
    kernels = cuda_host.built("plain", cuda_host.FLAGS)
    sources = [ROOT / "csrc" / path for path in ("cuda/torch/ops.cpp", "testing/cuda_emulator/launch.cpp")]
    torch_home = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden", f"-I{torch_home / 'include'}"]
    flags += ["-DFUSEDRNN_CUDA_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    links = [f"-L{kernels.parent}", f"-l:{kernels.name}", "-Wl,-rpath,$ORIGIN"]
    links += [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"]
    text = " ".join([torch.__version__, *flags, *links]).encode() + b"".join(path.read_bytes() for path in sources)
    library = kernels.with_name(f"ops-{hashlib.sha256(text).hexdigest()[:16]}.so")
    with cuda_host.building():
        if not library.is_file():
            for old in library.parent.glob("ops-*"):
                old.unlink()
            partial = library.with_suffix(f".{os.getpid()}")
            command = [os.environ.get("CXX", "g++"), *flags, *map(str, sources), *links, "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.replace(library)
    torch.ops.load_library(str(library))


@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
    """Where there is no GPU, the host library stands for the CUDA library that was not loaded."""
    if not ON_GPU:
        request.getfixturevalue("host_library")
        monkeypatch.setattr(ops, "_cuda_unloaded", None)
    elif ops.cuda_unavailable() is not None:
        pytest.skip(ops.cuda_unavailable())


host_only = pytest.mark.skipif(ON_GPU, reason="plans the host's device: a GPU has one of its own")
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


MODULES = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU, "rnn_tanh": fusedrnn.RNN, "rnn_relu": fusedrnn.RNN}


def check(case):
    with fusedrnn.use_backend("cuda"), testing.poisoned():
        ours = testing.evaluate(testing.call, MODULES[case.cell], case, DEVICE)
    expected = testing.answers(case, DEVICE)
    assert ours.keys() == expected.keys()
    for name, answer in expected.items():
        testing.assert_as_exact_as(f"{case.id}: {name}", ours[name], *answer)


SIZES = [
    # T, B, I, H
    (1, 1, 5, 1),
    (1, 3, 31, 30),
    (2, 17, 24, 64),
    (7, 3, 33, 19),
    (33, 1, 2, 9),
]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype):
    check(Case(*size, dtype=dtype))


OPTIONS = {
    "layers": {"layers": 3},
    "no-bias": {"bias": False},
    "no-hx": {"hx": False},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 5},
    "projection-bidirectional-no-bias": {"proj_size": 5, "bidirectional": True, "bias": False},
    "batch-first-strided": {"batch_first": True, "strided": True},
    "packed-bidirectional": {"packed": True, "bidirectional": True},
    "lengths": {"lengths": True},
    "lengths-no-hx-bidirectional": {"lengths": True, "bidirectional": True, "hx": False},
    "reset": {"reset": True},
    "states": {"states": True},
    "everything": {
        "layers": 2,
        "bidirectional": True,
        "proj_size": 5,
        "batch_first": True,
        "lengths": True,
        "reset": True,
        "states": True,
        "strided": True,
    },
}
EVERYTHING = {"bidirectional": True, "lengths": True, "reset": True, "states": True}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    check(Case(4, 3, 7, 14, **options))


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("name", ["projection", "everything"])
def test_options_in_other_dtypes(name, dtype):
    check(Case(3, 3, 7, 14, dtype=dtype, **OPTIONS[name]))


# Of the other cells: sizes, dtype and options that are all different.
OTHER_CELLS = [
    ("gru", (2, 17, 24, 64), F32, {}),
    ("gru", (4, 3, 37, 14), F64, {**EVERYTHING, "layers": 2, "batch_first": True, "strided": True}),
    ("gru", (4, 3, 7, 30), BF16, {"packed": True, "bidirectional": True}),
    ("gru", (3, 3, 7, 14), F16, {"bias": False, "hx": False}),
    ("rnn_tanh", (4, 3, 7, 30), BF16, EVERYTHING),
    ("rnn_tanh", (7, 3, 33, 19), F32, {"layers": 2}),
    ("rnn_relu", (5, 3, 7, 14), F64, {**EVERYTHING, "bias": False}),
    ("rnn_relu", (2, 17, 24, 64), F32, {"lengths": True, "reset": True}),
]


@pytest.mark.parametrize("reserve", ["gates", "recompute"])
@pytest.mark.parametrize(("cell", "size", "dtype", "options"), OTHER_CELLS, ids=str)
def test_other_cells(cell, size, dtype, options, reserve, monkeypatch):
    """With what they save, and with what is computed again, which takes x in the launch."""
    monkeypatch.setenv("FUSEDRNN_RESERVE", reserve)
    taken = plans_of({"fuse_input": reserve == "recompute"}, monkeypatch)
    check(Case(*size, dtype=dtype, cell=cell, **options))
    assert taken["forward"].cell == taken["backward"].cell == cell


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_gradcheck_of_other_cells(cell):
    rnn = MODULES[cell](2, 3, bidirectional=True, dtype=F64, device=DEVICE)
    x = torch.randn(3, 2, 2, dtype=F64, device=DEVICE, requires_grad=True)
    h0 = torch.randn(2, 2, 3, dtype=F64, device=DEVICE, requires_grad=True)
    given = {"lengths": torch.tensor([3, 1]), "reset": torch.tensor([[False, True], [True, False], [False, False]])}
    given = {name: value.to(DEVICE) for name, value in given.items()}

    with fusedrnn.use_backend("cuda"):
        assert torch.autograd.gradcheck(
            lambda x, h0, *_: rnn(x, h0, **given), (x, h0, *rnn.parameters()), fast_mode=True
        )


STATE = {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "state"}
# Variants of the LSTM: options, dtype, how it is called, and what a forward keeps.
LSTM_VARIANTS = {
    "everything": ({"peephole": True, "coupled": True, "zoneout": 0.3, **STATE}, F64, "ragged", "gates"),
    "peephole-zoneout-candidate": (
        {"peephole": True, "zoneout": (0.0, 0.5), "recurrent_dropout": 0.3},
        BF16,
        "packed",
        "gates",
    ),
    "projected": ({"peephole": True, "proj_size": 5, **STATE}, BF16, "ragged", "gates"),
    "projected-float64": ({"peephole": True, "proj_size": 5, **STATE}, F64, "ragged", "gates"),
    "recomputed": ({"coupled": True, "zoneout": 0.3, **STATE}, F64, "ragged", "recompute"),
    "evaluation": ({"zoneout": (0.4, 0.2), "bias": False}, F64, "evaluation", "gates"),
}


@pytest.mark.slow
@pytest.mark.cuda_variants
@pytest.mark.parametrize(("options", "dtype", "form", "reserve"), LSTM_VARIANTS.values(), ids=LSTM_VARIANTS)
def test_variants_of_the_lstm(options, dtype, form, reserve, monkeypatch):
    """Against the reference in float64, with the same masks. The error is held to that of the reference itself."""
    monkeypatch.setenv("FUSEDRNN_RESERVE", reserve)
    T, B, I, H = 5, 3, 4, 14
    module = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True, dtype=dtype, device=DEVICE, **options)
    module.train(form != "evaluation")
    x = torch.randn(T, B, I, dtype=dtype, device=DEVICE)
    hx = [torch.randn(4, B, size, dtype=dtype, device=DEVICE) for size in (module.proj_size or H, H)]
    calls = {}
    if form == "ragged":
        calls = {"lengths": torch.tensor([3, 0, 5], device=DEVICE), "reset": torch.rand(T, B, device=DEVICE) < 0.3}

    def run(backend, dtype):
        own = copy.deepcopy(module).to(dtype)
        leaves = [t.to(dtype).requires_grad_() for t in (x, *hx)] + [*own.parameters()]
        given = leaves[0]
        if form == "packed":
            given = pack_padded_sequence(given, torch.tensor([2, 5, 4]), enforce_sorted=False)
        torch.manual_seed(5)
        with fusedrnn.use_backend(backend), testing.poisoned():
            y, (hn, cn) = own(given, tuple(leaves[1:3]), **calls)
            y = y.data if form == "packed" else y
            outputs, generator = [y, hn, cn], torch.Generator().manual_seed(3)
            douts = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
            return [*outputs, *torch.autograd.grad(outputs, leaves, douts)]

    exact = run("reference", F64)
    for our, their, right in zip(run("cuda", dtype), run("reference", dtype), exact, strict=True):
        error, allowed = (our.double() - right).abs().max(), (their.double() - right).abs().max()
        assert error <= 2 * allowed + 4 * testing.roundoff(dtype) * right.abs().max()


@pytest.mark.slow
@pytest.mark.cuda_variants
def test_derivatives_of_a_variant():
    """Of both orders, with the masks of one seed; what the compiler is told of its operators; and who explains it."""
    module = fusedrnn.LSTM(2, 3, dtype=F64, device=DEVICE, peephole=True, zoneout=0.3, recurrent_dropout=0.4)
    x = torch.randn(3, 2, 2, dtype=F64, device=DEVICE, requires_grad=True)

    def run(x, *_):
        torch.manual_seed(1)
        y, (hn, cn) = module(x)
        return y, hn, cn

    with fusedrnn.use_backend("cuda"):
        inputs = (x, *module.parameters())
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
        assert fusedrnn.explain(module, x).plan.startswith("forward: ")
    cell, noise = "lstm_peephole+hcg", torch.rand(3, 3, 2, 3, dtype=F64, device=DEVICE)
    weights = [parameter.detach() for parameter in module.parameters()]
    arguments = (cell, x.detach(), False, None, None, None, None, True, True, *weights)
    torch.library.opcheck(ops.forward_op("cuda"), arguments, {"noise": noise})


@pytest.mark.slow
@pytest.mark.cuda_variants
@pytest.mark.parametrize("options", [{"zoneout": (0.3, 0.0)}, {"coupled": True}], ids=["zoneout", "coupled"])
def test_a_variant_is_infinite_where_the_reference_is(options):
    """What is not given is not computed with: zero times infinity is not a number."""
    module = fusedrnn.LSTM(2, 3, dtype=F64, device=DEVICE, **options).eval()
    x = torch.randn(3, 2, 2, dtype=F64, device=DEVICE)
    hx = torch.zeros(1, 2, 3, dtype=F64, device=DEVICE), torch.full((1, 2, 3), torch.inf, dtype=F64, device=DEVICE)
    results = []
    for backend in ("cuda", "reference"):
        with fusedrnn.use_backend(backend):
            y, (hn, cn) = module(x, hx)
            results.append((y, hn, cn))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, equal_nan=True)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precisions(precision, monkeypatch):
    """Where torch's own float32 is exact, what rounding operands to 11 bits is worth is added for TensorFloat-32."""
    monkeypatch.setenv("FUSEDRNN_FP32", precision)
    case = Case(3, 3, 7, 20, **EVERYTHING)
    with fusedrnn.use_backend("cuda"):
        ours = testing.evaluate(testing.call, fusedrnn.LSTM, case, DEVICE)
    worth = 1.0 if ON_GPU or precision == "ieee" else 1 + 2 * 2**-11 / testing.roundoff(F32)
    for name, (baseline, exact, rounding) in testing.answers(case, DEVICE).items():
        testing.assert_as_exact_as(name, ours[name], baseline, exact, worth * rounding)
    rounded = float((ours["y"].double() - testing.answers(case, DEVICE)["y"].exact).abs().max()) > 1e-5
    assert rounded == (precision == "tf32")


def plans_of(wanted, monkeypatch):
    """Makes every launch take the smallest plan with these values, where its pass has them; returns those taken.

    "shared": 0 keeps no weights in shared memory, so that they are streamed; "chunk_blocks": n is a plan in chunks, for
    a device of two multiprocessors.
    """
    taken = {}

    def plan(kernel, shape, device):
        want = {name: value for name, value in wanted.items() if name not in ("groups", "shared", "chunk_blocks")}
        want["fuse_input"] = kernel == "forward" and wanted.get("fuse_input", False)
        if kernel == "backward" and want.get("exchange") == "cluster" and not shape.projected:
            want = {name: value for name, value in want.items() if name != "splits"} | {"exchange": "scatter"}
        found = cuda.ranked(kernel, shape, device[1])
        if "chunk_blocks" in wanted:
            found = cuda_plan.chunked(kernel, shape, device[1]._replace(multiprocessors=2), want["fuse_input"])
        found = [p for p in found if want.items() <= vars(p).items()]
        changes = {name: wanted[name] for name in ("groups", "chunk_blocks") if name in wanted}
        if "shared" in wanted:
            changes |= {"shared_blocks": 0, "shared_projection_blocks": 0, "shared_input_blocks": 0}
        taken[kernel] = dataclasses.replace(min(found, key=lambda p: p.blocks * p.threads), **changes)
        return taken[kernel]

    monkeypatch.setattr(cuda, "_plan", plan)
    return taken


PLAIN, PROJECTED = {}, {**EVERYTHING, "proj_size": 23}


@host_only
@pytest.mark.parametrize(
    ("wanted", "dtype", "options"),
    [
        ({"exchange": "cluster", "blocks": 4}, F32, PLAIN),
        ({"exchange": "cluster", "blocks": 4, "splits": 2}, F64, EVERYTHING),
        ({"exchange": "cluster", "rows": 16, "groups": 1}, BF16, EVERYTHING),
        ({"exchange": "cluster", "blocks": 2, "groups": 1}, F16, PROJECTED),
        ({"exchange": "grid", "groups": 1}, F32, EVERYTHING),
        ({"exchange": "grid", "splits": 4}, BF16, PLAIN),
        ({"exchange": "grid", "rows": 16}, F16, EVERYTHING),
        ({"exchange": "grid", "shared": 0}, F64, PROJECTED),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain" if isinstance(value, dict) else str(value),
)
def test_plans(wanted, dtype, options, monkeypatch):
    """Every exchange, split and number of rows, after a GEMM and with x in the launch."""
    for fuse_input in (False, True):
        taken = plans_of({**wanted, "fuse_input": fuse_input}, monkeypatch)
        check(Case(3, 9, 5, 44, dtype=dtype, **options))
        assert {kernel: p.fuse_input for kernel, p in taken.items()} == {"forward": fuse_input, "backward": False}


@host_only
@pytest.mark.parametrize(
    ("wanted", "dtype", "options"),
    [
        ({"tiles": 1}, F32, PLAIN),
        ({"tiles": 2, "splits": 2, "groups": 1}, BF16, EVERYTHING),
        ({"tiles": 1}, F16, PROJECTED),
        ({"tiles": 1, "splits": 3}, F64, PROJECTED),
    ],
    ids=str,
)
def test_plans_in_chunks(wanted, dtype, options, monkeypatch):
    for fuse_input in (False, True):
        taken = plans_of({**wanted, "exchange": "chunked", "chunk_blocks": 1, "fuse_input": fuse_input}, monkeypatch)
        check(Case(3, 9, 37, 88, dtype=dtype, **options))
        assert {kernel: (p.exchange, p.chunk_blocks, p.fuse_input) for kernel, p in taken.items()} == {
            "forward": ("chunked", 1, fuse_input),
            "backward": ("chunked", 1, False),
        }


@host_only
def test_a_layer_that_fits_in_no_other_way(monkeypatch):
    """Planned as every other, for a small device: both passes in chunks, of several tiles a warp."""
    monkeypatch.setattr(cuda, "HOST", cuda.HOST._replace(multiprocessors=2, shared=30_000))

    class Small:
        def cuda_occupancy(self, *arguments):
            return 0, 2 // arguments[-1][2]  # groups of so many blocks

        def __getattr__(self, name):
            return getattr(torch.ops.fusedrnn, name)

    monkeypatch.setattr(cuda, "_ops", Small())
    case = Case(3, 2, 3, 140, dtype=F64, bidirectional=True)
    with fusedrnn.use_backend("cuda"):
        plan = fusedrnn.explain(
            fusedrnn.LSTM(3, 140, bidirectional=True, dtype=F64), torch.randn(3, 2, 3, dtype=F64)
        ).plan
    assert plan.count("exchanging through L2, in chunks") == 2
    shape = cuda.Shape(3, 2, 3, 140, 140, 2, 8, "ieee")
    forward = cuda.plan_for("forward", shape, torch.device(DEVICE))
    assert forward.blocks * forward.tiles * 8 < 140
    assert forward.tiles > 1
    check(case)


@pytest.mark.parametrize("proj", [0, 9], ids=["", "projected"])
def test_gradcheck_in_chunks(proj, monkeypatch):
    plans_of({"tiles": 1, "chunk_blocks": 1, "exchange": "chunked"}, monkeypatch)
    lstm = fusedrnn.LSTM(2, 17, proj_size=proj, dtype=F64, device=DEVICE)
    x = torch.randn(3, 2, 2, dtype=F64, device=DEVICE, requires_grad=True)
    given = {"lengths": torch.tensor([3, 1]), "reset": torch.tensor([[False, True], [True, False], [False, False]])}
    given = {name: value.to(DEVICE) for name, value in given.items()}

    def run(x, *_):
        y, (hn, cn), states = lstm(x, return_states=True, **given)
        return y, hn, cn, states.c[0]

    with fusedrnn.use_backend("cuda"):
        assert torch.autograd.gradcheck(run, (x, *lstm.parameters()), fast_mode=True)


@pytest.mark.parametrize("fuse_input", [False, True], ids=["after-a-gemm", "with-x"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_both_kinds_of_plans(options, dtype, fuse_input, monkeypatch):
    """With x of more than one K block."""
    monkeypatch.setenv("FUSEDRNN_FP32", "ieee")
    plans_of({"fuse_input": fuse_input}, monkeypatch)
    check(Case(4, 3, 37, 14, dtype=dtype, **options))


@pytest.mark.parametrize("fuse_input", [False, True], ids=["after-a-gemm", "with-x"])
@pytest.mark.parametrize("options", [{}, {**EVERYTHING, "proj_size": 5}, {"bias": False, "hx": False}], ids=str)
def test_gates_computed_again_after_both_kinds_of_plans(options, fuse_input, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_RESERVE", "recompute")
    plans_of({"fuse_input": fuse_input}, monkeypatch)
    check(Case(4, 3, 7, 14, **options))


def test_x_is_in_the_launch_where_that_is_chosen(monkeypatch):
    """As the planner has it: of one step in the launch, after a GEMM where no shared memory holds the rows of x."""
    for case, fuse_input in ((Case(1, 3, 33, 24), True), (Case(1, 3, 4000, 24), False)):
        taken, right = {}, cuda._plan

        def spy(kernel, *arguments, taken=taken, right=right):
            taken[kernel] = right(kernel, *arguments)
            return taken[kernel]

        with monkeypatch.context() as patched:
            patched.setattr(cuda, "_plan", spy)
            check(case)
        assert taken["forward"].fuse_input == fuse_input, case


@pytest.mark.parametrize("options", [{}, {"lengths": True, "reset": True, "proj_size": 2}], ids=["", "everything"])
def test_gradcheck(options):
    """Of the kernels themselves, in float64; and once more of the backward, which goes through the reference."""
    lstm = fusedrnn.LSTM(2, 3, bidirectional=True, proj_size=options.get("proj_size", 0), dtype=F64, device=DEVICE)
    x = torch.randn(3, 2, 2, dtype=F64, device=DEVICE, requires_grad=True)
    h0 = torch.randn(2, 2, options.get("proj_size", 3), dtype=F64, device=DEVICE, requires_grad=True)
    c0 = torch.randn(2, 2, 3, dtype=F64, device=DEVICE, requires_grad=True)
    given = {}
    if options:
        given = {"lengths": torch.tensor([3, 1]), "reset": torch.tensor([[False, True], [True, False], [False, False]])}
        given = {name: value.to(DEVICE) for name, value in given.items()}

    def run(x, h0, c0, *_):
        y, (hn, cn), states = lstm(x, (h0, c0), return_states=True, **given)
        return y, hn, cn, states.c[0]

    with fusedrnn.use_backend("cuda"):
        inputs = (x, h0, c0, *lstm.parameters())
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs[:3])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {**EVERYTHING, "proj_size": 5}, {"bias": False, "hx": False}], ids=str)
def test_gates_computed_again(options, dtype, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_RESERVE", "recompute")
    check(Case(4, 3, 7, 14, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
@pytest.mark.parametrize("reserve", ["gates", "recompute"])
@pytest.mark.parametrize("fuse_input", [False, True], ids=["after-a-gemm", "with-x"])
def test_no_product_is_given_padding(fuse_input, reserve, dtype, monkeypatch, assert_padding_is_not_read):
    monkeypatch.setenv("FUSEDRNN_RESERVE", reserve)
    plans_of({"fuse_input": fuse_input}, monkeypatch)
    assert_padding_is_not_read(partial(gpu.forward, cuda), partial(gpu.backward, cuda), dtype, DEVICE)


@pytest.mark.parametrize("reserve", ["gates", "recompute"])
def test_what_is_not_finite_is_that_where_nn_lstm_has_it(odd_layer, reserve, monkeypatch, assert_not_finite_as_nn_lstm):
    monkeypatch.setenv("FUSEDRNN_RESERVE", reserve)
    with fusedrnn.use_backend("cuda"):
        assert_not_finite_as_nn_lstm(*odd_layer, DEVICE, bidirectional=reserve == "gates")


def kept():
    """Bytes that the backward of two bidirectional layers is left with beside inputs, outputs and weights; and those
    of one number for each step, layer, direction and hidden unit."""
    T, B, H, layers = 5, 3, 8, 2
    lstm = fusedrnn.LSTM(4, H, layers, bidirectional=True, dtype=BF16, device=DEVICE)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(T, B, 4, dtype=BF16, device=DEVICE)
    with fusedrnn.use_backend("cuda"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lstm(x)
    shapes = {(T, B, 4), (T, B, 2 * H), *(tuple(w.shape) for w in lstm.parameters())}
    beside = [t for t in saved.values() if tuple(t.shape) not in shapes]
    states = [t for t in saved.values() if tuple(t.shape) == (T, B, 2 * H)]
    assert len(states) == 2 * layers  # the y of a layer has the shape of its c
    return sum(t.nbytes for t in [*beside, *states[layers:]]), 2 * layers * T * B * H * BF16.itemsize


def test_what_is_kept_for_the_backward(monkeypatch):
    """The gates and c, 5 H a step, layer and direction; c alone where the gates are computed again."""
    bytes_, one = kept()
    assert bytes_ == 5 * one
    monkeypatch.setenv("FUSEDRNN_RESERVE", "recompute")
    bytes_, one = kept()
    assert bytes_ == one


def test_a_backward_takes_what_its_forward_left(monkeypatch):
    lstm = fusedrnn.LSTM(3, 4, dtype=F64, device=DEVICE)
    x = torch.randn(5, 2, 3, dtype=F64, device=DEVICE)
    grads = []
    with fusedrnn.use_backend("cuda"):
        for now, later in (("gates", "gates"), ("gates", "recompute"), ("recompute", "gates")):
            monkeypatch.setenv("FUSEDRNN_RESERVE", now)
            y, _ = lstm(x)
            monkeypatch.setenv("FUSEDRNN_RESERVE", later)
            grads.append(torch.autograd.grad(y.square().sum(), [*lstm.parameters()]))
    for first, *others in zip(*grads, strict=True):
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-12, atol=1e-12)


def test_unknown_reserve(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_RESERVE", "everything")
    with pytest.raises(ValueError, match="FUSEDRNN_RESERVE must be one of gates, recompute, got 'everything'"):
        torch.ops.fusedrnn.cuda_forward("lstm", *operator_arguments())


@gpu_only
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_no_more_is_kept_than_cudnn_keeps(dtype):
    """cuDNN's reserve is a tensor of bytes among what autograd keeps for the backward of nn.LSTM."""
    T, B, H = 50, 16, 256
    lstm = torch.nn.LSTM(64, H, 2, bidirectional=True, dtype=dtype, device=DEVICE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lstm(torch.randn(T, B, 64, dtype=dtype, device=DEVICE))
    reserve = max(t.nbytes for t in kept if t.dtype == torch.uint8)
    intermediate = T * B * 2 * H * dtype.itemsize  # the output of the first layer, which cuDNN has in its reserve
    assert 2 * 2 * T * B * 5 * H * dtype.itemsize + intermediate <= reserve


def operator_arguments(T=3, B=2, I=5, H=4, D=2):
    weights = [
        w.to(DEVICE)
        for _ in range(D)
        for w in (torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H))
    ]
    lengths, reset = torch.tensor([3, 1], device=DEVICE), torch.rand(T, B, device=DEVICE) < 0.5
    state = torch.randn(D, B, H, device=DEVICE)
    return (torch.randn(T, B, I, device=DEVICE), weights, D == 2, state, state.clone(), lengths, reset, True, True)


def test_operators_pass_opcheck():
    x, weights, *options = operator_arguments()
    op, tests, given = torch.ops.fusedrnn, ("test_schema", "test_faketensor"), (x, *options[:5])
    torch.library.opcheck(op.cuda_forward.default, ("lstm", x, *options, *weights), test_utils=tests)
    y, hn, cn, c, reserve = op.cuda_forward("lstm", x, *options, *weights)
    needs = [True] * (3 + len(weights))
    backward = ("lstm", y, hn, cn, c, *given, y, c, reserve, needs, *weights)
    torch.library.opcheck(op.cuda_backward.default, backward, test_utils=tests)
    fewer = ("lstm", y, None, None, None, *given, y, c, reserve, [k % 2 == 0 for k in range(len(needs))], *weights)
    torch.library.opcheck(op.cuda_backward.default, fewer, test_utils=tests)


def test_operator_clamps_lengths():
    x, weights, two, h0, c0, _, reset, *flags = operator_arguments()
    run = torch.ops.fusedrnn.cuda_forward
    wild, tame = (
        run("lstm", x, weights, two, h0, c0, torch.tensor(n, device=DEVICE), reset, *flags) for n in ([-5, 99], [0, 3])
    )
    for a, b in zip(wild, tame, strict=True):
        assert torch.equal(a, b)


def test_empty_batch():
    with fusedrnn.use_backend("cuda"):
        lstm = fusedrnn.LSTM(3, 4, bidirectional=True, device=DEVICE)
        x = torch.randn(5, 0, 3, device=DEVICE, requires_grad=True)
        y, _ = lstm(x)
        assert y.shape == (5, 0, 8)
        grads = torch.autograd.grad(y.sum(), [x, *lstm.parameters()])
    assert grads[0].shape == x.shape
    assert all(not grad.any() for grad in grads[1:])


@pytest.mark.parametrize("fuse_input", [False, True], ids=["after-a-gemm", "with-x"])
def test_one_launch_a_pass(fuse_input, monkeypatch):
    """Of a bidirectional layer; and the gates take the memory of xg, where there is one."""
    plans_of({"fuse_input": fuse_input}, monkeypatch)
    launches, seen = [], {}
    for name in ("forward", "backward"):
        original = getattr(cuda, name)

        def spy(*arguments, name=name, original=original):
            launches.append(name)
            seen[name] = arguments
            return original(*arguments)

        monkeypatch.setattr(cuda, name, spy)
    lstm = fusedrnn.LSTM(3, 4, bidirectional=True, device=DEVICE)
    with fusedrnn.use_backend("cuda"):
        y, _ = lstm(torch.randn(5, 2, 3, device=DEVICE))
        torch.autograd.grad(y.sum(), lstm.weight_hh_l0)
    assert launches == ["forward", "backward"]
    xg, gates = seen["forward"][2], seen["forward"][-1]
    assert xg is (None if fuse_input else gates)


@pytest.mark.parametrize("reserve", ["gates", "recompute"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic, reserve, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_RESERVE", reserve)
    lstm = fusedrnn.CompilableLSTM(3, 4, dtype=F64, device=DEVICE)
    x = torch.randn(5, 2, 3, dtype=F64, device=DEVICE, requires_grad=True)
    with fusedrnn.use_backend("cuda"):
        outputs = [
            module(x)[0] for module in (lstm, torch.compile(lstm, fullgraph=True, backend="aot_eager", dynamic=dynamic))
        ]
        grads = [torch.autograd.grad(y.square().sum(), [x, *lstm.parameters()]) for y in outputs]
    assert torch.equal(*outputs)
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_an_exported_program_runs_with_grad_mode_on():
    lstm = fusedrnn.CompilableLSTM(3, 4, device=DEVICE)
    x = torch.randn(5, 2, 3, device=DEVICE)
    with fusedrnn.use_backend("cuda"):
        program = torch.export.export(lstm, (x,)).module()
        with torch.no_grad():
            expected = lstm(x)[0]
    assert torch.equal(program(x)[0].detach(), expected)


def problem(**changes):
    return dispatch.Problem(
        **{"device": DEVICE, "dtype": F32, "T": 2, "B": 2, "I": 3, "H": 4, "P": 4, "D": 1, **changes}
    )


def test_explain_shows_both_plans():
    with fusedrnn.use_backend("cuda"):
        explanation = fusedrnn.explain(fusedrnn.LSTM(3, 40, device=DEVICE), torch.randn(5, 2, 3, device=DEVICE))
    assert explanation.backend == "cuda"
    assert "forward: 1 groups of" in explanation.plan
    assert "backward: 1 groups of" in explanation.plan
    assert "us a step predicted from costs" in explanation.plan


def test_auto_does_not_choose_it():
    assert "not been verified" in dispatch.supports("cuda", problem())
    assert dispatch.select(problem()) != "cuda"
    with fusedrnn.use_backend("cuda"):
        assert dispatch.supports("cuda", problem()) is None
        assert dispatch.supports("cuda", problem(dtype=F64)) is None


def test_what_it_cannot_do_is_a_reason_and_an_error(monkeypatch):
    with fusedrnn.use_backend("cuda"):
        assert dispatch.supports("cuda", problem(H=1 << 20, P=1 << 20)) is None
        assert "does not fit" in dispatch.supports("cuda", problem(H=1 + (1 << 20), P=1 + (1 << 20)))
        assert "the input is on meta" in dispatch.supports("cuda", problem(device="meta"))
        assert "not torch.complex64" in dispatch.supports("cuda", problem(dtype=torch.complex64))
        monkeypatch.setenv("FUSEDRNN_FP32", "tf32x3")
        assert "tf32x3" in dispatch.supports("cuda", problem())
        with pytest.raises(RuntimeError, match=r"'cuda' was asked for and cannot run: .*tf32x3"):
            fusedrnn.LSTM(3, 4, device=DEVICE)(torch.randn(2, 2, 3, device=DEVICE))


def test_a_plan_that_the_device_has_no_room_for_gives_way_to_the_next(monkeypatch):
    shape = cuda.Shape(4, 8, 5, 64, 64, 1, 2, "tf32")
    device = cuda.device_for(torch.device(DEVICE))
    first = cuda.ranked("forward", shape, device[1])[0]
    rooms = []

    class Crowded:
        def cuda_occupancy(self, *arguments):
            rooms.append(arguments)
            return 0, 0 if arguments[-1][0] == first.fields[0] else 100

    monkeypatch.setattr(cuda, "_ops", Crowded())
    cuda._plan.cache_clear()
    other = cuda._plan("forward", shape, device)
    assert other.exchange != first.exchange
    assert len(rooms) > 1
    monkeypatch.setattr(Crowded, "cuda_occupancy", lambda *_: (0, 0))
    cuda._plan.cache_clear()
    with pytest.raises(ValueError, match=r"H = 64, P = 64 does not fit .*: it has no room for a block"):
        cuda._plan("forward", shape, device)
    cuda._plan.cache_clear()


class Launch:
    """The arguments of one forward launch, to be changed one at a time: after a GEMM, or with x of I numbers."""

    def __init__(self, fuse_input=False, T=3, B=2, I=5, H=8):
        _, device = cuda.device_for(torch.device(DEVICE))
        shape = cuda.Shape(T, B, I, H, H, 1, 4, "ieee")
        self.plan = next(p for p in cuda.ranked("forward", shape, device) if p.fuse_input == fuse_input).fields
        self.x, self.xg, self.w_ih, self.b_ih, self.b_hh = None, self.tensor(1, T, B, 4 * H), [], [], []
        if fuse_input:
            self.x, self.xg, self.w_ih = self.tensor(T, B, I), None, [self.tensor(4 * H, I)]
            self.b_ih, self.b_hh = [self.tensor(4 * H)], [self.tensor(4 * H)]
        self.w_hh, self.w_hr = [self.tensor(4 * H, H)], []
        self.h0 = self.c0 = self.lengths = self.reset = self.c = self.saved = None
        self.w_p0 = self.w_p1 = self.noise_h = self.noise_c = self.noise_g = self.noise_r = None
        self.y, self.hn, self.cn = self.tensor(T, B, H), self.tensor(1, B, H), self.tensor(1, B, H)

    def tensor(self, *shape, dtype=F32):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    def arguments(self, **changes):
        given = {**vars(self), **changes}
        both = {"w_ih", "b_ih", "b_hh", "w_hh", "w_hr"}  # lists of a tensor of each direction, or of none
        names = ["plan", "x", "xg", "w_ih", "b_ih", "b_hh", "w_hh", "w_hr", "h0", "c0", "lengths", "reset"]
        names += ["y", "hn", "cn", "c", "saved", "w_p0", "w_p1", "noise_h", "noise_c", "noise_g", "noise_r"]
        return tuple(a for n in names for a in ([*given[n], None, None][:2] if n in both else [given[n]]))

    def run(self, **changes):
        torch.ops.fusedrnn.cuda_launch_forward(*self.arguments(**changes))


def test_operators_of_the_library_pass_opcheck():
    """They change what their schemas say, and nothing else."""
    op, launch, t = torch.ops.fusedrnn, Launch(), Launch().tensor
    all_states = {"h0": t(1, 2, 8), "c0": t(1, 2, 8), "c": t(3, 2, 8), "saved": t(1, 3, 2, 32)}
    all_states |= {"lengths": t(2, dtype=torch.int64), "reset": t(3, 2, dtype=torch.bool)}
    for arguments in (
        launch.arguments(),
        launch.arguments(**all_states),
        Launch(fuse_input=True).arguments(**all_states),
    ):
        torch.library.opcheck(op.cuda_launch_forward, arguments, test_utils="test_schema")
    plan = cuda.plan_for("backward", cuda.Shape(3, 2, 1, 8, 8, 1, 4, "ieee"), torch.device(DEVICE)).fields
    given = (t(3, 2, 8), t(1, 2, 8), t(1, 2, 8), t(3, 2, 8), t(32, 8), None, None, None, t(1, 2, 8))
    given += (None, None)
    made = (t(3, 2, 8), t(1, 3, 2, 32), t(1, 3, 2, 32), None, None, t(1, 2, 8), t(1, 2, 8))
    torch.library.opcheck(op.cuda_launch_backward, (plan, *given, *made), test_utils="test_schema")
    occupancy = (0, 0, [3, 2, 8, 8, 1, 0, 5], launch.plan)
    for name, arguments in (("occupancy", occupancy), ("obstacle", (0,)), ("device_type", ())):
        torch.library.opcheck(getattr(op, f"cuda_{name}").default, arguments, test_utils="test_schema")


def test_the_library_checks_what_memory_safety_needs():
    launch = Launch()
    launch.run()
    t, plan, variant = launch.tensor, Launch(fuse_input=True).plan, [*launch.plan[:-1], 4]
    for changes, message in (
        ({"xg": t(1, 3, 2, 31)}, "xg has the wrong shape"),
        ({"xg": t(1, 3, 2, 64)[..., ::2]}, "xg must be contiguous"),
        ({"xg": t(1, 3, 2, 32, dtype=F64)}, "xg has a dtype that the plan is not for"),
        ({"y": t(3, 2, 9)}, "y has the wrong shape"),
        ({"hn": t(2, 2, 8)}, "hn has the wrong shape"),
        ({"c": t(3, 2, 7)}, "c has the wrong shape"),
        ({"lengths": t(2, dtype=torch.int32)}, "lengths has a dtype"),
        ({"reset": t(3, 3, dtype=torch.bool)}, "reset has the wrong shape"),
        ({"w_hh": []}, "w_hh must have 2 dimensions"),
        ({"w_hr": [t(8, 8), t(8, 8)]}, "one w_hr of each direction"),
        ({"plan": launch.plan[:-1]}, "a plan has 13 fields, got 12"),
        ({"plan": [*launch.plan[:-1], 6]}, "a plan of an unknown kind"),
        ({"plan": [*launch.plan[:-1], 1]}, "the plan is invalid: P must be H without a projection"),
        ({"cn": None}, "cn must be given"),
        ({"plan": [7, *launch.plan[1:]]}, "a plan of an unknown kind"),
        ({"plan": [4, *launch.plan[1:]]}, "a plan of an unknown kind"),
        ({"plan": [3, *launch.plan[1:]]}, "only the backward without a projection scatters"),
        ({"plan": [2, *launch.plan[1:]]}, "the plan is invalid: chunk_blocks must be 1"),
        ({"plan": [*launch.plan[:2], 0, *launch.plan[3:]]}, "the plan is invalid: counts must be positive"),
        ({"xg": None}, "the plan takes xg, and no x"),
        ({"x": t(3, 2, 5)}, "the plan takes xg, and no x"),
        ({"w_ih": [t(32, 5)]}, "one w_ih of each direction where the plan takes x, and none elsewhere"),
        ({"plan": plan}, "the plan is invalid: I must be 1"),
        ({"w_p0": t(24)}, "neither peepholes nor noise"),
        ({"noise_g": t(3, 2, 8)}, "neither peepholes nor noise"),
        ({"plan": variant, "w_p0": t(25)}, "w_p has the wrong shape"),
        ({"plan": variant, "w_p0": t(24), "w_p1": t(24)}, "peepholes of each direction, or none"),
        ({"plan": variant, "noise_h": t(3, 2, 7)}, "noise has the wrong shape"),
        ({"plan": variant, "noise_h": t(2, 2, 8)}, "noise must be of all time steps or of one"),
        ({"plan": variant, "noise_h": t(3, 2, 8), "noise_c": t(1, 2, 8)}, "noise must be of all time steps or of one"),
        ({"plan": variant, "noise_r": t(3, 2, 8, dtype=F64)}, "noise has a dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launch.run(**changes)


def test_the_library_checks_the_inputs_of_a_launch_that_takes_them():
    launch = Launch(fuse_input=True)
    launch.run()
    launch.run(b_ih=[], b_hh=[])
    t = launch.tensor
    for changes, message in (
        ({"x": t(3, 3, 5)}, "x has the wrong shape"),
        ({"x": t(3, 10)}, "x must have 3 dimensions"),
        ({"x": t(3, 2, 10)[..., ::2]}, "x must be contiguous"),
        ({"x": t(3, 2, 5, dtype=F64)}, "x has a dtype that the plan is not for"),
        ({"x": t(3, 2, 0)}, "the plan is invalid: I must be 1"),
        ({"x": None}, "the plan is invalid: I must be 1"),
        ({"xg": t(1, 3, 2, 32)}, "the plan takes x, and no xg"),
        ({"w_ih": []}, "one w_ih of each direction"),
        ({"w_ih": [t(32, 6)]}, "w_ih has the wrong shape"),
        ({"w_ih": [t(32, 10)[:, ::2]]}, "w_ih must be contiguous"),
        ({"b_ih": [t(31)]}, "b_ih has the wrong shape"),
        ({"b_hh": [t(32), t(32)]}, "one b_hh of each direction, or none"),
        ({"b_hh": [t(32, dtype=F64)]}, "b_hh has a dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launch.run(**changes)


def test_plans_that_are_not_chosen_can_be_tried(monkeypatch):
    """bench plans: what is launched is the plan of the trial, after a GEMM and with x, and every way comes once."""
    problem = cell((2, 3, 40, 40, 1, 1), "train", "float32", "plain", DEVICE)
    monkeypatch.setattr(plans, "_problems", lambda *_: [problem])
    launched = []
    for name in ("forward", "backward"):
        right = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda plan, *a, right=right: (launched.append(plan), right(plan, *a))[1])
    forced = [trial for trial in plans.trials("cuda", DEVICE) if trial.forced]
    assert {trial.forced[0].fuse_input for trial in forced} == {False, True}
    assert {trial.forced[0].exchange for trial in forced} >= {"grid"}
    assert len({trial.plan for trial in forced}) == len(forced) > 2
    for trial in forced[:4]:
        row = plans.attempt(trial)
        assert (row.status, row.reason) == ("ok", "")
        assert launched[-2:] == list(trial.forced)


@host_only
def test_without_the_library_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(ops, "_cuda_unloaded", "it was left at home")
    assert fusedrnn.backends()["cuda"] == "it was left at home"
    with pytest.raises(RuntimeError, match="it was left at home"), fusedrnn.use_backend("cuda"):
        pass


@host_only
def test_a_library_that_the_gpu_cannot_run_gives_the_librarys_reason(monkeypatch):
    """The library's own answer (an older driver, other architectures) is the reason, and is asked for once."""
    asked = []

    class Library:
        def cuda_device_type(self):
            return "cuda"

        def cuda_obstacle(self, device):
            asked.append(device)
            return "it was built for other architectures than sm_75"

    monkeypatch.setattr(ops, "_ops", Library())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert fusedrnn.backends()["cuda"] == "torch finds no GPU"
    monkeypatch.setattr(ops, "_no_gpu", lambda: None)
    ops._cuda_obstacle.cache_clear()
    assert fusedrnn.backends()["cuda"] == "it was built for other architectures than sm_75"
    assert "sm_75" in dispatch.supports("cuda", problem())
    assert asked == [3]
    ops._cuda_obstacle.cache_clear()
