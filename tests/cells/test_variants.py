"""Variants of the LSTM: peepholes, coupled gates, zoneout, recurrent dropout, the bias of the forget gate."""

import copy
import importlib.util
import io
import itertools
import json
import pickle

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import autograd, cells, cli, dispatch, layout, ops, reference, testing
from fusedrnn.noise import Noise
from fusedrnn.sequence import Form

F64 = torch.float64
T, B, I, H = 5, 3, 4, 6
STATE = {"recurrent_dropout": 0.4, "recurrent_dropout_mode": "state"}
OPTIONS = {
    "peephole": {"peephole": True},
    "coupled": {"coupled": True},
    "peephole-coupled": {"peephole": True, "coupled": True},
    "zoneout": {"zoneout": (0.4, 0.3)},
    "candidate": {"recurrent_dropout": 0.4},
    "state": STATE,
    "peephole-zoneout_c-candidate": {"peephole": True, "zoneout": (0.0, 0.5), "recurrent_dropout": 0.3},
    "everything": {"peephole": True, "coupled": True, "zoneout": 0.3, **STATE},
}
variants = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
BACKENDS = [
    name
    for name in ("reference", "cpu", "triton")
    if dispatch.supports(name, dispatch.Problem("cpu", F64, T, B, I, H, H, 1, cell="lstm_peephole")) is None
]
backends = pytest.mark.parametrize("backend", BACKENDS)


_TRAINING = torch.onnx.TrainingMode.PRESERVE


@pytest.fixture
def drawn(monkeypatch):
    """The noise of each layer in the order in which it is drawn: [K, T, B, D*W], as dicts by name."""
    found, draw = [], Noise.draw

    def record(self, cell, *args):
        noise = draw(self, cell, *args)
        found.append(dict(zip(cell.noise, noise, strict=True)))
        return noise

    monkeypatch.setattr(Noise, "draw", record)
    return found


@pytest.fixture
def same_noise(monkeypatch):
    """What is drawn first is drawn again, in any dtype."""
    found, draw = [], Noise.draw

    def again(self, cell, training, form, D, sizes, like):
        if not found:
            found.append(draw(self, cell, training, form, D, sizes, like))
        return found[0].to(reference.compute_dtype(like.dtype))

    monkeypatch.setattr(Noise, "draw", again)


def sequence(x, h, c, w, v, coupled, reset, length, reverse):
    """One sequence of one direction by the equations: x [T, I]; v(kind, t) -> [W], its multiplier or None."""
    y, cs = [torch.zeros_like(h)] * len(x), [torch.zeros_like(c)] * len(x)
    for t in reversed(range(length)) if reverse else range(length):
        if reset is not None and reset[t]:
            h, c = torch.zeros_like(h), torch.zeros_like(c)
        fed = h if v("r", t) is None else h * v("r", t)
        a = (w.w_ih @ x[t] + w.w_hh @ fed + (0 if w.b_ih is None else w.b_ih + w.b_hh)).chunk(3 if coupled else 4)
        a_i, a_g, a_o = a[0], a[-2], a[-1]
        p = [0.0, 0.0, 0.0] if w.w_p is None else w.w_p.chunk(2 if coupled else 3)
        i = torch.sigmoid(a_i + p[0] * c)
        f = 1 - i if coupled else torch.sigmoid(a[1] + p[1] * c)
        g = torch.tanh(a_g) if v("g", t) is None else torch.tanh(a_g) * v("g", t)
        new = f * c + i * g
        m = torch.sigmoid(a_o + p[-1] * new) * torch.tanh(new)
        m = m if w.w_hr is None else w.w_hr @ m
        h = m if v("h", t) is None else v("h", t) * h + (1 - v("h", t)) * m
        c = new if v("c", t) is None else v("c", t) * c + (1 - v("c", t)) * new
        y[t], cs[t] = h, c
    return torch.stack(y), torch.stack(cs), h, c


