"""One save: from tables and tensors to a committed checkpoint, and a report."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._display import AsDict, listed, size_text
from asyncloader._threads.jobs import ByteBudget, run_jobs
from asyncloader._threads.pool import Threads
from asyncloader.errors import SaveError

from .commit import Commit
from .contents import CHUNK, Contents
from .layout import checked_blocks, lay_out
from .part import RankPart
from .save_id import agreed_save_id, fresh_save_id
from .writing import Means, write_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import RenderableType
    from torch import Tensor

    from asyncloader._loading.progress import Meter
    from asyncloader._storage.folder import Folder
    from asyncloader._table.protocol import SavableSnapshot

    from .layout import ShardLayout, WriteBlock


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport(AsDict):
    """What a save did. `str` is one line; `rich.print` shows a table.

    Attributes:
        location: The folder.
        save_id: Told this save from every other one into the folder.
        shard_index: This rank.
        shard_num: How many ranks saved.
        committed: Whether the checkpoint is there: true on rank 0. The other ranks have written
            their parts.
        bytes_written: Bytes of the shard files that this rank wrote.
        seconds: Until all of it was on the disk; on rank 0 until the commit, the other ranks waited
            for.
        shards: Names of the shard files that this rank wrote.
        tables: Rows that this rank wrote, by the table's or child's name on disk.
        tensors: Names of the dense tensors that this rank wrote.
    """

    location: str
    save_id: str
    shard_index: int
    shard_num: int
    committed: bool
    bytes_written: int
    seconds: float
    shards: tuple[str, ...]
    tables: Mapping[str, int]
    tensors: tuple[str, ...]

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes written, in 10⁹ a second."""
        return self.bytes_written / max(self.seconds, 1e-9) / 1e9

    def __str__(self) -> str:
        rows = sum(self.tables.values())
        rank = f" rank {self.shard_index} of {self.shard_num}:" if self.shard_num > 1 else ""
        state = "" if self.committed else "; rank 0 commits"
        return (
            f"{self.location}:{rank} {size_text(self.bytes_written)} in {self.seconds:.2f} s "
            f"({self.gigabytes_per_second:.2f} GB/s) to {len(self.shards)} "
            f"shard{'s' * (len(self.shards) != 1)}, {len(self.tensors)} "
            f"tensor{'s' * (len(self.tensors) != 1)}, {rows:,} rows of {len(self.tables)} "
            f"table{'s' * (len(self.tables) != 1)}{state}"
        )

    def __rich__(self) -> RenderableType:
        from rich.table import Table  # noqa: PLC0415  # needed where the report is shown
        from rich.text import Text  # noqa: PLC0415

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_row("checkpoint", Text(self.location))
        if self.shard_num > 1:
            grid.add_row("rank", f"{self.shard_index} of {self.shard_num}")
        grid.add_row("written", f"{size_text(self.bytes_written)} to {len(self.shards)} shards")
        rate = f"{self.gigabytes_per_second:.2f} GB/s"
        grid.add_row("time", f"{self.seconds:.3f} s, [bold]{rate}[/]")
        if self.tables:
            rows = tuple(f"{name} ({count:,} rows)" for name, count in self.tables.items())
            grid.add_row("tables", Text(listed(rows)))
        if self.tensors:
            grid.add_row("tensors", f"{len(self.tensors):,}")
        grid.add_row("committed", "yes" if self.committed else "not yet: rank 0 does that")
        return grid


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
    """Write, wait for the other ranks, commit; raises the errors of `Saver.asave`.

    A save that fails leaves nothing but the folder.

    Args:
        order: The arguments of `Saver`.
        snapshots: Of the tables; or an error, which is raised once rank 0 knows of it.
        meter: Counts the bytes written.
        open_folder: Returns the folder; called on a thread.
    """
    writers = min(order.parallel, max(order.max_inflight_bytes // CHUNK, 1))
    async with Threads(reads=writers) as threads, contextlib.AsyncExitStack() as stack:
        [folder] = await run_jobs(threads.reads, [open_folder])
        budget = ByteBudget(order.max_inflight_bytes)
        means = Means(folder=folder, threads=threads, budget=budget, meter=meter, parallel=writers)
        save_id = order.save_id
        if save_id is None and order.ranks > 1:
            agreed = agreed_save_id(
                order.path, order.rank, order.ranks, timeout=order.timeout, executor=threads.reads
            )
            save_id = await stack.enter_async_context(agreed)
        return await _Save(order, save_id or fresh_save_id(), means).run(snapshots)


class _Save:
    """A save under way: one rank's part and, on rank 0, the commit of all."""

    def __init__(self, order: Order, save_id: str, means: Means) -> None:
        self._order = order
        self._means = means
        self._location = means.folder.location
        self._commit = Commit(means.folder, save_id, order.rank, order.ranks)

    async def run(self, snapshots: Sequence[SavableSnapshot] | Exception) -> SaveReport:
        threads, folder = self._means.threads.reads, self._means.folder
        try:
            contents, layouts = await self._plan(snapshots)
        except BaseException as error:
            if self._order.rank:  # rank 0 is told, and need not wait for this rank
                await run_jobs(threads, [partial(self._commit.refuse, _reason(error))])
            raise
        held = contextlib.ExitStack()

        def hold() -> None:
            """Keep other saves from committing to this folder meanwhile."""
            folder.make("")
            if self._order.rank == 0 and not held.enter_context(folder.hold()):
                problem = (
                    "another process is saving to this folder right now, or this one itself (a "
                    "handler of a signal, say): save into another folder, or later"
                )
                raise SaveError(self._location, problem)

        try:
            await run_jobs(threads, [hold])
            await self._write_and_commit(contents, layouts)
        except SaveError:
            raise
        except OSError as error:
            raise self._explained(error) from error
        finally:
            await run_jobs(threads, [held.close])
            for warning in self._commit.told:
                _log.warning("%s: %s", self._location, warning)
        return SaveReport(
            location=self._location,
            save_id=self._commit.save_id,
            shard_index=self._order.rank,
            shard_num=self._order.ranks,
            committed=self._commit.is_committed,
            bytes_written=sum(layout.size for layout in layouts),
            seconds=self._means.meter.seconds,
            shards=tuple(layout.file for layout in layouts),
            tables={name: rows.rows for name, rows in contents.part_rows().items()},
            tensors=tuple(block.name for block in contents.blocks if block.table is None),
        )

    async def _plan(
        self, snapshots: Sequence[SavableSnapshot] | Exception
    ) -> tuple[Contents, tuple[ShardLayout, ...]]:
        if isinstance(snapshots, Exception):
            raise snapshots
        order, threads = self._order, self._means.threads.kernels

        def decide() -> tuple[ShardLayout, ...]:
            contents.keep(checked_blocks(contents.blocks, chosen))
            return lay_out(
                contents.blocks, rank=order.rank, ranks=order.ranks, writers=order.parallel
            )

        gather = partial(Contents, snapshots, order.tensors, order.rank, order.ranks)
        [contents] = await run_jobs(threads, [gather])
        chosen = order.filter_func(list(contents.blocks))
        [layouts] = await run_jobs(threads, [decide])
        self._means.meter.total = sum(layout.size - len(layout.head) for layout in layouts)
        return contents, layouts

    def _explained(self, error: OSError) -> SaveError:
        """Say at which file of the folder a save failed, and what the folder holds now."""
        named = error.filename if isinstance(error.filename, str) else ""
        is_inside = named.startswith(self._location)
        file = named.removeprefix(self._location).lstrip(os.sep) if is_inside else ""
        what = error.strerror if file else error
        problem = f"could not be written: {what}; {self._commit.outcome()}"
        return SaveError(self._location, problem, file or None)

    async def _write_and_commit(self, contents: Contents, layouts: tuple[ShardLayout, ...]) -> None:
        threads, commit, means = self._means.threads.reads, self._commit, self._means

        def publish() -> None:
            if changed := contents.changed():
                problem = (
                    f"written to while they were saved: {listed(changed)}; nothing "
                    "was committed. Leave them alone until the save is done, or save copies"
                )
                raise SaveError(self._location, problem)
            tensors = {
                str(name): f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                for name, tensor in self._order.tensors.items()
            }
            part = RankPart.of(
                layouts,
                digests,
                contents.part_rows(),
                tensors,
                save_id=commit.save_id,
                rank=commit.rank,
                ranks=commit.ranks,
            )
            commit.publish(part)

        try:
            await run_jobs(threads, [commit.begin])
            digests = await write_shards(layouts, contents.sources, means, under=commit.staging)
            means.meter.finish()
            await run_jobs(threads, [publish])
            if self._order.rank == 0:
                texts = await commit.part_texts(threads, timeout=self._order.timeout)
                await run_jobs(threads, [partial(commit.commit, texts)])
        except BaseException as error:
            if not commit.is_committed:
                files = [layout.file for layout in layouts]
                await run_jobs(threads, [partial(commit.abandon, files, _reason(error))])
            raise


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
