"""A checkpoint in an object store, by obstore: S3, Google Cloud Storage, Azure, HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from asyncloader._threads.call import Reading, StalledError
from asyncloader._threads.jobs import for_each

from .cached_ranges import CachedRanges
from .flight import Flight, Reader, Target
from .kept import KeptFile, same_copy
from .opening import FileChangedError, RefusedFileError
from .protocol import Traffic, scatter
from .store_errors import explained
from .stores import identity_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from obstore import ObjectMeta
    from obstore.store import ObjectStore

    from asyncloader._threads.disk import Disk

    from .cache import Cache
    from .flight import Ranges
    from .protocol import ReadInto
    from .store_ranges import StoreRanges


T = TypeVar("T")

# In one request with what an object is: most headers, and all of `index`, need no other then.
_START = 256 << 10
_STARTS = 32  # kept at a time
_LOOKERS = 8


class ObjectStorage:
    """The objects under one prefix, read by ranges.

    A read is one request, of exactly the object that was found first under its name: another one
    is an error. Its bytes go straight to their place, on a thread. Cancelling ends a request at
    once. Belongs to one event loop.

    Args:
        store: A client of obstore.
        prefix: What the keys of all files begin with, its slash included; may be empty.
        location: What to call the checkpoint in messages.
        disk: Has threads read.
        ranges: Reads.
        cache: Copies on the local disk; `None` if there shall be none.
        stall_timeout: Seconds that one request may take; `None` leaves it to the client.
        seen: The identities of objects when they were first found.
    """

    gap_bytes: Final = 1 << 20  # as much comes in the time of a request
    attempts: Final = 9  # 12 s in the mean: a store that throttles wants that

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        location: str,
        *,
        disk: Disk,
        ranges: StoreRanges,
        cache: Cache | None = None,
        stall_timeout: float | None = None,
        seen: dict[str, tuple[object, ...]] | None = None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._location = location
        self._disk = disk
        self._stall_timeout = stall_timeout
        self._seen = {} if seen is None else seen
        self._ranges = ranges
        self._cache = cache
        self._cached = None if cache is None else CachedRanges(ranges, cache, location)
        self._reads: Ranges = self._cached or ranges
        self._targets: dict[str, Target] = {}
        self._starts: dict[str, bytes] = {}  # the first bytes of objects that were found last
        self._absent: dict[str, str] = {}  # and why
        self._finding: dict[str, asyncio.Lock] = {}
        self._asked = 0

    def __repr__(self) -> str:
        return f"<ObjectStorage {self._location!r}: {self.traffic().requests} requests>"

    def traffic(self) -> Traffic:
        """Return what there was of requests, and of bytes from the cache."""
        return Traffic(
            self._asked + self._ranges.requests, 0 if self._cache is None else self._cache.taken
        )

    @property
    def location(self) -> str:
        """The URL."""
        return self._location

    @property
    def lost(self) -> int:
        """Reads that were given up: their memory may be written to at any time."""
        return self._disk.lost

    async def __aenter__(self) -> Self:
        if self._cache is not None:
            await self._at_cache(self._cache.open)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._cache is not None:
                await self._at_cache(self._cache.close)
                self._cache.tell()
        finally:
            self._ranges.close()
            self._disk.close()

    async def _at_cache(self, job: Callable[[], None]) -> None:
        with contextlib.suppress(StalledError):  # nothing fails because of a copy
            await self._disk.call(job, label="the cache")

    @property
    def resumed(self) -> int:
        """How often a read went on at the last byte, after a connection had broken."""
        return self._ranges.resumed

    async def entries(self) -> dict[str, int | None]:
        """Return the names directly under the prefix, and their lengths; `None` of a folder.

        Raises:
            OSError: If the store does not list them: servers of HTTP do not.
        """
        import obstore  # noqa: PLC0415  # an extra

        if isinstance(self._store, obstore.store.HTTPStore):  # few know WebDAV
            raise OSError(errno.ENOTSUP, "a server of HTTP lists no names")
        with explained(self._location):
            found = await self._ask(
                obstore.list_with_delimiter_async(self._store, self._prefix.rstrip("/") or None)
            )
        folders = dict.fromkeys(found["common_prefixes"])
        files = {one["path"]: one["size"] for one in found["objects"]}
        all_ = {**folders, **files}
        return {key.removeprefix(self._prefix).rstrip("/"): size for key, size in all_.items()}

    async def find_ahead(self, names: Iterable[str]) -> None:
        """Find objects side by side, before each of them is asked for; what fails, fails then."""
        await asyncio.gather(*map(self._find, names), return_exceptions=True)

    async def size(self, name: str, /) -> int:
        """Return the length of an object in bytes."""
        return (await self._find(name)).size

    async def changed(self, names: Sequence[str], /) -> list[str]:
        """Say which objects are gone, or others than when they were first found; see `Storage`."""
        import obstore  # noqa: PLC0415  # an extra

        found: list[str] = []

        async def look(name: str) -> None:
            try:
                with explained(name):
                    meta = await self._ask(obstore.head_async(self._store, self._prefix + name))
            except FileNotFoundError:
                found.append(name)
            else:
                if self._seen.get(name, identity_of(meta)) != identity_of(meta):
                    found.append(name)

        await for_each(names, look, workers=_LOOKERS, name="asyncloader-look")
        return sorted(found)

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        """Fill `views` from `offset` on; see `Storage`."""
        target = await self._find(name)
        reading = Reading(name, offset, views)
        start = self._starts.get(name, b"")
        if offset + reading.length <= len(start):
            scatter(start[offset : offset + reading.length], views)
            return reading.length
        job = partial(self._reads.read, target, offset, views, Flight(reading))
        return await self._disk.call(job, reading=reading)

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        """Run `job` on one of the disk's threads; see `ThreadedStorage`."""
        target = await self._find(name)
        reading = Reading(name)

        read = Reader(self._reads, target, Flight(reading))
        return await self._disk.call(partial(job, read), reading=reading)

    async def hold_open(self, name: str, ranges: Sequence[tuple[int, int]]) -> KeptFile:
        """Open the local copy of an object, for one that outlives this storage.

        Args:
            name: The object.
            ranges: What will be needed of it there: (first byte, one past the last).

        Raises:
            OSError: If there can be no copy.
        """
        cached, target = self._copies(name), await self._find(name)

        def opened() -> KeptFile:
            fd = cached.hold(target, ranges)
            return KeptFile(self.location, name, fd, os.fstat(fd), identity=same_copy)

        return await self._disk.call(opened, label=name)

    async def ensure(self, name: str) -> None:
        """Make sure that what is needed of an object is in its copy; raises `OSError` if not."""
        cached, target = self._copies(name), await self._find(name)
        await self._disk.call(partial(cached.ensure, target), label=name)

    def _copies(self, name: str) -> CachedRanges:
        if self._cached is None:
            problem = "rows stay on a disk of this machine only: give cache_dir"
            raise RefusedFileError(errno.EINVAL, problem, name)
        return self._cached

    async def _find(self, name: str) -> Target:
        # Kept for good: a second lock for one name would let it be found twice.
        async with self._finding.setdefault(name, asyncio.Lock()):
            found = self._targets.get(name)
            if name in self._absent:  # so it is for this load
                raise FileNotFoundError(errno.ENOENT, self._absent[name], self._url(name))
            if found is None:
                found = self._targets[name] = await self._first_look(name)
            elif time.monotonic() > found.until:
                url, until = await self._ranges.url_of(name)
                found = self._targets[name] = replace(found, url=url, until=until)
            return found

    async def _first_look(self, name: str) -> Target:
        """Find an object, and read its first bytes, in one request."""
        import obstore  # noqa: PLC0415  # an extra

        key, known = self._prefix + name, self._cached is not None and self._cached.knows(name)
        try:
            with explained(self._url(name)):
                if known:
                    meta, start = await self._ask(obstore.head_async(self._store, key)), b""
                else:
                    meta, start = await self._started(key)
        except FileNotFoundError as error:
            self._absent[name] = error.strerror or ""
            raise
        url, until = await self._ranges.url_of(name)
        if self._seen.setdefault(name, identity_of(meta)) != identity_of(meta):
            raise FileChangedError(name)
        tag = meta["e_tag"]
        strong = None if tag is None or tag.startswith("W/") else tag
        target = Target(name, url, until, meta["size"], strong)
        if len(self._starts) >= _STARTS:
            del self._starts[next(iter(self._starts))]
        self._starts[name] = start
        if self._cached is not None and start:
            await self._at_cache(partial(self._cached.keep, target, start))
        return target

    async def _started(self, key: str) -> tuple[ObjectMeta, bytes]:
        """Return what an object is, and its first bytes."""
        import obstore  # noqa: PLC0415  # an extra

        try:
            options: Any = {"range": (0, _START)}
            result = await self._ask(obstore.get_async(self._store, key, options=options))
            return result.meta, bytes(await self._in_time(result.bytes_async()))
        except obstore.exceptions.GenericError:
            meta = await self._ask(obstore.head_async(self._store, key))
            if meta["size"]:  # else no range of it can be asked for
                raise
            return meta, b""

    def _url(self, name: str) -> str:
        return f"{self._location}/{name}"

    async def _ask(self, request: Awaitable[T]) -> T:
        self._asked += 1
        return await self._in_time(request)

    async def _in_time(self, answer: Awaitable[T]) -> T:
        """Await an answer, for no longer than was agreed."""
        try:
            async with asyncio.timeout(self._stall_timeout):
                return await answer
        except TimeoutError as error:
            raise StalledError(self._stall_timeout or 0.0) from error
