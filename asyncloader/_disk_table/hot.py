"""The cache of hot rows: set-associative, with counters that a row has to earn its place against.

A hit adds one to a row's counter, of 4 bits. A row that was missed takes one from the least counted
row of its set, and takes its place if that has nothing left: so a row that is asked for once does
not push out one that is asked for often. Rows are found by their ids, so a hit looks for nothing
else. A set is one line of 64 bytes: five ids, and who owns each row, and its counter.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from asyncloader._memory.allocation import zeros

from . import hot_kernels as _kernels
from .forked import renew_after_fork
from .kernels import LANES

if TYPE_CHECKING:
    from asyncloader._table.schema import Longs


LINE = 64
_SHIFT = 4  # the bits of a counter
_MOST_OWNERS = 2**28 - 1


class HotIds(NamedTuple):
    """Ids of rows that are in the cache, and how often each was asked for, about; `[n]`."""

    ids: Longs
    counts: Longs


class Owner:
    """Whose rows they are: one slot of one version of a table."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Rows:
    """The sets of rows of one width."""

    def __init__(self, nbytes: int, width: int) -> None:
        self.width = width
        sets = max(nbytes // (LINE + _kernels.WAYS * width), 1)
        memory = zeros((sets * LINE + LINE,), torch.uint8).numpy()
        start = -memory.ctypes.data % LINE
        flat = memory[start : start + sets * LINE]
        self.lines: Longs = flat.view(np.int64).reshape(sets, 8)
        self.words = flat.view(np.uint32).reshape(sets, 16)
        self._rows = zeros((sets * _kernels.WAYS * width,), torch.uint8)
        self.address = self._rows.data_ptr()


class HotRows:
    """Keeps rows that are asked for often, of any number of tables, within `nbytes` together.

    Rows of one width share one part; the parts share the bytes evenly. Where rows of another width
    come in, or the last owner of a width is gone by then, all parts are made anew, empty. May be
    used on any thread.

    Args:
        nbytes: Memory, in bytes, what it takes to find rows included.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._seed = np.uint64(int.from_bytes(os.urandom(8), "little"))
        self._owners = itertools.count(1)
        self._parts: dict[int, _Rows] = {}
        self._users: Counter[int] = Counter()  # owners of rows of each width
        self._left: deque[int] = deque()  # widths of which an owner is gone
        self._lock = threading.Lock()  # held for microseconds a hundred ids
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"<HotRows {self.nbytes} bytes, rows of {sorted(self._parts)} bytes>"

    def renew(self) -> None:
        """Forget, in a child process, who held the lock; and all rows, of which one may be half."""
        if self._lock.locked():
            for part in self._parts.values():
                part.words.fill(0)  # not by torch, whose threads are not here either
        self._lock = threading.Lock()

    def join(self, width: int) -> Owner:
        """Have room for rows of a width, for as long as their owner lives."""
        with self._lock:
            while self._left:
                self._users[self._left.popleft()] -= 1
            self._users[width] += 1
            widths = sorted(+self._users)
            if widths != sorted(self._parts):
                share = self.nbytes // len(widths)
                self._parts = {one: _Rows(share, one) for one in widths}
            number = next(self._owners)
        if number > _MOST_OWNERS:
            raise RuntimeError("a cache of hot rows has had too many owners: make a new one")
        owner = Owner(number)
        # No lock is taken: the garbage collector may call it at any time, on any thread.
        weakref.finalize(owner, self._left.append, width).atexit = False
        return owner

    def take(
        self,
        owner: Owner,
        width: int,
        wanted: Longs,
        out: tuple[int, int],
        form: int,
        *,
        wait: bool = True,
    ) -> Longs | None:
        """Copy the rows that are here to where they are wanted; return which are not.

        Args:
            owner: Whose rows they are.
            width: Bytes of a row.
            wanted: Ids, `[n]`.
            out: Where rows go, an address, and how many bytes each has there.
            form: How they are copied; see the kernels.
            wait: Whether to wait while another thread looks for others.

        Returns:
            Positions in `wanted`, ascending; `None` if it would have to wait.
        """
        missed = np.empty(len(wanted), np.int64)
        scratch = np.empty((2, LANES), np.int64)
        if not self._lock.acquire(blocking=wait):
            return None
        try:
            rows = self._parts[width]
            count = _kernels.take_hot(
                rows.lines, rows.words, rows.address, width, self._seed,
                np.uint32(owner.number << _SHIFT), wanted, *out, form, missed, scratch,
            )  # fmt: skip
        finally:
            self._lock.release()
        return missed[:count]

    def offer(self, owner: Owner, width: int, ids: Longs, counts: Longs, source: int) -> int:
        """Offer rows, each but once, at an address; return how many were taken in."""
        with self._lock:
            rows = self._parts[width]
            return _kernels.offer_hot(
                rows.lines, rows.words, rows.address, width, self._seed,
                np.uint32(owner.number << _SHIFT), ids, counts, source,
            )  # fmt: skip

    def of(self, owner: Owner, width: int) -> HotIds:
        """Return the ids of an owner's rows that are here, the most used first."""
        with self._lock:
            rows = self._parts[width]
            words = rows.words[:, 2 * _kernels.WAYS : 3 * _kernels.WAYS].copy()
            lines = rows.lines[:, : _kernels.WAYS].copy()
        mine = words >> _SHIFT == owner.number
        counts = (words[mine] & 15).astype(np.int64)
        order = np.argsort(-counts, kind="stable")
        return HotIds(lines[mine][order], counts[order] + 1)
