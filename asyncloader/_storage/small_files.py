"""Reads small files by aiofiles, without blocking the event loop.

A read is three calls on a thread (open, read, close) and one copy: right for a list of names or a
rank's part of a save, of which there are a few. The bytes of shards go by way of `local.py`.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

from aiofiles.threadpool import wrap

from asyncloader._threads.call import StalledError
from asyncloader._threads.jobs import settled

from .descriptors import close_aside
from .opening import open_regular

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from io import BufferedReader
    from pathlib import Path


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
