"""Counts ids that stand somewhere twice, in no more memory than they take themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


_WINDOW = 1 << 18


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
