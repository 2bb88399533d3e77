"""Which files stay open."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

from asyncloader._threads.jobs import for_each, settled

from .past_cache import open_past_cache

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from asyncloader._threads.disk import Disk


_MOST = 256
_CLOSERS = 8
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


class _Closable(Protocol):
    def close(self) -> None: ...


class OpenFile:
    """A file that is open.

    Args:
        fd: Its descriptor.
        status: What it was when it was opened.
        start: Its first bytes, read then.
        disk: Closes it, which may take a while: there are networks.

    Attributes:
        start: For the first read only: a file may change.
        users: Tasks that use it; belongs to the event loop.
    """

    def __init__(self, fd: int, status: os.stat_result, start: bytes, *, disk: Disk) -> None:
        self.status = status
        self.start = start
        self.users = 0
        self._fd = fd
        self._disk = disk
        self._lock = threading.Lock()  # for the two below
        self._readers = 0
        self._is_closed = False
        self._opening = threading.Lock()  # for the next
        self._past: int | None = None  # -1: there is none

    def past_cache(self) -> int | None:
        """Return a descriptor for reads past the page cache, within `using`; `None` without one."""
        with self._opening:
            if self._past is None:
                opened = open_past_cache(self._fd)
                self._past = -1 if opened is None else opened[0]
            return None if self._past < 0 else self._past

    @contextlib.contextmanager
    def using(self) -> Iterator[int]:
        """Lend the descriptor to a thread; it stays that of this file for the length of the block.

        Raises:
            OSError: If it is closed: the thread was given up on, and has come back.
        """
        with self._lock:
            if self._is_closed:
                raise OSError(errno.EBADF, "the file was closed meanwhile")
            self._readers += 1
        try:
            yield self._fd
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._readers -= 1
            is_last = self._is_closed and not self._readers
        if is_last:
            self._close()

    def _close(self) -> None:
        if self._past is not None and self._past >= 0:
            os.close(self._past)
        os.close(self._fd)

    def close(self) -> None:
        """Close it; if a thread that was given up on still reads, that one does when it is done."""
        with self._lock:
            is_last = not self._is_closed and not self._readers
            self._is_closed = True
        if is_last:
            self._close()

    async def aclose(self) -> None:
        """Close it on a thread."""
        with contextlib.suppress(OSError):  # nothing was written: nothing is lost
            await self._disk.call(self.close)


class Descriptors:
    """The open files of any number of storages, no more of them than the program can spare.

    A file stays open when no task uses it, until its place is wanted for another one; the file that
    was not used for longest goes first. Where all are used, the task that came first gets the
    first place that becomes free. Belongs to one event loop.

    Args:
        most: Files that are open at a time. `None` is 256, or a quarter of the files that the
            process may have open, if that is less: the others belong to the rest of the program.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = _allowed() if most is None else most
        self._files: OrderedDict[tuple[object, str], OpenFile] = OrderedDict()
        self._open = 0  # files, and what is being opened or closed
        self._turns = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        users = sum(file.users for file in self._files.values())
        return f"<Descriptors: {self._open} of {self._most} open, {users} in use>"

    def count(self, owner: object) -> tuple[int, int]:
        """Return how many files of one storage are open, and how many tasks use them."""
        mine = self._of(owner)
        return len(mine), sum(file.users for file in mine.values())

    def find(self, owner: object, name: str) -> OpenFile | None:
        """Return a file that is open, if it is."""
        file = self._files.get((owner, name))
        if file is not None:
            self._files.move_to_end((owner, name))
        return file

    async def open(
        self, owner: object, name: str, job: Callable[[], Awaitable[OpenFile]]
    ) -> OpenFile:
        """Return what `job` opens, once there is a place for it.

        Where the process has no descriptor left, `job` is called again when one of ours is closed.

        Raises:
            OSError: If `job` did, and there is no hope.
        """
        most = self._most
        while True:
            await self._take_place(most)
            try:
                file = await job()
            except OSError as error:
                self._free(1)
                if error.errno not in _NO_DESCRIPTORS or not self._open:
                    raise
                most = self._open
            except BaseException:
                self._free(1)
                raise
            else:
                self._files[owner, name] = file
                return file

    def release(self, file: OpenFile) -> None:
        """Note that a task does not use a file any more."""
        file.users -= 1
        assert file.users >= 0, "a file is released as often as it is used"
        if not file.users:
            self._changed.set()

    def take(self, owner: object) -> list[OpenFile]:
        """Return all files of one storage, and know nothing of them any more."""
        mine = self._of(owner)
        for key in mine:
            del self._files[key]
        self._free(len(mine))
        return list(mine.values())

    async def close(self, owner: object) -> None:
        """Close all files of one storage, side by side: sixteen of them one by one took 1 ms."""
        mine = self._of(owner)
        await for_each(mine, self._close, workers=_CLOSERS, name="asyncloader-close")

    async def _take_place(self, most: int) -> None:
        async with self._turns:
            while self._open >= most:
                idle = next((key for key, file in self._files.items() if not file.users), None)
                if idle is not None:
                    file = self._files.pop(idle)  # here: a task that runs first may want to use it
                    await settled(asyncio.ensure_future(self._shut(file)))
                else:
                    self._changed.clear()
                    await self._changed.wait()
            self._open += 1

    async def _close(self, key: tuple[object, str]) -> None:
        file = self._files.pop(key, None)  # before the await: no task may take it meanwhile
        if file is not None:
            await self._shut(file)

    async def _shut(self, file: OpenFile) -> None:
        try:
            await file.aclose()
        finally:
            self._free(1)

    def _free(self, places: int) -> None:
        self._open -= places
        assert self._open >= 0, "a place is freed once"
        self._changed.set()

    def _of(self, owner: object) -> dict[tuple[object, str], OpenFile]:
        return {key: file for key, file in self._files.items() if key[0] is owner}


def close_aside(files: Iterable[_Closable]) -> None:
    """Close files on a thread that the program does not wait for."""

    def close_all() -> None:
        for file in files:
            with contextlib.suppress(OSError):
                file.close()

    with contextlib.suppress(RuntimeError):  # no thread to be had: they stay open
        _thread.start_new_thread(close_all, ())  # unlike `threading`'s, it is not waited for


def _allowed() -> int:
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return _MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(min(_MOST, soft // 4), 1)
