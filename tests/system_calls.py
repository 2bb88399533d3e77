"""System calls that a test answers, in place of those that kernels call."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Final

from asyncloader._table.native import SystemCalls

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FakeReads", "no_such_call"]

_PREADV2 = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int
)
_LOCATION = ctypes.CFUNCTYPE(ctypes.c_void_p)


class FakeReads:
    """A `preadv2` that asks a test what to do at each call.

    Args:
        answer: Gets the number of the call, from 0 on, and whether it may wait. It returns `None`
            to read, a number of an error below zero, or how many bytes to read at most.

    Attributes:
        calls: To hand in.
    """

    def __init__(self, answer: Callable[[int, bool], int | None]) -> None:
        self._answer = answer
        self._errno = ctypes.c_int(0)
        self._preadv2 = _PREADV2(self._read)
        self._location = _LOCATION(lambda: ctypes.addressof(self._errno))
        self.count = 0
        preadv2, location = (
            ctypes.cast(one, ctypes.c_void_p).value or 0 for one in (self._preadv2, self._location)
        )
        self.calls: Final = SystemCalls(preadv2, location)

    def _read(self, fd: int, vector: int, _count: int, offset: int, flags: int) -> int:
        number, self.count = self.count, self.count + 1
        answer = self._answer(number, not flags)
        if answer is not None and answer < 0:
            self._errno.value = -answer
            return -1
        address, length = (ctypes.c_int64 * 2).from_address(vector)
        length = length if answer is None else min(length, answer)
        if not length:
            return 0
        memory = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
        try:
            return os.preadv(fd, [memory], offset)
        except OSError as error:
            self._errno.value = error.errno or errno.EIO
            return -1


def no_such_call(_number: int, may_wait: bool) -> int | None:
    """Refuse all that may not wait, as if nothing were in the page cache."""
    return None if may_wait else -errno.EAGAIN
