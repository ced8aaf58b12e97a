"""Fixtures that the tests of the Python layer share: where to compute, pairs of modules, and what equal means."""

import importlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

# Read when torch is loaded. Threads that spin while they wait keep their cores from the other process with tests: what
# computes on two threads then takes five times as long.
os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn import dispatch, sequence, testing
from fusedrnn.module import BASES
from fusedrnn.tuning import choice, profile


def _interpret_triton() -> None:
    """Loads Triton and its kernels in the interpreter, for tests/triton/test_triton.py, where there is no GPU.

    Triton decides it for good when it is first loaded, and other tests load it through torch. The variable is gone
    afterwards: nothing but the tests that set it again sees a backend that is interpreted.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("fusedrnn.kernels.launch")
    del os.environ["TRITON_INTERPRET"]


def _compute_on_one_thread() -> None:
    """Here and in the processes that tests start. Tests that are about threads set their number.

    Threads that wait for each other take their time where something else wants their cores: a busy machine, or a second
    process with tests.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _choose_by_rule() -> None:
    """No profile of the machine that the tests run on decides what they run. Tests that are about profiles name one."""
    os.environ["FUSEDRNN_PROFILE"] = "none"


_interpret_triton()
_compute_on_one_thread()
_choose_by_rule()


class Place(NamedTuple):
    """A backend, and a device that it computes on."""

    backend: str
    device: str
    lengths: str = "padded"  # or packed: what becomes of padded input with lengths


def places(**needs: Any) -> list[Place]:
    """Every backend that is available, on every device where it computes what is needed in float64."""
    return [
        Place(backend, device)
        for device in testing.devices()
        for backend in fusedrnn.backends()
        if dispatch.supports(backend, dispatch.Problem(device, torch.float64, 2, 2, 3, 4, 4, 1, **needs)) is None
    ]


class Kind(NamedTuple):
    """The modules of a cell that is no LSTM, and the options that make them compute it."""

    cell: str  # a name in cells.CELLS
    ours: Any
    step: Any  # of one time step
    options: dict[str, str] = {}  # noqa: RUF012 - never modified


KINDS = [
    Kind("gru", fusedrnn.GRU, fusedrnn.GRUCell),
    Kind("rnn_tanh", fusedrnn.RNN, fusedrnn.RNNCell),
    Kind("rnn_relu", fusedrnn.RNN, fusedrnn.RNNCell, {"nonlinearity": "relu"}),
]
PLACES = places()
KERNELS = places(lengths=True, reset=True, states=True)  # what is more than nn.LSTM: all but aten
RAGGED = [*KERNELS, *(k._replace(lengths="packed") for k in KERNELS if dispatch.TABLE[k.backend].takes_packed)]


# H, P and dtype of layers that do not fill the tiles of any kernel.
ODD_LAYERS = [
    (3, 0, torch.float32),
    (5, 2, torch.bfloat16),
    (17, 0, torch.bfloat16),
    (20, 0, torch.float32),
    (24, 7, torch.float32),
    (33, 0, torch.float16),
    (33, 20, torch.float32),
]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has the host build of the CUDA kernels made with those of variants if a test of them is going to run."""
    if any(item.get_closest_marker("cuda_variants") for item in session.items):
        os.environ["FUSEDRNN_CUDA_HOST_VARIANTS"] = "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`place` is every backend, `kernel` every one that can do more than nn.LSTM, `ragged` each way of these.

    `odd_layer` is each of ODD_LAYERS. `other_place` and `other_kernel` are these with each of KINDS, as pairs.
    """
    for name, needs in (("other_place", {}), ("other_kernel", {"lengths": True, "reset": True, "states": True})):
        if name in metafunc.fixturenames:
            pairs = [(kind, place) for kind in KINDS for place in places(cell=kind.cell, **needs)]
            ids = [f"{kind.cell}-{place.backend}-{place.device}" for kind, place in pairs]
            metafunc.parametrize(name, pairs, ids=ids, indirect=True)
    if "odd_layer" in metafunc.fixturenames:
        metafunc.parametrize("odd_layer", ODD_LAYERS, ids=str)
    for name, found in (("place", PLACES), ("kernel", KERNELS), ("ragged", RAGGED)):
        if name in metafunc.fixturenames:
            ids = ["-".join(place if place.lengths == "packed" else place[:2]) for place in found]
            metafunc.parametrize(name, found, ids=ids, indirect=True)


def _use(request: pytest.FixtureRequest) -> Iterator[Place]:
    with fusedrnn.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Computes on one backend; the tensors have to be on `place.device`."""
    yield from _use(request)


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[Place]:
    """As `place`, for what torch's own LSTM cannot do."""
    yield from _use(request)


def _use_other(request: pytest.FixtureRequest) -> Iterator[tuple[Kind, Place]]:
    with fusedrnn.use_backend(request.param[1].backend):
        yield request.param


