"""What torch.utils.flop_counter.FlopCounterMode counts for our operators: their matrix products.

A multiplication and an addition are two operations. Steps that padding fills are counted as well.

torch's counter loads Triton. It is told about the operators when somebody imports it, and not imported here.
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
    """Tells torch the formulas of operators, packets of torch.ops, as soon as its counter is loaded."""
    if _COUNTER in sys.modules:
        for packet, formula in formulas.items():
            sys.modules[_COUNTER].register_flop_formula(packet)(formula)
    else:
        sys.meta_path.insert(0, _WhenLoaded(formulas))


class _WhenLoaded(MetaPathFinder):
    """Finds torch's counter as everybody does, and has it know the formulas."""

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
    """Of so many rows with each weight, 0 for a bias."""
    return [2 * rows * prod(w) if w is not None and len(w) == 2 else 0 for w in weights]


def forward(cell: str, x: Size, *arguments: Any, out_shape: Any = None) -> int:
    """`ops.FORWARD_SCHEMA`, of sizes."""
    weights = arguments[0] if isinstance(arguments[0], list) else arguments[7:]
    return sum(_products(prod(x[:-1]), weights))


def infer(cell: str, x: Size, weights: Sequence[Size], *arguments: Any, out_shape: Any = None) -> int:
    """The operator cpu_infer, of sizes."""
    return sum(_products(prod(x[:-1]), weights))


def backward(cell: str, *arguments: Any, out_shape: Any = None) -> int:
    """`ops.BACKWARD_SCHEMA`, of sizes. Each product of forward has two gradients.

    That of the weight, or of the input, is not computed where it is not needed; that of the state is, but for the first
    one.
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
