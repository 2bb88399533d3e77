"""Loads blocks of which a table wants only some rows.

The ids are read first, a piece at a time; the ids that the table wants get rows; then the wanted
rows of every slot are read. Neighbours, and small gaps between them, are read at once: a gap is
cheaper than another call. Rows that are not wanted take no memory beyond the piece's own.

Where the checkpoint says that the wanted rows stand side by side, the ids around them are looked at
too, and all ids that are read are verified, so that no row is missed without notice.
"""

from __future__ import annotations

import time
from dataclasses import replace
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
from .pieces import COST, GAP_BYTES, RowPiece, is_believed, step_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import PartLoad
    from asyncloader._storage.protocol import ReadInto

    from .filling import Done, Step
    from .load import Load
    from .verification import Verifier


_UNSIGNED = 2**64


def _step(load: Load, block: Block) -> int:
    """Return how many bytes of a block to read before something is done with them."""
    return step_bytes(block, chunk_bytes=load.chunk_bytes, lends=load.lender is not None)


def _verifier_of_ids(load: Load, part: PartLoad) -> Verifier:
    """Return a verifier that leaves out no id where the sidecar is believed on the rows to read.

    An id that a flipped bit has taken out of the wanted slice would not be missed.
    """
    return replace(load.verifier, widen=True) if is_believed(part) else load.verifier


def _room(load: Load, part: PartLoad) -> int:
    """Return the memory that reading rows of a part takes besides them."""
    blocks = (part.ids, *part.slots.values())
    most = max(max(_step(load, block), block.nbytes // part.rows) for block in blocks)
    return most + (most + 2 * DIGEST_CHUNK if _verifier_of_ids(load, part).widen else 0)


async def load_piece(piece: RowPiece, load: Load) -> None:
    """Read a piece's ids, then the rows that the table wants."""
    try:
        async with load.budget.reserve(piece.count * COST + _room(load, piece.part)):
            await _load_piece(piece, load)
    except ReadError as error:
        error.names = (piece.table.name,)
        raise


async def _load_piece(piece: RowPiece, load: Load) -> None:
    part = piece.part
    ids = torch.empty(piece.count, dtype=torch.int64)
    every = range(piece.start, piece.start + piece.count)
    verifier = _verifier_of_ids(load, part)
    await _load_rows(piece, load, Filling.of(part.ids, every, ids, verifier))
    found = ids.numpy()
    _check_ends(piece, found, load.verifier.location)

    def select() -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        rows, kept, dropped = piece.update.select(
            part.child, found, part.claimed, piece.table.slice
        )
        return rows + piece.start, kept, dropped

    [(rows, kept, dropped)] = await run_jobs(load.threads.kernels, [select])
    piece.update.dropped(dropped)
    if not len(rows):
        return
    first = piece.update.reserve(part.layer, len(rows), part.rank + piece.start)
    room = piece.update.view("id", first, len(rows))
    await run_jobs(load.threads.kernels, [lambda: room.copy_(torch.from_numpy(kept))])
    load.indexer.put(
        Arrival(
            update=piece.update, layer=part.layer, child=part.child,
            first=first, count=len(rows), claimed=None,
        )
    )  # fmt: skip
    for slot, block in part.slots.items():
        target = piece.update.view(slot, first, len(rows))
        await _load_rows(piece, load, Filling.of(block, rows, target, load.verifier))


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


async def _load_rows(piece: RowPiece, load: Load, filling: Filling) -> None:
    """Read chosen rows of a block to where they belong."""
    block = filling.block
    steps = filling.steps(most=_step(load, block), gap=GAP_BYTES)
    batches = batches_of(steps, load.chunk_bytes)
    last = False
    while not last:
        start = time.perf_counter()
        done = await _carry_out(filling, batches, load)
        load.tracer.note("read", block.shard, start, done.read)
        load.meter.note(
            read=done.read, wanted=done.wanted, verified=done.verified, current=piece.table.name
        )
        last = done.last


async def _carry_out(
    filling: Filling, batches: Iterator[tuple[list[Step], bool]], load: Load
) -> Done:
    """Read the next batch, and take what is wanted, step by step."""
    block = filling.block
    usual = _step(load, block)

    if load.lender is None:
        [(batch, last)] = await run_jobs(load.threads.reads, [partial(next, batches)])
        buffer = load.row_staging.take(filling.room(batch, usual))
        verified = 0
        for step in batch:
            view = filling.view(step, buffer)
            offset = block.offset + filling.window(step)[0]
            await read_exactly(load.storage, block.shard, offset, [view])
            [count] = await run_jobs(load.threads.reads, [partial(filling.take, step, view)])
            verified += count
        load.row_staging.give(buffer)
        return filling.done(batch, verified, last=last)

    def at_once(read: ReadInto) -> Done:
        batch, last = next(batches)  # here: looking for gaps takes long
        buffer = load.row_staging.take(filling.room(batch, usual))
        verified = 0
        for step in batch:
            view = filling.view(step, buffer)
            fill(read, block.shard, block.offset + filling.window(step)[0], view)
            verified += filling.take(step, view)
        load.row_staging.give(buffer)
        return filling.done(batch, verified, last=last)

    try:
        return await load.lender.on_thread(block.shard, at_once)
    except OSError as error:
        raise read_error(block.shard, block.offset, block.nbytes, error) from error
