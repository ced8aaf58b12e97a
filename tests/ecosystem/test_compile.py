"""torch.compile, torch.export and the operators that both see: whole graphs, one operator a layer, any T and B."""

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import fresh_cache
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import dispatch, layout, ops
from fusedrnn.cells import CELLS
from fusedrnn.module import BASES

I, H = 3, 4
SIZES = [(5, 2), (6, 3), (3, 7), (9, 4)]  # T and B of the calls; the first one is compiled for


class Model(nn.Module):
    """An LSTM with layers around it, so that there is a graph to be whole."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(I, I)
        self.lstm = nn.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.Linear(2 * H, 2)

    def forward(self, x, lengths=None, reset=None, return_states=False):
        more = {"lengths": lengths, "reset": reset, "return_states": return_states}
        y, state, *states = self.lstm(torch.tanh(self.embed(x)), **more)
        return self.head(y), state, *states


class Decoder(nn.Module):
    """A loop over nn.LSTMCell."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(I, H)

    def forward(self, x, hx=None):
        for step in x.unbind(0):
            hx = self.cell(step, hx)
        return hx


class OtherModel(nn.Module):
    """The layers of a cell that is no LSTM, and its cell at the end."""

    def __init__(self, kind):
        super().__init__()
        self.layers = BASES[kind.ours](I, H, num_layers=2, bidirectional=True, batch_first=True, **kind.options)
        self.step = BASES[kind.step](2 * H, H, **kind.options)

    def forward(self, x, lengths=None, reset=None, return_states=False):
        y, h, *states = self.layers(x, lengths=lengths, reset=reset, return_states=return_states)
        return self.step(y[:, 0], h[0]), y, h, *states


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs graphs as they are and keeps those of AOTAutograd: `forward` and `backward`."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.compile = aot_autograd(fw_compiler=self.keep(self.forward), bw_compiler=self.keep(self.backward))

    def __call__(self, module, inputs):
        return self.compile(module, inputs)

    @staticmethod
    def keep(graphs):
        def compiler(module, inputs):
            graphs.append(module.graph)
            return make_boxed_func(module.forward)

        return compiler

    @staticmethod
    def operators(graph):
        """The arguments of each of our operators in a graph, under the operator's name."""
        called = {}
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == ops.NAMESPACE:
                called.setdefault(node.target._schema.name.split("::")[1], []).append(node.args)
        return called


def compiled(model, device):
    model = fusedrnn.convert(model, compilable=True).to(device, torch.float64)
    graphs = Graphs()
    return model, torch.compile(model, fullgraph=True, backend=graphs), graphs


def batch(T, B, device, dims=(0, 1)):
    x = torch.randn(B, T, I, dtype=torch.float64, device=device)
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    return x


def extras(T, B, device):
    """lengths, the first of them 0 and the last one T, and reset."""
    lengths = torch.arange(B, device=device).remainder(T + 1)
    lengths[-1] = T
    reset = torch.rand(B, T, device=device) < 0.3
    torch._dynamo.mark_dynamic(lengths, 0)
    torch._dynamo.mark_dynamic(reset, 0)
    torch._dynamo.mark_dynamic(reset, 1)
    return {"lengths": lengths, "reset": reset}


@pytest.mark.parametrize("more", [False, True], ids=["plain", "lengths-reset-states"])
def test_whole_graph_for_any_T_and_B(kernel, assert_same, gradients, more):  # noqa: N802, the letters of the field
    """Forward and backward as without compiling; what was compiled at first serves every other T and B."""
    model, run, graphs = compiled(Model(), kernel.device)
    for call, (T, B) in enumerate(SIZES):
        x = batch(T, B, kernel.device)
        options = {**extras(T, B, kernel.device), "return_states": True} if more else {}
        with torch._dynamo.config.patch(error_on_recompile=call > 0):
            outputs = run(x, **options)
            grads = gradients(outputs, list(model.parameters()))
        expected = model(x, **options)
        assert_same(outputs, expected)
        assert_same(grads, gradients(expected, list(model.parameters())))
    (forward,), (backward,) = graphs.forward, graphs.backward
    forward, backward = graphs.operators(forward), graphs.operators(backward)
    assert {name: len(calls) for name, calls in forward.items()} == {f"{kernel.backend}_forward": 2}
    assert {name: len(calls) for name, calls in backward.items()} == {f"{kernel.backend}_backward": 2}


