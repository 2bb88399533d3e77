"""What a run folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._checkpoint.finished import has_file
from asyncloader._checkpoint.format import RUN_LIST
from asyncloader._checkpoint.run_folder import find_versions, is_run_folder, newest_version
from asyncloader._saving.leftovers import left_of_saves
from asyncloader._storage.looks import Looks
from asyncloader._threads.jobs import for_each
from asyncloader.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    from asyncloader._checkpoint.run_folder import Version
    from asyncloader._storage.folder import Folder
    from asyncloader.options import ReadOptions

_LOOKERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSummary:
    """A sub-folder of a run folder.

    Attributes:
        modified: When it was committed, or else last changed, in seconds since 1970.
        bytes: Of all files in it.
        latest: Whether it is the one to load.
        lack: What is still missing of it, as while it is copied; empty if it is finished, or not
            committed.
        saving: What saves have there that are under way, or dead: shards that no `index` names,
            and `.saving-…`.
    """

    name: str
    committed: bool
    modified: float
    bytes: int
    latest: bool
    lack: str = ""
    saving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A folder in which a trainer keeps its checkpoints.

    Attributes:
        kind: Always `run folder`.
        latest: The sub-folder to load; `None` if none is finished.
        versions: The newest last.
    """

    location: str
    kind: str = "run folder"
    latest: str | None
    versions: tuple[VersionSummary, ...]


async def sum_up_run(path: str, options: ReadOptions) -> RunSummary | None:
    """Sum up a run folder; return `None` if it is none, or raise `CheckpointError`."""
    with Looks(
        path,
        stall_timeout=options.stall_timeout,
        storage_options=options.storage_options,
        threads=_LOOKERS,
    ) as looks:
        folder = looks.folder(path)
        if not await looks(_is_run_folder, folder):
            return None
        return await _summed_up(looks, folder)


def _is_run_folder(folder: Folder) -> bool:
    return has_file(folder, RUN_LIST) or is_run_folder(folder)


async def _summed_up(looks: Looks, folder: Folder) -> RunSummary:
    try:
        newest = await newest_version(looks, folder, finished=True)
    except CheckpointNotFoundError:
        newest = None
    found = await find_versions(looks, folder)
    sizes: dict[str, int] = {}
    left: dict[str, tuple[str, ...]] = {}

    async def measure(version: Version) -> None:
        sizes[version.name] = await looks(folder.total, version.name)
        left[version.name] = await looks(left_of_saves, folder.inside(version.name))

    await for_each(found, measure, workers=_LOOKERS, name="asyncloader-look")
    versions = tuple(
        VersionSummary(
            name=version.name,
            committed=version.committed,
            modified=version.modified,
            bytes=sizes[version.name],
            latest=version.name == newest,
            lack=version.lack,
            saving=left[version.name],
        )
        for version in found
    )
    return RunSummary(location=folder.location, latest=newest, versions=versions)
