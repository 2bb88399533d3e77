"""The objects under a prefix of an object store, by obstore, as a folder."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from .folder import Entry
from .store_errors import NO_BUCKET, explained
from .stores import identity_of
from .uploads import Upload

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor

    from obstore import ListResult, ObjectMeta, PutMode

    from .bucket import Bucket


_TRIES = 5
_PAUSE = 0.1


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
        files = {one["path"][len(key) :]: _entry(one) for one in found["objects"]}
        return {file: entry for file, entry in files.items() if file}

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
            size = got.meta["size"]
            if last is None or size <= last:
                return start
            options: Any = {"range": (size - last, size)}
            return bytes(obstore.get(client, key, options=options).bytes())

    async def aread(self, name: str, executor: Executor, /, *, last: int = -1) -> bytes:
        """Return a whole object, or its end."""
        read = partial(self.read, name, last=None if last < 0 else last)
        return await asyncio.get_running_loop().run_in_executor(executor, read)

    def names(self, name: str, /) -> list[str]:
        """Return the next parts of the keys under a prefix."""
        try:
            key, found = self._listed(name)
        except FileNotFoundError as error:
            if error.strerror == NO_BUCKET:
                raise
            return []  # a prefix is there, though nothing begins with it
        prefixes = (one[len(key) :].rstrip("/") + "/" for one in found["common_prefixes"])
        names = (one["path"][len(key) :] for one in found["objects"])
        # An empty one is an object that stands for the folder itself, as some tools make it.
        return sorted([*prefixes, *filter(None, names)])

    def create(self, name: str, /, *, size: int = 0) -> Upload:
        """Begin an object, which takes the place of another one once it is synced."""
        bucket = self._bucket
        return Upload(
            bucket.uploading, self._at(name), f"{self._url}/{name}", bucket.memory, size=size
        )

    def copy(self, source: str, target: str, /) -> None:
        """Copy an object within the store."""
        client = self._bucket.uploading
        import obstore  # noqa: PLC0415  # an extra

        with explained(f"{self._url}/{target}"):
            obstore.copy(client, self._at(source), self._at(target))

    def put(self, name: str, data: bytes, /, *, over: Entry | None) -> str:
        """Write a small object, if it is what it was."""
        url, mode = f"{self._url}/{name}", _mode(over)
        unsure: OSError | None = None
        for number in range(_TRIES):
            try:
                with explained(url):
                    return self._bucket.put_once(self._at(name), data, mode)
            except OSError as error:
                # A try without an answer may have been carried out: then this one is refused.
                if unsure is not None and (entry := self._ours(name, data)) is not None:
                    return entry.tag
                if error.errno == errno.EIO:
                    unsure = error
                elif unsure is not None:
                    raise unsure from error
                else:
                    raise
            time.sleep(_PAUSE * 2**number)
        assert unsure is not None, "else there was an answer"
        raise unsure

    def _ours(self, name: str, data: bytes) -> Entry | None:
        """Return what has a name, if it is as long and holds this."""
        with contextlib.suppress(OSError):
            entry = self.stat(name)
            if entry is not None and self.read(name) == data:
                return entry
        return None

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
        """Remove an object; fine if it is not there, as after a request whose answer was lost."""
        client = self._bucket.client
        import obstore  # noqa: PLC0415  # an extra

        with explained(f"{self._url}/{name}"), contextlib.suppress(FileNotFoundError):
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
    _, tag, *_ = over.identity
    if over.version is None:
        return {"e_tag": str(tag)}
    return {"e_tag": str(tag), "version": over.version}


def _is_key(key: str) -> bool:
    """Say whether a store could have such a key: a name in a list of names may be any bytes."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(meta: ObjectMeta) -> Entry:
    modified = meta["last_modified"].timestamp()
    return Entry(meta["size"], identity_of(meta), modified, meta["version"])
