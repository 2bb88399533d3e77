"""The files beside a checkpoint's tensors that RecIS's trainer resumes from. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import EXTRA
from asyncloader._checkpoint.problems import AllProblems
from asyncloader._checkpoint.torch_file import parse_archive, read_archive
from asyncloader._storage.protocol import opening_error, read_exactly
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._loading.session import Session


_STEP, _STEP_BYTES = "global_step", 8  # int64
_BESIDE = re.compile(r"extra\.p(t|kl)|model\.pkl|io_state_\d+\.pt", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSummary:
    """A file beside the tensors, of so many bytes."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What there is beside the tensors.

    Attributes:
        files: In the order of their names.
        global_step: The trainer's; `None` if it is not known.
        warnings: Why a file cannot be read.
    """

    files: tuple[FileSummary, ...] = ()
    global_step: int | None = None
    warnings: tuple[str, ...] = ()


async def look_beside(session: Session) -> Beside:
    """Look for the files, and read the step; raise `ReadError` if the storage failed."""
    files = _found(await session.listed())
    if all(file.name != EXTRA for file in files):
        return Beside(files=files)
    try:
        return Beside(files=files, global_step=await _step(session))
    except CheckpointError as error:
        return Beside(files=files, warnings=(f"{EXTRA}: {error.problem}",))


def _found(entries: Mapping[str, int | None]) -> tuple[FileSummary, ...]:
    found = [
        FileSummary(name=name, bytes=size)
        for name, size in entries.items()
        if size is not None and _BESIDE.fullmatch(name)
    ]
    return tuple(sorted(found, key=lambda file: (len(file.name), file.name)))


async def _step(session: Session) -> int | None:
    """Read the step: all of the archive's descriptions, and eight bytes."""
    storage, kernels = session.storage, session.threads.kernels
    try:
        size = await storage.size(EXTRA)
    except OSError as error:
        raise opening_error(session.location, EXTRA, error) from error
    archive = await read_archive(storage, EXTRA, size, executor=kernels)
    described = partial(parse_archive, AllProblems(session.location), archive)
    [header] = await run_jobs(kernels, [described])
    if _STEP not in header.blocks:
        return None
    block = header.blocks[_STEP]
    if (block.dtype.name, block.nbytes) != ("I64", _STEP_BYTES):
        return None
    session.know({EXTRA: header})
    step = bytearray(_STEP_BYTES)
    await read_exactly(storage, EXTRA, block.offset, [memoryview(step)])
    return int.from_bytes(step, "little", signed=True)
