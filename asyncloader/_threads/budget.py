"""An allowance of bytes in flight."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
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
        self._free = total
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __repr__(self) -> str:
        return f"<ByteBudget {self.in_use}/{self.total} in use, {len(self._queue)} waiting>"

    @property
    def in_use(self) -> int:
        """Bytes currently reserved."""
        return self.total - self._free

    @contextlib.asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes of the budget for the duration of the block."""
        cost = min(size, self.total)
        await self._take(cost)
        try:
            yield
        finally:
            self._give(cost)  # not a coroutine, so cancellation cannot skip it

    async def _take(self, cost: int) -> None:
        if not self._queue and cost <= self._free:
            self._free -= cost
            return
        granted = asyncio.get_running_loop().create_future()
        self._queue.append((cost, granted))
        try:
            await granted  # whoever grants it has already charged us
        except asyncio.CancelledError:
            self._give(0 if granted.cancelled() else cost)
            raise

    def _give(self, cost: int) -> None:
        self._free += cost
        while self._queue:
            wanted, granted = self._queue[0]
            if wanted > self._free and not granted.cancelled():
                return
            self._queue.popleft()
            if not granted.cancelled():
                self._free -= wanted
                granted.set_result(None)
