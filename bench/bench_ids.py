"""How fast ids are taken in where there are many, and their rows short."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench._cache import warm
from bench._cases import TABLE, TableCase, table_case, table_loader
from bench._index import build, index_bytes
from bench._measure import Contender, interleave, named
from bench._raw import raw_into_fresh, room_for, shards
from bench._results import Goal, Results, Speed
from bench._truth import table_rows
from examples.made_up import empty_table

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader import HashTable
    from bench._scale import Scale


@pytest.fixture
def many_ids(scratch: Callable[[str], Path], scale: Scale) -> TableCase:
    truth = table_rows(scale.many_ids, scale.many_width, ("embedding",))
    return table_case(scratch("many-ids"), truth, ranks=1)


def test_t5_many_ids_with_short_rows(
    many_ids: TableCase, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    case = many_ids
    files, ids = shards(case.path), case.truth.ids
    warm(files)
    sizes: list[int] = []

    def load(table: HashTable) -> HashTable:
        runner.run(table_loader(case.path, table).aload())
        sizes.append(index_bytes(table))
        return table

    ours = Contender(
        name="asyncloader",
        role="ours",
        prepare=case.table,
        run=load,
        check=case.check,
        fresh=room_for(files),
    )

    times = interleave([*raw_into_fresh(files), ours], rounds=scale.rounds(3))

    width = scale.many_width
    what = f"{len(ids):,} ids with 1 slot of {width} F32, warm"
    results.speeds.append(Speed(case="T5", what=what, nbytes=case.nbytes, times=times))
    rate = len(ids) / named(times, "asyncloader").median / 1e6
    results.figure("T5", "load, rows and all", rate, "M ids/s")
    results.figure("T5", "id index", sizes[-1] / len(ids), "bytes an id", Goal("≤", 20))


def test_t5_the_index_alone(many_ids: TableCase, results: Results, scale: Scale) -> None:
    ids = many_ids.truth.ids

    def check(built: tuple[HashTable, float]) -> None:
        table, _ = built
        assert len(table) == len(ids)
        assert bool(table.contains(ids).all())

    [times] = interleave(
        [
            Contender(
                name="id index, 2 threads",
                role="ours",
                prepare=lambda: empty_table(TABLE, many_ids.truth),
                run=lambda table: (table, build(table, ids)),
                clock=lambda built: built[1],
                check=check,
                fresh=28 * len(ids),
            )
        ],
        rounds=scale.rounds(3),
    )

    rate = len(ids) / times.median / 1e6
    results.figure("T5", "index build, 2 threads", rate, "M ids/s", Goal("≥", 50))
