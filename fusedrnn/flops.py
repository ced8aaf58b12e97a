"""FLOP formulas of our operators for torch.utils.flop_counter.FlopCounterMode: their matrix products.

A multiplication and an addition are two operations. Padding counts as well.

torch's counter imports Triton, so this module does not import it: the formulas are registered when it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from math import prod
from typing import Any

Size = Sequence[int]
_COUNTER = "torch.utils.flop_counter"


def register(formulas: dict[Any, Callable[..., int]]) -> None:
    """Registers the formulas of operators (packets of torch.ops) when torch's counter is imported."""
    if _COUNTER in sys.modules:
        for packet, formula in formulas.items():
            sys.modules[_COUNTER].register_flop_formula(packet)(formula)
    else:
        sys.meta_path.insert(0, _WhenLoaded(formulas))


class _WhenLoaded(MetaPathFinder):
    """An import hook that finds torch's counter and registers the formulas after its import."""

    def __init__(self, formulas: dict[Any, Callable[..., int]]) -> None:
        self._formulas = formulas

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            register(self._formulas)

        loader.exec_module = exec_module
        return spec


def _products(rows: int, weights: Sequence[Size | None]) -> list[int]:
    """FLOPs of the products of `rows` rows with each weight; 0 for a bias."""
    return [2 * rows * prod(w) if w is not None and len(w) == 2 else 0 for w in weights]


def forward(cell: str, x: Size, *arguments: Any, out_shape: Any = None) -> int:
    """FLOPs of `ops.FORWARD_SCHEMA`; the arguments are shapes."""
    weights = arguments[0] if isinstance(arguments[0], list) else arguments[7:]
    return sum(_products(prod(x[:-1]), weights))


def infer(cell: str, x: Size, weights: Sequence[Size], *arguments: Any, out_shape: Any = None) -> int:
    """FLOPs of the operator cpu_infer; the arguments are shapes."""
    return sum(_products(prod(x[:-1]), weights))


def backward(cell: str, *arguments: Any, out_shape: Any = None) -> int:
    """FLOPs of `ops.BACKWARD_SCHEMA`; the arguments are shapes. Each product of forward has two gradients.

    Gradients of weights and of the input count if needed; those of the state always, except the first.
    """
    if isinstance(arguments[5], list):
        arguments = *arguments[:5], *arguments[6:], *arguments[5]
    x, bidirectional, lengths, needs, weights = (arguments[k] for k in (4, 5, 8, 13, slice(14, None)))
    given = [w for w in weights if w is not None]
    products, count = _products(prod(x[:-1]), given), len(given) // (2 if bidirectional else 1)
    flops = sum(product for product, need in zip(products, needs[3:], strict=True) if need)
    B = x[1] if len(x) == 3 else lengths[0]
    for k, product in enumerate(products):
        if k % count == 0:
            flops += product if needs[0] else 0
        elif k % count == 1:
            flops += product - (0 if needs[1] else 2 * B * prod(given[k]))
        else:
            flops += product
    return flops
