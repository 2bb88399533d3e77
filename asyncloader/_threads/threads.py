"""The threads of a load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Self

from asyncloader._memory.allowance import processors

from .jobs import settled
from .pool import WorkerPool
from .throttle import ThrottledExecutor

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from types import TracebackType

    from .throttle import Throttle


# More than a handful do not build an id index faster: memory is the limit.
_MOST_KERNELS = 8
_NICE = 5


class Threads:
    """Two pools: reads wait, kernels compute, and neither shall keep the other from running.

    A thread that reads may never come back, and be replaced; those that compute always do, as they
    touch no file.

    They may be shared by several loads of one event loop. An async context manager: entering starts
    all threads, leaving joins them.

    Args:
        reads: Threads that read.
        throttle: What their jobs keep to; `None` lets them go as fast as they can.

    Attributes:
        reads: Runs jobs on threads that read.
        readers: Likewise, but they do not keep to the throttle: for a storage that does.
        kernels: Runs jobs on threads that compute.
    """

    def __init__(self, *, reads: int, throttle: Throttle | None = None) -> None:
        self.kernel_count = min(processors(), _MOST_KERNELS)
        self._throttle = throttle
        self.readers = WorkerPool(reads, name="asyncloader-read", initializer=_step_back)
        self._kernels = WorkerPool(
            self.kernel_count, name="asyncloader-kernel", initializer=_step_back
        )
        self.reads: Executor = self.readers
        self.kernels: Executor = self._kernels
        if throttle is not None:
            self.reads = ThrottledExecutor(self.readers, throttle)
            self.kernels = ThrottledExecutor(self._kernels, throttle)

    def replace(self, thread: threading.Thread) -> None:
        """Have another thread take the place of one that reads, soon."""
        if self.readers.strike_off(thread):
            self._kernels.submit(self.readers.start)  # starting one means waiting for it
        if self._throttle is not None:
            self._throttle.forget(thread)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        try:
            # Starting a thread means waiting until it runs. Done on the event loop, and while
            # others keep the processors busy, sixteen held it up for 90 ms: the first starts them.
            for pool in (self._kernels, self.readers):
                await settled(loop.run_in_executor(self._kernels, pool.start))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        # Nobody is at work any more, but each thread still has to wake up to end. The readers are
        # joined off the loop; the few others, one of which did that, on it.
        loop = asyncio.get_running_loop()
        if self._throttle is not None:
            self._throttle.pace = 1  # or the loop would wait for threads that rest
        try:
            await settled(loop.run_in_executor(self._kernels, self.readers.shutdown))
        except RuntimeError:  # no thread is to be had: then few run, or none
            self.readers.shutdown()
        finally:
            self._kernels.shutdown()


def _step_back() -> None:
    """Let the event loop's thread go first where there are too few processors for all."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # some sandboxes forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
