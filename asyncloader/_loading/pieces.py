"""Cuts blocks of which a table wants only some rows into pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import PartLoad, TableLoad
    from asyncloader._table.protocol import LoadableUpdate

GAP_BYTES = 64 << 10
"""Reading as much along takes about as long as handing another call to a thread."""

_ID_BYTES = 8
# Ids, those wanted, encoded, their positions, and what grouping them takes: five int64 a row.
COST = 5 * _ID_BYTES
# What one thread reads and picks rows from before it reads on: it is still in the cache then.
STEP = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPiece:
    """Rows `[start, start + count)` of a part."""

    table: TableLoad
    part: PartLoad
    update: LoadableUpdate
    start: int
    count: int


def is_believed(part: PartLoad) -> bool:
    """Whether only those rows are looked at that the sidecar says may be wanted."""
    return len(part.reach) < part.rows


def step_bytes(block: Block, *, chunk_bytes: int, lends: bool) -> int:
    """Return how many bytes of a block to read before something is done with them.

    Whole chunks of one with digests. Where each read is a hand-over to a thread, as much as one may
    take.

    Args:
        block: What to read.
        chunk_bytes: The most that one hand-over may take.
        lends: Whether the storage lends threads.
    """
    most = min(chunk_bytes, STEP) if lends else chunk_bytes
    if block.digests is None:
        return most
    return max(most // DIGEST_CHUNK, 1) * DIGEST_CHUNK


def row_pieces(
    table: TableLoad, part: PartLoad, update: LoadableUpdate, *, chunk_bytes: int, widen: bool
) -> Iterator[RowPiece]:
    """Cut what may be wanted of a part into pieces whose bookkeeping fits into a chunk.

    If there are digests, where chunks of ids, or of rows of many a size, end too; if what is read
    of the ids is widened to whole chunks, into pieces of as many ids as one has.
    """
    step = max(chunk_bytes // COST, 1)
    if part.ids.digests is not None:
        whole = widen or is_believed(part)
        step = DIGEST_CHUNK // _ID_BYTES if whole else 1 << (step.bit_length() - 1)
    start, stop = part.reach.start, part.reach.stop
    while start < stop:
        end = min((start // step + 1) * step, stop)
        yield RowPiece(table=table, part=part, update=update, start=start, count=end - start)
        start = end
