"""Rows that stay on the disk: how fast lookups are, cold, warm and from the cache of hot rows."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from asyncloader import DiskTable, Loader
from asyncloader._memory.allocation import zeros
from bench._results import Goal, Results
from bench._rows import NAME, RowsCase, rows_case
from bench.disk._peers import cold_or_skip, peers
from bench.disk._rates import Rate, asked, asked_by_threads, device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench._scale import Scale

WIDTH = 256
SECONDS = 1.5
ROUNDS = 3


@pytest.fixture(scope="module")
def rows(scratch: Callable[[str], Path], scale: Scale) -> RowsCase:
    return rows_case(scratch("rows"), count=scale.rows_on_disk, width=WIDTH)


@pytest.fixture(scope="module")
def fewer(scratch: Callable[[str], Path], scale: Scale) -> RowsCase:
    """Return a quarter of them: peers are slow to write."""
    return rows_case(scratch("fewer"), count=scale.rows_on_disk // 4, width=WIDTH)


@pytest.fixture(scope="module")
def times(scale: Scale) -> tuple[int, float]:
    """Return how many rounds, and the seconds of each."""
    return max(scale.rounds(ROUNDS), 1), SECONDS if scale.most_rounds else 0.02


async def opened(case: RowsCase, **how: Any) -> DiskTable:  # noqa: ANN401  # of DiskTable
    table = DiskTable([case.width // 4], name=NAME, **how)
    await Loader(case.path, {NAME: table}).aload()
    return table


def batches(ids: np.ndarray[Any, Any], size: int, *, zipf: float = 0.0) -> Iterator[torch.Tensor]:
    """Yield batches of ids, uniform ones, or by their rank's power; without end."""
    rng = np.random.default_rng(1)
    if not zipf:
        while True:
            yield torch.from_numpy(ids[rng.integers(0, len(ids), size)])
    by_rank = rng.permutation(len(ids))
    weights = np.cumsum(1 / np.arange(1, len(ids) + 1) ** zipf)
    while True:
        ranks = np.searchsorted(weights, rng.random(size) * weights[-1])
        yield torch.from_numpy(ids[by_rank[ranks]])


