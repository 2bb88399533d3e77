"""Row memory: a few allocations that together hold all rows of a table.

Rows are only ever appended, never overwritten while a lookup may read them: a table grows by a new
segment, not by moving its rows, so that a load into a full table takes no second copy of it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .slots import Slot


# Gathering and scattering move bits; some dtypes (float8, uint16) lack kernels of their own.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a dtype that every way of indexing knows."""
    return tensor.view(_CARRIERS[tensor.dtype.itemsize])


@dataclass(slots=True)
class Segment:
    """Memory for `capacity` rows of every slot."""

    first: int
    """Number of its first row within the table."""

    capacity: int
    slots: Mapping[str, torch.Tensor]
    """`[capacity, *shape]` each."""

    lent: int = 0
    """Rows that may have been written to; the rows beyond read as zero."""

    @classmethod
    def allocate(
        cls, slots: Mapping[str, Slot], first: int, capacity: int, device: torch.device
    ) -> Segment:
        """Reserve memory for rows.

        Raises:
            MemoryError: If there is no room.
        """
        memory = {
            name: zeros((capacity, *slot.shape), slot.dtype, device) for name, slot in slots.items()
        }
        return cls(first, capacity, memory)

    def until(self, end: int) -> Segment:
        """Return the rows of it that come before row `end` of the table."""
        count = min(end - self.first, self.capacity)
        memory = {name: rows[:count] for name, rows in self.slots.items()}
        return Segment(self.first, count, memory, min(self.lent, count))


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments in the order of their rows. A segment's rows end where the next one's begin."""

    items: tuple[Segment, ...] = ()
    firsts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, items: tuple[Segment, ...]) -> Segments:
        """Return these segments."""
        return cls(items, np.array([segment.first for segment in items], np.int64))

    @property
    def capacity(self) -> int:
        """One past the last row there is memory for."""
        return self.items[-1].first + self.items[-1].capacity if self.items else 0

    def owner(self, row: int) -> Segment:
        """Return the segment that a row lies in."""
        return self.items[bisect_right(self.firsts, row) - 1]

    def view(self, slot: str, first: int, count: int) -> torch.Tensor:
        """Return the memory of rows that lie in one segment, `[count, *shape]`."""
        segment = self.owner(first)
        start = first - segment.first
        assert start >= 0, "a row is not before its segment"
        assert start + count <= segment.capacity, "rows lie in one segment"
        return segment.slots[slot][start : start + count]

    def gather(self, slot: str, rows: NDArray[np.int64]) -> torch.Tensor:
        """Copy rows out, `[n, *shape]`."""
        sample = self.items[0].slots[slot]
        carrier = _CARRIERS[sample.dtype.itemsize]
        if len(self.items) == 1:
            first = self.items[0].first
            index = torch.from_numpy(rows - first if first else rows).to(sample.device)
            return sample.view(carrier).index_select(0, index).view(sample.dtype)
        out = torch.empty((len(rows), *sample.shape[1:]), dtype=carrier, device=sample.device)
        for segment, here in self._by_segment(rows):
            index = torch.from_numpy(rows[here] - segment.first).to(sample.device)
            memory = segment.slots[slot].view(carrier)
            out[torch.from_numpy(here).to(sample.device)] = memory.index_select(0, index)
        return out.view(sample.dtype)

    def copy_out(self, slot: str, rows: NDArray[np.int64], out: torch.Tensor) -> None:
        """Copy rows to host memory, uint8 `[n, row_bytes]`, without memory for a second copy."""
        for segment, here in self._by_segment(rows):
            whole = len(here) == len(rows)
            index = torch.from_numpy((rows if whole else rows[here]) - segment.first)
            memory = segment.slots[slot].view(segment.capacity, -1).view(torch.uint8)
            if memory.device.type == "cpu" and whole:
                torch.index_select(memory, 0, index, out=out)
            else:
                chosen = memory.index_select(0, index.to(memory.device)).to(out.device)
                out[torch.from_numpy(here)] = chosen

    def scatter(self, slot: str, rows: NDArray[np.int64], values: torch.Tensor) -> None:
        """Copy rows in; `values` is `[n, *shape]`."""
        carrier = _CARRIERS[values.dtype.itemsize]
        for segment, here in self._by_segment(rows):
            memory = segment.slots[slot].view(carrier)
            index = torch.from_numpy(rows[here] - segment.first).to(memory.device)
            chosen = values.view(carrier)[torch.from_numpy(here).to(values.device)]
            memory.index_copy_(0, index, chosen.to(memory.device))

    def _by_segment(self, rows: NDArray[np.int64]) -> list[tuple[Segment, NDArray[np.int64]]]:
        """Say for each segment which of `rows` lie in it, as positions in `rows`."""
        owners = np.searchsorted(self.firsts, rows, side="right") - 1
        return [
            (segment, here)
            for number, segment in enumerate(self.items)
            if len(here := np.flatnonzero(owners == number))
        ]
