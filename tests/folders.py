"""A folder that counts what is done to it, and can be told to go wrong at any point."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncloader import HashTable, Saver
from asyncloader.storage import LocalFolder
from asyncloader.streaming import Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from asyncloader import SaveReport
    from asyncloader.storage import WritableFile


@dataclass
class WatchedFile:
    """A file whose every call is counted."""

    folder: WatchedFolder
    name: str
    file: WritableFile

    def write(self, offset: int, views: Sequence[memoryview], /) -> None:
        if self.folder.step(f"write {self.name}") == "half":
            half = views[0][: views[0].nbytes // 2]
            self.file.write(offset, [half])
            self.folder.give_up()
        self.file.write(offset, views)

    def sync(self) -> None:
        self.folder.step(f"sync {self.name}")
        self.file.sync()

    def close(self) -> None:
        self.file.close()  # fails for nobody: descriptors are let go whatever it returns
        self.folder.step(f"close {self.name}")


@dataclass
class WatchedFolder:
    """`LocalFolder`, and what was asked of it."""

    real: LocalFolder
    fault: Callable[[int, str], str | None] = lambda _number, _what: None
    """Gets the number of the call and what it is. Raises to fail it; returns `half` to have half of
    a write written before `give_up`."""

    give_up: Callable[[], None] = lambda: None
    calls: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, path: Path, fault: Callable[[int, str], str | None]) -> WatchedFolder:
        return cls(LocalFolder(path), fault)

    @property
    def location(self) -> str:
        return self.real.location

    def step(self, what: str) -> str | None:
        self.calls.append(what)
        return self.fault(len(self.calls) - 1, what)

    def make(self, name: str, /) -> None:
        self.step(f"make {name}")
        self.real.make(name)

    def names(self, name: str, /) -> list[str]:
        self.step(f"names {name}")
        return self.real.names(name)

    def create(self, name: str, /) -> WatchedFile:
        self.step(f"create {name}")
        return WatchedFile(self, name, self.real.create(name))

    def read(self, name: str, /) -> bytes:
        self.step(f"read {name}")
        return self.real.read(name)

    def size(self, name: str, /) -> int:
        self.step(f"size {name}")
        return self.real.size(name)

    def age(self, name: str, than: str, /) -> float:
        self.step(f"age {name}")
        return self.real.age(name, than)

    def move(self, source: str, target: str, /) -> None:
        self.step(f"move {source} {target}")
        self.real.move(source, target)

    def remove(self, name: str, /) -> None:
        self.step(f"remove {name}")
        self.real.remove(name)

    def remove_folder(self, name: str, /) -> None:
        self.step(f"remove {name}/")
        self.real.remove_folder(name)

    def sync(self, name: str, /) -> None:
        self.step(f"sync {name}/")
        self.real.sync(name)

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        self.step("hold")
        with self.real.hold() as alone:
            yield alone


async def save_into(
    folder: WatchedFolder,
    tables: Mapping[str, HashTable],
    tensors: Mapping[str, Tensor],
    **options: Any,  # noqa: ANN401  # of Saver
) -> SaveReport:
    """Save into a folder of one's own, which `Saver` does not take."""
    saver = Saver(path=folder.location, hashtables=tables, tensors=tensors, **options)
    snapshots = [table.snapshot() for table in tables.values()]
    return await saver._save(snapshots, Meter(0), folder)


def content(path: Path) -> dict[str, bytes]:
    """Return all that readers look at in a folder: its files, but for what is staged."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
