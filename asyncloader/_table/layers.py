"""The rows of an update, by what they bring."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .index import IdIndex


@dataclass(frozen=True, slots=True)
class Run:
    """A range of rows that lie side by side."""

    first: int
    count: int

    fresh: bool
    """Whether its memory still reads as zero."""


@dataclass(slots=True)
class Layer:
    """Rows for which the same slots are given. Later layers win over earlier ones."""

    slots: frozenset[str]
    index: IdIndex
    runs: list[Run] = field(default_factory=list)
    """Ranges of rows reserved, ascending."""

    firsts: array[int] = field(default_factory=lambda: array("q"))
    """The first row of each."""

    ranks: array[int] = field(default_factory=lambda: array("q"))
    """Of two rows of a layer with the same id, the one in the range of higher rank wins."""

    def add(self, run: Run, rank: int) -> None:
        """Take note of another range."""
        self.runs.append(run)
        self.firsts.append(run.first)
        self.ranks.append(rank)
