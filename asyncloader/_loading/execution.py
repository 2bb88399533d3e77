"""Carries a plan out: reads into memory, indexes ids, then shows all tables at once."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._planning.reads import GAP, Extents, plan_reads
from asyncloader._storage.protocol import ThreadedStorage, read_error, read_exactly
from asyncloader._threads.collector import undisturbed
from asyncloader._threads.jobs import for_each, raising_first, run_jobs
from asyncloader.errors import CheckpointChangedError, ReadError

from .comparison import Comparison
from .indexing import Arrival, Indexer
from .selection import Means, RowPiece, load_piece, row_pieces, step_bytes
from .sinks import DirectSink, IdSink, Sinks, sink_for
from .staging import Arena, StagingPool
from .tensors import bump_versions, plain_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import LoadPlan, PartLoad, TableLoad
    from asyncloader._planning.reads import Extent, Piece, Read
    from asyncloader._storage.protocol import Storage
    from asyncloader._table.protocol import LoadableTable, LoadableUpdate, UpdateCounts
    from asyncloader._threads.budget import ByteBudget
    from asyncloader._threads.threads import Threads

    from .destinations import Destinations
    from .progress import Meter
    from .sinks import Sink
    from .trace import Tracer
    from .verification import Verifier


CHANGED = (
    "was replaced, removed or written to while it was being loaded; load the checkpoint anew, or "
    "the one that has taken its place"
)

# Reading 64 KiB along takes about as long as handing another call to a thread.
_GAP_BYTES = 64 << 10
_INDEXERS = 2


@dataclass(kw_only=True)
class Execution:
    """One load under way: `run` once, then `commit` or `abort`."""

    plan: LoadPlan
    tensors: Destinations
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

    warnings: Sequence[str] = ()
    """What is odd about the values, once `run` has returned."""

    _lost_before: int = 0
    _sinks: Sinks = field(init=False)
    _extents: list[Extent] = field(default_factory=list)
    _pieces: list[RowPiece] = field(default_factory=list)
    _work: list[Read | RowPiece] = field(default_factory=list)
    _updates: dict[str, LoadableUpdate] = field(default_factory=dict)

    async def run(self) -> None:
        """Read everything and make ready what `commit` will show.

        Afterwards, or after a failure, call `commit` or `abort`: no thread writes any more then.
        """
        self._lost_before = self.storage.lost
        self._indexer = Indexer(self.threads, self.tracer)
        self._staging = StagingPool(self.chunk_bytes)
        self._row_staging = StagingPool(self._row_step())
        # All of it is Python, and long for many tensors: on a thread the loop gets its turn.
        with self.tracer.span("plan", "reads"):
            await run_jobs(self.threads.kernels, [undisturbed(self._prepare)])
        await self._read_all()
        self.warnings = await self._comparison().run()
        await check_unchanged(self.storage, self.plan.location, self.plan.shards)
        for name, update in self._updates.items():
            with self.tracer.span("index", f"{name}: join"):
                for jobs in update.finish(threads=self.threads.kernel_count):
                    await run_jobs(self.threads.kernels, jobs)
        await run_jobs(self.threads.kernels, [self._tell_autograd])
        self.meter.finish()

    def _comparison(self) -> Comparison:
        return Comparison(
            plan=self.plan,
            tensors=self.tensors,
            storage=self.storage,
            threads=self.threads,
            budget=self.budget,
            staging=self._staging,
            parallel=self.parallel,
            chunk_bytes=self.chunk_bytes,
        )

    def commit(self) -> dict[str, UpdateCounts]:
        """Let every table show its new rows; return what was done to each.

        Nothing is awaited, so no cancellation can come between one table and the next.
        """
        return {name: update.commit() for name, update in self._updates.items()}

    def abort(self) -> None:
        """Leave every table as it was."""
        lost = self.lost
        with contextlib.ExitStack() as stack:  # one that fails does not keep the others
            stack.callback(self._tell_autograd)
            for update in self._updates.values():
                stack.callback(_end, update, lost=lost)

    @property
    def lost(self) -> bool:
        """Whether a read was given up: its thread may write at any time."""
        return self.storage.lost > self._lost_before

    def _tell_autograd(self) -> None:
        bump_versions(list(map(self.tensors.tensors.__getitem__, self.touched)))

    def _row_step(self) -> int:
        """Return how large the buffers are that rows, wanted in part, are picked from."""
        lends = isinstance(self.storage, ThreadedStorage)
        parts = (part for table in self.plan.tables for part in table.parts if not part.certain)
        steps = (step_bytes(part.ids, chunk_bytes=self.chunk_bytes, lends=lends) for part in parts)
        return max(steps, default=self.chunk_bytes)

    def _prepare(self) -> None:
        """Make room in the tables, and cut everything into reads."""
        _ = self.plan.shards  # worked out here, not on the loop
        self._sinks = Sinks(self.plan.tensors, self.tensors)
        for table in self.plan.tables:
            self._begin(table)
        extents = self._sinks.dense_extents() + Extents.of(self._extents)
        reads = plan_reads(extents, chunk_bytes=self.chunk_bytes, gap_bytes=_GAP_BYTES)
        self._work = self._in_order(reads)

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
        self._add(IdSink(table.name, memory, arrived), part.ids)
        for slot, block in part.slots.items():
            rows = update.view(slot, first, part.rows)
            self._add(sink_for(table.name, rows, block.dtype), block)

    def _add(self, sink: Sink, block: Block) -> None:
        if isinstance(sink, DirectSink) and sink.nbytes != block.nbytes:
            raise RuntimeError(f"{sink.name!r} got other memory while it was being loaded")
        extent = self._sinks.add(sink, block)
        if extent is not None:
            self._extents.append(extent)

    async def _read_all(self) -> None:
        with raising_first():
            async with asyncio.TaskGroup() as group:
                for number in range(_INDEXERS):
                    group.create_task(self._indexer.serve(), name=f"asyncloader-index-{number}")
                self._gap = memoryview(bytearray(_GAP_BYTES))  # whoever writes there, nobody reads
                self._row_means = self._means()
                await for_each(self._work, self._do, workers=self.parallel, name="asyncloader-read")
                self._indexer.close(workers=_INDEXERS)

    def _in_order(self, reads: list[Read]) -> list[Read | RowPiece]:
        """Return all work; ids first, so that they are indexed while the rest is read."""
        ids = self._sinks.ids
        if not ids:
            return [*self._pieces, *reads]
        first: list[Read] = []
        rest: list[Read] = []
        for read in reads:
            (first if ids.intersection(read.sinks.tolist()) else rest).append(read)
        return [*first, *self._pieces, *rest]

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
            self.touched.update(self._sinks.tensors(read))
            views = self._sinks.views(read)
            if views is None:
                verified = await self._read_pieces(read)
            else:
                await self._fill(read, views)
                verified = 0
        self.meter.note(
            read=read.length,
            wanted=read.length - read.surplus,
            verified=verified,
            current=self._sinks.name(int(read.sinks[-1])),
        )

    async def _fill(self, read: Read, views: list[memoryview]) -> None:
        try:
            with self.tracer.span("read", read.shard, read.length):
                await read_exactly(self.storage, read.shard, read.offset, views)
        except ReadError as error:
            error.names = self._names(read)
            raise

    async def _read_pieces(self, read: Read) -> int:
        """Read what is to be verified, copied, or indexed; return how many bytes were verified."""
        pieces = read.pieces
        arena = Arena(self._staging, read.length, len(pieces))
        views = [self._open(piece, arena) for piece in pieces]
        await self._fill(read, views)
        verified = await self._verify(read, pieces, views)
        jobs = []
        for piece, view in zip(pieces, views, strict=True):
            job = None if piece.sink == GAP else self._sinks.filled(piece, view)
            if job is not None:
                jobs.append(job)
        if jobs:  # one after the other: handing a thread a job costs more than a small copy
            with self.tracer.span("copy", read.shard, read.length):
                await run_jobs(self.threads.kernels, [lambda: [job() for job in jobs]])
        arena.close()
        return verified

    async def _verify(
        self, read: Read, pieces: Sequence[Piece], views: Sequence[memoryview]
    ) -> int:
        """Compare what was read with its digests, if there are any; return how many bytes."""
        checks = []
        for (number, position, _), view in zip(pieces, views, strict=True):
            block = None if number == GAP else self._sinks.block(number)
            if block is not None and block.digests is not None:
                checks.append(partial(self.verifier.check, block, position, view))
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
        return self._sinks.open(piece, arena)

    def _names(self, read: Read) -> tuple[str, ...]:
        """Name whom the bytes of a read are for."""
        sinks = read.sinks[read.sinks != GAP].tolist()
        return tuple(dict.fromkeys(map(self._sinks.name, sinks)))


async def check_unchanged(storage: Storage, location: str, shards: Sequence[str]) -> None:
    """Look whether the files that were read are still those that they were at first.

    Raises:
        CheckpointChangedError: If one of them is not.
        ReadError: If the storage failed.
    """
    if not shards:
        return
    try:
        changed = await storage.changed(shards)
    except OSError as error:
        raise read_error(shards[0], 0, 0, error) from error
    if changed:
        raise CheckpointChangedError(location, CHANGED, changed[0])


def _end(update: LoadableUpdate, *, lost: bool) -> None:
    if lost:
        update.abandon()
    else:
        update.abort()
