"""Finds an id in a table on disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.stored import Stored
from asyncloader.errors import CheckpointError

from .allocation import ID
from .values import read_row
from .windows import WINDOW, in_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.index import Catalog, Part
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._loading.session import Session

    from .values import Row


_IDS = "int64"


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


async def find_id(
    session: Session,
    catalog: Catalog,
    table: str,
    id_: int,
    *,
    only: str | None,
    advance: Callable[[int], object],
) -> FoundId:
    """Look through the ids of those parts that may hold it, then read its row of each slot.

    Args:
        session: The checkpoint.
        catalog: Its names.
        table: The table's name on disk.
        id_: As it stands on disk.
        only: The one slot to read, unless it is all of them.
        advance: Gets the bytes of ids that were looked at.

    Raises:
        CheckpointError: If the table is not whole.
        ReadError: If the storage failed.
    """
    slots = catalog.tables[table]
    if ID not in slots:
        raise CheckpointError(session.location, f"table {table!r} has no ids")
    parts = [part for part in slots[ID] if part.slice.accepts(id_)]
    names = [slot for slot in slots if slot != ID and only in {None, slot}]
    places = [part.place for part in (*parts, *(one for name in names for one in slots[name]))]
    manifest = await session.manifest(catalog, sorted({place.shard for place in places}))
    hits: list[tuple[Part, int]] = []
    for part in parts:
        ids = _stored(manifest, part, ID)
        check_ids(session.location, ids)
        found = await in_windows(session, ids, partial(_rows_of, id_), advance=advance)
        hits += [(part, number * WINDOW + row) for number, rows in enumerate(found) for row in rows]
    if not hits:
        return FoundId(location=session.location, table=table, id=id_, found=0, part=None, slots=())
    part, number = hits[-1]
    rows = []
    for name in names:
        stored = _stored(manifest, _same_part(session.location, slots, table, name, part), name)
        row = await read_row(session, stored, id_=id_, number=number)
        rows.append(FoundSlot(name=name, dtype=stored.dtype.torch, shape=stored.shape[1:], row=row))
    return FoundId(
        location=session.location,
        table=table,
        id=id_,
        found=len(hits),
        part=str(part.slice),
        slots=tuple(rows),
    )


def check_ids(location: str, ids: Stored) -> None:
    """Refuse what are no ids.

    Raises:
        CheckpointError: If they are not int64 `[n]`.
    """
    if ids.dtype.torch != _IDS or len(ids.shape) != 1:
        problem = f"is {ids.dtype} {list(ids.shape)}; ids are {_IDS} [n]"
        raise CheckpointError(location, problem, ids.blocks[0].shard, ids.blocks[0].key)


def _rows_of(id_: int, ids: Tensor) -> list[int]:
    rows: list[int] = (ids == id_).nonzero().reshape(-1).tolist()
    return rows


def _same_part(
    location: str, slots: Mapping[str, Sequence[Part]], table: str, name: str, part: Part
) -> Part:
    for other in slots[name]:
        if other.slice == part.slice:
            return other
    problem = f"it has ids of table {table!r} for slice {part.slice}, but not their {name!r}"
    raise CheckpointError(location, problem)


def _stored(manifest: Manifest, part: Part, name: str) -> Stored:
    block = manifest.block(part.place)
    return Stored(name=name, dtype=block.dtype, shape=block.shape, blocks=(block,))
