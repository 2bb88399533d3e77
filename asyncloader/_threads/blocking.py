"""Calls a coroutine function from synchronous code."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import os
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from .signals import Signals

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


T = TypeVar("T")

_PATIENCE = 0.1
"""Seconds between two looks at whether we are still wanted."""

_PIPES = 5
"""A loop, its signals and its wake-ups take 9 descriptors."""


def _new_event_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop  # noqa: PLC0415  # `aload()` does without

    _check_descriptors()
    return uvloop.new_event_loop()


def _check_descriptors() -> None:
    """Make sure that a loop gets its descriptors.

    A loop that gets too few says so in other words, and leaks the descriptors that it got.

    Raises:
        OSError: If there are too few.
    """
    with contextlib.ExitStack() as held:
        try:
            for _ in range(_PIPES):
                for fd in os.pipe():
                    held.callback(os.close, fd)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: {2 * _PIPES} descriptors have to be free: close some, or "
                "raise the limit (ulimit -n)",
            ) from error


class _Call(Generic[T]):
    """A coroutine on a loop of its own; any thread can stop it, before it begins, too."""

    def __init__(self, main: Callable[[], Coroutine[object, object, T]]) -> None:
        self._main = main
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None
        self._stopped = False
        self._was_paused = False
        self._signals = Signals(self._wake)

    def serve(self) -> T:
        """Run it to its end.

        Raises:
            BaseException: What it raised, or a handler of a signal.
        """
        raised: BaseException | None = None
        with self._signals, asyncio.Runner(loop_factory=_new_event_loop) as runner:
            self._loop = runner.get_loop()
            task = self._task = self._loop.create_task(self._run())
            while not (task.done() or self._loop.is_closed()):
                try:
                    self._signals.handle()
                    self._run_on(task)
                except BaseException as error:  # noqa: BLE001  # raised when the task has wound up
                    raised = error
                    self._cancel()
        try:
            if raised is not None:
                raise raised
            return task.result()
        finally:
            self._task = None
            del task, raised  # they know this frame

    def _run_on(self, task: asyncio.Task[T]) -> None:
        """Run the loop until the task is done, or a signal has come."""
        assert self._loop is not None, "it is made before its task"
        try:
            self._loop.run_until_complete(task)
        except BaseException as error:
            # What the task raised it tells itself. A loop that was stopped raises a RuntimeError;
            # uvloop's may do so in its next run, too.
            if not task.done() and not (self._was_paused and isinstance(error, RuntimeError)):
                raise

    async def _run(self) -> T:
        if self._stopped:
            raise asyncio.CancelledError
        return await self._main()

    def stop(self) -> None:
        """Have it cancelled; called on another thread."""
        self._stopped = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed: it has come to its end
                self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None and not self._task.cancelling():
            self._task.cancel()

    def _wake(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._pause)

    def _pause(self) -> None:
        """Stop the loop, unless the signal has been handled, or the task is done, meanwhile."""
        if self._signals and self._loop and self._task and not self._task.done():
            self._was_paused = True
            self._loop.stop()


def run_blocking(
    main: Callable[[], Coroutine[object, object, T]],
    *,
    start: Callable[[threading.Thread], object] = threading.Thread.start,
) -> T:
    """Run `main()` to its end on a loop of its own and return its result, from any thread.

    Where a loop is running already, as in Jupyter, that loop is left alone (and blocked) while a
    private one does the work on a thread that lives for this call only.

    Args:
        main: Makes the coroutine.
        start: Starts that thread.

    Raises:
        RuntimeError: If there is no thread to be had; whatever `main` raises, too.
        OSError: If there are too few descriptors for a loop.
    """
    call = _Call(main)
    return _Aside(call).run(start) if _loop_is_running() else call.serve()


class _Aside(Generic[T]):
    """A call on a thread of its own. It is waited for: until its end it may write to memory.

    Ctrl-C may come at any point of the wait. So only plain locks are waited for, which are taken or
    not; the locks within those of `threading` and of futures may be left half-taken.
    """

    def __init__(self, call: _Call[T]) -> None:
        self._call = call
        self._begun, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()  # the thread releases it
        self._outcome: list[tuple[T | None, BaseException | None]] = []
        self._task = asyncio.current_task()
        self._requests = self._task.cancelling() if self._task else 0

    def run(self, start: Callable[[threading.Thread], object]) -> T:
        """Run the call, and return its result.

        Raises:
            BaseException: What the call raised, or was raised here meanwhile, as by Ctrl-C.
        """
        serve = partial(contextvars.copy_context().run, self._serve)
        thread = threading.Thread(target=serve, name="asyncloader_0", daemon=True)
        raised: BaseException | None = None
        try:
            # By another thread: what Ctrl-C interrupts within `Thread.start` it leaves half-done.
            _thread.start_new_thread(self._begin, (start, thread))
        except BaseException as error:
            if self._begun.acquire(blocking=False):
                raise
            raised = error
        while not self._outcome:
            try:
                while not self._outcome:  # within the `try`: going round is a point of Ctrl-C, too
                    if raised is not None:
                        self._call.stop()
                    self._wait(is_wanted=raised is None)
            except BaseException as error:  # noqa: BLE001  # raised in the end
                raised = error
        if thread.ident is not None:
            thread.join()
        result, failure = self._outcome.pop()
        try:
            if raised is not None:
                raise raised
            if failure is not None:
                raise failure
            return cast("T", result)
        finally:
            del raised, failure  # they know this frame

    def _begin(self, start: Callable[[threading.Thread], object], thread: threading.Thread) -> None:
        if not self._begun.acquire(blocking=False):
            return  # this start was interrupted, and is not waited for
        try:
            start(thread)
        except BaseException as error:  # noqa: BLE001  # raised where the call is waited for
            self._outcome.append((None, error))
            self._done.release()

    def _serve(self) -> None:
        try:
            self._outcome.append((self._call.serve(), None))
        except BaseException as error:  # noqa: BLE001  # raised where the call is waited for
            self._outcome.append((None, error))
        finally:
            self._done.release()

    def _wait(self, *, is_wanted: bool) -> None:
        if self._done.acquire(timeout=_PATIENCE) or not is_wanted or self._task is None:
            return
        # `asyncio.run` answers Ctrl-C by cancelling its task, which does not get its turn here.
        if self._task.cancelling() > self._requests:
            raise asyncio.CancelledError


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
