"""Makes an id index without some of its ids, in steps that end soon: a load may be cancelled."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .index import IdIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .schema import Flags, Longs, Words


# Rows that one job looks at, and words that it copies: some 20 ms.
_WINDOW = 1 << 18


class Thinning:
    """An index in the making. The one that it is made of is only read.

    Args:
        index: It.
        ids: The encoded id of each row, int64 `[rows]`.
        end: One past the last row that the index may point to.
        goes: Says of rows, int64 `[n]`, whose ids go: bool `[n]`. Any thread calls it.

    Attributes:
        index: The index without the ids that go, once all jobs are done.
        removed: How many went.
    """

    def __init__(
        self, index: IdIndex, ids: Longs, end: int, goes: Callable[[Longs], Flags]
    ) -> None:
        self._from = self.index = index
        self._ids = ids
        self._end = end
        self._goes = goes
        self.removed = 0

    def jobs(self, *, threads: int) -> Iterator[list[Callable[[], None]]]:
        """Yield the work: lists of jobs that may run side by side."""
        live: list[Longs] = []
        yield [lambda: live.append(self._from.live_rows(self._end))]
        [rows], removed = live, list[int]()  # threads append to lists
        gone = np.zeros(self._end, np.bool_)
        windows = (rows[at : at + _WINDOW] for at in range(0, len(rows), _WINDOW))
        while wave := list(itertools.islice(windows, threads)):
            yield [partial(self._mark, window, gone, removed) for window in wave]
        self.removed = sum(removed)
        if self.removed:
            yield from self._copies(gone, threads)

    def _mark(self, rows: Longs, gone: Flags, removed: list[int]) -> None:
        flags = self._goes(rows)
        gone[rows] = flags
        removed.append(int(np.count_nonzero(flags)))

    def _copies(self, gone: Flags, threads: int) -> Iterator[list[Callable[[], None]]]:
        self.index = IdIndex.empty(self._from.count - self.removed, self._from.seed)
        added: list[int] = []

        def copy(share: tuple[int, int], words: Words) -> None:
            new, _ = self.index.merge(share, self._ids, words, gone=gone, wins=False)
            added.append(new)

        shares = self.index.shares(threads)
        sources = [self._from.candidates(self.index, share) for share in shares]
        for at in range(0, max(map(len, sources)), _WINDOW):
            words = [source[at : at + _WINDOW] for source in sources]
            yield [partial(copy, *both) for both in zip(shares, words, strict=True)]
        self.index.count = sum(added)
        assert self.index.count == self._from.count - self.removed, "what stays was copied"
