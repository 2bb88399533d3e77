"""Joins a table's present state and the layers of an update into its next state."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .state import Segment, Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from .index import IdIndex
    from .schema import Slot
    from .state import TableState

    Longs = NDArray[np.int64]


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
    """

    slots: frozenset[str]
    index: IdIndex
    runs: list[Run] = field(default_factory=list)
    firsts: array[int] = field(default_factory=lambda: array("q"))
    ranks: array[int] = field(default_factory=lambda: array("q"))

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
    """

    def __init__(self, base: TableState, state: TableState) -> None:
        self._base = base
        self.state = state
        self.replaced = 0
        self._lacks_ids = state.ids is not base.ids

    def add(self, layer: Layer, *, threads: int) -> Iterator[Jobs]:
        """Yield the jobs that put a layer on top of what is there."""
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
        yield from self._join(layer.index, missing, threads=threads)

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

    def _take_over_ids(self) -> None:
        """Copy the ids of the rows that were there, where new memory was taken for ids."""
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

        def job(share: tuple[int, int], words: NDArray[np.uint64]) -> None:
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
                values = segments.gather(slot.name, old[i : i + step])
                segments.scatter(slot.name, new[i : i + step], values)

    def tidy(self) -> Iterator[Jobs]:
        """Yield the jobs that give back memory of rows that no id points to any more."""
        state = self.state
        if state.index is self._base.index:  # nothing came in: do not keep rows that were reserved
            self.state = self._base
            return  # what is below writes to the index, and lookups are using this one
        if state.end - state.index.count <= max(state.index.count // 2, state.block_size):
            return  # counting costs more than so few dead rows
        counted: list[Longs] = []
        yield [lambda: counted.append(state.index.count_rows(state.segments.firsts))]
        live = counted[0]
        used = np.diff(np.append(state.segments.firsts, state.end))
        sparse = (live * 2 < used) & (live > 0)
        if sparse.any():
            yield [lambda: self._compact(sparse)]
            live = np.append(np.where(sparse, 0, live), live[sparse].sum())
        kept = [s for s, n in zip(self.state.segments.items, live, strict=True) if n]
        if len(kept) < len(self.state.segments.items):
            yield [lambda: self._keep(kept)]

    def _compact(self, sparse: NDArray[np.bool_]) -> None:
        """Move the live rows of segments that are mostly dead into a new one."""
        state = self.state
        rows = state.live_rows()
        owners = np.searchsorted(state.segments.firsts, rows, side="right") - 1
        moved = rows[sparse[owners]]
        first, end = state.end, state.end + len(moved)
        segments = state.grown(state.segments, first, len(moved))
        ids = state.copied_ids(segments.capacity)
        ids[first:end] = ids[moved]
        segments.items[-1].lent = len(moved)
        for slot in state.slots.values():
            step = _step(slot)
            for i in range(0, len(moved), step):
                values = state.segments.gather(slot.name, moved[i : i + step])
                segments.view(slot.name, first + i, len(values)).copy_(values)
        state.index.relocate(moved, first)
        self.state = replace(state, segments=segments, ids=ids, end=end)

    def _keep(self, kept: list[Segment]) -> None:
        """Let go of all other segments, and number the rows anew, without holes."""
        state = self.state
        if not kept:
            self.state = replace(state, ids=np.zeros(0, np.int64), segments=Segments(), end=0)
            return
        firsts = [segment.first for segment in state.segments.items]
        ends = dict(zip(firsts, (*firsts[1:], state.end), strict=True))
        used = np.array([ends[segment.first] - segment.first for segment in kept])
        old = np.array([segment.first for segment in kept])
        new = np.cumsum(used) - used
        state.index.rebase(old, old - new)
        # A copy: states before this one still look at the ids that were there.
        ids = np.concatenate([state.ids[a : a + n] for a, n in zip(old, used, strict=True)])
        segments = Segments(
            Segment(int(first), segment.capacity, segment.slots, segment.lent)
            for segment, first in zip(kept, new, strict=True)
        )
        self.state = replace(state, ids=ids, segments=segments, end=int(used.sum()))


def _step(slot: Slot) -> int:
    """Return how many rows of a slot one step fills or copies."""
    return max(_STEP // slot.row_bytes, 1)
