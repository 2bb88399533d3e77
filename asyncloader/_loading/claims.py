"""What is being filled, in all of the process: two loads into one tensor would mix."""

from __future__ import annotations

import os
import threading
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from .destinations import share

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import torch
    from numpy.typing import NDArray

    from .destinations import Destinations


_lock = threading.Lock()
_claims: set[Claim] = set()
"""Of all loads that are under way."""


class _Ranges(NamedTuple):
    """Memory on one device, each int64 `[n]`, ascending.

    Attributes:
        numbers: Of the tensors.
        reach: The largest end so far: a range begins anew where it lies below the next begin.
    """

    numbers: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    reach: NDArray[np.int64]

    def meeting(self, other: _Ranges) -> Iterator[tuple[int, int]]:
        """Yield the tensors whose ranges have bytes in common, one of ours and one of theirs.

        Views that interleave, as the columns of a matrix do, count.
        """
        before = np.searchsorted(other.begin, self.end)  # how many ranges begin before each ends
        reach = np.concatenate([[np.int64(-1)], other.reach])
        for at in np.flatnonzero(reach[before] > self.begin):
            for there in np.flatnonzero(other.end[: before[at]] > self.begin[at]):
                yield int(self.numbers[at]), int(other.numbers[there])


class _Taken(NamedTuple):
    """The tensors and tables that one load fills."""

    location: str
    into: Destinations
    ranges: Mapping[torch.device, _Ranges]
    tables: Mapping[int, str]

    def check(self, other: _Taken) -> None:
        """Make sure that another load fills nothing of it.

        Raises:
            RuntimeError: If it does.
        """
        for table in self.tables.keys() & other.tables.keys():
            raise RuntimeError(_refusal(f"table {self.tables[table]!r}", other.location))
        for device in self.ranges.keys() & other.ranges.keys():
            for number, taken in self.ranges[device].meeting(other.ranges[device]):
                if share(self.into.held[number], other.into.held[taken]):
                    there = f"{other.location} (there it is {other.into.name(taken)!r})"
                    raise RuntimeError(_refusal(f"tensors[{self.into.name(number)!r}]", there))


class Claim:
    """One load's right to fill tensors and tables: no other may fill them during the block.

    Enter it when the load begins: of two loads that are under way at a time, the one that comes to
    `take` the memory second is refused, also where the first has ended by then. Which values stayed
    would be chance.
    """

    def __init__(self) -> None:
        self.taken: _Taken | None = None
        self.ended: list[_Taken] | None = []
        """The memory that other loads have filled since this one began, until `take`."""

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
        """Take the memory that is filled. Belongs on a thread.

        Args:
            into: All tensors.
            names: The tensors that are filled.
            tables: The tables that are filled, by name.
            location: The checkpoint, for messages.

        Raises:
            RuntimeError: If another load fills some of it, or a read that was given up may.
        """
        for unsafe in into.unsafe(names):
            raise RuntimeError(unsafe)
        numbers = {id(table): name for name, table in tables.items()}
        mine = _Taken(location, into, dict(_by_device(into, names)), numbers)
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


def _by_device(
    into: Destinations, names: Collection[str]
) -> Iterator[tuple[torch.device, _Ranges]]:
    chosen = into.filled(names)
    devices = list(map(attrgetter("device"), map(into.held.__getitem__, chosen.tolist())))
    kinds = {device: number for number, device in enumerate(set(devices))}
    kind = np.array(list(map(kinds.__getitem__, devices)), np.int64)
    for device, number in kinds.items():
        numbers = chosen[kind == number]
        end = into.end[numbers]
        yield device, _Ranges(numbers, into.begin[numbers], end, np.maximum.accumulate(end))


def _forked() -> None:
    """Forget the loads of the parent: its threads are not here, its memory is a copy."""
    global _lock  # noqa: PLW0603  # a thread of the parent may have held it
    _lock = threading.Lock()
    _claims.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
