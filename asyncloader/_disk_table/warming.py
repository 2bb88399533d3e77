"""What a table whose rows stay on the disk does for its cache: to be warm before it is asked."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._table.schema import as_ids
from asyncloader._threads.blocking import run_blocking

if TYPE_CHECKING:
    import os

    from asyncloader._table.schema import Encoding, Slot

    from .lookups import Lookups
    from .places import DiskState


EMBEDDING = "embedding"


class Warming(torch.nn.Module):
    """The cache of a table; see `DiskTable`, which makes all of the attributes."""

    name: str
    _encoding: Encoding
    _slots: dict[str, Slot]
    _lookups: Lookups
    _state: DiskState
    _is_closed: bool
    _owns_readers: bool

    @property
    def cache_bytes(self) -> int:
        """Memory for hot rows of its own, in bytes; 0 if there is none, or it is a runtime's."""
        return self._lookups.cache_bytes if self._owns_readers else 0

    def prefetch(self, ids: torch.Tensor, slot: str = EMBEDDING, child: str | None = None) -> None:
        """Begin to read rows that will soon be asked for, and wait for nothing.

        They come into the cache of hot rows, if there is one and they earn a place there, and into
        the page cache, unless `direct_io` goes past it. A failure is only counted (`stats()`).

        Raises:
            KeyError: If there is no such slot or child.
            TypeError: If the ids are not integers.
        """
        wanted = self._encoding.encode(as_ids(ids)[0], child)
        self._lookups.prefetch(self._held(), self._slot(slot), wanted)

    async def awarm(
        self, ids: torch.Tensor, slot: str = EMBEDDING, child: str | None = None
    ) -> None:
        """Bring rows into the cache of hot rows, as if they had been asked for.

        Raises:
            KeyError: If there is no such slot or child.
            TypeError: If the ids are not integers.
            ReadError: As of `alookup`.
            RuntimeError: If the table has no cache, or was not loaded.
        """
        self._check_cache()
        wanted = self._encoding.encode(as_ids(ids)[0], child)
        await self._lookups.warm(self._held(), self._slot(slot), wanted)

    async def asave_hot(self, path: str | os.PathLike[str]) -> int:
        """Write the ids of the rows in the cache to a file, for `aload_hot`; return how many.

        A file that is there is replaced once the new one is whole. It holds ids, no rows.

        Raises:
            OSError: If it cannot be written.
        """
        from .hot_file import write_hot  # noqa: PLC0415  # numpy's files, which few need

        self._check_cache()
        state = self._held()

        def write() -> int:
            return write_hot(path, self._lookups.hot(state), self._encoding)

        return await self._lookups.on_thread(write, str(path))

    async def aload_hot(self, path: str | os.PathLike[str]) -> int:
        """Bring the rows of a file of `asave_hot` into the cache; return how many ids it has.

        The rows are read from the checkpoint that the table has now. Slots, children and ids that
        are not there are passed over.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is no such file.
            ReadError: As of `alookup`.
        """
        from .hot_file import read_hot  # noqa: PLC0415  # as above

        self._check_cache()
        reading = partial(read_hot, path, self._encoding)
        hot = await self._lookups.on_thread(reading, str(path))
        for slot, (ids, counts) in hot.items():
            if slot in self._slots:
                await self._lookups.warm(self._held(), self._slots[slot], ids, counts)
        return sum(len(ids) for ids, _ in hot.values())

    def warm(self, ids: torch.Tensor, slot: str = EMBEDDING, child: str | None = None) -> None:
        """Do as `awarm`, and block the calling thread meanwhile."""
        run_blocking(partial(self.awarm, ids, slot, child))

    def save_hot(self, path: str | os.PathLike[str]) -> int:
        """Do as `asave_hot`, and block the calling thread meanwhile."""
        return run_blocking(partial(self.asave_hot, path))

    def load_hot(self, path: str | os.PathLike[str]) -> int:
        """Do as `aload_hot`, and block the calling thread meanwhile."""
        return run_blocking(partial(self.aload_hot, path))

    def _held(self) -> DiskState:
        """Return the version that there is.

        Raises:
            RuntimeError: If the table was closed: zeros would look like rows.
        """
        if self._is_closed:
            raise RuntimeError(f"table {self.name!r} is closed: load it again")
        return self._state

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            known = ", ".join(self._slots)
            raise KeyError(f"table {self.name!r} has no slot {name!r}, only {known}")
        return self._slots[name]

    def _check_cache(self) -> None:
        if not self._lookups.cache_bytes:
            problem = "has no cache for rows: make it with cache_bytes=, or a runtime that has one"
            raise RuntimeError(f"table {self.name!r} {problem}")
        if not self._held().layers:
            raise RuntimeError(f"table {self.name!r} has no rows yet: load it first")
