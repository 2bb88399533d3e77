"""Reads by position, in steps, and notices whether that had to wait."""

from __future__ import annotations

import errno
import os
import threading
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from asyncloader._memory.pages import touch

from .protocol import views_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asyncloader._threads.call import Reading


PReadV: TypeAlias = "Callable[[int, Sequence[memoryview], int, Reading], int]"

# One call into the kernel. A longer one may keep a processor from the event loop until it is done.
_STEP = 8 << 20
_NBYTES = attrgetter("nbytes")
# Linux only. It refuses with EAGAIN where the bytes are not in the page cache, and with one of the
# others where the file system does not know.
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_CANNOT_TELL = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


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

    def preadv(fd: int, views: Sequence[memoryview], offset: int, reading: Reading) -> int:
        """Fill views, and note whether that took bytes which were not in memory yet."""
        done = 0
        reading.unsure |= not _NOWAIT
        for step, length in _steps(views):
            touch(step)
            count = 0
            if not (reading.waited or reading.unsure):
                try:  # as much as need not be waited for
                    count = os.preadv(fd, step, offset + done, _NOWAIT)
                except (OSError, NotImplementedError) as error:
                    reading.unsure = _cannot_tell(error)
            if count < length:
                reading.waited = not reading.unsure
                left = views_after(step, count) if count else step
                count += os.preadv(fd, left, offset + done + count)
            done += count
            if count < length:
                break
        return done

    def _cannot_tell(error: OSError | NotImplementedError) -> bool:
        """Say whether the system cannot tell what is in memory.

        Raises:
            OSError: If reading failed.
        """
        if isinstance(error, OSError) and error.errno == errno.EAGAIN:
            return False
        if isinstance(error, OSError) and error.errno not in _CANNOT_TELL:
            raise error
        return True  # or a C library without preadv2

else:  # Windows: one position a descriptor, so one reader at a time
    _seek_and_read = threading.Lock()

    def preadv(fd: int, views: Sequence[memoryview], offset: int, reading: Reading) -> int:
        reading.waited = True
        with _seek_and_read, open(fd, "rb", buffering=0, closefd=False) as file:
            file.seek(offset)
            return file.readinto(views[0]) or 0
