"""How late the caller's event loop is while a load runs on it.

What an idle loop shows, and one beside the raw read in two threads, stand beside it: the rest is
the machine.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
from typing import TYPE_CHECKING

import torch

from bench._cases import DenseCase, TableCase, table_loader, tensor_loader, touched
from bench._measure import fault_in
from bench._raw import STEP, read_raw, shards, steps
from bench._results import Lag, Results
from examples.lag import measuring_lag, percentile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncloader import HashTable

ROUNDS = 5


def measure(
    results: Results, runner: asyncio.Runner, what: str, work: Callable[[], Awaitable[object]]
) -> None:
    lags: list[float] = []

    async def once() -> None:
        todo = work()
        gc.collect()  # or what earlier rounds left behind is cleared away within this one
        await measuring_lag(todo, lags)

    runner.run(once())
    lags.clear()  # the first was to warm up
    for _ in range(ROUNDS):
        runner.run(once())
    results.lags.append(
        Lag(
            case="L1",
            what=what,
            ticks=len(lags),
            median=statistics.median(lags),
            p99=percentile(lags, 99),
            worst=max(lags),
        )
    )


def test_l1_nothing(results: Results, runner: asyncio.Runner) -> None:
    measure(results, runner, "idle", lambda: asyncio.sleep(0.2))


def test_l1_raw_read(results: Results, runner: asyncio.Runner, dense: DenseCase) -> None:
    files = shards(dense.path)
    buffer = torch.ones(steps(files) * STEP // 4).numpy().data.cast("B")

    measure(
        results, runner, "beside the raw read", lambda: asyncio.to_thread(read_raw, files, buffer)
    )


def test_l1_dense(results: Results, runner: asyncio.Runner, dense: DenseCase) -> None:
    tensors = touched({name: tuple(tensor.shape) for name, tensor in dense.truth.items()})

    measure(results, runner, "while D1 loads", lambda: tensor_loader(dense.path, tensors).aload())

    dense.check(tensors)


def test_l1_a_table(results: Results, runner: asyncio.Runner, one_rank: TableCase) -> None:
    tables: list[HashTable] = []

    def load() -> Awaitable[object]:
        tables[:] = [one_rank.table()]
        fault_in(steps(shards(one_rank.path)) * STEP)
        return table_loader(one_rank.path, tables[0]).aload()

    measure(results, runner, "while T1 loads", load)

    one_rank.check(tables[0])
