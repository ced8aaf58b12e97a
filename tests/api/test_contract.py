"""What code finds that has one of torch's recurrent modules in its hands: constructor, attributes, parameters, pickles,
and every error.

Where the contract names the behaviour of torch's module, that is run and is the expectation.
"""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import functional
from fusedrnn.module import BASES

CLASSES = [fusedrnn.LSTM, fusedrnn.CompilableLSTM]
OTHERS = [fusedrnn.GRU, fusedrnn.CompilableGRU, fusedrnn.RNN, fusedrnn.CompilableRNN]
LAYERS = [*CLASSES, *OTHERS]
STEPS = [fusedrnn.LSTMCell, fusedrnn.GRUCell, fusedrnn.RNNCell]
INSTANCES = [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN, *STEPS]  # of the class that they stand for
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.25, "proj_size": 2},
    {"bias": False, "proj_size": 2, "bidirectional": True},
]
RELU = {"nonlinearity": "relu"}
LAYERS_AND_OPTIONS = [
    *((cls, options) for cls in CLASSES for options in OPTIONS),
    *((cls, options) for cls in OTHERS for options in OPTIONS if "proj_size" not in options),
    *((cls, {**RELU, **options}) for cls in OTHERS[2:] for options in OPTIONS[:2]),
]
ids = {"ids": lambda v: getattr(v, "__name__", None) or "-".join(f"{k}={o}" for k, o in v.items()) or "default"}


@pytest.fixture(params=[True, False], ids=["grad", "no grad"])
def grad_mode(request):
    """On the CPU both take a shorter way (fast_path.attempt), which has to come to the same errors."""
    with torch.set_grad_enabled(request.param):
        yield


def outcome(call):
    """The type and text of what a call raises."""
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError(f"nothing was raised; it returned {result!r}")


# torch 2.10 asks less than later ones, and in other words.
IS_2_10 = Version(torch.__version__) < Version("2.11")


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


# Constructor


BAD_ARGUMENTS = [
    {"dropout": True},
    {"dropout": False},
    {"dropout": -0.1},
    {"dropout": 1.5},
    {"dropout": float("nan")},
    {"dropout": "a lot"},
    {"bias": 1},
    {"bias": None},
    {"batch_first": 0},
    {"input_size": 3.0},
    {"input_size": "3"},
    {"input_size": 0},
    {"input_size": -1},
    {"hidden_size": 4.0},
    {"hidden_size": 0},
    {"hidden_size": -4},
    {"num_layers": 0},
    {"num_layers": -1},
    {"proj_size": -1},
    {"proj_size": 4},
    {"proj_size": 5},
    {"proj_size": "2"},
    {"layers": 2},
    {"reset": True},
    {"nonlinearity": "sin"},
    {"dropout": True, "bias": 1},
    {"bias": 1, "input_size": 0},
]
UNASKED_BY_2_10 = [{"bias": 1}, {"bias": None}, {"batch_first": 0}, {"input_size": 0}, {"bias": 1, "input_size": 0}]


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("bad", BAD_ARGUMENTS, **ids)
def test_bad_argument_raises_what_torchs_raises(cls, bad):
    arguments = {"input_size": 3, "hidden_size": 4, **bad}
    if IS_2_10 and bad in UNASKED_BY_2_10:
        pytest.skip("torch 2.10 makes a module of it")
    assert outcome(lambda: cls(**arguments)) == outcome(lambda: BASES[cls](**arguments))


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("dropout", [0.5, 1, 1.0])
def test_dropout_with_one_layer_warns_as_torchs_does(cls, dropout):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as expected:
        BASES[cls](3, 4, dropout=dropout)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as warned:
        cls(3, 4, dropout=dropout)
    assert [str(w.message) for w in warned] == [str(w.message) for w in expected]


@pytest.mark.parametrize("cls", LAYERS)
def test_every_argument_by_position(cls):
    """The eighth, the ninth of an nn.RNN, is proj_size in all of them, whatever the signature in the docs says."""
    args = (3, 4, 2, *(["relu"] if BASES[cls] is nn.RNN else []), False, True, 0.5, True, 2, "cpu", torch.float64)
    ours, theirs = cls(*args), BASES[cls](*args)
    for name in FIELDS:
        assert getattr(ours, name) == getattr(theirs, name)
    assert [p.dtype for p in ours.parameters()] == [torch.float64] * 12
    with pytest.raises(TypeError):
        cls(*args, None)


@pytest.mark.parametrize("cls", OTHERS)
def test_a_projection_by_position_is_refused_when_it_is_called(cls):
    """nn.GRU and nn.RNN fail there as well, with a size that does not fit."""
    module = cls(3, 4, 1, *(["tanh"] if BASES[cls] is nn.RNN else []), True, False, 0.0, False, 2)
    assert "weight_hr_l0" in module.state_dict()
    with pytest.raises(ValueError, match="weights must hold 2 or 4 tensors"):
        module(zeros(5, 2, 3))
    device = (3, 4, 1, *(["tanh"] if BASES[cls] is nn.RNN else []), True, False, 0.0, False, "cpu")
    assert outcome(lambda: cls(*device)) == outcome(lambda: BASES[cls](*device))


@pytest.mark.parametrize("cls", [fusedrnn.RNN, fusedrnn.CompilableRNN])
def test_nonlinearity(cls):
    for args, options in (((), {}), ((), {"nonlinearity": "tanh"}), ((), RELU), ((1, "relu"), {}), ((1, "tanh"), {})):
        ours, theirs = cls(3, 4, *args, **options), nn.RNN(3, 4, *args, **options)
        assert (ours.mode, ours.nonlinearity) == (theirs.mode, theirs.nonlinearity)
        assert repr(ours) == repr(theirs).replace("RNN", cls.__name__)
    for args, options in (((1, "sin"), {}), ((1, None), {}), ((1, "relu"), RELU)):
        assert outcome(lambda a=args, o=options: cls(3, 4, *a, **o)) == outcome(
            lambda a=args, o=options: nn.RNN(3, 4, *a, **o)
        )


