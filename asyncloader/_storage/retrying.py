"""Tries again what may have failed for a moment only."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asyncloader._addresses import is_url
from asyncloader._threads.call import StalledError

from .opening import FileChangedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from .protocol import ReadInto, Storage, ThreadedStorage


T = TypeVar("T")

_log = logging.getLogger(__name__)

_TRANSIENT = {errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN, errno.EINTR}
_FIRST_PAUSE = 0.1
"""Seconds, at most; each pause may be twice as long as the one before."""
_LONGEST_WISH = 30.0


class LaterError(OSError):
    """A server wants to be left alone for a while.

    Attributes:
        seconds: For so long, at least; at most half a minute.
    """

    def __init__(self, problem: str, wish: str | None) -> None:
        super().__init__(errno.EIO, problem)
        is_number = wish is not None and wish.isascii() and wish.isdigit()  # it may be a date
        self.seconds = min(float(wish or 0), _LONGEST_WISH) if is_number else 0.0


def is_transient(error: BaseException) -> bool:
    """Say whether a fault may be gone in a moment: networks and devices have such.

    A file that was replaced stays so; what took too long already is not waited for again.
    """
    if isinstance(error, FileChangedError | StalledError) or not isinstance(error, OSError):
        return False
    return error.errno in _TRANSIENT


class RetryingStorage:
    """A storage that tries again, a few times and with growing pauses, what may pass.

    Between the attempts are pauses of up to 0.1, 0.2, 0.4 s and so on, random ones, so that many
    readers do not come back at the same moment.

    Args:
        inner: The storage.
        lost: Knows how many reads were given up, if `inner` may not say so.
        sleep: Pauses on the event loop.
        rest: Pauses on a thread.
        attempts: How often a call is tried, at most.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        lost: Callable[[], int] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rest: Callable[[float], None] = time.sleep,
        attempts: int = 5,
    ) -> None:
        self._inner = inner
        self._lost = lost
        self._sleep = sleep
        self._rest = rest
        self._attempts = attempts
        self._retries = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._inner!r}: {self.retries} retries>"

    @property
    def retries(self) -> int:
        """How often it tried again, or the storage itself did."""
        resumed: int = getattr(self._inner, "resumed", 0)
        return self._retries + resumed

    @property
    def location(self) -> str:
        """What to call the checkpoint in messages."""
        return self._inner.location

    @property
    def lost(self) -> int:
        """Reads that were given up: their memory may be written to at any time."""
        return self._inner.lost if self._lost is None else self._lost()

    async def size(self, name: str, /) -> int:
        """Return the length of a file in bytes; see `Storage`."""
        return await self._again(partial(self._inner.size, name), name)

    async def changed(self, names: Sequence[str], /) -> list[str]:
        """Say which files are others than they were; see `Storage`."""
        return await self._again(partial(self._inner.changed, names), "")

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        """Fill `views` from `offset` on; see `Storage`."""
        # The loop of `_again`, written out: one call less on the way of every read.
        attempt = 0
        while True:
            try:
                return await self._inner.readinto(name, offset, views)
            except OSError as error:
                attempt += 1
                if (pause := self._pause(error, name, attempt)) is None:
                    raise
            await self._sleep(pause)

    async def _again(self, call: Callable[[], Awaitable[T]], name: str) -> T:
        attempt = 0
        while True:
            try:
                return await call()
            except OSError as error:
                attempt += 1
                if (pause := self._pause(error, name, attempt)) is None:
                    raise
            await self._sleep(pause)

    def _pause(
        self,
        error: OSError,
        name: str,
        attempt: int,
        told: list[tuple[int, str]] | None = None,
    ) -> float | None:
        """Return how long to wait before the next attempt; `None` if there is none."""
        if not is_transient(error):
            return None
        if attempt == self._attempts:
            place = "the server and the network" if is_url(self.location) else "the disk"
            error.add_note(f"{self._attempts} times in a row; look at {place}")
            return None
        self._retries += 1
        # The first one is news; the report will count the others.
        level = logging.WARNING if self._retries == 1 else logging.DEBUG
        where = f"{self.location}: {name}"
        text = (
            f"{where}: {error.strerror or error}; trying again, {attempt} of {self._attempts - 1}"
        )
        if told is None:
            _log.log(level, "%s", text)
        else:
            told.append((level, text))
        # Random, so that many readers do not come back at the same moment.
        pause = random.uniform(0, _FIRST_PAUSE * 2 ** (attempt - 1))  # noqa: S311  # no secret
        return pause + (error.seconds if isinstance(error, LaterError) else 0.0)


class ThreadedRetryingStorage(RetryingStorage):
    """The same for a storage that lends threads.

    What is tried again on one of these pauses there: by an attribute `rest` of its `read`, if it
    has one, which can be interrupted. Else cancelling waits for the pause, of up to 1.5 s.
    """

    def __init__(self, inner: ThreadedStorage, **pauses: Any) -> None:  # noqa: ANN401  # as above
        super().__init__(inner, **pauses)
        self._lender = inner

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        """Run `job` on a thread; see `ThreadedStorage`."""
        # For the event loop's thread: a handler of a signal that loads may have come while that
        # thread wrote a log line, and then no other thread can.
        told: list[tuple[int, str]] = []

        def with_read(read: ReadInto) -> T:
            rest = getattr(read, "rest", self._rest)

            def persistent(offset: int, views: Sequence[memoryview]) -> int:
                attempt = 0
                while True:
                    try:
                        return read(offset, views)
                    except OSError as error:
                        attempt += 1
                        if (pause := self._pause(error, name, attempt, told)) is None:
                            raise
                    rest(pause)

            return job(persistent)

        try:
            return await self._lender.on_thread(name, with_read)
        finally:
            for level, text in told:
                _log.log(level, "%s", text)
