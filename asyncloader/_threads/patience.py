"""How long a thread is waited for."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .jobs import settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Executor


T = TypeVar("T")

_LOOKS = 8
"""How often, at least, an errand is looked after before it is given up."""

_SLOW = 1.0
"""Seconds. One that takes longer stands in nobody's way any more: its thread is replaced."""


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


class Pulse:
    """A thread's sign of life: of an errand that is several calls, each is waited for by itself."""

    __slots__ = ("beats",)

    def __init__(self) -> None:
        self.beats = 0

    def beat(self) -> None:
        """Note that a call begins."""
        self.beats += 1


class Errand(Generic[T]):
    """Something that a thread does for somebody who waits.

    Args:
        job: What to do.
        label: What it is about, for messages.
        late: Gets the result if it comes after the errand was given up.
        lost: Called if the errand is given up, whether the one who waited was cancelled or not.
        pulse: Beats when another call begins, if it is several.

    Attributes:
        future: The result, or what was raised; a `StalledError` if it was given up.
        thread: The one that has begun with it, or `None`.
        is_over: Whether that thread is done with it, given up or not.
    """

    __slots__ = (
        "beats",
        "future",
        "is_over",
        "is_slow",
        "job",
        "label",
        "late",
        "lost",
        "pulse",
        "thread",
        "waited",
    )

    def __init__(
        self,
        job: Callable[[], T],
        *,
        label: object = "",
        late: Callable[[T], object] | None = None,
        lost: Callable[[], object] | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.job: Callable[[], T] | None = job
        self.label = label
        self.late = late
        self.lost = lost
        self.pulse = pulse
        self.future: Future[T] = Future()
        self.thread: threading.Thread | None = None
        self.is_over = False
        self.is_slow = False
        self.beats = 0
        self.waited = 0.0

    def run(self) -> None:
        """Do it, on a thread; nothing if it was withdrawn meanwhile."""
        job, self.job = self.job, None  # the one who waits may hold on to this
        if job is None or not self.future.set_running_or_notify_cancel():
            return
        self.thread = threading.current_thread()
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001  # whoever waits for it raises it
            self.is_over = True
            self._fail(error)
            del self, job  # the error knows this frame
        else:
            self.is_over = True
            self._succeed(result)

    def passed(self, seconds: float) -> float:
        """Note that time has passed; return for how long the storage has given no answer."""
        if self.thread is None:
            return 0.0
        if self.pulse is not None and self.beats != self.pulse.beats:
            self.beats = self.pulse.beats
            self.waited = 0.0
        self.waited += seconds
        return self.waited

    def give_up(self, seconds: float) -> bool:
        """Let whoever waits go; say whether there was still something to wait for."""
        try:
            self.future.set_exception(StalledError(seconds))
        except InvalidStateError:
            return False
        if self.lost is not None:
            self.lost()
        return True

    def _succeed(self, result: T) -> None:
        try:
            self.future.set_result(result)
        except InvalidStateError:
            if self.late is not None:
                self.late(result)

    def _fail(self, error: BaseException) -> None:
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            return  # nobody wants to know any more


class Patience:
    """Gives up on errands whose threads do not come back.

    Threads cannot be interrupted: one that waits for a disk that is gone may do so for ever. One
    that takes more than a second is replaced by another, so that it keeps nobody waiting but the
    one whom it works for. One that takes `seconds` is given up: that one is let go, too, and what
    it was to write to stays alive and is not used again, for it may yet be written to.

    Time in which nobody looked, since the event loop or all of the process stood still, does not
    count. Belongs to one event loop.

    Args:
        seconds: From when the thread began, or its last call did; `None` waits for ever.
        replace: Gets a thread that another shall take the place of. Called on the event loop.
        clock: Seconds, ever growing.
    """

    def __init__(
        self,
        seconds: float | None,
        *,
        replace: Callable[[threading.Thread], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._replace = replace
        self._clock = clock
        self._slow = _SLOW if seconds is None else min(_SLOW, seconds / 2)
        self._period = self._slow / _LOOKS * 2
        self._under_way: dict[Errand[Any], Callable[[], object] | None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._looked = 0.0
        self.lost = 0
        """Errands that were given up."""

    def __repr__(self) -> str:
        return f"<Patience {self._seconds} s: {len(self._under_way)} under way, {self.lost} lost>"

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self._under_way

    def under_way(self) -> list[str]:
        """Say what threads are at, the longest first."""
        begun = [errand for errand in self._under_way if errand.thread is not None]
        begun.sort(key=lambda errand: -errand.waited)
        return [label for errand in begun if (label := str(errand.label))]

    async def wait_for(
        self,
        errand: Errand[T],
        *,
        withdraw: Callable[[], object] | None = None,
        discard: Callable[[T], Awaitable[object]] | None = None,
        on_slow: Callable[[], object] | None = None,
    ) -> T:
        """Return what an errand results in; being cancelled waits for a thread that has begun.

        Args:
            errand: A thread has been told to run it.
            withdraw: Called if we are cancelled, to take back what has not begun.
            discard: Called with the result if we were cancelled, and nobody will take it.
            on_slow: Called if its thread is replaced.

        Raises:
            StalledError: If it was given up.
        """
        self._under_way[errand] = on_slow
        if self._timer is None:
            self._looked = self._clock()
            self._timer = asyncio.get_running_loop().call_later(self._period, self._look)
        try:
            return await settled(
                asyncio.wrap_future(errand.future),
                withdraw=withdraw or errand.future.cancel,
                discard=discard,
            )
        finally:
            del self._under_way[errand]
            del errand, withdraw, discard, on_slow  # its error knows this frame

    async def run(
        self,
        executor: Executor,
        job: Callable[[], T],
        *,
        label: object = "",
        late: Callable[[T], object] | None = None,
        lost: Callable[[], object] | None = None,
        discard: Callable[[T], Awaitable[object]] | None = None,
    ) -> T:
        """Return what a job results in that an executor runs; see `Errand` and `wait_for`."""
        errand = Errand(job, label=label, late=late, lost=lost)
        executor.submit(errand.run)
        try:
            return await self.wait_for(errand, discard=discard)
        finally:
            del errand, job, late, lost, discard

    def close(self) -> None:
        """Look after nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._under_way:
            return
        # First of all: without a timer, an error of `replace` would have errands wait for ever.
        self._timer = asyncio.get_running_loop().call_later(self._period, self._look)
        now = self._clock()
        passed = min(now - self._looked, 2 * self._period)
        self._looked = now
        for errand, on_slow in list(self._under_way.items()):
            waited = errand.passed(passed)
            if waited > self._slow and not errand.is_slow:
                self._note_slow(errand, on_slow)
            if self._seconds is not None and waited > self._seconds:
                self.lost += errand.give_up(self._seconds)

    def _note_slow(self, errand: Errand[Any], on_slow: Callable[[], object] | None) -> None:
        errand.is_slow = True
        if errand.thread is not None and not errand.is_over:
            self._replace(errand.thread)
            if on_slow is not None:
                on_slow()
