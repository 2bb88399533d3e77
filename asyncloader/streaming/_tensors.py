"""The memory of dense tensors: how bytes get in, and who shares it with whom."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader.checkpoint import BY_TORCH
from asyncloader.planning import RowType, TensorTarget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "bump_versions",
    "copy_elements",
    "copy_flat",
    "describe_tensors",
    "overlaps",
    "plain_bytes",
]

# How long numpy may think about whether two strided views have an element in common.
_MAX_WORK = 1_000_000


def describe_tensors(tensors: Mapping[str, object]) -> dict[str, TensorTarget]:
    """Say what each tensor can take, and which are the same memory.

    Raises:
        TypeError: If one is no tensor.
        ValueError: If one cannot be written to element by element.
    """
    groups: dict[object, int] = {}
    targets = {}
    for name, tensor in tensors.items():
        if type(name) is not str or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensors maps names to torch tensors, got {name!r}: {type(tensor)}")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"tensors[{name!r}]: only plain strided tensors can be filled")
        dtype = BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"tensors[{name!r}] is {tensor.dtype}, which no checkpoint can hold")
        shape, strides = tuple(tensor.shape), tensor.stride()
        if tensor.numel() and _overlaps_itself(tensor):
            raise ValueError(
                f"tensors[{name!r}] is expanded, or overlaps itself: several of its elements are "
                "one place in memory; pass a clone() of it"
            )
        steps = tuple(step for step, size in zip(strides, shape, strict=True) if size > 1)
        same = (tensor.device, tensor.data_ptr(), dtype, shape, steps) if tensor.numel() else name
        targets[name] = TensorTarget(
            name=name,
            type=RowType(shape=shape, dtype=dtype),
            memory=groups.setdefault(same, len(groups)),
        )
    return targets


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Say whether elements share a place; exact for whatever slicing, turning and viewing make."""
    last = 0  # where the last element of the dimensions so far lies
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    for step, size in sorted(pair for pair in steps if pair[1] > 1):
        if step <= last:
            return True
        last += step * (size - 1)
    return False


def overlaps(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Name the pairs of tensors that are neither apart nor the same, a sentence each.

    Views that interleave, as the columns of one matrix do, are apart.
    """
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), str(tensor.device), name)
        for name, tensor in tensors.items()
        if tensor.numel()
    )
    problems = []
    open_: list[tuple[int, int, str, str]] = []
    for span in spans:
        open_ = [other for other in open_ if other[1] > span[0]]
        problems += [
            f"tensors {other[3]!r} and {span[3]!r} overlap in memory in part: what is loaded last "
            "would overwrite the other; give one of them memory of its own"
            for other in open_
            if other[2] == span[2] and _share(tensors[other[3]], tensors[span[3]])
        ]
        open_.append(span)
    return problems


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


class _Address:
    """Shows numpy where a tensor lies, on whatever device. Nobody reads from there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(step * tensor.itemsize for step in tensor.stride()),
            "typestr": f"|V{tensor.itemsize}",
        }


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return np.shares_memory(
            np.asarray(_Address(one)),
            np.asarray(_Address(other)),
            max_work=_MAX_WORK,  # type: ignore[arg-type]  # any int: the stub is wrong
        )
    except np.exceptions.TooHardError:
        return True


def plain_bytes(tensor: torch.Tensor) -> memoryview | None:
    """Return a tensor's memory, if a file's bytes can go there as they lie.

    Not by way of `numpy()`: that forbids the tensor's storage, for good, to be resized. Whoever
    resizes it while the memory is in use takes it away: `Loader` and `Saver` say so.
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


def bump_versions(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that tensors were written to behind its back."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
