"""Memory that threads may still write to, though nobody waits for them any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


_lost: set[Writing] = set()


class Writing:
    """A thread that writes to views, some now, some later.

    `lose` is called on the event loop, the others on the thread; each notes its own part before it
    looks at the other's, so no lock is needed.
    """

    __slots__ = ("_is_lost", "_is_over", "views")

    def __init__(self) -> None:
        self.views: Sequence[memoryview] = ()
        self._is_lost = False
        self._is_over = False

    def begin(self, views: Sequence[memoryview]) -> None:
        """Note what is written to next.

        Raises:
            RuntimeError: If nobody waits for it any more: others may have the memory by now.
        """
        self.views = views
        if self._is_lost:
            raise RuntimeError("the read was given up")

    def lose(self) -> None:
        """Note that nobody waits for it any more."""
        self._is_lost = True
        _lost.add(self)
        if self._is_over:
            _lost.discard(self)

    def end(self) -> None:
        """Note that the thread is done."""
        self._is_over = True
        if self._is_lost:
            _lost.discard(self)


def lost_memory() -> list[tuple[int, int]]:
    """Return the addresses, from the first to one past the last, of what may yet be written to."""
    views = [view for writing in _lost.copy() for view in writing.views if view.nbytes]
    begins = [np.frombuffer(view, np.uint8).ctypes.data for view in views]
    return [(begin, begin + view.nbytes) for begin, view in zip(begins, views, strict=True)]
