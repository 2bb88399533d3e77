"""Reads rows from files: by a kernel where there is one for this system, else a call at a time."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asyncloader._table.native import SystemCalls

from . import read_kernels as _kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncloader._table.native import SystemCalls
    from asyncloader._table.schema import Longs

    from .places import Places

_WINDOW = 128
"""Rows that the device has been asked for at a time. 32 reach 0.8 of the rate, 512 no more."""


class RowReader:
    """Reads rows to an address, and tells how far it came.

    Args:
        calls: What the kernel calls; `None` where there is no such call.
        window: Rows that the device is asked for at a time.
    """

    def __init__(self, calls: SystemCalls | None, *, window: int = _WINDOW) -> None:
        self._calls = calls
        self._window = window

    def __call__(
        self, places: Places, numbers: Longs, address: int, stop: Longs
    ) -> tuple[int, int, int]:
        """Read rows one behind the other; belongs on a thread.

        Args:
            places: Where rows stand.
            numbers: The rows, `[n]`.
            address: Memory for them.
            stop: `[2]`; once the first is not 0, the call ends soon; the second counts what came.

        Returns:
            The number of the error, 0 for none (see the kernels); the first row that was not read;
            and how many were not in the page cache.
        """
        if self._calls is None:
            return read_slowly(places, numbers, address, stop)
        seen = np.zeros(4, np.int64)
        error = _kernels.read_ahead(
            self._calls[:3], places.firsts, places.fds, places.offsets, numbers, address,
            places.width, np.empty(self._window, np.int64), stop, seen,
        )  # fmt: skip
        return error, int(seen[1]), int(seen[2])


class DirectReader(RowReader):
    """Reads rows past the page cache, by Linux AIO; as `RowReader` where that cannot be done.

    About half of the processor time a row, and what is in the page cache stays there. Not io_uring,
    which many a container may not use.

    Args:
        calls: What the kernel calls; `None` where there is no such call.
        depth: Reads that the device has at a time.
    """

    def __init__(self, calls: SystemCalls | None, *, depth: int = 128) -> None:
        super().__init__(calls)
        self._depth = depth
        self._of_thread = threading.local()

    def __call__(
        self, places: Places, numbers: Longs, address: int, stop: Longs
    ) -> tuple[int, int, int]:
        """Read rows; see `RowReader`."""
        past = places.past_cache() if self._calls is not None else None
        queue = None if past is None else self._queue(past[1], places.width)
        if self._calls is None or past is None or queue is None:
            return super().__call__(places, numbers, address, stop)
        seen = np.zeros(4, np.int64)
        fds, block = past
        error = _kernels.read_direct(
            (self._calls.syscall, self._calls.errno_location, *queue.calls), queue.context,
            places.firsts, fds, places.offsets, numbers, address, places.width, block,
            queue.staging.ctypes.data, queue.room, queue.requests, queue.events, stop, seen,
        )  # fmt: skip
        if seen[3]:  # the kernel may yet write to its memory: this waits for that
            queue.close()
            self._of_thread.queue = None
        return error, int(seen[1]), int(seen[2])

    def _queue(self, block: int, width: int) -> _Queue | None:
        """Return this thread's queue of reads; `None` if the system has none to give."""
        room = -(-(width + 2 * block) // _PAGE) * _PAGE  # of whole pages, whatever block comes next
        queue: _Queue | None = getattr(self._of_thread, "queue", None)
        if queue is None or queue.room < room:
            queue = self._of_thread.queue = _Queue.of(self._depth, room)
        return queue


class _Queue:
    """A context of Linux AIO, and memory for what is read in it; ends with its thread."""

    def __init__(self, context: int, numbers: _AioNumbers, depth: int, room: int) -> None:
        self.context = context
        self.calls = numbers.submit, numbers.getevents
        self.room = room
        flat = np.zeros(depth * room + _PAGE, np.uint8)
        self.staging = flat[-flat.ctypes.data % _PAGE :]
        self.requests = np.zeros((depth, 8), np.int64)
        self.events = np.zeros((depth, 4), np.int64)
        self.close = weakref.finalize(self, _destroy, numbers.destroy, context)
        """Wait for what is under way, and end it."""

        self.close.atexit = False

    @classmethod
    def of(cls, depth: int, room: int) -> _Queue | None:
        numbers = _AIO.get(platform.machine())
        if numbers is None:
            return None
        context = ctypes.c_ulong(0)
        if _syscall(numbers.setup, depth, ctypes.addressof(context)):
            return None  # a sandbox forbids it, or too many of them are in use (fs.aio-max-nr)
        return cls(context.value, numbers, depth, room)


class _AioNumbers(NamedTuple):
    """The numbers of the system calls."""

    setup: int
    destroy: int
    submit: int
    getevents: int


_AIO = {"x86_64": _AioNumbers(206, 207, 209, 208), "aarch64": _AioNumbers(0, 1, 2, 4)}
_PAGE = 4096


def _destroy(number: int, context: int) -> None:
    _syscall(number, context, 0)


def _syscall(number: int, one: int, other: int) -> int:
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return int(call(*map(ctypes.c_long, (number, one, other))))


def read_slowly(
    places: Places,
    numbers: Longs,
    address: int,
    stop: Longs,
    *,
    preadv: Callable[[int, Sequence[memoryview], int], int] | None = None,
) -> tuple[int, int, int]:
    """Do as `RowReader`, in Python, a row after the other."""
    preadv = preadv or os.preadv
    memory = memoryview((ctypes.c_char * (len(numbers) * places.width)).from_address(address))
    memory = memory.cast("B")
    for at, number in enumerate(numbers.tolist()):
        file, begin = places.where(number)
        view = memory[at * places.width : (at + 1) * places.width]
        while view.nbytes:
            if stop[0]:
                return _kernels.STOPPED, at, at
            try:
                count = preadv(file.fd, [view], begin)
            except OSError as error:
                return error.errno or -3, at, at
            if not count:
                return _kernels.ENDS_EARLY, at, at
            view, begin = view[count:], begin + count
    return 0, 0, len(numbers)
