"""What a checkpoint holds, by name; names and headers are remembered."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from asyncloader._checkpoint.header import ShardHeader
    from asyncloader._checkpoint.index import Catalog, Place
    from asyncloader._checkpoint.stored import Stored

    from .session import Session


_log = logging.getLogger(__name__)

_NAMED = 20
_GUESSED = 5
# As many as `did_you_mean` compares; names that begin alike are offered first.
_LIKELY = 200


class Contents:
    """The names of one checkpoint, and the headers that were needed so far.

    Works with any session of that checkpoint, one after the other or several at once.
    """

    def __init__(self) -> None:
        self._catalog: Catalog | None = None
        self._headers: dict[str, ShardHeader] = {}
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<Contents: {len(self._headers)} headers known>"

    async def catalog(self, session: Session) -> Catalog:
        """Return which names there are.

        Raises:
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            ReadError: If the storage failed.
        """
        async with session.lock:  # or many calls at once would all read it
            if self._catalog is None:
                self._catalog = _kept(await session.catalog())
            return self._catalog

    async def find(self, session: Session, names: Iterable[str]) -> list[Stored]:
        """Return what is stored under each name, in their order.

        Raises:
            TypeError: If a name is no text.
            KeyError: If there are no such names; it lists them.
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            ReadError: If the storage failed.
        """
        pool = session.threads.kernels
        catalog = await self.catalog(session)
        locate = partial(_locate, session.location, catalog, names)
        [places] = await run_jobs(pool, [locate])
        shards = sorted({place.shard for found in places.values() for place in found})
        manifest = await self._manifest(session, catalog, shards)
        [stored] = await run_jobs(
            pool, [lambda: [stored_tensor(manifest, name) for name in places]]
        )
        return stored

    async def _manifest(
        self, session: Session, catalog: Catalog, shards: Sequence[str]
    ) -> Manifest:
        async with session.lock:
            unknown = [shard for shard in shards if shard not in self._headers]
            if unknown:
                manifest = await session.manifest(catalog, unknown)
                self._headers |= manifest.headers
                self._warn(session.location, manifest.warnings)
        return Manifest(session.location, catalog, self._headers)

    def _warn(self, location: str, warnings: Iterable[str]) -> None:
        """Say of each thing that is odd, once."""
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                _log.warning("%s: %s", location, warning)


def _kept(catalog: Catalog) -> Catalog:
    """Return a catalog without what only loads of tables ask for, and what may be large."""
    if catalog.sidecar is None:
        return catalog
    return replace(catalog, sidecar=replace(catalog.sidecar, unread=None))


def _locate(
    location: str, catalog: Catalog, names: Iterable[str]
) -> Mapping[str, tuple[Place, ...]]:
    found = {name: places_of(catalog, name) for name in map(_checked, names)}
    unknown = [name for name, places in found.items() if not places]
    if unknown:
        raise KeyError(_complaint(location, catalog, unknown))
    return found


def _checked(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"names are text, got {name!r}")
    return name


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
    """Return in brackets which name was meant, or nothing.

    Args:
        name: The one that is not there.
        names: Those that are.
    """
    likely = heapq.nlargest(_LIKELY, names, partial(_in_common, name))
    return did_you_mean([name], likely)[name]


def _in_common(one: str, other: str) -> int:
    return len(os.path.commonprefix((one, other)))  # noqa: RUF071  # any text, not only paths
