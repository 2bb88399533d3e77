"""Host memory for bytes on their way, used again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from asyncloader._memory import zeros

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StagingPool"]

# The C library keeps what large temporary buffers leave behind, and counts it as ours: measured,
# 290 MB where 128 were allowed. Small ones it handles well.
_SMALL = 1 << 20


class StagingPool:
    """Lends buffers of one size. Safe to use from several threads.

    Args:
        size: Of the buffers, in bytes. A larger one is made for its use and then let go.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[Tensor] = []

    def __repr__(self) -> str:
        return f"<StagingPool {len(self._free)} buffers of {self._size} bytes free>"

    def take(self, nbytes: int) -> Tensor:
        """Return a buffer of at least `nbytes`, uint8 `[n]`; what it holds is anything."""
        if nbytes < _SMALL or nbytes > self._size:
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            return self._free.pop()
        except IndexError:
            return zeros((self._size,), torch.uint8)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back. Nobody may read it or write to it any more."""
        if buffer.numel() == self._size:
            self._free.append(buffer)
