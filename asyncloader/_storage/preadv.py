"""Reads by position: through the page cache, noticing whether that had to wait, and past it.

A cold read through the cache spends more time on taking and filling pages than the device does on
reading, and evicts what others had there. `O_DIRECT` wants file offsets, lengths and addresses that
are multiples of the device's blocks, which headers and tensors hardly ever are; so whole blocks are
read into staging memory, and the bytes asked for are copied from there.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from asyncloader._memory.pages import touch
from asyncloader._threads.call import nbytes_of

from .protocol import views_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asyncloader._threads.call import Reading


PReadV: TypeAlias = "Callable[[int, Sequence[memoryview], int, Reading], int]"

# One call into the kernel. A longer one may keep a processor from the event loop until it is done.
_STEP = 8 << 20
# Linux only. It refuses with EAGAIN where the bytes are not in the page cache, and with one of the
# others where the file system does not know.
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_CANNOT_TELL = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def _steps(views: Sequence[memoryview]) -> Iterator[tuple[Sequence[memoryview], int]]:
    """Cut views, and group them, so that one call into the kernel takes at most a step.

    Yields:
        What one call takes, and how many bytes that are.
    """
    total = nbytes_of(views)
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


# What every device and file system is content with that we know of; most ask for 512.
_BLOCK = 4 << 10
_STAGED = 4 << 20
_HUGE = 2 << 20
# Below it, what numpy costs a copy is more than keeping the interpreter from others.
_SMALL = 64 << 10


class DirectReader:
    """`preadv` for files that were opened with `O_DIRECT`, at any offset, into any memory.

    Takes 4 MiB of staging memory for each thread that reads, until the thread ends.

    Args:
        block: Offsets and lengths are multiples of it.
        step: Bytes of staging memory, and of one call into the kernel.
    """

    def __init__(self, *, block: int = _BLOCK, step: int = _STAGED) -> None:
        self._block = block
        self._step = step
        self._of_thread = threading.local()

    def preadv(self, fd: int, views: Sequence[memoryview], offset: int, reading: Reading) -> int:
        """Fill `views`, one after the other, and return the bytes read; fewer at the file's end.

        Args:
            fd: The file.
            views: At most 1024.
            offset: Of the first byte.
            reading: Learns that the device was waited for.

        Raises:
            OSError: If the device failed.
        """
        reading.waited = True
        staging = self._staging()
        total = sum(view.nbytes for view in views)
        rest = iter(views)
        view = next(rest, memoryview(b""))
        done = 0
        while done < total:
            at = offset + done
            ahead = at % self._block
            left = ahead + total - done
            # In steps that are as long as each other: a short last one costs as much as a long one.
            steps = -(-left // self._step)
            wanted = -(-left // (steps * self._block)) * self._block
            count = _read_past(fd, staging[:wanted], at - ahead)
            end = min(count, ahead + total - done)
            if end <= ahead:  # nothing follows
                break
            done += end - ahead
            while ahead < end:
                while not view.nbytes:
                    view = next(rest)
                length = min(view.nbytes, end - ahead)
                touch([view[:length]])
                _copy(view[:length], staging[ahead : ahead + length])
                view = view[length:]
                ahead += length
        return done

    def _staging(self) -> memoryview:
        staging: memoryview | None = getattr(self._of_thread, "staging", None)
        if staging is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # huge pages are for private ones only
            memory = mmap.mmap(-1, self._step + _HUGE, flags=flags)
            with contextlib.suppress(OSError, AttributeError):
                # Of small pages a device takes as many requests for a read: half of the speed.
                memory.madvise(mmap.MADV_HUGEPAGE)
            start = -np.frombuffer(memory, np.uint8).ctypes.data % _HUGE
            staging = memoryview(memory)[start : start + self._step]
            self._of_thread.staging = staging
        return staging


def _read_past(fd: int, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(fd, [view], offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # Its device wants larger blocks, say. Another thread may have found that out at the same time.
    import fcntl  # noqa: PLC0415  # not everywhere

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return os.preadv(fd, [view], offset)


def _copy(target: memoryview, source: memoryview) -> None:
    if target.nbytes < _SMALL:
        target[:] = source
    else:  # numpy lets other threads run meanwhile
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


read_past = DirectReader().preadv
"""Of all storages: a thread has one staging memory, however many checkpoints it reads."""
