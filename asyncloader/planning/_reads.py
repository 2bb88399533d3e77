"""Which single reads carry out a plan. No I/O; the result is what an executor would issue."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["GAP", "MAX_PIECES", "Extent", "Piece", "Read", "plan_reads"]

GAP = -1
"""The sink of bytes that nobody wants."""

MAX_PIECES = 1024
"""Buffers of one `preadv`: `IOV_MAX` of Linux and macOS."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes that lie side by side on disk and belong to one sink."""

    shard: str

    offset: int
    """First byte within the shard."""

    length: int
    """Bytes."""

    sink: int
    """Number of the sink."""

    position: int
    """First byte within the sink."""

    grain: int
    """The sink takes whole multiples of so many bytes."""


_ON_DISK = attrgetter("shard", "offset", "length")


class Piece(NamedTuple):
    """A part of a read that belongs to one sink."""

    sink: int
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class Read:
    """One read, and where its bytes go, one piece after the other."""

    shard: str
    offset: int
    length: int
    pieces: tuple[Piece, ...]

    @property
    def surplus(self) -> int:
        """Bytes that nobody wants."""
        return sum(piece.length for piece in self.pieces if piece.sink == GAP)


def plan_reads(extents: Iterable[Extent], *, chunk_bytes: int, gap_bytes: int) -> list[Read]:
    """Cut extents into reads of about `chunk_bytes`, and join neighbours into one read.

    Args:
        extents: In any order. Two that overlap on disk are read twice.
        chunk_bytes: The most a read takes, unless one grain of a sink is larger.
        gap_bytes: The largest gap between two extents that is read along.
    """
    reads: list[Read] = []
    shard, start, end, pieces = "", 0, 0, list[Piece]()
    for extent in sorted(extents, key=_ON_DISK):
        for offset, length, position in _cut(extent, chunk_bytes):
            gap = offset - end
            joins = (
                pieces
                and shard == extent.shard
                and 0 <= gap <= gap_bytes
                and offset + length - start <= chunk_bytes
                and len(pieces) + 2 <= MAX_PIECES
            )
            if not joins:
                if pieces:
                    reads.append(Read(shard, start, end - start, tuple(pieces)))
                shard, start, pieces = extent.shard, offset, []
            elif gap:
                pieces.append(Piece(GAP, 0, gap))
            pieces.append(Piece(extent.sink, position, length))
            end = offset + length
    if pieces:
        reads.append(Read(shard, start, end - start, tuple(pieces)))
    return reads


def _cut(extent: Extent, chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield offset, length and position of pieces of at most a chunk."""
    step = max(chunk_bytes // extent.grain, 1) * extent.grain
    for done in range(0, extent.length, step):
        length = min(step, extent.length - done)
        yield extent.offset + done, length, extent.position + done
