"""A job for a thread, and all that is known of it: the one that waits, and memory, depend on it."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence
    from queue import SimpleQueue


T = TypeVar("T")

_LARGE = 1 << 20
"""Bytes. Shorter reads do not keep other threads from the processors."""

_NBYTES = attrgetter("nbytes")


class StalledError(TimeoutError):
    """A thread has not come back in time, and may be waiting for ever.

    Attributes:
        seconds: How long it was waited for.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"no answer from the storage for {self.seconds:g} seconds (stall_timeout), so it was "
            "given up; is the disk or the network there?"
        )


class Reading:
    """What a thread reads, where to, and what it notices.

    Several reads, one after the other, are one reading of a thread that is lent: it calls `begin`
    before each of them.

    Args:
        name: The file.
        offset: The first byte.
        views: The memory that is filled; `None` says that `begin` will tell.

    Attributes:
        is_large: Whether the gate counts it among the reads of which only some are of use.
        waited: Whether it had to wait for bytes that were not in memory yet.
        unsure: Whether the system could not say that; then its thread's time tells.
        is_lost: Whether the one that waited was let go: other loads may have the memory by now.
    """

    __slots__ = (
        "begun",
        "is_large",
        "is_lost",
        "length",
        "name",
        "offset",
        "unsure",
        "views",
        "waited",
    )

    def __init__(
        self, name: str = "", offset: int = 0, views: Sequence[memoryview] | None = None
    ) -> None:
        self.name = name
        self.offset = offset
        self.views: Sequence[memoryview] = views or ()
        self.length: int = sum(map(_NBYTES, self.views))
        self.is_large = views is None or self.length >= _LARGE
        self.waited = not self.is_large  # so that nobody looks whether a short one has to
        self.unsure = self.is_lost = False
        self.begun = 0
        """Reads that were begun; each is waited for by itself."""

    def __str__(self) -> str:
        if not self.views:
            return self.name
        return f"{self.name}: bytes [{self.offset}, {self.offset + self.length})"

    def begin(self, offset: int, views: Sequence[memoryview]) -> None:
        """Note the next read of this thread.

        Raises:
            RuntimeError: If nobody waits for it any more.
        """
        self.offset, self.views = offset, views
        self.length = sum(map(_NBYTES, views))
        self.begun += 1
        if self.is_lost:  # noted first, looked at second; `Call.give_up` does it the other way
            raise RuntimeError("the read was given up")


class Call(Generic[T]):
    """A job for a thread.

    Args:
        job: What to do.
        reading: What it reads, if it does.
        is_counted: Whether the gate counts it; not where it uses no processor to speak of.
        label: What it is about, for messages.
        late: Gets the result if it comes after the call was given up.

    Attributes:
        future: The result, or what was raised; a `StalledError` if it was given up.
        thread: The one that has begun with it, or `None`.
        begun: When that was, by the gate's clock.
        is_over: Whether that thread is done with it, given up or not.
        is_struck: Whether that thread was replaced. It takes no other call.
    """

    __slots__ = (
        "_reads",
        "begun",
        "future",
        "is_counted",
        "is_large",
        "is_over",
        "is_slow",
        "is_struck",
        "job",
        "label",
        "late",
        "number",
        "queue",
        "reading",
        "thread",
        "waited",
    )

    def __init__(
        self,
        job: Callable[[], T],
        *,
        reading: Reading | None = None,
        is_counted: bool = True,
        label: object = "",
        late: Callable[[T], object] | None = None,
    ) -> None:
        self.job: Callable[[], T] | None = job
        self.reading = reading
        self.is_large = reading is not None and reading.is_large
        self.is_counted = is_counted
        self.label = label
        self.late = late
        self.future: Future[T] = Future()
        self.thread: threading.Thread | None = None
        self.begun = 0.0
        self.is_over = self.is_struck = self.is_slow = False
        self.queue: SimpleQueue[Call[Any] | None]
        self.number = 0
        self.waited = 0.0
        self._reads = 0

    def withdraw(self) -> None:
        """Take it back if no thread has begun with it, and let go of its memory."""
        if self.future.cancel():
            self.job = self.reading = None

    def passed(self, seconds: float) -> float:
        """Note that time has passed; return for how long the storage has given no answer."""
        if self.thread is None or self.is_over:
            return 0.0
        if self.reading is not None and self._reads != self.reading.begun:
            self._reads = self.reading.begun
            self.waited = 0.0
        self.waited += seconds
        return self.waited

    def give_up(self, seconds: float) -> bool:
        """Let the one that waits go; say whether there was still something to wait for."""
        try:
            self.future.set_exception(StalledError(seconds))
        except InvalidStateError:
            return False
        if self.reading is not None:
            self.reading.is_lost = True
            _lost.add(self)
            if self.is_over:  # the thread notes its own part before it looks at ours
                _lost.discard(self)
        return True

    def succeed(self, result: T) -> None:
        """Note, on its thread, what it results in."""
        self._end()
        try:
            self.future.set_result(result)
        except InvalidStateError:
            if self.late is not None:
                self.late(result)

    def fail(self, error: BaseException) -> None:
        """Note, on its thread, what it raised."""
        self._end()
        with contextlib.suppress(InvalidStateError):  # no caller wants to know any more
            self.future.set_exception(error)

    def _end(self) -> None:
        self.is_over = True
        _lost.discard(self)


_lost: set[Call[Any]] = set()
"""Calls that were given up, and whose threads may still write to memory."""


def lost_memory() -> list[tuple[int, int]]:
    """Return the addresses, from the first to one past the last, of what may yet be written to."""
    readings = [call.reading for call in _lost.copy()]
    views = [view for one in readings if one is not None for view in one.views if view.nbytes]
    begins = [np.frombuffer(view, np.uint8).ctypes.data for view in views]
    return [(begin, begin + view.nbytes) for begin, view in zip(begins, views, strict=True)]
