"""Joins a table's present state and the layers of an update into its next state."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .state import Segments
from .thinning import Thinning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .index import IdIndex
    from .schema import Flags, Longs, Slot, Words
    from .state import TableState


Jobs = list["Callable[[], None]"]

# Slots of an index that one job walks over: some 20 ms, so that a cancelled load stops soon.
_WINDOW = 1 << 18
# Bytes of rows that one step fills or copies.
_STEP = 4 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that lie side by side; `fresh` ones have memory that still reads as zero."""

    first: int
    count: int
    fresh: bool


@dataclass(slots=True)
class Layer:
    """Rows for which the same slots are given. Later layers win over earlier ones.

    Attributes:
        runs: The rows, ascending.
        firsts: The first row of each run.
        ranks: The rank of each run: of two rows with the same id, the one of higher rank wins.
        fills: Whether it brings no ids: its rows are for ids that are there below it.
    """

    slots: frozenset[str]
    index: IdIndex
    runs: list[Run] = field(default_factory=list)
    firsts: array[int] = field(default_factory=lambda: array("q"))
    ranks: array[int] = field(default_factory=lambda: array("q"))
    fills: bool = False

    def add(self, run: Run, rank: int) -> None:
        self.runs.append(run)
        self.firsts.append(run.first)
        self.ranks.append(rank)


def run_here(waves: Iterable[Jobs]) -> None:
    """Do the jobs of a fold on this thread."""
    for wave in waves:
        for job in wave:
            job()


