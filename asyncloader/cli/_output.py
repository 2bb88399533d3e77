"""Where output goes: results to stdout, all else to stderr; in colour on terminals only."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from typing import TYPE_CHECKING

import orjson
import typer
from rich.console import Console
from rich.text import Text

from ._names import escaped

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "PIPE_CLOSED",
    "complain",
    "console",
    "count",
    "drop_output",
    "prepare",
    "print_json",
    "show",
]

PIPE_CLOSED = 141
"""Exit code when nobody reads on, that of a program which the signal has ended."""

_STDERR = 2
# Whatever reads a pipe has no width: nothing is cut.
_UNLIMITED = 1 << 14


class _Console(Console):
    def on_broken_pipe(self) -> None:
        _give_up()


def prepare() -> None:
    """Make the standard streams safe to use.

    Let no name fail for want of a character that they cannot encode. If one of them is closed,
    take its number: or the event loop's own descriptors would get it, which ends the process.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console(*, stderr: bool = False, markup: bool = False) -> Console:
    """Return a console that takes names for what they are, no markup and no emoji codes."""
    made = _Console(stderr=stderr, markup=markup, emoji=False, highlight=False)
    if not made.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        made.width = _UNLIMITED
    return made


def show(result: RenderableType, *, markup: bool = False) -> None:
    """Print a result.

    Args:
        result: What rich can render.
        markup: Whether plain `str` within it are rich markup; names must not be such `str` then.
    """
    console(markup=markup).print(result)


def print_json(value: object) -> None:
    """Print a result as one JSON document; frozen dataclasses are objects."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # a path that is not UTF-8
        text = json.dumps(value, indent=2, default=_as_dict).encode()
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text + b"\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up()


def complain(message: str) -> None:
    """Say on stderr, in one line, what went wrong."""
    line = " ".join(part.strip() for part in message.splitlines())
    console(stderr=True).print(
        Text.assemble(("asyncloader: ", "bold red"), escaped(line)), soft_wrap=True
    )


def count(number: int) -> str:
    """Return a number with separators."""
    return f"{number:,}"


def _as_dict(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value)} is nothing that JSON has")


def drop_output() -> None:
    """Drop what stdout could not take, and all that follows: at exit it would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _give_up() -> None:
    """End quietly: whoever read our output has gone."""
    drop_output()
    raise typer.Exit(PIPE_CLOSED)
