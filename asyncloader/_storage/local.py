"""A checkpoint in a folder of the file system."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from asyncloader._threads.jobs import for_each, settled
from asyncloader._threads.lost import Writing
from asyncloader._threads.pace import ReadPace, Seen
from asyncloader._threads.patience import Patience, Pulse, StalledError
from asyncloader._threads.throttle import ThrottledExecutor

from .descriptors import Descriptors, OpenFile, close_aside
from .opening import O_DIRECT, FileChangedError, identity, open_regular, status_of
from .preadv import preadv
from .protocol import ByteRange, scatter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from concurrent.futures import Executor

    from asyncloader._threads.throttle import Throttle

    from .preadv import PReadV
    from .protocol import ReadInto


T = TypeVar("T")

# Read as soon as a file is open: most headers, and many an `index`, need no other hand-over then.
_START = 16 << 10
# Shorter reads do not keep others from the processors.
_PACED = 1 << 20
_NBYTES = attrgetter("nbytes")
_LOOKERS = 8
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


class LocalStorage:
    """Files in one folder, read by position on the threads of an executor.

    A read is one `preadv`, which needs no seek, no lock and no copy, so one descriptor serves all
    readers. Belongs to one event loop.

    A file that is not the one that was opened first under its name is an error. Storages of one
    folder that are given the same `seen` remember that together, one after the other. A descriptor
    that a network file system has let go of is replaced by a new one.

    ```python
    async with LocalStorage("/path", executor=pool) as storage:
        count = await storage.readinto("model.safetensors", 0, [memoryview(buffer)])
    ```

    Args:
        root: The folder.
        executor: Its threads read.
        pace: How many large reads run at a time, on these threads; `None` is one of its own, for
            16 at most.
        descriptors: Keeps files open; `None` is one of its own.
        patience: How long a thread is waited for; `None` is for ever.
        throttle: What short reads keep to, if there is one; the pace has its own.
        seen: Which files there were when they were first opened.
        direct_io: Whether files are read past the page cache, where the file system lets us.
        follow_symlinks: Whether a file may be a symbolic link that leads out of the folder.
        preadv: Reads; `None` asks the system to.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        executor: Executor,
        pace: ReadPace | None = None,
        descriptors: Descriptors | None = None,
        patience: Patience | None = None,
        throttle: Throttle | None = None,
        seen: dict[str, tuple[int, ...]] | None = None,
        direct_io: bool = False,
        follow_symlinks: bool = False,
        preadv: PReadV | None = None,
    ) -> None:
        self._flags = O_DIRECT if direct_io else 0
        self._preadv = preadv or _reader(past_cache=bool(self._flags))
        self._root = Path(root)
        self._executor = executor
        self._pace = pace or ReadPace(executor, most=16)
        self._small = executor if throttle is None else ThrottledExecutor(executor, throttle)
        self._descriptors = descriptors or Descriptors()
        self._patience = patience or Patience(None)
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
        return self._patience.lost

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every descriptor. Nobody may be reading any more."""
        if self._patience.lost:  # a disk that gives no answer may give none to this either
            close_aside(self._descriptors.take(self))
        else:
            await settled(asyncio.ensure_future(self._descriptors.close(self)))
        self._patience.close()

    async def size(self, name: str, /) -> int:
        """Return the length of a file in bytes."""
        async with self._using(name) as file:
            return file.status.st_size

    async def changed(self, names: Sequence[str], /) -> list[str]:
        """Say which files are gone, or others than when they were first opened; see `Storage`."""
        found: list[str] = []

        async def look(name: str) -> None:
            look_here = partial(status_of, self._root / name)
            status = await self._on_executor(look_here, label=name)
            if status is None or self._seen.get(name, identity(status)) != identity(status):
                found.append(name)

        await for_each(names, look, workers=_LOOKERS, name="asyncloader-look")
        return sorted(found)

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        """Fill `views` from `offset` on; see `Storage`."""
        async with self._using(name) as file:
            size: int = sum(map(_NBYTES, views))
            start, file.start = file.start, b""
            if 0 <= offset <= len(start) - size:
                scatter(start[offset : offset + size], views)
                return size
            return await self._fill(name, offset, views, size, file)

    async def _fill(
        self, name: str, offset: int, views: Sequence[memoryview], size: int, file: OpenFile
    ) -> int:
        label, writing = ByteRange(name, offset, size), Writing()

        def read(seen: Seen) -> int:
            try:
                writing.begin(views)
                return self._read(name, file, views, offset, seen)
            finally:
                writing.end()

        if size < _PACED:
            job, lost = partial(read, Seen(waited=True)), writing.lose
            return await self._on_executor(job, label=label, lost=lost)
        return await self._pace.run(read, self._patience, label=label, lost=writing.lose)

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        """Run `job` on one of the executor's threads; see `ThreadedStorage`."""
        async with self._using(name) as file:
            file.start = b""
            pulse, label, writing = Pulse(), ByteRange(name), Writing()

            def with_read(seen: Seen) -> T:
                def read(offset: int, views: Sequence[memoryview]) -> int:
                    label.note(offset, views)
                    pulse.beat()
                    writing.begin(views)
                    return self._read(name, file, views, offset, seen)

                try:
                    return job(read)
                finally:
                    writing.end()

            return await self._pace.run(
                with_read, self._patience, label=label, pulse=pulse, lost=writing.lose
            )

    async def _on_executor(
        self,
        job: Callable[[], T],
        *,
        label: object = "",
        lost: Callable[[], object] | None = None,
    ) -> T:
        return await self._patience.run(self._small, job, label=label, lost=lost)

    def _read(
        self, name: str, file: OpenFile, views: Sequence[memoryview], offset: int, seen: Seen
    ) -> int:
        """Read, on a thread."""

        def read(fd: int) -> int:
            try:
                return self._preadv(fd, views, offset, seen)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            self._renew(name, fd)
            return self._preadv(fd, views, offset, seen)

        return file.use(read)

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
            # Who waited while another one did not get it opened has waited long enough.
            if (stalled := self._stalls.get(name)) is not None and stalled is not before:
                raise StalledError(stalled.seconds)
            file = self._descriptors.find(self, name)
            if file is None:
                file = await self._open_first(name)
                self._descriptors.add(self, name, file)
            return file

    async def _open_first(self, name: str) -> OpenFile:
        await self._descriptors.make_room()
        with self._descriptors.opening():
            file = await self._open(name)
        if self._seen.setdefault(name, identity(file.status)) != identity(file.status):
            await settled(asyncio.ensure_future(file.close()))
            raise FileChangedError(name)
        return file

    async def _open(self, name: str) -> OpenFile:
        open_here = partial(self._open_here, self._root / name)
        while True:
            try:
                return await self._patience.run(
                    self._executor,
                    open_here,
                    label=name,
                    late=OpenFile.close_here,
                    discard=OpenFile.close,
                )
            except (FileNotFoundError, NotADirectoryError) as error:
                raise await self._on_executor(partial(self._explained, error)) from error
            except StalledError as error:
                self._stalls[name] = error
                raise
            except OSError as error:
                # Whoever else may need one gets it first: what we do not use is closed.
                if error.errno not in _NO_DESCRIPTORS or not await self._descriptors.relieve():
                    raise

    def _open_here(self, path: Path) -> OpenFile:
        flags = os.O_RDONLY | self._flags
        fd, status = open_regular(path, flags, follow=self._follow)
        try:
            return OpenFile(
                fd, status, self._start(fd, status.st_size), on_thread=self._on_executor
            )
        except BaseException:
            os.close(fd)
            raise

    def _start(self, fd: int, size: int) -> bytes:
        start = bytearray(min(size, _START))
        try:
            count = self._preadv(fd, [memoryview(start)], 0, Seen(waited=True))
        except OSError:  # whoever asks for these bytes hears of it
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


def _reader(*, past_cache: bool) -> PReadV:
    if not past_cache:
        return preadv
    from .direct import DirectReader  # noqa: PLC0415  # seldom

    return DirectReader().preadv
