"""The memory of dense tensors: how bytes get in and out."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asyncloader._checkpoint.dtypes import DType


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's own dtype; destinations of it are known to be there."""
    found: torch.dtype = getattr(torch, dtype.torch)
    return found


def plain_bytes(tensor: torch.Tensor) -> memoryview | None:
    """Return a tensor's memory, if a file's bytes can go there as they lie.

    Not by way of `numpy()`: that forbids the tensor's storage, for good, to be resized. A
    program that resizes it meanwhile takes the memory away: `Loader` and `Saver` say so.
    """
    plain = tensor.detach()
    if plain.device.type != "cpu" or not plain.is_contiguous() or plain.is_conj() or plain.is_neg():
        return None
    if not plain.numel():
        return memoryview(b"")
    memory = (ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())
    memory._tensor = plain  # type: ignore[attr-defined]  # lives as long as any view  # noqa: SLF001
    return memoryview(memory).cast("B")


def copy_flat(tensor: torch.Tensor, start: int, values: torch.Tensor) -> None:
    """Copy `values`, `[n]`, to the elements `[start, start + n)` of a tensor in row-major order.

    Works for every tensor that can be written to, and copies boxes, not elements: at most two of
    each number of dimensions.
    """
    for box, part in _boxes(tensor, start, values):
        box.copy_(part)


def copy_elements(tensor: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """Copy the elements `[start, start + n)` of a tensor in row-major order to `out`, `[n]`."""
    for box, part in _boxes(tensor, start, out):
        part.copy_(box)


def _boxes(
    tensor: torch.Tensor, start: int, flat: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pair parts of a tensor with parts of `flat`, `[n]`: its elements `[start, start + n)`."""
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
        yield from _boxes(tensor[row], column, flat[:head])
        flat, row = flat[head:], row + 1
    whole = len(flat) // inner
    if whole:
        box = tensor[row : row + whole]
        yield box, flat[: whole * inner].view(box.shape)
    rest = flat[whole * inner :]
    if rest.numel():
        yield from _boxes(tensor[row + whole], 0, rest)


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
