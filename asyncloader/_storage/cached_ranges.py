"""Reads ranges of objects from copies on the local disk, and keeps there what it has to ask for."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from .cache import Object
from .flight import Flight, Ranges, Target, end_of
from .opening import RefusedFileError
from .protocol import scatter, views_within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .cache import Cache


class CachedRanges:
    """Takes from a cache what it has. A read ends where that changes.

    Args:
        inner: Reads what is not there.
        cache: The copies. Objects without a strong ETag have none: another one could take its
            place unnoticed.
        location: What comes before the names of objects in their URLs.
    """

    def __init__(self, inner: Ranges, cache: Cache, location: str) -> None:
        self._inner = inner
        self._cache = cache
        self._location = location
        self._local = threading.local()

    def knows(self, name: str) -> bool:
        """Say whether there was a copy of an object, maybe an older one."""
        return self._cache.knows(self._url(name))

    def keep(self, target: Target, data: bytes) -> None:
        """Keep the first bytes of an object."""
        if target.tag is not None:
            views = [memoryview(data)]
            self._cache.keep(self._object(target, target.tag), 0, views)

    def hold(self, target: Target, ranges: Sequence[tuple[int, int]]) -> int:
        """Return a descriptor of an object's copy, in which these bytes will be needed.

        Raises:
            OSError: If there can be none.
        """
        if target.tag is None:
            problem = "its server sends no strong ETag, so no copy of it is kept: download it"
            raise RefusedFileError(errno.ENOTSUP, problem, target.name)
        return self._cache.hold(self._object(target, target.tag), ranges)

    def ensure(self, target: Target) -> None:
        """Make sure that what is needed of an object is in its copy.

        Raises:
            OSError: If it is not.
        """
        assert target.tag is not None, "its copy is held"
        self._cache.ensure(self._object(target, target.tag))

    def read(
        self, target: Target, offset: int, views: Sequence[memoryview], flight: Flight, /
    ) -> int:
        """Fill views; see `Ranges`."""
        last = end_of(target, offset, views)
        if target.tag is None or offset >= last:
            return self._inner.read(target, offset, views, flight)
        what, length = self._object(target, target.tag), last - offset
        flight.reading.unsure = True  # the gate goes by the thread's time
        # Of several views, some may be one memory: that of the gaps between what is wanted.
        apart = len(views) == 1
        found = views_within(views, length) if apart else [self._buffer(length)]
        if not (count := self._cache.read(what, offset, found)):
            end = min(self._cache.next_after(what, offset), last)
            found, apart = [self._buffer(end - offset)], False
            count = self._inner.read(target, offset, found, flight)
            kept = views_within(found, count)
            self._cache.keep(what, offset, kept)
        if not apart:
            flight.check(None)
            scatter(found[0][:count], views_within(views, count))
        return count

    def _buffer(self, nbytes: int) -> memoryview:
        """Return memory of the thread's own: nobody else changes it before it is kept."""
        held: memoryview | None = getattr(self._local, "held", None)
        if held is None or held.nbytes < nbytes:
            held = self._local.held = memoryview(bytearray(nbytes))
        return held[:nbytes]

    def _object(self, target: Target, tag: str) -> Object:
        return Object(self._url(target.name), tag, target.size)

    def _url(self, name: str) -> str:
        return f"{self._location}/{name}"
