"""Rows as they are shown: some of their values, which JSON can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from asyncloader._loading.reading import has_numbers

from .scanning import flat, read_elements

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.session import Session


Value: TypeAlias = "bool | int | float | str"
"""A number; where JSON has none (NaN, infinities, complex numbers, raw bits) its text."""

_MOST = 4096
"""Values of one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row, its values in one dimension."""

    number: int
    """Counted over all parts."""

    id: int | None
    """In a table."""

    values: tuple[Value, ...]

    omitted: int
    """Values after these."""


async def read_rows(
    session: Session, stored: Stored, rows: range, *, ids: Sequence[int]
) -> tuple[Row, ...]:
    """Read some rows, of each no more than some thousand values; none of what is no whole bytes.

    Args:
        session: The checkpoint.
        stored: The tensor; a scalar is a row of one value.
        rows: Their numbers.
        ids: Of these rows, as far as they have any.

    Raises:
        ReadError: If the storage failed.
    """
    if flat(stored).rows != math.prod(stored.shape):
        return ()
    width = math.prod(stored.shape[1:])
    taken = min(width, _MOST)
    texts = values_of if has_numbers(stored.dtype) else bits_of
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


def values_of(tensor: Tensor) -> tuple[Value, ...]:
    """Return the values in one dimension."""
    flat = tensor.reshape(-1)
    if flat.is_floating_point():
        flat = flat.double()  # not every small dtype has a `tolist`
    values: Iterable[bool | float | complex] = flat.tolist()
    return tuple(_value(value) for value in values)


def bits_of(elements: Tensor) -> tuple[Value, ...]:
    """Return elements, `[n, size]` bytes, as texts of their bits: `0x…`, the last byte first."""
    size = elements.shape[1]
    return tuple(
        f"0x{int.from_bytes(bytes(one), 'little'):0{2 * size}x}" for one in elements.tolist()
    )


def _value(value: bool | complex) -> Value:  # noqa: FBT001  # no flag: it is shown
    if isinstance(value, complex) or not math.isfinite(value):
        return str(value)
    return value
