"""Where the rows of a table stand: layers of ids, and for each slot the parts of shards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from asyncloader._storage.kept import KeptFile
    from asyncloader._table.schema import Flags, Longs

    from .hot import Owner
    from .ids import SortedIds


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the rows of one slot stand. Row `firsts[p] + i` is row `i` of part `p`.

    Attributes:
        dtype: Of the elements, as they are stored.
        width: Bytes of a row.
        files: The different files.
        firsts: int64 `[parts]`, ascending.
        file: int64 `[parts]`, which of `files` each is in.
        offsets: int64 `[parts]`, where each begins in its file, in bytes.
    """

    dtype: torch.dtype
    width: int
    files: tuple[KeptFile, ...]
    firsts: Longs
    file: Longs
    offsets: Longs

    @classmethod
    def of(
        cls, dtype: torch.dtype, width: int, parts: Sequence[tuple[int, KeptFile, int]]
    ) -> Places:
        """Take parts, each with its first row's number, its file, and where it begins there."""
        ordered = sorted(parts, key=lambda part: part[0])
        files = tuple(dict.fromkeys(file for _, file, _ in ordered))
        numbers = {file: number for number, file in enumerate(files)}
        return cls(
            dtype,
            width,
            files,
            np.array([first for first, _, _ in ordered], np.int64),
            np.array([numbers[file] for _, file, _ in ordered], np.int64),
            np.array([offset for _, _, offset in ordered], np.int64),
        )

    @property
    def fds(self) -> Longs:
        """The descriptor of each part's file, int64 `[parts]`."""
        return np.array([file.fd for file in self.files], np.int64)[self.file]

    def past_cache(self) -> tuple[Longs, int] | None:
        """Return descriptors for reads past the page cache, by part, and their blocks' length.

        `None` if one of the files is not to be had that way.
        """
        found = [file.past_cache() for file in self.files]
        if not found or any(one is None for one in found):
            return None
        known = [one for one in found if one is not None]
        fds = np.array([fd for fd, _ in known], np.int64)
        return fds[self.file], max(block for _, block in known)

    def parts(self) -> list[tuple[int, KeptFile, int]]:
        """Return what `of` takes."""
        files = [self.files[number] for number in self.file.tolist()]
        return list(zip(self.firsts.tolist(), files, self.offsets.tolist(), strict=True))

    def where(self, number: int) -> tuple[KeptFile, int]:
        """Return the file of a row, and where it begins there."""
        part = int(np.searchsorted(self.firsts, number, side="right")) - 1
        begin = int(self.offsets[part]) + (number - int(self.firsts[part])) * self.width
        return self.files[int(self.file[part])], begin

    def files_of(self, numbers: Longs) -> Sequence[KeptFile]:
        """Return the files of some rows."""
        if len(numbers) >= len(self.files):
            return self.files
        parts = np.searchsorted(self.firsts, numbers, side="right") - 1
        return [self.files[number] for number in np.unique(self.file[parts]).tolist()]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Ids, and the slots of which they have rows.

    Attributes:
        first: The number of its first row in the table.
        room: How many numbers it has.
    """

    ids: SortedIds
    slots: frozenset[str]
    first: int
    room: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DiskState:
    """One version of a table. It never changes; a request takes it once and works on it.

    An id is there if any layer has it. Its row of a slot is that of the last layer that has both.

    Attributes:
        places: By slot; a slot of which no row was brought has none.
        count: Ids.
        owners: Who each slot's rows are, in the cache of hot rows.
    """

    layers: tuple[Layer, ...] = ()
    places: Mapping[str, Places] = field(default_factory=dict)
    count: int = 0
    owners: Mapping[str, Owner] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """One past the last number of a row."""
        return self.layers[-1].first + self.layers[-1].room if self.layers else 0

    @property
    def nbytes(self) -> int:
        """Memory for ids, in bytes."""
        return sum(layer.ids.nbytes for layer in self.layers)

    def find(self, slot: str, wanted: Longs) -> Longs:
        """Return the number of each id's row of a slot, `[n]`; -1 where there is none."""
        numbers = np.full(len(wanted), -1, np.int64)
        for layer in reversed(self.layers):
            if slot not in layer.slots:
                continue
            left = np.flatnonzero(numbers < 0)
            found = layer.ids.numbers(layer.ids.find(wanted[left]))
            numbers[left] = np.where(found < 0, -1, found + layer.first)
        return numbers

    def has(self, wanted: Longs) -> Flags:
        """Say which ids are there, bool `[n]`."""
        there = np.zeros(len(wanted), np.bool_)
        for layer in self.layers:
            left = np.flatnonzero(~there)
            there[left] = layer.ids.find(wanted[left]) >= 0
        return there

    def all_ids(self) -> Longs:
        """Return all ids, encoded, each once."""
        found = [np.zeros(0, np.int64)]
        for number, layer in enumerate(self.layers):
            before = replace(self, layers=self.layers[:number])
            found.append(layer.ids.ids[~before.has(layer.ids.ids)])
        return np.concatenate(found)

    def with_layer(
        self, slots: frozenset[str], ids: SortedIds, places: Mapping[str, Places]
    ) -> DiskState:
        """Return a version with another layer."""
        if not len(ids):
            return self
        known = np.count_nonzero(self.has(ids.ids)) if self.layers else 0
        first = self.room
        room = len(ids) if ids.rows is None else int(ids.rows.max()) + 1
        joined = dict(self.places)
        for slot, one in places.items():
            moved = [(first + number, file, offset) for number, file, offset in one.parts()]
            before = joined[slot].parts() if slot in joined else []
            joined[slot] = Places.of(one.dtype, one.width, [*before, *moved])
        return replace(
            self,
            layers=(*self.layers, Layer(ids, slots, first, room)),
            places=joined,
            count=self.count + len(ids) - int(known),
        )

    def without_first(self, count: int) -> DiskState:
        """Return a version without the lowest layers, of which no row is wanted any more."""
        start = self.layers[count].first
        places = {}
        for slot, one in self.places.items():
            parts = [part for part in one.parts() if part[0] >= start]
            if parts:
                places[slot] = Places.of(one.dtype, one.width, parts)
        return replace(self, layers=self.layers[count:], places=places)
