"""Shows what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from bench._machine import machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from bench._results import Figure, Growth, Lag, Latency, Memory, Results, Speed

STYLES = {"raw": "dim", "ours": "bold", "peer": "", "variant": ""}


def tables_of(results: Results) -> RenderableType:
    """Return a table for each kind of result; goals are for the full scale."""
    tables: list[RenderableType] = []
    if results.speeds:
        tables.append(_speeds(results.speeds))
    if results.memories:
        tables.append(_memories(results.memories))
    if results.lags:
        tables.append(_lags(results.lags))
    if results.latencies:
        tables.append(_latencies(results.latencies))
    if results.growths:
        tables.append(_growths(results.growths))
    if results.figures:
        tables.append(_goals(results.figures, full=results.scale == "full"))
    return Group(*tables, f"[dim]{' · '.join(machine().values())}[/]")


def _table(title: str, *columns: str, texts: int) -> Table:
    """Return an empty table whose first columns are texts, the others numbers."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None)
    for number, column in enumerate(columns):
        text = number < texts
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    return table


def _speeds(speeds: Sequence[Speed]) -> Table:
    columns = ("case", "loader", "median s", "min … max", "rounds", "GB/s", "of raw")
    table = _table("Time", *columns, texts=2)
    for speed in speeds:
        table.add_section()
        table.add_row(speed.case, f"[italic]{speed.what}[/]")
        for row in _contenders(speed):
            table.add_row("", *row)
        for name in speed.skipped:
            table.add_row("", name, "absent")
    return table


def _contenders(speed: Speed) -> Iterator[list[str]]:
    for one in speed.times:
        nbytes = one.nbytes or speed.nbytes
        ratio = speed.ratio(one)
        style = STYLES[one.role]
        cells = (
            one.name,
            seconds_text(one.median),
            f"{seconds_text(min(one.seconds))} … {seconds_text(max(one.seconds))}",
            str(len(one.seconds)),
            f"{nbytes / one.median / 1e9:.2f}" if nbytes else "",
            f"{ratio:.2f}" if ratio is not None else "",
        )
        yield [f"[{style}]{cell}[/]" if style else cell for cell in cells]


def seconds_text(seconds: float) -> str:
    """Return seconds with three digits at least."""
    return f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.5f}"


def _goals(figures: Sequence[Figure], *, full: bool) -> Table:
    columns = ("case", "what", "measured", "", "goal", "")
    table = _table("Goals", *columns, texts=2)
    table.columns[3].justify = "left"
    for figure in figures:
        goal = figure.goal
        mark = {None: "", True: "[green]✓[/]", False: "[red]✗[/]"}[figure.reached if full else None]
        bound = f"{goal.sense} {number_text(goal.bound)}" if goal is not None else ""
        table.add_row(figure.case, figure.what, number_text(figure.value), figure.unit, bound, mark)
    return table


def number_text(value: float) -> str:
    """Return a number with three digits or so."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def _memories(memories: Sequence[Memory]) -> Table:
    columns = ("case", "MiB", "destination", "id index", "above", "allowed")
    table = _table("Memory", *columns, texts=2)
    for memory in memories:
        sizes = (memory.destination, memory.index, memory.above, memory.allowed)
        table.add_row(memory.case, memory.what, *(f"{size / 2**20:,.0f}" for size in sizes))
    return table


def _lags(lags: Sequence[Lag]) -> Table:
    columns = ("case", "ms", "rounds", "ticks", "median", "p99", "worst", "of all")
    table = _table("Lag of the event loop", *columns, texts=2)
    for lag in lags:
        times = (
            f"{seconds * 1e3:.1f}" for seconds in (lag.median, lag.p99, lag.worst, lag.worst_of_all)
        )
        rounds = f"{lag.rounds - lag.stolen} of {lag.rounds}"
        table.add_row(lag.case, lag.what, rounds, f"{lag.ticks:,}", *times)
    return table


def _latencies(latencies: Sequence[Latency]) -> Table:
    columns = ("case", "ms", "answers", "failed", "p50", "p99", "p99.9", "worst", "loading", "load")
    table = _table("Latency of a service; loading: p99 while the load ran, s", *columns, texts=2)
    for one in latencies:
        times = (one.p50, one.p99, one.p999, one.worst, one.while_loading)
        table.add_row(
            one.case,
            one.what,
            f"{one.answers:,}",
            f"{one.failed:,}",
            *("" if seconds is None else f"{seconds * 1e3:.1f}" for seconds in times),
            "" if one.load is None else f"{one.load:.2f} s",
        )
    return table


def _growths(growths: Sequence[Growth]) -> Table:
    table = _table("Time against size", "case", "what", "size", "median s", texts=2)
    for growth in growths:
        for size, median in zip(growth.sizes, growth.medians, strict=True):
            table.add_row(growth.case, growth.what, f"{size:,.0f} {growth.unit}", f"{median:.4f}")
    return table
