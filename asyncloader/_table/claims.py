"""Which ids of a block are taken: those that belong to the slices of the block and of the table.

numpy does it about as fast as a compiled loop would, which would take long to compile. It goes
over windows that fit the cache, and holds no GIL to speak of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncloader._checkpoint.slices import Slice

    Flags = NDArray[np.bool_]
    Longs = NDArray[np.int64]


_WINDOW = 1 << 15


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
    for start in range(0, len(ids), _WINDOW):
        window = ids[start : start + _WINDOW]
        np.logical_not(_belong(window, claimed), out=refused[start : start + _WINDOW])
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
    for start in range(0, len(ids), _WINDOW):
        window = ids[start : start + _WINDOW]
        taken = _belong(window, wanted)
        if not claimed.is_whole:
            honest = _belong(window, claimed)
            outside += len(window) - int(np.count_nonzero(honest))
            taken &= honest
        found = np.flatnonzero(taken)
        rows[count : count + len(found)] = found + start
        count += len(found)
    rows = rows[:count]
    return rows, (ids[rows] & mask) | child, outside


def _belong(ids: Longs, slice_: Slice) -> Flags:
    size = slice_.size
    unsigned = ids.view(np.uint64)
    # A division costs ten times as much as a mask.
    power_of_two = size & (size - 1) == 0
    position = unsigned & np.uint64(size - 1) if power_of_two else unsigned % np.uint64(size)
    # Below `begin` it wraps around, to more than any slice is long.
    position -= np.uint64(slice_.begin)
    inside: Flags = position < np.uint64(slice_.end - slice_.begin)
    return inside
