"""Run folders, in which a trainer keeps its checkpoints: one sub-folder each.

RecIS's trainer lists the sub-folders' names in a text file, `checkpoint`, a line each, the newest
last. What is no coroutine function blocks, and belongs on a thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ._arguments import checked_path
from ._checkpoint.catalog import is_weight_map, model_in
from ._checkpoint.format import INDEX, MAX_NAMES, PREFIX, TENSORKEY
from ._checkpoint.header import FIRST, header_length, parse_header
from ._checkpoint.index import is_file_name, parse_catalog, parse_weight_map
from ._checkpoint.problems import Problems
from ._storage.small_files import Looks
from ._threads.blocking import run_blocking
from .errors import CheckpointError, CheckpointNotFoundError, TruncatedShardError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

__all__ = [
    "Version",
    "alatest",
    "is_run_folder",
    "latest",
    "listed",
    "name_order",
    "newest_version",
    "versions",
]

_log = logging.getLogger("asyncloader")

_LIST = "checkpoint"
# Of savers, for one, that are at work: what lies there is not committed, even if it has an `index`.
_HIDDEN = "."
# Only the end of the list counts; it grows for as long as the run goes on.
_LAST_BYTES = 64 << 10
_SAFETENSORS = ".safetensors"
_STALL_TIMEOUT = 120.0
_NUMBER = re.compile("([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A sub-folder of a run folder.

    Attributes:
        name: Its name.
        committed: Whether it holds `index`, which is written last; or a model, as Hugging Face's
            folders do.
        modified: When the file that says so was written, or else when the folder was changed, in
            seconds since 1970.
    """

    name: str
    committed: bool
    modified: float


def latest(run_folder: str | os.PathLike[str]) -> Path:
    """Return the newest finished checkpoint of a run folder.

    That is the last line of its text file `checkpoint` that names a sub-folder with `index`, or
    with a model as Hugging Face has it; where no line does, the sub-folder whose `index`, or model,
    is the newest. A checkpoint whose shards are missing or short, since it is still copied, is
    passed over, with a warning. Blocks; `alatest` does not.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed, or its disk gives no answer.
        OSError: If there are too few descriptors for an event loop.
    """
    return run_blocking(partial(alatest, run_folder))


async def alatest(run_folder: str | os.PathLike[str]) -> Path:
    """Return what `latest` returns, without blocking the event loop: a thread looks.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed, or its disk gives no answer for two
            minutes.
    """
    folder = Path(checked_path(run_folder, "run_folder"))
    with Looks(str(folder), stall_timeout=_STALL_TIMEOUT) as looks:
        return await newest_version(looks, folder, finished=True)


async def newest_version(looks: Looks, folder: Path, *, finished: bool) -> Path:
    """Return the newest checkpoint; `finished` passes over those whose files are still to come.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed, or there was no answer.
    """
    lacking: list[str] = []
    async with contextlib.aclosing(_newest_first(looks, folder)) as found:
        async for path in found:
            lack = await looks.at_many(partial(_lack_of, path)) if finished else ""
            if not lack:
                return path
            lacking.append(f"{path.name!r}: {lack}")
            _log.warning("%s is passed over, not all of it is there: %s", path, lack)
    if not lacking:
        raise await looks(_none_in, folder)
    problem = f"no finished checkpoint here, copy the rest of one: {'; '.join(lacking)}"
    raise CheckpointNotFoundError(str(folder), problem)


def _none_in(folder: Path) -> CheckpointNotFoundError:
    problem = "no run folder but a checkpoint itself; use it as it is"
    if not _is_committed(folder):
        problem = (
            f"no committed checkpoint here; looked for sub-folders that hold {INDEX!r}, which is "
            f"written last, or a safetensors model, the first ones that {_LIST!r} names"
        )
    return CheckpointNotFoundError(str(folder), problem)


def versions(run_folder: str | os.PathLike[str]) -> tuple[Version, ...]:
    """Return all sub-folders of a run folder, the newest last.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointError: If it cannot be listed.
    """
    return _versions(Path(checked_path(run_folder, "run_folder")), int)


def _versions(run_folder: Path, tick: Callable[[], object]) -> tuple[Version, ...]:
    try:
        with os.scandir(run_folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(_HIDDEN)]
            names = [one.name for one in shown if os.path.isdir(one)]  # noqa: PTH112  # odd links
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"no run folder: {error.strerror}"
        raise CheckpointNotFoundError(os.fspath(run_folder), problem) from error
    except OSError as error:
        raise CheckpointError(os.fspath(run_folder), f"cannot be listed: {error}") from error
    found = []
    for name in names:
        tick()
        if (version := _version(run_folder, name)) is not None:
            found.append(version)
    return tuple(sorted(found, key=lambda version: (version.modified, name_order(version.name))))


