"""Chooses the kind of pages for fresh memory, huge or small, by what touching them costs now.

The first touch of memory is the dearest part of a load. Huge pages are usually several times
cheaper to touch than small ones. In a virtual machine that reports free pages to its host, they are
several times dearer once memory has been free for a few seconds: the host takes the reported pages
back, huge ones first, and gives them again page by page. No file says in which state memory is. So
the thread that is about to read into fresh memory touches it first, a block at a time, and notes
the processor time; the cheaper kind is used, and the other one is tried now and then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import sys
import time
import weakref
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable


BLOCK = 2 << 20
"""A huge page, in bytes; memory is touched in such blocks, and aligned to them."""

# The read itself touches the pages of smaller views.
_WORTH_IT = 512 << 10
# One part in so many of the time that touching takes is spent on trying the other kind; less and
# less as long as that is the dearer one, since each try splits a mapping, of which a process may
# have 65,530.
_LOOKS = 24
_LEAST_LOOKS = 24 << 5
# Huge pages also spare look-ups of addresses, so small ones have to be this much cheaper.
_MARGIN = 1.25
# Seconds a block. To wipe a block takes 0.2 ms, a fresh one 0.3 to 0.5 where that is fast.
_DEAR = 0.0007
# The weight of the latest block in the known cost of its kind.
_LATEST = 0.25
# Linux 5.14 and newer: make pages present as a read or a write would. `mmap` has no names for them.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MADV_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
_MADV_NOHUGEPAGE = getattr(mmap, "MADV_NOHUGEPAGE", None)
# Without it a mapping that is larger than memory and swap is refused, even if most stays untouched.
# `mmap` has the constant from Python 3.13 on; the value is that of Linux on x86 and Arm.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if _MADV_HUGEPAGE else 0


class PageChooser:
    """Chooses the kind of pages for the next block, by the cost of earlier blocks of either kind.

    Threads may share one: at worst, only one of two notes at the same time is kept.
    """

    def __init__(self) -> None:
        self._cost: dict[bool, float] = {}
        self._since = 0.0
        self._looks = _LOOKS

    def __repr__(self) -> str:
        costs = ", ".join(
            f"{'huge' if huge else 'small'} {seconds * 1e3:.2f} ms a block"
            for huge, seconds in sorted(self._cost.items(), reverse=True)
        )
        return f"<PageChooser: {costs or 'nothing known'}>"

    @property
    def cost(self) -> float:
        """The cost of a block of the cheaper kind, in seconds of processor time; 0 if unknown."""
        return min(self._cost.values(), default=0.0)

    @property
    def prefers_huge(self) -> bool:
        """Whether huge pages are the cheaper kind, as far as is known."""
        huge, small = self._cost.get(True), self._cost.get(False)
        return huge is None or small is None or huge <= small * _MARGIN

    def choose(self) -> bool:
        for kind in (True, False):
            if kind not in self._cost:
                return kind
        preferred = self.prefers_huge
        if self._since > self._cost[not preferred] * self._looks:
            self._since = 0.0
            self._looks = min(self._looks * 2, _LEAST_LOOKS)
            return not preferred
        return preferred

    def note(self, *, huge: bool, seconds: float) -> None:
        preferred = self.prefers_huge
        before = self._cost.get(huge, seconds)
        self._cost[huge] = before + (seconds - before) * _LATEST
        if self.prefers_huge != preferred:
            self._looks = _LOOKS
        if huge == self.prefers_huge:
            self._since += seconds


_untouched: dict[int, bool] = {}
"""Blocks that `map_fresh` has mapped and no thread has touched, by address over `BLOCK`, and
whether the kernel was advised to make them huge pages. Each change is one call of a method, so that
no lock is held where a process forks or the garbage collector frees memory."""

_chooser = PageChooser()
# By ctypes, which lets other threads run meanwhile; `mmap.madvise` does not.
_madvise = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None


def map_fresh(size: int) -> tuple[mmap.mmap, int]:
    """Map `size` bytes that read as zero, and take no room before they are touched.

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
        first = (address + start) // BLOCK
        blocks = range(first, first + size // BLOCK)
        _untouched.update(dict.fromkeys(blocks, huge))
        weakref.finalize(memory, _forget, blocks).atexit = False
    return memory, start


def _forget(blocks: Iterable[int]) -> None:
    """Note that memory was freed: other memory may get its addresses soon."""
    for block in blocks:
        _untouched.pop(block, None)


def fresh_memory_is_dear() -> bool:
    """Say whether touching fresh memory costs more than wiping used memory."""
    return _chooser.cost > _DEAR


def wipe(memory: mmap.mmap, start: int, size: int) -> None:
    """Make bytes of a mapping of `map_fresh` read as zero; touched pages stay in memory.

    A block begins at offset `start`.
    """
    array = np.frombuffer(memory, np.uint8)[start : start + size]
    first = array.ctypes.data // BLOCK
    for at in range(0, size, BLOCK):
        block = first + at // BLOCK
        # A view that is too small for `touch` may have been written to all the same. The last block
        # may be cut short: its rest is other memory.
        is_fresh = at + BLOCK <= size and block in _untouched
        if not is_fresh or not _advise(block * BLOCK, _MADV_DONTNEED):
            array[at : at + BLOCK] = 0


def give_up(memory: mmap.mmap, start: int) -> None:
    """Give whole blocks of a mapping of `map_fresh` back to the system; they read as zero.

    The block in which `start`, an offset, lies stays, unless it begins there.
    """
    address = np.frombuffer(memory, np.uint8).ctypes.data
    begin = -(-(address + start) // BLOCK) * BLOCK
    if begin < address + len(memory):
        _advise(begin, _MADV_DONTNEED, address + len(memory) - begin)


def is_read_only(address: int) -> bool:
    """Say whether an address can be read but not written to, if the kernel tells.

    The page there is touched. The kernel does not tell of memory that belongs to a device, as
    memory that CUDA has pinned; nor do other systems than Linux.
    """
    page = address & ~(mmap.PAGESIZE - 1)
    if _advise(page, _MADV_POPULATE_WRITE, 1) or ctypes.get_errno() != errno.EINVAL:
        return False
    return _advise(page, _MADV_POPULATE_READ, 1)


def touch(views: Iterable[memoryview]) -> None:
    """Touch the untouched blocks of some views, on the thread that is about to fill them.

    Memory that `map_fresh` did not map is left as it is.
    """
    for view in views:
        if view.nbytes < _WORTH_IT:
            continue
        begin = np.frombuffer(view, np.uint8).ctypes.data
        for block in range(begin // BLOCK, -(-(begin + view.nbytes) // BLOCK)):
            is_huge = _untouched.pop(block, None)
            if is_huge is not None:
                _touch(block * BLOCK, is_huge=is_huge)


def _touch(address: int, *, is_huge: bool) -> None:
    huge = _chooser.choose()
    if huge != is_huge:
        _advise(address, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)
    start = time.thread_time()
    if _advise(address, _MADV_POPULATE_WRITE):
        _chooser.note(huge=huge, seconds=time.thread_time() - start)


def _advise(address: int, advice: int | None, size: int = BLOCK) -> bool:
    """Advise the kernel about a block; return whether it has taken the advice."""
    if _madvise is None or advice is None:
        return False
    done: int = _madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
    return done == 0
