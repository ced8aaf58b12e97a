"""Which backend runs, who decides it, and what is said about the others."""

import asyncio
import copy
import itertools
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import dispatch, fast_path, functional, ops, stack
from fusedrnn.cells import CELLS
from fusedrnn.dispatch import Problem

NAMES = ["cuda", "triton", "cpu", "aten", "reference"]
OPERATORS = [name for name in ("cpu", "reference") if fusedrnn.backends()[name] is None]
EXTRAS = {
    "lengths": {"lengths": torch.tensor([3, 1])},
    "reset": {"reset": torch.zeros(4, 2, dtype=torch.bool)},
    "return_states": {"return_states": True},
}


@pytest.fixture(autouse=True)
def auto():
    """Nobody asks for a backend, whatever the environment says."""
    with fusedrnn.use_backend("auto"):
        yield


@pytest.fixture
def spies(monkeypatch):
    """What really runs: the names given to ops.forward_op and ops.backward_op, and "aten" for torch's own LSTM."""
    ran = {"forward": [], "backward": []}

    def spy(direction, find):
        def spied(name):
            ran[direction].append(name)
            return find(name)

        monkeypatch.setattr(ops, find.__name__, spied)

    spy("forward", ops.forward_op)
    spy("backward", ops.backward_op)
    for name in [name + step for name in CELLS for step in ("", "_cell")]:
        baseline = getattr(torch._VF, name)

        def spied(*args, baseline=baseline):
            ran["forward"].append("aten")
            return baseline(*args)

        monkeypatch.setattr(torch._VF, name, spied)
    return ran


@pytest.fixture
def replace(monkeypatch):
    """Gives a row of the table other answers, and has the table asked: the short way knows what it says of the CPU."""
    monkeypatch.setattr(fast_path, "attempt", lambda *_, **__: None)

    def change(name, **answers):
        monkeypatch.setitem(dispatch.TABLE, name, dispatch.TABLE[name]._replace(**answers))

    return change


def lstm_and_input(**options):
    return fusedrnn.LSTM(3, 5, **options), torch.randn(4, 2, 3)


# backends and use_backend


def test_backends_in_order_of_preference(replace):
    replace("triton", unavailable=lambda: "it is the test that says so")
    replace("reference", unavailable=lambda: None)
    found = fusedrnn.backends()
    assert list(found) == NAMES
    assert found["triton"] == "it is the test that says so"
    assert found["aten"] is None
    assert found["reference"] is None


@pytest.mark.parametrize("name", [name for name, reason in fusedrnn.backends().items() if reason is None])
def test_what_is_asked_for_runs(spies, name):
    lstm, x = lstm_and_input(num_layers=2)
    with fusedrnn.use_backend(name):
        lstm(x)
    assert set(spies["forward"]) == {name}


@pytest.mark.parametrize("name", [name for name, reason in fusedrnn.backends().items() if reason is not None])
def test_what_is_not_available_cannot_be_asked_for(name):
    with pytest.raises(RuntimeError) as error, fusedrnn.use_backend(name):
        pass
    assert str(error.value) == f"backend {name!r} was asked for and is not available: {fusedrnn.backends()[name]}"


def test_nesting_and_restoring(spies):
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("reference"):
        lstm(x)
        with fusedrnn.use_backend("aten"):
            lstm(x)
            with fusedrnn.use_backend("reference"):
                lstm(x)
            lstm(x)
        lstm(x)
        with fusedrnn.use_backend("auto"):
            lstm(x)
        lstm(x)
    lstm(x)
    first = fusedrnn.explain(lstm, x).backend
    assert spies["forward"] == ["reference", "aten", "reference", "aten", "reference", first, "reference", first]


def test_restoring_after_an_exception(spies):
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("aten"):
        with pytest.raises(KeyError, match="inside"), fusedrnn.use_backend("reference"):
            raise KeyError("inside")
        lstm(x)
    assert spies["forward"] == ["aten"]


def asked_in_a_thread(wait_for, opened, backend, close, found):
    """Opens `backend` once `wait_for` is set, sets `opened`, and notes what it is given there until `close` is set."""
    lstm, x = fusedrnn.LSTM(3, 4), torch.ones(5, 2, 3)
    wait_for.wait(60)
    with fusedrnn.use_backend(backend):
        opened.set()
        close.wait(60)
        found[backend] = [
            fusedrnn.explain(lstm, x).backend,
            dispatch.select(dispatch.Problem("cpu", torch.float32, 5, 2, 3, 4, 4, 1)),
            dispatch.is_plain_on_cpu(x),
        ]


