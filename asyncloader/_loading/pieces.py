"""The rows of a table on their way: pieces to read, and rows whose ids are to be indexed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._planning.plan import PartLoad, TableLoad
    from asyncloader._table.protocol import LoadableUpdate, PlacingUpdate


# All ids, the wanted ones, the encoded ones, their positions, their groups: five int64 a row.
ROW_COST = 5 * 8


class RowPiece(NamedTuple):
    """Rows `[start, start + rows)` of a part of which only some are wanted."""

    table: TableLoad
    part: PartLoad
    update: LoadableUpdate | PlacingUpdate
    turns: Turns | None  # of the table, if it places rows itself
    start: int
    rows: int


class Turns:
    """Lets the pieces of a table that places rows itself take turns.

    Attributes:
        under_way: Set by each piece when its rows are written: an id that comes again waits for
            them, so that the later row stays.
    """

    def __init__(self) -> None:
        self.under_way: set[asyncio.Event] = set()
        self._last = asyncio.Event()
        self._last.set()

    def ticket(self) -> tuple[asyncio.Event, asyncio.Event]:
        """Return what is set once the piece before has let its ids in, and what this one sets."""
        before, self._last = self._last, asyncio.Event()
        return before, self._last


class Arrival(NamedTuple):
    """Rows `[first, first + rows)` of an update, whose ids are there and not in the index yet."""

    update: LoadableUpdate
    layer: int
    child: str
    first: int
    rows: int
    claimed: Slice | None  # the slice to check the ids against; `None` where that is done


def is_believed(part: PartLoad) -> bool:
    """Say whether rows are left out because the sidecar says that they are not wanted."""
    return len(part.reach) < part.rows
