"""Calls a coroutine function from synchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import signal
import sys
import threading
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from .pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator
    from concurrent.futures import Executor, Future
    from types import FrameType


T = TypeVar("T")

_PATIENCE = 0.1
"""Seconds between two looks at whether we are still wanted."""

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


def _one_thread() -> Executor:
    return WorkerPool(1, name="asyncloader", initializer=_all_signals)


def run_blocking(
    main: Callable[[], Coroutine[object, object, T]],
    *,
    one_thread: Callable[[], Executor] = _one_thread,
) -> T:
    """Run `main()` to its end on a loop of its own and return its result, from any thread.

    Where a loop is running already, as in Jupyter, that loop is left alone (and blocked) while a
    private one does the work on a thread that lives for this call only. Likewise where a signal's
    handler may come in between: it may do anything, such as to save, and would hold up, or end, a
    loop at any point. Such a handler itself runs `main()` on its own thread, which may hold locks
    that another thread would wait for, as that of a log.

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
        result: Future[T] | None = None
        try:
            with _no_signals():
                result = thread.submit(contextvars.copy_context().run, call.serve)
            _wait_for(result)
            return result.result()
        except BaseException as error:  # Ctrl-C: stop the load, and let the thread wind up
            call.stop()
            last = None if result is None else _outlast(result)
            if last is not None:
                raise last from error
            raise


def _handlers_may_run() -> bool:
    """Say whether this thread may have to run the handler of a signal, but for plain Ctrl-C.

    Not if it runs one already.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    found = map(signal.getsignal, signal.valid_signals())
    handlers = [one for one in found if callable(one) and one is not signal.default_int_handler]
    return bool(handlers) and not _is_running(handlers)


def _is_running(functions: Iterable[Callable[..., object]]) -> bool:
    """Say whether this thread is in one of some functions."""
    codes = set()
    for function in functions:
        while isinstance(function, partial):
            function = function.func  # noqa: PLW2901  # of the same function
        called = function if hasattr(function, "__code__") else type(function).__call__
        codes.add(getattr(inspect.unwrap(called), "__code__", None))
    frame: FrameType | None = sys._getframe()  # noqa: SLF001  # inspect.stack() reads the sources
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    """Hold signals back on this thread: one that is starting another holds a lock of Python's."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _all_signals() -> None:
    """Let this thread, and what it starts, get signals again."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _outlast(result: Future[T]) -> BaseException | None:
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
