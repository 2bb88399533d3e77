"""Verifies a whole checkpoint: every rule, every digest, every byte once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.safetensors import catalog_of_file
from asyncloader._loading.progress import Meter
from asyncloader._loading.session import open_session
from asyncloader._memory.allocation import zeros
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.duplicates import count_duplicates
from asyncloader._tools.room import check_room, free_memory
from asyncloader.options import ReadOptions

from .bytes import Inspector, Watched, memories
from .findings import Findings, Verification
from .ids import check_part
from .names import read_names
from .shards import check_layout, read_shards
from .sidecars import check_parts, with_digests
from .structure import TableIds, check_catalog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.sidecar import PartRows
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session

    from .names import Names
    from .shards import Shard


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
        CheckpointError: If the folder cannot be listed.
        MemoryError: If the ids of a table do not fit into memory.
    """
    meter = Meter(0, progress)
    how = replace(options or ReadOptions(), verify="off")  # digests are compared here
    async with open_session(path, how) as session:
        return await verify_session(session, meter)


async def verify_session(session: Session, meter: Meter) -> Verification:
    """Look at everything in a checkpoint that is open; raises what `averify` does."""
    findings = Findings()
    names = await read_names(session, findings)
    check = _Check(session=session, names=names, findings=findings, meter=meter)
    await check.read_headers()
    await check.read_bytes()
    meter.finish()
    return check.result()


@dataclass(slots=True, kw_only=True)
class _Check:
    """One verification under way."""

    session: Session
    names: Names
    findings: Findings
    meter: Meter
    shards: dict[str, Shard] = field(default_factory=dict)
    tables: list[TableIds] = field(default_factory=list)
    told: Mapping[str, Mapping[Slice, PartRows]] = field(default_factory=dict)
    tensors: int = 0
    compared: int = 0

    async def read_headers(self) -> None:
        names = self.names
        self.shards = await read_shards(
            self.session, names.shards, names.source, self.findings, recis=names.recis
        )
        await run_jobs(self.session.threads.kernels, [self._check_structure])

    def _check_structure(self) -> None:
        names, findings = self.names, self.findings
        for shard in self.shards.values():
            check_layout(shard, findings, recis=names.recis)
        if names.sidecar is None:
            findings.note("no digests: bytes cannot be verified, only the structure")
        else:
            self.shards = with_digests(names.sidecar, self.shards, names.shards, findings)
        catalog = self._catalog()
        if catalog is None:
            return
        self.tensors = len(catalog.tensors)
        self.tables = check_catalog(
            self.session.location, catalog, names.refused, self.shards, findings
        )
        if names.sidecar is not None:
            self.told = check_parts(names.sidecar, self.tables, findings)

    def _catalog(self) -> Catalog | None:
        if self.names.catalog is not None or self.names.source not in self.shards:
            return self.names.catalog
        return catalog_of_file(self.shards[self.names.source].header)

    async def read_bytes(self) -> None:
        blocks = {
            (block.shard, block.key): block
            for shard in self.shards.values()
            for block in shard.header.blocks.values()
        }
        self.meter.total = sum(block.nbytes for block in blocks.values())
        inspector = Inspector(self.session, self.meter, self.findings)
        for ids in self.tables:  # one table at a time, its ids have to be kept
            await self._read_ids(inspector, ids)
            for block in ids.parts.values():
                blocks.pop((block.shard, block.key), None)
        await inspector.inspect([Watched(block) for block in blocks.values()])
        self.compared = inspector.compared

    async def _read_ids(self, inspector: Inspector, ids: TableIds) -> None:
        [kept] = await run_jobs(self.session.threads.kernels, [partial(_Kept.of, ids)])
        complete = await inspector.inspect(kept.watched)
        if complete:  # or some ids are zeros that nobody wrote
            told = self.told.get(ids.table, {})
            check = partial(kept.check, told, self.findings)
            await run_jobs(self.session.threads.kernels, [check])

    def result(self) -> Verification:
        return Verification(
            location=self.session.location,
            kind=self.names.kind,
            problems=self.findings.of("problem"),
            notes=self.findings.of("note"),
            files=len(self.shards) + self.names.others,
            tables=len(self.tables),
            tensors=self.tensors,
            blocks=sum(len(shard.header.blocks) for shard in self.shards.values()),
            ids=sum(ids.rows for ids in self.tables),
            bytes_read=self.meter.read,
            digests=self.compared,
            seconds=self.meter.seconds,
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """The ids of one table, in memory."""

    table: str
    ids: NDArray[np.int64]
    parts: tuple[tuple[Slice, Block], ...]
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
        watched = tuple(Watched(block, view) for block, view in blocks)
        return cls(ids.table, array, tuple(ids.parts.items()), watched)

    def check(self, told: Mapping[Slice, PartRows], findings: Findings) -> None:
        """Check all of them; they are sorted afterwards."""
        begin = 0
        for claim, block in self.parts:
            part = self.ids[begin : begin + block.rows]
            check_part(part, claim, block, told.get(claim), findings)
            begin += block.rows
        count, example = count_duplicates(self.ids)
        if count:
            text = f"{count:,} of {len(self.ids):,} ids come twice or more, such as {example}"
            findings.problem(f"{text}: the later row would win", name=self.table)
