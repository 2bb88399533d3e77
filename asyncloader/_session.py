"""What everybody needs who reads a checkpoint: its storage, threads, a byte budget, a time-out."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ._arguments import check_callable
from ._concurrency import run_jobs
from ._throttle import Throttle
from .checkpoint import read_catalog, read_manifest
from .errors import CheckpointNotFoundError, LoadTimeoutError, ReadError
from .storage import LocalStorage, processors
from .streaming import ByteBudget, LagWatch, Threads, Verifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from .checkpoint import Catalog, Manifest, Verify
    from .storage import Storage

__all__ = [
    "CHUNK_BYTES",
    "INFLIGHT_BYTES",
    "PACED_CHUNK_BYTES",
    "PARALLEL",
    "Contract",
    "Limits",
    "Session",
    "checked_verify",
    "open_session",
]

PARALLEL = 16
CHUNK_BYTES = 16 << 20
# Where the event loop was promised something: a job that has begun is not interrupted.
PACED_CHUNK_BYTES = 4 << 20
INFLIGHT_BYTES = 128 << 20
VERIFY: tuple[Verify, ...] = ("auto", "require", "off")
_SUFFIX = ".safetensors"


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
class Session:
    """A checkpoint that is open for reading, on one event loop."""

    location: str
    """The checkpoint, for messages."""

    file: str | None
    """The one file in `storage` that is all of it, unless all of the folder is."""

    storage: Storage
    threads: Threads
    limits: Limits
    budget: ByteBudget
    verify: Verify
    watch: LagWatch | None = None
    """Keeps the loop's lag within a bound, if there is one."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """For what several tasks should not do at the same time."""

    @property
    def verifier(self) -> Verifier:
        """Compares what was read with digests."""
        return Verifier(self.location, widen=self.verify == "require")

    async def catalog(self) -> Catalog:
        """Read which names there are.

        Raises:
            CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
            CheckpointError: If a file that says so is no good.
            ReadError: If the storage failed.
        """
        pool = self.threads.kernels
        try:
            return await read_catalog(
                self.storage, executor=pool, file=self.file, verify=self.verify
            )
        except CheckpointNotFoundError as error:
            from ._runs import is_run_folder  # noqa: PLC0415  # seldom

            [is_run] = await run_jobs(pool, [partial(is_run_folder, self.location)])
            if not is_run:
                raise
            problem = f"{error.problem}. It holds checkpoints: take asyncloader.latest() of it"
            raise CheckpointNotFoundError(error.location, problem) from error.__cause__

    async def manifest(self, catalog: Catalog, shards: Iterable[str]) -> Manifest:
        """Read the headers of some shards.

        Raises:
            CheckpointError: If one of them is no good.
            ReadError: If the storage failed.
        """
        manifest = await read_manifest(
            self.storage,
            catalog,
            shards,
            parallel=self.limits.parallel,
            executor=self.threads.kernels,
        )
        return replace(manifest, location=self.location)


@contextlib.asynccontextmanager
async def open_session(
    path: str,
    *,
    limits: Limits,
    verify: Verify,
    timeout: float | None,  # noqa: ASYNC109  # of the block, and with an error of ours
    seen: dict[str, tuple[int, ...]] | None = None,
    direct_io: bool = False,
    contract: Contract | None = None,
) -> AsyncIterator[Session]:
    """Hold descriptors and threads for the length of the block, and keep to a time-out.

    Args:
        path: A folder, or a file whose name ends in `.safetensors`.
        limits: For all that the block does.
        verify: Whether to take digests along, if there are any.
        timeout: Seconds that the block may take; `None` is for ever.
        seen: Which files there were when they were first opened; see `LocalStorage`.
        direct_io: Whether to read past the page cache.
        contract: What the event loop is promised; `None` is nothing.

    Raises:
        LoadTimeoutError: If `timeout` passed.
    """
    limit = asyncio.timeout(timeout)
    throttle = Throttle(cores=processors()) if contract else None
    watching = contract.watch(throttle) if contract and throttle else contextlib.nullcontext()
    try:
        async with (
            limit,
            watching as watch,
            Threads(reads=limits.threads, throttle=throttle) as threads,
        ):
            [(root, file)] = await run_jobs(threads.kernels, [partial(_root_and_file, path)])
            async with LocalStorage(
                root,
                executor=threads.readers,
                throttle=throttle,
                parallel=limits.threads,
                seen=seen,
                direct_io=direct_io,
            ) as storage:
                yield Session(
                    location=str(Path(path)),
                    file=file,
                    storage=storage,
                    threads=threads,
                    limits=limits,
                    budget=ByteBudget(limits.max_inflight_bytes),
                    verify=verify,
                    watch=watch,
                )
    except ReadError as error:
        error.location = path
        raise
    except TimeoutError as error:
        if timeout is not None and limit.expired():
            raise LoadTimeoutError(path, timeout) from error
        raise


def _root_and_file(path: str) -> tuple[Path, str | None]:
    """Say which folder to look into, and at which file alone, if it is one."""
    whole = Path(path)
    if whole.name.endswith(_SUFFIX) and not os.path.isdir(whole):  # noqa: PTH112  # never raises
        return whole.parent, whole.name
    return whole, None


def checked_verify(verify: object) -> Verify:
    """Return what may be asked for.

    Raises:
        ValueError: If it is something else.
    """
    for known in VERIFY:
        if verify == known:
            return known
    raise ValueError(f"verify is one of {', '.join(map(repr, VERIFY))}, got {verify!r}")
