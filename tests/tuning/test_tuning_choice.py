"""What runs where, by made-up profiles: the nearest measurements, noise, failures, and what torch's own cannot do."""

import dataclasses
import math
import sys

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import autograd, dispatch, ops
from fusedrnn.tuning import choice, machine, profile
from fusedrnn.tuning.profile import Key, Measurement, Profile, Ratio

needs_cpu = pytest.mark.skipif(fusedrnn.backends()["cpu"] is not None, reason="the cpu backend is not available")
NAMES = tuple(dispatch.TABLE)
LARGE = {"T": 64, "B": 32, "I": 256, "H": 256}


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    """Nobody asks for a backend, and what a test has said of profiles is forgotten."""
    with fusedrnn.use_backend("auto"):
        choice.forget()
        yield
        monkeypatch.undo()
        choice.forget()


@pytest.fixture
def pin(monkeypatch, tmp_path):
    """Writes made-up profiles, and has them count."""

    def pinned(*profiles):
        paths = [tmp_path / f"{k}.json" for k in range(len(profiles))]
        for path, made in zip(paths, profiles, strict=True):
            profile.save(made, path)
        monkeypatch.setenv("FUSEDRNN_PROFILE", ":".join(map(str, paths)) if sys.platform != "win32" else str(paths[0]))
        choice.forget()

    return pinned


def key(dtype="float32", train=False, T=64, B=16, I=256, H=256, **options):
    return Key(dtype, train, T, B, I, H, **options)


def measured(of, *, noise=1.0, failures=(), **ratios):
    """A measurement in which backends are so many times as fast as torch's own, and the noise divides the bound."""
    times = {name: 10 / ratio for name, ratio in ratios.items()}
    bounds = {name: Ratio(ratio / noise, ratio) for name, ratio in ratios.items()}
    return Measurement(of, {"aten": 10.0, **times}, bounds, dict(failures), 5)


def profile_of(*measurements, device="cpu", threads=1, **facts):
    here = machine.here("cpu") if device == "cpu" else machine.Machine(device, "card", "card", "Card")
    provenance = {"fusedrnn": fusedrnn.__version__, "torch": torch.__version__, **facts}
    return Profile(here, threads, provenance).with_added(measurements)


def table(*measurements, **options):
    """A table of one profile."""
    made = choice.Table.__new__(choice.Table)
    source = profile.Source(profile_of(*measurements, **options), profile.Path("made-up.json"), "pinned")
    made._read(source.profile.machine, [source], {})
    return made


def first(*measurements, of, **options):
    return table(*measurements, **options).choose(of, NAMES).order[0]


# The choice.


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [
        (2.0, 1.0, "cpu"),
        (1.03, 1.0, "cpu"),
        (1.02, 1.0, "aten"),
        (1.07, 1.02, "cpu"),
        (1.07, 1.06, "aten"),
    ],
)
def test_own_kernel_only_where_it_is_as_fast_beyond_the_noise(ratio, noise, expected):
    assert first(measured(key(), cpu=ratio, noise=noise), of=key()) == expected


def test_an_exact_measurement_decides_alone():
    others = [measured(key(B=B), cpu=3.0) for B in (8, 15, 17, 32)]
    assert first(measured(key(), cpu=0.9), *others, of=key()) == "aten"


def test_the_nearer_counts_more():
    small, large = measured(key(B=8), cpu=1.3), measured(key(B=64), cpu=0.8)
    assert first(small, large, of=key(B=10)) == "cpu"
    assert first(small, large, of=key(B=56)) == "aten"


def test_a_large_lead_far_off_does_not_outweigh_a_loss_next_door():
    lead, loss = measured(key(B=1), cpu=50.0), measured(key(B=8), cpu=0.8)
    assert first(lead, loss, of=key(B=6)) == "aten"


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"train": True},
        {"packed": True},
        {"projected": True},
        {"T": 1},
        {"T": 1, "step": True},
        {"cell": "gru"},
    ],
    ids=str,
)
def test_another_kind_says_nothing(other):
    chosen = table(measured(key(**other), cpu=0.5)).choose(key(), NAMES)
    assert chosen.order[0] == "cpu"
    assert "nothing like" in chosen.reason


def test_what_is_too_far_away_says_nothing():
    made = table(measured(key(), cpu=0.5))
    assert made.choose(key(B=60), NAMES).order[0] == "aten"
    assert "nothing like" in made.choose(key(B=65, H=512), NAMES).reason


