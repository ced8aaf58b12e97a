"""fusedrnn.tune: `python -m fusedrnn tune` for the layers of one model, or for given sizes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import dispatch
from ..layout import cell_of
from . import choice
from .profile import Key, Measurement

if TYPE_CHECKING:
    from . import session


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`. Printing it shows the table."""

    path: Path  # the profile with the measurements
    measurements: list[Measurement] = field(default_factory=list)

    def __str__(self) -> str:
        from .report import table

        return "\n".join([*table(self.measurements), f"profile: {self.path}"])


def tune(
    model: nn.Module,
    example_inputs: Any,
    *,
    modes: Sequence[str] = ("train", "infer"),
    seconds: float = 1.0,
    out: Path | str | None = None,
) -> Tuning:
    """Verifies and measures the backends for the recurrent layers of a model; `auto` then uses the fastest.

    The model is called once, in evaluation mode and without gradients, to record the shapes of its layers' inputs;
    these are then measured with random numbers in a separate process. An interrupt keeps the measurements made so far.

    Args:
        model: any module; its recurrent layers and cells may be converted or not.
        example_inputs: the arguments of one call: a tuple, a mapping for keywords, or one argument.
        modes: "train" and "infer".
        seconds: maximum sampling time for each size and mode.
        out: a file for the profile; by default the user's profile, which later processes load.

    Returns:
        The measurements and the path of their profile. This process uses them at once, unless they are in `out`, which
        must be named by FUSEDRNN_PROFILE.

    Raises:
        TypeError: model is not a Module.
        ValueError: no LSTM, GRU or RNN was called, or a mode is unknown.
        RuntimeError: there is nothing to measure on the device of a layer.
        OSError: the profile cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not set(modes) <= {"train", "infer"}:
        raise ValueError(f'modes must be of "train" and "infer", got {list(modes)}')
    from . import session

    problems = _called_with(model, example_inputs)
    if not problems:
        raise ValueError("no LSTM, GRU or RNN of the model, and no cell of one, was called with these inputs")
    keys: dict[str, list[Key]] = {}
    for problem in problems:
        of_device = keys.setdefault(problem.device, [])
        of_device += [dispatch.key_of(problem._replace(train=mode == "train")) for mode in modes]
    tuning = None
    for device, found in keys.items():
        tuning = _measure(device, list(dict.fromkeys(found)), session.Settings(budget=seconds), out, tuning)
    assert tuning is not None
    return tuning


def _measure(
    device: str,
    keys: list[Key],
    settings: session.Settings,
    out: Path | str | None,
    before: Tuning | None = None,
    until: float | None = None,
) -> Tuning:
    from . import session, worker

    backends = worker.supported(device)
    if not backends:
        raise RuntimeError(f"there is nothing to measure on {device}: no backend with kernels can compute there")
    keeper = session.Keeper(device, None if out is None else Path(out))
    try:
        session.measure(keys, device, backends, keeper.keep, settings, until)
    finally:
        choice.forget()
    return Tuning(keeper.path, [*(before.measurements if before else ()), *keeper.made])


def _called_with(model: nn.Module, example_inputs: Any) -> list[dispatch.Problem]:
    """Records the problem of every call of a recurrent layer or cell."""
    problems: list[dispatch.Problem] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input, hx, *_ = (*args, kwargs.get("input"), kwargs.get("hx")) if not args else (*args, kwargs.get("hx"), None)
        if isinstance(input, (Tensor, PackedSequence)):
            problems.append(dispatch.problem_of(module, input, hx))

    layers = [module for module in model.modules() if cell_of(module) is not None]
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad(), _evaluating(model):
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            elif isinstance(example_inputs, tuple) and not isinstance(example_inputs, PackedSequence):
                model(*example_inputs)
            else:
                model(example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return problems


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def write_profile(
    path: Path | str,
    device: str,
    keys: Sequence[Key] | None = None,
    *,
    seconds: float | None = None,
    limit: float = 180.0,
) -> Tuning:
    """Verifies and measures the backends on a device, for a program that runs unattended, and writes a profile.

    Args:
        path: the file; existing measurements of the same machine and versions are kept and not repeated.
        device: "cpu" or "cuda".
        keys: what to measure; by default the grid of `python -m fusedrnn tune`, the coarsest first.
        seconds: time budget, after which no new measurement starts.
        limit: timeout in seconds for one key; a backend that exceeds it counts as hanging.

    Returns:
        The measurements, including failures.

    Raises:
        RuntimeError: there is nothing to measure on this device, or the process that measures cannot work.
        OSError: the profile cannot be written.
    """
    from . import grid, session

    if keys is None:
        keys = grid.standard(device, list(grid.DTYPES[device]))
    known = session.Keeper(device, Path(path)).profile.measurements
    until = None if seconds is None else time.monotonic() + seconds
    left = [key for key in keys if key not in known]
    return _measure(device, left, session.Settings(limit=limit), path, None, until)
