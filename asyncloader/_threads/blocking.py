"""Calls a coroutine function from synchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import sys
import threading
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from concurrent.futures import Executor, Future
    from types import FrameType


T = TypeVar("T")

_PATIENCE = 0.1
"""Seconds between two looks at whether we are still wanted."""

_PIPES = 5
"""A loop, its signals and its wake-ups take 9 descriptors."""


def _one_thread() -> Executor:
    return WorkerPool(1, name="asyncloader")


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
        self._handlers: dict[int, Callable[..., object]] = {}
        self._signals: dict[int, FrameType | None] = {}  # signals that wait for the loop

    def serve(self) -> T:
        """Run it to its end.

        Raises:
            BaseException: What it raised, or a handler of a signal.
        """
        raised: BaseException | None = None
        with self._own_handlers(), asyncio.Runner(loop_factory=_new_event_loop) as runner:
            self._loop = runner.get_loop()
            task = self._task = self._loop.create_task(self._run())
            while not (task.done() or self._loop.is_closed()):
                try:
                    self._handle_signals()
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
            # What the task raised it tells itself; a loop that is stopped raises a RuntimeError.
            stopped = isinstance(error, RuntimeError) and self._signals
            if not task.done() and not stopped:
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

    @contextlib.contextmanager
    def _own_handlers(self) -> Iterator[None]:
        """Have handlers of signals run between two steps of the loop, and while none is running.

        Python runs them at any point of the main thread. A handler may do anything, such as to
        save: it would wait for locks that the loop's step holds, or end the loop in mid-step.
        """
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in signal.valid_signals()}
            with contextlib.suppress(ValueError):  # an interpreter in which no handler runs
                for number, handler in found.items():
                    if callable(handler):
                        signal.signal(number, self._note_signal)
                        self._handlers[number] = handler
        try:
            yield
        finally:
            for own, handler in self._handlers.items():
                if signal.getsignal(own) == self._note_signal:  # else one has set another
                    signal.signal(own, handler)
            self._handle_signals()

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if number in self._signals:  # once more: a callback may never return to the loop
            self._handlers[number](number, frame)
            return
        self._signals[number] = frame
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed
                self._loop.call_soon_threadsafe(self._pause)

    def _pause(self) -> None:
        """Stop the loop, unless the signal has been handled, or the task is done, meanwhile."""
        if self._signals and self._loop and self._task and not self._task.done():
            self._loop.stop()

    def _handle_signals(self) -> None:
        while self._signals:
            number = next(iter(self._signals))
            self._handlers[number](number, self._signals.pop(number))


def run_blocking(
    main: Callable[[], Coroutine[object, object, T]],
    *,
    one_thread: Callable[[], Executor] = _one_thread,
) -> T:
    """Run `main()` to its end on a loop of its own and return its result, from any thread.

    Where a loop is running already, as in Jupyter, that loop is left alone (and blocked) while a
    private one does the work on a thread that lives for this call only.

    Args:
        main: Makes the coroutine.
        one_thread: Makes that thread.

    Raises:
        RuntimeError: If there is no thread to be had; whatever `main` raises, too.
        OSError: If there are too few descriptors for a loop.
    """
    call = _Call(main)
    if not _loop_is_running():
        return call.serve()
    with one_thread() as thread:
        result: Future[T] | None = None
        try:
            result = thread.submit(contextvars.copy_context().run, call.serve)
            _wait_for(result)
            return result.result()
        except BaseException as error:  # Ctrl-C: stop the load, and let the thread wind up
            call.stop()
            last = None if result is None else _outlast(result)
            if last is not None:
                raise last from error
            raise


def _outlast(result: Future[Any]) -> BaseException | None:
    """Wait for a call's end: its threads may write to memory until then.

    Returns:
        What was raised here meanwhile, as by Ctrl-C once more; the last of it.
    """
    last = None
    while not result.done():
        try:
            wait([result])
        except BaseException as error:  # noqa: BLE001  # raised in the end
            last = error
    return last


def _wait_for(result: Future[T]) -> None:
    """Wait, but not longer than the task around us is wanted.

    `asyncio.run` answers Ctrl-C by cancelling its task; one that never awaits would not notice.
    """
    task = asyncio.current_task() if _loop_is_running() else None
    requests = task.cancelling() if task else 0
    while not wait([result], timeout=_PATIENCE).done:
        if task and task.cancelling() > requests:
            raise asyncio.CancelledError


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
