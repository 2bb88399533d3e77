"""One load: its reads, its memory, its updates of tables, which show all at once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from asyncloader._planning.reads import Extents, plan_reads
from asyncloader._storage.protocol import ThreadedStorage
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import AsyncLoaderError

from .indexing import Arrival, Indexer
from .pieces import GAP_BYTES, row_pieces, step_bytes
from .sinks import DirectSink, IdSink, Sinks, sink_for
from .staging import StagingPool
from .tensors import bump_versions, plain_bytes
from .trace import Tracer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import LoadPlan, PartLoad, TableLoad
    from asyncloader._planning.reads import Extent, Read
    from asyncloader._table.protocol import LoadableTable, LoadableUpdate, UpdateCounts

    from .claims import Claim
    from .destinations import Destinations
    from .pieces import RowPiece
    from .progress import Meter
    from .session import Session
    from .sinks import Sink
    from .verification import Verifier


_NAMED = 20


class Load:
    """A load under way: what is read, the memory that it goes to, the updates of tables.

    Args:
        session: The checkpoint, threads and memory for reads.
        plan: What to read, and where to.
        tensors: The tensors that the plan was made for.
        tables: The tables that the plan was made for.
        meter: Counts reads.
        claim: The right to fill memory; `None` where the memory is new.
        tracer: Gets every step.
        verifier: Compares bytes with digests; `None` is the session's.

    Attributes:
        touched: The tensors that were written to, by name, and whether by way of staging memory.
        warnings: What is odd about the values, once all is read.
        reads: What is left for `stream` to carry out.
    """

    def __init__(
        self,
        session: Session,
        plan: LoadPlan,
        tensors: Destinations,
        tables: Mapping[str, LoadableTable],
        *,
        meter: Meter,
        claim: Claim | None = None,
        tracer: Tracer | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self.plan = plan
        self.tensors = tensors
        self.meter = meter
        self.tracer = tracer or Tracer(None)
        self.verifier = verifier or session.verifier
        self.storage = session.storage
        self.lender = self.storage if isinstance(self.storage, ThreadedStorage) else None
        self.threads = session.threads
        self.budget = session.budget
        self.parallel = session.options.parallel
        self.chunk_bytes = session.options.read_bytes
        self.indexer = Indexer(self.threads, self.tracer)
        self.staging = StagingPool(self.chunk_bytes)
        self.row_staging = StagingPool(self._row_step())
        self.gap = memoryview(bytearray(GAP_BYTES))  # reads write to it, and nothing reads it
        self.sinks: Sinks
        self.reads: list[Read | RowPiece] = []
        self.touched: dict[str, bool] = {}
        self.warnings: Sequence[str] = ()
        self._claim = claim
        self._tables = tables
        self._updates: dict[str, LoadableUpdate] = {}
        self._extents: list[Extent] = []
        self._pieces: list[RowPiece] = []
        self._lost_before = self.storage.lost

    async def prepare(self) -> None:
        """Take the memory, make room in the tables, and cut everything into reads.

        Afterwards, or after a failure, call `commit` or `abort` in the end.

        Raises:
            RuntimeError: If another load fills some of the memory.
            MemoryError: If there is no room.
        """
        # All of it is Python, and long for many tensors: on a thread the loop gets its turn.
        with self.tracer.span("plan", "reads"):
            await run_jobs(self.threads.kernels, [undisturbed(self._prepare)])

    async def finish(self) -> None:
        """Make ready what `commit` will show. Everything has been read."""
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
        lost = self.lost
        with contextlib.ExitStack() as stack:  # an update that fails does not keep the others
            stack.callback(self._tell_autograd)
            for update in self._updates.values():
                stack.callback(update.abandon if lost else update.abort)

    def explain(self, error: BaseException) -> None:
        """Say on an error which tensors are no longer what they were."""
        names = tuple(sorted(self.touched))
        if isinstance(error, AsyncLoaderError):
            error.touched = names
        if names:
            still = ", and until the disk answers; take new ones for another load"
            more = still if self.lost else ""
            error.add_note(f"tensors written to: {', '.join(names[:_NAMED])}{more}")

    @property
    def lost(self) -> bool:
        """Whether a read was given up: its thread may write at any time."""
        return self.storage.lost > self._lost_before

    def _tell_autograd(self) -> None:
        bump_versions(list(map(self.tensors.tensors.__getitem__, self.touched)))

    def _row_step(self) -> int:
        """Return how large the buffers are that rows, wanted in part, are picked from."""
        lends = self.lender is not None
        parts = (part for table in self.plan.tables for part in table.parts if not part.certain)
        steps = (step_bytes(part.ids, chunk_bytes=self.chunk_bytes, lends=lends) for part in parts)
        return max(steps, default=self.chunk_bytes)

    def _prepare(self) -> None:
        _ = self.plan.shards  # worked out here, not on the loop
        if self._claim is not None:
            tables = {load.name: self._tables[load.name] for load in self.plan.tables}
            names = self.plan.tensors.names
            self._claim.take(self.tensors, names, tables, self.plan.location)
        self.sinks = Sinks(self.plan.tensors, self.tensors)
        for table in self.plan.tables:
            self._begin(table)
        extents = self.sinks.dense_extents() + Extents.of(self._extents)
        reads = plan_reads(extents, chunk_bytes=self.chunk_bytes, gap_bytes=GAP_BYTES)
        # Ids first, so that they are indexed while the rest is read.
        ids = self.sinks.ids
        first: list[Read] = []
        rest: list[Read] = []
        for read in reads:
            (first if ids and ids.intersection(read.sinks.tolist()) else rest).append(read)
        self.reads = [*first, *self._pieces, *rest]

    def _begin(self, table: TableLoad) -> None:
        """Reserve rows for the blocks that are wanted whole; note the others for later."""
        update = self._tables[table.name].begin(most=table.most, expected=table.expected)
        self._updates[table.name] = update
        for number, slots in enumerate(table.layers):
            expected = sum(part.expected for part in table.parts if part.layer == number)
            update.layer(slots, expected)
        widen = self.verifier.widen
        for part in table.parts:
            if part.certain:
                self._add_part(table, part, update)
            else:
                self._pieces += row_pieces(
                    table, part, update, chunk_bytes=self.chunk_bytes, widen=widen
                )

    def _add_part(self, table: TableLoad, part: PartLoad, update: LoadableUpdate) -> None:
        first = update.reserve(part.layer, part.rows, part.rank)
        indexer = self.indexer  # not self: a cycle would keep the tables until the next collection

        def arrived(row: int, count: int) -> None:
            assert row + count <= part.rows, "rows lie within their part"
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
        extent = self.sinks.add(sink, block)
        if extent is not None:
            self._extents.append(extent)
