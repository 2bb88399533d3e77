"""The tables and tensors of a checkpoint, by its names and headers. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from asyncloader._checkpoint.index import Places
from asyncloader._checkpoint.long_slots import split_name
from asyncloader._checkpoint.manifest import stored_tensor
from asyncloader._checkpoint.parts import ID, table_problems
from asyncloader._checkpoint.problems import Problems
from asyncloader._display import size_text
from asyncloader._memory import allowance
from asyncloader._planning.hints import did_you_mean
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.manifest import Manifest, Stored
    from asyncloader._loading.session import Session


EMBEDDING = "embedding"
ID_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTable:
    """A table on disk."""

    slice_size: int
    ranks: int  # that wrote it
    ids: Stored
    slots: Mapping[str, Stored]  # all but the ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """All that a checkpoint holds, which is open."""

    session: Session
    manifest: Manifest
    tables: Mapping[str, StoredTable]
    tensors: Mapping[str, Stored]

    @property
    def location(self) -> str:
        """The checkpoint, for messages."""
        return self.manifest.location

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name; a slot is `table@slot`."""
        tables = self.tables.values()
        slots = (one for table in tables for one in (table.ids, *table.slots.values()))
        return {one.name: one.nbytes for one in (*slots, *self.tensors.values())}


async def read_headers(session: Session, *, whole: bool = True) -> Manifest:
    """Read all names and headers; raise `CheckpointError` or `ReadError` if that fails.

    Without `whole`, a `model.pt` that cannot be read is an oddity of the rest.
    """
    catalog = await session.catalog(whole=whole)
    return await session.manifest(catalog, shards_of(catalog))


async def read_content(session: Session) -> Content:
    """Read all names and headers, and say what they describe; raise what `read_headers` does."""
    manifest = await read_headers(session)
    [content] = await run_jobs(session.threads.kernels, [lambda: describe(session, manifest)])
    return content


def describe(session: Session, manifest: Manifest) -> Content:
    """Return the content of a checkpoint of which all headers are known.

    Raises `CheckpointError` if a table has no ids, or blocks are of different kinds of rows.
    """
    catalog = manifest.catalog
    return Content(
        session=session,
        manifest=manifest,
        tables={name: _table(manifest, name) for name in catalog.tables},
        tensors={name: stored_tensor(manifest, name) for name in catalog.tensors},
    )


def check_tables(manifest: Manifest) -> None:
    """Raise `CheckpointError` if the parts of a table do not fit together, as a load does."""
    for name, slots in manifest.catalog.tables.items():
        blocks = {
            slot: {part.slice: manifest.block(part.place) for part in parts}
            for slot, parts in slots.items()
        }
        Problems(manifest.location).take(table_problems(name, slots, blocks))


def check_readable(content: Content) -> None:
    """Raise `CheckpointError` if there are tensors of a kind that is not read."""
    for name, tensor in content.tensors.items():
        if tensor.dtype.is_refused:
            block = tensor.blocks[0]
            problem = f"{name!r} is a {tensor.dtype}, which is not read: save it as a plain tensor"
            raise CheckpointError(content.session.location, problem, block.shard, block.key)


def _table(manifest: Manifest, name: str) -> StoredTable:
    parts = manifest.catalog.tables[name]
    if ID not in parts:
        Problems(manifest.location).take(table_problems(name, parts, {}))
    slots = {slot: stored_slot(manifest, name, slot) for slot in parts}
    slice_size = parts[ID][0].slice.size
    return StoredTable(slice_size=slice_size, ranks=len(parts[ID]), ids=slots.pop(ID), slots=slots)


def shards_of(catalog: Catalog) -> list[str]:
    """Return the names of all shard files, sorted."""
    parts = (part for slots in catalog.tables.values() for slot in slots.values() for part in slot)
    places = (*catalog.tensors.values(), *(part.place for part in parts))
    return sorted({place.shard for place in places})


def stored_slot(manifest: Manifest, table: str, slot: str) -> Stored:
    """Return the rows of a slot on disk, also where a dense tensor is called `table@slot`.

    Raises:
        CheckpointError: If its blocks do not fit together, or a shard lacks one.
    """
    tables_only = replace(manifest.catalog, tensors=Places({}, {}))
    return stored_tensor(replace(manifest, catalog=tables_only), f"{table}@{slot}")


def find_table(location: str, catalog: Catalog, name: str) -> tuple[str, str | None]:
    """Return the table, and the slot, of a name, or raise `KeyError`; a table alone has no slot."""
    table, slot = split_name(catalog.tables, name)
    if slot in catalog.tables.get(table, {}):
        return table, slot
    if name in catalog.tables:
        return name, None
    if name in catalog.tensors:
        raise KeyError(f"{location}: {name!r} is a dense tensor, it has no ids; a table has")
    hint = did_you_mean([name], [*catalog.tables, *catalog.names()])[name]
    raise KeyError(
        f"{location}: nothing in it is called {name!r}{hint}; `asyncloader inspect --all` lists "
        "what there is"
    )


def check_rows(location: str, stored: Stored) -> None:
    """Raise `CheckpointError` for rows that no table can hold."""
    if not stored.shape or 0 in stored.shape[1:]:
        problem = f"{stored.name!r} has the shape {list(stored.shape)}: these are no rows"
        raise CheckpointError(location, problem)


def check_room(what: str, nbytes: int, free: int | None) -> None:
    """Raise `MemoryError` if the bytes do not fit: the system says yes to all, and kills later."""
    if free is not None and nbytes > free:
        raise MemoryError(f"{what} takes {size_text(nbytes)}, {size_text(free)} are free")


def free_memory() -> int | None:
    """Return the bytes that this process can still get, swap included; `None` if unknown."""
    return allowance.free_memory(address_space=allowance.address_space())
