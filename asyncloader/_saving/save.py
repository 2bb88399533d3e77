"""One save under way: from blocks to a committed checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader._memory.sizes import listed
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import SaveError, SaveTimeoutError

from .part import RankPart
from .writing import write_shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.sidecar import ShardDigests

    from .commit import Commit
    from .contents import Contents
    from .layout import ShardLayout
    from .writing import Means


# Between two looks at which ranks are done, in seconds: often at first, and then less.
_FIRST_LOOK, _LAST_LOOK = 0.01, 1.0


@dataclass(slots=True, kw_only=True)
class Save:
    """Writes one rank's part and, as rank 0, commits those of all."""

    contents: Contents
    layouts: Sequence[ShardLayout]
    commit: Commit
    means: Means
    timeout: float | None
    """Seconds to wait for the other ranks."""

    tensors: Mapping[str, str]
    """By name, dtype and shape of each dense tensor that this rank was given."""

    committed: bool = field(default=False, init=False)

    async def run(self) -> None:
        """Write, wait, commit. On failure nothing of it stays but the folder.

        Raises:
            SaveError: If the folder holds something else, or failed, or the ranks' parts do not
                fit together.
            SaveTimeoutError: If ranks are missing.
        """
        threads = self.means.threads.reads
        held = contextlib.ExitStack()
        try:
            await run_jobs(threads, [lambda: self._hold(held)])
            await self._write_and_commit()
        except SaveError:
            raise
        except OSError as error:
            raise self._explained(error) from error
        finally:
            await run_jobs(threads, [held.close])

    def _explained(self, error: OSError) -> SaveError:
        """Say which file of the folder it was, and what the folder holds now."""
        location = self.means.folder.location
        named = error.filename if isinstance(error.filename, str) else ""
        file = named.removeprefix(location).lstrip(os.sep) if named.startswith(location) else ""
        what = error.strerror if file else error
        problem = f"could not be written: {what}; {self.commit.outcome()}"
        return SaveError(location, problem, file or None)

    def _hold(self, held: contextlib.ExitStack) -> None:
        """Let nobody else commit to this folder meanwhile."""
        self.means.folder.make("")
        if self.commit.rank == 0 and not held.enter_context(self.means.folder.hold()):
            problem = (
                "somebody else is saving to this folder right now, or this process itself (a "
                "handler of a signal, say): save into another folder, or later"
            )
            raise SaveError(self.means.folder.location, problem)

    async def _write_and_commit(self) -> None:
        threads = self.means.threads.reads
        try:
            await run_jobs(threads, [self.commit.begin])
            digests = await write_shards(
                self.layouts,
                self.contents.sources,
                self.means,
                under=f"{self.commit.staging}/",
            )
            self.means.meter.finish()
            await run_jobs(threads, [lambda: self._publish(digests)])
            if self.commit.rank == 0:
                await self._wait_for_others()
                await run_jobs(threads, [self._commit])
        except BaseException as error:
            if not self.committed:
                files = [layout.file for layout in self.layouts]
                reason = f"{type(error).__name__}: {error}".removesuffix(": ")
                await run_jobs(threads, [lambda: self.commit.abandon(files, reason)])
            raise

    def _publish(self, digests: Mapping[str, ShardDigests]) -> None:
        changed = self.contents.changed()
        if changed:
            problem = (
                f"tensors were written to while they were saved: {listed(changed)}; nothing was "
                "committed. Leave them alone until the save is done, or save copies"
            )
            raise SaveError(self.means.folder.location, problem)
        part = RankPart.of(
            self.layouts,
            digests,
            self.contents.part_rows(),
            save_id=self.commit.save_id,
            rank=self.commit.rank,
            ranks=self.commit.ranks,
            tensors=self.tensors,
        )
        self.commit.publish(part)

    def _commit(self) -> None:
        self.commit.commit()
        self.committed = True
        self.commit.clean()

    async def _wait_for_others(self) -> None:
        clock = asyncio.get_running_loop().time
        start, pause = clock(), _FIRST_LOOK
        while True:
            [missing] = await run_jobs(self.means.threads.reads, [self.commit.missing])
            if not missing:
                return
            waited = clock() - start
            if self.timeout is not None and waited >= self.timeout:
                raise SaveTimeoutError(self.means.folder.location, missing, self.timeout)
            left = pause if self.timeout is None else self.timeout - waited
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, _LAST_LOOK)
