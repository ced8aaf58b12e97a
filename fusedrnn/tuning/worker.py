"""The process that verifies and measures: `python -m fusedrnn.tuning.worker STATE`, started by `session`.

It reads a line of JSON with the settings, then one line for each key, and answers each with a line. It writes the name
of the running backend to the file STATE, so that `session` knows which one hung or crashed.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median, quantiles
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import dispatch, module
from ..benchmarks import cases, contenders, memory, run, timing
from ..benchmarks.cases import BenchmarkCase
from ..benchmarks.contender import OURS, Contender
from .profile import BASELINE, Key, Measurement, Ratio, baseline, from_line, to_line

STATE_BYTES = 32
_MOST_TURNS = 3  # sampling repeats up to this often while the noise leaves the order open


def main() -> None:
    """Answers jobs until the end of the input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with answers
    setup = json.loads(sys.stdin.readline())
    if setup["threads"] is not None:
        torch.set_num_threads(setup["threads"])
    memory.settle("kept")
    settings = run.Settings(setup["rounds"], setup["budget"], check_flops=1e9)
    state = os.open(sys.argv[1], os.O_WRONLY)

    def at_work(name: str) -> None:
        os.lseek(state, 0, os.SEEK_SET)
        os.write(state, name.encode().ljust(STATE_BYTES))

    for line in sys.stdin:
        job = json.loads(line)
        key = from_line(job["key"]).key
        measurement = measure(key, setup["device"], job["backends"], settings, at_work)
        at_work("")
        _answer(answers, measurement)
        if setup["device"] != "cpu" and measurement.failures:
            return  # a fault may have corrupted the device context: continue in a new process


def _answer(answers: TextIO, measurement: Measurement) -> None:
    answers.write(json.dumps(to_line(measurement)) + "\n")
    answers.flush()


def measure(
    key: Key, device: str, backends: list[str], settings: run.Settings, at_work: Callable[[str], None]
) -> Measurement:
    """Checks each backend and the baseline, and times the correct ones, interleaved.

    Args:
        key: what to measure.
        device: "cpu" or "cuda".
        backends: names of `dispatch.TABLE`.
        settings: rounds, and seconds for them; three times as much while the noise leaves the order open.
        at_work: called with the name of a backend before it runs.

    Returns:
        A measurement, without times if the baseline or all backends have none. Backends that do not support the
        key, or run out of memory, are omitted; wrong results and errors are among the failures.
    """
    lanes, failures = dict[str, timing.Lane](), dict[str, str]()
    cell = _cell(key, device)
    for name, contender in _contenders(key, backends):
        at_work(name)
        row = run.blank("tune", cell, contender)
        lane = run.prepare(cell, contender, row, settings)
        if lane is not None:
            lanes[name] = replace(lane, active=_announced(lane.active, name, at_work))
        elif row.status in ("wrong", "failed"):
            failures[name] = f"{row.status}: {row.reason}"
    base = baseline(key.cell)
    if base not in lanes or len(lanes) == 1:
        failures.pop(base, None)
        return Measurement(key, failures=failures)
    repeat, clock = device == "cpu" or cell.streaming, timing.clock(device)
    for _ in range(_MOST_TURNS):
        timing.take_turns(list(lanes.values()), clock, settings.rounds, settings.budget, repeat)
        failed = any(lane.error is not None for lane in lanes.values())
        if failed or all(ratio.decided for ratio in _ratios(lanes, base).values()):
            break
    for name in [name for name, lane in lanes.items() if lane.error is not None]:
        failures[name] = f"failed: {lanes.pop(name).error}"
    if base not in lanes:
        failures.pop(base, None)
        return Measurement(key, failures=failures)
    times = {name: median(lane.seconds) * 1e3 for name, lane in lanes.items()}
    return Measurement(key, times, _ratios(lanes, base), failures, len(lanes[base].seconds))


def _ratios(lanes: dict[str, timing.Lane], base: str) -> dict[str, Ratio]:
    return {name: ratio(lanes[base].seconds, lane.seconds) for name, lane in lanes.items() if name != base}


