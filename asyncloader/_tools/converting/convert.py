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

from .file import write_file
from .folder import write_folder
from .source import read_source

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from asyncloader._loading.progress import Progress
    from asyncloader.options import ReadOptions


_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedTable:
    """What became of a table."""

    name: str
    slots: tuple[str, ...]
    """All but the ids."""

    ids: int
    """Ids that were written."""

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
    """The number of ranks that the folder looks written by; `None` for a file."""

    files: tuple[str, ...]
    """The files that hold the data."""

    tables: tuple[ConvertedTable, ...]
    tensors: tuple[str, ...]
    bytes_written: int
    bytes_verified: int
    """Bytes that were read and compared with digests."""

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
    place, nothing is left behind, and what was there is as it was. After a file's move it is
    written: an error says so then.
    """
    start = time.perf_counter()
    for name, number in (("shards", shards), ("parallel", parallel)):
        if number is not None and number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")
    async with open_session(source, options) as session:
        check = partial(_Destination.checked, source, destination, overwrite=overwrite)
        target = await session.on_disk(check)
        if target.is_file and shards is not None:
            raise SaveError(destination, "is one file: --shards is for folders")
        content = await read_source(session, slots, tables, to_file=target.is_file)
        try:
            await run_jobs(session.threads.reads, [target.begin])
            if target.is_file:
                written = await write_file(
                    session,
                    content,
                    target.path,
                    parallel=parallel,
                    overwrite=overwrite,
                    progress=progress,
                )
            else:
                written = await write_folder(
                    session,
                    content,
                    target.path,
                    ranks=shards,
                    parallel=parallel,
                    progress=progress,
                )
        except BaseException as error:
            await run_jobs(session.threads.reads, [target.give_up])
            if isinstance(error, OSError) and not isinstance(error, AsyncLoaderError):
                raise SaveError(destination, f"could not be written: {error}") from error
            raise
    ids, twice = written.ids, written.duplicates
    return Conversion(
        source=source,
        destination=str(target.path),
        kind="safetensors file" if target.is_file else "RecIS checkpoint",
        ranks=written.ranks,
        files=tuple(written.files),
        tables=tuple(
            ConvertedTable(
                name=name,
                slots=tuple(table.slots),
                ids=ids[name],
                duplicates=twice[name],
                strays=table.ids.rows - ids[name] - twice[name],
            )
            for name, table in content.tables.items()
        ),
        tensors=tuple(content.tensors),
        bytes_written=written.nbytes,
        bytes_verified=written.verified,
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Destination:
    """A file or folder to write. All of this blocks."""

    path: Path

    is_file: bool
    """Whether it is one plain safetensors file, rather than a checkpoint's folder."""

    made: tuple[Path, ...]
    """Folders that were not there before, the outermost first."""

    @classmethod
    def checked(cls, source: str, path: str, *, overwrite: bool) -> _Destination:
        """Say what the path stands for.

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
        home = target.parent if is_file else target
        return cls(path=target, is_file=is_file, made=tuple(_missing(home)))

    def begin(self) -> None:
        """Make the folders that are missing."""
        for folder in self.made:
            folder.mkdir(exist_ok=True)

    def give_up(self) -> None:
        """Remove the folders that were made, unless something was put into them."""
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_apart(source: str, target: Path) -> None:
    one, other = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if one == other:
        raise SaveError(str(target), "is the source itself; give another place")
    if one in other.parents:
        raise SaveError(str(target), f"lies within the source {source}; give another place")
    if other in one.parents:
        raise SaveError(str(target), f"holds the source {source}; give another place")


def _missing(folder: Path) -> Iterator[Path]:
    if not folder.exists() and folder.parent != folder:
        yield from _missing(folder.parent)
        yield folder
