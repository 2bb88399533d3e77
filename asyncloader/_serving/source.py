"""What there is to serve. What is no coroutine function blocks, and belongs on a thread."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from asyncloader._checkpoint.format import INDEX, SIDECAR, TENSORKEY
from asyncloader.errors import CheckpointNotFoundError
from asyncloader.runs import listed, name_order, newest_committed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from asyncloader._storage.small_files import Looks


_SAFETENSORS = ".safetensors"
_WEIGHT_MAP = f"{_SAFETENSORS}.index.json"
_NAMES = frozenset((INDEX, TENSORKEY, SIDECAR))

Identity: TypeAlias = tuple[int, ...]
"""Device, inode, size, time of the last change of the bytes."""


class Names(TypedDict):
    """Which version something is about."""

    version: str
    location: str


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a version that a load reads, now or soon, as one look found them."""

    identities: dict[str, Identity]
    """By name: what changes when a file is written to, or another one takes its place."""

    @property
    def have_index(self) -> bool:
        """Whether a file says which shards there are."""
        return INDEX in self.identities

    @property
    def marks(self) -> tuple[Identity, ...]:
        """What says that a version is committed: `index`, or all files that hold tensors."""
        if self.have_index:
            return (self.identities[INDEX],)
        found = sorted(self.identities.items())
        return tuple(one for name, one in found if name.endswith(_SAFETENSORS))

    def bring_news_to(self, before: Files) -> bool:
        """Say whether a file that a load reads has come since, or has changed.

        That some are gone is no news.
        """
        now = {name: one for name, one in self.identities.items() if not _is_under_way(name)}
        return not now.items() <= before.identities.items()

    def changed_since(self, before: Files) -> list[str]:
        """Return the names of files that have come, gone or changed."""
        return sorted({name for name, _ in self.identities.items() ^ before.identities.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A committed checkpoint, as one look found it. Two are equal if they are the same version."""

    path: Path
    """Where it was found, links resolved: where it is still, though a link leads elsewhere now."""

    identity: tuple[Identity, ...]
    """What changes when another one takes its place: its `index` is written anew."""

    files: Files = field(compare=False)
    """Of one version they may change: `index` comes before the shards."""

    entry: Path | None = field(default=None, compare=False)
    """Its name in its run folder, as a path; that may be a link to a folder elsewhere. `None` if it
    is the source itself."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.name

    @property
    def names(self) -> Names:
        """What events say of it."""
        return {"version": self.name, "location": str(self.path)}

    def brings_news_to(self, before: Candidate) -> bool:
        """Say whether a load would find anything else than it did before."""
        return self.path != before.path or self.files.bring_news_to(before.files)

    async def is_older_than(
        self, other: Candidate, served: Collection[Candidate], looks: Looks
    ) -> bool:
        """Say whether another version of the same run folder came after this one.

        The version that the list names last is new, whatever its time, unless it is in `served`.
        """
        mine, theirs = self.entry, other.entry
        if mine is None or theirs is None or mine == theirs or mine.parent != theirs.parent:
            return False  # what took a version's place, or came with another folder, is meant
        names = await listed(looks, mine.parent)
        if mine.name in names and theirs.name in names:
            return names.index(mine.name) > names.index(theirs.name)
        if names[:1] == [mine.name] and self not in served:
            return False
        return (self._modified, name_order(mine.name)) < (other._modified, name_order(theirs.name))

    @property
    def _modified(self) -> int:
        return max(modified for *_, modified in self.identity)


async def newest(looks: Looks, source: Path) -> Candidate:
    """Return the checkpoint at `source`, or the newest one of a run folder.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed, or there was no answer.
    """
    found = await looks.at_many(partial(_at, source))
    if found is None:
        return await candidate(looks, await newest_committed(looks, source))
    return found


async def candidate(looks: Looks, path: Path) -> Candidate:
    """Return the checkpoint at `path`.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If there was no answer.
    """
    found = await looks.at_many(partial(_at, path, is_version=True))
    if found is None:
        raise CheckpointNotFoundError(
            str(path), f"no committed checkpoint: it holds neither {INDEX!r} nor safetensors files"
        )
    return found


def named(source: Path, version: str | os.PathLike[str]) -> Path:
    """Return where a version is: a sub-folder of a run folder, or any other path."""
    path = Path(version)
    return source / path if len(path.parts) == 1 and _at(source) is None else path


def _at(
    path: Path, tick: Callable[[], object] = int, *, is_version: bool = False
) -> Candidate | None:
    entry = path.parent.resolve() / path.name if is_version else None
    real = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    files = _files_of(real, tick)
    own = files.identities.get(real.name)  # if it is a file, and no folder
    marks = files.marks if own is None else (own,)
    return Candidate(path=real, identity=marks, files=files, entry=entry) if marks else None


def _files_of(path: Path, tick: Callable[[], object]) -> Files:
    identities: dict[str, Identity] = {}
    for file in _listed(path):
        tick()
        try:
            found = file.stat()
        except OSError:  # removed meanwhile
            continue
        if stat.S_ISREG(found.st_mode):
            identities[file.name] = _identity(found)
    return Files(identities)


def _listed(path: Path) -> list[Path]:
    if os.path.isfile(path):  # noqa: PTH113  # Path's own raises for odd names
        if not path.name.endswith(_WEIGHT_MAP):
            return [path]
        path = path.parent  # where its shards are
    try:
        # Shards under way, by other names, count: rsync's `.NAME.Xy12z9`, `NAME.part` of others.
        return [file for file in path.iterdir() if file.name in _NAMES or _SAFETENSORS in file.name]
    except OSError:
        return []


def _is_under_way(name: str) -> bool:
    return _SAFETENSORS in name and not name.endswith((_SAFETENSORS, _WEIGHT_MAP))


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