def test_nonlinearity_may_be_changed_later():
    """torch's modules read it, an nn.RNN its mode, at every call; and so does a pickle made meanwhile."""
    x = torch.randn(5, 3)
    for ours, theirs in ((fusedrnn.RNN(3, 4), nn.RNN(3, 4)), (fusedrnn.RNNCell(3, 4), nn.RNNCell(3, 4))):
        ours.load_state_dict(theirs.state_dict())
        for module in (ours, theirs):
            module.mode, module.nonlinearity = "RNN_RELU", "relu"
        torch.testing.assert_close(flat(pickle.loads(pickle.dumps(ours))(x)), flat(theirs(x)))
        for module in (ours, theirs):
            module.mode = module.nonlinearity = "GRU"
        if not IS_2_10:  # which has no words for the layer
            assert outcome(lambda m=ours: m(x)) == outcome(lambda m=theirs: m(x))


def test_signature_is_torchs():
    for cls in INSTANCES:
        theirs, own = (list(inspect.signature(c).parameters.values()) for c in (BASES[cls], cls))
        assert [p for p in own if p in theirs] == theirs
        assert all(p.kind is p.KEYWORD_ONLY and hasattr(cls, p.name) for p in own if p not in theirs)
        ours = list(inspect.signature(cls.forward).parameters.values())
        assert [p.name for p in ours[:3]] == list(inspect.signature(BASES[cls].forward).parameters)
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[3:])


@pytest.mark.parametrize("cls", LAYERS)
def test_bidirectional_is_not_checked(cls):
    assert cls(3, 4, bidirectional=1)(zeros(5, 2, 3))[0].shape == (5, 2, 8)


# Attributes


FIELDS = [
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
    "_all_weights",
    "_flat_weights_names",
    "training",
]


@pytest.mark.parametrize(("cls", "options"), LAYERS_AND_OPTIONS, **ids)
def test_attributes(cls, options):
    ours, theirs = cls(3, 4, **options), BASES[cls](3, 4, **options)
    for name in FIELDS:
        assert getattr(ours, name) == getattr(theirs, name)
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    parameters = dict(ours.named_parameters())
    assert [[id(w) for w in layer] for layer in ours.all_weights] == [
        [id(parameters[name]) for name in names] for names in ours._all_weights
    ]
    assert [id(w) for w in ours._flat_weights] == [id(p) for p in parameters.values()]
    assert ours.flatten_parameters() is None


def test_there_is_no_attribute_named_reset():
    for cls in BASES:
        assert not hasattr(cls(3, 4), "reset")


def test_isinstance():
    for cls, base in BASES.items():
        assert isinstance(cls(3, 4), (nn.RNNBase, nn.RNNCellBase))
        assert isinstance(cls(3, 4), base) == (cls in INSTANCES)
        assert not isinstance(cls(3, 4), tuple(set(BASES.values()) - {base}))


@pytest.mark.parametrize(("cls", "options"), LAYERS_AND_OPTIONS, **ids)
def test_check_methods_are_torchs(cls, options):
    ours, theirs = cls(3, 4, **options), BASES[cls](3, 4, **options)
    x, sizes = zeros(6, 5, 3), torch.tensor([5, 3, 1])
    h = zeros(theirs.get_expected_hidden_size(x, None))
    if cls in CLASSES:
        c = zeros(theirs.get_expected_cell_size(x, None))
        hidden, bad_states = (h, c), [(h[:, :2], c), (h, c[:, :2])]
        assert ours.get_expected_cell_size(x, sizes) == theirs.get_expected_cell_size(x, sizes)
    else:
        hidden, bad_states = h, [h[:, :2], h[:, :, :2]]
        assert not hasattr(ours, "get_expected_cell_size")
    for module in (ours, theirs):
        module.check_input(x, None)
        module.check_input(zeros(9, 3), sizes)
        module.check_forward_args(x, hidden, None)
        module.check_hidden_size(h, tuple(h.shape))
    for call in (
        lambda m: m.get_expected_hidden_size(x, None),
        lambda m: m.get_expected_hidden_size(x, sizes),
        lambda m: m.permute_hidden(hidden, None) is hidden,
        lambda m: [s.shape for s in m.permute_hidden(hidden, torch.tensor([2, 0, 1]))],
    ):
        assert call(ours) == call(theirs)
    for bad in (
        lambda m: m.check_input(zeros(6, 5, 7), None),
        lambda m: m.check_input(x, sizes),
        lambda m: m.check_input(x.double(), None),
        lambda m: m.check_forward_args(x, bad_states[0], None),
        lambda m: m.check_forward_args(x, bad_states[1], None),
        lambda m: m.check_hidden_size(h, (1, 2, 3)),
    ):
        assert outcome(lambda bad=bad: bad(ours)) == outcome(lambda bad=bad: bad(theirs))


def test_permute_hidden_permutes_the_batch():
    hidden = torch.arange(3.0).view(1, 3, 1), torch.arange(3.0, 6.0).view(1, 3, 1)
    h, c = fusedrnn.LSTM(3, 4).permute_hidden(hidden, torch.tensor([2, 0, 1]))
    assert (h.flatten().tolist(), c.flatten().tolist()) == ([2.0, 0.0, 1.0], [5.0, 3.0, 4.0])


# Parameters and state_dict


