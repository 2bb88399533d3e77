"""Copies of objects on the local disk, which loads read in place of the store, and share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from asyncloader._threads.call import nbytes_of

from .cached_copy import DATA, RECORD, Copy, last_use
from .protocol import views_after

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


_log = logging.getLogger(__name__)

_LOCK = ".lock"
# Written at a time before room is looked for, and what is there is recorded: a killed load loses
# no more, and processes go beyond the bound by no more.
_STEP = 256 << 20
_STEPS = 16  # or as many of all that there may be
_MOST_OPEN = 128
_SPARE = 0.1  # of a disk, where no bound is given
_NAME_LETTERS = 32
_BLOCK = 512  # bytes of which `st_blocks` counts


class Cache:
    """Copies of objects in a folder: of each a sparse file, and a record of the ranges it holds.

    A copy is named by the object's URL, and by its ETag and length: it never changes. So processes
    that fill it at once write the same bytes to the same places. A range counts once it is
    recorded, and a record counts until the machine is started anew: then nobody knows which bytes
    had come to the disk. Ranges, not whole objects, as a rank reads its share of each.

    Nothing fails because of a copy: what cannot be read or written is read from the store. For
    threads; all but `trouble` and `taken` may wait for the disk.

    Args:
        folder: Is made, for this user alone. Who can write to it is trusted.
        most: Bytes that it may hold; `None` leaves a tenth of the disk free. Copies that were not
            used for longest are removed for others.

    Attributes:
        taken: Bytes that came from copies of earlier loads.
        trouble: What kept a copy from being read or written; none is since then.
        is_full: Whether bytes were not kept, as there was no room for them.
    """

    def __init__(self, folder: Path, most: int | None) -> None:
        self.taken = 0
        self.trouble: OSError | None = None
        self.is_full = False
        self.folder = folder
        self._most = most
        self._lock = threading.RLock()
        self._known: set[str] = set()
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._used: set[str] = set()
        self._room = 0
        self._is_closed = False

    def open(self) -> None:
        """Make the folder, and look which objects it has copies of."""
        with self._bearing():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._known = {file.name.partition("-")[0] for file in self.folder.iterdir()}

    def knows(self, url: str) -> bool:
        """Say whether there was a copy of an object, maybe an older one."""
        return _digest(url) in self._known

    def extent(self, url: str, tag: str, size: int, offset: int) -> tuple[bool, int]:
        """Say whether a byte of an object is here, and from which byte on that is different."""
        if self.trouble is None:
            with self._bearing(), self._using(url, tag, size) as copy, self._lock:
                if (end := copy.extents.end_of(offset)) is not None:
                    return True, end
                return False, copy.extents.next_after(offset, size)
        return False, size

    def read(self, url: str, tag: str, size: int, offset: int, views: Sequence[memoryview]) -> int:
        """Fill views with what is here, and return how many bytes came; 0 if none could be read."""
        count = 0
        with self._bearing(), self._using(url, tag, size) as copy:
            count = os.preadv(copy.fd, views, offset)
            if not count:
                raise OSError(errno.EIO, "a copy is shorter than it was", str(copy.path))
            with self._lock:
                self.taken += count * copy.was_here
        return count

    def write(
        self, url: str, tag: str, size: int, offset: int, views: Sequence[memoryview]
    ) -> None:
        """Keep what was read of an object."""
        nbytes = nbytes_of(views)
        if self.trouble is not None:
            return
        with self._bearing(), self._using(url, tag, size) as copy:
            if not self._make_room(nbytes):
                return
            end = offset
            while end < offset + nbytes:
                end += os.pwritev(copy.fd, views_after(views, end - offset), end)
            with self._lock:
                copy.extents.add(offset, end)
                copy.is_new = True

    def forget(self, url: str) -> None:
        """Remove the copies of objects of which one makes no sense: the copy may be to blame.

        Args:
            url: Of the object, or a folder's: then all that was used is removed.
        """
        with self._bearing(), self._lock, self._locked():
            mine = {name for name in self._used if name.startswith(_digest(url))}
            for name in mine or self._used:
                self._remove(self.folder / name)

    def close(self) -> None:
        """Record what is here.

        A thread that was given up may still use a copy; it closes that copy when it is done.
        """
        with self._lock:
            self._is_closed = True
            for name in list(self._copies):
                with self._bearing():
                    self._leave(name)

    def tell(self) -> None:
        """Log what went wrong. For the event loop's thread: others may not log (`retrying.py`)."""
        if self.trouble is not None:
            _log.warning("%s: copies were not used: %s", self.folder, self.trouble)
        elif self.is_full:
            _log.info("%s: full of what is being loaded, so some of it was not kept", self.folder)

    @contextlib.contextmanager
    def _bearing(self) -> Iterator[None]:
        """Go on without copies if something fails."""
        try:
            yield
        except OSError as error:
            self.trouble = error

    @contextlib.contextmanager
    def _using(self, url: str, tag: str, size: int) -> Iterator[Copy]:
        name = f"{_digest(url)}-{_digest(f'{size} {tag}')}{DATA}"
        with self._lock:
            if self._is_closed:  # its thread was given up
                raise OSError(errno.EBADF, "the cache is closed")
            copy = self._copies.get(name)
            if copy is None:
                while len(self._copies) >= _MOST_OPEN:
                    idle = (name for name, copy in self._copies.items() if not copy.users)
                    if (longest := next(idle, None)) is None:
                        break
                    self._leave(longest)
                copy = self._copies[name] = self._opened(self.folder / name, url)
                self._used.add(name)
            self._copies.move_to_end(name)
            copy.users += 1
        try:
            yield copy
        finally:
            with self._lock:
                copy.users -= 1
                copy.end()

    def _opened(self, path: Path, url: str) -> Copy:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        copy = Copy(path, url, os.open(path, flags, 0o600))
        with self._locked():
            copy.take_record()
        return copy

    def _leave(self, name: str) -> None:
        """Record what a copy holds, and close it."""
        copy = self._copies.pop(name)
        try:
            self._record(copy)
        finally:
            copy.leave()

    def _record(self, copy: Copy) -> None:
        with self._locked():
            copy.record()

    def _make_room(self, nbytes: int) -> bool:
        """Say whether so many bytes may be written."""
        with self._lock:
            if self._room < nbytes and not self.is_full:
                for copy in self._copies.values():
                    if copy.is_new:
                        self._record(copy)
                with self._locked():
                    self._room = self._evict(nbytes)
            if self._room < nbytes:
                self.is_full = True
                return False
            self._room -= nbytes
            return True

    def _evict(self, nbytes: int) -> int:
        """Remove what was not used for longest, until there is room; return how much to use."""
        copies = sorted((last_use(path), path) for path in self.folder.glob(f"*{DATA}"))
        sizes = {path: path.stat().st_blocks * _BLOCK for _, path in copies}
        held, most = sum(sizes.values()), self._most
        if most is None:
            disk = os.statvfs(self.folder)
            most = round((held + disk.f_bavail * disk.f_frsize) * (1 - _SPARE))
        step = max(nbytes, min(_STEP, most // _STEPS))
        for _, path in copies:
            if held + step <= most:
                break
            if path.name not in self._used:
                self._remove(path)
                held -= sizes[path]
        return min(most - held, step)

    def _remove(self, path: Path) -> None:
        # The record first: of a copy that is killed in between, none of the bytes count.
        for file in (path.with_suffix(RECORD), path):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from records for the length of the block."""
        fd = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_NAME_LETTERS]