@pytest.fixture
def other_place(request: pytest.FixtureRequest) -> Iterator[tuple[Kind, Place]]:
    """A cell that is no LSTM, and a place that computes it."""
    yield from _use_other(request)


@pytest.fixture
def other_kernel(request: pytest.FixtureRequest) -> Iterator[tuple[Kind, Place]]:
    """As `other_place`, for what torch's own layers cannot do."""
    yield from _use_other(request)


@pytest.fixture
def kinds() -> list[Kind]:
    """The cells that are no LSTM, for tests that need no backend of each."""
    return KINDS


@pytest.fixture
def ragged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """As `kernel`; and once more with padded input packed, whatever there is to save, where it may be."""
    monkeypatch.setattr(sequence, "_PACKING_FLOPS", 0 if request.param.lengths == "packed" else math.inf)
    yield from _use(request)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Every test begins with one thread of torch's, whatever number another one has set."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def twins() -> Callable[..., tuple[nn.LSTM, fusedrnn.LSTM]]:
    """Builds torch's and our module with the same weights, an LSTM in float64 unless told."""

    def build(*args: Any, cls: Any = fusedrnn.LSTM, **kwargs: Any) -> tuple[Any, Any]:
        kwargs.setdefault("dtype", torch.float64)
        theirs = BASES[cls](*args, **kwargs)
        ours = cls(*args, **kwargs)
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    return build


def tensors(nested: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, in order; of a PackedSequence its data."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, PackedSequence):
        return [nested.data]
    return [tensor for part in nested for tensor in tensors(part)]


def _same(ours: Any, theirs: Any) -> None:
    ours, theirs = tensors(ours), tensors(theirs)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        # Two orders of summation in float64 differ by some 1e-14; whatever is wrong is wrong by much more than this.
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@pytest.fixture
def assert_same() -> Callable[[Any, Any], None]:
    """Holds nested float64 tensors to be equal up to the order of summation: shapes, dtypes, devices and values."""
    return _same


@pytest.fixture
def gradients() -> Callable[..., list[torch.Tensor]]:
    """Gradients of nested outputs for random output gradients, the same ones at every call; 0 where none depends."""

    def compute(outputs: Any, inputs: Any) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        douts = [(y, torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)) for y in tensors(outputs)]
        pairs = [(y, dy) for y, dy in douts if y.requires_grad]
        if not pairs:
            return [torch.zeros_like(input) for input in tensors(inputs)]
        ys, dys = zip(*pairs, strict=True)
        return list(torch.autograd.grad(ys, tensors(inputs), dys, allow_unused=True, materialize_grads=True))

    return compute


