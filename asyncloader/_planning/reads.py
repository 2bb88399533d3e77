"""Cuts a plan into single reads. No I/O."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asyncloader._checkpoint.blocks import numbered

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


GAP = -1  # the sink of bytes that no sink wants
# More than any file has, and sums of it and an offset stay within int64.
_UNBOUNDED = 2**62
_MAX_PIECES = 1024  # buffers of one `preadv`: `IOV_MAX` of Linux and macOS


class Extent(NamedTuple):
    """Bytes that lie side by side on disk and fill one sink."""

    shard: str
    offset: int  # the first byte within the shard
    length: int
    sink: int  # its number
    grain: int  # the sink takes whole multiples of so many bytes


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Extents as columns.

    Attributes:
        shards: The different files.
        shard: int64 `[n]`; which of them.
        columns: int64 `[4, n]`; the other fields of an `Extent`, in their order.
    """

    shards: Sequence[str]
    shard: NDArray[np.int64]
    columns: NDArray[np.int64]

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> Extents:
        """Return extents as columns."""
        known = list(extents)
        shards, shard = numbered(one.shard for one in known)
        return cls(shards, shard, np.array([one[1:] for one in known], np.int64).reshape(-1, 4).T)

    def __add__(self, other: Extents) -> Extents:
        shards, numbers = numbered((*self.shards, *other.shards))
        cut = len(self.shards)
        shard = np.concatenate([numbers[:cut][self.shard], numbers[cut:][other.shard]])
        return Extents(shards, shard, np.concatenate([self.columns, other.columns], axis=1))


class Piece(NamedTuple):
    """A part of a read that belongs to one sink."""

    sink: int
    position: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One read, and where its bytes go, one piece after the other.

    Attributes:
        sinks: int64 `[n]`; of each piece, the number of its sink, or `GAP`.
        positions: int64 `[n]`; its first byte within the sink.
        lengths: int64 `[n]`, in bytes.
    """

    shard: str
    offset: int
    length: int
    sinks: NDArray[np.int64]
    positions: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, one by one."""
        columns = (self.sinks.tolist(), self.positions.tolist(), self.lengths.tolist())
        return tuple(map(Piece, *columns))

    @property
    def surplus(self) -> int:
        """Bytes that no sink wants."""
        return int(self.lengths[self.sinks == GAP].sum())


def plan_reads(extents: Extents, *, chunk_bytes: int, gap_bytes: int) -> list[Read]:
    """Cut extents into reads of about `chunk_bytes`, and join neighbours into one read.

    Args:
        extents: In any order. Two that overlap on disk are read twice.
        chunk_bytes: The most a read takes, unless one grain of a sink is larger.
        gap_bytes: The largest gap between two extents that is read along.
    """
    chunk_bytes = min(chunk_bytes, _UNBOUNDED)
    shard, offset, length, sinks, positions = _cut(extents, chunk_bytes)
    assert (length > 0).all(), "an extent without bytes is none to read"
    if not len(offset):
        return []
    ends = offset + length
    gaps = np.zeros(len(offset), np.int64)
    gaps[1:] = offset[1:] - ends[:-1]
    apart = (gaps < 0) | (gaps > gap_bytes)
    apart[1:] |= shard[1:] != shard[:-1]
    starts = _starts(offset, ends, gaps > 0, apart, chunk_bytes)
    gaps[starts] = 0
    # Gaps become pieces of their own, each before the piece that it precedes.
    wide = np.flatnonzero(gaps)
    sinks = np.insert(sinks, wide, GAP)
    positions = np.insert(positions, wide, 0)
    lengths = np.insert(length, wide, gaps[wide])
    lows = starts + np.searchsorted(wide, starts)
    bounds = [*lows.tolist(), len(sinks)]
    totals = ends[np.append(starts[1:], len(offset)) - 1] - offset[starts]
    columns = shard[starts].tolist(), offset[starts].tolist(), totals.tolist()
    return [
        Read(
            extents.shards[shard], offset, total, sinks[low:high], positions[low:high],
            lengths[low:high],
        )
        for shard, offset, total, low, high in zip(*columns, bounds[:-1], bounds[1:], strict=True)
    ]  # fmt: skip


def _cut(extents: Extents, chunk_bytes: int) -> tuple[NDArray[np.int64], ...]:
    """Sort extents as they lie on disk, and cut extents that are longer than a chunk.

    Return of each piece: its shard, offset, length, sink, and position within the sink.
    """
    place = {name: number for number, name in enumerate(sorted(extents.shards))}
    shard = np.array([place[name] for name in extents.shards], np.int64)[extents.shard]
    offset, length = extents.columns[:2]
    order = np.lexsort((length, offset, shard))
    offset, length, sink, grain = extents.columns[:, order]
    step = np.maximum(chunk_bytes // grain, 1) * grain
    counts = -(-length // step)
    which = np.repeat(np.arange(len(order)), counts)
    done = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * step[which]
    lengths = np.minimum(step[which], length[which] - done)
    return extents.shard[order[which]], offset[which] + done, lengths, sink[which], done


def _starts(
    offset: NDArray[np.int64],
    ends: NDArray[np.int64],
    gap: NDArray[np.bool_],
    apart: NDArray[np.bool_],
    chunk_bytes: int,
) -> NDArray[np.int64]:
    """Return the first piece of each read.

    Args:
        offset: `[n]`; first byte of each piece.
        ends: `[n]`; one past its last.
        gap: `[n]`; whether there is a gap before it.
        apart: `[n]`; whether it cannot be in one read with the piece before it.
        chunk_bytes: The most that a read of several pieces takes.
    """
    # How many buffers there are up to each piece, if all were one read.
    buffers = np.arange(len(offset)) + np.cumsum(gap)
    borders = [0, *np.flatnonzero(apart[1:]) + 1, len(offset)]
    starts = []
    for low, high in itertools.pairwise(map(int, borders)):
        first = low
        while first < high:
            starts.append(first)
            fits = np.searchsorted(ends[first:high], offset[first] + chunk_bytes, "right")
            few = np.searchsorted(buffers[first:high], buffers[first] + _MAX_PIECES - 1, "right")
            first += max(int(min(fits, few)), 1)
    return np.array(starts, np.int64)
