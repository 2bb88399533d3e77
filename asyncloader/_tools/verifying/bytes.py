"""Reads every byte of every block once, and looks at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.files import SIDECAR
from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, digest_of
from asyncloader._loading.staging import Arena, StagingPool
from asyncloader._planning.reads import Extent, Extents, plan_reads
from asyncloader._storage.protocol import read_exactly
from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader.errors import ReadError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.problems import AllProblems
    from asyncloader._loading.progress import Meter
    from asyncloader._loading.session import Session
    from asyncloader._planning.reads import Piece, Read


_RANGES = 3
"""Byte ranges that one finding names."""


@dataclass(slots=True)
class Watched:
    """A block, and the problems of its bytes so far."""

    block: Block
    memory: memoryview | None = None
    """Where its bytes are kept; nowhere if `None`."""

    compared: int = 0
    damaged: list[int] = field(default_factory=list)
    """Numbers of the chunks whose digest is another one."""

    no_bools: list[tuple[int, int]] = field(default_factory=list)
    """For each read, the place of the first byte that is neither 0 nor 1, and their number."""

    @property
    def grain(self) -> int:
        """Bytes that can only be looked at together."""
        return 1 if self.block.digests is None else DIGEST_CHUNK

    def room(self, piece: Piece, arena: Arena) -> memoryview:
        """Return memory for some of its bytes."""
        if self.memory is not None:
            return self.memory[piece.position : piece.position + piece.length]
        return arena.take(piece.length).numpy().data

    def look(self, begin: int, view: memoryview) -> None:
        """Look at bytes from `begin` on, whole chunks of them; belongs on a thread."""
        if self.block.digests is not None:
            for start in range(0, view.nbytes, DIGEST_CHUNK):
                number = (begin + start) // DIGEST_CHUNK
                if digest_of(view[start : start + DIGEST_CHUNK]) != self.block.digests[number]:
                    self.damaged.append(number)
                self.compared += 1
        if self.block.dtype.torch == "bool":
            odd = np.flatnonzero(np.frombuffer(view, np.uint8) > 1)
            if len(odd):
                self.no_bools.append((begin + int(odd[0]), len(odd)))

    def tell(self, problems: AllProblems) -> None:
        """Tell all problems."""
        block = self.block
        if self.damaged:
            problems.add(
                f"bytes {self._ranges()} are not those that were written, {SIDECAR} has other "
                "digests; copy the file again, or take another checkpoint",
                block.shard,
                block.key,
            )
        if self.no_bools:
            count = sum(count for _, count in self.no_bools)
            text = f"{count:,} bytes of a bool tensor are neither 0 nor 1, the first at byte "
            text += f"{block.offset + min(self.no_bools)[0]} of the file"
            problems.add(text, block.shard, block.key)

    def _ranges(self) -> str:
        ranges: list[tuple[int, int]] = []
        for number in sorted(self.damaged):
            begin = self.block.offset + number * DIGEST_CHUNK
            end = min(begin + DIGEST_CHUNK, self.block.offset + self.block.nbytes)
            if ranges and ranges[-1][1] == begin:
                begin, _ = ranges.pop()
            ranges.append((begin, end))
        named = ", ".join(f"[{begin}, {end})" for begin, end in ranges[:_RANGES])
        more = len(ranges) - _RANGES
        return named + (f" and {more} more ranges" if more > 0 else "")


@dataclass(slots=True)
class Inspector:
    """Reads blocks of one checkpoint."""

    session: Session
    meter: Meter
    problems: AllProblems
    compared: int = 0
    """Digests."""

    async def inspect(self, watched: Sequence[Watched]) -> bool:
        """Look at all bytes of some blocks; return whether all of them could be read."""
        limits = self.session.options
        extents = [
            Extent(one.block.shard, one.block.offset, one.block.nbytes, number, 0, one.grain)
            for number, one in enumerate(watched)
            if one.block.nbytes
        ]
        plan = partial(plan_reads, Extents.of(extents), chunk_bytes=limits.read_bytes, gap_bytes=0)
        [reads] = await run_jobs(self.session.threads.kernels, [plan])
        failed = len(self.problems.found)
        pool = StagingPool(max(limits.read_bytes, DIGEST_CHUNK))
        read = partial(self._read, watched, pool)
        await for_each(reads, read, workers=limits.parallel, name="asyncloader-verify")
        complete = len(self.problems.found) == failed
        for one in watched:
            one.tell(self.problems)
            self.compared += one.compared
        return complete

    async def _read(self, watched: Sequence[Watched], pool: StagingPool, read: Read) -> None:
        async with self.session.budget.reserve(read.length):
            arena = Arena(pool, read.length, len(read.pieces))
            views = [watched[piece.sink].room(piece, arena) for piece in read.pieces]
            try:
                await read_exactly(self.session.storage, read.shard, read.offset, views)
            except ReadError as error:
                self.problems.error(error)
            else:
                look = partial(_look_at_all, watched, read.pieces, views)
                await run_jobs(self.session.threads.kernels, [look])
                del look
            del views
            arena.close()
        current = watched[read.pieces[-1].sink].block.key
        self.meter.note(read=read.length, wanted=read.length, current=current)


def _look_at_all(
    watched: Sequence[Watched], pieces: Sequence[Piece], views: Sequence[memoryview]
) -> None:
    for (number, position, _), view in zip(pieces, views, strict=True):
        watched[number].look(position, view)
