"""Reads one tensor, the slots of a table, or the rows of an id, and describes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from asyncloader._checkpoint.manifest import Stored, stored_tensor
from asyncloader._checkpoint.parts import ID, id_problems, without_rows
from asyncloader._checkpoint.problems import Problems
from asyncloader._loading.opening import open_session
from asyncloader._loading.progress import Meter
from asyncloader._loading.reading import has_numbers, torch_dtype
from asyncloader.errors import CheckpointError

from .content import ID_BYTES, find_table, stored_slot
from .inspecting import metadata_of
from .scanning import scan
from .values import Row, combine, measure, read_elements, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader.options import ReadOptions

    from .values import Statistics


# Larger pieces take more memory to compute statistics, and no less time.
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
    parts: int  # pieces that different ranks wrote
    metadata: Mapping[str, Mapping[str, str]]  # `__metadata__` of its files' headers, by file
    statistics: Statistics | None  # `None` if it is complex, or of a dtype without numbers
    rows: tuple[Row, ...]  # the first ones


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTable:
    """A table."""

    location: str
    name: str
    kind: Literal["table"] = "table"
    ids: int
    bytes: int
    slots: tuple[ShownTensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSlot:
    """The row of an id in one slot."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # of the row
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundId:
    """An id of a table, or that it is not there."""

    location: str
    table: str
    id: int
    found: int  # how many times: the last one counts
    part: str | None  # the slice, `begin@end@size`, of the part that holds it
    slots: tuple[FoundSlot, ...]


async def look_at(
    path: str,
    name: str,
    *,
    rows: int,
    options: ReadOptions,
    progress: Callable[[Progress], object] | None,
) -> ShownTable | ShownTensor:
    """Read a tensor, or else a slot, `table@slot`, or else a table, and describe its values.

    Of a tensor or slot the first `rows` rows are kept. Raises `KeyError` if there is no such name.
    """
    async with open_session(path, options) as session:
        catalog = await session.catalog()
        meter = Meter(0, progress)
        if name in catalog.tensors:
            manifest = await session.manifest(catalog, [catalog.tensors[name].shard])
            show, stored = _Showing(session, manifest, meter), stored_tensor(manifest, name)
            meter.total = stored.nbytes
            return await show.tensor(stored, "tensor", rows=rows)
        table, slot = find_table(session.location, catalog, name)
        parts = (part for slots in catalog.tables[table].values() for part in slots)
        manifest = await session.manifest(catalog, {part.place.shard for part in parts})
        show = _Showing(session, manifest, meter)
        if slot is None:
            return await show.table(table)
        stored = stored_slot(manifest, table, slot)
        meter.total = stored.nbytes
        return await show.tensor(stored, "slot", rows=rows, ids=await show.ids(table, rows))


@dataclass(frozen=True, slots=True)
class _Showing:
    session: Session
    manifest: Manifest
    meter: Meter

    async def tensor(
        self,
        stored: Stored,
        kind: Literal["tensor", "slot"],
        *,
        rows: int = 0,
        ids: Sequence[int] = (),
    ) -> ShownTensor:
        there = range(min(rows, stored.shape[0]) if stored.shape else 1)
        shards = sorted({block.shard for block in stored.blocks})
        return ShownTensor(
            location=self.session.location,
            name=stored.name,
            kind=kind,
            dtype=stored.dtype.torch,
            shape=stored.shape,
            bytes=stored.nbytes,
            parts=len(stored.blocks),
            metadata=metadata_of(self.manifest, shards),
            statistics=await self._statistics(stored),
            rows=await read_rows(self.session, stored, there, ids=ids),
        )

    async def _statistics(self, stored: Stored) -> Statistics | None:
        if not has_numbers(stored.dtype):
            return None
        dtype = torch_dtype(self.session.location, stored)
        if dtype.is_complex:  # complex numbers have no order
            return None

        def look(_number: int, _position: int, view: memoryview) -> Statistics:
            return measure(torch.frombuffer(view, dtype=dtype))

        blocks, meter = stored.blocks, self.meter
        found = await scan(self.session, blocks, look, meter=meter, chunk_bytes=_PIECE)
        return combine(found)

    async def table(self, table: str) -> ShownTable:
        slots = sorted(self.manifest.catalog.tables[table], key=lambda slot: slot != ID)
        stored = {slot: stored_slot(self.manifest, table, slot) for slot in slots}
        self.meter.total = sum(one.nbytes for one in stored.values())
        return ShownTable(
            location=self.session.location,
            name=table,
            ids=stored[ID].shape[0] if ID in stored and stored[ID].shape else 0,
            bytes=self.meter.total,
            slots=tuple([await self.tensor(one, "slot") for one in stored.values()]),
        )

    async def ids(self, table: str, most: int) -> Sequence[int]:
        """Return the first ids of a table, which may have none."""
        if ID not in self.manifest.catalog.tables[table]:
            return []
        stored = stored_slot(self.manifest, table, ID)
        for block in stored.blocks:
            Problems(self.session.location).take(id_problems(stored.name, block))
        end = min(most, math.prod(stored.shape))
        ids: list[int] = (await read_elements(self.session, stored, 0, end)).tolist()
        return ids