class Fold:
    """The next state of a table in the making.

    Lookups go on in the present state, `base`: its index and its ids are read, never written.

    Attributes:
        state: The next state. At first it has the index of `base`, and memory for the new rows.
        replaced: The number of ids that were there before.
        unknown: The number of rows of layers without ids that were for ids not there.
        joined: The number of those that were for ids of layers below.
    """

    def __init__(self, base: TableState, state: TableState) -> None:
        self._base = base
        self.state = state
        self.replaced = self.unknown = self.joined = 0
        self._lacks_ids = state.ids is not base.ids

    def add(self, layer: Layer, *, threads: int) -> Iterator[Jobs]:
        """Yield the jobs that put a layer on top of the others."""
        if layer.fills:
            yield from self._drop_unknown(layer, threads)
        missing = [slot for name, slot in self._base.slots.items() if name not in layer.slots]
        jobs = self._initialize_jobs(missing, layer)
        while wave := list(itertools.islice(jobs, threads)):
            yield wave
        if not layer.index.count:
            return
        if not self.state.index.count:
            self.state = replace(self.state, index=layer.index)
            return
        yield [self._take_over_ids]
        layer_count = layer.index.count  # all of a layer that fills is there already
        before = self.replaced
        yield from self._join(layer.index, missing, threads=threads)
        if layer.fills:
            self.joined += layer_count - (self.replaced - before)

    def _initialize_jobs(self, slots: list[Slot], layer: Layer) -> Iterator[Callable[[], None]]:
        for slot in slots:
            step = _step(slot)
            for run in layer.runs:
                if run.fresh and slot.starts_as_zero:
                    continue
                for first in range(run.first, run.first + run.count, step):
                    count = min(step, run.first + run.count - first)
                    rows = self.state.segments.view(slot.name, first, count)
                    yield partial(slot.initialize, rows)

    def _drop_unknown(self, layer: Layer, threads: int) -> Iterator[Jobs]:
        """Take the ids out of a layer that no layer below it has."""
        yield [self._take_over_ids]
        state = self.state

        def is_unknown(rows: Longs) -> Flags:
            unknown: Flags = state.find(state.ids[rows])[0] < 0
            return unknown

        thinning = Thinning(layer.index, state.ids, state.end, is_unknown)
        yield from thinning.jobs(threads=threads)
        layer.index = thinning.index
        self.unknown += thinning.removed

    def _take_over_ids(self) -> None:
        """Copy the ids of the rows that were there, if new memory was taken for ids."""
        if self._lacks_ids:
            self.state.ids[: self._base.end] = self._base.ids[: self._base.end]
            self._lacks_ids = False

    def _join(self, newer: IdIndex, missing: list[Slot], *, threads: int) -> Iterator[Jobs]:
        """Walk over the smaller index and put its ids into the larger one."""
        older = self.state.index
        wins = newer.count < older.count  # the ids that are walked over are the new ones
        source, into = (newer, older) if wins else (older, newer)
        total = older.count + newer.count
        if total > into.room or into is self._base.index:
            made: list[IdIndex] = []
            yield [partial(self._make_writable, into, total, made)]
            into = made[0]
        found: list[tuple[int, int]] = []  # two threads append to it

        def job(share: tuple[int, int], words: Words) -> None:
            pairs = np.empty((2, len(words)), np.int64)
            new, both = into.merge(share, self.state.ids, words, wins=wins, pairs=pairs)
            assert both <= pairs.shape[1], "each word is in both at most once"
            lost, stays = pairs[:, :both]
            self._copy_rows(missing, lost, stays)
            found.append((new, int((lost < self._base.end).sum())))

        shares = into.shares(threads)
        sources = [source.candidates(into, share) for share in shares]
        for start in range(0, max(map(len, sources)), _WINDOW):
            windows = [words[start : start + _WINDOW] for words in sources]
            yield [partial(job, *both) for both in zip(shares, windows, strict=True)]
        into.count += sum(new for new, _ in found)
        self.replaced += sum(replaced for _, replaced in found)
        self.state = replace(self.state, index=into)

    def _make_writable(self, index: IdIndex, expected: int, made: list[IdIndex]) -> None:
        fits = expected <= index.room
        made.append(index.copy() if fits else index.grown(expected, self.state.ids))

    def _copy_rows(self, slots: list[Slot], old: Longs, new: Longs) -> None:
        segments = self.state.segments
        for slot in slots:
            step = _step(slot)
            for i in range(0, len(old), step):
                values = segments.gather(slot, old[i : i + step])
                segments.scatter(slot.name, new[i : i + step], values)

    def tidy(self) -> Iterator[Jobs]:
        """Yield the jobs that give back memory of rows that no id points to any more."""
        state = self.state
        if state.index is self._base.index:  # no id came in: do not keep rows that were reserved
            self.state = self._base
            return  # the jobs below write to the index, and lookups are using this one
        if self._lacks_ids:  # ids were taken out, and none came in
            yield [self._take_over_ids]
        if state.end - state.index.count <= max(state.index.count // 2, state.block_size):
            return  # counting costs more than so few dead rows
        counted: list[Longs] = []
        yield [lambda: counted.append(state.index.count_rows(state.segments.firsts))]
        live, used = counted[0], np.diff(np.append(state.segments.firsts, state.end))
        dense = (live > 0) & (live * 2 >= used)
        if not dense.all():
            yield [lambda: self._compact(dense, used)]

    def _compact(self, dense: Flags, used: Longs) -> None:
        """Keep dense segments, move the live rows of others to a new one, and leave no holes.

        `used`, `[segments]`, is how many rows of each segment are in use.
        """
        state = self.state
        rows = state.live_rows()
        owners = np.searchsorted(state.segments.firsts, rows, side="right") - 1
        moved = rows[~dense[owners]]
        counts, old = used[dense], state.segments.firsts[dense]
        new = np.cumsum(counts) - counts
        first = int(counts.sum())
        kept = itertools.compress(state.segments.items, dense)
        segments = Segments(
            replace(segment, first=int(at)) for segment, at in zip(kept, new, strict=True)
        )
        if len(moved):
            segments = state.grown(segments, first, len(moved))
            segments.items[-1].lent = len(moved)
        for slot in state.slots.values():
            step = _step(slot)
            for i in range(0, len(moved), step):
                values = state.segments.gather(slot, moved[i : i + step])
                segments.view(slot.name, first + i, len(values)).copy_(values)
        # By way of rows that are beyond all others: a number must not mean two rows meanwhile.
        state.index.relocate(moved, state.end)
        state.index.rebase(np.append(old, state.end), np.append(old - new, state.end - first))
        # A copy: states before this one still look at the ids that were there.
        ranges = [state.ids[at : at + n] for at, n in zip(old, counts, strict=True)]
        ids = np.concatenate([*ranges, state.ids[moved]])
        self.state = replace(state, segments=segments, ids=ids, end=first + len(moved))


def _step(slot: Slot) -> int:
    """Return how many rows of a slot one step fills or copies."""
    return max(_STEP // slot.row_bytes, 1)
