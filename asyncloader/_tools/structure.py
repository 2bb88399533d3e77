"""Looks at a checkpoint without its bytes: names, headers, tables, sidecar. Needs no torch.

The rules are those of a load. The rules here are about things that no load looks at: data that no
load reads, and tables that load, but not as they were saved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.catalog import (
    find_source,
    is_recis,
    is_weight_map,
    read_file,
    read_texts,
)
from asyncloader._checkpoint.format import DESCRIPTION, INDEX, SIDECAR, TENSORKEY
from asyncloader._checkpoint.index import Catalog, Places
from asyncloader._checkpoint.manifest import read_manifest
from asyncloader._checkpoint.parts import ID, id_problems, overlaps, spread_problems, table_problems
from asyncloader._checkpoint.sidecar import check_file
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.header import ShardHeader
    from asyncloader._checkpoint.index import Part, Place
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._checkpoint.problems import AllProblems
    from asyncloader._checkpoint.sidecar import PartRows
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._storage.unpacking import UnpackingStorage


_SHARD = re.compile(r".+\.safetensors")
_PART = re.compile(r".+/part_[0-9]+_[0-9]+", re.DOTALL)
_DESCRIPTION_MOST = 1 << 30  # no load reads it, so none bounds it


@dataclass(frozen=True, slots=True)
class TableIds:
    """The ids of one table, as far as they are sound."""

    table: str
    parts: Mapping[Slice, Block]  # by the slice that the block claims, in order
    # How the rows of a part are spread, where the sidecar says as many rows as there are.
    told: Mapping[Slice, PartRows]

    @property
    def rows(self) -> int:
        """How many ids there are."""
        return sum(block.rows for block in self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A checkpoint, as far as it is sound."""

    kind: str
    headers: Mapping[str, ShardHeader]
    tensors: int
    tables: list[TableIds]
    files: int  # that there are to read


async def read_structure(
    storage: UnpackingStorage,
    problems: AllProblems,
    *,
    file: str | None,
    there: frozenset[str],
    executor: Executor,
    parallel: int,
) -> Structure:
    """Read names and headers, and check that all fits together; tell of all problems and oddities.

    `there` are the names of all files in the folder; `file` is the one to look at, unless all are.
    Raises `CheckpointNotFoundError` and `CheckpointChangedError`.
    """

    async def names() -> list[str]:
        return sorted(there)

    source = await find_source(storage, file, names)
    recis, is_map = is_recis(source, file), is_weight_map(source)
    shards = sorted(filter(_SHARD.fullmatch, there)) if recis or is_map else []
    # If no file says which names there are, each shard is looked at by itself.
    catalog, known = Catalog(Places({}, {}), {}, source, tuple(shards), recis=recis), False
    with problems.caught():
        parse = await read_texts(
            storage, source, problems, executor=executor, recis=recis, digests=True
        )
        [catalog] = await run_jobs(executor, [undisturbed(parse)])
        known = True
    if DESCRIPTION in there and catalog.sidecar is not None:
        with problems.caught():
            text = await read_file(storage, DESCRIPTION, _DESCRIPTION_MOST)
            check = partial(check_file, problems, catalog.sidecar, DESCRIPTION, text)
            await run_jobs(executor, [check])
    for name in set(shards) - set(catalog.files):
        odd = "does not name this file, so no load reads it; left behind by an older save?"
        problems.note(f"{source} {odd}", name)
    manifest = await read_manifest(
        storage, catalog, catalog.files, parallel=parallel, executor=executor, problems=problems
    )
    for shard, header in manifest.headers.items():
        storage.unpack(shard, header.packed)
    [tables] = await run_jobs(executor, [partial(_check, manifest, problems, known=known)])
    others = {INDEX, TENSORKEY, SIDECAR, DESCRIPTION} & there if recis else {source}
    kind = "RecIS checkpoint" if recis else "Hugging Face folder" if is_map else "safetensors file"
    if any(header.archive for header in manifest.headers.values()) and not recis:
        kind = "file of torch.save"
    return Structure(
        kind=kind,
        headers=manifest.headers,
        tensors=len(catalog.tensors),
        tables=tables,
        files=len(manifest.headers.keys() | others),
    )


def _check(manifest: Manifest, problems: AllProblems, *, known: bool) -> list[TableIds]:
    """Compare names, headers and the sidecar; `known` says whether names could be read."""
    catalog = manifest.catalog
    for odd in manifest.oddities:
        problems.note(odd.text, odd.file, odd.key)
    _note_strange_dtypes(manifest, problems)
    find = partial(_find, manifest, problems)
    found = [find(place) for place in catalog.tensors.values()]
    if catalog.recis and not problems.blames(TENSORKEY):
        _find_parts(catalog, problems)
    tables = []
    told = _told(manifest, problems)
    for table, slots in catalog.tables.items():
        blocks: dict[str, dict[Slice, Block]] = {slot: {} for slot in slots}
        for slot, part in ((slot, part) for slot, parts in slots.items() for part in parts):
            block = find(part.place)
            found.append(block)
            if block is not None:
                blocks[slot].setdefault(part.slice, block)
        _check_table(table, slots, blocks, problems)
        ids = {
            where: block
            for where, block in blocks.get(ID, {}).items()
            if not any(id_problems(table, block))
        }
        spread = {} if told is None else _spread(table, slots, ids, told.get(table, ()), problems)
        tables.append(TableIds(table, ids, spread))
    for table in (told or {}).keys() - catalog.tables.keys():
        problems.add(f"tells of this table, which {INDEX} does not name", SIDECAR, table)
    if known:
        _find_unnamed(
            manifest, {(one.shard, one.key) for one in found if one is not None}, problems
        )
    return tables


