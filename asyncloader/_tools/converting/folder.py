"""Writes a checkpoint in RecIS's format, as so many ranks would, one after the other."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.slices import gen_slice
from asyncloader._display import listed
from asyncloader._loading.progress import Meter, Stages
from asyncloader._loading.reading import has_dtype
from asyncloader._saving.leftovers import OLD, staging_of
from asyncloader._saving.save_id import fresh_save_id
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.allocation import fill, make_table, make_tensors, row_bytes
from asyncloader._tools.content import check_room, free_memory
from asyncloader.errors import CheckpointError
from asyncloader.saver import Saver

from .file import Written

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader._saving.layout import WriteBlock
    from asyncloader._table.hashtable import HashTable
    from asyncloader._tools.content import Content


async def write_folder(
    session: Session,
    content: Content,
    path: Path,
    *,
    ranks: int | None,
    parallel: int,
    progress: Callable[[Progress], object] | None,
) -> Written:
    """Load each rank's part and save it; rank 0, which commits, comes last.

    Raises:
        PlanError: If something does not fit together.
        CheckpointError: Likewise, or if bytes are not those that were written.
        ReadError: If the source failed.
        SaveError: If the folder could not be written, or holds something else.
        MemoryError: If one rank's part does not fit into memory.
    """
    count = ranks or max((table.ranks for table in content.tables.values()), default=1)
    pool = session.threads.kernels
    await run_jobs(session.threads.reads, [partial(_check, content, count)])
    save_id = fresh_save_id()
    stages = Stages(2 * sum(content.sizes.values()), progress)
    slots = {name: table.slots for name, table in content.tables.items()}
    done = Written(files=[], ranks=count, nbytes=0, verified=0, ids=Counter(), duplicates=Counter())

    def allocate(rank: int) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
        where = content.location
        tables = {
            name: make_table(where, name, table.slots, gen_slice(rank, count, table.slice_size))
            for name, table in content.tables.items()
        }
        return tables, make_tensors(where, content.tensors if rank == 0 else {})

    async def write(rank: int) -> None:
        """Write one rank's part. Its rows are let go when this returns."""
        [(tables, tensors)] = await run_jobs(pool, [partial(allocate, rank)])
        meter = Meter(0, stages.tell)
        counts = await fill(session, content, tables, slots, tensors=tensors, meter=meter)
        stages.next()
        saver = Saver(
            rank,
            count,
            parallel,
            path,
            tables,
            tensors,
            partial(_wanted, content),
            save_id=save_id,
            max_inflight_bytes=session.options.max_inflight_bytes,
            progress=stages.tell,
        )
        report = await saver.asave()
        stages.next()
        done.files = sorted([*done.files, *report.shards])
        done.nbytes += report.bytes_written
        done.verified += meter.verified
        done.ids.update(report.tables)
        done.duplicates.update({name: one.duplicates for name, one in counts.items()})

    try:
        for rank in reversed(range(count)):
            await write(rank)
    except BaseException:
        await run_jobs(session.threads.reads, [partial(_give_up, path, save_id, count)])
        raise
    return done


def _check(content: Content, ranks: int) -> None:
    """Refuse what cannot be saved as so many ranks; belongs on a thread.

    Raises:
        CheckpointError: If names, dtypes or the number of ranks do not fit.
        MemoryError: If one rank's part does not fit into memory.
    """
    for name, table in content.tables.items():
        if name in content.tensors:
            problem = f"both a tensor and a table are called {name!r}, which cannot be saved"
            raise CheckpointError(content.location, problem)
        if ranks > table.slice_size:
            problem = (
                f"table {name!r} has a slice size of {table.slice_size}, so at most as many ranks "
                f"can share it, not {ranks}"
            )
            raise CheckpointError(content.location, problem)
    slots = [stored for table in content.tables.values() for stored in table.slots.values()]
    lacking = tuple(
        f"{one.name!r} ({one.dtype.name})"
        for one in (*slots, *content.tensors.values())
        if not has_dtype(one.dtype)
    )
    if lacking:
        problem = (
            f"torch lacks the dtype of {listed(lacking)}, and a folder is written from torch's "
            "tensors; a destination that ends in .safetensors gets the bytes as they are"
        )
        raise CheckpointError(content.location, problem)
    part = sum(one.ids.rows * row_bytes(one.slots) for one in content.tables.values()) // ranks
    dense = sum(stored.nbytes for stored in content.tensors.values())
    what = f"the part of one of {ranks} ranks (with more --shards it is smaller)"
    check_room(what, part + dense, free_memory())


def _wanted(content: Content, blocks: list[WriteBlock]) -> list[WriteBlock]:
    """Leave out the embeddings of a table that has none: they are ours."""
    kept = {f"{name}@{slot}" for name, one in content.tables.items() for slot in (ID, *one.slots)}
    return [block for block in blocks if block.table is None or block.name in kept]


def _give_up(path: Path, save_id: str, ranks: int) -> None:
    """Remove what all ranks have staged; belongs on a thread.

    A `Saver` that fails removes its own rank's files only. If the last one failed in its commit,
    and what stood in the folder could not be put back, that is kept.
    """
    staging = path / staging_of(ranks, save_id)
    with contextlib.suppress(OSError):
        aside = staging / OLD
        if not aside.is_dir() or not any(aside.iterdir()):
            shutil.rmtree(staging)
