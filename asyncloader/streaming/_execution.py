"""Carries a plan out: reads into memory, indexes ids, then shows all tables at once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._concurrency import for_each, raising_first, run_jobs
from asyncloader.checkpoint import DIGEST_CHUNK
from asyncloader.errors import ReadError
from asyncloader.planning import GAP, Extent, plan_reads
from asyncloader.storage import ThreadedStorage, read_exactly

from ._indexing import Arrival, Indexer
from ._selection import STEP, Means, RowPiece, load_piece, row_pieces
from ._sinks import DirectSink, IdSink, StagedSink, sink_for
from ._staging import Arena, StagingPool
from ._tensors import bump_versions, plain_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from asyncloader.checkpoint import Block
    from asyncloader.planning import LoadPlan, PartLoad, Piece, Read, TableLoad
    from asyncloader.storage import Storage
    from asyncloader.table import LoadableTable, LoadableUpdate, UpdateCounts

    from ._budget import ByteBudget
    from ._progress import Meter
    from ._sinks import Sink
    from ._threads import Threads
    from ._trace import Tracer
    from ._verification import Verifier

__all__ = ["Execution"]

# Reading 64 KiB along takes about as long as handing another call to a thread.
_GAP_BYTES = 64 << 10
_ID_BYTES = 8
_INDEXERS = 2


@dataclass(kw_only=True)
class Execution:
    """One load under way: `run` once, then `commit` or `abort`."""

    plan: LoadPlan
    tensors: Mapping[str, torch.Tensor]
    tables: Mapping[str, LoadableTable]
    storage: Storage
    threads: Threads
    budget: ByteBudget
    meter: Meter
    parallel: int
    chunk_bytes: int
    verifier: Verifier
    tracer: Tracer

    touched: dict[str, bool]
    """Receives the names of tensors that are written to, and whether by way of staging memory."""

    _sinks: list[Sink] = field(default_factory=list)
    _blocks: list[Block] = field(default_factory=list)
    """What fills each sink."""

    _is_tensor: list[bool] = field(default_factory=list)
    _extents: list[Extent] = field(default_factory=list)
    _id_sinks: set[int] = field(default_factory=set)
    _pieces: list[RowPiece] = field(default_factory=list)
    _reads: list[Read] = field(default_factory=list)
    _updates: dict[str, LoadableUpdate] = field(default_factory=dict)

    async def run(self) -> None:
        """Read everything and make ready what `commit` will show.

        Afterwards, or after a failure, call `commit` or `abort`: no thread writes any more then.
        """
        self._indexer = Indexer(self.threads, self.tracer)
        self._staging = StagingPool(self.chunk_bytes)
        self._row_staging = StagingPool(min(self.chunk_bytes, STEP))
        # All of it is Python, and long for many tensors: on a thread the loop gets its turn.
        with self.tracer.span("plan", "reads"):
            await run_jobs(self.threads.kernels, [self._prepare])
        await self._read_all()
        for name, update in self._updates.items():
            with self.tracer.span("index", f"{name}: join"):
                for jobs in update.finish(threads=self.threads.kernel_count):
                    await run_jobs(self.threads.kernels, jobs)
        await run_jobs(self.threads.kernels, [self._tell_autograd])
        self.meter.finish()

    def commit(self) -> dict[str, UpdateCounts]:
        """Let every table show its new rows; return what was done to each.

        Nothing is awaited, so no cancellation can come between one table and the next.
        """
        return {name: update.commit() for name, update in self._updates.items()}

    def abort(self) -> None:
        """Leave every table as it was."""
        with contextlib.ExitStack() as stack:  # one that fails does not keep the others
            stack.callback(self._tell_autograd)
            for update in self._updates.values():
                stack.callback(update.abort)

    def _tell_autograd(self) -> None:
        bump_versions([self.tensors[name] for name in self.touched])

    def _prepare(self) -> None:
        """Make room in the tables, and cut everything into reads."""
        for table in self.plan.tables:
            self._begin(table)
        for load in self.plan.tensors:
            tensor = self.tensors[load.name]
            self._add(sink_for(load.name, tensor), load.block, tensor.itemsize, tensor=True)
        self._reads = plan_reads(self._extents, chunk_bytes=self.chunk_bytes, gap_bytes=_GAP_BYTES)

    def _begin(self, table: TableLoad) -> None:
        """Reserve rows for the blocks that are wanted whole; note the others for later."""
        update = self.tables[table.name].begin(most=table.most, expected=table.expected)
        self._updates[table.name] = update
        for number, slots in enumerate(table.layers):
            expected = sum(part.expected for part in table.parts if part.layer == number)
            update.layer(slots, expected)
        for part in table.parts:
            if part.certain:
                self._add_part(table, part, update)
            else:
                self._pieces += row_pieces(
                    table,
                    part,
                    update,
                    chunk_bytes=self.chunk_bytes,
                    widen=self.verifier.widen,
                )

    def _add_part(self, table: TableLoad, part: PartLoad, update: LoadableUpdate) -> None:
        first = update.reserve(part.layer, part.rows, part.rank)
        indexer = self._indexer  # not self: a cycle would keep the tables until the next collection

        def arrived(row: int, count: int) -> None:
            indexer.put(
                Arrival(
                    update=update, layer=part.layer, child=part.child,
                    first=first + row, count=count, claimed=part.claimed,
                )
            )  # fmt: skip

        memory = plain_bytes(update.view("id", first, part.rows))
        if memory is None:
            raise TypeError(f"table {table.name!r}: its ids are not in plain host memory")
        self._id_sinks.add(len(self._sinks))
        self._add(IdSink(table.name, memory, arrived), part.ids, _ID_BYTES)
        for slot, block in part.slots.items():
            rows = update.view(slot, first, part.rows)
            self._add(sink_for(table.name, rows), block, rows.itemsize)

    def _add(self, sink: Sink, block: Block, itemsize: int, *, tensor: bool = False) -> None:
        if isinstance(sink, DirectSink) and sink.nbytes != block.nbytes:
            raise RuntimeError(f"{sink.name!r} got other memory while it was being loaded")
        if block.nbytes:
            grain = itemsize if isinstance(sink, StagedSink | IdSink) else 1
            if block.digests is not None:  # whatever is read can be compared then
                grain = DIGEST_CHUNK
            number = len(self._sinks)
            self._extents.append(Extent(block.shard, block.offset, block.nbytes, number, 0, grain))
        self._sinks.append(sink)
        self._blocks.append(block)
        self._is_tensor.append(tensor)

    async def _read_all(self) -> None:
        with raising_first():
            async with asyncio.TaskGroup() as group:
                for number in range(_INDEXERS):
                    group.create_task(self._indexer.serve(), name=f"asyncloader-index-{number}")
                await for_each(
                    self._work(), self._do, workers=self.parallel, name="asyncloader-read"
                )
                self._indexer.close(workers=_INDEXERS)

    def _work(self) -> Iterable[Read | RowPiece]:
        """Return all work; ids first, so that they are indexed while the rest is read."""
        self._gap = memoryview(bytearray(_GAP_BYTES))  # whoever writes there, nobody reads
        self._row_means = self._means()
        first: list[Read] = []
        rest: list[Read] = []
        for read in self._reads:
            brings_ids = any(piece.sink in self._id_sinks for piece in read.pieces)
            (first if brings_ids else rest).append(read)
        return itertools.chain(first, self._pieces, rest)

    async def _do(self, work: Read | RowPiece) -> None:
        if isinstance(work, RowPiece):
            await load_piece(work, self._row_means)
        else:
            await self._read(work)

    def _means(self) -> Means:
        return Means(
            storage=self.storage,
            lender=self.storage if isinstance(self.storage, ThreadedStorage) else None,
            threads=self.threads,
            budget=self.budget,
            indexer=self._indexer,
            staging=self._row_staging,
            meter=self.meter,
            chunk_bytes=self.chunk_bytes,
            gap_bytes=_GAP_BYTES,
            verifier=self.verifier,
            tracer=self.tracer,
        )

    async def _read(self, read: Read) -> None:
        async with self.budget.reserve(read.length):
            arena = Arena(self._staging, read.length, len(read.pieces))
            views = [self._open(piece, arena) for piece in read.pieces]
            try:
                with self.tracer.span("read", read.shard, read.length):
                    await read_exactly(self.storage, read.shard, read.offset, views)
            except ReadError as error:
                error.names = self._names(read)
                raise
            verified = await self._verify(read, views)
            jobs = []
            for (number, position, _), view in zip(read.pieces, views, strict=True):
                job = None if number == GAP else self._sinks[number].filled(position, view)
                if job is not None:
                    jobs.append(job)
            if jobs:  # one after the other: handing a thread a job costs more than a small copy
                with self.tracer.span("copy", read.shard, read.length):
                    await run_jobs(self.threads.kernels, [lambda: [job() for job in jobs]])
            arena.close()
        current = self._sinks[read.pieces[-1].sink].name
        self.meter.note(
            read=read.length,
            wanted=read.length - read.surplus,
            verified=verified,
            current=current,
        )

    async def _verify(self, read: Read, views: Sequence[memoryview]) -> int:
        """Compare what was read with its digests, if there are any; return how many bytes."""
        checks = [
            partial(self.verifier.check, self._blocks[number], position, view)
            for (number, position, _), view in zip(read.pieces, views, strict=True)
            if number != GAP and self._blocks[number].digests is not None
        ]
        if not checks:
            return 0
        with self.tracer.span("verify", read.shard, read.length):
            [verified] = await run_jobs(
                self.threads.reads, [lambda: sum(len(check()) for check in checks)]
            )
        return verified

    def _open(self, piece: Piece, arena: Arena) -> memoryview:
        if piece.sink == GAP:
            return self._gap[: piece.length]
        sink = self._sinks[piece.sink]
        if self._is_tensor[piece.sink]:
            self.touched[sink.name] = isinstance(sink, StagedSink)
        return sink.open(piece.position, piece.length, arena)

    def _names(self, read: Read) -> tuple[str, ...]:
        """Name whom the bytes of a read are for."""
        names = dict.fromkeys(self._sinks[p.sink].name for p in read.pieces if p.sink != GAP)
        return tuple(names)