def ratio(base: list[float], other: list[float]) -> Ratio:
    """The median of the ratios of adjacent samples, and its lower confidence bound.

    The bound is the notch of a box plot, 1.57 times the interquartile range over the root of the sample count: medians
    with disjoint notches differ with 95 % confidence (McGill, Tukey and Larsen, 1978).
    """
    logs = [math.log(b / o) for b, o in zip(base, other, strict=True)]
    if len(logs) < 2:
        return Ratio(math.exp(logs[0]), math.exp(logs[0]))
    first, _, third = quantiles(logs, n=4, method="inclusive")
    middle = median(logs)
    return Ratio(math.exp(middle - 1.57 * (third - first) / math.sqrt(len(logs))), math.exp(middle))


def _announced(active: Callable[[], Any], name: str, at_work: Callable[[str], None]) -> Callable[[], Any]:
    @contextmanager
    def announced() -> Any:
        at_work(name)
        with active():
            yield

    return announced


def _cell(key: Key, device: str) -> BenchmarkCase:
    shape = (key.T, key.B, key.I, key.H, key.L, key.D)
    mode, variant = "train" if key.train else "infer", "packed" if key.packed else "plain"
    made = cases.cell(shape, mode, key.dtype, variant, device, key.cell)
    case = replace(made.case, proj_size=max(key.H // 2, 1) if key.projected else 0)
    return replace(made, case=replace(case, hx=True) if key.step else case)


def _contenders(key: Key, backends: list[str]) -> list[tuple[str, Contender]]:
    """The contenders by backend name, the baseline first. There are none for one step of a variant."""
    found = [c for c in contenders.entered(backends, [], key.cell) if c.unavailable is None]
    named = [(BASELINE if not c.name.startswith(OURS) else c.name.removeprefix(OURS), c) for c in found]
    if not key.step:
        return named
    if key.cell not in _STEPS:
        return []
    return [(name, _of_a_step(c, key, name == BASELINE)) for name, c in named]


# Cell -> layer class, torch's cell class, our cell class.
_STEPS: dict[str, tuple[type[nn.RNNBase], type[nn.RNNCellBase], type[nn.RNNCellBase]]] = {
    "lstm": (nn.LSTM, nn.LSTMCell, module.LSTMCell),
    "gru": (nn.GRU, nn.GRUCell, module.GRUCell),
    "rnn_tanh": (nn.RNN, nn.RNNCell, module.RNNCell),
    "rnn_relu": (nn.RNN, nn.RNNCell, module.RNNCell),
}


def _of_a_step(contender: Contender, key: Key, is_baseline: bool) -> Contender:
    """A contender that runs one time step by a cell module, checked like a layer."""
    layer, theirs, ours = _STEPS[key.cell]
    step: Any = partial(theirs if is_baseline else ours, **_options(key.cell))

    class Step(layer):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            result = functional_call(
                step(self.input_size, self.hidden_size, device="meta"),
                dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), self._flat_weights, strict=True)),
                (input[0], tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]),
            )
            h, *last = (s.unsqueeze(0) for s in (result if isinstance(result, tuple) else (result,)))
            return h, (h, *last) if last else h

    return replace(contender, build=Step, work=partial(_step_work, step, key.train))


def _options(cell: str) -> dict[str, Any]:
    return {"nonlinearity": cell.removeprefix("rnn_")} if cell.startswith("rnn_") else {}


def _step_work(
    build: Callable[..., nn.Module], train: bool, layer: Any, x: Tensor, hx: Any, _: dict[str, Any], __: bool
) -> Callable[[], object]:
    """One call of the real module, with gradients where they are asked for."""
    step = build(layer.input_size, layer.hidden_size, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        for own, theirs in zip(step.parameters(), layer.parameters(), strict=True):
            own.copy_(theirs)
    x, hx = x.detach()[0], tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
    if not train:
        return lambda: step(x, hx)
    leaves = [x.requires_grad_(), *step.parameters()]
    dh = torch.ones_like(hx[0] if isinstance(hx, tuple) else hx)

    def run() -> object:
        result = step(x, hx)
        return torch.autograd.grad(result[0] if isinstance(result, tuple) else result, leaves, dh)

    return run


def supported(device: str) -> list[str]:
    """Our backends with kernels for a device, verified or not."""
    return [
        name
        for name, reason in dispatch.backends().items()
        if reason is None and name not in (BASELINE, "reference") and _computes_on(name, device)
    ]


def _computes_on(name: str, device: str) -> bool:
    smallest = dispatch.Problem(device, torch.float32, T=1, B=1, I=1, H=1, P=1, D=1)
    with dispatch.use_backend(name):  # some run only when requested by name
        return dispatch.supports(name, smallest) is None


if __name__ == "__main__":
    main()
