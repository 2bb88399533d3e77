"""What a table holds at one moment, in the order in which it is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from asyncloader.checkpoint import Slice

    from ._encoding import Encoding
    from ._slots import Slot
    from ._state import TableState

__all__ = ["SortedRows", "TableSnapshot", "sort_keys"]

_CHILD_BITS = np.uint64(52)


@dataclass(frozen=True, slots=True)
class SortedRows:
    """The rows of one child, by slice position, then by id (both unsigned)."""

    ids: NDArray[np.int64]
    """`[n]`, as they stand on disk."""

    rows: NDArray[np.int64]
    """`[n]`, where the table keeps them."""

    offsets: tuple[int, ...]
    """First row of each of a number of equal sub-slices, and the number of rows."""


@dataclass(slots=True)
class TableSnapshot:
    """A table at one moment. Whatever becomes of the table, this stays as it is.

    It keeps the memory of that moment alive, and copies none of it.
    """

    name: str
    children: Sequence[str]
    slice: Slice
    _state: TableState
    _encoding: Encoding
    _grouped: NDArray[np.int64] | None = field(default=None, init=False)
    _ends: NDArray[np.int64] = field(init=False)

    @property
    def slots(self) -> Mapping[str, Slot]:
        """What it keeps for each id, in order."""
        return self._state.slots

    def counts(self) -> dict[str, int]:
        """Return how many ids each child has. May take long, and belongs on a thread.

        Raises:
            ValueError: If it holds ids of no child, which could not be saved.
        """
        if not self._encoding.coalesced:
            return {self.children[0]: self._state.index.count}
        rows = self._state.live_rows()
        numbers = (self._state.ids[rows].view(np.uint64) >> _CHILD_BITS).astype(np.uint16)
        counts = np.bincount(numbers, minlength=len(self.children))
        if len(counts) > len(self.children):
            odd = len(counts) - 1
            raise ValueError(
                f"table {self.name!r} holds {counts[odd]:,} ids of child number {odd}, but has "
                f"only {len(self.children)} children: insert ids with child="
            )
        # A stable sort of 16-bit numbers is a radix sort.
        self._grouped = rows[np.argsort(numbers, kind="stable")]
        self._ends = np.cumsum(counts)
        return dict(zip(self.children, counts.tolist(), strict=True))

    def sorted_rows(self, child: str, *, sub_slices: int) -> SortedRows:
        """Sort the rows of a child; after `counts`. May take long, and belongs on a thread."""
        rows = self._rows_of(child)
        ids = self._encoding.decode(self._state.ids[rows], child)
        keys = sort_keys(ids, self.slice.size)
        order = np.argsort(keys)
        begin, end = self.slice.begin, self.slice.end
        cuts = [begin + (end - begin) * i // sub_slices for i in range(1, sub_slices)]
        first = np.searchsorted(keys, _keys_of(cuts, self.slice.size), sorter=order)
        offsets = (0, *first.tolist(), len(rows))
        return SortedRows(ids=ids[order], rows=rows[order], offsets=offsets)

    def copy_rows(self, slot: str, rows: NDArray[np.int64], out: torch.Tensor) -> None:
        """Copy rows of a slot, `[n]` of them, to host memory, uint8 `[n, row_bytes]`."""
        self._state.segments.copy_out(slot, rows, out)

    def _rows_of(self, child: str) -> NDArray[np.int64]:
        if self._grouped is None:
            return self._state.live_rows()
        number = self.children.index(child)
        begin = int(self._ends[number - 1]) if number else 0
        return self._grouped[begin : int(self._ends[number])]


def sort_keys(ids: NDArray[np.int64], size: int) -> NDArray[np.uint64]:
    """Return numbers that sort as (slice position, id) do: the rank of each id in that order.

    So one sort of plain numbers does it. Of the 2⁶⁴ ids `2⁶⁴ // size` have each position, and the
    first `2⁶⁴ % size` positions have one more.

    Args:
        ids: int64 `[n]`.
        size: Of the slices.
    """
    unsigned = ids.view(np.uint64)
    if size == 1:  # all ids have position 0: one number too many for 64 bits
        return unsigned
    share, larger = divmod(2**64, size)
    quotient, position = np.divmod(unsigned, np.uint64(size))
    position_keys = position * np.uint64(share) + np.minimum(position, np.uint64(larger))
    keys: NDArray[np.uint64] = position_keys + quotient
    return keys


def _keys_of(positions: Sequence[int], size: int) -> NDArray[np.uint64]:
    """Return the keys of the smallest ids that have these positions; of `size` itself the last."""
    share, larger = divmod(2**64, size)
    keys = [min(p * share + min(p, larger), 2**64 - 1) for p in positions]
    return np.array(keys, np.uint64)
