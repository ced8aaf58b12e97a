"""Correctness, before anything is timed: every contender is held to the rule of fusedrnn/testing.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import testing
from fusedrnn.testing import Answer, Inputs

from .cases import BenchmarkCase, Sequences
from .contender import Contender

# The rounding of testing.py grows with the roundings that it is made of. TensorFloat-32 keeps 10 bits of an operand, as
# float16 does, and an operand is rounded as often as a 16-bit dtype is stored.
_TF32 = testing.roundoff(torch.float16) / testing.roundoff(torch.float32)


class WrongError(Exception):
    """Results that break the rule: `excess` is the worst error over what is allowed."""

    def __init__(self, message: str, excess: float) -> None:
        super().__init__(message)
        self.excess = excess


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Inside, a GPU multiplies float32 in TensorFloat-32 or, without, as IEEE has it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    _allow_tf32(tf32, tf32)
    try:
        yield
    finally:
        _allow_tf32(*before)


def _allow_tf32(products: bool, cudnn: bool) -> None:
    # As torch.backends.cudnn.allow_tf32 = ... does, which is forbidden once torch's own test helpers are loaded.
    torch.backends.cuda.matmul.allow_tf32 = products
    torch._C._set_cudnn_allow_tf32(cudnn)


def worst_error(cell: BenchmarkCase, contender: Contender, module: nn.Module, most_flops: float = 1e10) -> float:
    """Computes the cell once, on a CPU its `affordable` part, and holds every tensor to the rule.

    In training the gradients of all inputs and parameters are among them.

    Args:
        module: the contender's, on the device of the cell.
        most_flops: of a forward, in a check on a CPU.

    Returns:
        The largest error over what is allowed, at most 1.

    Raises:
        WrongError: it is more; the message names the tensors.
    """
    cell = affordable(cell, most_flops)
    answers = _answers(cell.case, cell.tf32, cell.device)
    with contender.active(), products(cell.tf32):
        ours = _gradients_too(cell, module) if cell.mode == "train" else _outputs(cell, module)
    worst, complaints = 0.0, []
    for name, values in ours.items():
        try:
            worst = max(worst, testing.assert_as_exact_as(name, values, *answers[name]))
        except testing.InexactError as error:
            worst = max(worst, error.excess)
            complaints.append(str(error))
    if complaints:
        raise WrongError("; ".join(complaints), worst)
    return worst


def affordable(cell: BenchmarkCase, most_flops: float = 1e10) -> BenchmarkCase:
    """The cell with as many time steps as a CPU can compute in float64, several times over, in less than a minute."""
    forward = replace(cell, mode="infer").flops
    if cell.device != "cpu" or forward <= most_flops:
        return cell
    return replace(cell, case=replace(cell.case, T=max(int(cell.case.T * most_flops / forward), min(cell.case.T, 2))))


def _outputs(cell: BenchmarkCase, module: nn.Module) -> dict[str, Tensor]:
    with torch.set_grad_enabled(cell.mode == "forward"):
        outputs = testing.call(module, cell.case, cell.case.inputs(cell.device))
    return {name: values.detach() for name, values in outputs.items()}


def _gradients_too(cell: BenchmarkCase, module: nn.Module) -> dict[str, Tensor]:
    return evaluate(cell.case, cell.tf32, cell.device, lambda *_, **__: module)


def evaluate(case: testing.Case, tf32: bool, device: str, cls: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """`testing.evaluate`, on a GPU in TensorFloat-32 if asked for."""
    with products(tf32):
        return testing.evaluate(_call_in_tf32 if tf32 else testing.call, cls, case, device)


def _call_in_tf32(module: Any, case: testing.Case, inputs: Inputs, caller: testing.Call = testing.call) -> Any:
    # testing.evaluate has just switched it off, and puts back what was there when it is done.
    torch._C._set_cudnn_allow_tf32(True)
    return caller(module, case, inputs)


@lru_cache(maxsize=1)  # the modes of a case follow one another
def _answers(case: Sequences, tf32: bool, device: str) -> dict[str, Answer]:
    cls, caller = (fusedrnn.LSTM, testing.call) if case.variant else (testing.LAYERS[case.cell], testing.call_torch)
    with fusedrnn.use_backend("reference"):  # of variants, which torch lacks
        answers = testing.answers(case, device, caller, cls)
        return in_tf32(answers, case, device, caller, cls) if tf32 else answers


def in_tf32(
    answers: dict[str, Answer], case: testing.Case, device: str, caller: testing.Call, cls: Callable[..., nn.Module]
) -> dict[str, Answer]:
    """The answers in float32 as TensorFloat-32 has them: its own baseline, and its rounding."""
    with products(True):
        narrow = testing.evaluate(partial(_call_in_tf32, caller=caller), cls, case, device)
    return {name: Answer(narrow[name], answer.exact, answer.rounding * _TF32) for name, answer in answers.items()}
