r"""What is converted: all of a checkpoint, and which tensors of plain files are tables.

A file that was made of a checkpoint says so itself, in its header:

    {"__metadata__": {"asyncloader": "{\"format\": 1, \"tables\": {table: {
        "slice_size": 65536, "slots": {"id": key, "embedding": key}}}}"}}

Of others, `X.id` (I64 `[n]`) and `X.embedding` (`[n, …]`) may be the table `X`, with all further
`X.…` of n rows. The longest X counts. If an id stands there twice, they are not: a table would lose
a row.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from reprlib import repr as shown  # shortens
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson

from asyncloader._checkpoint.index import Part, Places
from asyncloader._checkpoint.manifest import stored_tensor
from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.slices import DEFAULT_SLICE_SIZE, Slice
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
from asyncloader._tools.verifying.ids import count_duplicates
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from asyncloader._checkpoint.index import Place
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._loading.session import Session


Tables: TypeAlias = dict[str, dict[str, tuple[Part, ...]]]

METADATA = "asyncloader"
_FORMAT = 1
_IDS = "int64"


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
        known = manifest if recis else _recognized(manifest, rows)
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
    likely = _likely_tables(manifest)
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


def _likely_tables(manifest: Manifest) -> dict[str, int]:
    """Return what may be tables, going by names, dtypes and shapes, and how many ids they have."""
    places = manifest.catalog.tensors
    blocks = {name: manifest.block(place) for name, place in places.items()}
    found = {}
    for key, block in blocks.items():
        table, dot, slot = key.rpartition(".")
        rows = blocks.get(key_of(table, EMBEDDING))
        are_ids = slot == ID and block.dtype.torch == _IDS and len(block.shape) == 1
        if dot and are_ids and rows is not None and rows.shape[:1] == block.shape:
            found[table] = block.rows
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


def key_of(table: str, slot: str) -> str:
    """Return the name under which a slot of a table stands in a plain file."""
    return f"{table}.{slot}"


def describe_tables(content: Content) -> str:
    """Return the text that lets a plain file be turned back."""
    described = {
        name: {
            "slice_size": table.slice_size,
            "slots": {slot: key_of(name, slot) for slot in (ID, *table.slots)},
        }
        for name, table in content.tables.items()
    }
    return orjson.dumps({"format": _FORMAT, "tables": described}).decode()


def metadata_of(manifest: Manifest) -> Mapping[str, str]:
    """Return what a single plain file says of itself besides."""
    header = manifest.catalog.header
    return {} if header is None else header.metadata


def _recognized(manifest: Manifest, rows: Mapping[str, int]) -> Manifest:
    """Return a manifest in which tables are tables.

    Args:
        manifest: Of plain safetensors files.
        rows: Where no header says it, the tables that there are, and how many ids they have.
    """
    text = metadata_of(manifest).get(METADATA)
    if text is not None:
        try:
            tables = _told(text, manifest.catalog.tensors)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"its __metadata__ {METADATA!r} is damaged: {shown(error)}"
            raise CheckpointError(manifest.location, problem, manifest.catalog.source) from error
    else:
        tables = _of_names(manifest, rows)
    taken = {part.place for slots in tables.values() for (part,) in slots.values()}
    plain = {name: p for name, p in manifest.catalog.tensors.items() if p not in taken}
    return replace(
        manifest, catalog=replace(manifest.catalog, tensors=Places.of(plain), tables=tables)
    )


def _told(text: str, places: Mapping[str, Place]) -> Tables:
    value: Any = orjson.loads(text)
    if value["format"] != _FORMAT:
        raise ValueError(f"its format is {shown(value['format'])}, {_FORMAT} is known")
    tables: Tables = {}
    for name, table in value["tables"].items():
        whole = Slice(0, table["slice_size"], table["slice_size"])
        odd = [slot for slot in table["slots"] if "@" in slot or not slot]
        if odd or ID not in table["slots"]:
            raise ValueError(f"table {shown(name)} has odd slots: {shown(table['slots'])}")
        tables[name] = {slot: (Part(whole, places[key]),) for slot, key in table["slots"].items()}
    return tables


def _of_names(manifest: Manifest, rows: Mapping[str, int]) -> Tables:
    whole = Slice(0, DEFAULT_SLICE_SIZE, DEFAULT_SLICE_SIZE)
    tables: Tables = {table: {} for table in rows}
    for key, place in manifest.catalog.tensors.items():
        owner = _owner(key, rows)
        if owner is not None and manifest.block(place).shape[:1] == (rows[owner],):
            tables[owner][key[len(owner) + 1 :]] = (Part(whole, place),)
    return tables


def _owner(key: str, tables: Mapping[str, int]) -> str | None:
    """Return the table with the longest name whose slot this may be."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) >= 0:
        if key[:end] in tables:
            return None if "@" in key[end + 1 :] else key[:end]
    return None
