"""Finds the versions of a model, and waits until one is written completely.

Functions that are no coroutine functions block, and belong on a thread.
"""

from __future__ import annotations

import asyncio
import errno
import posixpath
import time
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from asyncloader._addresses import is_url
from asyncloader._checkpoint.catalog import SHARDED, SINGLE, is_weight_map
from asyncloader._checkpoint.format import INDEX, MODEL, SIDECAR, TENSORKEY
from asyncloader._checkpoint.run_folder import listed, name_order, newest_version, sub_folder
from asyncloader.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from asyncloader._storage.folder import Entry, Folder
    from asyncloader._storage.looks import Looks


_SAFETENSORS = ".safetensors"
_WEIGHT_MAP = f"{_SAFETENSORS}.index.json"
_NAMES = (INDEX, TENSORKEY, SIDECAR)
_REMEMBERED = 100
_NAMED = 3

Files: TypeAlias = "dict[str, Entry]"
"""The files of a version that a load reads, now or soon, by name, as one look found them."""


class Names(TypedDict):
    """The fields of an event that name its version."""

    version: str
    location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A committed checkpoint, as one look found it. Two are equal if they are the same version.

    Attributes:
        location: Its URL; or its path, links resolved: it stays there, though a link leads
            elsewhere now.
        name: Of its folder or file.
        identity: Of the files that say that it is committed: of `index`, which is written anew when
            another version takes its place, or of all files that hold tensors.
        files: May change while it is the same version: `index` comes before the shards.
        run: The run folder that it was found in, and its name there, which may be that of a link to
            a folder elsewhere. `None` if it is the source itself.
        age: Comes after that of an older version of its run.
        parts: If it is made of versions of several runs: these.
    """

    location: str
    name: str
    identity: tuple[Entry, ...]
    files: Files = field(compare=False)
    run: tuple[str, str] | None = field(default=None, compare=False)
    age: tuple[float, list[str | int]] | None = field(default=None, compare=False)
    parts: tuple[Candidate, ...] = ()

    @property
    def names(self) -> Names:
        return {"version": self.name, "location": self.location}

    def brings_news_to(self, before: Candidate) -> bool:
        """Say whether a load would find a file that has come since, or has changed.

        A file that is gone is no news, nor is one that is still under way by another name.
        """
        return self.location != before.location or any(
            before.files.get(name) != entry
            for name, entry in self.files.items()
            if not _has_tensors(name) or name.endswith((_SAFETENSORS, _WEIGHT_MAP, MODEL))
        )

    async def is_older_than(
        self, other: Candidate, served: Collection[Candidate], looks: Looks
    ) -> bool:
        """Say whether another version of the same run folder came after this one.

        The version that the list names last is new, whatever its time, unless it is in `served`.
        """
        if self.run is None or other.run is None or self.run == other.run:
            return False  # a version that took another's place, or came with a folder, is meant
        (run, mine), (others, theirs) = self.run, other.run
        if run != others:
            return False
        names = await listed(looks, looks.folder(run))
        if mine in names and theirs in names:
            return names.index(mine) > names.index(theirs)
        if names[:1] == [mine] and self not in served:
            return False
        assert self.age is not None, "each version of a run has one"
        assert other.age is not None, "each version of a run has one"
        return self.age < other.age


async def newest(looks: Looks, source: str) -> Candidate:
    """Return the checkpoint at `source`, or the newest one of a run folder.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed, or there was no answer.
    """
    folder = looks.folder(source)
    found = await looks(_at, folder)
    if found is None:
        name = await newest_version(looks, folder, finished=False)
        return await candidate(looks, sub_folder(source, name))
    return found


async def candidate(looks: Looks, location: str) -> Candidate:
    """Return the checkpoint at a path or URL.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If there was no answer.
    """
    found = await looks(_at, looks.folder(location), is_version=True)
    if found is None:
        raise CheckpointNotFoundError(
            location, f"no committed checkpoint: it holds neither {INDEX!r} nor safetensors files"
        )
    return found


async def named(looks: Looks, source: str, version: str) -> str:
    """Return where a version is: a sub-folder of a run folder, or anywhere else."""
    if is_url(version) or len(PurePath(version).parts) != 1:
        return version
    itself = await looks(_at, looks.folder(source))
    return version if itself is not None else sub_folder(source, version)


def _at(folder: Folder, *, is_version: bool = False) -> Candidate | None:
    real = folder.resolved()
    name = posixpath.basename(real.location)
    found = _files_of(real, name)
    if (mark := name if name in found else INDEX) in found:
        marks = [mark]
    else:
        marks = [one for one in sorted(found) if one.endswith(_SAFETENSORS)]
    if not marks:
        return None
    identity = tuple(found[one] for one in marks)
    run, age = None, None
    if is_version:
        run = folder.above().resolved().location, posixpath.basename(folder.location)
        modified = max(one.modified for one in identity) if folder.dates_folders else 0.0
        age = modified, name_order(run[1])
    return Candidate(
        location=real.location, name=name, identity=identity, files=found, run=run, age=age
    )


def _files_of(folder: Folder, name: str) -> Files:
    """Return the files of the version in a folder, or of the one at the file of that name."""
    try:
        found = folder.files("")
    except (FileNotFoundError, NotADirectoryError):
        entry = folder.above().stat(name)
        if entry is None or entry.size is None:
            return {}
        if not is_weight_map(name):
            return {name: entry}
        found = folder.above().files("")  # the shards are beside it
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        # It does not tell what there is: these are asked for.
        asked = {one: folder.stat(one) for one in (*_NAMES, SHARDED, SINGLE)}
        found = {one: entry for one, entry in asked.items() if entry is not None}
    # Shards under way, by other names, count: rsync's `.NAME.Xy12z9`, others' `NAME.part`.
    return {
        one: entry
        for one, entry in found.items()
        if one in _NAMES or (_has_tensors(one) and (INDEX in found or MODEL not in one))
    }


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
        self._since: dict[str, tuple[Files, float]] = {}

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
                    same = seen is not None and seen.location == found.location
                    if seen is not None and same and seen.files != found.files:
                        self._note(wait, _waits(found, seen))
                    seen = found
                await asyncio.sleep(left)
        finally:
            self._note(wait, "")

    def _left(self, found: Candidate, began: float) -> float:
        """Return for how long the files of a look that began then have to stay as they are."""
        files, since = self._since.pop(found.location, (None, 0.0))
        if files != found.files:
            since = self._clock()
        self._since[found.location] = found.files, since
        if len(self._since) > _REMEMBERED:
            del self._since[next(iter(self._since))]
        return max(since + self._seconds - began, 0.0)


def _waits(found: Candidate, before: Candidate) -> str:
    changes = found.files.items() ^ before.files.items()
    names = sorted({name for name, _ in changes})
    text = ", ".join(map(repr, names[:_NAMED])) + ("" if len(names) <= _NAMED else ", …")
    where = f"{found.location}: is being written to ({text})"
    return f"{where}; it is loaded once its files stand still"
