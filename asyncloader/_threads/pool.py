"""Threads that can be given up on."""

from __future__ import annotations

import _thread
import contextlib
import threading
from concurrent.futures import Executor
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from .call import Call
from .gate import Gate

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future


T = TypeVar("T")

_LOOK_AGAIN = 0.5
"""Seconds. A thread that is waited for may be given up on meanwhile."""


class WorkerPool(Executor):
    """A fixed number of threads that carry calls out, first come, first served.

    What `ThreadPoolExecutor` lacks: a thread that does not come back, since the kernel keeps it
    waiting for a disk that is gone, can be struck off and replaced. Nobody waits for it any more,
    neither `shutdown` nor the end of the interpreter; should it ever come back, it ends.

    Args:
        size: Threads; all of them are started when the first call comes.
        name: Of the threads, before their numbers.
        gate: Says how many run at a time; `None` is one of its own.
        initializer: Called on each thread first; must not raise.
        start: Starts a thread; raises `RuntimeError` where there is none to be had.
    """

    def __init__(
        self,
        size: int,
        *,
        name: str,
        gate: Gate | None = None,
        initializer: Callable[[], object] = int,
        start: Callable[[threading.Thread], None] = threading.Thread.start,
    ) -> None:
        self._size = size
        self._name = name
        self._gate = gate or Gate(most=size, cores=size)
        self._initializer = initializer
        self._start_thread = start
        self._queue: SimpleQueue[Call[Any] | None] = SimpleQueue()
        self._lock = threading.Condition(threading.Lock())  # for all below; held for moments only
        self._threads: set[threading.Thread] = set()
        self._starting = False
        self._started = 0
        self._is_shut = False

    def __repr__(self) -> str:
        return f"<WorkerPool {self._name!r}: {len(self._threads)} of {self._size} threads>"

    def submit(self, job: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        """Have a thread run a job that comes back for certain; else there is `Disk`.

        Raises:
            RuntimeError: If the pool is shut down.
        """
        call = Call(partial(job, *args, **kwargs))
        self.put(call)
        return call.future

    def put(self, call: Call[Any]) -> None:
        """Have a thread carry a call out. It fails if there is not a single thread to be had.

        Raises:
            RuntimeError: If the pool is shut down.
        """
        if self._is_shut:
            raise RuntimeError(f"{self!r} is shut down")
        call.queue = self._queue
        self._gate.enter(call)
        if len(self._threads) < self._size:
            self._start_missing()

    def replace(self, call: Call[Any]) -> None:
        """Give up on the thread of a call, and have another take its place."""
        if call.thread is not None and self._gate.strike(call):
            with self._lock:
                self._threads.discard(call.thread)
            self._start_missing()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002  # as the base has it
        """Take no more calls; wait for those that are there, but for no thread given up on."""
        if cancel_futures:
            raise NotImplementedError("calls are withdrawn by whoever handed them in")
        self._is_shut = True
        self._queue.put(None)
        while wait:
            with self._lock:
                while self._starting:
                    self._lock.wait()
                thread = next(iter(self._threads), None)
            if thread is None:
                return
            thread.join(_LOOK_AGAIN)
            if not thread.is_alive():
                with self._lock:
                    self._threads.discard(thread)

    def _start_missing(self) -> None:
        """Have the threads started that are missing. Waits for nothing.

        Starting a thread means waiting until it runs, and holding a lock of Python's: sixteen held
        the event loop up for 90 ms while the processors were busy. So another thread does it.
        """
        with self._lock:
            if self._starting:
                return
            self._starting = True
        try:
            _thread.start_new_thread(self._start_all, ())
        except RuntimeError as error:
            self._end_starting(error)

    def _start_all(self) -> None:
        while (thread := self._next_thread()) is not None:
            try:
                self._start_thread(thread)
            except RuntimeError as error:
                with self._lock:
                    self._threads.discard(thread)
                self._end_starting(error)
                return

    def _next_thread(self) -> threading.Thread | None:
        """Return another thread to start, if one is missing."""
        with self._lock:
            if len(self._threads) >= self._size:
                self._starting = False
                self._lock.notify_all()
                return None
            name = f"{self._name}_{self._started}"
            self._started += 1
            # A daemon: Python would wait for all others at its end, those too that never return.
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            self._threads.add(thread)
            return thread

    def _end_starting(self, error: RuntimeError) -> None:
        """Go on with the threads that there are; without any, fail what waits."""
        with self._lock:
            self._starting = False
            self._lock.notify_all()
            if self._threads:
                return
        if not threading.main_thread().is_alive():
            error = RuntimeError(f"{error}: load or save before the program ends")
        self._fail_all(error)

    def _serve(self) -> None:
        self._initializer()
        thread = threading.current_thread()
        while (first := self._queue.get()) is not None:
            call: Call[Any] | None = first
            del first
            while call is not None:
                _carry_out(call, thread, self._gate)
                following = self._gate.leave(call)
                if call.is_struck:
                    return
                call = following
                del following  # an idle thread would hold on to what it did last
        self._queue.put(None)  # for the next one

    def _fail_all(self, error: RuntimeError) -> None:
        """Fail the calls that wait: there is no thread that would carry them out."""
        with contextlib.suppress(Empty):
            while True:
                call = self._queue.get_nowait()
                while call is not None:
                    if call.future.set_running_or_notify_cancel():
                        call.future.set_exception(error)
                    call = self._gate.leave(call)


def _carry_out(call: Call[Any], thread: threading.Thread, gate: Gate) -> None:
    job, call.job = call.job, None  # the one that waits may hold on to the call
    if job is None or not call.future.set_running_or_notify_cancel():
        return  # it was withdrawn meanwhile
    call.thread, call.begun = thread, gate.now()
    before = gate.clock() if call.is_large else None
    try:
        result = job()
    except BaseException as error:  # noqa: BLE001  # the one that waits raises it
        call.fail(error)
        del call, job  # the error knows this frame
    else:
        if call.is_large and call.reading is not None:
            gate.learn(call.reading, before, gate.now() - call.begun)
        call.succeed(result)
