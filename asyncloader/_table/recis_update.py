"""Fills a table of RecIS, whose rows show as they come, and takes ids out again if that fails."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .places import put_rows
from .protocol import COPIED_BYTES, Placed, UpdateCounts
from .recis_object import device_of, ids_and_places, look_up

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from asyncloader._checkpoint.slices import Slice

    from .schema import Encoding, Longs

# Flags of a place: its id was there before; its row is one of this load; its id is taken out at the
# commit unless this load brings it.
_HELD = 1
_FILLED = 2
_CLEARED = 4

# Bytes of rows that are converted at a time: no budget counts them.
_CONVERTED = 256 << 10
_NAMED = 20


class RecISUpdate:
    """See `PlacingUpdate`, which it implements."""

    def __init__(
        self,
        name: str,
        table: Any,  # noqa: ANN401  # RecIS's
        encoding: Encoding,
        row_bytes: int,
        end: Callable[[], None],
    ) -> None:
        self._name = name
        self._table = table
        self._encoding = encoding
        self._end = end
        self._device = device_of(table)
        self._blocks: dict[str, list[torch.Tensor]] = {}
        self._rows = self._dropped = 0
        self._written = set[str]()
        self._is_open = True
        self._writers = 0
        self._changed = threading.Condition()  # guards the two above
        self._left = ""
        self._clears = False
        self._gone: list[torch.Tensor] = []  # ids and places that the commit takes out
        self._uncertain: Longs = np.empty(0, np.int64)
        self._counts: UpdateCounts | None = None
        _, held = ids_and_places(table)
        self._flags = np.zeros(int(held.max(initial=-1)) + 1, np.uint8)  # by place
        self._flags[held] = _HELD
        self._at_once = max(COPIED_BYTES // max(row_bytes, 1), 1)

    def __repr__(self) -> str:
        return f"<RecISUpdate of {self._name!r}, {self._rows} rows so far>"

    def select(
        self, child: str, ids: Longs, claimed: Slice, wanted: Slice
    ) -> tuple[Longs, Longs, int]:
        return self._encoding.select(ids, child, claimed, wanted)

    def clear(self, children: Sequence[str]) -> None:
        self._clears = True
        ids, places = ids_and_places(self._table)
        self._flags[places[self._encoding.are_of_any(ids, children)]] |= _CLEARED

    def place(self, ids: Longs, slots: Collection[str], *, fills: bool) -> Placed:
        self._rows += len(ids)
        ordered, rows = np.sort(ids), None
        if (ordered[1:] == ordered[:-1]).any():  # of rows of one id the last one stays
            _, behind = np.unique(ids[::-1], return_index=True)
            rows = np.sort(len(ids) - 1 - behind)
            ids = ids[rows]
        if fills:
            return self._place_known(ids, slots, rows)
        self._reset(ids, slots)
        places = np.empty(len(ids), np.int64)
        again = False
        for low in range(0, len(ids), self._at_once):
            some = ids[low : low + self._at_once]
            try:
                found = look_up(self._table, some, self._device)
            except BaseException:
                self._uncertain = some  # which of them have come in, nobody knows
                raise
            again |= self._note(found)
            places[low : low + len(found)] = found
        self._take_blocks(slots, int(places.max(initial=-1)))
        return Placed(rows, places, again)

    def _place_known(self, ids: Longs, slots: Collection[str], rows: Longs | None) -> Placed:
        """Return the places of ids that are there and stay; count the others as dropped."""
        places = self._find(ids)
        known = places >= 0
        known[known] = (self._flags[places[known]] & (_FILLED | _CLEARED)) != _CLEARED
        places = places[known]
        unknown = len(ids) - len(places)
        self._dropped += unknown
        self._rows -= unknown + int(np.count_nonzero(self._flags[places] & _FILLED))
        rows = np.flatnonzero(known) if rows is None else rows[known]
        again = self._note(places)
        self._take_blocks(slots, int(places.max(initial=-1)))
        return Placed(rows, places, again)

    def _reset(self, ids: Longs, slots: Collection[str]) -> None:
        """Give ids that are cleared and come again RecIS's initial rows where slots are lacking."""
        if not self._clears:
            return
        every = {slot.name() for slot in self._table.slot_group().slots()}
        if every <= set(slots):
            return
        places = self._find(ids)
        known = places >= 0
        known[known] = (self._flags[places[known]] & (_FILLED | _CLEARED)) == _CLEARED
        ids, places = ids[known], places[known]
        if len(ids):
            self._written |= every
            self._delete(ids, places)
            # The places are free again, so that this needs no memory but for its copy of rows.
            self._flags[places] = 0
            for low in range(0, len(ids), self._at_once):
                some = ids[low : low + self._at_once]
                found = look_up(self._table, some, self._device)
                self._note(found)
                self._flags[found] = _HELD | _CLEARED

    def _find(self, ids: Longs) -> Longs:
        parts = [
            look_up(self._table, ids[low : low + self._at_once], self._device, readonly=True)
            for low in range(0, len(ids), self._at_once)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _delete(self, ids: Longs, places: Longs) -> None:
        given = (torch.tensor(some, device=self._device) for some in (ids, places))
        self._table.delete(*given, "")

    def write(self, slot: str, places: Longs, rows: torch.Tensor) -> None:
        with self._writing(slot):
            blocks = self._blocks[slot]
            if rows.dtype == blocks[0].dtype:
                put_rows(blocks, places, rows)
                return
            step = max(_CONVERTED // max(rows[:1].nbytes, 1), 1)
            for low in range(0, len(rows), step):
                converted = rows[low : low + step].to(blocks[0].dtype)
                put_rows(blocks, places[low : low + step], converted)

    def dropped(self, count: int) -> None:
        self._dropped += count

    def finish(self) -> None:
        filled = self._flags[(self._flags & _FILLED) != 0]
        replaced = int(np.count_nonzero((filled & (_HELD | _CLEARED)) == _HELD))
        new = len(filled) - replaced
        self._counts = UpdateCounts(
            rows=self._rows,
            new=new,
            replaced=replaced,
            duplicates=self._rows - new - replaced,
            dropped=self._dropped,
            cleared=int(np.count_nonzero(self._flags & _CLEARED)),
        )
        if not self._clears:
            return
        ids, places = ids_and_places(self._table)
        gone = (self._flags[places] & (_FILLED | _CLEARED)) == _CLEARED
        if gone.any():
            self._gone = [torch.tensor(some[gone], device=self._device) for some in (ids, places)]

    def commit(self) -> UpdateCounts:
        if self._counts is None:
            self.finish()
        assert self._counts is not None
        self._close()
        try:
            if self._gone:
                self._table.delete(*self._gone, "")
        finally:
            self._end()
        return self._counts

    def abort(self) -> str:
        if self._is_open:
            self._close()
            try:
                self._left = self._take_out() if self._rows or self._clears else ""
            except Exception as error:  # noqa: BLE001  # the failure before it is what counts
                self._left = (
                    f"table {self._name!r}: ids that came in could not be taken out ({error!r})"
                )
            self._end()
        return self._left

    def _note(self, places: Longs) -> bool:
        """Note that places are filled; say whether one was filled before."""
        end = int(places.max(initial=-1)) + 1
        if end > len(self._flags):
            more = np.zeros(end + end // 2 - len(self._flags), np.uint8)
            self._flags = np.concatenate([self._flags, more])
        again = bool((self._flags[places] & _FILLED).any())
        self._flags[places] |= _FILLED
        return again

    def _take_blocks(self, slots: Collection[str], last: int) -> None:
        """Hold the blocks of slots, once ids have places: a lookup appends blocks."""
        group = self._table.slot_group()
        for name in slots:
            held = self._blocks.get(name, ())
            if not held or len(held) * len(held[0]) <= last:
                self._blocks[name] = held = group.slot_by_name(name).values()
            if not held or len(held) * len(held[0]) <= last:
                raise RuntimeError(
                    f"slot {name!r} of table {self._name!r} has no memory for rows of ids that are "
                    "there: it was appended after the first id, or changed while it was loaded"
                )

    @contextlib.contextmanager
    def _writing(self, slot: str) -> Iterator[None]:
        with self._changed:
            if not self._is_open:  # a thread that was given up has come back
                raise RuntimeError("the load was given up")
            self._writers += 1
            self._written.add(slot)
        try:
            yield
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

    def _close(self) -> None:
        """Let no thread write any more; those that are copying rows right now end."""
        with self._changed:
            self._is_open = False
            self._changed.wait_for(lambda: not self._writers)
        self._blocks.clear()

    def _take_out(self) -> str:
        """Take out the ids that were new, and say what is left of the load."""
        ids, places = ids_and_places(self._table)
        behind = places >= len(self._flags)  # not noted: of a lookup that failed, or not ours
        flags = np.zeros(len(places), np.uint8)
        flags[~behind] = self._flags[places[~behind]]
        came = np.isin(ids, self._uncertain) & ((flags & _HELD) == 0)
        new = (flags == _FILLED) | came
        replaced = ids[(flags & (_FILLED | _HELD)) == _FILLED | _HELD]
        if new.any():
            self._delete(ids[new], places[new])
        left = f"table {self._name!r}: {np.count_nonzero(new):,} ids that came in were taken out"
        if self._written and len(replaced):
            shown = ", ".join(map(str, self._encoding.decode(replaced[:_NAMED]).tolist()))
            left += (
                f"; rows of {len(replaced):,} ids that were there may be overwritten, in slots "
                f"{', '.join(sorted(self._written))}: {shown}"
            ) + (", ..." if len(replaced) > _NAMED else "")
        return left
