"""Waits until no file of a version is written to any more."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from .source import Candidate, Files


_REMEMBERED = 100
_NAMED = 3


class Rest:
    """Knows for how long the files of versions have been as they are.

    No time of a file is compared with a clock: that of a file server may be wrong.

    Args:
        seconds: For which files have to be seen unchanged.
        note: Gets what is waited for, and an object that stands for the wait; an empty text once
            it is over.
        clock: Seconds, ever growing.
    """

    def __init__(
        self,
        seconds: float,
        *,
        note: Callable[[object, str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._note = note
        self._clock = clock
        self._since: dict[Path, tuple[Files, float]] = {}

    async def reached(self, look: Callable[[], Awaitable[Candidate | None]]) -> Candidate:
        """Return a version once two looks, some time apart, have found the same files.

        Args:
            look: Returns it as it is now; `None` where that is unknown. An error of it ends the
                wait.
        """
        wait = object()
        seen: Candidate | None = None
        try:
            while True:
                began = self._clock()
                found = await look()
                left = self._seconds
                if found is not None:
                    left = self._left(found, began)
                    if not left:
                        return found
                    if seen is not None and seen.path == found.path and seen.files != found.files:
                        self._note(wait, _waits(found, seen))
                    seen = found
                await asyncio.sleep(left)
        finally:
            self._note(wait, "")

    def _left(self, found: Candidate, began: float) -> float:
        """Return for how long files have to stay as a look has found them that began then."""
        files, since = self._since.pop(found.path, (None, 0.0))
        if files != found.files:
            since = self._clock()
        self._since[found.path] = found.files, since
        if len(self._since) > _REMEMBERED:
            del self._since[next(iter(self._since))]
        return max(since + self._seconds - began, 0.0)


def _waits(found: Candidate, before: Candidate) -> str:
    names = found.files.changed_since(before.files)
    text = ", ".join(map(repr, names[:_NAMED])) + ("" if len(names) <= _NAMED else ", …")
    return f"{found.path}: is being written to ({text}); it is loaded once its files stand still"
