"""How far a load has come."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from asyncloader._display import AsDict

if TYPE_CHECKING:
    from collections.abc import Callable


_EVERY = 0.1
"""Seconds between two calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(AsDict):
    """A moment of a load."""

    bytes_done: int
    bytes_total: int
    """An estimate where only some rows of a block are wanted."""

    seconds: float
    """Since the load began."""

    current: str
    """The tensor or table that the last bytes belong to."""


class Meter:
    """Counts reads, and tells a listener now and then.

    Args:
        total: Bytes to read.
        listener: Called on the event loop, at most ten times a second and once at the end.
        clock: Seconds, ever growing.
    """

    def __init__(
        self,
        total: int,
        listener: Callable[[Progress], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total = total
        self.wanted = 0
        self.read = 0
        self.verified = 0
        self.reads = 0
        self._listener = listener
        self._clock = clock
        self._start = clock()
        self._told = self._start
        self._current = ""

    @property
    def seconds(self) -> float:
        """Since the load began."""
        return self._clock() - self._start

    def note(self, *, read: int, wanted: int, current: str, verified: int = 0) -> None:
        """Count one read of `read` bytes.

        Args:
            read: Bytes.
            wanted: The bytes among them that the load asked for.
            verified: The bytes among `wanted` that were compared with digests.
            current: The tensor or table that the last ones belong to.
        """
        self.read += read
        self.verified += verified
        self.wanted += wanted
        self.reads += 1
        self._current = current
        if self._listener is not None and (now := self._clock()) - self._told >= _EVERY:
            self._told = now
            self._tell(self.total)

    def finish(self) -> None:
        """Say that all is done."""
        if self._listener is not None:
            self._tell(self.wanted)

    def _tell(self, total: int) -> None:
        if self._listener is not None:
            moment = Progress(
                bytes_done=self.wanted,
                bytes_total=max(total, self.wanted),
                seconds=self.seconds,
                current=self._current,
            )
            self._listener(moment)


@dataclass(slots=True)
class Stages:
    """Passes on what several loads and saves tell, one after the other, as if they were one."""

    total: int
    """Bytes of all of them, about."""

    listener: Callable[[Progress], object] | None
    _before: int = 0
    _now: int = 0

    def tell(self, moment: Progress) -> None:
        """Tell of the present stage: this is its `progress`."""
        self._now = moment.bytes_done
        if self.listener is not None:
            done = self._before + self._now
            self.listener(replace(moment, bytes_done=done, bytes_total=max(self.total, done)))

    def next(self) -> None:
        """Begin the next stage."""
        self._before += self._now
        self._now = 0