def test_inference_reserves_nothing(kernel, assert_same):
    model, run, graphs = compiled(Model(), kernel.device)
    x = batch(5, 2, kernel.device)
    with torch.no_grad():
        assert_same(run(x), model(x))
    (forward,) = graphs.forward
    calls = graphs.operators(forward)[f"{kernel.backend}_forward"]
    assert [args[7:9] for args in calls] == [(False, False), (False, False)]  # cell_states, reserve
    assert graphs.backward == []


def test_gradients_of_input_and_states(kernel, assert_same, gradients):
    lstm = nn.LSTM(I, H, proj_size=2, bias=False)
    model, run, _ = compiled(lstm, kernel.device)
    x = torch.randn(5, 2, I, dtype=torch.float64, device=kernel.device, requires_grad=True)
    hx = [torch.randn(1, 2, n, dtype=torch.float64, device=kernel.device, requires_grad=True) for n in (2, H)]
    outputs, expected = run(x, tuple(hx)), model(x, tuple(hx))
    assert_same(outputs, expected)
    assert_same(gradients(outputs, [x, *hx]), gradients(expected, [x, *hx]))


def test_loop_over_cells(kernel, assert_same, gradients):
    model, run, graphs = compiled(Decoder(), kernel.device)
    x = torch.randn(4, 2, I, dtype=torch.float64, device=kernel.device)
    outputs, expected = run(x), model(x)
    assert_same(outputs, expected)
    assert_same(gradients(outputs, list(model.parameters())), gradients(expected, list(model.parameters())))
    assert len(graphs.operators(graphs.forward[0])[f"{kernel.backend}_forward"]) == 4


