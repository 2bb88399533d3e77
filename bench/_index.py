"""The id index of a table by itself: what it weighs, and building it with nothing else to do."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from asyncloader import HashTable

THREADS = 2
PIECE = 1 << 20
"""Ids that arrive at a time: 8 MiB, as much as a load reads at once."""


def index_bytes(table: HashTable) -> int:
    """Return what the index takes, the ids themselves not counted."""
    return table._state.index.words.nbytes  # noqa: SLF001  # users need not know


def build(table: HashTable, ids: Tensor) -> float:
    """Put ids into an empty table, rows untouched, and return the seconds that the index took.

    What a load does with ids, in the same pieces; copying them to where they stay is not counted,
    since a load reads them there.
    """
    update = table.begin(most=len(ids), expected=len(ids))
    layer = update.layer(frozenset(), len(ids))
    seconds = 0.0
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]
            first = update.reserve(layer, len(piece), start)
            update.view("id", first, len(piece)).copy_(piece)
            began = time.perf_counter()
            update.make_room(layer, len(piece))
            jobs = update.index_jobs(layer, first, len(piece), None, threads=THREADS)
            update.indexed(layer, list(pool.map(lambda job: job(), jobs)))
            seconds += time.perf_counter() - began
        began = time.perf_counter()
        for wave in update.finish(threads=THREADS):
            list(pool.map(lambda job: job(), wave))
        update.commit()
        return seconds + time.perf_counter() - began
