"""How shards become a checkpoint where nothing can be renamed: `index` is created last, once.

    path/model-…-ID.safetensors        each rank's shards; ID is the save's: no other writes there
    path/.saving-RANKS-ID/             files whose names are fixed (`model.pt`, `extra.pt`, …), and
                                       what ranks tell each other; no reader looks here
    path/.saving-claim                 the save that commits now
    path/index                         makes a checkpoint of all that

The commit, by rank 0, once every rank's part is there:

1. The claim is created. Where another save holds it, this one waits; one that is older than a
   commit can take was left by a save that died, and is taken over.
2. `index` of the old checkpoint is removed, if it may be replaced. From here to 4 there is none.
3. Files with fixed names are copied to their places within the store, and the small ones written.
4. `index` is created: not if there is one, for then another save has committed.
5. A run's list gets its line; what is left of the old checkpoint and of dead saves is removed, and
   then the claim.

A save that fails removes what bears its id, unless `index` names it, or may yet come to: if the
answer to 4 is lost, nothing is removed, and the claim stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import INDEX, SAFETENSORS, STAGING
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import SaveError

from .claim import LEASE, CommitClaim
from .leftovers import is_shard, old_files, telling
from .part import render_part
from .ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from concurrent.futures import Executor

    from asyncloader._storage.folder import ConditionalFolder, Entry

    from .part import RankPart


_log = logging.getLogger(__name__)

_PAUSE = 1.0
_READ_AGAIN = 8 << 20  # bytes
_LARGEST_COPY = 5 << 30  # bytes, of S3
_IS_THERE = (
    "there is a checkpoint already, and nothing was written: save to another place, or pass "
    "overwrite=True"
)


@dataclass(slots=True)
class StoreCommit(Ranks):
    """A commit by one conditional write.

    Attributes:
        replaces: Whether a checkpoint that is there may be replaced.
        lease: Seconds after which a claim counts as left by a save that died.
    """

    folder: ConditionalFolder
    replaces: bool = False
    lease: float = LEASE
    _old: set[str] = field(default_factory=set, init=False)
    _claim: CommitClaim = field(init=False)
    _has_published: bool = field(default=False, init=False)
    _has_removed: bool = field(default=False, init=False)
    _is_unsure: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._claim = CommitClaim(self.folder, self.save_id, self.staging, lease=self.lease)

    @property
    def shard_mark(self) -> str:
        """The save's id, so that no other save writes to the same objects."""
        return self.save_id

    def place(self, file: str, size: int) -> str:
        """Return where to write a file: a shard to its place, another one beside it first.

        Raises:
            SaveError: If it would be written over a file of the checkpoint that is there.
        """
        if is_shard(file):
            return file
        if size <= _LARGEST_COPY:
            return f"{self.staging}/{file}"
        if INDEX in self._old:
            problem = (
                "larger than 5 GiB, which cannot be copied within a store, so the checkpoint that "
                "is there cannot be replaced by a commit: save to another place"
            )
            raise SaveError(self.folder.location, problem, file)
        return file

    def begin(self) -> None:
        """Make sure that there is nothing that must stay."""
        if self.rank == 0:
            self._old = {*old_files(self.folder, whole=self.is_run)}
            if INDEX in self._old and not self.replaces:
                raise SaveError(self.folder.location, _IS_THERE)
            if self.ranks > 1:
                self._write(self._sign_of_life, b"")
        if self.folder.names(self.staging):  # of an earlier try that had the same id
            self._remove([self._part_file(self.rank), self._failure_file(self.rank)])

    def publish(self, part: RankPart) -> None:
        """Tell rank 0 that all of this rank's shards are there; from now on they stay."""
        self._has_published = True
        self._write(self._part_file(self.rank), render_part(part))

    async def missing(self, executor: Executor) -> tuple[int, ...]:
        """Return the ranks whose part is not there yet.

        Raises:
            SaveError: If one has given up, or another save has cleared this one away.
        """
        missing = await Ranks.missing(self, executor)
        [lives] = await run_jobs(executor, [lambda: self.folder.stat(self._sign_of_life)])
        if 0 in missing or (self.ranks > 1 and lives is None):
            problem = "another save has committed here meanwhile, and cleared this one away"
            raise SaveError(self.folder.location, problem)
        return missing

    async def ready(self, executor: Executor) -> None:
        """Wait until no other save commits here."""
        while True:
            [waits] = await run_jobs(executor, [self._claim.take])
            if waits is None:
                return
            _log.info("%s: another save commits here, since %.0f s", self.folder.location, waits)
            await asyncio.sleep(_PAUSE)

    def commit(self, part_texts: Sequence[bytes]) -> None:
        """Make a checkpoint of the parts of all ranks, if this save holds the claim.

        Raises:
            SaveError: If the parts do not fit together, or another save commits here, too.
        """
        parts, texts = self._merged(part_texts)
        files = {name for part in parts for name in part.sizes}
        there = self.folder.names("")  # what comes later is another save's
        # Not every store has two creations of one name at once refuse one of them (Swift).
        if not self._claim.is_ours():
            raise self._overtaken()
        self._remove_old_index(there)
        try:
            self._put_in_place(files, texts)
            if self.run_list is not None:
                self.run_list.publish()
            self._tidy(there, files | {*texts})
        finally:
            if not self._is_unsure:  # else others are to wait
                self._claim.release(self.told)
        if self.run_list is not None:
            self.run_list.evict()

    def _remove_old_index(self, there: list[str]) -> None:
        if INDEX in there:
            if not self.replaces:
                raise self._overtaken()
            self.folder.remove(INDEX)
            self._has_removed = True

    def _put_in_place(self, files: Iterable[str], texts: Mapping[str, bytes]) -> None:
        """Copy and write what is not in its place yet, `index` last."""
        staged = self._staged()
        for name in sorted(staged.keys() & files):
            self.folder.copy(f"{self.staging}/{name}", name)
        for name, text in texts.items():
            if name != INDEX:
                self._write(name, text)
        if not self._claim.is_ours():
            raise self._overtaken()
        tag = self._create_index(texts[INDEX])
        self.is_committed = True
        if not self._claim.is_ours() or not self._is_as_written(texts):
            self.is_committed = False
            entry = self.folder.stat(INDEX)
            if entry is not None and entry.tag == tag:
                self.folder.remove(INDEX)
            raise self._overtaken()

    def _is_as_written(self, texts: Mapping[str, bytes]) -> bool:
        """Say whether nobody has written over the small files."""
        there = self.folder.files("")
        for name, text in texts.items():
            if name not in there or there[name].size != len(text):
                return False
            if len(text) <= _READ_AGAIN and self.folder.read(name) != text:
                return False
        return True

    def _tidy(self, there: list[str], ours: set[str]) -> None:
        """Remove what the old checkpoint and dead saves have left, and what ranks have told."""
        dead = {name for name in there if is_shard(name)}
        self._remove((self._old | dead) - ours)
        stagings = {name for name in there if name.startswith(STAGING) and name.endswith("/")}
        for staging in {*stagings, f"{self.staging}/"}:
            self._remove(staging + name for name in self._told_in(staging))

    def _create_index(self, text: bytes) -> str:
        try:
            return self.folder.put(INDEX, text, over=None)
        except FileExistsError as error:
            raise self._overtaken() from error
        except OSError as error:
            # No answer: it may be lost, or the request come late.
            self._is_unsure = error.errno == errno.EIO
            raise

    def _overtaken(self) -> SaveError:
        problem = "another save commits a checkpoint here, too, so this one gives up"
        return SaveError(self.folder.location, problem)

    def _told_in(self, staging: str) -> list[str]:
        try:
            return self.folder.names(staging.rstrip("/"))
        except OSError as error:
            self.told.append(f"left-overs could not be listed: {error}")
            return []

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            with telling(self.told, f"{name!r} could not be removed"):
                self.folder.remove(name)

    def outcome(self) -> str:
        """Say in which state a failed save has left the place."""
        if self.is_committed:
            return "the checkpoint is there, whole"
        if self._is_unsure:
            return "whether it was committed is not known: look for its `index`"
        if self._has_removed:
            return "there is no checkpoint any more, as the old one was being replaced"
        return "what was there before is as it was"

    def abandon(self, files: list[str], reason: str) -> None:
        """Remove what this rank has written, and tell rank 0; rank 0 removes what all have."""
        if self._is_unsure:
            return  # it may be a checkpoint, and others are to wait
        self._claim.release(self.told)
        # What rank 0 knows of may be a part of the checkpoint by now.
        if (self.rank == 0 or not self._has_published) and not self._may_be_committed():
            self._remove(file for file in files if is_shard(file))
            if self.rank == 0:
                self._remove(name for name in self._told_in("") if name.endswith(self._ending))
        if self.rank == 0:
            self._remove(f"{self.staging}/{name}" for name in self._told_in(self.staging))
        else:
            with contextlib.suppress(OSError):
                text = reason.encode(errors="backslashreplace")
                self._write(self._failure_file(self.rank), text)

    def _may_be_committed(self) -> bool:
        """Say whether `index` names files of this save, as far as can be told."""
        try:
            return self._ending.encode() in self.folder.read(INDEX)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def refuse(self, reason: str) -> None:
        """As another rank, tell rank 0 that this rank failed before it wrote anything."""
        self.abandon([], reason)

    def _sizes(self) -> Mapping[str, Entry]:
        return {**self.folder.files(""), **self._staged()}

    def _staged(self) -> Mapping[str, Entry]:
        try:
            return self.folder.files(self.staging)
        except FileNotFoundError:
            return {}

    @property
    def _ending(self) -> str:
        """Ends the names of this save's shards."""
        return f"-{self.save_id}{SAFETENSORS}"

    @property
    def _sign_of_life(self) -> str:
        return f"{self.staging}/begun"
