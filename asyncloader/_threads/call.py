"""A job for a thread, and all that is known of it: the one that waits, and memory, depend on it."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence
    from queue import SimpleQueue

    from numpy.typing import NDArray


T = TypeVar("T")

_LARGE = 1 << 20
"""Bytes. Shorter reads do not keep other threads from the processors."""

_NBYTES = attrgetter("nbytes")


def nbytes_of(views: Sequence[memoryview]) -> int:
    """Return the bytes of all views together."""
    return sum(map(_NBYTES, views))


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


@dataclass(slots=True, eq=False)
class Reading:
    """What a thread reads, where to, and what it notices.

    Several reads, one after the other, are one reading of a thread that is lent: it calls `begin`
    before each of them.

    Attributes:
        name: The file.
        views: The memory that is filled; `None` says that `begin` will tell.
        is_large: Whether the gate counts it among the reads of which only some are of use.
        waited: Whether it had to wait for bytes that were not in memory yet; a short one does not
            look.
        unsure: Whether the system could not say that; then its thread's time tells.
        begun: Reads that were begun; each is waited for by itself.
        ticks: Counted up, `[1]`, by what reads many small things, each of which is waited for by
            itself; `None` where there is no such.
        interrupt: Ends the wait of its thread, on the event loop's thread; `None` where that cannot
            be.
        is_lost: Whether its caller was let go: other loads may have the memory by now.
    """

    name: str = ""
    offset: int = 0
    views: Sequence[memoryview] | None = None
    length: int = field(init=False)
    is_large: bool = field(init=False)
    waited: bool = field(init=False)
    unsure: bool = False
    begun: int = 0
    ticks: NDArray[np.int64] | None = None
    interrupt: Callable[[], object] | None = None
    is_lost: bool = False

    def __post_init__(self) -> None:
        self.length = nbytes_of(self.views or ())
        self.is_large = self.views is None or self.length >= _LARGE
        self.waited = not self.is_large

    def __str__(self) -> str:
        if self.views is None:
            return self.name
        return f"{self.name}: bytes [{self.offset}, {self.offset + self.length})"

    @property
    def answers(self) -> int:
        """A number that grows while the storage answers."""
        return self.begun + (0 if self.ticks is None else int(self.ticks[0]))

    def begin(self, offset: int, views: Sequence[memoryview]) -> None:
        """Note the next read of this thread.

        Raises:
            RuntimeError: If the read was given up.
        """
        self.offset, self.views = offset, views
        self.length = nbytes_of(views)
        self.begun += 1
        if self.is_lost:  # noted first, looked at second; `Call.give_up` does it the other way
            raise RuntimeError("the read was given up")


@dataclass(slots=True, eq=False)
class Call(Generic[T]):
    """A job for a thread.

    Attributes:
        job: The work; `None` once a thread has begun, or the call was withdrawn.
        reading: What the job reads, if it does.
        is_counted: Whether the gate counts it; not where it uses no processor to speak of.
        label: What it is about, for messages.
        late: Gets the result if it comes after the call was given up.
        future: The result, or what was raised; a `StalledError` if it was given up.
        queue: That of its threads.
        number: In order of arrival at the gate.
        thread: The one that has begun with it.
        begun: When that was, by the gate's clock.
        waited: Seconds for which the storage has given no answer.
        is_over: Whether its thread is done with it, given up or not.
        is_struck: Whether its thread was replaced. It takes no other call.
    """

    job: Callable[[], T] | None
    reading: Reading | None = None
    is_counted: bool = True
    label: object = ""
    late: Callable[[T], object] | None = None
    future: Future[T] = field(default_factory=Future)
    queue: SimpleQueue[Call[Any] | None] = field(init=False)
    number: int = 0
    thread: threading.Thread | None = None
    begun: float = 0.0
    waited: float = 0.0
    is_slow: bool = False
    is_over: bool = False
    is_struck: bool = False
    is_large: bool = field(init=False)
    _reads: int = 0

    def __post_init__(self) -> None:
        self.is_large = self.reading is not None and self.reading.is_large

    def withdraw(self) -> None:
        """Take it back if no thread has begun with it, and let go of its memory."""
        if self.future.cancel():
            self.job = self.reading = None
            self.label = ""  # which may be the reading
        elif self.reading is not None and self.reading.interrupt is not None:
            self.reading.interrupt()

    def passed(self, seconds: float) -> float:
        """Note that time has passed; return for how long the storage has given no answer."""
        if self.thread is None or self.is_over:
            return 0.0
        if self.reading is not None and self._reads != (reads := self.reading.answers):
            self._reads = reads
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
            elif self.reading.interrupt is not None:
                self.reading.interrupt()
        return True

    def succeed(self, result: T) -> None:
        """Note, on its thread, what it results in."""
        self._end()
        try:
            self.future.set_result(result)
        except InvalidStateError:
            if self.late is not None:
                with contextlib.suppress(Exception):  # no caller is left to tell
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
    views = [view for one in readings if one is not None for view in one.views or () if view.nbytes]
    begins = [np.frombuffer(view, np.uint8).ctypes.data for view in views]
    return [(begin, begin + view.nbytes) for begin, view in zip(begins, views, strict=True)]
