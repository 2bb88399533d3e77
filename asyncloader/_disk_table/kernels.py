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

RUN = 32
"""Ids from one sample to the next."""

_MOST_SAMPLES = 64  # of a bucket, that are fetched before they are looked at

_TOP, _REST = np.uint64(48), np.uint64(16)

kernel = Compiler(partial(KernelCache, shared=(moving.__file__, native.__file__)))


@inline
def _key(id_: np.int64) -> np.uint64:
    """Return a number that sorts as (position in a slice of 65,536, id) do: its bits, rotated."""
    bits = np.uint64(id_)
    return (bits << _TOP) | (bits >> _REST)


@kernel("b1(i8[::1])")
def ascends(ids: Longs) -> bool:
    """Say whether ids ascend, none of them twice."""
    wrong = 0
    for at in range(1, ids.shape[0]):
        wrong += _key(ids[at]) <= _key(ids[at - 1])
    return wrong == 0


@kernel("void(i8[::1], u8, i8[::1])")
def find_buckets(ids: Longs, shift: np.uint64, directory: Longs) -> None:
    """Write where each bucket of ascending ids begins, `[buckets + 1]`."""
    low = 0
    for bucket in range(directory.shape[0] - 1):
        # The next one is near, if buckets are about as long: twice as far each time.
        step = 1
        high = low
        while high < ids.shape[0] and np.int64(_key(ids[high]) >> shift) < bucket:
            low = high + 1
            high += step
            step *= 2
        high = min(high, ids.shape[0])
        while low < high:
            middle = (low + high) >> 1
            below = np.int64(_key(ids[middle]) >> shift) < bucket
            low = middle + 1 if below else low
            high = high if below else middle
        directory[bucket] = low
    directory[directory.shape[0] - 1] = ids.shape[0]


@inline
def _last_not_above(ids: Longs, first: int, count: int, key: np.uint64) -> int:
    """Return the place of the last of `count` ascending ids from `first` on that is not above."""
    at = first
    while count > 1:
        half = count >> 1
        at += half * (_key(ids[at + half]) <= key)
        count -= half
    return at


@kernel("void(i8[::1], i8[::1], i8[::1], u8, i8[::1], i8[::1], i8[:, ::1])")
def find(
    ids: Longs,  # [n], ascending
    samples: Longs,  # [n / RUN, rounded up], the first of each run of ids
    directory: Longs,  # [buckets + 1], where each bucket begins
    shift: np.uint64,  # of a key, to its bucket
    wanted: Longs,  # [m], the ids to find
    places: Longs,  # [m]; receives their places, or -1
    scratch: Longs,  # [3, LANES]
) -> None:
    """Look ids up: the samples of a bucket, then a run of ids; many side by side.

    Each of the three steps fetches what the next one looks at, so that memory is waited for by all
    of a batch together.
    """
    lows, highs, runs = scratch[0], scratch[1], scratch[2]
    for start in range(0, wanted.shape[0], LANES):
        size = min(LANES, wanted.shape[0] - start)
        for i in range(size):
            prefetch(directory, np.int64(_key(wanted[start + i]) >> shift))
        for i in range(size):
            bucket = np.int64(_key(wanted[start + i]) >> shift)
            low, high = directory[bucket], directory[bucket + 1]
            lows[i], highs[i] = low, high
            for at in range(low // RUN, min(high // RUN + 1, low // RUN + _MOST_SAMPLES), 8):
                prefetch(samples, at)
        for i in range(size):
            first, last = lows[i] // RUN, max(highs[i] - 1, lows[i]) // RUN
            run = _last_not_above(samples, first, last + 1 - first, _key(wanted[start + i]))
            runs[i] = run
            for at in range(run * RUN, run * RUN + RUN, 8):
                prefetch(ids, at)
        for i in range(size):
            begin = max(lows[i], runs[i] * RUN)
            end = min(highs[i], runs[i] * RUN + RUN)
            at = _last_not_above(ids, begin, end - begin, _key(wanted[start + i]))
            found = end > begin
            if found:
                found = ids[at] == wanted[start + i]
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


@kernel("void(i8, i8)")
def wipe_rows(address: int, nbytes: int) -> None:
    """Write zeros to an address."""
    wipe(address, nbytes)
