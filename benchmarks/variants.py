"""The cost of the variants of the LSTM over the plain one: both of this package, interleaved in one process.

    python -m fusedrnn bench variants [--shape T,B,I,H] [--mode train] [--dtype float32] [--backend cpu]

prints microseconds of a time step of the whole batch, and how many times as long as the plain LSTM each takes: the
median of the rounds' ratios, and the 20th and 80th percentile. Drawing masks is a part of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

import fusedrnn

from . import arguments, cases, provenance, timing
from .timing import Lane

# Options of an LSTM, by name.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "peephole": {"peephole": True},
    "coupled": {"coupled": True},
    "peephole, coupled": {"peephole": True, "coupled": True},
    "zoneout": {"zoneout": 0.1},
    "recurrent dropout, candidate": {"recurrent_dropout": 0.2},
    "recurrent dropout, state": {"recurrent_dropout": 0.2, "recurrent_dropout_mode": "state"},
}
SHAPES = ((64, 8, 128, 128), (64, 8, 256, 256), (64, 32, 256, 256), (64, 64, 512, 512))
_COLUMNS = ("T", "B", "I", "H", "mode", "variant", "us a step", "times plain", "20 %", "80 %")
_ROUNDS, _BUDGET = 15, 8.0  # of a shape and mode; seconds


def work(options: dict[str, Any], shape: Sequence[int], mode: str, dtype: torch.dtype) -> Callable[[], object]:
    """A call of an LSTM with these options, with its backward in "train"."""
    T, B, I, H = shape
    module = fusedrnn.LSTM(I, H, dtype=dtype, **options).train(mode == "train")
    x = torch.randn(T, B, I, dtype=dtype)
    if mode != "train":

        def infer() -> object:
            with torch.inference_mode():
                return module(x)

        return infer
    dy = torch.randn(T, B, H, dtype=dtype)
    leaves = [x.requires_grad_(), *module.parameters()]

    def train() -> object:
        return torch.autograd.grad(module(x)[0], leaves, dy)

    return train


def add_action(actions: Any) -> None:
    """Adds `variants` to the parser of `bench`."""
    what = "what the variants of the LSTM cost over the plain one"
    parser = actions.add_parser("variants", help=what, description=__doc__)
    parser.add_argument("--shape", action="append", type=arguments.converted(cases.parse_shape), metavar="T,B,I,H")
    parser.add_argument("--mode", action="append", choices=("infer", "train"), help="by default both")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--backend", type=arguments.backend, default="cpu")
    parser.add_argument("--rounds", type=arguments.whole(2), default=_ROUNDS)
    arguments.set_action(parser, _measure)


def _measure(given: argparse.Namespace, _: argparse.ArgumentParser) -> tuple[int, dict[str, Any]]:
    rows = []
    print(f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}")
    for shape in given.shape or SHAPES:
        for mode in given.mode or ("infer", "train"):
            lanes = [Lane(work(own, shape[:4], mode, cases.DTYPES[given.dtype])) for own in OPTIONS.values()]
            with fusedrnn.use_backend(given.backend):
                timing.take_turns(lanes, timing.clock("cpu"), given.rounds, _BUDGET)
            for name, lane in zip(OPTIONS, lanes, strict=True):
                if lane.error is not None:
                    raise lane.error
                ratios = [own / plain for own, plain in zip(lane.seconds, lanes[0].seconds, strict=True)]
                low, middle, high = timing.percentiles(ratios)
                step = 1e6 * median(lane.seconds) / shape[0]
                rows.append(dict(zip(_COLUMNS, (*shape[:4], mode, name, step, middle, low, high), strict=True)))
                figures = (f"{step:.1f}", *(f"{ratio:.2f}" for ratio in (middle, low, high)))
                print(f"| {' | '.join((*map(str, shape[:4]), mode, name, *figures))} |", flush=True)
    facts = {name: value for name, value in provenance.collect("cpu").items() if value}
    return 0, {"provenance": facts, "dtype": given.dtype, "backend": given.backend, "variants": rows}
