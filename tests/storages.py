"""A storage to put between a load and its files: `Runtime(wrap_storage=…)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncloader._storage.protocol import ReadInto, ThreadedStorage

__all__ = ["Through"]


@dataclass
class Through:
    """Passes everything on to another storage; what is derived from it does something besides."""

    inner: ThreadedStorage

    @property
    def location(self) -> str:
        return self.inner.location

    @property
    def lost(self) -> int:
        return self.inner.lost

    async def size(self, name: str, /) -> int:
        return await self.inner.size(name)

    async def changed(self, names: Sequence[str], /) -> list[str]:
        return await self.inner.changed(names)

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        return await self.inner.readinto(name, offset, views)

    async def on_thread(self, name: str, job: Callable[[ReadInto], Any], /) -> Any:  # noqa: ANN401  # the job's
        return await self.inner.on_thread(name, job)
