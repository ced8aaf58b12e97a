"""The first questions to a GPU, each a process of `bench gpu` (session.py), a line for each result:

    python -m fusedrnn.benchmarks.smoke torch                   nn.LSTM alone: whether torch and cuDNN work
    python -m fusedrnn.benchmarks.smoke exchange BACKEND KIND   small layers by plans of one kind of exchange
    python -m fusedrnn.benchmarks.smoke steps BACKEND           microseconds of a step: measured, predicted, and cuDNN's
    python -m fusedrnn.benchmarks.smoke once BACKEND            one training step, for a profiler to look at

`exchange` is where a kernel hangs if it ever does. It is one process for each kind, and the session runs the C++
kernels in the debug build, whose waits name themselves and end the launch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from fusedrnn.kernels import plan as planner
from fusedrnn.kernels.device import cdiv
from torch import nn

import fusedrnn
from fusedrnn import cuda_plan, gpu, ops, testing
from fusedrnn.testing import Case

from . import plans, timing, verify

# By backend: the kinds of exchange that its plans have.
KINDS = {"cuda": cuda_plan.EXCHANGES, "triton": ("rows", "resident", "streamed")}
_PASSES = ("forward", "backward")
_MODULES = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU, "rnn_tanh": fusedrnn.RNN}
_MATHS = {"bfloat16": (torch.bfloat16, "tf32"), "tf32": (torch.float32, "tf32"), "float32": (torch.float32, "ieee")}


# ------------------------------------------------------------------------------------------------ exchanges


class Chosen(NamedTuple):
    """The plans that one layer is computed with."""

    H: int
    size: int  # blocks, or programs, that exchange
    plans: dict[str, Any]  # by pass


def _kind(plan: Any) -> str:
    return plan.exchange if hasattr(plan, "exchange") else plan.regime


def _size(plan: Any) -> int:
    return plan.blocks if hasattr(plan, "exchange") else plan.programs


def _fitting(backend: str, kernel: str, shape: Any, device: str) -> list[Any]:
    """The plans that fit the device, the best first."""
    if backend == "cuda":
        from fusedrnn import cuda

        return list(cuda.fitting(kernel, shape, cuda.device_for(torch.device(device))))
    from fusedrnn.kernels import launch

    there = planner.INTERPRETER if launch.INTERPRETED else launch._device(torch.cuda.current_device())
    found = [plan for plan in planner.plans(kernel, shape, there) if plan.shared <= there.shared]
    return sorted(found, key=lambda plan: plan.launch)


def chosen(
    backend: str, kind: str, math: str, device: str, sizes: Sequence[int], hidden: Sequence[int], cell: str = "lstm"
) -> list[Chosen]:
    """For each number of blocks that exchange the smallest layer that has such a plan, in both passes where it can."""
    dtype, precision = _MATHS[math]
    found: dict[int, Chosen] = {}
    for H in hidden:
        shape = planner.Shape(128, 20, 9, H, H, 1, dtype.itemsize, precision, cell=cell)
        try:
            fit = {kernel: _fitting(backend, kernel, shape, device) for kernel in _PASSES}
        except ValueError:
            continue  # a layer that nothing fits, or arithmetic that the backend does not have
        for size in sizes:
            alike = {k: [p for p in fit[k] if _kind(p) == kind and size in (_size(p), 0)] for k in _PASSES}
            if size not in found and any(alike.values()):
                best = {k: (alike[k] or fit[k])[0] for k in _PASSES}
                found[size] = Chosen(H, size or max(map(_size, best.values())), best)
    return list(found.values())


def exchange(backend: str, kind: str, device: str, skip: int = 0) -> int:
    """Holds small layers to the rule of fusedrnn/testing.py, three times each, which have to give the same bits: of an
    LSTM in every arithmetic, of the other cells in one. A process whose device has failed starts another for the rest.
    """
    failed = False
    for k, (case, math, choice, label) in enumerate(_trials(backend, kind, device)):
        if k < skip:
            continue
        print(label, end=": ", flush=True)  # before: one that hangs says no more
        try:
            with plans.forcing(backend, *choice.plans.values()):
                print(f"ok, {_worst(backend, case, math, device):.2f} of what is allowed", flush=True)
        except Exception as error:
            failed = True
            print(flush=True)
            why = " ".join(f"{type(error).__name__}: {error}"[:600].split())
            used = "; ".join(f"{kernel}: {plan}" for kernel, plan in choice.plans.items())
            print(f"FAILED {label}: {why}{_where(error)}; {used}", flush=True)
            if not plans.responds(device):
                print("the device does not answer this process any longer: another goes on", flush=True)
                command = [sys.executable, "-m", "fusedrnn.benchmarks.smoke", "exchange", backend, kind]
                subprocess.run([*command, "--device", device, "--skip", str(k + 1)], check=False)
                break
    return 1 if failed else 0


def _trials(backend: str, kind: str, device: str) -> Iterator[tuple[Case, str, Chosen, str]]:
    """Small layers, each with its arithmetic, its plans, and what to call it."""
    dry = device == "cpu"
    sizes = {"cluster": (2, 4, 8, 16), "scatter": (2, 4, 8, 16), "grid": (2, 32, 64, 128)}.get(kind, (0,))
    if backend == "triton" and kind != "rows":
        sizes = (16, 32, 64, 128)
    hidden: Sequence[int] = (16, 64, 128, 256, 512, 1024, 2048)
    if dry:
        sizes, hidden = (0,), hidden[:2]
    for cell, math in [
        *(("lstm", math) for math in _MATHS),
        *((cell, "bfloat16") for cell in _MODULES if cell != "lstm"),
    ]:
        for choice in chosen(backend, kind, math, device, sizes, hidden, cell):
            # What float64 says of a large layer takes a second or more, most of it on the CPU.
            for T in (3,) if dry else (3, 40) if choice.H <= 256 else (40,):
                case = Case(T, 3 if dry else 20, 9, choice.H, _MATHS[math][0], cell=cell)
                yield case, math, choice, f"{cell}, {kind} of {choice.size}, {math}, H {choice.H}, T {T}"


# The same layer is computed in float32 and in TF32.
_answers = lru_cache(maxsize=16)(testing.answers)


def _worst(backend: str, case: Case, math: str, device: str) -> float:
    """The largest error over what is allowed.

    Raises:
        AssertionError: something is wrong, or differs from one time to the next; the message names where first.
    """
    expected, tf32 = _answers(case, device), math == "tf32"
    if tf32:
        expected = verify.in_tf32(expected, case, device, testing.call_torch, testing.LAYERS[case.cell])
    first: dict[str, torch.Tensor] = {}
    worst = 0.0
    for _ in range(3):
        with fusedrnn.use_backend(backend), testing.poisoned():
            ours = verify.evaluate(case, tf32, device, _MODULES[case.cell])
        wrong: list[str] = []
        for name, answer in expected.items():
            try:
                worst = max(worst, testing.assert_as_exact_as(name, ours[name], *answer))
            except testing.InexactError as error:
                wrong.append(f"{error}{_first_wrong(ours[name], answer)}" if not wrong else name)
        if wrong:
            raise AssertionError("; wrong as well: ".join((wrong[0], ", ".join(wrong[1:]))[: len(wrong)]))
        for name, values in ours.items():
            if not torch.equal(first.setdefault(name, values), values):
                place = (first[name] != values).nonzero()[0].tolist()
                raise AssertionError(f"{name} differs from one time to the next, first at {place}")
    return worst


def _first_wrong(ours: torch.Tensor, answer: testing.Answer) -> str:
    """Which element is wrong first, and how many are."""
    baseline, exact, rounding = answer
    if ours.shape != exact.shape:
        return ""
    allowed = 2 * testing._error(baseline, exact) + testing._rounding(baseline.dtype, exact, rounding)
    wrong = (~((ours.to(exact) - exact).abs() <= allowed)).nonzero()
    if len(wrong) == 0:
        return ""
    place = tuple(wrong[0].tolist())
    return (
        f"; {len(wrong)} of {exact.numel()} wrong, first {list(place)}: {ours[place]:.4g}, exactly {exact[place]:.4g}"
    )


def _where(error: Exception) -> str:
    """The last functions of the package that an error of a device came through."""
    if isinstance(error, AssertionError):
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fusedrnn" in frame.filename]
    return " in " + " > ".join(f"{Path(frame.filename).stem}.{frame.name}" for frame in frames[-2:])


# ------------------------------------------------------------------------------------------------ steps


def steps(backend: str, device: str, out: Path) -> int:
    """Times cells, by the slope between two lengths, so without what is constant: nn.LSTM's, then those of a backend.
    Appends each to `out`/steps.jsonl as it is measured."""
    dry = device == "cpu"
    lengths = (2, 4) if dry else (128, 1024)
    hidden, batches = ((16,), (1, 3)) if dry else ((128, 256, 512, 1024), (1, 16, 64))
    clock = timing.clock(device)
    cells = [(H, B, lengths, clock, device) for H in hidden for B in batches]
    failed = False

    def theirs(*size: Any) -> dict[str, Any]:
        dtypes = (torch.bfloat16,) if dry else (torch.bfloat16, torch.float16)
        return {str(dtype).removeprefix("torch."): _slopes(nn.LSTM, dtype, *size) for dtype in dtypes}

    def ours(*size: Any) -> dict[str, Any]:
        return _ours(backend, *size)

    out.mkdir(parents=True, exist_ok=True)
    with (out / "steps.jsonl").open("a", encoding="utf-8") as file:
        for name, measure in (("nn.LSTM", theirs), (backend, ours)):
            for size in cells:
                row: dict[str, Any] = {"H": size[0], "B": size[1]}
                print(f"{name}, H {size[0]}, B {size[1]}:", flush=True)
                try:
                    row[name] = measure(*size)
                except Exception as error:
                    failed = True
                    row[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}{_where(error)}"}
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{'FAILED ' if 'error' in row[name] else ''}{json.dumps(row)}", flush=True)
                if "error" in row[name] and not plans.responds(device):
                    print("the device does not answer any longer", flush=True)
                    return 1
    return 1 if failed else 0


def _ours(backend: str, H: int, B: int, lengths: tuple[int, int], clock: timing.Clock, device: str) -> dict[str, Any]:
    """Microseconds of a step, of whole calls and of their launches alone, with one plan for both lengths."""
    shape = planner.Shape(lengths[1], B, H, H, H, 1, 2, gpu.fp32_precision())
    module = ops.launches(backend)
    with fusedrnn.use_backend(backend):
        found = {kernel: module.plan_for(kernel, shape, torch.device(device)) for kernel in _PASSES}
        with plans.forcing(backend, *found.values()):
            calls = _slopes(fusedrnn.LSTM, torch.bfloat16, H, B, lengths, clock, device, module)
    predicted = [found[kernel].step * _rounds(found[kernel], B) for kernel in _PASSES]
    return {**calls, "predicted": predicted, "plans": [str(found[kernel]) for kernel in _PASSES]}


def _rounds(plan: Any, B: int) -> int:
    rows = plan.rows if hasattr(plan, "exchange") else plan.batch
    return cdiv(cdiv(B, rows), plan.groups)


def _slopes(
    build: Callable[[int, int], nn.Module],
    dtype: torch.dtype,
    H: int,
    B: int,
    lengths: tuple[int, int],
    clock: timing.Clock,
    device: str,
    module: Any = None,
) -> dict[str, list[float]]:
    """ "call": microseconds a step of forward and of backward; "launch": those of the launches of `module` in them."""
    lstm = build(H, H).to(device, dtype)
    at: dict[str, list[list[float]]] = {"call": [], "launch": []}
    for T in lengths:
        x = torch.randn(T, B, H, dtype=dtype, device=device, requires_grad=True)
        dy = torch.randn(T, B, H, dtype=dtype, device=device)
        samples: dict[str, list[list[float]]] = {"call": [], "launch": []}
        for k in range(4):
            with _launches_timed(module, clock) as launches:
                kept: list[torch.Tensor] = []
                forward = clock.sample(lambda: kept.append(lstm(x)[0]), 1)  # noqa: B023 - called at once
                backward = clock.sample(lambda: torch.autograd.grad(kept[0], [x, *lstm.parameters()], dy), 1)  # noqa: B023
            if k > 0:  # the first compiles
                samples["call"].append([forward * 1e6, backward * 1e6])
                samples["launch"].append([launches.get(kernel, 0.0) * 1e6 for kernel in _PASSES])
        for what, those in samples.items():
            at[what].append([median(column) for column in zip(*those, strict=True)])
    steps = lengths[1] - lengths[0]
    return {what: [(long - short) / steps for short, long in zip(*two, strict=True)] for what, two in at.items()}


@contextmanager
def _launches_timed(module: Any, clock: timing.Clock) -> Iterator[dict[str, float]]:
    """Seconds of the last launch of each pass of a backend."""
    found: dict[str, float] = {}
    if module is None:
        yield found
        return
    before = {kernel: getattr(module, kernel) for kernel in _PASSES}
    events: dict[str, Callable[[], float]] = {}

    def timed(kernel: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            begin = timing.mark(clock)
            result = before[kernel](*arguments)
            end = timing.mark(clock)
            events[kernel] = lambda: timing.between(begin, end)
            return result

        return run

    for kernel in _PASSES:
        setattr(module, kernel, timed(kernel))
    try:
        yield found
        found.update({kernel: seconds() for kernel, seconds in events.items()})
    finally:
        for kernel, original in before.items():
            setattr(module, kernel, original)


def table(path: Path) -> list[str]:
    """steps.jsonl as people read it: a line for each cell and backend."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    baselines = {(row["H"], row["B"]): row["nn.LSTM"] for row in rows if "nn.LSTM" in row}
    lines = ["   H   B backend   forward: launch predicted  call  cuDNN16 cuDNNbf | backward: the same | plans"]
    for row in rows:
        theirs = baselines.get((row["H"], row["B"]), {})
        for name, found in row.items():
            start = f"{row['H']:4} {row['B']:3} {name:7}"
            if name in ("H", "B") or (name == "nn.LSTM" and "error" not in found):
                continue
            if "error" in found:
                lines.append(f"{start} FAILED {found['error']}")
                continue
            both = []
            for k in range(2):
                figures = [found["launch"][k], found["predicted"][k], found["call"][k]]
                figures += [theirs[dtype]["call"][k] for dtype in ("float16", "bfloat16") if dtype in theirs]
                both.append(" ".join(f"{figure:7.2f}" for figure in figures))
            lines.append(f"{start} {' | '.join(both)} | {' / '.join(plan[:24] for plan in found['plans'])}")
    return lines


