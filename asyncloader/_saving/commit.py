"""How shards become a checkpoint: staged beside it, then moved into place, `index` last.

    path/.saving-RANKS-ID/             no reader looks here
        model-…safetensors             each rank's shards
        part-000003.json               the list of rank 3's shards, once they are on the disk
        failed-000003.txt              or why rank 3 gave up
        old/                           the files of the old checkpoint, until the commit is done
    path/index, path/model-…           the checkpoint

The commit, by rank 0, once every rank's part is there and synced:

1. `index` of the old checkpoint moves away. From here to step 3 the folder holds no checkpoint.
2. The other old files move away, the new ones into place. Only names change: no byte is copied or
   freed meanwhile, so it takes milliseconds, for any size.
3. The new `index` moves into place.
4. Of a run, the new list of its checkpoints, which was written before, moves into place.

The folder is synced after each step. If one fails, all moves are undone, in reverse. A reader sees,
at any moment and after a crash at any moment, the old checkpoint whole, or none, or the new one
whole. (A reader that has read one `index` and opens shards of the other notices: see
`read_manifest`.) The next save puts the files back that a crash between 1 and 3 has moved away.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import INDEX, TENSORKEY

from .leftovers import (
    OLD,
    moved_away,
    old_files,
    put_back,
    remove_dead,
    remove_staging,
    telling,
)
from .part import render_part
from .ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Executor

    from asyncloader._storage.folder import Entry, RenamingFolder

    from .part import RankPart


@dataclass(slots=True)
class Commit(Ranks):
    """A commit by renaming."""

    folder: RenamingFolder
    _moved: list[tuple[str, str]] = field(default_factory=list, init=False)
    _is_recovering: bool = field(default=False, init=False)

    def place(self, file: str, size: int) -> str:  # noqa: ARG002  # of stores
        """Return a place in the staging folder."""
        return f"{self.staging}/{file}"

    def _sizes(self) -> Mapping[str, Entry]:
        return self.folder.files(self.staging)

    @property
    def shard_mark(self) -> str:
        """Nothing: other saves have other staging folders."""
        return ""

    def begin(self) -> None:
        """Make room for this rank; raise `SaveError` if the folder holds anything else."""
        self.folder.make("")
        if self.rank == 0 and (away := moved_away(self.folder)) is not None:
            self._is_recovering = True
            put_back(self.folder, away)
            self._is_recovering = False
        old_files(self.folder, whole=self.is_run)
        self.folder.make(self.staging)
        for name in (self._part_file(self.rank), self._failure_file(self.rank)):
            with contextlib.suppress(FileNotFoundError):
                self.folder.remove(name)

    async def ready(self, executor: Executor) -> None:
        """Wait for nothing: this save holds the folder."""

    def publish(self, part: RankPart) -> None:
        """Tell rank 0 that all of this rank's shards are on the disk."""
        name = self._part_file(self.rank)
        self._write(f"{name}.tmp", render_part(part))
        self.folder.sync(self.staging)  # the shards' names, before rank 0 can read of them
        # Not synced again: rank 0 may have committed, and removed all of this, by now.
        self.folder.move(f"{name}.tmp", name)

    def commit(self, part_texts: Sequence[bytes]) -> None:
        """Make a checkpoint of the parts of all ranks; if that fails, undo it as far as possible.

        Raises:
            SaveError: If the parts do not fit together.
        """
        parts, texts = self._merged(part_texts)
        for name, text in texts.items():
            self._write(f"{self.staging}/{name}", text)
        self.folder.make(f"{self.staging}/{OLD}")
        self.folder.sync(self.staging)
        new = [name for part in parts for name in part.sizes]
        new += [name for name in texts if name != INDEX]
        old = old_files(self.folder, whole=self.is_run)
        with contextlib.nullcontext() if self.run_list is None else self.run_list.staged():
            try:
                self._swap(old, new)
            except BaseException as error:
                self._undo(error)
                raise
            self.is_committed = True
            if self.run_list is not None:
                self.run_list.publish()
        if self.run_list is not None:
            self.run_list.evict()
        with telling(self.told, "left-overs could not be removed"):
            now = self.folder.changed_at(self.staging)
            remove_dead(self.folder, self.staging, self.told, now=now)
        remove_staging(self.folder, self.staging, self.told)

    def _swap(self, old: list[str], new: list[str]) -> None:
        aside = f"{self.staging}/{OLD}"
        if INDEX in old:
            self._move(INDEX, f"{aside}/{INDEX}")
            self._sync_both(aside)
        for name in sorted(set(old) - {INDEX}, key=lambda name: (name == TENSORKEY, name)):
            self._move(name, f"{aside}/{name}")
        for name in new:
            self._move(f"{self.staging}/{name}", name)
        self._sync_both(aside)
        self._move(f"{self.staging}/{INDEX}", INDEX)
        self.folder.sync("")

    def _sync_both(self, aside: str) -> None:
        self.folder.sync(aside)  # first: a file that has left one folder must be in the other
        self.folder.sync("")

    def _move(self, source: str, target: str) -> None:
        self._moved.append((source, target))  # before: one that fails may have taken effect
        self.folder.move(source, target)

    def _undo(self, reason: BaseException) -> None:
        """Move everything back, last move first, so that the old `index` comes last."""
        try:
            while self._moved:
                source, target = self._moved[-1]
                marks = INDEX in {source, target}
                if marks:
                    self._sync_if_possible()
                # Where nothing is, the move that failed did not take effect.
                with contextlib.suppress(FileNotFoundError):
                    self.folder.move(target, source)
                self._moved.pop()
                if marks:
                    self._sync_if_possible()
        except OSError as error:
            kept = f"{self.folder.location}/{self.staging}"
            reason.add_note(f"undoing it failed too ({error}): the files are in {kept}")

    def outcome(self) -> str:
        """Say in which state a failed save has left the folder."""
        if self.is_committed:
            return "the checkpoint is there, whole"
        if self._is_recovering:
            return (
                "what a save that was cut off had moved away is not all back yet; the next save "
                "into the folder goes on with that"
            )
        if not self._moved:
            return "what was there before is as it was"
        return (
            f"the folder holds no checkpoint now, its files are in {self.staging}; the next save "
            "into it puts them back first"
        )

    def _sync_if_possible(self) -> None:
        with contextlib.suppress(OSError):  # it matters more that names are right again
            self.folder.sync("")

    def abandon(self, files: list[str], reason: str) -> None:
        """Remove the files that this rank has staged, and tell rank 0; rank 0 removes all files."""
        if self.rank == 0:
            if not self._moved:
                remove_staging(self.folder, self.staging, self.told, keep_old=True)
            return
        staged = (f"{self.staging}/{file}" for file in files)
        for name in (self._part_file(self.rank), *staged):
            with contextlib.suppress(OSError):
                self.folder.remove(name)
        failure = self._failure_file(self.rank)
        with contextlib.suppress(OSError):
            self._write(f"{failure}.tmp", reason.encode(errors="backslashreplace"))
            self.folder.move(f"{failure}.tmp", failure)
