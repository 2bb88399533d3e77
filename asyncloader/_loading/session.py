"""A checkpoint that is open for reading: its storage, threads, a byte budget, a time-out."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from asyncloader._checkpoint.catalog import Names, read_names
from asyncloader._checkpoint.manifest import read_manifest
from asyncloader._storage.protocol import read_error
from asyncloader._threads.call import StalledError
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    ReadError,
    ReadStalledError,
)

from .verification import Verifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._storage.protocol import Storage
    from asyncloader._storage.retrying import RetryingStorage
    from asyncloader._threads.budget import ByteBudget
    from asyncloader._threads.disk import Disk
    from asyncloader._threads.lag import LagWatch
    from asyncloader._threads.pool import Threads
    from asyncloader.options import ReadOptions


T = TypeVar("T")

_CHANGED = (
    "was replaced, removed or written to while it was being loaded; load the checkpoint anew, or "
    "the one that has taken its place"
)


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
        return await on_disk(self.disk, job, self.location)

    def _listed(self) -> Sequence[str]:
        with contextlib.suppress(OSError):
            return os.listdir(self.storage.location)  # noqa: PTH208  # names
        return ()

    @property
    def verifier(self) -> Verifier:
        """Compares what was read with digests."""
        return Verifier(self.location, widen=self.options.verify == "require")

    async def names(self) -> Names:
        """Read the texts that say which names there are.

        Raises:
            CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
            CheckpointError: If such a file cannot be read.
            ReadError: If the storage failed.
        """
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

    async def catalog(self) -> Catalog:
        """Read which names there are; raises what `names` does, and if a text is no good."""
        return await self.with_names(Names.parse)

    async def with_names(self, job: Callable[[Names], T]) -> T:
        """Read which names there are, and return what a job, on a thread, makes of them.

        Raises:
            CheckpointError: If a text is no good, besides what `names` raises.
        """
        names = await self.names()
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


async def on_disk(disk: Disk, job: Callable[[], T], location: str) -> T:
    """Return what a job finds that looks at files, of a checkpoint that may not be open yet.

    Raises:
        ReadStalledError: If it was given up.
    """
    try:
        return await disk.call(job, label=location)
    except StalledError as error:
        stalled = ReadStalledError(location, 0, 0, str(error))
        raise stalled from error
