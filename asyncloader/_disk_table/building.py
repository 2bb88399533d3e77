"""A layer of ids in the making: where each of its rows stands, and in which order its ids are."""

from __future__ import annotations

import itertools
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .ids import SIZE, SortedIds
from .places import Places

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._storage.kept import KeptFile
    from asyncloader._table.schema import Longs


class Run(NamedTuple):
    """Rows that were reserved together, all of one part of the checkpoint."""

    first: int  # where its ids begin
    length: int
    rank: int
    rows: range | Longs = range(0)  # their positions in the blocks
    slots: Mapping[str, Block] = MappingProxyType({})


class NewLayer:
    """A layer in the making.

    Args:
        slots: The slots of which it brings rows.

    Attributes:
        fills: Whether it brings no ids, but rows of ids that are there.
        runs: By `first`.
        ascending: First and length of ranges of ids that ascend.
        refused: Where ids stand that are not to come in.
    """

    def __init__(self, slots: frozenset[str]) -> None:
        self.slots = slots
        self.fills = False
        self.runs: dict[int, Run] = {}
        self.ascending: set[tuple[int, int]] = set()
        self.refused: list[Longs] = []

    def __repr__(self) -> str:
        return f"<NewLayer {sorted(self.slots)}: {len(self.runs)} runs>"

    def built(
        self, memory: Longs, files: Mapping[str, KeptFile]
    ) -> tuple[SortedIds, dict[str, Places]]:
        """Return the ids in their order, and where the rows of each slot stand.

        Args:
            memory: All ids of the update, in which runs have theirs.
            files: By the names that blocks give them.
        """
        if not self.runs:
            return SortedIds(), {}
        runs = self._in_order(memory)
        if runs is None:
            return self._sorted(memory, files)
        ends = itertools.accumulate(run.length for run in runs)
        firsts = [end - run.length for end, run in zip(ends, runs, strict=True)]
        ids = SortedIds(_joined(memory, runs))
        return ids, _places(files, firsts, runs)

    def _in_order(self, memory: Longs) -> list[Run] | None:
        """Return the runs in the order of their ids, if there is nothing else to sort."""
        runs = sorted(self.runs.values(), key=lambda run: _key(memory[run.first]))
        if self.refused or any(not isinstance(run.rows, range) for run in runs):
            return None
        if sum(length for _, length in self.ascending) != sum(run.length for run in runs):
            return None
        meetings = [(first - 1, first) for first, _ in self.ascending if first not in self.runs]
        meetings += [
            (one.first + one.length - 1, other.first) for one, other in itertools.pairwise(runs)
        ]
        ascend = all(_key(memory[one]) < _key(memory[other]) for one, other in meetings)
        return runs if ascend else None

    def _sorted(
        self, memory: Longs, files: Mapping[str, KeptFile]
    ) -> tuple[SortedIds, dict[str, Places]]:
        """Sort the ids. The rows of a part have numbers side by side, wanted or not."""
        runs = sorted(self.runs.values(), key=lambda run: run.rank)
        firsts: dict[int, int] = {}
        parts: list[Run] = []
        room = 0
        for run in runs:
            if id(run.slots) not in firsts:
                firsts[id(run.slots)] = room
                room += max((block.rows for block in run.slots.values()), default=0)
                parts.append(run._replace(rows=range(1)))
        rows = [firsts[id(run.slots)] + np.asarray(run.rows, np.int64) for run in runs]
        kept = np.ones(len(memory), np.bool_)
        for refused in self.refused:
            kept[refused] = False
        flags = np.concatenate([kept[run.first :][: run.length] for run in runs])
        ids = SortedIds.sorted(_joined(memory, runs)[flags], np.concatenate(rows)[flags])
        return ids, _places(files, list(firsts.values()), parts)


def _joined(memory: Longs, runs: Sequence[Run]) -> Longs:
    """Return the ids of runs, one behind the other; no copy if they lie so."""
    first = end = runs[0].first
    for run in runs:
        if run.first != end:
            return np.concatenate([memory[one.first :][: one.length] for one in runs])
        end += run.length
    return memory[first:end]


def _places(
    files: Mapping[str, KeptFile], firsts: Sequence[int], runs: Sequence[Run]
) -> dict[str, Places]:
    """Return where the rows of each slot stand, given the number of each run's first row."""
    found: dict[str, list[tuple[int, KeptFile, int]]] = {}
    blocks: dict[str, Block] = {}
    for first, run in zip(firsts, runs, strict=True):
        for slot, block in run.slots.items():
            begin = block.offset + run.rows[0] * (block.nbytes // block.rows)
            found.setdefault(slot, []).append((first, files[block.shard], begin))
            blocks[slot] = block
    return {
        slot: Places.of(getattr(torch, block.dtype.torch), block.nbytes // block.rows, found[slot])
        for slot, block in blocks.items()
    }


def _key(id_: np.int64) -> tuple[int, int]:
    """Return what ids are sorted by."""
    number = int(id_) % 2**64
    return number % SIZE, number