async def look_for(
    path: str,
    name: str,
    id_: int,
    *,
    options: ReadOptions,
    progress: Callable[[Progress], object] | None,
) -> FoundId:
    """Look through the ids of the parts that may hold one, then read its row of each slot.

    `name` is a table, or a slot, `table@slot`, which alone is read; the id is as it stands on disk.
    Raises `KeyError` if there is no such name.
    """
    async with open_session(path, options) as session:
        catalog = await session.catalog()
        table, only = find_table(session.location, catalog, name)
        slots = catalog.tables[table]
        if ID not in slots:
            raise CheckpointError(session.location, f"table {table!r} has no ids")
        names = [slot for slot in slots if slot != ID and only in {None, slot}]
        parts = [part for part in slots[ID] if part.slice.accepts(id_)]
        read = [*parts, *(part for slot in names for part in slots[slot])]
        manifest = await session.manifest(catalog, sorted({part.place.shard for part in read}))
        blocks = [manifest.block(part.place) for part in parts]
        hits = await _hits(session, blocks, id_, Meter(0, progress))
        part, found = None, []
        if hits:
            number, row = hits[-1]
            part = parts[number]
            for slot in names:
                Problems(session.location).take(without_rows(table, slot, [part], slots[slot]))
                other = next(one for one in slots[slot] if one.slice == part.slice)
                block = manifest.block(other.place)
                found.append(await _slot(session, block, slot, id_=id_, number=row))
    return FoundId(
        location=session.location,
        table=table,
        id=id_,
        found=len(hits),
        part=None if part is None else str(part.slice),
        slots=tuple(found),
    )


async def _hits(
    session: Session, blocks: Sequence[Block], id_: int, meter: Meter
) -> list[tuple[int, int]]:
    """Return in which rows of which blocks an id stands."""
    for block in blocks:
        Problems(session.location).take(id_problems(block.key, block))
    meter.total = sum(block.nbytes for block in blocks)

    def look(number: int, position: int, view: memoryview) -> list[tuple[int, int]]:
        rows = np.flatnonzero(np.frombuffer(view, np.int64) == id_) + position // ID_BYTES
        return [(number, row) for row in rows.tolist()]

    found = await scan(session, blocks, look, meter=meter)
    return [hit for piece in found for hit in piece]


async def _slot(session: Session, block: Block, name: str, *, id_: int, number: int) -> FoundSlot:
    stored = Stored(name=name, dtype=block.dtype, shape=block.shape, blocks=(block,))
    shape = stored.shape[1:]
    rows = await read_rows(session, stored, range(number, number + 1), ids=[id_])
    unread = Row(number=number, id=id_, values=(), omitted=math.prod(shape))
    dtype = stored.dtype.torch
    return FoundSlot(name=name, dtype=dtype, shape=shape, row=rows[0] if rows else unread)
