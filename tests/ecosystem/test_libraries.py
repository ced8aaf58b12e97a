"""Libraries that hold, train or explain a recurrent layer: each runs on a converted model and on nn.LSTM's.

`make test-tools` installs them; where one is not installed its test is skipped. docs/ecosystem.md names the tests.
"""

import copy
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


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


def library(name):
    """The module, or a skip that says why there is none."""
    return pytest.importorskip(name, exc_type=ImportError)


def batch(B=6, T=5):
    return torch.randn(B, T, 3, dtype=torch.float64)


def classes(model):
    return {type(module) for module in model.modules() if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN))}


def parameters(model):
    return [p.detach() for p in model.parameters()]


def grads(model, y):
    return list(torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True))


def test_captum(pair, assert_same):
    attr = library("captum.attr")
    x, baseline = batch(B=2), batch(B=2)
    for method in (attr.IntegratedGradients, attr.Saliency, attr.GradientShap):
        found = []
        for model in pair:
            torch.manual_seed(1)
            np.random.seed(1)  # captum draws from both
            extra = {} if method is attr.Saliency else {"baselines": baseline}
            found.append(method(model).attribute(x, target=1, **extra))
        assert_same(found[1], found[0])
    layers = [attr.LayerIntegratedGradients(model, model.embed).attribute(x, target=0) for model in pair]
    assert_same(layers[1], layers[0])


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_torchrl(cell, assert_same):
    """Trajectories that begin inside of a sequence, and single steps. TorchRL asks for the layer by isinstance."""
    modules = library("torchrl.modules")
    from tensordict import TensorDict

    begins = torch.zeros(4, 6, 1, dtype=torch.bool)
    begins[:, 0] = begins[1, 2] = begins[3, 5] = True
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    cls = getattr(modules, f"{cell}Module")
    ours, theirs = (cls(3, 5, in_key="x", out_key="y", num_layers=2).double() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    fusedrnn.convert(ours)
    assert type(getattr(ours, cell.lower())) is getattr(fusedrnn, cell)
    found = []
    for module in (ours, theirs):
        with modules.set_recurrent_mode(True):
            y = module(TensorDict({"x": x, "is_init": begins}, [4, 6]))["y"]
        with modules.set_recurrent_mode(False):
            step = module(TensorDict({"x": x[:, 0], "is_init": begins[:, 0]}, [4]))["y"]
        found.append([y, step, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    assert_same(*found)
    fusedrnn.convert(ours, compilable=True)
    with pytest.raises(TypeError, match="mask"), modules.set_recurrent_mode(True):
        ours(TensorDict({"x": x, "is_init": begins}, [4, 6]))


def test_opacus_before_convert(assert_same):
    """It puts an LSTM of its own, whose per-sample gradients it knows, in nn.LSTM's place: convert leaves that one."""
    opacus = library("opacus")
    from opacus.validators import ModuleValidator

    fixed = ModuleValidator.fix(Model()).double()
    x, grads = batch(), []
    for model in (copy.deepcopy(fixed), fusedrnn.convert(copy.deepcopy(fixed))):
        assert type(model.lstm) is type(fixed.lstm)
        sampled = opacus.GradSampleModule(model)
        sampled(x).square().sum().backward()
        grads.append([p.grad_sample for p in sampled.parameters()])
    assert all(len(g) == len(x) for g in grads[1])
    assert_same(grads[1], grads[0])


def test_lightning(pair, assert_same):
    """A Trainer with clipped and accumulated gradients."""
    lightning = library("lightning.pytorch")

    class Trained(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, x, index):
            return self.model(x).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(batch(B=8), batch_size=2)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    before = [p.clone() for p in pair[0].parameters()]
    for model in pair:
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", gradient_clip_val=0.05, accumulate_grad_batches=2, **quiet
        )
        trainer.fit(Trained(model), data)
    trained = [p.detach() for p in pair[0].parameters()]
    assert not any(torch.equal(p, q) for p, q in zip(trained, before, strict=True))
    assert_same([p.detach() for p in pair[1].parameters()], trained)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(pair, precision, assert_same, tmp_path):
    """An Accelerator with accumulated and clipped gradients, autocast, and its checkpoints."""
    accelerate = library("accelerate")
    from accelerate.state import AcceleratorState

    data, found = batch(B=8).float(), []
    for model in pair:
        AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
        before = parameters(copy.deepcopy(model))
        model = model.float() if precision == "bf16" else model
        x = data if precision == "bf16" else data.double()
        loader = torch.utils.data.DataLoader(x, batch_size=2)
        trained, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
        for part in loader:
            with accelerator.accumulate(trained):
                accelerator.backward(trained(part).square().mean())
                accelerator.clip_grad_norm_(trained.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(tmp_path)
        expected = parameters(copy.deepcopy(model))
        for p in parameters(model):
            p.zero_()
        accelerator.load_state(tmp_path)
        assert all(torch.equal(p, q) for p, q in zip(parameters(model), expected, strict=True))
        assert not any(torch.equal(p, q.to(p)) for p, q in zip(expected, before, strict=True))
        found.append(parameters(accelerator.unwrap_model(trained)))
    if precision == "no":
        assert_same(found[1], found[0])
    else:
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)


def test_accelerate_offloads(pair, assert_same, tmp_path):
    """Weights that are loaded for each call: convert before accelerate sets the layer's forward. The report says so."""
    accelerate = library("accelerate")
    x, (theirs, ours) = batch(), pair
    expected = theirs(x)
    offloaded = accelerate.cpu_offload(copy.deepcopy(ours), execution_device="cpu")
    assert offloaded.lstm.weight_ih_l0.is_meta
    assert_same([offloaded(x), offloaded(x)], [expected, expected])

    accelerate.Accelerator(cpu=True).save_model(theirs, tmp_path)
    with accelerate.init_empty_weights():
        empty = fusedrnn.convert(Model())
    places = {"embed": "cpu", "lstm": "disk", "head": "cpu"}
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, tmp_path, device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    assert classes(loaded) == {fusedrnn.LSTM}
    assert_same(loaded(x), expected)

    report = fusedrnn.Report()
    late = fusedrnn.convert(accelerate.cpu_offload(copy.deepcopy(theirs), execution_device="cpu"), report=report)
    assert "convert the model before" in report.left["lstm"]
    assert_same(late(x), expected)


def test_transformers(assert_same, tmp_path):
    """EnCodec, which has an LSTM in its encoder and its decoder: outputs, gradients, checkpoints both ways."""
    transformers = library("transformers")
    options = {"num_filters": 2, "hidden_size": 8, "codebook_size": 8, "codebook_dim": 8, "upsampling_ratios": [4, 2]}
    config = transformers.EncodecConfig(**options, target_bandwidths=[1.5], sampling_rate=800)
    theirs = transformers.EncodecModel(config).double().eval()
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    assert classes(ours) == {fusedrnn.LSTM}
    sound = torch.randn(2, 1, 160, dtype=torch.float64)
    found = []
    for model in (ours, theirs):
        made = model(sound)
        found.append([made.audio_values, made.audio_codes, *grads(model.decoder, made.audio_values)])
    assert_same(*found)
    ours.save_pretrained(tmp_path)
    plain = transformers.EncodecModel.from_pretrained(tmp_path, dtype=torch.float64)
    with fusedrnn.patch():
        patched = transformers.EncodecModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert (classes(plain), classes(patched)) == ({nn.LSTM}, {fusedrnn.LSTM})
    assert_same([plain.eval()(sound).audio_values, patched.eval()(sound).audio_values], [found[1][0]] * 2)


def test_transformers_generate():
    """A transducer, whose decoder is an LSTM that is stepped with a cache of its states: `generate` gives the same."""
    transformers = library("transformers")
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = options | {"subsampling_conv_channels": 4, "num_mel_bins": 16, "conv_kernel_size": 3}
    tokens = {"vocab_size": 12, "blank_token_id": 11, "pad_token_id": 0, "decoder_start_token_id": 11}
    sizes = {"decoder_hidden_size": 8, "num_decoder_layers": 2}
    config = transformers.ParakeetRNNTConfig(**sizes, **tokens, encoder_config=encoder)
    theirs = transformers.ParakeetForRNNT(config).double().eval()
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    assert classes(ours) == {fusedrnn.LSTM}
    features = torch.randn(2, 64, 16, dtype=torch.float64)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 40:] = False
    made = [model.generate(features, attention_mask=mask, max_new_tokens=20) for model in (ours, theirs)]
    assert len(made[1].sequences.unique()) > 2
    assert torch.equal(made[0].sequences, made[1].sequences)


def test_stable_baselines(assert_same, tmp_path):
    """RecurrentPPO learns a task that needs a memory: its two LSTMs, stepped and over sequences with restarts."""
    contrib, gymnasium = library("sb3_contrib"), library("gymnasium")

    class Remember(gymnasium.Env):
        """The first observation says which action is rewarded."""

        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def observation(self):
            return np.array([self.goal if self.t == 0 else 0, self.t / 5], np.float32)

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.t, self.goal = 0, int(self.np_random.choice([-1, 1]))
            return self.observation(), {}

        def step(self, action):
            self.t += 1
            return self.observation(), float(2 * action - 1 == self.goal), self.t == 5, False, {}

    def learned(convert):
        sizes = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
        policy = {"lstm_hidden_size": 8, "net_arch": [8]}
        model = contrib.RecurrentPPO("MlpLstmPolicy", Remember(), seed=0, device="cpu", policy_kwargs=policy, **sizes)
        before = parameters(copy.deepcopy(model.policy))
        if convert:
            fusedrnn.convert(model.policy)
        model.learn(64)
        assert not any(torch.equal(p, q) for p, q in zip(parameters(model.policy), before, strict=True))
        return model

    theirs, ours = learned(False), learned(True)
    assert classes(ours.policy) == {fusedrnn.LSTM}
    torch.testing.assert_close(parameters(ours.policy), parameters(theirs.policy), rtol=0, atol=1e-6)
    ours.save(tmp_path / "model")
    with fusedrnn.patch():
        loaded = contrib.RecurrentPPO.load(tmp_path / "model", device="cpu")
    assert classes(loaded.policy) == {fusedrnn.LSTM}
    assert all(torch.equal(p, q) for p, q in zip(parameters(loaded.policy), parameters(ours.policy), strict=True))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_pytorch_forecasting(cell, assert_same, tmp_path):
    """RecurrentNetwork. Its layers are subclasses of nn.LSTM and nn.GRU, which take sequences of length 0."""
    forecasting = library("pytorch_forecasting")
    import lightning.pytorch as lightning
    import pandas

    series = {"t": np.tile(np.arange(12), 3), "series": np.repeat(list("abc"), 12)}
    frame = pandas.DataFrame(series | {"value": np.sin(np.arange(36.0)).astype("float32")})
    columns = {"time_idx": "t", "target": "value", "group_ids": ["series"], "time_varying_unknown_reals": ["value"]}
    lengths = {"max_encoder_length": 5, "min_encoder_length": 2, "max_prediction_length": 2}
    data = forecasting.TimeSeriesDataSet(frame, **columns, **lengths)
    theirs = forecasting.RecurrentNetwork.from_dataset(data, cell_type=cell, hidden_size=6, rnn_layers=2, dropout=0.0)
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    assert isinstance(ours.rnn, getattr(fusedrnn, cell))
    x, _ = next(iter(data.to_dataloader(train=True, batch_size=8, shuffle=False)))
    assert len(x["encoder_lengths"].unique()) > 1
    found = []
    for model in (ours, theirs):
        y = model(x).prediction
        found.append([y.detach(), *grads(model.rnn, y)])
    torch.testing.assert_close(*found)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for model in (theirs, ours):
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", limit_train_batches=2, **quiet)
        trainer.fit(model, data.to_dataloader(train=True, batch_size=8, shuffle=False))
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-4, atol=1e-5)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = forecasting.RecurrentNetwork.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    assert all(torch.equal(p, q) for p, q in zip(parameters(loaded), parameters(ours), strict=True))

    lengths, x = torch.tensor([0, 4, 2]), torch.randn(3, 4, theirs.rnn.input_size, dtype=torch.float64)
    found = [model.rnn.double()(x, lengths=lengths, enforce_sorted=False) for model in (ours, theirs)]
    theirs.load_state_dict(ours.state_dict())
    found[1] = theirs.rnn(x, lengths=lengths, enforce_sorted=False)
    assert_same(*found)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_speechbrain(cell, assert_same, monkeypatch):
    """Its encoders pack what they are given, with lengths as parts of the longest."""
    if "torchaudio" not in sys.modules:  # which these need not; its wheels need a torch with CUDA
        audio = types.ModuleType("torchaudio")
        audio.__spec__, audio.__version__ = ModuleSpec("torchaudio", None), "2.10.0"
        monkeypatch.setitem(sys.modules, "torchaudio", audio)
    encoders = library("speechbrain.nnet.RNN")
    theirs = getattr(encoders, cell)(hidden_size=5, input_shape=(3, 7, 4), num_layers=2, bidirectional=True).double()
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    assert type(ours.rnn) is getattr(fusedrnn, cell)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    for lengths in (None, torch.tensor([1.0, 0.5, 0.8])):
        found = []
        for model in (ours, theirs):
            y, hidden = model(x, lengths=lengths)
            found.append([y, *(hidden if isinstance(hidden, tuple) else (hidden,)), *grads(model, y)])
        assert_same(*found)


