"""Watches how late the caller's event loop is, and has the load go slower or faster for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from asyncloader._display import AsDict

if TYPE_CHECKING:
    from collections.abc import Callable

    from .gate import Gate


_log = logging.getLogger(__name__)

# Chosen by trying: see docs/performance.md.
_FIRST = 0.3
_FASTER = 0.02
_SLOWEST = 0.1
_SLOWEST_IN_VAIN = 0.25
_IN_VAIN = 20
"""Decisions in a row after which the slowest pace has not helped: another program is in the way."""

_WINDOW = 0.05
"""Seconds between two decisions."""

_TICKS = 2
"""Ticks within the bound, at most one in a millisecond and one in ten at least."""

_STEP = 1e-4
"""Seconds: lags are counted in steps."""

_MOST_PACES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopLag(AsDict):
    """How late the event loop was during a load, and what the load did about it. Seconds."""

    p50: float
    """Half of the ticks of a timer were no later than this."""

    p99: float
    worst: float
    bound: float
    """What the load was to keep to: `max_loop_lag`."""

    paces: tuple[tuple[float, float], ...]
    """When, since the load began, it went on at which pace: the share of the processors that its
    threads might keep busy. 1 is full speed."""

    held_back: float
    """How much sooner the load would have ended at full speed, about."""

    def __str__(self) -> str:
        return (
            f"loop late by {self.p50 * 1e3:.1f} ms (half of the time), {self.p99 * 1e3:.1f} "
            f"(99 of 100), {self.worst * 1e3:.1f} at worst; held back {self.held_back:.2f} s"
        )


class LagWatch:
    """A timer on the event loop that says how late it was called, and what follows from that.

    While it comes later than the bound, the pace is halved, at most once in 50 ms, down to a tenth;
    while it comes earlier than half of the bound, it grows by a fiftieth. Where a second of the
    slowest pace has not helped, another program is in the way, and a load that takes ten times as
    long would only be in its way for longer: then a quarter is the slowest. An async context
    manager.

    Args:
        gate: Is given the pace.
        bound: Seconds.
        pressure: Says how little room the program has for a load, 0 to 1: the pace is at most what
            is left. Called on the event loop, twenty times a second. What it raises is logged, and
            it is not called again.
        clock: Seconds, ever growing.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        bound: float,
        pressure: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._gate = gate
        self._bound = bound
        self._pressure = pressure
        self._clock = clock
        self._period = min(max(bound / _TICKS, 1e-3), 1e-2)
        self._lags: Counter[int] = Counter()
        self._worst = self._worst_lately = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._start = self._decided = self._noted = clock()
        self._held_back = 0.0
        self._paces: list[tuple[float, float]] = []
        self._slowest = _SLOWEST
        self._in_vain = 0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._start = self._decided = self._noted = self._clock()
        self._go(min(_FIRST, self._most()))
        self._wind()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._note_time(self._clock())

    @property
    def lag(self) -> LoopLag:
        """What was seen so far."""
        return LoopLag(
            p50=self._percentile(0.5),
            p99=self._percentile(0.99),
            worst=self._worst,
            bound=self._bound,
            paces=tuple(self._paces),
            held_back=self._held_back,
        )

    def _wind(self) -> None:
        self._due = self._clock() + self._period
        self._timer = self._loop.call_later(self._period, self._tick)

    def _tick(self) -> None:
        now = self._clock()
        self.note(max(now - self._due, 0.0), now)
        self._wind()

    def note(self, lag: float, now: float) -> None:
        """Take a tick in that was so late, and decide."""
        self._lags[int(lag / _STEP)] += 1
        self._worst = max(self._worst, lag)
        self._worst_lately = max(self._worst_lately, lag)
        if now - self._decided < _WINDOW:
            return
        self._note_time(now)
        self._decided = now
        pace = self._gate.allowed
        late, early = self._worst_lately > self._bound, self._worst_lately < self._bound / 2
        self._in_vain = self._in_vain + 1 if pace <= _SLOWEST and not early else 0
        if self._in_vain >= _IN_VAIN:
            self._slowest = _SLOWEST_IN_VAIN
        if late:
            pace /= 2
        elif early:
            pace += _FASTER
        self._worst_lately = 0.0
        self._go(min(max(pace, self._slowest), self._most()))

    def _most(self) -> float:
        if self._pressure is None:
            return 1.0
        try:
            pressure = min(max(float(self._pressure()), 0.0), 1.0)
        except Exception:  # noqa: BLE001  # a user's function may raise anything
            _log.exception("pressure failed; the load goes on without it")
            self._pressure = None
            return 1.0
        return max(1.0 - pressure, _SLOWEST)

    def _go(self, pace: float) -> None:
        if self._paces and pace == self._gate.allowed:
            return
        self._gate.allowed = pace
        self._paces.append((self._clock() - self._start, pace))
        if len(self._paces) > _MOST_PACES:
            del self._paces[1::2]

    def _note_time(self, now: float) -> None:
        self._held_back += (now - self._noted) * (1 - self._gate.allowed)
        self._noted = now

    def _percentile(self, share: float) -> float:
        wanted = share * self._lags.total()
        seen = 0
        for step in sorted(self._lags):
            seen += self._lags[step]
            if seen >= wanted:
                return min((step + 1) * _STEP, self._worst)
        return 0.0