def seen_elsewhere():
    """What is asked for in a thread that has asked for nothing."""
    seen = []
    thread = Thread(target=lambda: seen.append(dispatch.forced()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("first_closes_first", [True, False])
def test_contexts_that_overlap_in_two_threads(first_closes_first):
    """Each thread has its own; what they leave behind is what was there before. One that has none sees the newest."""
    before, found = seen_elsewhere(), {}
    start, one, two, close_one, close_two = (Event() for _ in range(5))
    start.set()
    first = Thread(target=asked_in_a_thread, args=(start, one, "reference", close_one, found))
    second = Thread(target=asked_in_a_thread, args=(one, two, "aten", close_two, found))
    order = [(close_one, first), (close_two, second)]
    first.start()
    second.start()
    assert two.wait(60)
    seen = [seen_elsewhere()]
    for close, thread in order if first_closes_first else reversed(order):
        with fusedrnn.use_backend("cpu"):  # of this thread, whatever the others have asked for
            seen.append(dispatch.forced())
        close.set()
        thread.join()
        seen.append(seen_elsewhere())
    assert seen == ["aten", "cpu", "aten" if first_closes_first else "reference", "cpu", before]
    assert found == {name: [name, name, False] for name in ("reference", "aten")}


def test_contexts_that_overlap_in_two_tasks():
    async def task(name, mine, other):
        with fusedrnn.use_backend(name):
            mine.set()
            await other.wait()
            return dispatch.forced()

    async def both():
        one, two = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("reference", one, two), task("aten", two, one))

    before = dispatch.forced()
    assert asyncio.run(both()) == ["reference", "aten"]
    assert dispatch.forced() == before


def test_contexts_of_one_thread_that_do_not_end_in_the_order_they_began():
    before, first, second = dispatch.forced(), fusedrnn.use_backend("reference"), fusedrnn.use_backend("aten")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced() == "aten"
    second.__exit__(None, None, None)
    assert dispatch.forced() == before


@pytest.mark.parametrize("name", ["tpu", "CPU", "", " cpu"], ids=repr)
def test_unknown_name(spies, name):
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("reference"):
        with pytest.raises(ValueError) as error, fusedrnn.use_backend(name):
            pass
        lstm(x)
    assert str(error.value) == f"unknown backend {name!r}: expected one of auto, {', '.join(NAMES)}"
    assert spies["forward"] == ["reference"]


def test_an_unavailable_name_changes_nothing(spies, replace):
    replace("triton", unavailable=lambda: "it is the test that says so")
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("reference"):
        with pytest.raises(RuntimeError, match="it is the test that says so"), fusedrnn.use_backend("triton"):
            pass
        lstm(x)
    assert spies["forward"] == ["reference"]


def test_holds_in_other_threads(spies):
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("reference"):
        thread = Thread(target=lstm, args=(x,))
        thread.start()
        thread.join()
    assert spies["forward"] == ["reference"]


@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS.keys())
def test_aten_cannot_do_more_than_nn_lstm(spies, options):
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("aten"):
        with pytest.raises(RuntimeError) as error:
            lstm(x, **options)
        explanation = fusedrnn.explain(lstm, x, **options)
    (name,) = options
    assert str(error.value) == f"backend 'aten' was asked for and cannot run: torch's own LSTM has no {name}"
    assert explanation.backend is None
    assert explanation.reasons["aten"] == f"torch's own LSTM has no {name}"
    assert spies["forward"] == []


def test_aten_names_all_that_it_lacks():
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("aten"), pytest.raises(RuntimeError, match=r"no lengths, reset, return_states$"):
        lstm(x, lengths=torch.tensor([3, 1]), **EXTRAS["reset"], return_states=True)


def test_a_backend_that_is_asked_for_is_never_replaced(spies, replace):
    replace("cpu", unavailable=lambda: None, unsupported=lambda problem: f"it is tired of {problem.T} steps")
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="backend 'cpu' was asked for and cannot run: it is tired of 4 steps"):
            lstm(x)
        with pytest.raises(RuntimeError, match="it is tired of 1 steps"):
            fusedrnn.LSTMCell(3, 5)(x[0])
    assert spies["forward"] == []
    lstm(x)
    assert spies["forward"] == ["aten"]  # where nobody asked, the next one serves


