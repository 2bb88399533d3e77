"""Makes tables and tensors of the kinds that a checkpoint holds, and fills them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.slices import gen_slice
from asyncloader._loading.checks import describe_tables
from asyncloader._loading.destinations import describe_tensors
from asyncloader._loading.load import Load
from asyncloader._loading.opening import open_session
from asyncloader._loading.progress import Meter
from asyncloader._loading.reading import has_dtype, torch_dtype
from asyncloader._loading.transaction import complete
from asyncloader._loading.verifier import Verifier
from asyncloader._memory.allocation import zeros
from asyncloader._planning.choice import choose
from asyncloader._planning.planner import plan_load
from asyncloader._planning.targets import Targets, can_cast
from asyncloader._table.hashtable import HashTable
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError

from .content import EMBEDDING, ID_BYTES, check_room, check_rows, free_memory, read_content

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.manifest import Stored
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.destinations import Destinations
    from asyncloader._loading.progress import Stages
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._planning.targets import LoadInfo
    from asyncloader._table.protocol import UpdateCounts
    from asyncloader.options import ReadOptions

    from .content import Content


_INDEX_BYTES = 16  # that an id takes in a table's index

# By table: the ids to take, and the slots.
Wanted: TypeAlias = "Mapping[str, tuple[Slice, Mapping[str, Stored]]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocated:
    """Empty tables, and tensors of zeros, for all of a checkpoint."""

    tables: dict[str, HashTable]
    tensors: dict[str, Tensor]
    lacking: Mapping[str, str]  # tensors that are left out, and their dtype, which torch lacks
    kernels_seconds: float  # to load the compiled kernels, or to compile them, if there are tables


async def allocate(path: str, options: ReadOptions, *, floats: str | None = None) -> Allocated:
    """Read names and headers, and make empty tables and zero tensors that take all of it.

    Each table on disk becomes a table of its own, also where several are children of one. With
    `floats`, a dtype as torch spells it, all floats become of that dtype. Raises the errors of
    `asyncloader.tools.empty_like`.
    """
    async with open_session(path, options) as session:
        content = await read_content(session)
        # Off the loop: the first table imports, or even compiles, the kernels.
        make = partial(_allocate, content, floats)
        [made] = await run_jobs(session.threads.kernels, [make])
    return made


def _allocate(content: Content, floats: str | None) -> Allocated:
    where = content.location
    known = {name: one for name, one in content.tensors.items() if has_dtype(one.dtype)}
    tensors = _cast_all(known, floats)
    wanted = {
        name: (gen_slice(0, 1, table.slice_size), _cast_all(table.slots, floats))
        for name, table in content.tables.items()
    }
    for name, (_, slots) in wanted.items():
        if EMBEDDING not in slots:
            problem = f"table {name!r} has no slot {EMBEDDING!r}, so no table can be made for it"
            raise CheckpointError(where, problem)
    taken = [one for _, slots in wanted.values() for one in slots.values()]
    taken += [*(table.ids for table in content.tables.values()), *tensors.values()]
    check_room(where, sum(one.memory for one in taken), free_memory())
    begin = time.perf_counter()
    if wanted:
        HashTable([1])  # the first one imports the kernels
    return Allocated(
        kernels_seconds=time.perf_counter() - begin if wanted else 0.0,
        tables=_make_tables(where, wanted),
        tensors=_make_tensors(where, tensors),
        lacking={n: one.dtype.name for n, one in content.tensors.items() if n not in known},
    )


def _cast_all(stored: Mapping[str, Stored], floats: str | None) -> dict[str, Stored]:
    """Return stored tensors as if floats were of the dtype that is wanted."""
    return {
        name: one
        if floats is None or not can_cast(one.dtype, BY_TORCH[floats], "any")
        else replace(one, dtype=BY_TORCH[floats])
        for name, one in stored.items()
    }


def _make_tables(location: str, wanted: Wanted) -> dict[str, HashTable]:
    return {name: _make_table(location, name, *one) for name, one in wanted.items()}


def _make_table(location: str, name: str, part: Slice, slots: Mapping[str, Stored]) -> HashTable:
    """Make an empty table; belongs on a thread.

    Without embeddings among its slots, the table has some all the same, of one byte, which mean
    nothing. Raises `CheckpointError` if torch has no such dtype, or there are no rows.
    """
    for stored in slots.values():
        check_rows(location, stored)
    shape: Sequence[int] = [1]
    dtype = torch.uint8
    if EMBEDDING in slots:
        shape, dtype = slots[EMBEDDING].shape[1:], torch_dtype(location, slots[EMBEDDING])
    table = HashTable(shape, dtype=dtype, slice=part, name=name)
    for slot, stored in slots.items():
        if slot != EMBEDDING:
            table.add_slot(slot, stored.shape[1:], torch_dtype(location, stored))
    return table


def _make_tensors(location: str, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    return {name: zeros(one.shape, torch_dtype(location, one)) for name, one in stored.items()}


def row_bytes(slots: Mapping[str, Stored]) -> int:
    """Return about how many bytes a table takes an id; of dtypes that torch has."""
    return (ID_BYTES + _INDEX_BYTES) + sum(
        math.prod(stored.shape[1:]) * (stored.dtype.itemsize or 0) for stored in slots.values()
    )


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """Tables and tensors that were filled."""

    tables: Mapping[str, HashTable]
    tensors: Mapping[str, Tensor]
    counts: Mapping[str, UpdateCounts]  # by table
    verified: int  # bytes that were compared with digests


async def load_part(
    content: Content, wanted: Wanted, dense: Mapping[str, Stored], stages: Stages
) -> LoadedPart:
    """Load parts of tables, and dense tensors, as one of `stages`.

    Where there are digests every byte is verified: reads are widened to whole chunks, which costs
    little, as rows that are saved with digests are sorted. Raises the errors of
    `asyncloader.tools.convert`.
    """
    info: LoadInfo = {name: {name: [ID, *slots]} for name, (_, slots) in wanted.items()}
    info |= {name: {name: []} for name in dense}
    session = content.session
    kernels = session.threads.kernels

    def make() -> tuple[dict[str, HashTable], dict[str, Tensor]]:
        where = content.location
        return _make_tables(where, wanted), _make_tensors(where, dense)

    def decide() -> tuple[LoadPlan, Destinations]:
        into = describe_tensors(tensors)
        targets = Targets(tensors=into.targets, tables=describe_tables(tables))
        choice = choose(content.manifest.catalog, info, targets)
        return plan_load(content.manifest, choice, strict=True), into

    [(tables, tensors)] = await run_jobs(kernels, [make])
    [(plan, into)] = await run_jobs(kernels, [decide])
    meter = Meter(plan.nbytes, stages.tell)
    verifier = Verifier(session.location, widen=True)
    load = Load(session, plan, into, tables, meter=meter, verifier=verifier)
    counts = await complete(load)
    stages.next()
    return LoadedPart(tables, tensors, counts, meter.verified)
