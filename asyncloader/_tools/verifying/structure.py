"""Looks at all of a checkpoint but its bytes: names, headers, tables, and what the sidecar says.

The rules are those of a load. Only what no load looks at is looked for here: what is there and is
never read, and what loads, but cannot be what was meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.catalog import CatalogReader, find_source, is_recis
from asyncloader._checkpoint.files import DESCRIPTION, INDEX, SIDECAR, TENSORKEY
from asyncloader._checkpoint.index import Catalog, Places
from asyncloader._checkpoint.manifest import Manifest, read_manifest
from asyncloader._checkpoint.parts import (
    ID,
    id_problems,
    overlaps,
    spread_problems,
    table_problems,
)
from asyncloader._checkpoint.safetensors import is_weight_map
from asyncloader._checkpoint.sidecar import check_file
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.header import ShardHeader
    from asyncloader._checkpoint.index import Part, Place
    from asyncloader._checkpoint.problems import AllProblems
    from asyncloader._checkpoint.sidecar import PartRows, Sidecar
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._storage.protocol import Storage


_SHARD = re.compile(r".+\.safetensors")
_PART = re.compile(r".+/part_[0-9]+_[0-9]+", re.DOTALL)
# A load reads no description, so no load bounds it.
_DESCRIPTION_MOST = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class TableIds:
    """The ids of one table, as far as they are sound."""

    table: str
    parts: Mapping[Slice, Block]
    """By the slice that the block claims, in order."""

    told: Mapping[Slice, PartRows]
    """How rows are spread, of parts of which the sidecar says as many rows as there are."""

    @property
    def rows(self) -> int:
        """How many ids there are."""
        return sum(block.rows for block in self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What a checkpoint holds, as far as it is sound."""

    kind: str
    """`RecIS checkpoint`, `safetensors file` or `Hugging Face folder`."""

    headers: Mapping[str, ShardHeader]
    tensors: int
    tables: tuple[TableIds, ...]
    files: int
    """How many were read."""


async def read_structure(
    storage: Storage,
    problems: AllProblems,
    *,
    file: str | None,
    there: frozenset[str],
    executor: Executor,
    parallel: int,
) -> Structure:
    """Read names and headers, and check that all fits together.

    Args:
        storage: The folder.
        problems: Receives what is wrong or odd.
        file: The one file to look at, instead of the folder that holds it.
        there: The names of all files.
        executor: For parsing.
        parallel: How many headers are read at a time.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointChangedError: If it was replaced meanwhile.
    """

    async def names() -> list[str]:
        return sorted(there)

    source = await find_source(storage, file, names)
    recis = is_recis(source, file)
    reader = CatalogReader(storage, executor, problems)
    catalog, files = Catalog(Places({}, {}), {}, source, recis=recis), set[str]()
    if recis or is_weight_map(source):  # whether or not anything names them
        files = {name for name in there if _SHARD.fullmatch(name)}
    known = False
    with problems.caught():
        catalog = await reader.read(source, recis=recis, digests=True)
        known = True
    for name in files - set(catalog.files) if known else ():
        text = (
            f"{source} does not name this file, so nobody reads it; left behind by an older save?"
        )
        problems.note(text, name)
    if DESCRIPTION in there and catalog.sidecar is not None:
        with problems.caught():
            described = await reader.text(DESCRIPTION, _DESCRIPTION_MOST)
            check = partial(check_file, problems, catalog.sidecar, DESCRIPTION, described)
            await run_jobs(executor, [check])
    manifest = await read_manifest(
        storage,
        catalog,
        sorted(catalog.files if known else files),
        parallel=parallel,
        executor=executor,
        problems=problems,
    )
    tables: tuple[TableIds, ...] = ()
    if known:
        [tables] = await run_jobs(executor, [_Check(manifest, problems).run])
    others = {INDEX, TENSORKEY, SIDECAR, DESCRIPTION} & there if recis else {source} - set(files)
    return Structure(
        kind=_kind(source, recis=recis),
        headers=manifest.headers,
        tensors=len(catalog.tensors),
        tables=tables,
        files=len(manifest.headers.keys() | others),
    )


def _kind(source: str, *, recis: bool) -> str:
    if recis:
        return "RecIS checkpoint"
    return "Hugging Face folder" if is_weight_map(source) else "safetensors file"


