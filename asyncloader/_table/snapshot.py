"""A table at one moment, and its rows in the order in which they are saved."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from asyncloader._checkpoint.slices import Slice

    from .schema import Encoding, Longs, Slot, Words
    from .state import TableState


_CHILD_BITS = np.uint64(52)
_FEW = 1000
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class SortedRows:
    """The rows of one child, by slice position, then by id (both unsigned).

    Attributes:
        ids: `[n]`, as they stand on disk.
        rows: `[n]`, their numbers within the table.
        offsets: The first row of each of a number of equal sub-slices, then the number of rows.
    """

    ids: Longs
    rows: Longs
    offsets: tuple[int, ...]


@dataclass(slots=True)
class TableSnapshot:
    """A table at one moment. Later changes of the table leave it alone.

    It keeps the memory of that moment alive, and copies none of it: it takes 8 bytes an id while
    children are sorted one after the other, and 48 while one is.
    """

    name: str
    children: Sequence[str]
    slice: Slice
    _state: TableState
    _encoding: Encoding
    _grouped: Longs | None = field(default=None, init=False)
    _ends: Longs = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _left: int = field(default=0, init=False)  # rows of children that were not sorted yet

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The slots by name, in order."""
        return self._state.slots

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self._state.device

    def counts(self) -> dict[str, int]:
        """Return how many ids each child has. May take long, and belongs on a thread.

        Raises:
            ValueError: If an id belongs to no child, so that it cannot be saved.
        """
        if not self._encoding.coalesced:
            return {self.children[0]: self._state.index.count}
        counts = np.bincount(self._numbers()[1], minlength=len(self.children))
        if len(counts) > len(self.children):
            odd = len(counts) - 1
            raise ValueError(
                f"table {self.name!r} holds {counts[odd]:,} ids of child number {odd}, but has "
                f"only {len(self.children)} children: insert ids with child="
            )
        self._ends = np.cumsum(counts)
        self._left = int(counts.sum())
        return dict(zip(self.children, counts.tolist(), strict=True))

    def sorted_rows(self, child: str, *, sub_slices: int) -> SortedRows:
        """Sort the rows of a child; after `counts`. May take long, and belongs on a thread."""
        state = self._state
        if not self._encoding.coalesced and state.index.count == state.end:  # every row is in use
            order = order_of(sort_keys(state.ids[: state.end], self.slice.size))
            ids, rows = state.ids[order], order
        else:
            rows = self._rows_of(child)
            ids = self._encoding.decode(state.ids[rows])
            order = order_of(sort_keys(ids, self.slice.size))
            ids, rows = ids[order], rows[order]
        offsets = sub_slice_offsets(ids, self.slice, sub_slices)
        return SortedRows(ids=ids, rows=rows, offsets=offsets)

    def copy_rows(self, slot: str, rows: Longs, out: torch.Tensor) -> None:
        """Copy rows of a slot, `[n]` of them, to host memory, uint8 `[n, row_bytes]`."""
        self._state.segments.copy_out(slot, rows, out)

    def changed(self) -> bool:
        """Say whether rows may have changed since: never."""
        return False

    def _rows_of(self, child: str) -> Longs:
        if not self._encoding.coalesced:
            return self._state.live_rows()
        with self._lock:
            if self._grouped is None:
                rows, numbers = self._numbers()
                # A stable sort of 16-bit numbers is a radix sort.
                self._grouped = rows[np.argsort(numbers, kind="stable")]
            number = self.children.index(child)
            begin = int(self._ends[number - 1]) if number else 0
            rows = self._grouped[begin : int(self._ends[number])]
            self._left -= len(rows)
            if self._left <= 0:  # that was the last child
                self._grouped = None
            return rows

    def _numbers(self) -> tuple[Longs, NDArray[np.uint16]]:
        """Return all rows, and the number of each row's child."""
        rows = self._state.live_rows()
        return rows, (self._state.ids[rows].view(np.uint64) >> _CHILD_BITS).astype(np.uint16)


def sub_slice_offsets(ids: Longs, slice_: Slice, sub_slices: int) -> tuple[int, ...]:
    """Return where the rows of each sub-slice begin, given sorted ids."""
    begin, size = slice_.begin, slice_.size
    share = slice_.end - begin

    def position(row: int) -> int:
        return int(ids[row]) % 2**64 % size

    cuts = (begin + share * number // sub_slices for number in range(1, sub_slices))
    firsts = (bisect_left(range(len(ids)), cut, key=position) for cut in cuts)
    return (0, *firsts, len(ids))


def sort_keys(ids: Longs, size: int) -> Words:
    """Return numbers that sort as (slice position, id) do, so that one sort of numbers is enough.

    Of all ids with quotients by `size` from `low` to `high`, at most `high - low + 1` have the same
    position, so an id's place among them is `position * (high - low + 1) + quotient - low`. Where
    that may exceed 64 bits, places among all 2⁶⁴ ids are used: `2⁶⁴ // size` ids have each
    position, and the first `2⁶⁴ % size` positions have one more.
    """
    unsigned = ids.view(np.uint64)
    if size == 1 or not len(ids):  # all ids have position 0
        return unsigned
    quotient: Words
    position: Words
    quotient, position = np.divmod(unsigned, np.uint64(size))
    low, high = int(quotient.min()), int(quotient.max())
    keys: Words
    if (high - low + 1) * size <= 2**64:
        keys = position * np.uint64(high - low + 1) + quotient - np.uint64(low)
    else:
        share, larger = divmod(2**64, size)
        begins = position * np.uint64(share) + np.minimum(position, np.uint64(larger))
        keys = begins + quotient
    return keys


def order_of(keys: Words) -> Longs:
    """Return the positions that sort keys, as a stable `np.argsort` does, in a third of the time.

    numpy sorts plain numbers seven times faster than positions of numbers (4 million in 22 ms
    instead of 158). So each key carries its position in its lowest bits. If that pushes bits of the
    key out, neighbours may come in the wrong order. They are few if keys are spread, as hashed ids
    are, and are put right; if they are many, `np.argsort` sorts after all.
    """
    if len(keys) < _FEW:
        return np.argsort(keys, kind="stable")
    low, high = int(keys.min()), int(keys.max())
    bits = (len(keys) - 1).bit_length()
    lost = max((high - low).bit_length() + bits - 64, 0)
    packed = ((keys - np.uint64(low)) >> np.uint64(lost)) << np.uint64(bits)
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    packed &= np.uint64((1 << bits) - 1)
    order = packed.view(np.int64)
    return order if not lost or _put_right(keys, order) else np.argsort(keys, kind="stable")


def _put_right(keys: Words, order: Longs) -> bool:
    """Swap neighbours in the wrong order until there are none; give up if there are many."""
    for _ in range(_ROUNDS):
        found = keys[order]
        wrong = np.flatnonzero(found[1:] < found[:-1])
        if not len(wrong):
            return True
        if len(wrong) > len(order) // _FEW:
            return False
        wrong = wrong[np.append(True, np.diff(wrong) > 1)]  # of three in a row, two at a time
        order[wrong], order[wrong + 1] = order[wrong + 1], order[wrong]
    return False
