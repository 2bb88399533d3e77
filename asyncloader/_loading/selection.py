"""Loads blocks of which a table wants only some rows.

The ids are read first, a piece at a time; those that the table wants get rows; then the wanted
rows of every slot are read. Neighbours, and small gaps between them, are read at once: a gap is
cheaper than another call. Rows that nobody wants take no memory beyond the piece's own.

Where the checkpoint says that the wanted rows stand side by side, the ids around them are looked at
too, and all ids that are read are verified, so that no row is missed without notice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.files import SIDECAR
from asyncloader._checkpoint.sidecar import DIGEST_CHUNK
from asyncloader._storage.protocol import fill, read_error, read_exactly
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError, ReadError

from .filling import Filling, batches_of
from .indexing import Arrival

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import PartLoad, TableLoad
    from asyncloader._storage.protocol import ReadInto, Storage, ThreadedStorage
    from asyncloader._table.protocol import LoadableUpdate
    from asyncloader._threads.budget import ByteBudget
    from asyncloader._threads.threads import Threads

    from .filling import Done, Step
    from .indexing import Indexer
    from .progress import Meter
    from .staging import StagingPool
    from .trace import Tracer
    from .verification import Verifier


_ID_BYTES = 8
# Ids, those wanted, encoded, their positions, and what grouping them takes: five int64 a row.
_COST = 5 * _ID_BYTES
# What one thread reads and picks rows from before it reads on: it is still in the cache then.
STEP = 4 << 20
_UNSIGNED = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPiece:
    """Rows `[start, start + count)` of a part."""

    table: TableLoad
    part: PartLoad
    update: LoadableUpdate
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What reading takes."""

    storage: Storage
    threads: Threads
    budget: ByteBudget
    indexer: Indexer
    staging: StagingPool
    meter: Meter
    chunk_bytes: int
    gap_bytes: int
    verifier: Verifier
    tracer: Tracer

    lender: ThreadedStorage | None
    """The storage, if it can do more with a thread than read."""

    def step(self, block: Block) -> int:
        """Return how many bytes of a block to read before something is done with them."""
        lends = self.lender is not None
        return step_bytes(block, chunk_bytes=self.chunk_bytes, lends=lends)

    def verifier_of_ids(self, part: PartLoad) -> Verifier:
        """Return a verifier that leaves out no id where it is believed which rows they stand in.

        An id that a flipped bit has taken out of the wanted slice would be missed by nobody.
        """
        return replace(self.verifier, widen=True) if is_believed(part) else self.verifier

    def room(self, part: PartLoad) -> int:
        """Return the memory that reading rows of a part takes besides them."""
        blocks = (part.ids, *part.slots.values())
        most = max(max(self.step(block), block.nbytes // part.rows) for block in blocks)
        return most + (most + 2 * DIGEST_CHUNK if self.verifier_of_ids(part).widen else 0)


def is_believed(part: PartLoad) -> bool:
    """Whether only those rows are looked at that the sidecar says may be wanted."""
    return len(part.reach) < part.rows


def step_bytes(block: Block, *, chunk_bytes: int, lends: bool) -> int:
    """Return how many bytes of a block to read before something is done with them.

    Whole chunks of one with digests. Where each read is a hand-over to a thread, as much as one may
    take.

    Args:
        block: What to read.
        chunk_bytes: The most that one hand-over may take.
        lends: Whether the storage lends threads.
    """
    most = min(chunk_bytes, STEP) if lends else chunk_bytes
    if block.digests is None:
        return most
    return max(most // DIGEST_CHUNK, 1) * DIGEST_CHUNK


def row_pieces(
    table: TableLoad, part: PartLoad, update: LoadableUpdate, *, chunk_bytes: int, widen: bool
) -> Iterator[RowPiece]:
    """Cut what may be wanted of a part into pieces whose bookkeeping fits into a chunk.

    If there are digests, where chunks of ids, or of rows of many a size, end too; if what is read
    of the ids is widened to whole chunks, into pieces of as many ids as one has.
    """
    step = max(chunk_bytes // _COST, 1)
    if part.ids.digests is not None:
        whole = widen or is_believed(part)
        step = DIGEST_CHUNK // _ID_BYTES if whole else 1 << (step.bit_length() - 1)
    start, stop = part.reach.start, part.reach.stop
    while start < stop:
        end = min((start // step + 1) * step, stop)
        yield RowPiece(table=table, part=part, update=update, start=start, count=end - start)
        start = end


async def load_piece(piece: RowPiece, means: Means) -> None:
    """Read a piece's ids, then the rows that the table wants."""
    try:
        async with means.budget.reserve(piece.count * _COST + means.room(piece.part)):
            await _load_piece(piece, means)
    except ReadError as error:
        error.names = (piece.table.name,)
        raise


async def _load_piece(piece: RowPiece, means: Means) -> None:
    part = piece.part
    ids = torch.empty(piece.count, dtype=torch.int64)
    every = range(piece.start, piece.start + piece.count)
    verifier = means.verifier_of_ids(part)
    await _load_rows(piece, means, Filling.of(part.ids, every, ids, verifier))
    found = ids.numpy()
    _check_ends(piece, found, means.verifier.location)

    def select() -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        rows, kept, dropped = piece.update.select(
            part.child, found, part.claimed, piece.table.slice
        )
        return rows + piece.start, kept, dropped

    [(rows, kept, dropped)] = await run_jobs(means.threads.kernels, [select])
    piece.update.dropped(dropped)
    if not len(rows):
        return
    first = piece.update.reserve(part.layer, len(rows), part.rank + piece.start)
    room = piece.update.view("id", first, len(rows))
    await run_jobs(means.threads.kernels, [lambda: room.copy_(torch.from_numpy(kept))])
    means.indexer.put(
        Arrival(
            update=piece.update, layer=part.layer, child=part.child,
            first=first, count=len(rows), claimed=None,
        )
    )  # fmt: skip
    for slot, block in part.slots.items():
        target = piece.update.view(slot, first, len(rows))
        await _load_rows(piece, means, Filling.of(block, rows, target, means.verifier))


def _check_ends(piece: RowPiece, ids: NDArray[np.int64], location: str) -> None:
    """Refuse what the sidecar says of the rows' order if the rows around the wanted ones disagree.

    Rows are sorted by slice position: if the one before is below the wanted slice, and the one
    behind beyond it, then all that are wanted stand between the two.
    """
    part, wanted = piece.part, piece.table.slice
    begins = piece.start == part.reach.start > 0
    ends = piece.start + piece.count == part.reach.stop < part.rows
    before, behind = (int(ids[end]) % _UNSIGNED % wanted.size for end in (0, -1))
    if (begins and before >= wanted.begin) or (ends and behind < wanted.end):
        problem = (
            f"{SIDECAR} says that ids at slice positions [{wanted.begin}, {wanted.end}) stand "
            f"within rows [{part.reach.start + (part.reach.start > 0)}, "
            f"{part.reach.stop - (part.reach.stop < part.rows)}), but others do "
            "too: it belongs to other ids; copy it again, or load with verify='off', which goes by "
            "the ids alone"
        )
        raise CheckpointError(location, problem, part.ids.shard, part.ids.key)


async def _load_rows(piece: RowPiece, means: Means, filling: Filling) -> None:
    """Read chosen rows of a block to where they belong."""
    block = filling.block
    steps = filling.steps(most=means.step(block), gap=means.gap_bytes)
    batches = batches_of(steps, means.chunk_bytes)
    last = False
    while not last:
        start = time.perf_counter()
        done = await _carry_out(filling, batches, means)
        means.tracer.note("read", block.shard, start, done.read)
        means.meter.note(
            read=done.read, wanted=done.wanted, verified=done.verified, current=piece.table.name
        )
        last = done.last


async def _carry_out(
    filling: Filling, batches: Iterator[tuple[list[Step], bool]], means: Means
) -> Done:
    """Read the next batch, and take what is wanted, step by step."""
    block = filling.block
    usual = means.step(block)

    if means.lender is None:
        [(batch, last)] = await run_jobs(means.threads.reads, [partial(next, batches)])
        buffer = means.staging.take(filling.room(batch, usual))
        verified = 0
        for step in batch:
            view = filling.view(step, buffer)
            offset = block.offset + filling.window(step)[0]
            await read_exactly(means.storage, block.shard, offset, [view])
            [count] = await run_jobs(means.threads.reads, [partial(filling.take, step, view)])
            verified += count
        means.staging.give(buffer)
        return filling.done(batch, verified, last=last)

    def at_once(read: ReadInto) -> Done:
        batch, last = next(batches)  # here: looking for gaps takes long
        buffer = means.staging.take(filling.room(batch, usual))
        verified = 0
        for step in batch:
            view = filling.view(step, buffer)
            fill(read, block.shard, block.offset + filling.window(step)[0], view)
            verified += filling.take(step, view)
        means.staging.give(buffer)
        return filling.done(batch, verified, last=last)

    try:
        return await means.lender.on_thread(block.shard, at_once)
    except OSError as error:
        raise read_error(block.shard, block.offset, block.nbytes, error) from error
