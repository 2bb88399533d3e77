"""How fast hash tables load, into tables that are new each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from asyncloader._memory import zeros  # the same kind of memory as the table's own
from bench._cases import table_loader
from bench._measure import alternate
from bench._raw import STEP, read_raw, shards, steps
from bench._results import Results, Speed

if TYPE_CHECKING:
    import asyncio

    from pytest_benchmark.fixture import BenchmarkFixture

    from bench._cases import TableCase


def measure(
    benchmark: BenchmarkFixture,
    case: TableCase,
    runner: asyncio.Runner,
    *,
    name: str,
    what: str,
    share: int = 1,
    goal: float | None,
) -> Speed:
    """Compare with a raw read of all shards into one `share`-th as much fresh memory."""
    files = shards(case.path)
    room = -(-steps(files) // share) * STEP

    def raw() -> float:
        return read_raw(files, zeros((room,), torch.uint8).numpy().data)

    loads, raws = alternate(
        benchmark,
        rounds=5,
        fresh=room,
        raw=raw,
        prepare=case.table,
        load=lambda table: runner.run(table_loader(case.path, table).aload()),
        check=case.check,
    )
    return Speed(
        case=name,
        what=what,
        nbytes=sum(file.stat().st_size for file in files),
        load_seconds=loads,
        raw_seconds=raws,
        goal=goal,
    )


def test_t1_a_table_saved_by_one_rank(
    benchmark: BenchmarkFixture, one_rank: TableCase, runner: asyncio.Runner, results: Results
) -> None:
    what = f"{len(one_rank.truth.ids):,} ids, 1 rank"
    results.speeds.append(measure(benchmark, one_rank, runner, name="T1", what=what, goal=0.35))


def test_t2_a_table_saved_by_four_ranks(
    benchmark: BenchmarkFixture, four_ranks: TableCase, runner: asyncio.Runner, results: Results
) -> None:
    what = f"{len(four_ranks.truth.ids):,} ids, 4 ranks"
    results.speeds.append(measure(benchmark, four_ranks, runner, name="T2", what=what, goal=0.35))


def test_t4_a_quarter_of_a_table_saved_by_one_rank(
    benchmark: BenchmarkFixture, quarter: TableCase, runner: asyncio.Runner, results: Results
) -> None:
    what = f"{len(quarter.truth.ids):,} ids of those"
    results.speeds.append(
        measure(benchmark, quarter, runner, name="T4", what=what, share=4, goal=None)
    )