def by_the_equations(module, x, drawn, hx=None, lengths=None, reset=None):
    """y, hn, cn of a module with an input [T, B, I], whose layers have drawn this noise."""
    D, C, P = 2 if module.bidirectional else 1, module.hidden_size, module.proj_size or module.hidden_size
    rows, hns, cns = module.num_layers * D, [], []
    h0, c0 = hx if hx is not None else (x.new_zeros(rows, x.shape[1], P), x.new_zeros(rows, x.shape[1], C))
    for layer in range(module.num_layers):
        ys = []
        for d in range(D):
            row = layer * D + d
            w = layout.split_directions([getattr(module, n) for n in module._all_weights[row]], False, module._cell)[0]
            noise = {kind: of.chunk(D, dim=-1)[d] for kind, of in drawn[layer].items()} if drawn else {}
            traces = []
            for b in range(x.shape[1]):

                def v(kind, t, b=b, noise=noise):
                    return noise[kind][min(t, len(noise[kind]) - 1), b] if kind in noise else None

                length = x.shape[0] if lengths is None else int(lengths[b])
                cut = None if reset is None else reset[:, b]
                args = (x[:, b], h0[row, b], c0[row, b], w, v, module.coupled, cut, length, d == 1)
                traces.append(sequence(*args))
            y, _, hn, cn = (torch.stack(part, dim=-2) for part in zip(*traces, strict=True))
            ys.append(y)
            hns.append(hn)
            cns.append(cn)
        x = torch.cat(ys, dim=-1)
    return x, torch.stack(hns), torch.stack(cns)


def results(outputs, leaves):
    """Outputs and, for some gradients of them, the gradients of leaves."""
    generator = torch.Generator().manual_seed(3)
    douts = [torch.randn(o.shape, generator=generator, dtype=F64).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, douts)]


def assert_close(ours, theirs, **tolerance):
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, **tolerance)


@backends
@variants
@pytest.mark.parametrize("form", ["plain", "ragged", "projected"])
def test_layers_compute_the_equations(backend, options, form, drawn):
    """Two layers of two directions, forward and backward; with lengths, resets and states, or with a projection."""
    if form == "projected" and "zoneout" in options:
        pytest.skip("h and c have different units")
    more = {"proj_size": 4} if form == "projected" else {}
    module = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True, dtype=F64, **options, **more)
    x = torch.randn(T, B, I, dtype=F64, requires_grad=True)
    hx = [torch.randn(4, B, size, dtype=F64, requires_grad=True) for size in (module.proj_size or H, H)]
    calls = {"lengths": torch.tensor([3, 0, 5]), "reset": torch.rand(T, B) < 0.3} if form == "ragged" else {}
    if form == "plain":
        hx = None
    leaves = [x, *(hx or []), *module.parameters()]
    with fusedrnn.use_backend(backend):
        y, (hn, cn) = module(x, hx, **calls)
        ours = results([y, hn, cn], leaves)
    assert_close(ours, results(by_the_equations(module, x, drawn, hx, **calls), leaves))


@backends
@pytest.mark.parametrize("options", [OPTIONS["everything"], OPTIONS["peephole-zoneout_c-candidate"]])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_packed_sequences_and_every_state(backend, options, mode, drawn):
    module = fusedrnn.LSTM(I, H, bidirectional=True, dtype=F64, **options).train(mode == "train")
    lengths = torch.tensor([2, 5, 4])
    x = torch.randn(T, B, I, dtype=F64, requires_grad=True)
    hx = [torch.randn(2, B, H, dtype=F64, requires_grad=True) for _ in range(2)]
    leaves = [x, *hx, *module.parameters()]
    with fusedrnn.use_backend(backend):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, (hn, cn), states = module(packed, hx, return_states=True)
        ours = results([pad_packed_sequence(y)[0], hn, cn], leaves)
        assert torch.equal(states.h[0].data, y.data)
    order = packed.sorted_indices
    noise = {kind: of.index_select(-2, order.argsort()) for kind, of in drawn[0].items() if of.dim() == 3}
    if not noise:  # of the rows that were drawn
        steps = [pad_packed_sequence(packed._replace(data=of))[0] for of in drawn[0].values()]
        noise = dict(zip(drawn[0], steps, strict=True))
    assert_close(ours, results(by_the_equations(module, x, [noise], hx, lengths), leaves))


