"""Cells of one's own: their pointwise functions and the derivatives of those, written from a program.

fusedrnn/cells/program.py records what a user's function and its backward compute; here that becomes source text in
Triton's language, one line for each of its own. `inspect`, by which Triton reads the source of a function, finds it in
`linecache`: no file is written, and Triton's cache of compiled kernels goes by the text.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from ...cells import Cell
from ...cells.program import Line, Operand, Program
from .functions import sigmoid, tanh

_WRITTEN = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "equal": "{} == {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "not": "{} == 0",
    "where": "tl.where({}, {}, {})",
    "sigmoid": "sigmoid({})",
    "tanh": "tanh({})",
    **{name: f"tl.{name}({{}})" for name in ("abs", "exp", "log", "sqrt", "sin", "cos", "erf")},
}


def functions(cell: Cell) -> tuple[Any, Any]:
    """`step` and `step_backward` of a cell that has a program."""
    filename = f"<fusedrnn.cell {cell.name}>"
    text = source(cell)
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    names: dict[str, Any] = {"__name__": __name__, "triton": triton, "tl": tl, "sigmoid": sigmoid, "tanh": tanh}
    exec(compile(text, filename, "exec"), names)
    return names["step"], names["step_backward"]


def source(cell: Cell) -> str:
    """Both functions, as `kernels/cells/__init__.py` has them called."""
    program = cell.program
    assert isinstance(program, Program)
    has_carry, operands = cell.carry is not None, ", p, v_c, v_g" if cell.parameters else ""
    read = {cell.maps[k]: k for k in cell.read}
    names = {name: f"a{k}" for name, k in read.items()}
    names |= {"carry": "carry"} | {f"p.{name}": f"p{k}" for k, name in enumerate(cell.parameters)}
    names |= {"dm": "dm", "dcarry": "dcarry"}
    own = [f"p{k} = p[{k}]" for k in range(len(cell.parameters))]

    def maps(of: str) -> list[str]:
        return [f"a{k} = {of}[{place}]" for place, k in enumerate(read.values())]

    def results(operands: Sequence[Operand], like: str) -> list[str]:
        each = [_operand(operand, names) for operand in operands]
        return [
            o if isinstance(was, str) else f"tl.zeros_like({like}) + {o}" for o, was in zip(each, operands, strict=True)
        ]

    m, *carry = results(program.results, "carry")
    saved = _tuple(names[name] for name in read)
    forward = [*maps("a"), *own, *_lines(program.forward, program.results, names)]
    forward.append(f"return {m}, {carry[0] if has_carry else 'carry'}, {saved}")

    gradients = results(program.gradients, "dm")
    M = len(cell.maps)
    da, dcarry, dp = gradients[:M], gradients[M] if has_carry else "dcarry", gradients[M + has_carry :]
    lines = _lines((*program.forward, *program.backward), program.gradients, names)
    backward = [*maps("saved"), *own, *lines]
    backward.append(f"return {_tuple(da)}, {dcarry}" + (f", {_tuple(dp)}" if dp else ""))
    return "\n".join(
        [
            "@triton.jit",
            f"def step(a, carry{operands}):",
            *(f"    {line}" for line in forward),
            "",
            "",
            "@triton.jit",
            f"def step_backward(saved, carry, carry_out, dm, dcarry{operands}):",
            *(f"    {line}" for line in backward),
            "",
        ]
    )


def _lines(lines: Sequence[Line], results: Sequence[Operand], names: dict[str, str]) -> list[str]:
    """The operations that the results need."""
    needed, kept = {*results}, []
    for line in reversed(lines):
        if line.result in needed:
            needed |= {*line.operands}
            kept.append(line)
    return [
        f"{line.result} = {_WRITTEN[line.operation].format(*(_operand(o, names) for o in line.operands))}"
        for line in reversed(kept)
    ]


def _operand(operand: Operand, names: dict[str, str]) -> str:
    if isinstance(operand, str):
        return names.get(operand, operand)
    return repr(operand) if abs(operand) < float("inf") else f'float("{operand}")'


def _tuple(parts: Any) -> str:
    return f"({''.join(f'{part}, ' for part in parts)})"
