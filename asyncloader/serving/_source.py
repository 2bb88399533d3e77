"""What there is to serve. Looks at the file system and so blocks; it belongs on a thread."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from asyncloader._runs import latest
from asyncloader.checkpoint import INDEX
from asyncloader.errors import CheckpointNotFoundError

__all__ = ["Candidate", "candidate", "named", "newest"]

_SAFETENSORS = ".safetensors"

Identity: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A committed checkpoint."""

    path: Path
    identity: Identity
    """What changes when another one takes its place: its `index` is written anew."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name


def newest(source: Path) -> Candidate:
    """Return the checkpoint at `source`, or the newest one of a run folder.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed.
    """
    return _at(source) or candidate(latest(source))


def candidate(path: Path) -> Candidate:
    """Return the checkpoint at `path`.

    Raises:
        CheckpointNotFoundError: If there is none.
    """
    found = _at(path)
    if found is None:
        raise CheckpointNotFoundError(
            str(path), f"no committed checkpoint: it holds neither {INDEX!r} nor safetensors files"
        )
    return found


def named(source: Path, version: str | os.PathLike[str]) -> Path:
    """Return where a version is: a sub-folder of a run folder, or any other path."""
    path = Path(version)
    return source / path if len(path.parts) == 1 and not _marks(source) else path


def _at(path: Path) -> Candidate | None:
    marks = _marks(path)
    return Candidate(path=path, identity=marks) if marks else None


def _marks(path: Path) -> Identity:
    """Return the identities of the files that make a folder a checkpoint; none if it is not one."""
    for one in (path / INDEX, path):
        if os.path.isfile(one):  # noqa: PTH113  # Path's own raises for odd names
            return _identities([one])
    try:
        files = [one for one in path.iterdir() if one.name.endswith(_SAFETENSORS)]
    except OSError:
        return ()
    return _identities(sorted(files))


def _identities(files: list[Path]) -> Identity:
    try:
        found = [file.stat() for file in files]
    except OSError:  # removed meanwhile
        return ()
    return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found)
