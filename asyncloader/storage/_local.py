"""A checkpoint in a folder of the file system."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar

import aiofiles
import aiofiles.os

from asyncloader._concurrency import for_each, run_jobs, settled
from asyncloader._throttle import ThrottledExecutor

from ._pace import ReadPace, Seen
from ._protocol import scatter, views_after

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from concurrent.futures import Executor

    from aiofiles.threadpool.binary import AsyncFileIO

    from asyncloader._throttle import Throttle

    from ._protocol import ReadInto

__all__ = ["LocalStorage"]

T = TypeVar("T")
_PReadV: TypeAlias = "Callable[[int, Sequence[memoryview], int, Seen], int]"


# One call into the kernel. A longer one may keep a processor from the event loop until it is done.
_STEP = 8 << 20
# Read as soon as a file is open: most headers, and many an `index`, need no other hand-over then.
_START = 16 << 10
_CLOSERS = 8
# Shorter reads do not keep others from the processors.
_PACED = 1 << 20
_NBYTES = attrgetter("nbytes")
_O_DIRECT = getattr(os, "O_DIRECT", 0)
# Linux only. It refuses with EAGAIN where the bytes are not in the page cache, and with one of the
# others where the file system does not know.
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_CANNOT_TELL = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


@dataclass(slots=True)
class _OpenFile:
    handle: AsyncFileIO
    status: os.stat_result

    start: bytes
    """Its first bytes, read when it was opened, for the first read only: a file may change."""

    users: int = 0


class LocalStorage:
    """Files in one folder, read by position on the threads of an executor.

    aiofiles opens, measures and closes them; the bulk is one `preadv` a call, which needs no seek,
    no lock and no copy, so one descriptor serves all readers. At most `max_open` descriptors that
    nobody is reading from stay open, and at most `parallel` large reads run at a time, fewer where
    that is faster (`ReadPace`). Belongs to one event loop.

    A file that is not the one that was opened first under its name is an error. Storages of one
    folder that are given the same `seen` remember that together, one after the other.

    With `direct_io` files are read past the page cache, where the file system lets us. Reads keep
    to `throttle`, if there is one.

    ```python
    async with LocalStorage("/path", executor=pool) as storage:
        count = await storage.readinto("model.safetensors", 0, [memoryview(buffer)])
    ```
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        executor: Executor,
        parallel: int = 16,
        max_open: int = 64,
        seen: dict[str, tuple[int, ...]] | None = None,
        direct_io: bool = False,
        throttle: Throttle | None = None,
    ) -> None:
        self._flags = _O_DIRECT if direct_io else 0
        self._preadv: _PReadV = _preadv
        if self._flags:
            from ._direct import DirectReader  # noqa: PLC0415  # seldom

            self._preadv = DirectReader().preadv
        self._root = Path(root)
        self._executor = executor
        self._pace = ReadPace(executor, most=parallel, throttle=throttle)
        self._small = executor if throttle is None else ThrottledExecutor(executor, throttle)
        self._max_open = max_open
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._opening: dict[str, asyncio.Lock] = {}
        self._seen = {} if seen is None else seen

    def __repr__(self) -> str:
        users = sum(file.users for file in self._files.values())
        return f"<LocalStorage {self.location!r}: {len(self._files)} open, {users} reading>"

    @property
    def location(self) -> str:
        """The folder."""
        return str(self._root)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every descriptor. Nobody may be reading any more."""
        await settled(asyncio.ensure_future(self._close_all()))

    async def _close_all(self) -> None:
        files = list(self._files.values())
        self._files.clear()

        async def close(file: _OpenFile) -> None:
            with contextlib.suppress(OSError):  # nothing was written: nothing is lost
                await file.handle.close()

        # Side by side: sixteen of them one by one took 1 ms.
        await for_each(files, close, workers=_CLOSERS, name="asyncloader-close")

    async def size(self, name: str, /) -> int:
        """Return the length of a file in bytes."""
        async with self._using(name) as file:
            return file.status.st_size

    async def changed(self, name: str, /) -> bool:
        """Say whether a file is gone, or another one than when it was first opened."""
        loop = asyncio.get_running_loop()
        looking = loop.run_in_executor(self._executor, _status, self._root / name)
        status = await settled(looking)
        return status is None or self._seen.get(name, _identity(status)) != _identity(status)

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        """Fill `views` from `offset` on; see `Storage`."""
        async with self._using(name) as file:
            size: int = sum(map(_NBYTES, views))
            start, file.start = file.start, b""
            if 0 <= offset <= len(start) - size:
                scatter(start[offset : offset + size], views)
                return size
            fd = file.handle.fileno()
            read: Callable[[Seen], int] = partial(self._preadv, fd, views, offset)
            if size >= _PACED:
                return await self._pace.run(read)
            [count] = await run_jobs(self._small, [partial(read, Seen(waited=True))])
            return count

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        """Run `job` on one of the executor's threads; see `ThreadedStorage`."""
        async with self._using(name) as file:
            fd, file.start = file.handle.fileno(), b""

            def with_read(seen: Seen) -> T:
                return job(lambda offset, views: self._preadv(fd, views, offset, seen))

            return await self._pace.run(with_read)

    @contextlib.asynccontextmanager
    async def _using(self, name: str) -> AsyncIterator[_OpenFile]:
        file = self._files.get(name) or await self._open_once(name)
        file.users += 1
        self._files.move_to_end(name)
        try:
            yield file
        finally:
            file.users -= 1

    async def _open_once(self, name: str) -> _OpenFile:
        # Kept for good: a second lock for one name would let two descriptors be opened.
        lock = self._opening.setdefault(name, asyncio.Lock())
        async with lock:
            if name not in self._files:
                await self._close_idle()
                file = await self._open(name)
                if self._seen.setdefault(name, _identity(file.status)) != _identity(file.status):
                    await settled(asyncio.ensure_future(file.handle.close()))
                    raise OSError(errno.ESTALE, "the file was replaced meanwhile", name)
                self._files[name] = file
            return self._files[name]

    async def _open(self, name: str) -> _OpenFile:
        opening = asyncio.ensure_future(self._open_and_measure(self._root / name))
        try:
            return await settled(opening, discard=lambda file: file.handle.close())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise await self._explained(error) from error

    async def _open_and_measure(self, path: Path) -> _OpenFile:
        found: list[tuple[os.stat_result, bytes]] = []

        def opener(path: str, flags: int) -> int:
            fd, status = _open_regular(path, flags | self._flags)
            found.append((status, self._start(fd, status.st_size)))
            return fd

        handle = await aiofiles.open(
            path, "rb", buffering=0, opener=opener, executor=self._executor
        )
        return _OpenFile(handle, *found[0])

    def _start(self, fd: int, size: int) -> bytes:
        start = bytearray(min(size, _START))
        try:
            count = self._preadv(fd, [memoryview(start)], 0, Seen(waited=True))
        except OSError:  # whoever asks for these bytes hears of it
            return b""
        return bytes(start[:count])

    async def _explained(self, error: OSError) -> OSError:
        """Say whether it is the file or the folder that is missing."""
        if not await aiofiles.os.path.exists(self._root, executor=self._executor):
            return FileNotFoundError(errno.ENOENT, "no such folder", self.location)
        if not await aiofiles.os.path.isdir(self._root, executor=self._executor):
            return NotADirectoryError(errno.ENOTDIR, "not a folder", self.location)
        return FileNotFoundError(errno.ENOENT, "No such file in the folder", str(error.filename))

    async def _close_idle(self) -> None:
        """Make room for one more descriptor."""
        while len(self._files) >= self._max_open:
            # Looked for anew after each await: who was idle before may be in use, or gone.
            idle = next((name for name, file in self._files.items() if not file.users), None)
            if idle is None:
                return
            file = self._files.pop(idle)  # before the await: nobody may take it meanwhile
            await settled(asyncio.ensure_future(file.handle.close()))


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written anew."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _open_regular(path: str, flags: int) -> tuple[int, os.stat_result]:
    """Open a file, but no FIFO, device or folder: those would block or never end.

    Returns:
        The descriptor, and what the file was then.
    """
    flags |= getattr(os, "O_NONBLOCK", 0)  # or a FIFO hangs here
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EINVAL or not flags & _O_DIRECT:
            raise
        fd = os.open(path, flags & ~_O_DIRECT)  # a file system in memory, or an odd one
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd, status


