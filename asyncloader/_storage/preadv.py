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

    from asyncloader._threads.pace import Seen


PReadV: TypeAlias = "Callable[[int, Sequence[memoryview], int, Seen], int]"

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

    def preadv(fd: int, views: Sequence[memoryview], offset: int, seen: Seen) -> int:
        """Fill views, and say whether that took bytes which were not in memory yet."""
        done = 0
        for step, length in _steps(views):
            touch(step)
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

    def preadv(fd: int, views: Sequence[memoryview], offset: int, seen: Seen) -> int:
        seen.waited = True
        with _seek_and_read, open(fd, "rb", buffering=0, closefd=False) as file:
            file.seek(offset)
            return file.readinto(views[0]) or 0
