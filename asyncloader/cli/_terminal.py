"""Draws results: a console that obeys no part of a name; names, numbers, facts, grids."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from asyncloader._display import escaped
from asyncloader._loading.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from rich.console import ConsoleOptions, RenderableType, RenderResult

    from asyncloader._loading.progress import Progress
    from asyncloader._tools.values import Value

    Listener: TypeAlias = Callable[[Progress], object]
    Fact: TypeAlias = tuple[str, RenderableType]

T = TypeVar("T")

_UNLIMITED = 1 << 14  # a pipe has no width: nothing is cut
_DOTS = "…"
_SHORTEST = 16  # cells that a name keeps however narrow the terminal is
_MOMENT = 0.3  # seconds
_NAME = 24  # cells of the name beside a bar
_CELL = 10
SHOWN = 20  # lines of a list, unless all are wanted
# A line below the titles, and no room between columns but their padding.
_UNDERLINED = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  # what rich is handling: `run` says what becomes of it


def console(*, stderr: bool = False, markup: bool = False) -> Console:
    """Return a console that takes names as they are: no markup and no emoji codes."""
    made = _Console(stderr=stderr, markup=markup, emoji=False, highlight=False)
    if not made.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        made.width = _UNLIMITED
    return made


def show(result: RenderableType, *, markup: bool = False) -> None:
    """Print a result; with `markup`, plain `str` in it are rich markup, and must not be names."""
    console(markup=markup).print(result)


def complain(message: str) -> None:
    """Say on stderr, in one line, what went wrong."""
    line = " ".join(part.strip() for part in message.splitlines())
    console(stderr=True).print(
        Text.assemble(("asyncloader: ", "bold red"), escaped(line)), soft_wrap=True
    )


def bar(doing: str, out: Console | None = None) -> AbstractContextManager[Listener]:
    """Return a bar on stderr, or `out`, that shows itself if the block takes longer than a moment.

    It says `doing` where there is no name.
    """
    return progress_bar(
        doing,
        console=out or console(stderr=True),
        label=lambda name: middle_cut(shown(name), _NAME),
        after=_MOMENT,
    )


def shown(name: str) -> str:
    """Return a name with invisible characters escaped; in quotes if its ends are spaces."""
    text = escaped(name)
    return text if text and text == text.strip() else f'"{text}"'


def middle_cut(text: str, width: int) -> str:
    """Return a text of at most `width` cells on the terminal, its middle left out if need be."""
    if cell_len(text) <= width:
        return text
    room = max(width - cell_len(_DOTS), 0)
    tail = _ending(text, room // 2)
    head = _ending(text[::-1], room - cell_len(tail))[::-1]
    return f"{head}{_DOTS}{tail}"


def _ending(text: str, width: int) -> str:
    """Return the longest end of a text that fits into `width` cells."""
    begin = len(text)
    while begin and cell_len(text[begin - 1 :]) <= width:
        begin -= 1
    return text[begin:]


class Name:
    """A name in a cell of a rich table: one line, as wide as there is room."""

    def __init__(self, name: str, style: str = "", *, indent: int = 0) -> None:
        self._text = shown(name)
        self._style = style
        self._indent = indent

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = self._indent + cell_len(self._text)
        return Measurement(min(width, _SHORTEST), width).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = middle_cut(self._text, max(options.max_width - self._indent, 1))
        yield Text(" " * self._indent + text, self._style, no_wrap=True)


class Numbers:
    """Numbers below each other in columns, as many as there is room for.

    Args:
        values: The numbers.
        omitted: How many more there are.
        one_line: Whether to leave out those that do not fit into one line.
    """

    def __init__(self, values: Sequence[Value], omitted: int = 0, *, one_line: bool) -> None:
        texts = [number_text(value) for value in values]
        self._cell = max([_CELL, *(len(text) + 1 for text in texts)])
        self._texts = [f"{text:>{self._cell - 1}}" for text in texts]
        self._omitted = omitted
        self._one_line = one_line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = len(self._texts) * self._cell + len(_rest(self._omitted))
        return Measurement(min(self._cell, width), width).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if self._one_line:
            yield self._line(width)
            return
        each = max(width // self._cell, 1)
        for begin in range(0, len(self._texts), each):
            yield Text(" ".join(self._texts[begin : begin + each]))
        if self._omitted:
            yield Text(_rest(self._omitted).strip(), "dim")

    def _line(self, width: int) -> Text:
        more = self._omitted + len(self._texts)
        fit = len(self._texts)
        while fit > 1 and fit * self._cell + len(_rest(more - fit)) > width:
            fit -= 1
        line = Text(" ".join(self._texts[:fit]), no_wrap=True, overflow="ellipsis")
        return line.append(_rest(more - fit), "dim")


def _rest(number: int) -> str:
    return f"  … {number:,} more" if number else ""


def number_text(value: Value, digits: int = 4) -> str:
    """Return a number with so many digits, or all of them if it is whole."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def count(number: int) -> str:
    """Return a number with separators."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """Return `1 table`, `2 tables`."""
    return f"{count(number)} {noun}{'s' * (number != 1)}"


def holds(tables: int, ids: int, tensors: int) -> str:
    """Return `2 tables of 5 ids, 1 tensor`."""
    return f"{plural(tables, 'table')} of {plural(ids, 'id')}, {plural(tensors, 'tensor')}"


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as people read it."""
    return " × ".join(map(count, shape)) if shape else "scalar"  # noqa: RUF001  # it is meant


def facts(title: str | None, lines: Iterable[Fact]) -> RenderableType:
    """Show a few facts about something in a frame, each with its title."""
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for line in lines:
        grid.add_row(*line)
    return Panel(
        Padding(grid, (0, 1)),
        title=None if title is None else Text(title, "bold cyan"),
        title_align="left",
        border_style="dim",
        expand=False,
    )


def path_fact(path: str, title: str = "path") -> Fact:
    """Return the fact that a checkpoint has a path."""
    return title, Text(escaped(path), "bold", overflow="fold")


def name_fact(title: str, name: str) -> Fact:
    """Return the fact that a thing has a name."""
    return title, Text(shown(name), "bold", overflow="fold")


def odd_fact(title: str, text: str) -> Fact:
    """Return the fact that something is odd."""
    return title, Text(escaped(text), "yellow")


def indented(what: RenderableType) -> RenderableType:
    """Set something a little to the right, as wide as it is."""
    return Padding(what, (0, 2), expand=False)


def section(
    items: Sequence[T],
    draw: Callable[[Sequence[T]], RenderableType],
    what: str,
    *,
    everything: bool,
) -> list[RenderableType]:
    """Draw the first of some items, unless there are none, and say how many more of `what` are."""
    if not items:
        return []
    most = len(items) if everything else SHOWN
    parts: list[RenderableType] = ["", indented(draw(items[:most]))]
    if len(items) > most:
        text = f"and {count(len(items) - most)} {what}; --all shows them"
        parts.append(indented(Text(text, "dim italic")))
    return parts


def grid_of_numbers(first: str, *others: str, left: Iterable[str] = (), gap: int = 3) -> Table:
    """Return an empty table: names in its first column, then numbers, to the right.

    The titles of the other columns that are no numbers are in `left`; `gap` is in cells.
    """
    table = Table(
        box=_UNDERLINED,
        show_edge=False,
        padding=(0, gap - 1, 0, 0),
        pad_edge=False,
        header_style="dim",
        border_style="dim",
    )
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    return table
