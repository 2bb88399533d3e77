"""Tells whether a checkpoint is finished: all of its files are there, written to their ends.

A trainer writes one file after the other, and a copy brings them in any order. What a file holds is
looked at only as far as that says how long it should be: a load tells the rest. Blocks.
"""

from __future__ import annotations

import os
import stat
import zipfile
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError, TruncatedShardError

from .catalog import is_weight_map, model_in
from .format import EXTRA, INDEX, MAX_NAMES, MODEL, PREFIX, TENSORKEY
from .header import FIRST, header_length, parse_header
from .index import parse_catalog, parse_weight_map
from .problems import Problems
from .strict_json import BadJsonError, parse_object

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import BufferedReader
    from pathlib import Path


_SAFETENSORS = ".safetensors"
_ARCHIVE = b"PK"  # begins an archive of `torch.save`, which lists its files at its end


class _UnfinishedError(Exception):
    """A file has its name, maybe its length, and not yet its content."""


def mark_of(path: Path) -> Path | None:
    """Return the file that makes a folder a checkpoint: `index`, or the one that names a model."""
    if os.path.isfile(path / INDEX):  # noqa: PTH113  # Path's own raises for odd names
        return path / INDEX
    try:
        name = model_in(str(path), [entry.name for entry in path.iterdir()])
    except (OSError, CheckpointError):  # no folder; or several models
        return None
    return None if name is None else path / name


def lack_of(path: Path, tick: Callable[[], object]) -> str:
    """Say which file of a checkpoint, if any, is missing, short, or no text yet.

    `tick` is called before each file that is looked at.
    """
    mark = mark_of(path)
    if mark is None:
        return "it was removed"
    try:
        _check(mark, tick)
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)!r} is missing"  # noqa: PTH119  # text
    except (TruncatedShardError, _UnfinishedError) as error:
        return str(error).removeprefix(f"{path}: ")
    except CheckpointError as error:
        # A text that has no form is taken for half a text.
        return f"{error.shard!r} {error.problem}" if _is_no_json(error) else ""
    except OSError:
        pass
    return ""


def _is_no_json(error: CheckpointError) -> bool:
    return isinstance(error.__cause__, BadJsonError) and error.shard is not None


def _check(mark: Path, tick: Callable[[], object]) -> None:
    folder, recis = mark.parent, mark.name == INDEX
    if mark.stat().st_size > MAX_NAMES and not mark.name.endswith(_SAFETENSORS):
        return
    for shard in sorted(_shards(mark)):
        tick()
        _check_length(folder, shard, recis=recis)
    if recis:
        tick()
        _check_names(folder / TENSORKEY)
        for name in (MODEL, EXTRA):
            tick()
            _check_archive(folder / name)


def _shards(mark: Path) -> set[str]:
    """Return the names of a checkpoint's shards."""
    problems = Problems(str(mark.parent))
    if mark.name == INDEX:
        catalog = parse_catalog(problems, _written(mark), b"{}")
    elif is_weight_map(mark.name):
        catalog = parse_weight_map(problems, _written(mark), mark.name)
    else:
        return {mark.name}
    return set(catalog.files)


def _check_names(tensorkey: Path) -> None:
    try:
        parse_object(_written(tensorkey), len)
    except BadJsonError as error:
        raise _UnfinishedError(f"{TENSORKEY!r} {error}") from error


def _written(names: Path) -> bytes:
    """Return the text of a JSON file, unless it is cut short: it ends where its braces do."""
    size = _size(names)
    if size is None or size > MAX_NAMES:
        raise OSError(f"{names.name!r} is no file that is read")  # a load tells
    text = names.read_bytes()
    if not text.strip(b"\0") or text.count(b"{") > text.count(b"}"):
        raise _unwritten(names.name)
    return text


def _unwritten(name: str) -> _UnfinishedError:
    return _UnfinishedError(f"{name!r} is not written to its end")


def _check_length(folder: Path, shard: str, *, recis: bool) -> None:
    """Raise if a shard is not as long as its header says."""
    size = _size(folder / shard)
    if size is None:
        return
    with (folder / shard).open("rb") as file:
        start = file.read(FIRST)
        if len(start) >= PREFIX and not any(start[:PREFIX]):  # its room was taken first
            raise _unwritten(shard)
        length = header_length(str(folder), shard, start, size)
        file.seek(PREFIX)
        parse_header(Problems(str(folder)), shard, file.read(length), size, recis=recis)


def _check_archive(path: Path) -> None:
    """Raise if an archive has no end; it need not be there."""
    try:
        if _size(path) is None:
            return
        with path.open("rb") as file:
            if _is_unwritten(file):
                raise _unwritten(path.name)
    except FileNotFoundError:
        pass


def _is_unwritten(file: BufferedReader) -> bool:
    start = file.read(PREFIX)
    if start.startswith(_ARCHIVE):
        return not zipfile.is_zipfile(file)
    return not any(start)  # another file was written by an old torch, which a load refuses


def _size(path: Path) -> int | None:
    """Return the length of a regular file; `None` of another: opening a FIFO would hang."""
    found = path.stat()
    return found.st_size if stat.S_ISREG(found.st_mode) else None
