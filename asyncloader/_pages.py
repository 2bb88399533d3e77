"""Which kind of pages fresh memory is made of: huge or small, by what touching them costs now.

The first touch of memory is the dearest part of a load. Huge pages are usually several times
cheaper to touch than small ones. In a virtual machine that reports free pages to its host, they are
several times dearer once memory has been free for a few seconds: the host takes what is reported
back, in huge pages first, and gives it again page by page. No file says in which state memory is.
So the thread that is about to read into fresh memory touches it first, a block at a time, and notes
the processor time; the cheaper kind is used, and the other one is tried now and then.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
import time
import weakref
from bisect import bisect_right
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BLOCK", "PageChooser", "map_fresh", "touch"]

BLOCK = 2 << 20
"""A huge page, in bytes; memory is touched in such blocks, and aligned to them."""

# Smaller views are not worth a look; the read touches their pages itself.
_WORTH_IT = 512 << 10
# Of the time that touching takes, one part in so many is spent on trying the other kind.
_LOOKS = 24
# Huge pages also spare look-ups of addresses, so small ones have to be this much cheaper.
_MARGIN = 1.25
# The weight of the latest block in what a kind is thought to cost.
_LATEST = 0.25
# Linux 5.14 and newer: makes pages present as a write would. `mmap` has no name for it.
_MADV_POPULATE_WRITE = 23
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
_MADV_NOHUGEPAGE = getattr(mmap, "MADV_NOHUGEPAGE", None)
# Without it a mapping larger than memory and swap is refused, even if little of it is ever used.
# `mmap` has the constant from Python 3.13 on; the value is that of Linux on x86 and Arm.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if _MADV_HUGEPAGE else 0


class PageChooser:
    """Chooses the kind of pages for the next block, by what blocks of either kind have cost.

    Threads may share one: what two of them note at the same time is at worst noted once.
    """

    def __init__(self) -> None:
        self._cost: dict[bool, float] = {}
        self._since: float = 0.0

    def __repr__(self) -> str:
        costs = ", ".join(
            f"{'huge' if huge else 'small'} {seconds * 1e3:.2f} ms a block"
            for huge, seconds in sorted(self._cost.items(), reverse=True)
        )
        return f"<PageChooser: {costs or 'nothing known'}>"

    @property
    def prefers_huge(self) -> bool:
        """Whether huge pages are the cheaper kind, as far as is known."""
        huge, small = self._cost.get(True), self._cost.get(False)
        return huge is None or small is None or huge <= small * _MARGIN

    def choose(self) -> bool:
        """Return whether the next block is to be a huge page."""
        for kind in (True, False):
            if kind not in self._cost:
                return kind
        preferred = self.prefers_huge
        if self._since > self._cost[not preferred] * _LOOKS:
            self._since = 0.0
            return not preferred
        return preferred

    def note(self, *, huge: bool, seconds: float) -> None:
        """Take in what a block has cost, in seconds of processor time."""
        before = self._cost.get(huge, seconds)
        self._cost[huge] = before + (seconds - before) * _LATEST
        if huge == self.prefers_huge:
            self._since += seconds


class _Fresh:
    """A mapping whose blocks are touched, one after the other, by the threads that fill it.

    Args:
        begin: Address of its first block, a multiple of `BLOCK`.
        blocks: How many it has.
        huge: The kind of pages that it has been advised to take.
    """

    __slots__ = ("_left", "begin", "end", "huge")

    def __init__(self, begin: int, blocks: int, *, huge: bool) -> None:
        self.begin = begin
        self.end = begin + blocks * BLOCK
        self.huge = huge
        self._left = bytearray(b"\1" * blocks)

    def close(self) -> None:
        """Note that the memory is no more, and that its addresses may be those of other memory."""
        self.end = self.begin

    def claim(self, begin: int, end: int) -> list[int]:
        """Return the addresses of the untouched blocks in a range. They count as touched then.

        If two threads claim one block at the same time, it is touched twice, which does no harm.
        """
        first = (max(begin, self.begin) - self.begin) // BLOCK
        last = -(-(min(end, self.end) - self.begin) // BLOCK)
        claimed = [block for block in range(first, last) if self._left[block]]
        for block in claimed:
            self._left[block] = 0
        return [self.begin + block * BLOCK for block in claimed]


class _Registry:
    """Finds fresh memory by its address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: tuple[list[int], list[_Fresh]] = ([], [])

    def add(self, fresh: _Fresh) -> None:
        """Take in a mapping, and forget those that are no more."""
        with self._lock:
            alive = [one for one in self._known[1] if one.end > one.begin]
            alive = sorted([*alive, fresh], key=attrgetter("begin"))
            self._known = [one.begin for one in alive], alive

    def find(self, address: int) -> _Fresh | None:
        """Return the mapping that an address is in, if there is one."""
        begins, known = self._known
        at = bisect_right(begins, address) - 1
        return known[at] if at >= 0 and address < known[at].end else None


_registry = _Registry()
_chooser = PageChooser()
# By ctypes, which lets other threads run meanwhile; `mmap.madvise` does not.
_madvise = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None


def map_fresh(size: int) -> tuple[mmap.mmap, int]:
    """Map memory that reads as zero, and takes no room before it is touched.

    Args:
        size: Bytes.

    Returns:
        The mapping, which is larger, and the offset in it at which the memory begins: the address
        there is a multiple of `BLOCK`.

    Raises:
        MemoryError: If there is no room for it.
    """
    try:
        memory = mmap.mmap(
            -1, size + BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        )
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {size} bytes: {error}") from error
    huge = _chooser.prefers_huge
    advice = _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE
    if advice is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(advice)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    start = -address % BLOCK
    if _madvise is not None:
        fresh = _Fresh(address + start, size // BLOCK, huge=huge)
        weakref.finalize(memory, fresh.close).atexit = False
        _registry.add(fresh)
    return memory, start


def touch(views: Iterable[memoryview]) -> None:
    """Touch what of some views was never touched, on the thread that is about to fill them.

    Memory that `map_fresh` did not map is left as it is.
    """
    for view in views:
        if view.nbytes < _WORTH_IT:
            continue
        begin = np.frombuffer(view, np.uint8).ctypes.data
        fresh = _registry.find(begin)
        if fresh is not None:
            for address in fresh.claim(begin, begin + view.nbytes):
                _touch(address, fresh)


def _touch(address: int, fresh: _Fresh) -> None:
    huge = _chooser.choose()
    if huge != fresh.huge:
        _advise(address, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)
    start = time.thread_time()
    if _advise(address, _MADV_POPULATE_WRITE):
        _chooser.note(huge=huge, seconds=time.thread_time() - start)


def _advise(address: int, advice: int | None) -> bool:
    """Tell the kernel about a block; return whether it knows that advice, and has taken it."""
    if _madvise is None or advice is None:
        return False
    done: int = _madvise(ctypes.c_void_p(address), ctypes.c_size_t(BLOCK), advice)
    return done == 0
