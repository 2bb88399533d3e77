"""One request for rows: hits from the cache, the rest from files; all on one thread."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._storage.opening import FileChangedError
from asyncloader._storage.retrying import is_transient
from asyncloader._threads.call import Reading
from asyncloader.errors import CheckpointChangedError, ReadError

from . import kernels as _kernels
from .kernels import wipe_rows
from .read_kernels import ENDS_EARLY, STOPPED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from asyncloader._storage.kept import KeptFile
    from asyncloader._table.schema import Longs

    from .hot import HotRows
    from .places import DiskState, Places
    from .stats import Tally


_ATTEMPTS = 5
_FIRST_PAUSE = 0.1
_LOOK_AGAIN = 0.01
"""Seconds. A pause is cut short that nobody waits for any more."""

_LARGE = 2048
"""Ids. Of larger requests only so many run at a time that there is a thread for smaller ones."""

_CHANGED = (
    "was written to while rows were read from it; make the table anew from a checkpoint that "
    "stays as it is, or let Live take in the one that has taken its place"
)


class Stop:
    """Tells the thread of a request that its rows are not wanted any more.

    Attributes:
        flag: For kernels, `[2]`. The first is not 0 once rows are not wanted; the second counts
            the rows that were waited for and came.
    """

    __slots__ = ("_lock", "flag")

    def __init__(self) -> None:
        self.flag: Longs = np.zeros(2, np.int64)
        self._lock = threading.Lock()

    def end(self) -> None:
        """Say so; when this has returned, the thread writes to the caller's memory no more."""
        with self._lock:
            self.flag[0] = 1

    @contextlib.contextmanager
    def unless_ended(self) -> Iterator[None]:
        """Write to the caller's memory within the block.

        Raises:
            OSError: If it is not the caller's any more.
        """
        with self._lock:
            if self.flag[0]:
                raise OSError(errno.ECANCELED, "the lookup was given up")
            yield

    def rest(self, seconds: float) -> None:
        """Pause, unless rows are no longer wanted."""
        end = time.monotonic() + seconds
        while not self.flag[0] and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_AGAIN))


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Rows of some ids, of one slot, from one version of a table.

    Attributes:
        table: The table's name, for messages.
        state: The version.
        slot: The slot.
        ids: Encoded, `[n]`.
        out: What rows go to; held, so that its memory stays. `None` if only the cache is to have
            them. Rows that were read go there once all are there and the files are known to be the
            same, so a thread that was given up writes nothing there.
        address: Where in `out` the first row goes.
        out_width: Bytes of a row there.
        form: How rows are copied; see the kernels.
        hot: The cache of hot rows, if there is one.
        tally: Counts what was done.
        read: Reads rows.
        counts: How often each id is worth being counted as asked for, `[n]`; `None` is once.
    """

    table: str
    state: DiskState
    slot: str
    ids: Longs
    out: torch.Tensor | None
    address: int
    out_width: int
    form: int
    hot: HotRows | None
    tally: Tally
    read: Callable[[Places, Longs, int, Longs], tuple[int, int, int]]
    counts: Longs | None = None
    stop: Stop = field(default_factory=Stop)
    reading: Reading = field(init=False)

    def __post_init__(self) -> None:
        # Not a method of this object: a cycle would keep files open until the next collection.
        self.reading = Reading(self.table, interrupt=self.stop.end, ticks=self.stop.flag[1:])
        self.reading.is_large = len(self.ids) > _LARGE
        self.reading.waited = False

    def run(self) -> None:
        """Fill `out`; belongs on a thread.

        Raises:
            ReadError: If the disk failed, five times in a row.
            CheckpointChangedError: If a file was written to.
        """
        places = self.state.places.get(self.slot)
        if places is None:  # no checkpoint has brought a row of it
            with self.stop.unless_ended():
                wipe_rows(self.address, len(self.ids) * self.out_width)
                self.tally.add(ids=len(self.ids), absent=len(self.ids))
            return
        missed = self._missed(places)
        hits = len(self.ids) - len(missed)
        if not len(missed):
            self.tally.add(ids=len(self.ids), hits=hits)
            return
        which, ids, counts = self._different(missed)
        numbers = self.state.find(self.slot, ids)
        there = numbers >= 0
        found = numbers[there]
        rows = np.empty(len(found) * places.width, np.uint8)
        waits = self._read_all(places, found, rows)
        for file in places.files_of(found):
            self._check(file)
        source = rows.ctypes.data
        if self.hot is not None:
            owner = self.state.owners[self.slot]
            self.hot.offer(owner, places.width, ids[there], counts[there], source)
        if self.out is not None:
            at, out = np.where(there, np.cumsum(there) - 1, -1), (self.address, self.out_width)
            with self.stop.unless_ended():
                _kernels.spread(missed, which, at, source, places.width, *out, self.form)
        asked = self.out is not None  # else nobody did, yet
        self.tally.add(
            ids=len(self.ids) * asked,
            hits=hits,
            absent=int(np.count_nonzero(~there[which])) * asked,
            rows_read=len(found),
            bytes_read=rows.nbytes,
            waits=waits,
        )

    def _missed(self, places: Places) -> Longs:
        """Take what the cache has; return the positions of the rest."""
        if self.hot is None or self.out is None:
            return np.arange(len(self.ids))
        owner, target = self.state.owners[self.slot], (self.address, self.out_width)
        with self.stop.unless_ended():
            missed = self.hot.take(owner, places.width, self.ids, target, self.form)
        assert missed is not None, "it has waited"
        return missed

    def _different(self, missed: Longs) -> tuple[Longs, Longs, Longs]:
        """Return which of the different ids each missed one is; these; how often each is there."""
        count = len(missed)
        buckets = np.full(1 << (2 * count).bit_length(), -1, np.int64)
        which, ids, counts = np.empty((3, count), np.int64)
        different = _kernels.unify(self.ids, missed, buckets, which, ids, counts)
        if self.counts is not None:
            counts[which] = self.counts[missed]
        return which, ids[:different], counts[:different]

    def _read_all(self, places: Places, numbers: Longs, rows: np.ndarray) -> int:
        """Read rows, trying again what may pass; return how many had to be waited for."""
        done = waits = attempt = 0
        address = rows.ctypes.data
        while done < len(numbers):
            start = address + done * places.width
            error, at, waited = self.read(places, numbers[done:], start, self.stop.flag)
            waits += waited
            self.reading.waited |= waited > 0
            if not error:
                break
            attempt = 1 if at else attempt + 1
            done += at
            self._explain(places, int(numbers[done]), error, attempt)
            self.tally.add(retries=1)
            self.stop.rest(random.uniform(0, _FIRST_PAUSE * 2 ** (attempt - 1)))  # noqa: S311  # no secret
        return waits

    def _explain(self, places: Places, number: int, error: int, attempt: int) -> None:
        """Raise why a row could not be read, unless it is to be tried again."""
        if error == STOPPED:
            raise OSError(errno.ECANCELED, "the lookup was given up")
        file, begin = places.where(number)
        self._check(file)
        if error == ENDS_EARLY:
            raise _failed(self.table, file, begin, places.width, "the file ends before it")
        cause = OSError(error, os.strerror(error), file.name)
        if not is_transient(cause):
            raise _failed(self.table, file, begin, places.width, os.strerror(error)) from cause
        if attempt == _ATTEMPTS:
            problem = f"{os.strerror(error)}, {_ATTEMPTS} times in a row; look at the disk"
            raise _failed(self.table, file, begin, places.width, problem) from cause

    def _check(self, file: KeptFile) -> None:
        try:
            file.check()
        except FileChangedError as error:
            raise CheckpointChangedError(file.location, _CHANGED, file.name) from error
        except OSError as error:
            raise _failed(self.table, file, 0, 0, error.strerror or str(error)) from error


def _failed(table: str, file: KeptFile, begin: int, length: int, problem: str) -> ReadError:
    failure = ReadError(file.name, begin, length, problem)
    failure.location, failure.names = file.location, (table,)
    return failure


def cut(count: int, most: int) -> Sequence[tuple[int, int]]:
    """Cut so many ids into pieces of at most `most`, each about as long."""
    if 0 < count <= most:  # nearly always
        return [(0, count)]
    pieces = -(-count // most)
    cuts = [count * number // pieces for number in range(pieces + 1)] if pieces else []
    return list(itertools.pairwise(cuts))
