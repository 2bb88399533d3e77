"""What was measured, as values, and as a file."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from bench._machine import machine
from bench._measure import best, named

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench._measure import Times


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Contenders of one case."""

    case: str
    what: str
    nbytes: int | None
    """What each of them loads; `None` where bytes say nothing."""

    times: Sequence[Times]
    skipped: Sequence[str] = ()
    """Peers that are not installed."""

    @property
    def raw(self) -> Times | None:
        return best(self.times, "raw")

    @property
    def ours(self) -> Times | None:
        return best(self.times, "ours")

    def ratio(self, one: Times) -> float | None:
        """Return how fast it is, raw being 1."""
        return self.raw.median / one.median if self.raw is not None else None


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound that a figure shall keep."""

    sense: Literal["≥", "≤"]
    bound: float

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.sense == "≥" else value <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number, and what it should be."""

    case: str
    what: str
    value: float
    unit: str
    goal: Goal | None = None

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.goal.reached(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The most that a process held during a load, above what it held before and its results."""

    case: str
    what: str
    destination: int
    """Bytes that stay: tensors, or ids and rows."""

    index: int
    """Bytes of the id index."""

    above: int
    """Bytes at the peak, less those before the load, less `destination`."""

    allowed: int
    """`max_inflight_bytes`, `index`, and 64 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How late a timer on the event loop was, in seconds.

    Rounds in which the host let others run in this machine's place are left out, as far as there
    are any others.
    """

    case: str
    what: str
    rounds: int
    stolen: int
    """Rounds that were left out."""

    ticks: int
    median: float
    p99: float
    worst: float
    worst_of_all: float
    """Those that were left out included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What took how long, by its size."""

    case: str
    what: str
    unit: str
    """Of the sizes."""

    sizes: Sequence[float]
    seconds: Sequence[Sequence[float]]

    @property
    def medians(self) -> list[float]:
        return [statistics.median(some) for some in self.seconds]

    def worst_doubling(self) -> float:
        """Return by how much the time grew at most for twice the size."""
        steps = zip(itertools.pairwise(self.sizes), itertools.pairwise(self.medians), strict=True)
        return max(
            math.pow(after / before, 1 / math.log2(large / small))
            for (small, large), (before, after) in steps
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How late answers of a service were, in seconds, from when their requests were due."""

    case: str
    what: str
    answers: int
    failed: int
    p50: float
    p99: float
    p999: float
    worst: float
    while_loading: float | None
    """The 99th percentile of those that were due while a version came in."""

    load: float | None
    """Seconds that it took to come in."""


@dataclass(slots=True)
class Results:
    """All that one run measured."""

    scale: str
    speeds: list[Speed] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    lags: list[Lag] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(
            (self.speeds, self.figures, self.memories, self.lags, self.growths, self.latencies)
        )

    def figure(
        self, case: str, what: str, value: float, unit: str, goal: Goal | None = None
    ) -> None:
        """Note a figure."""
        self.figures.append(Figure(case=case, what=what, value=value, unit=unit, goal=goal))

    def write(self, path: Path) -> None:
        """Write everything to a JSON file."""
        facts = {
            "machine": machine(),
            "scale": self.scale,
            "goals": [asdict(one) | {"reached": one.reached} for one in self.figures],
            "speed": [_with_ratios(speed) for speed in self.speeds],
            "memory": [asdict(memory) for memory in self.memories],
            "lag": [asdict(lag) for lag in self.lags],
            "growth": [asdict(growth) for growth in self.growths],
            "latency": [asdict(latency) for latency in self.latencies],
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def against_raw(results: Results, speed: Speed, goal: Goal | None, name: str | None = None) -> None:
    """Note how ours, or a variant of it of that name, compares with the raw read."""
    ours = speed.ours if name is None else named(speed.times, name)
    if speed.raw is None or ours is None:
        raise LookupError(f"{speed.case} has no raw read, or nothing of ours")
    ratio = speed.raw.median / ours.median
    what = f"{'' if name is None else f'{name}, '}beside {speed.raw.name}"
    results.figure(speed.case, what, ratio, "of its speed", goal)


def against_peers(results: Results, speed: Speed, goal: Goal) -> None:
    """Note how ours compares with the best peer, if there is one."""
    peer = best(speed.times, "peer")
    if peer is not None and speed.ours is not None:
        ratio = peer.median / speed.ours.median
        results.figure(speed.case, f"beside {peer.name}", ratio, "of its speed", goal)


def _with_ratios(speed: Speed) -> dict[str, object]:
    times = [asdict(one) | {"median": one.median, "ratio": speed.ratio(one)} for one in speed.times]
    return asdict(speed) | {"times": times}
