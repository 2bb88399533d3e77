"""Verifies a whole checkpoint: every rule, every digest, every byte once."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from asyncloader._checkpoint.problems import AllProblems, Problem
from asyncloader._loading.opening import open_session
from asyncloader._loading.progress import Meter
from asyncloader._threads.call import StalledError
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError, CheckpointNotFoundError, ReadStalledError

from .checksums import check_sums
from .content import ID_BYTES, check_room, free_memory
from .scanning import Watched, check_part, count_duplicates, scan
from .structure import read_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader.options import ReadOptions

    from .structure import Structure, TableIds


Severity = Literal["problem", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong or odd.

    Attributes:
        severity: Of a problem bytes or rows are wrong, lost, or cannot be read; a note is odd, but
            does no harm.
        text: A sentence.
        file: The file within the checkpoint, if it is about one.
        name: The block's key in that file, or the table, or `table@slot`.
    """

    severity: Severity
    text: str
    file: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        return str(Problem(self.file or "", self.name, self.text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How much was looked at, and everything that was found.

    Attributes:
        kind: `RecIS checkpoint`, `safetensors file` or `Hugging Face folder`.
        files: Files that were read, also the files with names and digests.
        ids: Of all tables.
        bytes_read: Of blocks.
        digests: How many were compared.
    """

    location: str
    kind: str
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    files: int
    tables: int
    tensors: int
    blocks: int
    ids: int
    bytes_read: int
    digests: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


async def averify(
    path: str, *, progress: Callable[[Progress], object] | None, options: ReadOptions
) -> Verification:
    """Look at everything that a checkpoint holds; see `asyncloader.tools.verify`."""
    # Digests are compared here; and it is the checkpoint that is looked at, no copy of it.
    how = replace(options, verify="off", cache_dir=None, cache_bytes=None)
    async with open_session(path, how) as session:
        return await verify_session(session, Meter(0, progress))


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
    inspector = _Inspector(session, meter, problems)
    await inspector.read_all(structure)
    meter.finish()
    return Verification(
        location=session.location,
        kind=structure.kind,
        problems=_findings("problem", problems.found),
        notes=_findings("note", problems.notes),
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
    try:
        return frozenset(await session.entries())
    except StalledError as error:
        raise ReadStalledError(session.location, 0, 0, str(error)) from error
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # over HTTP
            return frozenset()
        problem = f"cannot be listed: {error.strerror}"
        raise CheckpointError(session.location, problem) from error


def _findings(severity: Severity, found: Iterable[Problem]) -> tuple[Finding, ...]:
    return tuple(
        Finding(severity=severity, text=one.text, file=one.file or None, name=one.key)
        for one in sorted(found, key=lambda one: (one.file, one.key or "", one.text))
    )


@dataclass(slots=True)
class _Inspector:
    """Reads every byte of every block once, and looks at it."""

    session: Session
    meter: Meter
    problems: AllProblems
    compared: int = 0  # digests

    async def read_all(self, structure: Structure) -> None:
        """Read all blocks; ids one table at a time, as they have to be kept."""
        blocks = {
            (block.shard, block.key): block
            for header in structure.headers.values()
            for block in header.blocks.values()
        }
        self.meter.total = sum(block.nbytes for block in blocks.values())
        for table in structure.tables:
            await self._read_ids(table)
            for block in table.parts.values():
                blocks.pop((block.shard, block.key), None)
        await self._inspect([Watched(block) for block in blocks.values()])
        for header in structure.headers.values():
            if header.archive is not None:
                await check_sums(self.session, header.archive, self.problems)

    async def _read_ids(self, table: TableIds) -> None:
        kernels = self.session.threads.kernels
        [room] = await run_jobs(kernels, [partial(_room_for, table)])
        cuts = np.cumsum([block.rows for block in table.parts.values()], dtype=np.int64)
        parts = dict(zip(table.parts, np.split(room, cuts), strict=False))
        blocks = ((block, parts[claim].view(np.uint8).data) for claim, block in table.parts.items())
        if await self._inspect([Watched(*one) for one in blocks]):  # or some ids were not read
            check = partial(_check_ids, table, room, parts, self.problems)
            await run_jobs(kernels, [check])

    async def _inspect(self, watched: Sequence[Watched]) -> bool:
        """Look at all bytes of some blocks; return whether all of them could be read."""
        before = len(self.problems.found)
        await scan(
            self.session,
            [one.block for one in watched],
            lambda number, begin, view: watched[number].look(begin, view),
            meter=self.meter,
            kept=[one.memory for one in watched],
            failed=self.problems.error,
        )
        complete = len(self.problems.found) == before
        for one in watched:
            one.tell(self.problems)
            self.compared += one.compared
        return complete


def _room_for(table: TableIds) -> NDArray[np.int64]:
    """Return room for the ids of a table; raise `MemoryError` if there is none."""
    check_room(f"the ids of table {table.table!r}", table.rows * ID_BYTES, free_memory())
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
