"""A checkpoint that is open for reading: its storage, threads, a byte budget, a time-out."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from asyncloader._checkpoint.catalog import read_catalog
from asyncloader._checkpoint.manifest import read_manifest
from asyncloader._checkpoint.safetensors import is_weight_map
from asyncloader._storage.local import LocalStorage
from asyncloader._storage.protocol import ThreadedStorage, read_error
from asyncloader._storage.retrying import ThreadedRetryingStorage
from asyncloader._threads.call import StalledError
from asyncloader._threads.disk import Disk
from asyncloader.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    LoadTimeoutError,
    ReadError,
    ReadStalledError,
)

from .resources import open_resources
from .verification import Verifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._storage.protocol import Storage
    from asyncloader._storage.retrying import RetryingStorage
    from asyncloader._threads.budget import ByteBudget
    from asyncloader._threads.lag import LagWatch
    from asyncloader._threads.pool import Threads
    from asyncloader.options import ReadOptions

    from .resources import Resources
    from .runtime import Runtime


T = TypeVar("T")

_CHANGED = (
    "was replaced, removed or written to while it was being loaded; load the checkpoint anew, or "
    "the one that has taken its place"
)
_SUFFIX = ".safetensors"
_JUST_BEFORE = 1e-6
"""Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A checkpoint that is open for reading, on one event loop."""

    location: str
    """The checkpoint, for messages."""

    file: str | None
    """The one file in `storage` that is all of it, unless all of the folder is."""

    storage: Storage
    threads: Threads
    disk: Disk
    """Has threads do what may block."""

    options: ReadOptions
    budget: ByteBudget
    retrying: RetryingStorage | None = None
    """The storage, if it tries again what fails."""

    watch: LagWatch | None = None
    """Keeps the loop's lag within a bound, if there is one."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """For what several tasks should not do at the same time."""

    @contextlib.asynccontextmanager
    async def explaining(self) -> AsyncIterator[None]:
        """Say which checkpoint could not be read; or that it has changed, if that is why.

        Raises:
            CheckpointChangedError: If a file could not be read that is another one by now.
        """
        try:
            yield
        except ReadStalledError as error:  # another question would wait as long again
            error.location = self.location
            raise
        except ReadError as error:
            error.location = self.location
            with contextlib.suppress(OSError):
                if error.shard in await self.storage.changed([error.shard]):
                    raise CheckpointChangedError(self.location, _CHANGED, error.shard) from error
            raise

    @contextlib.asynccontextmanager
    async def in_time(self, seconds: float | None) -> AsyncIterator[None]:
        """Keep the block to a time-out, and explain what cannot be read.

        Raises:
            LoadTimeoutError: If it passed.
        """
        async with _in_time(self.location, seconds) as late:
            with late.noting(self.disk):
                async with self.explaining():
                    yield

    async def check_unchanged(self, shards: Sequence[str]) -> None:
        """Make sure that the shards are the files that they were when they were opened.

        Raises:
            CheckpointChangedError: If one of them is not.
            ReadError: If the storage failed.
        """
        if not shards:
            return
        try:
            changed = await self.storage.changed(shards)
        except OSError as error:
            raise read_error(shards[0], 0, 0, error) from error
        if changed:
            raise CheckpointChangedError(self.location, _CHANGED, changed[0])

    async def on_disk(self, job: Callable[[], T]) -> T:
        """Return what a job finds that looks at files, but reads none.

        Raises:
            ReadStalledError: If it was given up.
        """
        return await _on_disk(self.disk, job, self.location)

    def _names(self) -> Sequence[str]:
        with contextlib.suppress(OSError):
            return os.listdir(self.storage.location)  # noqa: PTH208  # names
        return ()

    @property
    def verifier(self) -> Verifier:
        """Compares what was read with digests."""
        return Verifier(self.location, widen=self.options.verify == "require")

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
                self.storage,
                executor=pool,
                file=self.file,
                verify=self.options.verify,
                names=partial(self.on_disk, self._names),
            )
        except CheckpointNotFoundError as error:
            from asyncloader.runs import is_run_folder  # noqa: PLC0415  # seldom

            is_run = await self.on_disk(partial(is_run_folder, self.location))
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
            parallel=self.options.parallel,
            executor=self.threads.kernels,
        )
        return replace(manifest, location=self.location)


