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


GAP = -1
"""The sink of bytes that no sink wants."""

# More than any file has, and sums of it and an offset stay within int64.
_UNBOUNDED = 2**62

MAX_PIECES = 1024
"""Buffers of one `preadv`: `IOV_MAX` of Linux and macOS."""


_COLUMNS = ("offset", "length", "sink", "position", "grain")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Extents:
    """Extents as columns."""

    shards: Sequence[str]
    """The different files."""

    shard: NDArray[np.int64]
    """`[n]`; which of them."""

    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    sink: NDArray[np.int64]
    position: NDArray[np.int64]
    grain: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert {len(getattr(self, name)) for name in _COLUMNS} == {len(self.shard)}

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> Extents:
        """Return extents as columns."""
        known = list(extents)
        shards, shard = numbered(one.shard for one in known)
        table = np.array([[getattr(one, name) for name in _COLUMNS] for one in known], np.int64)
        columns = dict(zip(_COLUMNS, table.reshape(-1, len(_COLUMNS)).T, strict=True))
        return cls(shards=shards, shard=shard, **columns)

    def __add__(self, other: Extents) -> Extents:
        shards, numbers = numbered((*self.shards, *other.shards))
        cut = len(self.shards)
        return Extents(
            shards=shards,
            shard=np.concatenate([numbers[:cut][self.shard], numbers[cut:][other.shard]]),
            **{
                name: np.concatenate([getattr(self, name), getattr(other, name)])
                for name in _COLUMNS
            },
        )


class Piece(NamedTuple):
    """A part of a read that belongs to one sink."""

    sink: int
    position: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One read, and where its bytes go, one piece after the other."""

    shard: str
    offset: int
    length: int
    sinks: NDArray[np.int64]
    """`[n]`; of each piece, the number of its sink, or `GAP`."""

    positions: NDArray[np.int64]
    """`[n]`; its first byte within the sink."""

    lengths: NDArray[np.int64]
    """`[n]`, in bytes."""

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
    pieces = _cut(extents, chunk_bytes)
    count = len(pieces.offset)
    assert (pieces.length > 0).all(), "an extent without bytes is none to read"
    if not count:
        return []
    ends = pieces.offset + pieces.length
    gaps = np.zeros(count, np.int64)
    gaps[1:] = pieces.offset[1:] - ends[:-1]
    apart = (gaps < 0) | (gaps > gap_bytes)
    apart[1:] |= pieces.shard[1:] != pieces.shard[:-1]
    starts = _starts(pieces.offset, ends, gaps > 0, apart, chunk_bytes)
    gaps[starts] = 0
    # Gaps become pieces of their own, each before the piece that it precedes.
    wide = np.flatnonzero(gaps)
    sinks = np.insert(pieces.sink, wide, GAP)
    positions = np.insert(pieces.position, wide, 0)
    lengths = np.insert(pieces.length, wide, gaps[wide])
    lows = starts + np.searchsorted(wide, starts)
    bounds = [*lows.tolist(), len(sinks)]
    lasts = np.append(starts[1:], count) - 1
    shards = pieces.shard[starts].tolist()
    offsets = pieces.offset[starts].tolist()
    totals = (ends[lasts] - pieces.offset[starts]).tolist()
    return [
        Read(
            extents.shards[shard], offset, total, sinks[low:high], positions[low:high],
            lengths[low:high],
        )
        for shard, offset, total, low, high in zip(
            shards, offsets, totals, bounds[:-1], bounds[1:], strict=True
        )
    ]  # fmt: skip


def _cut(extents: Extents, chunk_bytes: int) -> Extents:
    """Sort extents as they lie on disk, and cut extents that are longer than a chunk."""
    place = {name: number for number, name in enumerate(sorted(extents.shards))}
    shard = np.array([place[name] for name in extents.shards], np.int64)[extents.shard]
    order = np.lexsort((extents.length, extents.offset, shard))
    length, grain = extents.length[order], extents.grain[order]
    step = np.maximum(chunk_bytes // grain, 1) * grain
    counts = -(-length // step)
    which = np.repeat(np.arange(len(order)), counts)
    done = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * step[which]
    source = order[which]
    return Extents(
        shards=extents.shards,
        shard=extents.shard[source],
        offset=extents.offset[source] + done,
        length=np.minimum(step[which], length[which] - done),
        sink=extents.sink[source],
        position=extents.position[source] + done,
        grain=grain[which],
    )


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
            few = np.searchsorted(buffers[first:high], buffers[first] + MAX_PIECES - 1, "right")
            first += max(int(min(fits, few)), 1)
    return np.array(starts, np.int64)
