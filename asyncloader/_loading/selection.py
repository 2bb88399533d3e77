"""Loads blocks of which a table wants only some rows.

The ids are read first, a piece at a time; the ids that the table wants get rows; then the wanted
rows of every slot are read. Neighbours, and small gaps between them, are read at once: a gap is
cheaper than another call. Rows that are not wanted take no memory beyond the piece's own.

Where the checkpoint says that the wanted rows stand side by side, the ids around them are looked at
too, and all ids that are read are verified, so that no row is missed without notice.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.format import SIDECAR
from asyncloader._checkpoint.sidecar import DIGEST_CHUNK
from asyncloader._storage.protocol import fill, read_error
from asyncloader._table.protocol import COPIED_BYTES, LocatingUpdate, PlacingUpdate
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError, ReadError

from .filling import Filling
from .pieces import ROW_COST, Arrival, RowPiece, is_believed
from .scattering import Scattering

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from asyncloader._storage.protocol import ReadInto

    from .filling import Batch
    from .load import Load
    from .pieces import Turns
    from .verifier import Verifier


_UNSIGNED = 2**64
# Ids in order, places, blocks and rows within blocks: four int64 a row.
_PLACE_COST = 4 * 8


async def load_piece(piece: RowPiece, load: Load) -> None:
    """Read a piece's ids, then the rows that the table wants."""
    part, verifier = piece.part, load.verifier
    if is_believed(part):  # an id that a flipped bit takes out of the slice would not be missed
        verifier = replace(verifier, widen=True)
    blocks = (part.ids, *part.slots.values())
    room = max(max(load.step_bytes(block), block.nbytes // part.rows) for block in blocks)
    if verifier.widen:
        room += room + 2 * DIGEST_CHUNK
    try:
        turns, cost = piece.turns, piece.rows * ROW_COST + room
        if turns is not None:
            cost += piece.rows * _PLACE_COST + COPIED_BYTES
        async with load.session.budget.reserve(cost):
            if turns is None:
                await _load_piece(piece, load, verifier)
            else:
                await _place_piece(piece, load, verifier, turns)
    except ReadError as error:
        error.names = (piece.table.name,)
        raise


async def _load_piece(piece: RowPiece, load: Load, verifier_of_ids: Verifier) -> None:
    part, update, kernels = piece.part, piece.update, load.threads.kernels
    assert not isinstance(update, PlacingUpdate), "rows can be reserved"
    rows, kept = await _wanted(piece, load, verifier_of_ids)
    if not len(rows):
        return
    first = update.reserve(part.layer, len(rows), part.rank + piece.start)
    room = update.view("id", first, len(rows))
    await run_jobs(kernels, [lambda: room.copy_(torch.from_numpy(kept))])
    load.arrivals.put_nowait(Arrival(update, part.layer, part.child, first, len(rows), None))
    if isinstance(update, LocatingUpdate):
        one_by_one = int(rows[-1]) - int(rows[0]) >= len(rows)
        there = rows if one_by_one else range(int(rows[0]), int(rows[-1]) + 1)
        update.locate(part.layer, first, there, part.slots)
        return
    for slot, block in part.slots.items():
        target = update.view(slot, first, len(rows))
        await _load_rows(piece, load, Filling(block, rows, target, load.verifier))


async def _place_piece(
    piece: RowPiece, load: Load, verifier_of_ids: Verifier, turns: Turns
) -> None:
    """Let a piece's ids into a table that then knows the places of their rows."""
    part, update = piece.part, piece.update
    assert isinstance(update, PlacingUpdate), "the table places rows"
    before_us, entered = turns.ticket()  # budgets are given in order, so these are, too
    try:
        rows, ids = await _wanted(piece, load, verifier_of_ids)
        await before_us.wait()
        if not len(rows):
            return
        with load.tracer.span("index", part.child, ids.nbytes):
            place = partial(update.place, ids, part.slots, fills=part.layer in piece.table.fills)
            [placed] = await run_jobs(load.threads.kernels, [place])
        before = [*turns.under_way] if placed.again else []
        done = asyncio.Event()
        turns.under_way.add(done)
    finally:
        entered.set()
    del ids
    try:
        for event in before:
            await event.wait()
        chosen = rows if placed.rows is None else rows[placed.rows]
        for slot, block in part.slots.items():
            target = Scattering(
                block, chosen, places=placed.places, update=update, slot=slot,
                verifier=load.verifier,
            )  # fmt: skip
            await _load_rows(piece, load, target)
    finally:
        turns.under_way.discard(done)
        done.set()


async def _wanted(
    piece: RowPiece, load: Load, verifier: Verifier
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read a piece's ids; return the rows that the table wants, and their ids, encoded."""
    part, update = piece.part, piece.update
    ids = torch.empty(piece.rows, dtype=torch.int64)
    every = range(piece.start, piece.start + piece.rows)
    await _load_rows(piece, load, Filling(part.ids, every, ids, verifier))
    found = ids.numpy()
    _check_ends(piece, found, load.verifier.location)

    def select() -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        rows, kept, dropped = update.select(part.child, found, part.claimed, piece.table.slice)
        return rows + piece.start, kept, dropped

    [(rows, kept, dropped)] = await run_jobs(load.threads.kernels, [select])
    update.dropped(dropped)
    return rows, kept


def _check_ends(piece: RowPiece, ids: NDArray[np.int64], location: str) -> None:
    """Refuse the order of rows that the sidecar claims if the rows around the wanted ones disagree.

    Rows are sorted by slice position: if the one before is below the wanted slice, and the one
    behind beyond it, then all that are wanted stand between the two.
    """
    part, wanted = piece.part, piece.table.slice
    begins = piece.start == part.reach.start > 0
    ends = piece.start + piece.rows == part.reach.stop < part.rows
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
    block, usual = filling.block, load.step_bytes(filling.block)
    batches = filling.batches(step=usual, gap=load.gap_bytes, most=load.chunk_bytes)

    def carry_out(read: ReadInto) -> Batch:
        batch = next(batches)  # here: looking for gaps takes long
        buffer = load.row_staging.take(batch.room(usual))
        for step in batch.steps:
            view = filling.view(step, buffer)
            fill(read, block.shard, block.offset + step.first, view)
            batch.verified += filling.take(step, view)
        load.row_staging.give(buffer)
        return batch

    is_last = False
    while not is_last:
        start = time.perf_counter()
        try:
            batch = await load.storage.on_thread(block.shard, carry_out)
        except OSError as error:
            raise read_error(block.shard, block.offset, block.nbytes, error) from error
        load.tracer.note("read", block.shard, start, batch.read)
        load.meter.note(
            read=batch.read, wanted=batch.wanted, verified=batch.verified, current=piece.table.name
        )
        is_last = batch.is_last
