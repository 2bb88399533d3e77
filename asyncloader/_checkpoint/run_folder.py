"""Finds the checkpoints of a run folder: the newest, or all.

What is no coroutine function blocks, and belongs on a thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader._addresses import is_url
from asyncloader._storage.folder import is_unclear
from asyncloader._threads.jobs import for_each
from asyncloader.errors import CheckpointError, CheckpointNotFoundError

from .finished import has_file, lack_of, mark_of
from .format import INDEX, RUN_LIST
from .index import is_file_name

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from asyncloader._storage.folder import Folder
    from asyncloader._storage.looks import Looks


_log = logging.getLogger("asyncloader")

# Of savers, for one, that are at work: what lies there is not committed, even if it has an `index`.
_HIDDEN = "."
# Only the end of the list counts; it grows for as long as the run goes on.
_LAST_BYTES = 64 << 10
_LOOKS = 5  # at a list that changes all the time
_LOOKERS = 8
_NUMBER = re.compile("([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A sub-folder of a run folder.

    Attributes:
        name: Its name.
        committed: Whether it holds `index`, which is written last; or a model, as Hugging Face's
            folders do.
        modified: When the file that says so was written, or else when the folder was changed, in
            seconds since 1970. Folders of an object store have no time: 0.
        lack: What is still missing of a committed checkpoint, as while it is copied: which file
            is not there, or not written to its end. Empty if it is finished, so that `latest` may
            return it.
    """

    name: str
    committed: bool
    modified: float
    lack: str = ""


def sub_folder(location: str, name: str) -> str:
    """Return the path, or the URL, of a folder in a folder."""
    return f"{location.rstrip('/')}/{name}" if is_url(location) else str(Path(location) / name)


async def newest_version(looks: Looks, folder: Folder, *, finished: bool) -> str:
    """Return the newest checkpoint's name; `finished` passes over those that still lack files.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed, or there was no answer.
    """
    names = await listed(looks, folder)
    for _ in range(_LOOKS):
        found, lacking = await _newest_of(looks, folder, names, finished=finished)
        if not finished:
            break
        before, names = names, await listed(looks, folder)
        if names == before:
            break
        # A trainer removes a checkpoint when it has listed a newer one, and writes the list anew.
        _log.warning("%s: %r was written to meanwhile, looking again", folder.location, RUN_LIST)
    for name, lack in lacking.items():
        path = sub_folder(folder.location, name)
        _log.warning("%s is passed over, not all of it is there: %s", path, lack)
    if found is not None:
        return found
    if not lacking:
        raise await looks(_none_in, folder)
    each = "; ".join(f"{name!r}: {lack}" for name, lack in lacking.items())
    problem = f"no finished checkpoint here, copy the rest of one: {each}"
    raise CheckpointNotFoundError(folder.location, problem)


async def _newest_of(
    looks: Looks, folder: Folder, names: list[str], *, finished: bool
) -> tuple[str | None, dict[str, str]]:
    """Return the newest checkpoint, and what those that were passed over lack, by name."""
    lacking: dict[str, str] = {}
    async with contextlib.aclosing(_newest_first(looks, folder, names)) as found:
        async for name in found:
            lack = await looks.at_many(partial(lack_of, folder.inside(name))) if finished else ""
            if not lack:
                return name, lacking
            lacking[name] = lack
    return None, lacking


def _none_in(folder: Folder) -> CheckpointNotFoundError:
    problem = "no run folder but a checkpoint itself; use it as it is"
    if mark_of(folder) is None:
        problem = (
            f"no committed checkpoint here; looked for sub-folders that hold {INDEX!r}, which is "
            f"written last, or a safetensors model, the first ones that {RUN_LIST!r} names"
        )
    return CheckpointNotFoundError(folder.location, problem)


