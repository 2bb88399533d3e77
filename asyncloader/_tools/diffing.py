"""Compares two checkpoints, whatever ranks wrote them and in whatever order.

Neither has to fit into memory: a table is compared a sub-slice of all ids at a time, a tensor a
window of elements at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from asyncloader._checkpoint.slices import gen_slice
from asyncloader._loading.opening import open_session
from asyncloader._loading.progress import Meter, Stages
from asyncloader._loading.reading import has_numbers, read_stored
from asyncloader._threads.jobs import for_each, run_jobs

from .allocation import load_part, row_bytes
from .content import check_readable, check_rows, read_content
from .difference import (
    Change,
    Difference,
    Kind,
    Names,
    SlotDifference,
    TableDifference,
    TensorDifference,
    compare,
    compare_bits,
)
from .values import flat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.manifest import Stored
    from asyncloader._loading.progress import Progress
    from asyncloader._table.hashtable import HashTable
    from asyncloader._table.protocol import UpdateCounts
    from asyncloader.options import ReadOptions

    from .content import Content


# A table that is being filled takes more than its rows: room to grow, and rows on their way.
_OVERHEAD = 1.5
_WINDOW = 64 << 20
_AT_A_TIME = 4
# A call takes a millisecond, whatever it reads: small tensors are read many at a time.
_MOST = 1000

# The elements `[begin, end)` of a tensor, after its name.
_Window: TypeAlias = tuple[str, int, int]


async def adiff(
    a: str,
    b: str,
    *,
    budget: int,
    progress: Callable[[Progress], object] | None,
    options: ReadOptions,
) -> Difference:
    """Compare two checkpoints; see `asyncloader.tools.diff`."""
    clock = Meter(0)
    async with open_session(a, options) as first, open_session(b, options) as second:
        one, other = await read_content(first), await read_content(second)
        check_readable(one)
        check_readable(other)
        sizes, others = one.sizes, other.sizes
        common = sum(sizes[name] + others[name] for name in sizes.keys() & others.keys())
        stages = Stages(common, progress)
        found = [
            await _compare_table(one, other, name, budget=budget, stages=stages)
            for name in one.tables
            if name in other.tables
        ]
        meter = Meter(0, stages.tell)
        tensors = await _compare_tensors(one, other, min(budget, _WINDOW), meter)
        meter.finish()
    tables = [table for table, _ in found]
    only_a, only_b = Names.only_in(one, other), Names.only_in(other, one)
    same = all(table.equal for table in tables) and all(tensor.equal for tensor in tensors)
    return Difference(
        a=a,
        b=b,
        equal=same and not only_a and not only_b,
        only_in_a=only_a,
        only_in_b=only_b,
        tables=tuple(tables),
        tensors=tuple(tensors),
        notes=tuple(note for _, notes in found for note in notes),
        seconds=clock.seconds,
    )


async def _compare_table(
    a: Content, b: Content, name: str, *, budget: int, stages: Stages
) -> tuple[TableDifference, list[str]]:
    """Compare a table that both have, and return oddities, too.

    The rows of both sides take no more than `budget` bytes at a time.
    """
    one, other = a.tables[name], b.tables[name]
    for side, table in ((a, one), (b, other)):
        for stored in table.slots.values():
            if not stored.shape:  # of which nothing would be read
                check_rows(side.location, stored)
    kinds = {
        slot: (Kind.of_row(stored), Kind.of_row(other.slots[slot]))
        for slot, stored in one.slots.items()
        if slot in other.slots
    }
    slots = [slot for slot, (x, y) in kinds.items() if x == y and 0 not in x.shape]
    tally = _Tally({slot: [] for slot in kinds}, dict.fromkeys(kinds, 0))
    # As many sub-slices as let one of both sides fit into the budget.
    taken = sum(table.ids.rows * row_bytes(table.slots) for table in (one, other))
    count = min(max(-int(-taken * _OVERHEAD // budget), 1), one.slice_size)
    wanted = [{slot: table.slots[slot] for slot in slots} for table in (one, other)]
    seen: tuple[list[UpdateCounts], list[UpdateCounts]] = [], []
    for number in range(count):
        part = gen_slice(number, count, one.slice_size)
        left = await load_part(a, {name: (part, wanted[0])}, {}, stages)
        right = await load_part(b, {name: (part, wanted[1])}, {}, stages)
        both = left.tables[name], right.tables[name]
        compare_both = partial(tally.compare, *both, slots, max(budget // 16, 1))
        await run_jobs(a.session.threads.kernels, [compare_both])
        seen[0].extend(left.counts.values())
        seen[1].extend(right.counts.values())
        del left, right, both, compare_both  # before the next ones take as much memory
    notes = [*_oddities(a, name, seen[0]), *_oddities(b, name, seen[1])]
    return tally.difference(name, kinds), notes


def _oddities(content: Content, name: str, seen: Sequence[UpdateCounts]) -> Iterator[str]:
    """Tell of rows that no load takes, given the counts of loads of all ids of a table."""
    if duplicates := sum(counts.duplicates for counts in seen):
        text = f"{duplicates:,} rows of {name!r} gave way to a later one of their id"
        yield f"{content.location}: {text}"
    if strays := content.tables[name].ids.rows - sum(counts.rows for counts in seen):
        text = f"{strays:,} ids of {name!r} lie outside the slice that their block claims"
        yield f"{content.location}: {text}"


@dataclass(slots=True)
class _Tally:
    """The differences in the sub-slices so far, by slot; and the numbers of ids."""

    changes: dict[str, list[Change]]
    rows: dict[str, int]  # that differ
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

    def difference(self, name: str, kinds: Mapping[str, tuple[Kind, Kind]]) -> TableDifference:
        slots = [
            SlotDifference(
                name=slot,
                a=a,
                b=b,
                rows=self.kept if a == b else 0,
                different=self.rows[slot],
                change=Change.sum(self.changes[slot]),
            )
            for slot, (a, b) in kinds.items()
        ]
        lost, gained, kept = self.lost, self.gained, self.kept
        return TableDifference(name=name, lost=lost, gained=gained, kept=kept, slots=tuple(slots))


async def _compare_tensors(
    a: Content, b: Content, window_bytes: int, meter: Meter
) -> list[TensorDifference]:
    """Compare all tensors that both have, so many bytes of each side at a time."""
    pairs = {name: (one, b.tensors[name]) for name, one in a.tensors.items() if name in b.tensors}
    alike = [
        one
        for one, other in pairs.values()
        if Kind.of(one) == Kind.of(other) and one.nbytes == other.nbytes
    ]
    changes: dict[str, list[Change]] = {name: [] for name in pairs}

    async def work(batch: Sequence[_Window]) -> None:
        ours, theirs = await _read(a, batch), await _read(b, batch)

        def compare_all() -> None:
            for name, one in ours.items():
                is_known, other = has_numbers(pairs[name][0].dtype), theirs[name]
                change = compare(one, other)[0] if is_known else compare_bits(one, other)
                changes[name].append(change)

        await run_jobs(a.session.threads.kernels, [compare_all])
        size = 2 * sum(tensor.nbytes for tensor in ours.values())
        meter.note(read=size, wanted=size, current=batch[-1][0])

    most = max(window_bytes // _AT_A_TIME, 1)
    await for_each(_batches(alike, most), work, workers=_AT_A_TIME, name="asyncloader-diff")
    return [_difference(*pair, Change.sum(changes[name])) for name, pair in pairs.items()]


def _batches(tensors: Iterable[Stored], most: int) -> Iterator[list[_Window]]:
    """Cut large tensors up, and put small ones together, so that none takes more than `most`."""
    batch: list[_Window] = []
    room = most
    for stored in tensors:
        total = flat(stored).rows
        itemsize = max(stored.nbytes // max(total, 1), 1)
        step = max(most // itemsize, 1)
        for begin in range(0, total, step):
            end = min(begin + step, total)
            nbytes = (end - begin) * itemsize
            if batch and (nbytes > room or len(batch) == _MOST):
                yield batch
                batch, room = [], most
            batch.append((stored.name, begin, end))
            room -= nbytes
    if batch:
        yield batch


async def _read(side: Content, batch: Sequence[_Window]) -> dict[str, Tensor]:
    def cut() -> list[Stored]:
        return [flat(side.tensors[name]).window(begin, end) for name, begin, end in batch]

    [wanted] = await run_jobs(side.session.threads.kernels, [cut])
    return await read_stored(side.session, wanted)


def _difference(one: Stored, other: Stored, change: Change) -> TensorDifference:
    a, b = Kind.of(one), Kind.of(other)
    elements = max(flat(one).rows, flat(other).rows) if a == b else 0
    if elements and one.nbytes != other.nbytes:  # of an unknown dtype
        change = Change(different=elements)
    return TensorDifference(name=one.name, a=a, b=b, elements=elements, change=change)
