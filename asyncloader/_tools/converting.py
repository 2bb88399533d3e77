"""Turns one form of a checkpoint into another."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from asyncloader._loading.runtime import open_session
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import AsyncLoaderError, SaveError

from .beside import look_beside
from .source import read_source
from .writing import write_file, write_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator

    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader.options import ReadOptions

    from .content import Content
    from .writing import Written


_SUFFIX = ".safetensors"


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
        check = partial(_checked, source, destination, overwrite=overwrite)
        target = await session.on_disk(check)
        is_file = target.name.endswith(_SUFFIX)
        if is_file and shards is not None:
            raise SaveError(destination, "is one file: --shards is for folders")
        content = await read_source(session, slots, tables, to_file=is_file)
        is_recis = content.manifest.catalog.recis
        beside = (await look_beside(session)).files if is_recis else ()
        async with _making(session, target.parent if is_file else target, destination):
            if is_file:
                written = await write_file(
                    content, target, parallel=parallel, overwrite=overwrite, progress=progress
                )
            else:
                written = await write_folder(
                    content, target, ranks=shards, parallel=parallel, progress=progress
                )
    return Conversion(
        source=source,
        destination=str(target),
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


def _checked(source: str, path: str, *, overwrite: bool) -> Path:
    """Return the file or folder to write; this blocks.

    Raises:
        SaveError: If it would harm the source, or something is there that must not be replaced.
    """
    target = Path(path)
    is_file = target.name.endswith(_SUFFIX)
    _check_apart(source, target)
    if is_file and target.is_dir():
        problem = f"is a folder; a name that ends in {_SUFFIX} is taken for a file"
        raise SaveError(path, problem)
    if not is_file and target.exists() and not target.is_dir():
        problem = "is a file, but a checkpoint is a folder; a plain file's name has to end "
        raise SaveError(path, problem + f"in {_SUFFIX}")
    occupied = any(target.iterdir()) if target.is_dir() else os.path.lexists(target)
    if occupied and not overwrite:
        raise SaveError(path, "is there already; give another place, or --overwrite")
    return target


def _check_apart(source: str, target: Path) -> None:
    one, other = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    for is_so, problem in (
        (one == other, "is the source itself"),
        (one in other.parents, f"lies within the source {source}"),
        (other in one.parents, f"holds the source {source}"),
    ):
        if is_so:
            raise SaveError(str(target), f"{problem}; give another place")


@contextlib.asynccontextmanager
async def _making(session: Session, folder: Path, path: str) -> AsyncIterator[None]:
    """Make a folder and those above it; if the block fails, remove those of them that are empty.

    Raises:
        SaveError: In place of an `OSError`; it names `path`.
    """
    made: list[Path] = []

    def begin() -> None:
        for one in (*reversed(folder.parents), folder):
            if not one.exists():
                made.append(one)
                one.mkdir(exist_ok=True)

    def give_up() -> None:
        for one in reversed(made):
            with contextlib.suppress(OSError):
                one.rmdir()

    try:
        await run_jobs(session.threads.reads, [begin])
        yield
    except BaseException as error:
        await run_jobs(session.threads.reads, [give_up])
        if isinstance(error, OSError) and not isinstance(error, AsyncLoaderError):
            raise SaveError(path, f"could not be written: {error}") from error
        raise