def is_run_folder(path: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds checkpoints."""
    try:
        with os.scandir(path) as entries:
            return any(
                _is_committed(Path(entry))
                for entry in entries
                if not entry.name.startswith(_HIDDEN)
            )
    except OSError:
        return False


async def _newest_first(looks: Looks, folder: Path) -> AsyncGenerator[Path, None]:
    """Yield the committed checkpoints of a run folder, the names in its list first."""
    seen, names = set(), await listed(looks, folder)
    while (at := await looks.at_many(partial(_first_committed, folder, names))) is not None:
        seen.add(names[at])
        yield folder / names[at]
        names = names[at + 1 :]
    for version in reversed(await looks.at_many(partial(_versions, folder))):
        if version.committed and version.name not in seen:
            yield folder / version.name


def _first_committed(folder: Path, names: list[str], tick: Callable[[], object]) -> int | None:
    for at, name in enumerate(names):
        tick()
        if _is_committed(folder / name):
            return at
    return None


async def listed(looks: Looks, folder: Path) -> list[str]:
    """Return the names at the end of the list, the last one first, each once."""
    try:
        text = await looks.read(folder / _LIST, last=_LAST_BYTES + 1)
    except OSError:
        return []
    lines = text.split(b"\n")
    if len(text) > _LAST_BYTES:
        del lines[0]  # it may be half a line
    # As the system decodes file names: never fails.
    names = [os.fsdecode(line.strip()) for line in dict.fromkeys(reversed(lines))]
    return [name for name in names if is_file_name(name) and not name.startswith(_HIDDEN)]


def _version(folder: Path, name: str) -> Version | None:
    path = folder / name
    mark = _mark(path)
    try:
        modified = (mark or path).stat().st_mtime
    except OSError:  # removed meanwhile
        return None
    return Version(name=name, committed=mark is not None, modified=modified)


def _is_committed(path: Path) -> bool:
    return _mark(path) is not None


def _mark(path: Path) -> Path | None:
    """Return the file that makes a folder a checkpoint: `index`, or the one that names a model."""
    if os.path.isfile(path / INDEX):  # noqa: PTH113  # Path's own raises for odd names
        return path / INDEX
    try:
        name = model_in(str(path), [entry.name for entry in path.iterdir()])
    except (OSError, CheckpointError):  # no folder; or several models
        return None
    return None if name is None else path / name


def name_order(name: str) -> list[str | int]:
    """Return what orders names by the numbers in them: `ckpt_9` comes before `ckpt_10`."""
    parts = _NUMBER.split(name)  # text and numbers take turns
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]


def _lack_of(path: Path, tick: Callable[[], object]) -> str:
    """Say which file, if any, is missing or short, as while it is copied: a load tells the rest."""
    mark = _mark(path)
    if mark is None:
        return "it was removed"
    try:
        if mark.stat().st_size > MAX_NAMES and not mark.name.endswith(_SAFETENSORS):
            return ""
        for shard in sorted(_shards(mark)):
            tick()
            _check_length(mark.parent, shard, recis=mark.name == INDEX)
        if mark.name == INDEX:
            _written(mark.parent / TENSORKEY)
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)!r} is missing"  # noqa: PTH119  # text
    except TruncatedShardError as error:
        return str(error)
    except _UnwrittenError as unwritten:
        return f"{str(unwritten)!r} is not written to its end"
    except (OSError, CheckpointError):
        pass
    return ""


class _UnwrittenError(Exception):
    """A file has its name, maybe its length, and not yet its content."""


def _shards(mark: Path) -> set[str]:
    """Return the names of a checkpoint's shards."""
    if mark.name == INDEX:
        catalog = parse_catalog(Problems(str(mark.parent)), _written(mark), b"{}")
        return set(catalog.tensors.shards.values())  # without TENSORKEY, tables are tensors, too
    if is_weight_map(mark.name):
        catalog = parse_weight_map(Problems(str(mark.parent)), _written(mark), mark.name)
        return set(catalog.tensors.shards.values())
    return {mark.name}


def _written(names: Path) -> bytes:
    """Return the text of a JSON file, unless it is cut short: it ends where its braces do."""
    text = names.read_bytes()
    if not text or text.count(b"{") > text.count(b"}"):
        raise _UnwrittenError(names.name)
    return text


def _check_length(folder: Path, shard: str, *, recis: bool) -> None:
    """Raise if a shard is not as long as its header says."""
    found = (folder / shard).stat()
    if not stat.S_ISREG(found.st_mode):  # opening a FIFO would hang
        return
    with (folder / shard).open("rb") as file:
        start = file.read(FIRST)
        if len(start) >= PREFIX and not any(start[:PREFIX]):  # its room was taken first
            raise _UnwrittenError(shard)
        length = header_length(str(folder), shard, start, found.st_size)
        file.seek(PREFIX)
        parse_header(Problems(str(folder)), shard, file.read(length), found.st_size, recis=recis)
