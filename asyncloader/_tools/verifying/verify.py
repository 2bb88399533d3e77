"""Verifies a whole checkpoint: every rule, every digest, every byte once."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.problems import AllProblems
from asyncloader._loading.progress import Meter
from asyncloader._loading.runtime import open_session
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.content import check_room, free_memory
from asyncloader._tools.verifying.ids import count_duplicates
from asyncloader.errors import CheckpointError, CheckpointNotFoundError, ReadStalledError
from asyncloader.options import ReadOptions

from .bytes import Inspector, Watched
from .findings import Verification, findings
from .ids import check_part
from .structure import read_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session

    from .structure import Structure, TableIds


_ID_BYTES = 8


async def averify(
    path: str,
    *,
    progress: Callable[[Progress], object] | None = None,
    options: ReadOptions | None = None,
) -> Verification:
    """Look at everything that a checkpoint holds.

    Args:
        path: A folder, or a safetensors file.
        progress: Called on the event loop, at most ten times a second.
        options: How to read.

    Returns:
        All problems and oddities, and how much was looked at.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointChangedError: If it was replaced meanwhile.
        CheckpointError: If the folder cannot be listed.
        MemoryError: If the ids of a table do not fit into memory.
    """
    meter = Meter(0, progress)
    how = replace(options or ReadOptions(), verify="off")  # digests are compared here
    async with open_session(path, how) as session:
        return await verify_session(session, meter)


async def verify_session(session: Session, meter: Meter) -> Verification:
    """Look at everything in a checkpoint that is open; raise as `averify` does."""
    problems = AllProblems(session.location)
    try:
        structure = await read_structure(
            session.storage,
            problems,
            file=session.file,
            there=await _listed(session),
            executor=session.threads.kernels,
            parallel=session.options.parallel,
        )
    except CheckpointNotFoundError:
        await session.catalog()  # says which files are there instead
        raise
    if session.file is not None and not structure.headers:  # there is nothing else to look at
        await session.catalog()
    inspector = Inspector(session, meter, problems)
    await _read_bytes(inspector, structure)
    meter.finish()
    return Verification(
        location=session.location,
        kind=structure.kind,
        problems=findings("problem", problems.found),
        notes=findings("note", problems.notes),
        files=structure.files,
        tables=len(structure.tables),
        tensors=structure.tensors,
        blocks=sum(len(header.blocks) for header in structure.headers.values()),
        ids=sum(ids.rows for ids in structure.tables),
        bytes_read=meter.read,
        digests=inspector.compared,
        seconds=meter.seconds,
    )


async def _listed(session: Session) -> frozenset[str]:
    if session.file is not None:
        return frozenset([session.file])
    listed = partial(os.listdir, session.storage.location)
    try:
        return frozenset(await session.on_disk(listed))
    except ReadStalledError:  # an OSError, too
        raise
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        problem = f"cannot be listed: {error.strerror}"
        raise CheckpointError(session.location, problem) from error


async def _read_bytes(inspector: Inspector, structure: Structure) -> None:
    """Read all blocks; ids one table at a time, as they have to be kept."""
    blocks = {
        (block.shard, block.key): block
        for header in structure.headers.values()
        for block in header.blocks.values()
    }
    inspector.meter.total = sum(block.nbytes for block in blocks.values())
    for table in structure.tables:
        await _read_ids(inspector, table)
        for block in table.parts.values():
            blocks.pop((block.shard, block.key), None)
    await inspector.inspect([Watched(block) for block in blocks.values()])


async def _read_ids(inspector: Inspector, table: TableIds) -> None:
    kernels = inspector.session.threads.kernels
    [room] = await run_jobs(kernels, [partial(_room_for, table)])
    cuts = np.cumsum([block.rows for block in table.parts.values()], dtype=np.int64)
    parts = dict(zip(table.parts, np.split(room, cuts), strict=False))
    blocks = ((block, parts[claim].view(np.uint8).data) for claim, block in table.parts.items())
    if await inspector.inspect([Watched(*one) for one in blocks]):  # or some ids were not read
        check = partial(_check_ids, table, room, parts, inspector.problems)
        await run_jobs(kernels, [check])


def _room_for(table: TableIds) -> NDArray[np.int64]:
    """Return room for the ids of a table.

    Raises:
        MemoryError: If there is none.
    """
    check_room(f"the ids of table {table.table!r}", table.rows * _ID_BYTES, free_memory())
    return np.zeros(table.rows, np.int64)


def _check_ids(
    table: TableIds,
    ids: NDArray[np.int64],
    parts: Mapping[Slice, NDArray[np.int64]],
    problems: AllProblems,
) -> None:
    """Check all ids of a table; they are sorted afterwards."""
    for claim, block in table.parts.items():
        check_part(parts[claim], claim, block, table.told.get(claim), problems)
    count, example = count_duplicates(ids)
    if count:
        text = f"{count:,} of {len(ids):,} ids come twice or more, such as {example}"
        problems.add(f"{text}: the later row would win", None, table.table)
