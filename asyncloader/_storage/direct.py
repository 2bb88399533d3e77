"""Reads past the page cache.

A cold read through the cache spends more time on taking and filling pages than the device does on
reading, and evicts what others had there. `O_DIRECT` wants file offsets, lengths and addresses that
are multiples of the device's blocks, which headers and tensors hardly ever are; so whole blocks are
read into staging memory, and what was asked for is copied from there.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._memory.pages import touch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncloader._threads.call import Reading


# What every device and file system is content with that we know of; most ask for 512.
_BLOCK = 4 << 10
_STEP = 4 << 20
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

    def __init__(self, *, block: int = _BLOCK, step: int = _STEP) -> None:
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
            count = _read(fd, staging[:wanted], at - ahead)
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


def _read(fd: int, view: memoryview, offset: int) -> int:
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
