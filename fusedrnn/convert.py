"""convert, revert, patch: replace torch's recurrent modules by fusedrnn's, in existing models.

Conversion assigns another class to the module, in place. Parameters, buffers, hooks, flags, name and all references
stay the same, and assigning the old class undoes it exactly. An instance of a subclass, say of nn.LSTM, gets a new
class with the bases (subclass, ours), so that `super().forward(...)` in the subclass calls our forward.
"""

from __future__ import annotations

import copyreg
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, wraps
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .module import BASES, mark_as_leaf, unmark_as_leaf

Model = TypeVar("Model", bound=nn.Module)

# Attribute of a converted class: the class it was derived from.
_ORIGINAL = "_fusedrnn_original"
# torch's class -> our subclass of it; and -> our class that is no subclass of it, which torch.compile can trace.
_OURS: dict[Any, Any] = {theirs: ours for ours, theirs in BASES.items() if issubclass(ours, theirs)}
_COMPILABLE: dict[Any, Any] = {theirs: ours for ours, theirs in BASES.items() if not issubclass(ours, theirs)}


_NAMES = {theirs.__name__ for theirs in _OURS}


@dataclass
class Report:
    """What `convert` or `revert` did, by module name ("" is the model itself)."""

    swapped: dict[str, str] = field(default_factory=dict)  # name -> old class and new class
    left: dict[str, str] = field(default_factory=dict)  # name -> why it was not converted

    def __str__(self) -> str:
        lines = [f"swapped {name or '(the model)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"left {name or '(the model)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) if lines else "no LSTM, GRU or RNN found"


def convert(model: Model, *, compilable: bool = False, report: Report | None = None) -> Model:
    """Converts every nn.LSTM, nn.GRU, nn.RNN and every cell of these in a model to fusedrnn's class, in place;
    parameters stay the same objects.

    Args:
        model: any module; converted itself if it is one of these. Subclasses are converted too and keep their own
            forward; its calls of `super().forward` run our forward. A module whose forward was set on the instance
            is not converted.
        compilable: convert plain nn.LSTMs to `CompilableLSTM`, and so on, so that torch.compile(model,
            fullgraph=True) and torch.export work. The result is not an instance of nn.LSTM, which matters to code
            that tests for it, such as TorchRL's LSTMModule. Subclasses of nn.LSTM stay subclasses of it: they are
            converted as without this option, and the report says that torch.compile breaks the graph there.
        report: filled with the modules that were converted, those that were not, and why.

    Returns:
        The model.

    Raises:
        TypeError: model is not a Module.

    Example:
        >>> model = nn.Sequential(nn.LSTM(4, 8), nn.Identity())
        >>> report = fusedrnn.Report()
        >>> _ = fusedrnn.convert(model, report=report)
        >>> isinstance(model[0], fusedrnn.LSTM), isinstance(model[0], nn.LSTM), list(report.swapped)
        (True, True, ['0'])
        >>> type(fusedrnn.revert(model)[0]) is nn.LSTM
        True
    """
    return _swap(model, report, lambda module: _convert_module(module, compilable))


def revert(model: Model, *, report: Report | None = None) -> Model:
    """Undoes `convert` in place; also converts modules that were constructed as fusedrnn's to torch.nn's.

    Args:
        model: any module.
        report: filled with the modules that were converted, those that were not, and why.

    Returns:
        The model.

    Raises:
        TypeError: model is not a Module.
    """
    return _swap(model, report, _revert_module)


_patches = 0  # how many `patch` contexts are open, in all threads
_patches_lock = threading.Lock()
_unpatched: dict[Any, Any] = {}  # class -> its own __init__, while a context is open


@contextmanager
def patch() -> Iterator[None]:
    """Context in which constructing an nn.LSTM, nn.GRU, nn.RNN, or a cell of these, gives fusedrnn's class.

    For code that constructs the layers itself, however it refers to the class: an earlier import, a table of classes,
    or a subclass. torch.nn's names are unchanged, and the new objects are instances of torch's classes. Applies to the
    whole process while any such context is open.

    Example:
        >>> with fusedrnn.patch():
        ...     lstm = nn.LSTM(4, 8)
        >>> isinstance(lstm, fusedrnn.LSTM)
        True
    """
    global _patches
    with _patches_lock:
        _patches += 1
        if _patches == 1:
            for cls in _OURS:
                _unpatched[cls] = inspect.getattr_static(cls, "__init__")
            for patched, original in _unpatched.items():
                patched.__init__ = _converting(original)
    try:
        yield
    finally:
        with _patches_lock:
            _patches -= 1
            if _patches == 0:
                for patched, original in _unpatched.items():
                    patched.__init__ = original
                _unpatched.clear()


def _converting(original: Any) -> Any:
    """An __init__ that calls `original` and then converts the module."""

    @wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        with suppress(_LeftAlone):  # fusedrnn's own classes call this __init__ too
            _convert_module(self, compilable=False)

    return init


class _LeftAlone(Exception):  # noqa: N818, it is an outcome
    """The module is not converted; the message says why."""


def _swap(model: Model, report: Report | None, swap: Any) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report() if report is None else report
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            if getattr(module, "original_name", "") in _NAMES:
                report.left[name] = "it is TorchScript; convert the model before it is scripted"
            continue
        before = type(module)
        try:
            note = swap(module)
        except _LeftAlone as left:
            report.left[name] = f"{_name(before)}: {left}"
        else:
            report.swapped[name] = f"{_name(before)} -> {_name(type(module))}{note}"
    return model


def _convert_module(module: nn.Module, compilable: bool) -> str:
    """Gives one module our class; returns what the report should add, or raises _LeftAlone."""
    cls = type(module)
    if not isinstance(module, (*_OURS, *BASES)):
        raise _LeftAlone("fusedrnn has no class for it")
    _check_forward(module, "it calls torch's; convert the model before it is set")
    if parametrize.is_parametrized(module):
        base = cls.__bases__[0]
        converted = _parametrized_over(cls, _converted_class(base, compilable))
        if base not in BASES:
            setattr(converted, _ORIGINAL, cls)
    else:
        converted = _converted_class(cls, compilable)
    _give_class(module, converted)
    if cls in BASES or cls in _OURS:
        mark_as_leaf(module)  # as torch's own are; torch.fx traces into subclasses, converted or not
    notes = []
    if compilable and isinstance(module, tuple(_COMPILABLE)):
        base = next(theirs for theirs in _COMPILABLE if isinstance(module, theirs))
        notes.append(
            f"still an nn.{base.__name__}, because its class is derived from it: torch.compile breaks the graph here"
        )
    if _has_own_forward(cls):
        notes.append("its own forward is kept, and ours is what its super().forward finds")
    return "".join(f" ({note})" for note in notes)


def _revert_module(module: nn.Module) -> str:
    if not isinstance(module, tuple(BASES)):
        raise _LeftAlone("it is not fusedrnn's")
    _check_forward(module, "it calls fusedrnn's; take it away first")
    if options := getattr(module, "_options_repr", str)():
        raise _LeftAlone(f"torch's has no {options.removeprefix(', ')}")
    cls = type(module)
    if parametrize.is_parametrized(module):
        remembered = cls.__dict__.get(_ORIGINAL)
        # Parametrizations added or removed after the conversion are properties of this class only.
        if remembered is not None and _properties(remembered) == _properties(cls):
            original = remembered
        else:
            original = _parametrized_over(cls, _original_class(cls.__bases__[0]))
    else:
        original = _original_class(cls)
    _give_class(module, original)
    unmark_as_leaf(module)
    return ""


def _give_class(module: nn.Module, cls: type) -> None:
    own_forward = vars(module).get("forward")
    object.__setattr__(module, "__class__", cls)  # bypasses a __setattr__ of the class
    if own_forward is not None:
        vars(module)["forward"] = MethodType(inspect.getattr_static(cls, "forward"), module)


def _check_forward(module: nn.Module, why: str) -> None:
    """Refuses a module whose instance has a `forward` of its own, which would hide the forward of the new class.

    The class's own forward, bound to the module, is harmless: it remains where a hook was removed.
    """
    own = vars(module).get("forward")
    if own is None or (isinstance(own, MethodType) and own == MethodType(type(module).forward, module)):
        return
    raise _LeftAlone(f"a forward of its own was set on the module (by a hook, or weight dropping), and {why}")


def _converted_class(cls: Any, compilable: bool) -> type:
    """The class that a module of class `cls` is given."""
    if cls in _OURS:
        return _COMPILABLE.get(cls, _OURS[cls]) if compilable else _OURS[cls]
    if compilable and cls in _OURS.values() and BASES[cls] in _COMPILABLE:
        return _COMPILABLE[BASES[cls]]
    if issubclass(cls, tuple(BASES)):
        raise _LeftAlone("it is fusedrnn's already")
    return _derived_class(cls)


@cache
def _derived_class(cls: Any) -> type:
    """For a subclass of one of torch's: a class derived from it first and from ours second."""
    ours = next(ours for theirs, ours in _OURS.items() if issubclass(cls, theirs))
    namespace = {
        _ORIGINAL: cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_converted,
    }
    try:
        return type(cls)(cls.__name__, (cls, ours), namespace)
    except Exception as error:  # a metaclass or an __init_subclass__ of the subclass may raise anything
        raise _LeftAlone(f"no class can be derived from it: {error}") from error


def _original_class(cls: type) -> type:
    """The inverse of `_converted_class`."""
    if cls in BASES:
        return BASES[cls]
    if _ORIGINAL in cls.__dict__:
        return cls.__dict__[_ORIGINAL]
    raise _LeftAlone("its class was written as a subclass of fusedrnn's")


def _reduce_converted(self: nn.Module, protocol: Any) -> Any:
    """Pickles an instance of a derived class by its original class, which, unlike the derived one, has a name."""
    original = getattr(type(self), _ORIGINAL)
    reduced = original.__reduce_ex__(self, max(int(protocol), 2))
    if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced  # the subclass defines its own pickling
    (_, *args), rest = reduced[1], reduced[2:]
    return _new_converted, (original, *args), *rest


def _new_converted(cls: type, *args: Any) -> nn.Module:
    converted: Any = _derived_class(cls)
    return converted.__new__(converted, *args)


def _parametrized_over(cls: type, base: type) -> type:
    """A copy of `cls`, the class that torch made for a parametrized module, with `base` as its base class."""
    left_out = ("__dict__", "__weakref__", _ORIGINAL)
    return type(cls.__name__, (base,), {key: value for key, value in vars(cls).items() if key not in left_out})


def _properties(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


def _has_own_forward(cls: type) -> bool:
    known = [inspect.getattr_static(base, "forward") for base in (*BASES, *_OURS)]
    return inspect.getattr_static(cls, "forward") not in known


def _name(cls: type) -> str:
    package = cls.__module__.split(".")[0]
    return f"{'nn' if package == 'torch' else package}.{cls.__name__}"
