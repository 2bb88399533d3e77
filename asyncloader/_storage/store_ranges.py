"""Reads ranges of a store's objects: by URLs that its client signs, or by the client itself."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import math
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .flight import end_of
from .opening import FileChangedError
from .protocol import scatter, views_within
from .ranges import RangeReader
from .store_errors import explained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from obstore import Bytes
    from obstore.store import ObjectStore

    from .flight import Flight, Target


_SIGNED = timedelta(hours=1)
_PATIENCE = 10.0  # seconds for a signature, which some stores are asked for
_YES = {"1", "true", "on", "yes", "y"}  # as obstore reads a text


class StoreRanges:
    """Reads by signed URLs: bytes go straight to their place then.

    Where no URL can be signed, or the store refuses one, the client reads: with one copy more, and
    the memory for it. So it is with credentials that hold no key (a SAS token of Azure, a
    workload's identity without the permission to sign), with buckets that anybody may read, with
    policies against signed URLs, and with keys of encryption that go along in headers.

    Belongs to the event loop on which it is made; `read` is for threads.

    Args:
        store: The client.
        prefix: What all keys begin with.
        options: obstore's `client_options`, for the reads by URLs.
    """

    def __init__(
        self, store: ObjectStore, prefix: str, options: Mapping[str, Any] | None = None
    ) -> None:
        from obstore.store import GCSStore, HTTPStore  # noqa: PLC0415  # an extra

        # obstore puts Google's keys into URLs as they are.
        self._quote = quote if isinstance(store, GCSStore) else str
        self._store = store
        self._prefix = prefix
        self._root = store.url.rstrip("/") if isinstance(store, HTTPStore) else None
        self._by_url = RangeReader(options)
        skips = str(getattr(store, "config", {}).get("skip_signature", "")).lower()
        self._signs = skips not in _YES
        self._asked: list[None] = []
        self._loop = asyncio.get_running_loop()

    @property
    def requests(self) -> int:
        """How many there were."""
        return len(self._by_url.asked) + len(self._asked)

    @property
    def resumed(self) -> int:
        """How often a read went on at the last byte, after a connection had broken."""
        return self._by_url.resumed

    def close(self) -> None:
        """Close all connections."""
        self._by_url.close()

    async def url_of(self, name: str) -> tuple[str | None, float]:
        """Return the URL of an object, and until when it holds; `None` if the client reads."""
        import obstore  # noqa: PLC0415  # an extra

        key = self._prefix + name
        if self._root is not None:
            return f"{self._root}/{quote(key)}", math.inf
        until = time.monotonic() + _SIGNED.total_seconds() / 2
        if self._signs:
            store: Any = self._store
            try:
                async with asyncio.timeout(_PATIENCE):
                    return await obstore.sign_async(store, "GET", self._quote(key), _SIGNED), until
            except (obstore.exceptions.BaseError, OSError, ValueError, TypeError):
                self._signs = False
        return None, math.inf

    def read(
        self, target: Target, offset: int, views: Sequence[memoryview], flight: Flight, /
    ) -> int:
        """Fill views; see `Ranges`."""
        if target.url is not None and (self._signs or self._root is not None):
            try:
                return self._by_url.read(target, offset, views, flight)
            except PermissionError:
                if self._root is not None:
                    raise
                self._signs = False
        end = end_of(target, offset, views)
        if end <= offset:
            return 0
        flight.reading.unsure = True  # the gate goes by the thread's time
        coming = asyncio.run_coroutine_threadsafe(self._get(target, offset, end), self._loop)
        try:
            flight.check(coming.cancel)
            data = memoryview(coming.result())
            flight.check(None)
        except concurrent.futures.CancelledError as error:
            raise OSError(errno.ECANCELED, "the read was given up") from error
        finally:
            coming.cancel()  # it may have begun when the read was over already
        scatter(data, views_within(views, end - offset))
        return end - offset

    async def _get(self, target: Target, offset: int, end: int) -> Bytes:
        import obstore  # noqa: PLC0415  # an extra

        self._asked.append(None)
        options: Any = {"range": (offset, end)}
        if target.tag is not None:
            options["if_match"] = target.tag
        with explained(target.name):
            key = self._prefix + target.name
            result = await obstore.get_async(self._store, key, options=options)
            data = await result.bytes_async()
        tag = result.meta["e_tag"]
        if result.meta["size"] != target.size or target.tag not in {None, tag}:
            raise FileChangedError(target.name)
        if len(data) != end - offset:
            raise OSError(errno.EIO, f"{len(data)} bytes came of [{offset}, {end})")
        return data