def test_nothing_can_serve(replace):
    for name in NAMES:
        replace(name, unavailable=lambda: None, unsupported=lambda _, name=name: f"{name} says no")
    lstm, x = lstm_and_input()
    with pytest.raises(RuntimeError) as error:
        lstm(x)
    assert str(error.value) == "no backend can compute this: " + "; ".join(f"{name}: {name} says no" for name in NAMES)
    explanation = fusedrnn.explain(lstm, x)
    assert explanation.backend is None
    assert list(explanation.reasons) == NAMES
    assert str(explanation).splitlines()[0] == "no backend"


@pytest.mark.parametrize("then", [*OPERATORS, "aten"])
@pytest.mark.parametrize("first", OPERATORS)
def test_backward_stays_with_the_backend_of_the_forward(spies, first, then):
    lstm, x = lstm_and_input(num_layers=2)
    with fusedrnn.use_backend(first):
        y, _ = lstm(x)
    with fusedrnn.use_backend(then):
        y.sum().backward()
    assert spies == {"forward": [first] * 2, "backward": [first] * 2}


# explain

FORMS = {
    "plain": (
        fusedrnn.LSTM(3, 5),
        (torch.randn(4, 2, 3),),
        {},
        Problem("cpu", torch.float32, 4, 2, 3, 5, 5, 1, train=True),
    ),
    "nn.LSTM": (
        nn.LSTM(3, 5),
        (torch.randn(4, 2, 3),),
        {},
        Problem("cpu", torch.float32, 4, 2, 3, 5, 5, 1, train=True),
    ),
    "compilable": (
        fusedrnn.CompilableLSTM(3, 5, bidirectional=True),
        (torch.randn(4, 2, 3),),
        {},
        Problem("cpu", torch.float32, 4, 2, 3, 5, 5, 2, train=True),
    ),
    "batch_first": (
        fusedrnn.LSTM(3, 5, proj_size=2, batch_first=True),
        (torch.randn(2, 4, 3),),
        {},
        Problem("cpu", torch.float32, 4, 2, 3, 5, 2, 1, train=True),
    ),
    "unbatched": (
        fusedrnn.LSTM(3, 5),
        (torch.randn(4, 3),),
        {},
        Problem("cpu", torch.float32, 4, 1, 3, 5, 5, 1, train=True),
    ),
    "unbatched-batch_first": (
        fusedrnn.LSTM(3, 5, batch_first=True),
        (torch.randn(4, 3),),
        {},
        Problem("cpu", torch.float32, 4, 1, 3, 5, 5, 1, train=True),
    ),
    "float64-hx": (
        fusedrnn.LSTM(3, 5, dtype=torch.float64),
        (torch.randn(4, 2, 3).double(), (torch.zeros(1, 2, 5).double(), torch.zeros(1, 2, 5).double())),
        {},
        Problem("cpu", torch.float64, 4, 2, 3, 5, 5, 1, train=True),
    ),
    "packed": (
        fusedrnn.LSTM(3, 5, batch_first=True),
        (pack_sequence([torch.randn(4, 3), torch.randn(2, 3), torch.randn(1, 3)]),),
        {},
        Problem("cpu", torch.float32, 4, 3, 3, 5, 5, 1, packed=True, train=True),
    ),
    "packed-equal": (
        fusedrnn.LSTM(3, 5),
        (pack_sequence([torch.randn(4, 3), torch.randn(4, 3)]),),
        {},
        Problem("cpu", torch.float32, 4, 2, 3, 5, 5, 1, train=True),
    ),
    "lengths": (
        fusedrnn.LSTM(3, 5),
        (torch.randn(4, 2, 3),),
        EXTRAS["lengths"],
        Problem("cpu", torch.float32, 4, 2, 3, 5, 5, 1, lengths=True, train=True),
    ),
    "reset": (
        fusedrnn.LSTM(3, 5),
        (torch.randn(4, 2, 3),),
        EXTRAS["reset"],
        Problem("cpu", torch.float32, 4, 2, 3, 5, 5, 1, reset=True, train=True),
    ),
    "states": (
        fusedrnn.LSTM(3, 5),
        (torch.randn(4, 2, 3),),
        EXTRAS["return_states"],
        Problem("cpu", torch.float32, 4, 2, 3, 5, 5, 1, states=True, train=True),
    ),
    "layers": (
        fusedrnn.LSTM(3, 5, num_layers=2).requires_grad_(False),
        (torch.randn(4, 2, 3),),
        {},
        Problem("cpu", torch.float32, 4, 2, 3, 5, 5, 1, L=2),
    ),
    "cell": (
        fusedrnn.LSTMCell(3, 5),
        (torch.randn(2, 3),),
        {},
        Problem("cpu", torch.float32, 1, 2, 3, 5, 5, 1, train=True, step=True),
    ),
    "nn.LSTMCell": (
        nn.LSTMCell(3, 5),
        (torch.randn(2, 3),),
        {},
        Problem("cpu", torch.float32, 1, 2, 3, 5, 5, 1, train=True, step=True),
    ),
    "cell-unbatched": (
        fusedrnn.LSTMCell(3, 5),
        (torch.randn(3), (torch.zeros(5), torch.zeros(5))),
        {},
        Problem("cpu", torch.float32, 1, 1, 3, 5, 5, 1, train=True, step=True),
    ),
}


