"""Carries a layout out: bytes are gathered, digested and written, a chunk at a time."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._checkpoint.archive_form import joined_crc
from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, ShardDigests, chunk_count, digest_of
from asyncloader._loading.buffers import Arena, StagingPool
from asyncloader._threads.jobs import for_each, run_jobs, settled

from .contents import CHUNK

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asyncloader._loading.progress import Meter
    from asyncloader._storage.folder import WritableFile, WritableFolder
    from asyncloader._threads.jobs import ByteBudget
    from asyncloader._threads.pool import Threads

    from .contents import ByteSource
    from .layout import PlacedBlock, ShardLayout, WriteBlock


_MOST_PIECES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """The folder to write to, and the threads and memory that writing may use."""

    folder: WritableFolder
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
            # Even an empty tensor has a header in `model.pt`.
            for begin in range(0, max(placed.block.nbytes, min(placed.gap, 1)), CHUNK):
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
    crcs: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    """For an archive: by key, and by its first byte, the checksum and length of each piece."""

    numbers: dict[str, int] = field(default_factory=dict)  # of blocks within the file, by key
    sums: dict[str, int] = field(default_factory=dict)
    """Checksums of longer blocks, by key, where a header cannot be written once they are known."""

    def summary(self) -> ShardDigests:
        blocks = {key: tuple(digests) for key, digests in self.digests.items()}
        keys = {placed.offset: placed.key for placed in self.layout.blocks}
        blocks |= {other.key: blocks[keys[other.offset]] for other in self.layout.tied}
        return ShardDigests(digest_of(self.layout.names), blocks)

    def finish(self) -> None:
        """Write what had to wait for checksums; sync."""
        if archive := self.layout.archive:
            sums = []
            for number, placed in enumerate(self.layout.blocks):
                first, *others = (crc for _, crc in sorted(self.crcs[placed.key].items()))
                total = first[0]
                for crc, length in others:
                    total = joined_crc(total, crc, length)
                sums.append(total)
                if others and placed.key not in self.sums:
                    header = archive.header(number, total)
                    self.file.write(placed.offset - placed.gap, [memoryview(header)])
            tail = archive.tail(sums)
            self.file.write(self.layout.size - len(tail), [memoryview(tail)])
        self.file.sync()


async def write_shards(
    layouts: Sequence[ShardLayout],
    sources: Mapping[WriteBlock, ByteSource],
    means: Means,
    *,
    place: Callable[[str, int], str],
) -> dict[str, ShardDigests]:
    """Write shards to where `place` says, sync them, and return their digests by file.

    Files of a failed call are left to the caller.
    """
    # Python, and long for many tensors: on a thread the loop gets its turn.
    [writes] = await run_jobs(means.threads.kernels, [partial(_cut_writes, layouts)])
    files = contextlib.ExitStack()  # a file that fails to close does not keep the others open

    def begin() -> list[_Shard]:
        shards = []
        for layout in layouts:
            name = place(layout.file, layout.size)
            file = means.folder.create(name, size=layout.size)
            files.callback(file.close)
            file.write(0, [memoryview(layout.head)])
            shards.append(shard := _Shard(layout, file))
            for placed in layout.blocks:
                shard.digests[placed.key] = [""] * chunk_count(placed.block.nbytes)
                shard.crcs[placed.key] = {}
                shard.numbers[placed.key] = len(shard.numbers)
        for write in writes:
            shards[write.shard].left += 1
        return shards

    try:
        [shards] = await run_jobs(means.threads.reads, [begin])
        for shard in shards:
            if means.folder.writes_in_order:
                await _sum_up(shard, sources, means)
            if not shard.left:
                await run_jobs(means.threads.reads, [shard.finish])
        await _write_all(writes, shards, sources, means)
    finally:
        await run_jobs(means.threads.reads, [files.close])
    [digests] = await run_jobs(
        means.threads.kernels, [lambda: {shard.layout.file: shard.summary() for shard in shards}]
    )
    return digests


async def _write_all(
    writes: Sequence[_Write],
    shards: Sequence[_Shard],
    sources: Mapping[WriteBlock, ByteSource],
    means: Means,
) -> None:
    """Do all writes; none of them goes on waiting for one that failed, or will not come."""

    def abandon() -> None:
        for shard in shards:
            shard.file.abandon()

    async def write(one: _Write) -> None:
        try:
            await _write(shards, sources, means, one)
        except BaseException:
            abandon()
            raise

    def cancel() -> None:
        abandon()
        working.cancel()

    working = asyncio.ensure_future(
        for_each(writes, write, workers=means.parallel, name="asyncloader-write")
    )
    await settled(working, withdraw=cancel)


async def _sum_up(shard: _Shard, sources: Mapping[WriteBlock, ByteSource], means: Means) -> None:
    """Compute the checksums of an archive's longer blocks, each of which is read twice so."""
    if shard.layout.archive is None:
        return
    for placed in shard.layout.blocks:
        if placed.block.nbytes > CHUNK:
            add = partial(_crc_of, sources[placed.block], placed.block.nbytes, means.staging)
            [shard.sums[placed.key]] = await run_jobs(means.threads.kernels, [add])


def _crc_of(source: ByteSource, nbytes: int, staging: StagingPool) -> int:
    crc = 0
    for begin in range(0, nbytes, CHUNK):
        end = min(begin + CHUNK, nbytes)
        arena = Arena(staging, end - begin + source.slack, 1)
        crc = zlib.crc32(source.read(begin, end, arena), crc)
        arena.close()
    return crc


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
        begin = first.placed.offset + first.begin - (0 if first.begin else first.placed.gap)
        put = partial(shard.file.write, begin, views)
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
        if archive := shard.layout.archive:
            crc = zlib.crc32(view)
            shard.crcs[piece.placed.key][piece.begin] = crc, view.nbytes
            if not piece.begin:  # of a longer block the checksum may be written later
                crc = shard.sums.get(piece.placed.key, crc)
                views.append(memoryview(archive.header(shard.numbers[piece.placed.key], crc)))
        views.append(view)
    return [view for view in views if view.nbytes]
