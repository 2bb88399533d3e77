"""Compares dense tensors, some elements at a time."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._concurrency import for_each, run_jobs
from asyncloader.cli._windows import read_elements

from ._comparison import Change, combined, compare
from ._difference import Kind, TensorDifference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncloader.checkpoint import Stored
    from asyncloader.streaming import Meter

    from ._contents import Content

__all__ = ["compare_tensors"]

_AT_A_TIME = 4


async def compare_tensors(
    a: Content, b: Content, *, window_bytes: int, meter: Meter
) -> list[TensorDifference]:
    """Compare all tensors that both have.

    Args:
        a: One checkpoint.
        b: The other.
        window_bytes: What may be compared at a time, of each side.
        meter: Is told of what was read.

    Raises:
        CheckpointError: If bytes are not those that were written, or torch has no such dtype.
        ReadError: If the storage failed.
    """
    both = [name for name in a.tensors if name in b.tensors]
    changes: dict[str, list[Change]] = {name: [] for name in both}

    def windows() -> Iterator[tuple[str, int, int]]:
        for name in both:
            one, other = a.tensors[name], b.tensors[name]
            if _kind(one) == _kind(other):
                total = math.prod(one.shape)
                step = max(window_bytes // _AT_A_TIME // one.dtype.itemsize, 1)
                for begin in range(0, total, step):
                    yield name, begin, min(begin + step, total)

    async def work(window: tuple[str, int, int]) -> None:
        name, begin, end = window
        one = await read_elements(a.session, a.tensors[name], begin, end)
        other = await read_elements(b.session, b.tensors[name], begin, end)
        job = partial(compare, one, other)
        [(change, _)] = await run_jobs(a.session.threads.kernels, [job])
        changes[name].append(change)
        size = one.nbytes + other.nbytes
        meter.note(read=size, wanted=size, current=name)

    await for_each(windows(), work, workers=_AT_A_TIME, name="asyncloader-diff")
    return [_difference(a.tensors[name], b.tensors[name], combined(changes[name])) for name in both]


def _kind(stored: Stored) -> Kind:
    return Kind(dtype=stored.dtype.torch, shape=stored.shape)


def _difference(one: Stored, other: Stored, change: Change) -> TensorDifference:
    same = _kind(one) == _kind(other)
    return TensorDifference(
        name=one.name,
        a=_kind(one),
        b=_kind(other),
        elements=math.prod(one.shape) if same else 0,
        change=change,
    )
