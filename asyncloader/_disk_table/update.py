"""A load into a table whose rows stay on the disk: ids come in, places of rows are noted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros
from asyncloader._table.protocol import UpdateCounts

from .building import NewLayer, Run
from .ids import ascend
from .places import DiskState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._storage.kept import KeptFile
    from asyncloader._table.schema import Encoding, Flags, Longs

    from .hot import Owner


class DiskUpdate:
    """The next version of a table, built beside the one that is served: a `LocatingUpdate`.

    Not safe to share between threads, but for the jobs that it hands out, and `admit`.

    Args:
        state: The version that there is.
        encoding: Of the table.
        most: Rows at most.
        publish: Gets the next version when the update ends; `None` if there is none.
        join: Gets the width of rows, in bytes, and returns their owner in the cache of hot rows.
    """

    def __init__(
        self,
        state: DiskState,
        encoding: Encoding,
        *,
        most: int,
        publish: Callable[[DiskState | None], None],
        join: Callable[[int], Owner],
    ) -> None:
        self._base = state
        self._encoding = encoding
        self._publish = publish
        self._join = join
        self._ids = zeros((most,), torch.int64).numpy()
        self._end = 0
        self._layers: list[NewLayer] = []
        self._cleared: Sequence[str] = ()
        self._dropped = 0
        self._taken = 0
        self._files: Mapping[str, KeptFile] = {}
        self._next: DiskState | None = None
        self._counts = UpdateCounts(rows=0, new=0, replaced=0, duplicates=0, dropped=0)

    def __repr__(self) -> str:
        return f"<DiskUpdate {self._end} ids reserved, {self._taken} taken in>"

    def layer(self, slots: frozenset[str], expected: int) -> int:  # noqa: ARG002  # of the Protocol
        """Begin a layer in which `slots` are given; see `TableUpdate`."""
        self._layers.append(NewLayer(slots))
        return len(self._layers) - 1

    def fill(self, layer: int) -> None:
        """Let a layer bring no ids; see `TableUpdate`."""
        self._layers[layer].fills = True

    def clear(self, children: Sequence[str]) -> None:
        """Take all ids of these children out first; see `TableUpdate`."""
        self._cleared = children

    def reserve(self, layer: int, count: int, rank: int) -> int:
        """Reserve places for `count` ids; see `TableUpdate`. `locate` says where their rows are."""
        if not 0 < count <= len(self._ids) - self._end:
            raise RuntimeError(f"{self!r}: {count} more than were announced")
        first = self._end
        self._end += count
        self._layers[layer].runs[first] = Run(first, count, rank)
        return first

    def locate(
        self, layer: int, first: int, rows: range | Longs, slots: Mapping[str, Block]
    ) -> None:
        """Say which rows of which blocks belong to ids that were reserved.

        Args:
            layer: Their layer.
            first: What `reserve` has returned for them.
            rows: Their positions in the blocks, ascending, `[count]`.
            slots: The blocks.
        """
        stays = not set(self._cleared) >= set(self._encoding.children)
        for slot, block in slots.items():
            held = self._base.places.get(slot) if stays else None
            if held is not None and str(held.dtype).removeprefix("torch.") != block.dtype.torch:
                raise ValueError(
                    f"slot {slot!r} holds rows of {held.dtype}, {block.shard} has {block.dtype}: "
                    "make another table for them"
                )
        runs = self._layers[layer].runs
        runs[first] = runs[first]._replace(rows=rows, slots=slots)

    def keep(self, files: Mapping[str, KeptFile]) -> None:
        """Take the files that rows stay in, by the names that blocks give them."""
        self._files = files

    def view(self, slot: str, first: int, count: int) -> torch.Tensor:
        """Return the memory of ids, int64 `[count]`; there is none for rows."""
        assert slot == "id", "rows stay on the disk"
        with torch.inference_mode(mode=False):  # threads outside of it may write there
            return torch.from_numpy(self._ids[first : first + count])

    def admit(self, child: str, first: int, count: int, claimed: Slice) -> tuple[Flags | None, int]:
        """Encode ids that were read, and say which lie outside their slice; see `TableUpdate`."""
        return self._encoding.admit(self._ids[first : first + count], child, claimed)

    def select(
        self, child: str, ids: Longs, claimed: Slice, wanted: Slice
    ) -> tuple[Longs, Longs, int]:
        """Pick the ids of a block that belong to `wanted`; see `TableUpdate`."""
        return self._encoding.select(ids, child, claimed, wanted)

    def make_room(self, layer: int, count: int) -> None:
        """Do nothing: ids are where they will stay."""

    def index_jobs(
        self,
        layer: int,
        first: int,
        count: int,
        refused: Flags | None,
        *,
        threads: int,  # noqa: ARG002  # of the Protocol
    ) -> list[Callable[[], tuple[int, int]]]:
        """Return the job that looks at a range of ids; see `TableUpdate`."""
        into = self._layers[layer]

        def look() -> tuple[int, int]:
            if ascend(self._ids[first : first + count]):
                into.ascending.add((first, count))
            if refused is None:
                return count, 0
            gone = np.flatnonzero(refused)
            into.refused.append(first + gone)
            return count - len(gone), 0

        return [look]

    def indexed(self, layer: int, results: Sequence[tuple[int, int]]) -> None:  # noqa: ARG002
        """Note the results of the jobs for one range."""
        self._taken += sum(result[0] for result in results)

    def dropped(self, count: int) -> None:
        """Note that `count` rows were refused."""
        self._dropped += count

    def finish(self, *, threads: int) -> Iterator[list[Callable[[], None]]]:  # noqa: ARG002
        """Yield the rest of the work: lists of jobs that may run side by side."""
        yield [self._finish]

    def commit(self) -> UpdateCounts:
        """Show all at once, and count the changes. Cannot fail after `finish`."""
        if self._next is None:
            raise RuntimeError(f"{self!r}: commit before finish")
        self._publish(self._next)
        return self._counts

    def abort(self) -> None:
        """Leave the table as it was."""
        self._files = {}
        self._publish(None)

    def abandon(self) -> None:
        """Leave the table as it was: a thread may write to our ids, which nobody else has."""
        self.abort()

    def _finish(self) -> None:
        base = self._without_cleared()
        state, unknown, replaced, joined, hidden = base, 0, 0, 0, False
        for layer in self._layers:
            ids, places = layer.built(self._ids[: self._end], self._files)
            if layer.fills and not (known := state.has(ids.ids)).all():
                unknown += len(ids)
                ids = ids.only(known)
                unknown -= len(ids)
            above = replace(state, layers=state.layers[len(base.layers) :])
            again = 0
            if base.count:
                there = base.has(ids.ids)
                if layer.slots >= base.places.keys() and np.count_nonzero(there) == base.count:
                    hidden = True  # each of its rows has another one above it
                again = int(np.count_nonzero(there & ~above.has(ids.ids)))
            replaced += again
            joined += len(ids) - again if layer.fills else 0
            state = state.with_layer(layer.slots, ids, places)
        if hidden and base.layers:
            state = state.without_first(len(base.layers))
        owners = {slot: self._join(places.width) for slot, places in state.places.items()}
        self._next = replace(state, owners=owners)
        taken, new = self._taken - unknown - joined, state.count - base.count
        self._counts = UpdateCounts(
            rows=taken,
            new=new,
            replaced=replaced,
            duplicates=taken - new - replaced,
            dropped=self._dropped + unknown,
            cleared=self._base.count - base.count,
        )

    def _without_cleared(self) -> DiskState:
        """Return the version that there is without the ids that are taken out first."""
        base, cleared = self._base, self._cleared
        if not cleared or not base.count:
            return base
        if set(cleared) >= set(self._encoding.children):
            return DiskState()
        layers = [
            replace(layer, ids=layer.ids.only(~self._encoding.are_of_any(layer.ids.ids, cleared)))
            for layer in base.layers
        ]
        thinned = replace(base, layers=tuple(layers))
        return replace(thinned, count=len(thinned.all_ids()))
