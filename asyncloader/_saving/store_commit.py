"""How shards become a checkpoint where nothing can be renamed: in place, `index` last.

    path/model-…-ID.safetensors        each rank's shards, there once they are whole
    path/.saving-RANKS-ID/             small objects by which ranks tell each other what they wrote
    path/index                         makes them a checkpoint: created once, or not at all

No reader takes anything for a checkpoint that has no `index`, and only one save can create that. So
a save that ends at any request leaves no checkpoint, and what it leaves is in nobody's way: its
shards have names of their own, and the next save that commits removes them. Where there was a
checkpoint, and it may be replaced, its `index` is removed before anything is written.
"""

from __future__ import annotations

import contextlib
import errno
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import DESCRIPTION, INDEX, SAFETENSORS, SIDECAR, TENSORKEY
from asyncloader.errors import SaveError, SaveTimeoutError

from .leftovers import STAGINGS, old_files, telling
from .part import render_part
from .ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asyncloader._storage.folder import ConditionalFolder

    from .part import RankPart


_PAUSE = 0.5
_TEXTS = (TENSORKEY, DESCRIPTION, SIDECAR)
_NOT_ALONE = "another save commits a checkpoint here at the same time, so this one gives up"
_IS_THERE = (
    "there is a checkpoint already, and nothing was written: save to another place, or pass "
    "overwrite=True, and then there is none until the save is done"
)


@dataclass(slots=True)
class StoreCommit(Ranks):
    """A commit by one conditional write.

    Attributes:
        replaces: Whether a checkpoint that is there may be replaced.
        patience: Seconds for which another rank waits until rank 0 has removed the old `index`.
    """

    folder: ConditionalFolder
    replaces: bool = False
    patience: float | None = None
    _is_replacing: bool = field(default=False, init=False)
    _has_begun: bool = field(default=False, init=False)
    _is_unsure: bool = field(default=False, init=False)
    _created: list[str] = field(default_factory=list, init=False)

    @property
    def under(self) -> str:
        """The place itself."""
        return ""

    @property
    def shard_mark(self) -> str:
        """The save's id, so that no other save writes to the same objects."""
        return self.save_id

    def begin(self) -> None:
        """Make sure that there is no checkpoint, and nothing else."""
        if self.rank == 0:
            names = old_files(self.folder, whole=self.is_run)
            if INDEX in names and not self.replaces:
                raise SaveError(self.folder.location, _IS_THERE)
            if INDEX in names:
                self._is_replacing = True
                self.folder.remove(INDEX)
            # Of the old checkpoint, or of a save that died before it had an `index`.
            self._remove(name for name in names if name in _TEXTS)
        else:
            self._await_no_index()
        self._has_begun = True
        for name in (self._part_file(self.rank), self._failure_file(self.rank)):
            with contextlib.suppress(FileNotFoundError):
                self.folder.remove(name)

    def _await_no_index(self) -> None:
        """Wait until no reader can take what this rank writes for a part of the old checkpoint."""
        until = None if self.patience is None else time.monotonic() + self.patience
        while self.folder.stat(INDEX) is not None:
            if not self.replaces:
                raise SaveError(self.folder.location, _IS_THERE)
            if until is not None and time.monotonic() > until:
                raise SaveTimeoutError(self.folder.location, (0,), self.patience or 0.0)
            time.sleep(_PAUSE)

    def publish(self, part: RankPart) -> None:
        """Tell rank 0 that all of this rank's shards are there."""
        self._write(self._part_file(self.rank), render_part(part))

    def commit(self, part_texts: Sequence[bytes]) -> None:
        """Make a checkpoint of the parts of all ranks.

        Raises:
            SaveError: If the parts do not fit together, or another save commits here, too.
        """
        parts, texts = self._merged(part_texts)
        index = texts.pop(INDEX)
        # Created, too, so that another save that commits now, or has, is noticed.
        tags = {name: self._create(name, text) for name, text in texts.items()}
        try:
            self._create(INDEX, index)
        except SaveError:
            raise
        except OSError as error:
            # No answer: it may be lost, or the request come late.
            self._is_unsure = error.errno == errno.EIO
            raise
        self.is_committed = True
        # One that has just begun takes them for what a dead save has left.
        there = self.folder.files("")
        if any(name not in there or there[name].tag != tag for name, tag in tags.items()):
            self.folder.remove(INDEX)
            self.is_committed = False
            raise SaveError(self.folder.location, _NOT_ALONE)
        if self.run_list is not None:
            self.run_list.publish()
            self.run_list.evict()
        with telling(self.told, "left-overs could not be removed"):
            self._tidy({INDEX, *tags, *(name for part in parts for name in part.sizes)})

    def _create(self, name: str, text: bytes) -> str:
        try:
            tag = self.folder.put(name, text, over=None)
        except FileExistsError as error:
            raise SaveError(self.folder.location, _NOT_ALONE) from error
        self._created.append(name)
        return tag

    def _tidy(self, ours: set[str]) -> None:
        """Remove the old checkpoint's files, and what dead saves have left."""
        self._remove(set(old_files(self.folder, whole=self.is_run)) - ours)
        for name in self.folder.names(""):
            if STAGINGS.fullmatch(name):
                self._remove(name + one for one in self.folder.names(name.rstrip("/")))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with (
                telling(self.told, f"{name!r} could not be removed"),
                contextlib.suppress(FileNotFoundError),
            ):
                self.folder.remove(name)

    def outcome(self) -> str:
        """Say in which state a failed save has left the place."""
        if self.is_committed:
            return "the checkpoint is there, whole"
        if self._is_unsure:
            return "whether it was committed is not known: look for its `index`"
        if self._is_replacing:
            return "there is no checkpoint any more, as the old one's `index` was removed first"
        return "nothing was committed"

    def abandon(self, files: list[str], reason: str) -> None:
        """Remove what this rank has written, and tell rank 0."""
        if self._is_unsure:
            return  # it may be a checkpoint
        if self._has_begun:  # else files of these names are the old checkpoint's
            self._remove([*self._created, *files])
        if self.rank == 0:
            with telling(self.told, "left-overs could not be removed"):
                told = (f"{self.staging}/{name}" for name in self.folder.names(self.staging))
                # Of the other ranks, too.
                mark = f"-{self.shard_mark}{SAFETENSORS}"
                self._remove([*told, *(x for x in self.folder.names("") if x.endswith(mark))])
            return
        with contextlib.suppress(OSError):
            self.folder.remove(self._part_file(self.rank))
        with contextlib.suppress(OSError):
            text = reason.encode(errors="backslashreplace")
            self._write(self._failure_file(self.rank), text)

    def refuse(self, reason: str) -> None:
        """As another rank, tell rank 0 that this rank failed before it wrote anything."""
        self.abandon([], reason)