@pytest.mark.parametrize(("module", "args", "options", "problem"), FORMS.values(), ids=FORMS.keys())
def test_explain_sees_the_problem(spies, module, args, options, problem):
    explanation = fusedrnn.explain(module, *args, **options)
    assert explanation.problem == problem
    assert spies["forward"] == []  # nothing is computed


@pytest.mark.parametrize("asked", ["auto", *(name for name, why in fusedrnn.backends().items() if why is None)])
@pytest.mark.parametrize(
    "form", [name for name, (module, *_) in FORMS.items() if type(module).__module__.startswith("fusedrnn")]
)
def test_explain_tells_what_runs(spies, monkeypatch, form, asked):
    """The problem that is explained is the one that the call selects a backend for, and so is the backend."""
    module, args, options, problem = FORMS[form]
    select, selected = dispatch.select, []
    monkeypatch.setattr(fast_path, "attempt", lambda *_, **__: None)  # it has no problem to show
    monkeypatch.setattr(dispatch, "select", lambda problem: selected.append(problem) or select(problem))
    with fusedrnn.use_backend(asked):
        explanation = fusedrnn.explain(module, *args, **options)
        if explanation.backend is None:
            with pytest.raises(RuntimeError, match=explanation.reasons[asked]):
                module(*args, **options)
        else:
            module(*args, **options)
    assert selected == [problem]
    assert set(spies["forward"]) == ({explanation.backend} - {None})


@pytest.mark.parametrize("asked", ["auto", *(name for name, why in fusedrnn.backends().items() if why is None)])
def test_explain_says_why_not_the_others(asked):
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend(asked):
        explanation = fusedrnn.explain(lstm, x)
    assert {explanation.backend, *explanation.reasons} == set(NAMES)
    assert explanation.backend not in explanation.reasons
    for name, reason in fusedrnn.backends().items():
        if reason is not None:
            assert explanation.reasons[name] == reason
        elif name != explanation.backend:
            why = f"{explanation.backend} is preferred" if asked == "auto" else f"{asked} was asked for"
            assert explanation.reasons[name] == why
    first, *others = str(explanation).splitlines()
    assert first == f"{explanation.backend}: {explanation.plan}"
    assert sorted(line for line in others if line.startswith("  not ")) == sorted(
        f"  not {name}: {reason}" for name, reason in explanation.reasons.items()
    )


def test_explain_names_the_reason_of_a_backend_that_was_asked_for():
    lstm, x = lstm_and_input()
    with fusedrnn.use_backend("aten"):
        text = str(fusedrnn.explain(lstm, x, return_states=True))
    assert text.splitlines()[0] == "no backend"
    assert "  not aten: torch's own LSTM has no return_states" in text.splitlines()
    assert "  not reference: aten was asked for" in text.splitlines()


@pytest.mark.skipif("cpu" not in OPERATORS, reason=str(ops.cpu_unavailable))
def test_plan_of_the_cpu_backend_is_the_kernels_own():
    lstm, x = lstm_and_input(bidirectional=True)
    with fusedrnn.use_backend("cpu"):
        assert fusedrnn.explain(lstm, x).plan == torch.ops.fusedrnn.cpu_plan("lstm", 4, 2, 3, 5, 5, 2, x.dtype) != ""


