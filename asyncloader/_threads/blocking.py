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
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from .pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Executor, Future


T = TypeVar("T")

_PATIENCE = 0.1
"""Seconds between two looks at whether we are still wanted."""

_ONE_THREAD = partial(WorkerPool, 1, name="asyncloader", initializer=int)

_PIPES = 5
"""A loop, its signals and its wake-ups take 9 descriptors."""


def _new_event_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop  # noqa: PLC0415  # who awaits has a loop

    _check_descriptors()
    return uvloop.new_event_loop()


def _check_descriptors() -> None:
    """See that a loop gets its descriptors.

    One that does not get them all says so in other words, and keeps open those that it got.

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
        self._task: asyncio.Task[object] | None = None
        self._stopped = False

    def serve(self) -> T:
        """Run it to its end."""
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            self._loop = runner.get_loop()
            return runner.run(self._run())

    async def _run(self) -> T:
        self._task = asyncio.current_task()
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
        if self._task is not None:
            self._task.cancel()


def run_blocking(
    main: Callable[[], Coroutine[object, object, T]],
    *,
    one_thread: Callable[[], Executor] = _ONE_THREAD,
) -> T:
    """Run `main()` to its end on a loop of its own and return its result, from any thread.

    Where a loop is running already, as in Jupyter, that loop is left alone (and blocked) while a
    private one does the work on a thread that lives for this call only. Likewise where a signal's
    handler may come in between: it may do anything, such as to save, and would hold up, or end, a
    loop at any point.

    Args:
        main: Makes the coroutine.
        one_thread: Makes that thread.

    Raises:
        RuntimeError: If there is no thread to be had; whatever `main` raises, too.
        OSError: If there are too few descriptors for a loop.
    """
    call = _Call(main)
    if not _loop_is_running() and not _handlers_may_run():
        return call.serve()
    with one_thread() as thread:
        result = thread.submit(contextvars.copy_context().run, call.serve)
        try:
            _wait_for(result)
            return result.result()
        except BaseException:  # Ctrl-C: stop the load, and let the thread wind up
            call.stop()
            raise


def _handlers_may_run() -> bool:
    """Say whether this thread may have to run the handler of a signal, but for plain Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        return False
    handlers = map(signal.getsignal, signal.valid_signals())
    return any(callable(one) and one is not signal.default_int_handler for one in handlers)


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
