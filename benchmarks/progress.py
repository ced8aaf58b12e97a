"""A bar that says what is measured, and the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def shown(items: Sequence[Item], unit: str, label: Callable[[Item], str]) -> Iterable[Item]:
    """The items, with a bar where there is a terminal, and tqdm to draw it.

    Args:
        unit: what the bar counts.
        label: what it says of the item that is at work.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar = tqdm(items, file=sys.stderr, disable=None, leave=False, unit=unit, smoothing=0)

    def described() -> Iterable[Item]:
        for item in bar:
            bar.set_description_str(label(item))
            yield item

    return described()
