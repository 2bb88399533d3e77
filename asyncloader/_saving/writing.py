"""Carries a layout out: bytes are gathered, digested and written, a chunk at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, ShardDigests, chunk_count, digest_of
from asyncloader._loading.buffers import Arena, StagingPool
from asyncloader._threads.jobs import for_each, run_jobs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from asyncloader._loading.progress import Meter
    from asyncloader._storage.folder import Folder, WritableFile
    from asyncloader._threads.jobs import ByteBudget
    from asyncloader._threads.pool import Threads

    from .layout import PlacedBlock, ShardLayout, WriteBlock
    from .sources import ByteSource


CHUNK = 2 * DIGEST_CHUNK
"""Bytes of one write, at most."""

_MOST_PIECES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What writing takes."""

    folder: Folder
    threads: Threads
    budget: ByteBudget
    meter: Meter
    parallel: int
    staging: StagingPool = field(default_factory=partial(StagingPool, CHUNK))


class Piece(NamedTuple):
    """The bytes `[begin, end)` of a block; whole digest chunks, but for the block's end."""

    placed: PlacedBlock
    begin: int
    end: int


class Write(NamedTuple):
    """Pieces that lie side by side in one file, written in one call."""

    shard: int
    pieces: tuple[Piece, ...]

    @property
    def offset(self) -> int:
        """First byte within the file."""
        first = self.pieces[0]
        return first.placed.offset + first.begin

    @property
    def length(self) -> int:
        """Bytes."""
        return sum(piece.end - piece.begin for piece in self.pieces)


def cut_writes(layouts: Sequence[ShardLayout]) -> list[Write]:
    """Cut shards into writes, in the order in which blocks were dealt out.

    In that order the blocks of one table come together, so that the order of its rows has to be
    kept for a short time only. Small neighbours, as dense tensors often are, share a write.
    """
    writes = []
    for number, layout in enumerate(layouts):
        turns = []
        pieces: list[Piece] = []
        turn = length = 0
        for index, placed in enumerate(layout.blocks):
            for begin in range(0, placed.block.nbytes, CHUNK):
                piece = Piece(placed, begin, min(begin + CHUNK, placed.block.nbytes))
                size = piece.end - piece.begin
                if pieces and (length + size > CHUNK or len(pieces) == _MOST_PIECES):
                    turns.append((turn, Write(number, tuple(pieces))))
                    pieces, length = [], 0
                if not pieces:
                    turn = index
                pieces.append(piece)
                length += size
        if pieces:
            turns.append((turn, Write(number, tuple(pieces))))
        writes += turns
    writes.sort(key=lambda pair: (pair[0], pair[1].shard))
    return [write for _, write in writes]


@dataclass(slots=True)
class _Shard:
    """A shard file while it is being written."""

    layout: ShardLayout
    file: WritableFile
    left: int
    """Writes that are still to come."""

    digests: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def begin(cls, layout: ShardLayout, folder: Folder, under: str, writes: int) -> _Shard:
        """Create the file and write its header."""
        file = folder.create(f"{under}{layout.file}")
        try:
            file.write(0, [memoryview(layout.head)])
        except BaseException:
            file.close()
            raise
        digests = {placed.key: [""] * chunk_count(placed.block.nbytes) for placed in layout.blocks}
        return cls(layout, file, writes, digests)

    def finish(self) -> None:
        """Let it outlive a loss of power."""
        self.file.sync()

    def summary(self) -> ShardDigests:
        """Return the digests of all that was written."""
        blocks = {key: tuple(digests) for key, digests in self.digests.items()}
        return ShardDigests(digest_of(self.layout.head), blocks)


async def write_shards(
    layouts: Sequence[ShardLayout],
    sources: Mapping[WriteBlock, ByteSource],
    means: Means,
    *,
    under: str,
) -> dict[str, ShardDigests]:
    """Write shards, sync them, and return their digests by file.

    Args:
        layouts: What to write.
        sources: Where the bytes of each block come from.
        means: What it takes.
        under: What goes before the names of the files: a folder's name and a slash, or nothing.

    Raises:
        OSError: If the folder failed. What was written so far is left to the caller.
    """
    # Python, and long for many tensors: on a thread the loop gets its turn.
    [writes] = await run_jobs(means.threads.kernels, [partial(cut_writes, layouts)])
    counts = [0] * len(layouts)
    for write in writes:
        counts[write.shard] += 1
    shards: list[_Shard] = []
    try:
        begin = partial(_begin_all, shards, layouts, counts, means.folder, under)
        await run_jobs(means.threads.reads, [begin])
        for shard in shards:
            if not shard.left:
                await run_jobs(means.threads.reads, [shard.finish])
        await for_each(
            writes,
            partial(_write, shards, sources, means),
            workers=means.parallel,
            name="asyncloader-write",
        )
    finally:
        await run_jobs(means.threads.reads, [partial(_close_all, shards)])
    [digests] = await run_jobs(
        means.threads.kernels,
        [lambda: {shard.layout.file: shard.summary() for shard in shards}],
    )
    return digests


def _begin_all(
    shards: list[_Shard],
    layouts: Iterable[ShardLayout],
    counts: Sequence[int],
    folder: Folder,
    under: str,
) -> None:
    for layout, count in zip(layouts, counts, strict=True):
        shards.append(_Shard.begin(layout, folder, under, count))


def _close_all(shards: Iterable[_Shard]) -> None:
    with contextlib.ExitStack() as stack:  # one that fails does not keep the others
        for shard in shards:
            stack.callback(shard.file.close)


async def _write(
    shards: Sequence[_Shard],
    sources: Mapping[WriteBlock, ByteSource],
    means: Means,
    write: Write,
) -> None:
    shard = shards[write.shard]
    used = [sources[piece.placed.block] for piece in write.pieces]
    room = write.length + sum(source.slack for source in used)
    async with means.budget.reserve(room):
        arena = Arena(means.staging, room, len(used))
        gather = partial(_gather, shard, write, used, arena)
        [views] = await run_jobs(means.threads.kernels, [gather])
        put = partial(shard.file.write, write.offset, views)
        await run_jobs(means.threads.reads, [put])
        del views, put, gather
        arena.close()
    for source in used:
        source.done()
    shard.left -= 1
    assert shard.left >= 0, "a write is counted once"
    means.meter.note(
        read=write.length, wanted=write.length, current=write.pieces[-1].placed.block.name
    )
    if not shard.left:
        await run_jobs(means.threads.reads, [shard.finish])


def _gather(
    shard: _Shard, write: Write, sources: Sequence[ByteSource], arena: Arena
) -> list[memoryview]:
    views = []
    for piece, source in zip(write.pieces, sources, strict=True):
        view = source.read(piece.begin, piece.end, arena)
        digests = shard.digests[piece.placed.key]
        for start in range(0, view.nbytes, DIGEST_CHUNK):
            number = (piece.begin + start) // DIGEST_CHUNK
            digests[number] = digest_of(view[start : start + DIGEST_CHUNK])
        assert view.nbytes == piece.end - piece.begin, "a source returns what it is asked for"
        views.append(view)
    return views