def test_explain_under_autocast():
    lstm, x = lstm_and_input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fusedrnn.explain(lstm, x).problem.dtype == torch.bfloat16
        assert fusedrnn.explain(lstm.double(), x.double()).problem.dtype == torch.float64


@pytest.mark.parametrize(
    ("cls", "options", "cell", "step"),
    [
        (nn.GRU, {"bidirectional": True}, "gru", False),
        (nn.RNN, {}, "rnn_tanh", False),
        (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}, "rnn_relu", False),
        (nn.GRUCell, {}, "gru", True),
        (nn.RNNCell, {}, "rnn_tanh", True),
        (nn.RNNCell, {"nonlinearity": "relu"}, "rnn_relu", True),
    ],
)
def test_explain_tells_what_runs_of_other_cells(spies, cls, options, cell, step):
    """Of fusedrnn's module what ran, with hx as a tensor; and why no kernel that is written for other cells did."""
    theirs = cls(3, 5, **options)
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    x = torch.randn(2, 3) if step else torch.randn(4, 2, 3)
    rows = theirs.num_layers * (2 if theirs.bidirectional else 1) if not step else 0
    hx = torch.randn(2, 5) if step else torch.randn(rows, 2, 5)
    for module in (theirs, ours):
        for state in (None, hx):
            told = fusedrnn.explain(module, x, state)
            p = told.problem
            assert (p.cell, p.step, p.T, p.B, p.H, p.P) == (cell, step, 1 if step else 4, 2, 5, 5)
            assert set(told.reasons) == set(NAMES) - {told.backend}
            for name in ("cuda", "triton"):
                if dispatch.TABLE[name].unavailable() is None and cell not in dispatch.TABLE[name].cells:
                    assert told.reasons[name] == f"it has no kernel for the cell {cell}"
    told = fusedrnn.explain(ours, x, hx)
    if told.backend == "aten":
        assert told.plan == f"torch's own {cls.__name__.removesuffix('Cell')} for this device"
        ours(x, hx)
        assert spies["forward"] == ["aten"]
    if not step:
        extra = fusedrnn.explain(ours, x, hx, return_states=True)
        assert extra.backend != "aten"
        assert extra.reasons["aten"] == f"torch's own {cls.__name__} has no return_states"


def test_a_backend_without_a_kernel_for_a_cell_is_refused_by_name(replace):
    replace("cpu", unavailable=lambda: None, cells=frozenset({"lstm"}))
    module, x = fusedrnn.GRU(3, 5), torch.randn(4, 2, 3)
    with fusedrnn.use_backend("cpu"), pytest.raises(RuntimeError, match="it has no kernel for the cell gru"):
        module(x)


@pytest.mark.parametrize(
    ("module", "input", "text"),
    [
        (nn.Linear(3, 5), torch.randn(4, 2, 3), "module must be an LSTM, GRU or RNN, or a cell of one, got Linear"),
        (
            nn.RNNCell(3, 5, nonlinearity="x"),
            torch.randn(2, 3),
            "module must be an LSTM, GRU or RNN, or a cell of one, got RNNCell",
        ),
        (fusedrnn.LSTM(3, 5), [1.0], "input must be a Tensor or a PackedSequence, got list"),
        (fusedrnn.LSTM(3, 5), None, "input must be a Tensor or a PackedSequence, got NoneType"),
        (fusedrnn.LSTMCell(3, 5), pack_sequence([torch.randn(4, 3)]), "input must be a Tensor, got PackedSequence"),
    ],
    ids=["Linear", "unknown", "list", "None", "packed-for-a-cell"],
)
def test_explain_refuses_other_types(module, input, text):
    with pytest.raises(TypeError) as error:
        fusedrnn.explain(module, input)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("module", "input", "text"),
    [
        (fusedrnn.LSTM(3, 5), torch.randn(3), "LSTM: Expected input to be 2D or 3D, got 1D instead"),
        (fusedrnn.LSTM(3, 5), torch.randn(1, 4, 2, 3), "LSTM: Expected input to be 2D or 3D, got 4D instead"),
        (fusedrnn.LSTMCell(3, 5), torch.randn(4, 2, 3), "LSTMCell: Expected input to be 1D or 2D, got 3D instead"),
        (nn.GRU(3, 5), torch.randn(3), "GRU: Expected input to be 2D or 3D, got 1D instead"),
        (nn.RNNCell(3, 5), torch.randn(4, 2, 3), "RNNCell: Expected input to be 1D or 2D, got 3D instead"),
    ],
    ids=["1-D", "4-D", "cell-3-D", "GRU", "RNNCell"],
)
def test_explain_refuses_other_dimensions(module, input, text):
    with pytest.raises(ValueError) as error:
        fusedrnn.explain(module, input)
    assert str(error.value) == text


