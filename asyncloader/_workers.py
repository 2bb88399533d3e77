"""Threads that can be given up on."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WorkerPool"]

T = TypeVar("T")


class WorkerPool(Executor):
    """A fixed number of threads that run jobs, first come, first served.

    What `ThreadPoolExecutor` lacks: a thread that does not come back, since the kernel keeps it
    waiting for a disk that is gone, can be replaced. Nobody waits for it any more, neither
    `shutdown` nor the end of the interpreter; should it ever come back, it ends.

    Args:
        size: Threads. Started by `start`, or one by one as jobs come.
        name: Of the threads, before their numbers.
        initializer: Called on each thread first; must not raise.
    """

    def __init__(self, size: int, *, name: str, initializer: Callable[[], object]) -> None:
        self._size = size
        self._name = name
        self._initializer = initializer
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()  # for all below
        self._threads: set[threading.Thread] = set()
        self._started = 0
        self._is_shut = False

    def __repr__(self) -> str:
        return f"<WorkerPool {self._name!r}: {len(self._threads)} of {self._size} threads>"

    def submit(self, job: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        """Have a thread run a job.

        Raises:
            RuntimeError: If the pool is shut down, or there is no thread to be had.
        """
        result: Future[T] = Future()
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"{self!r} is shut down")
            if len(self._threads) < self._size:
                self._start()
            self._jobs.put(partial(_carry_out, partial(job, *args, **kwargs), result))
        return result

    def start(self) -> None:
        """Start all threads that do not run yet. Waits for each to run.

        Raises:
            RuntimeError: If there are no more to be had.
        """
        with self._lock:
            while len(self._threads) < self._size and not self._is_shut:
                self._start()

    def replace(self, thread: threading.Thread) -> None:
        """Give up on a thread, and start another one in its place, if there is one to be had."""
        with self._lock:
            if thread not in self._threads:
                return
            self._threads.discard(thread)
            if not self._is_shut:
                try:
                    self._start()
                except RuntimeError:
                    if not self._threads:
                        raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002  # as the base has it
        """Take no more jobs; wait for those that are there, but not for threads given up on."""
        with self._lock:
            self._is_shut = True
            threads = list(self._threads)
        if cancel_futures:
            raise NotImplementedError("jobs are withdrawn by whoever handed them in")
        self._jobs.put(None)
        if wait:
            for thread in threads:
                thread.join()

    def _start(self) -> None:
        # A daemon: Python would wait for all others at its end, those too that never return.
        name = f"{self._name}_{self._started}"
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        thread.start()
        self._started += 1
        self._threads.add(thread)

    def _serve(self) -> None:
        self._initializer()
        thread = threading.current_thread()
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or an idle thread would hold on to what it did last
            # One that was replaced while it ran is in nobody's books any more.
            if thread not in self._threads and self._is_replaced(thread):
                return
        self._jobs.put(None)  # for the next one; also one that came back just as it was replaced

    def _is_replaced(self, thread: threading.Thread) -> bool:
        with self._lock:  # whoever started it may not have noted it yet
            return thread not in self._threads


def _carry_out(job: Callable[[], T], result: Future[T]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        result.set_result(job())
    except BaseException as error:  # noqa: BLE001  # whoever waits for it raises it
        result.set_exception(error)
        del result, job  # the error knows this frame
