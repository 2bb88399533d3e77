"""Whether something fits into memory: the system says yes to everything, and kills later."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from asyncloader._sizes import size_text

__all__ = ["check_room", "free_memory"]

_FACT = re.compile(rb"^(MemAvailable|SwapFree): *([0-9]+) kB$", re.MULTILINE)


def check_room(location: str, nbytes: int, free: int | None) -> None:
    """Refuse what certainly does not fit.

    Raises:
        MemoryError: If so.
    """
    if free is not None and nbytes > free:
        raise MemoryError(f"{location} takes {size_text(nbytes)}, {size_text(free)} are free")


def free_memory(source: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes that this machine can still give, swap included; `None` if unknown."""
    with contextlib.suppress(OSError):  # on another system than Linux
        facts = dict(_FACT.findall(source.read_bytes()))
        if b"MemAvailable" in facts:
            return sum(int(kilobytes) << 10 for kilobytes in facts.values())
    return None
