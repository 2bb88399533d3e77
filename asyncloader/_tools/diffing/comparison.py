"""Compares values, whatever their dtype: bit for bit first, and only what differs as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._loading.reading import has_numbers

from .difference import Change

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def compare(one: Tensor, other: Tensor) -> tuple[Change, NDArray[np.int64]]:
    """Compare two tensors of the same dtype and shape.

    Returns:
        How they differ, and which elements do, as ascending positions in row-major order.
    """
    left, right = _bits(one), _bits(other)
    where = np.flatnonzero(left != right)
    if not len(where) or not has_numbers(BY_TORCH[str(one.dtype).removeprefix("torch.")]):
        return Change(different=len(where)), where
    a, b = left[where], right[where]
    if one.dtype == torch.bool:
        return Change(different=len(where), largest=1), where
    if not one.dtype.is_floating_point and not one.dtype.is_complex:
        return _integers(a, b, signed=one.dtype.is_signed), where
    return _numbers(_wide(a, one.dtype), _wide(b, one.dtype), where)


def compare_bits(one: Tensor, other: Tensor) -> Change:
    """Compare elements without numbers, `[n, size]` bytes."""
    return Change(different=int((one != other).any(dim=1).count_nonzero()))


def _bits(tensor: Tensor) -> NDArray[np.unsignedinteger]:
    """Return the elements in one dimension, as unsigned integers of their width."""
    flat = tensor.contiguous().reshape(-1)
    if not flat.numel():
        return np.zeros(0, np.uint8)
    return flat.view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _integers(
    a: NDArray[np.unsignedinteger], b: NDArray[np.unsignedinteger], *, signed: bool
) -> Change:
    width = a.dtype.itemsize
    if signed:
        a, b = a.view(f"i{width}"), b.view(f"i{width}")
    high, low = np.maximum(a, b), np.minimum(a, b)
    # The distance of two signed numbers may need the sign's bit.
    distance = high.view(f"u{width}") - low.view(f"u{width}")
    return Change(different=len(a), largest=int(distance.max()))


def _wide(bits: NDArray[np.unsignedinteger], dtype: torch.dtype) -> NDArray[np.inexact]:
    plain = torch.from_numpy(bits.view(f"i{bits.dtype.itemsize}")).view(dtype)
    return plain.to(torch.complex128 if dtype.is_complex else torch.float64).numpy()


def _numbers(
    a: NDArray[np.inexact], b: NDArray[np.inexact], where: NDArray[np.int64]
) -> tuple[Change, NDArray[np.int64]]:
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    differ = ~(nan_a & nan_b)
    known = ~(nan_a | nan_b)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a[known] - b[known])
    finite = distance[np.isfinite(distance)]
    different = int(np.count_nonzero(differ))
    change = Change(
        different=different,
        largest=float(finite.max()) if len(finite) else None,
        infinite=len(distance) - len(finite),
        nans=different - len(distance),
    )
    return change, where[differ]
