"""Which files stay open."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._concurrency import for_each, settled

if TYPE_CHECKING:
    import os

    from aiofiles.threadpool.binary import AsyncFileIO

__all__ = ["Descriptors", "OpenFile"]

_MOST = 64
_CLOSERS = 8


@dataclass(slots=True, eq=False)
class OpenFile:
    """A file that is open."""

    handle: AsyncFileIO
    status: os.stat_result

    start: bytes
    """Its first bytes, read when it was opened, for the first read only: a file may change."""

    users: int = 0

    stuck: bool = False
    """Whether a thread that was given up on is still reading. Its number must not come to stand for
    another file then: it is closed when that thread lets go of it, if it ever does."""

    async def close(self) -> None:
        """Close it."""
        if not self.stuck:
            with contextlib.suppress(OSError):  # nothing was written: nothing is lost
                await self.handle.close()


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
            waiting, self._waiting = self._waiting, []
            for one in waiting:
                if not one.done():
                    one.set_result(None)

    async def make_room(self) -> None:
        """Close files that nobody uses until there is room for one more."""
        while len(self._files) >= self._most and await self._close_one():
            pass

    async def relieve(self) -> bool:
        """Return once there is one descriptor less in use; say whether there is any hope of that.

        For when the process may have no more of them.
        """
        if await self._close_one():
            return True
        if not self._files:
            return False
        released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(released)
        await released
        return True

    async def close(self, owner: object) -> None:
        """Close all files of one storage. Nobody may be reading them any more."""
        mine = self._of(owner)
        for key in mine:
            del self._files[key]
        # Side by side: sixteen of them one by one took 1 ms.
        await for_each(mine.values(), OpenFile.close, workers=_CLOSERS, name="asyncloader-close")

    def _of(self, owner: object) -> dict[tuple[object, str], OpenFile]:
        return {key: file for key, file in self._files.items() if key[0] is owner}

    async def _close_one(self) -> bool:
        """Close the file that nobody has used for longest; say whether there was one."""
        idle = next((key for key, file in self._files.items() if not file.users), None)
        if idle is None:
            return False
        file = self._files.pop(idle)  # before the await: nobody may take it meanwhile
        await settled(asyncio.ensure_future(file.close()))
        return True


def _allowed() -> int:
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return _MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(min(_MOST, soft // 4), 1)
