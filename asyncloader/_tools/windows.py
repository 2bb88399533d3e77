"""Reads tensors piece by piece, so that none of them has to fit into memory."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from asyncloader._checkpoint.dtypes import DTYPES
from asyncloader._loading.reading import has_numbers, read_stored
from asyncloader._threads.jobs import for_each, run_jobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.session import Session


T = TypeVar("T")

WINDOW = 2 << 20
"""Elements in one piece."""

_AT_A_TIME = 4
# Bytes of an element; what claims more is none that anybody knows.
_WIDEST = 64


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
    """Read the elements `[begin, end)`, counted over all rows, in one dimension; see `flat`.

    Raises:
        ReadError: If the storage failed.
    """
    window = flat(stored).window(begin, end)
    return (await read_stored(session, [window]))[stored.name]


async def in_windows(
    session: Session,
    stored: Stored,
    work: Callable[[Tensor], T],
    *,
    window: int = WINDOW,
    advance: Callable[[int], object],
) -> list[T]:
    """Do something with all elements, some at a time; return the results in their order.

    Args:
        session: The checkpoint.
        stored: The tensor.
        work: Gets the elements of one window; runs on a thread.
        window: How many that are.
        advance: Gets the bytes of each window that is done.

    Raises:
        ReadError: If the storage failed.
    """
    total = flat(stored).rows
    results: dict[int, T] = {}

    async def do(begin: int) -> None:
        end = min(begin + window, total)
        values = await read_elements(session, stored, begin, end)
        [results[begin]] = await run_jobs(session.threads.kernels, [partial(work, values)])
        advance(values.nbytes)

    await for_each(range(0, total, window), do, workers=_AT_A_TIME, name="asyncloader-window")
    return [results[begin] for begin in sorted(results)]
