"""Which bytes of an object a copy holds: pieces of at most a MiB, and their digests."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from asyncloader._threads.call import nbytes_of

from .protocol import views_after, views_within

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


PIECE = 1 << 20


class Piece(NamedTuple):
    """Bytes of an object that are kept, at most a MiB, and their digest from when they came."""

    begin: int
    end: int
    digest: str


class Pieces:
    """Pieces of one object, in order; none overlap. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._begins: list[int] = []
        self._pieces: list[Piece] = []

    def all(self) -> list[Piece]:
        """Return them, in order."""
        with self._lock:
            return list(self._pieces)

    def following(self, offset: int, end: int) -> list[Piece]:
        """Return the one that holds a byte, if any, and those next to it, of bytes before `end`."""
        found: list[Piece] = []
        with self._lock:
            at = max(bisect_right(self._begins, offset) - 1, 0)
            while at < len(self._pieces) and offset < end:
                piece = self._pieces[at]
                if not piece.begin <= offset < piece.end:
                    break
                found.append(piece)
                offset, at = piece.end, at + 1
        return found

    def next_after(self, offset: int, last: int) -> int:
        """Return where the next piece begins behind a byte; `last` if none does."""
        with self._lock:
            at = bisect_right(self._begins, offset)
            return self._begins[at] if at < len(self._begins) else last

    def add(self, piece: Piece) -> bool:
        """Add a piece, unless it overlaps one that is there; say whether it was added."""
        begin, end, _ = piece
        with self._lock:
            if self.following(begin, end) or self.next_after(begin, end) < end or end <= begin:
                return False
            at = bisect_left(self._begins, begin)
            self._begins.insert(at, begin)
            self._pieces.insert(at, piece)
            return True

    def drop(self, piece: Piece) -> None:
        """Remove a piece, if it is there."""
        with self._lock:
            if piece in self.following(piece.begin, piece.end):
                at = bisect_left(self._begins, piece.begin)
                del self._begins[at], self._pieces[at]


def pieces_of(offset: int, views: Sequence[memoryview]) -> list[Piece]:
    """Return the pieces to keep of bytes that have just come; they end at whole MiB."""
    end = offset + nbytes_of(views)
    inner = range((offset // PIECE + 1) * PIECE, end, PIECE)
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
