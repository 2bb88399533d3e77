"""How long a thread is waited for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import Executor, Future, InvalidStateError
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ._concurrency import settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Errand", "Patience", "StalledError"]

T = TypeVar("T")

_LOOKS = 8
"""How often a thread is looked after before it is given up on."""


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


class Errand(Generic[T]):
    """Something that a thread does for somebody who waits.

    Args:
        job: What to do.
        late: Gets the result if it comes after the errand was given up.

    Attributes:
        future: The result, or what was raised; a `StalledError` if it was given up.
        begun: When a thread began, or `None`.
        thread: The one that did.
    """

    __slots__ = ("begun", "future", "job", "late", "thread")

    def __init__(self, job: Callable[[], T], late: Callable[[T], object] | None = None) -> None:
        self.job: Callable[[], T] | None = job
        self.late = late
        self.future: Future[T] = Future()
        self.begun: float | None = None
        self.thread: threading.Thread | None = None

    def run(self) -> None:
        """Do it, on a thread; nothing if it was withdrawn meanwhile."""
        job, self.job = self.job, None  # the one who waits may hold on to this
        if job is None or not self.future.set_running_or_notify_cancel():
            return
        self.thread, self.begun = threading.current_thread(), time.monotonic()
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001  # whoever waits for it raises it
            self._fail(error)
            del self, job  # the error knows this frame
        else:
            self._succeed(result)

    def give_up(self, seconds: float) -> bool:
        """Let whoever waits go; say whether there was still something to wait for."""
        try:
            self.future.set_exception(StalledError(seconds))
        except InvalidStateError:
            return False
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

    Threads cannot be interrupted: one that waits for a disk that is gone may do so for ever. It is
    then replaced by another, whoever waits for it is let go, and what it was to write to stays
    alive and is not used again, for it may yet be written to. Belongs to one event loop.

    Args:
        seconds: From when the thread began; `None` waits for ever.
        replace: Gets a thread that was given up on.
    """

    def __init__(
        self,
        seconds: float | None,
        *,
        replace: Callable[[threading.Thread], object] = lambda _: None,
    ) -> None:
        self._seconds = seconds
        self._replace = replace
        self._under_way: dict[Errand[Any], Callable[[], object] | None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.lost = 0
        """Errands that were given up."""

    def __repr__(self) -> str:
        return f"<Patience {self._seconds} s: {len(self._under_way)} under way, {self.lost} lost>"

    async def wait_for(
        self,
        errand: Errand[T],
        *,
        withdraw: Callable[[], object] | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> T:
        """Return what an errand results in; being cancelled waits for a thread that has begun.

        Args:
            errand: A thread has been told to run it.
            withdraw: Called if we are cancelled, to take back what has not begun.
            on_lost: Called if the errand is given up.

        Raises:
            StalledError: If it was given up.
        """
        self._watch(errand, on_lost)
        try:
            return await settled(
                asyncio.wrap_future(errand.future), withdraw=withdraw or errand.future.cancel
            )
        finally:
            del self._under_way[errand]
            del errand, withdraw, on_lost  # its future knows its error, which knows this frame

    @contextlib.contextmanager
    def executor(
        self, executor: Executor, *, late: Callable[[Any], object] | None = None
    ) -> Iterator[Executor]:
        """Lend an executor whose jobs are given up like errands, for the length of the block.

        Args:
            executor: Runs them.
            late: Gets the result of a job that was given up, if there ever is one.
        """
        mine: list[Errand[Any]] = []

        def note(errand: Errand[Any]) -> None:
            mine.append(errand)
            self._watch(errand, None)

        try:
            yield _Errands(executor, note, late)
        finally:
            for errand in mine:
                del self._under_way[errand]

    def _watch(self, errand: Errand[Any], on_lost: Callable[[], object] | None) -> None:
        self._under_way[errand] = on_lost
        if self._timer is None and self._seconds is not None:
            self._set_timer(self._seconds)

    def close(self) -> None:
        """Look after nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        seconds = self._seconds
        if seconds is None or not self._under_way:
            return
        begun_before = time.monotonic() - seconds
        for errand, on_lost in list(self._under_way.items()):
            if errand.begun is not None and errand.begun <= begun_before:
                self._give_up(errand, on_lost)
        self._set_timer(seconds)

    def _give_up(self, errand: Errand[Any], on_lost: Callable[[], object] | None) -> None:
        seconds, thread = self._seconds, errand.thread
        if seconds is None or thread is None or not errand.give_up(seconds):
            return
        self.lost += 1
        self._replace(thread)
        if on_lost is not None:
            on_lost()


class _Errands(Executor):
    """Makes an errand of every job."""

    def __init__(
        self,
        executor: Executor,
        note: Callable[[Errand[Any]], object],
        late: Callable[[Any], object] | None,
    ) -> None:
        self._executor = executor
        self._note = note
        self._late = late

    def submit(self, job: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        errand = Errand(partial(job, *args, **kwargs), self._late)
        self._executor.submit(errand.run)
        self._note(errand)
        return errand.future
