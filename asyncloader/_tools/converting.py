"""Turns one form of a checkpoint into another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from asyncloader._loading.opening import open_session
from asyncloader.errors import SaveError

from .beside import look_beside
from .source import read_source
from .target import making, target_of
from .writing import write_file, write_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from asyncloader._loading.progress import Progress
    from asyncloader.options import ReadOptions

    from .content import Content
    from .target import Written


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedTable:
    """How a table was written.

    Attributes:
        slots: All but the ids.
        ids: Ids that were written.
        duplicates: Rows left out because a later one has the same id.
        strays: Rows left out because their id lies outside the slice that their block claims.
    """

    name: str
    slots: tuple[str, ...]
    ids: int
    duplicates: int
    strays: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A file or folder that was written.

    Attributes:
        ranks: The number of ranks that the folder looks written by; `None` for a file.
        files: The files that hold the data.
        bytes_written: To these files.
        bytes_verified: Bytes that were read and compared with digests.
        left_out: Files beside the source's tensors, such as `extra.pt`: they are no tensors.
    """

    source: str
    destination: str
    kind: Literal["RecIS checkpoint", "safetensors file"]
    ranks: int | None
    files: tuple[str, ...]
    tables: tuple[ConvertedTable, ...]
    tensors: tuple[str, ...]
    bytes_written: int
    bytes_verified: int
    left_out: tuple[str, ...]
    seconds: float


async def aconvert(
    source: str,
    destination: str,
    *,
    shards: int | None,
    slots: Collection[str] | None,
    tables: Collection[str] | None,
    parallel: int,
    overwrite: bool,
    progress: Callable[[Progress], object] | None,
    options: ReadOptions,
) -> Conversion:
    """Convert; see `asyncloader.tools.convert`.

    If that fails, or is cancelled, before the file, or the folder's `index`, is moved into its
    place, no new file is left behind, and the old ones are as they were. After a file's move it is
    written: an error says so then.
    """
    start = time.perf_counter()
    for name, number in (("shards", shards), ("parallel", parallel)):
        if number is not None and number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")
    async with open_session(source, options) as session:
        find = partial(target_of, source, destination, options.storage_options, overwrite=overwrite)
        try:
            target = await session.on_disk(find)
        except OSError as error:
            raise SaveError(destination, f"cannot be looked at: {error.strerror}") from error
        is_file = target.file is not None
        if is_file and shards is not None:
            raise SaveError(destination, "is one file: --shards is for folders")
        content = await read_source(session, slots, tables, to_file=is_file)
        is_recis = content.manifest.catalog.recis
        beside = (await look_beside(session)).files if is_recis else ()
        async with making(session, target):
            if is_file:
                written = await write_file(content, target, parallel=parallel, progress=progress)
            else:
                written = await write_folder(
                    content, target, ranks=shards, parallel=parallel, progress=progress
                )
    return Conversion(
        source=source,
        destination=target.location,
        kind="safetensors file" if is_file else "RecIS checkpoint",
        ranks=written.ranks,
        files=tuple(written.files),
        tables=tuple(_converted(content, written)),
        tensors=tuple(content.tensors),
        bytes_written=written.nbytes,
        bytes_verified=written.verified,
        left_out=tuple(file.name for file in beside),
        seconds=time.perf_counter() - start,
    )


def _converted(content: Content, written: Written) -> Iterator[ConvertedTable]:
    for name, table in content.tables.items():
        ids, duplicates = written.ids[name], written.duplicates[name]
        yield ConvertedTable(
            name=name,
            slots=tuple(table.slots),
            ids=ids,
            duplicates=duplicates,
            strays=table.ids.rows - ids - duplicates,
        )
