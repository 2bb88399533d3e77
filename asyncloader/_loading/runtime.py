"""What loads take, and may share: threads, a budget of bytes, descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from asyncloader._arguments import check_callable
from asyncloader._storage.descriptors import Descriptors
from asyncloader._threads.budget import ByteBudget
from asyncloader._threads.gate import Gate
from asyncloader._threads.jobs import settled
from asyncloader._threads.lag import LagWatch
from asyncloader._threads.pool import Threads
from asyncloader.options import ReadOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from asyncloader._storage.protocol import ThreadedStorage

T = TypeVar("T")


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
    ) -> None:
        check_callable(wrap_storage, "wrap_storage")
        self._wrap = wrap_storage
        self._options = ReadOptions(
            parallel=parallel,
            max_inflight_bytes=max_inflight_bytes,
            max_loop_lag=max_loop_lag,
            pressure=pressure,
        )
        self._held: Hold[Resources] | None = None
        self._is_entered = False

    def __repr__(self) -> str:
        held = self._held
        if held is None:
            return "<Runtime: not entered>"
        return f"<Runtime: {held.users} loads, {held.value.budget!r}>"

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise RuntimeError(f"{self!r} is entered already")
        self._is_entered = True  # before the first await: two could enter at once
        try:
            # It is not known yet how large chunks are: small ones may have use for all threads.
            reads = self._options.parallel
            self._held = await Hold.open(
                open_resources(self._options, reads=reads, wrap=self._wrap)
            )
        except BaseException:
            self._is_entered = False
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        try:
            await held.close()
        finally:
            self._is_entered = False

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[Resources]:
        """Lend what loads share, for the length of the block; for loaders.

        Raises:
            RuntimeError: If it is not entered, or elsewhere.
        """
        held = self._held
        if held is None:
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
    """What one load, or many loads at a time, take on one event loop.

    Attributes:
        options: The limits of all of them together.
        watch: Keeps what the event loop was promised, if that is anything.
        wrap: Gets the files of a checkpoint, and returns what is read from in their place.
    """

    options: ReadOptions
    threads: Threads
    budget: ByteBudget
    descriptors: Descriptors
    watch: LagWatch | None
    wrap: Callable[[ThreadedStorage], ThreadedStorage]


@contextlib.asynccontextmanager
async def open_resources(
    options: ReadOptions,
    *,
    reads: int | None = None,
    wrap: Callable[[ThreadedStorage], ThreadedStorage] = _as_it_is,
) -> AsyncIterator[Resources]:
    """Hold threads for the length of the block.

    Args:
        options: For all that use them together.
        reads: Threads that read; `None` is as many as are of use for chunks of the usual size.
        wrap: See `Resources`.
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


class Hold(Generic[T]):
    """A value that is open, and how many blocks use it.

    Belongs to the event loop and the process that opened it.
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
