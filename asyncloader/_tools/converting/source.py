"""What is converted: all names and headers of it, tables told from tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.parts import ID, table_problems
from asyncloader._checkpoint.problems import Problems
from asyncloader._checkpoint.stored import stored_tensor
from asyncloader._loading.reading import read_stored
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.allocation import shards_of, stored_slot
from asyncloader._tools.duplicates import count_duplicates
from asyncloader._tools.room import check_room, free_memory
from asyncloader.errors import CheckpointError

from .recognition import METADATA, key_of, likely_tables, recognized

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTable:
    """A table on disk."""

    name: str
    slice_size: int
    ranks: int
    """How many wrote it."""

    ids: Stored
    slots: Mapping[str, Stored]
    """All but the ids."""

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(one.nbytes for one in (self.ids, *self.slots.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """All that there is to convert."""

    manifest: Manifest
    metadata: Mapping[str, str]
    """What a plain file says besides."""

    tables: tuple[StoredTable, ...]
    tensors: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        dense = sum(stored.nbytes for stored in self.tensors)
        return dense + sum(table.nbytes for table in self.tables)


async def read_source(
    session: Session,
    slots: Collection[str] | None,
    tables: Collection[str] | None = None,
    *,
    to_file: bool = False,
) -> Source:
    """Read what a checkpoint holds.

    Args:
        session: It.
        slots: The slots to keep besides the ids; all if `None`.
        tables: What of plain files are tables; if `None`, what looks like one and has each id once.
        to_file: Whether it becomes a plain file, where what looks like a table may stay as it is.

    Raises:
        MemoryError: If the ids of what looks like a table do not fit.
        CheckpointError: If it is missing, unreadable, or contradicts itself; if no table has one of
            the slots.
        ReadError: If the storage failed.
    """
    catalog = await session.catalog()
    manifest = await session.manifest(catalog, shards_of(catalog))
    metadata = {} if catalog.header is None else catalog.header.metadata

    is_told = catalog.recis or METADATA in metadata
    if tables is not None and is_told:
        problem = "says itself which of its tensors are tables: leave --tables out"
        raise CheckpointError(manifest.location, problem)
    as_it_is = is_told or (to_file and slots is None and tables is None)
    rows = {} if as_it_is else await _tables_of_names(session, manifest, tables)

    def describe() -> Source:
        known = manifest if catalog.recis else recognized(manifest, metadata, rows)
        return _describe(_with_slots(known, slots), metadata)

    [source] = await run_jobs(session.threads.kernels, [describe])
    return source


async def _tables_of_names(
    session: Session, manifest: Manifest, wanted: Collection[str] | None
) -> dict[str, int]:
    """Return the tables of plain files, and how many ids they have.

    Raises:
        CheckpointError: If one that is wanted is none.
        MemoryError: If the ids of one do not fit.
    """
    likely = likely_tables(manifest)
    unknown = sorted(set(wanted or ()) - likely.keys())
    if unknown:
        name = unknown[0]
        problem = (
            f"{name!r} is no table: that takes {key_of(name, ID)!r}, I64 [n], and "
            f"{key_of(name, 'embedding')!r} of as many rows"
        )
        raise CheckpointError(manifest.location, problem)
    found = {}
    for name in likely if wanted is None else wanted:
        key = key_of(name, ID)
        stored = stored_tensor(manifest, key)
        [free] = await run_jobs(session.threads.reads, [free_memory])
        check_room(
            f"{session.location}: {key!r}, to see whether an id stands twice,", stored.nbytes, free
        )
        ids = (await read_stored(session, [stored]))[key].numpy()
        [(again, _)] = await run_jobs(session.threads.kernels, [partial(count_duplicates, ids)])
        if not again:
            found[name] = likely[name]
        elif wanted is not None:
            problem = (
                f"{name!r} is no table: of the {len(ids)} ids in {key!r}, {again} stand there "
                "twice, and rows would be lost"
            )
            raise CheckpointError(manifest.location, problem)
    return found


def _with_slots(manifest: Manifest, wanted: Collection[str] | None) -> Manifest:
    if wanted is None:
        return manifest
    tables = manifest.catalog.tables
    known = {slot for slots in tables.values() for slot in slots} - {ID}
    unknown = sorted(set(wanted) - known - {ID})
    if unknown:
        there = ", ".join(map(repr, sorted(known))) or "none"
        problem = f"no table has the slot {unknown[0]!r}; the slots are {there}"
        raise CheckpointError(manifest.location, problem)
    kept = {
        name: {slot: parts for slot, parts in slots.items() if slot in {ID, *wanted}}
        for name, slots in tables.items()
    }
    return replace(manifest, catalog=replace(manifest.catalog, tables=kept))


def _describe(manifest: Manifest, metadata: Mapping[str, str]) -> Source:
    catalog = manifest.catalog
    return Source(
        manifest=manifest,
        metadata=metadata,
        tables=tuple(_table(manifest, name) for name in catalog.tables),
        tensors=tuple(stored_tensor(manifest, name) for name in catalog.tensors),
    )


def _table(manifest: Manifest, name: str) -> StoredTable:
    parts = manifest.catalog.tables[name]
    blocks = {
        slot: {part.slice: manifest.block(part.place) for part in of_slot}
        for slot, of_slot in parts.items()
    }
    Problems(manifest.location).take(table_problems(name, parts, blocks))
    stored = {slot: stored_slot(manifest, name, slot) for slot in parts}
    return StoredTable(
        name=name,
        slice_size=parts[ID][0].slice.size,
        ranks=len(parts[ID]),
        ids=stored.pop(ID),
        slots=stored,
    )
