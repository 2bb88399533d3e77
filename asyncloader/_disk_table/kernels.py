"""The loops over ids of tables whose rows stay on the disk, compiled by Numba.

As those of `_table.kernels`: without the GIL, compiled for given signatures when they are imported.
Rows are moved by address: rows of any dtype and length are bytes to them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._table import native
from asyncloader._table.compiling import Compiler, KernelCache, hash_of, inline, prefetch
from asyncloader._table.native import wipe

from . import moving
from .moving import put_row

if TYPE_CHECKING:
    from asyncloader._table.schema import Longs


LANES = 64
"""Ids that are looked for side by side."""

_TOP, _REST = np.uint64(48), np.uint64(16)

kernel = Compiler(partial(KernelCache, shared=(moving.__file__, native.__file__)))


@inline
def _key(id_: np.int64) -> np.uint64:
    """Return a number that sorts as (position in a slice of 65,536, id) do: its bits, rotated."""
    bits = np.uint64(id_)
    return (bits << _TOP) | (bits >> _REST)


@kernel("b1(i8[::1], u8, i8[::1])")
def scan(ids: Longs, shift: np.uint64, counts: Longs) -> bool:
    """Count the ids of each bucket; say whether they ascend, none of them twice."""
    ascending = True
    last = np.uint64(0)
    for at in range(ids.shape[0]):
        key = _key(ids[at])
        counts[key >> shift] += 1
        ascending &= (key > last) | (at == 0)
        last = key
    return ascending


@kernel("void(i8[::1], i8[::1], u8, i8[::1], i8[::1], i8[:, ::1])")
def find(
    ids: Longs,  # [n], ascending
    directory: Longs,  # [buckets + 1], where each bucket begins
    shift: np.uint64,  # of a key, to its bucket
    wanted: Longs,  # [m], the ids to find
    places: Longs,  # [m]; receives their places, or -1
    scratch: Longs,  # [2, LANES]
) -> None:
    """Look ids up: a binary search of many at a time, so that memory is not waited for."""
    lows, lengths = scratch[0], scratch[1]
    for start in range(0, wanted.shape[0], LANES):
        size = min(LANES, wanted.shape[0] - start)
        for i in range(size):
            prefetch(directory, np.int64(_key(wanted[start + i]) >> shift))
        longest = 0
        for i in range(size):
            bucket = np.int64(_key(wanted[start + i]) >> shift)
            low = directory[bucket]
            length = directory[bucket + 1] - low
            lows[i] = low
            lengths[i] = length
            longest = max(longest, length)
            prefetch(ids, low + max(length >> 1, 1) - 1)
        while longest > 1:
            for i in range(size):
                half = lengths[i] >> 1
                low = lows[i]
                key = _key(wanted[start + i])
                below = (half > 0) & (_key(ids[low + max(half, 1) - 1]) < key)
                low += half * below
                length = lengths[i] - half
                lows[i] = low
                lengths[i] = length
                prefetch(ids, low + max(length >> 1, 1) - 1)
            longest -= longest >> 1
        for i in range(size):
            # One is left, or none was there to begin with.
            at = min(lows[i], ids.shape[0] - 1)
            found = (lengths[i] > 0) & (ids[at] == wanted[start + i])
            places[start + i] = at if found else -1


@kernel("i8(i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1])")
def unify(
    wanted: Longs,  # [n]
    chosen: Longs,  # [m], positions in `wanted`
    buckets: Longs,  # [a power of two above m], -1
    which: Longs,  # [m]; receives which of the different ids each chosen one is
    ids: Longs,  # [m]; receives the different ids, in the order of their first places
    counts: Longs,  # [m]; receives how often each is there
) -> int:
    """Find the different ids among chosen ones; return how many there are."""
    mask = np.uint64(buckets.shape[0] - 1)
    count = 0
    for i in range(chosen.shape[0]):
        id_ = wanted[chosen[i]]
        at = hash_of(id_, np.uint64(buckets.shape[0])) & mask
        while buckets[at] >= 0 and ids[buckets[at]] != id_:
            at = (at + np.uint64(1)) & mask
        if buckets[at] < 0:
            buckets[at] = count
            ids[count] = id_
            counts[count] = 0
            count += 1
        which[i] = buckets[at]
        counts[buckets[at]] += 1
    return count


@kernel("void(i8[::1], i8[::1], i8[::1], i8, i8, i8, i8, i8)")
def spread(
    chosen: Longs,  # [m], positions of the caller's rows
    which: Longs,  # [m], which of the different ids each is
    slots: Longs,  # [different ids], which of the rows that were read each has; -1: zeros
    rows: int,  # the address of the rows, [k, width]
    width: int,
    out: int,  # the address of what the caller gets, [n, out_width]
    out_width: int,
    form: int,
) -> None:
    """Copy rows to all positions that want them."""
    for i in range(chosen.shape[0]):
        slot = slots[which[i]]
        target = out + chosen[i] * out_width
        if slot < 0:
            wipe(target, out_width)
        else:
            put_row(target, rows + slot * width, width, form)
