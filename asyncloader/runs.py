"""Run folders, in which a trainer keeps its checkpoints: one sub-folder each.

RecIS's trainer lists the sub-folders' names in a text file, `checkpoint`, a line each, the newest
last. All of this blocks; it belongs on a thread.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ._arguments import checked_path
from ._checkpoint.files import INDEX
from ._checkpoint.index import is_file_name
from ._checkpoint.lacking import lack_of
from ._checkpoint.safetensors import model_in
from .errors import CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Version",
    "is_run_folder",
    "latest",
    "listed",
    "name_order",
    "newest_committed",
    "versions",
]

_log = logging.getLogger("asyncloader")

_LIST = "checkpoint"
# Of savers, for one, that are at work: what lies there is not committed, even if it has an `index`.
_HIDDEN = "."
# Only the end of the list counts; it grows for as long as the run goes on.
_LAST_BYTES = 64 << 10
_NUMBER = re.compile("([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A sub-folder of a run folder."""

    name: str
    committed: bool
    """Whether it holds `index`, which is written last; or a model, as Hugging Face's folders do."""

    modified: float
    """When the file that says so was written, or else when the folder was changed, in seconds since
    1970."""


def latest(run_folder: str | os.PathLike[str]) -> Path:
    """Return the newest finished checkpoint of a run folder.

    That is the last line of its text file `checkpoint` that names a sub-folder with `index`, or
    with a model as Hugging Face has it; where no line does, the sub-folder whose `index`, or model,
    is the newest. One of which shards are missing or short, since it is still being copied, is
    passed over, with a warning. Looks at the file system and so blocks: in a coroutine, `await
    asyncio.to_thread(latest, run_folder)`.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed.
    """
    folder = Path(checked_path(run_folder, "run_folder"))
    lacking: list[str] = []
    for path in _newest_first(folder):
        lack = lack_of(_mark(path))
        if not lack:
            return path
        lacking.append(f"{path.name!r}: {lack}")
        _log.warning("%s is passed over, not all of it is there: %s", path, lack)
    if not lacking:
        return newest_committed(folder)  # it says why there is none
    problem = f"no finished checkpoint here, copy the rest of one: {'; '.join(lacking)}"
    raise CheckpointNotFoundError(str(folder), problem)


def newest_committed(folder: Path) -> Path:
    """Return the newest checkpoint of a run folder, though some of it may be still to come.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed.
    """
    for path in _newest_first(folder):
        return path
    if _is_committed(folder):
        problem = "no run folder but a checkpoint itself; use it as it is"
    else:
        problem = (
            f"no committed checkpoint here; looked for sub-folders that hold {INDEX!r}, which is "
            f"written last, or a safetensors model, those first that the text file {_LIST!r} names"
        )
    raise CheckpointNotFoundError(str(folder), problem)


def versions(run_folder: str | os.PathLike[str]) -> tuple[Version, ...]:
    """Return all sub-folders of a run folder, the newest last.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointError: If it cannot be listed.
    """
    checked_path(run_folder, "run_folder")
    try:
        with os.scandir(run_folder) as entries:
            names = [entry.name for entry in entries if _is_folder(entry)]
            names = [name for name in names if not name.startswith(_HIDDEN)]
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"no run folder: {error.strerror}"
        raise CheckpointNotFoundError(os.fspath(run_folder), problem) from error
    except OSError as error:
        raise CheckpointError(os.fspath(run_folder), f"cannot be listed: {error}") from error
    found = [version for name in names if (version := _version(Path(run_folder), name))]
    return tuple(sorted(found, key=_age))


def is_run_folder(path: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds checkpoints."""
    try:
        with os.scandir(path) as entries:
            return any(
                _is_committed(Path(entry))
                for entry in entries
                if not entry.name.startswith(_HIDDEN)
            )
    except OSError:
        return False


def _newest_first(folder: Path) -> Iterator[Path]:
    """Yield the committed checkpoints of a run folder, those first that its list names."""
    seen = set()
    for name in listed(folder):
        if _is_committed(folder / name):
            seen.add(name)
            yield folder / name
    for version in reversed(versions(folder)):
        if version.committed and version.name not in seen:
            yield folder / version.name


def listed(folder: Path) -> Iterator[str]:
    """Yield the names at the end of the list, the last one first, each once."""
    lines = _tail(folder / _LIST).split(b"\n")
    for line in dict.fromkeys(reversed(lines)):
        name = os.fsdecode(line.strip())  # as the system decodes file names: never fails
        if is_file_name(name) and not name.startswith(_HIDDEN):
            yield name


def _tail(path: Path) -> bytes:
    """Return the last lines of a file; nothing if it is no file that can be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would hang
            return b""
        with path.open("rb") as file:
            skipped = max(file.seek(0, os.SEEK_END) - _LAST_BYTES, 0)
            file.seek(skipped)
            text = file.read(_LAST_BYTES)
    except OSError:
        return b""
    return text.partition(b"\n")[2] if skipped else text  # the first line may be half a line


def _version(folder: Path, name: str) -> Version | None:
    path = folder / name
    mark = _mark(path)
    try:
        modified = (mark or path).stat().st_mtime
    except OSError:  # removed meanwhile
        return None
    return Version(name=name, committed=mark is not None, modified=modified)


def _is_folder(path: os.DirEntry[str]) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path's own raises for odd links


def _is_committed(path: Path) -> bool:
    return _mark(path) is not None


def _mark(path: Path) -> Path | None:
    """Return the file that makes a folder a checkpoint: `index`, or the one that names a model."""
    if os.path.isfile(path / INDEX):  # noqa: PTH113  # Path's own raises for odd names
        return path / INDEX
    try:
        name = model_in(str(path), [entry.name for entry in path.iterdir()])
    except (OSError, CheckpointError):  # no folder; or several models
        return None
    return None if name is None else path / name


def _age(version: Version) -> tuple[float, list[str | int]]:
    """Order by time; versions of the same moment by name, numbers by their value."""
    return version.modified, name_order(version.name)


def name_order(name: str) -> list[str | int]:
    """Return what orders names by the numbers in them: `ckpt_9` comes before `ckpt_10`."""
    parts = _NUMBER.split(name)  # text and numbers take turns
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]
