"""Reads ranges of objects from copies on the local disk, and keeps there what it has to ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cache import Object
from .cached_copy import pieces_of
from .flight import Flight, Ranges, Target, end_of
from .protocol import views_within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncloader._threads.call import Reading

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

    def knows(self, name: str) -> bool:
        """Say whether there was a copy of an object, maybe an older one."""
        return self._cache.knows(self._url(name))

    def keep(self, target: Target, data: bytes) -> None:
        """Keep the first bytes of an object."""
        if target.tag is not None:
            views = [memoryview(data)]
            self._cache.keep(self._object(target, target.tag), 0, views, pieces_of(0, views))

    def read(
        self,
        target: Target,
        offset: int,
        views: Sequence[memoryview],
        reading: Reading,
        flight: Flight,
        /,
    ) -> int:
        """Fill views; see `Ranges`."""
        last = end_of(target, offset, views)
        if target.tag is None or offset >= last:
            return self._inner.read(target, offset, views, reading, flight)
        what = self._object(target, target.tag)
        reading.unsure = True  # the gate goes by the thread's time
        if count := self._cache.read(what, offset, views_within(views, last - offset)):
            return count
        end = min(self._cache.next_after(what, offset), last)
        views = views_within(views, end - offset)
        count = self._inner.read(target, offset, views, reading, flight)
        views = views_within(views, count)
        pieces = pieces_of(offset, views)
        if not reading.is_lost:  # once it is, the memory is another's, and digests would be of that
            self._cache.keep(what, offset, views, pieces)
        return count

    def _object(self, target: Target, tag: str) -> Object:
        return Object(self._url(target.name), tag, target.size)

    def _url(self, name: str) -> str:
        return f"{self._location}/{name}"
