"""When each step of a load began, and how long it took."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from asyncloader._display import AsDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


Step = Literal["plan", "read", "verify", "copy", "index", "commit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span(AsDict):
    """One step of a load."""

    step: Step
    """What kind of work it was."""

    name: str
    """A shard, a table, or a part of planning."""

    lane: str
    """The asyncio task that did it, or waited for the thread that did: spans of one lane follow
    each other, or lie within each other."""

    start: float
    """Seconds, by `time.perf_counter`."""

    seconds: float
    nbytes: int
    """Bytes that it was about, 0 where that says nothing."""


class Tracer:
    """Tells a listener about every step, on the event loop, when it is over.

    Args:
        listener: Gets a `Span`; `None` makes tracing free.
    """

    def __init__(self, listener: Callable[[Span], object] | None) -> None:
        self._listener = listener

    def span(
        self, step: Step, name: str, nbytes: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        """Measure the block."""
        if self._listener is None:
            return contextlib.nullcontext()
        return self._measured(step, name, nbytes)

    def note(self, step: Step, name: str, start: float, nbytes: int = 0) -> None:
        """Tell that a step which began at `start` is over."""
        if self._listener is None:
            return
        seconds = time.perf_counter() - start
        task = asyncio.current_task()
        lane = "asyncloader" if task is None else task.get_name()
        self._listener(
            Span(step=step, name=name, lane=lane, start=start, seconds=seconds, nbytes=nbytes)
        )

    @contextlib.contextmanager
    def _measured(self, step: Step, name: str, nbytes: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.note(step, name, start, nbytes)
