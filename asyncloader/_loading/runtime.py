"""Threads, a byte budget and descriptors of loads, which may share them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

from asyncloader._arguments import check_callable, check_row_options
from asyncloader._storage.descriptors import Descriptors
from asyncloader._threads.gate import Gate
from asyncloader._threads.jobs import ByteBudget
from asyncloader._threads.lag import LagWatch
from asyncloader._threads.pool import Threads
from asyncloader.options import ReadOptions

from .hold import Hold

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asyncloader._disk_table.readers import RowReaders
    from asyncloader._storage.protocol import ThreadedStorage


def _as_it_is(storage: ThreadedStorage) -> ThreadedStorage:
    return storage


class Runtime:
    """Threads and an allowance of bytes that any number of loads share.

    A load makes its own, and lets go of them when it ends; so 32 loads at a time have 32 times the
    threads and 32 times `max_inflight_bytes`. Loads that are given a runtime share them.
    Reads of all of them take turns, first come, first served: none waits for another to end.

    ```python
    async with asyncloader.Runtime(max_inflight_bytes=256 << 20) as runtime:
        async with asyncio.TaskGroup() as group:
            for path, tensors in models.items():
                loader = asyncloader.Loader(path, tensors=tensors, runtime=runtime)
                group.create_task(loader.aload())
    ```

    Belongs to the event loop, and to the process, in which it was entered. Leaving waits for the
    loads that use it; a load that begins afterwards is a `RuntimeError`. Can be entered again.

    Args:
        parallel: Reads at a time, of all loads, as far as `max_inflight_bytes` has room for them.
        max_inflight_bytes: Memory for reads under way, of all loads, in bytes.
        max_loop_lag: As in `ReadOptions`, for all loads.
        pressure: As in `ReadOptions`, for all loads.
        wrap_storage: Gets the files of each checkpoint, a `protocols.ThreadedStorage`, and returns
            what is read from in their place: one that counts, say, or that fails, to see what your
            service does then.
        row_cache_bytes: Memory for hot rows of all `DiskTable`s that are made with this runtime, in
            bytes; 0 is none. It outlives a version of a model: while the next one comes in, both
            share it.
        row_concurrency: Lookups in all those tables that read at a time.
        row_stall_timeout: Seconds after which such a lookup is given up; `None` waits for ever.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        *,
        parallel: int = 16,
        max_inflight_bytes: int = 128 << 20,
        max_loop_lag: float | None = None,
        pressure: Callable[[], float] | None = None,
        wrap_storage: Callable[[ThreadedStorage], ThreadedStorage] = _as_it_is,
        row_cache_bytes: int = 0,
        row_concurrency: int = 8,
        row_stall_timeout: float | None = 120.0,
    ) -> None:
        check_callable(wrap_storage, "wrap_storage")
        check_row_options(row_concurrency, row_cache_bytes, row_stall_timeout, prefix="row_")
        self._row_options = row_concurrency, row_cache_bytes, row_stall_timeout
        self._options = ReadOptions(
            parallel=parallel,
            max_inflight_bytes=max_inflight_bytes,
            max_loop_lag=max_loop_lag,
            pressure=pressure,
        )
        # It is not known yet how large chunks are: small ones may have use for all threads.
        self._held = Hold(partial(open_resources, self._options, reads=parallel, wrap=wrap_storage))

    def __repr__(self) -> str:
        held = self._held
        if held.value is None:
            return "<Runtime: not entered>"
        return f"<Runtime: {held.users} loads, {held.value.budget!r}>"

    @functools.cached_property
    def row_readers(self) -> RowReaders:
        """What all `DiskTable`s of this runtime share; on any thread, entered or not."""
        from asyncloader._disk_table.readers import RowReaders  # noqa: PLC0415  # numba

        concurrency, cache_bytes, seconds = self._row_options
        return RowReaders(concurrency=concurrency, cache_bytes=cache_bytes, stall_timeout=seconds)

    async def __aenter__(self) -> Self:
        if self._held.is_entered:
            raise RuntimeError(f"{self!r} is entered already")
        await self._held.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._held.close()

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[Resources]:
        """Lend resources to a load, for the length of the block."""
        held = self._held
        if held.value is None:
            raise RuntimeError("the runtime is not entered: async with Runtime() as runtime: ...")
        if held.process != os.getpid():
            raise RuntimeError("the runtime was entered in another process; make one in this one")
        if held.loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "the runtime was entered on another event loop; load() has one of its own, so it "
                "cannot share: await aload()"
            )
        with held.use() as resources:
            yield resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The threads and memory of one load, or of many at a time, on one event loop."""

    options: ReadOptions  # the limits of all loads together
    threads: Threads
    budget: ByteBudget
    descriptors: Descriptors
    watch: LagWatch | None  # keeps the promises to the event loop, if there are any
    wrap: Callable[[ThreadedStorage], ThreadedStorage]


@contextlib.asynccontextmanager
async def open_resources(
    options: ReadOptions,
    *,
    reads: int | None = None,
    wrap: Callable[[ThreadedStorage], ThreadedStorage] = _as_it_is,
) -> AsyncIterator[Resources]:
    """Start threads for the length of the block, `reads` of them for reads.

    `None` is as many as are of use for chunks of the usual size.
    """
    # No more threads than whole chunks fit into memory: the others would wait.
    count = max(options.max_inflight_bytes // options.read_bytes, 1)
    count = min(options.parallel, count) if reads is None else reads
    gate = Gate(most=count)
    watching: contextlib.AbstractAsyncContextManager[LagWatch | None] = contextlib.nullcontext()
    if options.promises:
        bound = math.inf if options.max_loop_lag is None else options.max_loop_lag
        watching = LagWatch(gate, bound=bound, pressure=options.pressure)
    async with watching as watch, Threads(reads=count, gate=gate) as threads:
        yield Resources(
            options=options,
            threads=threads,
            budget=ByteBudget(options.max_inflight_bytes),
            descriptors=Descriptors(),
            watch=watch,
            wrap=wrap,
        )
