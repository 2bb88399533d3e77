"""The threads of a load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from typing import Self

from asyncloader._memory.allowance import processors

from .gate import Gate
from .jobs import settled
from .pool import WorkerPool

# More than a handful do not build an id index faster: memory is the limit.
_MOST_KERNELS = 8
_NICE = 5


class Threads:
    """Two pools: reads wait, kernels compute, and neither shall keep the other from running.

    A thread that reads may never come back, and be replaced (`Disk`); those that compute always do,
    as they touch no file.

    They may be shared by several loads of one event loop. An async context manager: leaving
    joins all threads.

    Args:
        reads: Threads that read.
        gate: Says how many run at a time; `None` is one of its own.

    Attributes:
        reads: Runs jobs on threads that read.
        kernels: Runs jobs on threads that compute.
        gate: All of them keep to it.
    """

    def __init__(self, *, reads: int, gate: Gate | None = None) -> None:
        self.kernel_count = min(processors(), _MOST_KERNELS)
        self.gate = gate or Gate(most=reads)
        self.reads = WorkerPool(
            reads, name="asyncloader-read", gate=self.gate, initializer=_step_back
        )
        self.kernels = WorkerPool(
            self.kernel_count, name="asyncloader-kernel", gate=self.gate, initializer=_step_back
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        # Nobody is at work any more, but each thread still has to wake up to end. The readers are
        # joined off the loop; the few others, one of which did that, on it.
        loop = asyncio.get_running_loop()
        self.gate.allowed = 1  # or the loop would wait for threads that rest
        try:
            await settled(loop.run_in_executor(self.kernels, self.reads.shutdown))
        except RuntimeError:  # no thread is to be had: then few run, or none
            self.reads.shutdown()
        finally:
            self.kernels.shutdown()


def _step_back() -> None:
    """Let the event loop's thread go first where there are too few processors for all."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # some sandboxes forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
