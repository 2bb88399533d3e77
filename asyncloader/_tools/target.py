"""Where a conversion is written, a folder or a file of a disk or an object store, and what was."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader._addresses import is_url
from asyncloader._storage.folders import Folders
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import AsyncLoaderError, SaveError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from typing import Any

    from asyncloader._loading.session import Session
    from asyncloader._saving.report import SaveReport
    from asyncloader._storage.folder import TargetFolder

    from .allocation import LoadedPart


_SUFFIX = ".safetensors"
_UPLOADS = 16
_IS_THERE = "is there already; give another place, or --overwrite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a conversion goes.

    Attributes:
        location: Its path or URL, as it was given.
        folder: The folder that becomes a checkpoint, or that the file is in.
        file: The file's name; `None` of a folder.
        overwrite: Whether what is there may be replaced.
    """

    location: str
    folder: TargetFolder
    file: str | None
    overwrite: bool


def target_of(
    source: str, location: str, storage_options: Mapping[str, Any] | None, *, overwrite: bool
) -> Target:
    """Return the file or folder to write; this blocks.

    Raises:
        SaveError: If it would harm the source, or something is there that must not be replaced.
    """
    name = posixpath.basename(location.rstrip("/"))
    is_file = name.endswith(_SUFFIX)
    if is_url(location):
        _check_apart(source.rstrip("/"), location.rstrip("/"), location)
        folder = Folders(storage_options, uploads=_UPLOADS).at(location)
        occupied = folder.above().stat(name) is not None if is_file else folder.names("") != []
        if occupied and not overwrite:
            raise SaveError(location, _IS_THERE)
    else:
        _check(source, location, is_file=is_file, overwrite=overwrite)
        folder = Folders().at(str(Path(location).absolute()))
    return Target(
        location=location if is_url(location) else str(Path(location)),
        folder=folder.above() if is_file else folder,
        file=name if is_file else None,
        overwrite=overwrite,
    )


def _check(source: str, path: str, *, is_file: bool, overwrite: bool) -> None:
    target = Path(path)
    _check_apart(os.path.realpath(source), os.path.realpath(target), path)
    if is_file and target.is_dir():
        problem = f"is a folder; a name that ends in {_SUFFIX} is taken for a file"
        raise SaveError(path, problem)
    if not is_file and target.exists() and not target.is_dir():
        problem = "is a file, but a checkpoint is a folder; a plain file's name has to end "
        raise SaveError(path, problem + f"in {_SUFFIX}")
    occupied = any(target.iterdir()) if target.is_dir() else os.path.lexists(target)
    if occupied and not overwrite:
        raise SaveError(path, _IS_THERE)


def _check_apart(one: str, other: str, path: str) -> None:
    for is_so, problem in (
        (one == other, "is the source itself"),
        (other.startswith(f"{one}/"), f"lies within the source {one}"),
        (one.startswith(f"{other}/"), f"holds the source {one}"),
    ):
        if is_so:
            raise SaveError(path, f"{problem}; give another place")


@contextlib.asynccontextmanager
async def making(session: Session, target: Target) -> AsyncIterator[None]:
    """Make a folder and those above it; if the block fails, remove those of them that are empty.

    Raises:
        SaveError: In place of an `OSError`.
    """
    made: list[Path] = []

    def begin() -> None:
        if is_url(target.location):
            return  # a prefix need not be made
        folder = Path(target.folder.location)
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
            raise SaveError(target.location, f"could not be written: {error}") from error
        raise


@dataclass(slots=True, kw_only=True)
class Written:
    """The files of a conversion. A folder looks written by so many `ranks`."""

    files: list[str]
    ranks: int | None = None
    nbytes: int = 0
    verified: int = 0  # bytes that were read and compared with digests
    ids: Counter[str] = field(default_factory=Counter)  # by table
    duplicates: Counter[str] = field(default_factory=Counter)  # rows that gave way, by table

    def add(self, part: LoadedPart, report: SaveReport) -> None:
        """Count the rows and bytes of one rank."""
        self.files = sorted([*self.files, *report.shards])
        self.nbytes += report.bytes_written
        self.verified += part.verified
        self.ids.update(report.tables)
        self.duplicates.update({name: one.duplicates for name, one in part.counts.items()})
