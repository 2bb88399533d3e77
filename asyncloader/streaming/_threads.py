"""The threads of a load."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Threads"]

# More than a handful do not build an id index faster: memory is the limit.
_MOST_KERNELS = 8


def _cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Threads:
    """Two pools: reads wait, kernels compute, and neither shall keep the other from running.

    They may be shared by several loads. Use as a context manager: leaving it waits for the threads.
    """

    reads: ThreadPoolExecutor
    kernels: ThreadPoolExecutor
    kernel_count: int

    @classmethod
    def start(cls, *, reads: int) -> Self:
        """Make pools; threads start when there is work for them."""
        count = min(_cores(), _MOST_KERNELS)
        return cls(
            ThreadPoolExecutor(reads, thread_name_prefix="asyncloader-read"),
            ThreadPoolExecutor(count, thread_name_prefix="asyncloader-kernel"),
            count,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Join the threads. Called once their work is done, so it does not block."""
        self.reads.shutdown()
        self.kernels.shutdown()
