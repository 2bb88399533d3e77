"""Memory that costs nothing until it is touched.

The first touch of fresh memory is the dearest part of a load: every 4 KiB page is a fault. Huge
pages make it about six times faster, so large allocations are anonymous mappings that ask for
them. Fresh mappings read as zero, and pages that nobody touches take no memory, so tables may
reserve more rows than they will use.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["zeros"]

_HUGE = 2 << 20
# Without it a mapping larger than memory and swap is refused, even if little of it is ever used.
# `mmap` has the constant from Python 3.13 on; the value is that of Linux on x86 and Arm.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if hasattr(mmap, "MADV_HUGEPAGE") else 0


@torch.inference_mode(mode=False)  # or what is made within it could not be changed outside of it
def zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return a tensor of zeros whose memory is taken when it is first touched.

    Raises:
        MemoryError: If there is no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _HUGE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(
            -1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        )
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {size} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE  # a huge page begins at a multiple of its size
    # Not a part of `whole`: whoever saves the tensor saves its storage, all of it.
    exact = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
    return exact.view(dtype).view(tuple(shape))
