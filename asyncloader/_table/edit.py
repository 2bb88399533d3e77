"""Small changes to a table, made at once on the caller's thread."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from asyncloader._memory.allocation import zeros

from .fold import Fold
from .segments import Segment, Segments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .state import TableState
    from .update import TableUpdate


def insert(update: TableUpdate, ids: NDArray[np.int64], rows: torch.Tensor, slot: str) -> None:
    """Put ids, encoded, and their rows of one slot in, and commit."""
    try:
        layer = update.layer(frozenset({slot}), len(ids))
        if len(ids):
            first = update.reserve(layer, len(ids), 0)
            update.view("id", first, len(ids)).copy_(torch.from_numpy(ids))
            update.view(slot, first, len(ids)).copy_(rows.detach())
            jobs = update.index_jobs(layer, first, len(ids), None, threads=1)
            update.indexed(layer, [job() for job in jobs])
        for wave in update.finish(threads=1):
            for finishing in wave:
                finishing()
    except BaseException:
        update.abort()
        raise
    update.commit()


def delete(state: TableState, ids: NDArray[np.int64], *, block_size: int) -> TableState:
    """Return a state without these ids, encoded."""
    rows, missing = state.find(ids)
    if missing == len(ids):
        return state
    fold = Fold(state, state.segments, state.ids, state.end, block_size)
    fold.drop(rows[rows >= 0])
    for wave in fold.tidy():
        for job in wave:
            job()
    return fold.state()


def with_room(state: TableState, count: int, *, block_size: int) -> TableState:
    """Return the same state, with memory for `count` ids in all."""
    more = count - state.index.count
    segments, ids, index = state.segments, state.ids, state.index
    if segments.capacity - state.end < more:
        blocks = -(-more // block_size)
        new = Segment.allocate(state.slots, state.end, blocks * block_size, state.device)
        segments = Segments.of((*segments.items, new))
    if len(ids) - state.end < more:
        ids = zeros((state.end + more,), torch.int64).numpy()
        ids[: state.end] = state.ids[: state.end]
    if index.room < count:
        index = index.grown(count, ids, state.seed)
    return replace(state, segments=segments, ids=ids, index=index)
