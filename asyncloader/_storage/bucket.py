"""The objects under a prefix of an object store, by obstore, as a folder."""

from __future__ import annotations

import asyncio
import errno
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from asyncloader._addresses import HTTP

from .folder import Entry
from .stores import explained, identity_of, open_store

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Executor

    from obstore import ListResult, ObjectMeta
    from obstore.store import ObjectStore

    from asyncloader._addresses import Address


_READ_BYTES = 8 << 20
_RETRIES = 5


class Bucket:
    """A bucket, a container or a server; made in no time, its client when it is first asked.

    Args:
        address: Of anything in it.
        options: As `open_store` takes them.
    """

    def __init__(self, address: Address, options: Mapping[str, Any] | None) -> None:
        self._address = address
        self._options = options

    @cached_property
    def client(self) -> ObjectStore:
        """The client of obstore, which tries again by itself."""
        return open_store(self._address, self._options, read_bytes=_READ_BYTES, retries=_RETRIES)

    @property
    def lists(self) -> bool:
        """Whether it tells which objects there are: few servers of HTTP do, by WebDAV."""
        return self._address.store != HTTP


class BucketFolder:
    """The objects whose keys begin with a prefix and a slash. Nothing is there before all of it is.

    Args:
        bucket: Where they lie.
        url: Of the prefix.
        key: The prefix, without a slash at either end; may be empty.
    """

    shows_whole = True
    dates_folders = False

    def __init__(self, bucket: Bucket, url: str, key: str) -> None:
        self._bucket = bucket
        self._url = url
        self._key = key

    def __repr__(self) -> str:
        return f"<BucketFolder {self._url!r}>"

    @property
    def location(self) -> str:
        """The URL."""
        return self._url

    def above(self) -> BucketFolder:
        """Return the folder that this one is in; the bucket is in itself."""
        if not self._key:
            return self
        return BucketFolder(
            self._bucket, self._url.rpartition("/")[0], self._key.rpartition("/")[0]
        )

    def inside(self, name: str, /) -> BucketFolder:
        """Return a folder in this one."""
        return BucketFolder(self._bucket, f"{self._url}/{name}", self._at(name))

    def resolved(self) -> BucketFolder:
        """Return it as it is: a store has no links."""
        return self

    def stat(self, name: str, /) -> Entry | None:
        """Say what a name stands for: a folder is nothing."""
        import obstore  # noqa: PLC0415  # an extra

        if not (key := self._at(name)) or not _is_key(key):
            return None
        try:
            with explained(f"{self._url}/{name}"):
                return _entry(obstore.head(self._bucket.client, key))
        except FileNotFoundError:
            return None

    def files(self, name: str, /) -> dict[str, Entry]:
        """Return the objects directly under a prefix; one request for each thousand."""
        key, found = self._listed(name)
        return {one["path"][len(key) :]: _entry(one) for one in found["objects"]}

    def folders(self, name: str, /) -> list[str]:
        """Return the next parts of the keys under a prefix that have further parts."""
        key, found = self._listed(name)
        return [one[len(key) :].rstrip("/") for one in found["common_prefixes"]]

    def total(self, name: str, /) -> int:
        """Return the bytes of all objects beneath a prefix; one request for each thousand."""
        import obstore  # noqa: PLC0415  # an extra

        with explained(f"{self._url}/{name}"):
            pages = obstore.list(self._bucket.client, f"{self._at(name)}/")
            return sum(one["size"] for page in pages for one in page)

    def read(self, name: str, /, *, first: int | None = None, last: int | None = None) -> bytes:
        """Return a whole object, or at most so many of its first or last bytes."""
        import obstore  # noqa: PLC0415  # an extra

        client, key, url = self._bucket.client, self._at(name), f"{self._url}/{name}"
        if not _is_key(key):
            raise FileNotFoundError(errno.ENOENT, "no such object", url)
        with explained(url):
            if first is None and last is None:
                return bytes(obstore.get(client, key).bytes())
            try:
                # Azure knows no ranges from the end, so the beginning is tried for the whole.
                got = obstore.get(client, key, options={"range": (0, first or last or 1)})
                start = bytes(got.bytes())
            except obstore.exceptions.GenericError:
                if obstore.head(client, key)["size"]:  # of an empty one there is no range
                    raise
                return b""
            size, tag = got.meta["size"], got.meta["e_tag"]
            if last is None or size <= last:
                return start
            options: Any = {"range": (size - last, size), "if_match": tag}
            return bytes(obstore.get(client, key, options=options).bytes())

    async def aread(self, name: str, executor: Executor, /, *, last: int = -1) -> bytes:
        """Return a whole object, or its end."""
        read = partial(self.read, name, last=None if last < 0 else last)
        return await asyncio.get_running_loop().run_in_executor(executor, read)

    def _listed(self, name: str) -> tuple[str, ListResult[Any]]:
        """Return what keys begin with, and what is there."""
        import obstore  # noqa: PLC0415  # an extra

        key, url = self._at(name), f"{self._url}/{name}".rstrip("/")
        if not self._bucket.lists:
            raise OSError(errno.ENOTSUP, "a server of HTTP lists no names", url)
        if not _is_key(key):
            raise FileNotFoundError(errno.ENOENT, "no such folder", url)
        with explained(url):
            found = obstore.list_with_delimiter(self._bucket.client, key or None)
        if not found["objects"] and not found["common_prefixes"]:
            raise FileNotFoundError(errno.ENOENT, "no object has a key that begins so", url)
        return f"{key}/" if key else "", found

    def _at(self, name: str) -> str:
        return "/".join(part for part in (self._key, name) if part)


def _is_key(key: str) -> bool:
    """Say whether a store could have such a key: a name in a list of names may be any bytes."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(meta: ObjectMeta) -> Entry:
    return Entry(meta["size"], identity_of(meta), meta["last_modified"].timestamp())
