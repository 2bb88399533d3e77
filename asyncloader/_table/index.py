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

from . import kernels as _kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .schema import Flags, Longs, Words


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
_WINDOW = 1 << 16  # words that fit into the processor's cache
_ROW = np.uint64(2**40 - 1)
NO_ROWS: Flags = np.zeros(0, np.bool_)
"""Flags of rows, where none is set."""
_NO_PAIRS: Longs = np.zeros((2, 0), np.int64)


def scratch() -> Words:
    """Return memory for a kernel's work on a batch of ids."""
    return np.empty((2, _kernels.BATCH), np.uint64)


def _new_words(count: int) -> Words:
    return zeros((count,), torch.int64).numpy().view(np.uint64)


@dataclass(slots=True)
class IdIndex:
    """Words that point to rows. Once in a `TableState`, it does not change.

    Attributes:
        words: `[parts * capacity]`; each part takes ids of its own.
        count: The number of ids in it.
        seed: The seed of the hash. Each table draws its own.
    """

    words: Words
    parts: int
    count: int
    seed: np.uint64

    @classmethod
    def empty(cls, expected: int, seed: np.uint64 | None = None) -> IdIndex:
        """Return an index with room for `expected` ids, and a seed of its own unless given."""
        if seed is None:
            seed = np.uint64(int.from_bytes(os.urandom(8), "little"))
        parts = 1 if expected < _SMALL else _PARTS
        lines = (int(expected / parts / _LOAD) + _SPARE) // _LINE
        return cls(_new_words(parts * lines * _LINE), parts, 0, seed)

    def __repr__(self) -> str:
        return f"<IdIndex {self.count} ids in {self.words.size} slots>"

    @property
    def room(self) -> int:
        """The number of ids that it takes in before it must grow."""
        # Hashes spread n ids over the parts to within sqrt(n) or so: far below the margin.
        return int(self.words.size * _FULL) - self.parts * _SPARE // 2

    def shares(self, threads: int) -> list[tuple[int, int]]:
        """Split the parts into ranges that as many threads may fill side by side."""
        threads = min(threads, self.parts)
        cuts = [self.parts * number // threads for number in range(threads + 1)]
        return list(itertools.pairwise(cuts))

    def candidates(self, other: IdIndex, share: tuple[int, int]) -> Words:
        """Return the words whose ids may lie in a share of another index of the same seed."""
        return self._of_parts(*share) if self.parts == other.parts else self.words

    def _of_parts(self, lo: int, hi: int) -> Words:
        capacity = self.words.size // self.parts
        return self.words[lo * capacity : hi * capacity]

    def copy(self) -> IdIndex:
        words = _new_words(self.words.size)
        np.copyto(words, self.words)
        return IdIndex(words, self.parts, self.count, self.seed)

    def grown(self, expected: int, ids: Longs, gone: Flags = NO_ROWS) -> IdIndex:
        """Return a copy with room for `expected` ids, without the rows that `gone` flags."""
        new = IdIndex.empty(expected, self.seed)
        whole = (0, new.parts)
        new.count, _ = new.merge(whole, ids, self.words, gone=gone, wins=False)  # no id is in both
        return new

    def find(self, ids: Longs, wanted: Longs) -> tuple[Longs, int]:
        """Return the row of each wanted id, -1 where it is not there, and how many are not."""
        rows = np.empty(len(wanted), np.int64)
        if not self.count:
            rows.fill(-1)
            return rows, len(wanted)
        missing = _kernels.find(self.words, self.parts, self.seed, ids, wanted, rows, scratch())
        return rows, missing

    def insert(
        self,
        share: tuple[int, int],
        ids: Longs,
        rows: tuple[int, int],
        refused: Flags,
        runs: tuple[Longs, Longs],
    ) -> tuple[int, int]:
        """Put the ids of `rows`, first and count, into a share; see `kernels.insert_rows`.

        `count` does not change: several threads may do this side by side.
        """
        # In order and block by block; ids touch memory in any order, at whatever that costs.
        touch([self._of_parts(*share).data])
        return _kernels.insert_rows(
            self.words, self.parts, *share, self.seed, ids, *rows, refused, *runs, scratch()
        )

    def merge(
        self,
        share: tuple[int, int],
        ids: Longs,
        source: Words,
        *,
        wins: bool,
        gone: Flags = NO_ROWS,
        pairs: Longs = _NO_PAIRS,
    ) -> tuple[int, int]:
        """Put words of another index into a share; see `kernels.merge`. `count` does not change."""
        return _kernels.merge(
            self.words, self.parts, *share, self.seed, ids, source, gone, wins, pairs, scratch()
        )

    # numpy does the following about as fast as a kernel would, which would take long to compile.

    def live_rows(self, end: int) -> Longs:
        """Return the rows that ids point to, ascending; `end` is one past the last."""
        if self.count == end:
            return np.arange(end)
        live = np.zeros(end, np.bool_)
        for _, _, rows in self._windows():
            live[rows] = True
        return np.flatnonzero(live)

    def count_rows(self, firsts: Longs) -> Longs:
        """Return how many ids point to each segment; `firsts` are the segments' first rows."""
        counts = np.zeros(len(firsts), np.int64)
        for _, _, rows in self._windows():
            counts += np.bincount(_owners(firsts, rows), minlength=len(firsts))
        return counts

    def rebase(self, firsts: Longs, shifts: Longs) -> None:
        """Lower every row by the shift of its segment; `firsts` are the segments' first rows."""
        for window, used, rows in self._windows():
            window[used] -= shifts[_owners(firsts, rows)].view(np.uint64)

    def relocate(self, moved: Longs, first: int) -> None:
        """Point the word of row `moved[i]` to row `first + i`; `moved`, `[n]`, ascends."""
        if not len(moved):
            return
        for window, used, rows in self._windows():
            at = np.searchsorted(moved, rows)
            found = moved[np.minimum(at, len(moved) - 1)] == rows
            window[used[found]] += (first + at[found] - rows[found]).view(np.uint64)

    def _windows(self) -> Iterator[tuple[Words, Longs, Longs]]:
        """Yield windows of words, the positions in each that are in use, and their rows."""
        for start in range(0, len(self.words), _WINDOW):
            window = self.words[start : start + _WINDOW]
            used = np.flatnonzero(window)
            yield window, used, (window[used] & _ROW).view(np.int64) - 1


def _owners(firsts: Longs, rows: Longs) -> Longs:
    """Return the number of the segment of each row."""
    return np.searchsorted(firsts, rows, side="right") - 1
