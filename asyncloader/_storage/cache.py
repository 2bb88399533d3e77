"""Copies of objects on the local disk, which loads read in place of the store, and share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._threads.call import nbytes_of

from .cached_copy import DATA, Copy, Piece, last_use, remove
from .opening import RefusedFileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path


_log = logging.getLogger(__name__)

_LOCK = ".lock"
_PATIENCE = 1.0  # seconds for the lock, which is held for moments, but by a process that is stopped
# Written at a time before room is looked for, and what is there is recorded: a killed load loses
# no more, and processes go beyond the bound by no more.
_STEP = 256 << 20
_STEPS = 16  # or as many of all that there may be
_MOST_OPEN = 128
_SPARE = 0.1  # of a disk, where no bound is given
_LETTERS = 32
_NAME = re.compile(rf"[0-9a-f]{{{_LETTERS}}}-[0-9a-f]{{{_LETTERS}}}{re.escape(DATA)}")
_BLOCK = 512  # bytes of which `st_blocks` counts


class Object(NamedTuple):
    """What there is a copy of: an object, as it is now."""

    url: str
    tag: str
    size: int


class Cache:
    """Copies of objects in a folder: of each a sparse file, and a record of its pieces.

    A copy is named by the object's URL, ETag and length: what it holds never changes. So processes
    may fill it at once. A piece is a MiB, or what came of it; its digest was taken as it came, and
    is compared whenever it is taken from the copy. So it need not be known what became of the file
    meanwhile: whether it came to the disk before the power went, was cut, or written to.

    Nothing fails because of a copy: what cannot be read or written is read from the store. For
    threads; all but the attributes may wait for the disk.

    Args:
        folder: Is made, for this user alone. One that belongs to another, or that others can write
            to, is not used.
        most: Bytes that it may hold; `None` leaves a tenth of the disk free. Copies that were not
            used for longest are removed for others, those alone that no load has open.

    Attributes:
        taken: Bytes that came from copies of earlier loads.
    """

    def __init__(self, folder: Path, most: int | None) -> None:
        self.taken = 0
        self._folder = folder
        self._most = most
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._room = 0  # bytes that may be written before room is looked for again
        self._writing = 0  # bytes that the disk may not show yet
        self._keeps = False  # whether what is read is written
        self._is_open = False
        self._trouble: Exception | None = None
        self._damaged = 0

    def open(self) -> None:
        """Make the folder, and look which objects it has copies of."""
        with self._bearing():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self._folder.stat()
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                problem = "others can write to it: name a folder in it, which will be made"
                raise PermissionError(errno.EPERM, problem, str(self._folder))
            self._known = {file.name.partition("-")[0] for file in self._folder.iterdir()}
            self._is_open = self._keeps = True

    def knows(self, url: str) -> bool:
        """Say whether there was a copy of an object, maybe an older one."""
        return _digest(url) in self._known

    def read(self, what: Object, offset: int, views: Sequence[memoryview]) -> int:
        """Fill views with what is here, and return how many bytes came; 0 if none is here.

        The views are apart: of memory that is filled twice, no digest is right.
        """
        count = 0
        with self._bearing(), self._using(what) as copy:
            with self._lock:
                end = offset + nbytes_of(views)
                pieces = [] if copy is None else copy.pieces.following(offset, end)
            if copy is not None and pieces:
                count, damaged = copy.read(pieces, offset, views)
                with self._lock:
                    self.taken += count * copy.earlier(pieces)
                    if damaged is not None:
                        copy.pieces.drop(damaged)
                        self._damaged += 1
        return count

    def next_after(self, what: Object, offset: int) -> int:
        """Return the first byte behind this one that is here; the object's length if none is."""
        found = what.size
        with self._bearing(), self._using(what) as copy, self._lock:
            if copy is not None:
                found = copy.pieces.next_after(offset, what.size)
        return found

    def keep(
        self, what: Object, offset: int, views: Sequence[memoryview], pieces: Sequence[Piece]
    ) -> None:
        """Keep what was read of an object."""
        nbytes = nbytes_of(views)
        with self._bearing(), self._using(what) as copy:
            if copy is None or not self._has_room(nbytes):
                return
            try:
                copy.write(offset, views)
            finally:
                with self._lock:
                    self._writing -= nbytes
            with self._lock:
                copy.add(pieces)

    def lend(self, what: Object, ranges: Iterable[tuple[int, int]]) -> int:
        """Return a descriptor of a copy; as long as it is open, the copy stays.

        What is in a copy is never written again with other bytes. So who reads it from now on
        compares no digests, but what was written has to be on the disk.

        Raises:
            OSError: If some of these bytes are not here.
        """
        with self._using(what) as copy, self._bearing():
            with self._lock:
                is_whole = copy is not None and all(copy.pieces.cover(*one) for one in ranges)
            if copy is not None and is_whole:
                return copy.lend()
        why = f": {self._trouble}" if self._trouble is not None else ""
        problem = f"its rows could not be kept in {self._folder}{why}"
        raise RefusedFileError(errno.ENOSPC, problem, what.url)

    def close(self) -> None:
        """Record what is here.

        A thread that was given up may still use a copy; it closes that copy when it is done.
        """
        with self._lock:
            self._is_open = False
            while self._copies:
                with self._bearing():
                    self._leave(next(iter(self._copies)))

    def tell(self) -> None:
        """Log what went wrong. For the event loop's thread: others may not log (`retrying.py`)."""
        if self._trouble is not None:
            _log.warning("%s: not all was kept: %s", self._folder, self._trouble)
        if self._damaged:
            text = "%s: %d pieces had other bytes than were kept, and were read from the store"
            _log.warning(text, self._folder, self._damaged)

    @contextlib.contextmanager
    def _bearing(self) -> Iterator[None]:
        """Go on, but keep no more, if something fails."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # nothing fails because of a copy
            self._trouble, self._keeps = error, False

    @contextlib.contextmanager
    def _using(self, what: Object) -> Iterator[Copy | None]:
        """Lend the copy of an object; `None` if there shall be none."""
        name = f"{_digest(what.url)}-{_digest(f'{what.size} {what.tag}')}{DATA}"
        with self._lock:
            copy = self._copies.get(name)
            if copy is None and self._is_open:
                self._leave_one()
                copy = self._copies[name] = Copy(self._folder / name, what.url)
            if copy is not None:
                self._copies.move_to_end(name)
                copy.users += 1
        try:
            yield copy
        finally:
            if copy is not None:
                with self._lock:
                    copy.users -= 1
                    copy.end()

    def _leave_one(self) -> None:
        """Make room for one more, if so many are open, and one is idle."""
        idle = (name for name, copy in self._copies.items() if not copy.users)
        if len(self._copies) >= _MOST_OPEN and (name := next(idle, None)) is not None:
            self._leave(name)

    def _leave(self, name: str) -> None:
        """Record what a copy holds, and close it."""
        copy = self._copies.pop(name)
        try:
            with self._locked():
                copy.record()
        finally:
            copy.leave()

    def _has_room(self, nbytes: int) -> bool:
        """Say whether so many bytes may be written."""
        with self._lock:
            if self._room < nbytes and self._keeps:
                with self._locked():
                    for copy in self._copies.values():
                        if copy.is_new:
                            copy.record()
                    self._room = self._evict(nbytes)
                if self._room < nbytes:
                    problem = "full of what is being loaded"
                    raise OSError(errno.ENOSPC, problem, str(self._folder))
            if self._keeps:
                self._room -= nbytes
                self._writing += nbytes
            return self._keeps

    def _evict(self, nbytes: int) -> int:
        """Remove what was not used for longest, until there is room; return how much to use."""
        mine = [file for file in self._folder.iterdir() if _NAME.fullmatch(file.name)]
        copies = sorted((last_use(path), path) for path in mine)
        sizes = {path: path.lstat().st_blocks * _BLOCK for path in mine}
        held, most = sum(sizes.values()) + self._writing, self._most
        if most is None:
            disk = os.statvfs(self._folder)
            most = round((held + disk.f_bavail * disk.f_frsize) * (1 - _SPARE))
        step = max(nbytes, min(_STEP, most // _STEPS))
        for _, path in copies:
            if held + step <= most:
                break
            if remove(path):
                held -= sizes[path]
        return min(most - held, step)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from records for the length of the block."""
        fd = os.open(
            self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            until = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise BlockingIOError(
                            errno.EAGAIN, "another process holds its lock", str(self._folder)
                        ) from None
                time.sleep(_PATIENCE / 100)
            try:
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child of this process may have it open, too
        finally:
            os.close(fd)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_LETTERS]
