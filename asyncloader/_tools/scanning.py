"""Reads blocks piece by piece, and looks at their bytes, and at the ids of tables.

No block has to fit into memory. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from asyncloader._checkpoint.format import SIDECAR
from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, SUB_SLICES, digest_of
from asyncloader._memory.pages import map_fresh
from asyncloader._planning.reads import Extent, Extents, plan_reads
from asyncloader._storage.protocol import read_exactly
from asyncloader._threads.jobs import for_each, run_jobs, undisturbed
from asyncloader.errors import ReadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.problems import AllProblems, Problems
    from asyncloader._checkpoint.sidecar import PartRows
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.progress import Meter
    from asyncloader._loading.session import Session
    from asyncloader._planning.reads import Piece, Read


T = TypeVar("T")

_ALIGNMENT = 16  # bytes: a multiple of the size of every dtype's elements
_RANGES = 3  # byte ranges that one finding names
_WINDOW = 1 << 18  # ids looked at together: that takes a few MB besides them


async def scan(
    session: Session,
    blocks: Sequence[Block],
    look: Callable[[int, int, memoryview], T],
    *,
    meter: Meter,
    kept: Sequence[memoryview | None] = (),
    failed: Callable[[ReadError], object] | None = None,
    executor: Executor | None = None,
    chunk_bytes: int | None = None,
    workers: int | None = None,
) -> list[T]:
    """Read all bytes of some blocks once, and have a thread look at each piece of them.

    Pieces are whole elements, and of a block that has digests whole chunks.

    Args:
        session: The checkpoint.
        blocks: The blocks to read.
        look: Gets the number of a block, the first byte within it, and the bytes of a piece, whose
            memory is used again afterwards.
        meter: Counts reads.
        kept: The memory where the bytes of each block are to stay, if anywhere.
        failed: Gets the failures of reads; without it, the first one is raised as `ReadError`.
        executor: The threads that look; by default the kernel threads.
        chunk_bytes: The most that a piece takes, unless a chunk is larger; by default as the
            session reads.
        workers: Reads at a time; by default as the session reads.

    Returns:
        The results of `look`, in the order of blocks and of their bytes.
    """
    most = min(chunk_bytes or session.options.read_bytes, session.options.read_bytes)
    plan = undisturbed(partial(_plan, blocks, most))
    [reads] = await run_jobs(session.threads.kernels, [plan])
    size = max((read.length + _ALIGNMENT * len(read.sinks) for read in reads), default=0)
    free: list[memoryview] = []  # all of one size, and used again and again
    found: dict[tuple[int, int], T] = {}

    async def read_one(read: Read) -> None:
        pieces = read.pieces
        async with session.budget.reserve(read.length):
            # A read that is given up keeps its memory: a thread may still write there.
            memory = free.pop() if free else _fresh(size)
            views = list(_views(pieces, memory, kept))

            def look_at_all() -> None:
                for (number, position, _), view in zip(pieces, views, strict=True):
                    found[number, position] = look(number, position, view)

            try:
                await read_exactly(session.storage, read.shard, read.offset, views)
            except ReadError as error:
                if failed is None:
                    raise
                failed(error)
            else:
                await run_jobs(executor or session.threads.kernels, [look_at_all])
                free.append(memory)
        current = blocks[pieces[-1].sink].key
        meter.note(read=read.length, wanted=read.length, current=current)

    count = workers or session.options.parallel
    await for_each(reads, read_one, workers=count, name="asyncloader-scan")
    return [found[at] for at in sorted(found)]


def _plan(blocks: Sequence[Block], chunk_bytes: int) -> list[Read]:
    extents = []
    for number, block in enumerate(blocks):
        if block.nbytes:
            grain = _ALIGNMENT if block.digests is None else DIGEST_CHUNK
            extents.append(Extent(block.shard, block.offset, block.nbytes, number, grain))
    return plan_reads(Extents.of(extents), chunk_bytes=chunk_bytes, gap_bytes=0)


def _fresh(size: int) -> memoryview:
    memory, start = map_fresh(size)
    return memoryview(memory)[start : start + size]


def _views(
    pieces: Sequence[Piece], memory: memoryview, kept: Sequence[memoryview | None]
) -> Iterator[memoryview]:
    """Yield where the bytes of each piece go: where they are to stay, or else into `memory`."""
    at = 0
    for number, position, length in pieces:
        own = kept[number] if kept else None
        if own is not None:
            yield own[position : position + length]
        else:
            yield memory[at : at + length]
            at += -(-length // _ALIGNMENT) * _ALIGNMENT


@dataclass(slots=True)
class Watched:
    """A block, and the problems of its bytes so far."""

    block: Block
    memory: memoryview | None = None  # where its bytes are kept; nowhere if `None`
    compared: int = 0  # digests
    damaged: list[int] = field(default_factory=list)  # chunks, by number, of another digest
    # For each read, the place of the first byte that is neither 0 nor 1, and their number.
    no_bools: list[tuple[int, int]] = field(default_factory=list)

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
            text = f"bytes {self._ranges()} are not those that were written, {SIDECAR} has other "
            text += "digests; copy the file again, or take another checkpoint"
            problems.add(text, block.shard, block.key)
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


def check_part(
    ids: NDArray[np.int64], claim: Slice, block: Block, told: PartRows | None, problems: Problems
) -> None:
    """Tell of strays among the ids of a part, int64 `[n]`, and where they are not as `told`."""
    strays = example = 0
    for window in _windows(ids):
        outside = claim.strays(window)
        count = int(np.count_nonzero(outside))
        if count and not strays:
            example = int(window[int(np.argmax(outside))])
        strays += count
    if strays:
        text = f"{strays:,} of {len(ids):,} ids do not lie in its slice {claim}, such as {example}"
        problems.add(f"{text}: no load takes them", block.shard, block.key)
    if told is not None and (text := _disorder(ids, told)):
        problems.add(text, block.shard, block.key)


def _disorder(ids: NDArray[np.int64], told: PartRows) -> str:
    """Say where ids are in another order than the sidecar says."""
    cuts, last = np.array(told.cuts, np.uint64), np.uint64(0)
    below = np.zeros(len(cuts), np.int64)  # how many positions are below each cut
    for window in _windows(ids):
        positions = window.view(np.uint64) % np.uint64(told.slice.size)
        if positions[0] < last or np.any(positions[1:] < positions[:-1]):
            return "its ids are not sorted by slice position, but the sidecar says where rows begin"
        below += np.searchsorted(positions, cuts)
        last = positions[-1]
    wrong = np.flatnonzero(below != np.array(told.offsets[1:-1])).tolist()
    if not wrong:
        return ""
    first = wrong[0]
    return (
        f"sub-slice {first + 1} of {SUB_SLICES} begins at row {below[first]}, but the sidecar says "
        f"{told.offsets[first + 1]}; offsets that are wrong: {len(wrong)}"
    )


def _windows(ids: NDArray[np.int64], more: int = 0) -> Iterator[NDArray[np.int64]]:
    """Yield a few ids at a time, and the first `more` of the next ones with them."""
    for start in range(0, len(ids) - more, _WINDOW):
        yield ids[start : start + _WINDOW + more]


def count_duplicates(ids: NDArray[np.int64]) -> tuple[int, int]:
    """Sort ids where they stand; return how many came before, and one of them (or 0)."""
    ids.sort()
    count = example = 0
    for window in _windows(ids, 1):
        same = window[1:] == window[:-1]
        found = int(np.count_nonzero(same))
        if found and not count:
            example = int(window[int(np.argmax(same))])
        count += found
    return count, example