@backends
@variants
def test_derivatives_of_both_orders_are_those_of_differences(backend, options):
    module = fusedrnn.LSTM(2, 3, bidirectional=True, dtype=F64, **options)
    names = [name for name, _ in module.named_parameters()]
    inputs = [torch.randn(3, 2, 2, dtype=F64), torch.randn(2, 2, 3, dtype=F64), torch.randn(2, 2, 3, dtype=F64)]
    inputs = [t.requires_grad_() for t in [*inputs, *(p.detach().clone() for p in module.parameters())]]

    def run(x, h, c, *weights):
        torch.manual_seed(1)
        parameters = dict(zip(names, weights, strict=True))
        y, (hn, cn) = torch.func.functional_call(module, parameters, (x, (h, c)))
        return y, hn, cn

    with fusedrnn.use_backend(backend):
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        if backend != "reference" or options in (OPTIONS["everything"], OPTIONS["peephole-zoneout_c-candidate"]):
            assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def assert_as_close_as_the_reference(ours, theirs, exact, slack):
    """Errors are at most twice those of the reference in the same dtype, plus `slack` of the largest value."""
    for our, their, right in zip(ours, theirs, exact, strict=True):
        error, allowed = (our.double() - right).abs().max(), (their.double() - right).abs().max()
        assert allowed <= 0.1 * right.abs().max(), "the reference draws other noise in this dtype, and bounds nothing"
        assert error <= 2 * allowed + slack * right.abs().max()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["coupled", "everything", "peephole-zoneout_c-candidate"])
@pytest.mark.parametrize("size", [(20, 33, 37), (20, 1, 64), (1, 2, 20), (1, 70, 130), (5, 70, 130)], ids=str)
def test_kernels_compute_what_the_reference_does_in_float64(backend, dtype, name, size):
    """Sizes that take each way through the kernels. The error is held to that of the reference in the same dtype."""
    steps, batch, units = size
    module = fusedrnn.LSTM(units, units, dtype=dtype, **OPTIONS[name])
    x = torch.randn(steps, batch, units).to(dtype)
    hx = [torch.randn(1, batch, units).to(dtype) for _ in range(2)]

    def run(backend, wide):
        own = copy.deepcopy(module).to(wide)
        leaves = [x.to(wide), *(s.to(wide) for s in hx), *own.parameters()]
        leaves = [leaf.detach().requires_grad_() if k < 3 else leaf for k, leaf in enumerate(leaves)]
        torch.manual_seed(5)
        with fusedrnn.use_backend(backend):
            y, (hn, cn) = own(leaves[0], leaves[1:3])
            return results([y, hn, cn], leaves)

    ours, theirs, exact = run(backend, dtype), run("reference", dtype), run("reference", F64)
    assert_as_close_as_the_reference(ours, theirs, exact, 4 * testing.roundoff(dtype))


