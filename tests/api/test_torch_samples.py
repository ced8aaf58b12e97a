"""What torch tests its recurrent modules with: its samples ship in the wheel, and run against any class."""

import pytest
import torch
from torch.testing._internal import common_modules
from torch.testing._internal.common_utils import noncontiguous_like

from fusedrnn import dispatch
from fusedrnn.module import BASES

# Their import forbids the whole process to set the flags of torch.backends.
torch.backends.__allow_nonbracketed_mutation_flag = True


def info(cls):
    return next(entry for entry in common_modules.module_db if entry.module_cls is cls)


PAIRS = [(theirs, ours) for ours, theirs in BASES.items()]
INSTANCES = [(theirs, ours) for theirs, ours in PAIRS if issubclass(ours, theirs)]


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in flat(part)]


def supported(place, theirs):
    """Skips what a backend has no kernel for."""
    module = theirs(3, 4, dtype=torch.float64, device=place.device)
    reason = dispatch.supports(place.backend, dispatch.problem_of(module, torch.zeros(2, 3, device=place.device)))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_torchs_samples(place, theirs, ours):
    supported(place, theirs)
    device, dtype = place.device, torch.float64
    entry = info(theirs)
    samples = entry.module_inputs_func(entry, device=device, dtype=dtype, requires_grad=True, training=True)
    assert len(samples) >= 2
    for sample in samples:
        arguments, inputs = sample.constructor_input, sample.forward_input
        module = ours(*arguments.args, **arguments.kwargs, device=device, dtype=dtype)
        outputs = flat(module(*inputs.args))
        expected = flat(sample.reference_fn(module, *inputs.args))
        torch.testing.assert_close(outputs, expected)
        x, *hx = (
            noncontiguous_like(given) if isinstance(given, torch.Tensor) else tuple(map(noncontiguous_like, given))
            for given in inputs.args
        )
        assert not x.is_contiguous()
        again = module(x, *hx)
        torch.testing.assert_close(flat(again), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "ours"), INSTANCES)
def test_torchs_gradients(place, theirs, ours):
    """What torch expects its own to fail on CUDA: gradcheck and gradgradcheck; in eval mode, which fails there too."""
    supported(place, theirs)
    if place.backend == "reference":
        pytest.skip("its derivatives are autograd's")
    entry = info(theirs)
    samples = entry.module_inputs_func(
        entry, device=place.device, dtype=torch.float64, requires_grad=True, training=False
    )
    for number, sample in enumerate(samples):
        arguments, inputs = sample.constructor_input, sample.forward_input
        module = ours(*arguments.args, **arguments.kwargs, device=place.device, dtype=torch.float64).eval()
        x, *rest = inputs.args
        hx = flat(rest)
        is_tuple = bool(rest) and isinstance(rest[0], tuple)
        names = [name for name, _ in module.named_parameters()]

        def call(x, *leaves, module=module, names=names, is_tuple=is_tuple):
            weights, states = dict(zip(names, leaves, strict=False)), leaves[len(names) :]
            hx = states if is_tuple else states[0] if states else None
            return flat(torch.func.functional_call(module, weights, (x, hx)))

        leaves = [t.detach().requires_grad_() for t in (x, *module.parameters(), *hx)]
        torch.autograd.gradcheck(call, leaves, fast_mode=True)
        if number % 5 == 0:  # slow, and every option is met: they repeat with periods that are powers of two
            torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_torchs_error_samples(theirs, ours):
    entry = info(theirs)
    samples = entry.module_error_inputs_func(
        entry, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    )
    assert len(samples) >= 2
    for sample in samples:
        given = sample.module_error_input
        arguments, inputs = given.constructor_input, given.forward_input
        if sample.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                ours(*arguments.args, **arguments.kwargs)
        else:
            module = ours(*arguments.args, **arguments.kwargs)
            with pytest.raises(sample.error_type, match=sample.error_regex):
                module(*inputs.args, **inputs.kwargs)
