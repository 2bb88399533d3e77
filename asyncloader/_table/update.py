"""An update in the making: rows and ids that no lookup sees before they are committed.

The steps, in order: `reserve` rows, write to their `view`s, `admit` and index their ids, run the
jobs that `finish` yields, `commit`; or `abort` at any time. The steps that take long come as jobs,
plain functions that hardly ever hold the GIL, so that the caller decides on which threads they run.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros

from .fold import Fold, Layer, Run, run_here
from .index import MAX_ROWS, NO_ROWS, IdIndex
from .protocol import UpdateCounts
from .thinning import Thinning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asyncloader._checkpoint.slices import Slice

    from .schema import Encoding, Flags, Longs
    from .state import TableState


class TableUpdate:
    """The next version of a table, built beside the one that is served.

    Not safe to share between threads, but for the jobs that it hands out, and `admit`.
    """

    def __init__(
        self,
        state: TableState,
        encoding: Encoding,
        *,
        most: int,
        expected: int,
        publish: Callable[[TableState | None], None],
    ) -> None:
        self._base = state
        self._encoding = encoding
        self._publish = publish
        self._segments = state.segments
        self._end = state.end
        self._expected = expected
        self._dropped = 0
        self._taken = 0
        self._layers: list[Layer] = []
        self._cleared: Sequence[str] = ()
        self._first, self._kept = state.index, state.index.count  # what the layers are put on
        self._fold: Fold | None = None
        if state.end + most > MAX_ROWS:
            raise MemoryError(f"a table holds at most {MAX_ROWS} rows")
        self._ids = state.ids
        if state.end + most > len(state.ids):
            self._ids = zeros((state.end + most,), torch.int64).numpy()

    def __repr__(self) -> str:
        rows = self._end - self._base.end
        return f"<TableUpdate {rows} rows reserved, {self._taken} indexed>"

    def layer(self, slots: frozenset[str], expected: int) -> int:
        """Begin a layer in which `slots` are given, with about `expected` rows; return its number.

        Rows of later layers win over those of earlier ones.
        """
        held = self._base.index.count
        # The smaller index is folded into the larger one: spare that one from growing then.
        room = expected + (held if expected >= held else 0)
        self._layers.append(Layer(slots, IdIndex.empty(room, self._base.index.seed)))
        return len(self._layers) - 1

    def fill(self, layer: int) -> None:
        """Let a layer bring no ids: its rows for ids that are not there below it are dropped."""
        self._layers[layer].fills = True

    def clear(self, children: Sequence[str]) -> None:
        """Take all ids of these children out first. Shows at `commit`, as all else does."""
        self._cleared = children

    def reserve(self, layer: int, count: int, rank: int) -> int:
        """Reserve `count` rows that lie side by side, and return the number of the first one.

        Args:
            layer: The layer that the rows belong to.
            count: The number of rows.
            rank: Of two rows of a layer with the same id, the one of higher rank wins; no two
                ranges have the same.
        """
        if count <= 0:
            raise ValueError(f"{self!r}: cannot reserve {count} rows")
        if self._end + count > len(self._ids):
            raise RuntimeError(f"{self!r}: more rows than were announced")
        if self._end + count > self._segments.capacity:
            self._grow(count)
        first = self._end
        self._end += count
        self._expected -= count
        segment = self._segments.owner(first)
        fresh = first - segment.first >= segment.lent
        self._layers[layer].add(Run(first, count, fresh), rank)
        segment.lent = max(segment.lent, first + count - segment.first)
        return first

    def _grow(self, count: int) -> None:
        held = sum(segment.capacity for segment in self._segments.items)
        # Memory that is not touched costs nothing on the host: a quarter more spares a table that
        # grows by little from falling into many segments.
        spare = held // 4 if self._base.device.type == "cpu" else 0
        wanted = max(count, self._expected, spare)
        self._segments = self._base.grown(self._segments, self._end, wanted)

    def view(self, slot: str, first: int, count: int) -> torch.Tensor:
        """Return the memory of reserved rows, `[count, *shape]`; for `id`, int64 `[count]`."""
        assert self._base.end <= first <= first + count <= self._end, "rows were reserved"
        if slot == "id":
            with torch.inference_mode(mode=False):  # threads outside of it may write there
                return torch.from_numpy(self._ids[first : first + count])
        return self._segments.view(slot, first, count)

    def admit(self, child: str, first: int, count: int, claimed: Slice) -> tuple[Flags | None, int]:
        """Encode ids that were read from disk, and say which lie outside their block's slice.

        Args:
            child: The child that the ids belong to.
            first: First row; the ids are in `view("id", …)`.
            count: The number of rows.
            claimed: The slice that the block claims.

        Returns:
            bool `[count]`, or `None` where none is refused; and how many are.
        """
        return self._encoding.admit(self._ids[first : first + count], child, claimed)

    def select(
        self, child: str, ids: Longs, claimed: Slice, wanted: Slice
    ) -> tuple[Longs, Longs, int]:
        """Pick the ids of a block, int64 `[n]` as on disk, that belong to `wanted`.

        Returns:
            Their positions in `ids`, ascending; the ids, encoded; and how many of `ids` lie outside
            the slice that the block claims.
        """
        return self._encoding.select(ids, child, claimed, wanted)

    def make_room(self, layer: int, count: int) -> None:
        """Let the layer's index take `count` ids more. No job may be using it."""
        index = self._layers[layer].index
        wanted = index.count + count
        if wanted > index.room:
            self._layers[layer].index = index.grown(wanted + wanted // 2, self._ids)

    def index_jobs(
        self,
        layer: int,
        first: int,
        count: int,
        refused: Flags | None,
        *,
        threads: int,
    ) -> list[Callable[[], tuple[int, int]]]:
        """Return jobs that together index a range of rows, and may run side by side.

        Hand their results to `indexed`. Only one range of a layer at a time.
        """
        into = self._layers[layer]
        runs = np.array(into.firsts, np.int64), np.array(into.ranks, np.int64)
        skip = NO_ROWS if refused is None else refused
        return [
            partial(into.index.insert, share, self._ids, (first, count), skip, runs)
            for share in into.index.shares(threads)
        ]

    def indexed(self, layer: int, results: Sequence[tuple[int, int]]) -> None:
        """Note the results of the jobs for one range."""
        new = sum(result[0] for result in results)
        index = self._layers[layer].index
        index.count += new
        assert index.count <= index.words.size, "an id has a word"
        self._taken += new + sum(result[1] for result in results)

    def dropped(self, count: int) -> None:
        """Note that `count` rows were refused."""
        self._dropped += count

    def finish(self, *, threads: int) -> Iterator[list[Callable[[], None]]]:
        """Yield the rest of the work: lists of jobs that may run side by side."""
        if self._cleared:
            yield from self._clear(threads)
        memory = replace(
            self._base, index=self._first, segments=self._segments, ids=self._ids, end=self._end
        )
        self._fold = Fold(self._base, memory)
        for layer in self._layers:
            yield from self._fold.add(layer, threads=threads)
        yield from self._fold.tidy()

    def _clear(self, threads: int) -> Iterator[list[Callable[[], None]]]:
        base, encoding, cleared = self._base, self._encoding, self._cleared
        if set(cleared) >= set(encoding.children):
            self._first, self._kept = IdIndex.empty(0, base.index.seed), 0
            return

        def goes(rows: Longs) -> Flags:
            return encoding.are_of_any(base.ids[rows], cleared)

        thinning = Thinning(base.index, base.ids, base.end, goes)
        yield from thinning.jobs(threads=threads)
        self._first, self._kept = thinning.index, thinning.index.count

    def commit(self) -> UpdateCounts:
        """Show all rows at once, and count the changes. Cannot fail after `finish`."""
        if self._fold is None:
            raise RuntimeError(f"{self!r}: commit before finish")
        state, replaced = self._fold.state, self._fold.replaced
        taken = self._taken - self._fold.unknown - self._fold.joined
        new = state.index.count - self._kept
        self._publish(state)
        return UpdateCounts(
            rows=taken,
            new=new,
            replaced=replaced,
            duplicates=taken - new - replaced,
            dropped=self._dropped + self._fold.unknown,
            cleared=self._base.index.count - self._kept,
        )

    def abort(self) -> None:
        """Leave the table as it was. No thread may be writing to a view any more."""
        self._publish(None)

    def abandon(self) -> None:
        """Leave the table as it was, and never use the memory of views again.

        For an update of which a thread may still write to a view.
        """
        self._publish(self._base.sealed(shares_ids=self._ids is self._base.ids))


def insert(update: TableUpdate, ids: Longs, rows: torch.Tensor, slot: str) -> None:
    """Put ids, encoded, and their rows of one slot in, and commit."""
    try:
        layer = update.layer(frozenset({slot}), len(ids))
        if len(ids):
            first = update.reserve(layer, len(ids), 0)
            update.view("id", first, len(ids)).copy_(torch.from_numpy(ids))
            update.view(slot, first, len(ids)).copy_(rows.detach())
            jobs = update.index_jobs(layer, first, len(ids), None, threads=1)
            update.indexed(layer, [job() for job in jobs])
        run_here(update.finish(threads=1))
    except BaseException:
        update.abort()
        raise
    update.commit()


def delete(state: TableState, ids: Longs) -> TableState:
    """Return a state without these ids, encoded."""
    rows, missing = state.find(ids)
    if missing == len(ids):
        return state
    gone = np.zeros(state.end, np.bool_)
    gone[rows[rows >= 0]] = True
    index = state.index.grown(state.index.count, state.ids, gone)
    fold = Fold(state, replace(state, index=index))
    run_here(fold.tidy())
    return fold.state
