"""The methods of a table that a loader and a saver call: other tables than ours may have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from asyncloader._display import AsDict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    import torch

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._storage.kept import KeptFile

    from .schema import Flags, Longs, Slot
    from .snapshot import SortedRows


COPIED_BYTES = 4 << 20
"""Bytes of rows that a `PlacingUpdate` may copy besides while it places ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCounts(AsDict):
    """The rows of an update of a table.

    Attributes:
        rows: Rows taken in; equal to `new + replaced + duplicates`. Slots that come without ids
            (see `Loader.from_bank`) bring no rows for ids of the same update.
        new: Ids that were not there before.
        replaced: Ids that were there already.
        duplicates: Rows that gave way to a later row with the same id in the same update.
        dropped: Rows whose id lies outside the slice that their block claims; or, of slots that
            come without ids, whose id is not there.
        cleared: Ids that were taken out first (see `hashtable_clear` there).
    """

    rows: int
    new: int
    replaced: int
    duplicates: int
    dropped: int
    cleared: int = 0


class LoadableTable(Protocol):
    """A table that can be filled."""

    @property
    def name(self) -> str:
        """Its name in messages and reports."""
        ...

    @property
    def children(self) -> Sequence[str]:
        """The names under which its ids stand on disk; its own, unless it is coalesced."""
        ...

    @property
    def slice(self) -> Slice:
        """The ids that it accepts, by their position on disk."""
        ...

    def slots(self) -> Mapping[str, Slot]:
        """Return the slots by name, `embedding` first."""
        ...

    def begin(self, *, most: int, expected: int) -> LoadableUpdate | PlacingUpdate:
        """Begin an update of at most `most` rows, about `expected` of them.

        Raises:
            RuntimeError: If another update has begun and not ended.
            MemoryError: If there is no room.
        """
        ...


class SavableTable(Protocol):
    """A table that can be saved."""

    @property
    def children(self) -> Sequence[str]:
        """The names under which its ids stand on disk; its own, unless it is coalesced."""
        ...

    def snapshot(self) -> SavableSnapshot:
        """Return the rows of this moment, which later changes leave alone. Must be quick."""
        ...


class SavableSnapshot(Protocol):
    """A table at one moment. `TableSnapshot` documents each method."""

    @property
    def name(self) -> str: ...
    @property
    def children(self) -> Sequence[str]: ...
    @property
    def slice(self) -> Slice: ...
    @property
    def slots(self) -> Mapping[str, Slot]: ...
    @property
    def device(self) -> torch.device: ...
    def counts(self) -> Mapping[str, int]: ...
    def sorted_rows(self, child: str, *, sub_slices: int) -> SortedRows: ...
    def copy_rows(self, slot: str, rows: Longs, out: torch.Tensor) -> None: ...
    def changed(self) -> bool: ...


class LoadableUpdate(Protocol):
    """The next version of a table, which no lookup sees before `commit`.

    Rows are reserved, their memory is written to, their ids are indexed, then the update finishes
    and commits. The steps that take long come as jobs, plain functions that hardly ever hold the
    GIL: the caller decides on which threads they run. `TableUpdate` documents each method.

    `fill` and `clear` are called for banks only, right after `layer` and `begin`.
    """

    def layer(self, slots: frozenset[str], expected: int) -> int: ...
    def fill(self, layer: int) -> None: ...
    def clear(self, children: Sequence[str]) -> None: ...
    def reserve(self, layer: int, count: int, rank: int) -> int: ...
    def view(self, slot: str, first: int, count: int) -> torch.Tensor: ...
    def admit(
        self, child: str, first: int, count: int, claimed: Slice
    ) -> tuple[Flags | None, int]: ...
    def select(
        self, child: str, ids: Longs, claimed: Slice, wanted: Slice
    ) -> tuple[Longs, Longs, int]: ...
    def make_room(self, layer: int, count: int) -> None: ...
    def index_jobs(
        self, layer: int, first: int, count: int, refused: Flags | None, *, threads: int
    ) -> list[Callable[[], tuple[int, int]]]: ...
    def indexed(self, layer: int, results: Sequence[tuple[int, int]]) -> None: ...
    def dropped(self, count: int) -> None: ...
    def finish(self, *, threads: int) -> Iterator[list[Callable[[], None]]]: ...
    def commit(self) -> UpdateCounts: ...
    def abort(self) -> None: ...
    def abandon(self) -> None: ...


@runtime_checkable
class LocatingUpdate(LoadableUpdate, Protocol):
    """An update of a table whose rows stay in the checkpoint: only their ids are read."""

    def locate(
        self, layer: int, first: int, rows: range | Longs, slots: Mapping[str, Block]
    ) -> None:
        """Note where the rows of reserved ids stand, at once after `reserve`.

        Args:
            layer: Their layer.
            first: What `reserve` has returned for them.
            rows: Their positions in the blocks, ascending.
            slots: The blocks.
        """
        ...

    def keep(self, files: Mapping[str, KeptFile]) -> None:
        """Take the files that rows stay in, by the names that blocks give them."""
        ...


class Placed(NamedTuple):
    """Places of the rows of some ids.

    Attributes:
        rows: Which of the ids have a row that stays, ascending, `[m]`; `None`: all.
        places: int64 `[m]`.
        again: Whether one of the places was given in this update before.
    """

    rows: Longs | None
    places: Longs
    again: bool


@runtime_checkable
class PlacingUpdate(Protocol):
    """An update of a table that knows the place of a row only once it has the id.

    Ids and rows show as they come, so all that such an update can do after a failure is to take
    out again what was new. Methods may be called on any thread.
    """

    def select(
        self, child: str, ids: Longs, claimed: Slice, wanted: Slice
    ) -> tuple[Longs, Longs, int]:
        """Pick the ids of a block, as `TableUpdate.select` does."""
        ...

    def clear(self, children: Sequence[str]) -> None:
        """Let `commit` take out the ids of these children that no `place` brings again."""
        ...

    def place(self, ids: Longs, slots: Collection[str], *, fills: bool) -> Placed:
        """Let ids in, encoded, `[n]`, and return the places of their rows in `slots`.

        With `fills` none comes in: rows of ids that are not there are dropped, and counted.
        One call at a time. Of rows of one id the later stays. It may copy `COPIED_BYTES` besides.
        """
        ...

    def write(self, slot: str, places: Longs, rows: torch.Tensor) -> None:
        """Write rows, `[n, *shape]`, to places; another dtype is converted.

        Several calls at a time may write to different places.

        Raises:
            RuntimeError: If the update has ended.
        """
        ...

    def dropped(self, count: int) -> None:
        """Note that `count` rows were refused."""
        ...

    def finish(self) -> None:
        """Look for the ids that `commit` takes out. May take long."""
        ...

    def commit(self) -> UpdateCounts:
        """End the update, and count the changes."""
        ...

    def abort(self) -> str:
        """End the update, take its new ids out, and say what is left of it; "" for nothing.

        May take long. Called again, it only says the same again.
        """
        ...
