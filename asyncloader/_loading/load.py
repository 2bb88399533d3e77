"""One load: its reads, its memory, its updates of tables, which show all at once."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK
from asyncloader._planning.reads import plan_reads
from asyncloader._table.protocol import LocatingUpdate, PlacingUpdate
from asyncloader._threads.jobs import for_each, run_jobs, undisturbed
from asyncloader.errors import AsyncLoaderError

from .buffers import StagingPool, bump_versions
from .pieces import ROW_COST, Arrival, RowPiece, Turns, is_believed
from .progress import Tracer
from .sinks import Sink, Sinks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import LoadPlan, PartLoad, TableLoad
    from asyncloader._planning.reads import Read
    from asyncloader._storage.kept import KeptFile
    from asyncloader._table.protocol import LoadableTable, LoadableUpdate, UpdateCounts

    from .claims import Claim
    from .destinations import Destinations
    from .progress import Meter
    from .session import Session
    from .verifier import Verifier


_NAMED = 20

_ID_BYTES = 8
_PLACED = 1 << 17
# So many bytes are still in the cache when a thread picks rows from them.
_STEP = 4 << 20


class Load:
    """A load under way: its reads, the memory that they fill, the updates of tables.

    Args:
        session: The checkpoint, threads and memory for reads.
        plan: It was made for these tensors and tables.
        tensors: As they were described for the plan.
        tables: By the names in the plan.
        meter: Counts reads.
        claim: The right to fill memory; `None` where the memory is new.
        tracer: Gets every step.
        verifier: Compares bytes with digests; `None` is the session's.
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
        self.session = session
        self.plan = plan
        self.tensors = tensors
        self.meter = meter
        meter.retries = lambda: session.retries
        self.tracer = tracer or Tracer(None)
        self.verifier = verifier or session.verifier
        self.threads = session.threads
        self.storage = session.storage
        self.chunk_bytes = session.options.read_bytes
        self.gap_bytes = session.gap_bytes
        self.staging = StagingPool(self.chunk_bytes)
        self.row_staging = StagingPool(self._row_step())
        self.sinks: Sinks
        self.reads: list[Read | RowPiece] = []
        # No bound: an arrival is a few numbers, its ids are where they will stay. `None` ends one
        # of the tasks that take arrivals.
        self.arrivals: asyncio.Queue[Arrival | None] = asyncio.Queue()
        self.touched: dict[str, bool] = {}  # by name; whether by way of staging memory
        self.warnings: Sequence[str] = ()  # of odd values; known once all is read
        self._claim = claim
        self._tables = tables
        self._updates: dict[str, LoadableUpdate | PlacingUpdate] = {}
        self._lost_before = self.storage.lost

    async def prepare(self) -> None:
        """Take the memory, make room in the tables, and cut everything into reads.

        Afterwards, or after a failure, call `commit` or `abort` in the end.
        """
        # All of it is Python, and long for many tensors: on a thread the loop gets its turn.
        with self.tracer.span("plan", "reads"):
            await run_jobs(self.threads.kernels, [undisturbed(self._prepare)])
        await self._hold_files()

    async def finish(self) -> None:
        """Make the new rows ready for `commit`. Everything has been read."""
        located = (table for table in self.plan.tables if table.locates)
        held = {shard for table in located for shard in table.row_blocks()}
        workers = min(self.session.options.parallel, len(held))
        await for_each(held, self.session.ensure_held, workers=workers, name="asyncloader-ensure")
        for name, update in self._updates.items():
            if isinstance(update, PlacingUpdate):
                await run_jobs(self.threads.kernels, [update.finish])
                continue
            with self.tracer.span("index", f"{name}: join"):
                for jobs in update.finish(threads=self.threads.kernel_count):
                    await run_jobs(self.threads.kernels, jobs)
        await run_jobs(self.threads.kernels, [self._tell_autograd])
        self.meter.finish()

    def commit(self) -> dict[str, UpdateCounts]:
        """Let every table show its new rows; return the counts of each.

        Nothing is awaited, so no cancellation can come between one table and the next.
        """
        # RecIS's own tables first: should one fail, no other table has changed.
        order = sorted(self._updates.items(), key=lambda one: one[0] not in self._placing)
        return {name: update.commit() for name, update in order}

    async def take_back(self) -> None:
        """Take out of tables what shows already, after a failure: on a thread, as it takes long."""
        aborts = [update.abort for update in self._placing.values()]
        await run_jobs(self.threads.kernels, aborts)

    def abort(self) -> None:
        """Leave every table as it was."""
        lost = self.lost
        with contextlib.ExitStack() as stack:  # an update that fails does not keep the others
            stack.callback(self._tell_autograd)
            for update in self._updates.values():
                if isinstance(update, PlacingUpdate) or not lost:
                    stack.callback(update.abort)
                else:
                    stack.callback(update.abandon)

    def explain(self, error: BaseException) -> None:
        """Note on an error which tensors were written to."""
        names = tuple(sorted(self.touched))
        if isinstance(error, AsyncLoaderError):
            error.touched = names
        if names:
            still = ", and until the disk answers; take new ones for another load"
            more = still if self.lost else ""
            error.add_note(f"tensors written to: {', '.join(names[:_NAMED])}{more}")
        for update in self._placing.values():
            if left := update.abort():  # again: says what was left
                error.add_note(left)

    @property
    def in_place(self) -> tuple[str, ...]:
        """The tables whose rows show as they come."""
        return tuple(self._placing)

    @property
    def lost(self) -> bool:
        """Whether a read was given up: its thread may still write."""
        return self.storage.lost > self._lost_before

    @property
    def _placing(self) -> dict[str, PlacingUpdate]:
        updates = self._updates.items()
        return {name: update for name, update in updates if isinstance(update, PlacingUpdate)}

    def step_bytes(self, block: Block) -> int:
        """Return how many bytes of a block a thread reads before it picks rows from them."""
        most = min(self.chunk_bytes, _STEP)
        if block.digests is None:
            return most
        return max(most // DIGEST_CHUNK, 1) * DIGEST_CHUNK

    async def _hold_files(self) -> None:
        """Give tables the files that their rows stay in."""
        for table in self.plan.tables:
            update = self._updates[table.name]
            if isinstance(update, LocatingUpdate):
                kept: dict[str, KeptFile] = {}
                for shard, blocks in table.row_blocks().items():
                    ranges = [(one.offset, one.offset + one.nbytes) for one in blocks]
                    kept[shard] = await self.session.hold_open(shard, ranges)
                update.keep(kept)

    def _row_step(self) -> int:
        """Return how large the buffers are that some rows of a part are picked from."""
        parts = (part for table in self.plan.tables for part in table.parts)
        return max((self.step_bytes(part.ids) for part in parts), default=self.chunk_bytes)

    def _tell_autograd(self) -> None:
        bump_versions(list(map(self.tensors.tensors.__getitem__, self.touched)))

    def _prepare(self) -> None:
        _ = self.plan.shards  # computed here, not on the loop
        if self._claim is not None:
            tables = {load.name: self._tables[load.name] for load in self.plan.tables}
            names = self.plan.tensors.names
            self._claim.take(self.tensors, names, tables, self.plan.location)
        self.sinks = Sinks(self.plan.tensors, self.tensors, gap_bytes=self.gap_bytes)
        pieces = [piece for table in self.plan.tables for piece in self._begin(table)]
        extents = self.sinks.extents()
        reads = plan_reads(extents, chunk_bytes=self.chunk_bytes, gap_bytes=self.gap_bytes)
        # Ids first, so that they are indexed while the rest is read.
        ids = self.sinks.ids
        first: list[Read] = []
        rest: list[Read] = []
        for read in reads:
            (first if ids and ids.intersection(read.sinks.tolist()) else rest).append(read)
        self.reads = [*first, *pieces, *rest]

    def _begin(self, table: TableLoad) -> Iterator[RowPiece]:
        """Reserve rows for the blocks that are wanted whole; yield pieces of the others."""
        update = self._tables[table.name].begin(most=table.most, expected=table.expected)
        self._updates[table.name] = update
        if table.cleared:
            update.clear(table.cleared)
        if isinstance(update, PlacingUpdate):
            turns = Turns()
            for part in table.parts:
                yield from self._row_pieces(table, part, update, turns)
            return
        if table.locates:
            for block in self._read_once(table):
                self.meter.total += block.nbytes
                self.sinks.add(Sink(table.name, block, None, None))
        for number, slots in enumerate(table.layers):
            expected = sum(part.expected for part in table.parts if part.layer == number)
            update.layer(slots, expected)
            if number in table.fills:
                update.fill(number)
        for part in table.parts:
            if part.certain:
                self._reserve(table, part, update)
            else:
                yield from self._row_pieces(table, part, update, None)

    def _read_once(self, table: TableLoad) -> list[Block]:
        """Return the blocks of rows that stay where they are, and are read this once.

        To be compared with their digests, or for a store's rows to come to a disk of this machine.
        """
        if self.verifier.widen:
            return [block for part in table.parts for block in part.slots.values()]
        found = table.row_blocks().items()
        return [one for shard, blocks in found if self.session.is_remote(shard) for one in blocks]

    def _reserve(self, table: TableLoad, part: PartLoad, update: LoadableUpdate) -> None:
        first = update.reserve(part.layer, part.rows, part.rank)
        arrivals = self.arrivals  # not self: a cycle would keep tables until the next collection

        def arrived(row: int, count: int) -> None:
            assert row + count <= part.rows, "rows lie within their part"
            arrivals.put_nowait(
                Arrival(update, part.layer, part.child, first + row, count, part.claimed)
            )

        ids = Sink.of(table.name, update.view("id", first, part.rows), part.ids, arrived)
        if ids.memory is None:
            raise TypeError(f"table {table.name!r}: its ids are not in plain host memory")
        self.sinks.add(ids)
        if isinstance(update, LocatingUpdate):
            update.locate(part.layer, first, range(part.rows), part.slots)
            return
        for slot, block in part.slots.items():
            self.sinks.add(Sink.of(table.name, update.view(slot, first, part.rows), block))

    def _row_pieces(
        self,
        table: TableLoad,
        part: PartLoad,
        update: LoadableUpdate | PlacingUpdate,
        turns: Turns | None,
    ) -> Iterator[RowPiece]:
        """Cut the rows of a part that may be wanted into pieces whose bookkeeping fits a chunk.

        If there are digests, a piece ends where a chunk of ids ends, or of rows of many a size. If
        reads of ids are widened to whole chunks, a piece has as many ids as a chunk.
        """
        step = max(self.chunk_bytes // ROW_COST, 1)
        if turns is not None:  # shorter, so that rows are read while ids of the next come in
            step = min(step, _PLACED)
        if part.ids.digests is not None:
            whole = self.verifier.widen or is_believed(part)
            step = DIGEST_CHUNK // _ID_BYTES if whole else 1 << (step.bit_length() - 1)
        start, stop = part.reach.start, part.reach.stop
        while start < stop:
            end = min((start // step + 1) * step, stop)
            yield RowPiece(table, part, update, turns, start, end - start)
            start = end
