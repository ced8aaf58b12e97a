"""A pointwise function and its derivative as straight-line code, for code generators.

`record` runs a function of tensors, and the backward that autograd makes of it, and notes every operator of torch that
they call. What is noted is a `Program`: lines of a small vocabulary (`OPERATIONS`) on numbers of one unit each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Operand = str | float  # the name of an input or of a line, or a constant

_FUNCTIONS = ("neg", "abs", "exp", "log", "sqrt", "sin", "cos", "erf", "sigmoid", "tanh")
_COMPARISONS = frozenset(("less", "less_equal", "equal", "and", "or", "not"))  # they make truth values
OPERATIONS = frozenset(("add", "sub", "mul", "div", "where", *_FUNCTIONS, *_COMPARISONS))


class Line(NamedTuple):
    """result = operation(*operands)."""

    result: str
    operation: str
    operands: tuple[Operand, ...]


class Program(NamedTuple):
    """Lines of the function first, then of its derivative."""

    forward: tuple[Line, ...]
    backward: tuple[Line, ...]
    results: tuple[Operand, ...]
    gradients: tuple[Operand, ...]  # one for each input; 0.0 where it has none

    def reads(self, name: str) -> bool:
        """Whether the function reads an input."""
        return name in self.results or any(name in line.operands for line in self.forward)

    def only_sums(self, a: str, b: str) -> bool:
        """Whether the function reads two inputs, and of them nothing but their sum."""
        if not self.reads(a) or {a, b} & {*self.results}:
            return False
        found = [line for line in self.forward if {a, b} & {*line.operands}]
        return all(line.operation == "add" and {a, b} == {*line.operands} for line in found)


class UntranslatableError(Exception):
    """The message says what it is that cannot be written."""


def record(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[str],
    gradients: Sequence[str],
) -> Program:
    """The program of a function.

    Args:
        function: (tensors by name) -> its results; all tensors are of one shape, and it is differentiated by autograd.
        inputs: names.
        gradients: what the gradients of the results are called.

    Raises:
        UntranslatableError: the function calls what the vocabulary does not have, or asks for values or sizes.
    """
    first, second = (_record(function, inputs, gradients, shape) for shape in ((2, 3), (5, 4)))
    if first != second:
        raise UntranslatableError("it does not do the same at each call, or for each size")
    return first


def _record(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[str],
    gradients: Sequence[str],
    shape: tuple[int, int],
) -> Program:
    generator = torch.Generator().manual_seed(0)

    def random(name: str) -> Tensor:
        return recorder.argument(torch.randn(shape, generator=generator, device="cpu"), name)

    recorder = _Recorder(torch.Size(shape))
    leaves = {name: random(name).requires_grad_() for name in inputs}
    given = [random(name) for name in gradients]
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), recorder:
        results = function(leaves)
        names = tuple(recorder.operand(result) for result in results)
        count = len(recorder.lines)
        pairs = [(result, grad) for result, grad in zip(results, given, strict=True) if result.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            # With create_graph gradients are summed by `add`, and not in place.
            found = torch.autograd.grad(outputs, [*leaves.values()], grads, create_graph=True, allow_unused=True)
        sums = tuple(0.0 if grad is None else recorder.operand(grad) for grad in found)
    lines = recorder.lines
    return Program(tuple(lines[:count]), tuple(lines[count:]), names, sums)


class _Recorder(TorchDispatchMode):
    """Notes what is called inside, below autograd."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self._shape = shape
        self._values: dict[int, Operand] = {}  # by the id of a tensor
        self._tensors: list[Tensor] = []  # kept, so that no other has its id
        self._fixed: set[int] = set()  # ids of tensors that may not be changed: arguments, and what has aliases
        self._truths: set[Operand] = set()

    def named(self, tensor: Tensor, operand: Operand) -> Tensor:
        self._tensors.append(tensor)
        self._values[id(tensor)] = operand
        return tensor

    def argument(self, tensor: Tensor, name: str) -> Tensor:
        self._fixed.add(id(tensor))
        return self.named(tensor, name)

    def operand(self, value: Any) -> Operand:
        """A tensor or a number as a number."""
        found = self._operand(value)
        return self.line("where", found, 1.0, 0.0) if found in self._truths else found

    def truth(self, value: Any) -> Operand:
        """A tensor or a number as a truth value."""
        found = self._operand(value)
        return found if found in self._truths else self.line("not", self.line("equal", found, 0.0))

    def _operand(self, value: Any) -> Operand:
        if not isinstance(value, Tensor):
            if not isinstance(value, (int, float)):
                raise UntranslatableError(f"a constant of type {type(value).__name__}")
            return float(value)
        if id(value) not in self._values:
            raise UntranslatableError("it reads a tensor that is none of its arguments")
        return self._values[id(value)]

    def line(self, operation: str, *operands: Operand) -> str:
        result = f"v{len(self.lines)}"
        self.lines.append(Line(result, operation, operands))
        if operation in _COMPARISONS:
            self._truths.add(result)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        in_place = name.endswith("_") and not name.endswith("__")
        base = name[:-1] if in_place else name
        if in_place and id(args[0]) in self._fixed:
            raise UntranslatableError(f"{name} changes an argument, or what it was made of, in place")
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if base in _LITERALS:
            return self._constant(func(*args, **kwargs), base)
        if base in _UNSET:
            return self.named(func(*args, **kwargs), float("nan"))
        if tensors and base in (*_SAME, *_VOCABULARY) and all(self._is_constant(t) for t in tensors):
            result = self._constant(func(*args, **kwargs), base)
            if base in _SAME:
                self._fixed |= {id(args[0]), id(result)}
            return result
        if base in _SAME and not in_place:
            result = func(*args, **kwargs)
            found = self._operand(args[0])
            if result.dtype is torch.bool:
                found = self.truth(args[0])
            elif result.dtype.is_floating_point:
                found = self.operand(args[0])
            else:
                raise UntranslatableError(f"it makes numbers of type {result.dtype}")
            self._fixed |= {id(args[0]), id(result)}
        elif base in _VOCABULARY:
            found = self._translated(name, _VOCABULARY[base], args, kwargs)
            result = func(*args, **kwargs)
        else:
            return self._decomposed(func, name, args, kwargs)
        if result.shape != self._shape:
            raise UntranslatableError(f"{name} makes a tensor of another shape")
        return self.named(result, found)

    def _translated(self, name: str, write: Callable[..., Operand], args: Any, kwargs: Any) -> Operand:
        named = {key: value for key, value in kwargs.items() if key not in _IGNORED}
        try:
            inspect.signature(write).bind(self, *args, **named)
        except TypeError:
            raise UntranslatableError(f"it calls {name} with arguments that are not known") from None
        return write(self, *args, **named)

    def _is_constant(self, tensor: Tensor) -> bool:
        return isinstance(self._values.get(id(tensor)), float)

    def _constant(self, result: Tensor, name: str) -> Tensor:
        values = result.detach().double().flatten()
        if len(values) == 0 or not bool((values == values[0]).all()):
            raise UntranslatableError(f"{name} makes numbers that are not all the same")
        return self.named(result, float(values[0]))

    def _decomposed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """By operators that it is made of, which come back one by one."""
        from torch._decomp import decomposition_table  # takes its time

        if not func._schema.is_mutable:
            with self:
                parts = decomposition_table.get(func, func.decompose)
                result = parts(*args, **kwargs)
            if result is not NotImplemented:
                return result
        raise UntranslatableError(f"it calls {name}")


