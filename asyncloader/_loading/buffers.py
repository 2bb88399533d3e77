"""Memory that bytes are read into: a tensor's own, and staging memory, which is used again."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from asyncloader._memory.allocation import zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asyncloader._checkpoint.dtypes import DType


# Larger buffers are mappings of their own: the C library keeps the memory of large temporary
# buffers, and that counts as ours (measured: up to 290 MB, 215 allowed).
_SMALL = 1 << 20
_ALIGNMENT = 16


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's own dtype; there is a destination of it, so torch has it."""
    found: torch.dtype = getattr(torch, dtype.torch)
    return found


def plain_bytes(tensor: torch.Tensor) -> memoryview | None:
    """Return a tensor's memory, if a file's bytes can go there as they lie.

    Not by way of `numpy()`: then the tensor's storage can never be resized again. A program that
    resizes it during a load or a save takes the memory away: `Loader` and `Saver` say so.
    """
    plain = tensor.detach()
    if plain.device.type != "cpu" or not plain.is_contiguous() or plain.is_conj() or plain.is_neg():
        return None
    if not plain.numel():
        return memoryview(b"")
    memory = (ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())
    memory._tensor = plain  # type: ignore[attr-defined]  # lives as long as any view  # noqa: SLF001
    return memoryview(memory).cast("B")


def boxes(
    tensor: torch.Tensor, start: int, flat: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pair parts of a tensor with parts of `flat`, `[n]`, to copy from one to the other.

    `flat` stands for the elements `[start, start + n)` in row-major order, of any tensor. There are
    at most two boxes of each number of dimensions.
    """
    if not flat.numel():
        return
    if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():
        whole_tensor = tensor.as_strided((tensor.numel(),), (1,))
        yield whole_tensor[start : start + len(flat)], flat
        return
    if not tensor.dim():
        yield tensor, flat[0]
        return
    inner = tensor[0].numel()
    row, column = divmod(start, inner)
    if column:  # up to the end of the first row
        head = min(inner - column, len(flat))
        yield from boxes(tensor[row], column, flat[:head])
        flat, row = flat[head:], row + 1
    whole = len(flat) // inner
    if whole:
        box = tensor[row : row + whole]
        yield box, flat[: whole * inner].view(box.shape)
    rest = flat[whole * inner :]
    if rest.numel():
        yield from boxes(tensor[row + whole], 0, rest)


def bump_versions(
    tensors: Sequence[torch.Tensor],
    increment: Callable[..., object] = torch.autograd.graph.increment_version,
) -> None:
    """Tell autograd that tensors were written to behind its back."""
    versioned = [tensor for tensor in tensors if not tensor.is_inference()]
    try:
        increment(versioned)
    except (AttributeError, RuntimeError, TypeError):  # older releases of torch take one at a time
        for tensor in versioned:
            increment(tensor)


class StagingPool:
    """Lends buffers, and keeps buffers of the usual size. Several threads may use it at once.

    Args:
        size: The usual size, in bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size + size // 32  # room for what alignment and cut rows add
        self._free: list[torch.Tensor] = []

    def __repr__(self) -> str:
        return f"<StagingPool {len(self._free)} buffers of {self._size} bytes free>"

    def take(self, nbytes: int) -> torch.Tensor:
        """Return a buffer of at least `nbytes`, uint8 `[n]`; it may hold any bytes."""
        if nbytes < _SMALL:
            return torch.empty(nbytes, dtype=torch.uint8)
        # A buffer that is much too large would take more memory than the budget was charged for.
        if self._size - self._size // 16 < nbytes <= self._size:
            try:
                return self._free.pop()
            except IndexError:
                return zeros((self._size,), torch.uint8)
        self._free.clear()  # kept and lent buffers shall not add up
        return zeros((nbytes,), torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back, which nothing reads or writes to any more."""
        if buffer.numel() == self._size:
            self._free.append(buffer)


class Arena:
    """The staging memory of one read: one buffer, cut up among the pieces that need some."""

    def __init__(self, pool: StagingPool, nbytes: int, pieces: int) -> None:
        self._pool = pool
        self._nbytes = nbytes + pieces * _ALIGNMENT
        self._buffer: torch.Tensor | None = None
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """Return memory for one piece, uint8 `[nbytes]`, aligned for every dtype."""
        if self._buffer is None:
            self._buffer = self._pool.take(self._nbytes)
        start = self._used
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return self._buffer[start : start + nbytes]

    def close(self) -> None:
        if self._buffer is not None:
            self._pool.give(self._buffer)
            self._buffer = None