@pytest.fixture
def assert_twins(assert_same: Any, gradients: Any) -> Callable[..., None]:
    """Runs both modules on the same input: equal outputs, and equal gradients of leaves and parameters.

    `make` returns the leaves and the arguments; it is called for each module, with the same seed.
    """

    def check(theirs: nn.Module, ours: nn.Module, make: Callable[[], tuple[Any, tuple[Any, ...]]]) -> None:
        results = []
        for module in (theirs, ours):
            torch.manual_seed(1)
            leaves, args = make()
            outputs = module(*args)
            results.append((outputs, gradients(outputs, [leaves, *module.parameters()])))
        (expected, expected_grads), (outputs, grads) = results
        assert_same(outputs, expected)
        assert_same(grads, expected_grads)

    return check


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of profiles in an empty cache folder, which counts: nothing is pinned, and none is shipped."""
    monkeypatch.delenv("FUSEDRNN_PROFILE", raising=False)
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(profile, "SHIPPED", tmp_path / "shipped")
    choice.forget()
    yield tmp_path / "profiles"
    monkeypatch.undo()
    choice.forget()


class _FiniteProducts(TorchDispatchMode):
    """Inside, an operand of a matrix product that is not finite is an error: what a product reads is up to it."""

    PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            assert all(bool(a.isfinite().all()) for a in args if isinstance(a, torch.Tensor)), f"{func} is given NaN"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def assert_padding_is_not_read() -> Callable[..., None]:
    """Holds a pair of operators (see ops.FORWARD_SCHEMA, ops.BACKWARD_SCHEMA), or of gpu.py's functions, whose
    gradients of the weights are in a list, to what they make of NaN in padding.

    It is in x, dy and dc where no step exists, and in the state of a sequence without a step. No product is given it,
    and all results are what they are with zeros there.
    """

    def check(forward: Callable[..., Any], backward: Callable[..., Any], dtype: torch.dtype, device: str) -> None:
        T, B, I, H, P, D = 4, 5, 7, 6, 3, 2
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        weights = [random(*size) for _ in range(D) for size in ((4 * H, I), (4 * H, P), (4 * H,), (4 * H,), (P, H))]
        lengths = torch.tensor([T, 1, 0, 3, 2], device=device)
        reset = (torch.rand(T, B, generator=generator) < 0.3).to(device)
        x, h0, c0 = random(T, B, I), random(D, B, P), random(D, B, H)
        dy, dhn, dcn, dc = random(T, B, D * P), random(D, B, P), random(D, B, H), random(T, B, D * H)
        steps = (torch.arange(T, device=device).unsqueeze(1) < lengths).unsqueeze(-1)

        def run(padding: float) -> list[torch.Tensor]:
            px, pdy, pdc = (rows.where(steps, padding) for rows in (x, dy, dc))
            ph0, pc0, pdhn, pdcn = (state.where(steps[0], padding) for state in (h0, c0, dhn, dcn))
            given, needs = (px, True, ph0, pc0, lengths, reset), [True] * (3 + len(weights))
            y, hn, cn, c, reserve = forward("lstm", *given, True, True, *weights)
            dx, dh0, dc0, *dweights = backward("lstm", pdy, pdhn, pdcn, pdc, *given, y, c, reserve, needs, *weights)
            dweights = dweights[0] if isinstance(dweights[0], list) else dweights[: len(weights)]
            states = [state.where(steps[0], 0.0) for state in (hn, cn, dh0, dc0)]
            return [y, c, dx, *states, *dweights]

        expected = run(0.0)
        with _FiniteProducts():
            found = run(math.nan)
        assert all(bool(tensor.isfinite().all()) for tensor in expected)
        for ours, right in zip(found, expected, strict=True):
            assert torch.equal(ours, right)

    return check


@pytest.fixture
def assert_not_finite_as_nn_lstm() -> Callable[..., None]:
    """Holds the backend in use to nn.LSTM's infinities and NaN: one number of all that enters is not finite.

    What comes of it in other rows, units, steps and gradients is what float64 has there: a kernel computes more units
    than there are, and 0 * inf is NaN. oneDNN is left out: on some processors its bfloat16 product, which is part of
    the GPU backends where they compute on the CPU, reads on into the next row. `few`: of the values infinity alone.
    """

    def check(H: int, P: int, dtype: torch.dtype, device: str, bidirectional: bool, few: bool = False) -> None:
        T, I, D = 3, 4, 2 if bidirectional else 1
        theirs = nn.LSTM(I, H, proj_size=P, bidirectional=bidirectional, dtype=torch.float64)
        ours = fusedrnn.LSTM(I, H, proj_size=P, bidirectional=bidirectional, dtype=dtype, device=device)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())  # the same to the bit

        def run(module: nn.Module, given: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> Any:
            x, h0, c0, *douts = (value.to(device, dtype) for value in given.values())
            leaves = [x.requires_grad_(), h0.requires_grad_(), c0.requires_grad_(), *module.parameters()]
            y, (hn, cn) = module(x, (h0, c0))
            return [y, hn, cn, *torch.autograd.grad([y, hn, cn], leaves, douts)]

        @torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
        def compare(*places: tuple[str, float]) -> None:
            """Of two rows of the batch for each place, the second has it."""
            B = 2 * len(places)
            sizes = {"x": (T, B, I), "h0": (D, B, P or H), "c0": (D, B, H), "dy": (T, B, D * (P or H))}
            sizes |= {"dhn": sizes["h0"], "dcn": sizes["c0"]}
            given = {name: torch.randn(size).to(dtype).double() for name, size in sizes.items()}
            for k, (name, value) in enumerate(places):
                given[name][len(given[name]) // 2, 2 * k + 1, k % 2] = value
            found, expected = run(ours, given, device, dtype), run(theirs, given, "cpu", torch.float64)
            for k, (mine, right) in enumerate(zip(found, expected, strict=True)):
                for what in (torch.isnan, torch.isposinf, torch.isneginf):
                    assert torch.equal(what(mine).cpu(), what(right)), f"{what.__name__} of result {k}: {places}"

        values, names = (math.inf, -math.inf, math.nan), ("x", "h0", "c0", "dy", "dhn", "dcn")
        compare(*itertools.product(names, values[:1] if few else values))
        for name in ("x", "dy"):  # gradients of weights are sums over all rows
            compare((name, -math.inf))

    return check


@pytest.fixture(scope="session")
def report() -> Callable[..., Any]:
    """What code prints as JSON in a fresh Python, started in another folder so that it finds the installed package."""

    def run(code: str, folder: Path, **environment: str) -> Any:
        inherited = {name: value for name, value in os.environ.items() if name != "FUSEDRNN_BACKEND"}
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**inherited, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


@pytest.fixture(scope="session")
def cuda_host() -> ModuleType:
    """tests/cuda/conftest.py: the host build of the kernels in csrc/cuda, and mirrors of their structs."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the host build of the CUDA kernels needs a C++ compiler, and there is none")
    name = "fusedrnn_tests_cuda_host"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "cuda" / "conftest.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
