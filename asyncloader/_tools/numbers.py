"""Numbers as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from .values import Value


_CELL = 10
_GAP = 1


def number_text(value: Value, digits: int = 4) -> str:
    """Return a number with so many digits, or all of them if it is whole."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


class Numbers:
    """Numbers below each other in columns, as many as there is room for.

    Args:
        values: What to show.
        omitted: How many more there are.
        one_line: Whether to leave out what does not fit into one line.
    """

    def __init__(self, values: Sequence[Value], omitted: int = 0, *, one_line: bool) -> None:
        texts = [number_text(value) for value in values]
        self._cell = max([_CELL - _GAP, *map(len, texts)]) + _GAP
        self._texts = [f"{text:>{self._cell - _GAP}}" for text in texts]
        self._omitted = omitted
        self._one_line = one_line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Say how much room it takes: at least one number, at best all in one line."""
        width = len(self._texts) * self._cell + len(_rest(self._omitted))
        return Measurement(min(self._cell, width), width).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield lines."""
        width = options.max_width
        if self._one_line:
            yield self._line(width)
            return
        each = max(width // self._cell, 1)
        for begin in range(0, len(self._texts), each):
            yield Text((" " * _GAP).join(self._texts[begin : begin + each]))
        if self._omitted:
            yield Text(_rest(self._omitted).strip(), "dim")

    def _line(self, width: int) -> Text:
        fit = len(self._texts)
        while fit > 1 and fit * self._cell + len(_rest(self._left_out(fit))) > width:
            fit -= 1
        line = Text((" " * _GAP).join(self._texts[:fit]), no_wrap=True, overflow="ellipsis")
        return line.append(_rest(self._left_out(fit)), "dim")

    def _left_out(self, shown: int) -> int:
        return self._omitted + len(self._texts) - shown


def _rest(number: int) -> str:
    return f"  … {number:,} more" if number else ""
