"""How fast hash tables load, into tables that are new each time, from a warm page cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench._cache import warm
from bench._cases import QUARTER, TableCase, saved_case, table_loader
from bench._measure import Contender, interleave, named
from bench._raw import raw_into_fresh, room_for, shards
from bench._results import Goal, Results, Speed, against_raw

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader import HashTable, LoadReport
    from bench._measure import Role
    from bench._scale import Scale

ROUNDS = 7


def ours(
    name: str,
    case: TableCase,
    runner: asyncio.Runner,
    *,
    role: Role = "ours",
    reports: list[LoadReport] | None = None,
) -> Contender:
    """Return a load into a new table; the table is made before."""

    def load(table: HashTable) -> HashTable:
        report = runner.run(table_loader(case.path, table).aload())
        if reports is not None:
            reports.append(report)
        return table

    return Contender(
        name=name,
        role=role,
        prepare=case.table,
        run=load,
        check=case.check,
        fresh=room_for(shards(case.path)),
        nbytes=case.nbytes if case.part is None else None,
    )


def whole(case: TableCase, runner: asyncio.Runner, name: str, what: str, rounds: int) -> Speed:
    """Measure a load of all ids beside the raw read of the same files."""
    files = shards(case.path)
    warm(files)
    contenders = [*raw_into_fresh(files), ours("asyncloader", case, runner)]
    return Speed(
        case=name,
        what=f"{len(case.truth.ids):,} ids with {len(case.truth.slots)} slots, {what}, warm",
        nbytes=case.nbytes,
        times=interleave(contenders, rounds=rounds),
    )


def test_t1_a_table_saved_by_one_rank(
    one_rank: TableCase, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    speed = whole(one_rank, runner, "T1", "saved by 1 rank", scale.rounds(ROUNDS))

    results.speeds.append(speed)
    against_raw(results, speed, Goal("≥", 0.6))


def test_t2_a_table_saved_by_four_ranks(
    four_ranks: TableCase, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    speed = whole(four_ranks, runner, "T2", "saved by 4 ranks", scale.rounds(ROUNDS))

    results.speeds.append(speed)
    against_raw(results, speed, Goal("≥", 0.6))


@pytest.fixture(params=[1, 4], ids=["one-rank", "four-ranks"])
def sorted_table(
    request: pytest.FixtureRequest, scratch: Callable[[str], Path], one_rank: TableCase
) -> TableCase:
    ranks: int = request.param
    return saved_case(scratch(f"sorted-{ranks}"), one_rank, ranks=ranks)


def test_t3_a_quarter_of_a_sorted_table(
    sorted_table: TableCase,
    four_ranks: TableCase,
    runner: asyncio.Runner,
    results: Results,
    scale: Scale,
) -> None:
    case = sorted_table.owned(QUARTER)
    what = f"¼ of the ids, sorted, saved by {case.path.name[-1]}"
    reports: list[LoadReport] = []

    speed = beside_t2(
        name="T3", what=what, case=case, t2=four_ranks, runner=runner, reports=reports, scale=scale
    )

    results.speeds.append(speed)
    row = 8 + sum(slot[:1].nbytes for slot in case.truth.slots.values())
    surplus = reports[-1].bytes_read / (row * len(case.truth.ids))
    results.figure("T3", f"{what}: bytes read", surplus, "of those owned", Goal("≤", 1.05))
    time = named(speed.times, what).median / named(speed.times, "all of T2").median
    results.figure("T3", f"{what}: time", time, "of T2's", Goal("≤", 0.35))


def test_t4_a_quarter_of_an_unsorted_table(
    one_rank: TableCase,
    four_ranks: TableCase,
    runner: asyncio.Runner,
    results: Results,
    scale: Scale,
) -> None:
    case = one_rank.owned(QUARTER)
    what = "¼ of the ids, unsorted"

    speed = beside_t2(
        name="T4", what=what, case=case, t2=four_ranks, runner=runner, reports=[], scale=scale
    )

    results.speeds.append(speed)
    time = named(speed.times, what).median / named(speed.times, "all of T2").median
    results.figure("T4", f"{what}: time", time, "of T2's", Goal("≤", 1))


def beside_t2(
    *,
    name: str,
    what: str,
    case: TableCase,
    t2: TableCase,
    runner: asyncio.Runner,
    reports: list[LoadReport],
    scale: Scale,
) -> Speed:
    """Measure a load of some ids beside that of all of T2's."""
    warm([*shards(case.path), *shards(t2.path)])
    contenders = [
        ours("all of T2", t2, runner, role="variant"),
        ours(what, case, runner, reports=reports),
    ]
    times = interleave(contenders, rounds=scale.rounds(ROUNDS))
    return Speed(case=name, what=f"{what}, beside T2, warm", nbytes=None, times=times)
