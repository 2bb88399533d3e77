"""The ids of a table whose rows stay on the disk: sorted, with a directory. 8.3 bytes an id.

Ids ascend by their position in a slice of 65,536, then by themselves (both unsigned): the order in
which our Saver writes them, so that nothing is to be built. Ids that come in another order are
sorted, and keep the number of their row besides, in 4 or 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._table.snapshot import order_of, sort_keys

from . import kernels as _kernels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncloader._table.schema import Flags, Longs


SIZE = 65536
"""Positions of a slice, by which ids are sorted."""

_BITS = 16
_IN_A_BUCKET = 64
_UINT32 = 2**32
_NO_IDS: Longs = np.zeros(0, np.int64)


def bits_for(count: int) -> int:
    """Return how many bits of a key the directory of so many ids goes by."""
    return min(max((count // _IN_A_BUCKET).bit_length(), 1), _BITS)


def ascend(ids: Longs) -> bool:
    """Say whether ids are in order, each but once."""
    return bool(_kernels.ascends(ids))


@dataclass(frozen=True, slots=True, eq=False)
class SortedIds:
    """Ids in their order, each but once.

    Attributes:
        ids: int64 `[n]`.
        rows: uint32 or int64 `[n]`, the number of each one's row; `None`: its place in `ids`.
        directory: int64 `[buckets + 1]`, where each bucket begins.
        shift: Of an id's key, to its bucket.
        samples: int64 `[n / 32]`, every 32nd id: to look there first spares half of the misses.
    """

    ids: Longs = field(default_factory=_NO_IDS.copy)
    rows: NDArray[np.uint32] | Longs | None = None
    directory: Longs = field(init=False)
    shift: np.uint64 = field(init=False)
    samples: Longs = field(init=False)

    def __post_init__(self) -> None:
        bits = bits_for(len(self.ids))
        directory, shift = np.empty((1 << bits) + 1, np.int64), np.uint64(64 - bits)
        _kernels.find_buckets(self.ids, shift, directory)
        object.__setattr__(self, "directory", directory)
        object.__setattr__(self, "shift", shift)
        object.__setattr__(self, "samples", self.ids[:: _kernels.RUN].copy())

    def __repr__(self) -> str:
        return f"<SortedIds {len(self)}, {self.nbytes} bytes>"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        rows = 0 if self.rows is None else self.rows.nbytes
        return self.ids.nbytes + rows + self.directory.nbytes + self.samples.nbytes

    @classmethod
    def sorted(cls, ids: Longs, rows: Longs) -> SortedIds:
        """Sort ids, `[n]`; of those that are there more than once, take the last one's row.

        Takes some 40 bytes an id meanwhile.
        """
        order = order_of(sort_keys(ids, SIZE))
        ids = ids[order]
        last = np.append(ids[1:] != ids[:-1], True) if len(ids) else np.zeros(0, np.bool_)
        if not last.all():
            ids, order = ids[last], order[last]
        return cls._with_rows(ids, rows[order])

    @classmethod
    def _with_rows(cls, ids: Longs, rows: Longs) -> SortedIds:
        fits = not len(rows) or int(rows.max()) < _UINT32
        return cls(ids, rows.astype(np.uint32) if fits else rows)

    def only(self, kept: Flags) -> SortedIds:
        """Return some of the ids, bool `[n]`."""
        rows = np.flatnonzero(kept) if self.rows is None else self.rows[kept].astype(np.int64)
        return self._with_rows(self.ids[kept], rows)

    def find(self, wanted: Longs) -> Longs:
        """Return the place of each id in `ids`, `[m]`, or -1."""
        places = np.empty(len(wanted), np.int64)
        if not len(self.ids):
            places.fill(-1)
            return places
        scratch = np.empty((3, _kernels.LANES), np.int64)
        _kernels.find(self.ids, self.samples, self.directory, self.shift, wanted, places, scratch)
        return places

    def numbers(self, places: Longs) -> Longs:
        """Return the number of the row of each place, -1 for -1."""
        if self.rows is None or not len(self.ids):
            return places
        found: Longs = self.rows[places].astype(np.int64)  # -1 takes the last one's
        found[places < 0] = -1
        return found
