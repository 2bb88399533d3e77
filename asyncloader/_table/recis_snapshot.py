"""A table of RecIS while it is saved: its rows must stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .places import take_rows
from .recis_object import device_of, ids_and_places
from .snapshot import SortedRows, order_of, sort_keys, sub_slice_offsets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from asyncloader._checkpoint.slices import Slice

    from .schema import Encoding, Longs, Slot

_CHILD_BITS = np.uint64(52)


@dataclass(slots=True)
class RecISSnapshot:
    """See `SavableSnapshot`. Takes 16 bytes an id, and twice that in `changed`."""

    name: str
    slice: Slice
    slots: Mapping[str, Slot]
    _table: Any
    _encoding: Encoding
    _ids: Longs = field(init=False)
    _places: Longs = field(init=False)
    _blocks: Mapping[str, Sequence[torch.Tensor]] = field(init=False)

    @property
    def children(self) -> Sequence[str]:
        return self._encoding.children

    @property
    def device(self) -> torch.device:
        return device_of(self._table)

    def counts(self) -> dict[str, int]:
        self._ids, self._places = ids_and_places(self._table)
        last = int(self._places.max(initial=-1))
        self._blocks = {slot.name(): slot.values() for slot in self._table.slot_group().slots()}
        for slot, blocks in self._blocks.items():
            if sum(map(len, blocks)) <= last:
                raise ValueError(
                    f"slot {slot!r} of table {self.name!r} was appended after the first id, and "
                    "has no rows for ids that are there: append slots (make the optimizer) before "
                    "ids come in"
                )
        if not self._encoding.coalesced:
            return {self.children[0]: len(self._ids)}
        numbers = (self._ids.view(np.uint64) >> _CHILD_BITS).astype(np.int64)
        counts = np.bincount(numbers, minlength=len(self.children)).tolist()
        if len(counts) > len(self.children):
            raise ValueError(
                f"table {self.name!r} holds {counts[-1]:,} ids of child number {len(counts) - 1}, "
                f"but has only {len(self.children)} children"
            )
        return dict(zip(self.children, counts, strict=True))

    def sorted_rows(self, child: str, *, sub_slices: int) -> SortedRows:
        mine = self._encoding.are_of(self._ids, child)
        ids, places = self._encoding.decode(self._ids[mine]), self._places[mine]
        order = order_of(sort_keys(ids, self.slice.size))
        ids = ids[order]
        offsets = sub_slice_offsets(ids, self.slice, sub_slices)
        return SortedRows(ids=ids, rows=places[order], offsets=offsets)

    def copy_rows(self, slot: str, rows: Longs, out: torch.Tensor) -> None:
        take_rows(self._blocks[slot], rows, out)

    def changed(self) -> bool:
        """Say whether ids came or went, or rows moved, since `counts`."""
        found = ids_and_places(self._table)
        known = self._ids, self._places
        if all(map(np.array_equal, found, known)):
            return False
        now, then = np.argsort(found[0]), np.argsort(known[0])  # it may list them in any order
        return not all(np.array_equal(a[now], b[then]) for a, b in zip(found, known, strict=True))