def test_tagger(assert_same):
    """As flair's: sentences in the order of their lengths, packed; trained first states; an output of every token."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 6, padding_idx=0)
            self.rnn = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
            self.h0, self.c0 = (nn.Parameter(torch.randn(4, 1, 5)) for _ in range(2))
            self.out = nn.Linear(10, 3)

        def forward(self, tokens):
            lengths, order = tokens.ne(0).sum(1).sort(descending=True)
            packed = pack_padded_sequence(self.embed(tokens[order]), lengths, batch_first=True)
            states = tuple(state.expand(-1, len(tokens), -1).contiguous() for state in (self.h0, self.c0))
            y, _ = pad_packed_sequence(self.rnn(packed, states)[0], batch_first=True)
            return self.out(y)[order.argsort()]

    tokens = torch.randint(1, 20, (4, 6))
    for row, length in enumerate((3, 6, 1, 4)):
        tokens[row, length:] = 0
    theirs = Tagger().double()
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    found = []
    for model in (ours, theirs):
        y = model(tokens)
        found.append([y, *grads(model, y)])
    assert_same(*found)


def test_torchao(pair):
    """It quantizes the linear layers and leaves nn.LSTM, converted or not, whole graphs among them."""
    quantization = library("torchao.quantization")
    configuration = quantization.Int8DynamicActivationInt8WeightConfig()
    found, x = [], batch().float()
    for model in pair:
        quantization.quantize_(model.float().eval(), configuration)
        assert type(model.head.weight) is not nn.Parameter
        assert type(model.lstm.weight_ih_l0) is nn.Parameter
        found.append(model(x).detach())
    torch.testing.assert_close(found[1], found[0])
    fusedrnn.convert(pair[1], compilable=True)
    compiled = torch.compile(pair[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).detach(), found[0])
