"""The id index: id → row. See `_kernels` for its layout."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory import zeros

from . import _kernels

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MAX_ROWS", "IdIndex", "new_seed"]

MAX_ROWS = 2**40 - 2
# Measured for 4 M ids, one and two threads: 0.5 builds at 33 and 47 M ids/s and takes 16 bytes an
# id, 0.6 at 27 and 42 and takes 13, 0.7 at 26 and 37 and takes 11.
_LOAD = 0.6
# A part may hold a little more than its share of the ids.
_FULL = 0.8
_SPARE = 64
_PARTS = 8
_SMALL = 1 << 16


def new_seed() -> np.uint64:
    """Draw a seed for the hash of one table's ids."""
    return np.uint64(int.from_bytes(os.urandom(8), "little"))


@dataclass(slots=True)
class IdIndex:
    """Slots that point to rows, and how many. Once in a `TableState`, nobody writes to it."""

    slots: NDArray[np.uint64]
    """`[parts, capacity]`."""

    count: int
    """Ids in it."""

    @classmethod
    def empty(cls, expected: int) -> IdIndex:
        """Return an index with room for `expected` ids."""
        parts = 1 if expected < _SMALL else _PARTS
        capacity = int(expected / parts / _LOAD) + _SPARE
        memory = zeros((parts * capacity,), torch.int64).numpy().view(np.uint64)
        return cls(memory.reshape(parts, capacity), 0)

    def __repr__(self) -> str:
        return f"<IdIndex {self.count} ids in {self.slots.size} slots>"

    @property
    def words(self) -> NDArray[np.uint64]:
        """All slots, `[parts * capacity]`."""
        return self.slots.reshape(-1)

    @property
    def shift(self) -> np.uint64:
        """How far a hash is shifted to give its part."""
        return np.uint64(64 - (len(self.slots).bit_length() - 1))

    @property
    def room(self) -> int:
        """Ids that it takes in before it must grow."""
        # Hashes spread n ids over the parts to within sqrt(n) or so: far below the margin.
        return int(self.slots.size * _FULL) - len(self.slots) * _SPARE // 2

    def shares(self, threads: int) -> list[tuple[int, int]]:
        """Split the parts into ranges that as many threads may fill side by side."""
        parts = len(self.slots)
        threads = min(threads, parts)
        cuts = [parts * number // threads for number in range(threads + 1)]
        return list(itertools.pairwise(cuts))

    def copy(self) -> IdIndex:
        """Return a copy to write to."""
        memory = zeros((self.slots.size,), torch.int64).numpy().view(np.uint64)
        np.copyto(memory, self.words)
        return IdIndex(memory.reshape(self.slots.shape), self.count)

    def grown(
        self,
        expected: int,
        ids: NDArray[np.int64],
        seed: np.uint64,
        gone: NDArray[np.bool_] | None = None,
    ) -> IdIndex:
        """Return a copy with room for `expected` ids.

        Args:
            expected: Ids.
            ids: int64 `[rows]`, where the ids stand.
            seed: The hash's.
            gone: bool `[rows]`, rows to leave out.
        """
        new = IdIndex.empty(expected)
        leave = np.zeros(0, np.bool_) if gone is None else gone
        new.count = _kernels.rehash(new.slots, new.shift, seed, ids, self.words, leave)
        return new

    def find(
        self, ids: NDArray[np.int64], seed: np.uint64, wanted: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], int]:
        """Return the row of each wanted id, -1 where it is not there, and how many are not."""
        rows = np.empty(len(wanted), np.int64)
        if not self.count:
            rows.fill(-1)
            return rows, len(wanted)
        return rows, _kernels.find(self.slots, self.shift, seed, ids, wanted, rows)

    def live_rows(self, end: int) -> NDArray[np.int64]:
        """Return the rows that ids point to, ascending; `end` is one past the last."""
        if self.count == end:
            return np.arange(end)
        live = np.zeros(end, np.bool_)
        _kernels.mark_rows(self.words, live)
        return np.flatnonzero(live)
