"""What people put around a recurrent layer, each against nn.LSTM. docs/ecosystem.md names the tests of all of it."""

import ast
import contextlib
import copy
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedrnn
from fusedrnn import testing

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ecosystem.md"


class Model(nn.Module):
    """A recurrent layer between two others."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x).tanh())[0][:, -1])


@pytest.fixture
def pair():
    """A model, and a converted one of the same weights, in float64."""
    model = Model().double()
    return model, fusedrnn.convert(copy.deepcopy(model))


def batch(B=6, T=5):
    return torch.randn(B, T, 3, dtype=torch.float64)


def grads(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


# The page


def rows():
    """The rows of the table of the page: the tool, whether it works, and the tests."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set(row[0]) <= {"-"}][1:]


def test_the_page_has_a_test_for_every_tool():
    assert len(rows()) > 30
    for tool, works, tests in rows():
        assert re.match(r"(yes|no|only)\b", works), tool
        assert re.findall(r"`tests/([\w/]+\.py)::(\w+)`", tests), tool


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_test_of_the_page_exists(row):
    for file, name in re.findall(r"`tests/([\w/]+\.py)::(\w+)`", row[2]):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


# Weights


def test_pruning(pair, assert_same):
    x = batch()
    for model in pair:
        torch.manual_seed(1)
        prune.random_unstructured(model.lstm, "weight_hh_l0", 0.5)
    assert_same(pair[1](x), pair[0](x))
    assert_same(grads(pair[1], x), grads(pair[0], x))
    for model in pair:
        prune.remove(model.lstm, "weight_hh_l0")
    assert (pair[1].lstm.weight_hh_l0 == 0).sum() == 50
    assert_same(pair[1](x), pair[0](x))


def test_ema(pair, assert_same):
    """The averaged copy sees its weights change in place, in inference, where packed weights are cached."""
    x = batch(T=40)
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for model in pair]
    for step in range(3):
        with torch.no_grad():
            for model in pair:
                for p in model.parameters():
                    p.add_(0.01 * step)
            for average, model in zip(averages, pair, strict=True):
                average.update_parameters(model)
            assert_same(averages[1](x), averages[0](x))


