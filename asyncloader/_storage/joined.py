"""Several folders as one storage: a file's name begins with its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from .protocol import ThreadedStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .protocol import ReadInto


T = TypeVar("T")


class JoinedStorage(ThreadedStorage):
    """Reads `<path>/<file>` as `<file>` of the storage of that path.

    Args:
        storages: By path. They stay open as long as this one is used.
        location: What to call all of them.
    """

    def __init__(self, storages: Mapping[str, ThreadedStorage], location: str) -> None:
        self._storages = storages
        self._location = location

    def __repr__(self) -> str:
        return f"<JoinedStorage {len(self._storages)} folders>"

    @property
    def location(self) -> str:
        return self._location

    @property
    def lost(self) -> int:
        return sum(storage.lost for storage in self._storages.values())

    @property
    def retries(self) -> int:
        """How often one of the storages tried a failed read again."""
        return sum(getattr(storage, "retries", 0) for storage in self._storages.values())

    async def size(self, name: str, /) -> int:
        storage, file = self._of(name)
        return await storage.size(file)

    async def changed(self, names: Sequence[str], /) -> list[str]:
        """Say which files have changed; the folders are asked one after the other."""
        files: dict[str, list[str]] = {}
        for name in names:
            path, _, file = name.rpartition("/")
            files.setdefault(path, []).append(file)
        found = []
        for path, asked in files.items():
            found += [f"{path}/{file}" for file in await self._storages[path].changed(asked)]
        return found

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        storage, file = self._of(name)
        return await storage.readinto(file, offset, views)

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        storage, file = self._of(name)
        return await storage.on_thread(file, job)

    def _of(self, name: str) -> tuple[ThreadedStorage, str]:
        path, _, file = name.rpartition("/")
        return self._storages[path], file
