"""When handlers of signals run during a blocking call."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


_STUCK = 1.0
"""Seconds. A loop that has not ended its step by then may never do so: a handler runs at once."""


class Signals:
    """Calls handlers of signals between two steps of a loop, while none is running.

    Python calls them at any point of the main thread. A handler may do anything, such as to save:
    it would wait for locks that the loop's step holds, or end the loop in mid-step. A signal that
    comes again before its handler has run counts once, as a signal does that is pending.

    A context manager; on other threads than the main one it does nothing.

    Args:
        wake: Called in the place of a handler: has the loop end its step.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._pid = os.getpid()
        self._is_over = False
        self._wakeup_fd = -1
        self._handlers: dict[int, Callable[..., object]] = {}
        self._waiting: dict[int, tuple[FrameType | None, float]] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            try:
                self._take_over()
            except BaseException:  # of a handler that was not replaced yet
                self.__exit__()
                raise
        return self

    def _take_over(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed; or as below
            # A loop that rests meanwhile is told by way of its descriptor, which our loop replaces.
            self._wakeup_fd = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(self._wakeup_fd)
        with contextlib.suppress(ValueError):  # an interpreter in which no handler runs
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        raised: BaseException | None = None
        while not self._is_over:
            try:
                for number, handler in self._handlers.items():
                    if signal.getsignal(number) == self._note:  # else the program has set another
                        signal.signal(number, handler)
                self._is_over = True
            except BaseException as error:  # noqa: BLE001  # a handler's; raised when all are back
                raised = error
        self.handle()
        if raised is not None:
            raise raised

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_over or os.getpid() != self._pid:  # it was kept and put back, or we were forked
            self._handlers[number](number, frame)
            return
        _, since = self._waiting.setdefault(number, (frame, time.monotonic()))
        if time.monotonic() - since > _STUCK:
            self._waiting.pop(number, None)
            self._handlers[number](number, frame)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._wake()

    def handle(self) -> None:
        """Call the handlers of all signals that have come.

        Raises:
            BaseException: What the last one raised that did.
        """
        raised: BaseException | None = None
        while self._waiting:
            number = next(iter(self._waiting))
            frame, _ = self._waiting.pop(number)
            try:
                self._handlers[number](number, frame)
            except BaseException as error:  # noqa: BLE001  # the others come first
                raised = error
            if self._wakeup_fd >= 0:
                with contextlib.suppress(OSError):  # it is full, or closed
                    os.write(self._wakeup_fd, bytes([number]))
        if raised is not None:
            raise raised