# ------------------------------------------------------------------------------------------------ one training step


def baseline(device: str) -> int:
    """A training step of nn.LSTM in every dtype, which needs no kernel of ours, and how long each takes at first."""
    failed = False
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)[: 2 if device == "cpu" else 4]:
        begin = time.perf_counter()
        try:
            lstm = nn.LSTM(64, 64).to(device, dtype)
            lstm(torch.randn(8, 4, 64, device=device).to(dtype))[0].float().square().mean().backward()
            finite = all(bool(p.grad.isfinite().all()) for p in lstm.parameters() if p.grad is not None)
            outcome = "ok" if finite else "FAILED: not finite"
        except Exception as error:
            finite, outcome = False, f"FAILED {type(error).__name__}: {' '.join(str(error)[:600].split())}"
        failed |= not finite
        print(f"{outcome}, {dtype}, {time.perf_counter() - begin:.1f} s", flush=True)
    return 1 if failed else 0


def once(backend: str, device: str) -> int:
    """One training step at H 512, B 16, T 64 in bfloat16."""
    lstm = fusedrnn.LSTM(512, 512).to(device, torch.bfloat16)
    x = torch.randn(64, 16, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    with fusedrnn.use_backend(backend):
        lstm(x)[0].float().square().mean().backward()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.benchmarks.smoke", description=__doc__)
    parser.add_argument("what", choices=("torch", "exchange", "steps", "once"))
    parser.add_argument("names", nargs="*", help="a backend, and of exchange a kind")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("smoke"))
    parser.add_argument("--skip", type=int, default=0, help="trials of an exchange")
    options = parser.parse_args(argv)
    if options.what == "torch":
        return baseline(options.device)
    if options.what == "steps":
        return steps(options.names[0], options.device, options.out)
    if options.what == "once":
        return once(options.names[0], options.device)
    return exchange(options.names[0], options.names[1], options.device, options.skip)


if __name__ == "__main__":
    sys.exit(main())
