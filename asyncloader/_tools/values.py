"""Rows as they are shown: some of their values, which JSON can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from asyncloader._loading.reading import has_numbers

from .windows import flat, read_elements

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.session import Session


Value: TypeAlias = "bool | int | float | str"
"""A number; where JSON has none (NaN, infinities, complex numbers, raw bits) its text."""

_MOST = 4096
"""Values of one row."""

_EXACT = 1 << 53
"""The largest whole number up to which programs are exact whose numbers are doubles, as jq is."""


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
    session: Session, stored: Stored, rows: int, *, ids: Sequence[int]
) -> tuple[Row, ...]:
    """Read the first rows, of each no more than some thousand values; none of what is no bytes.

    Args:
        session: The checkpoint.
        stored: The tensor; a scalar is a row of one value.
        rows: How many, if there are as many.
        ids: Of the rows, as far as they have any.

    Raises:
        ReadError: If the storage failed.
    """
    if flat(stored).rows != math.prod(stored.shape):
        return ()
    count = min(rows, stored.shape[0]) if stored.shape else 1
    width = math.prod(stored.shape[1:])
    taken = min(width, _MOST)
    texts = values_of if has_numbers(stored.dtype) else bits_of
    if taken == width:
        whole = await read_elements(session, stored, 0, count * width)
        found = list(whole.view(count, width, *whole.shape[1:]))
    else:
        begins = range(0, count * width, width)
        found = [await read_elements(session, stored, at, at + taken) for at in begins]
    return tuple(
        Row(
            number=number,
            id=ids[number] if number < len(ids) else None,
            values=texts(row),
            omitted=width - taken,
        )
        for number, row in enumerate(found)
    )


async def read_row(session: Session, stored: Stored, *, id_: int, number: int) -> Row:
    """Read the row of an id, its first few thousand values; raises what `read_rows` does."""
    width = math.prod(stored.shape[1:])
    taken = min(width, _MOST)
    if flat(stored).rows != math.prod(stored.shape):
        return Row(number=number, id=id_, values=(), omitted=width)
    texts = values_of if has_numbers(stored.dtype) else bits_of
    values = await read_elements(session, stored, number * width, number * width + taken)
    return Row(number=number, id=id_, values=texts(values), omitted=width - taken)


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


def with_texts(value: object) -> object:
    """Return what JSON is made of, with the text of whole numbers beside them, as `…_text`.

    An id always has one, so that a program need not look; others where a double would round them.
    """
    if isinstance(value, dict):
        return dict(_members(value))
    if isinstance(value, list | tuple):
        return [with_texts(one) for one in value]
    return value


def _members(value: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, one in value.items():
        yield key, with_texts(one)
        if _is_rounded(one) or (key == "id" and type(one) is int):
            yield f"{key}_text", str(one)
        elif isinstance(one, list | tuple) and any(map(_is_rounded, one)):
            yield f"{key}_text", list(map(str, one))


def _is_rounded(value: object) -> bool:
    return type(value) is int and abs(value) > _EXACT


def _value(value: bool | complex) -> Value:  # noqa: FBT001  # no flag: it is shown
    if isinstance(value, complex) or not math.isfinite(value):
        return str(value)
    return value
