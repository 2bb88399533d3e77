"""Compares two checkpoints, whatever ranks wrote them and in whatever order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncloader._arguments import checked_path
from asyncloader._loading.progress import Meter
from asyncloader._loading.session import open_session
from asyncloader._tools.stages import Stages
from asyncloader.options import ReadOptions

from .contents import Content, only_in, read_content
from .difference import Difference
from .tables import compare_table
from .tensors import compare_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncloader._loading.progress import Progress


BUDGET = 1 << 30
"""Bytes that rows and elements of both sides may take at a time."""

_WINDOW = 64 << 20


async def adiff(
    a: str,
    b: str,
    *,
    budget: int = BUDGET,
    progress: Callable[[Progress], object] | None = None,
    options: ReadOptions | None = None,
) -> Difference:
    """Compare all that both hold; name what only one holds.

    Args:
        a: A folder, or a safetensors file.
        b: The same.
        budget: Memory for what is compared, in bytes, besides that.
        progress: Called on the event loop, at most ten times a second.
        options: How to read.

    Raises:
        CheckpointError: If one of them is missing, unreadable, or contradicts itself.
        PlanError: If one of them does not fit together.
        ReadError: If one of them could not be read.
    """
    clock, how = Meter(0), options or ReadOptions()
    paths = [checked_path(path, "path") for path in (a, b)]
    async with (
        open_session(paths[0], how) as first,
        open_session(paths[1], how) as second,
    ):
        one, other = await read_content(first), await read_content(second)
        stages = Stages(sum(_common(one, other)), progress)
        notes: list[str] = []
        tables = [
            await compare_table(one, other, name, budget=budget, stages=stages, notes=notes)
            for name in one.tables
            if name in other.tables
        ]
        meter = Meter(0, stages.tell)
        window = min(budget, _WINDOW)
        tensors = await compare_tensors(one, other, window_bytes=window, meter=meter)
        meter.finish()
    only_a, only_b = only_in(one, other), only_in(other, one)
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


def _common(a: Content, b: Content) -> Iterator[int]:
    """Yield the bytes of all that both have, of each."""
    for one, other in ((a, b), (b, a)):
        for name, table in one.tables.items():
            if name in other.tables:
                yield table.ids.nbytes
                both = table.slots.keys() & other.tables[name].slots.keys()
                yield from (table.slots[slot].nbytes for slot in both)
        yield from (s.nbytes for name, s in one.tensors.items() if name in other.tensors)
