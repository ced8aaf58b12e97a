"""convert, revert, patch: put fusedrnn's LSTM where nn.LSTM is, in models that exist already.

A module is converted by giving it another class, in place. Its parameters, buffers, hooks, flags, name and every
reference to it stay what they are, and giving the old class back undoes it exactly. A subclass of nn.LSTM gets a class
of its own that derives from the subclass first and from ours second, so that its `super().forward(...)` finds ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .module import LSTM, CompilableLSTM, LSTMCell

Model = TypeVar("Model", bound=nn.Module)

# What a converted class remembers of the class it was made from.
_ORIGINAL = "_fusedrnn_original"


@dataclass
class Report:
    """What `convert` or `revert` did: names of modules ("" is the model itself)."""

    swapped: dict[str, str] = field(default_factory=dict)  # name -> what it was and what it is
    left: dict[str, str] = field(default_factory=dict)  # name -> why it was left alone

    def __str__(self) -> str:
        lines = [f"swapped {name or '(the model)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"left {name or '(the model)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) if lines else "no LSTM found"


def convert(model: Model, *, compilable: bool = False, report: Report | None = None) -> Model:
    """Turns every nn.LSTM and nn.LSTMCell of a model into fusedrnn's, in place; parameters stay the same objects.

    Args:
        model: any module; itself converted if it is an LSTM. Subclasses of nn.LSTM are converted too and keep their
            own forward; what that computes by calling `super().forward` is then ours.
        compilable: give plain nn.LSTMs the class `CompilableLSTM`, so that torch.compile(model, fullgraph=True) and
            torch.export work. They are no instances of nn.LSTM any longer; subclasses cannot be, and are left.
        report: filled with what was swapped and what was left and why.

    Returns:
        The model.

    Raises:
        TypeError: model is not a Module.
    """
    return _swap(model, report, lambda module: _convert_module(module, compilable))


def revert(model: Model, *, report: Report | None = None) -> Model:
    """Undoes `convert` in place, and turns fusedrnn modules that were built as such into torch.nn's.

    Args:
        model: any module.
        report: filled with what was swapped and what was left and why.

    Returns:
        The model.

    Raises:
        TypeError: model is not a Module.
    """
    return _swap(model, report, _revert_module)


@contextmanager
def patch() -> Iterator[None]:
    """Inside, whatever constructs an nn.LSTM or nn.LSTMCell gets fusedrnn's, however it came by the class.

    For code that names nn.LSTM itself, from an import made long before, a table of classes, or a subclass. The classes
    themselves stay in place, so isinstance and exact comparisons of classes mean what they meant.
    """
    originals = {cls: cls.__init__ for cls in (nn.LSTM, nn.LSTMCell)}

    def patched(original: Any) -> Any:
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            _convert_module(self, compilable=False)

        return __init__

    for cls, original in originals.items():
        cls.__init__ = patched(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.__init__ = original  # type: ignore[method-assign]


class _Left(Exception):
    """A module is left alone; the message says why."""


def _swap(model: Model, report: Report | None, swap: Any) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report() if report is None else report
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            if getattr(module, "original_name", "") in ("LSTM", "LSTMCell"):
                report.left[name] = "it is TorchScript; convert the model before it is scripted"
            continue
        before = type(module)
        try:
            note = swap(module)
        except _Left as left:
            report.left[name] = f"{_name(before)}: {left}"
        else:
            report.swapped[name] = f"{_name(before)} -> {_name(type(module))}{note}"
    return model


def _convert_module(module: nn.Module, compilable: bool) -> str:
    """Gives one module our class; returns what the report should add, or raises _Left."""
    cls = type(module)
    if isinstance(module, LSTM) and compilable and cls is LSTM:
        module.__class__ = CompilableLSTM
        return ""
    if isinstance(module, (LSTM, CompilableLSTM, LSTMCell)):
        raise _Left("it is fusedrnn's already")
    if not isinstance(module, (nn.LSTM, nn.LSTMCell)):
        raise _Left("fusedrnn has no kernels for it yet")
    if parametrize.is_parametrized(module):
        converted = _parametrized_class(cls, compilable)
    else:
        converted = _converted_class(cls, compilable and cls is nn.LSTM)
    _assign_class(module, converted)
    notes = []
    if compilable and isinstance(module, nn.LSTM):
        notes.append("still an nn.LSTM, because its class is derived from it: torch.compile breaks the graph here")
    if cls not in (nn.LSTM, nn.LSTMCell) and _has_own_forward(cls):
        notes.append("its own forward is kept, and ours is what its super().forward finds")
    return "".join(f" ({note})" for note in notes)


def _revert_module(module: nn.Module) -> str:
    cls = type(module)
    plain: dict[type, type] = {LSTM: nn.LSTM, CompilableLSTM: nn.LSTM, LSTMCell: nn.LSTMCell}
    if cls in plain:
        original = plain[cls]
    elif _ORIGINAL in cls.__dict__:
        original = cls.__dict__[_ORIGINAL]
    elif not isinstance(module, (LSTM, CompilableLSTM, LSTMCell)):
        raise _Left("it is not fusedrnn's")
    elif parametrize.is_parametrized(module) and cls.__bases__[0] in plain:
        original = _parametrized_over(cls, plain[cls.__bases__[0]])
    else:
        raise _Left("its class was written as a subclass of fusedrnn's")
    _assign_class(module, original)
    return ""


def _assign_class(module: nn.Module, cls: type) -> None:
    try:
        module.__class__ = cls
    except TypeError as error:  # for instance a class with __slots__
        raise _Left(str(error)) from error


@cache
def _converted_class(cls: type, compilable: bool) -> type:
    """The class that a module of class `cls` is given."""
    if cls is nn.LSTM:
        return CompilableLSTM if compilable else LSTM
    if cls is nn.LSTMCell:
        return LSTMCell
    ours = LSTM if issubclass(cls, nn.LSTM) else LSTMCell

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = object.__reduce_ex__(self, protocol)
        return _new_converted, (cls,), *state

    namespace = {
        _ORIGINAL: cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": __reduce_ex__,
    }
    try:
        return type(cls.__name__, (cls, ours), namespace)
    except Exception as error:  # a metaclass or an __init_subclass__ of the subclass may refuse, in any way it likes
        raise _Left(f"no class can be derived from it: {error}") from error


def _new_converted(cls: type) -> nn.Module:
    """Unpickles an instance of a converted subclass: `cls` can be found by name, its converted class cannot."""
    converted = _converted_class(cls, False)
    return converted.__new__(converted)


def _parametrized_class(cls: type, compilable: bool) -> type:
    """The class of a parametrized module, which torch derived from the module's own, over the converted one."""
    base = cls.__bases__[0]
    converted = _parametrized_over(cls, _converted_class(base, compilable and base is nn.LSTM))
    setattr(converted, _ORIGINAL, cls)
    return converted


def _parametrized_over(cls: type, base: type) -> type:
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), namespace)


def _has_own_forward(cls: type) -> bool:
    return inspect.getattr_static(cls, "forward") not in (nn.LSTM.forward, nn.LSTMCell.forward)


def _name(cls: type) -> str:
    package = cls.__module__.split(".")[0]
    return f"{'nn' if package == 'torch' else package}.{cls.__name__}"
