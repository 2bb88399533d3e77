"""Makes tables and tensors for what a checkpoint holds, and fills them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.slices import gen_slice
from asyncloader._loading.checks import describe_tables
from asyncloader._loading.destinations import describe_tensors
from asyncloader._loading.load import Load
from asyncloader._loading.reading import has_dtype, torch_dtype
from asyncloader._loading.runtime import open_session
from asyncloader._loading.session import Verifier
from asyncloader._loading.transaction import complete
from asyncloader._memory.allocation import zeros
from asyncloader._planning.choice import choose
from asyncloader._planning.planner import plan_load
from asyncloader._planning.targets import Targets, can_cast
from asyncloader._table.hashtable import HashTable
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError
from asyncloader.options import ReadOptions

from .content import EMBEDDING, check_room, check_rows, free_memory, read_content

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from asyncloader._checkpoint.manifest import Stored
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.destinations import Destinations
    from asyncloader._loading.progress import Meter
    from asyncloader._loading.session import Session
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._planning.targets import LoadInfo
    from asyncloader._table.protocol import UpdateCounts

    from .content import Content


# What a table takes an id beyond its rows: the id, and its place in the index.
_ID_BYTES = 8 + 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocated:
    """Empty tables, and tensors of zeros, for all of a checkpoint."""

    tables: dict[str, HashTable]
    tensors: dict[str, Tensor]

    lacking: Mapping[str, str]
    """Tensors that are left out, as torch lacks their dtype, and that dtype."""

    kernels_seconds: float
    """It took to load the compiled kernels, or to compile them, if there are tables."""


async def allocate(
    path: str, *, options: ReadOptions | None = None, floats: str | None = None
) -> Allocated:
    """Read names and headers, and make empty tables and zero tensors that take all of it.

    Each table on disk becomes a table of its own, also where several are children of one. With
    `floats`, a dtype as torch spells it, all floats become of that dtype. Raises the errors of
    `asyncloader.tools.empty_like`.
    """
    async with open_session(path, options or ReadOptions()) as session:
        content = await read_content(session)
        # Off the loop: the first table imports, or even compiles, the kernels.
        make = partial(_allocate, content, floats)
        [made] = await run_jobs(session.threads.kernels, [make])
    return made


def _allocate(content: Content, floats: str | None) -> Allocated:
    where = content.location
    known = {name: one for name, one in content.tensors.items() if has_dtype(one.dtype)}
    tensors = {name: _cast(one, floats) for name, one in known.items()}
    slots = {
        name: {slot: _cast(one, floats) for slot, one in table.slots.items()}
        for name, table in content.tables.items()
    }
    for name, of_table in slots.items():
        if EMBEDDING not in of_table:
            problem = f"table {name!r} has no slot {EMBEDDING!r}, so no table can be made for it"
            raise CheckpointError(where, problem)
    rows = sum(one.memory for of_table in slots.values() for one in of_table.values())
    ids = sum(table.ids.memory for table in content.tables.values())
    dense = sum(one.memory for one in tensors.values())
    check_room(where, rows + ids + dense, free_memory())
    begin = time.perf_counter()
    if slots:
        HashTable([1])  # the first one imports the kernels
    return Allocated(
        kernels_seconds=time.perf_counter() - begin if slots else 0.0,
        tables={
            name: make_table(where, name, slots[name], gen_slice(0, 1, table.slice_size))
            for name, table in content.tables.items()
        },
        tensors=make_tensors(where, tensors),
        lacking={n: one.dtype.name for n, one in content.tensors.items() if n not in known},
    )


def _cast(stored: Stored, floats: str | None) -> Stored:
    """Return what is stored as if it were of the dtype that is wanted."""
    if floats is None or not can_cast(stored.dtype, BY_TORCH[floats], "any"):
        return stored
    return replace(stored, dtype=BY_TORCH[floats])


def make_table(location: str, name: str, slots: Mapping[str, Stored], part: Slice) -> HashTable:
    """Make an empty table for the ids of a slice; belongs on a thread.

    Without embeddings among its slots, the table has some all the same, of one byte, which mean
    nothing.

    Raises:
        CheckpointError: If torch has no such dtype, or there are no rows.
    """
    for stored in slots.values():
        check_rows(location, stored)
    if EMBEDDING in slots:
        stored = slots[EMBEDDING]
        dtype = torch_dtype(location, stored)
        table = HashTable(stored.shape[1:], dtype=dtype, slice=part, name=name)
    else:
        table = HashTable([1], dtype=torch.uint8, slice=part, name=name)
    for slot, stored in slots.items():
        if slot != EMBEDDING:
            table.add_slot(slot, stored.shape[1:], torch_dtype(location, stored))
    return table


def make_tensors(location: str, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Make tensors of zeros.

    Raises:
        CheckpointError: If torch has no such dtype.
    """
    return {name: zeros(one.shape, torch_dtype(location, one)) for name, one in stored.items()}


def row_bytes(slots: Mapping[str, Stored]) -> int:
    """Return about how many bytes a table takes an id; of dtypes that torch has."""
    return _ID_BYTES + sum(
        math.prod(stored.shape[1:]) * (stored.dtype.itemsize or 0) for stored in slots.values()
    )


async def fill(
    session: Session,
    content: Content,
    tables: Mapping[str, HashTable],
    slots: Mapping[str, Mapping[str, Stored]],
    *,
    tensors: Mapping[str, Tensor],
    meter: Meter,
) -> dict[str, UpdateCounts]:
    """Fill tables and tensors from what is stored under the same names; return counts by table.

    Where there are digests every byte is verified: what is read is widened to whole chunks, which
    costs little, as rows that are saved with digests are sorted. Of a table, `slots` are loaded,
    and the ids.

    Raises:
        PlanError: If something does not fit together.
        CheckpointError: If bytes are not those that were written.
        ReadError: If the storage failed.
        MemoryError: If there is no room.
    """
    info: LoadInfo = {name: {name: [ID, *slots[name]]} for name in tables}
    info |= {name: {name: []} for name in tensors}

    def decide() -> tuple[LoadPlan, Destinations]:
        into = describe_tensors(tensors)
        targets = Targets(tensors=into.targets, tables=describe_tables(tables))
        choice = choose(content.manifest.catalog, info, targets)
        return plan_load(content.manifest, choice, strict=True), into

    [(plan, into)] = await run_jobs(session.threads.kernels, [decide])
    meter.total = plan.nbytes
    verifier = Verifier(session.location, widen=True)
    return await complete(Load(session, plan, into, tables, meter=meter, verifier=verifier))
