"""A checkpoint that is open for reading: its storage, threads, a byte budget, a time-out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from asyncloader._checkpoint.catalog import read_catalog
from asyncloader._checkpoint.manifest import read_manifest
from asyncloader._checkpoint.run_folder import is_run_folder
from asyncloader._storage.folders import Folders
from asyncloader._storage.opening import FileChangedError
from asyncloader._storage.protocol import Traffic, opening_error, read_error
from asyncloader._threads.call import StalledError
from asyncloader.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    LoadTimeoutError,
    ReadError,
    ReadStalledError,
)

from .verifier import Verifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

    from asyncloader._checkpoint.header import ShardHeader
    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._storage.kept import KeptFile
    from asyncloader._storage.unpacking import UnpackingStorage
    from asyncloader._threads.disk import Disk
    from asyncloader._threads.jobs import ByteBudget
    from asyncloader._threads.lag import LagWatch
    from asyncloader._threads.pool import Threads
    from asyncloader.options import ReadOptions


T = TypeVar("T")
Ranges: TypeAlias = "Sequence[tuple[int, int]]"

_JUST_BEFORE = 1e-6  # seconds

_CHANGED = (
    "was replaced, removed or written to while it was being loaded; load the checkpoint anew, or "
    "the one that has taken its place"
)


async def _none() -> Mapping[str, int | None]:
    return {}


async def _kept_nowhere(name: str, ranges: Ranges) -> KeptFile:  # noqa: ARG001
    raise OSError(errno.ENOTSUP, "it cannot stay open", name)


async def is_here(name: str) -> None:
    """Do nothing: what is needed of a local file stays with it."""


def _none_are(name: str) -> bool:  # noqa: ARG001
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A checkpoint that is open for reading, on one event loop."""

    location: str  # the checkpoint, for messages
    file: str | None  # the one file in `storage` that is all of it, unless all of the folder is
    storage: UnpackingStorage
    threads: Threads
    disk: Disk
    options: ReadOptions
    budget: ByteBudget
    watch: LagWatch | None = None  # keeps the loop's lag within a bound, if there is one
    gap_bytes: int = 0  # worth reading along between two ranges
    traffic: Callable[[], Traffic] = Traffic  # what there was with an object store
    # The names beside each other, and how long the files are.
    entries: Callable[[], Awaitable[Mapping[str, int | None]]] = _none
    # Opens a file that stays open when the session has ended, given the ranges that are needed; and
    # makes sure that these are there, once they were read.
    keep_open: Callable[[str, Ranges], Awaitable[KeptFile]] = _kept_nowhere
    ensure: Callable[[str], Awaitable[None]] = is_here
    is_remote: Callable[[str], bool] = _none_are  # whether a file is in an object store
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # tasks take turns to read names

    @property
    def retries(self) -> int:
        """How often the storage tried a failed read again."""
        return self.storage.retries

    @property
    def verifier(self) -> Verifier:
        return Verifier(self.location, widen=self.options.verify == "require")

    @contextlib.asynccontextmanager
    async def explaining(self) -> AsyncIterator[None]:
        """Name the checkpoint in the errors of reads; say that it has changed, if that is why."""
        try:
            yield
        except ReadStalledError as error:  # another question would wait as long again
            error.location = self.location
            raise
        except ReadError as error:
            error.location = self.location
            if isinstance(error.__cause__, FileChangedError):
                raise CheckpointChangedError(self.location, _CHANGED, error.shard) from error
            with contextlib.suppress(OSError):
                if error.shard in await self.storage.changed([error.shard]):
                    raise CheckpointChangedError(self.location, _CHANGED, error.shard) from error
            raise

    async def check_unchanged(self, shards: Sequence[str]) -> None:
        """Make sure that the shards are the files that they were when they were opened."""
        if not shards:
            return
        try:
            changed = await self.storage.changed(shards)
        except OSError as error:
            raise read_error(shards[0], 0, 0, error) from error
        if changed:
            raise CheckpointChangedError(self.location, _CHANGED, changed[0])

    async def hold_open(self, name: str, ranges: Ranges) -> KeptFile:
        """Open a file that stays open when the session has ended.

        Raises:
            CheckpointError: If it cannot be opened, or no copy of it is on a disk of this machine.
            CheckpointChangedError: If it is another one than the session has read.
        """
        try:
            return await self.keep_open(name, ranges)
        except FileChangedError as error:
            raise CheckpointChangedError(self.location, _CHANGED, name) from error
        except OSError as error:
            raise opening_error(self.location, name, error) from error

    async def ensure_held(self, name: str) -> None:
        """Make sure that what is needed of a file stays with it, once it was read.

        Raises:
            CheckpointError: If not.
        """
        try:
            await self.ensure(name)
        except OSError as error:
            raise opening_error(self.location, name, error) from error

    async def on_disk(self, job: Callable[[], T]) -> T:
        """Have a thread do a job that looks at files, but reads none."""
        return await on_disk(self.disk, job, self.location)

    async def listed(self) -> Mapping[str, int | None]:
        """Return `entries`; none if the folder is not there, or cannot be listed."""
        with contextlib.suppress(OSError):
            return await self.entries()
        return {}

    async def has(self, name: str) -> bool:
        """Say whether there is such a file; it is asked for where names cannot be listed."""
        if names := await self.listed():
            return name in names
        try:
            await self.storage.size(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise opening_error(self.location, name, error) from error
        return True

    async def _names(self) -> Sequence[str]:
        return list(await self.listed())

    async def catalog(self, *, whole: bool = True) -> Catalog:
        """Return the names; raise what `with_names` does, and with `whole` if some are lacking."""
        return await self.with_names(lambda parse: parse().whole() if whole else parse())

    async def with_names(self, job: Callable[[Callable[[], Catalog]], T]) -> T:
        """Read the names, and return the result of a job that a thread does with their parser.

        Raises:
            CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
            CheckpointError: If a file of names cannot be read, or its text is no good.
            ReadError: If the storage failed.
        """
        try:
            return await read_catalog(
                self.storage,
                job,
                executor=self.threads.kernels,
                file=self.file,
                verify=self.options.verify,
                names=self._names,
            )
        except CheckpointNotFoundError as error:
            folder = Folders(self.options.storage_options).at(self.location)
            if not await self.on_disk(partial(is_run_folder, folder)):
                raise
            problem = f"{error.problem}. It holds checkpoints: take asyncloader.latest() of it"
            raise CheckpointNotFoundError(error.location, problem) from error.__cause__

    async def manifest(self, catalog: Catalog, shards: Iterable[str]) -> Manifest:
        parallel, executor = self.options.parallel, self.threads.kernels
        manifest = await read_manifest(
            self.storage, catalog, shards, parallel=parallel, executor=executor
        )
        self.know(manifest.headers)
        return replace(manifest, location=self.location)

    def know(self, headers: Mapping[str, ShardHeader]) -> None:
        """Let blocks be read that a file has in pieces, or compressed."""
        for shard, header in headers.items():
            self.storage.unpack(shard, header.packed)


@contextlib.asynccontextmanager
async def in_time(path: str, seconds: float | None) -> AsyncIterator[list[Disk]]:
    """Keep to a time-out; its error says what was being read when it passed.

    Yields an empty list, for the disks to ask.
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


async def on_disk(disk: Disk, job: Callable[[], T], location: str) -> T:
    try:
        return await disk.call(job, label=location)
    except StalledError as error:
        raise ReadStalledError(location, 0, 0, str(error)) from error
