"""Threads that can be given up on."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .jobs import carry_out

if TYPE_CHECKING:
    from collections.abc import Callable


T = TypeVar("T")

_LOOK_AGAIN = 0.5
"""Seconds. A thread that is waited for may be given up on meanwhile."""


class _Job(NamedTuple):
    do: Callable[[], object]
    result: Future[Any]


class WorkerPool(Executor):
    """A fixed number of threads that run jobs, first come, first served.

    What `ThreadPoolExecutor` lacks: a thread that does not come back, since the kernel keeps it
    waiting for a disk that is gone, can be struck off and replaced. Nobody waits for it any more,
    neither `shutdown` nor the end of the interpreter; should it ever come back, it ends.

    Args:
        size: Threads. Started by `start`, or one by one as jobs come.
        name: Of the threads, before their numbers.
        initializer: Called on each thread first; must not raise.
        start: Starts a thread; raises `RuntimeError` where there is none to be had.
    """

    def __init__(
        self,
        size: int,
        *,
        name: str,
        initializer: Callable[[], object],
        start: Callable[[threading.Thread], None] = threading.Thread.start,
    ) -> None:
        self._size = size
        self._name = name
        self._initializer = initializer
        self._start_thread = start
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()  # for all below; held for moments only
        self._threads: set[threading.Thread] = set()
        self._starting = 0
        self._started = 0
        self._is_shut = False

    def __repr__(self) -> str:
        return f"<WorkerPool {self._name!r}: {len(self._threads)} of {self._size} threads>"

    def submit(self, job: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        """Have a thread run a job.

        Raises:
            RuntimeError: If the pool is shut down, or there is not a single thread to be had.
        """
        if self._is_shut:
            raise RuntimeError(f"{self!r} is shut down")
        if len(self._threads) + self._starting < self._size:
            self._start_one()
        result: Future[T] = Future()
        self._jobs.put(_Job(partial(job, *args, **kwargs), result))
        return result

    def start(self) -> None:
        """Start all threads that do not run. Waits for each to run.

        Raises:
            RuntimeError: If there is not a single one to be had; what waits for one fails, too.
        """
        try:
            while self._start_one():
                pass
        except RuntimeError as error:
            self._fail_all(error)
            raise

    def strike_off(self, thread: threading.Thread) -> bool:
        """Give up on a thread: `start` puts another in its place. Say whether it was one of ours.

        Waits for nothing, so that it may be called on an event loop.
        """
        with self._lock:
            if thread not in self._threads:
                return False
            self._threads.discard(thread)
            return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002  # as the base has it
        """Take no more jobs; wait for those that are there, but for no thread given up on."""
        if cancel_futures:
            raise NotImplementedError("jobs are withdrawn by whoever handed them in")
        self._is_shut = True
        self._jobs.put(None)
        while wait and (thread := next(iter(self._threads.copy()), None)):
            thread.join(_LOOK_AGAIN)
            if not thread.is_alive():
                self.strike_off(thread)

    def _start_one(self) -> bool:
        """Start a thread if one is missing; say whether one was.

        Raises:
            RuntimeError: If none is to be had, and none runs.
        """
        with self._lock:
            if self._is_shut or len(self._threads) + self._starting >= self._size:
                return False
            self._starting += 1
            self._started += 1
            name = f"{self._name}_{self._started - 1}"
        # A daemon: Python would wait for all others at its end, those too that never return.
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        try:
            self._start_thread(thread)
        except RuntimeError as error:
            if self._threads:
                return False
            if threading.main_thread().is_alive():
                raise
            raise RuntimeError(f"{error}: load or save before the program ends") from error
        finally:
            with self._lock:
                self._starting -= 1
                if thread.ident is not None:
                    self._threads.add(thread)
        return True

    def _serve(self) -> None:
        self._initializer()
        thread = threading.current_thread()
        while (job := self._jobs.get()) is not None:
            carry_out(*job)
            del job  # or an idle thread would hold on to what it did last
            if self._is_struck_off(thread):
                return
        self._jobs.put(None)  # for the next one

    def _is_struck_off(self, thread: threading.Thread) -> bool:
        if thread in self._threads:
            return False
        with self._lock:  # whoever started it may not have noted it yet
            return thread not in self._threads and not self._starting

    def _fail_all(self, error: RuntimeError) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is not None and job.result.set_running_or_notify_cancel():
                job.result.set_exception(error)
