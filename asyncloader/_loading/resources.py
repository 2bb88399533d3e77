"""What loads take, and may share: threads, an allowance of bytes, descriptors, a pace."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._arguments import check_callable
from asyncloader._memory.allowance import processors
from asyncloader._storage.descriptors import Descriptors
from asyncloader._threads.budget import ByteBudget
from asyncloader._threads.lag import LagWatch
from asyncloader._threads.pace import ReadPace
from asyncloader._threads.threads import Threads
from asyncloader._threads.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asyncloader._storage.protocol import ThreadedStorage


PARALLEL = 16
CHUNK_BYTES = 16 << 20
# Where the event loop was promised something: a job that has begun is not interrupted.
PACED_CHUNK_BYTES = 4 << 20
INFLIGHT_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may be under way at a time."""

    parallel: int
    """Reads."""

    chunk_bytes: int
    """The most that one read takes, in bytes; no more than fits into `max_inflight_bytes`."""

    max_inflight_bytes: int
    """Bytes of all reads."""

    def __post_init__(self) -> None:
        for name in ("parallel", "chunk_bytes", "max_inflight_bytes"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")

    @property
    def read_bytes(self) -> int:
        """The most that one read takes."""
        return min(self.chunk_bytes, self.max_inflight_bytes)

    def within(self, other: Limits) -> Limits:
        """Return these limits where they are to be kept to together with others."""
        return Limits(
            parallel=min(self.parallel, other.parallel),
            chunk_bytes=min(self.chunk_bytes, other.chunk_bytes),
            max_inflight_bytes=other.max_inflight_bytes,
        )

    @property
    def threads(self) -> int:
        """Threads that read: no more than whole chunks fit into memory, the others would wait."""
        return min(self.parallel, max(self.max_inflight_bytes // self.read_bytes, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a load promises the event loop that it runs on."""

    max_loop_lag: float
    """Seconds."""

    pressure: Callable[[], float] | None
    """Says how little room the program has for a load, 0 to 1."""

    @classmethod
    def of(
        cls, max_loop_lag: float | None, pressure: Callable[[], float] | None
    ) -> Contract | None:
        """Check what users ask for; `None` if that is nothing.

        Raises:
            TypeError: If `pressure` cannot be called.
            ValueError: If `max_loop_lag` is not positive.
        """
        if max_loop_lag is not None and not isinstance(max_loop_lag, int | float):
            raise TypeError(f"max_loop_lag is a number of seconds, got {max_loop_lag!r}")
        if max_loop_lag is not None and not max_loop_lag > 0:
            raise ValueError(f"max_loop_lag must be positive or None, got {max_loop_lag}")
        if pressure is not None:
            check_callable(pressure, "pressure")
        elif max_loop_lag is None:
            return None
        return cls(
            max_loop_lag=math.inf if max_loop_lag is None else max_loop_lag, pressure=pressure
        )

    def watch(self, throttle: Throttle) -> LagWatch:
        """Return what sees to it."""
        return LagWatch(throttle, bound=self.max_loop_lag, pressure=self.pressure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What loads of one event loop take, one of them or many at a time."""

    limits: Limits
    threads: Threads
    budget: ByteBudget
    pace: ReadPace
    descriptors: Descriptors
    throttle: Throttle | None
    """What threads keep to, if the event loop was promised something."""

    watch: LagWatch | None
    """Sees to that."""

    wrap: Callable[[ThreadedStorage], ThreadedStorage]
    """Gets the files of a checkpoint, and returns what is read from in their place."""


@contextlib.asynccontextmanager
async def open_resources(
    limits: Limits,
    contract: Contract | None,
    *,
    reads: int | None = None,
    wrap: Callable[[ThreadedStorage], ThreadedStorage] = lambda storage: storage,
) -> AsyncIterator[Resources]:
    """Hold threads for the length of the block.

    Args:
        limits: For all that use them together.
        contract: What the event loop is promised; `None` is nothing.
        reads: Threads that read; `None` is as many as are of use for chunks of the usual size.
        wrap: Gets the files of a checkpoint, and returns what is read from in their place.
    """
    throttle = Throttle(cores=processors()) if contract else None
    watching = contract.watch(throttle) if contract and throttle else contextlib.nullcontext()
    count = limits.threads if reads is None else reads
    async with watching as watch, Threads(reads=count, throttle=throttle) as threads:
        yield Resources(
            limits=limits,
            threads=threads,
            budget=ByteBudget(limits.max_inflight_bytes),
            pace=ReadPace(threads.readers, most=count, throttle=throttle),
            descriptors=Descriptors(),
            throttle=throttle,
            watch=watch,
            wrap=wrap,
        )
