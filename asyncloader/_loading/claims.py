"""The memory that loads fill, in all of the process: two loads into one tensor would mix."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from asyncloader._table.recis import identity

from .destinations import share

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from numpy.typing import NDArray

    from .destinations import Destinations


_lock = threading.Lock()
_claims: set[Claim] = set()  # of all loads that are under way


class _Taken(NamedTuple):
    """The tensors and tables that one load fills."""

    location: str
    into: Destinations
    numbers: NDArray[np.int64]  # of the tensors, as they lie in memory, `[n]`
    tables: Mapping[int, str]  # their names, by `identity`

    def check(self, other: _Taken) -> None:
        for table in self.tables.keys() & other.tables.keys():
            raise RuntimeError(_refusal(f"table {self.tables[table]!r}", other.location))
        for number, taken in self._meeting(other):
            one, another = self.into.held[number], other.into.held[taken]
            if one.device == another.device and share(one, another):
                there = f"{other.location} (there it is {other.into.name(taken)!r})"
                raise RuntimeError(_refusal(f"tensors[{self.into.name(number)!r}]", there))

    def _meeting(self, other: _Taken) -> Iterator[tuple[int, int]]:
        """Yield the pairs of tensors, one of ours and one of theirs, whose addresses meet.

        Views that interleave, as the columns of a matrix do, count; so do tensors of two devices
        whose addresses are alike by chance.
        """
        begin, end = self.into.begin[self.numbers], self.into.end[self.numbers]
        begins, ends = other.into.begin[other.numbers], other.into.end[other.numbers]
        before = np.searchsorted(begins, end)  # how many of theirs begin before each of ours ends
        reach = np.concatenate([[np.int64(-1)], np.maximum.accumulate(ends)])  # the last of those
        for at in np.flatnonzero(reach[before] > begin).tolist():
            for there in np.flatnonzero(ends[: before[at]] > begin[at]).tolist():
                yield int(self.numbers[at]), int(other.numbers[there])


class Claim:
    """One load's right to fill tensors and tables: no other may fill them during the block.

    Enter it when the load begins. Of two loads that are under way at a time, the one that calls
    `take` second is refused, also where the first has ended by then: which values stayed would be
    chance.
    """

    def __init__(self) -> None:
        self.taken: _Taken | None = None
        self.ended: list[_Taken] | None = []  # filled by others since we began, until `take`

    def __enter__(self) -> Self:
        with _lock:
            _claims.add(self)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        with _lock:
            _claims.discard(self)
            if failure is None and self.taken is not None:
                for other in _claims:
                    if other.ended is not None:  # or it would hold on to our tensors to its end
                        other.ended.append(self.taken)

    def take(
        self,
        into: Destinations,
        names: Collection[str],
        tables: Mapping[str, object],
        location: str,
    ) -> None:
        """Take the memory of the tensors `names`, and the tables; belongs on a thread.

        Raises:
            RuntimeError: If another load fills some of it, or a read that was given up may.
        """
        for unsafe in into.unsafe(names):
            raise RuntimeError(unsafe)
        by_id = {identity(table): name for name, table in tables.items()}
        mine = _Taken(location, into, into.filled(names), by_id)
        # Compared outside of the lock, for which event loops wait: a later load sees this one.
        with _lock:
            others = (*(one.taken for one in _claims), *(self.ended or ()))
            self.taken = mine
            self.ended = None
        try:
            for other in others:
                if other is not None:
                    mine.check(other)
        except BaseException:
            self.taken = None
            raise


def _refusal(what: str, other: str) -> str:
    return (
        f"{what} is being filled by another load at the same time, of {other}; one update at a "
        "time: wait until that one has ended, or load into another one"
    )


def _forked() -> None:
    """Forget the loads of the parent process: its threads are not here, its memory is a copy."""
    global _lock  # noqa: PLW0603  # a thread of the parent may have held it
    _lock = threading.Lock()
    _claims.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
