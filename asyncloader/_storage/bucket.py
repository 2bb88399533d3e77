"""The objects under a prefix of an object store, by obstore, as a folder."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from asyncloader._addresses import HTTP

from .folder import Entry
from .stores import explained, identity_of, open_store
from .uploads import PartMemory, Upload

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from concurrent.futures import Executor

    from obstore import ListResult, ObjectMeta, PutMode
    from obstore.store import ObjectStore

    from asyncloader._addresses import Address


_READ_BYTES = 8 << 20
_RETRIES = 5
_PAUSE = 0.1
_SPARE_PARTS = 4


class Bucket:
    """A bucket, a container or a server; made in no time, its client when it is first asked.

    Args:
        address: Of anything in it.
        options: As `open_store` takes them.
        uploads: Objects that are written at a time.

    Attributes:
        memory: Of all uploads, 8 MiB for each of them, and 32 MiB more.
    """

    def __init__(
        self, address: Address, options: Mapping[str, Any] | None, *, uploads: int = 1
    ) -> None:
        self._address = address
        self._options = options
        self.memory = PartMemory(uploads + _SPARE_PARTS)

    @cached_property
    def client(self) -> ObjectStore:
        """The client of obstore, which tries again by itself."""
        return open_store(self._address, self._options, read_bytes=_READ_BYTES, retries=_RETRIES)

    def put_once(self, key: str, data: bytes, mode: PutMode) -> str:
        """Write an object, and return its ETag. Tried once: of two tries one would be refused.

        Raises:
            FileExistsError: If the condition does not hold.
        """
        client = self._trying_once  # says it if obstore is not there
        import obstore  # noqa: PLC0415  # an extra

        try:
            result = obstore.put(client, key, data, mode=mode)
        except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as no:
            raise FileExistsError(errno.EEXIST, "written to by another", key) from no
        return str(result["e_tag"]).strip('"')

    @cached_property
    def _trying_once(self) -> ObjectStore:
        return open_store(self._address, self._options, read_bytes=_READ_BYTES)

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
    writes_in_order = True

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
        client = self._bucket.client
        import obstore  # noqa: PLC0415  # an extra

        if not (key := self._at(name)) or not _is_key(key):
            return None
        try:
            with explained(f"{self._url}/{name}"):
                return _entry(obstore.head(client, key))
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
        client = self._bucket.client
        import obstore  # noqa: PLC0415  # an extra

        with explained(f"{self._url}/{name}"):
            pages = obstore.list(client, f"{self._at(name)}/")
            return sum(one["size"] for page in pages for one in page)

    def read(self, name: str, /, *, first: int | None = None, last: int | None = None) -> bytes:
        """Return a whole object, or at most so many of its first or last bytes."""
        client, key, url = self._bucket.client, self._at(name), f"{self._url}/{name}"
        import obstore  # noqa: PLC0415  # an extra

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

    def names(self, name: str, /) -> list[str]:
        """Return the next parts of the keys under a prefix."""
        try:
            key, found = self._listed(name)
        except FileNotFoundError:
            return []  # a prefix is there, though nothing begins with it
        prefixes = (one[len(key) :].rstrip("/") + "/" for one in found["common_prefixes"])
        return sorted([*prefixes, *(one["path"][len(key) :] for one in found["objects"])])

    def create(self, name: str, /, *, size: int = 0) -> Upload:
        """Begin an object, which takes the place of another one once it is synced."""
        bucket = self._bucket
        return Upload(
            bucket.client, self._at(name), f"{self._url}/{name}", bucket.memory, size=size
        )

    def put(self, name: str, data: bytes, /, *, over: Entry | None) -> str:
        """Write a small object, if it is what it was."""
        url, mode = f"{self._url}/{name}", _mode(over)
        for number in range(_RETRIES):
            try:
                with explained(url):
                    return self._bucket.put_once(self._at(name), data, mode)
            except FileExistsError:
                # If an answer was lost before, it may be ours.
                if not number or self.read(name) != data:
                    raise
                break
            except OSError as error:
                if error.errno != errno.EIO or number == _RETRIES - 1:
                    raise
            time.sleep(_PAUSE * 2**number)
        entry = self.stat(name)
        return "" if entry is None else entry.tag

    def size(self, name: str, /) -> int:
        """Return the length of an object in bytes."""
        entry = self.stat(name)
        if entry is None or entry.size is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self._url}/{name}")
        return entry.size

    def changed_at(self, name: str, /) -> float:
        """Return when an object under a prefix was last written."""
        _, found = self._listed(name)
        return max((_entry(one).modified for one in found["objects"]), default=0.0)

    def remove(self, name: str, /) -> None:
        """Remove an object; fine for most stores if it is not there."""
        client = self._bucket.client
        import obstore  # noqa: PLC0415  # an extra

        with explained(f"{self._url}/{name}"):
            obstore.delete(client, self._at(name))

    def make(self, name: str, /) -> None:
        """Do nothing: a prefix need not be made."""

    def remove_folder(self, name: str, /) -> None:
        """Do nothing: a prefix is gone with its last object."""

    def sync(self, name: str, /) -> None:
        """Do nothing: what a store has said to have, it has."""

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        """Hold nothing: conditions of `put` keep others from what is decided by it."""
        yield True

    def _listed(self, name: str) -> tuple[str, ListResult[Any]]:
        """Return what keys begin with, and what is there."""
        client, key = self._bucket.client, self._at(name)
        url = f"{self._url}/{name}".rstrip("/")
        import obstore  # noqa: PLC0415  # an extra

        if not self._bucket.lists:
            raise OSError(errno.ENOTSUP, "a server of HTTP lists no names", url)
        if not _is_key(key):
            raise FileNotFoundError(errno.ENOENT, "no such folder", url)
        with explained(url):
            found = obstore.list_with_delimiter(client, key or None)
        if not found["objects"] and not found["common_prefixes"]:
            raise FileNotFoundError(errno.ENOENT, "no object has a key that begins so", url)
        return f"{key}/" if key else "", found

    def _at(self, name: str) -> str:
        return "/".join(part for part in (self._key, name) if part)


def _mode(over: Entry | None) -> PutMode:
    if over is None:
        return "create"
    _, tag, _ = over.identity
    return {"e_tag": str(tag)}


def _is_key(key: str) -> bool:
    """Say whether a store could have such a key: a name in a list of names may be any bytes."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(meta: ObjectMeta) -> Entry:
    return Entry(meta["size"], identity_of(meta), meta["last_modified"].timestamp())