has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@has_triton
@pytest.mark.parametrize(
    ("name", "units", "form", "dtype", "more"),
    [
        ("peephole", 20, "ragged", torch.float32, {"bidirectional": True}),  # one program
        ("coupled", 20, "ragged", torch.float32, {}),
        ("zoneout", 20, "ragged", torch.float32, {"bidirectional": True}),
        ("candidate", 20, "plain", torch.float16, {"bidirectional": True}),
        ("state", 20, "ragged", torch.float32, {"bidirectional": True}),
        ("peephole-zoneout_c-candidate", 20, "packed", torch.float32, {}),
        ("everything", 20, "ragged", torch.bfloat16, {"bidirectional": True}),
        pytest.param(  # some programs
            "everything", 72, "ragged", torch.float32, {"bidirectional": True}, marks=pytest.mark.slow
        ),
        ("peephole", 24, "plain", torch.float32, {"proj_size": 10, "bias": False}),
        ("state", 24, "plain", torch.float32, {"proj_size": 10}),
    ],
)
def test_triton_kernels_compute_what_the_reference_does(
    name, units, form, dtype, more, monkeypatch, same_noise, triton_device
):
    """Every state, and where the name says so the gates computed again. The error is held to that of the reference."""
    if name in ("coupled", "state"):
        monkeypatch.setenv("FUSEDRNN_RESERVE", "recompute")
    module = fusedrnn.LSTM(5, units, device=triton_device, dtype=dtype, **OPTIONS[name], **more)
    rows, P = 2 if "bidirectional" in more else 1, module.proj_size or units
    inputs = [torch.randn(size).to(triton_device, dtype) for size in ((3, 3, 5), (rows, 3, P), (rows, 3, units))]
    ragged = {"lengths": torch.tensor([2, 0, 3]), "reset": torch.rand(3, 3) < 0.3} if form == "ragged" else {}
    calls = {key: value.to(triton_device) for key, value in ragged.items()}

    def run(backend, dtype):
        own = copy.deepcopy(module).to(dtype)
        leaves = [t.to(dtype).requires_grad_() for t in inputs] + [*own.parameters()]
        x, *hx = leaves[:3]
        x = pack_padded_sequence(x, [1, 3, 2], enforce_sorted=False) if form == "packed" else x
        with fusedrnn.use_backend(backend), testing.poisoned():
            y, (hn, cn), states = own(x, hx, return_states=True, **calls)
            y, c = (s.data if form == "packed" else s for s in (y, states.c[0]))
            return results([y, hn, cn, c], leaves)

    ours, theirs, exact = run("triton", dtype), run("reference", dtype), run("reference", F64)
    assert_as_close_as_the_reference(ours, theirs, exact, 16 * testing.roundoff(dtype))


@has_triton
@pytest.mark.parametrize(("units", "projection"), [(20, None), (24, 10)])
def test_multipliers_of_the_state_may_change_with_time(units, projection, triton_device):
    """They are those of the step whose product takes the state, also where that is its first."""
    D, steps, batch, P = 2, 3, 3, projection or units
    sizes = [(4 * units, 5), (4 * units, P), (4 * units,), (4 * units,), *([(P, units)] if projection else [])] * D
    generator = torch.Generator().manual_seed(0)
    x, h0, c0, noise, *weights = (
        torch.randn(size, generator=generator, dtype=F64).mul(0.3).requires_grad_()
        for size in ((steps, batch, 5), (D, batch, P), (D, batch, units), (1, steps, batch, D * P), *sizes)
    )
    lengths, noise = torch.tensor([2, 0, 3]), 1 + noise.detach()

    def run(backend, dtype):
        own = [t.detach().to(triton_device, dtype).requires_grad_() for t in (x, h0, c0, *weights)]
        given = (lengths.to(triton_device), None, False, noise.to(triton_device, dtype))
        return results(autograd.layer(backend, "lstm+r", own[0], own[3:], True, *own[1:3], *given)[:3], own)

    assert_close([our.double() for our in run("triton", torch.float32)], run("reference", F64), rtol=2e-5, atol=2e-5)


