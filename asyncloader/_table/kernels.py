"""The loops over ids, compiled by Numba. They hold no GIL, so threads run them side by side.

The index is open addressing over 64-bit words, `parts` times `capacity` of them:

    word = tag << 40 | (row + 1)        0 is an empty slot

The row points into `ids`, int64 `[rows]`, where the id itself stands, so every int64 is a legal id
and a word takes 8 bytes. An id has a 64-bit hash. Its top bits choose the part. 32 bits in the
middle choose the line, eight slots that share a cache line (by a product with the number of lines,
which need not be a power of two). The lowest 24 are the tag, which spares nearly every look at
another id; it is odd, so it is never the tag of an empty slot. An id stands in the first slot of
its line that was free or, if none was, of the lines behind it; behind the part's last line comes
its first.

Threads share the work by parts: each walks over all ids and takes those of its own parts.

Two things keep the processor from waiting. A probe of a large index is a cache miss, so hashes are
computed for a batch, and the lines fetched, before the first is examined. And a branch that may go
either way stops the processor from starting the next probe, so the eight slots of a line are
examined without one; the cases that this leaves open, a full line or the same tag of another id,
are rare.

Everything is uint64 on purpose: numba turns a mixture of int64 and uint64 into float64. Signatures
are given, so that all compiling (or loading from the cache) happens at import and never within a
load. The first table waits for it, so there is little to compile: numpy does the work for which it
takes about as long (`index`, `schema`), a function that only kernels call gets no wrapper for calls
from Python, and `np.searchsorted`, `np.empty` and comparing tuples, which take long to compile, are
avoided.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.ma  # Numba imports it at the first call of a kernel, which is within a load

from . import native
from .compiling import (
    LINE,
    ONE,
    ROW,
    ZERO,
    Compiler,
    KernelCache,
    hash_of,
    home_of,
    owner_of,
    part_of,
    prefetch,
    seek,
    tag_of,
)
from .native import copy, fetch, wipe

if TYPE_CHECKING:
    from .schema import Flags, Longs, Words


BATCH = 128
AHEAD = 8
"""Rows that are fetched into the cache before they are copied."""

MOST_FETCHED = 512
"""Bytes of a row that are fetched; the processor fetches what follows by itself."""

_MAX = np.uint64(2**64 - 1)
_OPEN = -2  # the row of an id whose line is full of others, until it is found

_kernel = Compiler(partial(KernelCache, shared=(native.__file__,)))


@_kernel(
    "UniTuple(i8, 2)(u8[::1], u8, u8, u8, u8, i8[::1], "
    "i8, i8, b1[::1], i8[::1], i8[::1], u8[:, ::1])"
)
def insert_rows(
    words: Words,  # [parts * capacity], the index
    parts: int,
    part_lo: int,  # the first part to fill
    part_hi: int,  # one past the last
    seed: np.uint64,
    ids: Longs,  # [rows]
    first: int,  # the first row
    count: int,
    refused: Flags,  # [count], rows to pass over; or empty
    run_first: Longs,  # [runs], ascending: the first row of each run
    run_order: Longs,  # [runs], the rank of each run
    scratch: Words,  # [2, BATCH]
) -> tuple[int, int]:
    """Put the ids of rows `[first, first + count)` into the index.

    Of two rows with the same id, the one of the run of higher rank wins, or the later one of a run:
    the outcome does not depend on the order of the calls. Returns how many ids were new, and how
    many were there already; the rest are in other parts.
    """
    capacity = np.uint64(words.shape[0]) // parts
    homes, entries = scratch[0], scratch[1]
    skipping = refused.shape[0] > 0
    new = 0
    again = 0
    for start in range(first, first + count, BATCH):
        size = 0
        for row in range(start, min(start + BATCH, first + count)):
            h = hash_of(ids[row], seed)
            part = part_of(h, parts)
            homes[size] = home_of(h, part, capacity)
            entries[size] = tag_of(h) | np.uint64(row + 1)
            mine = (part >= part_lo) & (part < part_hi)
            if skipping:
                mine &= not refused[row - first]
            size += mine
        for i in range(size):
            prefetch(words, homes[i])
        for i in range(size):
            home = homes[i]
            entry = entries[i]
            tag = entry & ~ROW
            nearest = _MAX
            used = ZERO
            for slot in range(home, home + LINE):
                there = words[slot]
                nearest = min(nearest, there ^ tag)  # the row of a word that has the tag
                used += np.uint64(there != ZERO)
            if nearest > ROW and used < LINE:
                words[home + used] = entry
                new += 1
                continue
            row = np.int64(entry & ROW) - 1
            slot = seek(words, home, capacity, tag, ids, ids[row])
            there = words[slot]
            if there == ZERO:
                words[slot] = entry
                new += 1
                continue
            again += 1
            other = np.int64(there & ROW) - 1
            rank = run_order[owner_of(run_first, row)]
            other_rank = run_order[owner_of(run_first, other)]
            if rank > other_rank or (rank == other_rank and row > other):
                words[slot] = entry
    return new, again


@_kernel("i8(u8[::1], u8, u8, i8[::1], i8[::1], i8[::1], u8[:, ::1])")
def find(
    words: Words,  # [parts * capacity], the index
    parts: int,
    seed: np.uint64,
    ids: Longs,  # [rows]
    wanted: Longs,  # [n], the ids to find
    rows: Longs,  # [n]; receives their rows, or -1
    scratch: Words,  # [2, BATCH]
) -> int:
    """Look ids up, and return how many are not there."""
    capacity = np.uint64(words.shape[0]) // parts
    homes, tags = scratch[0], scratch[1]
    missing = 0
    for start in range(0, wanted.shape[0], BATCH):
        size = min(BATCH, wanted.shape[0] - start)
        for i in range(size):
            h = hash_of(wanted[start + i], seed)
            homes[i] = home_of(h, part_of(h, parts), capacity)
            tags[i] = tag_of(h)
        for i in range(size):
            prefetch(words, homes[i])
        for i in range(size):
            nearest = _MAX
            for slot in range(homes[i], homes[i] + LINE):
                nearest = min(nearest, words[slot] ^ tags[i])
            # Lines fill from their first slot on.
            nowhere = -1 if words[homes[i] + LINE - ONE] == ZERO else _OPEN
            row = np.int64(nearest) - 1 if nearest <= ROW else nowhere
            rows[start + i] = row
            prefetch(ids, np.uint64(max(row, 0)))
        for i in range(size):
            row = rows[start + i]
            same = (row >= 0) & (ids[max(row, 0)] == wanted[start + i])
            if same | (row == -1):
                missing += row < 0
                continue
            slot = seek(words, homes[i], capacity, tags[i], ids, wanted[start + i])
            row = np.int64(words[slot] & ROW) - 1
            rows[start + i] = row
            missing += row < 0
    return missing


@_kernel(
    "UniTuple(i8, 2)(u8[::1], u8, u8, u8, u8, i8[::1], "
    "u8[::1], b1[::1], b1, i8[:, ::1], u8[:, ::1])"
)
def merge(
    words: Words,  # [parts * capacity], the index that receives
    parts: int,
    part_lo: int,  # the first part to fill
    part_hi: int,  # one past the last
    seed: np.uint64,  # the same for both
    ids: Longs,  # [rows]
    source: Words,  # [n], words of the other index, empty ones among them
    gone: Flags,  # [rows], rows to leave out; or empty
    wins: bool,  # whether the row of the source stays, for an id in both
    pairs: Longs,  # [2, m]; for each id in both, receives the row that lost and the one that stays
    scratch: Words,  # [2, BATCH]
) -> tuple[int, int]:
    """Put words of another index over the same `ids` into this one.

    Returns how many ids were new, and how many were in both; the rest are in other parts, or gone.
    """
    capacity = np.uint64(words.shape[0]) // parts
    homes, entries = scratch[0], scratch[1]
    leaving = gone.shape[0] > 0
    new = 0
    both = 0
    for start in range(0, source.shape[0], BATCH):
        size = 0
        for i in range(start, min(start + BATCH, source.shape[0])):
            entries[size] = source[i]
            prefetch(ids, (source[i] & ROW) - ONE)
            size += source[i] != ZERO
        count = size
        size = 0
        for i in range(count):
            entry = entries[i]
            row = np.int64(entry & ROW) - 1
            h = hash_of(ids[row], seed)
            part = part_of(h, parts)
            homes[size] = home_of(h, part, capacity)
            entries[size] = entry
            mine = (part >= part_lo) & (part < part_hi)
            if leaving:
                mine &= not gone[row]
            size += mine
        for i in range(size):
            nearest = _MAX
            for slot in range(homes[i], homes[i] + LINE):
                nearest = min(nearest, words[slot] ^ (entries[i] & ~ROW))
            prefetch(ids, nearest - ONE)
        for i in range(size):
            entry = entries[i]
            row = np.int64(entry & ROW) - 1
            slot = seek(words, homes[i], capacity, entry & ~ROW, ids, ids[row])
            there = words[slot]
            if there == ZERO:
                words[slot] = entry
                new += 1
                continue
            other = np.int64(there & ROW) - 1
            if both < pairs.shape[1]:  # a caller that expects none may be wrong
                pairs[0, both] = other if wins else row
                pairs[1, both] = row if wins else other
            both += 1
            if wins:
                words[slot] = entry
    return new, both


@_kernel("void(i8[::1], i8[::1], i8[::1], i8, i8)")
def gather(
    firsts: Longs,  # [segments], ascending: the first row of each
    addresses: Longs,  # [segments], where each begins in memory
    rows: Longs,  # [n]; -1: zeros
    width: int,  # bytes of a row
    out: int,  # the address of memory for them
) -> None:
    """Copy rows out, on this thread."""
    count = rows.shape[0]
    for at in range(count):
        ahead = at + AHEAD
        if ahead < count and rows[ahead] >= 0:
            owner = owner_of(firsts, rows[ahead])
            place = addresses[owner] + (rows[ahead] - firsts[owner]) * width
            for line in range(0, min(width, MOST_FETCHED), 64):
                fetch(place + line)
        row = rows[at]
        if row < 0:
            wipe(out + at * width, width)
            continue
        owner = owner_of(firsts, row)
        copy(out + at * width, addresses[owner] + (row - firsts[owner]) * width, width)
