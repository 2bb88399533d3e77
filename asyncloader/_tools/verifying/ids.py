"""Checks ids: whether they lie where they claim to, come once, and are in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.sidecar import SUB_SLICES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.problems import Problems
    from asyncloader._checkpoint.sidecar import PartRows
    from asyncloader._checkpoint.slices import Slice


# Ids looked at together: what that takes besides them is a few MB.
_WINDOW = 1 << 18


@dataclass(slots=True)
class _Part:
    """What was seen of a part so far."""

    claim: Slice
    cuts: NDArray[np.uint64]
    """First position of each sub-slice but the first."""

    strays: int = 0
    example: int = 0
    ascending: bool = True
    last: np.uint64 = field(default_factory=lambda: np.uint64(0))
    below: NDArray[np.int64] = field(default_factory=lambda: np.zeros(SUB_SLICES - 1, np.int64))
    """How many positions are below each cut."""

    def see(self, ids: NDArray[np.int64]) -> None:
        outside = self.claim.strays(ids)
        count = int(np.count_nonzero(outside))
        if count and not self.strays:
            self.example = int(ids[int(np.argmax(outside))])
        self.strays += count
        if self.ascending:
            positions = ids.view(np.uint64) % np.uint64(self.claim.size)
            self.ascending = bool(self.last <= positions[0])
            self.ascending &= bool(np.all(positions[:-1] <= positions[1:]))
            self.last = positions[-1]
            self.below += np.searchsorted(positions, self.cuts)


def check_part(
    ids: NDArray[np.int64],
    claim: Slice,
    block: Block,
    told: PartRows | None,
    problems: Problems,
) -> None:
    """Check the ids of one part.

    Args:
        ids: int64 `[n]`.
        claim: The slice that the block claims.
        block: Where they stand.
        told: What the sidecar says of their order, if it does.
        problems: Receives what is wrong.
    """
    begin, length = claim.begin, claim.end - claim.begin
    cuts = [begin + length * number // SUB_SLICES for number in range(1, SUB_SLICES)]
    part = _Part(claim, np.array(cuts, np.uint64))
    for window in _windows(ids):
        part.see(window)
    if part.strays:
        problems.add(
            f"{part.strays:,} of {len(ids):,} ids do not lie in its slice {claim}, such as "
            f"{part.example}: nobody loads them",
            block.shard,
            block.key,
        )
    if told is not None:
        _check_order(part, block, told, problems)


def _check_order(part: _Part, block: Block, told: PartRows, problems: Problems) -> None:
    if not part.ascending:
        text = "its ids are not sorted by slice position, but the sidecar says where rows begin"
        problems.add(text, block.shard, block.key)
        return
    wrong = np.flatnonzero(part.below != np.array(told.offsets[1:-1]))
    if len(wrong):
        first = int(wrong[0])
        problems.add(
            f"sub-slice {first + 1} of {SUB_SLICES} begins at row {part.below[first]}, but the "
            f"sidecar says {told.offsets[first + 1]}; offsets that are wrong: {len(wrong)}",
            block.shard,
            block.key,
        )


def _windows(ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(ids), _WINDOW):
        yield ids[start : start + _WINDOW]
