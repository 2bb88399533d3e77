"""Where bytes come from."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from asyncloader._threads.call import StalledError, nbytes_of
from asyncloader.errors import CheckpointError, ReadError, ReadStalledError

from .opening import RefusedFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


T = TypeVar("T")
ReadInto: TypeAlias = "Callable[[int, Sequence[memoryview]], int]"

_STEP = 1 << 20
_LARGE = 64 << 10


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a storage has asked an object store for.

    Attributes:
        requests: How many there were; none to a disk.
        cached: Bytes that came from copies on the local disk instead.
    """

    requests: int = 0
    cached: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests + other.requests, self.cached + other.cached)


class Storage(Protocol):
    """Positional reads from the files of one checkpoint. Any number may run at once."""

    @property
    def location(self) -> str:
        """What to call the checkpoint in messages."""
        ...

    async def size(self, name: str, /) -> int:
        """Return the length of a file in bytes.

        Raises:
            OSError: If there is no such file, or it is nothing that can be read by position.
        """
        ...

    @property
    def lost(self) -> int:
        """Reads that were given up, though a thread that cannot be interrupted is still at them.

        What they were to write to may be written to at any time, and is not to be used again.
        """
        ...

    async def changed(self, names: Sequence[str], /) -> list[str]:
        """Say which files are gone, or others than when they were first asked for.

        Files that were written to since then are others: their length or time is.

        Raises:
            OSError: If the storage failed.
        """
        ...

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        """Fill `views`, one after the other, from `offset` on, and return the bytes read.

        Short reads are allowed; 0 means end of file. At most 1024 views. Once this has returned or
        raised, even `CancelledError`, nothing may write to the views any more, unless `lost` says
        that something may.

        Raises:
            OSError: If the storage failed.
        """
        ...


@runtime_checkable
class ThreadedStorage(Storage, Protocol):
    """A storage that reads on threads, and lends one for more than a single read.

    What is done with a few MiB as soon as they are read, on the same thread, finds them in the
    cache; and handing over to a thread costs more than many a read.
    """

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        """Return `job(read)`, run on a thread; `read(offset, views)` is `readinto` of the file.

        Once this has returned or raised, even `CancelledError`, the job is over, unless `lost` says
        that it is not.

        Raises:
            OSError: If the file cannot be opened.
        """
        ...


async def read_exactly(
    storage: Storage, name: str, offset: int, views: Sequence[memoryview]
) -> None:
    """Fill all of `views`.

    Raises:
        ReadError: If that failed; it names the whole byte range.
    """
    length = nbytes_of(views)
    left, done = list(views), 0
    while done < length:
        try:
            count = await storage.readinto(name, offset + done, left)
        except OSError as error:
            raise read_error(name, offset, length, error) from error
        if count == 0:
            raise _ends_early(name, offset, length, done)
        done += count
        if done < length:
            left = views_after(left, count)


def fill(read: ReadInto, name: str, offset: int, view: memoryview) -> None:
    """Fill all of a view, on a thread that a `ThreadedStorage` lends.

    Raises:
        ReadError: If that failed; it names the whole byte range.
    """
    done = 0
    while done < view.nbytes:
        try:
            count = read(offset + done, [view[done:]])
        except OSError as error:
            raise read_error(name, offset, view.nbytes, error) from error
        if count == 0:
            raise _ends_early(name, offset, view.nbytes, done)
        done += count


def read_error(name: str, offset: int, length: int, error: OSError) -> ReadError:
    """Return what to raise, from `error`, where a storage failed to deliver a byte range."""
    if error.errno == errno.EFAULT:
        problem = (
            "the memory that it was to fill cannot be written to: a file that is mapped read-only, "
            "say; load into a copy (`tensor.clone()`)"
        )
        return ReadError(name, offset, length, problem)
    kind = ReadStalledError if isinstance(error, StalledError) else ReadError
    return kind(name, offset, length, _in_words(error, name))


def _in_words(error: OSError, name: str) -> str:
    """Say what is wrong with a file that the message names already."""
    named = error.strerror and str(error.filename).rpartition("/")[2] == name
    text = str(error.strerror) if named else str(error)
    return ", ".join((text, *getattr(error, "__notes__", ())))


def opening_error(location: str, name: str, error: OSError) -> ReadError | CheckpointError:
    """Return what to raise, from `error`, where a file cannot be opened."""
    if isinstance(error, StalledError):
        return ReadStalledError(name, 0, 0, str(error))
    if isinstance(error, RefusedFileError):
        return CheckpointError(location, str(error), name)
    return CheckpointError(location, f"cannot be opened: {_in_words(error, name)}", name)


def _ends_early(name: str, offset: int, length: int, done: int) -> ReadError:
    problem = f"the file ends {length - done} bytes early; was it changed meanwhile?"
    return ReadError(name, offset, length, problem)


def views_after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what is left of the views once the first `count` bytes are filled."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
        count -= view.nbytes
    return []


def views_within(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the first `count` bytes of the views."""
    found = []
    for view in views:
        if count <= 0:
            break
        found.append(view[:count])
        count -= view.nbytes
    return found


def scatter(source: bytes | memoryview, views: Sequence[memoryview]) -> None:
    """Copy bytes to where they belong; the views together are as long."""
    begin = 0
    for view in views:
        piece = source[begin : begin + view.nbytes]
        if view.nbytes < _LARGE:
            view[:] = piece
        else:  # other threads run meanwhile
            np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(piece, np.uint8))
        begin += view.nbytes


async def read_small(storage: Storage, name: str, *, limit: int) -> bytearray:
    """Return a whole file of at most `limit` bytes.

    Raises:
        OSError: If it cannot be opened, or is larger than that.
        ReadError: If it cannot be read.
    """
    size = await storage.size(name)
    if size > limit:
        raise OSError(f"{size} bytes long, at most {limit} are read")
    try:
        return await read_text(storage, name, 0, size)
    except ValueError as error:
        raise OSError(str(error)) from error


async def read_text(storage: Storage, name: str, offset: int, length: int) -> bytearray:
    """Return a range of a file that is said to hold text.

    Memory grows with what has been read, and reading ends where it cannot be text: a file may be
    long and yet hold nothing, and then its length is no reason to take memory.

    Raises:
        ValueError: If there is a zero byte in it.
        ReadError: If it cannot be read.
    """
    text = bytearray()
    while len(text) < length:
        piece = bytearray(min(_STEP, length - len(text)))
        await read_exactly(storage, name, offset + len(text), [memoryview(piece)])
        if 0 in piece:
            raise ValueError(f"byte {offset + len(text) + piece.index(0)} is zero")
        text += piece
    return text
