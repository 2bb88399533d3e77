"""What a range is read of, and a request for it that is under way."""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from asyncloader._threads.call import nbytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncloader._threads.call import Reading


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
    """A thread's request under way, which the event loop may end."""

    def __init__(self) -> None:
        self._stop: Callable[[], object] | None = None
        self._is_over = False

    def interrupt(self) -> None:
        """Have the thread come back with an error, at once."""
        self._is_over = True
        if self._stop is not None:
            self._stop()

    def check(self, stop: Callable[[], object] | None) -> None:
        """Note what ends the present wait, if there is one; raise if the request was given up."""
        self._stop = stop
        if self._is_over:  # noted first, looked at second; `interrupt` does it the other way
            raise OSError(errno.ECANCELED, "the read was given up")


class Ranges(Protocol):
    """Reads ranges of objects, on threads."""

    def read(
        self,
        target: Target,
        offset: int,
        views: Sequence[memoryview],
        reading: Reading,
        flight: Flight,
        /,
    ) -> int:
        """Fill views from `offset` on, as far as one request goes; return the bytes read.

        Raises:
            FileChangedError: If it is another object by now.
            OSError: If that failed.
        """
        ...


def end_of(target: Target, offset: int, views: Sequence[memoryview]) -> int:
    """Return where a read of an object ends that is to fill views."""
    return min(offset + nbytes_of(views), target.size)


def shut(sock: socket.socket) -> None:
    """Have whoever waits for a connection wait no longer."""
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)
