"""A checkpoint in a folder of the file system."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar

from asyncloader._threads.call import Reading, StalledError
from asyncloader._threads.jobs import for_each, settled

from .descriptors import Descriptors, OpenFile, close_aside
from .kept import KeptFile
from .opening import O_DIRECT, FileChangedError, identity, open_regular, status_of
from .past_cache import ChoosingReader, Company
from .preadv import preadv as through_cache
from .preadv import read_past
from .protocol import Traffic, scatter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from asyncloader._threads.disk import Disk

    from .preadv import PReadV
    from .protocol import ReadInto


T = TypeVar("T")

# Read as soon as a file is open: most headers, and many an `index`, need no other hand-over then.
_START = 16 << 10
_LOOKERS = 8


class LocalStorage:
    """Files in one folder, read by position on a disk's threads.

    A read is one `preadv`, which needs no seek, no lock and no copy, so one descriptor serves all
    readers. Belongs to one event loop.

    A file that is not the one that was opened first under its name is an error. Storages of one
    folder that are given the same `seen` remember that together, one after the other. A descriptor
    that a network file system has let go of is replaced by a new one.

    Args:
        root: The folder.
        disk: Has threads read, and keeps to a stall time-out.
        descriptors: Keeps files open; `None` is one of its own.
        seen: Which files there were when they were first opened.
        direct_io: Whether files are read past the page cache, where the file system lets us;
            `"auto"` decides for each read.
        names: Of files of which one is there, and the same for all who load from the folder.
        follow_symlinks: Whether a file may be a symbolic link that leads out of the folder.
        preadv: Reads; `None` asks the system to.
    """

    attempts: Final = 5
    # Reading as much along takes about as long as handing another call to a thread.
    gap_bytes: Final = 64 << 10

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        disk: Disk,
        descriptors: Descriptors | None = None,
        seen: dict[str, tuple[object, ...]] | None = None,
        direct_io: bool | Literal["auto"] = False,
        names: Sequence[str] = (),
        follow_symlinks: bool = False,
        preadv: PReadV | None = None,
    ) -> None:
        self._flags = O_DIRECT if direct_io is True else 0
        self._preadv = preadv or (read_past if self._flags else through_cache)
        self._root = Path(root)
        self._company = Company(self._root, names, follow=follow_symlinks)
        chooses = direct_io == "auto" and preadv is None
        self._choosing = ChoosingReader(self._company.is_alone) if chooses else None
        self._disk = disk
        self._descriptors = descriptors or Descriptors()
        self._opening: dict[str, asyncio.Lock] = {}
        self._stalls: dict[str, StalledError] = {}
        self._seen = {} if seen is None else seen
        self._follow = follow_symlinks

    def __repr__(self) -> str:
        files, users = self._descriptors.count(self)
        return f"<LocalStorage {self.location!r}: {files} open, {users} reading>"

    @property
    def location(self) -> str:
        """The folder."""
        return str(self._root)

    @property
    def lost(self) -> int:
        """Reads that were given up: their memory may be written to at any time."""
        return self._disk.lost

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every descriptor. No read may be in flight any more."""
        if self._disk.lost:  # a disk that gives no answer may give none to this either
            close_aside([*self._descriptors.take(self), self._company])
        else:
            await settled(asyncio.gather(self._descriptors.close(self), self._part()))
        self._disk.close()

    async def _part(self) -> None:
        with contextlib.suppress(OSError):  # the lock ends with the process at the latest
            if self._choosing is not None:
                await self._disk.call(self._company.close)

    def traffic(self) -> Traffic:
        """Return nothing: a disk takes no requests."""
        return Traffic()

    async def entries(self) -> dict[str, int | None]:
        """Return the names in the folder, and the lengths of files; `None` of all else.

        Raises:
            OSError: If it is not there, or cannot be listed.
        """

        def listed() -> dict[str, int | None]:
            with os.scandir(self._root) as found:
                return {one.name: _length(one) for one in found}

        return await self._disk.call(listed, label=self.location)

    async def size(self, name: str, /) -> int:
        """Return the length of a file in bytes."""
        async with self._using(name) as file:
            return file.status.st_size

    async def changed(self, names: Sequence[str], /) -> list[str]:
        """Say which files are gone, or others than when they were first opened; see `Storage`."""
        found: list[str] = []

        async def look(name: str) -> None:
            look_here = partial(status_of, self._root / name)
            status = await self._disk.call(look_here, label=name)
            if status is None or self._seen.get(name, identity(status)) != identity(status):
                found.append(name)

        await for_each(names, look, workers=_LOOKERS, name="asyncloader-look")
        return sorted(found)

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        """Fill `views` from `offset` on; see `Storage`."""
        reading = Reading(name, offset, views)
        async with self._using(name) as file:
            start, file.start = file.start, b""
            if 0 <= offset <= len(start) - reading.length:
                scatter(start[offset : offset + reading.length], views)
                return reading.length
            return await self._disk.call(partial(self._read, file, reading), reading=reading)

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        """Run `job` on one of the disk's threads; see `ThreadedStorage`."""
        reading = Reading(name)

        def read(offset: int, views: Sequence[memoryview]) -> int:
            reading.begin(offset, views)
            count = self._read(file, reading)
            if reading.is_lost:  # what the job would do with the bytes is no longer wanted
                raise OSError(errno.ECANCELED, "the read was given up")
            return count

        async with self._using(name) as file:
            file.start = b""
            return await self._disk.call(partial(job, read), reading=reading)

    async def hold_open(self, name: str, _: Sequence[tuple[int, int]]) -> KeptFile:
        """Open a file anew, for one that outlives this storage.

        Raises:
            FileChangedError: If it is not the one any more that was opened first.
            OSError: If it cannot be opened.
        """

        def opened() -> KeptFile:
            fd, status = open_regular(self._root / name, os.O_RDONLY, follow=self._follow)
            file = KeptFile(self.location, name, fd, status)
            if self._seen.setdefault(name, identity(status)) != identity(status):
                raise FileChangedError(name)
            return file

        return await self._disk.call(opened, label=name)

    def _read(self, file: OpenFile, reading: Reading) -> int:
        """Read, on a thread."""
        views = reading.views
        assert views is not None, "a read has begun"
        with file.using() as fd:
            try:
                if self._choosing is None:
                    count = self._preadv(fd, views, reading.offset, reading)
                else:
                    past, at = file.past_cache, reading.offset
                    count = self._choosing.preadv(fd, past, views, at, reading)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                self._renew(reading.name, fd)
                count = self._preadv(fd, views, reading.offset, reading)
        assert 0 <= count <= reading.length, "what was read lies within its views"
        return count

    def _renew(self, name: str, fd: int) -> None:
        """Have a descriptor that went stale stand for the same file again, for all its readers."""
        path = self._root / name
        fresh, status = open_regular(path, os.O_RDONLY | self._flags, follow=self._follow)
        try:
            if self._seen.get(name) != identity(status):
                raise FileChangedError(name)
            os.dup2(fresh, fd, inheritable=False)
        finally:
            os.close(fresh)

    @contextlib.asynccontextmanager
    async def _using(self, name: str) -> AsyncIterator[OpenFile]:
        file = self._descriptors.find(self, name) or await self._open_once(name)
        file.users += 1
        try:
            yield file
        finally:
            self._descriptors.release(file)

    async def _open_once(self, name: str) -> OpenFile:
        # Kept for good: a second lock for one name would let two descriptors be opened.
        lock = self._opening.setdefault(name, asyncio.Lock())
        before = self._stalls.get(name)
        async with lock:
            # A task that waited while another one did not get it opened has waited long enough.
            if (stalled := self._stalls.get(name)) is not None and stalled is not before:
                raise StalledError(stalled.seconds)
            return self._descriptors.find(self, name) or await self._descriptors.open(
                self, name, partial(self._open, name)
            )

    async def _open(self, name: str) -> OpenFile:
        open_here = partial(self._open_here, self._root / name)
        try:
            file = await self._disk.call(open_here, label=name, late=OpenFile.close)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise await self._disk.call(partial(self._explained, error)) from error
        except StalledError as error:
            self._stalls[name] = error
            raise
        if self._seen.setdefault(name, identity(file.status)) != identity(file.status):
            await settled(asyncio.ensure_future(file.aclose()))
            raise FileChangedError(name)
        return file

    def _open_here(self, path: Path) -> OpenFile:
        if self._choosing is not None:
            self._company.join(path)
        fd, status = open_regular(path, os.O_RDONLY | self._flags, follow=self._follow)
        try:
            return OpenFile(fd, status, self._start(fd, status.st_size), disk=self._disk)
        except BaseException:
            os.close(fd)
            raise

    def _start(self, fd: int, size: int) -> bytes:
        start = bytearray(min(size, _START))
        try:
            count = self._preadv(fd, [memoryview(start)], 0, Reading("", 0, ()))
        except OSError:  # the read of these bytes will fail, and say why
            return b""
        return bytes(start[:count])

    def _explained(self, error: OSError) -> OSError:
        """Say whether it is the file or the folder that is missing."""
        if not os.path.exists(self._root):  # noqa: PTH110  # Path's own raises for odd names
            return FileNotFoundError(errno.ENOENT, "no such folder", self.location)
        if not os.path.isdir(self._root):  # noqa: PTH112
            return NotADirectoryError(errno.ENOTDIR, "not a folder", self.location)
        dangling = "symbolic link" in (error.strerror or "")
        problem = error.strerror if dangling else "No such file in the folder"
        return FileNotFoundError(errno.ENOENT, problem, str(error.filename))


def _length(entry: os.DirEntry[str]) -> int | None:
    with contextlib.suppress(OSError):  # removed meanwhile
        return entry.stat().st_size if entry.is_file() else None
    return None
