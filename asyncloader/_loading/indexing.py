"""Puts ids into tables' indexes while the other bytes are still being read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._threads.jobs import run_jobs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from asyncloader._checkpoint.slices import Slice
    from asyncloader._table.protocol import LoadableUpdate
    from asyncloader._threads.pool import Threads

    from .trace import Tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Rows whose ids are there."""

    update: LoadableUpdate
    layer: int
    child: str
    first: int
    count: int

    claimed: Slice | None
    """The slice to check the ids against, or `None` where that is done."""


@dataclass(slots=True)
class Indexer:
    """A queue of arrivals, and the workers that index them.

    The queue has no bound: what waits in it is a few numbers, the ids are where they will stay.
    """

    threads: Threads
    tracer: Tracer
    _queue: asyncio.Queue[Arrival | None] = field(default_factory=asyncio.Queue)
    _locks: dict[tuple[int, int], asyncio.Lock] = field(default_factory=dict)

    def put(self, arrival: Arrival) -> None:
        """Have an arrival indexed."""
        self._queue.put_nowait(arrival)

    def close(self, *, workers: int) -> None:
        """Let so many workers end once all arrivals are indexed."""
        for _ in range(workers):
            self._queue.put_nowait(None)

    async def serve(self) -> None:
        """Index arrivals until told to end."""
        while (arrival := await self._queue.get()) is not None:
            with self.tracer.span("index", arrival.child, 8 * arrival.count):
                await self._index(arrival)

    async def _index(self, arrival: Arrival) -> None:
        update, layer = arrival.update, arrival.layer
        refused = await self._admit(arrival)
        # Only one range of a layer at a time; within it, threads share the work.
        lock = self._locks.setdefault((id(update), layer), asyncio.Lock())
        kernels = self.threads.kernels
        async with lock:
            await run_jobs(kernels, [partial(update.make_room, layer, arrival.count)])
            jobs = update.index_jobs(
                layer, arrival.first, arrival.count, refused, threads=self.threads.kernel_count
            )
            update.indexed(layer, await run_jobs(kernels, jobs))

    async def _admit(self, arrival: Arrival) -> NDArray[np.bool_] | None:
        if arrival.claimed is None:
            return None
        admit = partial(
            arrival.update.admit, arrival.child, arrival.first, arrival.count, arrival.claimed
        )
        [(refused, dropped)] = await run_jobs(self.threads.kernels, [admit])
        arrival.update.dropped(dropped)
        return refused
