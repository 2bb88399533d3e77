"""Writes a checkpoint in RecIS's format, as so many ranks would, one after the other."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.slices import gen_slice
from asyncloader._loading.reading import has_dtype, torch_dtype
from asyncloader._memory.allocation import zeros
from asyncloader._memory.sizes import listed
from asyncloader._saving.commit import Commit
from asyncloader._saving.save_id import fresh_save_id
from asyncloader._storage.folder import LocalFolder
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.filling import fill, make_table, row_bytes
from asyncloader._tools.room import check_room, free_memory
from asyncloader._tools.stages import Stages
from asyncloader.errors import CheckpointError
from asyncloader.saver import Saver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader._saving.layout import WriteBlock
    from asyncloader._saving.report import SaveReport
    from asyncloader._table.hashtable import HashTable

    from .source import Source, StoredTable


_OLD = "old"
"""The folder within a staging folder to which a commit moves what it replaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank has written."""

    report: SaveReport
    duplicates: Mapping[str, int]
    """Rows that gave way to a later one of the same id, by table."""

    bytes_verified: int
    """Of those that were read for it."""


async def write_folder(
    session: Session,
    source: Source,
    path: Path,
    *,
    ranks: int,
    parallel: int,
    progress: Callable[[Progress], object] | None,
) -> list[Part]:
    """Load each rank's part and save it; rank 0, which commits, comes last.

    Args:
        session: The source.
        source: What it holds.
        path: The folder.
        ranks: How many.
        parallel: Shards of each rank.
        progress: Called on the event loop.

    Raises:
        PlanError: If something does not fit together.
        CheckpointError: Likewise, or if bytes are not those that were written.
        ReadError: If the source failed.
        SaveError: If the folder could not be written, or holds something else.
        MemoryError: If one rank's part does not fit into memory.
    """
    _check_names(source)
    _check_dtypes(source)
    _check_ranks(source, ranks)
    await run_jobs(session.threads.reads, [partial(_check_memory, source, ranks)])
    writer = _Writer(
        session=session,
        source=source,
        path=path,
        ranks=ranks,
        parallel=parallel,
        stages=Stages(2 * source.nbytes, progress),
        save_id=fresh_save_id(),
    )
    try:
        return [await writer.write(rank) for rank in reversed(range(ranks))]
    except BaseException:
        await run_jobs(session.threads.reads, [writer.give_up])
        raise


def _check_names(source: Source) -> None:
    tensors = {stored.name for stored in source.tensors}
    for table in source.tables:
        if table.name in tensors:
            problem = f"both a tensor and a table are called {table.name!r}, which cannot be saved"
            raise CheckpointError(source.manifest.location, problem)


def _check_dtypes(source: Source) -> None:
    slots = [stored for table in source.tables for stored in table.slots.values()]
    lacking = tuple(
        f"{one.name!r} ({one.dtype.name})"
        for one in (*slots, *source.tensors)
        if not has_dtype(one.dtype)
    )
    if lacking:
        problem = (
            f"torch lacks the dtype of {listed(lacking)}, and a folder is written from torch's "
            "tensors; a destination that ends in .safetensors gets the bytes as they are"
        )
        raise CheckpointError(source.manifest.location, problem)


def _check_ranks(source: Source, ranks: int) -> None:
    for table in source.tables:
        if ranks > table.slice_size:
            problem = (
                f"table {table.name!r} has a slice size of {table.slice_size}, so at most as many "
                f"ranks can share it, not {ranks}"
            )
            raise CheckpointError(source.manifest.location, problem)


def _check_memory(source: Source, ranks: int) -> None:
    part = sum(table.ids.rows * row_bytes(table.slots) for table in source.tables) // ranks
    dense = sum(stored.nbytes for stored in source.tensors)
    what = f"the part of one of {ranks} ranks (with more --shards it is smaller)"
    check_room(what, part + dense, free_memory())


@dataclass(slots=True, kw_only=True)
class _Writer:
    session: Session
    source: Source
    path: Path
    ranks: int
    parallel: int
    stages: Stages
    save_id: str
    _kept: frozenset[str] = field(init=False)
    """Names of the blocks that there are; a table without embeddings has some of ours."""

    def __post_init__(self) -> None:
        self._kept = frozenset(
            f"{table.name}@{slot}" for table in self.source.tables for slot in ("id", *table.slots)
        )

    async def write(self, rank: int) -> Part:
        """Write one rank's part. Its rows are let go when this returns."""
        pool = self.session.threads.kernels
        [(tables, tensors)] = await run_jobs(pool, [partial(self._allocate, rank)])
        slots = {table.name: table.slots for table in self.source.tables}
        filled = await fill(
            self.session,
            self.source.manifest,
            {name: (table, slots[name]) for name, table in tables.items()},
            tensors,
            progress=self.stages.tell,
        )
        self.stages.next()
        saver = Saver(
            rank,
            self.ranks,
            self.parallel,
            self.path,
            tables,
            tensors,
            self._wanted,
            save_id=self.save_id,
            max_inflight_bytes=self.session.options.max_inflight_bytes,
            progress=self.stages.tell,
        )
        report = await saver.asave()
        self.stages.next()
        return Part(
            report=report,
            duplicates={name: counts.duplicates for name, counts in filled.counts.items()},
            bytes_verified=filled.bytes_verified,
        )

    def _allocate(self, rank: int) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
        where = self.source.manifest.location
        tables = {table.name: self._table(where, table, rank) for table in self.source.tables}
        dense = self.source.tensors if rank == 0 else ()
        return tables, {stored.name: _tensor(where, stored) for stored in dense}

    def _table(self, where: str, table: StoredTable, rank: int) -> HashTable:
        part = gen_slice(rank, self.ranks, table.slice_size)
        return make_table(where, table.name, table.slots, part)

    def _wanted(self, blocks: list[WriteBlock]) -> list[WriteBlock]:
        return [block for block in blocks if block.table is None or block.name in self._kept]

    def give_up(self) -> None:
        """Remove what all ranks have staged; belongs on a thread.

        A `Saver` that fails removes its own rank's files only. If the last one failed in its
        commit, and what stood in the folder could not be put back, that is kept.
        """
        commit = Commit(LocalFolder(self.path), self.save_id, 0, self.ranks, 0.0)
        staging = self.path / commit.staging
        with contextlib.suppress(OSError):
            aside = staging / _OLD
            if not aside.is_dir() or not any(aside.iterdir()):
                shutil.rmtree(staging)


def _tensor(where: str, stored: Stored) -> Tensor:
    return zeros(stored.shape, torch_dtype(where, stored))
