"""Compares dense tensors, some elements at a time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._loading.reading import has_numbers, read_stored
from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader._tools.windows import flat

from .comparison import Change, combined, compare, compare_bits
from .difference import Kind, TensorDifference

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.progress import Meter

    from .contents import Content


_AT_A_TIME = 4
# A call takes a millisecond, whatever it reads: small tensors are read many at a time.
_MOST = 1000


class _Window(NamedTuple):
    """The elements `[begin, end)` of a tensor."""

    name: str
    begin: int
    end: int


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
        CheckpointError: If bytes are not those that were written.
        ReadError: If the storage failed.
    """
    both = [name for name in a.tensors if name in b.tensors]
    alike = [
        a.tensors[name]
        for name in both
        if _kind(a.tensors[name]) == _kind(b.tensors[name])
        and a.tensors[name].nbytes == b.tensors[name].nbytes
    ]
    changes: dict[str, list[Change]] = {name: [] for name in both}

    async def work(batch: Sequence[_Window]) -> None:
        ours, theirs = await _read(a, batch), await _read(b, batch)
        job = partial(_compare_all, a, ours, theirs)
        [found] = await run_jobs(a.session.threads.kernels, [job])
        for name, change in found:
            changes[name].append(change)
        size = 2 * sum(tensor.nbytes for tensor in ours.values())
        meter.note(read=size, wanted=size, current=batch[-1].name)

    most = max(window_bytes // _AT_A_TIME, 1)
    await for_each(_batches(alike, most), work, workers=_AT_A_TIME, name="asyncloader-diff")
    return [_difference(a.tensors[name], b.tensors[name], combined(changes[name])) for name in both]


def _batches(tensors: Iterable[Stored], most: int) -> Iterator[list[_Window]]:
    """Cut large tensors up, and put small ones together, so that none takes more than `most`."""
    batch: list[_Window] = []
    room = most
    for stored in tensors:
        total = flat(stored).rows
        itemsize = max(stored.nbytes // max(total, 1), 1)
        step = max(most // itemsize, 1)
        for begin in range(0, total, step):
            window = _Window(stored.name, begin, min(begin + step, total))
            nbytes = (window.end - begin) * itemsize
            if batch and (nbytes > room or len(batch) == _MOST):
                yield batch
                batch, room = [], most
            batch.append(window)
            room -= nbytes
    if batch:
        yield batch


async def _read(content: Content, batch: Sequence[_Window]) -> dict[str, Tensor]:
    def cut() -> list[Stored]:
        return [flat(content.tensors[name]).window(begin, end) for name, begin, end in batch]

    [wanted] = await run_jobs(content.session.threads.kernels, [cut])
    return await read_stored(content.session, wanted)


def _compare_all(
    a: Content, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> list[tuple[str, Change]]:
    return [
        (
            name,
            compare(tensor, theirs[name])[0]
            if has_numbers(a.tensors[name].dtype)
            else compare_bits(tensor, theirs[name]),
        )
        for name, tensor in ours.items()
    ]


def _kind(stored: Stored) -> Kind:
    return Kind(dtype=stored.dtype.torch, shape=stored.shape)


def _difference(one: Stored, other: Stored, change: Change) -> TensorDifference:
    same = _kind(one) == _kind(other)
    elements = max(flat(one).rows, flat(other).rows) if same else 0
    if elements and one.nbytes != other.nbytes:  # of a dtype that nobody knows
        change = Change(different=elements, largest=None, infinite=0, nans=0)
    return TensorDifference(
        name=one.name, a=_kind(one), b=_kind(other), elements=elements, change=change
    )
