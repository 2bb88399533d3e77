"""What loads take, and may share: threads, an allowance of bytes, descriptors, a pace."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._storage.descriptors import Descriptors
from asyncloader._threads.budget import ByteBudget
from asyncloader._threads.gate import Gate
from asyncloader._threads.lag import LagWatch
from asyncloader._threads.pool import Threads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asyncloader._storage.protocol import ThreadedStorage
    from asyncloader.options import ReadOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What loads of one event loop take, one of them or many at a time."""

    options: ReadOptions
    """What they keep to, all together."""

    threads: Threads
    budget: ByteBudget
    descriptors: Descriptors
    watch: LagWatch | None
    """Keeps what the event loop was promised, if that is anything."""

    wrap: Callable[[ThreadedStorage], ThreadedStorage]
    """Gets the files of a checkpoint, and returns what is read from in their place."""


@contextlib.asynccontextmanager
async def open_resources(
    options: ReadOptions,
    *,
    reads: int | None = None,
    wrap: Callable[[ThreadedStorage], ThreadedStorage] = lambda storage: storage,
) -> AsyncIterator[Resources]:
    """Hold threads for the length of the block.

    Args:
        options: For all that use them together.
        reads: Threads that read; `None` is as many as are of use for chunks of the usual size.
        wrap: Gets the files of a checkpoint, and returns what is read from in their place.
    """
    # No more threads than whole chunks fit into memory: the others would wait.
    count = max(options.max_inflight_bytes // options.read_bytes, 1)
    count = min(options.parallel, count) if reads is None else reads
    gate = Gate(most=count)
    async with _watch(gate, options) as watch, Threads(reads=count, gate=gate) as threads:
        yield Resources(
            options=options,
            threads=threads,
            budget=ByteBudget(options.max_inflight_bytes),
            descriptors=Descriptors(),
            watch=watch,
            wrap=wrap,
        )


def _watch(
    gate: Gate, options: ReadOptions
) -> contextlib.AbstractAsyncContextManager[LagWatch | None]:
    if not options.promises:
        return contextlib.nullcontext()
    bound = math.inf if options.max_loop_lag is None else options.max_loop_lag
    return LagWatch(gate, bound=bound, pressure=options.pressure)
