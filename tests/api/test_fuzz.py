"""Random sequences of what people do to and around a module: after every call fusedrnn agrees with torch's module.

Three modules go through the same operations: one that is converted (and reverted, and converted again), its twin, a
torch.nn module, and a torch.nn module in float64, which tells what is exact for the rule of `fusedrnn.testing`.

A failure is shrunk by Hypothesis and printed as a program: put it behind the imports of this file. The seed is printed
too; FUSEDRNN_FUZZ_SEED=7 starts with that one, and FUSEDRNN_FUZZ_SECONDS=3600 goes on for longer than CI does.
"""

import copy
import os
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.optim.swa_utils import AveragedModel

import fusedrnn
from fusedrnn import testing

SECONDS = float(os.environ.get("FUSEDRNN_FUZZ_SECONDS", 20))
FIRST_SEED = int(os.environ.get("FUSEDRNN_FUZZ_SEED", 0))
I = 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NUDGES = 2


@dataclass(frozen=True)
class Call:
    """One call of a module, and what is done with its results."""

    form: str = "padded"  # padded, unbatched or packed; a cell is called step by step
    T: int = 3
    B: int = 2
    hx: bool = False
    strided: bool = False  # x is a slice of a larger tensor
    grad: str = "first"  # first, second: derivatives of that order; no_grad, inference: none
    in_place: str = ""  # what is done to the output
    via: str = "module"  # how it is called
    autocast: bool = False
    seed: int = 0


CALLS = st.builds(
    Call,
    form=st.sampled_from(["padded", "unbatched", "packed"]),
    T=st.sampled_from([1, 2, 5, 17]),
    B=st.integers(1, 4),
    hx=st.booleans(),
    strided=st.booleans(),
    grad=st.sampled_from(["first", "no_grad", "inference"]),
    in_place=st.sampled_from(["", "", "relu_", "add_", "mul_"]),
    autocast=st.sampled_from([False, False, True]),
    seed=st.integers(0, 9),
)


class Problem:
    """The numbers of a call for a module, the same ones whatever its dtype."""

    def __init__(self, call, module):
        self.call, self.cell = call, isinstance(module, nn.RNNCellBase)
        self.paired = isinstance(module, (nn.LSTM, fusedrnn.CompilableLSTM, nn.LSTMCell))  # hx is (h0, c0)
        generator = torch.Generator().manual_seed(call.seed)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        H = module.hidden_size
        P = 0 if self.cell else module.proj_size
        rows = () if self.cell else (module.num_layers * (2 if module.bidirectional else 1),)
        batch = () if call.form == "unbatched" else (call.B,)
        self.batch_first = not self.cell and module.batch_first
        sizes = (*batch, call.T) if self.batch_first else (call.T, *batch)
        self.x = random(*sizes, I + 2)[..., 1:-1]
        self.x = self.x if call.strided else self.x.contiguous()
        sizes = (P or H, H) if self.paired else (H,)
        self.hx = tuple(random(*rows, *batch, size) for size in sizes) if call.hx else None
        self.lengths = torch.randint(1, call.T + 1, (call.B,), generator=generator)
        self.generator = generator

    def outputs(self, module, x, hx):
        """y and the last states; hx is a tuple or None, whatever the module takes."""

        def states(hx):
            return tuple(hx) if self.paired else (hx,)

        hx = hx if self.paired or not hx else hx[0]
        if self.cell:
            steps = []
            for step in x:
                hx = module(step, hx)
                steps.append(states(hx)[0])
            return [torch.stack(steps), *states(hx)]
        if self.call.form == "packed":
            x = pack_padded_sequence(x, self.lengths, self.batch_first, enforce_sorted=False)
        y, last = module(x, hx)
        return [y.data if isinstance(y, PackedSequence) else y, *states(last)]


def nudged(tensor, roundoff, generator):
    signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
    return tensor * (1 + signs.to(tensor) * roundoff)


def called(module, problem, x, hx, via):
    """The outputs, by one of the ways to call a module."""
    if via == "functional_call":
        own = dict(module.named_parameters())
        halves = {name: value * 0.5 for name, value in own.items()}

        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = module

            def forward(self, x, hx):
                return problem.outputs(self.inner, x, hx)

        return torch.func.functional_call(Whole(), {f"inner.{k}": v for k, v in halves.items()}, (x, hx))
    if via == "checkpoint":
        return torch.utils.checkpoint.checkpoint(
            lambda x, hx: problem.outputs(module, x, hx), x, hx, use_reentrant=False
        )
    if via in ("trace", "freeze"):
        return traced(module, problem, x, hx)
    return problem.outputs(module, x, hx)


