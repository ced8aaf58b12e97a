"""python -m fusedrnn bench: what it runs, what it refuses, what it writes, and what it does when things go wrong."""

import csv
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from fusedrnn.benchmarks import (
    cases,
    ceilings,
    command,
    contenders,
    memory,
    peers,
    provenance,
    results,
    run,
    timing,
    verify,
)
from fusedrnn.benchmarks.cases import cell
from fusedrnn.benchmarks.contender import BASELINE, OURS, Contender
from fusedrnn.benchmarks.timing import Lane, take_turns
from torch import nn

import fusedrnn
from fusedrnn import cli, ops, testing

SMALL = ["--shape", "3,2,4,5", "--rounds", "2", "--time-budget", "0", "--baseline", "nn.LSTM"]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """What is measured here does not matter, and the memory of this process is that of all tests."""
    monkeypatch.setattr(memory, "settle", lambda freed: "")
    monkeypatch.setattr(timing, "SAMPLE", 1e-4)
    monkeypatch.setattr(timing, "REST", 0.0)
    monkeypatch.setattr(ceilings, "_SAMPLE", 1e-4)


def bench(*arguments):
    return cli.main(["bench", *map(str, arguments)])


def rows_of(folder):
    return results.read(folder / "results.csv")[0]


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--suite", "large"], ["'large'", "quick", "cpu", "gpu", "streaming", "models"]),
        (["--mode", "fast"], ["'fast'", "infer", "forward", "train"]),
        (["--dtype", "int8"], ["'int8'", "float32", "tf32", "bfloat16", "float16", "float64"]),
        (["--variant", "ragged"], ["'ragged'", "plain", "packed", "lengths", "reset"]),
        (["--baseline", "keras"], ["'keras'", *contenders.BASELINES]),
        (["--backend", "warp"], ["unknown backend 'warp': expected one of cuda, triton, cpu, aten, reference"]),
        (["--shape", "1,2,3"], ["expected T,B,I,H or T,B,I,H,L,D", "got '1,2,3'"]),
        (["--shape", "1,2,3,x"], ["got '1,2,3,x'"]),
        (["--shape", "1,2,3,0"], ["whole numbers from 1"]),
        (["--shape", "1,2,3,4,1,3"], ["D at most 2"]),
        (["--threads", "0"], ["must be a whole number from 1, got '0'"]),
        (["--time-budget", "-1"], ["must be a number from 0, got '-1'"]),
        (["--device", "cpu", "--suite", "gpu"], ["gpu needs a GPU"]),
        (["--device", "cpu", "--dtype", "tf32"], ["tf32 is what a GPU computes in"]),
        (["compare", "a.csv"], ["B.csv"]),
        (["compare", "nowhere/a.csv", "b.csv"], ["nowhere/a.csv: No such file"]),
    ],
    ids=lambda value: " ".join(value[:4]) if value and value[0].startswith("--") else "",
)
def test_arguments_that_are_wrong_name_those_that_are_right(capsys, arguments, messages):
    with pytest.raises(SystemExit) as exit:
        bench(*arguments)
    assert exit.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(message in error for message in messages), error


def test_backend_that_is_not_available_is_an_error_with_its_reason(capsys, monkeypatch):
    backend = fusedrnn.dispatch.TABLE["triton"]._replace(unavailable=lambda: "the reason")
    monkeypatch.setitem(fusedrnn.dispatch.TABLE, "triton", backend)
    with pytest.raises(SystemExit):
        bench("--backend", "triton")
    assert "backend 'triton' is not available: the reason" in " ".join(capsys.readouterr().err.split())


def test_out_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        bench("--out", tmp_path / "file")
    assert "argument --out" in capsys.readouterr().err


def test_info_and_check_do_not_load_the_benchmark(report, tmp_path):
    code = """
import contextlib, io, json, sys
from fusedrnn import cli
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(["info"])
print(json.dumps([name for name in sys.modules if name.startswith("fusedrnn.benchmarks")]))
"""
    assert report(code, tmp_path) == []


# ------------------------------------------------------------------------------------------------ cases


def test_mode_dtype_and_variant_of_a_shape():
    arguments = ["--shape", "6,2,3,4,2,2", "--mode", "train", "--dtype", "bfloat16", "--variant", "lengths"]
    options = command._parser().parse_args(arguments)
    ((_, found),) = command._cells(options, "cpu")
    assert (found.case.T, found.case.B, found.case.I, found.case.H, found.case.layers) == (6, 2, 3, 4, 2)
    assert found.case.bidirectional
    assert (found.mode, found.dtype, found.variant) == ("train", "bfloat16", "lengths")


def test_mode_and_dtype_take_the_place_of_what_a_suite_has():
    options = command._parser().parse_args(["--suite", "quick", "--mode", "forward", "--dtype", "float64"])
    found = [cell for _, cell in command._cells(options, "cpu")]
    assert {(cell.mode, cell.dtype) for cell in found} == {("forward", "float64")}
    assert len(found) == len(set(found)) == len({cell.case for cell in found})


def test_streaming_is_one_step_of_plain_inference_with_a_state():
    assert cell((1, 1, 4, 8), "infer").streaming
    assert cell((1, 1, 4, 8), "infer").case.hx
    assert not cell((1, 1, 4, 8), "train").streaming
    assert not cell((2, 1, 4, 8), "infer").streaming
    assert not cell((1, 1, 4, 8), "infer", variant="reset").streaming


