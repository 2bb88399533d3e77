"""Carries a layout out: bytes are gathered, digested and written, a chunk at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, ShardDigests, chunk_count, digest_of
from asyncloader._loading.buffers import Arena, StagingPool
from asyncloader._threads.jobs import for_each, run_jobs

from .contents import CHUNK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._loading.progress import Meter
    from asyncloader._storage.folder import Folder, WritableFile
    from asyncloader._threads.jobs import ByteBudget
    from asyncloader._threads.pool import Threads

    from .contents import ByteSource
    from .layout import PlacedBlock, ShardLayout, WriteBlock


_MOST_PIECES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """The folder to write to, and the threads and memory that writing may use."""

    folder: Folder
    threads: Threads
    budget: ByteBudget
    meter: Meter
    parallel: int
    staging: StagingPool = field(default_factory=partial(StagingPool, CHUNK))


class _Piece(NamedTuple):
    """The bytes `[begin, end)` of a block; whole digest chunks, but for the block's end."""

    placed: PlacedBlock
    begin: int
    end: int


class _Write(NamedTuple):
    """Pieces that lie side by side in one file, written in one call."""

    shard: int
    pieces: tuple[_Piece, ...]
    length: int


def _cut_writes(layouts: Sequence[ShardLayout]) -> list[_Write]:
    """Cut shards into writes, in the order in which blocks were dealt out.

    In that order the blocks of one table come together, so that the order of its rows has to be
    kept for a short time only. Small neighbours, as dense tensors often are, share a write.
    """
    writes: list[tuple[int, _Write]] = []
    for number, layout in enumerate(layouts):
        pieces: list[_Piece] = []
        turn = length = 0
        for index, placed in enumerate(layout.blocks):
            for begin in range(0, placed.block.nbytes, CHUNK):
                piece = _Piece(placed, begin, min(begin + CHUNK, placed.block.nbytes))
                size = piece.end - piece.begin
                if pieces and (length + size > CHUNK or len(pieces) == _MOST_PIECES):
                    writes.append((turn, _Write(number, tuple(pieces), length)))
                    pieces, length = [], 0
                if not pieces:
                    turn = index
                pieces.append(piece)
                length += size
        if pieces:
            writes.append((turn, _Write(number, tuple(pieces), length)))
    writes.sort(key=lambda pair: (pair[0], pair[1].shard))
    return [write for _, write in writes]


@dataclass(slots=True)
class _Shard:
    """A shard file while it is being written."""

    layout: ShardLayout
    file: WritableFile
    left: int = 0  # writes that are still to come
    digests: dict[str, list[str]] = field(default_factory=dict)  # by key, of each chunk

    def summary(self) -> ShardDigests:
        blocks = {key: tuple(digests) for key, digests in self.digests.items()}
        return ShardDigests(digest_of(self.layout.head), blocks)


async def write_shards(
    layouts: Sequence[ShardLayout],
    sources: Mapping[WriteBlock, ByteSource],
    means: Means,
    *,
    under: str,
) -> dict[str, ShardDigests]:
    """Write shards into the folder `under`, sync them, and return their digests by file.

    Files of a failed call are left to the caller.
    """
    # Python, and long for many tensors: on a thread the loop gets its turn.
    [writes] = await run_jobs(means.threads.kernels, [partial(_cut_writes, layouts)])
    files = contextlib.ExitStack()  # a file that fails to close does not keep the others open

    def begin() -> list[_Shard]:
        shards = []
        for layout in layouts:
            file = means.folder.create(f"{under}/{layout.file}")
            files.callback(file.close)
            file.write(0, [memoryview(layout.head)])
            shards.append(shard := _Shard(layout, file))
            for placed in layout.blocks:
                shard.digests[placed.key] = [""] * chunk_count(placed.block.nbytes)
        for write in writes:
            shards[write.shard].left += 1
        return shards

    try:
        [shards] = await run_jobs(means.threads.reads, [begin])
        for shard in shards:
            if not shard.left:
                await run_jobs(means.threads.reads, [shard.file.sync])
        await for_each(
            writes,
            partial(_write, shards, sources, means),
            workers=means.parallel,
            name="asyncloader-write",
        )
    finally:
        await run_jobs(means.threads.reads, [files.close])
    [digests] = await run_jobs(
        means.threads.kernels, [lambda: {shard.layout.file: shard.summary() for shard in shards}]
    )
    return digests


async def _write(
    shards: Sequence[_Shard],
    sources: Mapping[WriteBlock, ByteSource],
    means: Means,
    write: _Write,
) -> None:
    shard, first = shards[write.shard], write.pieces[0]
    used = [sources[piece.placed.block] for piece in write.pieces]
    room = write.length + sum(source.slack for source in used)
    async with means.budget.reserve(room):
        arena = Arena(means.staging, room, len(used))
        gather = partial(_gather, shard, write, used, arena)
        [views] = await run_jobs(means.threads.kernels, [gather])
        put = partial(shard.file.write, first.placed.offset + first.begin, views)
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
        await run_jobs(means.threads.reads, [shard.file.sync])


def _gather(
    shard: _Shard, write: _Write, sources: Sequence[ByteSource], arena: Arena
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
