"""Looks at folders and reads small files, by aiofiles, without blocking the event loop.

A read is three calls on a thread (open, read, close) and one copy: right for a list of names or a
rank's part of a save, of which there are a few. The bytes of shards go by way of `local.py`.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, Self, TypeVar

from aiofiles.threadpool import wrap

from asyncloader._threads.call import Reading, StalledError
from asyncloader._threads.disk import Disk
from asyncloader._threads.jobs import settled
from asyncloader._threads.pool import WorkerPool
from asyncloader.errors import CheckpointError

from .descriptors import close_aside
from .opening import open_regular

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Executor
    from io import BufferedReader
    from pathlib import Path


T = TypeVar("T")
P = ParamSpec("P")


async def read_file(path: Path, executor: Executor, *, last: int = -1) -> bytes:
    """Return the content of a regular file.

    A caller that is cancelled waits for the thread, as long as the executor does.

    Args:
        path: The file. A link is followed.
        executor: Its threads open, read and close the file.
        last: Bytes at the end of the file that are read; a negative number reads all of it.

    Raises:
        OSError: If it is no regular file, or cannot be read.
    """
    return await settled(asyncio.ensure_future(_read(path, executor, last)))


async def _read(path: Path, executor: Executor, last: int) -> bytes:
    loop = asyncio.get_running_loop()
    # Not `async with aiofiles.open(…)`: that closes the file on the event loop's own threads, for
    # which the end of the program waits, though the disk is gone.
    opened = await loop.run_in_executor(executor, partial(_opened, path))
    file = wrap(opened, executor=executor)
    try:
        if last >= 0:
            size = await file.seek(0, os.SEEK_END)
            await file.seek(max(size - last, 0))
        content: bytes = await file.read(last)
    except (StalledError, asyncio.CancelledError):
        close_aside([opened])  # waits for the thread that may still read
        raise
    except BaseException:
        await file.close()
        raise
    await file.close()
    return content


def _opened(path: Path) -> BufferedReader:
    fd, _ = open_regular(path, os.O_RDONLY, follow=True)
    return open(fd, "rb")  # noqa: PTH123  # a descriptor


class Looks:
    """Looks at a folder and reads small files in it, on a thread of its own.

    The event loop's own threads would not do: the end of the program waits for them, though the
    disk is gone. Belongs to one event loop.

    Args:
        location: What is looked at, for messages.
        stall_timeout: Seconds after which a look is given up if the disk gives no answer; `None`
            waits for ever.
    """

    def __init__(self, location: str, *, stall_timeout: float | None) -> None:
        self._location = location
        self._is_closed = False
        self._workers = WorkerPool(1, name="asyncloader-look")
        self._disk = Disk(self._workers, seconds=stall_timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Look no more; wait for the thread to end, which it does at once if it is idle."""
        self._is_closed = True
        # A command may still look at a disk that gives no answer: it will be given up.
        self._workers.shutdown(wait=self._disk.is_idle)

    async def __call__(self, look: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `look` returns.

        Raises:
            CheckpointError: If there was no answer.
            RuntimeError: If this is closed.
            Exception: What `look` raises.
        """
        return await self._answered(self._disk.call(partial(look, *args, **kwargs)))

    async def at_many(self, look: Callable[[Callable[[], None]], T]) -> T:
        """Return what a look at many files returns; each gets the whole stall time-out.

        Args:
            look: Gets a function to call before each file.

        Raises:
            Exception: What a call raises.
        """
        reading = Reading(self._location)
        tick = partial(reading.begin, 0, ())
        return await self._answered(self._disk.call(partial(look, tick), reading=reading))

    async def read(self, path: Path, *, last: int) -> bytes:
        """Return the end of a regular file, at most `last` bytes of it.

        Raises:
            CheckpointError: If there was no answer.
            RuntimeError: If this is closed.
            OSError: If it is no regular file, or cannot be read.
        """
        return await self._answered(read_file(path, self._disk.executor(path), last=last))

    async def _answered(self, look: Awaitable[T]) -> T:
        try:
            return await look
        except StalledError as error:
            raise CheckpointError(self._location, f"cannot be looked at: {error}") from error
        except RuntimeError as error:
            if not self._is_closed:
                raise
            problem = f"{self._location!r}: left: use it within its `async with` block"
            raise RuntimeError(problem) from error
