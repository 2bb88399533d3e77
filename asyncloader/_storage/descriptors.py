"""Which files stay open."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeVar

from asyncloader._threads.jobs import for_each, settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator


T = TypeVar("T")

_MOST = 64
_CLOSERS = 8


class OpenFile:
    """A file that is open.

    Args:
        fd: Its descriptor.
        status: What it was when it was opened.
        start: Its first bytes, read then.
        on_thread: Runs a job on a thread. Closing may wait for a network.

    Attributes:
        start: For the first read only: a file may change.
        users: Tasks that use it; belongs to the event loop.
    """

    def __init__(
        self,
        fd: int,
        status: os.stat_result,
        start: bytes,
        *,
        on_thread: Callable[[Callable[[], None]], Awaitable[None]],
    ) -> None:
        self.status = status
        self.start = start
        self.users = 0
        self._fd = fd
        self._on_thread = on_thread
        self._lock = threading.Lock()  # for the two below
        self._readers = 0
        self._is_closed = False

    def use(self, job: Callable[[int], T]) -> T:
        """Return `job(fd)`, on a thread; the descriptor stays that of this file meanwhile.

        Raises:
            OSError: If it is closed: the thread was given up on, and has come back.
        """
        with self._lock:
            if self._is_closed:
                raise OSError(errno.EBADF, "the file was closed meanwhile")
            self._readers += 1
        try:
            return job(self._fd)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._readers -= 1
            is_last = self._is_closed and not self._readers
        if is_last:
            os.close(self._fd)

    async def close(self) -> None:
        """Close it; if a thread that was given up on still reads, that one does when it is done."""
        with contextlib.suppress(OSError):  # nothing was written: nothing is lost
            await self._on_thread(self.close_here)

    def close_here(self) -> None:
        """Do that on this thread."""
        with self._lock:
            is_last = not self._is_closed and not self._readers
            self._is_closed = True
        if is_last:
            os.close(self._fd)


class Descriptors:
    """The open files of any number of storages; few of them stay open while nobody reads them.

    Belongs to one event loop.

    Args:
        most: Files that stay open. `None` is 64, or a quarter of those that the process may have
            open, if that is less: the others belong to the rest of the program.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = _allowed() if most is None else most
        self._files: OrderedDict[tuple[object, str], OpenFile] = OrderedDict()
        self._waiting: list[asyncio.Future[None]] = []
        self._busy = 0  # being opened or closed: what may free a descriptor soon

    def __repr__(self) -> str:
        users = sum(file.users for file in self._files.values())
        return f"<Descriptors: {len(self._files)} of {self._most} open, {users} in use>"

    def count(self, owner: object) -> tuple[int, int]:
        """Return how many files of one storage are open, and how many read from them."""
        mine = self._of(owner)
        return len(mine), sum(file.users for file in mine.values())

    def find(self, owner: object, name: str) -> OpenFile | None:
        """Return a file that is open, if it is."""
        file = self._files.get((owner, name))
        if file is not None:
            self._files.move_to_end((owner, name))
        return file

    def add(self, owner: object, name: str, file: OpenFile) -> None:
        """Note that a file is open."""
        self._files[owner, name] = file

    def release(self, file: OpenFile) -> None:
        """Note that somebody who used a file does not do so any more."""
        file.users -= 1
        if not file.users:
            self._wake()

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Note that a file is being opened or closed, for the length of the block."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._wake()

    async def make_room(self) -> None:
        """Close files that nobody uses until there is room for one more."""
        while len(self._files) >= self._most and await self._close_one():
            pass

    async def relieve(self) -> bool:
        """Return once there may be one descriptor less in use; say whether there is hope of that.

        For who is `opening` a file, when the process may have no more of them.
        """
        if await self._close_one():
            return True
        self._busy -= 1
        try:
            if not self._files and not self._busy:
                return False
            released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(released)
            await released
        finally:
            self._busy += 1
        return True

    def take(self, owner: object) -> list[OpenFile]:
        """Return all files of one storage, and know nothing of them any more."""
        mine = self._of(owner)
        for key in mine:
            del self._files[key]
        return list(mine.values())

    async def close(self, owner: object) -> None:
        """Close all files of one storage."""
        with self.opening():
            # Side by side: sixteen of them one by one took 1 ms.
            await for_each(
                self.take(owner), OpenFile.close, workers=_CLOSERS, name="asyncloader-close"
            )

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    def _of(self, owner: object) -> dict[tuple[object, str], OpenFile]:
        return {key: file for key, file in self._files.items() if key[0] is owner}

    async def _close_one(self) -> bool:
        """Close the file that nobody has used for longest; say whether there was one."""
        idle = next((key for key, file in self._files.items() if not file.users), None)
        if idle is None:
            return False
        file = self._files.pop(idle)  # before the await: nobody may take it meanwhile
        with self.opening():
            await settled(asyncio.ensure_future(file.close()))
        return True


def close_aside(files: Iterable[OpenFile]) -> None:
    """Close files on a thread of its own, which nobody waits for."""

    def close_all() -> None:
        for file in files:
            with contextlib.suppress(OSError):
                file.close_here()

    with contextlib.suppress(RuntimeError):  # no thread to be had: they stay open
        _thread.start_new_thread(close_all, ())  # unlike `threading`'s, it is not waited for


def _allowed() -> int:
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return _MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(min(_MOST, soft // 4), 1)
