"""Threads that carry out requests for rows, and the cache of hot rows: one table's, or many's."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

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
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from .request import Request

T = TypeVar("T")

_PATIENCE = 0.5
"""Seconds that the end of the program waits for threads which are idle."""

_SPARE = 1
"""Threads that large requests leave to small ones."""

_SLOW = 1.0
"""Seconds. The thread of a request that takes longer without a row is replaced."""


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
        self._finalizer: weakref.finalize[..., RowReaders] | None = None
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
        with self._in_use() as pool:
            try:
                await self._disk(pool).call(request.run, reading=request.reading)
            except StalledError as error:
                raise _stalled(request, error) from error

    def carry_out_here(self, request: Request) -> None:
        """Do the same, and block the calling thread meanwhile."""
        with self._in_use() as pool:
            call = _begun(pool, request)
            try:
                while not self._has_ended(pool, call):
                    pass
            except StalledError as error:
                raise _stalled(request, error) from error
            except BaseException:  # Ctrl-C, say
                call.withdraw()
                raise

    def begin(self, request: Request, done: Callable[[Future[None]], object]) -> None:
        """Have a thread carry a request out, and wait for nothing; `done` is called on it."""
        using = self._in_use()
        call = _begun(using.__enter__(), request)
        call.future.add_done_callback(lambda _: using.__exit__(None, None, None))
        call.future.add_done_callback(done)

    async def on_thread(self, job: Callable[[], T], label: str) -> T:
        """Return what a job results in that may block.

        Raises:
            OSError: If the job did, or the disk gave no answer.
        """
        with self._in_use() as pool:
            return await self._disk(pool).call(job, label=label)

    def close(self) -> None:
        """End the threads once they have nothing to do; more requests start others."""
        with self._lock:
            self._is_closing = True
            ended = self._ended()
        if ended is not None:
            ended.shutdown(wait=False)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[WorkerPool]:
        """Have threads for the length of the block: they are not ended meanwhile."""
        if self._process != os.getpid():  # the threads of the other process are not here
            self._begin()
        with self._lock:
            self._using += 1
            self._is_closing = False
            pool = self._pool
        try:
            yield pool
        finally:
            with self._lock:
                self._using -= 1
                ended = self._ended()
            if ended is not None:
                ended.shutdown(wait=False)

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()  # for all that follows
        self._using = 0
        self._is_closing = False
        self._new_pool()

    def _ended(self) -> WorkerPool | None:
        """Return threads that nobody has use for any more; others take their place."""
        if not self._is_closing or self._using:
            return None
        pool, self._is_closing = self._pool, False
        self._new_pool()
        return pool

    def _new_pool(self) -> None:
        # So many large ones at a time as are of use, as of loads; small ones run beside them.
        gate = Gate(most=max(self._concurrency - _SPARE, 1))
        self._pool = WorkerPool(
            self._concurrency, name="asyncloader-rows", gate=gate, initializer=step_back
        )
        self._disks: dict[asyncio.AbstractEventLoop, Disk] = {}
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, partial(self._pool.shutdown, wait=False))
        self._finalizer.atexit = False
        _pools.add(self._pool)

    def _has_ended(self, pool: WorkerPool, call: Call[None]) -> bool:
        """Wait a while for a call; replace its thread if it is slow, give it up in the end.

        Does what `Disk` does on an event loop.
        """
        slow = _SLOW if self._seconds is None else min(_SLOW, self._seconds / 2)
        period = slow / 4
        try:
            call.future.result(period)
        except TimeoutError:
            if call.future.done():
                raise  # its own
        else:
            return True
        waited = call.passed(period)
        if waited > slow and not call.is_slow:
            call.is_slow = True
            pool.replace(call)
        if self._seconds is not None and waited > self._seconds:
            call.give_up(self._seconds)
        return False

    def _disk(self, pool: WorkerPool) -> Disk:
        loop = asyncio.get_running_loop()
        disk = self._disks.get(loop)
        if disk is None:
            for other in [one for one in self._disks if one.is_closed()]:
                del self._disks[other]
            disk = self._disks[loop] = Disk(pool, seconds=self._seconds)
        return disk


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for pool in list(_pools):
        pool.end(_PATIENCE)


class HasReaders(Protocol):
    """A `Runtime`, whose module this one may not import."""

    @property
    def row_readers(self) -> RowReaders: ...


def _begun(pool: WorkerPool, request: Request) -> Call[None]:
    call: Call[None] = Call(request.run, reading=request.reading, label=request.reading)
    pool.put(call)
    return call


def _stalled(request: Request, error: StalledError) -> ReadStalledError:
    failure = ReadStalledError("rows", 0, 0, str(error))
    failure.names = (request.table,)
    places = request.state.places.get(request.slot)
    if places is not None and places.files:
        failure.location = places.files[0].location
    return failure
