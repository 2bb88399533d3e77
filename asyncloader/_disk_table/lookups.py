"""Carries out the lookups of one table: cuts them into requests, and counts what they come to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import torch

from .hot import Owner
from .request import Request, cut
from .stats import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from asyncloader._table.schema import Longs, Slot

    from .hot import HotIds
    from .places import DiskState, Places
    from .readers import RowReaders
    from .reading import RowReader
    from .stats import TableStats


T = TypeVar("T")

_PIECE = 16 << 10
"""Ids. Larger lookups are cut: between two pieces, other lookups have their turn."""

_AT_ONCE = 512
"""Ids. So few are looked for in the cache on the caller's thread: that is less than a hand-over."""

_FORMS = {(torch.bfloat16, torch.float32): 1, (torch.float16, torch.float32): 2}
"""How rows are copied whose dtype for the caller is another one than that on the disk."""


class Lookups:
    """Looks ids up.

    Args:
        table: The table's name, for messages.
        readers: Carry requests out.
        read: Reads rows from files.
    """

    def __init__(self, table: str, readers: RowReaders, read: RowReader) -> None:
        self._table = table
        self._readers = readers
        self._read = read
        self._tally = Tally()

    async def run(self, state: DiskState, slot: Slot, ids: Longs, out: torch.Tensor) -> None:
        """Fill `out` with the rows of ids, encoded, `[n]`."""
        start = time.perf_counter()
        try:
            if not self._hit(state, slot, ids, out):
                for request in self._requests(state, slot, ids, out):
                    await self._readers.carry_out(request)
        except BaseException:
            self._tally.add(failures=1)
            raise
        self._tally.ended(time.perf_counter() - start)

    def run_here(self, state: DiskState, slot: Slot, ids: Longs, out: torch.Tensor) -> None:
        """Do the same, and block the calling thread meanwhile."""
        start = time.perf_counter()
        try:
            if not self._hit(state, slot, ids, out):
                for request in self._requests(state, slot, ids, out):
                    self._readers.carry_out_here(request)
        except BaseException:
            self._tally.add(failures=1)
            raise
        self._tally.ended(time.perf_counter() - start)

    def _hit(self, state: DiskState, slot: Slot, ids: Longs, out: torch.Tensor) -> bool:
        """Take few rows from the cache, if it has all of them and nobody uses it; never waits."""
        places, hot = state.places.get(slot.name), self._readers.hot
        if hot is None or places is None or len(ids) > _AT_ONCE:
            return False
        target, form = (out.data_ptr(), slot.row_bytes), _form(places, slot)
        owner = state.owners[slot.name]
        missed = hot.take(owner, places.width, ids, target, form, wait=False)
        if missed is None or len(missed):
            return False
        self._tally.add(ids=len(ids), hits=len(ids))
        return True

    async def warm(
        self, state: DiskState, slot: Slot, ids: Longs, counts: Longs | None = None
    ) -> None:
        """Bring rows into the cache, as if each had been asked for `counts` times, `[n]`."""
        try:
            for request in self._requests(state, slot, ids, None, counts):
                await self._readers.carry_out(request)
        except BaseException:
            self._tally.add(failures=1)
            raise

    def prefetch(self, state: DiskState, slot: Slot, ids: Longs) -> None:
        """Begin to bring rows into the cache; wait for nothing."""
        for request in self._requests(state, slot, ids, None):
            self._readers.begin(request, self._noted)

    def _noted(self, future: Future[None]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self._tally.add(failures=1)

    def hot(self, state: DiskState) -> dict[str, HotIds]:
        """Return the ids in the cache, encoded, and how often each was asked for; by slot."""
        hot = self._readers.hot
        if hot is None:
            return {}
        return {
            slot: hot.of(owner, state.places[slot].width) for slot, owner in state.owners.items()
        }

    def close(self) -> None:
        """End the threads, if they are this table's own."""
        self._readers.close()

    def join(self, width: int) -> Owner:
        """Return a new owner of rows in the cache; nobody where there is none."""
        hot = self._readers.hot
        return Owner(0) if hot is None else hot.join(width)

    async def on_thread(self, job: Callable[[], T], label: str) -> T:
        """Return what a job results in that may block."""
        return await self._readers.on_thread(job, label)

    @property
    def cache_bytes(self) -> int:
        """Memory for hot rows, in bytes; 0 if there is no cache."""
        return 0 if self._readers.hot is None else self._readers.hot.nbytes

    def stats(self, state: DiskState) -> TableStats:
        """Return what all lookups came to."""
        return self._tally.stats(nbytes=state.nbytes, cache_bytes=self.cache_bytes)

    def _requests(
        self,
        state: DiskState,
        slot: Slot,
        ids: Longs,
        out: torch.Tensor | None,
        counts: Longs | None = None,
    ) -> Iterator[Request]:
        places = state.places.get(slot.name)
        form = 0 if places is None else _form(places, slot)
        address, wide = 0 if out is None else out.data_ptr(), slot.row_bytes
        for low, high in cut(len(ids), _PIECE):
            yield Request(
                table=self._table,
                state=state,
                slot=slot.name,
                ids=ids[low:high],
                out=out,
                address=0 if out is None else address + low * wide,
                out_width=0 if out is None else wide,
                form=form,
                hot=self._readers.hot,
                tally=self._tally,
                read=self._read,
                counts=None if counts is None else counts[low:high],
            )


def _form(places: Places, slot: Slot) -> int:
    return _FORMS.get((places.dtype, slot.dtype), 0)