def test_cpu_suite_covers_the_goals():
    found = {(c.case.T, c.case.B, c.case.H, c.case.layers, c.D, c.variant, c.mode) for c in cases.suite("cpu", "cpu")}
    expected = {(1, 1, H, 1, 1, "plain", "infer") for H in (64, 128, 256, 512)}
    for mode in ("infer", "train"):
        expected |= {(100, 1, H, 1, 1, "plain", mode) for H in (128, 512)}
        expected |= {(64, B, H, 1, 1, "plain", mode) for B in (16, 64) for H in (256, 512, 1024)}
        expected |= {(100, 16, 256, 2, 1, "plain", mode), (100, 16, 256, 1, 2, "plain", mode)}
        expected |= {(100, 32, 256, 1, D, variant, mode) for D in (1, 2) for variant in ("packed", "lengths")}
    assert expected <= found


def test_gpu_suite_covers_its_grid_and_begins_with_a_coarse_one():
    found = cases.suite("gpu", "cuda")
    assert len(found) == len(set(found))
    grid = {
        (c.case.H, c.case.B, c.case.T, c.dtype, c.mode) for c in found if c.variant == "plain" and c.case.layers == 1
    }
    hidden, batch = (128, 256, 512, 768, 1024, 1536, 2048), (1, 8, 16, 32, 64, 128, 256)
    for dtype in ("bfloat16", "float16", "tf32", "float32"):
        for mode in cases.MODES:
            assert {(H, B, T, dtype, mode) for H in hidden for B in batch for T in (128, 1024)} <= grid
    first = found[: len(found) // 5]
    assert {c.dtype for c in first} == {"bfloat16", "tf32", "float16", "float32"}
    assert {c.case.layers for c in first} == {1, 2, 4}
    assert {c.variant for c in first} >= {"plain", "lengths", "reset"}
    assert {c.case.T for c in first} == {128, 1024}


def test_lengths_are_those_that_nn_lstm_can_be_given():
    lengths = cell((9, 5, 2, 3), "infer", variant="lengths").case.inputs().lengths
    assert lengths.min() == 1
    assert lengths.max() == 9


def test_arithmetic_and_bytes_of_a_cell():
    plain = cell((10, 2, 3, 4), "infer")
    assert plain.flops == 2 * 10 * 2 * 16 * (3 + 4)
    assert plain.bytes == 4 * (16 * (3 + 4 + 2) + 20 * (3 + 4))
    assert replace(plain, mode="train").flops == 3 * plain.flops
    assert cell((10, 2, 3, 4), "infer", kind="gru").flops == plain.flops * 3 / 4
    stacked = cell((10, 2, 3, 4, 2, 2), "infer")
    assert stacked.flops == 2 * 20 * 2 * 16 * ((3 + 4) + (8 + 4))
    ragged = cell((10, 2, 3, 4), "infer", variant="packed")
    assert ragged.steps == ragged.case.inputs().lengths.sum() < 20


def test_shrinking_keeps_a_step_a_step_and_a_sequence_a_sequence():
    assert cases.shrunk(cell((1, 1, 128, 128), "infer"), 32).streaming
    case = cases.shrunk(cell((100, 16, 256, 512), "train"), 64).case
    assert (case.T, case.B, case.I, case.H) == (2, 1, 4, 8)


# ------------------------------------------------------------------------------------------------ contenders


def by_name(name):
    return contenders.BASELINES[name]()


SUPPORTED = [
    pytest.param(name, made, id=f"{name}-{made.id}-{made.mode}")
    for name in (BASELINE, "LSTMCell", "onnxruntime")
    for shape in ((5, 3, 4, 6), (5, 3, 4, 6, 2, 2), (1, 2, 4, 6))
    for variant in cases.VARIANTS
    for made in (cell(shape, mode, variant=variant) for mode in cases.MODES)
    if by_name(name).unsupported(made) is None
]


@pytest.mark.parametrize(("name", "made"), SUPPORTED)
def test_baselines_compute_what_they_say(name, made):
    contender = by_name(name)
    if contender.unavailable:
        pytest.skip(contender.unavailable)
    assert verify.worst_error(made, contender, made.case.module(contender.build)) <= 1


OTHER_CELLS = [
    pytest.param(contender, made, id=f"{contender.name}-{made.id}-{made.mode}")
    for kind in ("gru", "rnn_tanh", "rnn_relu")
    for contender in contenders.entered(["auto"], ["onnxruntime"], kind)
    for shape, variant in (((5, 3, 4, 6, 2, 2), "plain"), ((5, 3, 4, 6), "lengths"), ((5, 3, 4, 6), "reset"))
    for made in (cell(shape, mode, variant=variant, kind=kind) for mode in ("train", "infer"))
    if contender.unsupported(made) is None
]


@pytest.mark.parametrize(("contender", "made"), OTHER_CELLS)
def test_layers_of_other_cells(contender, made):
    if contender.unavailable:
        pytest.skip(contender.unavailable)
    assert verify.worst_error(made, contender, made.case.module(contender.build)) <= 1


def test_layers_of_other_cells_are_set_against_torchs_own(tmp_path, capsys):
    arguments = ["--cell", "gru", "--cell", "rnn_tanh", "--shape", "3,2,4,5", "--mode", "infer", "--rounds", "2"]
    arguments += ["--time-budget", "0", "--backend", "reference", "--baseline", "LSTMCell", "--out", tmp_path]
    assert bench(*arguments) == 0
    found = [(row.contender, row.case) for row in rows_of(tmp_path)]
    gru, rnn = "gru-T3-B2-I4-H5-float32", "rnn_tanh-T3-B2-I4-H5-float32"
    ours = OURS + "reference"
    assert found == [("nn.GRU", gru), (ours, gru), ("nn.RNN", rnn), (ours, rnn)]
    assert all(row.ratio for row in rows_of(tmp_path))
    assert "geometric mean of the ratios to nn.GRU, nn.RNN:" in capsys.readouterr().out
    assert "nn.LSTM" not in (tmp_path / "report.md").read_text()


def test_baselines_refuse_what_they_cannot_do():
    tested = {(param.values[0], param.values[1].mode, param.values[1].variant) for param in SUPPORTED}
    assert {variant for name, _, variant in tested if name == BASELINE} == set(cases.VARIANTS)
    assert {variant for name, _, variant in tested if name == "LSTMCell"} == {"plain", "reset"}
    assert {(mode, variant) for name, mode, variant in tested if name == "onnxruntime"} == {
        ("infer", "plain"),
        ("infer", "lengths"),
    }


def test_compiled_lstm_is_traced(monkeypatch):
    traced = []

    def count(graph, _):
        traced.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=count))
    contender = by_name("torch.compile")
    if contender.unavailable:
        pytest.skip(contender.unavailable)
    for mode in cases.MODES:
        made = cell((5, 3, 4, 6), mode)
        traced.clear()
        assert verify.worst_error(made, contender, made.case.module(contender.build)) <= 1
        assert traced, "the compiler left the LSTM as it was"