def check(case: RowsCase, table: DiskTable, runner: asyncio.Runner) -> None:
    """Fail unless rows are right."""
    ids = case.all_ids()[:: max(case.count // 997, 1)]
    case.check(ids, runner.run(table.alookup(torch.from_numpy(ids))))


COLD = {"10,000": (10_000, 1, 0.9), "1,000": (1000, 1, 0.8), "4 times 1,000": (1000, 4, 0.9)}


def test_k1_cold_rows(
    rows: RowsCase, runner: asyncio.Runner, results: Results, times: tuple[int, float]
) -> None:
    rounds, seconds = times
    ids = rows.all_ids()
    for name, how, micros in (("ahead", {}, 4.5), ("direct_io", {"direct_io": True}, 3.0)):
        table = runner.run(opened(rows, **how))
        check(rows, table, runner)
        for what, (size, at_once, share) in COLD.items():
            wanted, ratios, spent = batches(ids, size), [], []
            for _ in range(rounds):
                before = device(rows.shard, max(seconds, 0.2))
                cold_or_skip(rows.shard)
                ready = iter(list(itertools.islice(wanted, 200_000 // size)))
                chained = itertools.chain(ready, wanted)
                asking = asked(table.alookup, chained, seconds=seconds, at_once=at_once)
                found = runner.run(asking)
                after = device(rows.shard, max(seconds, 0.2))
                ratios.append(found.per_second / ((before + after) / 2))
                spent.append(found.micros)
            share_of = statistics.median(ratios)
            results.figure(
                "K1", f"cold, {what} ids, {name}", share_of, "of fio's", Goal("≥", share)
            )
            if size * at_once == 10_000:
                spent_each = statistics.median(spent)
                results.figure("K1", f"processor time, {name}", spent_each, "us", Goal("≤", micros))


def test_k2_rows_of_the_page_cache_and_of_the_cache_of_hot_rows(
    rows: RowsCase, runner: asyncio.Runner, results: Results, times: tuple[int, float]
) -> None:
    rounds, seconds = times
    some = rows.all_ids()[:: max(rows.count // 200_000, 1)]
    wanted = itertools.cycle(list(itertools.islice(batches(some, 10_000), 40)))
    bounds = {"page cache": (0, 700e3), "all hits": (max(2 * len(some) * WIDTH, 1 << 20), 8e6)}
    for what, (cache_bytes, least) in bounds.items():
        table = runner.run(opened(rows, cache_bytes=cache_bytes))
        for _ in range(3):  # so that both caches have them
            runner.run(asked(table.alookup, itertools.islice(wanted, 41), seconds=0))
            for ids in itertools.islice(wanted, 40):
                runner.run(table.alookup(ids))
        found = [runner.run(asked(table.alookup, wanted, seconds=seconds)) for _ in range(rounds)]
        rate = statistics.median(one.per_second for one in found)
        results.figure("K2", f"{what}, 10,000 ids", rate, "rows/s", Goal("≥", least))


def test_k3_skewed_ids_with_and_without_a_cache(
    rows: RowsCase, runner: asyncio.Runner, results: Results, times: tuple[int, float]
) -> None:
    """Zipf 1.05, a cache of 5 % of the rows; past the page cache, which would help both."""
    rounds, seconds = times
    ids, kept = rows.all_ids(), rows.count // 20
    wanted = batches(ids, 10_000, zipf=1.05)
    plain = runner.run(opened(rows, direct_io=True))
    cached = runner.run(opened(rows, direct_io=True, cache_bytes=kept * (WIDTH + 13)))
    hot = np.random.default_rng(1).permutation(len(ids))[:kept]  # the first by rank
    runner.run(cached.awarm(torch.from_numpy(ids[hot])))
    for _ in range(int(100 * seconds)):
        runner.run(cached.alookup(next(wanted)))
    ratios = []
    for _ in range(rounds):
        one, other = (
            runner.run(asked(table.alookup, wanted, seconds=seconds)) for table in (plain, cached)
        )
        ratios.append(other.per_second / one.per_second)
    results.figure(
        "K3",
        "Zipf 1.05, cache of 5 %",
        statistics.median(ratios),
        "times its rate without",
        Goal("≥", 3.0),
    )
    stats = cached.stats()
    results.figure("K3", "hits of that, warming included", stats.hit_rate, "of ids")


def test_k4_latency_of_few_ids(
    rows: RowsCase, runner: asyncio.Runner, results: Results, times: tuple[int, float]
) -> None:
    _, seconds = times
    ids = rows.all_ids()
    table = runner.run(opened(rows))

    async def few_beside_many() -> Rate:
        many = asyncio.create_task(
            asked(table.alookup, batches(ids, 10_000), seconds=2 * seconds, at_once=3)
        )
        found = await asked(table.alookup, batches(ids, 10), seconds=seconds)
        await many
        return found

    cold_or_skip(rows.shard)
    one = runner.run(asked(table.alookup, batches(ids, 1), seconds=seconds))
    results.figure("K4", "one id, cold, p50", one.p50 * 1e3, "ms", Goal("≤", 0.3))
    cold_or_skip(rows.shard)
    few = runner.run(few_beside_many())
    results.figure("K4", "ten ids beside 3 times 10,000, p50", few.p50 * 1e3, "ms", Goal("≤", 5.0))


def test_k5_lag_of_the_loop_while_cold_rows_are_read(
    rows: RowsCase, runner: asyncio.Runner, results: Results, times: tuple[int, float]
) -> None:
    rounds, seconds = times
    ids = rows.all_ids()
    table = runner.run(opened(rows))

    async def lag(*, busy: bool) -> float:
        late: list[float] = []

        async def tick() -> None:
            while True:
                due = time.perf_counter() + 0.001
                await asyncio.sleep(0.001)
                late.append(time.perf_counter() - due)

        ticking = asyncio.create_task(tick())
        ready = iter(list(itertools.islice(batches(ids, 10_000), 40)))
        wanted = itertools.chain(ready, batches(ids, 10_000))
        await (asked(table.alookup, wanted, seconds=seconds) if busy else asyncio.sleep(seconds))
        ticking.cancel()
        return float(np.percentile(late, 99))

    more = []
    for _ in range(rounds):
        cold_or_skip(rows.shard)
        more.append(runner.run(lag(busy=True)) - runner.run(lag(busy=False)))
    worse = statistics.median(more) * 1e3
    results.figure(
        "K5", "lag, p99, above idle, cold lookups all the time", worse, "ms", Goal("≤", 3.0)
    )


def test_k6_opening(
    rows: RowsCase, runner: asyncio.Runner, results: Results, times: tuple[int, float]
) -> None:
    rounds, _ = times
    ratios = []
    for _ in range(rounds + 1):
        memory = zeros((rows.count,), torch.int64).numpy()  # as the table takes it
        start = time.perf_counter()
        with rows.shard.open("rb", buffering=0) as file:
            file.seek(rows.ids)
            view, done = memory.view(np.uint8).data, 0
            while done < len(view):
                done += file.readinto(view[done : done + (16 << 20)]) or 0
        read = time.perf_counter() - start
        del memory, view
        start = time.perf_counter()
        table = runner.run(opened(rows))
        ratios.append((time.perf_counter() - start) / read)
    took = statistics.median(ratios[1:])
    results.figure("K6", f"opening {rows.count:,} ids", took, "of reading them", Goal("≤", 1.3))
    each = table.stats().nbytes / rows.count
    results.figure("K6", "memory an id", each, "B", Goal("≤", 8.5))


def test_k7_beside_what_others_do(
    fewer: RowsCase,
    scratch: Callable[[str], Path],
    runner: asyncio.Runner,
    results: Results,
    times: tuple[int, float],
) -> None:
    """Cold, 1,000 ids a request, one at a time and eight; all of them blocking, on threads."""
    rounds, seconds = times
    ids = fewer.all_ids()
    folder = scratch("fewer-peers")
    folder.mkdir(exist_ok=True)
    known = peers(fewer, folder)
    for at_once in (1, 8):
        rates: dict[str, list[float]] = {}
        for _ in range(rounds):
            for peer in known:
                cold_or_skip(peer.place)
                with peer.opened() as ask:
                    found = asked_by_threads(
                        ask, batches(ids, 1000), seconds=seconds, at_once=at_once
                    )
                    some = ids[:50].copy()
                    fewer.check(some, ask(torch.from_numpy(some)))
                rates.setdefault(peer.name, []).append(found.per_second)
            for name, how in (("ahead", {}), ("direct_io", {"direct_io": True})):
                table = runner.run(opened(fewer, **how))
                cold_or_skip(fewer.shard)
                asking = asked(table.alookup, batches(ids, 1000), seconds=seconds, at_once=at_once)
                rates.setdefault(name, []).append(runner.run(asking).per_second)
        ours = statistics.median(rates["ahead"])
        for peer in known:
            ratio = ours / statistics.median(rates[peer.name])
            what = f"cold, {at_once} at a time, beside {peer.name}"
            results.figure("K7", what, ratio, "times its rate", Goal("≥", 1.0))
        ratio = statistics.median(rates["direct_io"]) / ours
        results.figure("K7", f"{at_once} at a time, direct_io", ratio, "of our rate without")
