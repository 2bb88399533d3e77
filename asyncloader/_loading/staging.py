"""Host memory for bytes on their way, used again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from asyncloader._memory.allocation import zeros

if TYPE_CHECKING:
    from torch import Tensor


# Larger buffers are mappings of their own: the C library keeps what large temporary buffers leave
# behind, and that counts as ours (measured: up to 290 MB, 215 allowed).
_SMALL = 1 << 20
_ALIGNMENT = 16


class StagingPool:
    """Lends buffers, and keeps those of the usual size. Safe to use from several threads.

    Args:
        size: The usual size, in bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size + size // 32  # room for what alignment and cut rows add
        self._free: list[Tensor] = []

    def __repr__(self) -> str:
        return f"<StagingPool {len(self._free)} buffers of {self._size} bytes free>"

    def take(self, nbytes: int) -> Tensor:
        """Return a buffer of at least `nbytes`, uint8 `[n]`; what it holds is anything."""
        if nbytes < _SMALL:
            return torch.empty(nbytes, dtype=torch.uint8)
        if self._is_usual(nbytes):
            try:
                return self._free.pop()
            except IndexError:
                return zeros((self._size,), torch.uint8)
        self._free.clear()  # what is kept and what is lent shall not add up
        return zeros((nbytes,), torch.uint8)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back. Nothing may read it or write to it any more."""
        if buffer.numel() == self._size:
            self._free.append(buffer)

    def _is_usual(self, nbytes: int) -> bool:
        # A buffer that is much too large would take more memory than the budget was charged for.
        return self._size - self._size // 16 < nbytes <= self._size


class Arena:
    """The staging memory of one read: one buffer, cut up among the pieces that need some."""

    def __init__(self, pool: StagingPool, nbytes: int, pieces: int) -> None:
        self._pool = pool
        self._nbytes = nbytes + pieces * _ALIGNMENT
        self._buffer: Tensor | None = None
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """Return memory for one piece, uint8 `[nbytes]`, aligned for every dtype."""
        if self._buffer is None:
            self._buffer = self._pool.take(self._nbytes)
        start = self._used
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return self._buffer[start : start + nbytes]

    def close(self) -> None:
        """Give the buffer back."""
        if self._buffer is not None:
            self._pool.give(self._buffer)
            self._buffer = None