def test_safetensors(pair, assert_same, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path, x = tmp_path / "model.safetensors", batch()
    safetensors.save_file(pair[0].state_dict(), path)
    converted = fusedrnn.convert(Model().double())
    converted.load_state_dict(safetensors.load_file(path))
    assert_same(converted(x), pair[0](x))
    safetensors.save_model(converted, path)
    safetensors.load_model(pair[0], path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization_needs_revert(pair):
    quantize = torch.ao.quantization.quantize_dynamic
    left = quantize(pair[1].float(), {nn.LSTM}, dtype=torch.qint8)
    assert type(left.lstm) is fusedrnn.LSTM
    before = fusedrnn.convert(quantize(pair[0].float(), {nn.LSTM}, dtype=torch.qint8))
    after = quantize(fusedrnn.revert(pair[1]), {nn.LSTM}, dtype=torch.qint8)
    for quantized in (before, after):
        assert type(quantized.lstm).__module__.startswith("torch.ao.nn.quantized")
    x = batch().float()
    assert torch.equal(before(x), after(x))


@pytest.mark.skipif(not testing.nn_lstm_autocasts(), reason="nn.LSTM itself fails under autocast on this processor")
def test_autocast():
    """Of padded input: the dtypes of nn.LSTM, and its gradients within what bfloat16 can tell."""
    theirs = nn.LSTM(3, 5, bidirectional=True)
    ours, x = fusedrnn.convert(copy.deepcopy(theirs)), torch.randn(7, 2, 3)
    found = []
    for lstm in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            y, state = lstm(x)
        found.append([y, *state, *torch.autograd.grad(y.float().sum(), list(lstm.parameters()))])
    assert [value.dtype for value in found[1]] == [value.dtype for value in found[0]]
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)


# Hooks and attribution


def test_hooks_see_what_they_see_of_nn_lstm(pair, assert_same):
    seen = [[], []]
    for model, mine in zip(pair, seen, strict=True):

        def forward(module, args, output, mine=mine):
            mine.extend((args[0], output[0]))

        model.lstm.register_forward_hook(forward)
        model.embed.register_full_backward_hook(lambda module, dx, dy, mine=mine: mine.append(dy[0]))
        model.head.register_full_backward_hook(lambda module, dx, dy, mine=mine: mine.append(dx[0]))
    x = batch()
    assert_same(grads(pair[1], x), grads(pair[0], x))
    assert len(seen[0]) == 4
    assert_same(seen[1], seen[0])


def test_per_sample_gradients_by_hooks(pair, assert_same):
    """As opacus and others take them for linear layers: what enters, times the gradient of what leaves."""

    def per_sample(model, x):
        entered, left = [], []
        handles = [
            model.embed.register_forward_hook(lambda module, args, output: entered.append(args[0])),
            model.embed.register_full_backward_hook(lambda module, dx, dy: left.append(dy[0])),
        ]
        model(x).square().sum().backward()
        for handle in handles:
            handle.remove()
        return torch.einsum("bto,bti->boi", left[0], entered[0])

    x = batch()
    found = per_sample(pair[1], x)
    assert_same(found, per_sample(pair[0], x))
    assert_same(found[2], grads(pair[0], x[2:3])[0])


def test_per_sample_gradients_of_the_layer(pair, assert_same):
    """All sequences at once; nn.LSTM, which torch.func.vmap refuses, takes one after another."""

    def gradients(model):
        def loss(weights, x):
            return torch.func.functional_call(model, weights, (x.unsqueeze(0),)).square().sum()

        weights = {name: p.detach() for name, p in model.named_parameters()}
        return lambda x: list(torch.func.grad(loss)(weights, x).values())

    x = batch(B=3)
    each = [gradients(pair[0])(sequence) for sequence in x]
    assert_same(torch.func.vmap(gradients(pair[1]))(x), [torch.stack(parts) for parts in zip(*each, strict=True)])


@pytest.mark.parametrize("cls", [nn.GRU, nn.RNN, nn.GRUCell, nn.RNNCell])
def test_tools_around_other_cells(cls, assert_same):
    """A GRU or RNN: pruning, averaging, and per-sample gradients by torch.func."""
    theirs = cls(3, 4).double()
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    name = next(name for name, _ in theirs.named_parameters() if name.startswith("weight_hh"))
    x = torch.randn(6, 2, 3, dtype=torch.float64) if issubclass(cls, nn.RNNBase) else batch(B=2)[:, 0, :3]
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        average = AveragedModel(model)
        average.update_parameters(model)
        prune.random_unstructured(model, name, 0.5)
        pruned = model(x)
        prune.remove(model, name)

        def loss(weights, x, model=model):
            outputs = torch.func.functional_call(model, weights, (x,))
            return (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum()

        weights = dict(model.named_parameters())
        each = [list(torch.func.grad(loss)(weights, part).values()) for part in x.split(1, dim=-2)]
        found.append([*(pruned if isinstance(pruned, tuple) else (pruned,)), average(x), *each])
    assert_same(found[0], found[1])


# Counters and profilers


def products(module, rows):
    return sum(2 * rows * weight.numel() for weight in module.parameters() if weight.dim() == 2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN])
def test_flop_counter(cls, backend):
    """The products of nn.LSTM: torch counts them for a projection, but none of its kernels for the CPU without."""
    if fusedrnn.backends()[backend] is not None:
        pytest.skip(fusedrnn.backends()[backend])
    from torch.utils.flop_counter import FlopCounterMode

    def count(run):
        with FlopCounterMode(display=False) as counter:
            result = run()
        return counter.get_total_flops(), result

    T, B, x = 5, 3, torch.randn(5, 3, 7)
    layers = cls(7, 16, 2, bidirectional=True)
    with fusedrnn.use_backend(backend):
        with torch.no_grad():
            assert count(lambda: layers(x))[0] == products(layers, T * B)
        forward, (y, _) = count(lambda: layers(x))
        backward, _ = count(lambda: y.sum().backward())
        assert forward == products(layers, T * B)
        of_x = sum(2 * T * B * layers.all_weights[d][0].numel() for d in range(2))
        of_first_states = sum(2 * B * weights[1].numel() for weights in layers.all_weights)
        assert backward == 2 * forward - of_x - of_first_states
        if cls is fusedrnn.LSTM:
            found = []
            for module in (fusedrnn.LSTM(7, 16, proj_size=5), nn.LSTM(7, 16, proj_size=5)):
                leaf = x.clone().requires_grad_()
                forward, (y, _) = count(lambda module=module, leaf=leaf: module(leaf))
                found.append((forward, count(lambda y=y: y.sum().backward())[0]))
            assert found[0] == found[1]
        step = getattr(fusedrnn, f"{cls.__name__}Cell")(7, 16)
        assert count(lambda: step(x[0]))[0] == products(step, B)


def test_the_flop_counter_is_not_loaded_by_us():
    """It takes its time, and loads Triton."""
    code = """
import sys, torch, fusedrnn
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import flop_registry
assert torch.ops.fusedrnn.cpu_forward in flop_registry
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_profiler():
    """Operators by name, with the shapes of what they take, forward and backward."""
    if fusedrnn.backends()["cpu"] is not None:
        pytest.skip(fusedrnn.backends()["cpu"])
    layer, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    with fusedrnn.use_backend("cpu"), torch.profiler.profile(record_shapes=True) as profile:
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x)
    shapes = {event.key: event.input_shapes for event in profile.key_averages(group_by_input_shape=True)}
    assert shapes["fusedrnn::cpu_forward"][1] == [5, 2, 3]
    assert shapes["fusedrnn::cpu_backward"][5] == [5, 2, 3]
    assert shapes["fusedrnn::cpu_infer"][1] == [5, 2, 3]


# Copies and processes


@pytest.mark.parametrize("compilable", [False, True], ids=["LSTM", "CompilableLSTM"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(pair, assert_same, duplicate, compilable):
    model = fusedrnn.convert(pair[1], compilable=compilable)
    x, other = batch(), duplicate(model)
    assert type(other.lstm) is type(model.lstm)
    assert_same(other(x), pair[0](x))
    with torch.no_grad():
        other.lstm.weight_hh_l0.zero_()
    assert_same(model(x), pair[0](x))


@pytest.fixture
def importable(monkeypatch):
    """Lets processes that are spawned find this file: they get the path of this one."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])


def answer(model, x, queue):
    torch.set_num_threads(1)
    queue.put([value.detach().numpy() for value in (model(x), *grads(model, x))])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(pair, assert_same, importable, method):
    """A model that has computed here computes in a child; by spawn it is pickled on the way."""
    x = batch()
    expected = [pair[0](x), *grads(pair[0], x)]
    pair[1](x)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=answer, args=(pair[1], x, queue))
    child.start()
    found = queue.get(timeout=120)
    child.join()
    assert child.exitcode == 0
    assert_same([torch.from_numpy(value) for value in found], expected)


