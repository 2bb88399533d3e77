"""A storage that goes wrong when it is told to."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from tests.storages import Through

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncloader._storage.protocol import ReadInto

__all__ = ["Fault", "FaultyStorage", "Stuck", "flips_a_bit", "raises"]

T = TypeVar("T")


def _no_fault(_: Read) -> None:
    return None


@dataclass(frozen=True)
class Read:
    """One call for bytes."""

    number: int
    """How many there were before it."""

    name: str
    offset: int
    views: Sequence[memoryview]
    really: Callable[[], int]
    """Reads, and returns how many bytes that gave."""


Fault: TypeAlias = "Callable[[Read], int | None]"
"""Called on the thread that reads, in place of reading: raises, waits, does something to the files,
reads and changes what came. Returns how many bytes it gave, or `None` for an ordinary read."""


@dataclass
class FaultyStorage(Through):
    """Another storage, between whose threads and files comes what goes wrong."""

    fault: Fault = _no_fault
    at_most: int = 1 << 60
    """Bytes that one read gives."""

    reads: list[Read] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        return await self.on_thread(name, lambda read: read(offset, views))

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        def with_faults(read: ReadInto) -> T:
            def faulty(offset: int, views: Sequence[memoryview]) -> int:
                few = _first(views, self.at_most)
                one = Read(next(self._numbers), name, offset, few, lambda: read(offset, few))
                self.reads.append(one)
                count = self.fault(one)
                return one.really() if count is None else count

            return job(faulty)

        return await self.inner.on_thread(name, with_faults)


def _first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    few = []
    for view in views:
        few.append(view[:count])
        count -= few[-1].nbytes
    return few


def raises(error: Exception, *, at: Callable[[Read], bool]) -> Callable[[Read], None]:
    """Return a fault: some reads fail."""

    def fault(read: Read) -> None:
        if at(read):
            raise error

    return fault


def flips_a_bit(*, at: Callable[[Read], bool]) -> Callable[[Read], int | None]:
    """Return a fault: some reads give as many bytes as they should, one of them another one."""

    def fault(read: Read) -> int | None:
        if not at(read):
            return None
        count = read.really()
        view = read.views[-1]
        view[view.nbytes // 2] ^= 0x10
        return count

    return fault


class Stuck:
    """A fault: some reads give no answer, until `release`."""

    def __init__(self, *, at: Callable[[Read], bool]) -> None:
        self._at = at
        self._released = threading.Event()
        self.stuck: list[Read] = []
        self.late = threading.Semaphore(0)
        """One for each that has come back."""

    def __call__(self, read: Read) -> int | None:
        if not self._at(read) or self._released.is_set():
            return None
        self.stuck.append(read)
        self._released.wait()
        try:
            return read.really()
        finally:
            self.late.release()

    def release(self) -> None:
        """Let them read."""
        self._released.set()
