"""Memory that costs nothing until it is touched.

Large allocations are anonymous mappings, whose kind of pages `_pages` chooses. Fresh mappings read
as zero, and pages that nothing touches take no memory, so tables may reserve more rows than they
will use.
"""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING

import torch

from ._pages import BLOCK, map_fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["zeros"]


@torch.inference_mode(mode=False)  # or what is made within it could not be changed outside of it
def zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return a tensor of zeros whose memory is taken when it is first touched.

    Raises:
        MemoryError: If there is no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < BLOCK or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory, start = map_fresh(size)
    # Not a part of a tensor of all of it: whoever saves a tensor saves its storage, all of it.
    exact = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
    return exact.view(dtype).view(tuple(shape))
