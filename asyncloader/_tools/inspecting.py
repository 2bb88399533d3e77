"""Sums up checkpoints by their names and headers alone, and folders that have to do with some."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from asyncloader._checkpoint.format import SIDECAR, STAGING
from asyncloader._checkpoint.manifest import stored_tensor
from asyncloader._checkpoint.parts import ID
from asyncloader._loading.opening import open_session
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError, CheckpointNotFoundError

from .beside import Beside, look_beside
from .content import read_headers, shards_of, stored_slot
from .run_summary import sum_up_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader.options import ReadOptions

    from .run_summary import RunSummary


_GHOSTS = 20

Kind = Literal["RecIS checkpoint", "Hugging Face folder", "safetensors file", "file of torch.save"]
Digests = Literal["present", "ignored", "absent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSummary:
    """A dense tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSummary:
    """A slot: the rows of all ids, or (`id`) the ids themselves. `shape` is that of one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSummary:
    """A table, or one child of several that were saved as one.

    Attributes:
        ids: How many; the same id may stand there twice.
        parts: How many; one for each rank that wrote some of it.
        slice_size: The ranks share the ids: a rank owns a range of `id % slice_size`.
        bytes: Of all slots.
        slots: The ids first.
    """

    name: str
    ids: int
    parts: int
    slice_size: int
    bytes: int
    slots: tuple[SlotSummary, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """The tables and tensors of a checkpoint.

    Attributes:
        committed: Always true: a folder that is not committed is an error.
        bytes: Of all tensors and slots, headers not counted.
        shards: Files that hold them.
        ids: Of all tables.
        digests: Whether bytes can be verified: `ignored` digests belong to another save, or are of
            a format that is not known here.
        saving: Folders in it of saves that are under way, or were cut off.
        warnings: Oddities that do no harm.
        metadata: The free text of headers, `__metadata__`, by file; files without any are absent.
        beside: What a trainer of RecIS saved beside the tensors.
    """

    location: str
    kind: Kind
    committed: bool
    bytes: int
    shards: int
    ids: int
    digests: Digests
    saving: tuple[str, ...]
    warnings: tuple[str, ...]
    metadata: Mapping[str, Mapping[str, str]]
    beside: Beside
    tables: tuple[TableSummary, ...]
    tensors: tuple[TensorSummary, ...]


async def look_into(path: str, options: ReadOptions) -> CheckpointSummary | RunSummary:
    """Sum up a checkpoint, or a run folder; see `asyncloader.tools.inspect`."""
    async with open_session(path, options) as session:
        try:
            manifest = await read_headers(session, whole=False)
        except CheckpointNotFoundError:
            run = await sum_up_run(path, options)
            if run is not None:
                return run
            raise
        names = await session.listed() if session.file is None else ()
        saving = tuple(sorted(name for name in names if name.startswith(STAGING)))
        beside = await look_beside(session) if manifest.catalog.recis else Beside()
        sum_up = partial(_summarize, manifest, session.file, saving, beside)
        return (await run_jobs(session.threads.kernels, [sum_up]))[0]


def _summarize(
    manifest: Manifest, file: str | None, saving: tuple[str, ...], beside: Beside
) -> CheckpointSummary:
    """Sum up a checkpoint, which is the folder, or else `file` alone."""
    catalog = manifest.catalog
    tables = tuple(_table(manifest, name) for name in catalog.tables)
    tensors, ghosts = _tensors(manifest)
    kind: Kind = "RecIS checkpoint" if catalog.recis else "Hugging Face folder"
    if file is not None and file == catalog.source and file in catalog.headers:
        is_torch = catalog.headers[file].archive is not None
        kind = "file of torch.save" if is_torch else "safetensors file"
    is_odd = any(odd.file == SIDECAR for odd in catalog.oddities)
    digests: Digests = "present" if catalog.sidecar else "ignored" if is_odd else "absent"
    return CheckpointSummary(
        location=manifest.location,
        kind=kind,
        committed=True,
        bytes=sum(table.bytes for table in tables) + sum(tensor.bytes for tensor in tensors),
        shards=len(shards_of(catalog)),
        ids=sum(table.ids for table in tables),
        digests=digests,
        saving=saving,
        warnings=(*manifest.warnings, *_oddities(tables), *ghosts, *beside.warnings),
        metadata=metadata_of(manifest, sorted(manifest.headers)),
        beside=beside,
        tables=tables,
        tensors=tensors,
    )


def metadata_of(manifest: Manifest, shards: Iterable[str]) -> dict[str, Mapping[str, str]]:
    """Return the free text in the headers of some files, by file; files without any are absent."""
    headers = manifest.headers
    return {shard: headers[shard].metadata for shard in shards if headers[shard].metadata}


def _tensors(manifest: Manifest) -> tuple[tuple[TensorSummary, ...], list[str]]:
    """Return the tensors, and a line for each tensor that its file does not have."""
    found, ghosts = [], []
    for name in manifest.catalog.tensors:
        try:
            one = stored_tensor(manifest, name)
            shape, nbytes = one.shape, one.nbytes
            found.append(TensorSummary(name=name, dtype=str(one.dtype), shape=shape, bytes=nbytes))
        except CheckpointError as error:
            ghosts.append(str(error).removeprefix(f"{manifest.location}: "))
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


def _oddities(tables: Iterable[TableSummary]) -> Iterator[str]:
    """Say why tables cannot be loaded."""
    for table in tables:
        if all(slot.name != ID for slot in table.slots):
            yield f"table {table.name!r} has no ids"
            continue
        for slot in table.slots:
            if slot.rows != table.ids:
                yield f"table {table.name!r} has {table.ids:,} ids, but {slot.rows:,} {slot.name!r}"
