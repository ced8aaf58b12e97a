"""torch.onnx.export by both exporters: ONNX Runtime has to agree for other T and B than those of the example."""

import io
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import dispatch, testing
from fusedrnn.testing import Case, Inputs

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning", "ignore:Exporting a model"
)
PLAIN = Case(T=4, B=3, I=3, H=5)
SIZES = [(4, 3), (7, 2), (1, 1)]  # T and B; the first ones are exported
LSTM = [  # what ONNX's LSTM node can say
    PLAIN,
    replace(PLAIN, hx=False),
    replace(PLAIN, bias=False, batch_first=True, bidirectional=True),
    replace(PLAIN, layers=2, bidirectional=True, lengths=True),
    replace(PLAIN, lengths=True, hx=False),
    replace(PLAIN, dtype=torch.float16, layers=2, bidirectional=True, lengths=True),
    replace(PLAIN, dtype=torch.bfloat16, bidirectional=True),
]
SCAN = [  # what it cannot
    replace(PLAIN, proj_size=2, layers=2, lengths=True),
    replace(PLAIN, dtype=torch.float64, hx=False, bias=False),
    replace(PLAIN, reset=True, batch_first=True),
    replace(PLAIN, states=True, hx=False),
    replace(PLAIN, dtype=torch.float16, proj_size=2, bidirectional=True, lengths=True, reset=True, states=True),
]
NODES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
OTHER_NODES = [
    *(replace(case, cell="gru") for case in (LSTM[0], LSTM[2], LSTM[3])),
    replace(LSTM[3], cell="rnn_tanh"),
    replace(LSTM[2], cell="rnn_relu"),
    replace(LSTM[4], cell="gru"),
]
OTHER_SCANS = [
    replace(PLAIN, cell=cell, states=True, reset=True, lengths=True, bidirectional=True, dtype=torch.float64)
    for cell in ("gru", "rnn_relu")
]
EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


def cases(found):
    return pytest.mark.parametrize("case", found, ids=lambda case: case.id)


class Model(nn.Module):
    """A layer as a case describes it. NumPy has no bfloat16, so that one is cast inside."""

    def __init__(self, case):
        super().__init__()
        self.case, self.lstm = case, case.module()

    def forward(self, x, h0=None, c0=None, lengths=None, reset=None):
        x, h0, c0 = (None if t is None else t.to(self.case.dtype) for t in (x, h0, c0))
        hx = h0 if c0 is None else (h0, c0)
        outputs = testing.call(self.lstm, self.case, Inputs(x, hx, lengths, reset))
        return tuple(t.float() if t.dtype == torch.bfloat16 else t for t in outputs.values())


def inputs(case):
    """What `Model` is called with, by name."""
    x, hx, lengths, reset = case.inputs()
    h0, c0 = (hx, None) if isinstance(hx, torch.Tensor) else hx or (None, None)
    named = {"x": x, "h0": h0, "c0": c0, "lengths": lengths, "reset": reset}
    return {
        name: value.float() if value.dtype == torch.bfloat16 else value
        for name, value in named.items()
        if value is not None
    }


def axes(case):
    """Which dimensions of the inputs may change."""
    laid_out = {0: "B", 1: "T"} if case.batch_first else {0: "T", 1: "B"}
    return {"x": laid_out, "h0": {1: "B"}, "c0": {1: "B"}, "lengths": {0: "B"}, "reset": laid_out}


def export(model, args, dynamic, dynamo=True):
    """The file, as bytes. `args` and `dynamic` are by name; the latter may name more."""
    dynamic = {name: dynamic.get(name, {}) for name in args}
    first, *rest = args
    if dynamo:
        names = {axis for sizes in dynamic.values() for axis in sizes.values()}
        dims = {name: Dim(name, min=1) for name in names}
        shapes = {name: {k: dims[axis] for k, axis in sizes.items()} for name, sizes in dynamic.items()}
        kwargs = {name: args[name] for name in rest}
        program = torch.onnx.export(
            model, (args[first],), kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        return program.model_proto.SerializeToString()
    file = io.BytesIO()
    torch.onnx.export(
        model,
        (args[first], {name: args[name] for name in rest}) if rest else (args[first],),
        file,
        input_names=list(args),
        dynamic_axes=dynamic,
        dynamo=False,
        verbose=False,
    )
    return file.getvalue()


def operators(file):
    return [node.op_type for node in onnx.load_from_string(file).graph.node]


def run(file, args):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: value.detach().numpy() for name, value in args.items()})
    return [torch.from_numpy(np.asarray(result)) for result in results]


def check(case, file):
    for T, B in SIZES:
        other = replace(case, T=T, B=B)
        answers = testing.answers(other)
        for (name, answer), result in zip(answers.items(), run(file, inputs(other)), strict=False):
            testing.assert_as_exact_as(f"{other.id} {name}", result.to(case.dtype), *answer)


def export_case(case, dynamo, compilable=True):
    model = fusedrnn.convert(Model(case), compilable=compilable).eval()
    return export(model, inputs(case), axes(case), dynamo)


@EXPORTERS
@cases([*LSTM, *OTHER_NODES])
def test_onnx_runtime_agrees(case, dynamo):
    file = export_case(case, dynamo)
    nodes = [node for node in onnx.load_from_string(file).graph.node if node.op_type == NODES[case.cell]]
    assert len(nodes) == case.layers
    assert all(bool(node.input[4]) == case.lengths for node in nodes)  # sequence_lens
    assert "Scan" not in operators(file)
    check(case, file)


