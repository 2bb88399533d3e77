"""Folders that are no checkpoint but have to do with some."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import INDEX
from asyncloader._storage.small_files import Looks
from asyncloader.errors import CheckpointNotFoundError
from asyncloader.runs import is_run_folder, newest_finished, versions

if TYPE_CHECKING:
    from collections.abc import Iterator


_SAVING = ".saving-"
_LIST = "checkpoint"  # in which a trainer lists its checkpoints, finished or not
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSummary:
    """A sub-folder of a run folder."""

    name: str
    committed: bool

    modified: float
    """When it was committed, or else when it was last changed, in seconds since 1970."""

    bytes: int
    """Of all files in it."""

    latest: bool
    """Whether it is the one to load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A folder in which a trainer keeps its checkpoints."""

    location: str
    kind: str = "run folder"
    latest: str | None
    """The sub-folder to load; `None` if none is committed."""

    versions: tuple[VersionSummary, ...]
    """The newest last."""


async def run_folder(path: str, *, stall_timeout: float | None) -> RunSummary | None:
    """Sum up a run folder; return `None` if it is none.

    Raises:
        CheckpointError: If it cannot be listed, or its disk gives no answer.
    """
    with Looks(path, stall_timeout=stall_timeout) as looks:
        if not await looks(_is_run_folder, path):
            return None
        try:
            newest = (await newest_finished(looks, Path(path))).name
        except CheckpointNotFoundError:
            newest = None
        return await looks(_summed_up, path, newest)


def _is_run_folder(path: str) -> bool:
    has_list = os.path.isfile(os.path.join(path, _LIST))  # noqa: PTH113, PTH118  # never raises
    return has_list or is_run_folder(path)


def _summed_up(path: str, newest: str | None) -> RunSummary:
    found = tuple(
        VersionSummary(
            name=version.name,
            committed=version.committed,
            modified=version.modified,
            bytes=sum(_sizes(Path(path, version.name))),
            latest=version.name == newest,
        )
        for version in versions(path)
    )
    return RunSummary(location=path, latest=newest, versions=found)


def unfinished(path: str) -> str | None:
    """Say why a folder that was saved into is no checkpoint; return `None` for other folders."""
    names = _names(path)
    shards = sum(_SHARD.fullmatch(name) is not None for name in names)
    found = [f"{shards:,} shard file{'s' * (shards != 1)}"] if shards else []
    found += [name for name in names if name.startswith(_SAVING)]
    if not found:
        return None
    return (
        f"not committed: holds {', '.join(found)} but no {INDEX!r}, which is written last; the "
        "save is still going on, or it did not finish"
    )


def saves_in(path: str) -> tuple[str, ...]:
    """Return the names of the folders in which another save is staged."""
    return tuple(name for name in _names(path) if name.startswith(_SAVING))


def _names(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(entry.name for entry in Path(path).iterdir())
    return []


def _sizes(folder: Path) -> Iterator[int]:
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # removed meanwhile
                yield Path(root, file).lstat().st_size