def test_the_fastest_of_several_is_first_and_torchs_own_before_the_slow_ones():
    made = table(measured(key("bfloat16"), cuda=1.4, triton=2.0), device="cuda", threads=None)
    assert made.choose(key("bfloat16"), NAMES).order == ("triton", "cuda", "aten", "cpu", "reference")
    made = table(measured(key("bfloat16"), cuda=0.5, triton=0.8), device="cuda", threads=None)
    assert made.choose(key("bfloat16"), NAMES).order == ("aten", "triton", "cuda", "cpu", "reference")


def test_a_backend_that_a_neighbour_lacks_counts_as_slow_there():
    both, lacking = measured(key("bfloat16", H=512), cuda=1.1), measured(key("bfloat16", H=300), triton=1.5)
    made = table(both, lacking, device="cuda", threads=None)
    assert made.choose(key("bfloat16", H=320), NAMES).order[:2] == ("triton", "aten")


def test_a_small_input_is_the_cpu_backends_where_torchs_own_wins_with_much_larger_ones():
    step = measured(key(T=1, B=1, step=True), cpu=0.5)
    layers = [measured(key(T=1, B=B, train=B == 1), cpu=ratio) for B, ratio in ((1, 0.9), (8, 0.9), (9, 0.5))]
    made = table(measured(key(), cpu=0.5), *layers, step)
    assert made.small("lstm", "float32", False, False) == 8 * 256 // 8
    assert made.small("lstm", "float32", True, False) == 256 // 8, "training is another matter"
    assert made.small("lstm", "float32", False, True) == 256 // 8, "so is an LSTMCell"
    assert made.choose(key(T=1, B=1), NAMES).order[0] == "cpu"
    assert made.choose(key(T=1, B=8), NAMES).order[0] == "aten"
    assert made.choose(key(T=1, B=1, train=True), NAMES).order[0] == "aten"
    assert made.small("lstm", "bfloat16", False, False) > made.small("lstm", "float32", False, False)
    assert made.small("gru", "float32", False, False) > made.small("lstm", "float32", False, False), "so is a GRU"


def test_a_relu_is_as_fast_as_a_tanh_where_only_that_was_measured():
    tanh, relu = key(cell="rnn_tanh"), key(cell="rnn_relu")
    assert first(measured(tanh, cpu=0.5), of=relu) == "aten"
    assert first(measured(tanh, cpu=2.0), of=relu) == "cpu"
    assert first(measured(tanh, cpu=0.5), measured(relu, cpu=2.0), of=relu) == "cpu", "its own counts first"
    assert first(measured(relu, cpu=0.5), of=tanh) == "cpu", "by the rule"


def test_a_failure_ends_the_trust_in_a_dtype():
    wrong = Measurement(key(B=64), failures={"cpu": "wrong: y: error 1"})
    made = table(measured(key(), cpu=3.0), wrong, measured(key("bfloat16"), cpu=3.0))
    assert made.choose(key(), NAMES).order[-1] == "cpu"
    assert made.choose(key("bfloat16"), NAMES).order[0] == "cpu"
    assert made.verdict("cpu", "float32") == (
        True,
        "wrong: y: error 1 (T 64, B 64, I 256, H 256, float32, inference; made-up.json)",
    )
    assert made.verdict("cpu", "bfloat16") == (True, None)
    assert made.verdict("triton", "bfloat16") == (False, None)
    assert made.small("lstm", "float32", False, False) == made.small("lstm", "float32", True, True) == -1


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("intel-avx512", {"train": True, "B": 32}, "aten"),
        ("amd-avx512_bf16", {"train": True, "B": 64, "H": 1024}, "aten"),
        ("intel-amx", {"train": True, "B": 16}, "cpu"),
        ("intel-amx", {"train": False, "B": 64}, "cpu"),
        ("intel-amx", {"train": True, "B": 64, "dtype": "bfloat16"}, "cpu"),
        ("intel-amx", {"train": True, "B": 64, "packed": True}, "cpu"),
        ("amd-avx2", {"train": True, "B": 64}, "cpu"),
        ("amd-avx2", {"T": 1, "B": 16, "H": 1024, "I": 1024, "step": True}, "cpu"),
        ("intel-amx", {"T": 1, "B": 64, "H": 1024, "I": 1024, "step": True, "train": True}, "cpu"),
        ("amd-avx2", {"T": 1, "B": 16, "H": 1024, "I": 1024}, "cpu"),
        ("amd-avx2", {"T": 1, "B": 64, "H": 1024, "I": 1024}, "cpu"),
        ("amd-avx2", {"T": 1, "B": 128, "H": 256, "I": 256, "step": True}, "cpu"),
        ("amd-avx2", {"T": 1, "B": 8, "H": 4096, "step": True}, "cpu"),
    ],
)
def test_the_rule_where_nothing_was_measured(family, options, expected):
    made = table()
    made.machine = dataclasses.replace(made.machine, device="cpu", family=family)
    assert made.choose(key(**options), NAMES).order[0] == expected


