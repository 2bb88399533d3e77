"""Run folders, in which a trainer keeps its checkpoints: one sub-folder each.

RecIS's trainer lists the sub-folders' names in a text file, `checkpoint`, a line each, the newest
last. What is no coroutine function blocks, and belongs on a thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ._arguments import checked_path
from ._checkpoint.finished import lack_of, mark_of
from ._checkpoint.format import INDEX, RUN_LIST
from ._checkpoint.index import is_file_name
from ._storage.small_files import Looks
from ._threads.blocking import run_blocking
from .errors import CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

__all__ = [
    "Version",
    "alatest",
    "finished_versions",
    "is_run_folder",
    "latest",
    "listed",
    "name_order",
    "newest_version",
    "versions",
]

_log = logging.getLogger("asyncloader")

# Of savers, for one, that are at work: what lies there is not committed, even if it has an `index`.
_HIDDEN = "."
# Only the end of the list counts; it grows for as long as the run goes on.
_LAST_BYTES = 64 << 10
_STALL_TIMEOUT = 120.0
_LOOKS = 5  # at a list that changes all the time
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
        lack: What is still missing of a committed checkpoint, as while it is copied: which file
            is not there, or not written to its end. Empty if it is finished, so that `latest` may
            return it.
    """

    name: str
    committed: bool
    modified: float
    lack: str = ""


def latest(run_folder: str | os.PathLike[str]) -> Path:
    """Return the newest finished checkpoint of a run folder.

    That is the last line of its text file `checkpoint` that names a sub-folder with `index`, or
    with a model as Hugging Face has it; where no line does, the sub-folder whose `index`, or model,
    is the newest. A checkpoint is passed over, with a warning, if `index` or `tensorkey.json` is no
    JSON, or if a shard, `model.pt` or `extra.pt` is not written to its end: it is still copied, or
    was removed meanwhile. Blocks; `alatest` does not.

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
    names = await listed(looks, folder)
    for _ in range(_LOOKS):
        found, lacking = await _newest_of(looks, folder, names, finished=finished)
        before, names = names, await listed(looks, folder)
        if names == before or not finished:
            break
        # A trainer removes a checkpoint when it has listed a newer one, and writes the list anew.
        _log.warning("%s: %r was written to meanwhile, looking again", folder, RUN_LIST)
    for name, lack in lacking.items():
        _log.warning("%s is passed over, not all of it is there: %s", folder / name, lack)
    if found is not None:
        return found
    if not lacking:
        raise await looks(_none_in, folder)
    each = "; ".join(f"{name!r}: {lack}" for name, lack in lacking.items())
    problem = f"no finished checkpoint here, copy the rest of one: {each}"
    raise CheckpointNotFoundError(str(folder), problem)


async def _newest_of(
    looks: Looks, folder: Path, names: list[str], *, finished: bool
) -> tuple[Path | None, dict[str, str]]:
    """Return the newest checkpoint, and what those that were passed over lack, by name."""
    lacking: dict[str, str] = {}
    async with contextlib.aclosing(_newest_first(looks, folder, names)) as found:
        async for path in found:
            lack = await looks.at_many(partial(lack_of, path)) if finished else ""
            if not lack:
                return path, lacking
            lacking[path.name] = lack
    return None, lacking


def _none_in(folder: Path) -> CheckpointNotFoundError:
    problem = "no run folder but a checkpoint itself; use it as it is"
    if not _is_committed(folder):
        problem = (
            f"no committed checkpoint here; looked for sub-folders that hold {INDEX!r}, which is "
            f"written last, or a safetensors model, the first ones that {RUN_LIST!r} names"
        )
    return CheckpointNotFoundError(str(folder), problem)


def versions(run_folder: str | os.PathLike[str]) -> tuple[Version, ...]:
    """Return all sub-folders of a run folder, the newest last.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointError: If it cannot be listed.
    """
    return finished_versions(Path(checked_path(run_folder, "run_folder")), int)


def finished_versions(run_folder: Path, tick: Callable[[], object]) -> tuple[Version, ...]:
    """Return what `versions` does; `tick` is called before each file that is looked at."""
    return tuple(
        replace(version, lack=lack_of(run_folder / version.name, tick))
        if version.committed
        else version
        for version in _versions(run_folder, tick)
    )


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


async def _newest_first(looks: Looks, folder: Path, names: list[str]) -> AsyncGenerator[Path, None]:
    """Yield the committed checkpoints of a run folder, the names in its list first."""
    seen = set()
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
        text = await looks.read(folder / RUN_LIST, last=_LAST_BYTES + 1)
    except OSError:
        return []
    lines = [line.strip() for line in text.split(b"\n")]
    if len(text) > _LAST_BYTES:
        del lines[0]  # it may be half a line
    # So may a last line without an end: `ckpt_3` of `ckpt_30`, if that is in the folder, too.
    if lines and lines[-1] in lines[:-1] and await looks(_begins_another, folder, lines[-1]):
        del lines[-1]
    # As the system decodes file names: never fails.
    names = [os.fsdecode(line) for line in dict.fromkeys(reversed(lines))]
    return [name for name in names if is_file_name(name) and not name.startswith(_HIDDEN)]


def _begins_another(folder: Path, half: bytes) -> bool:
    """Say whether an entry of the folder has a longer name that begins so."""
    with contextlib.suppress(OSError):
        names = map(os.fsencode, os.listdir(folder))  # noqa: PTH208  # names
        return bool(half) and any(name.startswith(half) and name != half for name in names)
    return False


def _version(folder: Path, name: str) -> Version | None:
    path = folder / name
    mark = mark_of(path)
    try:
        modified = (mark or path).stat().st_mtime
    except OSError:  # removed meanwhile
        return None
    return Version(name=name, committed=mark is not None, modified=modified)


def _is_committed(path: Path) -> bool:
    return mark_of(path) is not None


def name_order(name: str) -> list[str | int]:
    """Return what orders names by the numbers in them: `ckpt_9` comes before `ckpt_10`."""
    parts = _NUMBER.split(name)  # text and numbers take turns
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]