@pytest.mark.slow
@cases([*SCAN, *OTHER_SCANS])
def test_onnx_runtime_agrees_where_a_layer_is_a_scan(case):
    file = export_case(case, dynamo=True)
    assert operators(file).count("Scan") == case.layers * (2 if case.bidirectional else 1)
    assert NODES[case.cell] not in operators(file)
    check(case, file)


@pytest.mark.parametrize(
    ("case", "what"),
    list(zip(SCAN, ["projection", "float64", "reset", "return_states"], strict=False)),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_torchscript_exporter_cannot_say_is_an_error_that_tells_what_to_do(case, what):
    with pytest.raises(NotImplementedError, match=rf"{what}.*dynamo=True"):
        export_case(case, dynamo=False)


@EXPORTERS
def test_a_model_that_is_not_compilable(dynamo):
    check(PLAIN, export_case(PLAIN, dynamo, compilable=False))


@EXPORTERS
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_backend_is_exported_alike(backend, dynamo):
    if fusedrnn.backends()[backend]:
        pytest.skip(fusedrnn.backends()[backend])
    with fusedrnn.use_backend(backend):
        file = export_case(PLAIN, dynamo)
    assert operators(file).count("LSTM") == 1


@EXPORTERS
def test_where_torch_would_compute(dynamo, monkeypatch):
    """On a device without kernels of ours torch's own LSTM computes, but it is not what is exported."""
    for backend in ("cuda", "triton", "cpu"):
        unavailable = dispatch.TABLE[backend]._replace(unavailable=lambda: "not here")
        monkeypatch.setitem(dispatch.TABLE, backend, unavailable)
    assert fusedrnn.explain(PLAIN.module(), PLAIN.inputs().x).backend == "aten"
    check(PLAIN, export_case(PLAIN, dynamo))


def test_a_program_that_was_exported_before():
    model = fusedrnn.convert(Model(LSTM[3]), compilable=True).eval()
    args = inputs(LSTM[3])
    dims = {name: Dim(name, min=1) for name in "TB"}
    shapes = {name: {k: dims[axis] for k, axis in axes(LSTM[3])[name].items()} for name in args}
    kwargs = {name: value for name, value in args.items() if name != "x"}
    program = torch.export.export(model, (args["x"],), kwargs, dynamic_shapes=shapes)
    check(LSTM[3], torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString())


def test_the_file_of_the_fault_that_was_reported(tmp_path):
    """A plain call, with sizes that do not change, into a file, checked by onnx."""
    model = fusedrnn.convert(nn.Sequential(nn.LSTM(3, 4, batch_first=True)), compilable=True).eval()
    x = torch.randn(2, 5, 3)
    for dynamo in (True, False):
        path = str(tmp_path / f"{dynamo}.onnx")
        torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False)
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(y), model(x)[0].detach())


class Decoder(nn.Module):
    """Three steps of a cell, for the input of each the output of the one before."""

    def __init__(self, **options):
        super().__init__()
        self.cell = nn.LSTMCell(4, 4, **options)

    def forward(self, x):
        h, c = self.cell(x)
        for _ in range(2):
            h, c = self.cell(h, (h, c))
        return h, c


@EXPORTERS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_cell(bias, dynamo):
    decoder = Decoder(bias=bias).eval()
    expected = [(x := torch.randn(B, 4), decoder(x)) for B in (3, 1, 8)]
    file = export(fusedrnn.convert(decoder), {"x": expected[0][0]}, {"x": {0: "B"}}, dynamo)
    assert operators(file).count("LSTM") == 3
    for x, results in expected:
        for result, wanted in zip(run(file, {"x": x}), results, strict=True):
            torch.testing.assert_close(result, wanted.detach())


class Walk(nn.Module):
    """Two steps of cells with one state."""

    def __init__(self):
        super().__init__()
        self.gru, self.rnn = nn.GRUCell(4, 4), nn.RNNCell(4, 4, nonlinearity="relu")

    def forward(self, x):
        h = self.gru(x)
        return self.rnn(h, self.gru(h, h))


@EXPORTERS
def test_cells_with_one_state(dynamo):
    walk = Walk().eval()
    expected = [(x := torch.randn(B, 4), walk(x)) for B in (3, 1, 8)]
    file = export(fusedrnn.convert(walk), {"x": expected[0][0]}, {"x": {0: "B"}}, dynamo)
    assert [operators(file).count(name) for name in ("GRU", "RNN")] == [2, 1]
    for x, wanted in expected:
        torch.testing.assert_close(run(file, {"x": x})[0], wanted.detach())


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5)

    def forward(self, x, lengths):
        packed, _ = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(packed)[0]


@pytest.mark.parametrize("compilable", [False, True], ids=["LSTM", "CompilableLSTM"])
@EXPORTERS
def test_a_packed_sequence_is_refused_and_told_what_to_do(dynamo, compilable):
    """The dynamo exporter tells the reason as the cause of an error of its own."""
    model = fusedrnn.convert(Packed(), compilable=compilable).eval()
    with pytest.raises((NotImplementedError, RuntimeError)) as raised:
        export(model, {"x": torch.randn(4, 2, 3), "lengths": torch.tensor([4, 2])}, {}, dynamo)
    error = raised.value.__cause__ if dynamo else raised.value
    assert isinstance(error, NotImplementedError)
    assert "lengths=" in str(error)


def test_torch_export_for_other_purposes_still_has_the_operators():
    """After torch.onnx was loaded, too."""
    program = torch.export.export(fusedrnn.CompilableLSTM(3, 4).eval(), (torch.randn(5, 2, 3),))
    assert any("fusedrnn" in str(node.target) for node in program.graph.nodes)
    assert not any("onnx" in str(node.target) for node in program.graph.nodes)
