"""Whether something fits into memory: the system says yes to everything, and kills later."""

from __future__ import annotations

from asyncloader._memory.allowance import address_space
from asyncloader._memory.allowance import free_memory as _free_memory
from asyncloader._memory.sizes import size_text


def check_room(location: str, nbytes: int, free: int | None) -> None:
    """Refuse what certainly does not fit.

    Raises:
        MemoryError: If so.
    """
    if free is not None and nbytes > free:
        raise MemoryError(f"{location} takes {size_text(nbytes)}, {size_text(free)} are free")


def free_memory() -> int | None:
    """Return the bytes that this process can still get, swap included; `None` if unknown."""
    return _free_memory(address_space=address_space())
