"""What a folder holds before a save: an old checkpoint, other files, left-overs of dead saves."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import TYPE_CHECKING

import orjson

from asyncloader._checkpoint.format import DESCRIPTION, INDEX, SIDECAR, TENSORKEY
from asyncloader.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from asyncloader._storage.folder import Folder


_log = logging.getLogger(__name__)

STAGING = ".saving-"
"""What the names of folders begin with that hold what is not committed yet."""

OLD = "old"
"""The folder, within a staging folder, of what a commit has moved away."""

_OURS = frozenset({INDEX, TENSORKEY, DESCRIPTION, SIDECAR})
_SHARD = re.compile(r"model-\d{6,}-of-\d{6,}\.safetensors")
# What an `index` may call a shard; nothing else is removed because one names it.
_LISTED = re.compile(r"[^/\\\0]+\.safetensors")
# RecIS's trainer puts these into the folder of a checkpoint, before or after.
_BESIDE = re.compile(r"model\.pt|extra\.pt|io_state_.*\.pt")
# What network file systems call a file that was removed while it was open.
_GHOST = re.compile(r"\.nfs.*")
# What file systems, desktops and job runners leave in a volume or a folder on their own account.
_LEFT_BY_SYSTEMS = re.compile(
    r"lost\+found/|\.snapshots?/|\.zfs/|\.Trash(es|-\d+)?/|\.(fseventsd|Spotlight-V100)/"
    r"|\$RECYCLE\.BIN/|System Volume Information/|\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|_SUCCESS"
)
_NAMED = 5


def old_files(folder: Folder) -> list[str]:
    """Return the names of the files that a new checkpoint replaces.

    Raises:
        SaveError: If the folder holds anything else.
        OSError: If it cannot be read.
    """
    names = folder.names("")
    listed = _listed(folder) if INDEX in names else frozenset()
    old = [name for name in names if name in _OURS | listed or _SHARD.fullmatch(name)]
    if old == [INDEX] and not listed:
        old = []  # a file of that name, but none of ours
    others = [name for name in names if name not in old and not _stays(name)]
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        problem = (
            f"the folder holds something else than a checkpoint: "
            f"{', '.join(map(repr, others[:_NAMED]))}{more}; nothing was written. Save into a "
            "new folder, or move that away"
        )
        raise SaveError(folder.location, problem)
    return old


def _stays(name: str) -> bool:
    return name.startswith(STAGING) or any(
        pattern.fullmatch(name) is not None for pattern in (_BESIDE, _GHOST, _LEFT_BY_SYSTEMS)
    )


def _listed(folder: Folder) -> frozenset[str]:
    """Return the shard files that the old `index` names, whatever they are called."""
    try:
        names = dict(orjson.loads(folder.read(INDEX))["file_index"])
    except (ValueError, TypeError, KeyError):
        return frozenset()  # damaged: it is replaced all the same
    return frozenset(name for name in names if _LISTED.fullmatch(str(name)))


def recover(folder: Folder) -> None:
    """Clear up after saves that were cut off in their commit, or just after it.

    Where there is no `index`, what they had moved away is put back; where there is one, it is
    out of date. So there is never more than one old checkpoint that has been moved away.
    """
    names = folder.names("")
    dead = [staging for staging in _stagings(names) if f"{OLD}/" in folder.names(staging)]
    if INDEX in names:
        for staging in dead:
            _remove_old(folder, staging)
        return
    for staging in dead:
        if INDEX in folder.names(f"{staging}/{OLD}"):
            _put_back(folder, staging)
            return


def _put_back(folder: Folder, staging: str) -> None:
    """Make a checkpoint again of what a dead save had moved away."""
    old = f"{staging}/{OLD}"
    aside = folder.names(old)
    if TENSORKEY in aside:  # it goes last, so all that is left is the dead save's own
        for name in old_files(folder):
            folder.move(name, f"{staging}/{name}")
    for name in aside:
        if name != INDEX:
            folder.move(f"{old}/{name}", name)
    folder.sync("")
    folder.move(f"{old}/{INDEX}", INDEX)
    folder.sync("")


def _remove_old(folder: Folder, staging: str) -> None:
    """Remove what was moved away; `index` first, so that no reader takes the rest for whole."""
    old = f"{staging}/{OLD}"
    names = folder.names(old)
    if INDEX in names:
        folder.remove(f"{old}/{INDEX}")
        folder.sync(old)
    for name in names:
        if name != INDEX:
            folder.remove(f"{old}/{name}")


def _stagings(names: Iterable[str]) -> list[str]:
    """Return which names in a folder are staging folders, without their slash."""
    folders = [name.removesuffix("/") for name in names if name.endswith("/")]
    return [name for name in folders if name.startswith(STAGING)]


def remove_dead(folder: Folder, mine: str, dead_after: float) -> None:
    """Remove the staging folders of dead saves; only with the folder's lock. Fails with a warning.

    Args:
        folder: Where they are.
        mine: The staging folder of the save that asks, which stays.
        dead_after: Seconds without a change after which a save of several ranks counts as dead.
    """
    with _quietly(folder):
        now = folder.changed_at(mine)
        for staging in _stagings(folder.names("")):
            # A save of one rank would hold the lock.
            alone = staging.startswith(f"{STAGING}1-")
            if staging != mine and (alone or now - folder.changed_at(staging) > dead_after):
                remove_staging(folder, staging)


def remove_staging(folder: Folder, staging: str, *, keep_old: bool = False) -> None:
    """Remove a staging folder. Fails with a warning.

    Args:
        folder: Where it is.
        staging: Its name.
        keep_old: Whether it stays if an old checkpoint is in it.
    """
    with _quietly(folder):
        try:
            names = folder.names(staging)
        except FileNotFoundError:
            return
        if f"{OLD}/" in names:
            if keep_old and folder.names(f"{staging}/{OLD}"):
                return
            _remove_old(folder, staging)
        for name in names:
            if name.endswith("/"):
                folder.remove_folder(f"{staging}/{name.removesuffix('/')}")
            else:
                folder.remove(f"{staging}/{name}")
        folder.remove_folder(staging)


@contextlib.contextmanager
def _quietly(folder: Folder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.warning("%s: left-overs could not be removed: %s", folder.location, error)