def _note_strange_dtypes(manifest: Manifest, problems: AllProblems) -> None:
    for header in manifest.headers.values():
        if any(dtype.itemsize is None for dtype, _ in header.blocks.types):
            for block in header.blocks.values():
                if block.dtype.itemsize is None:
                    text = f"is {block.dtype.lack}, so it cannot be loaded"
                    problems.note(text, block.shard, block.key)


def _find_parts(catalog: Catalog, problems: AllProblems) -> None:
    """Tell of parts of tables that are taken for tensors: a tensor's key ends in `^ `."""
    for key in filter(_PART.fullmatch, catalog.tensors.block_keys.values()):
        text = f"looks like a rank's part of a table, but {TENSORKEY} does not say of which, so it "
        problems.add(f"{text}is taken for a dense tensor", INDEX, key)


def _find_unnamed(manifest: Manifest, named: set[tuple[str, str]], problems: AllProblems) -> None:
    """Tell of blocks, by file and key, that no name leads to."""
    there = ((file, key) for file, header in manifest.headers.items() for key in header.blocks)
    for file, key in there:
        refused = problems.blames(INDEX, key) or problems.blames(TENSORKEY, key)
        if (file, key) not in named and not refused:
            source = manifest.catalog.source
            text = f"stands in the shard, but {source} does not name it: no load reads it"
            problems.add(text, file, key)


def _find(manifest: Manifest, problems: AllProblems, place: Place) -> Block | None:
    """Return the block at a place, unless it is known to be no good."""
    if place.shard not in manifest.headers:
        return None
    try:
        return manifest.block(place)
    except CheckpointError as error:
        keys = {place.key, place.key.removesuffix("^ ")}
        if not any(problems.blames(place.shard, key) for key in keys):
            problems.error(error)
        return None


def _told(manifest: Manifest, problems: AllProblems) -> Mapping[str, tuple[PartRows, ...]] | None:
    """Return how the sidecar says rows are spread; tell of digests of blocks that are not there."""
    catalog, headers = manifest.catalog, manifest.headers
    if catalog.sidecar is None:
        problems.note("no digests: bytes cannot be verified, only the structure")
        return None
    for file, digests in catalog.sidecar.shards.items():
        if file not in catalog.files:
            problems.add(f"has digests of {file!r}, which {INDEX} does not name", SIDECAR)
        for key in digests.blocks.keys() - headers[file].blocks.keys() if file in headers else ():
            if not problems.blames(file, key):
                text = f"has digests of this block, which {file!r} does not have"
                problems.add(text, SIDECAR, key)
    told: Mapping[str, tuple[PartRows, ...]] | None = None
    with problems.caught():
        told = catalog.sidecar.all_spread(manifest.location)
    return told  # noqa: RET504  # mypy does not know that the block may end early


def _check_table(
    table: str,
    slots: Mapping[str, tuple[Part, ...]],
    blocks: Mapping[str, Mapping[Slice, Block]],
    problems: AllProblems,
) -> None:
    problems.take(table_problems(table, slots, blocks))
    for slot, block in ((slot, one) for slot, of in blocks.items() for one in of.values()):
        if 0 in block.shape[1:]:
            text = f"has the shape {list(block.shape)}, which are no rows of anything"
            problems.add(f"{table}@{slot}: {text}", block.shard, block.key)
    claims = {part.slice for part in slots.get(ID, ())}
    if len({claim.size for claim in claims}) == 1:
        for one, other in overlaps(claims):
            text = f"positions [{other.begin}, {min(one.end, other.end)}) lie in several slices"
            problems.add(text, None, table)


def _spread(
    table: str,
    slots: Mapping[str, tuple[Part, ...]],
    ids: Mapping[Slice, Block],
    told: tuple[PartRows, ...],
    problems: AllProblems,
) -> dict[Slice, PartRows]:
    """Return how rows are spread, of parts as they are; tell of other parts."""
    known, claims = {part.slice: part for part in told}, {part.slice for part in slots.get(ID, ())}
    for where in known.keys() - claims:
        text = f"tells of a part {where} of this table, which {INDEX} does not name"
        problems.add(text, SIDECAR, table)
    for where in claims - known.keys():
        problems.add(f"does not tell of its part {where}", SIDECAR, table)
    wrong = {w: list(spread_problems(known[w], ids[w])) for w in known.keys() & ids.keys()}
    for found in wrong.values():
        problems.take(found)
    return {where: known[where] for where, found in wrong.items() if not found}
