"""A checkpoint that is open for reading: its storage, threads, a byte budget, a time-out."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from asyncloader._checkpoint.catalog import Names, read_names
from asyncloader._checkpoint.manifest import read_manifest
from asyncloader._checkpoint.safetensors import is_weight_map
from asyncloader._storage.local import LocalStorage
from asyncloader._storage.protocol import ThreadedStorage, read_error
from asyncloader._storage.retrying import RetryingStorage, ThreadedRetryingStorage
from asyncloader._threads.call import StalledError
from asyncloader._threads.disk import Disk
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    LoadTimeoutError,
    ReadError,
    ReadStalledError,
)

from .runtime import open_resources
from .verification import Verifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._threads.budget import ByteBudget
    from asyncloader._threads.lag import LagWatch
    from asyncloader._threads.pool import Threads
    from asyncloader.options import ReadOptions

    from .runtime import Runtime


T = TypeVar("T")

_SUFFIX = ".safetensors"
_JUST_BEFORE = 1e-6  # seconds

_CHANGED = (
    "was replaced, removed or written to while it was being loaded; load the checkpoint anew, or "
    "the one that has taken its place"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A checkpoint that is open for reading, on one event loop.

    Attributes:
        location: The checkpoint, for messages.
        file: The one file in `storage` that is all of it, unless all of the folder is.
        disk: Has threads do what may block.
        watch: Keeps the loop's lag within a bound, if there is one.
        lock: For what several tasks should not do at the same time.
    """

    location: str
    file: str | None
    storage: ThreadedStorage
    threads: Threads
    disk: Disk
    options: ReadOptions
    budget: ByteBudget
    watch: LagWatch | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def retries(self) -> int:
        """How often the storage tried again what had failed."""
        return self.storage.retries if isinstance(self.storage, RetryingStorage) else 0

    @property
    def verifier(self) -> Verifier:
        """Compares what was read with digests."""
        return Verifier(self.location, widen=self.options.verify == "require")

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

    async def catalog(self) -> Catalog:
        """Read which names there are; raises what `with_names` does."""
        return await self.with_names(Names.parse)

    async def with_names(self, job: Callable[[Names], T]) -> T:
        """Read which names there are, and return what a job, on a thread, makes of them.

        Raises:
            CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
            CheckpointError: If a file of names cannot be read, or its text is no good.
            ReadError: If the storage failed.
        """
        names = await self._names()
        try:
            [result] = await run_jobs(self.threads.kernels, [undisturbed(partial(job, names))])
        except CheckpointError:
            await names.check_unchanged()
            raise
        return result

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

    async def _names(self) -> Names:
        try:
            return await read_names(
                self.storage,
                executor=self.threads.kernels,
                file=self.file,
                verify=self.options.verify,
                names=partial(self.on_disk, self._listed),
            )
        except CheckpointNotFoundError as error:
            from asyncloader.runs import is_run_folder  # noqa: PLC0415  # seldom

            is_run = await self.on_disk(partial(is_run_folder, self.location))
            if not is_run:
                raise
            problem = f"{error.problem}. It holds checkpoints: take asyncloader.latest() of it"
            raise CheckpointNotFoundError(error.location, problem) from error.__cause__

    def _listed(self) -> Sequence[str]:
        with contextlib.suppress(OSError):
            return os.listdir(self.storage.location)  # noqa: PTH208  # names
        return ()


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
    async with in_time(path, options.timeout) as watched, holding as resources:
        disk = Disk(resources.threads.reads, seconds=options.stall_timeout)
        root, file = await _on_disk(disk, partial(_root_and_file, path), path)
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
            storage = resources.wrap(files)
            if not isinstance(storage, ThreadedStorage):
                raise TypeError(f"wrap_storage returned {storage!r}, which is no ThreadedStorage")
            session = Session(
                location=str(Path(path)),
                file=file,
                # What wraps the files need not know what threads may still write to.
                storage=ThreadedRetryingStorage(storage, lost=lambda: files.lost),
                threads=resources.threads,
                disk=disk,
                options=_within(options, resources.options),
                budget=resources.budget,
                watch=resources.watch,
            )
            watched.append(disk)
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


@contextlib.asynccontextmanager
async def in_time(path: str, seconds: float | None) -> AsyncIterator[list[Disk]]:
    """Keep to a time-out, and say what was being read when it passed.

    Yields:
        An empty list, for the disks to ask.

    Raises:
        LoadTimeoutError: If it passed.
    """
    disks: list[Disk] = []
    under_way: list[str] = []

    def look() -> None:
        under_way.extend(label for disk in disks for label in disk.under_way())

    loop, limit = asyncio.get_running_loop(), asyncio.timeout(seconds)
    timer = None if seconds is None else loop.call_later(seconds - _JUST_BEFORE, look)
    try:
        async with limit:
            yield disks
    except TimeoutError as error:
        if seconds is not None and limit.expired():
            raise LoadTimeoutError(path, seconds, under_way) from error
        raise
    finally:
        if timer is not None:
            timer.cancel()


async def _on_disk(disk: Disk, job: Callable[[], T], location: str) -> T:
    try:
        return await disk.call(job, label=location)
    except StalledError as error:
        raise ReadStalledError(location, 0, 0, str(error)) from error


def _root_and_file(path: str) -> tuple[Path, str | None]:
    """Return the folder to look into, and the name of the file if it is one."""
    whole = Path(path)
    # Of `os.path`, whose questions never raise.
    is_file = os.path.isfile(whole)  # noqa: PTH113
    if is_file or (whole.name.endswith(_SUFFIX) and not os.path.isdir(whole)):  # noqa: PTH112
        return whole.parent, whole.name
    return whole, None