def evaluated(node, feeds):
    """What ONNX's reference evaluator makes of one node."""
    names = list(feeds)
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in feeds.items()]
    outputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in node.output]
    graph = onnx.helper.make_graph([node], "graph", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    assert set(names) <= set(node.input)
    return onnx.reference.ReferenceEvaluator(model).run(None, feeds)


@backends
@pytest.mark.parametrize("coupled", [False, True])
def test_peepholes_and_coupled_gates_are_those_of_onnx(backend, coupled):
    """Of coupled gates it gets f = 1 - i as sigmoid(-a_i): its evaluator does not look at `input_forget`."""
    module = fusedrnn.LSTM(I, H, peephole=True, coupled=coupled)
    x, h0, c0 = torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(1, B, H)
    with torch.no_grad(), fusedrnn.use_backend(backend):
        y, (hn, cn) = module(x, (h0, c0))
    i, *f, g, o = range(3 if coupled else 4)

    def ordered(rows, gates=4):
        blocks = rows.detach().chunk(len(module._cell.gates) - (0 if gates == 4 else 1))
        forget = -blocks[i] if coupled else blocks[f[0]]
        return torch.cat([blocks[i], blocks[-1], forget, *([blocks[g]] if gates == 4 else [])]).unsqueeze(0).numpy()

    bias = np.concatenate([ordered(module.bias_ih_l0), ordered(module.bias_hh_l0)], axis=1)
    feeds = {
        "X": x.numpy(),
        "W": ordered(module.weight_ih_l0),
        "R": ordered(module.weight_hh_l0),
        "B": bias,
        "initial_h": h0.numpy(),
        "initial_c": c0.numpy(),
        "P": ordered(module.weight_peephole_l0, 3),
    }
    order = ["X", "W", "R", "B", "", "initial_h", "initial_c", "P"]
    node = onnx.helper.make_node("LSTM", order, ["Y", "Y_h"], hidden_size=H)
    every, last = evaluated(node, feeds)
    np.testing.assert_allclose(every[:, 0], y.numpy(), atol=2e-6)
    np.testing.assert_allclose(last, hn.numpy(), atol=2e-6)
    assert cn.shape == (1, B, H)
    assert o == len(module._cell.gates) - 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("options", "operator"),
    [({"peephole": True, "coupled": True}, "LSTM"), ({"peephole": True, "zoneout": 0.3}, "Scan")],
    ids=["node", "scan"],
)
def test_onnx_runtime_computes_what_was_exported(dynamo, options, operator):
    module = nn.Sequential(fusedrnn.CompilableLSTM(I, H, bidirectional=True, **options)).eval()
    x, buffer = torch.randn(T, B, I), io.BytesIO()
    if operator == "Scan" and not dynamo:
        with pytest.raises(Exception, match="cannot say zoneout"):
            torch.onnx.export(module, (x,), buffer, dynamo=False)
        return
    torch.onnx.export(module, (x,), buffer, dynamo=dynamo)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    assert operator in {node.op_type for node in onnx.load_from_string(buffer.getvalue()).graph.node}
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    y, (hn, cn) = module(x)
    for ours, theirs in zip((y, hn, cn), found, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_onnx_has_no_masks():
    with pytest.raises(Exception, match="eval"):
        torch.onnx.export(
            fusedrnn.CompilableLSTM(I, H, zoneout=0.3), (torch.randn(T, B, I),), io.BytesIO(), dynamo=True
        )


@pytest.mark.parametrize("native", [True, False])
def test_masks_have_their_probabilities(drawn, native, monkeypatch):
    if not native:
        monkeypatch.setattr(ops, "cpu_unavailable", "not here")
    module = fusedrnn.LSTM(2, 500, zoneout=(0.25, 0.1), recurrent_dropout=0.4)
    with torch.no_grad():
        module(torch.randn(20, 10, 2))
    for kind, p, value in (("h", 0.25, 1.0), ("c", 0.1, 1.0), ("g", 0.6, 1 / 0.6)):
        mask = drawn[0][kind]
        assert mask.shape == (20, 10, 500)
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(value).item()}
        assert abs((mask > 0).double().mean().item() - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
        assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("zoneout", "dropout", "ones"), [(1.0, 1.0, (1, 1, 0)), (1e-9, 0.0, (0, 0)), ((1.0, 1e-9), 0.0, (1, 0))]
)
def test_masks_of_extreme_probabilities(drawn, zoneout, dropout, ones, native, monkeypatch):
    if not native:
        monkeypatch.setattr(ops, "cpu_unavailable", "not here")
    fusedrnn.LSTM(2, 5, zoneout=zoneout, recurrent_dropout=dropout)(torch.randn(3, 3, 2))
    assert [mask.unique().tolist() for mask in drawn[0].values()] == [[value] for value in ones]


@pytest.mark.parametrize("native", [True, False])
def test_masks_inside_vmap(native, monkeypatch, capfd):
    if not native:
        monkeypatch.setattr(ops, "cpu_unavailable", "not here")
    noise = Noise(0.5, 0.0, 0.0, "candidate")
    cell = noise.cell(cells.LSTM, True)

    def draw(x):
        return noise.draw(cell, True, Form(3, 4), 1, (64, 64), x)

    different = torch.vmap(draw, randomness="different")(torch.zeros(2, 3, 4, 1))
    assert different.shape == (2, 1, 3, 4, 64)
    assert not torch.equal(*different)
    assert torch.vmap(draw, randomness="same", out_dims=None)(torch.zeros(2, 3, 4, 1)).shape == (1, 3, 4, 64)
    assert "performance drop" not in capfd.readouterr().err


