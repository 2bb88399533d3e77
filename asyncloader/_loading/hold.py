"""A value that is opened once for any number of users."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Generic, TypeVar

from asyncloader._threads.jobs import settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


T = TypeVar("T")


class Hold(Generic[T]):
    """Opens a value once for any number of blocks that use it; may be opened again.

    Belongs to the event loop and the process that opened it.
    """

    def __init__(self, manager: Callable[[], contextlib.AbstractAsyncContextManager[T]]) -> None:
        self.value: T | None = None  # `None` where it is not open
        self.users = 0
        self.is_entered = False  # from when it begins to open until it is closed
        self.process = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self._manager = manager
        self._stack = contextlib.AsyncExitStack()
        self._idle = asyncio.Event()

    async def open(self) -> None:
        assert not self.is_entered
        self.is_entered = True  # before the first await: two could enter at once
        try:
            value = await self._stack.enter_async_context(self._manager())
        except BaseException:
            self.is_entered = False
            raise
        self.loop, self.process = asyncio.get_running_loop(), os.getpid()
        self.value = value  # last: another thread may look

    @contextlib.contextmanager
    def use(self) -> Iterator[T]:
        """Yield the value: it stays open at least until the block ends."""
        assert self.value is not None, "it is open"
        self.users += 1
        try:
            yield self.value
        finally:
            self.users -= 1
            if not self.users:
                self._idle.set()

    async def close(self) -> None:
        """Wait until no block uses it, as threads may be writing to memory; then close it."""
        if self.value is None:
            return
        self.value = None
        try:
            if self.users:
                self._idle = asyncio.Event()
                await settled(asyncio.ensure_future(self._idle.wait()))
        finally:
            try:
                await self._stack.aclose()
            finally:  # cancelled, say: it is closed all the same
                self.is_entered, self.loop = False, None
