"""Sums up a checkpoint by its names and headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from asyncloader._checkpoint.format import SIDECAR
from asyncloader._checkpoint.manifest import stored_tensor
from asyncloader._checkpoint.parts import ID
from asyncloader._loading.runtime import open_session
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError, CheckpointNotFoundError

from .content import read_headers, shards_of, stored_slot
from .folders import run_folder, saves_in, unfinished

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader.options import ReadOptions

    from .folders import RunSummary


_GHOSTS = 20

Kind = Literal["RecIS checkpoint", "Hugging Face folder", "safetensors file"]
Digests = Literal["present", "ignored", "absent"]
"""Whether bytes can be verified: `ignored` digests belong to another save, or are of a format that
is not known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSummary:
    """A dense tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSummary:
    """A slot: the rows of all ids, or (`id`) the ids themselves."""

    name: str
    dtype: str

    shape: tuple[int, ...]
    """Of one row."""

    rows: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSummary:
    """A table, or one child of several that were saved as one."""

    name: str

    ids: int
    """How many; the same id may stand there twice."""

    parts: int
    """One for each rank that wrote some of it."""

    slice_size: int
    """The ranks share the ids: a rank owns a range of `id % slice_size`."""

    bytes: int
    slots: tuple[SlotSummary, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """All of it."""

    location: str
    kind: Kind
    committed: bool

    bytes: int
    """Of all tensors and slots, headers not counted."""

    shards: int
    """Files that hold them."""

    ids: int
    """Of all tables."""

    digests: Digests

    saving: tuple[str, ...]
    """Folders in it of saves that are under way, or were cut off."""

    warnings: tuple[str, ...]
    """Oddities that do no harm."""

    metadata: Mapping[str, Mapping[str, str]]
    """The free text of headers, `__metadata__`, by file; files without any are absent."""

    tables: tuple[TableSummary, ...]
    tensors: tuple[TensorSummary, ...]


async def look_into(path: str, options: ReadOptions) -> CheckpointSummary | RunSummary:
    """Sum up a checkpoint, or a run folder.

    Raises:
        CheckpointError: If there is no committed checkpoint, or it is unreadable.
        ReadError: If the storage failed.
    """
    async with open_session(path, options) as session:
        try:
            manifest = await read_headers(session)
        except CheckpointNotFoundError as error:
            run = await run_folder(path, stall_timeout=options.stall_timeout)
            if run is not None:
                return run
            problem = await session.on_disk(partial(unfinished, path))
            if problem is None:
                raise
            raise CheckpointNotFoundError(error.location, problem) from error
        saving = await session.on_disk(partial(saves_in, path))
        sum_up = partial(_summarize, manifest, file=session.file, saving=saving)
        [summary] = await run_jobs(session.threads.kernels, [sum_up])
        return summary


def _summarize(manifest: Manifest, *, file: str | None, saving: Sequence[str]) -> CheckpointSummary:
    """Sum up a checkpoint.

    Args:
        manifest: With the headers of all shards.
        file: The one safetensors file that is all of it, unless a folder is.
        saving: Names of what its folder holds of other saves.
    """
    catalog = manifest.catalog
    tables = tuple(_table(manifest, name) for name in catalog.tables)
    tensors, ghosts = _tensors(manifest)
    kind: Kind = "RecIS checkpoint" if catalog.recis else "Hugging Face folder"
    if file is not None and file == catalog.source and catalog.header is not None:
        kind = "safetensors file"
    digests: Digests = "absent" if catalog.sidecar is None else "present"
    if catalog.sidecar is None and any(odd.file == SIDECAR for odd in catalog.oddities):
        digests = "ignored"
    odd = [text for table in tables for text in _oddities(table)]
    return CheckpointSummary(
        location=manifest.location,
        kind=kind,
        committed=True,
        bytes=sum(table.bytes for table in tables) + sum(tensor.bytes for tensor in tensors),
        shards=len(shards_of(catalog)),
        ids=sum(table.ids for table in tables),
        digests=digests,
        saving=tuple(saving),
        warnings=(*manifest.warnings, *odd, *ghosts),
        metadata=metadata_of(manifest, sorted(manifest.headers)),
        tables=tables,
        tensors=tensors,
    )


def metadata_of(manifest: Manifest, shards: Iterable[str]) -> dict[str, Mapping[str, str]]:
    """Return the free text in the headers of some files, by file; files without any are absent."""
    found = ((shard, manifest.headers[shard].metadata) for shard in shards)
    return {shard: metadata for shard, metadata in found if metadata}


def _tensors(manifest: Manifest) -> tuple[tuple[TensorSummary, ...], list[str]]:
    """Return the tensors, and a line for each tensor that its file does not have."""
    found, ghosts = [], []
    for name in manifest.catalog.tensors:
        try:
            one = stored_tensor(manifest, name)
        except CheckpointError as error:
            ghosts.append(str(error).removeprefix(f"{manifest.location}: "))
            continue
        found.append(
            TensorSummary(name=name, dtype=one.dtype.torch, shape=one.shape, bytes=one.nbytes)
        )
    more = [f"and {len(ghosts) - _GHOSTS:,} more like it"] if len(ghosts) > _GHOSTS else []
    return tuple(found), ghosts[:_GHOSTS] + more


def _table(manifest: Manifest, name: str) -> TableSummary:
    parts = manifest.catalog.tables[name]
    stored = {slot: stored_slot(manifest, name, slot) for slot in parts}
    slots = [
        SlotSummary(
            name=slot,
            dtype=one.dtype.torch,
            shape=one.shape[1:],
            rows=one.shape[0] if one.shape else 0,
            bytes=one.nbytes,
        )
        for slot, one in stored.items()
    ]
    first = parts.get(ID) or next(iter(parts.values()))
    return TableSummary(
        name=name,
        ids=sum(slot.rows for slot in slots if slot.name == ID),
        parts=max(len(blocks) for blocks in parts.values()),
        slice_size=first[0].slice.size,
        bytes=sum(slot.bytes for slot in slots),
        slots=tuple(sorted(slots, key=lambda slot: slot.name != ID)),
    )


def _oddities(table: TableSummary) -> Iterator[str]:
    """Say what keeps a table from being loaded."""
    if all(slot.name != ID for slot in table.slots):
        yield f"table {table.name!r} has no ids"
        return
    for slot in table.slots:
        if slot.rows != table.ids:
            yield f"table {table.name!r} has {table.ids:,} ids, but {slot.rows:,} {slot.name!r}"
