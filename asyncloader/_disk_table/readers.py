"""Threads that carry out requests for rows, and the cache of hot rows: one table's, or many's."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import weakref
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._arguments import check_row_options
from asyncloader._table.native import SystemCalls
from asyncloader._threads.call import Call, StalledError
from asyncloader._threads.disk import Disk
from asyncloader._threads.gate import Gate
from asyncloader._threads.pool import WorkerPool, step_back
from asyncloader.errors import ReadStalledError

from .hot import HotRows
from .reading import DirectReader, RowReader

if TYPE_CHECKING:
    from .request import Request

_SPARE = 1
"""Threads that large requests leave to small ones."""


class RowReaders:
    """Carries requests out, `concurrency` at a time, the others in their order.

    Threads start with the first request. May be used on any thread, and on any number of event
    loops; a process that was forked has threads of its own.

    Args:
        concurrency: Requests at a time, each on one thread.
        cache_bytes: Memory for hot rows, in bytes; 0 is no cache.
        stall_timeout: Seconds after which a request is given up if the disk gives no answer; `None`
            waits for ever.
        calls: What kernels call; `None` is what this system has.

    Attributes:
        hot: The cache; `None` if there is none.
    """

    def __init__(
        self,
        *,
        concurrency: int = 8,
        cache_bytes: int = 0,
        stall_timeout: float | None = 120.0,
        calls: SystemCalls | None = None,
    ) -> None:
        check_row_options(concurrency, cache_bytes, stall_timeout)
        self.hot = HotRows(cache_bytes) if cache_bytes else None
        self._concurrency = concurrency
        self._calls = SystemCalls.of_system() if calls is None else calls
        self._seconds = stall_timeout
        self._begin()

    def __repr__(self) -> str:
        return f"<RowReaders: {self._concurrency} at a time, {self.hot!r}>"

    def reader(self, *, direct_io: bool) -> RowReader:
        """Return what reads rows, through the page cache or past it."""
        return DirectReader(self._calls) if direct_io else RowReader(self._calls)

    async def carry_out(self, request: Request) -> None:
        """Have a thread fill a request; raises what `Request.run` does.

        A caller that is cancelled has the thread end what it does, and waits for that.

        Raises:
            ReadStalledError: If the disk gave no answer.
        """
        disk = self._disk()
        try:
            await disk.call(request.run, reading=request.reading)
        except StalledError as error:
            raise _stalled(request, error) from error

    def carry_out_here(self, request: Request) -> None:
        """Do the same, and block the calling thread meanwhile."""
        call = self.begin(request)
        try:
            call.future.result(self._seconds)
        except concurrent.futures.TimeoutError as error:
            if isinstance(error, StalledError) or self._seconds is None:
                raise
            call.give_up(self._seconds)
            self._pool_here().replace(call)
            raise _stalled(request, StalledError(self._seconds)) from error
        except BaseException:  # Ctrl-C, say
            call.withdraw()
            raise

    def begin(self, request: Request) -> Call[None]:
        """Have a thread carry a request out, and wait for nothing."""
        call: Call[None] = Call(request.run, reading=request.reading, label=request.reading)
        self._pool_here().put(call)
        return call

    def close(self) -> None:
        """End the threads when they have done what waits for them; more requests start others."""
        pool = self._pool
        self._begin()
        pool.shutdown(wait=False)

    def _begin(self) -> None:
        self._process = os.getpid()
        # So many large ones at a time as are of use, as of loads; small ones run beside them.
        gate = Gate(most=max(self._concurrency - _SPARE, 1))
        self._pool = WorkerPool(
            self._concurrency, name="asyncloader-rows", gate=gate, initializer=step_back
        )
        self._disks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Disk] = (
            weakref.WeakKeyDictionary()
        )
        weakref.finalize(self, partial(self._pool.shutdown, wait=False)).atexit = False

    def _pool_here(self) -> WorkerPool:
        if self._process != os.getpid():  # the threads of the other process are not here
            self._begin()
        return self._pool

    def _disk(self) -> Disk:
        pool, loop = self._pool_here(), asyncio.get_running_loop()
        disk = self._disks.get(loop)
        if disk is None:
            disk = self._disks[loop] = Disk(pool, seconds=self._seconds)
        return disk


def _stalled(request: Request, error: StalledError) -> ReadStalledError:
    failure = ReadStalledError("rows", 0, 0, str(error))
    failure.names = (request.table,)
    places = request.state.places.get(request.slot)
    if places is not None and places.files:
        failure.location = places.files[0].location
    return failure
