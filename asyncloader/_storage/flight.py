"""What a range is read of, and a request for it that is under way."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from asyncloader._threads.call import nbytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncloader._threads.call import Reading


_SIGN_OF_LIFE = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class Target:
    """An object, as it was first found.

    Attributes:
        name: For messages.
        url: It may hold a signature: in no message. `None` if the store's client has to read.
        until: When the signature wants to be made anew, by the monotonic clock.
        size: In bytes.
        tag: What the server calls this very content; `None` if it does not.
    """

    name: str
    url: str | None
    until: float
    size: int
    tag: str | None


class Flight:
    """What a thread is at, which the event loop may end.

    Attributes:
        reading: What it reads, and where to.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        reading.interrupt = self.interrupt
        self._stop: Callable[[], object] | None = None
        self._over = threading.Event()

    def interrupt(self) -> None:
        """Have the thread come back with an error, at once."""
        self._over.set()
        if self._stop is not None:
            self._stop()

    def check(self, stop: Callable[[], object] | None) -> None:
        """Note what ends the present wait, if there is one; raise if the request was given up."""
        self._stop = stop
        if self._over.is_set():  # noted first, looked at second; `interrupt` does it the other way
            raise OSError(errno.ECANCELED, "the read was given up")

    def rest(self, seconds: float) -> None:
        """Wait, on the thread; raise if the request is given up meanwhile."""
        self._over.wait(seconds)
        self.check(None)


class Ranges(Protocol):
    """Reads ranges of objects, on threads."""

    def read(
        self, target: Target, offset: int, views: Sequence[memoryview], flight: Flight, /
    ) -> int:
        """Fill views from `offset` on, as far as one request goes; return the bytes read.

        Raises:
            FileChangedError: If it is another object by now.
            OSError: If that failed.
        """
        ...


class Reader:
    """Reads an object for a job on a thread that is lent: see `ThreadedStorage`."""

    def __init__(self, ranges: Ranges, target: Target, flight: Flight) -> None:
        self._ranges = ranges
        self._target = target
        self._flight = flight

    def __call__(self, offset: int, views: Sequence[memoryview], /) -> int:
        """Fill views from `offset` on."""
        self._flight.reading.begin(offset, views)
        return self._ranges.read(self._target, offset, views, self._flight)

    def rest(self, seconds: float) -> None:
        """Wait before the next try: the storage has answered, so it is no stall."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._flight.reading.begun += 1
            self._flight.rest(min(left, _SIGN_OF_LIFE))


def end_of(target: Target, offset: int, views: Sequence[memoryview]) -> int:
    """Return where a read of an object ends that is to fill views."""
    return min(offset + nbytes_of(views), target.size)


def shut(sock: socket.socket) -> None:
    """Have whoever waits for a connection wait no longer."""
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)
