"""One save: from tables and tensors to a committed checkpoint, and a report."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._display import listed
from asyncloader._storage.folder import ConditionalFolder
from asyncloader._threads.jobs import ByteBudget, run_jobs
from asyncloader._threads.pool import Threads
from asyncloader.errors import SaveError

from .commit import Commit
from .contents import CHUNK, Contents
from .layout import belongs_to_model, checked_blocks, lay_out, lay_out_model
from .part import RankPart
from .recis import recis_problems, reserved_problems, state_problems
from .report import SaveReport
from .run_list import RenamedRunList
from .save_id import agreed_save_id, fresh_save_id
from .store_commit import StoreCommit
from .store_run_list import StoreRunList
from .writing import Means, write_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from asyncloader._loading.progress import Meter
    from asyncloader._storage.folder import TargetFolder
    from asyncloader._table.protocol import SavableSnapshot

    from .layout import ShardLayout, WriteBlock
    from .ranks import Ranks
    from .states import States


_log = logging.getLogger(__name__)


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
    is_run: bool
    max_keep: int | None
    for_recis: bool
    overwrite: bool


class Moment(NamedTuple):
    """What is saved, as it was when the save was asked for."""

    snapshots: Sequence[SavableSnapshot]
    states: States


async def save(
    order: Order,
    moment: Moment | Exception,
    meter: Meter,
    open_folder: Callable[[], TargetFolder],
) -> SaveReport:
    """Write, wait for the other ranks, commit; raises the errors of `Saver.asave`.

    A save that fails leaves nothing but the folder.

    Args:
        order: The arguments of `Saver`.
        moment: What is saved; or an error, which is raised once rank 0 knows of it.
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
        commit = _commit_of(order, folder, save_id or fresh_save_id())
        return await _Save(order, means, commit).run(moment)


def _commit_of(order: Order, folder: TargetFolder, save_id: str) -> Ranks:
    commit = commit_of(
        folder,
        save_id,
        order.rank,
        order.ranks,
        is_run=order.is_run,
        replaces=order.overwrite,
    )
    if order.is_run:
        name, most = PurePath(folder.location).name, order.max_keep
        if isinstance(folder, ConditionalFolder):
            commit.run_list = StoreRunList(folder.above(), name, most, commit.told)
        else:
            commit.run_list = RenamedRunList(folder.above(), name, most, commit.told)
    return commit


def commit_of(
    folder: TargetFolder,
    save_id: str,
    rank: int,
    ranks: int,
    *,
    is_run: bool = False,
    replaces: bool = False,
) -> Ranks:
    """Return what makes a checkpoint of the ranks' shards, by what the folder is good at."""
    if isinstance(folder, ConditionalFolder):
        return StoreCommit(folder, save_id, rank, ranks, is_run, replaces=replaces)
    return Commit(folder, save_id, rank, ranks, is_run)


class _Save:
    """A save under way: one rank's part and, on rank 0, the commit of all."""

    def __init__(self, order: Order, means: Means, commit: Ranks) -> None:
        self._order = order
        self._means = means
        self._location = means.folder.location
        self._commit = commit
        self._problems: list[str] = []  # of RecIS

    async def run(self, moment: Moment | Exception) -> SaveReport:
        threads, folder = self._means.threads.reads, self._means.folder
        try:
            if isinstance(moment, Exception):
                raise moment  # noqa: TRY301  # rank 0 is told of this one, too
            contents, layouts = await self._plan(moment)
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
            await self._write_and_commit(contents, layouts, moment.states)
        except SaveError:
            raise
        except OSError as error:
            raise self._explained(error) from error
        finally:
            await run_jobs(threads, [held.close])
            for warning in self._commit.told:
                _log.warning("%s: %s", self._location, warning)
        for problem in self._problems:
            _log.warning("%s: %s", self._location, problem)
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
            recis_problems=tuple(self._problems),
            evicted=self._commit.evicted,
        )

    async def _plan(self, moment: Moment) -> tuple[Contents, tuple[ShardLayout, ...]]:
        order, threads = self._order, self._means.threads.kernels

        def decide() -> tuple[ShardLayout, ...]:
            contents.keep(checked_blocks(contents.blocks, chosen))
            apart: list[WriteBlock] = []
            rest: list[WriteBlock] = []
            for block in contents.blocks:
                (apart if order.is_run and belongs_to_model(block) else rest).append(block)
            shards = lay_out(
                rest,
                rank=order.rank,
                ranks=order.ranks,
                writers=order.parallel,
                save=self._commit.shard_mark,
            )
            layouts = (*shards, *lay_out_model(apart, contents.tied(apart)))
            moment.states.check()
            self._judge([*recis_problems(layouts), *state_problems(moment.states.files)])
            return layouts

        gather = partial(Contents, moment.snapshots, order.tensors, order.rank, order.ranks)
        [contents] = await run_jobs(threads, [gather])
        chosen = order.filter_func(list(contents.blocks))
        [layouts] = await run_jobs(threads, [decide])
        self._means.meter.total = sum(layout.nbytes for layout in layouts)
        return contents, layouts

    def _judge(self, problems: Iterable[str]) -> None:
        """Note what RecIS could not read.

        Raises:
            SaveError: If it shall be able to.
        """
        found = list(problems)
        if found and self._order.for_recis:
            problem = f"for_recis: {'; '.join(found)}; nothing was committed"
            raise SaveError(self._location, problem)
        self._problems += found

    def _explained(self, error: OSError) -> SaveError:
        """Say at which file of the folder a save failed, and what the folder holds now."""
        named = error.filename if isinstance(error.filename, str) else ""
        is_inside = named.startswith(f"{self._location}{os.sep}")
        file = named.removeprefix(self._location).lstrip(os.sep) if is_inside else ""
        what = error.strerror if file else error
        problem = f"could not be written: {what}; {self._commit.outcome()}"
        return SaveError(self._location, problem, file or None)

    async def _write_and_commit(
        self, contents: Contents, layouts: tuple[ShardLayout, ...], states: States
    ) -> None:
        threads, commit, means = self._means.threads.reads, self._commit, self._means

        def publish() -> None:
            self._judge(reserved_problems(contents.reserved_ids()))
            changed = (*contents.changed(), *states.changed())
            if changed:
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
                files,
                save_id=commit.save_id,
                rank=commit.rank,
                ranks=commit.ranks,
            )
            commit.publish(part)

        try:
            await run_jobs(threads, [commit.begin])
            digests = await write_shards(layouts, contents.sources, means, place=commit.place)
            write = partial(states.write, means.folder, commit.staging)
            [files] = await run_jobs(threads, [write])
            means.meter.finish()
            await run_jobs(threads, [publish])
            if self._order.rank == 0:
                texts = await commit.part_texts(threads, timeout=self._order.timeout)
                await commit.ready(threads)
                await run_jobs(threads, [partial(commit.commit, texts)])
        except BaseException as error:
            if not commit.is_committed:
                staged = [*(layout.file for layout in layouts), *states.files]
                await run_jobs(threads, [partial(commit.abandon, staged, _reason(error))])
            raise


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