@pytest.mark.parametrize(("cls", "options"), LAYERS_AND_OPTIONS, **ids)
def test_same_seed_gives_the_same_weights(cls, options):
    torch.manual_seed(3)
    theirs, after = BASES[cls](3, 4, **options), torch.rand(1)
    torch.manual_seed(3)
    ours = cls(3, 4, **options)
    assert torch.rand(1) == after
    for init in (lambda m: None, lambda m: m.reset_parameters()):
        torch.manual_seed(4)
        init(theirs)
        torch.manual_seed(4)
        init(ours)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, weight in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("cls", "options"), [*((cls, {}) for cls in STEPS), (fusedrnn.RNNCell, {"bias": False, **RELU})], **ids
)
def test_cell_has_torchs_weights_and_repr(cls, options):
    torch.manual_seed(3)
    theirs = BASES[cls](3, 4, **options)
    torch.manual_seed(3)
    ours = cls(3, 4, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(("cls", "options"), LAYERS_AND_OPTIONS, **ids)
def test_state_dict_through_a_file_both_ways(cls, options):
    ours, theirs = cls(3, 4, **options), BASES[cls](3, 4, **options)
    for source, target in ((ours, theirs), (theirs, ours)):
        source.reset_parameters()
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        keys = target.load_state_dict(torch.load(file, weights_only=True))
        assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(("cls", "options"), LAYERS_AND_OPTIONS, **ids)
def test_repr_shows_what_differs_from_the_defaults(cls, options):
    base = BASES[cls]
    assert repr(cls(3, 4, **options)) == repr(base(3, 4, **options)).replace(base.__name__, cls.__name__)


# Copies


@pytest.mark.parametrize("cls", BASES)
@pytest.mark.parametrize(
    "duplicate",
    [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
def test_copies(cls, duplicate):
    module = cls(3, 4).eval()
    clone = duplicate(module)
    assert type(clone) is cls
    assert clone.training is False
    x = torch.randn(2, 3)
    assert all(torch.equal(a, b) for a, b in zip(flat(module(x)), flat(clone(x)), strict=True))
    flat(clone(x))[0].sum().backward()
    assert all(p.grad is not None for p in clone.parameters())


@pytest.mark.parametrize("cls", LAYERS)
def test_module_through_torch_save(cls):
    module, file = cls(3, 4, num_layers=2), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(5, 2, 3)
    assert torch.equal(loaded(x)[0], module(x)[0])


@pytest.mark.parametrize(("cls", "options"), LAYERS_AND_OPTIONS, **ids)
def test_old_pickles(cls, options):
    """Before torch 1.8 there was no proj_size, and once _all_weights held, or all_weights was, something else."""
    module, x = cls(3, 4, **options), torch.randn(5, 2, 3)
    expected = module(x)[0] if options.get("dropout", 0) == 0 else module.eval()(x)[0]
    states = [module.__getstate__()]
    if not module.proj_size:
        states.append({k: v for k, v in states[0].items() if k != "proj_size"})
        states.append({**states[1], "all_weights": states[1]["_all_weights"]})
        states[-1].pop("_all_weights")
    if module.bias or not module.proj_size:  # nn.LSTM itself takes the names apart wrongly in the remaining case
        states.append({**states[0], "_all_weights": module.all_weights})
    for state in states:
        loaded = cls.__new__(cls)
        loaded.__setstate__(copy.copy(state))
        assert loaded.proj_size == module.proj_size
        assert loaded._all_weights == module._all_weights
        assert torch.equal(loaded(x)[0], expected)


@pytest.mark.parametrize("cls", BASES)
def test_meta_device_then_materialised(cls):
    with torch.device("meta"):
        module = cls(3, 4)
        assert [p.device.type for p in module.parameters()] == ["meta"] * 4
        shapes = [t.shape for t in flat(module(zeros(2, 3)))]
    source, x = cls(3, 4), torch.randn(2, 3)
    assert shapes == [t.shape for t in flat(source(x))]
    assigned = copy.deepcopy(module)
    assigned.load_state_dict(source.state_dict(), assign=True)
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    for loaded in (module, assigned):
        assert all(torch.equal(a, b) for a, b in zip(flat(loaded(x)), flat(source(x)), strict=True))


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in flat(part)]


# Subclasses and replicas


class Doubling(fusedrnn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        if isinstance(output, PackedSequence):
            return output._replace(data=output.data * 2), state
        return output * 2, state


def test_subclass_that_overrides_forward():
    ours, theirs = Doubling(3, 4), nn.LSTM(3, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0] * 2)
    packed = pack_padded_sequence(x, [3, 5], enforce_sorted=False)
    (output, (h, _)), (expected, (expected_h, _)) = ours(packed), theirs(packed)
    torch.testing.assert_close(output.data, expected.data * 2)
    torch.testing.assert_close(h, expected_h)


def test_class_assigned_afterwards():
    module, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    before = module(x)[0]
    module.__class__ = Doubling
    assert torch.equal(module(x)[0], before * 2)


@pytest.mark.parametrize("cls", LAYERS)
def test_data_parallel_replica(cls):
    """What torch.nn.parallel.replicate does: a shell whose parameters are set as plain, non-leaf tensors."""
    module = cls(3, 4, num_layers=2, bidirectional=True)
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter * 1)
    x = torch.randn(5, 2, 3)
    output = replica(x)[0]
    assert torch.equal(output, module(x)[0])
    output.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert [id(w) for w in module._flat_weights] == [id(p) for p in module.parameters()]


# Errors of forward on padded input: nn.LSTM's own, in its order


def unsuitable(T=5, B=3, I=3, L=2, H=4):
    x, h = zeros(T, B, I), zeros(L, B, H)
    meta, double = {"device": "meta"}, {"dtype": torch.float64}
    return {
        "4-D": lambda m: m(zeros(2, T, B, I)),
        "1-D": lambda m: m(zeros(I)),
        "0-D": lambda m: m(zeros(())),
        "4-D before a bad hx": lambda m: m(zeros(2, T, B, I), (h[0], h[0])),
        "2-D hx": lambda m: m(x, (h[0], h[0])),
        "2-D cx": lambda m: m(x, (h, h[0])),
        "4-D hx": lambda m: m(x, (h[None], h)),
        "3-D hx of unbatched input": lambda m: m(x[:, 0], (h, h)),
        "2-D hx before a dtype": lambda m: m(x.double(), (h[0], h[0])),
        "dtype": lambda m: m(zeros(T, B, I, **double)),
        "integers": lambda m: m(zeros(T, B, I, dtype=torch.int64)),
        "dtype before a feature size": lambda m: m(zeros(T, B, 7, **double)),
        "feature size": lambda m: m(zeros(T, B, 7)),
        "feature size of unbatched input": lambda m: m(zeros(T, 7)),
        "no features": lambda m: m(zeros(T, B, 0)),
        "feature size before a state's": lambda m: m(zeros(T, B, 7), (h[:1], h)),
        "feature size before three states": lambda m: m(zeros(T, B, 7), (h, h, h)),
        "feature size before T": lambda m: m(zeros(0, B, 7)),
        "layers of h": lambda m: m(x, (h[:1], h)),
        "layers of c": lambda m: m(x, (h, h[:1])),
        "batch of h": lambda m: m(x, (h[:, :2], h)),
        "batch of c": lambda m: m(x, (h, h[:, :2])),
        "batch of both": lambda m: m(x, (h[:, :2], h[:, :2])),
        "a batch that would broadcast": lambda m: m(x, (h[:, :1], h[:, :1])),
        "hidden size": lambda m: m(x, (h[:, :, :3], h)),
        "cell size": lambda m: m(x, (h, h[:, :, :3])),
        "layers of unbatched h": lambda m: m(x[:, 0], (h[:1, 0], h[:, 0])),
        "hidden size of unbatched h": lambda m: m(x[:, 0], (h[:, 0, :3], h[:, 0])),
        "states before T": lambda m: m(x[:0], (h[:1], h)),
        "T = 0": lambda m: m(x[:0]),
        "T = 0, unbatched": lambda m: m(x[:0, 0]),
        "T = B = 0": lambda m: m(x[:0, :0]),
        "T = 0 with hx": lambda m: m(x[:0], (h, h)),
        "T = 0 before the dtype of hx": lambda m: m(x[:0], (h.double(), h)),
        "three states": lambda m: m(x, (h, h, h)),
        "three states before T": lambda m: m(x[:0], (h, h, h)),
        "three states before a device": lambda m: m(x, (h, h, zeros(L, B, H, **meta))),
        "device of h": lambda m: m(x, (zeros(L, B, H, **meta), h)),
        "device of c": lambda m: m(x, (h, zeros(L, B, H, **meta))),
        "device before T": lambda m: m(x[:0], (h, zeros(L, B, H, **meta))),
        "device of input": lambda m: m(zeros(T, B, I, **meta)),
    }


def unsuitable_for_one_state(T=5, B=3, I=3, L=2, H=4):
    """For a GRU or RNN, whose hx is a tensor."""
    x, h = zeros(T, B, I), zeros(L, B, H)
    meta, double = {"device": "meta"}, {"dtype": torch.float64}
    return {
        "4-D": lambda m: m(zeros(2, T, B, I)),
        "0-D": lambda m: m(zeros(())),
        "4-D before a bad hx": lambda m: m(zeros(2, T, B, I), h[0]),
        "2-D hx": lambda m: m(x, h[0]),
        "4-D hx": lambda m: m(x, h[None]),
        "3-D hx of unbatched input": lambda m: m(x[:, 0], h),
        "2-D hx before a dtype": lambda m: m(x.double(), h[0]),
        "dtype": lambda m: m(zeros(T, B, I, **double)),
        "integers": lambda m: m(zeros(T, B, I, dtype=torch.int64)),
        "dtype before a feature size": lambda m: m(zeros(T, B, 7, **double)),
        "feature size": lambda m: m(zeros(T, B, 7)),
        "feature size of unbatched input": lambda m: m(zeros(T, 7)),
        "feature size before a state's": lambda m: m(zeros(T, B, 7), h[:1]),
        "feature size before T": lambda m: m(zeros(0, B, 7)),
        "layers of h": lambda m: m(x, h[:1]),
        "batch of h": lambda m: m(x, h[:, :2]),
        "a batch that would broadcast": lambda m: m(x, h[:, :1]),
        "hidden size": lambda m: m(x, h[:, :, :3]),
        "hidden size of unbatched h": lambda m: m(x[:, 0], h[:, 0, :3]),
        "states before T": lambda m: m(x[:0], h[:1]),
        "T = 0": lambda m: m(x[:0]),
        "T = 0, unbatched": lambda m: m(x[:0, 0]),
        "T = 0 with hx": lambda m: m(x[:0], h),
        "T = 0 before the dtype of hx": lambda m: m(x[:0], h.double()),
        "device of h": lambda m: m(x, zeros(L, B, H, **meta)),
        "device before T": lambda m: m(x[:0], zeros(L, B, H, **meta)),
        "device of input": lambda m: m(zeros(T, B, I, **meta)),
        "features of packed input": lambda m: m(packed(I=7)),
        "dtype of packed input": lambda m: m(packed(dtype=torch.float64)),
        "packed: batch of h": lambda m: m(by_hand([3, 2]), zeros(L, 5, H)),
        "packed: layers of h": lambda m: m(packed(), zeros(L + 1, B, H)),
        "packed: 2-D hx": lambda m: m(by_hand([3, 2]), h[0]),
    }


WRONG_DTYPE = "RNN input dtype ({0}) does not match weight dtype ({1}). Convert input: input.to({1})"
WRONG_DTYPE += ", or convert model: model.to({0})"


@pytest.mark.parametrize(
    ("cls", "case"),
    [
        *((cls, case) for cls in CLASSES for case in unsuitable()),
        *((cls, case) for cls in OTHERS for case in unsuitable_for_one_state()),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_unsuitable_input_raises_what_torchs_raises(cls, case):
    call = (unsuitable() if cls in CLASSES else unsuitable_for_one_state())[case]
    kind, text = outcome(lambda: call(cls(3, 4, 2)))
    expected_kind, expected_text = outcome(lambda: call(BASES[cls](3, 4, 2)))
    if IS_2_10 and case in ("dtype", "integers", "dtype before a feature size", "dtype of packed input"):
        dtype = torch.int64 if case == "integers" else torch.float64
        expected_kind, expected_text = ValueError, WRONG_DTYPE.format(dtype, torch.float32)
    assert kind is expected_kind
    if case.startswith(("three", "device")):  # what was given is named as well
        assert text.startswith(expected_text)
        assert "got 3" in text or "(hx" in text or "weights[" in text
    else:
        assert text == expected_text


@pytest.mark.parametrize("call", ["T = 0", "feature size", "batch of h"])
@pytest.mark.parametrize("options", [{"batch_first": True}, {"bidirectional": True}, {"proj_size": 2}], **ids)
def test_unsuitable_input_with_options(call, options):
    def bad(cls):
        module = cls(3, 4, **options)
        D, P = 2 if module.bidirectional else 1, module.proj_size or 4
        x, h, c = zeros(5, 3, 3), zeros(D, 3, P), zeros(D, 3, 4)
        if call == "T = 0":
            return module(zeros(3, 0, 3) if module.batch_first else zeros(0, 3, 3))
        return module(zeros(5, 3, 7)) if call == "feature size" else module(x, (h[:, :1], c))

    assert outcome(lambda: bad(fusedrnn.LSTM)) == outcome(lambda: bad(nn.LSTM))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        (lambda m: m([1.0]), TypeError, "input must be a Tensor, got list"),
        (lambda m: m(None), TypeError, "input must be a Tensor, got NoneType"),
        (lambda m: m(zeros(5, 3, 3), zeros(2, 2, 3, 4)), TypeError, "hx must be a tuple or a list of two Tensors"),
        (lambda m: m(zeros(5, 3, 3), "ab"), TypeError, "hx must be a tuple or a list of two Tensors"),
        (lambda m: m(zeros(5, 3, 3), (None, zeros(2, 3, 4))), TypeError, r"hx\[0\] must be a Tensor, got NoneType"),
        (lambda m: m(zeros(5, 3, 3), (zeros(2, 3, 4), 0.0)), TypeError, r"hx\[1\] must be a Tensor, got float"),
        (lambda m: m(zeros(5, 3, 3), ()), RuntimeError, "lstm expects two hidden states.*got 0"),
        (lambda m: m(zeros(5, 3, 3), [zeros(2, 3, 4)]), RuntimeError, "lstm expects two hidden states.*got 1"),
        (
            lambda m: m(zeros(5, 3, 3), (zeros(2, 3, 4).double(), zeros(2, 3, 4))),
            RuntimeError,
            r"hx\[0\] must have the dtype of the weights, torch.float32, got torch.float64",
        ),
        (
            lambda m: m(zeros(5, 3, 3), (zeros(2, 3, 4), zeros(2, 3, 4).half())),
            RuntimeError,
            r"hx\[1\] must have the dtype of the weights, torch.float32, got torch.float16",
        ),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_unsuitable_input_that_nn_lstm_has_no_words_for(cls, case, kind, text):
    with pytest.raises(kind, match=text):
        case(cls(3, 4, 2))


@pytest.mark.parametrize("cls", OTHERS)
@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        (
            lambda m, h: m(zeros(5, 3, 3), (h, h)),
            AttributeError,
            r"hx must be a Tensor h_0, got tuple of 2: .*\(h_0, c_0\)",
        ),
        (
            lambda m, h: m(zeros(5, 3, 3), [h]),
            AttributeError,
            r"hx must be a Tensor h_0, got list of 1: .*\(h_0, c_0\)",
        ),
        (lambda m, h: m(zeros(5, 3, 3), "ab"), AttributeError, "hx must be a Tensor h_0, got str"),
        (lambda m, h: m(packed(), (h, h)), AttributeError, "hx must be a Tensor h_0, got tuple of 2"),
        (lambda m, h: m(by_hand([3, 2]), (h, h)), AttributeError, "hx must be a Tensor h_0, got tuple of 2"),
        (lambda m, h: m(zeros(5, 3, 3), h.double()), RuntimeError, "hx must have the dtype of the weights.*float64"),
        (lambda m, h: m(packed(), zeros(2, 5, 4)), RuntimeError, r"hx must be \[L\*D, 3, ...\].*got \[2, 5, 4\]"),
        (lambda m, h: m(packed(), zeros(2, 1, 4)), RuntimeError, r"hx must be \[L\*D, 3, ...\].*got \[2, 1, 4\]"),
        (lambda m, h: m(packed(), zeros(3, 4)), RuntimeError, r"hx must be \[L\*D, 3, ...\].*got \[3, 4\]"),
        (lambda m, h: m([1.0]), TypeError, "input must be a Tensor, got list"),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_unsuitable_input_that_nn_gru_has_no_words_for(cls, case, kind, text):
    """hx in a tuple, as of an LSTM, is nn.GRU's AttributeError, and a TypeError."""
    h = zeros(2, 3, 4)
    with pytest.raises(kind, match=text) as raised:
        case(cls(3, 4, 2), h)
    assert kind is not AttributeError or isinstance(raised.value, TypeError)


def packed(I=3, lengths=(5, 2, 1), **kwargs):
    return pack_padded_sequence(zeros(5, len(lengths), I, **kwargs), list(lengths), enforce_sorted=False)


def by_hand(sizes, rows=None, **kwargs):
    return PackedSequence(zeros(sum(sizes) if rows is None else rows, 3), torch.tensor(sizes), **kwargs)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("input", "hx", "kind", "text"),
    [
        (packed(I=7), None, RuntimeError, r"input.size\(-1\) must be equal to input_size. Expected 3, got 7"),
        (packed(dtype=torch.float64), None, ValueError, r"RNN input dtype \(torch.float64\) does not match weight"),
        (packed(), ((2, 5, 4), (2, 5, 4)), RuntimeError, r"hx\[0\] .*3 sequences, got \[2, 5, 4\]"),
        (packed(), ((2, 3, 4), (2, 5, 4)), RuntimeError, r"hx\[1\] .*3 sequences, got \[2, 5, 4\]"),
        (packed(), ((2, 1, 4), (2, 1, 4)), RuntimeError, r"hx\[0\] .*3 sequences, got \[2, 1, 4\]"),
        (packed(), ((3, 4), (3, 4)), RuntimeError, r"hx\[0\] .*3 sequences, got \[3, 4\]"),
        (packed(), ((3, 3, 4), (2, 3, 4)), RuntimeError, r"Expected hidden\[0\] size \(2, 3, 4\), got \[3, 3, 4\]"),
        (packed(), ((2, 3, 4), (2, 3, 5)), RuntimeError, r"Expected hidden\[1\] size \(2, 3, 4\), got \[2, 3, 5\]"),
        (packed(), ((2, 3, 4),) * 3, RuntimeError, "lstm expects two hidden states.*got 3"),
        (by_hand([3, 2]), ((2, 5, 4),) * 2, RuntimeError, r"Expected hidden\[0\] size \(2, 3, 4\), got \[2, 5, 4\]"),
        (by_hand([3, 2]), ((3, 4),) * 2, RuntimeError, r"hx and cx should also be 3-D but got \(2-D, 2-D\)"),
        (by_hand([3, 2]), ((2, 3, 4),) * 3, RuntimeError, "lstm expects two hidden states.*got 3"),
        (by_hand([3, 2], rows=6), None, RuntimeError, "batch_sizes must add up to the 6 rows of data, got 5"),
        (by_hand([3, 2], rows=4), None, RuntimeError, "batch_sizes must add up to the 4 rows of data, got 5"),
        (by_hand([2, 3]), None, RuntimeError, r"batch_sizes must be positive and never grow, got \[2, 3\]"),
        (by_hand([3, 2, 0]), None, RuntimeError, r"batch_sizes must be positive and never grow, got \[3, 2, 0\]"),
        (by_hand([0]), None, RuntimeError, r"batch_sizes must be positive and never grow, got \[0\]"),
        (
            PackedSequence(zeros(0, 3), torch.tensor([], dtype=torch.int64)),
            None,
            RuntimeError,
            r"batch_sizes must have one entry per time step, got shape \[0\]",
        ),
        (
            PackedSequence(zeros(3, 3), torch.tensor([[2], [1]])),
            None,
            RuntimeError,
            r"batch_sizes must have one entry per time step, got shape \[2, 1\]",
        ),
        (PackedSequence(zeros(3, 3), torch.tensor([2.0, 1.0])), None, TypeError, "batch_sizes must be int64"),
        (
            PackedSequence(zeros(3, 1, 3), torch.tensor([2, 1])),
            None,
            RuntimeError,
            "data of a PackedSequence must have 2 dimensions, got 3",
        ),
        (
            by_hand([3, 2], sorted_indices=torch.tensor([1, 0])),
            None,
            RuntimeError,
            r"sorted_indices .* must have shape \[3\], got \[2\]",
        ),
        (
            by_hand([2, 1])._replace(sorted_indices=torch.tensor([0, 0])),
            None,
            RuntimeError,
            r"sorted_indices .* must be a permutation of 0..1, got \[0, 0\]",
        ),
        (
            by_hand([2, 1])._replace(unsorted_indices=torch.tensor([2, 0])),
            None,
            RuntimeError,
            r"unsorted_indices .* must be a permutation of 0..1, got \[2, 0\]",
        ),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_unsuitable_packed_sequence(cls, input, hx, kind, text):
    state = None if hx is None else tuple(zeros(*shape) for shape in hx)
    with pytest.raises(kind, match=text):
        cls(3, 4, 2)(input, state)


@pytest.mark.parametrize("case", ["dims", "dtype", "feature", "batch", "T", "three", "packed", "lengths", "reset"])
def test_a_failing_call_changes_nothing(case):
    module, h = fusedrnn.LSTM(3, 4, 2, dropout=0.5), torch.randn(2, 3, 4)
    x = torch.randn(5, 3, 3)
    before = copy.deepcopy(module.state_dict()), h.clone(), x.clone(), torch.get_rng_state()
    attributes = {k: id(v) for k, v in vars(module).items()}
    calls = {
        "dims": lambda: module(zeros(3), (h, h)),
        "dtype": lambda: module(x.double(), (h, h)),
        "feature": lambda: module(zeros(5, 3, 7), (h, h)),
        "batch": lambda: module(x[:, :2], (h, h)),
        "T": lambda: module(x[:0], (h, h)),
        "three": lambda: module(x, (h, h, h)),
        "packed": lambda: module(packed(), (h[:, :2], h)),
        "lengths": lambda: module(x, (h, h), lengths=torch.tensor([6, 1, 1])),
        "reset": lambda: module(x, (h, h), reset=zeros(5, 3)),
    }
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        calls[case]()
    state, h_before, x_before, rng = before
    assert all(torch.equal(weight, state[name]) for name, weight in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(h, h_before)
    assert torch.equal(x, x_before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {k: id(v) for k, v in vars(module).items()} == attributes


# Errors of the cell and of the functions


def unsuitable_for_a_cell(B=2, I=3, H=4):
    x, h = zeros(B, I), zeros(B, H)
    return {
        "3-D": lambda m: m(zeros(2, B, I)),
        "0-D": lambda m: m(zeros(())),
        "3-D h": lambda m: m(x, (zeros(2, B, H), h)),
        "3-D c": lambda m: m(x, (h, zeros(2, B, H))),
        "feature size": lambda m: m(zeros(B, 7)),
        "feature size before a state's": lambda m: m(zeros(B, 7), (h[:1], h)),
        "batch of h": lambda m: m(x, (zeros(3, H), h)),
        "batch of c": lambda m: m(x, (h, zeros(3, H))),
        "a batch that would broadcast": lambda m: m(x, (h[:1], h[:1])),
        "hidden size of h": lambda m: m(x, (zeros(B, 5), h)),
        "hidden size of c": lambda m: m(x, (h, zeros(B, 5))),
        "three states": lambda m: m(x, (h, h, h)),
        "one state": lambda m: m(x, (h,)),
    }


def unsuitable_for_a_cell_of_one_state(B=2, I=3, H=4):
    x, h = zeros(B, I), zeros(B, H)
    return {
        "3-D": lambda m: m(zeros(2, B, I)),
        "0-D": lambda m: m(zeros(())),
        "3-D h": lambda m: m(x, zeros(2, B, H)),
        "0-D h": lambda m: m(x, zeros(())),
        "feature size": lambda m: m(zeros(B, 7)),
        "feature size before a state's": lambda m: m(zeros(B, 7), h[:1]),
        "batch of h": lambda m: m(x, zeros(3, H)),
        "a batch that would broadcast": lambda m: m(x, h[:1]),
        "hidden size of h": lambda m: m(x, zeros(B, 5)),
    }


@pytest.mark.parametrize(
    ("cls", "case"),
    [
        *((fusedrnn.LSTMCell, case) for case in unsuitable_for_a_cell()),
        *((cls, case) for cls in STEPS[1:] for case in unsuitable_for_a_cell_of_one_state()),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_cell_raises_what_torchs_raises(cls, case):
    call = (unsuitable_for_a_cell() if cls is fusedrnn.LSTMCell else unsuitable_for_a_cell_of_one_state())[case]
    kind, text = outcome(lambda: call(cls(3, 4)))
    expected_kind, expected_text = outcome(lambda: call(BASES[cls](3, 4)))
    assert kind is expected_kind
    assert text.startswith(expected_text) if case.endswith(("states", "state")) else text == expected_text


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda m: m([1.0]), TypeError, "input must be a Tensor, got list"),
        (lambda m: m(zeros(2, 3), zeros(2, 2, 4)), TypeError, "hx must be a tuple or a list of two Tensors"),
        (lambda m: m(zeros(2, 3), (zeros(2, 4), None)), TypeError, r"hx\[1\] must be a Tensor, got NoneType"),
        (lambda m: m(zeros(2, 3), (zeros(4), zeros(4))), RuntimeError, r"hx must be 2-D.*\(1-D, 1-D\)"),
        (lambda m: m(zeros(3), (zeros(1, 4), zeros(1, 4))), RuntimeError, r"hx must be 1-D.*\(2-D, 2-D\)"),
        (lambda m: m(zeros(2, 3).double()), RuntimeError, "input must have the dtype of the weights.*float64"),
        (
            lambda m: m(zeros(2, 3), (zeros(2, 4), zeros(2, 4).double())),
            RuntimeError,
            r"hx\[1\] must have the dtype of the weights.*float64",
        ),
        (lambda m: m(zeros(2, 3, device="meta")), RuntimeError, "not at the same device.*meta"),
        (
            lambda m: m(zeros(2, 3), (zeros(2, 4, device="meta"), zeros(2, 4))),
            RuntimeError,
            r"not at the same device.*meta \(hx\[0\]\)",
        ),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_cell_errors_that_nn_lstmcell_has_no_words_for(call, kind, text):
    with pytest.raises(kind, match=text):
        call(fusedrnn.LSTMCell(3, 4))


@pytest.mark.parametrize("cls", STEPS[1:])
@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda m, h: m(zeros(2, 3), (h, h)),
            AttributeError,
            r"hx must be a Tensor h_0, got tuple of 2: .*\(h_0, c_0\)",
        ),
        (lambda m, h: m(zeros(2, 3), [h]), AttributeError, "hx must be a Tensor h_0, got list of 1"),
        (lambda m, h: m(zeros(2, 3), h[0]), RuntimeError, r"hx must be 2-D.*a 1-D tensor"),
        (lambda m, h: m(zeros(3), h), RuntimeError, r"hx must be 1-D.*a 2-D tensor"),
        (lambda m, h: m(zeros(2, 3).double()), RuntimeError, "input must have the dtype of the weights.*float64"),
        (lambda m, h: m(zeros(2, 3), h.double()), RuntimeError, "hx must have the dtype of the weights.*float64"),
        (lambda m, h: m(zeros(2, 3), h.to("meta")), RuntimeError, r"not at the same device.*meta \(hx\)"),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_cell_errors_that_nn_grucell_has_no_words_for(cls, call, kind, text):
    with pytest.raises(kind, match=text):
        call(cls(3, 4), zeros(2, 4))


@pytest.mark.parametrize(
    ("function", "G"),
    [(functional.gru, 3), (functional.rnn, 1), (lambda *a, **k: functional.rnn(*a, nonlinearity="relu", **k), 1)],
    ids=["gru", "rnn_tanh", "rnn_relu"],
)
@pytest.mark.usefixtures("grad_mode")
def test_functional_gru_and_rnn_check_their_own_arguments(function, G):
    weights = [zeros(G * 4, 3), zeros(G * 4, 4), zeros(G * 4), zeros(G * 4)]
    assert function(zeros(5, 2, 3), weights)[1].shape == (1, 2, 4)
    for bad, options, text in (
        (weights[:3], {}, "weights must hold 2 or 4 tensors for each of 1 layers and 1 directions, got 3"),
        ([*weights, zeros(2, 4)], {}, "weights must hold 2 or 4 tensors .* got 5"),
        (weights, {"num_layers": 0}, "num_layers must be greater than zero, got 0"),
        (weights, {"dropout": 2}, "dropout must be a probability in 0..1, got 2"),
        ([*weights[:2], zeros(1), weights[3]], {}, rf"weights\[2\] must have shape \[{4 * G}\], got \[1\]"),
        ([*weights[:3], zeros(1)], {}, rf"weights\[3\] must have shape \[{4 * G}\], got \[1\]"),
        (weights * 2, {"num_layers": 2}, rf"weights\[4\] must have shape \[{4 * G}, 4\]"),
    ):
        with pytest.raises(ValueError, match=text):
            function(zeros(5, 2, 3), bad, **options)
    with pytest.raises(TypeError, match="hidden_size"):
        function(zeros(5, 2, 3), weights, hidden_size=4)


@pytest.mark.parametrize(("function", "G"), [(functional.gru_cell, 3), (functional.rnn_cell, 1)])
@pytest.mark.usefixtures("grad_mode")
def test_functional_cells_of_one_state_check_their_own_arguments(function, G):
    w_ih, w_hh, bias = zeros(G * 4, 3), zeros(G * 4, 4), zeros(G * 4)
    assert function(zeros(2, 3), None, w_ih, w_hh, bias, bias).shape == (2, 4)
    for bad, text in (
        ((w_ih, w_hh, bias, None), "b_ih and b_hh must be given both or not at all"),
        ((w_ih, w_hh, zeros(1), bias), rf"weights\[2\] must have shape \[{4 * G}\], got \[1\]"),
        ((w_ih, w_hh, bias, zeros(1)), rf"weights\[3\] must have shape \[{4 * G}\], got \[1\]"),
        ((w_ih, zeros(5, 4), bias, bias), "must have shape"),
        ((w_ih[0], w_hh, bias, bias), r"weights\[0\] must be 2-D, got 1-D"),
    ):
        with pytest.raises(ValueError, match=text):
            function(zeros(2, 3), None, *bad)


def test_functional_rnn_knows_two_nonlinearities():
    for call in (
        lambda: functional.rnn(zeros(5, 2, 3), [], nonlinearity="sin"),
        lambda: functional.rnn_cell(zeros(2, 3), None, zeros(4, 3), zeros(4, 4), nonlinearity="sin"),
    ):
        with pytest.raises(ValueError, match="Unknown nonlinearity 'sin'"):
            call()


WEIGHTS = [zeros(16, 3), zeros(16, 4), zeros(16), zeros(16)]


@pytest.mark.parametrize(
    ("weights", "options", "kind", "text"),
    [
        (WEIGHTS[:1], {}, ValueError, "weights must hold 2 to 5 tensors for each of 1 layers and 1 directions, got 1"),
        (WEIGHTS, {"num_layers": 3}, ValueError, "weights must hold .* 3 layers and 1 directions, got 4"),
        ([*WEIGHTS, *WEIGHTS], {}, ValueError, "weights must hold .* got 8"),
        (WEIGHTS, {"num_layers": 0}, ValueError, "num_layers must be greater than zero, got 0"),
        (WEIGHTS, {"dropout": 1.5}, ValueError, "dropout must be a probability in 0..1, got 1.5"),
        ([*WEIGHTS[:2], None, None], {}, TypeError, r"weights\[2\] must be a Tensor, got NoneType"),
        ([WEIGHTS[0][0], *WEIGHTS[1:]], {}, ValueError, r"weights\[0\] must be 2-D, got 1-D"),
        ([WEIGHTS[0], zeros(16), *WEIGHTS[2:]], {}, ValueError, r"weights\[1\] must be 2-D, got 1-D"),
        ([zeros(12, 3), *WEIGHTS[1:]], {}, ValueError, r"weights\[0\] must have shape \[16, 3\], got \[12, 3\]"),
        ([WEIGHTS[0], zeros(16, 2), *WEIGHTS[2:]], {}, ValueError, r"weights\[1\] must have shape \[16, 4\]"),
        ([*WEIGHTS[:3], zeros(12)], {}, ValueError, r"weights\[3\] must have shape \[16\], got \[12\]"),
        ([*WEIGHTS, zeros(4, 4, 1)], {}, ValueError, r"weights\[4\] must have shape \[4, 4\]"),
        ([*WEIGHTS, *WEIGHTS], {"num_layers": 2}, ValueError, r"weights\[4\] must have shape \[16, 4\], got \[16, 3\]"),
        (
            [*WEIGHTS[:3], zeros(16).double()],
            {},
            RuntimeError,
            r"weights\[3\] must have the dtype of the weights, torch.float32, got torch.float64",
        ),
        (
            [*WEIGHTS[:3], zeros(16, device="meta")],
            {},
            RuntimeError,
            r"parameter tensors are not at the same device.*weights\[3\]",
        ),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_functional_lstm_checks_its_own_arguments(weights, options, kind, text):
    with pytest.raises(kind, match=text):
        functional.lstm(zeros(5, 2, 3), weights, **options)


@pytest.mark.parametrize(
    ("data", "options", "kind", "text"),
    [
        (zeros(3, 3), {"batch_sizes": [2, 1]}, TypeError, "batch_sizes must be a Tensor, got list"),
        (
            zeros(3, 3),
            {"batch_sizes": torch.tensor([2, 1], device="meta")},
            RuntimeError,
            "batch_sizes must be on the CPU, got meta",
        ),
        (zeros(3, 1, 3), {"batch_sizes": torch.tensor([2, 1])}, RuntimeError, "must have 2 dimensions, got 3"),
        (
            zeros(3, 3),
            {"batch_sizes": torch.tensor([2, 1]), "lengths": torch.tensor([2, 1])},
            ValueError,
            "lengths must be None for packed input",
        ),
        (
            zeros(3, 3),
            {"batch_sizes": torch.tensor([2, 1]), "reset": zeros(3, dtype=torch.bool)},
            ValueError,
            r"reset must have shape \[2, 2\].*got \[3\]",
        ),
        (
            zeros(3, 3),
            {"batch_sizes": torch.tensor([2, 1]), "hx": (zeros(1, 3, 4), zeros(1, 2, 4))},
            RuntimeError,
            r"Expected hidden\[0\] size \(1, 2, 4\), got \[1, 3, 4\]",
        ),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_functional_lstm_checks_packed_data(data, options, kind, text):
    with pytest.raises(kind, match=text):
        functional.lstm(data, WEIGHTS, **options)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((*WEIGHTS[:2], WEIGHTS[2], None), "b_ih and b_hh must be given both or not at all"),
        ((*WEIGHTS[:2], None, WEIGHTS[2]), "b_ih and b_hh must be given both or not at all"),
        ((WEIGHTS[0], zeros(12, 4)), r"weights\[0\] must have shape"),
    ],
)
@pytest.mark.usefixtures("grad_mode")
def test_functional_lstm_cell_checks_its_own_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        functional.lstm_cell(zeros(2, 3), None, *arguments)


def test_import_and_use_warn_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cls in LAYERS:
            cls(3, 4, 2, dropout=0.5)(zeros(5, 2, 3))[0].sum().backward()
        for cls in STEPS:
            cls(3, 4)(zeros(2, 3))
