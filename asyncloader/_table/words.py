"""What is done to the words of an index now and then. See `_kernels` for what a word is.

numpy does it about as fast as a compiled loop would, which would take long to compile. It goes
over windows that fit the cache, and holds no GIL to speak of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Flags = NDArray[np.bool_]
    Longs = NDArray[np.int64]
    Words = NDArray[np.uint64]


_WINDOW = 1 << 16
_ROW = np.uint64(2**40 - 1)


def mark_rows(words: Words, live: Flags) -> None:
    """Set `live`, bool `[rows]`, for every row that a word points to."""
    for _, _, rows in _windows(words):
        live[rows] = True


def count_rows(words: Words, firsts: Longs, counts: Longs) -> None:
    """Count the rows that words point to, by segment.

    Args:
        words: uint64 `[n]`, of an index.
        firsts: int64 `[segments]`, ascending; the first row of each.
        counts: int64 `[segments]`; increased.
    """
    for _, _, rows in _windows(words):
        counts += np.bincount(_owners(firsts, rows), minlength=len(firsts))


def rebase(words: Words, firsts: Longs, shifts: Longs) -> None:
    """Lower every row by what its segment is lowered.

    Args:
        words: uint64 `[n]`, of an index.
        firsts: int64 `[segments]`, ascending; the first row of each.
        shifts: int64 `[segments]`; how far each is lowered.
    """
    for window, used, rows in _windows(words):
        window[used] -= shifts[_owners(firsts, rows)].view(np.uint64)


def relocate(words: Words, moved: Longs, first: int) -> None:
    """Point the words of row `moved[i]` to row `first + i`; `moved`, int64 `[n]`, ascends."""
    if not len(moved):
        return
    for window, used, rows in _windows(words):
        at = np.searchsorted(moved, rows)
        found = moved[np.minimum(at, len(moved) - 1)] == rows
        window[used[found]] += (first + at[found] - rows[found]).view(np.uint64)


def _windows(words: Words) -> Iterator[tuple[Words, Longs, Longs]]:
    """Yield windows of words, the positions in each that are in use, and their rows."""
    for start in range(0, len(words), _WINDOW):
        window = words[start : start + _WINDOW]
        used = np.flatnonzero(window)
        yield window, used, (window[used] & _ROW).view(np.int64) - 1


def _owners(firsts: Longs, rows: Longs) -> Longs:
    """Return the number of the segment of each row."""
    return np.searchsorted(firsts, rows, side="right") - 1
