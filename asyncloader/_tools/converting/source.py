"""What is converted: all of a checkpoint, tables told from tensors, checked to be whole."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.stored import stored_tensor
from asyncloader._loading.reading import read_stored
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.content import (
    EMBEDDING,
    Content,
    check_room,
    check_tables,
    describe,
    free_memory,
    read_headers,
)
from asyncloader._tools.duplicates import count_duplicates
from asyncloader.errors import CheckpointError

from .recognition import METADATA, key_of, likely_tables, metadata_of, recognized

if TYPE_CHECKING:
    from collections.abc import Collection

    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._loading.session import Session


async def read_source(
    session: Session,
    slots: Collection[str] | None,
    tables: Collection[str] | None = None,
    *,
    to_file: bool = False,
) -> Content:
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
    manifest = await read_headers(session)
    recis = manifest.catalog.recis
    is_told = recis or METADATA in metadata_of(manifest)
    if tables is not None and is_told:
        problem = "says itself which of its tensors are tables: leave --tables out"
        raise CheckpointError(manifest.location, problem)
    as_it_is = is_told or (to_file and slots is None and tables is None)
    rows = {} if as_it_is else await _tables_of_names(session, manifest, tables)

    def decide() -> Content:
        known = manifest if recis else recognized(manifest, rows)
        chosen = _with_slots(known, slots)
        check_tables(chosen)
        return describe(chosen)

    [content] = await run_jobs(session.threads.kernels, [decide])
    return content


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
            f"{key_of(name, EMBEDDING)!r} of as many rows"
        )
        raise CheckpointError(manifest.location, problem)
    found = {}
    for name in likely if wanted is None else wanted:
        key = key_of(name, ID)
        stored = stored_tensor(manifest, key)
        [free] = await run_jobs(session.threads.reads, [free_memory])
        what = f"{session.location}: {key!r}, to see whether an id stands twice,"
        check_room(what, stored.nbytes, free)
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
