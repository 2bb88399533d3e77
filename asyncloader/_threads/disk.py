"""The one door to a thread for what may block: files, and the memory that is read into."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from functools import partial
from io import IOBase
from typing import TYPE_CHECKING, Any, TypeVar

from .call import Call
from .jobs import settled

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from .call import Reading
    from .pool import WorkerPool


T = TypeVar("T")

_LOOKS = 8
"""How often, at least, a call is looked after before it is given up."""

_SLOW = 1.0
"""Seconds. The thread of a call that takes longer is replaced: no other call waits for it."""


class Disk:
    """Has threads do what may block for ever, and waits no longer than was agreed.

    A thread cannot be interrupted: one that waits for a disk that is gone may do so for ever. One
    that takes more than a second is replaced by another, so that it keeps no caller waiting but the
    one that it works for. One that takes `seconds` is given up: its caller is let go, and the
    memory that it was to write to stays alive and is known (`lost_memory`), whatever has become of
    the caller.

    Time in which the event loop, or all of the process, stood still does not count. Belongs to one
    event loop.

    Args:
        pool: Its threads do the work. Disks may share it.
        seconds: How long a call is waited for from when its thread began, or began its latest read;
            `None` waits for ever.
        clock: Seconds, ever growing.

    Attributes:
        lost: Calls that were given up.
    """

    def __init__(
        self,
        pool: WorkerPool,
        *,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lost = 0
        self._pool = pool
        self._seconds = seconds
        self._clock = clock
        self._slow = _SLOW if seconds is None else min(_SLOW, seconds / 2)
        self._period = self._slow / _LOOKS * 2
        self._under_way: set[Call[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._looked = 0.0

    def __repr__(self) -> str:
        return f"<Disk {self._seconds} s: {len(self._under_way)} under way, {self.lost} lost>"

    @property
    def is_idle(self) -> bool:
        """Whether no caller waits for anything."""
        return all(call.future.done() for call in self._under_way)

    def under_way(self) -> list[str]:
        """Say what threads are at, the longest first."""
        begun = [call for call in self._under_way if call.thread and not call.is_over]
        begun.sort(key=lambda call: -call.waited)
        return [label for call in begun if (label := str(call.label))]

    async def call(
        self,
        job: Callable[[], T],
        *,
        label: object = "",
        reading: Reading | None = None,
        late: Callable[[T], object] | None = None,
    ) -> T:
        """Return what a job results in, on a thread.

        A caller that is cancelled takes it back if no thread has begun with it, and waits for the
        thread otherwise, as long as for any call.

        Args:
            job: May block.
            label: What it is about, for messages; `reading` has one of its own.
            reading: What the job reads. It takes its turn among all reads then.
            late: Gets the result where no caller takes it, such as to close a file; on a thread.

        Raises:
            StalledError: If it was given up.
            RuntimeError: If there is no thread.
        """
        call = self._begun(job, label, reading, late)
        discard = None if late is None else partial(self._discard, late)
        try:
            return await settled(
                asyncio.wrap_future(call.future), withdraw=call.withdraw, discard=discard
            )
        finally:
            self._under_way.discard(call)
            del call, job, late, reading  # its error knows this frame

    async def _discard(self, late: Callable[[T], object], result: T) -> None:
        await self.call(partial(late, result))

    def executor(self, label: object = "", reading: Reading | None = None) -> Executor:
        """Return an executor for `run_in_executor` and the like; its jobs are calls like others.

        A caller that is cancelled does not wait for the thread: jobs may write to no memory but
        their own. A file that a job opens too late is closed. Used on the event loop's thread only.
        """
        return _Executor(partial(self._begun, label=label, reading=reading, late=_close))

    def close(self) -> None:
        """Look after no call any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begun(
        self,
        job: Callable[[], T],
        label: object,
        reading: Reading | None,
        late: Callable[[T], object] | None,
    ) -> Call[T]:
        call = Call(
            job,
            reading=reading,
            is_counted=reading is not None,  # others wait for the file system, not a processor
            label=label if reading is None else reading,
            late=late,
        )
        self._pool.put(call)
        self._under_way.add(call)
        if self._timer is None:
            self._looked = self._clock()
            self._timer = asyncio.get_running_loop().call_later(self._period, self._look)
        return call

    def _look(self) -> None:
        self._timer = None
        self._under_way = {call for call in self._under_way if not call.future.done()}
        if not self._under_way:
            return
        self._timer = asyncio.get_running_loop().call_later(self._period, self._look)
        now = self._clock()
        passed = min(now - self._looked, 2 * self._period)
        self._looked = now
        for call in list(self._under_way):
            waited = call.passed(passed)
            if waited > self._slow and not call.is_slow:
                call.is_slow = True
                self._pool.replace(call)
            if self._seconds is not None and waited > self._seconds:
                self.lost += call.give_up(self._seconds)


def _close(result: object) -> None:
    if isinstance(result, IOBase):
        result.close()


class _Executor(Executor):
    """An executor's face for `Disk`."""

    def __init__(self, begun: Callable[[Callable[[], Any]], Call[Any]]) -> None:
        self._begun = begun

    def submit(self, job: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        """Have a thread do a job."""
        return self._begun(partial(job, *args, **kwargs)).future
