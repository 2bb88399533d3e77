r"""Which tensors of plain safetensors files are tables.

A file that was made of a checkpoint says so itself, in its header:

    {"__metadata__": {"asyncloader": "{\"format\": 1, \"tables\": {table: {
        "slice_size": 65536, "slots": {"id": key, "embedding": key}}}}"}}

Of others, `X.id` (I64 `[n]`) and `X.embedding` (`[n, …]`) may be the table `X`, with all further
`X.…` of n rows. The longest X counts. If an id stands there twice, they are not: a table would lose
a row.
"""

from __future__ import annotations

from dataclasses import replace
from reprlib import repr as shown  # shortens
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson

from asyncloader._checkpoint.index import Part, Places
from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.slices import DEFAULT_SLICE_SIZE, Slice
from asyncloader._tools.content import EMBEDDING
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.index import Place
    from asyncloader._checkpoint.manifest import Manifest


Tables: TypeAlias = dict[str, dict[str, tuple[Part, ...]]]

METADATA = "asyncloader"
_FORMAT = 1
_IDS = "int64"


def key_of(table: str, slot: str) -> str:
    """Return the name under which a slot of a table stands in a plain file."""
    return f"{table}.{slot}"


def describe_tables(tables: Mapping[str, tuple[int, Iterable[str]]]) -> str:
    """Return the text that lets a plain file be turned back.

    Args:
        tables: Slice size and slots, by table.
    """
    described = {
        name: {"slice_size": size, "slots": {slot: key_of(name, slot) for slot in slots}}
        for name, (size, slots) in tables.items()
    }
    return orjson.dumps({"format": _FORMAT, "tables": described}).decode()


def likely_tables(manifest: Manifest) -> dict[str, int]:
    """Return what may be tables, going by names, dtypes and shapes, and how many ids they have."""
    places = manifest.catalog.tensors
    return dict(_tables_among({name: manifest.block(place) for name, place in places.items()}))


def metadata_of(manifest: Manifest) -> Mapping[str, str]:
    """Return what a single plain file says of itself besides."""
    header = manifest.catalog.header
    return {} if header is None else header.metadata


def recognized(manifest: Manifest, rows: Mapping[str, int]) -> Manifest:
    """Return a manifest in which tables are tables.

    Args:
        manifest: Of plain safetensors files, with all headers.
        rows: Where no header says it, the tables that there are, and how many ids they have.

    Raises:
        CheckpointError: If the metadata is damaged, or does not fit.
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
    places = manifest.catalog.tensors
    blocks = {name: manifest.block(place) for name, place in places.items()}
    whole = Slice(0, DEFAULT_SLICE_SIZE, DEFAULT_SLICE_SIZE)
    tables: Tables = {table: {} for table in rows}
    for key, block in blocks.items():
        owner = _owner(key, rows)
        if owner is not None and block.shape[:1] == (rows[owner],):
            tables[owner][key[len(owner) + 1 :]] = (Part(whole, places[key]),)
    return tables


def _tables_among(blocks: Mapping[str, Block]) -> Iterator[tuple[str, int]]:
    """Yield names of tables, and how many ids they have."""
    for key, block in blocks.items():
        table, dot, slot = key.rpartition(".")
        rows = blocks.get(key_of(table, EMBEDDING))
        are_ids = slot == ID and block.dtype.torch == _IDS and len(block.shape) == 1
        if dot and are_ids and rows is not None and rows.shape[:1] == block.shape:
            yield table, block.rows


def _owner(key: str, tables: Mapping[str, int]) -> str | None:
    """Return the table with the longest name whose slot this may be."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) >= 0:
        if key[:end] in tables:
            return None if "@" in key[end + 1 :] else key[:end]
    return None
