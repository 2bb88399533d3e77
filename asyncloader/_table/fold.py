"""Joins a table's present state and the layers of an update into its next state."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros

from . import arrays as _arrays
from . import kernels as _kernels
from .index import NO_ROWS, scratch
from .segments import Segment, Segments
from .slots import fill
from .state import TableState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from .index import IdIndex
    from .slots import Slot


Jobs = list["Callable[[], None]"]

# Slots of an index that one job walks over: some 20 ms, so that a cancelled load stops soon.
_WINDOW = 1 << 18
# Bytes of rows that one step fills or copies.
_STEP = 4 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """A range of rows that lie side by side."""

    first: int
    count: int

    fresh: bool
    """Whether its memory still reads as zero."""


@dataclass(slots=True)
class Layer:
    """Rows for which the same slots are given. Later layers win over earlier ones."""

    slots: frozenset[str]
    index: IdIndex
    runs: list[Run] = field(default_factory=list)
    """Ranges of rows reserved, ascending."""

    firsts: array[int] = field(default_factory=lambda: array("q"))
    """The first row of each."""

    ranks: array[int] = field(default_factory=lambda: array("q"))
    """Of two rows of a layer with the same id, the one in the range of higher rank wins."""

    def add(self, run: Run, rank: int) -> None:
        """Take note of another range."""
        self.runs.append(run)
        self.firsts.append(run.first)
        self.ranks.append(rank)


def _step(slot: Slot) -> int:
    return max(_STEP // slot.row_bytes, 1)


def _side_by_side(jobs: Iterator[Callable[[], None]], threads: int) -> Iterator[Jobs]:
    """Hand out jobs as many at a time as there are threads."""
    while wave := list(itertools.islice(jobs, threads)):
        yield wave


class Fold:
    """The next state in the making.

    What the present state holds is read, never written: lookups go on in it meanwhile.
    """

    def __init__(
        self,
        base: TableState,
        segments: Segments,
        ids: NDArray[np.int64],
        end: int,
        block_size: int,
    ) -> None:
        self._base = base
        self._segments = segments
        self._ids = ids
        self._end = end
        self._block_size = block_size
        self._index = base.index
        self._ids_are_whole = ids is base.ids
        self.replaced = 0

    def state(self) -> TableState:
        """Return the next state."""
        return TableState(
            slots=self._base.slots,
            device=self._base.device,
            seed=self._base.seed,
            index=self._index,
            ids=self._ids,
            segments=self._segments,
            end=self._end,
        )

    def add(self, layer: Layer, *, threads: int) -> Iterator[Jobs]:
        """Yield the jobs that put a layer on top of what is there."""
        missing = [slot for name, slot in self._base.slots.items() if name not in layer.slots]
        yield from _side_by_side(self._initialise_jobs(missing, layer), threads)
        if not layer.index.count:
            return
        if not self._index.count:
            self._index = layer.index
            return
        yield [self._take_over_ids]
        yield from self._join(layer, threads=threads)

    def drop(self, rows: NDArray[np.int64]) -> None:
        """Take rows out of the index."""
        gone = np.zeros(self._end, np.bool_)
        gone[rows] = True
        self._index = self._index.grown(self._index.count, self._ids, self._base.seed, gone)

    def _initialise_jobs(self, slots: list[Slot], layer: Layer) -> Iterator[Callable[[], None]]:
        for slot in slots:
            step = _step(slot)
            for run in layer.runs:
                if run.fresh and slot.starts_as_zero:
                    continue
                for first in range(run.first, run.first + run.count, step):
                    count = min(step, run.first + run.count - first)
                    rows = self._segments.view(slot.name, first, count)
                    yield partial(fill, rows, slot.initializer)

    def _take_over_ids(self) -> None:
        """Copy the ids of the rows that were there, where new memory was taken for ids."""
        if not self._ids_are_whole:
            self._ids[: self._base.end] = self._base.ids[: self._base.end]
            self._ids_are_whole = True

    def _join(self, layer: Layer, *, threads: int) -> Iterator[Jobs]:
        """Walk over the smaller index and put its ids into the larger one."""
        older, newer = self._index, layer.index
        wins = newer.count < older.count  # the ids that are walked over are the new ones
        source = newer if wins else older
        into = older if wins else newer
        total = older.count + newer.count
        if total > into.room or into is self._base.index:
            made: list[IdIndex] = []
            yield [partial(self._make_writable, into, total, made)]
            into = made[0]
        missing = [name for name in self._base.slots if name not in layer.slots]
        found: list[tuple[int, int]] = []  # two threads append to it

        def job(share: tuple[int, int], words: NDArray[np.uint64]) -> None:
            found.append(self._merge(into, share, words, missing, wins=wins))

        shares = into.shares(threads)
        sources = [source.candidates(into, share) for share in shares]
        for start in range(0, max(map(len, sources)), _WINDOW):
            windows = [words[start : start + _WINDOW] for words in sources]
            yield [partial(job, *both) for both in zip(shares, windows, strict=True)]
        into.count += sum(new for new, _ in found)
        self.replaced += sum(replaced for _, replaced in found)
        self._index = into

    def _make_writable(self, index: IdIndex, expected: int, made: list[IdIndex]) -> None:
        fits = expected <= index.room
        made.append(index.copy() if fits else index.grown(expected, self._ids, self._base.seed))

    def _merge(
        self,
        into: IdIndex,
        share: tuple[int, int],
        words: NDArray[np.uint64],
        missing: list[str],
        *,
        wins: bool,
    ) -> tuple[int, int]:
        """Merge words into the parts of a share.

        Returns:
            How many ids were new, and how many were in both and shown before the update.
        """
        pairs = np.empty((2, len(words)), np.int64)
        added, both = _kernels.merge(
            into.words, into.parts, *share, self._base.seed, self._ids, words, NO_ROWS, wins,
            pairs, scratch(),
        )  # fmt: skip
        assert both <= pairs.shape[1], "each word is in both at most once"
        lost, stays = pairs[:, :both]
        for name in missing:
            step = _step(self._base.slots[name])
            for i in range(0, both, step):
                here = slice(i, i + step)
                self._segments.scatter(name, stays[here], self._segments.gather(name, lost[here]))
        return added, int((lost < self._base.end).sum())

    def tidy(self) -> Iterator[Jobs]:
        """Yield the jobs that give back memory of rows that no id points to any more."""
        if self._index is self._base.index:  # nothing came in: do not keep rows that were reserved
            base = self._base
            self._segments, self._ids, self._end = base.segments, base.ids, base.end
            return  # what is below writes to the index, and lookups are using this one
        if self._end - self._index.count <= max(self._index.count // 2, self._block_size):
            return  # counting costs more than so few dead rows
        live = np.zeros(len(self._segments.items), np.int64)
        yield [lambda: _arrays.count_rows(self._index.words, self._segments.firsts, live)]
        used = np.diff(np.append(self._segments.firsts, self._end))
        sparse = (live * 2 < used) & (live > 0)
        if sparse.any():
            yield [lambda: self._compact(sparse)]
            live = np.append(np.where(sparse, 0, live), live[sparse].sum())
        kept = [s for s, n in zip(self._segments.items, live, strict=True) if n]
        if len(kept) < len(self._segments.items):
            yield [lambda: self._keep(kept)]

    def _compact(self, sparse: NDArray[np.bool_]) -> None:
        """Move the live rows of segments that are mostly dead into a new one."""
        rows = self._index.live_rows(self._end)
        owners = np.searchsorted(self._segments.firsts, rows, side="right") - 1
        moved = rows[sparse[owners]]
        first, count = self._end, len(moved)
        blocks = -(-count // self._block_size)
        segment = Segment.allocate(
            self._base.slots, first, blocks * self._block_size, self._base.device
        )
        segments = Segments.of((*self._segments.items, segment))
        ids = zeros((first + segment.capacity,), torch.int64).numpy()
        ids[:first] = self._ids[:first]
        ids[first : first + count] = ids[moved]
        segment.lent = count
        for name, slot in self._base.slots.items():
            step = _step(slot)
            for start in range(0, count, step):
                window = moved[start : start + step]
                values = self._segments.gather(name, window)
                segments.view(name, first + start, len(window)).copy_(values)
        _arrays.relocate(self._index.words, moved, first)
        self._ids, self._segments, self._end = ids, segments, first + count

    def _keep(self, kept: list[Segment]) -> None:
        """Let go of all other segments, and number the rows anew, without holes."""
        if not kept:
            self._ids, self._segments, self._end = np.zeros(0, np.int64), Segments(), 0
            return
        firsts = [segment.first for segment in self._segments.items]
        ends = dict(zip(firsts, (*firsts[1:], self._end), strict=True))
        used = np.array([ends[segment.first] - segment.first for segment in kept])
        old = np.array([segment.first for segment in kept])
        new = np.cumsum(used) - used
        _arrays.rebase(self._index.words, old, old - new)
        # A copy: states before this one still look at the ids that were there.
        self._ids = np.concatenate([self._ids[a : a + n] for a, n in zip(old, used, strict=True)])
        self._segments = Segments.of(
            tuple(
                Segment(int(first), segment.capacity, segment.slots, segment.lent)
                for segment, first in zip(kept, new, strict=True)
            )
        )
        self._end = int(used.sum())
