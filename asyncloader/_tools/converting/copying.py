"""Copies blocks from the shards of a checkpoint into one file."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK
from asyncloader._loading.staging import Arena, StagingPool
from asyncloader._planning.reads import Extent, Extents, plan_reads
from asyncloader._storage.protocol import read_exactly
from asyncloader._threads.jobs import for_each, run_jobs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._loading.progress import Meter
    from asyncloader._loading.session import Session
    from asyncloader._planning.reads import Piece, Read
    from asyncloader._storage.folder import WritableFile


class Copy(NamedTuple):
    """A block, and where it goes."""

    block: Block
    at: int
    """First byte within the file."""


@dataclass(slots=True, kw_only=True)
class Copying:
    """Reads blocks as they lie on disk, whole chunks of what has digests, and writes them."""

    session: Session
    file: WritableFile
    copies: Sequence[Copy]
    meter: Meter
    _staging: StagingPool = field(init=False)

    async def run(self, parallel: int) -> None:
        """Copy everything, with so many reads and writes at a time.

        Raises:
            CheckpointError: If bytes are not those that were written.
            ReadError: If the source failed.
            OSError: If the file could not be written.
        """
        chunk_bytes = self.session.options.read_bytes
        self._staging = StagingPool(max(chunk_bytes, DIGEST_CHUNK))
        plan = partial(_plan, self.copies, chunk_bytes)
        [reads] = await run_jobs(self.session.threads.kernels, [plan])
        await for_each(reads, self._copy, workers=parallel, name="asyncloader-copy")

    async def _copy(self, read: Read) -> None:
        threads, pieces = self.session.threads, read.pieces
        async with self.session.budget.reserve(read.length):
            # If a read is given up, nobody gives this back: a thread may still write to it.
            arena = Arena(self._staging, read.length, len(pieces))
            views = [arena.take(piece.length).numpy().data for piece in pieces]
            await read_exactly(self.session.storage, read.shard, read.offset, views)
            check, put = partial(self._check, pieces, views), partial(self._put, pieces, views)
            [verified] = await run_jobs(threads.kernels, [check])
            await run_jobs(threads.reads, [put])
            del views, check, put
            arena.close()
        current = self.copies[pieces[-1].sink].block.key
        self.meter.note(read=read.length, wanted=read.length, verified=verified, current=current)

    def _check(self, pieces: Sequence[Piece], views: Sequence[memoryview]) -> int:
        """Compare with digests, where there are any; return how many bytes."""
        verifier = self.session.verifier
        return sum(
            len(verifier.check(self.copies[number].block, position, view))
            for (number, position, _), view in zip(pieces, views, strict=True)
        )

    def _put(self, pieces: Sequence[Piece], views: Sequence[memoryview]) -> None:
        for offset, together in self._runs(pieces, views):
            self.file.write(offset, together)

    def _runs(
        self, pieces: Sequence[Piece], views: Sequence[memoryview]
    ) -> Iterator[tuple[int, list[memoryview]]]:
        """Yield what goes side by side in the file, too, and where to."""
        begin, end, run = 0, -1, list[memoryview]()
        for piece, view in zip(pieces, views, strict=True):
            at = self.copies[piece.sink].at + piece.position
            if at != end and run:
                yield begin, run
                run = []
            if not run:
                begin = at
            run.append(view)
            end = at + view.nbytes
        yield begin, run


def _plan(copies: Sequence[Copy], chunk_bytes: int) -> list[Read]:
    extents = [
        Extent(
            block.shard, block.offset, block.nbytes, number, 0, DIGEST_CHUNK if block.digests else 1
        )
        for number, (block, _) in enumerate(copies)
        if block.nbytes
    ]
    return plan_reads(Extents.of(extents), chunk_bytes=chunk_bytes, gap_bytes=0)
