"""The loops over sets of the cache of hot rows. See `hot` for its layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from asyncloader._table.compiling import hash_of, inline, prefetch
from asyncloader._table.native import copy

from .kernels import LANES, kernel
from .moving import fetch_row, put_row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncloader._table.schema import Longs

    Words = NDArray[np.uint32]

WAYS = 5
"""Rows of a set; their ids, owners and counters fill one line of 64 bytes."""

_OWNERS = 2 * WAYS  # where they begin within a line, in words of 32 bits
_COUNT = np.uint32(15)  # the bits of a counter within such a word
_OWNER = np.uint32(0xFFFFFFF0)
_STEP = np.uint32(1)
_NONE = np.uint32(0)


@inline
def _set_of(id_: np.int64, seed: np.uint64, sets: int) -> np.int64:
    h = hash_of(id_, seed)
    return np.int64(((h >> np.uint64(32)) * np.uint64(sets)) >> np.uint64(32))


@inline
def _way_of(lines: Longs, words: Words, at: int, id_: np.int64, owner: np.uint32) -> int:
    """Return the way in which a row stands, or -1."""
    found = -1
    for way in range(WAYS):
        same = (lines[at, way] == id_) & (words[at, _OWNERS + way] & _OWNER == owner)
        found = way if same else found
    return found


@kernel("i8(i8[:, ::1], u4[:, ::1], i8, i8, u8, u4, i8[::1], i8, i8, i8, i8[::1], i8[:, ::1])")
def take_hot(
    lines: Longs,  # [sets, 8], the ids of each set
    words: Words,  # the same memory, [sets, 16]: behind the ids, each way's owner and counter
    rows: int,  # the address of the rows, [sets * WAYS, width]
    width: int,
    seed: np.uint64,
    owner: np.uint32,  # whose rows are wanted, in the upper 28 bits
    wanted: Longs,  # [n]
    out: int,  # the address of what the caller gets, [n, out_width]
    out_width: int,
    form: int,
    missed: Longs,  # [n]; receives the positions in `wanted` of the rows that are not there
    scratch: Longs,  # [2, LANES]
) -> int:
    """Copy the rows that the cache has, and count them as used; return how many it has not."""
    sets = lines.shape[0]
    places, ways = scratch[0], scratch[1]
    misses = 0
    for start in range(0, wanted.shape[0], LANES):
        size = min(LANES, wanted.shape[0] - start)
        for i in range(size):
            places[i] = _set_of(wanted[start + i], seed, sets)
            prefetch(lines, places[i] * 8)
        for i in range(size):
            at = places[i]
            way = _way_of(lines, words, at, wanted[start + i], owner)
            ways[i] = way
            fetch_row(rows + (at * WAYS + max(way, 0)) * width, width)
        for i in range(size):
            at, way = places[i], ways[i]
            if way < 0:
                missed[misses] = start + i
                misses += 1
                continue
            word = words[at, _OWNERS + way]
            words[at, _OWNERS + way] = word + (_STEP if word & _COUNT < _COUNT else _NONE)
            put_row(out + (start + i) * out_width, rows + (at * WAYS + way) * width, width, form)
    return misses


@kernel("i8(i8[:, ::1], u4[:, ::1], i8, i8, u8, u4, i8[::1], i8[::1], i8)")
def offer_hot(
    lines: Longs,
    words: Words,
    rows: int,
    width: int,
    seed: np.uint64,
    owner: np.uint32,
    ids: Longs,  # [n], all different
    counts: Longs,  # [n], how often each was asked for
    source: int,  # the address of their rows, [n, width]
) -> int:
    """Offer rows to the cache: each takes a free place, or wears down the least used of its set.

    Returns how many it has taken.
    """
    sets = lines.shape[0]
    taken = 0
    for i in range(ids.shape[0]):
        if i + 8 < ids.shape[0]:
            prefetch(lines, _set_of(ids[i + 8], seed, sets) * 8)
        at = _set_of(ids[i], seed, sets)
        if _way_of(lines, words, at, ids[i], owner) >= 0:
            continue  # another request was quicker
        least = 0
        for way in range(1, WAYS):
            mine, best = words[at, _OWNERS + way], words[at, _OWNERS + least]
            # A free place is below all others: it has no owner either.
            lower = (mine == _NONE) | ((best != _NONE) & (mine & _COUNT < best & _COUNT))
            least = way if lower else least
        word = words[at, _OWNERS + least]
        if word & _COUNT:
            words[at, _OWNERS + least] = word - _STEP
            continue
        lines[at, least] = ids[i]
        words[at, _OWNERS + least] = owner | np.uint32(max(min(counts[i], 15), 1) - 1)
        copy(rows + (at * WAYS + least) * width, source + i * width, width)
        taken += 1
    return taken
