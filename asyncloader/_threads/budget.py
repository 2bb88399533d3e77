"""An allowance of bytes in flight."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class ByteBudget:
    """A first-come, first-served semaphore over bytes; belongs to one event loop.

    A request larger than the whole budget waits until nothing else is in flight and then takes all
    of it: slow, never stuck.
    """

    def __init__(self, total: int) -> None:
        if total <= 0:
            raise ValueError(f"a byte budget must be positive, got {total}")
        self.total = total
        self.in_use = 0
        """Bytes currently reserved."""

        self._waiting = 0
        self._turns = asyncio.Lock()  # first come, first served
        self._freed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<ByteBudget {self.in_use}/{self.total} in use, {self._waiting} waiting>"

    @contextlib.asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes of the budget for the duration of the block."""
        cost = min(size, self.total)
        self._waiting += 1
        try:
            async with self._turns:
                while self.in_use + cost > self.total:
                    self._freed.clear()
                    await self._freed.wait()
                self.in_use += cost
        finally:
            self._waiting -= 1
        try:
            yield
        finally:  # nothing is awaited, so that no cancellation comes between
            self.in_use -= cost
            self._freed.set()
