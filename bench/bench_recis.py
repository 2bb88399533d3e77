"""How fast RecIS's own tables are filled, beside ours: a stand-in, as RecIS cannot be installed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

from asyncloader import Loader
from bench._cache import warm
from bench._cases import TABLE, table_case
from bench._measure import Contender, interleave, named
from bench._raw import shards
from bench._results import Goal, Speed
from bench._truth import same_bits, table_rows
from bench.bench_tables import ours
from tests.recis_table import IdMap, StandIn

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from bench._cases import TableCase
    from bench._results import Results
    from bench._scale import Scale
    from tests.oracle import TableData
    from tests.recis_table import Longs

ROUNDS = 7
BLOCK = 10_240  # of tables under RecIS's `EmbeddingEngine`
NAME = "into a stand-in for RecIS's table"


def _find(keys: Any, values: Any, at: Any, ids: Any, found: Any) -> None:  # noqa: ANN401
    for number in range(len(ids)):
        place = at[number]
        while values[place] != -1:
            if keys[place] == ids[number]:
                found[number] = values[place]
                break
            place = (place + 1) & (len(keys) - 1)


def _add(keys: Any, values: Any, at: Any, ids: Any, found: Any) -> None:  # noqa: ANN401
    for number in range(len(ids)):
        place = at[number]
        while values[place] != -1:
            place = (place + 1) & (len(keys) - 1)
        keys[place], values[place] = ids[number], found[number]


_COMPILED = [numba.njit(loop, nogil=True) for loop in (_find, _add)]


class CompiledMap(IdMap):
    """As fast as one of C++; nothing is removed from it, and it has room for all."""

    def find(self, ids: Longs) -> Longs:
        found = np.full(len(ids), -1, np.int64)
        _COMPILED[0](self.keys, self.values, self._home(ids), ids, found)
        return found

    def add(self, ids: Longs, indices: Longs) -> None:
        _COMPILED[1](self.keys, self.values, self._home(ids), ids, indices)


class Timed(StandIn):
    """Counts the seconds that its lookups take."""

    seconds = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._map = CompiledMap(self._map.bits)

    def embedding_lookup(self, ids: Tensor, readonly: bool) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        try:
            return super().embedding_lookup(ids, readonly)
        finally:
            self.seconds += time.perf_counter() - start


def stand_in(truth: TableData, pool: Tensor) -> Timed:
    """Return a table whose blocks lie in a pool: how fast fresh memory is, is not ours to say."""
    used = 0

    def memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nonlocal used
        used += shape[0] * shape[1]
        return pool[used - shape[0] * shape[1] : used].view(shape)

    width = truth.slots["embedding"].shape[1]
    table = Timed([width], block_size=BLOCK, children=[TABLE], room=len(truth.ids), memory=memory)
    for slot in list(truth.slots)[1:]:
        table.append(slot, [width], torch.float32)
    return table


def check(table: Timed, truth: TableData) -> None:
    assert len(table.ids()) == len(truth.ids)
    index, _ = table.embedding_lookup(truth.ids.clone(), readonly=True)
    for slot, rows in truth.slots.items():
        assert same_bits(table.get_slot(slot).pick(index.numpy()), rows), slot


def theirs(case: TableCase, runner: asyncio.Runner, lookups: list[float]) -> Contender:
    blocks = len(case.truth.ids) // BLOCK + 1
    width = case.truth.slots["embedding"].shape[1]
    pool = torch.ones(len(case.truth.slots) * blocks * BLOCK * width)

    def load(table: Any) -> Timed:  # noqa: ANN401  # RecIS's has no type that is known
        runner.run(Loader(case.path, hashtables={TABLE: table}, strict=True).aload())
        lookups.append(table.seconds)
        filled: Timed = table
        return filled

    return Contender(
        name=NAME,
        role="variant",
        prepare=lambda: stand_in(case.truth, pool),
        run=load,
        check=lambda table: check(table, case.truth),
    )


def test_t8_a_table_of_recis(
    scratch: Callable[[str], Path], runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    case = table_case(scratch("recis"), table_rows(scale.ids // 2, scale.width), ranks=1)
    files = shards(case.path)
    warm(files)
    lookups: list[float] = []
    contenders = [ours("asyncloader's own", case, runner), theirs(case, runner, lookups)]
    speed = Speed(
        case="T8",
        what=f"{len(case.truth.ids):,} ids with {len(case.truth.slots)} slots, warm",
        nbytes=case.nbytes,
        times=interleave(contenders, rounds=scale.rounds(ROUNDS)),
    )

    results.speeds.append(speed)
    own, other = (named(speed.times, one.name).median for one in contenders)
    inside = sorted(lookups)[len(lookups) // 2]
    results.figure("T8", "rate, of our own table's", own / other, "of it", Goal("≥", 0.5))
    results.figure("T8", "lookups of the stand-in", inside / other, "of the time")
    results.figure("T8", "all else, of our own table's time", (other - inside) / own, "of it")
