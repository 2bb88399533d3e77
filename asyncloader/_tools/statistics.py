"""What can be said of a tensor's values without holding all of them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor


# What numpy knows as it is, and is quick with.
_NATIVE = frozenset(
    {
        torch.float32,
        torch.float64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of all values; the first four of the finite ones among them, `None` if there are none."""

    min: float | None
    max: float | None
    mean: float | None

    std: float | None
    """Divided by their number, not by one less."""

    count: int
    zeros: int
    nans: int
    infinities: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Of some of the values."""

    count: int
    zeros: int
    nans: int
    infinities: int
    low: float
    high: float
    mean: float

    squares: float
    """Sum of the squared distances from the mean."""

    @property
    def finite(self) -> int:
        """How many values are neither NaN nor infinite."""
        return self.count - self.nans - self.infinities


def measure(values: Tensor) -> Moments | None:
    """Measure some values; `None` if they are complex, which have no order."""
    if values.is_complex():
        return None
    array = _as_array(values)
    finite, nans = array, 0
    if array.dtype.kind == "f":
        is_finite = np.isfinite(array)
        if not is_finite.all():
            nans = int(np.count_nonzero(np.isnan(array)))
            finite = array[is_finite]
    low = high = mean = squares = 0.0
    if finite.size:
        low, high = finite.min().item(), finite.max().item()
        with np.errstate(over="ignore", invalid="ignore"):  # squares of numbers near the largest
            mean = _mean(finite)
            distances = np.subtract(finite, mean, dtype=np.float64)
            squares = float(np.dot(distances, distances))
    return Moments(
        count=array.size,
        zeros=array.size - int(np.count_nonzero(array)),
        nans=nans,
        infinities=array.size - finite.size - nans,
        low=low,
        high=high,
        mean=mean,
        squares=squares,
    )


def _mean(finite: NDArray[Any]) -> float:
    mean = float(finite.mean(dtype=np.float64))
    # The sum of numbers near the largest is infinite, that of their shares is not.
    return mean if math.isfinite(mean) else float((finite / float(finite.size)).sum())


def _as_array(values: Tensor) -> NDArray[Any]:
    """Return the values in one dimension, of a dtype that numpy knows."""
    flat = values.reshape(-1)
    if flat.dtype in _NATIVE:
        return flat.numpy()
    if flat.dtype == torch.bool:
        return flat.view(torch.uint8).numpy()
    return flat.float().numpy()


def combine(parts: Iterable[Moments]) -> Statistics:
    """Sum up all values from what was measured of some at a time."""
    found = list(parts)
    measured = [part for part in found if part.finite]
    number, mean, squares = 0, 0.0, 0.0
    for part in measured:  # Chan, Golub, LeVeque: no difference of large sums
        distance, before, number = part.mean - mean, number, number + part.finite
        mean += distance * (part.finite / number)
        squares += part.squares
        if before:  # `**` would raise where this is infinite
            squares += distance * distance * (before / number) * part.finite
    return Statistics(
        min=min((part.low for part in measured), default=None),
        max=max((part.high for part in measured), default=None),
        mean=mean if number else None,
        std=math.sqrt(squares / number) if number else None,
        count=sum(part.count for part in found),
        zeros=sum(part.zeros for part in found),
        nans=sum(part.nans for part in found),
        infinities=sum(part.infinities for part in found),
    )
