"""Progress: a bar on a terminal, otherwise a line for each item."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def shown(items: Sequence[Item], unit: str, label: Callable[[Item], str]) -> Iterator[Item]:
    """The items. Before each one stderr says which it is: in a bar with the time left, where there is a terminal and
    tqdm to draw it; else in a line of its own.

    Args:
        unit: what the bar counts.
        label: what is said of the item that is at work.
    """
    bar = _bar(items, unit) if sys.stderr.isatty() else None
    for number, item in enumerate(items if bar is None else bar, 1):
        if bar is None:
            print(f"{unit} {number} of {len(items)}: {label(item)}", file=sys.stderr, flush=True)
        else:
            bar.set_description_str(label(item))
        yield item


def _bar(items: Sequence[Item], unit: str) -> Any:
    """tqdm's, None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(items, file=sys.stderr, leave=False, unit=unit, smoothing=0)
