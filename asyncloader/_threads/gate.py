"""How many threads run at a time."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncloader._memory.allowance import processors

if TYPE_CHECKING:
    from collections.abc import Callable

    from .call import Call, Reading


_SCHEDSTAT = "/proc/thread-self/schedstat"
# Of the time that a thread runs, spent waiting for its turn. Three on two processors wait for half
# as long as they run, four as long.
_CROWDED = 0.67
# Of the time of a read. What is in the page cache waits for 0.02 of it, what is not for 0.5 and
# more, whatever else the processors have to do.
_WAITING = 0.25
# A core. All sixteen at once took time from threads that compare digests, and that index.
_OF_A_NETWORK = 4
# Seconds. A caller that is cancelled waits for it.
_LONGEST_REST = 0.1


class Ran(NamedTuple):
    """What became of a thread's time."""

    running: int
    """Nanoseconds that it ran."""

    ready: int
    """Nanoseconds that it could have run, but for others."""


def thread_time() -> Ran | None:
    """Return what became of the calling thread's time; `None` where it is not told (only Linux)."""
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


class Gate:
    """Lets as many threads run at a time as are of use, and as are allowed.

    *Of use.* What is in the page cache is read as fast as a processor copies it. More readers than
    processors make that no faster, but everybody else, the event loop above all, queues behind
    them: with eight on two processors one of a hundred wake-ups of the loop was 10 ms late, with
    two 4 ms (docs/performance.md). A read that waits for a device or a network leaves its processor
    to others, and more of them at a time hide each other's waiting. So as many large reads as there
    are processors begin. Each that has waited for its bytes lets one more in. Otherwise, each that
    has waited for a processor lets one less in, down to half of the processors, and each that has
    not, one more, up to as many.

    *Allowed.* The share of the processors that all threads together, computing ones too, may keep
    busy. Below 1 so many calls run at a time as keep no more than that share busy, and at
    least one; below one processor, each call is followed by a rest, during which no other runs in
    its place. Calls should be short, milliseconds: one that has begun is not interrupted.

    Calls wait here, in order of arrival, and not on threads, which have other things to do. The
    thread that ends a call takes the next one over. Thread-safe.

    Args:
        most: Large reads at a time; no more than there are threads for them.
        cores: Processors.
        clock: Says what became of the calling thread's time.
        now: Seconds, ever growing.
    """

    def __init__(
        self,
        *,
        most: int,
        cores: int | None = None,
        clock: Callable[[], Ran | None] = thread_time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.now = now
        self._cores = processors() if cores is None else cores
        self._most = most
        self._usual = min(most, self._cores)
        self._least = max(self._usual // 2, 1)
        self._useful = self._usual
        self._allowed = 1.0
        self._large: deque[Call[Any]] = deque()  # waiting calls
        self._small: deque[Call[Any]] = deque()
        self._arrived = 0
        self._reading = 0  # large reads that were let in
        self._working = 0  # all calls that were
        self._lock = threading.Lock()  # for all of the above
        self._changed = threading.Condition(self._lock)

    def __repr__(self) -> str:
        waiting = len(self._large) + len(self._small)
        return f"<Gate {self._allowed:.2f}: {self._working} working, {waiting} waiting>"

    @property
    def useful(self) -> int:
        """Large reads that may run at a time now."""
        return self._useful

    @property
    def allowed(self) -> float:
        """The share of the processors that may be kept busy, above 0, at most 1."""
        return self._allowed

    @allowed.setter
    def allowed(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"a share is above 0 and at most 1, got {share}")
        with self._lock:
            self._allowed = share
            self._changed.notify_all()
            self._let_in()

    def expect_waiting(self) -> None:
        """Let more large reads in for a start: those of a network wait for their bytes."""
        with self._lock:
            self._useful = max(self._useful, min(self._most, _OF_A_NETWORK * self._cores))
            self._let_in()

    def enter(self, call: Call[Any]) -> None:
        """Have a call run, by way of its queue, when its turn comes."""
        if not call.is_counted:
            call.queue.put(call)
            return
        with self._lock:
            self._arrived += 1
            call.number = self._arrived
            (self._large if call.is_large else self._small).append(call)
            self._let_in()

    def leave(self, call: Call[Any]) -> Call[Any] | None:
        """Note that a thread has ended a call; return the next one for it, if there is one.

        Going by way of the queue between two calls would wake another thread, and leave a processor
        idle meanwhile. But where calls wait for a thread, each takes its turn behind them.
        """
        with self._lock:
            if call.is_struck or not call.is_counted:
                return None
            if self._allowed < 1 and call.thread is not None:
                self._rest(self.now() - call.begun)
            self._count(call, -1)
            return self._let_in(call.queue)

    def turned_away(self, queue: object) -> list[Call[Any]]:
        """Take back the calls that wait here for the threads of a queue: there are none."""
        with self._lock:
            found = [call for call in (*self._large, *self._small) if call.queue is queue]
            self._large = deque(call for call in self._large if call.queue is not queue)
            self._small = deque(call for call in self._small if call.queue is not queue)
            return found

    def strike(self, call: Call[Any]) -> bool:
        """Give the place of a call whose thread does not come back to another.

        Returns:
            Whether its thread was still at it; it takes no other call then.
        """
        with self._lock:
            if call.is_over or call.is_struck:
                return False
            call.is_struck = True
            if call.is_counted:
                self._count(call, -1)
                self._let_in()
            return True

    def learn(self, reading: Reading, before: Ran | None, seconds: float) -> None:
        """Go by what a large read of the calling thread took."""
        after, passed = self.clock(), seconds * 1e9
        crowded, waited = False, reading.waited or reading.unsure
        if before is not None and after is not None:
            running, ready = after.running - before.running, after.ready - before.ready
            crowded = ready > running * _CROWDED
            idle = passed - running - ready
            waited = reading.waited or (reading.unsure and idle > passed * _WAITING)
        with self._lock:
            if waited:
                self._useful = min(self._useful + 1, self._most)
            elif crowded or self._useful > self._usual:
                self._useful = max(self._useful - 1, self._least)
            else:
                self._useful = min(self._useful + 1, self._usual)

    def _let_in(self, mine: object = None) -> Call[Any] | None:
        """Let in what may run now; return the first call for a thread of queue `mine`."""
        taken = None
        while (call := self._next()) is not None:
            self._count(call, 1)
            if taken is None and call.queue is mine and call.queue.empty():
                taken = call
            else:
                call.queue.put(call)
        return taken

    def _next(self) -> Call[Any] | None:
        """Take the first call that may run now."""
        if self._working >= self._places():
            return None
        large = self._large if self._reading < self._useful else None
        if large and (not self._small or large[0].number < self._small[0].number):
            return large.popleft()
        return self._small.popleft() if self._small else None

    def _count(self, call: Call[Any], change: int) -> None:
        self._working += change
        self._reading += change * call.is_large
        assert 0 <= self._reading <= self._working, "what was let in leaves once"

    def _places(self) -> float:
        """Return how many calls may run at a time."""
        if self._allowed == 1:
            return float("inf")
        # Whole processors: one that is busy for a part of the time is in the loop's way, too. With
        # as many places as it takes, and rests, a load on two took four times as long, not twice.
        return max(int(self._allowed * self._cores), 1)

    def _rest(self, worked: float) -> None:
        surplus = self._places() / (self._allowed * self._cores) - 1
        until = self.now() + min(max(worked * surplus, 0), _LONGEST_REST)
        # Full speed cuts it short.
        while self._allowed < 1 and (left := until - self.now()) > 0:
            self._changed.wait(left)