def test_dropout(kernel, assert_same):
    model, run, _ = compiled(Model(dropout=0.5), kernel.device)
    x = batch(5, 2, kernel.device)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(run(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval()
    assert_same(run(x), model(x))


def test_autocast(kernel):
    model = fusedrnn.convert(Model(), compilable=True).to(kernel.device)
    run, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(2, 5, I, device=kernel.device)
    with torch.autocast(kernel.device, torch.bfloat16):
        outputs, expected = run(x), model(x)
    assert outputs[1][0].dtype is torch.bfloat16
    for mine, other in zip((outputs[0], *outputs[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("compilable", [False, True])
def test_second_derivatives(kernel, assert_same, compilable):
    """Those of backend="eager" are right, and AOTAutograd, which has none, refuses: none is left out silently."""
    model = fusedrnn.convert(nn.LSTM(I, H, 2), compilable=compilable).to(kernel.device, torch.float64)
    x = torch.randn(5, 2, I, dtype=torch.float64, device=kernel.device, requires_grad=True)

    def penalty(call):
        y = call(x)[0]
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(y.sum() + dx.square().sum(), list(model.parameters()))

    assert_same(penalty(torch.compile(model, backend="eager")), penalty(model))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(torch.compile(model, backend="aot_eager"))


def test_no_graph_of_the_backward_where_none_is_asked_for():
    model, x = fusedrnn.CompilableLSTM(I, H), torch.randn(5, 2, I, requires_grad=True)
    (dx,) = torch.autograd.grad(torch.compile(model, fullgraph=True, backend="eager")(x)[0].sum(), x)
    assert not dx.requires_grad


def test_another_backend_is_compiled_anew():
    """The choice is part of the graph, and made again when it may come out differently."""
    model, run, graphs = compiled(Model(), "cpu")
    x = batch(5, 2, "cpu")
    run(x)
    with fusedrnn.use_backend("reference"):
        run(x)
    names = [name for graph in graphs.forward for name in graphs.operators(graph)]
    assert names == [f"{fusedrnn.explain(model.lstm, x).backend}_forward", "reference_forward"]


def test_a_backend_that_is_asked_for_inside_of_what_is_compiled():
    model, _, graphs = compiled(Model(), "cpu")

    def call(x):
        with fusedrnn.use_backend("reference"):
            return model(x)

    before = dispatch.forced()
    torch.compile(call, fullgraph=True, backend=graphs)(batch(5, 2, "cpu"))
    assert [name for graph in graphs.forward for name in graphs.operators(graph)] == ["reference_forward"]
    assert dispatch.forced() == before


def test_compiled_with_weights_that_a_class_computes(assert_same, gradients):
    class Doubled(fusedrnn.CompilableLSTM):
        def _update_flat_weights(self):
            self._flat_weights = [2 * getattr(self, name) for name in self._flat_weights_names]

    module, x = Doubled(I, H, dtype=torch.float64), torch.randn(5, 2, I, dtype=torch.float64)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    outputs, expected = run(x), module(x)
    assert_same(outputs, expected)
    assert_same(gradients(outputs, list(module.parameters())), gradients(expected, list(module.parameters())))


def test_compiled_with_weights_that_were_put_into_the_list_by_hand():
    module, x = fusedrnn.CompilableLSTM(I, H), torch.randn(5, 2, I)
    run = torch.compile(module, fullgraph=True, backend="eager")
    run(x)
    module._flat_weights = [2 * weight.detach() for weight in module.parameters()]
    assert torch.equal(run(x)[0], module(x)[0])


@pytest.mark.parametrize("cpp_wrapper", [False, True], ids=["python", "cpp-wrapper"])
def test_inductor(assert_same, gradients, cpp_wrapper):
    model = fusedrnn.convert(Model(), compilable=True).double()
    run = torch.compile(model, fullgraph=True, options={"cpp_wrapper": cpp_wrapper})
    for call, (T, B) in enumerate(SIZES[:2]):
        x = batch(T, B, "cpu")
        with torch._dynamo.config.patch(error_on_recompile=call > 0):
            outputs, expected = run(x), model(x)
        assert_same(outputs, expected)
        assert_same(gradients(outputs, list(model.parameters())), gradients(expected, list(model.parameters())))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_compile(assert_same, gradients, mode):
    """In training, and for another size."""
    model = fusedrnn.CompilableLSTM(I, H, dtype=torch.float64)
    run = torch.compile(model, fullgraph=True, mode=mode, dynamic=True)
    for T, B in SIZES[:2]:
        x = torch.randn(T, B, I, dtype=torch.float64)
        outputs, expected = run(x), model(x)
        assert_same(outputs, expected)
        assert_same(gradients(outputs, list(model.parameters())), gradients(expected, list(model.parameters())))


@pytest.mark.slow
@pytest.mark.parametrize("more", [False, True], ids=["plain", "lengths-reset-states"])
def test_whole_graph_of_other_cells(other_kernel, assert_same, gradients, more):
    kind, place = other_kernel
    model, run, graphs = compiled(OtherModel(kind), place.device)
    for call, (T, B) in enumerate(SIZES):
        x = batch(T, B, place.device)
        options = {**extras(T, B, place.device), "return_states": True} if more else {}
        with torch._dynamo.config.patch(error_on_recompile=call > 0):
            outputs = run(x, **options)
            grads = gradients(outputs, list(model.parameters()))
        expected = model(x, **options)
        assert_same(outputs, expected)
        assert_same(grads, gradients(expected, list(model.parameters())))
    (forward,) = graphs.forward
    calls = graphs.operators(forward)[f"{place.backend}_forward"]
    assert [args[0] for args in calls] == [kind.cell] * 3


@pytest.mark.slow
def test_whole_graph_of_torchs_other_cells(kinds, assert_same, gradients):
    """Where torch's own compute, which is for the sizes of the example."""
    for kind in kinds:
        with fusedrnn.use_backend("aten"):
            torch._dynamo.reset()
            model, run, _ = compiled(OtherModel(kind), "cpu")
            x = torch.randn(2, 5, I, dtype=torch.float64)
            outputs, expected = run(x), model(x)
            assert_same(outputs, expected)
            parameters = list(model.parameters())
            assert_same(gradients(outputs, parameters), gradients(expected, parameters))


def test_inductor_of_other_cells(kinds, assert_same, gradients):
    model = fusedrnn.convert(OtherModel(kinds[0]), compilable=True).double()
    x, lengths = torch.randn(2, 5, I, dtype=torch.float64), torch.tensor([5, 3])
    with fusedrnn.use_backend("reference"):
        run = torch.compile(model, fullgraph=True)
        outputs, expected = run(x, lengths), model(x, lengths)
    assert_same(outputs, expected)
    assert_same(gradients(outputs, list(model.parameters())), gradients(expected, list(model.parameters())))


def test_the_cache_on_disk_does_not_outlive_the_sources(monkeypatch):
    """AOTAutograd goes by the graph that Dynamo made, which does not show what `layer` is made of."""
    module, x = fusedrnn.CompilableLSTM(I, H), torch.randn(5, 2, I)

    def misses():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile(module, fullgraph=True)(x)[0].sum().backward()
        return torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_miss"]

    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        assert [misses(), misses()] == [1, 0]
        monkeypatch.setattr(ops, "revision", ops.constant(lambda: "another"))
        assert misses() == 1


def test_an_nn_lstm_breaks_the_graph():
    """Why there is a class of its own for this: Dynamo traces nothing that is an instance of nn.LSTM."""
    model, x = fusedrnn.LSTM(I, H), torch.randn(5, 2, I)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(x)[0], model(x)[0])


def test_packed_sequence_inside_of_a_compiled_model():
    model = fusedrnn.CompilableLSTM(I, H, batch_first=True)

    def call(x):
        return model(pack_padded_sequence(x * 2, [2, 5], batch_first=True, enforce_sorted=False))[1][0] + 1

    x = torch.randn(2, 5, I)
    assert torch.equal(torch.compile(call, backend="eager")(x), call(x))


# torch.export


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "lengths-reset"])
def test_export(kernel, assert_same, strict, more):
    model = fusedrnn.convert(Model(), compilable=True).to(kernel.device, torch.float64)
    T, B = Dim("T", min=1), Dim("B")
    dynamic = {"x": {0: B, 1: T}}
    kwargs = extras(*SIZES[0], kernel.device) if more else {}
    if more:
        dynamic |= {"lengths": {0: B}, "reset": {0: B, 1: T}}
    x = batch(*SIZES[0], kernel.device, dims=())
    program = torch.export.export(model, (x,), kwargs, dynamic_shapes=dynamic, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file), program.run_decompositions()):
        calls = Graphs.operators(exported.graph)
        assert list(calls) == [f"{kernel.backend}_forward"]
        assert [args[8] for args in calls[f"{kernel.backend}_forward"]] == [False, False]  # reserve
        for sizes in [*SIZES, (1, 1)]:
            x = batch(*sizes, kernel.device, dims=())
            kwargs = extras(*sizes, kernel.device) if more else {}
            with torch.no_grad():
                assert_same(exported.module()(x, **kwargs), model(x, **kwargs))


JIT = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")


@JIT
def test_export_of_other_cells(other_kernel, assert_same):
    kind, place = other_kernel
    model = fusedrnn.convert(OtherModel(kind), compilable=True).to(place.device, torch.float64)
    T, B = Dim("T", min=1), Dim("B")
    dynamic = {"x": {0: B, 1: T}, "lengths": {0: B}, "reset": {0: B, 1: T}}
    x = batch(*SIZES[0], place.device, dims=())
    program = torch.export.export(model, (x,), extras(*SIZES[0], place.device), dynamic_shapes=dynamic)
    assert list(Graphs.operators(program.graph)) == [f"{place.backend}_forward"]
    traced = torch.jit.trace(model, x)
    for sizes in SIZES:
        x, kwargs = batch(*sizes, place.device, dims=()), extras(*sizes, place.device)
        with torch.no_grad():
            assert_same(program.module()(x, **kwargs), model(x, **kwargs))
            assert_same(traced(x), model(x))


@JIT
def test_jit_trace(kernel, assert_same):
    """Deprecated, and still how many a model is served; parameters may well require gradients then."""
    model = fusedrnn.convert(Model()).to(kernel.device, torch.float64)
    traced = torch.jit.trace(model, batch(*SIZES[0], kernel.device, dims=()))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for recorded in (traced, torch.jit.load(file)):
        for sizes in SIZES:
            x = batch(*sizes, kernel.device, dims=())
            with torch.no_grad():
                assert_same(recorded(x), model(x))


@JIT
@pytest.mark.parametrize("frozen", [False, True])
def test_jit_trace_of_what_runs_twice(kernel, frozen, assert_same):
    """A loop over a cell, and a program that is called again: each time with the weights that it holds."""
    for model in (Decoder(), nn.LSTM(I, H, bidirectional=True)):
        ours = fusedrnn.convert(model).to(kernel.device, torch.float64).eval()
        x = torch.randn(4, 2, I, dtype=torch.float64, device=kernel.device)
        traced = torch.jit.trace(ours, x, check_trace=False)
        traced = torch.jit.freeze(traced) if frozen else traced
        with torch.no_grad():
            expected = ours(x)
            for _ in range(3):
                assert_same(traced(x), expected)


@JIT
def test_a_list_of_weights_is_left_as_it_is(kernel):
    """By TorchScript, which hands the operator its own list, and not a copy."""
    name = f"{kernel.backend}_forward"
    program = torch.jit.CompilationUnit(f"""
def f(x: Tensor, w: List[Tensor]):
    y = torch.ops.fusedrnn.{name}("lstm", x, w, False, None, None, None, None, False, False)[0]
    z = torch.ops.fusedrnn.{name}("lstm", x, False, None, None, None, None, False, False, w[0], w[1])[0]
    return y, z, w
""")
    x, *weights = (torch.randn(size, device=kernel.device) for size in ((5, 2, I), (4 * H, I), (4 * H, H)))
    y, z, kept = program.f(x, weights)
    assert torch.equal(y, z)
    assert [w.data_ptr() for w in kept] == [w.data_ptr() for w in weights]


def test_what_takes_a_list_of_tensors():
    """torch moves the tensors out of a list that a native operator is given: only Python may call such a one."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedrnn::")]
    schemas = {name: torch._C._get_schema(*name.split(".") if "." in name else (name, "")) for name in names}
    listed = {name for name, schema in schemas.items() if any(str(a.type) == "List[Tensor]" for a in schema.arguments)}
    listed -= {"fusedrnn::layer"}  # which is Python
    assert {name for name in listed if not name.endswith(".list")} == {"fusedrnn::cpu_infer"}
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fusedrnn::cpu_forward.list", "CompositeImplicitAutograd")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("fusedrnn::cpu_infer", "Meta")


class Packed(nn.Module):
    """Packs its input by lengths that are an argument, or by a list that is not; returns y padded, h_n and c_n."""

    def __init__(self, sorted_lengths, with_hx, **options):
        super().__init__()
        self.lstm = nn.LSTM(I, H, batch_first=True, **options)
        self.sorted_lengths, self.with_hx = sorted_lengths, with_hx

    def forward(self, x, lengths, *hx):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=self.sorted_lengths)
        y, (h, c) = self.lstm(packed, hx if self.with_hx else None)
        return pad_packed_sequence(y, batch_first=True)[0], h, c


OTHER_LENGTHS = [[4, 4], [5, 3], [1, 1], [3, 2, 2], [6], [2, 2, 2, 2, 2]]  # other T, B, and sums


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_hx", [False, True], ids=["no-hx", "hx"])
@pytest.mark.parametrize("is_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("example", [[4, 4], [4, 3], [1]], ids=["equal", "unequal", "one-step"])
def test_jit_trace_of_packed_input_serves_other_lengths(place, assert_same, example, is_sorted, with_hx):
    """Nothing of the example is left: neither lengths, nor batch size, nor the order that sorts them."""
    model = Packed(is_sorted, with_hx, num_layers=2, bidirectional=True, proj_size=2).eval()
    fusedrnn.convert(model).to(place.device, torch.float64)

    def arguments(lengths):
        x = batch(max(lengths), len(lengths), place.device, dims=())
        states = [torch.randn(4, len(lengths), n, dtype=torch.float64, device=place.device) for n in (2, H)]
        return x, torch.tensor(lengths), *(states if with_hx else [])

    traced = torch.jit.trace(model, arguments(example))
    for lengths in OTHER_LENGTHS:
        given = arguments(lengths if is_sorted else lengths[::-1])
        with torch.no_grad():
            assert_same(traced(*given), model(*given))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_lengths_and_reset_serves_others(kernel, assert_same):
    model = fusedrnn.convert(Model().eval()).to(kernel.device, torch.float64)

    def arguments(T, B):
        more = extras(T, B, kernel.device)
        return batch(T, B, kernel.device, dims=()), more["lengths"], more["reset"]

    traced = torch.jit.trace(model, arguments(*SIZES[0]))
    for sizes in [*SIZES, (1, 1)]:
        given = arguments(*sizes)
        with torch.no_grad():
            assert_same(traced(*given), model(*given))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_a_cell_serves_other_batches(place, assert_same):
    model = fusedrnn.convert(Step()).to(place.device, torch.float64)

    def arguments(B):
        return tuple(torch.randn(B, n, dtype=torch.float64, device=place.device) for n in (I, H, H))

    traced = torch.jit.trace(model, arguments(2))
    for B in (1, 2, 5):
        given = arguments(B)
        with torch.no_grad():
            assert_same(traced(*given), model(*given))


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(I, H)

    def forward(self, x, h, c):
        return self.cell(x, (h, c))


class Rows(nn.Module):
    """Takes a PackedSequence apart: its data and batch_sizes are arguments."""

    def __init__(self):
        super().__init__()
        self.lstm = fusedrnn.CompilableLSTM(I, H, dtype=torch.float64)

    def forward(self, data, batch_sizes):
        y, (h, c) = self.lstm(PackedSequence(data, batch_sizes))
        return y.data, h, c


def test_make_fx_does_not_keep_batch_sizes():
    """Its tensors have values, those of the example: to read them is an error, never part of the graph."""
    arguments = torch.randn(8, I, dtype=torch.float64), torch.tensor([2, 2, 2, 2])
    with pytest.raises(RuntimeError, match="get value out of a tracing tensor"):
        make_fx(Rows())(*arguments)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("example", [[2, 2, 2, 2], [3, 2, 2, 1]], ids=["equal", "unequal"])
def test_export_of_packed_rows_serves_other_batch_sizes(assert_same, example, strict):
    model = Rows()
    arguments = torch.randn(8, I, dtype=torch.float64), torch.tensor(example)
    program = torch.export.export(model, arguments, strict=strict).module()
    for batch_sizes in ([2, 2, 2, 2], [3, 3, 1, 1], [5, 1, 1, 1]):
        given = torch.randn(8, I, dtype=torch.float64), torch.tensor(batch_sizes)
        with torch.no_grad():
            assert_same(program(*given), model(*given))


# The operators by themselves

LAYERS = {
    "plain": {},
    "no bias": {"bias": False},
    "both directions": {"bidirectional": True},
    "projection": {"proj_size": 2},
    "hx": {"hx": True},
    "lengths": {"lengths": True, "bidirectional": True},
    "reset": {"reset": True, "hx": True},
    "all of it": {"bidirectional": True, "proj_size": 2, "hx": True, "lengths": True, "reset": True},
    "packed": {"bidirectional": True, "proj_size": 2, "hx": True, "packed": True, "reset": True},
}


def forward_arguments(device, cell_states, reserve, bias=True, bidirectional=False, proj_size=0, cell="lstm", **extras):
    T, B, D, P, G = 4, 3, 2 if bidirectional else 1, proj_size or H, len(CELLS[cell].gates)

    def random(*shape):
        return torch.randn(*shape, device=device)

    weights = []
    for _ in range(D):
        biases = (random(G * H), random(G * H)) if bias else (None, None)
        projection = random(P, H) if proj_size else None
        direction = layout.DirectionWeights(random(G * H, I), random(G * H, P), *biases, projection)
        weights += [weight for weight in direction if weight is not None]
    h0, c0 = (random(D, B, P), random(D, B, H)) if extras.get("hx") else (None, None)
    c0 = c0 if CELLS[cell].has_cell_state else None
    lengths = torch.tensor([4, 0, 2], device=device) if extras.get("lengths") else None
    reset = torch.rand(T, B, device=device) < 0.3 if extras.get("reset") else None
    x = random(T, B, I)
    if extras.get("packed"):
        x, lengths = random(7, I), torch.tensor([4, 2, 1], device=device)
    return cell, x, bidirectional, h0, c0, lengths, reset, cell_states, reserve, *weights


def skip_packed(kernel, layer):
    if layer == "packed" and kernel.backend not in ("cpu", "reference"):
        pytest.skip("packed input is padded for it")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("cell_states", "reserve"), [(False, False), (True, False), (False, True)])
def test_opcheck_forward(kernel, layer, cell_states, reserve):
    skip_packed(kernel, layer)
    arguments = forward_arguments(kernel.device, cell_states, reserve, **LAYERS[layer])
    torch.library.opcheck(ops.forward_op(kernel.backend), arguments)
    cell, x, *options = arguments[:9]
    listed = getattr(torch.ops.fusedrnn, f"{kernel.backend}_forward").list
    for a, b in zip(ops.forward_op(kernel.backend)(*arguments), listed(cell, x, arguments[9:], *options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["no bias", "lengths", "reset"])
def test_opcheck_of_other_cells(other_kernel, layer):
    kind, place = other_kernel
    arguments = forward_arguments(place.device, False, True, cell=kind.cell, **LAYERS[layer])
    torch.library.opcheck(ops.forward_op(place.backend), arguments)
    cell, x, bidirectional, h0, c0, lengths, reset, _, _, *weights = arguments
    y, hn, _, c, reserve = ops.forward_op(place.backend)(*arguments)
    given = (cell, torch.randn_like(y), torch.randn_like(hn), None, None, x, bidirectional, h0, c0, lengths, reset)
    needs = [True, h0 is not None, False, *[True] * len(weights)]
    torch.library.opcheck(ops.backward_op(place.backend), (*given, y, c, reserve, needs, *weights))


@pytest.mark.parametrize("layer", ["plain", "no bias", "both directions", "projection", "hx"])
def test_opcheck_inference(layer):
    if fusedrnn.backends()["cpu"] is not None:
        pytest.skip(fusedrnn.backends()["cpu"])
    arguments = forward_arguments("cpu", False, False, **LAYERS[layer])
    cell, x, bidirectional, h0, c0 = arguments[:5]
    shorter = (cell, x, arguments[9:], 1, bidirectional, h0, c0)
    torch.library.opcheck(ops.cpu_infer, shorter, test_utils=("test_schema", "test_autograd_registration"))
    whole = ops.forward_op("cpu")(*arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(ops.cpu_infer(*shorter), whole[:3], strict=True))


GIVEN = ["all", "dy", "dhn", "dcn and dc"]
NEEDS = ["all", "x", "weights"]


@pytest.mark.parametrize(
    ("layer", "given", "needs"),
    [(layer, "all", "all") for layer in LAYERS]
    + [("all of it", given, needs) for given in GIVEN for needs in NEEDS][1:],
)
def test_opcheck_backward(kernel, layer, given, needs):
    skip_packed(kernel, layer)
    arguments = forward_arguments(kernel.device, True, True, **LAYERS[layer])
    cell, x, bidirectional, h0, c0, lengths, reset, _, _, *weights = arguments
    y, hn, cn, c, reserve = ops.forward_op(kernel.backend)(*arguments)
    douts = [
        torch.randn_like(t) if given == "all" or name in given.split(" and ") else None
        for name, t in (("dy", y), ("dhn", hn), ("dcn", cn), ("dc", c))
    ]
    wanted = [needs in ("all", "x")] + [needs == "all"] * 2 + [needs in ("all", "weights")] * len(weights)
    torch.library.opcheck(
        ops.backward_op(kernel.backend),
        (cell, *douts, x, bidirectional, h0, c0, lengths, reset, y, c, reserve, wanted, *weights),
    )
    listed = getattr(torch.ops.fusedrnn, f"{kernel.backend}_backward").list
    grads, (*states, dweights) = (
        op(cell, *douts, x, *first, bidirectional, h0, c0, lengths, reset, y, c, reserve, wanted, *last)
        for op, first, last in ((ops.backward_op(kernel.backend), [], weights), (listed, [weights], []))
    )
    assert all(grad is None for grad in grads[len(wanted) :])
    for a, b in zip(grads[: len(wanted)], [*states, *dweights], strict=True):
        assert torch.equal(a, b)


def test_opcheck_of_a_differentiable_layer(kernel):
    """Made of the pair above: what is left of opcheck are schema and traces."""
    arguments = forward_arguments(kernel.device, True, True)
    cell, x, bidirectional, h0, c0, lengths, reset, cell_states, _, *weights = arguments
    arguments = ("", kernel.backend, cell, bidirectional, cell_states, x, h0, c0, lengths, reset, None, weights)
    torch.library.opcheck(ops.layer, arguments, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_of_what_computes_no_tensor():
    """opcheck cannot compare the strings that these return; what is left are the schema and the registration."""
    utils = ("test_schema", "test_autograd_registration")
    if fusedrnn.backends()["cpu"] is None:
        torch.library.opcheck(torch.ops.fusedrnn.cpu_isa.default, (None,), test_utils=utils)
        torch.library.opcheck(torch.ops.fusedrnn.cpu_keep.default, (None,), test_utils=utils)
        torch.library.opcheck(torch.ops.fusedrnn.cpu_poison.default, (False,), test_utils=utils)
        plan = ("lstm", 4, 3, I, H, H, 1, torch.float32)
        torch.library.opcheck(torch.ops.fusedrnn.cpu_plan.default, plan, test_utils=utils)
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedrnn::")}
    pairs = {
        f"{backend}_{way}{overload}"
        for backend in ("reference", "cuda", "triton", "cpu")
        for way in ("forward", "backward")
        for overload in ("", ".list")
    }
    library = {f"cuda_{name}" for name in ("launch_forward", "launch_backward", "occupancy", "obstacle", "device_type")}
    for name, schema in ops._SCHEMAS.items():  # of the library, or of Python where there is none
        assert str(getattr(torch.ops.fusedrnn, name).default._schema) == f"fusedrnn::{name}{schema}"
    # What is new has to be checked: here, triton's and cuda's in test_triton.py and test_cuda.py.
    assert names == {
        *pairs,
        "layer",
        "cpu_infer",
        "cpu_isa",
        "cpu_masks",
        "cpu_keep",
        "cpu_plan",
        "cpu_poison",
        *library,
    }
