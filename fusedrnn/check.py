"""The checks of `python -m fusedrnn check`: derivatives against finite differences, all results against torch's.

A job is one check of one case on one device, run on every backend. Its outcome on a backend is passed, failed, or not
applicable: the backend does not support the case or, on `aten`, torch's own layer lacks what the check needs. Not
applicable never counts as passed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.func import functional_call

from . import testing
from .cells import CELLS, LSTM
from .dispatch import explain, use_backend
from .module import BASES, VARIANT_OPTIONS
from .testing import Answer, Case, InexactError, Inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_EVERYTHING = {"layers": 2, "bidirectional": True, "proj_size": True, "lengths": True, "reset": True, "states": True}
_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"hx": False},
    {"layers": 2},
    {"bidirectional": True},
    {"proj_size": True},  # half of H
    {"batch_first": True, "strided": True},
    {"packed": True, "bidirectional": True},
    {"lengths": True, "bidirectional": True},
    {"reset": True, "bidirectional": True},
    {"states": True},
    _EVERYTHING,
    {**_EVERYTHING, "hx": False, "bias": False, "packed": True, "lengths": False, "batch_first": True},
)
# Cases for the other cells, which share everything but the pointwise function with the LSTM.
_OWN_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"packed": True, "bias": False, "hx": False, "batch_first": True},
    {key: value for key, value in _EVERYTHING.items() if key != "proj_size"},
)
# Variants of the LSTM, each option once in each dtype; `quick` takes the last one.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {"peephole": True, "proj_size": True, "lengths": True},
    {"coupled": True, "packed": True, "recurrent_dropout": 0.25},
    {"peephole": True, "recurrent_dropout": 0.25, "recurrent_dropout_mode": "state", "proj_size": True, "reset": True},
    {"zoneout": (0.5, 0.1), "layers": 2, "hx": False, "bias": False},
    {"peephole": True, "zoneout": (0.1, 0.5), "recurrent_dropout": 0.25, "bidirectional": True, "states": True},
    {"peephole": True, "coupled": True, "zoneout": 0.25, "recurrent_dropout": 0.25}
    | {key: value for key, value in _EVERYTHING.items() if key != "proj_size"},
)
_QUICK_SIZES = ((1, 3, 5, 2), (7, 3, 5, 33))  # T, B, I, H
_SIZES = (*_QUICK_SIZES, (1, 1, 1, 2), (2, 17, 7, 64), (63, 3, 9, 30), (40, 1, 20, 129))


class Job(NamedTuple):
    """One check of one case on one device."""

    check: str  # "gradcheck", "gradgradcheck", or the baseline of a comparison: torch's class ("nn.GRU"), "reference"
    case: Case
    device: str
    quick: bool


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job on one backend."""

    job: Job
    backend: str
    excess: float | None = None  # of a comparison: the largest error over its tolerance
    failure: str | None = None
    inapplicable: str | None = None


def jobs(devices: Sequence[str], quick: bool) -> list[Job]:
    """All checks: derivatives in float64, results in every dtype. `quick` omits large sizes, all but one option of the
    other cells in each dtype, and all but one variant of the LSTM."""
    checks: list[tuple[str, Case]] = []
    for cell in CELLS:
        some = quick and cell != LSTM.name
        options = _OPTIONS if cell == LSTM.name else _OWN_OPTIONS
        sizes = _SIZES if not quick else _QUICK_SIZES[-1:] if some else _QUICK_SIZES
        small = [_case((3, 3, 2, 2), torch.float64, cell, own) for own in (options[-1:] if some else options)]
        grid = [
            _case(size, dtype, cell, own)
            for size in sizes
            for k, dtype in enumerate(DTYPES)
            for own in (options[k % len(options) :][:1] if some else options)
        ]
        checks += [(check, case) for case in small for check in ("gradcheck", "gradgradcheck")]
        checks += [(check, case) for case in grid for check in (_baseline(case), "reference")]
    for variant in _VARIANTS[-1:] if quick else _VARIANTS:
        case = _case((3, 3, 2, 2), torch.float64, LSTM.name, variant)
        checks += [(check, case) for check in ("gradcheck", "gradgradcheck")]
        checks += [("reference", _case(_QUICK_SIZES[-1], dtype, LSTM.name, variant)) for dtype in DTYPES]
    return [Job(check, case, device, quick) for device in devices for check, case in checks]


def run(job: Job, backends: Sequence[str]) -> list[Outcome]:
    """Runs a job on each of the backends, which must be available."""
    return [_run(job, backend) for backend in _concerned(job, backends)]


def applies(job: Job, backends: Sequence[str]) -> bool:
    """Whether one of the backends, which must be available, supports a job."""

    def supports(backend: str) -> bool:
        with use_backend(backend):
            return _unsupported(job, backend) is None

    return any(supports(backend) for backend in _concerned(job, backends))


def _concerned(job: Job, backends: Sequence[str]) -> list[str]:
    if job.check == "reference":  # it is not compared with itself, nor with torch's own layers
        return [backend for backend in backends if backend not in ("reference", "aten")]
    return list(backends)


