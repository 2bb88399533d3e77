"""How shards become a checkpoint: staged beside it, then moved into place, `index` last.

    path/.saving-RANKS-ID/             no reader looks here
        model-…safetensors             each rank's shards
        part-000003.json               what rank 3 wrote, once all of it is on the disk
        failed-000003.txt              or why it gave up
        old/                           what stood in the way, until the commit is done
    path/index, path/model-…           the checkpoint

The commit, by rank 0, once every rank's part is there and synced:

1. `index` of the old checkpoint moves away. From here to step 3 the folder holds no checkpoint.
2. The other old files move away, the new ones into place. Only names change: no byte is copied or
   freed meanwhile, so it takes milliseconds whatever the size.
3. The new `index` moves into place.

The folder is synced after each step. If one fails, all moves are undone, in reverse. A reader sees,
at any moment and after a crash at any moment, the old checkpoint whole, or none, or the new one
whole. (A reader that has read one `index` and opens shards of the other notices: see
`read_manifest`.) What a crash between 1 and 3 has moved away is put back by the next save.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import INDEX, TENSORKEY
from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader.errors import SaveError

from .leftovers import OLD, STAGING, old_files, recover, remove_dead, remove_staging
from .part import merge_parts, parse_part, render_part

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from asyncloader._storage.folder import Folder

    from .part import RankPart


_READERS = 8


@dataclass(slots=True)
class Commit:
    """One rank's view of a save. What is no coroutine function blocks, and belongs on a thread."""

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
        """Make room for this rank, once it is sure that the folder may become a checkpoint.

        Raises:
            SaveError: If it holds something else.
        """
        self.folder.make("")
        if self.rank == 0:
            recover(self.folder)
        old_files(self.folder)
        self.folder.make(self.staging)
        for name in (_part_name(self.rank), _failure_name(self.rank)):
            with contextlib.suppress(FileNotFoundError):
                self.folder.remove(f"{self.staging}/{name}")

    def publish(self, part: RankPart) -> None:
        """Say that all of this rank's shards are on the disk."""
        name = self._part_file(self.rank)
        self._write(f"{name}.tmp", render_part(part))
        self.folder.sync(self.staging)  # the shards' names, before rank 0 can read of them
        # Not synced again: rank 0 may have committed, and removed all of this, by now.
        self.folder.move(f"{name}.tmp", name)

    async def missing(self, executor: Executor) -> tuple[int, ...]:
        """Return the ranks that have not published their parts yet.

        Raises:
            SaveError: If one of them has given up.
        """
        [names] = await run_jobs(executor, [partial(self.folder.names, self.staging)])
        there = set(names)
        for rank in range(self.ranks):
            if _failure_name(rank) in there:
                name = f"{self.staging}/{_failure_name(rank)}"
                text = (await self.folder.aread(name, executor)).decode()
                problem = f"rank {rank} gave up, so nothing was committed: {text}"
                raise SaveError(self.folder.location, problem)
        return tuple(r for r in range(self.ranks) if _part_name(r) not in there)

    async def part_texts(self, executor: Executor) -> list[bytes]:
        """Return what all ranks have published, in the order of ranks; read side by side."""
        texts: dict[int, bytes] = {}

        async def read(rank: int) -> None:
            texts[rank] = await self.folder.aread(self._part_file(rank), executor)

        await for_each(range(self.ranks), read, workers=_READERS, name="asyncloader-part")
        return [texts[rank] for rank in range(self.ranks)]

    def commit(self, part_texts: Sequence[bytes]) -> None:
        """Make the checkpoint of what all ranks have published.

        Args:
            part_texts: Of each rank.

        Raises:
            SaveError: If the parts do not make one.
            OSError: If the folder failed; all is as it was, as far as it could be undone.
        """
        parts = [self._part(rank, text) for rank, text in enumerate(part_texts)]
        try:
            texts = merge_parts(parts)
        except ValueError as error:
            raise SaveError(self.folder.location, str(error)) from error
        for name, text in texts.items():
            self._write(f"{self.staging}/{name}", text)
        self.folder.make(f"{self.staging}/{OLD}")
        self.folder.sync(self.staging)
        new = [name for part in parts for name in part.numbers]
        new += [name for name in texts if name != INDEX]
        old = old_files(self.folder)
        try:
            self._swap(old, new)
        except BaseException as error:
            self._undo(error)
            raise

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
        self.folder.sync(aside)  # first: what has left one folder must be found in the other
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
        """Say what a save that failed has left in the folder."""
        if not self._moved:
            return "what was there before is as it was"
        return (
            f"the folder holds no checkpoint now, its files are in {self.staging}; the next save "
            "into it puts them back first"
        )

    def _sync_if_possible(self) -> None:
        with contextlib.suppress(OSError):  # what matters is that names are right again
            self.folder.sync("")

    def clean(self) -> None:
        """Remove what was staged, and what dead saves have left behind. Fails with a warning."""
        remove_dead(self.folder, self.staging, self.dead_after)
        remove_staging(self.folder, self.staging)

    def abandon(self, files: list[str], reason: str) -> None:
        """Remove what this rank has staged, and tell rank 0; as rank 0, whose save it is, all."""
        if self.rank == 0:
            if not self._moved:
                remove_staging(self.folder, self.staging, keep_old=True)
            return
        for name in (_part_name(self.rank), *files):
            with contextlib.suppress(OSError):
                self.folder.remove(f"{self.staging}/{name}")
        failure = f"{self.staging}/{_failure_name(self.rank)}"
        with contextlib.suppress(OSError):
            self._write(f"{failure}.tmp", reason.encode(errors="backslashreplace"))
            self.folder.move(f"{failure}.tmp", failure)

    def refuse(self, reason: str) -> None:
        """Tell rank 0 that this rank, another one, has failed before it staged anything."""
        with contextlib.suppress(OSError, SaveError):  # why it failed counts more
            self.begin()
            self.abandon([], reason)

    def _part(self, rank: int, text: bytes) -> RankPart:
        name = self._part_file(rank)
        try:
            part = parse_part(text)
        except ValueError as error:
            raise SaveError(self.folder.location, f"damaged: {error}", name) from error
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


def _failure_name(rank: int) -> str:
    return f"failed-{rank:06d}.txt"
