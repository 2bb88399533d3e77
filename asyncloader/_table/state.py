"""All that a lookup needs, in one value that never changes: the id index, ids and rows.

Rows lie in segments. They are only ever appended, never overwritten while a lookup may read them: a
table grows by a new segment, not by moving its rows, so that a load into a full table takes no
second copy of it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros

from . import kernels as _kernels
from .index import IdIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .schema import Longs, Slot


# Gathering and scattering move bits; some dtypes (float8, uint16) lack kernels of their own.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


_ALONE = 4 << 20
"""Bytes of rows that are gathered on the caller's thread. Two threads of torch's take 0.55 to 0.9
of the time from 200 KiB on; but where other threads are busy, the one that ends first waits for the
other, milliseconds long."""


def _carried(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a dtype that every way of indexing knows."""
    return tensor.view(_CARRIERS[tensor.dtype.itemsize])


@dataclass(slots=True)
class Segment:
    """Memory for `capacity` rows of every slot, `[capacity, *shape]` each.

    Attributes:
        first: The number of its first row within the table.
        lent: The first `lent` rows may have been written to; the rows behind them read as zero.
    """

    first: int
    capacity: int
    slots: Mapping[str, torch.Tensor]
    lent: int = 0


class Segments:
    """Segments in the order of their rows. A segment's rows end where those of the next begin."""

    def __init__(self, items: Iterable[Segment] = ()) -> None:
        self.items = tuple(items)
        self.firsts = np.array([segment.first for segment in self.items], np.int64)

    @property
    def capacity(self) -> int:
        """One past the last row that has memory."""
        return self.items[-1].first + self.items[-1].capacity if self.items else 0

    def owner(self, row: int) -> Segment:
        return self.items[bisect_right(self.firsts, row) - 1]

    def view(self, slot: str, first: int, count: int) -> torch.Tensor:
        """Return the memory of rows that lie in one segment, `[count, *shape]`."""
        segment = self.owner(first)
        start = first - segment.first
        assert start >= 0, "a row is not before its segment"
        assert start + count <= segment.capacity, "rows lie in one segment"
        return segment.slots[slot][start : start + count]

    def gather(self, slot: Slot, rows: Longs, *, missing: int = 0) -> torch.Tensor:
        """Copy rows out, `[n, *shape]`; of -1, which stands `missing` times in `rows`, zeros."""
        device = self.items[0].slots[slot.name].device
        wide = len(rows) * slot.row_bytes
        if device.type == "cpu" and (missing or len(self.items) > 1 or wide <= _ALONE):
            out = torch.empty((len(rows), *slot.shape), dtype=slot.dtype)
            self._copy(slot.name, rows, out)
            return out
        if missing:
            out = torch.zeros((len(rows), *slot.shape), dtype=slot.dtype, device=device)
            found = np.flatnonzero(rows >= 0)
            if len(found):
                there = self._select(slot.name, rows[found])
                _carried(out)[torch.from_numpy(found).to(device)] = _carried(there)
            return out
        return self._select(slot.name, rows)

    def _copy(self, slot: str, rows: Longs, out: torch.Tensor) -> None:
        """Copy rows to host memory, on this thread: torch's own wait for each other at the end."""
        memory = [segment.slots[slot] for segment in self.items]
        addresses = np.array([one.data_ptr() for one in memory], np.int64)
        width = memory[0].stride(0) * memory[0].itemsize
        _kernels.gather(self.firsts, addresses, rows, width, out.data_ptr())

    def _select(self, slot: str, rows: Longs) -> torch.Tensor:
        sample = self.items[0].slots[slot]
        carrier = _CARRIERS[sample.dtype.itemsize]
        if len(self.items) == 1:
            first = self.items[0].first
            index = torch.from_numpy(rows - first if first else rows).to(sample.device)
            return sample.view(carrier).index_select(0, index).view(sample.dtype)
        out = torch.empty((len(rows), *sample.shape[1:]), dtype=carrier, device=sample.device)
        for memory, index, here in self._by_segment(slot, rows):
            out[here.to(out.device)] = _carried(memory).index_select(0, index)
        return out.view(sample.dtype)

    def copy_out(self, slot: str, rows: Longs, out: torch.Tensor) -> None:
        """Copy rows to host memory, uint8 `[n, row_bytes]`, without memory for a second copy."""
        if self.items[0].slots[slot].is_cpu:
            self._copy(slot, rows, out)
            return
        for memory, index, here in self._by_segment(slot, rows):
            plain = memory.view(len(memory), -1).view(torch.uint8)
            out[here] = plain.index_select(0, index).to(out.device)

    def scatter(self, slot: str, rows: Longs, values: torch.Tensor) -> None:
        """Copy rows in; `values` is `[n, *shape]`."""
        for memory, index, here in self._by_segment(slot, rows):
            chosen = _carried(values)[here.to(values.device)].to(memory.device)
            _carried(memory).index_copy_(0, index, chosen)

    def _by_segment(
        self, slot: str, rows: Longs
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield the memory of each segment, the rows in it, and their positions in `rows`."""
        owners = np.searchsorted(self.firsts, rows, side="right") - 1
        for number, segment in enumerate(self.items):
            here = np.flatnonzero(owners == number)
            if len(here):
                memory = segment.slots[slot]
                index = torch.from_numpy(rows[here] - segment.first).to(memory.device)
                yield memory, index, torch.from_numpy(here)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """One version of a table.

    A lookup takes the state once and works on it; an update builds the next one beside it and
    swaps. Memory from `end` on may belong to an update in the making.

    Attributes:
        block_size: Capacity grows by a multiple of so many rows.
        ids: `[rows]`, the encoded id of each row; a row that `index` does not point to is dead.
        end: One past the last row in use.
    """

    slots: Mapping[str, Slot]
    device: torch.device
    block_size: int
    index: IdIndex
    ids: Longs
    segments: Segments
    end: int = 0

    def __post_init__(self) -> None:
        assert self.index.count <= self.end, "an id has a row"
        assert self.end <= min(len(self.ids), self.segments.capacity), "a row has memory"

    @classmethod
    def empty(cls, slots: Mapping[str, Slot], device: torch.device, block_size: int) -> TableState:
        """Return a table without ids, and with a seed of its own."""
        return cls(
            slots=slots,
            device=device,
            block_size=block_size,
            index=IdIndex.empty(0),
            ids=np.zeros(0, np.int64),
            segments=Segments(),
        )

    def find(self, wanted: Longs) -> tuple[Longs, int]:
        """Return the row of each id, -1 where there is none, and how many have none."""
        return self.index.find(self.ids, wanted)

    def lookup(self, slot: str, wanted: Longs) -> torch.Tensor:
        """Return the rows of ids, `[n, *shape]`; zeros for ids that are not there."""
        rows, missing = self.find(wanted)
        return self.gather(slot, rows, missing=missing)

    def gather(self, slot: str, rows: Longs, *, missing: int = 0) -> torch.Tensor:
        """Copy rows out, `[n, *shape]`; of -1, which stands `missing` times in `rows`, zeros."""
        spec = self.slots[slot]
        if missing == len(rows):
            return torch.zeros((len(rows), *spec.shape), dtype=spec.dtype, device=self.device)
        return self.segments.gather(spec, rows, missing=missing)

    def live_rows(self) -> Longs:
        return self.index.live_rows(self.end)

    def with_slot(self, slot: Slot) -> TableState:
        """Return this state with another slot, which has its initial value for all ids."""
        items = []
        for segment in self.segments.items:
            memory = zeros((segment.capacity, *slot.shape), slot.dtype, self.device)
            if not slot.starts_as_zero:
                slot.initialize(memory[: min(self.end - segment.first, segment.capacity)])
            slots = {**segment.slots, slot.name: memory}
            items.append(Segment(segment.first, segment.capacity, slots, segment.lent))
        return replace(self, slots={**self.slots, slot.name: slot}, segments=Segments(items))

    def with_room(self, count: int) -> TableState:
        more = count - self.index.count
        segments, ids, index = self.segments, self.ids, self.index
        if segments.capacity - self.end < more:
            segments = self.grown(segments, self.end, more)
        if len(ids) - self.end < more:
            ids = self.copied_ids(self.end + more)
        if index.room < count:
            index = index.grown(count, ids)
        return replace(self, segments=segments, ids=ids, index=index)

    def grown(self, segments: Segments, first: int, count: int) -> Segments:
        """Return segments and a new one, whose rows, `count` or some more, begin at `first`.

        Raises:
            MemoryError: If there is no room.
        """
        capacity = -(-count // self.block_size) * self.block_size
        memory = {
            name: zeros((capacity, *slot.shape), slot.dtype, self.device)
            for name, slot in self.slots.items()
        }
        return Segments((*segments.items, Segment(first, capacity, memory)))

    def copied_ids(self, capacity: int) -> Longs:
        """Return a copy of the ids, with memory for so many rows."""
        ids = zeros((capacity,), torch.int64).numpy()
        ids[: self.end] = self.ids[: self.end]
        return ids

    def sealed(self, *, shares_ids: bool) -> TableState:
        """Return the same rows, without memory behind them that the next update could use.

        Args:
            shares_ids: Whether the memory of ids is left behind, too: then they are copied.
        """
        items = [segment for segment in self.segments.items if segment.first < self.end]
        if items:
            last = items.pop()
            count = min(self.end - last.first, last.capacity)
            memory = {name: rows[:count] for name, rows in last.slots.items()}
            items.append(Segment(last.first, count, memory, min(last.lent, count)))
        ids = self.ids[: self.end].copy() if shares_ids else self.ids
        return replace(self, ids=ids, segments=Segments(items))


class Turn:
    """Lets one change of a table at a time be under way. A copy of it is a turn of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # another thread may release it

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()  # a lock cannot be copied, and a model with a table can

    def begin(self, name: str) -> None:
        """Begin a change of the table of that name; raise `RuntimeError` if one is under way."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"table {name!r} is being loaded or changed; one update at a time: "
                "wait for that one to end"
            )

    def end(self) -> None:
        """End the change that is under way, if one is: an update may be aborted twice."""
        if self._lock.locked():
            self._lock.release()
