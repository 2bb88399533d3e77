"""Tells whether a checkpoint is finished: all of its files are there, written to their ends.

A trainer writes one file after the other, and a copy brings them in any order. What a file holds is
looked at only as far as that says how long it should be: a load tells the rest. Blocks.
"""

from __future__ import annotations

import errno
import io
import posixpath
import zipfile
from typing import TYPE_CHECKING

from asyncloader._storage.folder import is_unclear
from asyncloader.errors import CheckpointError, TruncatedShardError

from .catalog import SHARDED, SINGLE, is_weight_map, model_in
from .format import EXTRA, INDEX, MAX_NAMES, MODEL, PREFIX, TENSORKEY
from .header import FIRST, header_length, parse_header
from .index import parse_catalog, parse_weight_map
from .problems import Problems
from .strict_json import BadJsonError, parse_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asyncloader._storage.folder import Folder


_SAFETENSORS = ".safetensors"
_ARCHIVE = b"PK"  # begins an archive of `torch.save`, which lists its files at its end
_ENDING = 1 << 17  # bytes: the end of that list is among the last ones


class _UnfinishedError(Exception):
    """A file has its name, maybe its length, and not yet its content."""


def mark_of(folder: Folder) -> str | None:
    """Return the file that makes a folder a checkpoint: `index`, or the one that names a model.

    Raises:
        OSError: If a disk or a server gave no answer.
    """
    try:
        if has_file(folder, INDEX):
            return INDEX
        return model_in(folder.location, _names(folder))
    except CheckpointError:  # several models
        return None
    except OSError as error:  # no folder
        if is_unclear(error):
            raise
        return None


def has_file(folder: Folder, name: str) -> bool:
    """Say whether there is a file of that name."""
    entry = folder.stat(name)
    return entry is not None and entry.size is not None


def _names(folder: Folder) -> Iterable[str]:
    try:
        return folder.files("")
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        # It does not tell: these are asked for.
        return [name for name in (SHARDED, SINGLE) if has_file(folder, name)]


def lack_of(folder: Folder, tick: Callable[[], object]) -> str:
    """Say which file of a checkpoint, if any, is missing, short, or no text yet.

    `tick` is called before each file that is looked at.
    """
    try:
        mark = mark_of(folder)
        if mark is None:
            return "it was removed"
        _check(folder, mark, tick)
    except FileNotFoundError as error:
        return f"{posixpath.basename(error.filename)!r} is missing"
    except (TruncatedShardError, _UnfinishedError) as error:
        return str(error).removeprefix(f"{folder.location}: ")
    except CheckpointError as error:
        # A text that has no form is taken for half a text.
        return f"{error.shard!r} {error.problem}" if _is_no_json(error) else ""
    except OSError:  # a load tells
        pass
    return ""


def _is_no_json(error: CheckpointError) -> bool:
    return isinstance(error.__cause__, BadJsonError) and error.shard is not None


def _check(folder: Folder, mark: str, tick: Callable[[], object]) -> None:
    recis = mark == INDEX
    if (_size(folder, mark) or 0) > MAX_NAMES and not mark.endswith(_SAFETENSORS):
        return
    shards = _shards(folder, mark)
    if folder.shows_whole:
        _check_presence(folder, shards)
    else:
        for shard in sorted(shards):
            tick()
            _check_length(folder, shard, recis=recis)
    if recis:
        tick()
        _check_names(folder)
    if recis and not folder.shows_whole:
        for name in (MODEL, EXTRA):
            tick()
            _check_archive(folder, name)


def _shards(folder: Folder, mark: str) -> set[str]:
    """Return the names of a checkpoint's shards."""
    problems = Problems(folder.location)
    if mark == INDEX:
        catalog = parse_catalog(problems, _written(folder, mark), b"{}")
    elif is_weight_map(mark):
        catalog = parse_weight_map(problems, _written(folder, mark), mark)
    else:
        return {mark}
    return set(catalog.files)


def _check_presence(folder: Folder, shards: set[str]) -> None:
    """Raise if a shard is not there, by one look at all names."""
    try:
        there = folder.files("")
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # a load tells
            return
        raise
    if missing := sorted(shards.difference(there)):
        raise FileNotFoundError(errno.ENOENT, "no such file", f"{folder.location}/{missing[0]}")


def _check_names(folder: Folder) -> None:
    try:
        parse_object(_written(folder, TENSORKEY), len)
    except BadJsonError as error:
        raise _UnfinishedError(f"{TENSORKEY!r} {error}") from error


def _written(folder: Folder, name: str) -> bytes:
    """Return the text of a JSON file, unless it is cut short: it ends where its braces do."""
    size = _size(folder, name)
    if size is None or size > MAX_NAMES:
        raise OSError(f"{name!r} is no file that is read")  # a load tells
    text = folder.read(name)
    if not text.strip(b"\0") or text.count(b"{") > text.count(b"}"):
        raise _unwritten(name)
    return text


def _unwritten(name: str) -> _UnfinishedError:
    return _UnfinishedError(f"{name!r} is not written to its end")


def _check_length(folder: Folder, shard: str, *, recis: bool) -> None:
    """Raise if a shard is not as long as its header says."""
    size = _size(folder, shard)
    if size is None:
        return
    start = folder.read(shard, first=FIRST)
    if len(start) >= PREFIX and not any(start[:PREFIX]):  # its room was taken first
        raise _unwritten(shard)
    length = header_length(folder.location, shard, start, size)
    if PREFIX + length > len(start):
        start = folder.read(shard, first=PREFIX + length)
    header = start[PREFIX : PREFIX + length]
    parse_header(Problems(folder.location), shard, header, size, recis=recis)


def _check_archive(folder: Folder, name: str) -> None:
    """Raise if an archive has no end; it need not be there."""
    entry = folder.stat(name)
    if entry is not None and entry.size is not None and _is_unwritten(folder, name):
        raise _unwritten(name)


def _is_unwritten(folder: Folder, name: str) -> bool:
    start = folder.read(name, first=PREFIX)
    if start.startswith(_ARCHIVE):
        return not zipfile.is_zipfile(io.BytesIO(folder.read(name, last=_ENDING)))
    return not any(start)  # another file was written by an old torch, which a load refuses


def _size(folder: Folder, name: str) -> int | None:
    """Return the length of a regular file; `None` of another: opening a FIFO would hang.

    Raises:
        FileNotFoundError: If it is not there.
    """
    entry = folder.stat(name)
    if entry is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", f"{folder.location}/{name}")
    return entry.size
