"""Compares tables, a sub-slice of all ids at a time, so that neither has to fit into memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.slices import gen_slice
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.filling import check_rows, fill, make_table, row_bytes

from .comparison import Change, combined, compare
from .contents import row_kind
from .difference import SlotDifference, TableDifference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from asyncloader._checkpoint.slices import Slice
    from asyncloader._checkpoint.stored import Stored
    from asyncloader._table.hashtable import HashTable
    from asyncloader._tools.stages import Stages

    from .contents import Content, StoredTable


# A table that is being filled takes more than its rows: room to grow, and what is on its way.
_OVERHEAD = 1.5


def sub_slices(a: StoredTable, b: StoredTable, *, budget: int) -> int:
    """Return into how many sub-slices to cut, so that one of both sides fits into the budget.

    Args:
        a: One table.
        b: The other.
        budget: Bytes.
    """
    taken = sum(table.ids.rows * row_bytes(table.slots) for table in (a, b))
    return min(max(-int(-taken * _OVERHEAD // budget), 1), a.slice_size)


async def compare_table(
    a: Content, b: Content, name: str, *, budget: int, stages: Stages, notes: list[str]
) -> TableDifference:
    """Compare a table that both have.

    Args:
        a: One checkpoint.
        b: The other.
        name: The table.
        budget: Bytes that the rows of both sides may take at a time.
        stages: Are told of what was read.
        notes: Receives what is odd.

    Raises:
        PlanError: If something does not fit together.
        CheckpointError: Likewise, or if bytes are not those that were written.
        ReadError: If the storage failed.
    """
    one, other = a.tables[name], b.tables[name]
    both = [slot for slot in one.slots if slot in other.slots]
    for content, table in ((a, one), (b, other)):
        for stored in table.slots.values():
            if not stored.shape:  # of which nothing would be read
                check_rows(content.manifest.location, stored)
    loaded = [slot for slot in both if _comparable(one.slots[slot], other.slots[slot])]
    tally = _Tally(slots={slot: _SlotTally() for slot in both})
    count = sub_slices(one, other, budget=budget)
    window = max(budget // 16, 1)
    for number in range(count):
        part = gen_slice(number, count, one.slice_size)
        left = await _load(a, one, loaded, part, stages, tally.left_a)
        right = await _load(b, other, loaded, part, stages, tally.left_b)
        compare_both = partial(tally.compare, left, right, loaded, window)
        await run_jobs(a.session.threads.kernels, [compare_both])
        del left, right, compare_both
    for content, table, lost in ((a, one, tally.left_a), (b, other, tally.left_b)):
        lost.tell(content.manifest.location, table, notes.append)
    return tally.result(one, other)


def _comparable(one: Stored, other: Stored) -> bool:
    return row_kind(one) == row_kind(other) and bool(one.shape) and 0 not in one.shape[1:]


async def _load(  # noqa: PLR0917
    content: Content,
    table: StoredTable,
    slots: list[str],
    part: Slice,
    stages: Stages,
    left_out: _LeftOut,
) -> HashTable:
    """Load the ids of one sub-slice, and their rows."""
    wanted = {slot: table.slots[slot] for slot in slots}
    make = partial(make_table, content.manifest.location, table.name, wanted, part)
    [made] = await run_jobs(content.session.threads.kernels, [make])
    filled = await fill(
        content.session,
        content.manifest,
        {table.name: (made, wanted)},
        {},
        progress=stages.tell,
    )
    stages.next()
    counts = filled.counts.get(table.name)
    if counts is not None:
        left_out.rows += counts.rows
        left_out.duplicates += counts.duplicates
    return made


@dataclass(slots=True)
class _LeftOut:
    """Counts rows, to find those that nobody loads."""

    rows: int = 0
    duplicates: int = 0

    def tell(self, location: str, table: StoredTable, note: Callable[[str], object]) -> None:
        strays = table.ids.rows - self.rows
        if self.duplicates:
            text = f"{self.duplicates:,} rows of {table.name!r} gave way to a later one of their id"
            note(f"{location}: {text}")
        if strays:
            text = f"{strays:,} ids of {table.name!r} lie outside the slice that their block claims"
            note(f"{location}: {text}")


@dataclass(slots=True)
class _SlotTally:
    different: int = 0
    changes: list[Change] = field(default_factory=list)


@dataclass(slots=True)
class _Tally:
    """What was found in the sub-slices so far."""

    slots: Mapping[str, _SlotTally]
    lost: int = 0
    gained: int = 0
    kept: int = 0
    left_a: _LeftOut = field(default_factory=_LeftOut)
    left_b: _LeftOut = field(default_factory=_LeftOut)

    def compare(self, a: HashTable, b: HashTable, slots: list[str], window: int) -> None:
        """Compare two tables of the same slice; belongs on a thread.

        Args:
            a: One.
            b: The other.
            slots: Whose rows to compare.
            window: Bytes of rows to look at together.
        """
        ids = a.ids()
        kept = ids[b.contains(ids)]
        self.kept += len(kept)
        self.lost += len(ids) - len(kept)
        self.gained += len(b) - len(kept)
        for slot in slots:
            step = max(window // a.slots()[slot].row_bytes, 1)
            for begin in range(0, len(kept), step):
                self._compare_rows(a, b, slot, kept[begin : begin + step])

    def _compare_rows(self, a: HashTable, b: HashTable, slot: str, ids: torch.Tensor) -> None:
        change, where = compare(a.lookup(ids, slot), b.lookup(ids, slot))
        if change.different:
            width = a.slots()[slot].row_bytes // a.slots()[slot].dtype.itemsize
            tally = self.slots[slot]
            tally.different += len(np.unique(where // width))
            tally.changes.append(change)

    def result(self, one: StoredTable, other: StoredTable) -> TableDifference:
        return TableDifference(
            name=one.name,
            lost=self.lost,
            gained=self.gained,
            kept=self.kept,
            slots=tuple(
                SlotDifference(
                    name=slot,
                    a=row_kind(one.slots[slot]),
                    b=row_kind(other.slots[slot]),
                    rows=self.kept
                    if row_kind(one.slots[slot]) == row_kind(other.slots[slot])
                    else 0,
                    different=tally.different,
                    change=combined(tally.changes),
                )
                for slot, tally in self.slots.items()
            ),
        )
