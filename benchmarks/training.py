"""Whole models trained with torch.nn.LSTM, and again after `fusedrnn.convert`: the same losses, and how fast.

The losses of the first steps are held to the rule of fusedrnn/testing.py: against a training in float64, at most twice
nn.LSTM's own error, plus what moving every initial parameter by a roundoff changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn import testing

from .contender import BASELINE, OURS, Contender
from .memory import peak_bytes
from .models import Task
from .results import Row
from .run import Settings, blame, fill, fill_ratios, stream
from .timing import Clock, Lane, take_turns
from .verify import products

_NUDGES = 2  # random directions in which the initial parameters are moved
_MAX_GRADIENT_NORM = 1.0
_BATCHES = 64  # that a training goes through again and again


class Training:
    """A model in training, step by step, for as long as one likes.

    Args:
        task: what.
        device: where.
        dtype: of parameters and inputs; initial values are float32's in any case.
        converted: by fusedrnn.
        nudge: unless 0, the seed of the signs with which every initial parameter is moved by a roundoff of float32.
    """

    def __init__(
        self, task: Task, device: str, dtype: torch.dtype = torch.float32, *, converted: bool = False, nudge: int = 0
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = task.build().to(device, dtype)
        if converted:
            fusedrnn.convert(self.model)
        if nudge:
            signs = torch.Generator().manual_seed(nudge)
            for parameter in self.model.parameters():
                sign = torch.randint(0, 2, parameter.shape, generator=signs).mul_(2).sub_(1).to(parameter)
                parameter.data.mul_(1 + sign * testing.roundoff(torch.float32))
        self._optimizer = task.optimizer(self.model.parameters())
        self._batches: Iterator[Any] = cycle([_moved(batch, device, dtype) for batch in task.batches[:_BATCHES]])
        self._state: Any = None

    def step(self) -> float:
        """One batch; the loss before it."""
        loss, state = self.model.loss(next(self._batches), self._state)  # type: ignore[operator]
        self._state = None if state is None else tuple(part.detach() for part in state)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRADIENT_NORM)
        self._optimizer.step()
        return loss.item()


def _moved(batch: Any, device: str, dtype: torch.dtype) -> Any:
    """On a device, and numbers that are not indices in a dtype."""
    if isinstance(batch, PackedSequence):
        return batch.to(device)  # type: ignore[arg-type]
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None)
    return tuple(_moved(part, device, dtype) for part in batch)


@dataclass
class Curve:
    """The losses of a training, step by step."""

    model: str
    contender: str
    losses: list[float]


def measure(
    task: Task, contenders: Sequence[Contender], device: str, clock: Clock, settings: Settings, steps: int
) -> tuple[list[Row], list[Curve]]:
    """Trains with nn.LSTM and with every backend of ours; checks the losses of the first steps, then times."""
    with products(tf32=False):
        return _measure(task, contenders, device, clock, settings, steps)


def _measure(
    task: Task, contenders: Sequence[Contender], device: str, clock: Clock, settings: Settings, steps: int
) -> tuple[list[Row], list[Curve]]:
    entered = [c for c in contenders if c.unavailable is None and (c.name == BASELINE or c.name.startswith(OURS))]
    exact, *nudged = (_losses(Training(task, device, torch.float64, nudge=k), steps) for k in range(_NUDGES + 1))
    rounding = max(float((other - exact).abs().max()) for other in nudged)
    baseline = _losses(Training(task, device), steps)
    curves, rows, lanes = [Curve(task.name, "float64", exact.tolist())], [], []
    for contender in entered:
        row = _row(task, contender, device, "train")
        rows.append(row)
        try:
            with contender.active():
                training = Training(task, device, converted=contender.name != BASELINE)
                losses = _losses(training, steps)
        except Exception as error:  # of whatever kind: it is this contender that cannot train this model
            blame(row, error)
            continue
        curves.append(Curve(task.name, contender.name, losses.tolist()))
        row.excess = testing.excess(losses, baseline, exact, rounding)
        if row.excess > 1:
            row.status, row.reason = "wrong", f"the losses differ by {row.excess:.3g} times what rounding explains"
            continue
        row.peak_mib = _peak_mib(training.step, contender, device)
        lanes.append((row, Lane(training.step, contender.active), task.units))
        if task.acting is not None:
            acting = _row(task, contender, device, "infer")
            rows.append(acting)
            x = task.acting.to(device)
            lanes.append((acting, Lane(stream(_actor(training.model), x, None), _without_autograd(contender)), 1))
    for mode in ("train", "infer"):
        turns = [(row, lane, units) for row, lane, units in lanes if row.mode == mode]
        timed = [lane for _, lane, _ in turns]
        take_turns(timed, clock, settings.rounds, settings.budget, repeat=mode == "infer", busy=settings.busy)
        for row, lane, units in turns:
            if lane.error is not None:
                blame(row, lane.error)
            else:
                fill(row, lane, units)
        fill_ratios([row for row, _, _ in turns])
    return rows, curves


def _actor(model: nn.Module) -> Callable[..., Any]:
    begins = torch.zeros(1, 1, dtype=torch.bool, device=next(model.parameters()).device)
    return lambda x, state: model(x, begins, state)


def _without_autograd(contender: Contender) -> Callable[[], Any]:
    @contextmanager
    def active() -> Iterator[None]:
        with contender.active(), torch.no_grad():
            yield

    return active


def _losses(training: Training, steps: int) -> Tensor:
    """Of the first steps, in the dtype of the model."""
    dtype = next(training.model.parameters()).dtype
    return torch.tensor([training.step() for _ in range(steps)], dtype=dtype)


def _peak_mib(work: Callable[[], object], contender: Contender, device: str) -> float | None:
    with contender.active():
        peak = peak_bytes(work, device)
    return None if peak is None else peak / 2**20


def _row(task: Task, contender: Contender, device: str, mode: str) -> Row:
    lstm = task.lstm
    return Row(
        "models",
        contender.name,
        case=task.name,
        mode=mode,
        device=device,
        dtype="float32",
        variant="model",
        ran=contender.name.removeprefix(OURS),
        I=lstm.input_size,
        H=lstm.hidden_size,
        L=lstm.num_layers,
        D=2 if lstm.bidirectional else 1,
        unit=task.unit,
    )
