"""A cell of one's own: a pointwise function in Python on tensors, of which everything else about a cell follows."""

from __future__ import annotations

import itertools
import keyword
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .spec import Cell

OWN: dict[str, Cell] = {}  # by name
_UNITS, _ROWS = 3, 2  # of the inputs that a function is checked with


class OwnCell:
    """What `cell` makes of a function. Calling it calls the function.

    Attributes:
        definition: the `Cell`.
    """

    def __init__(self, function: Callable[..., Any], definition: Cell) -> None:
        self._function, self.definition = function, definition
        self.__module__, self.__qualname__ = function.__module__, function.__qualname__
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __reduce__(self) -> str:
        return self.__qualname__  # found by its name, as a function is

    def __deepcopy__(self, _: Any) -> OwnCell:
        return self

    def __repr__(self) -> str:
        return f"<cell {self.__qualname__} of gates {', '.join(self.definition.gates)}>"


def cell(
    *, gates: Sequence[str], state: Literal["c", "h"] | None = None, parameters: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], OwnCell]:
    """Makes a cell of a pointwise function, for `fusedrnn.Recurrent`.

    The function is called with tensors [B, H], and returns the new hidden state h [B, H]:

        function(x, u)             x.i and u.i, for a gate i, are the affine maps of the input and of the hidden state
        function(x, u, h)          with state="h": the hidden state that enters; it is not rounded from step to step
        function(x, u, c) -> h, c  with state="c": a state of its own

    and with parameters one more argument p: p.a [H] for a parameter a, of which each unit has its own. It has to be
    pointwise, a function of each unit and each sequence apart, and differentiable by autograd, twice for second
    derivatives. It is checked when it is defined.

    Args:
        gates: the names of the affine maps; weights have a block of H rows for each, in this order.
        state: what goes from step to step besides the hidden state that the products take.
        parameters: names.

    Raises:
        TypeError, ValueError: a name is none, or the function does not do what is said here.
    """
    gates, parameters = tuple(gates), tuple(parameters)
    if state not in ("c", "h", None):
        raise ValueError(f"state must be 'c', 'h' or None, got {state!r}")
    if not gates:
        raise ValueError("gates must have at least one name")
    for name in (*gates, *parameters):
        if not isinstance(name, str):
            raise TypeError(f"names must be str, got {type(name).__name__}")
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(f"names of gates and parameters must be those of attributes, got {name!r}")
    if len({*gates}) < len(gates) or len({*parameters}) < len(parameters):
        raise ValueError(f"names must differ, got gates {gates} and parameters {parameters}")

    def decorate(function: Callable[..., Any]) -> OwnCell:
        definition = _definition(function, gates, state, parameters)
        _check(function.__name__, definition)
        OWN[definition.name] = definition
        return OwnCell(function, definition)

    return decorate


_count = itertools.count()


def _definition(
    function: Callable[..., Any], gates: tuple[str, ...], state: str | None, parameters: tuple[str, ...]
) -> Cell:
    G, K = len(gates), len(parameters)
    by_gate, by_parameter = namedtuple("Maps", gates), namedtuple("Parameters", parameters)  # type: ignore[misc]

    def step(a: Tensor, carry: Tensor, p: Tensor | None = None, _: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        each = a.chunk(2 * G, dim=-1)
        states = () if state is None else (carry,)
        own = () if p is None else (by_parameter(*p.chunk(K, dim=-1)),)
        found = function(by_gate(*each[:G]), by_gate(*each[G:]), *states, *own)
        if state != "c":
            return found, carry if state is None else found, a
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"{function.__name__} must return (h, c), got {type(found).__name__}")
        return *found, a

    def step_backward(
        a: Tensor,
        carry_in: Tensor,
        carry: Tensor,
        dm: Tensor,
        dcarry: Tensor,
        p: Tensor | None = None,
        _: Any = None,
    ) -> tuple[Tensor, ...]:
        if p is None:
            outputs, pullback, *_ = torch.func.vjp(lambda *args: step(*args)[:2], a, carry_in)
            return *pullback((dm, dcarry)), outputs[0]
        rows = p.expand(*a.shape[:-1], len(p))  # so that each has a gradient of its own
        outputs, pullback, *_ = torch.func.vjp(lambda *args: step(*args)[:2], a, carry_in, rows)
        da, dcarry, dp = pullback((dm, dcarry))
        return da, dcarry, outputs[0], dp

    nothing = (None,) * G
    return Cell(
        name=f"{function.__name__}#{next(_count)}",
        gates=gates,
        maps=(*(f"x.{gate}" for gate in gates), *(f"u.{gate}" for gate in gates)),
        input=(*range(G), *nothing),
        recurrent=(*nothing, *range(G)),
        saved=(*(f"x.{gate}" for gate in gates), *(f"u.{gate}" for gate in gates)),
        carry={"c": "cell", "h": "hidden", None: None}[state],  # type: ignore[arg-type]
        step=step,
        activate_=lambda a: None,
        step_backward=step_backward,
        parameters=parameters,
    )


def _check(name: str, definition: Cell) -> None:
    """Calls the function, and moves one unit of one sequence: no other one may feel it."""
    H, generator = _UNITS, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    inputs = [random(_ROWS, len(definition.maps) * H), random(_ROWS, H if definition.carry else 0)]
    p = random(len(definition.parameters) * H) if definition.parameters else None
    outputs = definition.step(*inputs, p)[: 2 if definition.carry else 1]
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(f"{name} must return a Tensor for each state, got {type(output).__name__}")
        if output.shape != (_ROWS, H):
            raise ValueError(f"{name} must return states of the shape of a map, [B, H], got {list(output.shape)}")
    moved = [values.clone() for values in inputs]
    for values in moved:
        values[0, ::H] += 0.5
    for before, after in zip(outputs, definition.step(*moved, p), strict=False):
        others = (after - before)[:, 1:].abs().sum() + (after - before)[1:].abs().sum()
        if others != 0:
            raise ValueError(f"{name} must be pointwise: a unit of one sequence is felt by another unit or sequence")
    definition.step_backward(inputs[0], inputs[1], inputs[1], outputs[0], inputs[1], p)
