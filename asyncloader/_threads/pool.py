"""Threads that can be given up on, and the two pools of them that a load has."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import os
import sys
import threading
import time
from concurrent.futures import Executor
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Self, TypeVar

from asyncloader._memory.allowance import processors

from .call import Call
from .gate import Gate
from .jobs import settled

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future


T = TypeVar("T")

# More than a handful do not build an id index faster: memory is the limit.
_MOST_KERNELS = 8
_NICE = 5
_LOOK_AGAIN = 0.5
"""Seconds. A thread that is waited for may be given up on meanwhile."""


class WorkerPool(Executor):
    """A fixed number of threads that carry calls out, first come, first served.

    What `ThreadPoolExecutor` lacks: a thread that does not come back, since the kernel keeps it
    waiting for a disk that is gone, can be struck off and replaced. Neither `shutdown` nor the end
    of the interpreter waits for it; should it ever come back, it ends.

    Args:
        size: Threads; all of them are started when the first call comes.
        name: Of the threads, before their numbers.
        gate: Says how many run at a time; `None` is one of its own.
        initializer: Called on each thread first; must not raise.
        start: Starts a thread; raises `RuntimeError` or `MemoryError` if there is none to be had.
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
        """Take no more calls; wait for the others, but for no thread that was given up on."""
        if cancel_futures:
            raise NotImplementedError("calls are withdrawn one by one, by their callers")
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

    def end(self, seconds: float) -> None:
        """Shut down, and wait so long for threads that are idle: they end before Python does.

        A thread that wakes up while the interpreter is being taken apart may end the process.
        """
        self.shutdown(wait=False)
        until = time.monotonic() + seconds
        for thread in list(self._threads):
            thread.join(max(until - time.monotonic(), 0))

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
        except BaseException as error:
            self._end_starting(error)
            if not isinstance(error, RuntimeError | MemoryError):  # Ctrl-C
                raise

    def _start_all(self) -> None:
        thread = None
        try:
            while (thread := self._next_thread()) is not None:
                self._start_thread(thread)
        except (RuntimeError, MemoryError) as error:
            with self._lock:
                self._threads.discard(thread)
            self._end_starting(error)

    def _next_thread(self) -> threading.Thread | None:
        """Return another thread to start, if one is missing."""
        with self._lock:
            if len(self._threads) >= self._size:
                self._starting = False
                self._lock.notify_all()
                return None
            name = f"{self._name}_{self._started}"
            self._started += 1
            # A daemon: Python would wait for any other thread at its end, though it never returns.
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            self._threads.add(thread)
            return thread

    def _end_starting(self, error: BaseException) -> None:
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

    def _fail_all(self, error: BaseException) -> None:
        """Fail the calls that wait: there is no thread that would carry them out."""
        for waiting in self._gate.turned_away(self._queue):
            _fail(waiting, error)
        with contextlib.suppress(Empty):
            while True:
                call = self._queue.get_nowait()
                while call is not None:
                    _fail(call, error)
                    call = self._gate.leave(call)


def _fail(call: Call[Any], error: BaseException) -> None:
    if call.future.set_running_or_notify_cancel():
        call.future.set_exception(error)


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


class Threads:
    """Two pools: reads wait, kernels compute, and neither shall keep the other from running.

    A thread that reads may never come back, and be replaced (`Disk`); a thread that computes
    always does, as it touches no file.

    They may be shared by several loads of one event loop. An async context manager: leaving
    joins all threads.

    Args:
        reads: Threads that read.
        gate: Says how many run at a time; `None` is one of its own.

    Attributes:
        reads: Runs jobs on threads that read.
        kernels: Runs jobs on threads that compute.
        gate: All of them keep to it.
    """

    def __init__(self, *, reads: int, gate: Gate | None = None) -> None:
        self.kernel_count = min(processors(), _MOST_KERNELS)
        self.gate = gate or Gate(most=reads)
        self.reads = WorkerPool(
            reads, name="asyncloader-read", gate=self.gate, initializer=step_back
        )
        self.kernels = WorkerPool(
            self.kernel_count, name="asyncloader-kernel", gate=self.gate, initializer=step_back
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        # All threads are idle, but each of them still has to wake up to end. The readers are
        # joined off the loop; the few others, one of which did that, on it.
        loop = asyncio.get_running_loop()
        self.gate.allowed = 1  # or the loop would wait for threads that rest
        try:
            await settled(loop.run_in_executor(self.kernels, self.reads.shutdown))
        except RuntimeError:  # no thread is to be had: then few run, or none
            self.reads.shutdown()
        finally:
            self.kernels.shutdown()


def step_back() -> None:
    """Let the event loop's thread go first where there are too few processors for all."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # some sandboxes forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
