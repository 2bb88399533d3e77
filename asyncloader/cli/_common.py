"""Arguments of several commands; their results, for programs too; messages of failures."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from asyncloader._arguments import checked_source
from asyncloader.errors import AsyncLoaderError, CheckpointNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asyncloader._loading.progress import Progress, Span

EXPECTED = (AsyncLoaderError, KeyError, OSError, ValueError, MemoryError)
"""Errors that are no bug: the checkpoint, the system, or the arguments are to blame."""

_STDERR = 2
_SCHEME = re.compile(r"(s3|gs|az|abfss|https?)/")
_MICRO = 1e6
_DIGITS = 3
# The largest whole number up to which programs are exact whose numbers are doubles, as jq is.
_EXACT = 1 << 53


def _given(path: str) -> str:
    if not path:
        raise typer.BadParameter("it is empty")
    try:
        return checked_source(path, "it")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


PathArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="The checkpoint: a folder that RecIS wrote, a .safetensors file, or a folder of "
        "these, as Hugging Face's are.",
        callback=_given,
    ),
]

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, for other programs, complete.")
]

DirectFlag = Annotated[
    bool | None,
    typer.Option(
        "--direct-io/--no-direct-io",
        help="Read all past the page cache, so that what others have there stays; or nothing, so "
        "that it is there for the next reader. Otherwise, only what is not in the cache, unless "
        "another load reads it, too.",
        show_default=False,
    ),
]

CacheFolder = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Of a URL: keep what is read there, for later loads on this machine (cache_dir).",
    ),
]

LinksFlag = Annotated[
    bool,
    typer.Option(
        "--follow-symlinks",
        help="Read what lies outside of the folder, too, if a symbolic link in it says so, as in "
        "Hugging Face's cache.",
    ),
]


def examples(*lines: tuple[str, str], codes: str = "") -> str:
    """Return the end of a help text: command lines with their purposes, then exit codes."""
    width = max(len(command) for command, _ in lines)
    shown = "\n".join(f"{command:{width}}  # {purpose}" for command, purpose in lines)
    text = f"Examples:\n\n\b\n{shown}"  # \b: leave these lines as they are
    return f"{text}\n\n{codes}" if codes else text


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
    """Return lists and dictionaries with the text of whole numbers beside them, as `…_text`.

    An id always has one, so that a program need not look; others where a double would round them.
    """
    if isinstance(value, list | tuple):
        return [with_texts(one) for one in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, object] = {}
    for key, one in value.items():
        found[key] = with_texts(one)
        if _is_rounded(one) or (key == "id" and type(one) is int):
            found[f"{key}_text"] = str(one)
        elif isinstance(one, list | tuple) and any(map(_is_rounded, one)):
            found[f"{key}_text"] = list(map(str, one))
    return found


def _is_rounded(value: object) -> bool:
    return type(value) is int and abs(value) > _EXACT


def trace_of(location: str, spans: Sequence[Span], *, process: int) -> dict[str, Any]:
    """Return the steps of a load as Chrome's trace viewer and Perfetto (ui.perfetto.dev) read them.

    A JSON object, `{"traceEvents": [...]}`, with an event for each step: `ph` is `X`, complete;
    `ts` and `dur` are microseconds from the first step on; `tid` is the lane. Events whose `ph` is
    `M` name process and lanes.
    """
    begin = min((span.start for span in spans), default=0.0)
    in_order = sorted(spans, key=lambda span: (span.start, -span.seconds))
    lanes = {lane: n for n, lane in enumerate(dict.fromkeys(span.lane for span in in_order), 1)}
    title = f"asyncloader load {os.fsencode(location).decode(errors='backslashreplace')}"
    events = [_naming("process_name", title, process)]
    events += [_naming("thread_name", lane, process, tid) for lane, tid in lanes.items()]
    events += [
        {
            "name": f"{span.step} {span.name}",
            "cat": span.step,
            "ph": "X",
            "ts": round((span.start - begin) * _MICRO, _DIGITS),
            "dur": round(span.seconds * _MICRO, _DIGITS),
            "pid": process,
            "tid": lanes[span.lane],
            "args": {"name": span.name, "bytes": span.nbytes},
        }
        for span in in_order
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _naming(what: str, name: str, process: int, lane: int = 0) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": lane, "args": {"name": name}}


def drop_output() -> None:
    """Drop the output that stdout could not take, and all later output: it would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def progress(doing: str) -> Iterator[Callable[[Progress], object] | None]:
    """Show on a terminal how far the block has come, if it takes longer than a moment."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None  # even if colours are forced
        return
    from ._terminal import bar

    with bar(doing) as listener:
        yield listener


def message_of(error: BaseException) -> str:
    """Return the text of an error for people."""
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
    from asyncloader._addresses import is_url
    from asyncloader._checkpoint.run_folder import is_run_folder
    from asyncloader._storage.folders import Folders
    from asyncloader.runs import latest

    if not is_url(error.location) and not os.path.lexists(error.location):
        scheme = _SCHEME.match(error.location)
        hint = f"; of a URL, a colon is missing: {scheme[1]}://…" if scheme else ""
        return f"{error.location}: no such file or folder{hint}"
    try:
        if not is_run_folder(Folders().at(error.location)):
            return str(error)
        newest = latest(error.location)
    except (AsyncLoaderError, OSError, ValueError):  # removed meanwhile
        return str(error)
    return (
        f"{error.location}: no checkpoint itself but a run folder that holds some; the newest is "
        f"{newest}"
    )
