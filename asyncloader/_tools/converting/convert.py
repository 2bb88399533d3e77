"""Turns one form of a checkpoint into another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from asyncloader._arguments import checked_path
from asyncloader._loading.session import open_session
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import AsyncLoaderError, SaveError
from asyncloader.options import ReadOptions

from .destination import Destination
from .file import Written, write_file
from .folder import Part, write_folder
from .source import Source, read_source
from .strays import refuse_strays

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to convert."""

    shards: int | None
    """Ranks to write a folder as; as many as wrote the source if `None`."""

    slots: Collection[str] | None
    """Slots to keep besides the ids; all if `None`."""

    tables: Collection[str] | None = None
    """What of plain files are tables; if `None`, what looks like one and has each id once."""

    parallel: int
    """Shard files of each rank, and writes at a time."""

    overwrite: bool
    """Whether to replace what is there."""

    def __post_init__(self) -> None:
        for name, value in (("shards", self.shards), ("parallel", self.parallel)):
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be positive, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedTable:
    """What became of a table."""

    name: str
    slots: tuple[str, ...]
    """All but the ids."""

    ids: int
    """That were written."""

    duplicates: int
    """Rows left out because a later one has the same id."""

    strays: int
    """Rows left out because their id lies outside the slice that their block claims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written."""

    source: str
    destination: str
    kind: Literal["RecIS checkpoint", "safetensors file"]
    ranks: int | None
    """As how many ranks a folder was written."""

    files: tuple[str, ...]
    """That hold the data."""

    tables: tuple[ConvertedTable, ...]
    tensors: tuple[str, ...]
    bytes_written: int
    bytes_verified: int
    """Of those that were read, compared with digests."""

    seconds: float


async def aconvert(
    source: str,
    destination: str,
    options: Options,
    *,
    progress: Callable[[Progress], object] | None = None,
    read: ReadOptions | None = None,
) -> Conversion:
    """Convert.

    If that fails, or is cancelled, before the file, or the folder's `index`, is moved into its
    place, nothing is left behind, and what was there is as it was. After a file's move it is
    written: an error says so then.

    Args:
        source: A RecIS folder, a safetensors file, or a folder of Hugging Face's.
        destination: A folder for a checkpoint in RecIS's format, or a file that ends in
            `.safetensors`.
        options: How.
        progress: Called on the event loop, at most ten times a second.
        read: How to read.

    Raises:
        CheckpointError: If the source is missing, unreadable, or contradicts itself.
        PlanError: If it does not fit together.
        ReadError: If it could not be read.
        SaveError: If the destination must not be written, or could not be; or a file was, but may
            not outlive a power loss.
        ValueError: If names cannot be told apart there.
    """
    start = time.perf_counter()
    for path in (source, destination):
        checked_path(path, "path")
    async with open_session(source, read or ReadOptions()) as session:
        reads = session.threads.reads
        check = partial(Destination.checked, source, destination, overwrite=options.overwrite)
        target = await session.on_disk(check)
        if target.is_file and options.shards is not None:
            raise SaveError(destination, "is one file: --shards is for folders")
        content = await read_source(session, options.slots, options.tables, to_file=target.is_file)
        try:
            await run_jobs(reads, [target.begin])
            written = await _write(session, content, target, options, progress)
        except BaseException as error:
            await run_jobs(reads, [target.give_up])
            if isinstance(error, OSError) and not isinstance(error, AsyncLoaderError):
                raise SaveError(destination, f"could not be written: {error}") from error
            raise
    return _result(source, target.path, content, written, time.perf_counter() - start)


async def _write(
    session: Session,
    content: Source,
    target: Destination,
    options: Options,
    progress: Callable[[Progress], object] | None,
) -> Written | list[Part]:
    parallel = options.parallel
    if target.is_file:
        await refuse_strays(session, content)
        return await write_file(
            session,
            content,
            target.path,
            parallel=parallel,
            overwrite=options.overwrite,
            progress=progress,
        )
    ranks = options.shards or max((table.ranks for table in content.tables), default=1)
    return await write_folder(
        session, content, target.path, ranks=ranks, parallel=parallel, progress=progress
    )


def _result(
    source: str, path: Path, content: Source, written: Written | Sequence[Part], seconds: float
) -> Conversion:
    parts = [] if isinstance(written, Written) else written
    tables = []
    for table in content.tables:
        slots, there = tuple(table.slots), table.ids.rows
        ids = sum(part.report.tables.get(table.name, 0) for part in parts) if parts else there
        twice = sum(part.duplicates.get(table.name, 0) for part in parts)
        strays = there - ids - twice
        tables.append(
            ConvertedTable(name=table.name, slots=slots, ids=ids, duplicates=twice, strays=strays)
        )
    if isinstance(written, Written):
        files, size, verified = written.files, written.bytes_written, written.bytes_verified
    else:
        files = tuple(sorted(file for part in parts for file in part.report.shards))
        size = sum(part.report.bytes_written for part in parts)
        verified = sum(part.bytes_verified for part in parts)
    return Conversion(
        source=source,
        destination=str(path),
        kind="safetensors file" if isinstance(written, Written) else "RecIS checkpoint",
        ranks=len(parts) or None,
        files=files,
        tables=tuple(tables),
        tensors=tuple(stored.name for stored in content.tensors),
        bytes_written=size,
        bytes_verified=verified,
        seconds=seconds,
    )
