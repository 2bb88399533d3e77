"""Streams shard chunks into preallocated tensors and table buffers: the readers of a load.

`parallel` coroutines share one iterator of reads, each a chunk of a shard; a semaphore counts the
bytes in flight. Ids are indexed as soon as they are there.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._planning.reads import GAP
from asyncloader._storage.protocol import read_exactly
from asyncloader._threads.jobs import raising_first, run_jobs
from asyncloader.errors import ReadError

from .buffers import Arena
from .pieces import RowPiece
from .selection import load_piece

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncloader._planning.reads import Piece, Read

    from .load import Load
    from .pieces import Arrival

_INDEXERS = 2


async def stream(load: Load) -> None:
    """Carry out all reads of a load. The first failure ends the others, and is raised.

    Raises:
        ReadError: If the storage failed.
        CheckpointError: If bytes differ from their digests, or ids lie outside of their slice.
    """
    todo = iter(load.reads)  # shared: `next` does not await, so each read has one reader
    locks: dict[tuple[int, int], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def reader() -> None:
        for read in todo:
            if isinstance(read, RowPiece):
                await load_piece(read, load)
            else:
                async with load.session.budget.reserve(read.length):
                    await _fill(read, load)

    async def indexer() -> None:
        while (arrival := await load.arrivals.get()) is not None:
            with load.tracer.span("index", arrival.child, 8 * arrival.rows):
                await _index(arrival, load, locks[id(arrival.update), arrival.layer])

    with raising_first():
        async with asyncio.TaskGroup() as group:
            for number in range(_INDEXERS):
                group.create_task(indexer(), name=f"asyncloader-index-{number}")
            async with asyncio.TaskGroup() as readers:
                for number in range(load.session.options.parallel):
                    readers.create_task(reader(), name=f"asyncloader-read-{number}")
            for _ in range(_INDEXERS):
                load.arrivals.put_nowait(None)


async def _fill(read: Read, load: Load) -> None:
    load.touched.update(load.sinks.tensors(read))
    views = load.sinks.views(read)
    verified = 0
    if views is None:  # some of the bytes are verified, copied or indexed
        verified = await _fill_pieces(read, load)
    else:
        await _read(read, views, load)
    load.meter.note(
        read=read.length,
        wanted=read.length - read.surplus,
        verified=verified,
        current=load.sinks.name(int(read.sinks[-1])),
    )


async def _read(read: Read, views: list[memoryview], load: Load) -> None:
    try:
        with load.tracer.span("read", read.shard, read.length):
            await read_exactly(load.storage, read.shard, read.offset, views)
    except ReadError as error:
        sinks = read.sinks[read.sinks != GAP].tolist()
        error.names = tuple(dict.fromkeys(map(load.sinks.name, sinks)))
        raise


async def _fill_pieces(read: Read, load: Load) -> int:
    """Read bytes that are verified, copied or indexed; return how many bytes were verified."""
    pieces, sinks = read.pieces, load.sinks
    arena = Arena(load.staging, read.length, len(pieces))
    views = [sinks.open(piece, arena) for piece in pieces]
    await _read(read, views, load)
    verified = await _verify(read, pieces, views, load)
    jobs = [job for pair in zip(pieces, views, strict=True) if (job := sinks.filled(*pair))]
    if jobs:  # one after the other: handing a thread a job costs more than a small copy
        with load.tracer.span("copy", read.shard, read.length):
            await run_jobs(load.threads.kernels, [lambda: [job() for job in jobs]])
    arena.close()
    return verified


async def _verify(
    read: Read, pieces: Sequence[Piece], views: Sequence[memoryview], load: Load
) -> int:
    """Compare bytes with their digests, if there are any; return how many bytes were verified."""
    checks = []
    for (number, position, _), view in zip(pieces, views, strict=True):
        block = load.sinks.block(number)
        if block is not None and block.digests is not None:
            checks.append(partial(load.verifier.check, block, position, view))
    if not checks:
        return 0
    with load.tracer.span("verify", read.shard, read.length):
        [verified] = await run_jobs(
            load.threads.reads, [lambda: sum(len(check()) for check in checks)]
        )
    return verified


async def _index(arrival: Arrival, load: Load, layer_lock: asyncio.Lock) -> None:
    """Put the ids of rows into the index of their layer."""
    update, layer, child, first, rows, claimed = arrival
    kernels, refused = load.threads.kernels, None
    if claimed is not None:
        admit = partial(update.admit, child, first, rows, claimed)
        [(refused, dropped)] = await run_jobs(kernels, [admit])
        update.dropped(dropped)
    async with layer_lock:  # one range at a time; within it, threads share the work
        await run_jobs(kernels, [partial(update.make_room, layer, rows)])
        jobs = update.index_jobs(layer, first, rows, refused, threads=load.threads.kernel_count)
        update.indexed(layer, await run_jobs(kernels, jobs))
