"""What there is to say of one tensor, or of a table's slots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from asyncloader._checkpoint.manifest import stored_tensor
from asyncloader._checkpoint.parts import ID, id_problems
from asyncloader._checkpoint.problems import Problems
from asyncloader._loading.progress import Meter
from asyncloader._loading.reading import has_numbers, torch_dtype
from asyncloader._loading.runtime import open_session
from asyncloader.options import ReadOptions

from .content import find_table, stored_slot
from .scanning import scan
from .summary import metadata_of
from .values import combine, measure, read_elements, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asyncloader._checkpoint.manifest import Manifest, Stored
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session

    from .values import Row, Statistics


# Larger pieces take more memory for what is computed of them, and no less time.
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTensor:
    """A dense tensor, or a slot of a table."""

    location: str
    name: str
    kind: Literal["tensor", "slot"]
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    parts: int
    """Pieces that different ranks wrote."""

    metadata: Mapping[str, Mapping[str, str]]
    """The free text of the headers of its files, `__metadata__`, by file."""

    statistics: Statistics | None
    """`None` if it is complex, or of a dtype without numbers."""

    rows: tuple[Row, ...]
    """The first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTable:
    """A table."""

    location: str
    name: str
    kind: Literal["table"] = "table"
    ids: int
    bytes: int
    slots: tuple[ShownTensor, ...]


async def look_at(
    path: str,
    name: str,
    *,
    rows: int,
    options: ReadOptions | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> ShownTable | ShownTensor:
    """Read a tensor, a slot, or all of a table, and say what it is like.

    Args:
        path: The checkpoint.
        name: A tensor, or else a slot, `table@slot`, or else a table.
        rows: How many of the first rows of a tensor or slot to keep.
        options: How to read.
        progress: Called on the event loop.

    Raises:
        KeyError: If there is no such name.
        CheckpointError: If there is no committed checkpoint, or it is unreadable.
        ReadError: If the storage failed.
    """
    async with open_session(path, options or ReadOptions()) as session:
        catalog = await session.catalog()
        meter = Meter(0, progress)
        if name in catalog.tensors:
            manifest = await session.manifest(catalog, [catalog.tensors[name].shard])
            stored = stored_tensor(manifest, name)
            meter.total = stored.nbytes
            return await _shown(session, manifest, stored, meter, kind="tensor", rows=rows)
        table, slot = find_table(session.location, catalog, name)
        parts = (part for slots in catalog.tables[table].values() for part in slots)
        manifest = await session.manifest(catalog, {part.place.shard for part in parts})
        if slot is None:
            return await _shown_table(session, manifest, table, meter)
        stored = stored_slot(manifest, table, slot)
        meter.total = stored.nbytes
        ids = await _first_ids(session, manifest, table, rows)
        return await _shown(session, manifest, stored, meter, kind="slot", rows=rows, ids=ids)


async def _shown(
    session: Session,
    manifest: Manifest,
    stored: Stored,
    meter: Meter,
    *,
    kind: Literal["tensor", "slot"],
    rows: int = 0,
    ids: Sequence[int] = (),
) -> ShownTensor:
    there = range(min(rows, stored.shape[0]) if stored.shape else 1)
    return ShownTensor(
        location=session.location,
        name=stored.name,
        kind=kind,
        dtype=stored.dtype.torch,
        shape=stored.shape,
        bytes=stored.nbytes,
        parts=len(stored.blocks),
        metadata=metadata_of(manifest, sorted({block.shard for block in stored.blocks})),
        statistics=await _statistics(session, stored, meter),
        rows=await read_rows(session, stored, there, ids=ids),
    )


async def _statistics(session: Session, stored: Stored, meter: Meter) -> Statistics | None:
    if not has_numbers(stored.dtype):
        return None
    dtype = torch_dtype(session.location, stored)

    def look(_number: int, _position: int, view: memoryview) -> Statistics | None:
        return measure(torch.frombuffer(view, dtype=dtype))

    found = await scan(
        session,
        stored.blocks,
        look,
        meter=meter,
        grain=dtype.itemsize,
        chunk_bytes=_PIECE,
    )
    measured = [part for part in found if part is not None]
    return combine(measured) if len(measured) == len(found) else None


async def _shown_table(
    session: Session, manifest: Manifest, table: str, meter: Meter
) -> ShownTable:
    slots = sorted(manifest.catalog.tables[table], key=lambda slot: slot != ID)
    stored = {slot: stored_slot(manifest, table, slot) for slot in slots}
    meter.total = sum(one.nbytes for one in stored.values())
    shown = [await _shown(session, manifest, one, meter, kind="slot") for one in stored.values()]
    return ShownTable(
        location=session.location,
        name=table,
        ids=stored[ID].shape[0] if ID in stored and stored[ID].shape else 0,
        bytes=meter.total,
        slots=tuple(shown),
    )


async def _first_ids(session: Session, manifest: Manifest, table: str, rows: int) -> Sequence[int]:
    if ID not in manifest.catalog.tables[table]:
        return []
    stored = stored_slot(manifest, table, ID)
    for block in stored.blocks:
        Problems(session.location).take(id_problems(stored.name, block))
    count = min(rows, math.prod(stored.shape))
    ids: list[int] = (await read_elements(session, stored, 0, count)).tolist()
    return ids
