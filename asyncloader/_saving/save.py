"""One save: from tables and tensors to a committed checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._display import listed
from asyncloader._threads.jobs import ByteBudget, run_jobs
from asyncloader._threads.pool import Threads
from asyncloader.errors import SaveError, SaveTimeoutError

from .commit import Commit
from .contents import Contents
from .layout import checked_blocks, lay_out
from .part import RankPart
from .report import SaveReport
from .save_id import agreed_save_id
from .writing import CHUNK, Means, write_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.sidecar import ShardDigests
    from asyncloader._loading.progress import Meter
    from asyncloader._storage.folder import Folder
    from asyncloader._table.protocol import SavableSnapshot

    from .layout import ShardLayout, WriteBlock


_DEAD_AFTER = 1800.0
"""Seconds without a change after which what ranks have staged for another save is removed."""

# Between two looks at which ranks are done, in seconds: often at first, and then less.
_FIRST_LOOK, _LAST_LOOK = 0.01, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is saved, and how; `Saver` documents the fields."""

    path: str
    rank: int
    ranks: int
    parallel: int
    tensors: Mapping[str, Tensor]
    filter_func: Callable[[list[WriteBlock]], list[WriteBlock]]
    save_id: str | None
    timeout: float | None
    max_inflight_bytes: int


