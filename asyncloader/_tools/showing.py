"""What there is to say of one tensor, or of a table's slots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from asyncloader._checkpoint.stored import stored_tensor
from asyncloader._loading.reading import has_numbers

from .allocation import ID, stored_slot
from .finding import check_ids
from .statistics import combine, measure
from .summary import metadata_of
from .values import read_rows
from .windows import in_windows, read_elements

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.session import Session

    from .lookup import Target
    from .stages import Tell
    from .statistics import Statistics
    from .values import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTensor:
    """A dense tensor, or a slot of a table."""

    location: str
    name: str
    kind: Literal["tensor", "slot"]
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    parts: int
    """Pieces that different ranks wrote."""

    metadata: Mapping[str, Mapping[str, str]]
    """The free text of the headers of its files, `__metadata__`, by file."""

    statistics: Statistics | None
    """`None` if it is complex, or of a dtype without numbers."""

    rows: tuple[Row, ...]
    """The first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTable:
    """A table."""

    location: str
    name: str
    kind: Literal["table"] = "table"
    ids: int
    bytes: int
    slots: tuple[ShownTensor, ...]


async def show_tensor(
    session: Session, catalog: Catalog, target: Target, *, rows: int, tell: Tell
) -> ShownTensor:
    """Read a dense tensor, or a slot, and say what it is like.

    Args:
        session: The checkpoint.
        catalog: Its names.
        target: Which tensor or slot.
        rows: How many of its first rows to keep.
        tell: Hears of progress.

    Raises:
        CheckpointError: If it is unreadable.
        ReadError: If the storage failed.
    """
    if target.table is None or target.slot is None:
        manifest = await session.manifest(catalog, [catalog.tensors[target.name].shard])
        stored = stored_tensor(manifest, target.name)
        ids: Sequence[int] = ()
    else:
        manifest = await _manifest_of(session, catalog, target.table)
        stored = stored_slot(manifest, target.table, target.slot)
        ids = await _first_ids(session, manifest, target.table, rows)
    advance = _teller(tell, stored.nbytes)
    kind: Literal["tensor", "slot"] = "tensor" if target.table is None else "slot"
    tell_of = advance(stored.name)
    return await _shown(session, manifest, stored, kind, rows=rows, ids=ids, advance=tell_of)


async def show_table(session: Session, catalog: Catalog, table: str, *, tell: Tell) -> ShownTable:
    """Read all of a table, and say what its slots are like; raises what `show_tensor` does."""
    manifest = await _manifest_of(session, catalog, table)
    stored = {slot: stored_slot(manifest, table, slot) for slot in catalog.tables[table]}
    nbytes = sum(one.nbytes for one in stored.values())
    advance = _teller(tell, nbytes)
    shown = [
        await _shown(session, manifest, one, "slot", rows=0, ids=(), advance=advance(one.name))
        for _, one in sorted(stored.items(), key=lambda item: item[0] != ID)
    ]
    ids = stored[ID].shape[0] if ID in stored and stored[ID].shape else 0
    return ShownTable(
        location=session.location, name=table, ids=ids, bytes=nbytes, slots=tuple(shown)
    )


async def _manifest_of(session: Session, catalog: Catalog, table: str) -> Manifest:
    slots = catalog.tables[table].values()
    return await session.manifest(catalog, {part.place.shard for slot in slots for part in slot})


async def _first_ids(session: Session, manifest: Manifest, table: str, rows: int) -> Sequence[int]:
    if ID not in manifest.catalog.tables[table]:
        return []
    stored = stored_slot(manifest, table, ID)
    check_ids(session.location, stored)
    count = min(rows, math.prod(stored.shape))
    ids: list[int] = (await read_elements(session, stored, 0, count)).tolist()
    return ids


async def _shown(
    session: Session,
    manifest: Manifest,
    stored: Stored,
    kind: Literal["tensor", "slot"],
    *,
    rows: int,
    ids: Sequence[int],
    advance: Callable[[int], object],
) -> ShownTensor:
    known = has_numbers(stored.dtype)
    moments = await in_windows(session, stored, measure, advance=advance) if known else [None]
    found = [one for one in moments if one is not None]
    return ShownTensor(
        location=session.location,
        name=stored.name,
        kind=kind,
        dtype=stored.dtype.torch,
        shape=stored.shape,
        bytes=stored.nbytes,
        parts=len(stored.blocks),
        metadata=metadata_of(manifest, sorted({block.shard for block in stored.blocks})),
        statistics=combine(found) if len(found) == len(moments) else None,
        rows=await read_rows(session, stored, rows, ids=ids),
    )


def _teller(tell: Tell, total: int) -> Callable[[str], Callable[[int], object]]:
    """Return what makes, for each name, a function that adds up bytes and tells of them."""
    done = 0

    def of(name: str) -> Callable[[int], object]:
        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            tell(done, total, name)

        return advance

    return of
