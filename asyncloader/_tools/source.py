r"""Reads a checkpoint to convert, and decides which tensors of plain files are tables.

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
from asyncloader._saving.layout import WriteBlock, lay_out_shard
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError

from .content import (
    EMBEDDING,
    check_readable,
    check_room,
    check_tables,
    describe,
    free_memory,
    read_headers,
)
from .scanning import count_duplicates

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.index import Place
    from asyncloader._checkpoint.manifest import Manifest, Stored
    from asyncloader._loading.session import Session
    from asyncloader._saving.layout import ShardLayout

    from .content import Content


Tables: TypeAlias = dict[str, dict[str, tuple[Part, ...]]]

_METADATA = "asyncloader"
_FORMAT = 1
_IDS = "int64"


async def read_source(
    session: Session,
    slots: Collection[str] | None,
    tables: Collection[str] | None = None,
    *,
    to_file: bool = False,
) -> Content:
    """Read the content of a checkpoint; see `asyncloader.tools.convert`.

    With `to_file` it becomes a plain file, where tensors that look like a table may stay tensors.
    """
    manifest = await read_headers(session)
    recis = manifest.catalog.recis
    is_told = recis or _METADATA in _metadata_of(manifest)
    if tables is not None and is_told:
        problem = "says itself which of its tensors are tables: leave --tables out"
        raise CheckpointError(manifest.location, problem)
    as_it_is = is_told or (to_file and slots is None and tables is None)
    rows = {} if as_it_is else await _tables_of_names(session, manifest, tables)

    def decide() -> Content:
        known = manifest if recis else _recognized(manifest, rows)
        chosen = _with_slots(known, slots)
        check_tables(chosen)
        content = describe(session, chosen)
        check_readable(content)
        return content

    [content] = await run_jobs(session.threads.kernels, [decide])
    return content


async def _tables_of_names(
    session: Session, manifest: Manifest, wanted: Collection[str] | None
) -> dict[str, int]:
    """Return the tables of plain files, and how many ids they have; fail if one wanted is none."""
    likely = _likely_tables(manifest)
    unknown = sorted(set(wanted or ()) - likely.keys())
    if unknown:
        name = unknown[0]
        problem = f"{name!r} is no table: that takes {_key_of(name, ID)!r}, I64 [n], and "
        problem += f"{_key_of(name, EMBEDDING)!r} of as many rows"
        raise CheckpointError(manifest.location, problem)
    found = {}
    for name in likely if wanted is None else wanted:
        key = _key_of(name, ID)
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
            )
            raise CheckpointError(manifest.location, problem + "twice, and rows would be lost")
    return found


def _likely_tables(manifest: Manifest) -> dict[str, int]:
    """Return the names that may be tables, by names, dtypes and shapes, and the numbers of ids."""
    places = manifest.catalog.tensors
    blocks = {name: manifest.block(place) for name, place in places.items()}
    found = {}
    for key, block in blocks.items():
        table, dot, slot = key.rpartition(".")
        rows = blocks.get(_key_of(table, EMBEDDING))
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


def _key_of(table: str, slot: str) -> str:
    """Return the name under which a slot of a table stands in a plain file."""
    return f"{table}.{slot}"


def _describe_tables(content: Content) -> str:
    """Return the text that lets a plain file be turned back."""
    described = {
        name: {
            "slice_size": table.slice_size,
            "slots": {slot: _key_of(name, slot) for slot in (ID, *table.slots)},
        }
        for name, table in content.tables.items()
    }
    return orjson.dumps({"format": _FORMAT, "tables": described}).decode()


def _metadata_of(manifest: Manifest) -> Mapping[str, str]:
    """Return the free text of a single plain file's header."""
    header = manifest.catalog.headers.get(manifest.catalog.source)
    return {} if header is None else header.metadata


def _recognized(manifest: Manifest, rows: Mapping[str, int]) -> Manifest:
    """Return a manifest of plain files in which tables are tables.

    Where no header says it, `rows` are the tables that there are, and how many ids they have.
    """
    places = manifest.catalog.tensors
    text = _metadata_of(manifest).get(_METADATA)
    if text is not None:
        try:
            tables = _told(text, places)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"its __metadata__ {_METADATA!r} is damaged: {shown(error)}"
            raise CheckpointError(manifest.location, problem, manifest.catalog.source) from error
    else:
        tables = _of_names(manifest, rows)
    taken = {part.place for slots in tables.values() for (part,) in slots.values()}
    plain = Places.of({name: place for name, place in places.items() if place not in taken})
    return replace(manifest, catalog=replace(manifest.catalog, tensors=plain, tables=tables))


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


def lay_out(file: str, content: Content) -> tuple[ShardLayout, list[tuple[Block, int]]]:
    """Decide where each block goes in a plain file: tables first, the ids before the slots.

    Raises `ValueError` if two things would have the same name there.
    """
    stored: dict[str, Stored] = {}
    for key, one in _entries(content):
        if key == "__metadata__":
            raise ValueError(f"{one.name!r} would stand under {key!r}, which is no tensor's name")
        if key in stored:
            raise ValueError(
                f"{stored[key].name!r} and {one.name!r} would both stand under {key!r}; a plain "
                "file has no other name for them"
            )
        stored[key] = one
    blocks = {
        key: WriteBlock(
            name=key, table=None, slice=None, dtype=one.dtype, shape=one.shape, nbytes=one.nbytes
        )
        for key, one in stored.items()
    }
    # Without a "format" some readers of Hugging Face's refuse a file.
    metadata = {"format": "pt", **_metadata_of(content.manifest)}
    metadata.pop(_METADATA, None)
    if content.tables:
        metadata[_METADATA] = _describe_tables(content)
    layout = lay_out_shard(file, blocks, metadata)
    copies: list[tuple[Block, int]] = []
    end = len(layout.head)
    for placed in layout.blocks:
        at = placed.offset
        for block in stored[placed.block.name].blocks:
            assert at == end, "copies fill the file, and none writes over its neighbour"
            copies.append((block, at))
            at = end = at + block.nbytes
    assert end == layout.size, "copies fill the file"
    return layout, copies


def _entries(content: Content) -> Iterator[tuple[str, Stored]]:
    for name, table in content.tables.items():
        yield _key_of(name, ID), table.ids
        for slot, stored in table.slots.items():
            yield _key_of(name, slot), stored
    yield from content.tensors.items()
