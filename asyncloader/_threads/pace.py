"""How many reads run at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from asyncloader._memory.allowance import processors

from .patience import Errand, Patience

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor, Future

    from .patience import Pulse
    from .throttle import Throttle


T = TypeVar("T")

_SCHEDSTAT = "/proc/thread-self/schedstat"
# Of the time that a thread runs, spent waiting for its turn. Three on two processors wait for half
# as long as they run, four as long.
_CROWDED = 0.67
# Of the time of a read. What is in the page cache waits for 0.02 of it, what is not for 0.5 and
# more, whatever else the processors have to do.
_WAITING = 0.25


class Ran(NamedTuple):
    """What became of a thread's time."""

    running: int
    """Nanoseconds that it ran."""

    ready: int
    """Nanoseconds that it could have run, but for others."""


@dataclass(slots=True)
class Seen:
    """What a read noticed."""

    waited: bool = False
    """Whether it had to wait for bytes that were not in memory yet."""

    unsure: bool = False
    """Whether nobody could say that; then how long its thread neither ran nor was ready does."""


def thread_time() -> Ran | None:
    """Return what became of the calling thread's time; `None` where nobody knows (Linux only)."""
    try:
        fd = os.open(_SCHEDSTAT, os.O_RDONLY)
        try:
            _, ready, _ = map(int, os.read(fd, 100).split())
        finally:
            os.close(fd)
    except (OSError, ValueError):  # another system, or a sandbox
        return None
    # The first number there is as of the last tick of the kernel's clock, milliseconds ago.
    return Ran(time.thread_time_ns(), ready)


