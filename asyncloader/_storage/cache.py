"""Copies of objects on the local disk, which loads read in place of the store, and share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._threads.call import nbytes_of

from .cached_copy import Copy, Marks
from .cached_room import first_of_name, make_room, name_of
from .opening import RefusedFileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


_log = logging.getLogger(__name__)

_LOCK = ".lock"
_PATIENCE = 1.0  # seconds for the lock, which is held for moments, but by a process that is stopped
_LONG = 30.0  # where a table needs what is to be kept
_MOST_OPEN = 128
_ATTEMPTS = 5


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
    meanwhile: whether it came to the disk before the power went, was cut, or written to. (Rows of a
    table that holds a copy open are compared before, once: `ensure`.)

    Nothing fails because of a copy: what cannot be read or written is read from the store. For
    threads; all but the attributes may wait for the disk.

    Args:
        folder: Is made, for this user alone. One that belongs to another, or that others can write
            to, is not used.
        most: Bytes that it may hold; `None` leaves a tenth of the disk free. Copies that were not
            used for longest are removed for others, those alone that no load or table has open.

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
        self._marks: dict[str, Marks] = {}
        self._needed: dict[Object, list[tuple[int, int]]] = {}
        self._writes = threading.Lock()  # a thread keeps at a time, of all processes
        self._patience = _PATIENCE
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
        return first_of_name(url) in self._known

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
                    self._damaged += damaged is not None
        return count

    def next_after(self, what: Object, offset: int) -> int:
        """Return the first byte behind this one that is here; the object's length if none is."""
        found = what.size
        with self._bearing(), self._using(what) as copy, self._lock:
            if copy is not None:
                found = copy.pieces.next_after(offset, what.size)
        return found

    def keep(self, what: Object, offset: int, views: Sequence[memoryview]) -> None:
        """Keep what was read of an object.

        Raises:
            OSError: If a table needs it here, and it could not be kept.
        """
        nbytes, kept = nbytes_of(views), False
        needed = any(
            begin < offset + nbytes and offset < end for begin, end in self._needed.get(what, ())
        )
        with self._bearing(), self._using(what) as copy:
            if copy is not None and self._has_room(nbytes):
                try:
                    with self._writes, self._locked(_LONG if needed else self._patience):
                        copy.keep(offset, views)
                        kept = True
                finally:
                    with self._lock:
                        self._writing -= nbytes
        if needed and not kept:
            raise self._refusal(what)

    def hold(self, what: Object, ranges: Sequence[tuple[int, int]]) -> int:
        """Return a descriptor of a copy; as long as it is open, the copy stays.

        Args:
            what: The object.
            ranges: What of it is needed here: (first byte, one past the last).

        Raises:
            OSError: If there can be no copy.
        """
        with self._bearing(), self._using(what) as copy:
            if copy is not None and self._keeps:
                self._needed.setdefault(what, []).extend(ranges)
                return copy.lend()
        raise self._refusal(what)

    def ensure(self, what: Object) -> None:
        """Make sure that what is needed of an object is here, on the disk, as it came.

        From then on nobody compares digests, and no other process writes there: all is recorded.

        Raises:
            OSError: If some of it is not here.
        """
        with self._bearing(), self._using(what) as copy:
            if copy is not None:
                with self._writes, self._locked(_LONG):
                    copy.record()
                copy.sync()
                if all(copy.holds(*one) for one in self._needed[what]):
                    return
        raise self._refusal(what)

    def _refusal(self, what: Object) -> OSError:
        why = f": {self._trouble}" if self._trouble is not None else ""
        problem = f"its rows could not be kept in {self._folder}{why}"
        return RefusedFileError(errno.ENOSPC, problem, what.url)

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
        except BlockingIOError as error:  # once: who holds a lock may be stopped
            self._trouble, self._patience = error, 0.0
        except Exception as error:  # noqa: BLE001  # nothing fails because of a copy
            self._trouble, self._keeps = error, False

    @contextlib.contextmanager
    def _using(self, what: Object) -> Iterator[Copy | None]:
        """Lend the copy of an object; `None` if there shall be none."""
        name = name_of(what.url, f"{what.size} {what.tag}")
        with self._lock:
            copy = self._copies.get(name)
            if copy is None and self._is_open:
                self._leave_one()
                copy = self._copies[name] = self._opened(name, what.url)
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

    def _opened(self, name: str, url: str) -> Copy:
        """Open a copy; again if another process was just removing it."""
        path, marks = self._folder / name, self._marks.setdefault(name, Marks())
        for attempt in range(_ATTEMPTS):
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                return Copy(path, url, marks)
            time.sleep(attempt * _PATIENCE / 100)
        return Copy(path, url, marks)

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
                    self._room = make_room(self._folder, nbytes, self._most, self._writing)
                if self._room < nbytes:
                    problem = (
                        "full of what is being loaded, or tables have open: give more cache_bytes"
                    )
                    raise OSError(errno.ENOSPC, problem, str(self._folder))
            if self._keeps:
                self._room -= nbytes
                self._writing += nbytes
            return self._keeps

    @contextlib.contextmanager
    def _locked(self, patience: float = _PATIENCE) -> Iterator[None]:
        """Keep other processes from copies and records for the length of the block."""
        fd = os.open(
            self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            until = time.monotonic() + patience
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