# Training on several processes


def train(model, rank, x, not_synchronised, between=lambda: None):
    """Two steps of SGD, of which each of two ranks computes one half of the batch, in two parts whose gradients add up;
    only those of the last part are synchronised."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        first, last = x[rank::2].chunk(2)
        with not_synchronised(model):
            (model(first).square().mean() / 2).backward()
        (model(last).square().mean() / 2).backward()
        optimizer.step()
        between()


def save_and_load(model, folder):
    """By torch.distributed.checkpoint: the weights are lost between."""
    from torch.distributed import checkpoint

    checkpoint.save(model.state_dict(), checkpoint_id=f"{folder}/checkpoint")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoint.load(model.state_dict(), checkpoint_id=f"{folder}/checkpoint")


def shard(model, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.embed, model.lstm, model.head):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@contextlib.contextmanager
def without_reduction(model):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def work(rank, folder, kind):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model, x = torch.load(f"{folder}/model.pt", weights_only=False)
        if kind == "ddp":
            model.lstm = checkpoint_wrapper(model.lstm)
            trained = nn.parallel.DistributedDataParallel(model)
            train(trained, rank, x, lambda trained: trained.no_sync())
            state = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.state_dict().items()}
        else:
            trained = shard(model)
            train(trained, rank, x, without_reduction, lambda: save_and_load(trained, folder))
            state = {name: value.full_tensor() for name, value in trained.state_dict().items()}
        if rank == 0:
            torch.save(state, f"{folder}/state.pt")
        if kind == "fsdp2":
            torch.save(mixed(rank, x), f"{folder}/mixed{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def mixed(rank, x):
    """A mixed-precision policy, for nn.LSTM and for ours: the output, and the weights after training."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    torch.manual_seed(0)
    theirs, found = Model(), []
    ours = fusedrnn.convert(copy.deepcopy(theirs), compilable=True)
    for model in (theirs, ours):
        model = shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        y = model(x.float())
        train(model, rank, x.float(), without_reduction)
        found.append([y.detach(), *(p.full_tensor() for p in model.state_dict().values())])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is without torch.distributed")
