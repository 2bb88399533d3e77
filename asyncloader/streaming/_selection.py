"""Loads blocks of which a table wants only some rows.

The ids are read first, a piece at a time; those that the table wants get rows; then the wanted
rows of every slot are read. Neighbours, and small gaps between them, are read at once: a gap is
cheaper than another call. Rows that nobody wants take no memory beyond the piece's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._concurrency import run_jobs
from asyncloader.checkpoint import DIGEST_CHUNK
from asyncloader.errors import ReadError
from asyncloader.storage import read_exactly

from ._indexing import Arrival
from ._tensors import plain_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from asyncloader.checkpoint import Block
    from asyncloader.planning import PartLoad, TableLoad
    from asyncloader.storage import Storage
    from asyncloader.table import LoadableUpdate

    from ._budget import ByteBudget
    from ._indexing import Indexer
    from ._progress import Meter
    from ._staging import StagingPool
    from ._threads import Threads
    from ._trace import Tracer
    from ._verification import Verifier

__all__ = ["RowPiece", "load_piece", "row_groups", "row_pieces", "rows_within"]

_ID_BYTES = 8
# Ids, those wanted, encoded, their positions, and what grouping them takes: five int64 a row.
_COST = 5 * _ID_BYTES


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

    def room(self, length: int) -> int:
        """Return the memory that reading `length` bytes may take besides them."""
        return length + 2 * DIGEST_CHUNK if self.verifier.widen else 0


def row_pieces(
    table: TableLoad, part: PartLoad, update: LoadableUpdate, *, chunk_bytes: int, widen: bool
) -> Iterator[RowPiece]:
    """Cut a part into pieces whose bookkeeping fits into a chunk.

    If what is read is widened to whole digest chunks, into pieces of as many ids as one has.
    """
    step = max(chunk_bytes // _COST, 1)
    if widen and part.ids.digests is not None:
        step = DIGEST_CHUNK // _ID_BYTES
    for start in range(0, part.rows, step):
        count = min(step, part.rows - start)
        yield RowPiece(table=table, part=part, update=update, start=start, count=count)


def row_groups(
    rows: NDArray[np.int64],
    *,
    most: int,
    gap: int,
    windows: NDArray[np.int64] | None = None,
) -> Iterator[tuple[int, int]]:
    """Group ascending positions into spans worth one read.

    Args:
        rows: int64 `[n]`, ascending.
        most: The most rows that a span covers.
        gap: The most unwanted rows between two neighbours of a span.
        windows: int64 `[n]`, ascending; only rows with the same number are read at once.

    Yields:
        `(i, j)`: `rows[i:j]` are read at once.
    """
    apart = np.diff(rows) > gap + 1
    if windows is not None:
        apart |= np.diff(windows) > 0
    breaks = np.flatnonzero(apart) + 1
    for low, high in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        i = low
        while i < high:
            j = min(int(np.searchsorted(rows, rows[i] + most)), high)
            yield i, j
            i = j


async def load_piece(piece: RowPiece, means: Means) -> None:
    """Read a piece's ids, then the rows that the table wants."""
    try:
        await _load_piece(piece, means)
    except ReadError as error:
        error.names = (piece.table.name,)
        raise


async def _load_piece(piece: RowPiece, means: Means) -> None:
    part = piece.part
    widest = max((block.nbytes // part.rows for block in part.slots.values()), default=0)
    most = max(means.chunk_bytes, widest)
    async with means.budget.reserve(piece.count * _COST + most + means.room(most)):
        ids = np.empty(piece.count, np.int64)
        begin = piece.start * _ID_BYTES
        read, checked = await _read_range(means, part.ids, begin, ids.data.cast("B"))
        means.meter.note(
            read=read, wanted=ids.nbytes, verified=len(checked), current=piece.table.name
        )
        select = partial(piece.update.select, part.child, ids, part.claimed, piece.table.slice)
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
            await _load_rows(piece, means, slot, block, rows, first)


async def _load_rows(  # noqa: PLR0917
    piece: RowPiece,
    means: Means,
    slot: str,
    block: Block,
    rows: NDArray[np.int64],
    first: int,
) -> None:
    """Read the rows of one slot at positions `rows` of the piece; they belong at `first`."""
    row_bytes = block.nbytes // block.rows
    groups = row_groups(
        rows,
        most=max(means.chunk_bytes // row_bytes, 1),
        gap=means.gap_bytes // row_bytes,
        windows=means.verifier.windows(block, (rows + piece.start) * row_bytes, means.chunk_bytes),
    )
    for i, j in groups:
        wanted = rows[i:j]
        span = int(wanted[-1] - wanted[0]) + 1
        target = piece.update.view(slot, first + i, j - i)
        begin = (piece.start + int(wanted[0])) * row_bytes
        direct = plain_bytes(target) if span == j - i else None
        if direct is not None:
            read, checked = await _read_range(means, block, begin, direct)
            verified = len(checked)
        else:
            buffer = means.staging.take(span * row_bytes)
            staged = buffer[: span * row_bytes]
            read, checked = await _read_range(means, block, begin, staged.numpy().data)
            verified = row_bytes * rows_within(wanted + piece.start, checked, row_bytes)
            pick = partial(_pick, staged.view(span, row_bytes), wanted - wanted[0], target)
            await run_jobs(means.threads.kernels, [pick])
            means.staging.give(buffer)
        means.meter.note(
            read=read,
            wanted=(j - i) * row_bytes,
            verified=verified,
            current=piece.table.name,
        )


async def _read_range(
    means: Means, block: Block, begin: int, view: memoryview
) -> tuple[int, range]:
    """Fill a view with the bytes of a block from `begin` on.

    Returns:
        How many bytes were read, and which bytes of the block that are in the view were verified.
    """
    end = begin + view.nbytes
    first, last = means.verifier.window(block, begin, end)
    widened = (first, last) != (begin, end)
    buffer = means.staging.take(last - first) if widened else None
    into = view if buffer is None else buffer[: last - first].numpy().data
    with means.tracer.span("read", block.shard, last - first):
        await read_exactly(means.storage, block.shard, block.offset + first, [into])

    def check() -> range:
        checked = means.verifier.check(block, first, into)
        if widened:
            view[:] = into[begin - first : end - first]
        return checked

    if block.digests is None:
        return last - first, range(0)
    with means.tracer.span("verify", block.shard, last - first):
        [checked] = await run_jobs(means.threads.reads, [check])
    if buffer is not None:
        del into, check  # nobody may look at the buffer any more
        means.staging.give(buffer)
    return last - first, range(max(checked.start, begin), max(min(checked.stop, end), begin))


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


def _pick(staged: torch.Tensor, rows: NDArray[np.int64], target: torch.Tensor) -> None:
    """Copy chosen rows, uint8 `[span, row_bytes]`, to `target`, `[n, *shape]`."""
    positions = torch.from_numpy(rows)
    memory = plain_bytes(target)
    if memory is None:  # on another device: by way of a copy of the chosen rows
        picked = staged.index_select(0, positions)
        target.copy_(picked.view(-1).view(target.dtype).view(target.shape))
        return
    out = torch.frombuffer(memory, dtype=torch.uint8).view(len(rows), -1)
    torch.index_select(staged, 0, positions, out=out)
