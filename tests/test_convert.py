"""convert, revert and patch: whatever hangs on the modules of a model survives, and the report leaves nothing out."""

import copy
import inspect
import io
import pickle
import sys
from abc import ABCMeta
from threading import Thread

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import CompilableLSTM, Report, convert, patch, revert

EARLY = nn.LSTM  # as `from torch.nn import LSTM` at the top of somebody's file
TABLE = {"lstm": nn.LSTM, "cell": nn.LSTMCell, "gru": nn.GRU}


class Doubled(nn.LSTM):
    """A subclass with a forward, an attribute and a constructor of its own."""

    def __init__(self, *args, factor=2, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        if isinstance(output, PackedSequence):
            return output._replace(data=output.data * self.factor), state
        return output * self.factor, state


class Plain(nn.LSTM):
    """A subclass that overrides nothing of the computation."""

    def first_state(self, B):
        return torch.zeros(1, B, self.hidden_size)


class Leaky(nn.LSTMCell):
    def forward(self, input, hx=None):
        h, c = super().forward(input, hx)
        return 0.9 * h, c


class Mixin:
    def describe(self):
        return f"{type(self).__name__} of {self.hidden_size}"


class Mixed(Mixin, nn.LSTM):
    pass


class Slotted(nn.LSTM):
    __slots__ = ("kept",)


class Frozen(nn.LSTM):
    """Refuses attributes once it is built."""

    def __init__(self, *args):
        super().__init__(*args)
        object.__setattr__(self, "built", True)

    def __setattr__(self, name, value):
        if getattr(self, "built", False):
            raise AttributeError(f"{name} is frozen")
        super().__setattr__(name, value)


class Closed(nn.LSTM):
    """May not be derived from."""

    def __init_subclass__(cls, **kwargs):
        raise RuntimeError("Closed is final")


class Registered(nn.LSTM, metaclass=ABCMeta):
    pass


class OwnReduce(nn.LSTM):
    """Says itself how it is pickled."""

    def __reduce__(self):
        return rebuild, (self.input_size, self.hidden_size), self.__getstate__()


def rebuild(*sizes):
    return OwnReduce(*sizes)


class Keyed(nn.LSTM):
    """Its __new__ takes arguments."""

    def __new__(cls, key="none", *args, **kwargs):
        self = super().__new__(cls)
        object.__setattr__(self, "key", key)
        return self

    def __init__(self, key, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def __getnewargs__(self):
        return (self.key,)


class Ours(fusedrnn.LSTM):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.first = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.middle = nn.Sequential(nn.Linear(10, 4), nn.ModuleList([nn.LSTMCell(4, 4)]))
        self.last = Doubled(4, 3, batch_first=True)
        self.gru = nn.GRU(3, 3)
        self.rnn_cell = nn.RNNCell(3, 3)
        self.again = self.first

    def forward(self, x):
        y = self.first(torch.tanh(self.embed(x)))[0]
        y = self.middle[0](y)
        cell, h = self.middle[1][0], None
        y = torch.stack([(h := cell(step, h))[0] for step in y.unbind(1)], 1)
        return self.last(y)[0]


SWAPPED = {
    "first": "nn.LSTM -> fusedrnn.LSTM",
    "middle.1.0": "nn.LSTMCell -> fusedrnn.LSTMCell",
}


def close(a, b):
    """float32: what two implementations of the same sums may differ by."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# convert


def test_convert_swaps_in_place_and_returns_the_model():
    model, x = Model(), torch.randn(2, 6, 3)
    expected = model(x)
    modules = dict(model.named_modules())
    report = Report()
    assert convert(model, report=report) is model
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert type(model.first) is fusedrnn.LSTM
    assert type(model.middle[1][0]) is fusedrnn.LSTMCell
    assert isinstance(model.last, Doubled)
    assert isinstance(model.last, fusedrnn.LSTM)
    assert model.again is model.first
    assert type(model.gru) is nn.GRU
    close(model(x), expected)


def test_report_says_what_was_swapped_and_what_was_left_and_why():
    model, report = Model(), Report()
    convert(model, report=report)
    package = Doubled.__module__.split(".")[0]
    last = (
        f"{package}.Doubled -> {package}.Doubled (its own forward is kept, and ours is what its super().forward finds)"
    )
    assert report.swapped == {**SWAPPED, "last": last}
    assert report.left == {
        "gru": "nn.GRU: fusedrnn has no kernels for it yet",
        "rnn_cell": "nn.RNNCell: fusedrnn has no kernels for it yet",
    }
    again = Report()
    convert(model, report=again)
    assert again.swapped == {}
    assert again.left == {
        "first": "fusedrnn.LSTM: it is fusedrnn's already",
        "middle.1.0": "fusedrnn.LSTMCell: it is fusedrnn's already",
        "last": f"{package}.Doubled: it is fusedrnn's already",
        **report.left,
    }
    text = str(report)
    assert "swapped first: nn.LSTM -> fusedrnn.LSTM" in text
    assert "left gru: nn.GRU: fusedrnn has no kernels for it yet" in text
    assert str(Report()) == "no LSTM found"


def test_a_module_that_is_itself_an_lstm():
    lstm, report = nn.LSTM(3, 4), Report()
    assert convert(lstm, report=report) is lstm
    assert type(lstm) is fusedrnn.LSTM
    assert report.swapped == {"": "nn.LSTM -> fusedrnn.LSTM"}
    assert "swapped (the model): nn.LSTM -> fusedrnn.LSTM" in str(report)


@pytest.mark.parametrize("function", [convert, revert])
@pytest.mark.parametrize("model", [None, nn.LSTM, "model", torch.zeros(1)], ids=repr)
def test_what_is_not_a_module(function, model):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got \w+"):
        function(model)


def test_optimizers_keep_working():
    twin, model = Model(), Model()
    model.load_state_dict(twin.state_dict())
    parameters = list(model.parameters())
    x, models = torch.randn(2, 6, 3), (twin, model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in models]
    for step in range(4):
        if step == 2:  # in the middle of training, with state in the optimizer
            convert(model)
        for m, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        close(mine, theirs)


def test_what_hangs_on_a_module_survives():
    model = Model().double()
    model.first.eval()
    model.first.weight_hh_l0.requires_grad_(False)
    model.first.note = "kept"
    model.first.register_buffer("mask", torch.ones(3))
    calls = []
    model.first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    model.first.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.first.register_state_dict_pre_hook(lambda *_: calls.append("state_dict"))
    model.first.weight_ih_l0.register_hook(lambda _: calls.append("gradient"))
    state, attributes = copy.deepcopy(model.state_dict()), dict(vars(model.first))
    calls.clear()

    convert(model)
    assert vars(model.first).keys() == attributes.keys()
    assert all(vars(model.first)[name] is value for name, value in attributes.items())
    assert (model.first.training, model.last.training) == (False, True)
    assert model.first.weight_hh_l0.requires_grad is False
    assert (model.first.note, model.first.mask.tolist()) == ("kept", [1.0, 1.0, 1.0])
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    calls.clear()
    model(torch.randn(2, 6, 3, dtype=torch.float64)).sum().backward()
    assert calls == ["pre", "forward", "gradient", "backward"] or calls == ["pre", "forward", "backward", "gradient"]
    assert model.first.weight_hh_l0.grad is None
    model.state_dict()
    assert calls[-1] == "state_dict"


def test_other_devices_and_dtypes():
    with torch.device("meta"):
        model = Model().bfloat16()
    convert(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.to_empty(device="cpu").float().load_state_dict(Model().state_dict())
    assert model(torch.randn(2, 6, 3)).shape == (2, 6, 3)


def test_a_model_without_lstms():
    model, report = nn.Sequential(nn.Linear(3, 3)), Report()
    assert convert(model, report=report) is model
    assert (report.swapped, report.left) == ({}, {})


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_lstm_is_left_and_named():
    model, report = nn.Sequential(torch.jit.script(nn.LSTM(3, 4)), nn.LSTM(3, 4)), Report()
    convert(model, report=report)
    assert report.left == {"0": "it is TorchScript; convert the model before it is scripted"}
    assert list(report.swapped) == ["1"]


# Subclasses


@pytest.mark.parametrize("cls", [Doubled, Plain, Mixed, Registered, Slotted, Frozen])
def test_subclass(cls):
    module, x = cls(3, 4), torch.randn(5, 2, 3)
    packed = pack_padded_sequence(x, [2, 5], enforce_sorted=False)
    expected, expected_packed = module(x)[0], module(packed)[0].data
    convert(module)
    assert type(module) is not cls
    assert isinstance(module, cls)
    assert isinstance(module, fusedrnn.LSTM)
    assert (type(module).__name__, type(module).__qualname__) == (cls.__name__, cls.__qualname__)
    assert (type(module).__module__, type(module).__doc__) == (cls.__module__, cls.__doc__)
    assert repr(module) == repr(cls(3, 4))
    close(module(x)[0], expected)
    close(module(packed)[0].data, expected_packed)


def test_subclasses_forward_finds_ours(monkeypatch):
    module, seen = convert(Doubled(3, 4, factor=3)), []
    monkeypatch.setattr(fusedrnn.module, "lstm", lambda *args, **kwargs: seen.append(args) or (torch.ones(1), ()))
    assert module(torch.zeros(5, 2, 3))[0] == 3
    assert len(seen) == 1
    with pytest.raises(TypeError):  # its own forward, and so its own signature
        module(torch.zeros(5, 2, 3), reset=torch.zeros(5, 2, dtype=torch.bool))
    assert convert(Plain(3, 4)).first_state(2).shape == (1, 2, 4)
    assert convert(Mixed(3, 4)).describe() == "Mixed of 4"


def test_subclass_of_the_cell():
    cell, x = Leaky(3, 4), torch.randn(2, 3)
    expected = cell(x)
    convert(cell)
    assert isinstance(cell, Leaky)
    assert isinstance(cell, fusedrnn.LSTMCell)
    close(cell(x), expected)
    assert type(revert(cell)) is Leaky


def test_two_modules_of_a_subclass_have_the_same_class():
    assert type(convert(Doubled(3, 4))) is type(convert(Doubled(5, 6)))


def test_slots_of_a_subclass():
    module = Slotted(3, 4)
    module.kept = 5
    assert convert(module).kept == 5
    assert type(revert(module)) is Slotted
    assert module.kept == 5


def test_a_subclass_that_cannot_be_converted_is_left():
    model, report, x = nn.Sequential(Closed(3, 4), nn.LSTM(3, 4)), Report(), torch.randn(5, 2, 3)
    expected = model[0](x)[0]
    convert(model, report=report)
    assert type(model[0]) is Closed
    assert torch.equal(model[0](x)[0], expected)
    package = Closed.__module__.split(".")[0]
    assert report.left == {"0": f"{package}.Closed: no class can be derived from it: Closed is final"}
    assert list(report.swapped) == ["1"]


@pytest.mark.parametrize("cls", [Doubled, Plain, Leaky, Registered])
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: pickle.loads(pickle.dumps(m, protocol=0)),
        lambda m: saved_and_loaded(m),
    ],
    ids=["deepcopy", "copy", "pickle", "pickle-0", "torch.save"],
)
def test_copies_of_a_converted_subclass_are_converted(cls, duplicate):
    module, x = convert(cls(3, 4)).eval(), torch.randn(2, 3)
    module.note = "kept"
    clone = duplicate(module)
    assert type(clone) is type(module)
    assert (clone.note, clone.training) == ("kept", False)
    assert torch.equal(clone(x)[0], module(x)[0])
    assert type(revert(clone)) is cls
    assert type(module) is not cls


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_subclass_that_is_pickled_in_its_own_way():
    x = torch.randn(5, 2, 3)
    for module in (convert(OwnReduce(3, 4)), convert(Keyed("a", 3, 4))):
        clone = pickle.loads(pickle.dumps(module))
        assert isinstance(clone, (OwnReduce, Keyed))
        assert getattr(clone, "key", None) == getattr(module, "key", None)
        close(clone(x)[0], module(x)[0])


def test_class_assigned_to_a_converted_module():
    module, x = convert(nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    expected = module(x)[0]

    class Tripled(fusedrnn.LSTM):
        def forward(self, *args, **kwargs):
            output, state = super().forward(*args, **kwargs)
            return 3 * output, state

    module.__class__ = Tripled
    assert torch.equal(module(x)[0], 3 * expected)


# Parametrized modules


def normed(module=None):
    return parametrizations.weight_norm(module or nn.LSTM(3, 4), "weight_hh_l0")


@pytest.mark.parametrize("compilable", [False, True])
def test_parametrized_module(compilable):
    module, x = normed(), torch.randn(5, 2, 3)
    cls, expected = type(module), module(x)[0]
    names = [name for name, _ in module.named_parameters()]
    convert(module, compilable=compilable)
    assert isinstance(module, CompilableLSTM if compilable else fusedrnn.LSTM)
    assert type(module).__name__ == cls.__name__
    assert [name for name, _ in module.named_parameters()] == names
    close(module(x)[0], expected)
    module(x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)  # the magnitude
    assert not torch.allclose(module(x)[0], expected)
    revert(module)
    assert type(module) is cls


def test_parametrized_subclass():
    module, x = normed(Doubled(3, 4)), torch.randn(5, 2, 3)
    cls, expected = type(module), module(x)[0]
    convert(module)
    close(module(x)[0], expected)
    assert isinstance(module, Doubled)
    assert isinstance(module, fusedrnn.LSTM)
    assert type(revert(module)) is cls


@pytest.mark.parametrize("cls", [nn.LSTM, Doubled])
def test_parametrized_after_the_conversion(cls):
    module, x = normed(convert(cls(3, 4))), torch.randn(5, 2, 3)
    expected = module(x)[0]
    revert(module)
    assert not isinstance(module, fusedrnn.LSTM)
    assert parametrize.is_parametrized(module, "weight_hh_l0")
    close(module(x)[0], expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is cls
    close(module(x)[0], expected)


@pytest.mark.parametrize("cls", [nn.LSTM, Doubled])
def test_parametrizations_removed_after_the_conversion(cls):
    module, x = normed(cls(3, 4)), torch.randn(5, 2, 3)
    expected = module(x)[0]
    convert(module)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert isinstance(module, fusedrnn.LSTM)
    close(module(x)[0], expected)
    assert type(revert(module)) is cls
    close(module(x)[0], expected)


def test_another_parametrization_after_the_conversion():
    module, x = convert(normed()), torch.randn(5, 2, 3)
    parametrizations.weight_norm(module, "weight_ih_l0")
    expected = module(x)[0]
    revert(module)
    assert not isinstance(module, fusedrnn.LSTM)
    close(module(x)[0], expected)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrize.remove_parametrizations(module, name)
    assert type(module) is nn.LSTM
    close(module(x)[0], expected)


def test_copy_of_a_converted_parametrized_module():
    module, x = convert(normed()), torch.randn(5, 2, 3)
    clone = copy.deepcopy(module)
    assert isinstance(clone, fusedrnn.LSTM)
    assert torch.equal(clone(x)[0], module(x)[0])


# compilable


def test_compilable():
    model, report, x = Model(), Report(), torch.randn(2, 6, 3)
    expected = model(x)
    convert(model, compilable=True, report=report)
    assert type(model.first) is CompilableLSTM
    assert isinstance(model.last, Doubled)
    assert report.swapped["first"] == "nn.LSTM -> fusedrnn.CompilableLSTM"
    assert "still an nn.LSTM" in report.swapped["last"]
    assert "torch.compile breaks the graph here" in report.swapped["last"]
    close(model(x), expected)


def test_compilable_after_an_ordinary_conversion():
    module, report = convert(nn.LSTM(3, 4)), Report()
    convert(module, compilable=True, report=report)
    assert type(module) is CompilableLSTM
    assert report.swapped == {"": "fusedrnn.LSTM -> fusedrnn.CompilableLSTM"}
    assert type(revert(module)) is nn.LSTM
    module = convert(convert(normed()), compilable=True)
    assert isinstance(module, CompilableLSTM)
    assert not isinstance(revert(module), CompilableLSTM)
    again = Report()
    convert(CompilableLSTM(3, 4), compilable=True, report=again)
    assert again.left == {"": "fusedrnn.CompilableLSTM: it is fusedrnn's already"}


# revert


def test_revert_undoes_it_exactly():
    model, x = Model(), torch.randn(2, 6, 3)
    classes = {name: type(m) for name, m in model.named_modules()}
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    expected = model(x)
    for compilable in (False, True):
        report = Report()
        convert(model, compilable=compilable)
        assert revert(model, report=report) is model
        assert set(report.swapped) == {*SWAPPED, "last"}
        assert report.swapped["middle.1.0"] == "fusedrnn.LSTMCell -> nn.LSTMCell"
        assert report.left == {"gru": "nn.GRU: it is not fusedrnn's", "rnn_cell": "nn.RNNCell: it is not fusedrnn's"}
        assert {name: type(m) for name, m in model.named_modules()} == classes
        assert torch.equal(model(x), expected)
        for name, module in model.named_modules():
            ignored = {"_flat_weight_refs"}  # nn.LSTM makes them anew at its forward
            now = {k: id(v) for k, v in vars(module).items() if k not in ignored}
            assert now == {k: id(v) for k, v in attributes[name].items() if k not in ignored}


def test_revert_of_modules_that_were_built_as_ours():
    model = nn.Sequential(fusedrnn.LSTM(3, 4), CompilableLSTM(3, 4), fusedrnn.LSTMCell(3, 4), Ours(3, 4))
    report = Report()
    revert(model, report=report)
    assert [type(m) for m in model] == [nn.LSTM, nn.LSTM, nn.LSTMCell, Ours]
    package = Ours.__module__.split(".")[0]
    assert report.left == {"3": f"{package}.Ours: its class was written as a subclass of fusedrnn's"}
    assert report.swapped["1"] == "fusedrnn.CompilableLSTM -> nn.LSTM"


# patch


def test_patch_however_the_code_came_by_the_class():
    classes = nn.LSTM, nn.LSTMCell, EARLY, TABLE["lstm"], TABLE["cell"], nn.LSTM.__init__, nn.LSTMCell.__init__
    with patch():
        built = [
            nn.LSTM(3, 4),
            EARLY(3, 4),
            getattr(nn, "LSTM")(3, 4),  # noqa: B009, it is the point
            TABLE["lstm"](3, 4),
            torch.nn.modules.rnn.LSTM(3, 4),
            sys.modules["torch.nn"].LSTM(input_size=3, hidden_size=4),
        ]
        cells = [nn.LSTMCell(3, 4), TABLE["cell"](3, 4)]
        others = [nn.GRU(3, 4), TABLE["gru"](3, 4)]
        assert nn.LSTM is EARLY
    assert {type(m) for m in built} == {fusedrnn.LSTM}
    assert {type(m) for m in cells} == {fusedrnn.LSTMCell}
    assert {type(m) for m in others} == {nn.GRU}
    assert all(isinstance(m, nn.LSTM) for m in built)
    now = nn.LSTM, nn.LSTMCell, EARLY, TABLE["lstm"], TABLE["cell"], nn.LSTM.__init__, nn.LSTMCell.__init__
    assert all(before is after for before, after in zip(classes, now, strict=True))
    assert type(nn.LSTM(3, 4)) is nn.LSTM


def test_patch_gives_the_weights_of_nn_lstm():
    torch.manual_seed(1)
    expected = Model()
    torch.manual_seed(1)
    with patch():
        model = Model()
    assert type(model.first) is fusedrnn.LSTM
    assert type(model.middle[1][0]) is fusedrnn.LSTMCell
    assert isinstance(model.last, fusedrnn.LSTM)
    assert (model.last.factor, type(model.gru)) == (2, nn.GRU)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    x = torch.randn(2, 6, 3)
    close(model(x), expected(x))
    revert(model)
    assert (type(model.first), type(model.last)) == (nn.LSTM, Doubled)


def test_patch_and_our_own_classes():
    with patch():
        built = fusedrnn.LSTM(3, 4), CompilableLSTM(3, 4), fusedrnn.LSTMCell(3, 4), Ours(3, 4)
        left = Closed(3, 4)
    assert [type(m) for m in built] == [fusedrnn.LSTM, CompilableLSTM, fusedrnn.LSTMCell, Ours]
    assert type(left) is Closed


def test_patch_keeps_what_is_said_about_bad_arguments():
    with patch():
        with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
            nn.LSTM(3, 0)
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            nn.LSTM(3, 4, dropout=0.5)
        signatures = inspect.signature(nn.LSTM), inspect.signature(nn.LSTMCell)
        skipped = torch.nn.utils.skip_init(nn.LSTMCell, 3, 4)  # it looks for `device` in the signature
    assert signatures == (inspect.signature(nn.LSTM), inspect.signature(nn.LSTMCell))
    assert type(skipped) is fusedrnn.LSTMCell


def test_patch_nested_and_left_by_an_exception():
    original = nn.LSTM.__init__
    with pytest.raises(ValueError, match="num_layers"), patch(), patch():
        nn.LSTM(3, 4, 0)
    assert nn.LSTM.__init__ is original
    with patch():
        with patch():
            pass
        assert type(nn.LSTM(3, 4)) is fusedrnn.LSTM
    assert nn.LSTM.__init__ is original


def test_patches_that_do_not_end_in_the_order_they_began():
    original = nn.LSTM.__init__
    first, second = patch(), patch()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert type(nn.LSTM(3, 4)) is fusedrnn.LSTM
    second.__exit__(None, None, None)
    assert nn.LSTM.__init__ is original


def test_patch_in_other_threads():
    built = []
    with patch():
        thread = Thread(target=lambda: built.append(nn.LSTM(3, 4)))
        thread.start()
        thread.join()
    assert type(built[0]) is fusedrnn.LSTM
