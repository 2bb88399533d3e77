"""Looks at the source on a thread, and waits until no file of a version is written to any more."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from asyncloader._threads.call import StalledError
from asyncloader._threads.disk import Disk
from asyncloader._threads.pool import WorkerPool
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from .source import Candidate, Files


T = TypeVar("T")
P = ParamSpec("P")

_REMEMBERED = 100
_NAMED = 3


class Looks:
    """Calls functions that look at the source on a thread. Belongs to one event loop.

    Args:
        source: A run folder, or a checkpoint.
        stall_timeout: Seconds after which a look is given up if the disk gives no answer.
    """

    def __init__(self, source: Path, *, stall_timeout: float | None) -> None:
        self._source = source
        self._closed = False
        self._workers = WorkerPool(1, name="asyncloader-look")
        self._disk = Disk(self._workers, seconds=stall_timeout)

    def close(self) -> None:
        """Look no more. Waits for the thread, unless a look is still waited for."""
        self._closed = True
        # A command may still look at a disk that gives no answer: it will be given up.
        self._workers.shutdown(wait=self._disk.is_idle)

    async def __call__(self, look: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `look` returns.

        Raises:
            CheckpointError: If there was no answer.
            RuntimeError: If this is closed.
            Exception: What `look` raises.
        """
        try:
            return await self._disk.call(partial(look, *args, **kwargs))
        except StalledError as error:
            raise CheckpointError(str(self._source), f"cannot be looked at: {error}") from error
        except RuntimeError as error:
            if not self._closed:
                raise
            problem = f"{str(self._source)!r}: left: use it within its `async with` block"
            raise RuntimeError(problem) from error


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
