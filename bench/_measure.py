"""Measures several contenders in turn: A B C A B C …, so that drift is shared by all."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from asyncloader._memory.allocation import zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Role: TypeAlias = Literal["raw", "ours", "peer", "variant"]

PATIENCE = 3.0
"""Seconds that the rounds of one peer may take together, estimated by its first."""

LEAST_ROUNDS = 3
ENOUGH = 8.0
"""Seconds after which no round begins that is more than the least."""


def nothing() -> None:
    """Prepare nothing."""


def accept(_: object) -> None:
    """Find everything right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to do what a case asks for."""

    name: str
    role: Role
    run: Callable[[Any], Any]
    """Takes what `prepare` returned; this is what is timed."""

    prepare: Callable[[], Any] = nothing
    poison: Callable[[Any], object] = accept
    """Overwrites the destination before a run that is checked: what was there does not pass."""

    check: Callable[[Any], object] = accept
    """Fails unless what `run` returned is right."""

    clock: Callable[[Any], float] | None = None
    """Takes what `run` returned, and returns the seconds, where `run` measures them itself."""

    fresh: int = 0
    """Bytes of fresh memory that a run takes."""

    nbytes: int | None = None
    """Bytes that a run loads, where they are not those of the case."""

    def once(self, *, checked: bool) -> float:
        """Run, and return the seconds that took."""
        target = self.prepare()
        if checked:
            self.poison(target)
        else:
            gc.collect()  # or what earlier rounds left behind is cleared away within this one
            fault_in(self.fresh)
        start = time.perf_counter()
        result = self.run(target)
        seconds = time.perf_counter() - start
        if checked:
            self.check(result)
        return seconds if self.clock is None else self.clock(result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What one contender took."""

    name: str
    role: Role
    seconds: Sequence[float]
    nbytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def interleave(contenders: Sequence[Contender], *, rounds: int) -> list[Times]:
    """Run all of them once to warm up, checked, and then in turn, `rounds` times.

    Where that takes long, there are fewer rounds, and fewer still for a peer that is slow. Of one
    that is very slow, or with no rounds at all, warming up is what counts. Ours are checked once
    more at the end.
    """
    fault_in(max(contender.fresh for contender in contenders))
    warm = [contender.once(checked=True) for contender in contenders]
    turns = [
        min(rounds, int(PATIENCE / seconds)) if contender.role == "peer" else rounds
        for contender, seconds in zip(contenders, warm, strict=True)
    ]
    taken: list[list[float]] = [[] for _ in contenders]
    start = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > ENOUGH:
            break
        for contender, turn, seconds in zip(contenders, turns, taken, strict=True):
            if number < turn:
                seconds.append(contender.once(checked=False))
    for contender in contenders:
        if contender.role == "ours" and rounds:
            contender.once(checked=True)
    return [
        Times(name=one.name, role=one.role, seconds=seconds or [first], nbytes=one.nbytes)
        for one, seconds, first in zip(contenders, taken, warm, strict=True)
    ]


def fault_in(size: int) -> None:
    """Take twice so many bytes of fresh memory, touch them, and give them back.

    A virtual machine may give memory that has been free for some seconds back to its host. Then
    whoever takes it first pays for its return, ten times the price of reading a page into it.
    Twice, because what is taken next need not be the same pages: with as many bytes, one load in
    four was still ten times slower.
    """
    if size:
        zeros((2 * size,), torch.uint8).fill_(1)


def best(times: Sequence[Times], role: Role) -> Times | None:
    """Return the fastest of a role by its median, or `None` where there is none of it."""
    return min((one for one in times if one.role == role), key=lambda one: one.median, default=None)


def named(times: Sequence[Times], name: str) -> Times:
    """Return what the contender of a name took."""
    return next(one for one in times if one.name == name)
