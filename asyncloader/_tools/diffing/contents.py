"""What each checkpoint holds, and what both do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._checkpoint.stored import stored_tensor
from asyncloader._planning.load_info import ID
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.allocation import shards_of, stored_slot
from asyncloader.errors import CheckpointError

from .difference import Kind, Names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTable:
    """A table on disk."""

    name: str
    slice_size: int
    ids: Stored
    slots: Mapping[str, Stored]
    """All but the ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """All of a checkpoint."""

    session: Session
    manifest: Manifest
    tables: Mapping[str, StoredTable]
    tensors: Mapping[str, Stored]


async def read_content(session: Session) -> Content:
    """Read names and headers.

    Raises:
        CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
        ReadError: If the storage failed.
    """
    catalog = await session.catalog()
    manifest = await session.manifest(catalog, shards_of(catalog))

    def describe() -> Content:
        return Content(
            session=session,
            manifest=manifest,
            tables={name: _table(manifest, name) for name in catalog.tables},
            tensors={name: stored_tensor(manifest, name) for name in catalog.tensors},
        )

    [content] = await run_jobs(session.threads.kernels, [describe])
    return content


def _table(manifest: Manifest, name: str) -> StoredTable:
    parts = manifest.catalog.tables[name]
    if ID not in parts:
        problem = f"table {name!r} has no ids: nobody can say whose its rows are"
        raise CheckpointError(manifest.location, problem)
    slots = {slot: stored_slot(manifest, name, slot) for slot in parts}
    return StoredTable(
        name=name, slice_size=parts[ID][0].slice.size, ids=slots.pop(ID), slots=slots
    )


def only_in(one: Content, other: Content) -> Names:
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


def row_kind(stored: Stored) -> Kind:
    """Return the kind of a slot's rows."""
    return Kind(dtype=stored.dtype.torch, shape=stored.shape[1:])
