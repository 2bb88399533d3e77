"""Which bytes of a file are there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Extents:
    """Ranges of bytes, `[begin, end)`; those that touch are one."""

    def __init__(self) -> None:
        # Both in order, and of the same length.
        self._begins: list[int] = []
        self._ends: list[int] = []

    def pairs(self) -> list[tuple[int, int]]:
        """Return the ranges, in order."""
        return list(zip(self._begins, self._ends, strict=True))

    def end_of(self, offset: int) -> int | None:
        """Return the end of the range that holds a byte; `None` if none does."""
        at = bisect_right(self._begins, offset) - 1
        return self._ends[at] if at >= 0 and offset < self._ends[at] else None

    def next_after(self, offset: int, last: int) -> int:
        """Return where the next range begins behind a byte; `last` if none does."""
        at = bisect_right(self._begins, offset)
        return self._begins[at] if at < len(self._begins) else last

    def add(self, begin: int, end: int) -> None:
        """Add a range, and join it with those that it touches."""
        if end <= begin:
            return
        first, last = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]

    def add_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Add ranges."""
        for begin, end in ranges:
            self.add(begin, end)
