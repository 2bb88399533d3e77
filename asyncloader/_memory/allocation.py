"""Memory that costs nothing until it is touched.

Large allocations are anonymous mappings; `pages` chooses their kind of pages. A fresh mapping reads
as zero, and an untouched page takes no memory, so a table may reserve more rows than it will use.
Where touching is dear, memory that is given back is kept for the next caller, as far as an owner
allows that.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch

from .pages import BLOCK, fresh_memory_is_dear, give_up, map_fresh, wipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


# The next version of a model is usually a little larger than the last one. Addresses cost nothing.
_GROWTH = 8


class _Kept(NamedTuple):
    """A mapping that was given back. The first `used` bytes from `start` on may not be zero."""

    memory: mmap.mmap
    start: int
    used: int

    @property
    def room(self) -> int:
        return len(self.memory) - self.start


class Spare:
    """Memory that was given back and is kept, wiped, for the next caller that maps memory.

    It is kept while an owner allows it, and if fresh memory is dear. No lock is held: the garbage
    collector may give memory back at any time on any thread.

    Args:
        is_dear: Says whether fresh memory costs more than wiping used memory.
        wipe: Makes bytes of a mapping read as zero.
    """

    def __init__(
        self,
        is_dear: Callable[[], bool] = fresh_memory_is_dear,
        wipe: Callable[[mmap.mmap, int, int], None] = wipe,
    ) -> None:
        self._is_dear = is_dear
        self._wipe = wipe
        self._allowed: dict[object, int] = {}
        self._kept = deque[_Kept]()

    def __repr__(self) -> str:
        return f"<Spare: {self.nbytes} bytes of {sum(self._allowed.values())}>"

    @property
    def nbytes(self) -> int:
        return sum(kept.room for kept in [*self._kept])

    def allow(self, owner: object, nbytes: int) -> None:
        """Keep up to so many bytes for an owner; the bytes of all owners add up."""
        self._allowed[owner] = nbytes
        self._drop(0)

    def forget(self, owner: object) -> None:
        self._allowed.pop(owner, None)
        self._drop(0)

    def map(self, size: int) -> tuple[mmap.mmap, int]:
        """Return memory of at least `size` bytes that reads as zero, and where it begins.

        Raises:
            MemoryError: If there is no room for it.
        """
        fitting = [kept for kept in [*self._kept] if size <= kept.room <= 2 * size]
        for kept in sorted(fitting, key=lambda kept: (kept.used > 0, kept.room)):
            if self._taken(kept):
                self._wipe(kept.memory, kept.start, kept.used)
                assert kept.start + size <= len(kept.memory), "lent memory lies within"
                give_up(kept.memory, kept.start + size)
                return kept.memory, kept.start
        return map_fresh(size + size // _GROWTH if self._allowed else size)

    def give(self, memory: mmap.mmap, start: int, used: int) -> None:
        """Take back memory that `map` has lent. Quick: `wipe` or the next `map` wipes it."""
        kept = _Kept(memory, start, used)
        if kept.room <= sum(self._allowed.values()) and self._is_dear():
            self._drop(kept.room)
            self._kept.append(kept)

    def wipe(self) -> None:
        """Make the memory that was given back read as zero. Belongs on a thread."""
        for kept in [*self._kept]:
            if kept.used and self._taken(kept):
                self._wipe(kept.memory, kept.start, kept.used)
                self._kept.append(kept._replace(used=0))
                self._drop(0)  # less may be allowed by now

    def _drop(self, more: int) -> None:
        """Let go of the memory that was kept longest, wiped first, until there is room for more."""
        most = sum(self._allowed.values())
        for kept in sorted([*self._kept], key=lambda kept: kept.used > 0):
            if self.nbytes + more > most:
                self._taken(kept)

    def _taken(self, kept: _Kept) -> bool:
        """Take a mapping out, unless another thread was quicker."""
        try:
            self._kept.remove(kept)
        except ValueError:
            return False
        return True


SPARE = Spare()


@torch.inference_mode(mode=False)  # a tensor that is made within it cannot be changed outside
def zeros(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    spare: Spare = SPARE,
) -> torch.Tensor:
    """Return a tensor of zeros whose memory is taken when it is first touched.

    Raises:
        MemoryError: If there is no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < BLOCK or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory, start = spare.map(size)
    lent = memoryview(memory)
    weakref.finalize(lent, spare.give, memory, start, size).atexit = False
    # Not a view of a tensor of all of it: `torch.save` saves a tensor's storage, all of it.
    exact = torch.frombuffer(lent, dtype=torch.uint8, count=size, offset=start)
    return exact.view(dtype).view(tuple(shape))