def traced(module, problem, x, hx):
    """By a program recorded of a call with other sizes."""
    example = Problem(Call(form=problem.call.form, T=2, B=3, hx=problem.call.hx, seed=1), module)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, *hx):
            return tuple(problem.outputs(self.inner, x, hx or None))

    inputs = (example.x.to(x.dtype), *(s.to(x.dtype) for s in example.hx or ()))
    recorded = torch.jit.trace(Whole(), inputs, check_trace=False)
    if problem.call.via == "freeze":
        recorded = torch.jit.freeze(recorded.eval())
    for _ in range(2):  # the first calls are profiled, and what they find is optimised for
        recorded(x, *(hx or ()))
    return list(recorded(x, *(hx or ())))


@contextmanager
def parameters_as(module, change):
    """Inside, the parameters have other values."""
    saved = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(change(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(module.parameters(), saved, strict=True):
                p.copy_(before)


def changed(y, how, out_of_place):
    if how == "relu_":
        return y.relu() if out_of_place else y.relu_()
    if how == "add_":
        return y + 1 if out_of_place else y.add_(1)
    if how == "mul_":
        return y * 2 if out_of_place else y.mul_(2)
    return y


def evaluate(module, problem, dtype, *, exact=False, nudge=0, out_of_place=False):
    """Outputs and gradients of a call by name. dtype: of the numbers that enter, and of the result where not exact."""
    call = problem.call
    generator = torch.Generator().manual_seed(nudge)
    into = torch.float64 if exact else dtype
    if call.autocast:  # what enters is rounded by autocast then
        dtype, into = torch.bfloat16, torch.float64 if exact else torch.float32
    roundoff = testing.roundoff(dtype) if nudge else 0.0

    def entering(values):
        rounded = values.to(dtype).to(into)
        return nudged(rounded, roundoff, generator) if nudge else rounded

    problem.generator.manual_seed(call.seed + 1)
    differentiated = call.grad in ("first", "second")
    x, hx = entering(problem.x), problem.hx and tuple(entering(s) for s in problem.hx)
    if problem.call.strided:
        x = torch.nn.functional.pad(x, (1, 1))[..., 1:-1]
    x, hx = x.detach(), hx and tuple(s.detach() for s in hx)
    leaves = {"x": x, **dict(zip(("h0", "c0"), hx or (), strict=False))}
    if differentiated:
        for leaf in leaves.values():
            leaf.requires_grad_()
    leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    mode = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(call.grad, nullcontext)
    autocast = torch.autocast("cpu", torch.bfloat16) if call.autocast and not exact else nullcontext()
    values = parameters_as(module, entering) if exact else nullcontext()
    with values, mode(), autocast:
        y, *states = called(module, problem, x, hx, call.via)
        y = changed(y, call.in_place, exact or out_of_place)
        outputs = dict(zip(("y", "hn", "cn"), (y, *states), strict=False))
        results = {name: value.detach().clone() for name, value in outputs.items()}
        if not differentiated:
            return results

        def cotangents(values):
            numbers = [torch.randn(v.shape, generator=problem.generator, dtype=torch.float64) for v in values]
            return [entering(n).to(v) for n, v in zip(numbers, values, strict=True)]

        second = call.grad == "second"
        used = [value for value in outputs.values() if value.requires_grad]
        grads = torch.autograd.grad(
            used,
            list(leaves.values()),
            cotangents(used),
            create_graph=second,
            allow_unused=True,
            materialize_grads=True,
        )
        results |= {f"d{name}": grad.detach().clone() for name, grad in zip(leaves, grads, strict=True)}
        if second:
            grads = [grad for grad in grads if grad.requires_grad]
            grads = torch.autograd.grad(
                grads, list(leaves.values()), cotangents(grads), allow_unused=True, materialize_grads=True
            )
            results |= {f"dd{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


class Scale(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight * 0.5

    def right_inverse(self, weight):
        return weight * 2


def scale_output(module, args, output):
    """A forward hook."""
    y, *rest = output
    return (y._replace(data=y.data * 2) if isinstance(y, PackedSequence) else y * 2), *rest


def scale_input(module, args):
    """A forward pre-hook."""
    x, *rest = args
    return (x._replace(data=x.data * 0.5) if isinstance(x, PackedSequence) else x * 0.5), *rest


def look(module, grad_input, grad_output):
    """A backward hook."""


class Modules(RuleBasedStateMachine):
    """The operations. `ours`, `theirs` and `exact` have the same names for the same parameters all the time."""

    cell = False

    @initialize(
        H=st.sampled_from([3, 5, 16]),
        layers=st.integers(1, 2),
        bias=st.booleans(),
        bidirectional=st.booleans(),
        batch_first=st.booleans(),
        projected=st.booleans(),
        compilable=st.booleans(),
        kind=st.sampled_from(["LSTM", "LSTM", "GRU", "RNN"]),
    )
    def build(self, H, layers, bias, bidirectional, batch_first, projected, compilable, kind):
        torch.manual_seed(H)
        if self.cell:
            self.theirs = getattr(nn, f"{kind}Cell")(I, H, bias=bias)
        else:
            own = {"proj_size": 2 if projected else 0} if kind == "LSTM" else {}
            self.theirs = getattr(nn, kind)(
                I, H, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, **own
            )
        self.ours = fusedrnn.convert(copy.deepcopy(self.theirs), compilable=compilable)
        self.exact = copy.deepcopy(self.theirs).double()
        self.dtype, self.handles = torch.float32, []
        self.parametrized = self.normed = self.pruned = False

    def each(self, change):
        """Does something to all three, and to what is random in it the same."""
        for module in (self.ours, self.theirs, self.exact):
            torch.manual_seed(0)
            change(module)
        self.same()

    def same(self):
        """Makes float64 what the twin has, and holds fusedrnn to the same."""
        ours, theirs, exact = (dict(m.named_parameters()) for m in (self.ours, self.theirs, self.exact))
        assert list(ours) == list(theirs) == list(exact)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
            assert ours[name].requires_grad == value.requires_grad
            exact[name].data = value.detach().double().clone()
        states = self.ours.state_dict(), self.theirs.state_dict()
        assert list(states[0]) == list(states[1])
        assert all(states[0][k].dtype == states[1][k].dtype for k in states[0])

    def name(self, k):
        names = [name for name, _ in self.theirs.named_parameters()]
        return names[k % len(names)]

    # Calls

    @invariant()
    def plain_call(self):
        self.compare(self.possible(Call()))

    @rule(call=CALLS)
    def call(self, call):
        self.compare(self.possible(call))

    @rule(call=CALLS)
    def call_twice_differentiated(self, call):
        self.compare(self.possible(replace(call, grad="second", in_place="")))

    @rule(call=CALLS, via=st.sampled_from(["functional_call", "threads", "average", "checkpoint"]))
    def call_through(self, call, via):
        self.compare(self.possible(replace(call, via=via)))

    def possible(self, call):
        """The nearest call that nn.LSTM, and its hooks and wrappers, can do."""
        change = {}
        if self.cell and call.form == "packed":
            change["form"] = "padded"
        if self.pruned and call.via in ("threads", "average", "functional_call", "checkpoint"):
            change["via"] = "module"  # a pruned weight is an attribute that each forward sets
        if (self.parametrized or self.normed) and call.via == "average":
            change["via"] = "module"
        if call.autocast and (self.dtype != torch.float32 or not testing.nn_lstm_autocasts()):
            change["autocast"] = False
        if call.grad == "second" and (self.dtype in (torch.bfloat16, torch.float16) or call.autocast):
            change["grad"] = "first"
        if call.via in ("threads", "average", "checkpoint", "trace", "freeze"):
            change["grad"] = "no_grad" if call.via in ("trace", "freeze") else "first"
        if call.in_place and (self.handles or self.cell or call.via != "module"):
            change["in_place"] = ""
        if call.form == "packed" and any(hook is look for hook in self.hooks()):
            change["form"] = "padded"
        return replace(call, **change)

    def hooks(self):
        return [hook for hook, _ in self.handles]

    def compare(self, call):
        problem = Problem(call, self.theirs)
        exact, *moved = (
            evaluate(self.exact, problem, self.dtype, exact=True, nudge=nudge) for nudge in range(NUDGES + 1)
        )
        with self.torch_as_it_can(call.grad == "second"):
            allowed = True
            try:
                theirs = evaluate(self.theirs, problem, self.dtype)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                allowed = False
                theirs = evaluate(self.theirs, problem, self.dtype, out_of_place=True)
        try:
            found = self.evaluate_ours(problem)
        except RuntimeError as error:
            if allowed or "modified by an inplace operation" not in str(error):
                raise
            return
        for ours in found:
            assert list(ours) == list(theirs)
            for name, value in theirs.items():
                rounding = max(float((m[name] - exact[name]).abs().max()) for m in moved)
                mine = ours[name]
                assert mine.dtype == value.dtype, name
                if call.autocast:  # computed in bfloat16, whatever the result is of
                    mine, value = mine.bfloat16(), value.bfloat16()
                testing.assert_as_exact_as(name, mine, value, exact[name], rounding)

    def torch_as_it_can(self, second=False):
        """oneDNN refuses some float16, and its backward has no derivative."""
        off = self.dtype == torch.float16 or second
        return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None) if off else nullcontext()

    def evaluate_ours(self, problem):
        if problem.call.via == "threads":
            with ThreadPoolExecutor(2) as pool:
                futures = [pool.submit(evaluate, self.ours, problem_copy(problem), self.dtype) for _ in range(2)]
                return [future.result() for future in futures]
        if problem.call.via == "average":
            average = AveragedModel(self.ours)
            average.update_parameters(self.ours)
            return [evaluate(average.module, problem, self.dtype)]
        return [evaluate(self.ours, problem, self.dtype)]

    @precondition(lambda self: not self.handles and not self.parametrized and not self.pruned)
    @rule(call=CALLS, frozen=st.booleans())
    def trace(self, call, frozen):
        forms = ("padded", "unbatched")
        form = call.form if call.form in forms and not (self.cell and call.form == "unbatched") else "padded"
        T = 2 if self.cell else call.T  # a loop over a cell is unrolled
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            via = "freeze" if frozen else "trace"
            self.compare(self.possible(Call(form=form, T=T, B=call.B, hx=call.hx, via=via, seed=call.seed)))

    @precondition(lambda self: not self.cell and not self.pruned)
    @rule()
    def symbolic_trace(self):
        """What is traced has one leaf, as it has with nn.LSTM, and computes the same."""
        for module in (self.ours, self.theirs):
            graph = torch.fx.symbolic_trace(nn.Sequential(module))
            assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]

    # Weights

    @rule(k=st.integers(0, 40), data=st.booleans())
    def change_in_place(self, k, data):
        name = self.name(k)

        def change(module):
            p = dict(module.named_parameters())[name]
            with torch.no_grad():
                (p.data if data else p).mul_(0.5).add_(0.125)

        self.each(change)

    @rule(k=st.integers(0, 40))
    def give_other_data(self, k):
        name = self.name(k)

        def change(module):
            p = dict(module.named_parameters())[name]
            p.data = (p.data * 0.5).clone()

        self.each(change)

    @precondition(lambda self: not self.parametrized and not self.pruned)
    @rule(k=st.integers(0, 40))
    def replace_parameter(self, k):
        name = self.name(k)
        self.each(lambda module: setattr(module, name, nn.Parameter(getattr(module, name).detach() * 0.5)))

    @precondition(lambda self: any(p.requires_grad for p in self.theirs.parameters()))
    @rule(call=CALLS)
    def optimizer_step(self, call):
        """By the gradients of the twin, which `compare` holds ours to."""
        problem = Problem(self.possible(Call(T=call.T, B=call.B, seed=call.seed)), self.theirs)
        with self.torch_as_it_can():
            grads = evaluate(self.theirs, problem, self.dtype)

        def change(module):
            named = {name: p for name, p in module.named_parameters() if p.requires_grad}
            for name, p in named.items():
                p.grad = grads[f"d{name}"].to(p)
            torch.optim.SGD(named.values(), lr=0.125).step()
            module.zero_grad()

        self.each(change)

    @rule()
    def load_state_dict(self):
        def change(module):
            state = {name: value * 0.5 if "mask" not in name else value for name, value in module.state_dict().items()}
            module.load_state_dict(state)

        self.each(change)

    @rule(k=st.integers(0, 40), on=st.booleans())
    def requires_grad(self, k, on):
        name = self.name(k)
        self.each(lambda module: dict(module.named_parameters())[name].requires_grad_(on))

    @precondition(lambda self: not self.pruned)
    @rule(dtype=st.sampled_from(DTYPES), to=st.booleans())
    def cast(self, dtype, to):
        methods = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half"}
        for module in (self.ours, self.theirs):
            if to:
                module.to(dtype)
            else:
                getattr(module, methods[dtype])()
        self.dtype = dtype
        self.same()

    @precondition(lambda self: not self.pruned and not self.parametrized)
    @rule()
    def share_memory(self):
        self.each(lambda module: module.share_memory())

    @precondition(lambda self: not self.parametrized and not self.pruned and self.dtype != torch.float16)
    @rule(norm=st.booleans())
    def parametrize(self, norm):
        name = self.name(1)
        weight = getattr(self.theirs, name)
        if norm and weight.reshape(len(weight), -1).norm(dim=1).all():  # a row of zeros, as pruning leaves, makes NaN
            self.each(lambda module: parametrizations.weight_norm(module, name))
            self.normed = True
        else:
            self.each(lambda module: parametrize.register_parametrization(module, name, Scale()))
        self.parametrized = True

    @precondition(lambda self: self.parametrized)
    @rule()
    def remove_parametrization(self):
        name = next(iter(self.theirs.parametrizations))
        self.each(lambda module: parametrize.remove_parametrizations(module, name))
        self.parametrized = False

    @precondition(lambda self: not self.parametrized and not self.pruned)
    @rule(k=st.integers(0, 1))
    def prune(self, k):
        name = self.name(k)
        self.each(lambda module: prune.random_unstructured(module, name, 0.5))
        self.pruned = True

    @precondition(lambda self: self.pruned)
    @rule()
    def remove_pruning(self):
        name = next(n.removesuffix("_orig") for n, _ in self.theirs.named_parameters() if n.endswith("_orig"))
        self.each(lambda module: prune.remove(module, name))
        self.pruned = False

    # The module

    @rule(compilable=st.booleans())
    def convert(self, compilable):
        fusedrnn.convert(self.ours, compilable=compilable)

    @rule()
    def revert(self):
        fusedrnn.revert(self.ours)
        assert type(self.ours).__mro__[-4:] == type(self.theirs).__mro__[-4:]

    @rule(train=st.booleans())
    def train(self, train):
        self.each(lambda module: module.train(train))

    # torch refuses what is parametrized, and for good what has had a weight norm.
    @precondition(lambda self: not self.pruned and not self.parametrized and not self.normed)
    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def duplicate(self, how):
        duplicate = copy.deepcopy if how == "deepcopy" else lambda module: pickle.loads(pickle.dumps(module))
        self.ours, self.theirs, self.exact = (duplicate(m) for m in (self.ours, self.theirs, self.exact))
        self.handles = [(hook, None) for hook in self.hooks()]  # the copies have the hooks, and no handles to them
        self.same()

    @precondition(lambda self: not self.cell and len(self.handles) < 2)
    @rule(which=st.sampled_from(["forward", "pre", "backward"]))
    def add_hook(self, which):
        hook = {"forward": scale_output, "pre": scale_input, "backward": look}[which]
        handles = []

        def add(module):
            register = {
                "forward": module.register_forward_hook,
                "pre": module.register_forward_pre_hook,
                "backward": module.register_full_backward_hook,
            }[which]
            handles.append(register(hook))

        self.each(add)
        self.handles.append((hook, handles))

    @precondition(lambda self: self.handles and self.handles[-1][1])
    @rule()
    def remove_hook(self):
        for handle in self.handles.pop()[1]:
            handle.remove()


def problem_copy(problem):
    """For another thread: the random numbers are drawn from its generator."""
    duplicate = copy.copy(problem)
    duplicate.generator = torch.Generator()
    return duplicate


class Cells(Modules):
    cell = True


@pytest.mark.timeout(300 + SECONDS)
@pytest.mark.parametrize("machine", [Modules, Cells], ids=["layers", "cell"])
def test_sequences_of_operations(machine):
    """Seed after seed until the time is over: each is the same set of sequences wherever it runs."""
    until, k = time.monotonic() + SECONDS / 2, FIRST_SEED
    options = settings(
        max_examples=3,  # so that a seed is over in seconds, on a busy machine too
        stateful_step_count=12,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    while time.monotonic() < until:
        print(f"FUSEDRNN_FUZZ_SEED={k}")  # shown where the test fails
        run_state_machine_as_test(seed(k)(type(machine.__name__, (machine,), {})), settings=options)
        k += 1
    assert k > FIRST_SEED