def plain_lstm(gates, recurrent, h, c, order):
    """A loop over gates [T, B, 4, H], with recurrent [4, H, H]; every h and c [T, B, H]."""
    steps = []
    for gate in gates:
        raw = dict(zip(order, (gate + torch.einsum("gdp,bp->bgd", recurrent, h)).unbind(1), strict=True))
        c = raw["f"].sigmoid() * c + raw["i"].sigmoid() * raw["g"].tanh()
        h = raw["o"].sigmoid() * c.tanh()
        steps.append((h, c))
    return (torch.stack(values) for values in zip(*steps, strict=True))


@pytest.mark.parametrize("nested", [False, True], ids=["function", "module"])
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (1, 2, 4, 6)], ids=str)
def test_flashrnn_is_given_what_it_asks_for(monkeypatch, shape, nested):
    """FlashRNN's own layout: Wx [B, T, 4, N, D], R [4, N, D, D], b [4, N, D], states [2, B, 1, N, D]."""

    def flashrnn(affine, weights, bias, states, function, backend, dtype):
        assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
        (B, T, G, N, D) = affine.shape
        assert (G, N) == (4, 1)
        h, c = (torch.zeros(B, D),) * 2 if states is None else states.reshape(2, B, D)
        h, c = plain_lstm((affine + bias)[:, :, :, 0].transpose(0, 1), weights[:, 0], h, c, "ifgo")
        values = torch.stack([h, c]).transpose(1, 2).reshape(2, B, T, N, D)
        return values, values[:, :, -1:]

    package = types.ModuleType("flashrnn")
    package.flashrnn = types.SimpleNamespace(flashrnn=flashrnn) if nested else flashrnn
    monkeypatch.setitem(sys.modules, "flashrnn", package)
    contender = peers.flashrnn()
    assert contender.unavailable is None
    for mode in cases.MODES:
        made = cell(shape, mode)
        assert verify.worst_error(made, contender, made.case.module(contender.build)) <= 1


def test_haste_is_given_what_it_asks_for(monkeypatch):
    """haste's own layout: kernel [I, 4H], recurrent [H, 4H], bias [4H], gates i g f o; every h and c [T + 1, B, H]."""

    class LSTMFunction:
        @staticmethod
        def apply(training, zoneout, x, kernel, recurrent, bias, mask):
            assert training == torch.is_grad_enabled()
            assert mask.numel() == zoneout == 0
            T, B, _ = x.shape
            H = len(recurrent)
            zeros = torch.zeros(B, H)
            gates = (x @ kernel + bias).view(T, B, 4, H)
            h, c = plain_lstm(gates, recurrent.T.reshape(4, H, H), zeros, zeros, "igfo")
            return torch.cat([zeros[None], h]), torch.cat([zeros[None], c])

    package, inner = types.ModuleType("haste_pytorch"), types.ModuleType("haste_pytorch.lstm")
    inner.LSTMFunction = LSTMFunction
    monkeypatch.setitem(sys.modules, "haste_pytorch", package)
    monkeypatch.setitem(sys.modules, "haste_pytorch.lstm", inner)
    contender = peers.haste()
    for mode in cases.MODES:
        made = cell((5, 3, 4, 6), mode)
        assert verify.worst_error(made, contender, made.case.module(contender.build)) <= 1