def test_the_rule_on_a_gpu_is_torchs_own():
    assert first(of=key(), device="cuda", threads=None) == "aten"


def test_for_any_shape_the_mean_decides():
    made = table(
        measured(key("tf32"), cuda=4.0, triton=0.8),
        measured(key("tf32", B=64), cuda=0.5, triton=0.9),
        device="cuda",
        threads=None,
    )
    assert made.overall("tf32", NAMES)[:3] == ("cuda", "aten", "triton")
    assert made.overall("bfloat16", NAMES)[0] == "aten"


def test_of_two_profiles_the_nearer_number_of_threads_counts(pin):
    pin(profile_of(measured(key(), cpu=0.5), threads=8), profile_of(measured(key(), cpu=2.0), threads=2))
    found = {threads: choice.table("cpu", threads) for threads in (1, 2, 8, 64)}
    firsts = {threads: made.choose(key(), NAMES).order[0] for threads, made in found.items()}
    assert firsts == {1: "cpu", 2: "cpu", 8: "aten", 64: "aten"}
    assert "this process computes with 64" in found[64].choose(key(), NAMES).reason
    assert "this process" not in found[8].choose(key(), NAMES).reason
    assert len({made.small("lstm", "float32", False, False) for made in found.values()}) == 1, (
        "it does not depend on who asked first"
    )


# What runs.


def lstm_and_input(B=32, T=64, requires_grad=False, **options):
    return fusedrnn.LSTM(256, 256, **options).requires_grad_(requires_grad), torch.randn(T, B, 256)


@pytest.fixture
def ran(monkeypatch):
    """Which of torch's own and our layers were called."""
    found = []
    own, layers = torch._VF.lstm, ops.cpu_infer
    monkeypatch.setattr(torch._VF, "lstm", lambda *args: found.append("aten") or own(*args))
    monkeypatch.setattr(ops, "cpu_infer", lambda *args: found.append("cpu") or layers(*args))
    layer = autograd.layer
    monkeypatch.setattr(autograd, "layer", lambda name, *args: found.append(name) or layer(name, *args))
    return found


SLOW = [measured(key(train=train, B=32), cpu=0.5) for train in (False, True)]


@needs_cpu
@pytest.mark.parametrize("train", [False, True])
def test_torchs_own_runs_where_it_is_faster(pin, ran, train):
    pin(profile_of(*SLOW))
    lstm, x = lstm_and_input(requires_grad=train)
    theirs = nn.LSTM(256, 256)
    theirs.load_state_dict(lstm.state_dict())
    y, (hn, cn) = lstm(x)
    expected = theirs(x)
    assert ran == ["aten"] * 2
    assert fusedrnn.explain(lstm, x).backend == "aten"
    assert torch.equal(y, expected[0])
    assert torch.equal(hn, expected[1][0])
    assert torch.equal(cn, expected[1][1])
    lstm(x.transpose(0, 1)[:, :1].contiguous())  # T 32, B 1: small, and far from what was measured
    assert ran[-1] == "cpu"


@needs_cpu
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": torch.full((32,), 64)},
        {"reset": torch.zeros(64, 32, dtype=torch.bool)},
        {"return_states": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_torchs_own_lacks_goes_to_who_has_it(pin, ran, options):
    pin(profile_of(*SLOW))
    lstm, x = lstm_and_input()
    lstm(x, **options)
    assert set(ran) == {"cpu"}
    assert fusedrnn.explain(lstm, x, **options).backend == "cpu"


@needs_cpu
def test_batch_first_and_cells_are_asked_about_as_they_are(pin, ran):
    pin(profile_of(measured(key(B=32), cpu=0.5), measured(key(T=1, B=512, step=True), cpu=0.5)))
    lstm, x = lstm_and_input(batch_first=True)
    lstm(x.transpose(0, 1))
    lstm(x)  # T 32, B 64 is near enough
    assert ran == ["aten", "aten"]
    cell, called = fusedrnn.LSTMCell(256, 256).requires_grad_(False), []
    own = torch._VF.lstm_cell
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._VF, "lstm_cell", lambda *args: called.append(1) or own(*args))
        cell(torch.randn(512, 256))
        assert called == [1]
        cell(torch.randn(16, 256))
        assert called == [1]
    assert fusedrnn.explain(cell, torch.randn(512, 256)).backend == "aten"