# The environment, and an installation without the native library: each in a Python of its own


FIRST_USE = """
import json, torch, fusedrnn
lstm, x = fusedrnn.LSTM(3, 5), torch.randn(4, 2, 3)
def attempt(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, str(error)]
def run():
    return type(lstm(x)[0].grad_fn).__name__
def explain():
    return fusedrnn.explain(lstm, x).backend
def inside():
    with fusedrnn.use_backend("aten"):
        return explain()
print(json.dumps([attempt(run), attempt(explain), attempt(inside), list(fusedrnn.backends())]))
"""


@pytest.mark.parametrize(("value", "ours"), [("reference", True), ("aten", False)], ids=["reference", "aten"])
def test_environment_names_the_backend(report, tmp_path, value, ours):
    ran, explained, inside, _ = report(FIRST_USE, tmp_path, FUSEDRNN_BACKEND=value)
    assert ("LayerFunction" in ran) == ours
    assert explained == value
    assert inside == "aten"


@pytest.mark.parametrize("value", ["", "auto"], ids=repr)
def test_environment_that_leaves_the_choice(report, tmp_path, value):
    lstm, x = lstm_and_input()
    explained = report(FIRST_USE, tmp_path, FUSEDRNN_BACKEND=value)[1]
    assert explained == fusedrnn.explain(lstm, x).backend


def test_environment_with_an_unknown_name(report, tmp_path):
    ran, explained, inside, names = report(FIRST_USE, tmp_path, FUSEDRNN_BACKEND="tpu")
    assert ran == explained == ["ValueError", f"unknown backend 'tpu': expected one of auto, {', '.join(NAMES)}"]
    assert inside == "aten"
    assert names == NAMES


def test_environment_with_a_backend_that_cannot_serve(report, tmp_path):
    """The input is on the CPU; on most machines there is no such backend either."""
    ran, explained, _, _ = report(FIRST_USE, tmp_path, FUSEDRNN_BACKEND="cuda")
    kind, text = ran
    assert kind == "RuntimeError"
    assert text.startswith("backend 'cuda' was asked for and cannot run: ")
    assert explained is None


WITHOUT_LIBRARY = """
import json, torch, fusedrnn
from torch import nn
theirs, ours = nn.LSTM(3, 5, 2, bidirectional=True).double(), fusedrnn.LSTM(3, 5, 2, bidirectional=True).double()
ours.load_state_dict(theirs.state_dict())
x = torch.randn(4, 2, 3, dtype=torch.float64)
def run(module, *args, **options):
    y, (hn, cn) = module(x, *args, **options)
    return [y, hn, cn, *torch.autograd.grad(y.sum() + cn.sum(), list(module.parameters()))]
def same(some, others):
    for a, b in zip(some, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)  # two orders of summation, in float64
def forced():
    with fusedrnn.use_backend("cpu"):
        pass
expected = run(theirs)
same(run(ours), expected)
same(run(ours, lengths=torch.tensor([4, 4])), expected)
cell, baseline = fusedrnn.LSTMCell(3, 5).double(), nn.LSTMCell(3, 5).double()
cell.load_state_dict(baseline.state_dict())
same(cell(x[0]), baseline(x[0]))
try:
    forced()
    error = None
except Exception as raised:
    error = [type(raised).__name__, str(raised)]
explained = [fusedrnn.explain(ours, x).backend, fusedrnn.explain(ours, x, lengths=torch.tensor([4, 4])).backend]
print(json.dumps({"file": fusedrnn.__file__, "reason": fusedrnn.backends()["cpu"], "explained": explained,
                  "error": error}))
"""