def test_one_mask_a_sequence(drawn):
    module = fusedrnn.LSTM(2, 50, bidirectional=True, **STATE)
    with torch.no_grad():
        module(torch.randn(20, 10, 2))
    assert drawn[0]["r"].shape == (1, 10, 100)


def test_masks_are_those_of_the_seed_and_come_back_from_a_checkpoint():
    module = fusedrnn.LSTM(I, H, num_layers=2, **OPTIONS["everything"])
    x = torch.randn(T, B, I, requires_grad=True)

    def run(function=module):
        torch.manual_seed(2)
        y = function(x)[0]
        return results([y], [x, *module.parameters()])

    first = run()
    assert_close(run(), first, rtol=0, atol=0)
    assert_close(run(lambda x: checkpoint(module, x, use_reentrant=False)), first, rtol=0, atol=0)
    assert not torch.equal(module(x)[0], first[0])


@variants
def test_evaluation_draws_nothing(options, drawn):
    module = fusedrnn.LSTM(I, H, dtype=F64, **options).eval()
    x, before = torch.randn(T, B, I, dtype=F64), torch.get_rng_state()
    y, (hn, cn) = module(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close([y, hn, cn], by_the_equations(module, x, drawn))
    for noise in drawn:  # the expectation
        assert {kind: v.unique().tolist() for kind, v in noise.items()} == {
            kind: [p] for kind, p in zip("hc", module._noise[:2], strict=True) if p
        }


def test_options_may_be_set_later():
    module = fusedrnn.LSTM(I, H)
    x = torch.randn(T, B, I)
    plain = module(x)[0]
    module.recurrent_dropout = 0.5
    assert not torch.equal(module(x)[0], plain)
    assert torch.equal(module.eval()(x)[0], plain)
    module.zoneout = 2.0
    with pytest.raises(ValueError, match="probability"):
        module(x)


def test_zoneout_of_everything_keeps_the_state():
    module = fusedrnn.LSTM(I, H, zoneout=1.0)
    hx = torch.randn(1, B, H), torch.randn(1, B, H)
    y, (hn, cn) = module(torch.randn(T, B, I), hx)
    assert torch.equal(y, hx[0].expand(T, B, H))
    assert torch.equal(hn, hx[0])
    assert torch.equal(cn, hx[1])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2, "proj_size": 2}])
def test_forget_bias(options):
    module = fusedrnn.LSTM(I, H, forget_bias=1.5, **options)
    for names in module._all_weights:
        total = getattr(module, names[2]) + getattr(module, names[3])
        assert torch.equal(total[H : 2 * H], torch.full((H,), 1.5))
        assert total[:H].abs().max() < 2 / H**0.5
    assert torch.equal(fusedrnn.LSTMCell(I, H, forget_bias=1.0).bias_ih[H : 2 * H], torch.ones(H))
    torch.manual_seed(4)
    plain = nn.LSTM(I, H, **options)
    torch.manual_seed(4)
    assert torch.equal(fusedrnn.LSTM(I, H, forget_bias=1.5, **options).weight_hh_l0, plain.weight_hh_l0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"peephole": 1}, TypeError, "peephole must be a bool, got int"),
        ({"zoneout": 1.5}, ValueError, "zoneout must be a probability in 0..1, got 1.5"),
        ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, "two, of h and of c, got 3"),
        ({"zoneout": "0.1"}, TypeError, "zoneout must be a number, got str"),
        ({"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout must be a probability"),
        ({"recurrent_dropout_mode": "gal"}, ValueError, "one of 'candidate', 'state', got 'gal'"),
        ({"zoneout": 0.1, "proj_size": 2}, ValueError, "zoneout must be 0 with a projection"),
        ({"forget_bias": 1.0, "coupled": True}, ValueError, "there is no forget gate"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "there is no bias to set"),
        ({"forget_bias": "1"}, TypeError, "forget_bias must be a number or None, got str"),
    ],
)
def test_options_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.LSTM(I, H, **options)