def _steps(views: Sequence[memoryview]) -> Iterator[tuple[Sequence[memoryview], int]]:
    """Cut views, and group them, so that one call into the kernel takes at most a step.

    Yields:
        What one call takes, and how many bytes that are.
    """
    total = sum(map(_NBYTES, views))
    if total <= _STEP:  # a thousand small ones, often
        yield views, total
        return
    step: list[memoryview] = []
    room = _STEP
    for view in views:
        start = 0
        while start < view.nbytes:
            piece = view[start : start + room]
            step.append(piece)
            start += piece.nbytes
            room -= piece.nbytes
            if not room:
                yield step, _STEP
                step, room = [], _STEP
    if step:
        yield step, _STEP - room


if hasattr(os, "preadv"):

    def _preadv(fd: int, views: Sequence[memoryview], offset: int, seen: Seen) -> int:
        """Fill views, and say whether that took bytes which were not in memory yet."""
        done = 0
        for step, length in _steps(views):
            count = (
                0 if seen.waited or seen.unsure else _preadv_cached(fd, step, offset + done, seen)
            )
            if count < length:
                seen.waited = not seen.unsure
                left = views_after(step, count) if count else step
                count += os.preadv(fd, left, offset + done + count)
            done += count
            if count < length:
                break
        return done

    def _preadv_cached(fd: int, views: Sequence[memoryview], offset: int, seen: Seen) -> int:
        """Read as much as need not be waited for; nothing, where the system cannot tell."""
        try:
            if _NOWAIT:
                return os.preadv(fd, views, offset, _NOWAIT)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return 0
            if error.errno not in _CANNOT_TELL:
                raise
        except NotImplementedError:  # a C library without preadv2
            pass
        seen.unsure = True
        return 0

else:  # Windows: one position a descriptor, so one reader at a time
    _seek_and_read = threading.Lock()

    def _preadv(fd: int, views: Sequence[memoryview], offset: int, seen: Seen) -> int:
        seen.waited = True
        with _seek_and_read, open(fd, "rb", buffering=0, closefd=False) as file:
            file.seek(offset)
            return file.readinto(views[0]) or 0
