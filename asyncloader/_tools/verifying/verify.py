"""Verifies a whole checkpoint: every rule, every digest, every byte once."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.problems import AllProblems
from asyncloader._loading.progress import Meter
from asyncloader._loading.session import open_session
from asyncloader._memory.allocation import zeros
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.duplicates import count_duplicates
from asyncloader._tools.room import check_room, free_memory
from asyncloader.errors import CheckpointError, CheckpointNotFoundError, ReadStalledError
from asyncloader.options import ReadOptions

from .bytes import Inspector, Watched, memories
from .findings import Verification, findings
from .ids import check_part
from .structure import TableIds, read_structure

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session

    from .structure import Structure


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
        All that is wrong or odd, and how much was looked at.

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
    """Look at everything in a checkpoint that is open; raises what `averify` does."""
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
        await session.catalog()  # knows how to say what is there instead
        raise
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
    def names() -> frozenset[str]:
        if session.file is None:
            return frozenset(os.listdir(session.storage.location))  # noqa: PTH208  # names
        return frozenset([session.file])

    try:
        return await session.on_disk(names)
    except ReadStalledError:  # an OSError, too
        raise
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        problem = f"cannot be listed: {error.strerror}"
        raise CheckpointError(session.location, problem) from error


async def _read_bytes(inspector: Inspector, structure: Structure) -> None:
    """Read all blocks; those of ids one table at a time, as they have to be kept."""
    blocks = {
        (block.shard, block.key): block
        for header in structure.headers.values()
        for block in header.blocks.values()
    }
    inspector.meter.total = sum(block.nbytes for block in blocks.values())
    kernels = inspector.session.threads.kernels
    for ids in structure.tables:
        [kept] = await run_jobs(kernels, [partial(_Kept.of, ids)])
        if await inspector.inspect(kept.watched):  # or some ids are zeros that nobody wrote
            await run_jobs(kernels, [partial(kept.check, inspector.problems)])
        del kept
        for block in ids.parts.values():
            blocks.pop((block.shard, block.key), None)
    await inspector.inspect([Watched(block) for block in blocks.values()])


@dataclass(frozen=True, slots=True)
class _Kept:
    """The ids of one table, in memory."""

    ids: TableIds
    array: NDArray[np.int64]
    watched: tuple[Watched, ...]

    @classmethod
    def of(cls, ids: TableIds) -> _Kept:
        """Make room for them; belongs on a thread.

        Raises:
            MemoryError: If there is none.
        """
        check_room(f"the ids of table {ids.table!r}", ids.rows * _ID_BYTES, free_memory())
        array = zeros((ids.rows,), torch.int64).numpy()
        sizes = [block.nbytes for block in ids.parts.values()]
        views = memories(array.data.cast("B"), sizes) if ids.rows else [None] * len(sizes)
        blocks = zip(ids.parts.values(), views, strict=True)
        return cls(ids, array, tuple(Watched(block, view) for block, view in blocks))

    def check(self, problems: AllProblems) -> None:
        """Check all of them; they are sorted afterwards."""
        begin = 0
        for claim, block in self.ids.parts.items():
            part = self.array[begin : begin + block.rows]
            check_part(part, claim, block, self.ids.told.get(claim), problems)
            begin += block.rows
        assert begin == len(self.array)
        count, example = count_duplicates(self.array)
        if count:
            text = f"{count:,} of {len(self.array):,} ids come twice or more, such as {example}"
            problems.add(f"{text}: the later row would win", None, self.ids.table)
