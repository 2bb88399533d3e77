"""What one checkpoint holds, by name, for any number of calls."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.manifest import Manifest
from asyncloader._checkpoint.stored import places_of, stored_names, stored_tensor
from asyncloader._planning.hints import did_you_mean
from asyncloader._threads.jobs import run_jobs

from .runtime import Hold
from .session import in_time, open_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from asyncloader._checkpoint.header import ShardHeader
    from asyncloader._checkpoint.index import Catalog, Place
    from asyncloader._checkpoint.stored import Stored
    from asyncloader.options import ReadOptions

    from .session import Session


_log = logging.getLogger(__name__)

_NAMED = 20
_GUESSED = 5
# As many as `did_you_mean` compares; names that begin alike are offered first.
_LIKELY = 200


class Contents:
    """The names of one checkpoint, and the headers that were needed so far.

    Every call has a session: the one that `async with` holds open, or one of its own. All of them
    see the same files: one that is replaced after it was first opened is an error.

    Args:
        path: As for `open_session`.
        options: For each session; `timeout` is for each call.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._seen: dict[str, tuple[int, ...]] = {}
        self._held: Hold[Session] | None = None
        self._catalog: Catalog | None = None
        self._headers: dict[str, ShardHeader] = {}
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<Contents: {len(self._headers)} headers known>"

    async def __aenter__(self) -> None:
        if self._held is not None:
            raise RuntimeError(f"{self._path}: is open already")
        options = replace(self._options, timeout=None)
        self._held = await Hold.open(open_session(self._path, options, seen=self._seen))

    async def __aexit__(self, *_: object) -> None:
        held, self._held = self._held, None
        if held is not None:
            await held.close()

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        """Lend a session for the length of the block."""
        held = self._held
        if held is None or held.loop is not asyncio.get_running_loop():
            async with open_session(self._path, self._options, seen=self._seen) as session:
                yield session
            return
        with held.use() as session:
            async with in_time(self._path, self._options.timeout) as watched:
                watched.append(session.disk)
                async with session.explaining():
                    yield session

    async def catalog(self, session: Session) -> Catalog:
        """Return which names there are.

        Raises:
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            ReadError: If the storage failed.
        """
        async with session.lock:  # or many calls at once would all read it
            if self._catalog is None:
                catalog = await session.catalog()
                if catalog.sidecar is not None:  # `unread` may be large, and is for tables only
                    catalog = replace(catalog, sidecar=replace(catalog.sidecar, unread=None))
                self._catalog = catalog
            return self._catalog

    async def find(self, session: Session, names: Iterable[str]) -> list[Stored]:
        """Return what is stored under each name, in their order.

        Raises:
            TypeError: If a name is no text.
            KeyError: If there are no such names; it lists them.
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            ReadError: If the storage failed.
        """
        kernels = session.threads.kernels
        catalog = await self.catalog(session)
        [places] = await run_jobs(kernels, [partial(_places, session.location, catalog, names)])
        shards = sorted({place.shard for found in places.values() for place in found})
        async with session.lock:
            unknown = [shard for shard in shards if shard not in self._headers]
            if unknown:
                manifest = await session.manifest(catalog, unknown)
                self._headers |= manifest.headers
                self._warn(session.location, manifest.warnings)
        manifest = Manifest(session.location, catalog, self._headers)
        [stored] = await run_jobs(
            kernels, [lambda: [stored_tensor(manifest, name) for name in places]]
        )
        return stored

    def _warn(self, location: str, warnings: Iterable[str]) -> None:
        """Log each warning once."""
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                _log.warning("%s: %s", location, warning)


def _places(
    location: str, catalog: Catalog, names: Iterable[object]
) -> dict[str, tuple[Place, ...]]:
    places: dict[str, tuple[Place, ...]] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names are text, got {name!r}")
        places[name] = places_of(catalog, name)
    unknown = [name for name, found in places.items() if not found]
    if unknown:
        raise KeyError(_complaint(location, catalog, unknown))
    return places


def _complaint(location: str, catalog: Catalog, unknown: Sequence[str]) -> str:
    names = stored_names(catalog)
    listed = [
        f"{name!r}{_hint(catalog, names, name) if number < _GUESSED else ''}"
        for number, name in enumerate(unknown[:_NAMED])
    ]
    more = f" and {len(unknown) - _NAMED:,} more" if len(unknown) > _NAMED else ""
    return (
        f"not in {location}: {', '.join(listed)}{more}; "
        "CheckpointReader.tensor_names() lists what there is"
    )


def _hint(catalog: Catalog, names: Sequence[str], name: str) -> str:
    if name in catalog.tables:
        slots = ", ".join(repr(f"{name}@{slot}") for slot in catalog.tables[name])
        return f" (a table: read {slots})"
    return hint_for(name, names)


def hint_for(name: str, names: Sequence[str]) -> str:
    """Return in brackets which of `names` was meant by another name, or nothing."""
    likely = heapq.nlargest(_LIKELY, names, partial(_in_common, name))
    return did_you_mean([name], likely)[name]


def _in_common(one: str, other: str) -> int:
    return len(os.path.commonprefix((one, other)))  # noqa: RUF071  # any text, not only paths
