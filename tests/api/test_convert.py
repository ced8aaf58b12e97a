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
from fusedrnn.module import BASES

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


class Foreign(nn.RNNBase):
    """A layer of somebody's own, which is none of torch's."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.first = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.middle = nn.Sequential(nn.Linear(10, 4), nn.ModuleList([nn.LSTMCell(4, 4)]))
        self.last = Doubled(4, 3, batch_first=True)
        self.gru = nn.GRU(3, 3)
        self.rnn_cell = nn.RNNCell(3, 3)
        self.foreign = Foreign("GRU", 3, 3)
        self.again = self.first

    def forward(self, x):
        y = self.first(torch.tanh(self.embed(x)))[0]
        y = self.middle[0](y)
        cell, h = self.middle[1][0], None
        y = torch.stack([(h := cell(step, h))[0] for step in y.unbind(1)], 1)
        y = self.gru(self.last(y)[0])[0]
        return y + self.rnn_cell(y[:, 0]).unsqueeze(1)


SWAPPED = {
    "first": "nn.LSTM -> fusedrnn.LSTM",
    "middle.1.0": "nn.LSTMCell -> fusedrnn.LSTMCell",
    "gru": "nn.GRU -> fusedrnn.GRU",
    "rnn_cell": "nn.RNNCell -> fusedrnn.RNNCell",
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
    assert (type(model.gru), type(model.rnn_cell)) == (fusedrnn.GRU, fusedrnn.RNNCell)
    assert type(model.foreign) is Foreign
    close(model(x), expected)


def test_report_says_what_was_swapped_and_what_was_left_and_why():
    model, report = Model(), Report()
    convert(model, report=report)
    package = Doubled.__module__.split(".")[0]
    last = (
        f"{package}.Doubled -> {package}.Doubled (its own forward is kept, and ours is what its super().forward finds)"
    )
    assert report.swapped == {**SWAPPED, "last": last}
    assert report.left == {"foreign": f"{package}.Foreign: fusedrnn has no class for it"}
    again = Report()
    convert(model, report=again)
    assert again.swapped == {}
    assert again.left == {
        "first": "fusedrnn.LSTM: it is fusedrnn's already",
        "middle.1.0": "fusedrnn.LSTMCell: it is fusedrnn's already",
        "last": f"{package}.Doubled: it is fusedrnn's already",
        "gru": "fusedrnn.GRU: it is fusedrnn's already",
        "rnn_cell": "fusedrnn.RNNCell: it is fusedrnn's already",
        **report.left,
    }
    text = str(report)
    assert "swapped first: nn.LSTM -> fusedrnn.LSTM" in text
    assert f"left foreign: {package}.Foreign: fusedrnn has no class for it" in text
    assert str(Report()) == "no LSTM, GRU or RNN found"


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
    assert vars(model.first).keys() - {"__module__"} == attributes.keys()  # it, torch.fx asks for
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
    monkeypatch.setattr(fusedrnn.module, "layers", lambda *args, **kwargs: seen.append(args) or (torch.ones(1), ()))
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


# A forward set on the instance


def hooked(module):
    """What accelerate's hooks and pytorch-nlp's weight dropping do: whatever forward was, wrapped in another one."""
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)
    return module


@pytest.mark.parametrize("cls", [nn.LSTM, nn.LSTMCell, Doubled])
@pytest.mark.parametrize("compilable", [False, True])
def test_a_module_whose_forward_was_set_is_left(cls, compilable):
    """It goes on calling what it was made of: torch's."""
    module, report, x = hooked(cls(3, 4)), Report(), torch.randn(5, 3)
    expected = module(x)[0]
    convert(module, compilable=compilable, report=report)
    assert type(module) is cls
    assert report.swapped == {}
    assert "a forward of its own was set on the module" in report.left[""]
    assert "convert the model before it is set" in report.left[""]
    assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.LSTMCell, Doubled])