_IGNORED = ("dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format")
# Operators that allocate, that make constants, and that return their argument.
_UNSET = frozenset(("empty", "empty_like", "new_empty"))
_LITERALS = frozenset(f"{how}{what}" for how in ("new_", "") for what in ("full", "zeros", "ones"))
_LITERALS |= {"full_like", "zeros_like", "ones_like", "scalar_tensor", "lift_fresh"}
_SAME = frozenset(("detach", "alias", "clone", "view", "_unsafe_view", "expand", "_to_copy", "convert_element_type"))


def _binary(operation: str) -> Callable[..., Operand]:
    return lambda r, a, b: r.line(operation, r.operand(a), r.operand(b))


def _unary(operation: str) -> Callable[..., Operand]:
    return lambda r, a: r.line(operation, r.operand(a))


def _logical(operation: str) -> Callable[..., Operand]:
    return lambda r, *each: r.line(operation, *(r.truth(a) for a in each))


def _scaled(r: _Recorder, a: Any, factor: float) -> Operand:
    return r.operand(a) if factor == 1 else r.line("mul", r.operand(a), float(factor))


def _add(r: _Recorder, a: Any, b: Any, alpha: float = 1) -> Operand:
    left, right = r.operand(a), _scaled(r, b, alpha)
    if 0.0 in (left, right):
        return right if left == 0.0 else left
    return r.line("add", left, right)


