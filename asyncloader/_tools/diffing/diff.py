"""Compares two checkpoints, whatever ranks wrote them and in whatever order."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from asyncloader._loading.progress import Meter, Stages
from asyncloader._loading.reading import has_numbers, read_stored
from asyncloader._loading.runtime import open_session
from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader._tools.content import read_content
from asyncloader._tools.values import flat

from .comparison import compare, compare_bits
from .difference import Change, Difference, Kind, Names, TensorDifference
from .tables import Side, compare_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.manifest import Stored
    from asyncloader._loading.progress import Progress
    from asyncloader._tools.content import Content
    from asyncloader.options import ReadOptions


_WINDOW = 64 << 20
_AT_A_TIME = 4
# A call takes a millisecond, whatever it reads: small tensors are read many at a time.
_MOST = 1000


class _Window(NamedTuple):
    """The elements `[begin, end)` of a tensor."""

    name: str
    begin: int
    end: int


async def adiff(
    a: str,
    b: str,
    *,
    budget: int,
    progress: Callable[[Progress], object] | None,
    options: ReadOptions,
) -> Difference:
    """Compare all that both hold, and name what only one holds; see `asyncloader.tools.diff`."""
    clock = Meter(0)
    async with open_session(a, options) as first, open_session(b, options) as second:
        one = Side(first, await read_content(first))
        other = Side(second, await read_content(second))
        sizes, others = one.content.sizes, other.content.sizes
        common = sum(sizes[name] + others[name] for name in sizes.keys() & others.keys())
        stages = Stages(common, progress)
        notes: list[str] = []
        tables = [
            await compare_table(one, other, name, budget=budget, stages=stages, notes=notes)
            for name in one.content.tables
            if name in other.content.tables
        ]
        meter = Meter(0, stages.tell)
        tensors = await _compare_tensors(one, other, min(budget, _WINDOW), meter)
        meter.finish()
    only_a = _only_in(one.content, other.content)
    only_b = _only_in(other.content, one.content)
    same = all(table.equal for table in tables) and all(tensor.equal for tensor in tensors)
    return Difference(
        a=a,
        b=b,
        equal=same and not only_a and not only_b,
        only_in_a=only_a,
        only_in_b=only_b,
        tables=tuple(tables),
        tensors=tuple(tensors),
        notes=tuple(notes),
        seconds=clock.seconds,
    )


def _only_in(one: Content, other: Content) -> Names:
    """Name what one of them holds and the other does not."""
    return Names(
        tables=tuple(name for name in one.tables if name not in other.tables),
        slots=tuple(
            f"{name}@{slot}"
            for name, table in one.tables.items()
            if name in other.tables
            for slot in table.slots
            if slot not in other.tables[name].slots
        ),
        tensors=tuple(name for name in one.tensors if name not in other.tensors),
    )


async def _compare_tensors(
    a: Side, b: Side, window_bytes: int, meter: Meter
) -> list[TensorDifference]:
    """Compare all tensors that both have, so many bytes of each side at a time."""
    ones, others = a.content.tensors, b.content.tensors
    both = [name for name in ones if name in others]
    alike = [
        ones[name]
        for name in both
        if Kind.of(ones[name]) == Kind.of(others[name]) and ones[name].nbytes == others[name].nbytes
    ]
    changes: dict[str, list[Change]] = {name: [] for name in both}

    async def work(batch: Sequence[_Window]) -> None:
        ours, theirs = await _read(a, batch), await _read(b, batch)

        def compare_all() -> None:
            for name, tensor in ours.items():
                known = has_numbers(ones[name].dtype)
                change = (
                    compare(tensor, theirs[name])[0]
                    if known
                    else compare_bits(tensor, theirs[name])
                )
                changes[name].append(change)

        await run_jobs(a.session.threads.kernels, [compare_all])
        size = 2 * sum(tensor.nbytes for tensor in ours.values())
        meter.note(read=size, wanted=size, current=batch[-1].name)

    most = max(window_bytes // _AT_A_TIME, 1)
    await for_each(_batches(alike, most), work, workers=_AT_A_TIME, name="asyncloader-diff")
    return [_difference(ones[name], others[name], Change.sum(changes[name])) for name in both]


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


async def _read(side: Side, batch: Sequence[_Window]) -> dict[str, Tensor]:
    def cut() -> list[Stored]:
        return [flat(side.content.tensors[name]).window(begin, end) for name, begin, end in batch]

    [wanted] = await run_jobs(side.session.threads.kernels, [cut])
    return await read_stored(side.session, wanted)


def _difference(one: Stored, other: Stored, change: Change) -> TensorDifference:
    same = Kind.of(one) == Kind.of(other)
    elements = max(flat(one).rows, flat(other).rows) if same else 0
    if elements and one.nbytes != other.nbytes:  # of an unknown dtype
        change = Change(different=elements)
    return TensorDifference(
        name=one.name, a=Kind.of(one), b=Kind.of(other), elements=elements, change=change
    )
