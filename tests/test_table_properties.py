"""Whatever is done to a table, in whatever order, it holds what the model in plain dicts holds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from asyncloader import HashTable, UpdateCounts
from tests.oracle import ModelTable, encode_id, flat_bytes, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from asyncloader._table.update import TableUpdate

EXTREMES = [-(2**63), 2**63 - 1, -1, 2**52, 2**52 - 1]
SLOTS = {
    "a": ((), torch.int64, 3.0),
    "b": ((2, 1), torch.float16, -0.0),
    "c": ((1,), torch.bool, 1.0),
    "d": ((3,), torch.float8_e5m2, 0.0),
}
CHILDREN = ["x", "y"]
# Numbers of a range this small meet again and again.
some_ids = st.lists(st.one_of(st.integers(0, 12), st.sampled_from(EXTREMES)), max_size=12)
many_ids = st.integers(0, 100).map(lambda start: list(range(start, start + 60)))
id_lists = st.one_of(some_ids, some_ids, many_ids)
seeds = st.integers(0, 2**32)


def filled(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    raw = bytearray(rng.randbytes(torch.Size(shape).numel() * dtype.itemsize))
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    return (
        torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape).to(dtype)
    )


@dataclass(kw_only=True)
class Run:
    """Rows that lie side by side."""

    layer: int
    rank: int
    ids: Tensor
    slots: dict[str, Tensor]
    refused: list[bool]
    first: int = -1

    def put_into(self, model: ModelTable) -> None:
        kept = [row for row, refused in enumerate(self.refused) if not refused]
        model.put(self.ids[kept], {slot: _take(rows, kept) for slot, rows in self.slots.items()})


class Arrival(NamedTuple):
    """Rows `[lo, hi)` of a run, whose ids are there."""

    run: Run
    lo: int
    hi: int

    def take_in(self, update: TableUpdate, threads: int) -> None:
        run, first, count = self.run, self.run.first + self.lo, self.hi - self.lo
        refused = np.array(run.refused[self.lo : self.hi], np.bool_)
        update.make_room(run.layer, count)
        skip = refused if refused.any() else None
        jobs = update.index_jobs(run.layer, first, count, skip, threads=threads)
        update.indexed(run.layer, [job() for job in jobs])
        update.dropped(int(refused.sum()))


def _take(rows: Tensor, kept: list[int]) -> Tensor:
    if not kept:
        return rows[:0]
    raw = flat_bytes(rows).reshape(len(rows), -1)[kept]  # indexing does not know every dtype
    return raw.reshape(-1).view(rows.dtype).reshape(len(kept), *rows.shape[1:])


@dataclass(kw_only=True)
class Plan:
    """An update: layers of slots, and runs of rows for them."""

    layers: list[frozenset[str]]
    runs: list[Run] = field(default_factory=list)


class TableMachine(RuleBasedStateMachine):
    """A table, and a dict that is told the same."""

    @initialize(coalesced=st.booleans(), block_size=st.sampled_from([1, 3, 64]))
    def make(self, *, coalesced: bool, block_size: int) -> None:
        self.table = HashTable(
            [2],
            block_size=block_size,
            coalesced=coalesced,
            children=CHILDREN if coalesced else None,
            initializer=torch.nn.init.ones_,
        )
        self.slots: dict[str, tuple[tuple[int, ...], torch.dtype, float]] = {
            "embedding": ((2,), torch.float32, 1.0)
        }
        self.model = ModelTable(slots=self.slots, children=CHILDREN, coalesced=coalesced)

    def rows(self, slot: str, count: int, rng: random.Random) -> Tensor:
        shape, dtype, _ = self.slots[slot]
        return filled(rng, (count, *shape), dtype)

    def encode(self, ids: list[int], child: str) -> list[int]:
        number = CHILDREN.index(child)
        return [encode_id(id_, number) for id_ in ids] if self.table.coalesced else ids

    def as_child(self, child: str) -> str | None:
        return child if self.table.coalesced else None

    @rule(ids=id_lists, child=st.sampled_from(CHILDREN), data=st.data(), seed=seeds)
    def insert(self, ids: list[int], child: str, data: st.DataObject, seed: int) -> None:
        slot = data.draw(st.sampled_from(list(self.slots)))
        rows = self.rows(slot, len(ids), random.Random(seed))
        self.table.insert(
            torch.tensor(ids, dtype=torch.int64), rows, slot=slot, child=self.as_child(child)
        )
        encoded = torch.tensor(self.encode(ids, child), dtype=torch.int64)
        self.model.put(encoded, {slot: rows})

    @rule(ids=id_lists, child=st.sampled_from(CHILDREN))
    def delete(self, ids: list[int], child: str) -> None:
        gone = set(self.encode(ids, child)) & set(self.model.rows)
        count = self.table.delete(torch.tensor(ids, dtype=torch.int64), self.as_child(child))
        assert count == len(gone)
        for key in gone:
            del self.model.rows[key]

    @rule()
    def clear(self) -> None:
        self.table.clear()
        self.model.rows.clear()

    @precondition(lambda self: len(self.slots) <= len(SLOTS))
    @rule()
    def add_slot(self) -> None:
        name = list(SLOTS)[len(self.slots) - 1]
        shape, dtype, initial = self.slots[name] = SLOTS[name]
        self.table.add_slot(name, shape, dtype, initial)
        row = torch.full(shape, initial).to(dtype)[None]
        new = torch.tensor(list(self.model.rows), dtype=torch.int64)
        for key in new:
            self.model.put(key[None], {name: row})

    @rule(count=st.integers(0, 300))
    def reserve(self, count: int) -> None:
        self.table.reserve(count)

    @rule(
        seed=seeds,
        lists=st.lists(id_lists, max_size=5),
        layer_count=st.integers(1, 3),
        threads=st.integers(1, 3),
        keep=st.sampled_from([True, True, True, False]),
    )
    def update(
        self, seed: int, lists: list[list[int]], layer_count: int, threads: int, *, keep: bool
    ) -> None:
        rng = random.Random(seed)
        plan = self.plan(rng, lists, layer_count)
        update = self.table.begin(
            most=sum(len(run.ids) for run in plan.runs), expected=rng.randrange(30)
        )
        for slots in plan.layers:
            update.layer(slots, rng.randrange(30))
        self.write(update, plan, rng, threads)
        self.compare()
        for jobs in update.finish(threads=threads):
            for job in rng.sample(jobs, len(jobs)):
                job()
        self.compare()
        if not keep:
            update.abort()
            return
        assert update.commit() == self.expect(plan)

    def plan(self, rng: random.Random, lists: list[list[int]], layer_count: int) -> Plan:
        names = list(self.slots)
        layers = [
            frozenset(rng.sample(names, rng.randrange(len(names) + 1))) for _ in range(layer_count)
        ]
        plan = Plan(layers=layers)
        lists = [ids for ids in lists if ids]  # rows are reserved where there are any
        for rank, ids in zip(rng.sample(range(99), len(lists)), lists, strict=True):
            layer = rng.randrange(layer_count)
            child = rng.choice(CHILDREN)
            plan.runs.append(
                Run(
                    layer=layer,
                    rank=rank,
                    ids=torch.tensor(self.encode(ids, child), dtype=torch.int64),
                    slots={slot: self.rows(slot, len(ids), rng) for slot in layers[layer]},
                    refused=[rng.random() < 0.1 for _ in ids],
                )
            )
        return plan

    def write(self, update: TableUpdate, plan: Plan, rng: random.Random, threads: int) -> None:
        """Reserve rows in one order, and have their ids arrive in pieces in another."""
        arrivals: list[Arrival] = []
        for run in rng.sample(plan.runs, len(plan.runs)):
            count = len(run.ids)
            run.first = update.reserve(run.layer, count, run.rank)
            update.view("id", run.first, count).copy_(run.ids)
            for slot, rows in run.slots.items():
                update.view(slot, run.first, count).copy_(rows)
            cut = rng.randrange(count + 1)
            arrivals += [Arrival(run, 0, cut), Arrival(run, cut, count)]
            if rng.random() < 0.5:
                rng.shuffle(arrivals)
                while arrivals:
                    arrivals.pop().take_in(update, threads)
        rng.shuffle(arrivals)
        for arrival in arrivals:
            arrival.take_in(update, threads)

    def expect(self, plan: Plan) -> UpdateCounts:
        before, touched = set(self.model.rows), set[int]()
        rows = dropped = 0
        for run in sorted(plan.runs, key=lambda run: (run.layer, run.rank)):
            run.put_into(self.model)
            dropped += sum(run.refused)
            rows += len(run.ids) - sum(run.refused)
            kept = zip(run.ids.tolist(), run.refused, strict=True)
            touched |= {key for key, refused in kept if not refused}
        new, replaced = len(touched - before), len(touched & before)
        return UpdateCounts(
            rows=rows,
            new=new,
            replaced=replaced,
            duplicates=rows - new - replaced,
            dropped=dropped,
        )

    @invariant()
    def compare(self) -> None:
        ids = self.table.ids()
        found = {slot: self.table.rows(slot) for slot in self.slots}
        assert rows_of(ids, found) == self.model.rows
        order = torch.randperm(len(ids))
        looked_up = {slot: self.table.lookup(ids[order], slot) for slot in self.slots}
        assert rows_of(ids[order], looked_up) == self.model.rows
        assert len(self.table) == len(self.model.rows)
        probe = torch.tensor([*range(20), *EXTREMES])
        there = [id_ in self.model.rows for id_ in probe.tolist()]
        assert self.table.contains(probe).tolist() == there

    @invariant()
    def waste_is_bounded(self) -> None:
        """Dead rows are at most as many as live ones, blocks and what `reserve` asked for apart."""
        segments = self.table._state.segments.items
        dead = self.table._state.end - len(self.table)
        assert dead <= 4 * (len(self.table) + self.table.block_size)
        assert len(segments) <= 12


TestTable = TableMachine.TestCase
TestTable.settings = settings(stateful_step_count=25)
