"""Makes tables, and fills them from a checkpoint that is open and whose headers are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._loading.checks import describe_tables
from asyncloader._loading.destinations import describe_tensors
from asyncloader._loading.load import Load
from asyncloader._loading.progress import Meter
from asyncloader._loading.reading import torch_dtype
from asyncloader._loading.transaction import complete
from asyncloader._loading.verification import Verifier
from asyncloader._planning.choice import choose
from asyncloader._planning.load_info import ID
from asyncloader._planning.planner import plan_load
from asyncloader._planning.targets import Targets
from asyncloader._table.hashtable import HashTable
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError

from .allocation import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.destinations import Destinations
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader._planning.load_info import LoadInfo
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._table.protocol import UpdateCounts


# What a table takes an id beyond its rows: the id, and its place in the index.
_ID_BYTES = 8 + 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What was read."""

    counts: Mapping[str, UpdateCounts]
    """By table."""

    bytes_read: int
    bytes_verified: int


def row_bytes(slots: Mapping[str, Stored]) -> int:
    """Return about how many bytes a table takes an id; of dtypes that torch has."""
    return _ID_BYTES + sum(
        math.prod(stored.shape[1:]) * (stored.dtype.itemsize or 0) for stored in slots.values()
    )


def check_rows(location: str, stored: Stored) -> None:
    """Refuse what no table can hold.

    Raises:
        CheckpointError: If it is.
    """
    if not stored.shape or 0 in stored.shape[1:]:
        problem = f"{stored.name!r} has the shape {list(stored.shape)}: these are no rows"
        raise CheckpointError(location, problem)


def make_table(location: str, name: str, slots: Mapping[str, Stored], part: Slice) -> HashTable:
    """Make an empty table; belongs on a thread.

    Args:
        location: The checkpoint, for messages.
        name: The table's.
        slots: What is stored of it, without the ids. Without embeddings the table has some all the
            same, of one byte, which nobody should look at.
        part: The ids that it takes.

    Raises:
        CheckpointError: If torch has no such dtype, or there are no rows.
    """
    for stored in slots.values():
        check_rows(location, stored)
    embedding = slots.get(EMBEDDING)
    if embedding is None:
        import torch  # noqa: PLC0415  # only here

        table = HashTable([1], dtype=torch.uint8, slice=part, name=name)
    else:
        dtype = torch_dtype(location, embedding)
        table = HashTable(embedding.shape[1:], dtype=dtype, slice=part, name=name)
    for slot, stored in slots.items():
        if slot != EMBEDDING:
            table.add_slot(slot, stored.shape[1:], torch_dtype(location, stored))
    return table


async def fill(
    session: Session,
    manifest: Manifest,
    tables: Mapping[str, tuple[HashTable, Mapping[str, Stored]]],
    tensors: Mapping[str, Tensor],
    *,
    progress: Callable[[Progress], object] | None = None,
) -> Filled:
    """Fill tables and tensors from what is stored under the same names.

    Where there are digests every byte is verified: what is read is widened to whole chunks, which
    costs little, as rows that are saved with digests are sorted.

    Args:
        session: The checkpoint.
        manifest: Its names and all headers.
        tables: By name, with the slots to load besides the ids.
        tensors: By name.
        progress: Called on the event loop.

    Raises:
        PlanError: If something does not fit together.
        CheckpointError: If bytes are not those that were written.
        ReadError: If the storage failed.
        MemoryError: If there is no room.
    """
    made = {name: table for name, (table, _) in tables.items()}
    info = {name: {name: [ID, *slots]} for name, (_, slots) in tables.items()}
    info |= {name: {name: []} for name in tensors}
    decide = partial(_plan, manifest, info, made, tensors)
    [(plan, into)] = await run_jobs(session.threads.kernels, [decide])
    meter = Meter(plan.nbytes, progress)
    load = Load(
        session, plan, into, made, meter=meter, verifier=Verifier(session.location, widen=True)
    )
    counts = await complete(load, session)
    return Filled(counts=counts, bytes_read=meter.read, bytes_verified=meter.verified)


def _plan(
    manifest: Manifest,
    info: LoadInfo,
    tables: Mapping[str, HashTable],
    tensors: Mapping[str, Tensor],
) -> tuple[LoadPlan, Destinations]:
    into = describe_tensors(tensors)
    targets = Targets(tensors=into.targets, tables=describe_tables(tables))
    return plan_load(manifest, choose(manifest.catalog, info, targets), strict=True), into