async def save(
    order: Order,
    snapshots: Sequence[SavableSnapshot] | Exception,
    meter: Meter,
    open_folder: Callable[[], Folder],
) -> SaveReport:
    """Write, wait for the other ranks, commit. On failure nothing of it stays but the folder.

    Args:
        order: What is saved, and how.
        snapshots: The tables; or why there are none, which is raised once rank 0 knows of it.
        meter: Counts what is written.
        open_folder: Returns the folder; called on a thread.

    Raises:
        SaveError: If the folder holds something else, or failed, or the ranks' parts do not fit
            together.
        SaveTimeoutError: If ranks are missing.
        TypeError: If `filter_func` returned something else than a list of its blocks.
        ValueError: If what there is to save cannot be told apart by its names.
    """
    writers = min(order.parallel, max(order.max_inflight_bytes // CHUNK, 1))
    async with Threads(reads=writers) as threads:
        [folder] = await run_jobs(threads.reads, [open_folder])
        means = Means(
            folder=folder,
            threads=threads,
            budget=ByteBudget(order.max_inflight_bytes),
            meter=meter,
            parallel=writers,
        )
        async with agreed_save_id(
            order.save_id,
            order.path,
            order.rank,
            order.ranks,
            timeout=order.timeout,
            executor=threads.reads,
        ) as save_id:
            return await _Save(order, save_id, means).run(snapshots)


class _Save:
    """A save under way: one rank's part and, on rank 0, the commit of all."""

    def __init__(self, order: Order, save_id: str, means: Means) -> None:
        self._order = order
        self._means = means
        self._folder = means.folder
        self._threads = means.threads
        self._contents = Contents()
        self._layouts: tuple[ShardLayout, ...] = ()
        self._commit = Commit(means.folder, save_id, order.rank, order.ranks, _DEAD_AFTER)
        self._committed = False

    async def run(self, snapshots: Sequence[SavableSnapshot] | Exception) -> SaveReport:
        try:
            await self._plan(snapshots)
        except BaseException as error:
            if self._order.rank:  # rank 0 is told, and need not wait for this rank
                refuse = partial(self._commit.refuse, _reason(error))
                await run_jobs(self._threads.reads, [refuse])
            raise
        held = contextlib.ExitStack()
        try:
            await run_jobs(self._threads.reads, [partial(self._hold, held)])
            await self._write_and_commit()
        except SaveError:
            raise
        except OSError as error:
            raise self._explained(error) from error
        finally:
            await run_jobs(self._threads.reads, [held.close])
        return self._report()

    async def _plan(self, snapshots: Sequence[SavableSnapshot] | Exception) -> None:
        """Decide what to write where."""
        if isinstance(snapshots, Exception):
            raise snapshots
        order, contents = self._order, self._contents

        def decide(chosen: object) -> tuple[ShardLayout, ...]:
            blocks = checked_blocks(offered, chosen)
            contents.keep(blocks)
            return lay_out(blocks, rank=order.rank, ranks=order.ranks, writers=order.parallel)

        gather = partial(contents.gather, snapshots, order.tensors, order.rank, order.ranks)
        await run_jobs(self._threads.kernels, [gather])
        offered = contents.blocks
        chosen = order.filter_func(list(offered))
        [self._layouts] = await run_jobs(self._threads.kernels, [partial(decide, chosen)])
        self._means.meter.total = sum(layout.size - len(layout.head) for layout in self._layouts)

    def _report(self) -> SaveReport:
        return SaveReport(
            location=self._folder.location,
            save_id=self._commit.save_id,
            shard_index=self._order.rank,
            shard_num=self._order.ranks,
            committed=self._committed,
            bytes_written=sum(layout.size for layout in self._layouts),
            seconds=self._means.meter.seconds,
            shards=tuple(layout.file for layout in self._layouts),
            tables={name: rows.rows for name, rows in self._contents.part_rows().items()},
            tensors=tuple(block.name for block in self._contents.blocks if block.table is None),
        )

    def _explained(self, error: OSError) -> SaveError:
        """Say which file of the folder it was, and what the folder holds now."""
        location = self._folder.location
        named = error.filename if isinstance(error.filename, str) else ""
        file = named.removeprefix(location).lstrip(os.sep) if named.startswith(location) else ""
        what = error.strerror if file else error
        problem = f"could not be written: {what}; {self._commit.outcome()}"
        return SaveError(location, problem, file or None)

    def _hold(self, held: contextlib.ExitStack) -> None:
        """Keep other saves from committing to this folder meanwhile."""
        self._folder.make("")
        if self._order.rank == 0 and not held.enter_context(self._folder.hold()):
            problem = (
                "another process is saving to this folder right now, or this one itself (a "
                "handler of a signal, say): save into another folder, or later"
            )
            raise SaveError(self._folder.location, problem)

    async def _write_and_commit(self) -> None:
        threads = self._threads.reads
        try:
            await run_jobs(threads, [self._commit.begin])
            digests = await write_shards(
                self._layouts,
                self._contents.sources,
                self._means,
                under=f"{self._commit.staging}/",
            )
            self._means.meter.finish()
            await run_jobs(threads, [lambda: self._publish(digests)])
            if self._order.rank == 0:
                await self._wait_for_others()
                texts = await self._commit.part_texts(threads)
                await run_jobs(threads, [partial(self._commit_all, texts)])
        except BaseException as error:
            if not self._committed:
                files = [layout.file for layout in self._layouts]
                await run_jobs(threads, [partial(self._commit.abandon, files, _reason(error))])
            raise

    def _publish(self, digests: Mapping[str, ShardDigests]) -> None:
        changed = self._contents.changed()
        if changed:
            problem = (
                f"tensors were written to while they were saved: {listed(changed)}; nothing was "
                "committed. Leave them alone until the save is done, or save copies"
            )
            raise SaveError(self._folder.location, problem)
        part = RankPart.of(
            self._layouts,
            digests,
            self._contents.part_rows(),
            save_id=self._commit.save_id,
            rank=self._order.rank,
            ranks=self._order.ranks,
            tensors={
                str(name): f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                for name, tensor in self._order.tensors.items()
            },
        )
        self._commit.publish(part)

    def _commit_all(self, part_texts: Sequence[bytes]) -> None:
        self._commit.commit(part_texts)
        self._committed = True
        self._commit.clean()

    async def _wait_for_others(self) -> None:
        clock = asyncio.get_running_loop().time
        start, pause = clock(), _FIRST_LOOK
        while True:
            missing = await self._commit.missing(self._threads.reads)
            if not missing:
                return
            waited = clock() - start
            if self._order.timeout is not None and waited >= self._order.timeout:
                raise SaveTimeoutError(self._folder.location, missing, self._order.timeout)
            left = pause if self._order.timeout is None else self._order.timeout - waited
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, _LAST_LOOK)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