@dataclass(slots=True)
class _Check:
    """Compares names, headers and the sidecar."""

    manifest: Manifest
    problems: AllProblems
    unnamed: set[tuple[str, str]] = field(default_factory=set)
    """Blocks that no name has led to yet: file and key."""

    def run(self) -> tuple[TableIds, ...]:
        catalog, headers = self.manifest.catalog, self.manifest.headers
        for odd in self.manifest.oddities:
            self.problems.note(odd.text, odd.file, odd.key)
        self.unnamed = {(file, key) for file, header in headers.items() for key in header.blocks}
        for file, header in headers.items():
            self._note_strange_dtypes(file, header)
        for place in catalog.tensors.values():
            self._look_for_part(place)
            self._block(place)
        told: Mapping[str, tuple[PartRows, ...]] | None = None
        if catalog.sidecar is None:
            self.problems.note("no digests: bytes cannot be verified, only the structure")
        else:
            self._check_digests(catalog.sidecar)
            with self.problems.caught():
                told = catalog.sidecar.all_spread(self.manifest.location)
        tables = tuple(
            self._table(table, slots, None if told is None else told.get(table, ()))
            for table, slots in catalog.tables.items()
        )
        for table in (told or {}).keys() - catalog.tables.keys():
            self.problems.add(f"tells of this table, which {INDEX} does not name", SIDECAR, table)
        for file, key in self.unnamed:
            if not self.problems.blames(INDEX, key) and not self.problems.blames(TENSORKEY, key):
                text = (
                    f"stands in the shard, but {catalog.source} does not name it: nobody reads it"
                )
                self.problems.add(text, file, key)
        return tables

    def _note_strange_dtypes(self, file: str, header: ShardHeader) -> None:
        if all(dtype.itemsize is not None for dtype, _ in header.blocks.types):
            return
        for block in header.blocks.values():
            if block.dtype.itemsize is None:
                text = f"is {block.dtype.name}, which torch does not have, so it cannot be loaded"
                self.problems.note(text, file, block.key)

    def _look_for_part(self, place: Place) -> None:
        """Tell of a part of a table that is taken for a tensor, whose key would end in `^ `."""
        if self.manifest.catalog.recis and _PART.fullmatch(place.key):
            text = (
                f"looks like a rank's part of a table, but {TENSORKEY} does not say of which, so "
                "it is taken for a dense tensor"
            )
            if not self.problems.blames(TENSORKEY):
                self.problems.add(text, INDEX, place.key)

    def _block(self, place: Place) -> Block | None:
        """Return the block at a place, unless it is known to be no good."""
        if place.shard not in self.manifest.headers:
            return None
        try:
            block = self.manifest.block(place)
        except CheckpointError as error:
            keys = {place.key, place.key.removesuffix("^ ")}
            if not any(self.problems.blames(place.shard, key) for key in keys):
                self.problems.error(error)
            return None
        self.unnamed.discard((block.shard, block.key))
        return block

    def _check_digests(self, sidecar: Sidecar) -> None:
        """Tell of digests of what is not there."""
        for file in sidecar.shards.keys() - set(self.manifest.catalog.files):
            text = f"has digests of {file!r}, which {INDEX} does not name"
            self.problems.add(text, SIDECAR)
        for file, header in self.manifest.headers.items():
            digests = sidecar.shards.get(file)
            for key in digests.blocks.keys() - header.blocks.keys() if digests else ():
                if not self.problems.blames(file, key):
                    text = f"has digests of this block, which {file!r} does not have"
                    self.problems.add(text, SIDECAR, key)

    def _table(
        self,
        table: str,
        slots: Mapping[str, tuple[Part, ...]],
        told: tuple[PartRows, ...] | None,
    ) -> TableIds:
        """Check a table; `told` is what the sidecar says of it, or `None` if it says nothing."""
        blocks: dict[str, dict[Slice, Block]] = {slot: {} for slot in slots}
        for slot, parts in slots.items():
            for part in parts:
                block = self._block(part.place)
                if block is not None:
                    blocks[slot].setdefault(part.slice, block)
                if block is not None and 0 in block.shape[1:]:
                    text = f"{table}@{slot}: has the shape {list(block.shape)}, which are no rows"
                    self.problems.add(f"{text} of anything", block.shard, block.key)
        self.problems.take(table_problems(table, slots, blocks))
        claims = {part.slice for part in slots.get(ID, ())}
        if len({claim.size for claim in claims}) == 1:
            for one, other in overlaps(claims):
                text = f"positions [{other.begin}, {min(one.end, other.end)}) lie in several slices"
                self.problems.add(text, None, table)
        ids = {
            where: block
            for where, block in blocks.get(ID, {}).items()
            if not any(id_problems(table, block))
        }
        agreed = {} if told is None else self._agreed(table, ids, claims, told)
        return TableIds(table=table, parts=ids, told=agreed)

    def _agreed(
        self,
        table: str,
        ids: Mapping[Slice, Block],
        claims: set[Slice],
        told: tuple[PartRows, ...],
    ) -> dict[Slice, PartRows]:
        """Return what the sidecar says of parts as they are."""
        known = {part.slice: part for part in told}
        for where in known.keys() - claims:
            text = f"tells of a part {where} of this table, which {INDEX} does not name"
            self.problems.add(text, SIDECAR, table)
        for where in claims - known.keys():
            self.problems.add(f"does not tell of its part {where}", SIDECAR, table)
        agreed = {}
        for where in known.keys() & ids.keys():
            wrong = list(spread_problems(known[where], ids[where]))
            self.problems.take(wrong)
            if not wrong:
                agreed[where] = known[where]
        return agreed
