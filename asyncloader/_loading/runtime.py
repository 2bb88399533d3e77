"""What users import to have several loads share threads and memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Self

from asyncloader._arguments import check_callable
from asyncloader.options import ReadOptions

from .hold import Hold
from .resources import open_resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asyncloader._storage.protocol import ThreadedStorage

    from .resources import Resources


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
