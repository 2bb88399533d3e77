"""Decisions that are made by bytes, so that whoever changes the bytes changes the decisions."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")
_TAIL = 100


def padded(data: bytes) -> bytes:
    """Return more bytes, by chance, but always the same ones for the same bytes.

    Who looks for short inputs finds some that decide little; with these, all is decided.
    """
    return data + random.Random(data).randbytes(_TAIL)


class Choices:
    """Draws from bytes; once these are used up, everything is the first that there is."""

    def __init__(self, data: bytes) -> None:
        self._left = iter(data)

    def below(self, count: int) -> int:
        """Draw a number from 0 to `count - 1`."""
        number, reach = 0, 1
        while reach < count:
            number = number << 8 | next(self._left, 0)
            reach <<= 8
        return number % count

    def of(self, options: Sequence[T]) -> T:
        """Draw one of them."""
        return options[self.below(len(options))]

    def once_in(self, count: int) -> bool:
        """Draw whether to do what is done once in `count` times; not, when nothing is left."""
        return self.below(count) == count - 1
