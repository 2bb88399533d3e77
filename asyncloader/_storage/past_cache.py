"""Reads past the page cache where that pays: of files that are not in it, and that nobody shares.

Filling the page cache takes longer than a fast device takes to deliver; but what is in it need not
be read at all. So each large read is looked at by itself: a byte at its beginning, middle and end
says whether it is there (`RWF_NOWAIT`; `mincore` tells nothing of files that are not one's own).

Several processes that load a checkpoint at a time should read the device once, by way of the cache.
They know of each other by locks (`flock`) on one of its files: whoever cannot have it alone for a
moment is not alone. (The folder itself is locked by who saves into it.)
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
from typing import TYPE_CHECKING

from .opening import O_DIRECT, open_regular
from .preadv import preadv as through_cache
from .preadv import read_past

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from asyncloader._threads.call import Reading

    from .preadv import PReadV


# Bytes. The page cache reads ahead of shorter ones, and headers are read again.
_LEAST = 1 << 20
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_BLOCKS = (512, 4096)
"""What devices and file systems are content with."""


def open_past_cache(fd: int) -> tuple[int, int] | None:
    """Open an open file for reads past the page cache.

    Returns:
        A descriptor, and what places and lengths in the file are to be multiples of; `None` where
        the file system reads all files through the cache.
    """
    if not O_DIRECT:
        return None
    try:  # by its descriptor, as another file may have its name by now
        past = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | O_DIRECT)
    except OSError:
        return None
    with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view:
        for block in _BLOCKS:
            try:
                os.preadv(past, [view[:block]], block)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue  # it wants larger ones
                return past, _BLOCKS[-1]  # the read that follows will say what is wrong
            return past, block
    os.close(past)
    return None


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Say whether bytes are in the page cache, as far as three of them tell.

    Where the system does not know, they count as if they were.
    """
    if not _NOWAIT:
        return True
    byte = bytearray(1)
    for at in (offset, offset + length // 2, offset + length - 1):
        try:
            os.preadv(fd, [byte], at, _NOWAIT)
        except OSError as error:
            return error.errno != errno.EAGAIN
        except NotImplementedError:  # a library of C without preadv2
            return True
    return True


class Company:
    """Knows whether others, of this process or of another one, load the same checkpoint now.

    Args:
        folder: Of it, one file is locked, shared, from `join` to `close`.
        names: Of files: the first one that is there is locked.
        follow: Whether a symbolic link may lead out of the folder.
    """

    def __init__(self, folder: Path, names: Sequence[str] = (), *, follow: bool = False) -> None:
        self._paths = [folder / name for name in names]
        self._follow = follow
        self._lock = threading.Lock()  # held for no call that may wait for the disk, but `is_alone`
        self._fd: int | None = None
        self._has_joined = False
        self._is_closed = False

    def join(self, path: Path) -> None:
        """Let others know of us, once; belongs on a thread.

        Args:
            path: Of a file that is there, in case that none of `names` is.
        """
        with self._lock:
            if self._has_joined:  # or a thread is about to
                return
            self._has_joined = True
        for one in (*self._paths, path):
            with contextlib.suppress(OSError):  # a file system that locks nothing, too
                fd, _ = open_regular(one, os.O_RDONLY, follow=self._follow)
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                with self._lock:
                    if not self._is_closed:
                        self._fd = fd
                        return
                os.close(fd)
                return

    def is_alone(self) -> bool:
        """Say whether there is nobody else; belongs on a thread."""
        with self._lock:
            if self._fd is None:
                return False
            try:  # this lets go of the shared lock first
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # others have it, or a network's file system cannot tell
                alone = False
            else:
                alone = True
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return alone

    def close(self) -> None:
        """Be no company any more; belongs on a thread if a thread may be stuck in `is_alone`."""
        with self._lock:
            self._is_closed = True
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


class ChoosingReader:
    """Reads each range the way that pays.

    Args:
        alone: Says whether nobody else loads the same checkpoint.
        cached: Says whether a range is in the page cache.
        through: Reads through the page cache.
        past: Reads past it.
    """

    def __init__(
        self,
        alone: Callable[[], bool],
        *,
        cached: Callable[[int, int, int], bool] = is_cached,
        through: PReadV = through_cache,
        past: PReadV | None = None,
    ) -> None:
        self._cached = cached
        self._alone = alone
        self._through = through
        self._past = past or read_past

    def preadv(
        self,
        fd: int,
        past_cache: Callable[[], int | None],
        views: Sequence[memoryview],
        offset: int,
        reading: Reading,
    ) -> int:
        """Fill `views`, one after the other, and return the bytes read.

        Args:
            fd: The file.
            past_cache: Opens it for reads past the page cache, once.
            views: At most 1024.
            offset: Of the first byte.
            reading: Learns whether the device was waited for.
        """
        if reading.length >= _LEAST and not self._cached(fd, offset, reading.length):
            past = past_cache()
            if past is not None and self._alone():
                return self._past(past, views, offset, reading)
        return self._through(fd, views, offset, reading)
