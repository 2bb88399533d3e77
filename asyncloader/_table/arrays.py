"""What numpy does with ids and with the words of an index, in windows that fit the cache.

numpy does it about as fast as a compiled loop would, which would take long to compile, and holds no
GIL to speak of. See `kernels` for what a word is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from asyncloader._checkpoint.slices import Slice

    Flags = NDArray[np.bool_]
    Longs = NDArray[np.int64]
    Words = NDArray[np.uint64]


_IDS = 1 << 15
_WORDS = 1 << 16
_ROW = np.uint64(2**40 - 1)


def admit(ids: Longs, claimed: Slice, mask: int, child: int) -> Flags:
    """Encode ids where they stand; say which lie outside the slice that their block claims.

    Args:
        ids: int64 `[n]`; encoded in place.
        claimed: The slice.
        mask: Bits of an id that stay; -1 keeps all.
        child: Bits that are set, the child's number shifted.

    Returns:
        bool `[n]`.
    """
    refused = np.empty(len(ids), np.bool_)
    for start in range(0, len(ids), _IDS):
        window = ids[start : start + _IDS]
        refused[start : start + _IDS] = claimed.strays(window)
        if mask != -1:
            window &= mask
            window |= child
    return refused


def select_rows(
    ids: Longs, claimed: Slice, wanted: Slice, mask: int, child: int
) -> tuple[Longs, Longs, int]:
    """Pick the ids of a block that a table wants.

    Args:
        ids: int64 `[n]`, as on disk.
        claimed: The slice that the block claims.
        wanted: The table's.
        mask: Bits of an id that stay; -1 keeps all.
        child: Bits that are set.

    Returns:
        The positions of those wanted, ascending; themselves, encoded; and how many lie outside the
        claimed slice.
    """
    rows = np.empty(len(ids), np.int64)
    count = 0
    outside = 0
    for start in range(0, len(ids), _IDS):
        window = ids[start : start + _IDS]
        refused = wanted.strays(window)
        if not claimed.is_whole:
            lying = claimed.strays(window)
            outside += int(np.count_nonzero(lying))
            refused |= lying
        found = np.flatnonzero(~refused)
        rows[count : count + len(found)] = found + start
        count += len(found)
    rows = rows[:count]
    return rows, (ids[rows] & mask) | child, outside


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
    for start in range(0, len(words), _WORDS):
        window = words[start : start + _WORDS]
        used = np.flatnonzero(window)
        yield window, used, (window[used] & _ROW).view(np.int64) - 1


def _owners(firsts: Longs, rows: Longs) -> Longs:
    """Return the number of the segment of each row."""
    return np.searchsorted(firsts, rows, side="right") - 1