def test_a_cell_has_no_mask_of_a_sequence():
    with pytest.raises(TypeError, match="recurrent_dropout_mode"):
        fusedrnn.LSTMCell(I, H, recurrent_dropout_mode="state")


def test_parameters_and_their_names():
    module = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=2, peephole=True, coupled=True)
    shapes = {name: list(p.shape) for name, p in module.named_parameters()}
    assert shapes["weight_ih_l1_reverse"] == [3 * H, 4]
    assert shapes["bias_hh_l0"] == [3 * H]
    assert shapes["weight_hr_l0"] == [2, H]
    assert shapes["weight_peephole_l1_reverse"] == [2 * H]
    assert list(fusedrnn.LSTM(I, H, peephole=True).weight_peephole_l0.shape) == [3 * H]
    assert "peephole=True, coupled=True" in repr(module)
    assert repr(fusedrnn.LSTM(I, H)) == repr(nn.LSTM(I, H))


def test_state_dicts_of_plain_layers_and_of_variants():
    plain, peephole, coupled = nn.LSTM(I, H), fusedrnn.LSTM(I, H, peephole=True), fusedrnn.LSTM(I, H, coupled=True)
    noisy = fusedrnn.LSTM(I, H, zoneout=0.1, recurrent_dropout=0.1, forget_bias=1.0)
    noisy.load_state_dict(plain.state_dict())
    plain.load_state_dict(noisy.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_peephole_l0"'):
        peephole.load_state_dict(plain.state_dict())
    missing = peephole.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["weight_peephole_l0"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_peephole_l0"'):
        fusedrnn.LSTM(I, H).load_state_dict(peephole.state_dict())
    with pytest.raises(RuntimeError, match="an LSTM that has a forget gate, and this one has gates"):
        coupled.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="has no forget gate"):
        nn.Sequential(fusedrnn.LSTM(I, H)).load_state_dict(nn.Sequential(coupled).state_dict())


@variants
def test_copies_and_pickles_compute_the_same(options):
    module = fusedrnn.LSTM(I, H, **options).eval()
    x = torch.randn(T, B, I)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])
        assert repr(twin) == repr(module)


def test_convert_takes_options_along_and_revert_leaves_them():
    module = fusedrnn.LSTM(I, H, peephole=True, zoneout=0.2).eval()
    x, report = torch.randn(T, B, I), fusedrnn.Report()
    y = module(x)[0]
    fusedrnn.convert(module, compilable=True)
    assert type(module) is fusedrnn.CompilableLSTM
    assert torch.equal(module(x)[0], y)
    fusedrnn.revert(module, report=report)
    assert "peephole=True, zoneout=0.2" in report.left[""]
    assert torch.equal(module(x)[0], y)


@variants
def test_compiled_as_one_graph_and_exported(options):
    torch._dynamo.reset()  # all modules share one forward, and Dynamo compiles that a few times only
    module = fusedrnn.CompilableLSTM(I, H, **options)
    x = torch.randn(T, B, I, requires_grad=True)

    def run(function):
        torch.manual_seed(3)
        return results([function(x)[0]], [x, *module.parameters()])

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert [r.shape for r in run(compiled)] == [r.shape for r in run(module)]
    if module._noise is None:
        assert_close(run(compiled), run(module), rtol=0, atol=0)
    module.eval()
    exported = torch.export.export(module, (x.detach(),)).module()
    assert torch.equal(exported(x.detach())[0], module(x.detach())[0])


def test_explain_names_the_cell_and_who_has_none():
    module, x = fusedrnn.LSTM(I, H, peephole=True, zoneout=0.1), torch.randn(T, B, I)
    explained = fusedrnn.explain(module, x)
    assert explained.problem.cell == "lstm_peephole+hc"
    assert explained.reasons["aten"] == "it has no kernel for the cell lstm_peephole+hc"
    with fusedrnn.use_backend("aten"), pytest.raises(RuntimeError, match="no kernel for the cell lstm_peephole"):
        module(x)
    assert fusedrnn.explain(fusedrnn.LSTM(I, H, recurrent_dropout=0.1).eval(), x).problem.cell == "lstm"