@pytest.mark.parametrize(
    ("info", "library", "expected"),
    [
        (None, None, "the native library fusedrnn/_cpu is not installed: it was not built. "),
        (
            {"failures": {"cpu": "the build failed (no compiler far and wide)"}},
            None,
            "the native library fusedrnn/_cpu is not installed: the build failed (no compiler far and wide). ",
        ),
        ({"failures": {}}, b"not a library", "_cpu.abi3.so cannot be loaded: "),
    ],
    ids=["not-built", "build-failed", "cannot-be-loaded"],
)
def test_without_the_native_library(report, tmp_path, info, library, expected):
    """The reason is kept, and everything works: by torch's own LSTM where that can do it, else by the reference."""
    package = tmp_path / "fusedrnn"
    for name, target in (("fusedrnn", package), ("fusedrnn.kernels", package / "kernels")):
        target.mkdir()
        for file in Path(find_spec(name).origin).parent.iterdir():
            if file.suffix in (".py", ".def"):
                shutil.copy(file, target)
    if info is not None:
        (package / "_build.json").write_text(json.dumps(info))
    if library is not None:
        (package / "_cpu.abi3.so").write_bytes(library)
    found = report(WITHOUT_LIBRARY, tmp_path, PYTHONPATH=str(tmp_path))
    assert Path(found["file"]).parent == package
    assert found["reason"].startswith(expected)
    assert found["error"] == ["RuntimeError", f"backend 'cpu' was asked for and is not available: {found['reason']}"]
    assert found["explained"] == ["aten", "reference"]


@pytest.mark.parametrize("name", ["auto", "cpu", "aten", "reference"])
@pytest.mark.parametrize("dtype", dispatch.FLOATING, ids=str)
def test_plain_on_the_cpu_is_where_the_cpu_backend_is_selected(name, dtype):
    x = torch.zeros(2, 3, 4, dtype=dtype)
    with fusedrnn.use_backend(name):
        selected = dispatch.select(Problem("cpu", dtype, 2, 3, 4, 5, 5, 1)) == "cpu"
        assert dispatch.is_plain_on_cpu(x) == selected
        with torch.autocast("cpu"):
            assert not dispatch.is_plain_on_cpu(x)


def test_the_fast_path_gives_the_same_bits(monkeypatch):
    """Layers, both directions, projections, batch first, and a cell: training, inference, and the long way."""
    results, real = [], fast_path.attempt

    def spy(*arguments, **dims):
        results.append(real(*arguments, **dims))
        return results[-1]

    def gradients(result, of):
        y, (h, c) = result
        return torch.autograd.grad(y.sin().sum() + h.sum() + (c * c).sum(), of)

    for layers, options in itertools.product(
        (1, 3), ({}, {"bidirectional": True, "proj_size": 2}, {"batch_first": True, "bias": False})
    ):
        lstm, x = fusedrnn.LSTM(3, 5, layers, **options), torch.randn(4, 2, 3, requires_grad=True)
        B = 4 if lstm.batch_first else 2
        rows = layers * (2 if lstm.bidirectional else 1)
        h0, c0 = torch.randn(rows, B, lstm.proj_size or 5), torch.randn(rows, B, 5)
        for hx in (None, (h0.requires_grad_(), c0.requires_grad_())):
            leaves = [x, *lstm.parameters(), *(hx or ())]
            with monkeypatch.context() as patch:
                patch.setattr(fast_path, "attempt", lambda *_, **__: None)
                y, state = lstm(x, hx)
                expected = [y, *state, *gradients((y, state), leaves)]
            with monkeypatch.context() as patch:
                patch.setattr(fast_path, "attempt", spy)
                y, state = lstm(x, hx)
                trained = [y, *state, *gradients((y, state), leaves)]
                with torch.no_grad():
                    y, state = lstm(x, hx)
            for ours, theirs in zip(trained, expected, strict=True):
                assert torch.equal(ours, theirs)
            for ours, theirs in zip([y, *state], expected, strict=False):
                assert torch.equal(ours, theirs)
                assert not ours.requires_grad
    cell, x = fusedrnn.LSTMCell(3, 5), torch.randn(2, 3, requires_grad=True)
    h, c = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    for state in ((h, c), None):
        leaves = [x, *cell.parameters(), *(state or ())]
        with monkeypatch.context() as patch:
            patch.setattr(fast_path, "attempt", lambda *_, **__: None)
            new = cell(x, state)
            expected = [*new, *gradients((new[0], new), leaves)]
        with monkeypatch.context() as patch:
            patch.setattr(fast_path, "attempt", spy)
            new = cell(x, state)
            trained = [*new, *gradients((new[0], new), leaves)]
            with torch.no_grad():
                inferred = cell(x, state)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained, expected, strict=True))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(inferred, expected, strict=False))
    if "cpu" in OPERATORS:
        assert [result is not None for result in results] == [True, True] * 14