class ReadPace:
    """Lets as many reads run at a time as are of use.

    What is in the page cache is read as fast as a processor copies it. More readers than processors
    make that no faster, but everybody else, the event loop above all, queues behind them: with
    eight on two processors one of a hundred wake-ups of the loop was 10 ms late, with two 4 ms
    (docs/performance.md). A read that waits for a device or a network leaves its processor to
    others, and more of them at a time hide each other's waiting.

    So as many as there are processors begin. Each read that has waited for its bytes lets one more
    in. Otherwise, each that has waited for a processor lets one less in, down to half of the
    processors, and each that has not, one more, up to where it began. Belongs to one event loop.

    Args:
        executor: Its threads read.
        most: Reads at a time; no more than it has threads.
        throttle: What reads keep to besides; `None` lets them go as fast as they can.
        cores: Processors.
        clock: Says what became of the calling thread's time.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        most: int,
        throttle: Throttle | None = None,
        cores: int | None = None,
        clock: Callable[[], Ran | None] = thread_time,
    ) -> None:
        self._executor = executor
        self._throttle = throttle
        self._clock = clock
        cores = processors() if cores is None else cores
        self._most = most
        self._usual = min(most, cores)
        self._least = max(self._usual // 2, 1)
        self._limit = self._usual
        self._waiting: deque[_Read] = deque()
        self._readers = 0
        self._lock = threading.Lock()  # for the three above

    @property
    def limit(self) -> int:
        """Reads that may run at a time now."""
        return self._limit

    async def run(
        self,
        job: Callable[[Seen], T],
        patience: Patience | None = None,
        *,
        label: object = "",
        pulse: Pulse | None = None,
        lost: Callable[[], object] | None = None,
    ) -> T:
        """Return `job(seen)`, run on a thread when its turn comes.

        Who is cancelled takes it back if it has not begun, and waits for it if it has: as long as
        `patience` says, or for ever. One that is slow leaves its place to another.

        Args:
            job: What to do.
            patience: How long it is waited for.
            label: As of an `Errand`.
            pulse: Likewise.
            lost: Likewise.

        Raises:
            StalledError: If it was given up.
        """
        read = _Read(Errand(partial(self._timed, job), label=label, pulse=pulse, lost=lost))
        with self._lock:
            self._waiting.append(read)
            missing = self._readers < self._limit
            self._readers += missing
        if missing:
            self._start(read)
        try:
            return await (patience or Patience(None)).wait_for(
                read.errand,
                withdraw=partial(self._withdraw, read),
                on_slow=partial(self._lose, read),
            )
        finally:
            del read  # its future knows its error, which knows this frame

    def _withdraw(self, read: _Read) -> None:
        """Take back what has not begun, and let go of its memory."""
        if read.errand.future.cancel():
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(read)

    def _lose(self, read: _Read) -> None:
        """Let another reader take the place of one that may not come back."""
        with self._lock:
            turn = read.turn
            if turn is None or turn.lost:
                return
            turn.lost = True
            missing = bool(self._waiting) and self._readers <= self._limit
            self._readers -= not missing
        if missing:
            self._start()

    def _start(self, first: _Read | None = None) -> None:
        """Have one thread more carry out what waits; where there is none, without `first`.

        Raises:
            RuntimeError: If nobody would carry out `first`.
        """
        turn = _Turn()
        try:
            self._executor.submit(self._serve, turn).add_done_callback(self._ended)
        except RuntimeError as error:  # no more threads to be had, or they are shut down
            with self._lock:
                if turn.begun:  # it stood in the executor's queue nevertheless, and was taken
                    return
                turn.void = True
                self._readers -= 1
                alone = not self._readers
                hopeless = alone and first in self._waiting
                if first is not None and hopeless:
                    self._waiting.remove(first)
            if alone:
                self._give_up(error)
            if hopeless:
                raise

    def _ended(self, serving: Future[None]) -> None:
        """If an executor that was shut down, or is broken, has dropped a reader, forget it."""
        if not serving.cancelled() and serving.exception() is None:
            return
        with self._lock:
            self._readers -= 1
            alone = not self._readers
        if alone:
            error = None if serving.cancelled() else serving.exception()
            self._give_up(error or RuntimeError("the threads that read were shut down"))

    def _give_up(self, error: BaseException) -> None:
        """Fail what waits: there is nobody who would carry it out."""
        with self._lock:
            left = list(self._waiting)
            self._waiting.clear()
        for read in left:
            # Not cancelled: who waits was not, and a task group would take it for well done.
            future = read.errand.future
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _serve(self, turn: _Turn) -> None:
        """Carry out what waits, one after the other, on a thread.

        Going by way of the event loop between two reads would leave a processor idle meanwhile. But
        where readers have all the threads, each goes back to the end of the executor's queue: files
        have to be opened, and other reads want their turn.
        """
        with self._lock:
            if turn.void:
                return
            turn.begun = True
        while True:
            with self._lock:
                if turn.lost:  # somebody else has taken this place
                    return
                if not self._waiting or self._readers > self._limit:
                    self._readers -= 1
                    return
                read = self._waiting.popleft()
                read.turn = turn
                missing = bool(self._waiting) and self._readers < self._limit
                self._readers += missing
                all_of_them = self._limit == self._most
            if missing:
                self._start()
            if self._throttle is None:
                read.errand.run()
            else:
                self._throttle.work(read.errand.run)
            del read  # or an idle thread would hold on to memory that was read into
            if all_of_them and self._go_behind(turn):
                return

    def _go_behind(self, mine: _Turn) -> bool:
        """Pass a reader's place on to the end of the executor's queue; say whether that worked."""
        turn = _Turn()
        with self._lock:
            if mine.lost:
                return True
            mine.lost = True  # whoever gives up on what I did last takes no place from the other
        try:
            self._executor.submit(self._serve, turn).add_done_callback(self._ended)
        except RuntimeError:
            with self._lock:
                turn.void = not turn.begun
                mine.lost = turn.begun
        return not turn.void

    def _timed(self, job: Callable[[Seen], T]) -> T:
        """Do a job, and go by what it took."""
        seen = Seen()
        begin, before = time.monotonic_ns(), self._clock()
        result = job(seen)
        after, end = self._clock(), time.monotonic_ns()
        self._adjust(seen, before, after, end - begin)
        return result

    def _adjust(self, seen: Seen, before: Ran | None, after: Ran | None, passed: int) -> None:
        crowded, waited = False, seen.waited or seen.unsure
        if before is not None and after is not None:
            running, ready = after.running - before.running, after.ready - before.ready
            crowded = ready > running * _CROWDED
            waited = seen.waited or (seen.unsure and passed - running - ready > passed * _WAITING)
        with self._lock:
            if waited:
                self._limit = min(self._limit + 1, self._most)
            elif crowded or self._limit > self._usual:
                self._limit = max(self._limit - 1, self._least)
            else:
                self._limit = min(self._limit + 1, self._usual)


@dataclass(slots=True)
class _Turn:
    """A place for one reader."""

    void: bool = False
    """Whether its executor refused it; it may stand in the queue nevertheless."""

    begun: bool = False
    lost: bool = False
    """Whether somebody else has taken it."""


@dataclass(slots=True, eq=False)
class _Read:
    errand: Errand[Any]
    turn: _Turn | None = None
    """The reader that carries it out."""
