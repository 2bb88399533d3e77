"""How fast ids are looked up, at rest and while the table is loaded."""

from __future__ import annotations

import copy
import statistics
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros
from bench._cases import TABLE, TableCase, rows_at, table_loader
from bench._measure import Contender, interleave, named
from bench._results import Goal, Results, Speed
from examples.made_up import filled_table

if TYPE_CHECKING:
    import asyncio

    from asyncloader import HashTable
    from bench._scale import Scale

BATCH = 10_000
BATCHES = 64
IDLE = 0.5
"""Seconds for which the idle rate is measured before each load."""


class Looker(threading.Thread):
    """Looks up batches of ids, one after the other, until told to stop."""

    def __init__(self, table: HashTable, batches: list[torch.Tensor]) -> None:
        super().__init__()
        self._table = table
        self._batches = batches
        self._stop_now = threading.Event()
        self.done: list[float] = []
        """When each lookup was over."""
        self.took: list[float] = []
        """How long it took."""

    def run(self) -> None:
        while not self._stop_now.is_set():
            for batch in self._batches:
                began = time.perf_counter()
                self._table.lookup(batch)
                self.done.append(time.perf_counter())
                self.took.append(self.done[-1] - began)
                if self._stop_now.is_set():
                    break

    def stop(self) -> None:
        self._stop_now.set()
        self.join()

    def times(self, start: float, end: float) -> list[float]:
        """Return how long those took that ended between two moments."""
        found = zip(self.done, self.took, strict=True)
        return [seconds for moment, seconds in found if start <= moment < end]

    def rate(self, start: float, end: float) -> float:
        """Return the lookups a second between two moments."""
        return sum(start <= moment < end for moment in self.done) / (end - start)


def random_batches(ids: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Return batches of some of these ids, each another one."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(len(ids), (size,), generator=generator) for _ in range(BATCHES)]


def test_t6_lookups_while_a_table_is_loaded(
    one_rank: TableCase, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    """The table holds half of the ids already; those are looked up, a thousand at a time."""
    half = rows_at(one_rank.truth, np.arange(0, len(one_rank.truth.ids), 2))
    batches = [half.ids[rows] for rows in random_batches(half.ids, 1000)]
    idle: list[float] = []
    loading: list[float] = []
    loads: list[float] = []
    late: list[float] = []

    filled = filled_table(TABLE, half)
    for number in range(1 + max(1, scale.rounds(4))):
        table = copy.deepcopy(filled)
        looker = Looker(table, batches)
        looker.start()
        time.sleep(IDLE)
        start = time.perf_counter()
        runner.run(table_loader(one_rank.path, table).aload())
        end = time.perf_counter()
        looker.stop()
        if number:  # the first was to warm up
            idle.append(looker.rate(start - IDLE, start))
            loading.append(looker.rate(start, end))
            loads.append(end - start)
            usual = statistics.median(looker.times(start - IDLE, start))
            late.append(float(np.percentile(looker.times(start, end), 99)) / usual)
    one_rank.check(table)

    share = statistics.median(loading) / statistics.median(idle)
    results.figure("T6", "lookups during a load", share, "of their idle rate", Goal("≥", 0.5))
    results.figure("T6", "that load", statistics.median(loads), "s")
    what, unit = "p99 of a lookup during a load", "times its idle median"
    results.figure("T6", what, statistics.median(late), unit, Goal("≤", 3.0))


def test_t7_lookup_of_random_ids(one_rank: TableCase, results: Results, scale: Scale) -> None:
    """Both on one thread: torch would spread `index_select`, and a server has other requests."""
    ids, embedding = one_rank.truth.ids, one_rank.truth.slots["embedding"]
    rows = zeros(embedding.shape, embedding.dtype).copy_(embedding)  # memory as the table has it
    table = one_rank.full_table()
    known = random_batches(ids, min(BATCH, len(ids)))
    wanted = [ids[batch] for batch in known]

    def lookups(_: None) -> list[torch.Tensor]:
        return [table.lookup(batch) for batch in wanted]

    def selects(_: None) -> list[torch.Tensor]:
        return [rows.index_select(0, batch) for batch in known]

    def check(found: list[torch.Tensor]) -> None:
        for got, batch in zip(found, known, strict=True):
            assert torch.equal(got.view(torch.int32), rows[batch].view(torch.int32))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = interleave(
            [
                Contender(name="index_select", role="variant", run=selects, check=check),
                Contender(name="lookup", role="ours", run=lookups, check=check),
            ],
            rounds=scale.rounds(9),
        )
    finally:
        torch.set_num_threads(threads)

    width = rows.shape[1]
    what = f"{len(known[0]):,} random ids {BATCHES} times, {width} F32 each, 1 thread"
    nbytes = BATCHES * len(known[0]) * width * 4
    results.speeds.append(Speed(case="T7", what=what, nbytes=nbytes, times=times))
    ratio = named(times, "index_select").median / named(times, "lookup").median
    results.figure("T7", "lookup", ratio, "of index_select", Goal("≥", 0.5))
