"""Names as a terminal can show them: nothing in them is obeyed, long ones lose their middle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.measure import Measurement
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Name", "escaped", "middle_cut", "shown"]

_DOTS = "…"
_SHORTEST = 16
"""Cells that a name keeps however narrow the terminal is."""


def shown(name: str) -> str:
    """Return a name with what cannot be seen escaped; in quotes where its ends would be lost."""
    text = escaped(name)
    return text if text and text == text.strip() else f'"{text}"'


def escaped(text: str) -> str:
    """Return a text in which control characters, and others that show nothing, are escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text.replace("\\", "\\\\")
    )


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
    """A name in a cell of a rich table: one line, as wide as there is room.

    Args:
        name: As it stands in the checkpoint.
        style: Rich's.
        indent: Cells before it.
    """

    def __init__(self, name: str, style: str = "", *, indent: int = 0) -> None:
        self._text = shown(name)
        self._style = style
        self._indent = indent

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Say how much room it takes: at least some, at best all."""
        width = self._indent + cell_len(self._text)
        return Measurement(min(width, _SHORTEST), width).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one line."""
        text = middle_cut(self._text, max(options.max_width - self._indent, 1))
        yield Text(" " * self._indent + text, self._style, no_wrap=True)
