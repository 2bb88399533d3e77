"""How late the caller's event loop is while a load runs on it.

What an idle loop shows, and one beside the raw read in two threads, stand beside it: that much is
the machine. Where a virtual machine's host has taken a processor away meanwhile, the round says
nothing of the load: one such moment is 20 to 90 ms.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
from typing import TYPE_CHECKING

from bench._cache import warm
from bench._cases import DenseCase, TableCase, table_loader, tensor_loader
from bench._machine import stolen_seconds
from bench._measure import fault_in
from bench._raw import carry_out, room_for, shards, tensor_reads
from bench._results import Goal, Lag, Results
from examples.lag import measuring_lag, percentile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncloader import HashTable
    from bench._scale import Scale

ROUNDS = 15


def measure(
    results: Results,
    runner: asyncio.Runner,
    what: str,
    work: Callable[[], Awaitable[object]],
    rounds: int,
    *,
    goals: bool = False,
) -> None:
    async def once() -> list[float]:
        lags: list[float] = []
        todo = work()
        gc.collect()  # or what earlier rounds left behind is cleared away within this one
        await measuring_lag(todo, lags)
        return lags

    runner.run(once())  # to warm up
    every: list[list[float]] = []
    ours: list[list[float]] = []
    for _ in range(max(1, rounds)):
        before = stolen_seconds()
        every.append(runner.run(once()))
        if stolen_seconds() == before:
            ours.append(every[-1])
    lags = list(itertools.chain.from_iterable(ours or every))
    lag = Lag(
        case="L1",
        what=what,
        rounds=len(every),
        stolen=len(every) - len(ours),
        ticks=len(lags),
        median=statistics.median(lags),
        p99=percentile(lags, 99),
        worst=max(lags),
        worst_of_all=max(map(max, every)),
    )
    results.lags.append(lag)
    if goals:
        results.figure("L1", f"{what}, 99th percentile", lag.p99 * 1e3, "ms", Goal("≤", 5))
        results.figure("L1", f"{what}, worst", lag.worst * 1e3, "ms", Goal("≤", 20))


def test_l1_nothing(results: Results, runner: asyncio.Runner, scale: Scale) -> None:
    measure(results, runner, "idle", lambda: asyncio.sleep(0.2), scale.rounds(ROUNDS))


def test_l1_raw_read(
    results: Results, runner: asyncio.Runner, scale: Scale, dense: DenseCase
) -> None:
    warm(dense.files())
    reads = tensor_reads(dense.files(), dense.destination())

    def work() -> Awaitable[object]:
        return asyncio.to_thread(carry_out, reads, threads=2)

    measure(results, runner, "beside the raw read, 2 threads", work, scale.rounds(ROUNDS))


def test_l1_dense(results: Results, runner: asyncio.Runner, scale: Scale, dense: DenseCase) -> None:
    warm(dense.files())
    tensors = dense.destination()

    def work() -> Awaitable[object]:
        return tensor_loader(dense.path, tensors).aload()

    measure(results, runner, "while D1 loads", work, scale.rounds(ROUNDS), goals=True)

    dense.check(tensors)


def test_l1_a_table(
    results: Results, runner: asyncio.Runner, scale: Scale, one_rank: TableCase
) -> None:
    warm(shards(one_rank.path))
    tables: list[HashTable] = []

    def work() -> Awaitable[object]:
        tables[:] = [one_rank.table()]
        fault_in(room_for(shards(one_rank.path)))
        return table_loader(one_rank.path, tables[0]).aload()

    measure(results, runner, "while T1 loads", work, scale.rounds(ROUNDS), goals=True)

    one_rank.check(tables[0])
