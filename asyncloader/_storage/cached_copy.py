"""A copy of an object on the local disk: a sparse file, and a record of what it holds."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import xxhash

from asyncloader._threads.call import nbytes_of

from .protocol import views_after, views_within

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


DATA, RECORD, NEW = ".bytes", ".json", ".new"
_PIECE = 1 << 20
_CREATE = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Piece(NamedTuple):
    """Bytes of an object that are kept, at most a MiB, and their digest from when they came."""

    begin: int
    end: int
    digest: str


class Pieces:
    """Pieces of one object, in order; none overlap."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._pieces: list[Piece] = []

    def all(self) -> list[Piece]:
        """Return them, in order."""
        return list(self._pieces)

    def following(self, offset: int, end: int) -> list[Piece]:
        """Return the one that holds a byte, if any, and those next to it, of bytes before `end`."""
        at = max(bisect_right(self._begins, offset) - 1, 0)
        found: list[Piece] = []
        while at < len(self._pieces) and offset < end:
            piece = self._pieces[at]
            if not piece.begin <= offset < piece.end:
                break
            found.append(piece)
            offset, at = piece.end, at + 1
        return found

    def next_after(self, offset: int, last: int) -> int:
        """Return where the next piece begins behind a byte; `last` if none does."""
        at = bisect_right(self._begins, offset)
        return self._begins[at] if at < len(self._begins) else last

    def cover(self, begin: int, end: int) -> bool:
        """Say whether every byte of a range is here."""
        found = self.following(begin, end)
        return begin >= end or (bool(found) and found[-1].end >= end)

    def add(self, piece: Piece) -> bool:
        """Add a piece, unless it overlaps one that is there; say whether it was added."""
        begin, end, _ = piece
        if self.following(begin, end) or self.next_after(begin, end) < end or end <= begin:
            return False
        at = bisect_left(self._begins, begin)
        self._begins.insert(at, begin)
        self._pieces.insert(at, piece)
        return True

    def drop(self, piece: Piece) -> None:
        """Remove a piece, if it is there."""
        if piece in self.following(piece.begin, piece.end):
            at = bisect_left(self._begins, piece.begin)
            del self._begins[at], self._pieces[at]


class Copy:
    """A copy that is open. Its cache sees to it that threads take turns with all but the bytes.

    Args:
        path: Of the file, which is made if need be.
        url: Of the object, for people who look into a record.

    Attributes:
        pieces: What it holds.
        users: Threads that are at it.
        is_new: Whether it holds more than its record says.
    """

    def __init__(self, path: Path, url: str) -> None:
        self.pieces = Pieces()
        self.users = 0
        self.is_new = False
        self._path = path
        self._url = url
        self._own: set[Piece] = set()  # of this load, which brought them here
        self._is_left = False
        self._add(_recorded(path))
        self._fd = os.open(path, os.O_RDWR | _CREATE, 0o600)
        with contextlib.suppress(OSError):  # nobody removes it meanwhile, who sees that it is used
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

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
                return begin - offset, piece
        return end - offset, None

    def lend(self) -> int:
        """Sync the file, and return another descriptor of it, which keeps it from being removed."""
        os.fsync(self._fd)  # says also whether pages were lost on their way to the disk
        return os.dup(self._fd)

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

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write bytes of pieces, which count once these are added."""
        done, length = 0, nbytes_of(views)
        while done < length:
            done += os.pwritev(self._fd, views_after(views, done), offset + done)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Have pieces count that were written."""
        for piece in pieces:
            if self.pieces.add(piece):
                self._own.add(piece)
                self.is_new = True

    def earlier(self, pieces: Iterable[Piece]) -> bool:
        """Say whether earlier loads had kept one of these pieces."""
        return not self._own.issuperset(pieces)

    def record(self) -> None:
        """Write down what it holds, and that it was used; not if its file was removed meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(self._path.lstat(), os.fstat(self._fd)):
                return
            if not self.is_new:
                os.utime(self._path.with_suffix(RECORD))
                return
            self._add(_recorded(self._path))
            beside = self._path.with_suffix(NEW)
            beside.unlink(missing_ok=True)  # of one that was killed: others wait for the lock
            text = orjson.dumps({"url": self._url, "pieces": [*map(list, self.pieces.all())]})
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_EXCL | _CREATE, 0o600), "wb") as file:
                file.write(text)
            beside.replace(self._path.with_suffix(RECORD))
            self.is_new = False

    def _add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self.pieces.add(piece)


def pieces_of(offset: int, views: Sequence[memoryview]) -> list[Piece]:
    """Return the pieces to keep of bytes that have just come; they end at whole MiB."""
    end = offset + nbytes_of(views)
    inner = range((offset // _PIECE + 1) * _PIECE, end, _PIECE)
    found = []
    for begin, stop in itertools.pairwise([offset, *inner, end]):
        part = views_within(views_after(views, begin - offset), stop - begin)
        found.append(Piece(begin, stop, digest_of(part)))
    return found


def digest_of(views: Iterable[memoryview]) -> str:
    """Return the digest of the bytes of all views together. Holds no GIL while it computes."""
    digest = xxhash.xxh3_128()
    for view in views:
        digest.update(view)
    return digest.hexdigest()


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
        return [one for one in pieces if 0 <= one.begin < one.end <= one.begin + _PIECE]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return []
