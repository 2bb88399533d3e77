"""Finds an id in a table on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.manifest import Stored
from asyncloader._checkpoint.parts import ID, id_problems, without_rows
from asyncloader._checkpoint.problems import Problems
from asyncloader._loading.progress import Meter
from asyncloader._loading.runtime import open_session
from asyncloader.errors import CheckpointError
from asyncloader.options import ReadOptions

from .content import find_table
from .scanning import scan
from .values import Row, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncloader._checkpoint.index import Part
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session


_ID_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSlot:
    """What a table keeps for an id."""

    name: str
    dtype: str

    shape: tuple[int, ...]
    """Of the row."""

    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundId:
    """An id of a table, or that it is not there."""

    location: str
    table: str
    id: int

    found: int
    """How many times: the last one counts."""

    part: str | None
    """The slice, `begin@end@size`, of the part that holds it."""

    slots: tuple[FoundSlot, ...]


async def look_for(
    path: str,
    name: str,
    id_: int,
    *,
    options: ReadOptions | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> FoundId:
    """Look through the ids of those parts that may hold one, then read its row of each slot.

    Args:
        path: The checkpoint.
        name: A table, or a slot, `table@slot`, which alone is read.
        id_: As it stands on disk.
        options: How to read.
        progress: Called on the event loop.

    Raises:
        KeyError: If there is no such name.
        CheckpointError: If the table is not whole, or the checkpoint is unreadable.
        ReadError: If the storage failed.
    """
    async with open_session(path, options or ReadOptions()) as session:
        catalog = await session.catalog()
        table, only = find_table(session.location, catalog, name)
        slots = catalog.tables[table]
        if ID not in slots:
            raise CheckpointError(session.location, f"table {table!r} has no ids")
        names = [slot for slot in slots if slot != ID and only in {None, slot}]
        parts = [part for part in slots[ID] if part.slice.accepts(id_)]
        read = [*parts, *(part for slot in names for part in slots[slot])]
        manifest = await session.manifest(catalog, sorted({part.place.shard for part in read}))
        problems = Problems(session.location)
        hits = await _hits(session, manifest, parts, id_, Meter(0, progress))
        found = []
        if hits:
            part, row = hits[-1]
            for slot in names:
                problems.take(without_rows(table, slot, [part], slots[slot]))
                other = next(one for one in slots[slot] if one.slice == part.slice)
                found.append(await _slot(session, manifest, other, slot, id_=id_, number=row))
    return FoundId(
        location=session.location,
        table=table,
        id=id_,
        found=len(hits),
        part=str(hits[-1][0].slice) if hits else None,
        slots=tuple(found),
    )


async def _hits(
    session: Session, manifest: Manifest, parts: Sequence[Part], id_: int, meter: Meter
) -> list[tuple[Part, int]]:
    """Return in which rows of which parts an id stands."""
    blocks = [manifest.block(part.place) for part in parts]
    for block in blocks:
        Problems(session.location).take(id_problems(block.key, block))
    meter.total = sum(block.nbytes for block in blocks)

    def look(number: int, position: int, view: memoryview) -> list[tuple[Part, int]]:
        rows = np.flatnonzero(np.frombuffer(view, np.int64) == id_) + position // _ID_BYTES
        return [(parts[number], row) for row in rows.tolist()]

    found = await scan(session, blocks, look, meter=meter, grain=_ID_BYTES)
    return [hit for piece in found for hit in piece]


async def _slot(
    session: Session, manifest: Manifest, part: Part, name: str, *, id_: int, number: int
) -> FoundSlot:
    block = manifest.block(part.place)
    stored = Stored(name=name, dtype=block.dtype, shape=block.shape, blocks=(block,))
    rows = await read_rows(session, stored, range(number, number + 1), ids=[id_])
    unread = Row(number=number, id=id_, values=(), omitted=math.prod(stored.shape[1:]))
    return FoundSlot(
        name=name,
        dtype=stored.dtype.torch,
        shape=stored.shape[1:],
        row=rows[0] if rows else unread,
    )
