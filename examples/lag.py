"""How late an event loop is while something runs on it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable

T = TypeVar("T")

PERIOD = 0.001


async def measuring_lag(work: Awaitable[T], lags: list[float]) -> T:
    """Await `work`; meanwhile wake up every millisecond, and note by how many seconds too late."""
    done = False

    async def tick() -> None:
        while not done:  # one more tick after the end: what blocked the loop last counts too
            start = time.perf_counter()
            await asyncio.sleep(PERIOD)
            lags.append(time.perf_counter() - start - PERIOD)

    async with asyncio.TaskGroup() as group:
        group.create_task(tick(), name="ticker")
        try:
            return await work
        finally:
            done = True


async def idle_lag(seconds: float) -> list[float]:
    """Measure the lag of a loop that has nothing else to do."""
    lags: list[float] = []
    await measuring_lag(asyncio.sleep(seconds), lags)
    return lags


def percentile(values: list[float], percent: float) -> float:
    """Return the smallest value that at least so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]
