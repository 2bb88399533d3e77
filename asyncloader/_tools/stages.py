"""Tells of several loads and saves, one after the other, as if they were one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncloader._loading.progress import Progress


Tell: TypeAlias = "Callable[[int, int, str], object]"
"""Takes bytes done, bytes in all (0 if nobody knows), and the name of what they belong to."""


@dataclass(slots=True)
class Stages:
    """Passes on what each stage tells, with the bytes of those before it."""

    total: int
    """Bytes of all of them, about."""

    listener: Callable[[Progress], object] | None
    _before: int = 0
    _now: int = 0

    def tell(self, moment: Progress) -> None:
        """Tell of the present stage; what it is given as `progress`."""
        self._now = moment.bytes_done
        if self.listener is not None:
            done = self._before + self._now
            self.listener(replace(moment, bytes_done=done, bytes_total=max(self.total, done)))

    def next(self) -> None:
        """Begin the next stage."""
        self._before += self._now
        self._now = 0


def telling(tell: Tell, doing: str) -> Callable[[Progress], object]:
    """Return what passes progress on to a bar; `doing` is shown where it has no name."""

    def listen(moment: Progress) -> None:
        tell(moment.bytes_done, moment.bytes_total, moment.current or doing)

    return listen
