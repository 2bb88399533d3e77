"""Something open that several tasks use: closed when the last of them is done."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Generic, TypeVar

from asyncloader._threads.jobs import settled

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class Hold(Generic[T]):
    """Belongs to the event loop and the process that opened it.

    Attributes:
        value: What is open.
        users: How many blocks use it.
        loop: The event loop.
        process: The process's number.
    """

    def __init__(self, value: T, stack: contextlib.AsyncExitStack) -> None:
        self.value = value
        self.users = 0
        self.loop = asyncio.get_running_loop()
        self.process = os.getpid()
        self._stack = stack
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def open(cls, manager: contextlib.AbstractAsyncContextManager[T]) -> Hold[T]:
        """Enter a context manager, for others to use what it yields."""
        stack = contextlib.AsyncExitStack()
        return cls(await stack.enter_async_context(manager), stack)

    @contextlib.contextmanager
    def use(self) -> Iterator[T]:
        """Yield the value: it stays open at least until the block ends."""
        self.users += 1
        self._idle.clear()
        try:
            yield self.value
        finally:
            self.users -= 1
            if not self.users:
                self._idle.set()

    async def close(self) -> None:
        """Wait until no block uses it, as threads may be writing to memory; then close it."""
        try:
            if self.users:
                await settled(asyncio.ensure_future(self._idle.wait()))
        finally:
            await self._stack.aclose()
