"""A folder that counts what is done to it, and can be told to go wrong at any point."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncloader import HashTable, Saver
from asyncloader._storage.local_folder import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from torch import Tensor

    from asyncloader import SaveReport
    from asyncloader._storage.folder import Entry, Folder, WritableFile


@dataclass
class WatchedFile:
    """A file whose every call is counted."""

    folder: WatchedFolder
    name: str
    file: WritableFile

    def write(self, offset: int, views: Sequence[memoryview], /) -> None:
        with self.folder.call(f"write {self.name}") as how:
            if how == "half":
                self.file.write(offset, [views[0][: views[0].nbytes // 2]])
                self.folder.give_up()
            self.file.write(offset, views)

    def sync(self) -> None:
        with self.folder.call(f"sync {self.name}"):
            self.file.sync()

    def abandon(self) -> None:
        self.file.abandon()

    def close(self) -> None:
        self.file.close()  # fails for nobody: descriptors are let go whatever it returns
        with self.folder.call(f"close {self.name}"):
            pass


@dataclass
class WatchedFolder:
    """`LocalFolder`, and what was asked of it."""

    real: LocalFolder
    shows_whole = False
    dates_folders = True
    writes_in_order = False
    fault: Callable[[int, str], str | None] = lambda _number, _what: None
    """Gets the number of the call and what it is. Raises to fail it before it takes effect; returns
    `after` to `give_up` when it has, `half` when half of a write has, `None` to let it be."""

    give_up: Callable[[], None] = lambda: None
    calls: list[str] = field(default_factory=list)
    label: str = ""
    """Begins the name of each call."""

    @classmethod
    def at(cls, path: Path, fault: Callable[[int, str], str | None]) -> WatchedFolder:
        return cls(LocalFolder(path), fault)

    @property
    def location(self) -> str:
        return self.real.location

    @contextlib.contextmanager
    def call(self, what: str) -> Iterator[str | None]:
        """Count a call, and let it fail if it shall."""
        what = self.label + what
        self.calls.append(what)
        how = self.fault(len(self.calls) - 1, what)
        yield how
        if how == "after":
            self.give_up()

    def above(self) -> WatchedFolder:
        """Return the folder that this one is in; calls of both are counted together."""
        above = LocalFolder(Path(self.location).parent)
        return WatchedFolder(above, self.fault, self.give_up, self.calls, "run: ")

    def inside(self, name: str, /) -> WatchedFolder:
        """Return a folder in this one; calls of both are counted together."""
        real = self.real.inside(name)
        return WatchedFolder(real, self.fault, self.give_up, self.calls, f"{self.label}{name}: ")

    def make(self, name: str, /) -> None:
        with self.call(f"make {name}"):
            self.real.make(name)

    def names(self, name: str, /) -> list[str]:
        with self.call(f"names {name}"):
            return self.real.names(name)

    def create(self, name: str, /, *, size: int = 0) -> WatchedFile:
        with contextlib.ExitStack() as unless_it_works:
            with self.call(f"create {name}"):
                file = self.real.create(name, size=size)
                unless_it_works.callback(file.close)
            unless_it_works.pop_all()
        return WatchedFile(self, name, file)

    def resolved(self) -> Folder:
        return self.real.resolved()

    def stat(self, name: str, /) -> Entry | None:
        with self.call(f"stat {name}"):
            return self.real.stat(name)

    def files(self, name: str, /) -> dict[str, Entry]:
        with self.call(f"files {name}"):
            return self.real.files(name)

    def folders(self, name: str, /) -> list[str]:
        with self.call(f"folders {name}"):
            return self.real.folders(name)

    def total(self, name: str, /) -> int:
        with self.call(f"total {name}"):
            return self.real.total(name)

    def read(self, name: str, /, *, first: int | None = None, last: int | None = None) -> bytes:
        with self.call(f"read {name}"):
            return self.real.read(name, first=first, last=last)

    async def aread(self, name: str, executor: Executor, /, *, last: int = -1) -> bytes:
        with self.call(f"read {name}"):
            return await self.real.aread(name, executor, last=last)

    def size(self, name: str, /) -> int:
        with self.call(f"size {name}"):
            return self.real.size(name)

    def changed_at(self, name: str, /) -> float:
        with self.call(f"changed_at {name}"):
            return self.real.changed_at(name)

    def move(self, source: str, target: str, /) -> None:
        with self.call(f"move {source} {target}"):
            self.real.move(source, target)

    def remove(self, name: str, /) -> None:
        with self.call(f"remove {name}"):
            self.real.remove(name)

    def remove_folder(self, name: str, /) -> None:
        with self.call(f"remove {name}/"):
            self.real.remove_folder(name)

    def sync(self, name: str, /) -> None:
        with self.call(f"sync {name}/"):
            self.real.sync(name)

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        with self.call("hold"):
            pass
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
    return await saver._asave(saver._now(), lambda: folder)


_KINDS = {
    r"\.saving-[^/ ]+": "staged",
    r"model-\d+-of-\d+\.safetensors": "shard",
    r"(part|failed)-\d+": "part",
    r"(tensorkey|torch_rank_weights_embs_table_multi_shard|asyncloader)\.json": "text",
}


FAILURES = ("once", "once, after it took effect", "for good")
"""How calls fail."""


def sites(calls: Sequence[str], *, every: bool, share: int = 0, shares: int = 1) -> list[int]:
    """Return the numbers of the calls to fail: the first of each kind, and the last of all; or all.

    Calls are of one kind if they do the same to a file of the same role, at the same place. Of a
    test with `shares` variants or more, each may fail a share of the kinds: all fail in some.
    """
    if every:
        return list(range(len(calls)))
    first: dict[str, int] = {}
    for number, call in enumerate(calls):
        kind = call
        for pattern, role in _KINDS.items():
            kind = re.sub(pattern, role, kind)
        first.setdefault(kind, number)
    return sorted({*first.values(), len(calls) - 1})[share % shares :: shares]


def content(path: Path) -> dict[str, bytes]:
    """Return all that readers look at in a folder: its files, but for what is staged."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