@needs_cpu
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_torchs_own_cell_runs_without_further_questions_and_its_errors_are_ours(pin, monkeypatch, given):
    pin(profile_of(measured(key(T=1, B=64, step=True), cpu=0.5)))
    cell, x = fusedrnn.LSTMCell(256, 256).requires_grad_(False), torch.randn(64, 256)
    hx = (torch.randn(64, 256), torch.randn(64, 256)) if given else None
    theirs = nn.LSTMCell(256, 256)
    theirs.load_state_dict(cell.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "select", None)
        h, c = cell(x, hx)
    expected = theirs(x, hx)
    assert torch.equal(h, expected[0])
    assert torch.equal(c, expected[1])
    with pytest.raises(RuntimeError, match="input has inconsistent input_size: got 255 expected 256"):
        cell(x[:, 1:], hx)
    with pytest.raises(RuntimeError, match="Input batch size 64 doesn't match hidden0 batch size 63"):
        cell(x, (torch.randn(63, 256), torch.randn(63, 256)))


@needs_cpu
def test_second_derivatives_where_torchs_own_is_faster(pin):
    pin(profile_of(*SLOW))
    lstm, x = lstm_and_input(requires_grad=True)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
    grads = torch.autograd.grad(dx.square().sum(), list(lstm.parameters()), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert grads[0] is not None


@needs_cpu
def test_backward_in_eval_mode_where_torchs_own_is_faster(pin, ran):
    pin(profile_of(*SLOW))
    lstm, x = lstm_and_input(requires_grad=True)
    lstm.eval()(x)[0].sum().backward()
    assert ran == ["aten"]
    assert lstm.weight_ih_l0.grad is not None


@needs_cpu
def test_what_is_asked_for_is_not_measured_by_anything(pin, ran):
    pin(profile_of(*SLOW))
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("cpu"):
        lstm(x)
        explanation = fusedrnn.explain(lstm, x)
    assert ran == ["cpu"]
    assert explanation.measured == ""


@needs_cpu
def test_a_backend_that_failed_verification_does_not_run(pin, ran):
    pin(profile_of(measured(key(B=8), cpu=9.0), Measurement(key(B=64), failures={"cpu": "hung: no answer"})))
    lstm, x = lstm_and_input(B=2, T=3)
    lstm(x)
    assert ran == ["aten"]
    reason = fusedrnn.explain(lstm, x).reasons["cpu"]
    assert reason.startswith("it failed verification on this machine: hung: no answer (T 64, B 64")
    lstm(x, lengths=torch.tensor([3, 1]))
    assert ran[-1] == "reference"
    with fusedrnn.use_backend("cpu"):
        lstm(x)
    assert ran[-1] == "cpu"


@needs_cpu
def test_what_is_recorded_is_for_any_shape(pin):
    pin(profile_of(*SLOW))
    lstm, x = lstm_and_input()
    traced = torch.jit.trace(lstm, x)
    assert "fusedrnn::cpu_forward" in str(traced.inlined_graph)


@needs_cpu
def test_what_is_compiled_is_for_any_shape_and_its_profile_is_read_while_it_is_traced(pin):
    pin(profile_of(*SLOW))
    lstm = fusedrnn.CompilableLSTM(256, 256)
    x = torch.randn(64, 32, 256)
    torch._dynamo.reset()
    y, _ = torch.compile(lstm, fullgraph=True, backend="eager")(x)
    with fusedrnn.use_backend("cpu"):
        assert torch.equal(y, lstm(x)[0])


@needs_cpu
def test_the_same_call_gets_the_same_backend_whatever_came_before(pin, ran):
    pin(profile_of(*SLOW, measured(key(B=1), cpu=4.0)))
    lstm, x = lstm_and_input()
    sizes = [1, 32, 2, 31, 4, 8, 16, 3]
    for order in (sizes, sizes[::-1]):
        choice.forget()
        ran.clear()
        for B in order:
            lstm(x[:, :B])
        chosen = dict(zip(order, ran, strict=True))
        assert chosen == {B: fusedrnn.explain(lstm, x[:, :B]).backend for B in sizes}
    assert set(chosen.values()) == {"aten", "cpu"}


@needs_cpu
def test_a_device_without_a_profile_is_verified_by_nobody(monkeypatch):
    monkeypatch.setattr(dispatch.choice, "table", lambda *_: table(device="cuda", threads=None))
    monkeypatch.setattr(dispatch.choice, "which", lambda _: 0)
    for name in ("cuda", "triton"):
        reason = dispatch._unproven(name, dispatch.Problem("cuda", torch.float32, 2, 2, 3, 4, 4, 1))
        assert "python -m fusedrnn tune --device cuda" in reason


def test_what_a_profile_has_verified_on_a_gpu_runs_there(monkeypatch):
    made = table(
        measured(key("tf32"), triton=2.0),
        Measurement(key("tf32", B=8), failures={"cuda": "crashed: the process ended with signal 11"}),
        device="cuda",
        threads=None,
    )
    monkeypatch.setattr(dispatch.choice, "table", lambda *_: made)
    monkeypatch.setattr(dispatch.choice, "which", lambda _: 0)
    monkeypatch.setattr(dispatch, "_is_measured", lambda _: True)
    problem = dispatch.Problem("cuda", torch.float32, 64, 16, 256, 256, 256, 1)
    assert dispatch._unproven("triton", problem) is None
    assert "crashed: the process ended with signal 11" in dispatch._unproven("cuda", problem)
    assert "tune" in dispatch._unproven("triton", problem._replace(dtype=torch.bfloat16))


def test_a_variant_goes_by_the_one_with_all_options(monkeypatch):
    made = table(
        measured(key("bfloat16", cell="lstm_peephole+hcg"), cuda=20.0, triton=30.0),
        measured(key("bfloat16", cell="lstm_peephole_coupled+hcr"), cuda=20.0, triton=10.0),
        Measurement(key("float16", cell="lstm_peephole+hcg"), failures={"cuda": "wrong"}),
        device="cuda",
        threads=None,
    )
    names = ("cuda", "triton", "aten", "reference")
    for cell in ("lstm_peephole", "lstm+h", "lstm_peephole+g"):
        assert made.choose(key("bfloat16", cell=cell), names).order == ("triton", "cuda", "reference", "aten")
        assert made.overall("bfloat16", names, cell)[0] == "triton"
    assert made.choose(key("bfloat16", cell="lstm_coupled+r"), names).order[0] == "cuda"
    assert not made.choose(key("bfloat16", cell="lstm_coupled+g"), names).ratios  # that gate and mode was not measured
    monkeypatch.setattr(dispatch.choice, "table", lambda *_: made)
    monkeypatch.setattr(dispatch.choice, "which", lambda _: 0)
    monkeypatch.setattr(dispatch, "_is_measured", lambda _: True)
    problem = dispatch.Problem("cuda", torch.bfloat16, 64, 16, 256, 256, 256, 1, cell="lstm+hc")
    assert dispatch._unproven("triton", problem) is None
    assert "wrong" in dispatch._unproven("cuda", problem._replace(dtype=torch.float16))
    assert "tune" in dispatch._unproven("cuda", problem._replace(cell="lstm_coupled"))
    assert dispatch._order(problem)[0] == "triton"
    assert dispatch._order(problem._replace(device="cpu")) == tuple(dispatch.TABLE)
    assert "as fast as the reference" in str(dispatch.Explanation(problem, "triton", "", {}, {"triton": Ratio(2, 3)}))


# What is said.


@needs_cpu
def test_explain_tells_the_ratio_and_where_it_was_measured(pin):
    pin(profile_of(measured(key(B=32), cpu=1.5, noise=1.2)))
    lstm, x = lstm_and_input()
    explanation = fusedrnn.explain(lstm, x)
    assert explanation.backend == "cpu"
    assert math.isclose(explanation.ratios["cpu"].median, 1.5, rel_tol=1e-3)
    text = str(explanation)
    assert "cpu is 1.50 times as fast as torch's own (1.25 at the least)" in text
    assert "measured at T 64, B 32, I 256, H 256, float32, inference; 0.json: the profile given" in text


@needs_cpu
def test_explain_says_where_a_rule_decides():
    lstm, x = lstm_and_input()
    assert "nothing like T 64, B 32" in fusedrnn.explain(lstm, x).measured
    assert "python -m fusedrnn tune" in fusedrnn.explain(lstm, x).measured