def test_peers_that_are_missing_or_broken_say_so(monkeypatch):
    for module in ("onnxruntime", "flashrnn", "haste_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    assert peers.onnxruntime().unavailable == "onnxruntime is not installed"
    assert peers.flashrnn().unavailable == "flashrnn is not installed"
    assert peers.haste().unavailable == "haste_pytorch is not installed"

    def explode(name):
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(peers.importlib, "import_module", explode)
    assert peers.flashrnn().unavailable == "flashrnn cannot be imported: no nvcc"


@pytest.mark.parametrize("name", ["FlashRNN", "haste"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "on a GPU"),
        ({"shape": (5, 3, 4, 6, 2)}, "one layer"),
        ({"shape": (5, 3, 4, 6, 1, 2)}, "one direction"),
        ({"variant": "lengths"}, "no lengths"),
        ({"dtype": "float64"}, "bfloat16|initial|None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_peers_say_what_they_cannot_do(name, changes, reason):
    given = {"shape": (5, 3, 4, 6), "device": "cuda", **changes}
    made = cell(given.pop("shape"), "infer", **given)
    said = str(by_name(name).unsupported(made))
    assert any(part in said for part in reason.split("|"))


def test_backends_are_contenders_with_their_reasons(monkeypatch):
    table = fusedrnn.dispatch.TABLE
    found = {contender.name: contender for contender in contenders.entered()}
    kernels = [name for name in table if name not in ("aten", "reference")]
    assert [name for name in found if name.startswith(OURS)] == [OURS + name for name in kernels]
    for name in kernels:
        assert found[OURS + name].unavailable == fusedrnn.backends()[name]
        monkeypatch.setitem(table, name, table[name]._replace(unavailable=lambda: "gone"))
    left = {contender.name: contender.unavailable for contender in contenders.entered()}
    assert left[OURS + "aten"] is left[OURS + "reference"] is None
    assert left[OURS + "cpu"] == "gone"


def test_every_backend_that_is_available_is_checked_like_the_others(place):
    made = cell((5, 3, 4, 6, 2, 2), "train", "float64", device=place.device)
    contender = contenders.entered([place.backend])[-1]
    module = made.case.module(contender.build, place.device)
    assert contender.unsupported(made) is None
    assert verify.worst_error(made, contender, module) <= 1
    x, hx, options = run._arguments(made)
    with contender.active():
        assert contender.ran(module, (x, hx), options).split(":")[0] == place.backend


# ------------------------------------------------------------------------------------------------ timing


class FakeClock(timing.CpuClock):
    """A clock that only work moves on."""

    def __init__(self):
        self.time, self.log = 0.0, []

    def now(self):
        return self.time

    def rest(self):
        self.log.append("rest")

    def takes(self, name, *seconds):
        """Work that takes these times one after another, and the last of them ever after."""
        left = list(seconds)

        def work():
            self.log.append(name)
            self.time += left.pop(0) if len(left) > 1 else left[0]

        return work


@pytest.fixture
def fake():
    return FakeClock()


def test_percentiles_of_what_was_sampled(fake, monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 1.0)
    lane = Lane(fake.takes("a", 9, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11))
    take_turns([lane], fake, rounds=11, budget=1e9)
    assert lane.seconds == list(range(1, 12)), "the two calls before the first round are not among them"
    assert lane.percentiles() == (3, 6, 9)
    assert replace(lane, seconds=[4.0]).percentiles() == (4, 4, 4)


def test_lanes_take_turns_and_take_turns_in_going_first(fake, monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 1.0)
    take_turns([Lane(fake.takes(name, 1)) for name in "abc"], fake, rounds=3, budget=1e9)
    calls = [entry for entry in fake.log if entry != "rest"]
    assert "".join(calls[6:]) == "abc" + "bca" + "cab"
    assert fake.log.count("rest") == 9, "one before every sample"


def test_short_calls_are_repeated_until_a_sample_is_long_enough(fake, monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 0.5)
    lane = Lane(fake.takes("a", 0.125))
    take_turns([lane], fake, rounds=2, budget=1e9)
    assert lane.calls == 4
    assert lane.seconds == [0.125, 0.125]
    assert fake.log.count("a") == 2 + 2 * (1 + 4), "each sample of several calls begins with one that is not counted"
    single = Lane(fake.takes("a", 0.125))
    take_turns([single], fake, rounds=2, budget=1e9, repeat=False)
    assert single.calls == 1


def test_budget_ends_the_rounds_but_not_before_a_few(fake):
    slow, quick = Lane(fake.takes("a", 1.0)), Lane(fake.takes("b", 0.5))
    take_turns([slow, quick], fake, rounds=100, budget=15)
    assert len(slow.seconds) == len(quick.seconds) == 11
    slow, quick = Lane(fake.takes("a", 1.0)), Lane(fake.takes("b", 0.5))
    take_turns([slow, quick], fake, rounds=100, budget=0)
    assert len(slow.seconds) == len(quick.seconds) == timing.ROUNDS


def test_a_lane_that_raises_is_out_and_the_others_go_on(fake):
    def broken():
        raise MemoryError("all gone")

    bad, good = Lane(broken), Lane(fake.takes("a", 1.0))
    take_turns([bad, good], fake, rounds=3, budget=1e9)
    assert isinstance(bad.error, MemoryError)
    assert bad.seconds == []
    assert len(good.seconds) == 3


def test_auto_is_a_contender_that_says_what_it_took():
    *_, contender = contenders.entered(["auto"], [])
    made = cell((3, 2, 4, 7), "infer")
    assert contender.unsupported(made) is None
    module = made.case.module(contender.build)
    x, hx, options = testing.arguments(made.case, made.case.inputs())
    with contender.active():
        expected = fusedrnn.explain(module, x).backend
        assert contender.ran(module, (x, hx), options).startswith(f"{expected}: ")


def test_contexts_are_entered_outside_of_the_time(fake):
    class Active:
        def __enter__(self):
            fake.time += 100

        def __exit__(self, *_):
            fake.time += 100

    lane = Lane(fake.takes("a", 1.0), Active)
    take_turns([lane], fake, rounds=2, budget=1e9)
    assert lane.seconds == [1, 1]


def test_cuda_clock_overwrites_the_cache_before_it_records(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 12.0  # milliseconds

    class Buffer:
        def zero_(self):
            log.append("flush")

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=50))
    monkeypatch.setattr(torch, "empty", lambda n, **kw: Buffer() if kw.get("device") == "cuda" else empty(n, **kw))
    assert timing.CudaClock().sample(lambda: log.append("work"), 3) == pytest.approx(0.004)
    assert log == ["flush", "record", "work", "work", "work", "record", "synchronize"]


def test_limit_is_the_larger_of_arithmetic_and_bytes(fake, monkeypatch):
    found = ceilings.Ceilings(fake)
    monkeypatch.setattr(found, "_arithmetic", lambda *_: 1e9)
    monkeypatch.setattr(found, "_bandwidth", lambda *_: 1e9)
    one, many = cell((1, 1, 64, 64), "infer"), cell((10, 64, 64, 64), "infer")
    assert found.limit(one).seconds == one.bytes / 1e9 > one.flops / 1e9
    assert found.limit(many).seconds == many.flops / 1e9 > many.bytes / 1e9


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ceilings_are_the_best_that_was_seen(fake, monkeypatch, device):
    found = ceilings.Ceilings(fake)
    of_moments = iter([3e9, 5e9, 4e9])
    monkeypatch.setattr(found, "_measure_arithmetic", lambda *_: next(of_moments))
    monkeypatch.setattr(found, "_measure_bandwidth", lambda *_: 1e9)
    seen = [found.limit(cell((1, 1, 64, 64), "infer", device=device)).flops_per_second for _ in range(3)]
    assert seen == ([3e9, 5e9, 5e9] if device == "cpu" else [3e9, 3e9, 3e9])


def test_ceilings_are_measured_by_the_clock(fake, monkeypatch):
    monkeypatch.setattr(fake, "sample", lambda work, calls: 0.5)
    limit = ceilings.Ceilings(fake).limit(cell((1, 1, 64, 64), "infer"))
    assert limit.flops_per_second == 2 * 1024**3 / 0.5
    assert limit.bytes_per_second == 12 * (2**20 // 12) / 0.5


def test_arithmetic_is_that_of_the_faster_library(fake, monkeypatch):
    found = ceilings.Ceilings(fake)
    seconds = {"float32": [2.0, 0.5], "float64": [3.0]}
    asked = []
    for dtype, times in seconds.items():
        left = iter(times)
        monkeypatch.setattr(found, "_least_seconds", lambda way, left=left: asked.append(way()) or next(left))
        assert found._measure_arithmetic("cpu", dtype) == 2 * 1024**3 / min(times)
        assert next(left, None) is None
    product, of_onednn, _ = asked
    torch.testing.assert_close(product.shape, of_onednn.shape)


# ------------------------------------------------------------------------------------------------ streaming


def test_streaming_passes_the_state_back():
    made = cell((1, 2, 4, 6, 2, 1), "infer")
    module = made.case.module()
    x, hx, _, _ = made.case.inputs()
    step = run.stream(module, x, hx)
    expected, _ = module(x.expand(4, 2, 4), hx)
    for t in range(4):
        torch.testing.assert_close(step(), expected[t : t + 1])


def test_streaming_of_onnxruntime_passes_the_state_back():
    contender, made = by_name("onnxruntime"), cell((1, 2, 4, 6, 2, 1), "infer")
    if contender.unavailable:
        pytest.skip(contender.unavailable)
    module = made.case.module(contender.build)
    x, hx, _, _ = made.case.inputs()
    step = run._work(made, contender, module, x, hx, {})
    expected, _ = made.case.module()(x.expand(4, 2, 4), hx)
    for t in range(4):
        torch.testing.assert_close(torch.from_numpy(step()), expected[t : t + 1])


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_training_computes_every_gradient_each_time(variant):
    made = cell((4, 3, 4, 6), "train", variant=variant)
    contender = by_name(BASELINE)
    module = made.case.module(contender.build)
    work = run._work(made, contender, module, *run._arguments(made))
    first, second = work(), work()
    assert len(first) == 1 + len(list(module.parameters()))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ end to end


def test_a_small_suite_end_to_end(capsys, tmp_path):
    arguments = ["--suite", "quick", "--suite", "models", "--shrink", 32, "--rounds", 2, "--time-budget", 0]
    baselines = [argument for name in (BASELINE, "onnxruntime", "haste") for argument in ("--baseline", name)]
    assert bench(*arguments, *baselines, "--steps", 2, "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()  # no bar, where there is no terminal
    assert [line.split(":")[0] for line in lines] == [f"cell {k + 1} of {len(lines)}" for k in range(len(lines))]

    rows, facts = results.read(tmp_path / "results.csv")
    timed = [row for row in rows if row.status == "ok"]
    assert {row.mode for row in timed} == {"infer", "train"}
    assert {row.suite for row in timed} == {"quick", "models"}
    for row in timed:
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.ratio > 0
        assert row.unit_us > 0
        assert row.ran
        assert row.excess is None or 0 <= row.excess <= 1
        if row.suite == "quick":
            assert row.limit_share > 0
            assert row.peak_mib is not None or row.contender == "onnxruntime" or not sys.platform.startswith("linux")
    assert {row.contender for row in rows if row.case} >= {
        BASELINE,
        *(OURS + n for n in ("cpu",) if not ops.cpu_unavailable),
    }
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == "1"
    assert facts["commit"] == provenance.collect("cpu")["commit"]

    document = json.loads((tmp_path / "results.json").read_text())
    assert document["provenance"] == facts
    assert len(document["rows"]) == len(rows)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"time_T_infer.png", "time_H_train.png", "losses.png"} <= pictures
    report = (tmp_path / "report.md").read_text()
    for name in pictures:
        assert f"]({name})" in report
    assert "haste: haste_pytorch is not installed" in out
    assert "haste: haste_pytorch is not installed" in report
    assert "geometric mean" in out

    for path in tmp_path.glob("*.png"):
        path.unlink()
    (tmp_path / "results.json").unlink()
    assert bench("plot", tmp_path / "results.csv") == 0
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    assert (tmp_path / "report.md").read_text() == report


def break_forward(monkeypatch, change):
    right = ops.forward_op("reference")
    monkeypatch.setitem(ops._FORWARD, "reference", lambda *arguments: change(right(*arguments)))


def test_a_wrong_result_is_reported_and_not_timed(capsys, monkeypatch, tmp_path):
    break_forward(monkeypatch, lambda results: (results[0] * (1 + 1e-3), *results[1:]))
    assert bench(*SMALL, "--backend", "reference", "--mode", "infer", "--out", tmp_path) == 1
    ours, theirs = (
        next(r for r in rows_of(tmp_path) if r.contender == name) for name in (OURS + "reference", BASELINE)
    )
    assert ours.status == "wrong"
    assert ours.reason.startswith("y: error ")
    assert ours.excess > 1
    assert ours.median_ms is ours.ratio is ours.samples is None
    assert theirs.status == "ok"
    assert theirs.median_ms > 0
    assert "wrong: y: error" in capsys.readouterr().out
    assert "wrong: y: error" in (tmp_path / "report.md").read_text()


def test_a_wrong_result_is_timed_where_asked_but_stays_wrong(monkeypatch, tmp_path):
    break_forward(monkeypatch, lambda results: (results[0] * (1 + 1e-3), *results[1:]))
    arguments = [*SMALL, "--backend", "reference", "--mode", "infer", "--time-wrong"]
    assert bench(*arguments, "--out", tmp_path) == 1
    (ours,) = (row for row in rows_of(tmp_path) if row.ours)
    assert ours.status == "wrong"
    assert ours.median_ms > 0
    assert results.geometric_means([ours]) == []


def test_means_say_what_they_would_be_at_the_limit():
    def rows(ratio, share, mode="infer", contender=OURS + "cpu"):
        return results.Row(
            suite="",
            contender=contender,
            status="ok",
            case="",
            mode=mode,
            ratio=ratio,
            limit_share=share,
            median_ms=1.0,
        )

    found = results.geometric_means([rows(2.0, 0.5), rows(1.0, 1.0), rows(3.0, None, "train"), rows(1.0, 1, "train")])
    infer, train = found
    assert infer == ("infer", OURS + "cpu", pytest.approx(2**0.5), pytest.approx(2.0), 2)
    assert train == ("train", OURS + "cpu", pytest.approx(3**0.5), None, 2)
    assert "at most 2.00x" in "\n".join(results.summary([rows(2.0, 0.5), rows(1.0, 1.0)]))


def test_a_wrong_gradient_makes_training_wrong_and_nothing_else(monkeypatch, tmp_path):
    right = ops.backward_op("reference")

    def wrong(*arguments):
        dx, *rest = right(*arguments)
        return dx * (1 + 1e-3), *rest

    monkeypatch.setitem(ops._BACKWARD, "reference", wrong)
    assert bench(*SMALL, "--backend", "reference", "--out", tmp_path) == 1
    status = {row.mode: (row.status, row.reason) for row in rows_of(tmp_path) if row.ours}
    assert status["infer"] == status["forward"] == ("ok", "")
    assert status["train"][0] == "wrong"
    assert status["train"][1].startswith("dx: error ")


def allocate_far_too_much(*_):
    return torch.empty(2**50)


def raise_out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.\nmore")


@pytest.mark.parametrize("fail", [allocate_far_too_much, raise_out_of_memory])
def test_out_of_memory_is_a_row_that_says_so(monkeypatch, tmp_path, fail):
    monkeypatch.setitem(ops._FORWARD, "reference", fail)
    assert bench(*SMALL, "--backend", "reference", "--mode", "infer", "--out", tmp_path) == 0
    (ours,) = (row for row in rows_of(tmp_path) if row.ours)
    assert ours.status == "out of memory"
    assert "allocate" in ours.reason
    assert "\n" not in ours.reason
    assert ours.median_ms is None
    assert next(row for row in rows_of(tmp_path) if row.contender == BASELINE).status == "ok"


def test_out_of_memory_while_timing_is_a_row_too(monkeypatch, tmp_path):
    calls = []

    def later(results):
        calls.append(None)
        if len(calls) > 4:  # checked, warmed up, its memory measured, and warmed up again
            raise_out_of_memory()
        return results

    break_forward(monkeypatch, later)
    bench(*SMALL, "--backend", "reference", "--mode", "infer", "--out", tmp_path)
    (ours,) = (row for row in rows_of(tmp_path) if row.ours)
    assert ours.status == "out of memory"
    assert ours.excess <= 1


def test_a_contender_that_raises_is_a_row_and_a_status(monkeypatch, tmp_path):
    monkeypatch.setitem(ops._FORWARD, "reference", lambda *_: [][0])
    assert bench(*SMALL, "--backend", "reference", "--mode", "infer", "--out", tmp_path) == 1
    (ours,) = (row for row in rows_of(tmp_path) if row.ours)
    assert (ours.status, ours.reason) == ("failed", "IndexError: list index out of range")


def test_interrupting_keeps_what_was_measured(capsys, monkeypatch, tmp_path):
    measure, begun = run.measure, []

    def interrupted(*arguments):
        begun.append(arguments)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(run, "measure", interrupted)
    assert bench(*SMALL, "--backend", "reference", "--out", tmp_path) == 130
    kept = {row.mode for row in rows_of(tmp_path) if row.status == "ok"}
    assert kept == set(cases.MODES[:2])
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == len(rows_of(tmp_path))
    assert (tmp_path / "report.md").is_file()
    out, err = capsys.readouterr()
    assert "geometric mean" in out
    assert "interrupted" in err


def test_a_cell_is_named_before_it_is_measured(capsys, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(run, "measure", lambda *_: said.append(capsys.readouterr().err) or [])
    bench(*SMALL, "--backend", "reference", "--out", tmp_path)
    names = [cell.id for _, cell in command._cells(command._parser().parse_args([str(a) for a in SMALL]), "cpu")]
    assert said == [
        f"cell {k} of 3: {name} {mode}\n" for k, (name, mode) in enumerate(zip(names, cases.MODES, strict=True), 1)
    ]


def test_a_limit_counts_models_too(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(run, "measure", lambda suite, cell, *_: asked.append(cell.mode) or [])
    monkeypatch.setattr(command.training, "measure", lambda task, *_: asked.append(task.name) or ([], []))
    bench(*SMALL, "--suite", "models", "--limit", 4, "--out", tmp_path)
    assert asked == [*cases.MODES, command.models.tasks()[0].name]


def test_results_as_json(capsys, tmp_path):
    arguments = ["--mode", "infer", "--backend", "reference", "--baseline", BASELINE, "--out", tmp_path]
    assert bench(*SMALL, *arguments, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "results.json").read_text())
    assert {row["contender"] for row in json.loads(out)["rows"]} >= {BASELINE, f"{OURS}reference"}
    assert f"results: {tmp_path / 'results.csv'}" in err
    compared = ["compare", tmp_path / "results.csv", tmp_path / "results.csv", "--json"]
    assert bench(*compared) == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert {(change["contender"], change["change"], change["regression"]) for change in changes} == {
        (BASELINE, "same", False),
        (f"{OURS}reference", "same", False),
    }


def test_rows_are_on_disk_as_they_come(monkeypatch, tmp_path):
    measure, seen = run.measure, []

    def watched(*arguments):
        seen.append(len(rows_of(tmp_path)))
        return measure(*arguments)

    monkeypatch.setattr(run, "measure", watched)
    bench(*SMALL, "--backend", "reference", "--out", tmp_path)
    assert seen == [0, 2, 4]


def test_without_matplotlib_all_but_the_pictures_is_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(*SMALL, "--backend", "reference", "--mode", "infer", "--out", tmp_path) == 0
    assert "no pictures: matplotlib" in capsys.readouterr().err
    assert "extra `bench`" in command.plot.missing()
    assert (tmp_path / "report.md").is_file()


def test_without_tqdm_there_is_no_bar(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert bench(*SMALL, "--backend", "reference", "--mode", "infer", "--out", tmp_path) == 0


def test_every_contender_appears_or_has_its_reason(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(contenders, "_no_compiler", lambda: "no compiler here")
    arguments = [argument for argument in SMALL if argument not in ("--baseline", "nn.LSTM")]
    assert bench(*arguments, "--mode", "infer", "--variant", "packed", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    rows = rows_of(tmp_path)
    assert {row.contender for row in rows} == {contender.name for contender in contenders.entered()}
    assert "onnxruntime: onnxruntime is not installed" in out
    assert "torch.compile: no compiler here" in out
    assert "FlashRNN: flashrnn is not installed" in out
    assert "LSTMCell, 1 of the cells: the loop runs over sequences of one length" in out
    for name, reason in fusedrnn.backends().items():
        assert reason is None or f"fusedrnn {name}: {reason}" in out


def test_provenance_names_no_folder_and_no_host():
    import socket

    facts = provenance.collect("cpu")
    assert facts["cpu"]
    text = json.dumps(facts)
    assert str(provenance.Path.cwd()) not in text
    assert socket.gethostname() not in text
    with_commit = facts["commit"] == "" or (len(facts["commit"]) == 40 and facts["dirty"] in ("yes", "no"))
    assert with_commit


def test_csv_is_read_as_it_was_written(tmp_path):
    rows = [
        results.Row("cpu", BASELINE, case="a, b", mode="infer", T=3, median_ms=1.5, reason='say "x"'),
        results.Row("", "haste", "unavailable", "not here"),
    ]
    writer = results.Writer(tmp_path / "r.csv", {"cpu": "one", "torch": "2"})
    writer.write(rows)
    writer.close()
    assert results.read(tmp_path / "r.csv") == (rows, {"cpu": "one", "torch": "2"})
    with (tmp_path / "r.csv").open(newline="") as file:
        assert [line["cpu"] for line in csv.DictReader(file)] == ["one", "one"]


def test_losing_cells_are_all_listed():
    def row(contender, median_ms, status="ok", reason=""):
        return results.Row("s", contender, status, reason, case="c", mode="infer", median_ms=median_ms)

    rows = [
        row(BASELINE, 2.0),
        row("onnxruntime", 1.0),
        row(OURS + "cpu", 1.5),
        row(OURS + "cuda", None, "wrong", "why"),
    ]
    assert results.losses(rows) == ["c infer, fusedrnn cpu: 0.67x of onnxruntime", "c infer, fusedrnn cuda: wrong: why"]
    assert results.losses([row(BASELINE, 2.0), row(OURS + "cpu", 1.5)]) == []


def test_tf32_is_measured_by_the_error_that_torch_makes_in_it(monkeypatch):
    """Without a GPU the switches change nothing, but they have to be on inside and as before outside."""
    states = []

    class Watched(nn.LSTM):
        def forward(self, *args):
            states.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(*args)

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    contender = Contender("watched", Watched, lambda *_: "")
    for dtype, on in (("tf32", True), ("float32", False)):
        for mode in cases.MODES:
            made = cell((3, 2, 4, 5), mode, dtype)
            states.clear()
            assert verify.worst_error(made, contender, made.case.module(Watched)) <= 1
            assert states == [(on, on)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    exact = {tf32: verify._answers(made.case, tf32, "cpu")["y"].rounding for tf32 in (False, True)}
    assert exact[True] == pytest.approx(exact[False] * 2**11, rel=0.01)


def test_modes_of_a_case_share_one_computation_of_the_answers(monkeypatch):
    counted, answers = [], testing.answers
    monkeypatch.setattr(testing, "answers", lambda *a: counted.append(a) or answers(*a))
    verify._answers.cache_clear()
    contender = by_name(BASELINE)
    for mode in cases.MODES:
        made = cell((3, 2, 4, 7), mode)
        verify.worst_error(made, contender, made.case.module(contender.build))
    assert len(counted) == 1


def test_large_cells_are_checked_over_fewer_steps():
    large = cell((64, 64, 1024, 1024), "train")
    checked = verify.affordable(large)
    assert 2 <= checked.case.T < 64
    assert checked.flops == pytest.approx(3e10, rel=0.2)
    assert replace(checked.case, T=64) == large.case
    for untouched in (cell((100, 16, 256, 256), "train"), replace(large, device="cuda")):
        assert verify.affordable(untouched) is untouched


# ------------------------------------------------------------------------------------------------ resuming


def test_a_run_that_was_cut_off_is_resumed(tmp_path, capsys, monkeypatch):
    arguments = ["--out", tmp_path, *SMALL, "--backend", "reference", "--device", "cpu"]
    assert bench(*arguments, "--limit", 2) == 0
    path = tmp_path / "results.csv"
    first = path.read_text()
    path.write_text(first + "shape,nn.LSTM,ok")  # a line that was cut off
    assert len(rows_of(tmp_path)) == len(first.splitlines()) - 1
    measured, right = [], run.measure
    monkeypatch.setattr(
        run, "measure", lambda suite, cell, *rest: (measured.append(cell.mode), right(suite, cell, *rest))[1]
    )
    assert bench(*arguments, "--resume") == 0
    assert measured == ["train"]
    assert path.read_text().startswith(first)
    rows = [row for row in rows_of(tmp_path) if row.case]
    assert [(row.mode, row.contender) for row in rows] == [
        (mode, contender) for mode in cases.MODES for contender in (BASELINE, f"{OURS}reference")
    ]
    assert "train" in capsys.readouterr().out
    path.write_text("other,columns\n")
    with pytest.raises(SystemExit):
        bench(*arguments, "--resume")
    assert "argument --resume" in capsys.readouterr().err


def test_resuming_needs_a_folder(capsys):
    with pytest.raises(SystemExit):
        bench(*SMALL, "--resume")
    assert "it needs the --out of the run before" in " ".join(capsys.readouterr().err.split())


def test_a_backend_that_runs_only_where_it_is_asked_for_is_measured(tmp_path, capsys, monkeypatch):
    table = fusedrnn.dispatch.TABLE

    def unless_forced(_):
        return None if fusedrnn.dispatch.forced() == "reference" else "it has to be asked for"

    monkeypatch.setitem(table, "reference", table["reference"]._replace(unsupported=unless_forced))
    assert bench("--out", tmp_path, *SMALL, "--backend", "reference", "--device", "cpu", "--limit", 1) == 0
    assert {row.contender: row.status for row in rows_of(tmp_path)} == {BASELINE: "ok", f"{OURS}reference": "ok"}