def test_a_converted_module_whose_forward_was_set_is_not_reverted(cls):
    module, report, x = hooked(convert(cls(3, 4))), Report(), torch.randn(5, 3)
    converted, expected = type(module), module(x)[0]
    revert(module, report=report)
    assert type(module) is converted
    assert report.swapped == {}
    assert "take it away first" in report.left[""]
    assert torch.equal(module(x)[0], expected)
    del module.forward
    assert type(revert(module)) is cls
    close(module(x)[0], expected)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.LSTMCell, Doubled])
def test_what_is_left_of_a_forward_that_was_taken_away_again(cls, monkeypatch):
    """accelerate's remove_hook_from_module sets the bound method that it had found."""
    module, x = cls(3, 4), torch.randn(5, 3)
    expected = module(x)[0]
    module.forward = module.forward
    convert(module)
    assert isinstance(module, (fusedrnn.LSTM, fusedrnn.LSTMCell))
    close(module(x)[0], expected)
    with monkeypatch.context() as patched:
        name = "step" if cls is nn.LSTMCell else "layers"
        patched.setattr(fusedrnn.module, name, lambda *_, **__: (torch.zeros(1), None))
        assert module(x)[0] == 0
    close(copy.deepcopy(module)(x)[0], expected)
    revert(module)
    assert type(module) is cls
    assert torch.equal(module(x)[0], expected)


def test_a_forward_that_is_set_in_the_constructor():
    """With `patch` the module is ours before that happens."""

    class Dropping(nn.LSTM):
        def __init__(self, *args):
            super().__init__(*args)
            self.calls = 0
            old = self.forward

            def forward(*args):
                self.calls += 1
                return old(*args)

            self.forward = forward

    with patch():
        module = Dropping(3, 4)
    x = torch.randn(5, 3)
    assert isinstance(module, fusedrnn.LSTM)
    assert module(x)[0].shape == (5, 4)
    assert module.calls == 1


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


# What a class, or somebody, makes of the weights


