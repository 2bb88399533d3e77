"""What the ranks of a save tell each other, by small files: the ground of each kind of commit."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader.errors import SaveError, SaveTimeoutError

from .leftovers import staging_of
from .part import merge_parts, parse_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Executor

    from asyncloader._storage.folder import Entry, WritableFolder

    from .part import RankPart
    from .run_list import RunList


_READERS = 8
# Between two looks at which ranks are done, in seconds: often at first, and then less.
_FIRST_LOOK, _LAST_LOOK = 0.01, 1.0


@dataclass(slots=True)
class Ranks(ABC):
    """One rank's view of a save. Methods that are no coroutine functions belong on a thread.

    Attributes:
        folder: What becomes the checkpoint.
        is_run: Whether the files that RecIS's trainer adds are the checkpoint's own.
        run_list: The list that the checkpoint comes into, if any.
        told: Warnings.
    """

    folder: WritableFolder
    save_id: str
    rank: int
    ranks: int
    is_run: bool = False
    run_list: RunList | None = None
    is_committed: bool = field(default=False, init=False)
    told: list[str] = field(default_factory=list, init=False)

    @property
    def staging(self) -> str:
        """The folder of what ranks tell each other."""
        return staging_of(self.ranks, self.save_id)

    @abstractmethod
    def place(self, file: str, size: int) -> str:
        """Return where to write a file of so many bytes."""

    @property
    @abstractmethod
    def shard_mark(self) -> str:
        """A part of the shards' names, where they are written to their final place."""

    @property
    def evicted(self) -> tuple[str, ...]:
        """Older checkpoints of the run that were removed."""
        return self.run_list.evicted if self.run_list and self.is_committed else ()

    @abstractmethod
    def begin(self) -> None:
        """Make room for this rank; raise `SaveError` if the folder holds anything else."""

    @abstractmethod
    def publish(self, part: RankPart) -> None:
        """Tell rank 0 that all of this rank's shards are there for good."""

    @abstractmethod
    async def ready(self, executor: Executor) -> None:
        """Wait until this save may commit."""

    @abstractmethod
    def _sizes(self) -> Mapping[str, Entry]:
        """Return the files that ranks have written, by name."""

    @abstractmethod
    def commit(self, part_texts: Sequence[bytes]) -> None:
        """Make a checkpoint of the parts of all ranks; if that fails, undo it as far as possible.

        Raises:
            SaveError: If the parts do not fit together.
        """

    @abstractmethod
    def outcome(self) -> str:
        """Say in which state a failed save has left the folder."""

    @abstractmethod
    def abandon(self, files: list[str], reason: str) -> None:
        """Remove the files that this rank has written, and tell rank 0; rank 0 removes the rest."""

    def refuse(self, reason: str) -> None:
        """As another rank, tell rank 0 that this rank failed before it staged anything."""
        with contextlib.suppress(OSError, SaveError):  # why it failed counts more
            self.begin()
            self.abandon([], reason)

    async def part_texts(
        self,
        executor: Executor,
        *,
        timeout: float | None,  # noqa: ASYNC109  # with an error of ours
    ) -> list[bytes]:
        """Wait until all ranks have published their parts; return the texts, by rank.

        Raises:
            SaveError: If a rank has given up.
            SaveTimeoutError: If a rank has not published its part within `timeout` seconds.
        """
        clock = asyncio.get_running_loop().time
        start, pause = clock(), _FIRST_LOOK
        while missing := await self.missing(executor):
            waited = clock() - start
            if timeout is not None and waited >= timeout:
                raise SaveTimeoutError(self.folder.location, missing, timeout)
            await asyncio.sleep(pause if timeout is None else min(pause, timeout - waited))
            pause = min(2 * pause, _LAST_LOOK)
        texts: dict[int, bytes] = {}

        async def read(rank: int) -> None:
            texts[rank] = await self.folder.aread(self._part_file(rank), executor)

        await for_each(range(self.ranks), read, workers=_READERS, name="asyncloader-part")
        return [texts[rank] for rank in range(self.ranks)]

    async def missing(self, executor: Executor) -> tuple[int, ...]:
        """Return the ranks whose part is not there yet; raise `SaveError` if one has given up."""
        [names] = await run_jobs(executor, [partial(self.folder.names, self.staging)])
        there = {f"{self.staging}/{name}" for name in names}
        for rank in range(self.ranks):
            if (name := self._failure_file(rank)) in there:
                text = (await self.folder.aread(name, executor)).decode()
                problem = f"rank {rank} gave up, so nothing was committed: {text}"
                raise SaveError(self.folder.location, problem)
        return tuple(rank for rank in range(self.ranks) if self._part_file(rank) not in there)

    def _merged(self, part_texts: Sequence[bytes]) -> tuple[list[RankPart], dict[str, bytes]]:
        """Return the ranks' parts, and the texts of the files that they make, `index` last."""
        parts = [self._part(rank, text) for rank, text in enumerate(part_texts)]
        there = self._sizes()
        for part in parts:
            for file, size in part.sizes.items():
                entry = there.get(file)
                found = "missing" if entry is None else f"{entry.size} bytes long"
                if entry is None or entry.size != size:
                    problem = (
                        f"{found}, but rank {part.rank} wrote {size}; did another save remove it?"
                    )
                    raise SaveError(self.folder.location, problem, self.place(file, size))
        try:
            return parts, merge_parts(parts)
        except ValueError as error:
            raise SaveError(self.folder.location, str(error)) from error

    def _part(self, rank: int, text: bytes) -> RankPart:
        name = self._part_file(rank)
        try:
            part = parse_part(text)
        except ValueError as error:
            raise SaveError(self.folder.location, f"damaged: {error}", name) from error
        if (part.save_id, part.rank, part.ranks) != (self.save_id, rank, self.ranks):
            problem = f"it is rank {part.rank} of {part.ranks}'s part of save {part.save_id!r}"
            raise SaveError(self.folder.location, problem, name)
        return part

    def _part_file(self, rank: int) -> str:
        return f"{self.staging}/part-{rank:06d}.json"

    def _failure_file(self, rank: int) -> str:
        return f"{self.staging}/failed-{rank:06d}.txt"

    def _write(self, name: str, text: bytes) -> None:
        file = self.folder.create(name)
        try:
            if text:
                file.write(0, [memoryview(text)])
            file.sync()
        finally:
            file.close()
