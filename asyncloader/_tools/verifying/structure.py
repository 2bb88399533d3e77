"""Checks that blocks fit together: names and headers, the slots of a table, its slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._checkpoint.manifest import Manifest
from asyncloader._planning.load_info import ID
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.index import Catalog, Part, Place
    from asyncloader._checkpoint.slices import Slice

    from .findings import Findings
    from .shards import Shard


_IDS = "int64"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableIds:
    """The ids of one table, as far as they are sound."""

    table: str
    parts: Mapping[Slice, Block]
    """By the slice that the block claims, in order."""

    claims: frozenset[Slice]
    """All slices of which there should be ids."""

    @property
    def rows(self) -> int:
        """How many ids there are."""
        return sum(block.rows for block in self.parts.values())


@dataclass(slots=True)
class _Finder:
    """Finds the blocks of places, and remembers which have no place."""

    manifest: Manifest
    shards: Mapping[str, Shard]
    findings: Findings
    unnamed: set[tuple[str, str]]

    def block(self, place: Place) -> Block | None:
        shard = self.shards.get(place.shard)
        if shard is None or place.key in shard.refused:
            return None  # and that was said already
        try:
            block = self.manifest.block(place)
        except CheckpointError as error:
            if place.key.removesuffix("^ ") not in shard.refused:
                self.findings.error(error)
            return None
        self.unnamed.discard((block.shard, block.key))
        return block


def check_catalog(
    location: str,
    catalog: Catalog,
    refused: frozenset[str],
    shards: Mapping[str, Shard],
    findings: Findings,
) -> list[TableIds]:
    """Check that every block is there, that every block has a name, and every table.

    Args:
        location: The checkpoint, for messages.
        catalog: All names.
        refused: Keys of which something bad is known already.
        shards: Those that could be read.
        findings: Receives what is wrong.

    Returns:
        The ids of each table.
    """
    headers = {file: shard.header for file, shard in shards.items()}
    unnamed = {(file, key) for file, header in headers.items() for key in header.blocks}
    finder = _Finder(Manifest(location, catalog, headers), shards, findings, unnamed)
    for place in catalog.tensors.values():
        finder.block(place)
    ids = [_check_table(finder, table, slots) for table, slots in catalog.tables.items()]
    for file, key in finder.unnamed:
        if key not in refused:
            text = f"stands in the shard, but {catalog.source} does not name it: nobody reads it"
            findings.problem(text, file=file, name=key)
    return ids


def _check_table(finder: _Finder, table: str, slots: Mapping[str, tuple[Part, ...]]) -> TableIds:
    findings = finder.findings
    found = {slot: _blocks(finder, f"{table}@{slot}", parts) for slot, parts in slots.items()}
    for slot, blocks in found.items():
        _check_rows(f"{table}@{slot}", blocks.values(), findings)
    if ID not in slots:
        findings.problem("the table has no ids: nobody can say whose its rows are", name=table)
        return TableIds(table=table, parts={}, claims=frozenset())
    claims = frozenset(part.slice for part in slots[ID])
    _check_slices(table, sorted(claims), findings)
    for slot, parts in slots.items():
        _check_slot(f"{table}@{slot}", claims, {part.slice for part in parts}, findings)
        _check_counts(found[ID], found[slot], findings)
    sound = {where: block for where, block in found[ID].items() if _are_ids(block)}
    for block in found[ID].values():
        if not _are_ids(block):
            text = f"is {block.dtype} {list(block.shape)}; ids are {_IDS} [n]"
            findings.problem(text, file=block.shard, name=block.key)
    return TableIds(table=table, parts=sound, claims=claims)


def _blocks(finder: _Finder, name: str, parts: Iterable[Part]) -> dict[Slice, Block]:
    blocks: dict[Slice, Block] = {}
    for part in parts:
        block = finder.block(part.place)
        if block is None:
            continue
        if part.slice in blocks:
            other = blocks[part.slice]
            text = f"claims slice {part.slice}, as {other.key!r} in {other.shard} does"
            finder.findings.problem(f"{name}: {text}", file=block.shard, name=block.key)
        else:
            blocks[part.slice] = block
    return blocks


def _check_rows(name: str, blocks: Iterable[Block], findings: Findings) -> None:
    """Check that all parts of a slot have rows of the same kind."""
    first = None
    for block in blocks:
        first = first or block
        if not block.shape:
            findings.problem(f"{name}: is a scalar, it has no rows", file=block.shard,
                             name=block.key)  # fmt: skip
        elif 0 in block.shape[1:]:
            text = f"{name}: has the shape {list(block.shape)}, which are no rows of anything"
            findings.problem(text, file=block.shard, name=block.key)
        elif (block.dtype, block.shape[1:]) != (first.dtype, first.shape[1:]):
            findings.problem(
                f"is {block.dtype} {list(block.shape)}, but another part of {name!r}, "
                f"{first.key!r} in {first.shard}, is {first.dtype} {list(first.shape)}: "
                "their rows differ",
                file=block.shard,
                name=block.key,
            )


def _check_slices(table: str, claims: list[Slice], findings: Findings) -> None:
    """Check that slices are apart, and that every id lies in one."""
    sizes = {claim.size for claim in claims}
    if len(sizes) > 1:
        text = f"its slices are of different sizes: {', '.join(map(str, claims[:4]))}"
        findings.problem(text, name=table)
        return
    end = 0
    for claim in (claim for claim in claims if claim.begin < claim.end):
        if claim.begin < end:
            text = f"positions [{claim.begin}, {min(claim.end, end)}) lie in several slices"
            findings.problem(text, name=table)
        elif claim.begin > end:
            _gap(table, end, claim.begin, findings)
        end = max(end, claim.end)
    [size] = sizes
    if end < size:
        _gap(table, end, size, findings)


def _gap(table: str, begin: int, end: int, findings: Findings) -> None:
    text = f"positions [{begin}, {end}) lie in no slice: the part of a rank is missing"
    findings.problem(text, name=table)


def _check_slot(
    name: str, ids: AbstractSet[Slice], own: AbstractSet[Slice], findings: Findings
) -> None:
    for claim in ids - own:
        findings.problem(f"has no part for slice {claim}, of which there are ids", name=name)
    for claim in own - ids:
        findings.problem(f"has a part for slice {claim}, of which there are no ids", name=name)


def _check_counts(
    ids: Mapping[Slice, Block], rows: Mapping[Slice, Block], findings: Findings
) -> None:
    for claim, block in rows.items():
        if claim in ids and block.shape and block.rows != ids[claim].rows:
            findings.problem(
                f"has {block.rows} rows, but there are {ids[claim].rows} ids "
                f"({ids[claim].key!r} in {ids[claim].shard})",
                file=block.shard,
                name=block.key,
            )


def _are_ids(block: Block) -> bool:
    return block.dtype.torch == _IDS and len(block.shape) == 1
