"""Checks where the blocks of a shard lie: one behind the other, within the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from asyncloader.errors import CheckpointError, TruncatedShardError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .blocks import Blocks


def check_layout(
    location: str, blocks: Blocks, start: int, size: int
) -> tuple[int, tuple[str, int] | None]:
    """Return where the last block ends, and the first gap; raise if two overlap, or one is outside.

    Blocks without bytes have to stand between others, too.
    """
    by_offset = np.lexsort((blocks.nbytes, blocks.offsets))
    begins = blocks.offsets[by_offset]
    ends = begins + blocks.nbytes[by_offset]
    _check_bounds(location, blocks, by_offset[ends > begins], size)
    before = np.concatenate(([start], ends[:-1]))
    gaps = (begins != before).nonzero()[0]
    end = int(ends[-1]) if len(ends) else start
    if not len(gaps):
        return end, None
    return end, (list(blocks)[by_offset[gaps[0]]], int(before[gaps[0]]))


def _check_bounds(location: str, blocks: Blocks, by_offset: NDArray[np.int64], size: int) -> None:
    """Raise if two blocks overlap, or one lies outside of the file; those without bytes cannot."""
    begins = blocks.offsets[by_offset]
    ends = begins + blocks.nbytes[by_offset]
    wrong = (begins[1:] < ends[:-1]).nonzero()[0] + 1
    beyond = (ends > size).nonzero()[0]
    if not len(wrong) and not len(beyond):
        return
    keys = list(blocks)
    first = min([*wrong[:1].tolist(), *beyond[:1].tolist()])
    block = blocks[keys[by_offset[first]]]
    end = block.offset + block.nbytes
    if first in wrong[:1]:
        problem = (
            f"bytes [{block.offset}, {end}) overlap those of {keys[by_offset[first - 1]]!r}, "
            f"which end at {ends[first - 1]}"
        )
        raise CheckpointError(location, problem, block.shard, block.key)
    raise TruncatedShardError(location, block.shard, block.key, block.offset, end, size)