def test_every_variant_is_found_by_its_name():
    assert len(cells.VARIANTS) == 2 * 2 * 2 * 2 * 3 - 1
    for name in cells.VARIANTS:
        assert cells.named(name).name == name
        assert cells.named(name).title == "LSTM"
    with pytest.raises(KeyError):
        cells.named("lstm_peephole+x")


@backends
@pytest.mark.parametrize(("peephole", "coupled"), [*itertools.product((False, True), repeat=2)])
def test_a_cell_is_a_step_of_the_layer(backend, peephole, coupled):
    cell = fusedrnn.LSTMCell(I, H, peephole=peephole, coupled=coupled, dtype=F64)
    module = fusedrnn.LSTM(I, H, peephole=peephole, coupled=coupled, dtype=F64)
    module.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x = torch.randn(T, B, I, dtype=F64)
    hx = torch.randn(B, H, dtype=F64), torch.randn(B, H, dtype=F64)
    with fusedrnn.use_backend(backend):
        y, (hn, cn) = module(x, tuple(s.unsqueeze(0) for s in hx))
        for t in range(T):
            hx = cell(x[t], hx)
            torch.testing.assert_close(hx[0], y[t])
        assert_close(hx, (hn[0], cn[0]))
        weights = [p.detach() for p in module.parameters()]
        found = fusedrnn.functional.lstm(x, weights, peephole=peephole, coupled=coupled)[0]
        torch.testing.assert_close(found, module(x)[0])
        w_p = weights.pop() if peephole else None
        torch.testing.assert_close(
            fusedrnn.functional.lstm_cell(x[0], None, *weights, w_peephole=w_p, coupled=coupled)[0], found[0]
        )


def test_cells_draw_masks_at_every_call():
    cell = fusedrnn.LSTMCell(2, 400, zoneout=(0.3, 0.0), recurrent_dropout=0.5)
    x, hx = torch.randn(5, 2), (torch.randn(5, 400), torch.randn(5, 400))
    h, _ = cell(x, hx)
    kept = (h == hx[0]).double().mean().item()
    assert abs(kept - 0.3) < 0.06
    assert not torch.equal(cell(x, hx)[0], h)
    assert torch.equal(cell.eval()(x, hx)[0], cell(x, hx)[0])


def test_autocast_and_an_empty_batch():
    module = fusedrnn.LSTM(I, H, **OPTIONS["everything"])
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(T, B, I))[0].dtype == torch.bfloat16
    y, (hn, cn) = module(torch.randn(T, 0, I))
    assert y.shape == (T, 0, H)
    assert hn.shape == cn.shape == (1, 0, H)
    y.sum().backward()
    assert torch.equal(module.weight_peephole_l0.grad, torch.zeros(2 * H))


@variants
def test_unbatched_and_batch_first_inputs(options):
    module = fusedrnn.LSTM(I, H, batch_first=True, dtype=F64, **options).eval()
    x = torch.randn(B, T, I, dtype=F64)
    y, (hn, cn) = module(x)
    one, (h, c) = module(x[1])
    assert_close([one, h, c], [y[1], hn[:, 1], cn[:, 1]])


def test_bench_sets_every_variant_beside_the_plain_lstm(capsys):
    assert cli.main(["bench", "variants", "--shape", "3,2,4,4", "--rounds", "2"]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    columns = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len(lines) == 14
    assert [c[4:6] + c[7:8] for c in columns[::7]] == [["infer", "plain", "1.00"], ["train", "plain", "1.00"]]


def test_bench_of_variants_as_json(capsys):
    assert cli.main(["bench", "variants", "--shape", "3,2,4,4", "--mode", "infer", "--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["backend"], found["dtype"]) == ("cpu", "float32")
    assert found["provenance"]["torch"] == torch.__version__
    rows = {row["variant"]: row for row in found["variants"]}
    assert len(rows) == 7
    assert rows["plain"]["times plain"] == 1
    assert rows["zoneout"]["us a step"] > 0