async def find_versions(looks: Looks, folder: Folder) -> tuple[Version, ...]:
    """Return all sub-folders of a run folder, the newest last.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointError: If it cannot be listed, or there was no answer.
    """
    found: list[Version] = []

    async def look(name: str) -> None:
        version = await looks(_version, folder, name)
        if version is not None and version.committed:
            lack = await looks.at_many(partial(lack_of, folder.inside(name)))
            version = replace(version, lack=lack)
        if version is not None:
            found.append(version)

    names = await looks(_sub_folders, folder)
    await for_each(names, look, workers=_LOOKERS, name="asyncloader-look")
    return tuple(sorted(found, key=_age))


def _sub_folders(folder: Folder) -> list[str]:
    """Return the names of all that may be versions."""
    try:
        return [name for name in folder.folders("") if not name.startswith(_HIDDEN)]
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"no run folder: {error.strerror}"
        raise CheckpointNotFoundError(folder.location, problem) from error
    except OSError as error:
        raise CheckpointError(
            folder.location, f"cannot be listed: {error.strerror or error}"
        ) from error


def is_run_folder(folder: Folder) -> bool:
    """Tell whether a folder holds checkpoints."""
    try:
        names = _sub_folders(folder)
    except CheckpointError as error:
        cause = error.__cause__
        lists = not isinstance(cause, OSError) or cause.errno != errno.ENOTSUP
        return not lists and has_file(folder, RUN_LIST)
    if not folder.dates_folders:  # each look is a request
        names = sorted(names, key=name_order)[-_LOOKS:]
    return any(mark_of(folder.inside(name)) is not None for name in names)


async def _newest_first(
    looks: Looks, folder: Folder, names: list[str]
) -> AsyncGenerator[str, None]:
    """Yield the committed checkpoints of a run folder, the names in its list first."""
    seen = set()
    while (at := await looks.at_many(partial(_first_committed, folder, names))) is not None:
        seen.add(names[at])
        yield names[at]
        names = names[at + 1 :]
    if folder.dates_folders:
        names = await looks.at_many(partial(_by_age, folder))
    else:  # to ask each of them when it was written would cost a request a version
        names = sorted(await looks(_sub_folders, folder), key=name_order)
    names = [name for name in reversed(names) if name not in seen]
    while (at := await looks.at_many(partial(_first_committed, folder, names))) is not None:
        yield names[at]
        names = names[at + 1 :]


def _by_age(folder: Folder, tick: Callable[[], object]) -> list[str]:
    """Return the names of the committed checkpoints, the newest last."""
    found = []
    for name in _sub_folders(folder):
        tick()
        version = _version(folder, name)
        if version is not None and version.committed:
            found.append(version)
    return [version.name for version in sorted(found, key=_age)]


def _first_committed(folder: Folder, names: list[str], tick: Callable[[], object]) -> int | None:
    for at, name in enumerate(names):
        tick()
        if mark_of(folder.inside(name)) is not None:
            return at
    return None


async def listed(looks: Looks, folder: Folder) -> list[str]:
    """Return the names at the end of the list, the last one first, each once.

    Raises:
        CheckpointError: If there was no answer.
    """
    try:
        text = await looks.read(folder, RUN_LIST, last=_LAST_BYTES + 1)
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


def _begins_another(folder: Folder, half: bytes) -> bool:
    """Say whether a sub-folder has a longer name that begins so."""
    with contextlib.suppress(OSError):
        names = map(os.fsencode, folder.folders(""))
        return bool(half) and any(name.startswith(half) and name != half for name in names)
    return False


def _version(folder: Folder, name: str) -> Version | None:
    inside = folder.inside(name)
    mark = mark_of(inside)
    try:
        found = inside.stat(mark or "")
    except OSError as error:
        if is_unclear(error):
            raise
        return None
    if found is None and folder.dates_folders:  # removed meanwhile
        return None
    return Version(name=name, committed=mark is not None, modified=found.modified if found else 0.0)


def _age(version: Version) -> tuple[object, ...]:
    return version.modified, name_order(version.name)


def name_order(name: str) -> list[str | int]:
    """Return what orders names by the numbers in them: `ckpt_9` comes before `ckpt_10`."""
    parts = _NUMBER.split(name)  # text and numbers take turns
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]
