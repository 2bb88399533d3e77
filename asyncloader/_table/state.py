"""All that a lookup needs, in one value that never changes; and who may put the next in place."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros

from .index import IdIndex, new_seed
from .segments import Segment, Segments, carried
from .slots import Slot, fill

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """One version of a table.

    A lookup takes the state once and works on it; an update builds the next one beside it and
    swaps. Memory beyond `end` may belong to an update in the making.
    """

    slots: Mapping[str, Slot]
    device: torch.device
    seed: np.uint64
    index: IdIndex
    ids: NDArray[np.int64]
    """`[rows]`: the id of each row, encoded; rows that `index` does not point to are dead."""

    segments: Segments
    end: int = 0
    """One past the last row in use."""

    def __post_init__(self) -> None:
        assert self.index.count <= self.end, "an id has a row"
        assert self.end <= min(len(self.ids), self.segments.capacity), "a row has memory"

    @classmethod
    def empty(cls, slots: Mapping[str, Slot], device: torch.device) -> TableState:
        """Return a table without ids, and with a seed of its own."""
        return cls(
            slots=slots,
            device=device,
            seed=new_seed(),
            index=IdIndex.empty(0),
            ids=np.zeros(0, np.int64),
            segments=Segments(),
        )

    def sealed(self, *, shares_ids: bool) -> TableState:
        """Return the same rows, and no memory beyond them that the next update could use.

        Args:
            shares_ids: Whether the memory of ids is to be left behind, too: then they are copied.
        """
        items = [segment for segment in self.segments.items if segment.first < self.end]
        if items:
            items[-1] = items[-1].until(self.end)
        segments = Segments.of(tuple(items))
        ids = self.ids[: self.end].copy() if shares_ids else self.ids
        return replace(self, ids=ids, segments=segments)

    def find(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Return the rows of ids, -1 where there is none, and how many have none."""
        return self.index.find(self.ids, self.seed, wanted)

    def lookup(self, slot: str, wanted: NDArray[np.int64]) -> torch.Tensor:
        """Return the rows of ids, `[n, *shape]`; zeros for ids that are not there."""
        rows, missing = self.find(wanted)
        if not missing:
            return self.gather(slot, rows)
        spec = self.slots[slot]
        found = rows >= 0
        out = torch.zeros((len(rows), *spec.shape), dtype=spec.dtype, device=self.device)
        if found.any():
            there = carried(self.segments.gather(slot, rows[found]))
            carried(out)[torch.from_numpy(found).to(self.device)] = there
        return out

    def gather(self, slot: str, rows: NDArray[np.int64]) -> torch.Tensor:
        """Copy rows out, `[n, *shape]`."""
        if len(rows):
            return self.segments.gather(slot, rows)
        spec = self.slots[slot]
        return torch.zeros((0, *spec.shape), dtype=spec.dtype, device=self.device)

    def live_rows(self) -> NDArray[np.int64]:
        """Return all rows in use, ascending."""
        return self.index.live_rows(self.end)

    def with_slot(self, slot: Slot) -> TableState:
        """Return this state with another slot, initialised for the ids that are there."""
        items = []
        for segment in self.segments.items:
            memory = zeros((segment.capacity, *slot.shape), slot.dtype, self.device)
            if not slot.starts_as_zero:
                fill(memory[: min(self.end - segment.first, segment.capacity)], slot.initializer)
            slots = {**segment.slots, slot.name: memory}
            items.append(Segment(segment.first, segment.capacity, slots, segment.lent))
        segments = Segments.of(tuple(items))
        return replace(self, slots={**self.slots, slot.name: slot}, segments=segments)


class Turn:
    """Lets one change of a table at a time be under way. A copy of it is a turn of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # given back by another thread, maybe

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()  # a lock cannot be copied, and a model with a table can

    def begin(self, name: str) -> None:
        """Begin a change of the table of that name.

        Raises:
            RuntimeError: If another one is under way.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"table {name!r} is being loaded or changed; one update at a time: "
                "wait for that one to end"
            )

    def end(self) -> None:
        """End the change that is under way, if one is."""
        if self._lock.locked():
            self._lock.release()