def _sub(r: _Recorder, a: Any, b: Any, alpha: float = 1) -> Operand:
    return r.line("sub", r.operand(a), _scaled(r, b, alpha))


def _div(r: _Recorder, a: Any, b: Any, rounding_mode: Any = None) -> Operand:
    if rounding_mode is not None:
        raise UntranslatableError(f"div with rounding_mode={rounding_mode!r}")
    return r.line("div", r.operand(a), r.operand(b))


def _pow(r: _Recorder, a: Any, exponent: Any) -> Operand:
    if isinstance(exponent, Tensor) or isinstance(a, (int, float)):
        raise UntranslatableError("pow with an exponent that is no constant")
    power, base = float(exponent), r.operand(a)
    if 2 * abs(power) not in range(1, 17):
        raise UntranslatableError(f"pow with the exponent {exponent}")
    factors = [base] * int(abs(power))
    if power != int(power):
        factors.append(r.line("sqrt", base))
    product = factors[0]
    for factor in factors[1:]:
        product = r.line("mul", product, factor)
    return r.line("div", 1.0, product) if power < 0 else product


def _where(r: _Recorder, condition: Any, a: Any, b: Any) -> Operand:
    return r.line("where", r.truth(condition), r.operand(a), r.operand(b))


def _sign(r: _Recorder, a: Any) -> Operand:
    """0 of 0, and of a NaN."""
    found = r.operand(a)
    below = r.line("where", r.line("less", found, 0.0), -1.0, 0.0)
    return r.line("where", r.line("less", 0.0, found), 1.0, below)


def _expm1(r: _Recorder, a: Any) -> Operand:
    """tanh(a / 2) (e^a + 1), which keeps what is small."""
    found = r.operand(a)
    half = r.line("tanh", r.line("mul", found, 0.5))
    return r.line("mul", half, r.line("add", r.line("exp", found), 1.0))


def _log1p(r: _Recorder, a: Any) -> Operand:
    """log(s) a / (s - 1) for s = a + 1 as it is rounded, which keeps what is small."""
    found = r.operand(a)
    s = r.line("add", found, 1.0)
    log = r.line("log", s)
    kept = r.line("mul", log, r.line("div", found, r.line("sub", s, 1.0)))
    kept = r.line("where", r.line("equal", s, 1.0), found, kept)
    return r.line("where", r.line("equal", s, found), log, kept)  # what is large, and infinity


def _clamp(r: _Recorder, a: Any, low: Any = None, high: Any = None) -> Operand:
    """A NaN stays one."""
    found = r.operand(a)
    if low is not None:
        found = r.line("where", r.line("less", found, r.operand(low)), r.operand(low), found)
    if high is not None:
        found = r.line("where", r.line("less", r.operand(high), found), r.operand(high), found)
    return found


