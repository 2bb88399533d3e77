"""How shards become a checkpoint: staged beside it, then moved into place, `index` last.

    path/.saving-RANKS-ID/             no reader looks here
        model-…safetensors             each rank's shards
        part-000003.json               what rank 3 wrote, once all of it is on the disk
        old/                           what stood in the way, until the commit is done
    path/index, path/model-…           the checkpoint

The commit, by rank 0, once every rank's part is there and synced:

1. `index` of the old checkpoint moves away. From here to step 3 the folder holds no checkpoint.
2. The other old files move away, the new ones into place. Only names change: no byte is copied or
   freed meanwhile, so it takes milliseconds whatever the size.
3. The new `index` moves into place.

The folder is synced after each step. If one fails, all moves are undone, in reverse. Whoever looks,
at any moment and after a crash at any moment, sees the old checkpoint whole, or none, or the new
one whole.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader.checkpoint import INDEX
from asyncloader.errors import SaveError

from ._old_files import STAGING, old_files
from ._part import merge_parts, parse_part, render_part

if TYPE_CHECKING:
    from asyncloader.storage import Folder

    from ._part import RankPart

__all__ = ["Commit"]

_log = logging.getLogger(__name__)

_OLD = "old"


@dataclass(slots=True)
class Commit:
    """One rank's view of a save. Every method may block, and belongs on a thread."""

    folder: Folder
    save_id: str
    rank: int
    ranks: int
    dead_after: float
    """Seconds after which what another save of several ranks has staged counts as left behind."""

    _moved: list[tuple[str, str]] = field(default_factory=list, init=False)

    @property
    def staging(self) -> str:
        """The folder that ranks write to."""
        return f"{STAGING}{self.ranks}-{self.save_id}"

    def begin(self) -> None:
        """Make sure that the folder may become a checkpoint, and make room for this rank.

        Raises:
            SaveError: If it holds something else.
        """
        self.folder.make("")
        old_files(self.folder)
        self.folder.make(self.staging)
        with contextlib.suppress(FileNotFoundError):
            self.folder.remove(self._part_file(self.rank))

    def publish(self, part: RankPart) -> None:
        """Say that all of this rank's shards are on the disk."""
        name = self._part_file(self.rank)
        self._write(f"{name}.tmp", render_part(part))
        self.folder.sync(self.staging)  # the shards' names, before anybody can read of them
        self.folder.move(f"{name}.tmp", name)
        self.folder.sync(self.staging)

    def missing(self) -> tuple[int, ...]:
        """Return the ranks that have not published their parts yet."""
        there = set(self.folder.names(self.staging))
        return tuple(r for r in range(self.ranks) if _part_name(r) not in there)

    def commit(self) -> None:
        """Make the checkpoint of what all ranks have published.

        Raises:
            SaveError: If the parts do not make one.
            OSError: If the folder failed; all is as it was, as far as it could be undone.
        """
        parts = [self._read_part(rank) for rank in range(self.ranks)]
        try:
            texts = merge_parts(parts)
        except ValueError as error:
            raise SaveError(self.folder.location, str(error)) from error
        for name, text in texts.items():
            self._write(f"{self.staging}/{name}", text)
        self.folder.make(f"{self.staging}/{_OLD}")
        self.folder.sync(self.staging)
        new = [name for part in parts for name in part.numbers]
        new += [name for name in texts if name != INDEX]
        old = old_files(self.folder)
        try:
            self._swap(old, new)
        except OSError as error:
            self._undo(error)
            raise

    def _swap(self, old: list[str], new: list[str]) -> None:
        if INDEX in old:
            self._move(INDEX, f"{self.staging}/{_OLD}/{INDEX}")
            self.folder.sync("")
        for name in old:
            if name != INDEX:
                self._move(name, f"{self.staging}/{_OLD}/{name}")
        for name in new:
            self._move(f"{self.staging}/{name}", name)
        self.folder.sync("")
        self._move(f"{self.staging}/{INDEX}", INDEX)
        self.folder.sync("")

    def _move(self, source: str, target: str) -> None:
        self.folder.move(source, target)
        self._moved.append((source, target))

    def _undo(self, reason: OSError) -> None:
        """Move everything back, last move first, so that the old `index` comes last."""
        try:
            while self._moved:
                source, target = self._moved[-1]
                marks = INDEX in {source, target}
                if marks:
                    self._sync_if_possible()
                self.folder.move(target, source)
                self._moved.pop()
                if marks:
                    self._sync_if_possible()
        except OSError as error:
            kept = f"{self.folder.location}/{self.staging}"
            reason.add_note(f"undoing it failed too ({error}): the files are in {kept}")

    def outcome(self) -> str:
        """Say what a save that failed has left in the folder."""
        if not self._moved:
            return "what was there before is as it was"
        return f"the folder holds no checkpoint now, its files are in {self.staging}"

    def _sync_if_possible(self) -> None:
        with contextlib.suppress(OSError):  # what matters is that names are right again
            self.folder.sync("")

    def clean(self) -> None:
        """Remove what was staged, and what dead saves have left behind. Fails in silence."""
        try:
            for name in self.folder.names(""):
                if name.startswith(STAGING) and (name == self.staging or self._is_dead(name)):
                    self._remove_staging(name)
        except OSError as error:
            _log.warning("%s: left-overs could not be removed: %s", self.folder.location, error)

    def abandon(self, files: list[str]) -> None:
        """Remove what this rank has staged; rank 0, whose save it is, removes all. In silence."""
        if self.rank == 0:
            if not self._moved:
                self.clean_own()
            return
        for name in (self._part_file(self.rank), *(f"{self.staging}/{file}" for file in files)):
            with contextlib.suppress(OSError):
                self.folder.remove(name)
        with contextlib.suppress(OSError):
            self.folder.remove_folder(self.staging)

    def clean_own(self) -> None:
        """Remove what was staged for this save. Fails in silence."""
        with contextlib.suppress(OSError):
            self._remove_staging(self.staging)

    def _is_dead(self, name: str) -> bool:
        """Say whether nobody works in a staging folder any more. We hold the checkpoint's lock."""
        if name.startswith(f"{STAGING}1-"):
            return True  # whoever saves alone holds the lock
        return self.folder.age(name, self.staging) > self.dead_after

    def _remove_staging(self, staging: str) -> None:
        for under in (f"{staging}/{_OLD}", staging):
            with contextlib.suppress(FileNotFoundError):
                for name in self.folder.names(under):
                    if under != staging or name != _OLD:
                        self.folder.remove(f"{under}/{name}")
                self.folder.remove_folder(under)

    def _read_part(self, rank: int) -> RankPart:
        name = self._part_file(rank)
        part = parse_part(self.folder.read(name))
        if (part.save_id, part.rank, part.ranks) != (self.save_id, rank, self.ranks):
            problem = f"it is rank {part.rank} of {part.ranks}'s part of save {part.save_id!r}"
            raise SaveError(self.folder.location, problem, name)
        for file, size in part.sizes.items():
            found = self.folder.size(f"{self.staging}/{file}")
            if found != size:
                problem = f"{found} bytes long, but rank {rank} wrote {size}"
                raise SaveError(self.folder.location, problem, f"{self.staging}/{file}")
        return part

    def _part_file(self, rank: int) -> str:
        return f"{self.staging}/{_part_name(rank)}"

    def _write(self, name: str, text: bytes) -> None:
        file = self.folder.create(name)
        try:
            if text:
                file.write(0, [memoryview(text)])
            file.sync()
        finally:
            file.close()


def _part_name(rank: int) -> str:
    return f"part-{rank:06d}.json"
