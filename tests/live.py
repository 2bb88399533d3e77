"""What tests of `Live` need: versions whose every value tells which one it is."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import tests.support  # noqa: F401  # imports numba, which no build() on an event loop should
from asyncloader import HashTable, Live
from tests.oracle import TableData, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from asyncloader import Event, LiveState, Model

T = TypeVar("T")

IDS = torch.arange(200)
TABLES = ("user", "item")


def publish(
    run: Path,
    version: int,
    *,
    name: str | None = None,
    when: float | None = None,
    ids: Tensor = IDS,
) -> Path:
    """Commit a version to a run folder: every value in it is its number, and so is its age.

    Args:
        run: The folder.
        version: Its number.
        name: Of its sub-folder.
        when: Its age instead, in seconds since 1970.
        ids: What its tables hold.
    """
    content = TableData(ids=ids, slots={"embedding": torch.full((len(ids), 4), float(version))})
    staged = run / f".{version}"
    write_checkpoint(
        staged, dict.fromkeys(TABLES, content), {"w": torch.full((64,), float(version))}
    )
    when = version if when is None else when
    os.utime(staged / "index", (when, when))
    path = run / (name or f"v{version}")
    if path.exists():
        shutil.rmtree(path)
    return staged.rename(path)


def damage(path: Path) -> None:
    """Cut a shard of a checkpoint short."""
    shard = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    os.truncate(shard, shard.stat().st_size - 8)


def build() -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    """Make what a version is loaded into."""
    return {name: HashTable([4], name=name) for name in TABLES}, {"w": torch.zeros(64)}


def version_in(model: Model) -> int:
    """Return the version that all values of a model are of.

    Fails if they are of several.
    """
    seen = {*model.tensors["w"].tolist()}
    for name in TABLES:
        seen.update(model.tables[name].lookup(IDS).flatten().tolist())
    assert len(seen) == 1, f"a mixture: {seen}"
    return int(seen.pop())


def serving(live: Live) -> int:
    """Return the version that whoever asks gets, looked up in all of it."""
    with live.use() as model:
        version = version_in(model)
        assert model.version in {f"v{version}", "same"}
        return version


def state(live: Live) -> LiveState:
    """Return its state, which the type checker must not believe to be what it was before."""
    return live.state


@dataclass
class Events:
    """Takes events in, and lets tests wait for them."""

    seen: list[Event] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, event: Event) -> None:
        self.seen.append(event)
        self._news.set()

    async def until(self, kind: type[T], **facts: object) -> T:
        """Return the first event of a kind about which all of this is true, seen or to come."""
        while True:
            for event in self.seen:
                if isinstance(event, kind) and facts.items() <= _facts(event).items():
                    return event
            self._news.clear()
            await self._news.wait()

    async def either(self, *kinds: type[Event]) -> Event:
        """Return the first event of any of some kinds, seen or to come."""
        while True:
            for event in self.seen:
                if isinstance(event, kinds):
                    return event
            await self.next()

    async def next(self) -> None:
        """Wait for another event."""
        self._news.clear()
        await self._news.wait()

    def kinds(self) -> list[str]:
        """Return what happened, in order."""
        return [f"{type(event).__name__} {event.version}" for event in self.seen]


def _facts(event: object) -> dict[str, Any]:
    names = getattr(type(event), "__dataclass_fields__", {})
    return {name: getattr(event, name) for name in names}


def live(
    run: Path | str,
    events: Events | None = None,
    build: Callable[[], Any] = build,
    **how: Any,  # noqa: ANN401  # of Live
) -> Live:
    """Return a service's model that follows quickly."""
    return Live(run, build, **{"poll": 0.01, "retry_pause": 0.01, "on_event": events, **how})


async def looked(it: Live) -> None:
    """Wait for two looks at the folder."""
    for _ in range(2):
        await it.resume()
        for _ in range(50):
            await asyncio.sleep(0.001)
