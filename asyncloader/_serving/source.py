"""Finds the versions of a model in the file system, and waits until one is written completely.

Functions that are no coroutine functions block, and belong on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from asyncloader._checkpoint.format import INDEX, MODEL, SIDECAR, TENSORKEY
from asyncloader.errors import CheckpointNotFoundError
from asyncloader.runs import listed, name_order, newest_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from asyncloader._storage.small_files import Looks


_SAFETENSORS = ".safetensors"
_WEIGHT_MAP = f"{_SAFETENSORS}.index.json"
_NAMES = frozenset((INDEX, TENSORKEY, SIDECAR))
_REMEMBERED = 100
_NAMED = 3

Identity: TypeAlias = tuple[int, ...]
"""Device, inode, size, time of the last change of the bytes: another one if a file is written to,
or another file takes its place."""

Files: TypeAlias = dict[str, Identity]
"""The files of a version that a load reads, now or soon, by name, as one look found them."""


class Names(TypedDict):
    """The fields of an event that name its version."""

    version: str
    location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A committed checkpoint, as one look found it. Two are equal if they are the same version.

    Attributes:
        path: Where it was found, links resolved: it stays there, though a link leads elsewhere now.
        identity: Of the files that say that it is committed: of `index`, which is written anew when
            another version takes its place, or of all files that hold tensors.
        files: May change while it is the same version: `index` comes before the shards.
        entry: Its name in its run folder, as a path; that may be a link to a folder elsewhere.
            `None` if it is the source itself.
        parts: If it is made of versions of several runs: these.
    """

    path: Path
    identity: tuple[Identity, ...]
    files: Files = field(compare=False)
    entry: Path | None = field(default=None, compare=False)
    parts: tuple[Candidate, ...] = ()

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts) or self.path.name

    @property
    def names(self) -> Names:
        return {"version": self.name, "location": str(self.path)}

    def brings_news_to(self, before: Candidate) -> bool:
        """Say whether a load would find a file that has come since, or has changed.

        A file that is gone is no news, nor is one that is still under way by another name.
        """
        return self.path != before.path or any(
            before.files.get(name) != identity
            for name, identity in self.files.items()
            if not _has_tensors(name) or name.endswith((_SAFETENSORS, _WEIGHT_MAP, MODEL))
        )

    async def is_older_than(
        self, other: Candidate, served: Collection[Candidate], looks: Looks
    ) -> bool:
        """Say whether another version of the same run folder came after this one.

        The version that the list names last is new, whatever its time, unless it is in `served`.
        """
        mine, theirs = self.entry, other.entry
        if mine is None or theirs is None or mine == theirs or mine.parent != theirs.parent:
            return False  # a version that took another's place, or came with a folder, is meant
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
        return await candidate(looks, await newest_version(looks, source, finished=False))
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
    """Return the path of a version: of a sub-folder of a run folder, or any other path."""
    path = Path(version)
    return source / path if len(path.parts) == 1 and _at(source) is None else path


def _at(
    path: Path, tick: Callable[[], object] = int, *, is_version: bool = False
) -> Candidate | None:
    entry = path.parent.resolve() / path.name if is_version else None
    real = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    found = _files_of(real, tick)
    if (mark := real.name if real.name in found else INDEX) in found:
        marks = [mark]
    else:
        marks = [name for name in sorted(found) if name.endswith(_SAFETENSORS)]
    if not marks:
        return None
    identity = tuple(found[name] for name in marks)
    return Candidate(path=real, identity=identity, files=found, entry=entry)


def _files_of(path: Path, tick: Callable[[], object]) -> Files:
    is_file = os.path.isfile(path)  # noqa: PTH113  # Path's own raises for odd names
    is_alone = is_file and not path.name.endswith(_WEIGHT_MAP)
    if is_alone:
        files = [path]
    else:
        folder = path.parent if is_file else path  # the shards are beside a weight map
        try:
            # Shards under way, by other names, count: rsync's `.NAME.Xy12z9`, others' `NAME.part`.
            files = [
                one for one in folder.iterdir() if one.name in _NAMES or _has_tensors(one.name)
            ]
        except OSError:
            return {}
    found: Files = {}
    for file in files:
        tick()
        with contextlib.suppress(OSError):  # removed meanwhile
            status = file.stat()
            if stat.S_ISREG(status.st_mode):
                device, inode = status.st_dev, status.st_ino
                found[file.name] = device, inode, status.st_size, status.st_mtime_ns
    if INDEX in found or is_alone:
        return found
    return {name: identity for name, identity in found.items() if MODEL not in name}


def _has_tensors(name: str) -> bool:
    """Say whether a file is a shard or RecIS's `model.pt`, also one that is still under way."""
    return _SAFETENSORS in name or MODEL in name


class Rest:
    """Knows for how long the files of versions have not changed.

    No time of a file is compared with a clock: that of a file server may be wrong.

    Args:
        seconds: The time for which no look may find a change.
        note: Gets an object that stands for a wait, and a text that says why; an empty text once
            the wait is over.
        clock: Seconds, ever growing.
    """

    def __init__(
        self,
        seconds: float,
        *,
        note: Callable[[object, str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._note = note
        self._clock = clock
        self._since: dict[Path, tuple[Files, float]] = {}

    async def reached(self, look: Callable[[], Awaitable[Candidate | None]]) -> Candidate:
        """Return a version once two looks, some time apart, have found the same files.

        Args:
            look: Returns the version as it is now; `None` where that is unknown. An error of it
                ends the wait.
        """
        wait = object()
        seen: Candidate | None = None
        try:
            while True:
                began = self._clock()
                found = await look()
                left = self._seconds
                if found is not None:
                    left = self._left(found, began)
                    if not left:
                        return found
                    if seen is not None and seen.path == found.path and seen.files != found.files:
                        self._note(wait, _waits(found, seen))
                    seen = found
                await asyncio.sleep(left)
        finally:
            self._note(wait, "")

    def _left(self, found: Candidate, began: float) -> float:
        """Return for how long the files of a look that began then have to stay as they are."""
        files, since = self._since.pop(found.path, (None, 0.0))
        if files != found.files:
            since = self._clock()
        self._since[found.path] = found.files, since
        if len(self._since) > _REMEMBERED:
            del self._since[next(iter(self._since))]
        return max(since + self._seconds - began, 0.0)


def _waits(found: Candidate, before: Candidate) -> str:
    changes = found.files.items() ^ before.files.items()
    names = sorted({name for name, _ in changes})
    text = ", ".join(map(repr, names[:_NAMED])) + ("" if len(names) <= _NAMED else ", …")
    return f"{found.path}: is being written to ({text}); it is loaded once its files stand still"