def _case(size: tuple[int, int, int, int], dtype: torch.dtype, cell: str, options: dict[str, Any]) -> Case:
    proj_size = size[-1] // 2 if "proj_size" in options else 0
    variant = tuple(item for item in options.items() if item[0] in VARIANT_OPTIONS)
    of_torch = {key: value for key, value in options.items() if key not in VARIANT_OPTIONS}
    return Case(*size, dtype=dtype, cell=cell, variant=variant, **{**of_torch, "proj_size": proj_size})


def _baseline(case: Case) -> str:
    """The name of torch's own class for a case."""
    return f"nn.{testing.LAYERS[case.cell].__name__}"


def _ours(case: Case) -> type:
    """Our class for a case."""
    theirs = testing.LAYERS[case.cell]
    return next(cls for cls, base in BASES.items() if base is theirs and issubclass(cls, theirs))


def _run(job: Job, backend: str) -> Outcome:
    check = _CHECKS[job.check]
    try:
        with use_backend(backend), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            inapplicable = _unsupported(job, backend)
            if inapplicable is not None:
                return Outcome(job, backend, inapplicable=inapplicable)
            return Outcome(job, backend, check(job, _ours(job.case)))
    except Exception as error:  # any error is a failure of this case on this backend
        limit = _limit_of_torch(check, job) if backend == "aten" else None
        if limit is not None:
            return Outcome(job, backend, inapplicable=limit)
        return Outcome(job, backend, getattr(error, "excess", None), failure=_describe(error))


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def _unsupported(job: Job, backend: str) -> str | None:
    x, hx, options = testing.arguments(job.case, job.case.inputs(job.device))
    module = job.case.module(_ours(job.case) if job.case.variant else None, job.device)
    return explain(module, x, hx, **options).reasons.get(backend)


def _limit_of_torch(check: Callable[[Job, type], float | None], job: Job) -> str | None:
    """Why the check fails for torch's own layer itself, if it does."""
    theirs = testing.LAYERS[job.case.cell]
    try:
        check(job, theirs)
    except Exception as error:
        return f"torch's own {theirs.__name__} fails here as well: {_describe(error)}"
    return None


def _check_gradient(job: Job, cls: type) -> None:
    _check_derivative(gradcheck, job, cls)


def _check_second_gradient(job: Job, cls: type) -> None:
    def check(function: Callable[..., Any], leaves: list[Tensor], **options: Any) -> None:
        random = torch.Generator().manual_seed(job.case.seed + 1)
        douts = [torch.randn(y.shape, generator=random).to(y).requires_grad_() for y in function(*leaves)]
        gradgradcheck(function, leaves, douts, **options)

    _check_derivative(check, job, cls)


def _check_derivative(check: Callable[..., object], job: Job, cls: type) -> None:
    case = job.case
    module, inputs = case.module(cls, job.device), case.inputs(job.device)
    parameters = dict(module.named_parameters())
    states = [] if inputs.hx is None else [inputs.hx] if isinstance(inputs.hx, Tensor) else list(inputs.hx)
    names = [*("x", "h0", "c0")[: 1 + len(states)], *parameters]
    leaves = [leaf.detach().requires_grad_() for leaf in (inputs.x, *states, *parameters.values())]

    def outputs(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(parameters, rest[len(states) :], strict=True))
        hx = rest[: len(states)] if len(states) == 2 else rest[0] if states else None

        def called(*args: Any, **options: Any) -> Any:
            return functional_call(module, weights, args, options)

        return tuple(testing.call(called, case, Inputs(x, hx, inputs.lengths, inputs.reset)).values())

    try:
        with testing.poisoned(), testing.single_threaded():
            check(outputs, leaves, atol=1e-7, rtol=1e-5, fast_mode=job.quick)
    except GradcheckError as error:
        mismatch = str(error).strip().splitlines()[0]
        raise AssertionError(f"{mismatch} inputs are {', '.join(names)}") from error


def _compare(job: Job, cls: type) -> float:
    answers = _reference_answers(job.case, job.device) if job.check == "reference" else _answers(job.case, job.device)
    with testing.poisoned():
        ours = testing.evaluate(testing.call, cls, job.case, job.device)
    worst, failures = 0.0, []
    for name, answer in answers.items():
        try:
            worst = max(worst, testing.assert_as_exact_as(name, ours[name], *answer))
        except InexactError as error:
            worst = max(worst, error.excess)
            failures.append(str(error))
    if failures:
        raise InexactError("\n".join(failures), worst)
    return worst


@lru_cache(maxsize=1)  # the jobs of a case follow one another
def _answers(case: Case, device: str) -> dict[str, Answer]:
    return testing.answers(case, device)


@lru_cache(maxsize=1)
def _reference_answers(case: Case, device: str) -> dict[str, Answer]:
    with use_backend("reference"), testing.single_threaded():
        if case.variant:  # torch has no such layer
            return testing.answers(case, device, testing.call, _ours(case))
        stored = testing.evaluate(testing.call, _ours(case), case, device)
        exact = testing.evaluate(testing.call, _ours(case), case, device, torch.float64)
    return {k: Answer(stored[k], exact[k], answer.rounding) for k, answer in _answers(case, device).items()}


# Each raises where the check fails, and returns the excess of a comparison.
_CHECKS: dict[str, Callable[[Job, type], float | None]] = {
    "gradcheck": _check_gradient,
    "gradgradcheck": _check_second_gradient,
    "reference": _compare,
    **{f"nn.{theirs.__name__}": _compare for theirs in testing.LAYERS.values()},
}