@pytest.mark.parametrize(("kind", "compilable"), [("ddp", False), ("fsdp2", True)])
def test_data_parallel_training(pair, assert_same, importable, tmp_path, kind, compilable):
    """Two ranks do to the weights what one process does with nn.LSTM and the whole batch.

    DDP with no_sync and a checkpointed layer; FSDP2 with gradients that are reduced later, weights that go through
    torch.distributed.checkpoint, and a mixed-precision policy.
    """
    x = batch(B=8)
    torch.save((fusedrnn.convert(pair[1], compilable=compilable), x), tmp_path / "model.pt")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, str(tmp_path), kind)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    optimizer = torch.optim.SGD(pair[0].parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        pair[0](x).square().mean().backward()
        optimizer.step()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    state = torch.load(tmp_path / "state.pt")
    assert_same(list(state.values()), list(pair[0].state_dict().values()))
    if kind == "fsdp2":
        theirs, ours = torch.load(tmp_path / "mixed0.pt")
        assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


# Compilers


def test_script_refuses(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, torch.jit.frontend.FrontendError)):
            torch.jit.script(pair[1])
        torch.jit.script(fusedrnn.revert(pair[1]))


CXX = shutil.which(os.environ.get("CXX", "g++"))


class Last(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.fixture
def package(pair, tmp_path):
    """nn.LSTM and our layer for inference, and a package of ours for any B and T."""
    theirs, ours = (Last(model.lstm).eval() for model in pair)
    fusedrnn.convert(ours, compilable=True)
    dynamic = {"x": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}}
    program = torch.export.export(ours, (torch.randn(6, 5, 4, dtype=torch.float64),), dynamic_shapes=dynamic)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    return theirs, ours, path


@pytest.mark.slow
@pytest.mark.skipif(CXX is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.skipif(fusedrnn.backends()["cpu"] is not None, reason="the CPU library is not here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_aot_inductor(package, assert_same, tmp_path):
    """In Python; and, with a trace, in a C++ program that loads the library: no Python is in its process."""
    theirs, ours, path = package
    inputs = [torch.randn(B, T, 4, dtype=torch.float64) for B, T in ((6, 5), (3, 9))]
    with torch.no_grad():
        expected = [theirs(x) for x in inputs]
        compiled = torch._inductor.aoti_load_package(path)
        assert_same([compiled(x) for x in inputs], expected)
        torch.jit.trace(ours, inputs[0], check_trace=False).save(str(tmp_path / "trace.pt"))
    program = built_program(tmp_path)
    (tmp_path / "x").write_bytes(b"".join(x.numpy().tobytes() for x in inputs))
    sizes = [str(number) for x in inputs for number in x.shape]
    for kind, file in (("package", path), ("trace", tmp_path / "trace.pt")):
        command = [program, LIBRARY, kind, file, tmp_path / "x", tmp_path / "y", *sizes]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        found = torch.from_numpy(np.fromfile(tmp_path / "y"))
        assert_same(found, torch.cat([y.flatten() for y in expected]))


LIBRARY = next(Path(fusedrnn.__file__).parent.glob("_cpu*.so"), None)


def built_program(folder):
    """tests/ecosystem/cpp/program.cpp, linked with this torch."""
    torch_folder, program = Path(torch.__file__).parent, folder / "program"
    includes = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
    libraries = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [CXX, "-std=c++20", "-O0", ROOT / "tests" / "ecosystem" / "cpp" / "program.cpp", "-o", program]
    command += [*(f"-isystem{include}" for include in includes), *libraries, "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_trace(pair, assert_same):
    frozen = torch.jit.freeze(torch.jit.trace(pair[1].eval(), batch(), check_trace=False))
    for B, T in ((6, 5), (2, 9), (1, 1), (3, 4)):  # the first calls are profiled
        x = batch(B, T)
        assert_same(frozen(x), pair[0](x))


@pytest.mark.parametrize("compilable", [False, True], ids=["LSTM", "CompilableLSTM"])
def test_symbolic_trace(pair, assert_same, compilable):
    """The layer is a leaf of the graph, as nn.LSTM is."""
    traced = [torch.fx.symbolic_trace(model) for model in (pair[0], fusedrnn.convert(pair[1], compilable=compilable))]
    targets = [[str(node.target) for node in program.graph.nodes] for program in traced]
    assert targets[1] == targets[0]
    x = batch()
    assert_same(traced[1](x), traced[0](x))


def test_jacobians(pair, assert_same):
    x = batch(B=2, T=3)
    for jacobian in (
        lambda model: torch.func.jacrev(model)(x),
        lambda model: torch.func.jacfwd(model)(x),
        lambda model: torch.func.hessian(lambda x: model(x).square().sum())(x),
        lambda model: torch.autograd.functional.jacobian(model, x, vectorize=True),
    ):
        assert_same(jacobian(pair[1]), jacobian(pair[0]))


def test_functionalize(pair, assert_same):
    x = batch()
    assert_same(torch.func.functionalize(pair[1])(x), pair[0](x))
