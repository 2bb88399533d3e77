"""What there is to serve. Looks at the file system and so blocks; it belongs on a thread."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from asyncloader._runs import listed, name_order, newest_committed
from asyncloader.checkpoint import INDEX, SIDECAR, TENSORKEY
from asyncloader.errors import CheckpointNotFoundError

__all__ = ["Candidate", "Files", "candidate", "files_of", "named", "newest"]

_SAFETENSORS = ".safetensors"
_NAMES = frozenset((INDEX, TENSORKEY, SIDECAR))
_LONG_AGO = 5.0
"""Seconds without a change after which a file is not being copied any more."""

Identity: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A committed checkpoint."""

    path: Path
    """Where it was found, links resolved: where it is still, though a link leads elsewhere now."""

    identity: Identity
    """What changes when another one takes its place: its `index` is written anew."""

    entry: Path | None = field(default=None, compare=False)
    """Its name in its run folder, as a path; that may be a link to a folder elsewhere. `None` if it
    is the source itself."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name

    def is_older_than(self, other: Candidate) -> bool:
        """Say whether another version of the same run folder came after this one. Blocks."""
        mine, theirs = self.entry, other.entry
        if mine is None or theirs is None or mine == theirs or mine.parent != theirs.parent:
            return False  # what took a version's place, or came with another folder, is meant
        names = list(listed(mine.parent))
        if mine.name in names and theirs.name in names:
            return names.index(mine.name) > names.index(theirs.name)
        return (self._modified, name_order(mine.name)) < (other._modified, name_order(theirs.name))

    @property
    def _modified(self) -> int:
        return max(modified for *_, modified in self.identity)


@dataclass(frozen=True, slots=True)
class Files:
    """What tells the files of a version from those that take their place."""

    identities: dict[str, tuple[int, ...]]
    """By name: device, inode, size, time of the last change of the bytes."""

    changed_at: float = field(compare=False)
    """When the last of them was written to, renamed or linked, in seconds since 1970."""

    @property
    def are_at_rest(self) -> bool:
        """Whether none of them has changed for some seconds, by this machine's clock."""
        return time.time() - self.changed_at > _LONG_AGO

    @property
    def have_digests(self) -> bool:
        """Whether a file says which bytes belong together, so that no mixture can be loaded."""
        return SIDECAR in self.identities

    @property
    def have_index(self) -> bool:
        """Whether a file says which shards there are."""
        return INDEX in self.identities


def files_of(path: Path) -> Files:
    """Return the files that a load of a version may read, now or soon; none if there is no list."""
    identities: dict[str, tuple[int, ...]] = {}
    changed_at = 0.0
    for file in _listed(path):
        # Shards under way, by other names, count: rsync's `.NAME.Xy12z9`, `NAME.part` of others.
        if file.name in _NAMES or _SAFETENSORS in file.name:
            try:
                found = file.stat()
            except OSError:  # removed meanwhile
                continue
            identities[file.name] = _identity(found)
            changed_at = max(changed_at, found.st_ctime)
    return Files(identities, changed_at)


def _listed(path: Path) -> list[Path]:
    if os.path.isfile(path):  # noqa: PTH113  # Path's own raises for odd names
        return [path]
    try:
        return list(path.iterdir())
    except OSError:
        return []


def newest(source: Path) -> Candidate:
    """Return the checkpoint at `source`, or the newest one of a run folder.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed.
    """
    return _at(source) or candidate(newest_committed(source))


def candidate(path: Path) -> Candidate:
    """Return the checkpoint at `path`.

    Raises:
        CheckpointNotFoundError: If there is none.
    """
    found = _at(path, path.parent.resolve() / path.name)
    if found is None:
        raise CheckpointNotFoundError(
            str(path), f"no committed checkpoint: it holds neither {INDEX!r} nor safetensors files"
        )
    return found


def named(source: Path, version: str | os.PathLike[str]) -> Path:
    """Return where a version is: a sub-folder of a run folder, or any other path."""
    path = Path(version)
    return source / path if len(path.parts) == 1 and not _marks(source) else path


def _at(path: Path, entry: Path | None = None) -> Candidate | None:
    real = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    marks = _marks(real)
    return Candidate(path=real, identity=marks, entry=entry) if marks else None


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
    return tuple(map(_identity, found))


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
