"""The first rows of a tensor, which JSON can hold, and the statistics of all its values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from asyncloader._checkpoint.dtypes import DTYPES
from asyncloader._loading.reading import has_numbers, read_stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from asyncloader._checkpoint.manifest import Stored
    from asyncloader._loading.session import Session


# A number; where JSON has none (NaN, infinities, complex numbers, raw bits) its text.
Value: TypeAlias = "bool | int | float | str"

_MOST = 4096  # values of one row
_WIDEST = 64  # bytes of an element: no known dtype has more


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row, its values in one dimension."""

    number: int  # counted over all parts
    id: int | None  # in a table
    values: tuple[Value, ...]
    omitted: int  # values after these


async def read_rows(
    session: Session, stored: Stored, rows: range, *, ids: Sequence[int]
) -> tuple[Row, ...]:
    """Read some rows, of each no more than some thousand values.

    A scalar is a row of one value. If an element takes no whole number of bytes, there are no rows.
    `ids` are the ids of the rows, as far as they have any.
    """
    if flat(stored).rows != math.prod(stored.shape):
        return ()
    width = math.prod(stored.shape[1:])
    taken = min(width, _MOST)
    texts = values_of if has_numbers(stored.dtype) else _bits_of
    if taken == width:
        whole = await read_elements(session, stored, rows.start * width, rows.stop * width)
        found = list(whole.view(len(rows), width, *whole.shape[1:]))
    else:
        begins = [number * width for number in rows]
        found = [await read_elements(session, stored, at, at + taken) for at in begins]
    return tuple(
        Row(
            number=number,
            id=ids[at] if at < len(ids) else None,
            values=texts(row),
            omitted=width - taken,
        )
        for at, (number, row) in enumerate(zip(rows, found, strict=True))
    )


def flat(stored: Stored) -> Stored:
    """Return the elements as rows of one each: the rows of some tensors are large.

    Of a dtype without numbers they are `[n, size]` bytes; where an element takes no whole number of
    bytes, each byte is one.
    """
    size = max(stored.nbytes // max(math.prod(stored.shape), 1), 1)
    if size > _WIDEST or any(
        block.nbytes != size * math.prod(block.shape) for block in stored.blocks
    ):
        size = 1
    dtype, inner = stored.dtype, tuple[int, ...]()
    if not has_numbers(dtype):
        dtype, inner = DTYPES["U8"], (size,)
    blocks = tuple(
        replace(block, dtype=dtype, shape=(block.nbytes // size, *inner)) for block in stored.blocks
    )
    rows = sum(block.rows for block in blocks)
    return replace(stored, dtype=dtype, shape=(rows, *inner), blocks=blocks)


async def read_elements(session: Session, stored: Stored, begin: int, end: int) -> Tensor:
    """Read the elements `[begin, end)`, counted over all rows, in one dimension; see `flat`."""
    window = flat(stored).window(begin, end)
    return (await read_stored(session, [window]))[stored.name]


def values_of(tensor: Tensor) -> tuple[Value, ...]:
    """Return the values in one dimension."""
    flat = tensor.reshape(-1)
    if flat.is_floating_point():
        flat = flat.double()  # not every small dtype has a `tolist`
    values: Iterable[bool | float | complex] = flat.tolist()
    return tuple(
        str(one) if isinstance(one, complex) or not math.isfinite(one) else one for one in values
    )


def _bits_of(elements: Tensor) -> tuple[Value, ...]:
    """Return elements, `[n, size]` bytes, as texts of their bits: `0x…`, the last byte first."""
    digits = 2 * elements.shape[1]
    return tuple(
        f"0x{int.from_bytes(bytes(one), 'little'):0{digits}x}" for one in elements.tolist()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of all values; the first four of the finite ones among them, `None` if there are none."""

    min: float | None
    max: float | None
    mean: float | None
    std: float | None  # divided by their number, not by one less
    count: int
    zeros: int
    nans: int
    infinities: int

    @property
    def finite(self) -> int:
        """How many values are neither NaN nor infinite."""
        return self.count - self.nans - self.infinities


def measure(values: Tensor) -> Statistics:
    """Measure some values, which are not complex."""
    array = _as_array(values)
    finite, nans = array, 0
    if array.dtype.kind == "f":
        is_finite = np.isfinite(array)
        if not is_finite.all():
            nans = int(np.count_nonzero(np.isnan(array)))
            finite = array[is_finite]
    low = high = mean = std = None
    if finite.size:
        low, high = finite.min().item(), finite.max().item()
        with np.errstate(over="ignore", invalid="ignore"):  # squares of numbers near the largest
            mean = float(finite.mean(dtype=np.float64))
            if not math.isfinite(mean):  # the sum is infinite, the sum of the shares is not
                mean = float((finite / float(finite.size)).sum())
            distances = np.subtract(finite, mean, dtype=np.float64)
            std = math.sqrt(float(np.dot(distances, distances)) / finite.size)
    return Statistics(
        min=low,
        max=high,
        mean=mean,
        std=std,
        count=array.size,
        zeros=array.size - int(np.count_nonzero(array)),
        nans=nans,
        infinities=array.size - finite.size - nans,
    )


def _as_array(values: Tensor) -> NDArray[Any]:
    """Return the values in one dimension, of a dtype that numpy knows."""
    flat = values.reshape(-1)
    if flat.dtype == torch.bool:
        return flat.view(torch.uint8).numpy()
    is_small = flat.is_floating_point() and flat.itemsize < torch.float32.itemsize
    return (flat.float() if is_small else flat).numpy()


def combine(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of all values, given those of some at a time."""
    number, mean, squares = 0, 0.0, 0.0
    for part in parts:  # Chan, Golub, LeVeque: no difference of large sums
        if part.mean is None or part.std is None:
            continue
        distance, before, number = part.mean - mean, number, number + part.finite
        mean += distance * (part.finite / number)
        squares += part.std * part.std * part.finite
        if before:  # `**` would raise where this is infinite
            squares += distance * distance * (before / number) * part.finite
    return Statistics(
        min=min((part.min for part in parts if part.min is not None), default=None),
        max=max((part.max for part in parts if part.max is not None), default=None),
        mean=mean if number else None,
        std=math.sqrt(squares / number) if number else None,
        count=sum(part.count for part in parts),
        zeros=sum(part.zeros for part in parts),
        nans=sum(part.nans for part in parts),
        infinities=sum(part.infinities for part in parts),
    )
