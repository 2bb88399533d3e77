"""What a folder holds before a checkpoint is saved into it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import orjson

from asyncloader._checkpoint.files import DESCRIPTION, INDEX, SIDECAR, TENSORKEY
from asyncloader.errors import SaveError

if TYPE_CHECKING:
    from asyncloader._storage.folder import Folder


STAGING = ".saving-"
"""What the names of folders begin with that hold what is not committed yet."""

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
