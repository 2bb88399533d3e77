"""What users import to save a checkpoint."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch

from ._arguments import as_dict, check_callable, check_progress, check_timeout, checked_path
from ._loading.checks import check_tables, check_tensors
from ._loading.progress import Meter
from ._loading.progress_bar import progress_bar
from ._loading.staging import StagingPool
from ._saving.commit import Commit
from ._saving.contents import Contents
from ._saving.layout import WriteBlock, checked_blocks, lay_out
from ._saving.report import SaveReport
from ._saving.save import Save
from ._saving.save_id import Agreed, checked_save_id, fresh_save_id, shared_save_id
from ._saving.writing import CHUNK, Means
from ._storage.folder import LocalFolder
from ._threads.blocking import run_blocking
from ._threads.budget import ByteBudget
from ._threads.jobs import run_jobs
from ._threads.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ._loading.progress import Progress
    from ._saving.layout import ShardLayout
    from ._storage.folder import Folder
    from ._table.protocol import SavableSnapshot, SavableTable

__all__ = ["Saver", "every_block"]

_log = logging.getLogger(__name__)

_INFLIGHT = 128 << 20
_PATIENCE = 1800.0
"""Seconds that rank 0 waits for the others."""

_DEAD_AFTER = 1800.0
"""Seconds without a change after which what ranks have staged for another save is removed."""


def every_block(blocks: list[WriteBlock]) -> list[WriteBlock]:
    """Return what it is given: the `filter_func` that leaves nothing out."""
    return blocks


class Saver:
    """Writes hash tables and dense tensors as a checkpoint in RecIS's format.

    Everything is staged in a folder that no reader looks at, synced to the disk, and then moved
    into place by renaming, `index` last. Whatever happens meanwhile, the folder holds the
    checkpoint that was there before, whole, or none, or the new one, whole. An older checkpoint in
    the folder is replaced, its files removed; a folder that holds anything else is refused.

    Tables are saved as they are when `asave` is called, whatever is written to them meanwhile;
    rows are sorted by slice position, then id. Dense tensors are read while the save goes on: one
    that is written to meanwhile makes it fail, and their storage must not be resized.

    The first seven arguments are those of RecIS's `Saver`, in its order. A saver may be used any
    number of times.

    Args:
        shard_index: This rank.
        shard_num: How many ranks save into the folder, each with a `Saver` of its own and with
            `slice=gen_slice(shard_index, shard_num)` of each table. Rank 0 waits for the others
            and commits; the others return when their parts are written.
        parallel: Shard files that this rank writes, and writes at a time.
        path: The folder that becomes the checkpoint; made if need be.
        hashtables: Tables to save, by any name; on disk they have the names of their `children`.
        tensors: Dense tensors to save, by name, on any device; only rank 0 writes them. Other
            ranks give the same ones, some of them, or none: what rank 0 does not have would be in
            no file, and is an error.
        filter_func: Gets the `WriteBlock`s that would be written, and returns those to write.
        save_id: Tells this save from every other one into the same folder: text or a number, the
            same on all ranks, another one for each try (a count of the job's starts and the step,
            say). By default rank 0 draws one, and tells the others by way of torch.distributed's
            store.
        timeout: Seconds that rank 0 waits for the other ranks; `None` waits for ever.
        max_inflight_bytes: Memory for writes under way, in bytes. Besides, the order of a table's
            rows takes 16 bytes an id while the table is being written, and three times that while
            it is sorted.
        progress: Called on the event loop with a `Progress`, at most ten times a second; `True`
            shows a bar on stderr.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    def __init__(  # noqa: PLR0917  # RecIS's order
        self,
        shard_index: int = 0,
        shard_num: int = 1,
        parallel: int = 8,
        path: str | os.PathLike[str] = ".",
        hashtables: Mapping[str, SavableTable] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        filter_func: Callable[[list[WriteBlock]], list[WriteBlock]] = every_block,
        *,
        save_id: str | int | None = None,
        timeout: float | None = _PATIENCE,
        max_inflight_bytes: int = _INFLIGHT,
        progress: Callable[[Progress], object] | bool | None = None,
    ) -> None:
        _check_order(shard_index, shard_num)
        for name, value in (
            ("shard_index", shard_index),
            ("shard_num", shard_num),
            ("parallel", parallel),
            ("max_inflight_bytes", max_inflight_bytes),
        ):
            if type(value) is not int:
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value <= 0 and name != "shard_index":
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= shard_index < shard_num:
            raise ValueError(f"shard_index is 0 to shard_num - 1, got {shard_index} of {shard_num}")
        check_timeout(timeout)
        check_callable(filter_func, "filter_func")
        check_progress(progress)
        self._rank = shard_index
        self._ranks = shard_num
        self._parallel = parallel
        self._path = checked_path(path, "path")
        self._tables = as_dict(hashtables, "hashtables")
        self._tensors = as_dict(tensors, "tensors")
        self._filter = filter_func
        self._save_id = None if save_id is None else checked_save_id(save_id)
        self._timeout = timeout
        self._max_inflight_bytes = max_inflight_bytes
        self._progress = progress
        check_tables(self._tables, self._tensors, able="snapshot")
        check_tensors(self._tensors, able="saved")

    @classmethod
    def to(
        cls,
        path: str | os.PathLike[str],
        hashtables: Mapping[str, SavableTable] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        **options: Any,  # noqa: ANN401  # further arguments, each of its own type
    ) -> Self:
        """Return a saver, its arguments in the order of `Loader`.

        ```python
        Saver.to(path, *targets(model)).save()
        ```

        Args:
            path: As of `Saver`, and so are all others.
            hashtables: Likewise.
            tensors: Likewise.
            options: Likewise, by name.
        """
        return cls(path=path, hashtables=hashtables, tensors=tensors, **options)

    def __repr__(self) -> str:
        rank = f"rank {self._rank} of {self._ranks}, " if self._ranks > 1 else ""
        what = f"{len(self._tables)} tables, {len(self._tensors)} tensors"
        return f"<Saver {self._path!r}: {rank}{what}>"

    def asave(self) -> Coroutine[Any, Any, SaveReport]:
        """Save, on the caller's event loop, which goes on serving meanwhile.

        To be awaited. Tables are saved as they are now, when this is called.

        Returns:
            What was written; on rank 0 the checkpoint is committed then.

        Raises:
            SaveError: If the folder holds something else than a checkpoint, somebody else is
                saving to it, it failed, another rank did, or the ranks' parts do not fit together;
                or if a tensor was written to meanwhile.
            SaveTimeoutError: If other ranks did not write their parts in time.
            TypeError: If `filter_func` returned something else than a list of its blocks.
            ValueError: If what there is to save cannot be told apart by its names, or this is one
                of several ranks and no `save_id` was given where torch.distributed could not help.
        """
        snapshots: list[SavableSnapshot] | Exception
        try:
            snapshots = [table.snapshot() for table in self._tables.values()]
        except Exception as error:  # noqa: BLE001  # raised once rank 0 knows of it
            snapshots = error
        return self._asave(snapshots, partial(LocalFolder, self._path))

    async def _asave(
        self, snapshots: list[SavableSnapshot] | Exception, open_folder: Callable[[], Folder]
    ) -> SaveReport:
        with contextlib.ExitStack() as stack:
            listener = self._progress
            if listener is True:
                listener = stack.enter_context(progress_bar("saving"))
            meter = Meter(0, None if isinstance(listener, bool) else _apart(listener))
            return await self._save(snapshots, meter, open_folder)

    def save(self) -> SaveReport:
        """Save, and return when it is done; raises what `asave` raises.

        Runs an event loop of its own, from any thread, also where a loop is running already (which
        it then blocks: inside a coroutine, `await asave()`). Where the program has handlers of
        signals, the loop, and with it every callback, is on another thread.
        """
        return run_blocking(self.asave)

    async def _save(
        self,
        snapshots: list[SavableSnapshot] | Exception,
        meter: Meter,
        open_folder: Callable[[], Folder],
    ) -> SaveReport:
        writers = min(self._parallel, max(self._max_inflight_bytes // CHUNK, 1))
        async with Threads(reads=writers) as threads:
            [folder] = await run_jobs(threads.reads, [open_folder])
            agreed = await self._agreed_save_id(threads)
            save_id = agreed.save_id
            commit = Commit(folder, save_id, self._rank, self._ranks, _DEAD_AFTER)
            try:
                contents, layouts = await self._planned(snapshots, threads, commit)
                meter.total = sum(layout.size - len(layout.head) for layout in layouts)
                save = Save(
                    contents=contents,
                    layouts=layouts,
                    commit=commit,
                    means=Means(
                        folder=folder,
                        threads=threads,
                        budget=ByteBudget(self._max_inflight_bytes),
                        staging=StagingPool(CHUNK),
                        meter=meter,
                        parallel=writers,
                    ),
                    timeout=self._timeout,
                    tensors={
                        str(
                            name
                        ): f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                        for name, tensor in self._tensors.items()
                    },
                )
                await save.run()
            finally:
                await agreed.close()
        report = SaveReport(
            location=folder.location,
            save_id=save_id,
            shard_index=self._rank,
            shard_num=self._ranks,
            committed=save.committed,
            bytes_written=sum(layout.size for layout in layouts),
            seconds=meter.seconds,
            shards=tuple(layout.file for layout in layouts),
            tables={name: rows.rows for name, rows in contents.part_rows().items()},
            tensors=tuple(block.name for block in contents.blocks if block.table is None),
        )
        _log.info("%s", report)
        return report

    async def _planned(
        self, snapshots: list[SavableSnapshot] | Exception, threads: Threads, commit: Commit
    ) -> tuple[Contents, tuple[ShardLayout, ...]]:
        """Return what to write; if that fails, rank 0 is told, and need not wait for this rank."""
        try:
            return await self._plan(snapshots, threads)
        except BaseException as error:
            if self._rank:
                reason = f"{type(error).__name__}: {error}".removesuffix(": ")
                await run_jobs(threads.reads, [partial(commit.refuse, reason)])
            raise

    async def _agreed_save_id(self, threads: Threads) -> Agreed:
        if self._save_id is not None:
            return Agreed(self._save_id)
        if self._ranks == 1:
            return Agreed(fresh_save_id())
        return await shared_save_id(
            self._path, self._rank, self._ranks, timeout=self._timeout, executor=threads.reads
        )

    async def _plan(
        self, snapshots: list[SavableSnapshot] | Exception, threads: Threads
    ) -> tuple[Contents, tuple[ShardLayout, ...]]:
        if isinstance(snapshots, Exception):
            raise snapshots
        contents = Contents()

        def gather() -> None:
            _wait_for_devices(snapshots, self._tensors)
            for snapshot in snapshots:
                if self._ranks == 1 and not snapshot.slice.is_whole:
                    raise ValueError(
                        f"table {snapshot.name!r} holds the ids of slice {snapshot.slice} alone, "
                        "but shard_num is 1: pass this rank's shard_index and shard_num"
                    )
                contents.add_table(snapshot)
            if self._rank == 0:
                contents.add_tensors(self._tensors)

        def decide(chosen: object) -> tuple[ShardLayout, ...]:
            blocks = checked_blocks(offered, chosen)
            contents.keep(blocks)
            return lay_out(blocks, rank=self._rank, ranks=self._ranks, writers=self._parallel)

        await run_jobs(threads.kernels, [gather])
        offered = contents.blocks
        chosen = self._filter(list(offered))
        [layouts] = await run_jobs(threads.kernels, [partial(decide, chosen)])
        return contents, layouts


def _check_order(shard_index: object, shard_num: object) -> None:
    """Refuse arguments in the order of `Loader`."""
    if isinstance(shard_index, str | os.PathLike) or isinstance(shard_num, Mapping):
        raise TypeError(
            "RecIS's Saver takes the ranks first, so the first argument is no path: write "
            "Saver.to(path, hashtables, tensors), or Saver(path=path, hashtables=hashtables, "
            "tensors=tensors)"
        )


def _apart(
    listener: Callable[[Progress], object] | None,
) -> Callable[[Progress], object] | None:
    """Keep a listener's own `OSError` from being taken for one of the folder's."""
    if listener is None:
        return None

    def tell(moment: Progress) -> None:
        try:
            listener(moment)
        except OSError as error:
            raise RuntimeError(f"progress raised {error!r}") from error

    return tell


def _wait_for_devices(
    snapshots: list[SavableSnapshot], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Wait for what the caller has left to do on GPUs, on whatever streams: we read on others."""
    devices = {tensor.device for tensor in tensors.values()}
    devices |= {snapshot.device for snapshot in snapshots}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
