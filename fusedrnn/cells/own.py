"""A cell of one's own: a pointwise function in Python on tensors, of which everything else about a cell follows."""

from __future__ import annotations

import itertools
import keyword
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .program import Program, UntranslatableError, record
from .spec import Cell

OWN: dict[str, Cell] = {}  # by name
_UNITS, _ROWS = 3, 2  # of the inputs that a function is checked with


class OwnCell:
    """The result of `cell`. Calling it calls the function.

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
    derivatives. It is checked when it is defined, and what it computes is recorded, for kernels that are generated:
    docs/variants.md says for which functions.

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
        call = _call_of(function, gates, state, parameters)
        name = f"{function.__name__}#{next(_count)}"
        apart = (*(f"x.{gate}" for gate in gates), *(f"u.{gate}" for gate in gates))
        _check(function.__name__, _definition(name, call, gates, state, parameters, apart))
        definition = _definition(
            name, call, gates, state, parameters, *_translated(call, apart, gates, state, parameters)
        )
        OWN[definition.name] = definition
        return OwnCell(function, definition)

    return decorate


_MOST_MAPS = 4  # that the kernels read


def obstacle(cell: Cell) -> str | None:
    """Why no kernel can be generated for a cell of one's own, or None."""
    if not isinstance(cell.program, Program):
        return cell.program
    if not 0 < len(cell.read) <= _MOST_MAPS:
        return f"it reads {len(cell.read)} affine maps ({', '.join(cell.saved)}), and kernels have 1 to {_MOST_MAPS}"
    return None


_count = itertools.count()
_CARRIES: dict[Any, Any] = {"c": "cell", "h": "hidden", None: None}
_Call = Callable[[dict[str, Tensor], Tensor, dict[str, Tensor]], tuple[Any, ...]]


def _definition(
    name: str,
    call: _Call,
    gates: tuple[str, ...],
    state: str | None,
    parameters: tuple[str, ...],
    maps: tuple[str, ...],
    unread: tuple[str, ...] = (),
    program: Program | str | None = None,
) -> Cell:
    K, read = len(parameters), [k for k, of in enumerate(maps) if of not in unread]

    def of_read(values: Tensor) -> Tensor:
        """The maps that the forward saves."""
        if not unread:
            return values
        each = values.chunk(len(maps), dim=-1)
        return torch.cat([each[k] for k in read], dim=-1) if read else values[..., :0]

    def of_saved(saved: Tensor, like: Tensor) -> Tensor:
        """The maps, those that are not read as zeros."""
        if not unread:
            return saved
        each = iter(saved.chunk(len(read), dim=-1)) if read else iter(())
        return torch.cat([torch.zeros_like(like) if of in unread else next(each) for of in maps], dim=-1)

    def step(a: Tensor, carry: Tensor, p: Tensor | None = None, _: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        own = {} if p is None else dict(zip(parameters, p.chunk(K, dim=-1), strict=True))
        found = call(dict(zip(maps, a.chunk(len(maps), dim=-1), strict=True)), carry, own)
        return found[0], carry if state is None else found[-1], of_read(a)

    def step_backward(
        saved: Tensor,
        carry_in: Tensor,
        carry: Tensor,
        dm: Tensor,
        dcarry: Tensor,
        p: Tensor | None = None,
        _: Any = None,
    ) -> tuple[Tensor, ...]:
        a = of_saved(saved, dm)
        if p is None:
            outputs, pullback, *_ = torch.func.vjp(lambda *args: step(*args)[:2], a, carry_in)
            return *pullback((dm, dcarry)), outputs[0]
        rows = p.expand(*a.shape[:-1], len(p))  # so that each has a gradient of its own
        outputs, pullback, *_ = torch.func.vjp(lambda *args: step(*args)[:2], a, carry_in, rows)
        da, dcarry, dp = pullback((dm, dcarry))
        return da, dcarry, outputs[0], dp

    return Cell(
        name=name,
        gates=gates,
        maps=maps,
        input=tuple(gates.index(of[2:]) if of[:2] != "u." else None for of in maps),
        recurrent=tuple(gates.index(of[2:]) if of[:2] != "x." else None for of in maps),
        saved=tuple(of for of in maps if of not in unread),
        carry=_CARRIES[state],
        step=step,
        activate_=lambda a: None,
        step_backward=step_backward,
        parameters=parameters,
        unread=unread,
        program=program,
    )


def _call_of(
    function: Callable[..., Any], gates: tuple[str, ...], state: str | None, parameters: tuple[str, ...]
) -> _Call:
    """The function of maps by name, the carry, and parameters by name: (h,), or (h, c).

    A map "s.i" is the sum of x.i and u.i, of which the function reads nothing else: it gets the one for x.i, and zeros
    for u.i.
    """
    by_gate, by_parameter = namedtuple("Maps", gates), namedtuple("Parameters", parameters)  # type: ignore[misc]

    def call(maps: dict[str, Tensor], carry: Tensor, own: dict[str, Tensor]) -> tuple[Any, ...]:
        x = by_gate(*(maps[f"{'s' if f's.{gate}' in maps else 'x'}.{gate}"] for gate in gates))
        u = by_gate(*(maps[f"u.{g}"] if f"u.{g}" in maps else torch.zeros_like(maps[f"s.{g}"]) for g in gates))
        arguments: list[Any] = [x, u]
        arguments += [] if state is None else [carry]
        arguments += [by_parameter(**own)] if parameters else []
        found = function(*arguments)
        if state != "c":
            return (found,)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"{function.__name__} must return (h, c), got {type(found).__name__}")
        return found

    return call


def _translated(
    call: _Call, apart: tuple[str, ...], gates: tuple[str, ...], state: str | None, parameters: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], Program | str]:
    """The maps of a cell, those of them that it does not read, and its program or why there is none.

    apart: the maps that it can do with in any case.
    """

    def recorded(maps: Sequence[str]) -> Program:
        def run(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
            own = {name: given[f"p.{name}"] for name in parameters}
            found = call({name: given[name] for name in maps}, given.get("carry"), own)  # type: ignore[arg-type]
            return (*found, found[0]) if state == "h" else found

        carry = [] if state is None else ["carry"]
        inputs = [*maps, *carry, *(f"p.{name}" for name in parameters)]
        return record(run, inputs, ["dm", "dcarry"][: 1 + len(carry)])

    try:
        maps, program = apart, recorded(apart)
        summed = [g for g in gates if program.only_sums(f"x.{g}", f"u.{g}")]
        if summed:
            split = [g for g in gates if g not in summed]
            maps = (*(f"x.{g}" for g in split), *(f"s.{g}" for g in summed), *(f"u.{g}" for g in split))
            program = recorded(maps)
    except UntranslatableError as error:
        return apart, (), str(error)
    return maps, tuple(name for name in maps if not program.reads(name)), program


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
