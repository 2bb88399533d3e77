"""Which tensors share memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


# How long numpy may think about whether two strided views have an element in common.
_MAX_WORK = 1_000_000


def overlaps_itself(tensor: torch.Tensor) -> bool:
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
        (tensor.data_ptr(), tensor.data_ptr() + extent(tensor), str(tensor.device), name)
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
            if other[2] == span[2] and share(tensors[other[3]], tensors[span[3]])
        ]
        open_.append(span)
    return problems


def extent(tensor: torch.Tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


class _Address:
    """Shows numpy where a tensor lies, on any device. Nothing is read from there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(step * tensor.itemsize for step in tensor.stride()),
            "typestr": f"|V{tensor.itemsize}",
        }


def share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors of one device have bytes in common; where it is hard to say, yes."""
    try:
        return np.shares_memory(
            np.asarray(_Address(one)),
            np.asarray(_Address(other)),
            max_work=_MAX_WORK,  # type: ignore[arg-type]  # any int: the stub is wrong
        )
    except np.exceptions.TooHardError:
        return True
