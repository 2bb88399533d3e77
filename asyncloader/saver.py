"""Saves a checkpoint."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ._addresses import FILES, is_url
from ._arguments import (
    as_dict,
    check_callable,
    check_count,
    check_progress,
    check_storage_options,
    check_switch,
    check_timeout,
)
from ._loading.checks import check_tables, check_tensors
from ._loading.progress import Meter, listening
from ._ready_stores import target_of
from ._saving.run_list import check_layout
from ._saving.save import Moment, Order, save
from ._saving.states import States
from ._storage.folders import Folders
from ._table.recis import adapted
from ._threads.blocking import run_blocking

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import torch

    from ._loading.progress import Progress
    from ._ready_stores import Source
    from ._saving.layout import WriteBlock
    from ._saving.report import SaveReport
    from ._storage.folder import TargetFolder
    from ._table.protocol import SavableTable

__all__ = ["Saver", "every_block"]

_log = logging.getLogger(__name__)

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def every_block(blocks: list[WriteBlock]) -> list[WriteBlock]:
    """Return all blocks: the `filter_func` that leaves nothing out."""
    return blocks


class Saver:
    """Writes hash tables and dense tensors as a checkpoint in RecIS's format.

    Everything is staged in a folder that no reader looks at, synced to the disk, and then moved
    into place by renaming, `index` last. At each moment the folder holds the checkpoint that was
    there before, whole, or none, or the new one, whole. An older checkpoint in the folder is
    replaced, its files removed; a folder that holds anything else is refused. In an object store,
    where nothing can be renamed, shards are streamed to their places, and `index` is created last;
    a checkpoint that is there is refused unless `overwrite` says otherwise.

    Tables are saved as they are when `asave` is called; later writes to them do not count. Rows are
    sorted by slice position, then id. Dense tensors are read while the save goes on: a tensor that
    is written to meanwhile makes the save fail, and its storage must not be resized.

    The first seven arguments are those of RecIS's `Saver`, in its order. A saver may be used any
    number of times.

    Args:
        shard_index: This rank.
        shard_num: How many ranks save into the folder, each with a `Saver` of its own and with
            `slice=gen_slice(shard_index, shard_num)` of each table. Rank 0 waits for the others
            and commits; the others return when their parts are written.
        parallel: Shard files that this rank writes, and writes at a time.
        path: The folder that becomes the checkpoint, made if need be; or its URL in an object
            store.
        hashtables: Tables to save, by any name; on disk they have the names of their `children`.
            RecIS's own tables, too, which must not change meanwhile: see `RecISTable`.
        tensors: Dense tensors to save, by name, on any device; only rank 0 writes them. Other
            ranks give the same tensors, some of them, or none: a tensor that rank 0 does not have
            would be in no file, and is an error.
        filter_func: Gets all `WriteBlock`s, and returns the blocks to write.
        layout: `"run"` writes what RecIS's trainer does. `path` is then the checkpoint's folder,
            `RUN/ID`. Dense tensors go to `model.pt`, but for the sparse optimizers' scalars
            (`sparse_…_step`, `sparse_…_beta1`, `sparse_…_beta2`); `extra` and `io_state` go to
            files of their own; and the last line of the run's list, `RUN/checkpoint`, becomes the
            id. `"checkpoint"` writes all tensors beside the tables, and no list.
        extra: What else the run is resumed from, by name, as `extra.pt`; rank 0's counts. Values
            that have a `state_dict()`, such as optimizers, are asked for it. Anything that
            `torch.load(weights_only=True)` reads.
        io_state: How far this rank has read its data, as `io_state_RANK.pt`; likewise. On all
            ranks or on none.
        max_keep: Of the run's list, how many checkpoints stay, this one included; `None` keeps all.
            Of older ones that a `Saver` wrote, the line and then the folder is removed, whichever
            process wrote it. Checkpoints of RecIS, and folders that hold anything else, stay.
        for_recis: Refuses what RecIS 1.0.0 could not read, or would read wrongly, before anything
            is written (ids: before the commit). Otherwise there is a warning, and
            `SaveReport.recis_problems`.
        save_id: Tells this save from every other save into the same folder: text or a number, the
            same on all ranks, another one for each try (a count of the job's starts and the step,
            say). By default rank 0 draws one, and tells the others by way of torch.distributed's
            store.
        overwrite: Of an object store: whether a checkpoint that is there may be replaced, by a
            commit during which there is none. A folder's checkpoint is always replaced.
        timeout: Seconds that rank 0 waits for the other ranks; `None` waits for ever.
        max_inflight_bytes: Memory for writes under way, in bytes. The order of a table's rows takes
            16 bytes an id more while the table is being written, and three times that while it is
            sorted; an upload to an object store, 8 MiB for each of `parallel + 5` parts.
        storage_options: Of a URL, as `ReadOptions` has them; in no message and no `repr`.
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
        path: Source = ".",
        hashtables: Mapping[str, SavableTable] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        filter_func: Callable[[list[WriteBlock]], list[WriteBlock]] = every_block,
        *,
        layout: Literal["checkpoint", "run"] = "checkpoint",
        extra: Mapping[str, object] | None = None,
        io_state: Mapping[str, object] | None = None,
        max_keep: int | None = None,
        for_recis: bool = False,
        save_id: str | int | None = None,
        overwrite: bool = False,
        timeout: float | None = 1800.0,
        max_inflight_bytes: int = 128 << 20,
        storage_options: Mapping[str, Any] | None = None,
        progress: Callable[[Progress], object] | bool | None = None,
    ) -> None:
        _check_order(shard_index, shard_num)
        if type(shard_index) is not int:
            raise TypeError(f"shard_index must be an int, got {shard_index!r}")
        check_count(shard_num, "shard_num")
        check_count(parallel, "parallel")
        check_count(max_inflight_bytes, "max_inflight_bytes")
        if not 0 <= shard_index < shard_num:
            raise ValueError(f"shard_index is 0 to shard_num - 1, got {shard_index} of {shard_num}")
        check_timeout(timeout)
        check_switch(overwrite, "overwrite")
        check_storage_options(storage_options)
        location, self._storage_options = target_of(path, "path", storage_options)
        check_layout(layout, extra, io_state, max_keep, location)
        check_callable(filter_func, "filter_func")
        check_progress(progress)
        self._tables = adapted(as_dict(hashtables, "hashtables"))
        self._progress = progress
        self._order = Order(
            path=location,
            rank=shard_index,
            ranks=shard_num,
            parallel=parallel,
            tensors=as_dict(tensors, "tensors"),
            filter_func=filter_func,
            save_id=None if save_id is None else _checked_save_id(save_id),
            timeout=timeout,
            max_inflight_bytes=max_inflight_bytes,
            is_run=layout == "run",
            max_keep=max_keep,
            for_recis=for_recis,
            overwrite=overwrite,
        )
        _check_key(self._order.path)
        self._extra, self._io_state = extra, io_state
        check_tables(self._tables, self._order.tensors, able="snapshot")
        check_tensors(self._order.tensors, able="saved")

    @classmethod
    def to(
        cls,
        path: Source,
        hashtables: Mapping[str, SavableTable] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        **options: Any,  # noqa: ANN401  # further arguments, each of its own type
    ) -> Self:
        """Return a saver, its arguments in the order of `Loader`.

        ```python
        Saver.to(path, *targets(model)).save()
        ```

        Args:
            path: As of `Saver`.
            hashtables: As of `Saver`.
            tensors: As of `Saver`.
            options: All other arguments of `Saver`, by name.
        """
        return cls(path=path, hashtables=hashtables, tensors=tensors, **options)

    def __repr__(self) -> str:
        order, tables = self._order, len(self._tables)
        rank = f"rank {order.rank} of {order.ranks}, " if order.ranks > 1 else ""
        return f"<Saver {order.path!r}: {rank}{tables} tables, {len(order.tensors)} tensors>"

    def asave(self) -> Coroutine[Any, Any, SaveReport]:
        """Save, on the caller's event loop, which goes on serving meanwhile.

        To be awaited. Tables, `extra` and `io_state` are saved as they are now, when this is
        called; tensors must stay as they are until it is done.

        Returns:
            A report of this rank's part; on rank 0 the checkpoint is committed then.

        Raises:
            SaveError: If the folder holds anything but a checkpoint, another process is saving to
                it, it failed, another rank did, or the ranks' parts do not fit together; or if a
                tensor was written to meanwhile.
            SaveTimeoutError: If other ranks did not write their parts in time.
            TypeError: If `filter_func` returned anything but a list of its blocks.
            ValueError: If names of tables and tensors cannot be told apart, or this is one of
                several ranks and no `save_id` was given where torch.distributed could not help.
        """
        return self._asave(self._now(), self._open)

    def _open(self) -> TargetFolder:
        path = self._order.path
        if not is_url(path):
            path = str(Path(path).absolute())  # or a chdir within a save would tear it apart
        return Folders(self._storage_options, uploads=self._order.parallel + 1).at(path)

    def _now(self) -> Moment | Exception:
        """Return what is saved, as it is now; or an error, raised once rank 0 knows of it."""
        order = self._order
        try:
            snapshots = [table.snapshot() for table in self._tables.values()]
            return Moment(snapshots, States(order.rank, order.ranks, self._extra, self._io_state))
        except Exception as error:  # noqa: BLE001
            return error

    async def _asave(
        self, moment: Moment | Exception, open_folder: Callable[[], TargetFolder]
    ) -> SaveReport:
        with listening(self._progress, "saving") as listener:

            def tell(progress: Progress) -> None:
                try:
                    if listener is not None:
                        listener(progress)
                except OSError as error:  # or it would be taken for an error of the folder
                    raise RuntimeError(f"progress raised {error!r}") from error

            meter = Meter(0, tell if listener else None)
            report = await save(self._order, moment, meter, open_folder)
        _log.info("%s", report)
        return report

    def save(self) -> SaveReport:
        """Save, and return when it is done; raises the errors of `asave`.

        Runs an event loop of its own, on any thread, also where a loop is running already (which
        it then blocks: inside a coroutine, `await asave()`). Handlers of signals run between two
        steps of that loop; an error that one of them raises ends the call, and is raised.
        """
        return run_blocking(self.asave)


