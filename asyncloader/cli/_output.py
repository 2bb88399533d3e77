"""Where results go: to stdout, all else to stderr; and failures as one line for people."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from typing import TYPE_CHECKING

import orjson

from asyncloader.errors import AsyncLoaderError, CheckpointNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from asyncloader._loading.progress import Progress

EXPECTED = (AsyncLoaderError, KeyError, OSError, ValueError, MemoryError)
"""Errors that are no bug: the checkpoint, the system, or the arguments are to blame."""

_STDERR = 2
_EXACT = 1 << 53
"""The largest whole number up to which programs are exact whose numbers are doubles, as jq is."""


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


def print_json(value: object) -> None:
    """Print a result as one JSON document; frozen dataclasses are objects."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # a path that is not UTF-8
        text = json.dumps(value, indent=2, default=_as_dict).encode()
    if sys.stdout is None:
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text + b"\n")
    sys.stdout.flush()


def _as_dict(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value)} is nothing that JSON has")


def with_texts(value: object) -> object:
    """Return what JSON is made of, with the text of whole numbers beside them, as `…_text`.

    An id always has one, so that a program need not look; others where a double would round them.
    """
    if isinstance(value, dict):
        return dict(_members(value))
    if isinstance(value, list | tuple):
        return [with_texts(one) for one in value]
    return value


def _members(value: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, one in value.items():
        yield key, with_texts(one)
        if _is_rounded(one) or (key == "id" and type(one) is int):
            yield f"{key}_text", str(one)
        elif isinstance(one, list | tuple) and any(map(_is_rounded, one)):
            yield f"{key}_text", list(map(str, one))


def _is_rounded(value: object) -> bool:
    return type(value) is int and abs(value) > _EXACT


def drop_output() -> None:
    """Drop what stdout could not take, and all that follows: at exit it would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def progress(doing: str) -> Iterator[Callable[[Progress], object] | None]:
    """Show on a terminal how far the block has come, if it takes longer than a moment."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None  # whatever colours are forced
        return
    from ._terminal import bar

    with bar(doing) as listener:
        yield listener


def message_of(error: BaseException) -> str:
    """Say what is wrong."""
    if isinstance(error, CheckpointNotFoundError):
        return _not_found(error)
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # `str` of a KeyError is a `repr`
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if error.args else "not enough memory"
    if isinstance(error, OSError) and not isinstance(error, AsyncLoaderError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _not_found(error: CheckpointNotFoundError) -> str:
    from asyncloader.runs import is_run_folder, latest

    if not os.path.lexists(error.location):
        return f"{error.location}: no such file or folder"
    if not is_run_folder(error.location):
        return str(error)
    try:
        newest = latest(error.location)
    except AsyncLoaderError:  # removed meanwhile
        return str(error)
    return (
        f"{error.location}: no checkpoint itself but a run folder that holds some; the newest is "
        f"{newest}"
    )
