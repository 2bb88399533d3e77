"""Objects that are being written: streamed in parts, there at once or not at all."""

from __future__ import annotations

import errno
import threading
import weakref
from typing import TYPE_CHECKING, Self, TypeAlias

import numpy as np

from .store_errors import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obstore.store import ObjectStore


PART = 8 << 20
"""Bytes of a part, of which S3 wants 5 MiB at least, and 10,000 at most."""

Bytes: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint8]]"

_MOST_PARTS = 9_000
_STEP = 1 << 20
_IN_FLIGHT = 4  # parts of one object; the memory of all bounds them, too


class PartMemory:
    """The memory of the parts of all uploads of a bucket, and the lock that they share.

    obstore keeps a part's memory until the part has arrived, and lets go of it on threads of its
    own. More parts than uploads must have room, or each of them might wait to be filled.

    Attributes:
        parts: How many there may be at a time.
        news: Is told when one was let go.
    """

    def __init__(self, parts: int) -> None:
        # A lock that its holder may take again: letting go may happen anywhere.
        self.news = threading.Condition()
        self.parts = self._free = parts

    def take(self, nbytes: int) -> Bytes:
        """Return memory that counts until nothing refers to it; the caller has seen `is_free`."""
        with self.news:
            self._free -= 1
        part = np.empty(nbytes, np.uint8)
        weakref.finalize(part, self._let_go).atexit = False
        return part

    @property
    def is_free(self) -> bool:
        return self._free > 0

    def _let_go(self) -> None:
        with self.news:
            self._free += 1
            self.news.notify_all()


class Upload:
    """An object while it is being written; see `WritableFile`.

    Its bytes are sent in order: a write whose turn has not come waits. One that fits into a part is
    sent by one request, when it is synced. A longer one is sent by a thread, in parts, and is there
    once all of them are. What was sent of an upload that fails, or is given up, is removed.

    Args:
        client: Of the bucket.
        key: Of the object.
        url: For messages.
        memory: Of all uploads of the bucket.
        size: About how long it will be, in bytes.
    """

    def __init__(
        self, client: ObjectStore, key: str, url: str, memory: PartMemory, *, size: int
    ) -> None:
        self._client = client
        self._key = key
        self._url = url
        self._memory = memory
        self._news = memory.news
        self._part_bytes = max(PART, -(-size // _MOST_PARTS // _STEP) * _STEP)
        self._at = 0  # bytes that were taken
        self._part: Bytes | None = None
        self._filled = 0
        self._full: list[Bytes] = []  # for the thread
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ended = False  # no more bytes come
        self._given_up = False
        self._is_whole = False

    def write(self, offset: int, views: Sequence[memoryview], /) -> None:
        """Take all of `views`; waits until all bytes before `offset` were taken.

        Raises:
            OSError: If the upload failed, or was given up.
        """
        self._wait(lambda: offset == self._at)
        count = 0
        for view in views:
            self._take(np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8))
            count += view.nbytes
        with self._news:
            self._at += count
            self._news.notify_all()

    def _take(self, data: Bytes) -> None:
        while len(data):
            if self._part is not None and self._filled == self._part_bytes:
                self._hand_over()
            if self._part is None:
                self._wait(lambda: self._memory.is_free, then=self._begin_part)
            assert self._part is not None, "it was begun"
            count = min(len(data), self._part_bytes - self._filled)
            # `copyto`, unlike an assignment to a slice of a memoryview, lets other threads run.
            np.copyto(self._part[self._filled : self._filled + count], data[:count])
            self._filled += count
            data = data[count:]

    def _begin_part(self) -> None:
        self._part, self._filled = self._memory.take(self._part_bytes), 0

    def _hand_over(self) -> None:
        """Let the thread have the part, which is not the last one unless it is short."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._send, name="asyncloader-upload", daemon=True
            )
            self._thread.start()
        self._wait(lambda: not self._full, then=self._push)

    def _push(self) -> None:
        assert self._part is not None, "there is one"
        self._full.append(self._part[: self._filled])
        self._part = None
        self._news.notify_all()

    def _wait(self, is_so: Callable[[], object], *, then: Callable[[], object] = int) -> None:
        """Wait for something to be so, and do something before anything else can happen.

        Raises:
            OSError: If the upload failed, or was given up.
        """
        with self._news:
            self._news.wait_for(lambda: is_so() or self._given_up or self._error)
            if self._error is not None:
                raise self._error
            if self._given_up:
                raise OSError(errno.ECANCELED, "the upload was given up", self._url)
            then()

    def _send(self) -> None:
        """Upload, on the thread."""
        import obstore  # noqa: PLC0415  # an extra

        try:
            with explained(self._url):
                obstore.put(
                    self._client,
                    self._key,
                    _Parts(self),
                    chunk_size=self._part_bytes,
                    max_concurrency=_IN_FLIGHT,
                )
        except BaseException as error:  # noqa: BLE001  # raised by whoever waits
            with self._news:
                self._error = error
                self._news.notify_all()

    def next_part(self) -> Bytes | None:
        """Return a full part, on the thread; `None` after the last one."""
        with self._news:
            self._news.wait_for(lambda: self._full or self._ended or self._given_up)
            if self._given_up:
                raise _GivenUpError
            part = self._full.pop() if self._full else None
            self._news.notify_all()
            return part

    def sync(self) -> None:
        """Return when the object is there, whole; no write may follow.

        Raises:
            OSError: If the upload failed, or was given up.
        """
        import obstore  # noqa: PLC0415  # an extra

        if self._thread is None:
            data = b"" if self._part is None else self._part[: self._filled]
            self._wait(lambda: True)
            with explained(self._url):
                obstore.put(self._client, self._key, data, use_multipart=False)
        else:
            if self._part is not None:
                self._hand_over()
            self._wait(lambda: True, then=self._end)
            self._thread.join()
            self._wait(lambda: True)
        self._part, self._is_whole = None, True

    def _end(self) -> None:
        self._ended = True
        self._news.notify_all()

    def abandon(self) -> None:
        """Have all calls that wait fail; nothing more is sent. Any thread; waits for nothing."""
        with self._news:
            self._given_up = True
            self._news.notify_all()

    def close(self) -> None:
        """Remove what was sent, unless the object is whole."""
        if not self._is_whole:
            self.abandon()
            if self._thread is not None:
                self._thread.join()
        self._part = None
        self._full.clear()


class _GivenUpError(Exception):
    """Has obstore remove what it has sent."""


class _Parts:
    """The parts of an upload. No generator: the frame of that would keep the last part."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> memoryview:
        part = self._upload.next_part()
        if part is None:
            raise StopIteration
        return part.data
