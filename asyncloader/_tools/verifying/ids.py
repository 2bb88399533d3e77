"""Checks whether ids lie in the slice of their block, and are in order."""

from __future__ import annotations

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


# Ids looked at together: that takes a few MB besides them.
_WINDOW = 1 << 18


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
        block: The block that holds them.
        told: Their order, if the sidecar says something of it.
        problems: Receives strays and disorder.
    """
    strays = example = 0
    for window in _windows(ids):
        outside = claim.strays(window)
        count = int(np.count_nonzero(outside))
        if count and not strays:
            example = int(window[int(np.argmax(outside))])
        strays += count
    if strays:
        text = f"{strays:,} of {len(ids):,} ids do not lie in its slice {claim}, such as {example}"
        problems.add(f"{text}: no load takes them", block.shard, block.key)
    if told is not None and (text := _disorder(ids, told)):
        problems.add(text, block.shard, block.key)


def _disorder(ids: NDArray[np.int64], told: PartRows) -> str:
    """Say where ids are in another order than the sidecar says."""
    cuts, last = np.array(told.cuts, np.uint64), np.uint64(0)
    below = np.zeros(len(cuts), np.int64)  # how many positions are below each cut
    for window in _windows(ids):
        positions = window.view(np.uint64) % np.uint64(told.slice.size)
        if positions[0] < last or np.any(positions[1:] < positions[:-1]):
            return "its ids are not sorted by slice position, but the sidecar says where rows begin"
        below += np.searchsorted(positions, cuts)
        last = positions[-1]
    wrong = np.flatnonzero(below != np.array(told.offsets[1:-1])).tolist()
    if not wrong:
        return ""
    first = wrong[0]
    return (
        f"sub-slice {first + 1} of {SUB_SLICES} begins at row {below[first]}, but the sidecar says "
        f"{told.offsets[first + 1]}; offsets that are wrong: {len(wrong)}"
    )


def _windows(ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(ids), _WINDOW):
        yield ids[start : start + _WINDOW]


def count_duplicates(ids: NDArray[np.int64]) -> tuple[int, int]:
    """Sort ids where they stand; return how many came before, and one of them (or 0)."""
    ids.sort()
    count = example = 0
    for start in range(0, len(ids) - 1, _WINDOW):
        window = ids[start : start + _WINDOW + 1]
        same = window[1:] == window[:-1]
        found = int(np.count_nonzero(same))
        if found and not count:
            example = int(window[int(np.argmax(same))])
        count += found
    return count, example
