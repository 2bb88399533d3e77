"""A copy of an object on the local disk: a sparse file, and a record of what it holds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from asyncloader._threads.call import nbytes_of

from .cached_pieces import PIECE, Piece, Pieces, digest_of, pieces_of
from .protocol import views_after, views_within

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


DATA, RECORD, NEW = ".bytes", ".json", ".new"
_CREATE = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(slots=True)
class Marks:
    """What a load knows of a copy's pieces, also while the copy is closed.

    Attributes:
        own: Those that it has brought.
        seen: Those whose bytes it has had, from the copy or from the store.
        damaged: Those that had other bytes than were kept; the record may have them for a while.
    """

    own: set[Piece] = field(default_factory=set)
    seen: set[Piece] = field(default_factory=set)
    damaged: set[Piece] = field(default_factory=set)


class Copy:
    """A copy that is open. Its cache sees to it that threads take turns to keep, record and close.

    What one process has recorded, no other one writes again, unless it is damaged.

    Args:
        path: Of the file, which is made if need be.
        url: Of the object, for people who look into a record.
        marks: What this load knows of its pieces.

    Attributes:
        pieces: What it holds.
        users: Threads that are at it.
        is_new: Whether it holds more than its record says.

    Raises:
        OSError: If it cannot be opened, or is being removed.
    """

    def __init__(self, path: Path, url: str, marks: Marks) -> None:
        self.pieces = Pieces()
        self.users = 0
        self.is_new = False
        self._path = path
        self._url = url
        self._marks = marks
        self._read_record: tuple[int, int] | None = None
        self._is_left = False
        self._fd = os.open(path, os.O_RDWR | _CREATE, 0o600)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # so that nobody removes it
            except OSError as error:
                if isinstance(error, BlockingIOError):  # else the file system has no locks
                    raise
            self._check_place()  # or somebody has removed it just before
            self._take_record()
        except BaseException:
            os.close(self._fd)
            raise

    def leave(self) -> None:
        """Close it once no thread uses it."""
        self._is_left = True
        self.end()

    def end(self) -> None:
        """Close it if it is left, and no thread uses it."""
        if self._is_left and not self.users:
            os.close(self._fd)

    def read(
        self, pieces: Sequence[Piece], offset: int, views: Sequence[memoryview]
    ) -> tuple[int, Piece | None]:
        """Fill views from pieces that follow each other, as far as these go.

        Returns:
            How many bytes came that are the same as when they were kept; and the piece that is not.
        """
        end = min(pieces[-1].end, offset + nbytes_of(views))
        self._fill(views := views_within(views, end - offset), offset)
        for piece in pieces:
            begin, stop = max(piece.begin, offset), min(piece.end, end)
            wanted = views_within(views_after(views, begin - offset), stop - begin)
            around = self._bytes(piece.begin, begin), self._bytes(stop, piece.end)
            if digest_of([around[0], *wanted, around[1]]) != piece.digest:
                self._drop(piece)
                return begin - offset, piece
            self._marks.seen.add(piece)
        return end - offset, None

    def keep(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write bytes where there are none yet; compare with them those that are there."""
        self._check_place()
        self._take_record()
        at, end = offset, offset + nbytes_of(views)
        while at < end:
            rest = views_after(views, at - offset)
            if there := self.pieces.following(at, at + 1):
                stop = min(there[0].end, end)
                if not self._is_same(there[0], at, views_within(rest, stop - at)):
                    continue  # it is dropped
            else:
                stop = min(self.pieces.next_after(at, end), end)
                part = views_within(rest, stop - at)
                self._write(at, part)
                for piece in pieces_of(at, part):
                    self._marks.damaged.discard(piece)
                    self.pieces.add(piece)
                    self._marks.own.add(piece)
                    self._marks.seen.add(piece)
                    self.is_new = True
            at = stop

    def _is_same(self, piece: Piece, at: int, views: Sequence[memoryview]) -> bool:
        """Note whether a piece has the bytes that came; drop it, and say no, if it is damaged."""
        held = self._bytes(piece.begin, piece.end)
        if digest_of([held]) != piece.digest:
            self._drop(piece)
            return False
        begin = at - piece.begin
        if digest_of([held[begin : begin + nbytes_of(views)]]) == digest_of(views):
            self._marks.seen.add(piece)
        return True

    def _drop(self, piece: Piece) -> None:
        self._marks.damaged.add(piece)
        self.pieces.drop(piece)

    def holds(self, begin: int, end: int) -> bool:
        """Say whether all bytes of a range are on the disk, the same as this load has had."""
        found = self.pieces.following(begin, end)
        if begin < end and (not found or found[-1].end < end):
            return False
        return self._marks.seen.issuperset(found) and all(
            digest_of([self._bytes(one.begin, one.end)]) == one.digest for one in found
        )

    def lend(self) -> int:
        """Return another descriptor of the file, which keeps it from being removed, too."""
        return os.dup(self._fd)

    def sync(self) -> None:
        """Have the disk write what is in memory; that says also whether some of it was lost."""
        os.fsync(self._fd)

    def _bytes(self, begin: int, end: int) -> memoryview:
        view = memoryview(bytearray(end - begin))
        self._fill([view], begin)
        return view

    def _fill(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill views; where the file ends early, a digest will tell."""
        done, length = 0, nbytes_of(views)
        while done < length:
            count = os.preadv(self._fd, views_after(views, done), offset + done)
            if not count:
                return
            done += count

    def _write(self, offset: int, views: Sequence[memoryview]) -> None:
        done, length = 0, nbytes_of(views)
        while done < length:
            done += os.pwritev(self._fd, views_after(views, done), offset + done)

    def earlier(self, pieces: Iterable[Piece]) -> bool:
        """Say whether earlier loads had kept one of these pieces."""
        return not self._marks.own.issuperset(pieces)

    def record(self) -> None:
        """Write down what it holds, and that it was used; not if its file was removed meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(self._path.lstat(), os.fstat(self._fd)):
                return
            if not self.is_new:
                os.utime(self._path.with_suffix(RECORD))
                return
            self._take_record()
            beside = self._path.with_suffix(NEW)
            beside.unlink(missing_ok=True)  # of one that was killed: others wait for the lock
            text = orjson.dumps({"url": self._url, "pieces": [*map(list, self.pieces.all())]})
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_EXCL | _CREATE, 0o600), "wb") as file:
                file.write(text)
            beside.replace(self._path.with_suffix(RECORD))
            self.is_new = False

    def _check_place(self) -> None:
        """Make sure that the file is still the one of its name.

        Raises:
            OSError: If it is not.
        """
        if not os.path.samestat(self._path.lstat(), os.fstat(self._fd)):
            raise FileNotFoundError(errno.ENOENT, "another file has its place", str(self._path))

    def _take_record(self) -> None:
        """Take pieces that others have recorded since this was looked at last."""
        with contextlib.suppress(FileNotFoundError):
            status = self._path.with_suffix(RECORD).stat()
            if self._read_record != (status.st_ino, status.st_mtime_ns):
                self._read_record = status.st_ino, status.st_mtime_ns
                for piece in _recorded(self._path):
                    if piece not in self._marks.damaged:
                        self.pieces.add(piece)


def last_use(path: Path) -> float:
    """Return when a copy was last used, in seconds of the system's clock."""
    times = [path.lstat().st_mtime]
    with contextlib.suppress(FileNotFoundError):
        times.append(path.with_suffix(RECORD).lstat().st_mtime)
    return max(times)


def remove(path: Path) -> bool:
    """Remove a copy, unless a load uses it; say whether it is gone."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for file in (path.with_suffix(RECORD), path.with_suffix(NEW), path):
                file.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
    return True


def _recorded(path: Path) -> list[Piece]:
    """Return what a copy is recorded to hold; nothing if its record makes no sense."""
    try:
        record: dict[str, Any] = orjson.loads(path.with_suffix(RECORD).read_bytes())
        pieces = [Piece(int(begin), int(end), str(text)) for begin, end, text in record["pieces"]]
        return [one for one in pieces if 0 <= one.begin < one.end <= one.begin + PIECE]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return []
