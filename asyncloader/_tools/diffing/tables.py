"""Compares tables, a sub-slice of all ids at a time, so that neither has to fit into memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asyncloader._checkpoint.slices import gen_slice
from asyncloader._loading.progress import Meter
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.allocation import fill, make_table, row_bytes
from asyncloader._tools.content import check_rows

from .comparison import Change, combined, compare
from .difference import Kind, SlotDifference, TableDifference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from asyncloader._checkpoint.slices import Slice
    from asyncloader._checkpoint.stored import Stored
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
    one, other = (side.content.tables[name] for side in (a, b))
    for side in (a, b):
        for stored in side.content.tables[name].slots.values():
            if not stored.shape:  # of which nothing would be read
                check_rows(side.content.location, stored)
    both = [slot for slot in one.slots if slot in other.slots]
    tallies = {slot: _SlotTally(one.slots[slot], other.slots[slot]) for slot in both}
    loaded = [slot for slot, tally in tallies.items() if tally.comparable]
    tally = _Tally(slots=tallies)
    # As many sub-slices as let one of both sides fit into the budget.
    taken = sum(table.ids.rows * row_bytes(table.slots) for table in (one, other))
    count = min(max(-int(-taken * _OVERHEAD // budget), 1), one.slice_size)
    window = max(budget // 16, 1)
    left_out = _LeftOut(), _LeftOut()
    for number in range(count):
        part = gen_slice(number, count, one.slice_size)
        left = await _load(a, name, loaded, part, stages, left_out[0])
        right = await _load(b, name, loaded, part, stages, left_out[1])
        compare_both = partial(tally.compare, left, right, loaded, window)
        await run_jobs(a.session.threads.kernels, [compare_both])
        del left, right, compare_both
    for side, rows in zip((a, b), left_out, strict=True):
        strays = side.content.tables[name].ids.rows - rows.taken
        if rows.duplicates:
            text = f"{rows.duplicates:,} rows of {name!r} gave way to a later one of their id"
            notes.append(f"{side.content.location}: {text}")
        if strays:
            text = f"{strays:,} ids of {name!r} lie outside the slice that their block claims"
            notes.append(f"{side.content.location}: {text}")
    return tally.result(name)


@dataclass(slots=True)
class _LeftOut:
    """Counts the rows of one side, to find those that no load takes."""

    taken: int = 0
    duplicates: int = 0


async def _load(  # noqa: PLR0917
    side: Side,
    name: str,
    slots: Sequence[str],
    part: Slice,
    stages: Stages,
    left_out: _LeftOut,
) -> HashTable:
    """Load the ids of one sub-slice, and their rows."""
    wanted = {slot: side.content.tables[name].slots[slot] for slot in slots}
    make = partial(make_table, side.content.location, name, wanted, part)
    [made] = await run_jobs(side.session.threads.kernels, [make])
    counts = await fill(
        side.session,
        side.content,
        {name: made},
        {name: wanted},
        tensors={},
        meter=Meter(0, stages.tell),
    )
    stages.next()
    if name in counts:
        left_out.taken += counts[name].rows
        left_out.duplicates += counts[name].duplicates
    return made


@dataclass(slots=True)
class _SlotTally:
    """What was found in a slot so far."""

    a: Stored
    b: Stored
    different: int = 0
    changes: list[Change] = field(default_factory=list)

    @property
    def alike(self) -> bool:
        return Kind.of_row(self.a) == Kind.of_row(self.b)

    @property
    def comparable(self) -> bool:
        return self.alike and bool(self.a.shape) and 0 not in self.a.shape[1:]


@dataclass(slots=True)
class _Tally:
    """What was found in the sub-slices so far."""

    slots: dict[str, _SlotTally]
    lost: int = 0
    gained: int = 0
    kept: int = 0

    def compare(self, a: HashTable, b: HashTable, slots: Sequence[str], window: int) -> None:
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

    def result(self, name: str) -> TableDifference:
        return TableDifference(
            name=name,
            lost=self.lost,
            gained=self.gained,
            kept=self.kept,
            slots=tuple(
                SlotDifference(
                    name=slot,
                    a=Kind.of_row(tally.a),
                    b=Kind.of_row(tally.b),
                    rows=self.kept if tally.alike else 0,
                    different=tally.different,
                    change=combined(tally.changes),
                )
                for slot, tally in self.slots.items()
            ),
        )
