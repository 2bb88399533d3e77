"""Loads blocks of which a table wants only some rows.

The ids are read first, a piece at a time; those that the table wants get rows; then the wanted
rows of every slot are read. Neighbours, and small gaps between them, are read at once: a gap is
cheaper than another call. Rows that nobody wants take no memory beyond the piece's own.

Where the checkpoint says that the wanted rows stand side by side, the ids around them are looked at
too, so that rows which stand elsewhere are missed by nobody.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from asyncloader._concurrency import run_jobs
from asyncloader.checkpoint import DIGEST_CHUNK, SIDECAR
from asyncloader.errors import CheckpointError, ReadError
from asyncloader.storage import fill, read_exactly

from ._indexing import Arrival
from ._tensors import plain_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from asyncloader.checkpoint import Block
    from asyncloader.planning import PartLoad, TableLoad
    from asyncloader.storage import ReadInto, Storage, ThreadedStorage
    from asyncloader.table import LoadableUpdate

    from ._budget import ByteBudget
    from ._indexing import Indexer
    from ._progress import Meter
    from ._staging import StagingPool
    from ._threads import Threads
    from ._trace import Tracer
    from ._verification import Verifier

__all__ = ["STEP", "Means", "RowPiece", "load_piece", "row_groups", "row_pieces", "rows_within"]

_ID_BYTES = 8
# Ids, those wanted, encoded, their positions, and what grouping them takes: five int64 a row.
_COST = 5 * _ID_BYTES
# What one thread reads and picks rows from before it reads on: it is still in the cache then.
STEP = 4 << 20
_UNSIGNED = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPiece:
    """Rows `[start, start + count)` of a part."""

    table: TableLoad
    part: PartLoad
    update: LoadableUpdate
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What reading takes."""

    storage: Storage
    threads: Threads
    budget: ByteBudget
    indexer: Indexer
    staging: StagingPool
    meter: Meter
    chunk_bytes: int
    gap_bytes: int
    verifier: Verifier
    tracer: Tracer

    lender: ThreadedStorage | None
    """The storage, if it can do more with a thread than read."""

    def step(self, block: Block) -> int:
        """Return how many bytes of a block to read before something is done with them.

        Whole chunks of one with digests. Where each read is a hand-over to a thread, as much as one
        may take.
        """
        most = self.chunk_bytes
        if self.lender is not None:
            most = min(most, STEP)
        if block.digests is None:
            return most
        return max(most // DIGEST_CHUNK, 1) * DIGEST_CHUNK

    def room(self, part: PartLoad) -> int:
        """Return the memory that reading rows of a part takes besides them."""
        blocks = (part.ids, *part.slots.values())
        most = max(max(self.step(block), block.nbytes // part.rows) for block in blocks)
        return most + (most + 2 * DIGEST_CHUNK if self.verifier.widen else 0)


def row_pieces(
    table: TableLoad, part: PartLoad, update: LoadableUpdate, *, chunk_bytes: int, widen: bool
) -> Iterator[RowPiece]:
    """Cut what may be wanted of a part into pieces whose bookkeeping fits into a chunk.

    If there are digests, where chunks of ids, or of rows of many a size, end too; if what is read
    is widened to whole chunks, into pieces of as many ids as one has.
    """
    step = max(chunk_bytes // _COST, 1)
    if part.ids.digests is not None:
        step = DIGEST_CHUNK // _ID_BYTES if widen else 1 << (step.bit_length() - 1)
    start, stop = part.reach.start, part.reach.stop
    while start < stop:
        end = min((start // step + 1) * step, stop)
        yield RowPiece(table=table, part=part, update=update, start=start, count=end - start)
        start = end


def row_groups(
    rows: NDArray[np.int64],
    *,
    most: int,
    gap: int,
    runs: bool = False,
    windows: NDArray[np.int64] | None = None,
) -> Iterator[tuple[int, int]]:
    """Group ascending positions into spans worth one read.

    Args:
        rows: int64 `[n]`, ascending.
        most: The most rows that a span covers.
        gap: The most unwanted rows between two neighbours of a span.
        runs: Whether a span without any unwanted row may be longer.
        windows: int64 `[n]`, ascending; only rows with the same number are read at once, but for
            such long spans.

    Yields:
        `(i, j)`: `rows[i:j]` are read at once.
    """
    breaks = np.flatnonzero(np.diff(rows) > gap + 1) + 1
    for low, high in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        if runs and rows[high - 1] - rows[low] == high - 1 - low:
            yield low, high
            continue
        i = low
        while i < high:
            j = min(int(np.searchsorted(rows, rows[i] + most)), high)
            if windows is not None:
                j = min(int(np.searchsorted(windows, windows[i], side="right")), j)
            yield i, j
            i = j


async def load_piece(piece: RowPiece, means: Means) -> None:
    """Read a piece's ids, then the rows that the table wants."""
    try:
        async with means.budget.reserve(piece.count * _COST + means.room(piece.part)):
            await _load_piece(piece, means)
    except ReadError as error:
        error.names = (piece.table.name,)
        raise


async def _load_piece(piece: RowPiece, means: Means) -> None:
    part = piece.part
    ids = torch.empty(piece.count, dtype=torch.int64)
    await _load_rows(piece, means, part.ids, range(piece.start, piece.start + piece.count), ids)
    found = ids.numpy()
    _check_ends(piece, found, means.verifier.location)

    def select() -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        rows, kept, dropped = piece.update.select(
            part.child, found, part.claimed, piece.table.slice
        )
        return rows + piece.start, kept, dropped

    [(rows, kept, dropped)] = await run_jobs(means.threads.kernels, [select])
    piece.update.dropped(dropped)
    if not len(rows):
        return
    first = piece.update.reserve(part.layer, len(rows), part.rank + piece.start)
    room = piece.update.view("id", first, len(rows))
    await run_jobs(means.threads.kernels, [lambda: room.copy_(torch.from_numpy(kept))])
    means.indexer.put(
        Arrival(
            update=piece.update, layer=part.layer, child=part.child,
            first=first, count=len(rows), claimed=None,
        )
    )  # fmt: skip
    for slot, block in part.slots.items():
        target = piece.update.view(slot, first, len(rows))
        await _load_rows(piece, means, block, rows, target)


def _check_ends(piece: RowPiece, ids: NDArray[np.int64], location: str) -> None:
    """Refuse what the sidecar says of the rows' order if the rows around the wanted ones disagree.

    Rows are sorted by slice position: if the one before is below the wanted slice, and the one
    behind beyond it, then all that are wanted stand between the two.
    """
    part, wanted = piece.part, piece.table.slice
    begins = piece.start == part.reach.start > 0
    ends = piece.start + piece.count == part.reach.stop < part.rows
    before, behind = (int(ids[end]) % _UNSIGNED % wanted.size for end in (0, -1))
    if (begins and before >= wanted.begin) or (ends and behind < wanted.end):
        problem = (
            f"{SIDECAR} says that ids at slice positions [{wanted.begin}, {wanted.end}) stand "
            f"within rows [{part.reach.start + begins}, {part.reach.stop - ends}), but others do "
            "too: it belongs to other ids; copy it again, or load with verify='off', which goes by "
            "the ids alone"
        )
        raise CheckpointError(location, problem, part.ids.shard, part.ids.key)


class _Step(NamedTuple):
    """Bytes that are read at once."""

    begin: int
    """First wanted byte of the block."""

    end: int

    low: int
    """Number of the first of the rows that are picked out of them."""

    high: int

    at: int | None
    """Where in the target's memory they go as they lie, or `None` if rows are picked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filling:
    """Fills memory with chosen rows of a block."""

    block: Block
    rows: NDArray[np.int64] | range
    """`[n]`, ascending positions in the block."""

    target: torch.Tensor
    """`[n, *shape]`."""

    memory: memoryview | None
    """The target's, if the file's bytes can go there as they lie."""

    row_bytes: int
    verifier: Verifier

    @classmethod
    def of(
        cls,
        block: Block,
        rows: NDArray[np.int64] | range,
        target: torch.Tensor,
        verifier: Verifier,
    ) -> _Filling:
        """Return the way to fill `target`."""
        return cls(
            block=block,
            rows=rows,
            target=target,
            memory=plain_bytes(target),
            row_bytes=block.nbytes // block.rows,
            verifier=verifier,
        )

    def steps(self, *, most: int, gap: int) -> Iterator[_Step]:
        """Cut the bytes into steps of about `most`; read gaps of up to `gap` along."""
        wide, rows = self.row_bytes, self.rows
        groups: Iterable[tuple[int, int]] = [(0, len(rows))]
        if self.memory is None or int(rows[-1]) - int(rows[0]) >= len(rows):
            rows = np.asarray(rows)
            groups = row_groups(
                rows,
                most=max(most // wide, 1),
                gap=gap // wide,
                runs=self.memory is not None,
                windows=self.verifier.windows(self.block, rows * wide, most),
            )
        for low, high in groups:
            begin, end = int(rows[low]) * wide, (int(rows[high - 1]) + 1) * wide
            if self.memory is None or end - begin > (high - low) * wide:
                yield _Step(begin, end, low, high, None)
                continue
            step = max(most, wide)
            cuts = [begin, *range((begin // step + 1) * step, end, step), end]
            for one, other in itertools.pairwise(cuts):
                yield _Step(one, other, low, high, low * wide + one - begin)

    def window(self, step: _Step) -> tuple[int, int]:
        """Return which bytes of the block to read."""
        return self.verifier.window(self.block, step.begin, step.end)

    def staged(self, step: _Step) -> int:
        """Return how much memory a step needs besides the target."""
        first, last = self.window(step)
        direct = step.at is not None and (first, last) == (step.begin, step.end)
        return 0 if direct else last - first

    def room(self, steps: Iterable[_Step], usual: int) -> int:
        """Return how much memory steps need besides the target, one after the other."""
        most = max(map(self.staged, steps), default=0)
        return max(most, usual) if most else 0  # buffers of the usual size are used again

    def done(self, steps: Iterable[_Step], verified: int, *, last: bool) -> _Done:
        """Count what was done."""
        read = wanted = 0
        for step in steps:
            first, end = self.window(step)
            read += end - first
            whole = step.at is not None
            wanted += step.end - step.begin if whole else (step.high - step.low) * self.row_bytes
        return _Done(read, wanted, verified, last)

    def view(self, step: _Step, buffer: torch.Tensor) -> memoryview:
        """Return the memory to read to."""
        if self.memory is not None and step.at is not None and not self.staged(step):
            return self.memory[step.at : step.at + step.end - step.begin]
        first, last = self.window(step)
        return buffer[: last - first].numpy().data

    def take(self, step: _Step, view: memoryview) -> int:
        """Compare what was read with its digests, and take what is wanted; belongs on a thread.

        Returns:
            How many wanted bytes were found to be what was written.
        """
        first, _ = self.window(step)
        checked = self.verifier.check(self.block, first, view)
        inner = np.frombuffer(view, np.uint8)[step.begin - first : step.end - first]
        if step.at is None:
            self._pick(step, inner)
            rows = np.asarray(self.rows[step.low : step.high])
            return self.row_bytes * rows_within(rows, checked, self.row_bytes)
        if self.memory is not None and self.staged(step):
            np.frombuffer(self.memory, np.uint8)[step.at :][: len(inner)] = inner
        return max(min(checked.stop, step.end) - max(checked.start, step.begin), 0)

    def _pick(self, step: _Step, source: NDArray[np.uint8]) -> None:
        """Copy chosen rows. Not by torch: it would start threads for that on every thread."""
        row = np.dtype((np.void, self.row_bytes))
        rows = np.asarray(self.rows[step.low : step.high]) - self.rows[step.low]
        if self.memory is not None:
            out = np.frombuffer(self.memory, row)[step.low : step.high]
            np.take(source.view(row), rows, out=out, mode="clip")
            return
        picked = torch.from_numpy(np.take(source.view(row), rows).view(np.uint8))
        target = self.target[step.low : step.high]
        target.copy_(picked.view(target.dtype).view(target.shape))


async def _load_rows(
    piece: RowPiece,
    means: Means,
    block: Block,
    rows: NDArray[np.int64] | range,
    target: torch.Tensor,
) -> None:
    """Read the rows of a block at positions `rows` to `target`, `[n, *shape]`."""
    filling = _Filling.of(block, rows, target, means.verifier)
    steps = filling.steps(most=means.step(block), gap=means.gap_bytes)
    batches = _batches(steps, means.chunk_bytes)
    last = False
    while not last:
        start = time.perf_counter()
        done = await _carry_out(filling, batches, means)
        means.tracer.note("read", block.shard, start, done.read)
        means.meter.note(
            read=done.read, wanted=done.wanted, verified=done.verified, current=piece.table.name
        )
        last = done.last


def _batches(steps: Iterable[_Step], most: int) -> Iterator[tuple[list[_Step], bool]]:
    """Put steps of about `most` bytes together: for so long a thread cannot be interrupted.

    Yields:
        Some steps, and whether they are the last.
    """
    batch: list[_Step] = []
    nbytes = 0
    for step in steps:
        if batch and nbytes + step.end - step.begin > most:
            yield batch, False
            batch, nbytes = [], 0
        batch.append(step)
        nbytes += step.end - step.begin
    yield batch, True


class _Done(NamedTuple):
    """What became of a batch, in bytes."""

    read: int
    wanted: int
    verified: int
    last: bool


async def _carry_out(
    filling: _Filling, batches: Iterator[tuple[list[_Step], bool]], means: Means
) -> _Done:
    """Read the next batch, and take what is wanted, step by step."""
    block = filling.block
    usual = means.step(block)

    if means.lender is None:
        batch, last = next(batches)
        buffer = means.staging.take(filling.room(batch, usual))
        verified = 0
        for step in batch:
            view = filling.view(step, buffer)
            offset = block.offset + filling.window(step)[0]
            await read_exactly(means.storage, block.shard, offset, [view])
            [count] = await run_jobs(means.threads.reads, [partial(filling.take, step, view)])
            verified += count
        means.staging.give(buffer)
        return filling.done(batch, verified, last=last)

    def at_once(read: ReadInto) -> _Done:
        batch, last = next(batches)  # here: looking for gaps takes long
        buffer = means.staging.take(filling.room(batch, usual))
        verified = 0
        for step in batch:
            view = filling.view(step, buffer)
            fill(read, block.shard, block.offset + filling.window(step)[0], view)
            verified += filling.take(step, view)
        means.staging.give(buffer)
        return filling.done(batch, verified, last=last)

    try:
        return await means.lender.on_thread(block.shard, at_once)
    except OSError as error:
        raise ReadError(block.shard, block.offset, block.nbytes, str(error)) from error


def rows_within(rows: NDArray[np.int64], checked: range, row_bytes: int) -> int:
    """Count the rows whose bytes all lie within a range.

    Args:
        rows: int64 `[n]`, ascending; positions in the block.
        checked: Bytes of the block.
        row_bytes: Bytes a row.
    """
    first = -(-checked.start // row_bytes)
    last = checked.stop // row_bytes
    low, high = np.searchsorted(rows, [first, max(last, first)])
    return int(high - low)
