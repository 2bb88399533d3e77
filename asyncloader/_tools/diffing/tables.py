"""Compares tables, a sub-slice of all ids at a time, so that neither has to fit into memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asyncloader._checkpoint.slices import gen_slice
from asyncloader._loading.progress import Meter
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.allocation import fill, make_table, row_bytes
from asyncloader._tools.content import check_rows

from .comparison import compare
from .difference import Change, Kind, SlotDifference, TableDifference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.progress import Stages
    from asyncloader._loading.session import Session
    from asyncloader._table.hashtable import HashTable
    from asyncloader._tools.content import Content


# A table that is being filled takes more than its rows: room to grow, and what is on its way.
_OVERHEAD = 1.5


class Side(NamedTuple):
    """One of the two checkpoints."""

    session: Session
    content: Content


async def compare_table(
    a: Side, b: Side, name: str, *, budget: int, stages: Stages, notes: list[str]
) -> TableDifference:
    """Compare a table that both have.

    The rows of both sides take no more than `budget` bytes at a time. `notes` receives oddities.
    """
    one, other = a.content.tables[name], b.content.tables[name]
    for side in (a, b):
        for stored in side.content.tables[name].slots.values():
            if not stored.shape:  # of which nothing would be read
                check_rows(side.content.location, stored)
    kinds = {
        slot: (Kind.of_row(stored), Kind.of_row(other.slots[slot]))
        for slot, stored in one.slots.items()
        if slot in other.slots
    }
    loaded = [slot for slot, (x, y) in kinds.items() if x == y and 0 not in x.shape]
    tally = _Tally({slot: [] for slot in kinds}, dict.fromkeys(kinds, 0))
    # As many sub-slices as let one of both sides fit into the budget.
    taken = sum(table.ids.rows * row_bytes(table.slots) for table in (one, other))
    count = min(max(-int(-taken * _OVERHEAD // budget), 1), one.slice_size)
    read = _Read(), _Read()
    for number in range(count):
        part = gen_slice(number, count, one.slice_size)
        left, right = [
            await _load(side, name, loaded, part, stages, rows)
            for side, rows in zip((a, b), read, strict=True)
        ]
        compare_both = partial(tally.compare, left, right, loaded, max(budget // 16, 1))
        await run_jobs(a.session.threads.kernels, [compare_both])
        del left, right, compare_both
    for side, rows in zip((a, b), read, strict=True):
        notes += rows.oddities(side.content, name)
    return TableDifference(
        name=name,
        lost=tally.lost,
        gained=tally.gained,
        kept=tally.kept,
        slots=tuple(
            SlotDifference(
                name=slot,
                a=x,
                b=y,
                rows=tally.kept if x == y else 0,
                different=tally.rows[slot],
                change=Change.sum(tally.changes[slot]),
            )
            for slot, (x, y) in kinds.items()
        ),
    )


@dataclass(slots=True)
class _Read:
    """Counts the rows of one side, to find rows that no load takes."""

    rows: int = 0
    duplicates: int = 0

    def oddities(self, content: Content, name: str) -> list[str]:
        strays = content.tables[name].ids.rows - self.rows
        texts = []
        if self.duplicates:
            texts.append(
                f"{self.duplicates:,} rows of {name!r} gave way to a later one of their id"
            )
        if strays:
            texts.append(
                f"{strays:,} ids of {name!r} lie outside the slice that their block claims"
            )
        return [f"{content.location}: {text}" for text in texts]


async def _load(  # noqa: PLR0917
    side: Side, name: str, slots: Sequence[str], part: Slice, stages: Stages, read: _Read
) -> HashTable:
    """Load the ids of one sub-slice, and their rows."""
    session, content = side
    wanted = {slot: content.tables[name].slots[slot] for slot in slots}
    make = partial(make_table, content.location, name, wanted, part)
    [table] = await run_jobs(session.threads.kernels, [make])
    meter = Meter(0, stages.tell)
    counts = await fill(session, content, {name: table}, {name: wanted}, tensors={}, meter=meter)
    stages.next()
    if name in counts:
        read.rows += counts[name].rows
        read.duplicates += counts[name].duplicates
    return table


@dataclass(slots=True)
class _Tally:
    """What was found in the sub-slices so far."""

    changes: dict[str, list[Change]]
    """By slot."""

    rows: dict[str, int]
    """That differ, by slot."""

    lost: int = 0
    gained: int = 0
    kept: int = 0

    def compare(self, a: HashTable, b: HashTable, slots: Sequence[str], window: int) -> None:
        """Compare two tables of the same slice, so many bytes of rows at a time; on a thread."""
        ids = a.ids()
        kept = ids[b.contains(ids)]
        self.kept += len(kept)
        self.lost += len(ids) - len(kept)
        self.gained += len(b) - len(kept)
        for slot in slots:
            step = max(window // a.slots()[slot].row_bytes, 1)
            for begin in range(0, len(kept), step):
                self._compare_rows(a, b, slot, kept[begin : begin + step])

    def _compare_rows(self, a: HashTable, b: HashTable, slot: str, ids: Tensor) -> None:
        change, where = compare(a.lookup(ids, slot), b.lookup(ids, slot))
        if change.different:
            width = a.slots()[slot].row_bytes // a.slots()[slot].dtype.itemsize
            self.rows[slot] += len(np.unique(where // width))
            self.changes[slot].append(change)
