"""The id index: id → row. See `kernels` for its layout."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros
from asyncloader._memory.pages import touch

from . import arrays as _arrays
from . import kernels as _kernels

if TYPE_CHECKING:
    from numpy.typing import NDArray


MAX_ROWS = 2**40 - 2
# Measured for 4 M ids, nanoseconds of one core an id, to build and to find: 0.4 takes 9.2 and 8.9,
# and 20 bytes an id; 0.5 takes 9.9, 9.9 and 16; 0.6 takes 10.4, 11.7 and 13.
_LOAD = 0.5
# A part may hold a little more than its share of the ids.
_FULL = 0.8
_SPARE = 64
_PARTS = 8
_SMALL = 1 << 16
_LINE = 8
NO_ROWS: NDArray[np.bool_] = np.zeros(0, np.bool_)
"""Flags of rows, where none is set."""
_NO_PAIRS: NDArray[np.int64] = np.zeros((2, 0), np.int64)


def scratch() -> NDArray[np.uint64]:
    """Return what a kernel needs to work on a batch of ids."""
    return np.empty((2, _kernels.BATCH), np.uint64)


def new_seed() -> np.uint64:
    """Draw a seed for the hash of one table's ids."""
    return np.uint64(int.from_bytes(os.urandom(8), "little"))


@dataclass(slots=True)
class IdIndex:
    """Words that point to rows, and how many. Once in a `TableState`, it does not change."""

    words: NDArray[np.uint64]
    """`[parts * capacity]`."""

    parts: int
    """Each takes ids of its own."""

    count: int
    """Ids in it."""

    @classmethod
    def empty(cls, expected: int) -> IdIndex:
        """Return an index with room for `expected` ids."""
        parts = 1 if expected < _SMALL else _PARTS
        lines = (int(expected / parts / _LOAD) + _SPARE) // _LINE
        words = zeros((parts * lines * _LINE,), torch.int64).numpy().view(np.uint64)
        return cls(words, parts, 0)

    def __repr__(self) -> str:
        return f"<IdIndex {self.count} ids in {self.words.size} slots>"

    @property
    def room(self) -> int:
        """Ids that it takes in before it must grow."""
        # Hashes spread n ids over the parts to within sqrt(n) or so: far below the margin.
        return int(self.words.size * _FULL) - self.parts * _SPARE // 2

    def shares(self, threads: int) -> list[tuple[int, int]]:
        """Split the parts into ranges that as many threads may fill side by side."""
        threads = min(threads, self.parts)
        cuts = [self.parts * number // threads for number in range(threads + 1)]
        return list(itertools.pairwise(cuts))

    def candidates(self, other: IdIndex, share: tuple[int, int]) -> NDArray[np.uint64]:
        """Return the words whose ids may be of some parts of another index of the same seed."""
        if self.parts != other.parts:
            return self.words
        return self._of_parts(*share)

    def touch(self, lo: int, hi: int) -> None:
        """Touch the memory of the parts from `lo` to `hi` that was never touched.

        In order and block by block; ids touch it in any order, at whatever that costs.
        """
        touch([self._of_parts(lo, hi).data])

    def _of_parts(self, lo: int, hi: int) -> NDArray[np.uint64]:
        capacity = self.words.size // self.parts
        return self.words[lo * capacity : hi * capacity]

    def copy(self) -> IdIndex:
        """Return a copy to write to."""
        words = zeros((self.words.size,), torch.int64).numpy().view(np.uint64)
        np.copyto(words, self.words)
        return IdIndex(words, self.parts, self.count)

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
        wins = False  # no id is in both
        new.count, _ = _kernels.merge(
            new.words, new.parts, 0, new.parts, seed, ids, self.words,
            NO_ROWS if gone is None else gone, wins, _NO_PAIRS, scratch(),
        )  # fmt: skip
        return new

    def find(
        self, ids: NDArray[np.int64], seed: np.uint64, wanted: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], int]:
        """Return the row of each wanted id, -1 where it is not there, and how many are not."""
        rows = np.empty(len(wanted), np.int64)
        if not self.count:
            rows.fill(-1)
            return rows, len(wanted)
        return rows, _kernels.find(self.words, self.parts, seed, ids, wanted, rows, scratch())

    def live_rows(self, end: int) -> NDArray[np.int64]:
        """Return the rows that ids point to, ascending; `end` is one past the last."""
        if self.count == end:
            return np.arange(end)
        live = np.zeros(end, np.bool_)
        _arrays.mark_rows(self.words, live)
        return np.flatnonzero(live)