class Adapter(nn.LSTM):
    """Low-rank changes of the weights, added to the list that nn.LSTM computes with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = nn.Parameter(0.3 * torch.randn(2, self.hidden_size))
        self.up = nn.Parameter(0.3 * torch.randn(4 * self.hidden_size, 2))

    def adapted(self, weights):
        """weight_hh_l0, the second one, with what is added to it."""
        return [weight + self.up @ self.down if k == 1 else weight for k, weight in enumerate(weights)]


class AsProperty(Adapter):
    @property
    def _flat_weights(self):
        weights = self.__dict__["_listed"]
        return self.adapted(weights) if "down" in self._parameters else weights

    @_flat_weights.setter
    def _flat_weights(self, weights):
        self.__dict__["_listed"] = weights


class AtEveryForward(Adapter):
    def _update_flat_weights(self):
        self._flat_weights = self.adapted([getattr(self, name) for name in self._flat_weights_names])


class AtTheStart(Adapter):
    """Makes the list where nn.LSTM does: nn.LSTM keeps it, with its graph, until a weight is another tensor."""

    def _init_flat_weights(self):
        super()._init_flat_weights()
        if "down" in self._parameters:
            self._flat_weights = self.adapted(self._flat_weights)


class ByName(Adapter):
    def __getattr__(self, name):
        weight = super().__getattr__(name)
        return weight + self.up @ self.down if name == "weight_hh_l0" and "down" in self._parameters else weight


class Masked(nn.LSTM):
    """A property of the name of a parameter; the class is given to a module that has been built."""

    @property
    def weight_hh_l0(self):
        return 0.5 * self._parameters["weight_hh_l0"]


class MaskedCell(nn.LSTMCell):
    @property
    def weight_ih(self):
        return 0.5 * self._parameters["weight_ih"]


def masked(cls, module):
    module.__class__ = cls
    return module


COMPUTED = {
    "property": lambda: AsProperty(3, 4),
    "at every forward": lambda: AtEveryForward(3, 4),
    "at the start": lambda: AtTheStart(3, 4).double().float(),
    "by name": lambda: ByName(3, 4),
    "masked": lambda: masked(Masked, nn.LSTM(3, 4)),
    "masked cell": lambda: masked(MaskedCell, nn.LSTMCell(3, 4)),
}


@pytest.mark.parametrize("build", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_a_class_computes(build):
    """They are computed with, and what they are made of gets gradients: those that nn.LSTM gives."""
    torch.manual_seed(1)
    theirs, x = build(), torch.randn(5, 3)
    torch.manual_seed(1)
    ours, report = build(), Report()
    convert(ours, report=report)
    assert list(report.swapped) == [""]
    outputs = [module(x)[0] for module in (theirs, ours)]
    plain = nn.LSTM(3, 4) if isinstance(theirs, nn.LSTM) else nn.LSTMCell(3, 4)
    plain.load_state_dict(theirs.state_dict(), strict=False)
    assert not torch.allclose(plain(x)[0], outputs[0], atol=1e-3)
    close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    assert all(p.grad is not None for p in theirs.parameters())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(mine.grad, other.grad)


@pytest.mark.parametrize("convert_it", [lambda m: m, convert, lambda m: convert(m, compilable=True)])
def test_weights_that_are_put_into_the_list_by_hand(convert_it):
    """Without the attributes being told, as hypernetworks do it; nn.LSTM uses them until an attribute changes."""
    module, x = convert_it(nn.LSTM(3, 4)), torch.randn(5, 3)
    before = module(x)[0]
    other = [torch.randn_like(weight, requires_grad=True) for weight in module.parameters()]
    module._flat_weights[:] = other
    expected = nn.LSTM(3, 4)
    expected._flat_weights = other
    y = module(x)[0]
    close(y, expected(x)[0])
    y.sum().backward()
    assert all(weight.grad is not None for weight in other)
    assert all(weight.grad is None for weight in module.parameters())
    module._flat_weights = [weight.detach() for weight in module._flat_weights]
    assert not module(x)[0].requires_grad
    assert not torch.allclose(y, before)
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach())
    close(module(x)[0], before)


# What a class checks


class Checks(nn.LSTM):
    def check_forward_args(self, input, hidden, batch_sizes):
        assert batch_sizes is None
        self.seen = [tuple(tensor.shape) for tensor in (input, *hidden)]
        super().check_forward_args(input, hidden, batch_sizes)


class ChecksInput(nn.LSTM):
    def check_input(self, input, batch_sizes):
        if input.abs().max() > 9:
            raise ValueError("too large")
        super().check_input(input, batch_sizes)


@pytest.mark.parametrize("batch_first", [False, True])
def test_check_forward_args_of_a_subclass_is_called(batch_first):
    theirs = Checks(3, 4, 2, bidirectional=True, batch_first=batch_first, proj_size=2)
    ours = convert(copy.deepcopy(theirs))
    states = torch.randn(4, 5, 2), torch.randn(4, 5, 4)
    for args in [
        (torch.randn(5, 5, 3),),
        (torch.randn(7, 5, 3).transpose(0, int(batch_first)),),
        (torch.randn(5, 5, 3), states),
        (torch.randn(5, 3),),
        (torch.randn(5, 3), tuple(state[:, 0] for state in states)),
    ]:
        for module in (theirs, ours):
            module.seen = None
            module(*args)
        assert ours.seen == theirs.seen
        assert ours.seen is not None
    ours.seen = None
    ours(pack_padded_sequence(torch.randn(2, 5, 3), [5, 2] if batch_first else [2, 2, 2, 2, 2], batch_first))
    assert ours.seen is None  # nn.LSTM does not check packed input either


def test_check_input_of_a_subclass_is_called():
    module = convert(ChecksInput(3, 4))
    module(torch.ones(5, 3))
    with pytest.raises(ValueError, match="too large"):
        module(10 * torch.ones(5, 3))


# torch.fx and TorchScript


class Tagger(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return self.head(y), h, c


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)

    def forward(self, x, h, c):
        h, c = self.cell(x, (h, c))
        return self.cell(x, (h, c))


MADE = {
    "convert": lambda: convert(nn.LSTM(3, 4, 2, dropout=0.5)),
    "compilable": lambda: convert(nn.LSTM(3, 4, 2, dropout=0.5), compilable=True),
    "both": lambda: convert(convert(nn.LSTM(3, 4, 2, dropout=0.5)), compilable=True),
    "built": lambda: fusedrnn.LSTM(3, 4, 2, dropout=0.5),
    "built compilable": lambda: CompilableLSTM(3, 4, 2, dropout=0.5),
    "built as a subclass": lambda: Ours(3, 4, 2, dropout=0.5),
    "patch": lambda: patched(3, 4, 2, dropout=0.5),
    "copy": lambda: copy.deepcopy(fusedrnn.LSTM(3, 4, 2, dropout=0.5)),
    "pickle": lambda: pickle.loads(pickle.dumps(CompilableLSTM(3, 4, 2, dropout=0.5))),
}


def patched(*args, **kwargs):
    with patch():
        return nn.LSTM(*args, **kwargs)


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("with_hook", [False, True])
def test_fx_calls_the_module(make, with_hook):
    """As it calls nn.LSTM: hooks run, and once; training mode and weights are those of the module when it is run."""
    model, x = Tagger(make()), torch.randn(5, 2, 3)
    if with_hook:
        model.lstm.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["lstm", "head"]
    for train in (True, False):
        outputs = []
        for module in (model.train(train), graph.train(train)):
            torch.manual_seed(0)
            outputs.append(module(x))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert not torch.equal(graph.train()(x)[0], graph.eval()(x)[0])


def test_fx_calls_the_cell():
    for model in (convert(Loop()), Loop()):
        graph = torch.fx.symbolic_trace(model)
        assert [node.op for node in graph.graph.nodes].count("call_module") == 2
        x, h, c = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
        assert all(torch.equal(a, b) for a, b in zip(graph(x, h, c), model(x, h, c), strict=True))


def test_fx_after_revert():
    model = Tagger(revert(convert(nn.LSTM(3, 4))))
    assert vars(model.lstm).keys() == vars(nn.LSTM(3, 4)).keys()
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["lstm", "head"]


def test_fx_traces_into_a_subclass_and_is_told_what_to_do():
    """Into its forward, as before; what cannot be traced is ours, as it was nn.LSTM."""
    for module in (convert(Doubled(3, 4)), convert(Leaky(3, 4))):
        with pytest.raises(TypeError, match=r"got Proxy: torch.fx traces into this module, .* is_leaf_module"):
            torch.fx.symbolic_trace(nn.Sequential(module))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [*MADE.values(), lambda: convert(nn.LSTMCell(3, 4))], ids=[*MADE, "cell"])
def test_jit_script_says_what_to_do(make):
    module = make()
    for model in (module, nn.Sequential(module)):
        with pytest.raises(NotImplementedError, match=r"torch.jit.trace or torch.export .* fusedrnn.revert\(model\)"):
            torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_script_after_revert():
    scripted = torch.jit.script(Tagger(revert(convert(nn.LSTM(3, 4)))))
    assert scripted(torch.randn(5, 2, 3))[0].shape == (5, 2, 2)


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


# GRU and RNN


class WideGRU(nn.GRU):
    """A subclass with arguments, a forward, and a check of its own."""

    def __init__(self, *args, factor=2, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor, self.checked = factor, []

    def forward(self, input, hx=None):
        y, h = super().forward(input, hx)
        return (y._replace(data=y.data * self.factor) if isinstance(y, PackedSequence) else y * self.factor), h

    def check_forward_args(self, input, hidden, batch_sizes):
        self.checked.append((tuple(input.shape), tuple(hidden.shape)))
        super().check_forward_args(input, hidden, batch_sizes)


class ReluCell(nn.RNNCell):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, nonlinearity="relu", **kwargs)

    def forward(self, input, hx=None):
        return 3 * super().forward(input, hx)


def test_a_subclass_of_a_gru(monkeypatch):
    module, x = WideGRU(3, 4, factor=3), torch.randn(5, 2, 3)
    h0, packed = torch.randn(1, 2, 4), pack_padded_sequence(x, [2, 5], enforce_sorted=False)
    results = module(x), module(x, h0), module(x[:, 0], h0[:, 0]), module(packed, h0)
    checked, module.checked = module.checked, []
    report = Report()
    convert(module, compilable=True, report=report)
    assert isinstance(module, WideGRU)
    assert isinstance(module, fusedrnn.GRU)
    assert "still an nn.GRU, because its class is derived from it" in report.swapped[""]
    for clone in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(clone) is type(module)
        clone.checked = []
        for (y, h), (expected, expected_h) in zip(
            (clone(x), clone(x, h0), clone(x[:, 0], h0[:, 0]), clone(packed, h0)), results, strict=True
        ):
            close(getattr(y, "data", y), getattr(expected, "data", expected))
            close(h, expected_h)
        assert clone.checked == checked[:3]  # what is packed is asked for by words of our own
    assert type(revert(module)) is WideGRU


def test_a_subclass_of_an_rnn_cell():
    module, x = ReluCell(3, 4), torch.randn(2, 3)
    expected = module(x, torch.ones(2, 4))
    convert(module)
    assert isinstance(module, fusedrnn.RNNCell)
    close(pickle.loads(pickle.dumps(module))(x, torch.ones(2, 4)), expected)
    assert type(revert(module)) is ReluCell


@pytest.mark.parametrize("compilable", [False, True])
def test_parametrized_gru_and_rnn(compilable):
    for cls in (nn.GRU, nn.RNN):
        module, x = parametrizations.weight_norm(cls(3, 4), "weight_hh_l0"), torch.randn(5, 2, 3)
        expected = module(x)
        original = type(module)
        convert(module, compilable=compilable)
        assert isinstance(module, cls) == (not compilable)
        for mine, other in zip(module(x), expected, strict=True):
            close(mine, other)
        module(x)[0].sum().backward()
        assert module.parametrizations.weight_hh_l0.original1.grad is not None
        assert type(revert(module)).__bases__ == original.__bases__


def test_compilable_gru_and_rnn():
    model = nn.ModuleList([nn.GRU(3, 4), nn.RNN(3, 4, nonlinearity="relu"), nn.GRUCell(3, 4)])
    convert(model, compilable=True)
    assert [type(m) for m in model] == [fusedrnn.CompilableGRU, fusedrnn.CompilableRNN, fusedrnn.GRUCell]
    assert not any(isinstance(m, (nn.GRU, nn.RNN)) for m in model)
    assert (model[1].mode, model[1].nonlinearity) == ("RNN_RELU", "relu")
    revert(model)
    assert [type(m) for m in model] == [nn.GRU, nn.RNN, nn.GRUCell]


@pytest.mark.parametrize("cls", [nn.GRU, nn.RNN, nn.GRUCell, nn.RNNCell])
def test_other_tools_and_gru(cls):
    """fx calls the module, script says what to do instead, and weights replaced by plain tensors are used."""
    model = convert(nn.Sequential(cls(3, 4)))
    assert [node.op for node in torch.fx.symbolic_trace(model).graph.nodes] == ["placeholder", "call_module", "output"]
    with pytest.raises(NotImplementedError, match="record the model"):
        torch.jit.script(model)
    module, x = model[0], torch.randn(2, 3)
    name = next(name for name, _ in module.named_parameters() if name.startswith("weight_hh"))
    weight = nn.Parameter(torch.randn_like(getattr(module, name)))
    theirs = cls(3, 4)
    theirs.load_state_dict({**module.state_dict(), name: 2 * weight.detach()})
    delattr(module, name)
    setattr(module, name, 2 * weight)
    h = torch.ones(1, 4) if cls in (nn.GRU, nn.RNN) else torch.ones(2, 4)
    y, expected = module(x, h), theirs(x, h)
    close(y[0] if isinstance(y, tuple) else y, expected[0] if isinstance(expected, tuple) else expected)
    (y[0] if isinstance(y, tuple) else y).sum().backward()
    assert weight.grad is not None


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
        assert report.left == {"foreign": f"{Foreign.__module__.split('.')[0]}.Foreign: it is not fusedrnn's"}
        assert {name: type(m) for name, m in model.named_modules()} == classes
        assert torch.equal(model(x), expected)
        for name, module in model.named_modules():
            ignored = {"_flat_weight_refs"}  # nn.LSTM makes them anew at its forward
            now = {k: id(v) for k, v in vars(module).items() if k not in ignored}
            assert now == {k: id(v) for k, v in attributes[name].items() if k not in ignored}


def test_revert_of_modules_that_were_built_as_ours():
    model = nn.Sequential(*(cls(3, 4) for cls in BASES), Ours(3, 4))
    report = Report()
    revert(model, report=report)
    assert [type(m) for m in model] == [*BASES.values(), Ours]
    package = Ours.__module__.split(".")[0]
    assert report.left == {str(len(BASES)): f"{package}.Ours: its class was written as a subclass of fusedrnn's"}
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
        grus = [nn.GRU(3, 4), TABLE["gru"](3, 4)]
        others = [nn.RNN(3, 4, 1, "relu"), nn.RNN(3, 4, nonlinearity="relu"), nn.GRUCell(3, 4), nn.RNNCell(3, 4)]
        foreign = Foreign("GRU", 3, 4)
        assert nn.LSTM is EARLY
    assert {type(m) for m in built} == {fusedrnn.LSTM}
    assert {type(m) for m in cells} == {fusedrnn.LSTMCell}
    assert {type(m) for m in grus} == {fusedrnn.GRU}
    assert [type(m) for m in others] == [fusedrnn.RNN, fusedrnn.RNN, fusedrnn.GRUCell, fusedrnn.RNNCell]
    assert [m.mode for m in others[:2]] == ["RNN_RELU"] * 2
    assert type(foreign) is Foreign
    assert all(isinstance(m, nn.LSTM) for m in built)
    now = nn.LSTM, nn.LSTMCell, EARLY, TABLE["lstm"], TABLE["cell"], nn.LSTM.__init__, nn.LSTMCell.__init__
    assert all(before is after for before, after in zip(classes, now, strict=True))
    assert [type(cls(3, 4)) for cls in (nn.LSTM, nn.GRU, nn.RNNCell)] == [nn.LSTM, nn.GRU, nn.RNNCell]


def test_patch_gives_the_weights_of_nn_lstm():
    torch.manual_seed(1)
    expected = Model()
    torch.manual_seed(1)
    with patch():
        model = Model()
    assert type(model.first) is fusedrnn.LSTM
    assert type(model.middle[1][0]) is fusedrnn.LSTMCell
    assert isinstance(model.last, fusedrnn.LSTM)
    assert (model.last.factor, type(model.gru)) == (2, fusedrnn.GRU)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    x = torch.randn(2, 6, 3)
    close(model(x), expected(x))
    revert(model)
    assert (type(model.first), type(model.last)) == (nn.LSTM, Doubled)


def test_patch_and_our_own_classes():
    with patch():
        built = [*(cls(3, 4) for cls in BASES), Ours(3, 4)]
        left = Closed(3, 4)
    assert [type(m) for m in built] == [*BASES, Ours]
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
