"""How late the event loop is, and how much it gets done."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from examples.lag import percentile

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Lag", "Pulse", "Sample"]

_TICK = 0.01
_SAMPLE = 0.25
_LATELY = 5.0
_REMEMBERED = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How late a timer was over the last seconds. Seconds."""

    p50: float
    p99: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A quarter of a second."""

    at: float
    """When it ended, in seconds since 1970."""

    p50: float
    """Half of its ticks were no later than this, in seconds."""

    worst: float
    answered: int


class Pulse:
    """A timer that goes off a hundred times a second, and notes how late it is. A context manager.

    Takes a thousandth of a processor, and belongs to the event loop on which it was entered.

    Args:
        clock: Seconds, ever growing.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lately: deque[float] = deque([0.0], maxlen=round(_LATELY / _TICK))
        self._now: list[float] = []
        self._began = self._due = 0.0
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None
        self.samples: deque[Sample] = deque(maxlen=round(_REMEMBERED / _SAMPLE))
        self.answered = 0
        """Requests so far; whoever answers one counts it here."""

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._began = self._clock()
        self._wind()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def lag(self) -> Lag:
        """Over the last five seconds."""
        late = list(self._lately)
        return Lag(p50=percentile(late, 50), p99=percentile(late, 99), worst=max(late))

    @property
    def rate(self) -> float:
        """Requests per second, over the last one."""
        lately = list(self.samples)[-round(1 / _SAMPLE) :]
        return sum(sample.answered for sample in lately) / (max(len(lately), 1) * _SAMPLE)

    def _wind(self) -> None:
        self._due = self._clock() + _TICK
        self._timer = self._loop.call_later(_TICK, self._tick)

    def _tick(self) -> None:
        now = self._clock()
        # Timers of the loop have steps of a millisecond, and may come early by a part of one.
        late = max(now - self._due, 0.0)
        self._lately.append(late)
        self._now.append(late)
        if now - self._began >= _SAMPLE:
            self._note(now)
        self._wind()

    def _note(self, now: float) -> None:
        self.samples.append(
            Sample(
                at=time.time(),
                p50=percentile(self._now, 50),
                worst=max(self._now),
                answered=self.answered - self._seen,
            )
        )
        self._now, self._began, self._seen = [], now, self.answered
