"""What was measured: kept, shown as tables, and written to a file."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numba
import torch
from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import RenderableType


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A load beside the raw read of the same bytes."""

    case: str
    what: str
    nbytes: int
    """On disk."""

    load_seconds: Sequence[float]
    raw_seconds: Sequence[float]
    """Measured in turn: raw, load, raw, load, …"""

    goal: float | None
    """The least that `ratio` should be."""

    @property
    def ratio(self) -> float:
        """Rate of the load over that of the raw read, medians both."""
        return statistics.median(self.raw_seconds) / statistics.median(self.load_seconds)


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
    """How late a timer on the event loop was, in seconds."""

    case: str
    what: str
    ticks: int
    median: float
    p99: float
    worst: float


@dataclass(slots=True)
class Results:
    """All that one run measured."""

    scale: str
    speeds: list[Speed] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    lags: list[Lag] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write everything to a JSON file."""
        facts = {
            "machine": machine(),
            "scale": self.scale,
            "speed": [{**asdict(speed), "ratio": speed.ratio} for speed in self.speeds],
            "memory": [asdict(memory) for memory in self.memories],
            "lag": [asdict(lag) for lag in self.lags],
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def __rich__(self) -> RenderableType:
        tables = []
        if self.speeds:
            tables.append(_speed_table(self.speeds, full=self.scale == "full"))
        if self.memories:
            tables.append(_memory_table(self.memories))
        if self.lags:
            tables.append(_lag_table(self.lags))
        about = " · ".join(str(value) for value in machine().values())
        return Group(*tables, f"[dim]{about}[/]")


def machine() -> dict[str, str | int]:
    """Say what the measurements were made on."""
    return {
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "processor": _processor(),
        "cores": f"{os.cpu_count()} cores",
        "memory": f"{_memory_gib():.0f} GiB",
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
        "numba": f"numba {numba.__version__}",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # a pseudo-file
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _speed_table(speeds: Sequence[Speed], *, full: bool) -> Table:
    table = _table("Speed, medians", "load s", "load GB/s", "raw s", "raw GB/s", "ratio", "goal")
    for speed in speeds:
        load, raw = statistics.median(speed.load_seconds), statistics.median(speed.raw_seconds)
        table.add_row(
            speed.case,
            speed.what,
            f"{load:.3f}",
            f"{speed.nbytes / load / 1e9:.1f}",
            f"{raw:.3f}",
            f"{speed.nbytes / raw / 1e9:.1f}",
            f"{speed.ratio:.2f}",
            _goal(speed) if full else "",
        )
    return table


def _goal(speed: Speed) -> str:
    if speed.goal is None:
        return "none"
    return f"{speed.goal} {'[green]✓[/]' if speed.ratio >= speed.goal else '[red]✗[/]'}"


def _memory_table(memories: Sequence[Memory]) -> Table:
    table = _table("\nMemory, MiB", "destination", "id index", "above", "allowed", "")
    for memory in memories:
        sizes = (memory.destination, memory.index, memory.above, memory.allowed)
        table.add_row(
            memory.case,
            memory.what,
            *(f"{size / 2**20:,.0f}" for size in sizes),
            "[green]✓[/]" if memory.above <= memory.allowed else "[red]✗[/]",
        )
    return table


def _lag_table(lags: Sequence[Lag]) -> Table:
    table = _table("\nLag of the event loop, ms", "ticks", "median", "p99", "worst")
    for lag in lags:
        times = (f"{seconds * 1e3:.1f}" for seconds in (lag.median, lag.p99, lag.worst))
        table.add_row(lag.case, lag.what, f"{lag.ticks:,}", *times)
    return table