@contextlib.asynccontextmanager
async def open_session(
    path: str,
    options: ReadOptions,
    *,
    seen: dict[str, tuple[int, ...]] | None = None,
    runtime: Runtime | None = None,
) -> AsyncIterator[Session]:
    """Hold descriptors and threads for the length of the block, and keep to a time-out.

    Args:
        path: A folder, a safetensors file, or a weight map.
        options: How to read; `timeout` is for the block. As far as a shared runtime allows.
        seen: Which files there were when they were first opened; see `LocalStorage`.
        runtime: Whose threads, bytes and promises to use, in place of such of its own.

    Raises:
        LoadTimeoutError: If `timeout` passed.
    """
    holding = open_resources(options) if runtime is None else runtime.lend()
    async with _in_time(path, options.timeout) as late, holding as resources:
        disk = Disk(resources.threads.reads, seconds=options.stall_timeout)
        look = partial(_root_and_file, path)
        root, file = await _on_disk(disk, look, path)
        # Of a weight map's files, the map chooses which.
        trusted = file is not None and not is_weight_map(file)
        files = LocalStorage(
            root,
            disk=disk,
            descriptors=resources.descriptors,
            seen=seen,
            direct_io=options.direct_io,
            # A file that the user has named may be a link to anywhere: nobody else chose it.
            follow_symlinks=options.follow_symlinks or trusted,
        )
        async with files:
            storage = _retrying(files, resources)
            session = Session(
                location=str(Path(path)),
                file=file,
                storage=storage,
                retrying=storage,
                threads=resources.threads,
                disk=disk,
                options=_within(options, resources.options),
                budget=resources.budget,
                watch=resources.watch,
            )
            with late.noting(disk):
                async with session.explaining():
                    yield session


def _within(options: ReadOptions, shared: ReadOptions) -> ReadOptions:
    """Return options that keep to the limits that several loads have together."""
    return replace(
        options,
        parallel=min(options.parallel, shared.parallel),
        chunk_bytes=min(options.read_bytes, shared.read_bytes),
        max_inflight_bytes=shared.max_inflight_bytes,
    )


def _retrying(files: LocalStorage, resources: Resources) -> ThreadedRetryingStorage:
    storage = resources.wrap(files)
    if not isinstance(storage, ThreadedStorage):
        raise TypeError(f"wrap_storage returned {storage!r}, which is no ThreadedStorage")
    # Of what threads may still write to, what is wrapped around the files need not know.
    return ThreadedRetryingStorage(storage, lost=lambda: files.lost)


async def _on_disk(disk: Disk, job: Callable[[], T], location: str) -> T:
    try:
        return await disk.call(job, label=location)
    except StalledError as error:
        stalled = ReadStalledError(location, 0, 0, str(error))
        raise stalled from error


@contextlib.asynccontextmanager
async def _in_time(path: str, seconds: float | None) -> AsyncIterator[_Lateness]:
    late = _Lateness(path, seconds)
    try:
        async with late.limit:
            yield late
    except TimeoutError as error:
        late.explain(error)
        raise


class _Lateness:
    """A time-out that knows what was being read when it passed."""

    def __init__(self, path: str, seconds: float | None) -> None:
        self.limit = asyncio.timeout(seconds)
        self._path = path
        self._seconds = seconds
        self._under_way: list[str] = []

    @contextlib.contextmanager
    def noting(self, disk: Disk) -> Iterator[None]:
        """Look what is being read just before the time-out passes."""

        def look() -> None:
            self._under_way = disk.under_way()

        when = self.limit.when()
        if when is None:
            yield
            return
        timer = asyncio.get_running_loop().call_at(when - _JUST_BEFORE, look)
        try:
            yield
        finally:
            timer.cancel()

    def explain(self, error: TimeoutError) -> None:
        """Say so, if it was this that has passed.

        Raises:
            LoadTimeoutError: If it was.
        """
        if self._seconds is not None and self.limit.expired():
            raise LoadTimeoutError(self._path, self._seconds, self._under_way) from error


def _root_and_file(path: str) -> tuple[Path, str | None]:
    """Say which folder to look into, and at which file alone, if it is one."""
    whole = Path(path)
    if whole.name.endswith(_SUFFIX) and not os.path.isdir(whole):  # noqa: PTH112  # never raises
        return whole.parent, whole.name
    if os.path.isfile(whole):  # noqa: PTH113  # never raises
        return whole.parent, whole.name
    return whole, None