@pytest.mark.skipif("cpu" not in OPERATORS, reason=str(ops.cpu_unavailable))
def test_what_needs_no_gradient_reserves_nothing(monkeypatch):
    """With autograd on, but nothing that needs a gradient."""
    monkeypatch.setattr(stack, "run", None)
    lstm = fusedrnn.LSTM(3, 5, 2).requires_grad_(False)
    y, (h, c) = lstm(torch.randn(4, 2, 3))
    assert not any(tensor.requires_grad for tensor in (y, h, c))


@pytest.mark.skipif("cpu" not in OPERATORS, reason=str(ops.cpu_unavailable))
@pytest.mark.parametrize("layers", [1, 2])
def test_states_of_too_many_layers_are_refused_in_training(layers):
    lstm, x = fusedrnn.LSTM(3, 5, layers), torch.randn(4, 2, 3)
    for rows in (layers + 1, 2 * layers):
        hx = torch.randn(rows, 2, 5), torch.randn(rows, 2, 5)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
            lstm(x, hx)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
            lstm(x, (hx[0][:layers], hx[1]))


def test_the_fast_path_of_inference_keeps_dropout():
    lstm, x = fusedrnn.LSTM(3, 5, 2, dropout=0.5), torch.randn(4, 2, 3)
    with torch.no_grad():
        torch.manual_seed(0)
        first = lstm(x)[0]
        assert not torch.equal(first, lstm(x)[0])
        torch.manual_seed(0)
        assert torch.equal(first, lstm(x)[0])
        assert torch.equal(lstm.eval()(x)[0], lstm(x)[0])


@pytest.mark.skipif("cpu" not in OPERATORS, reason=str(ops.cpu_unavailable))
@torch.no_grad()
def test_inference_of_layers_that_do_not_fit_each_other():
    """Each is a layer by itself, but states of all of them have one size."""
    small, large = nn.LSTM(3, 5, 1), nn.LSTM(5, 7, 1)
    weights = [*small._flat_weights, *large._flat_weights]
    with pytest.raises(RuntimeError, match="one size"):
        ops.cpu_infer("lstm", torch.randn(4, 2, 3), weights, 2, False, None, None)
    with pytest.raises(RuntimeError, match="as many for each of 3 layers"):
        ops.cpu_infer("lstm", torch.randn(4, 2, 3), weights, 3, False, None, None)
    with pytest.raises(RuntimeError, match="h0"):
        ops.cpu_infer("lstm", torch.randn(4, 2, 3), weights[:4], 1, False, torch.randn(2, 2, 5), None)
    with pytest.raises(RuntimeError, match="c0"):
        ops.cpu_infer("lstm", torch.randn(2, 3), weights[:4], 1, False, None, torch.randn(1, 2, 5))
    with pytest.raises(RuntimeError, match="3 and 2 dimensions"):
        ops.cpu_infer("lstm", torch.randn(2, 3), [*weights[:4], *weights[:4]], 1, True, None, None)
    with pytest.raises(ValueError, match="must have shape"):
        functional.lstm(torch.randn(4, 2, 3), weights, num_layers=2)


@pytest.mark.parametrize("extra", ["lengths", "reset", "states"])
def test_a_python_loop_on_a_gpu_is_warned_of(extra):
    problem = Problem("cuda", torch.float32, 4, 2, 3, 4, 4, 1, **{extra: True})
    with pytest.warns(RuntimeWarning, match=r"Python loop over the time steps on cuda.*triton: .*FUSEDRNN_BACKEND"):
        assert dispatch.select(problem) == "reference"


@pytest.mark.parametrize(("device", "asked"), [("cpu", "auto"), ("cuda", "reference")])
def test_nobody_is_warned_of_what_was_asked_for_or_is_not_on_a_gpu(device, asked, recwarn):
    with fusedrnn.use_backend(asked):
        dispatch.select(Problem(device, torch.float32, 4, 2, 3, 4, 4, 1, lengths=True))
    assert not recwarn.list