def _check_key(path: str) -> None:
    """Refuse a URL at which a load would look for one file."""
    if is_url(path) and path.rstrip("/").endswith(FILES):
        raise ValueError(
            f"path: {path!r} would be read as one file, by the end of its name, and a checkpoint "
            "is a folder: save to another name (tools.convert writes files)"
        )


def _check_order(shard_index: object, shard_num: object) -> None:
    """Refuse arguments in the order of `Loader`."""
    if isinstance(shard_index, str | os.PathLike) or isinstance(shard_num, Mapping):
        raise TypeError(
            "RecIS's Saver takes the ranks first, so the first argument is no path: write "
            "Saver.to(path, hashtables, tensors), or Saver(path=path, hashtables=hashtables, "
            "tensors=tensors)"
        )


def _checked_save_id(save_id: object) -> str:
    """Return a save_id as text."""
    if type(save_id) is int:
        save_id = str(save_id)
    if not isinstance(save_id, str):
        raise TypeError(f"save_id is text or an int, got {save_id!r}")
    if _PLAIN.fullmatch(save_id) is None:
        raise ValueError(
            f"save_id becomes a part of a file's name: 1 to 100 of A-Z a-z 0-9 . _ -, and no sign "
            f"first, got {save_id!r}"
        )
    return save_id
