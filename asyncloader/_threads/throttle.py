"""How much of the processors threads may take."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future


T = TypeVar("T")

# Whoever is cancelled waits for it.
_LONGEST_REST = 0.1


class Throttle:
    """Lets threads work at a pace: 1 is as fast as they can, 0.5 is half of the processors.

    Below 1 so many jobs run at a time as keep no more than that share busy, and at least one; below
    one processor, each job is followed by a rest, during which no other runs in its place. Jobs
    should be short, milliseconds: one that has begun is not interrupted.

    Thread-safe. Jobs may not hand each other work through it and wait for that.

    Args:
        cores: Processors.
        clock: Seconds, ever growing.
    """

    def __init__(self, *, cores: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._cores = cores
        self._clock = clock
        self._pace = 1.0
        self._working: set[int] = set()  # threads
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<Throttle {self._pace:.2f}: {len(self._working)} working>"

    @property
    def pace(self) -> float:
        """The share of the processors that may be kept busy, above 0, at most 1."""
        return self._pace

    @pace.setter
    def pace(self, pace: float) -> None:
        if not 0 < pace <= 1:
            raise ValueError(f"a pace is above 0 and at most 1, got {pace}")
        with self._changed:
            self._pace = pace
            self._changed.notify_all()

    def work(self, job: Callable[[], T]) -> T:
        """Run a job on this thread when its turn comes."""
        with self._changed:
            while len(self._working) >= self._places():
                self._changed.wait()
            self._working.add(threading.get_ident())
        start = self._clock()
        try:
            return job()
        finally:
            self._rest(self._clock() - start)

    def forget(self, thread: threading.Thread) -> None:
        """Give the place of a thread that does not come back to another."""
        if thread.ident is not None:
            with self._changed:
                self._leave(thread.ident)

    def _leave(self, thread: int) -> None:
        self._working.discard(thread)
        self._changed.notify_all()

    def _places(self) -> float:
        """Return how many may work at a time."""
        if self._pace == 1:
            return float("inf")
        # Whole processors: one that is busy for a part of the time is in the loop's way, too. With
        # as many places as it takes, and rests, a load on two took four times as long, not twice.
        return max(int(self._pace * self._cores), 1)

    def _rest(self, worked: float) -> None:
        with self._changed:
            if self._pace < 1:
                surplus = self._places() / (self._pace * self._cores) - 1
                until = self._clock() + min(max(worked * surplus, 0), _LONGEST_REST)
                # Full speed cuts it short.
                while self._pace < 1 and (left := until - self._clock()) > 0:
                    self._changed.wait(left)
            self._leave(threading.get_ident())


class ThrottledExecutor(Executor):
    """An executor whose jobs keep to a throttle. Belongs to whoever shuts the other one down."""

    def __init__(self, executor: Executor, throttle: Throttle) -> None:
        self._executor = executor
        self._throttle = throttle

    def submit(self, job: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        """Have a job run when a thread is free and its turn has come."""
        return self._executor.submit(self._throttle.work, partial(job, *args, **kwargs))