def _minimum(r: _Recorder, a: Any, b: Any) -> Operand:
    """a where it is less or a NaN; b may be one."""
    left, right = r.operand(a), r.operand(b)
    taken = r.line("or", r.line("less", left, right), r.line("not", r.line("equal", left, left)))
    return r.line("where", taken, left, right)


def _maximum(r: _Recorder, a: Any, b: Any) -> Operand:
    left, right = r.operand(a), r.operand(b)
    taken = r.line("or", r.line("less", right, left), r.line("not", r.line("equal", left, left)))
    return r.line("where", taken, left, right)


def _slope(r: _Recorder, grad: Any, slope: Operand) -> Operand:
    return r.line("mul", r.operand(grad), slope)


def _tanh_backward(r: _Recorder, grad: Any, out: Any) -> Operand:
    tanh = r.operand(out)
    return _slope(r, grad, r.line("sub", 1.0, r.line("mul", tanh, tanh)))


def _sigmoid_backward(r: _Recorder, grad: Any, out: Any) -> Operand:
    sigmoid = r.operand(out)
    return r.line("mul", _slope(r, grad, sigmoid), r.line("sub", 1.0, sigmoid))


def _silu(r: _Recorder, a: Any) -> Operand:
    found = r.operand(a)
    return r.line("mul", found, r.line("sigmoid", found))


def _silu_backward(r: _Recorder, grad: Any, a: Any) -> Operand:
    found = r.operand(a)
    sigmoid = r.line("sigmoid", found)
    bent = r.line("mul", found, r.line("sub", 1.0, sigmoid))
    return _slope(r, grad, r.line("mul", sigmoid, r.line("add", bent, 1.0)))


def _threshold_backward(r: _Recorder, grad: Any, a: Any, threshold: Any) -> Operand:
    return r.line("where", r.line("less_equal", r.operand(a), r.operand(threshold)), 0.0, r.operand(grad))


# Operators of torch by name: (recorder, *arguments) -> what they compute.
_VOCABULARY: dict[str, Callable[..., Operand]] = {
    **{name: _unary(name) for name in _FUNCTIONS},
    "add": _add,
    "sub": _sub,
    "rsub": lambda r, a, b, alpha=1: _sub(r, b, a, alpha),
    "mul": _binary("mul"),
    "div": _div,
    "reciprocal": lambda r, a: r.line("div", 1.0, r.operand(a)),
    "rsqrt": lambda r, a: r.line("div", 1.0, r.line("sqrt", r.operand(a))),
    "square": lambda r, a: _pow(r, a, 2),
    "pow": _pow,
    "sign": _sign,
    "sgn": _sign,
    "expm1": _expm1,
    "log1p": _log1p,
    "silu": _silu,
    "silu_backward": _silu_backward,
    "fill": lambda r, a, value: r.operand(value),
    "relu": lambda r, a: r.line("where", r.line("less_equal", r.operand(a), 0.0), 0.0, r.operand(a)),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda r, a, high: _clamp(r, a, None, high),
    "minimum": _minimum,
    "maximum": _maximum,
    "where": _where,
    "masked_fill": lambda r, a, mask, value: _where(r, mask, value, a),
    "lt": _binary("less"),
    "le": _binary("less_equal"),
    "gt": lambda r, a, b: r.line("less", r.operand(b), r.operand(a)),
    "ge": lambda r, a, b: r.line("less_equal", r.operand(b), r.operand(a)),
    "eq": _binary("equal"),
    "ne": lambda r, a, b: r.line("not", r.line("equal", r.operand(a), r.operand(b))),
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_not": _logical("not"),
    "bitwise_and": _logical("and"),
    "bitwise_or": _logical("or"),
    "bitwise_not": _logical("not"),
    "tanh_backward": _tanh_backward,
    "sigmoid_backward": _sigmoid_backward,
    "threshold_backward": _threshold_backward,
}
