"""Reads blocks piece by piece, so that none of them has to fit into memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK
from asyncloader._memory.pages import map_fresh
from asyncloader._planning.reads import Extent, Extents, plan_reads
from asyncloader._storage.protocol import read_exactly
from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader.errors import ReadError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._loading.progress import Meter
    from asyncloader._loading.session import Session
    from asyncloader._planning.reads import Read


T = TypeVar("T")

_ALIGNMENT = 16
"""Bytes: enough for every dtype."""


async def scan(
    session: Session,
    blocks: Sequence[Block],
    look: Callable[[int, int, memoryview], T],
    *,
    meter: Meter,
    grain: int | None = None,
    kept: Sequence[memoryview | None] = (),
    failed: Callable[[ReadError], object] | None = None,
    executor: Executor | None = None,
    chunk_bytes: int | None = None,
    workers: int | None = None,
) -> list[T]:
    """Read all bytes of some blocks once, and have a thread look at each piece of them.

    Args:
        session: The checkpoint.
        blocks: What to read.
        look: Gets the number of a block, the first byte within it, and the bytes of a piece, whose
            memory is used again afterwards.
        meter: Counts reads.
        grain: Bytes that no piece may cut; by default the chunks of blocks that have digests.
        kept: Where the bytes of each block are to stay, if anywhere.
        failed: Gets the failures of reads, which end the scan by default.
        executor: The threads that look; by default those that compute.
        chunk_bytes: The most that a piece takes, unless one grain is larger; by default as the
            session reads.
        workers: Reads at a time; by default as the session reads.

    Returns:
        What was found in each piece, in the order of blocks and of their bytes.

    Raises:
        ReadError: If the storage failed.
    """
    most = min(chunk_bytes or session.options.read_bytes, session.options.read_bytes)
    extents = [
        Extent(block.shard, block.offset, block.nbytes, number, grain or _grain(block))
        for number, block in enumerate(blocks)
        if block.nbytes
    ]
    plan = partial(plan_reads, Extents.of(extents), chunk_bytes=most, gap_bytes=0)
    [reads] = await run_jobs(session.threads.kernels, [plan])
    size = max((read.length + _ALIGNMENT * len(read.sinks) for read in reads), default=0)
    free: list[memoryview] = []  # all of one size, and used again and again
    found: dict[tuple[int, int], T] = {}

    async def read_one(read: Read) -> None:
        pieces = read.pieces
        async with session.budget.reserve(read.length):
            # A read that is given up keeps its memory: a thread may still write there.
            memory = free.pop() if free else _fresh(size)
            views, at = list[memoryview](), 0
            for number, position, length in pieces:
                own = kept[number] if kept else None
                if own is not None:
                    views.append(own[position : position + length])
                else:
                    views.append(memory[at : at + length])
                    at += -(-length // _ALIGNMENT) * _ALIGNMENT

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


def _grain(block: Block) -> int:
    return 1 if block.digests is None else DIGEST_CHUNK


def _fresh(size: int) -> memoryview:
    memory, start = map_fresh(size)
    return memoryview(memory)[start : start + size]
