"""A folder before a save: it may hold an old checkpoint, other files, left-overs of dead saves."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import orjson

from asyncloader._checkpoint.format import DESCRIPTION, INDEX, SIDECAR, STAGING, TENSORKEY
from asyncloader.errors import SaveError

from .part import parse_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from asyncloader._storage.folder import Folder, RenamingFolder, WritableFolder


OLD = "old"
"""The folder, within a staging folder, of the files that a commit has moved away."""

_DEAD_AFTER = 1800.0
"""Seconds without a change after which a save of several ranks counts as dead."""

_OURS = frozenset({INDEX, TENSORKEY, DESCRIPTION, SIDECAR})
_SHARD = re.compile(r"model-\d{6,}-of-\d{6,}(-[A-Za-z0-9._-]+)?\.safetensors")
# What an `index` may call a shard; nothing else is removed because one names it.
_LISTED = re.compile(r"[^/\\\0]+\.safetensors")
# What RecIS's trainer puts beside them; of a run, they are a checkpoint's own.
_OF_RUN = re.compile(r"model\.(pt|pkl)|extra\.(pt|pkl)|io_state_\d+\.pt|io_state_count")
# What an old checkpoint may have beside it. RecIS's trainer puts its own files there, before or
# after. `.nfs…` is a file that was removed while it was open. File systems, desktops and job
# runners leave the others.
_BESIDE = re.compile(
    r"model\.(pt|pkl)|extra\.(pt|pkl)|io_state_.*\.pt|io_state_count|\.nfs.*"
    r"|lost\+found/|\.snapshots?/|\.zfs/|\.Trash(es|-\d+)?/|\.(fseventsd|Spotlight-V100)/"
    r"|\$RECYCLE\.BIN/|System Volume Information/|\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|_SUCCESS"
)
_NAMED = 5


def staging_of(ranks: int, save_id: str) -> str:
    """Return the name of the folder that holds the files that a save has not committed yet."""
    return f"{STAGING}{ranks}-{save_id}"


def is_shard(name: str) -> bool:
    """Say whether a file is called as a shard of a save."""
    return _SHARD.fullmatch(name) is not None


def files_of(folder: WritableFolder, at: str, *, whole: bool) -> list[str]:
    """Return the files of the checkpoint in the folder `at`.

    With `whole`, those that RecIS's trainer puts beside the tables are its own, too; and always
    those of them that the sidecar tells of, as a `Saver` wrote them with the rest.
    """
    return _files_of(folder, at, folder.names(at), whole=whole)


def _files_of(folder: WritableFolder, at: str, names: list[str], *, whole: bool) -> list[str]:
    listed = _listed(folder, at) if INDEX in names else frozenset()
    own = [name for name in names if name in _OURS | listed or _SHARD.fullmatch(name)]
    if own == [INDEX] and not listed:
        return []  # a file of that name, but none of ours
    beside = [name for name in names if _OF_RUN.fullmatch(name)]
    if beside and not whole:
        told = _told(folder, at) if SIDECAR in names else frozenset()
        beside = [name for name in beside if name in told]
    return own + beside


def old_files(folder: WritableFolder, *, whole: bool = False) -> list[str]:
    """Return the files that a new checkpoint replaces; `SaveError` if there is anything else."""
    names = folder.names("")
    old = _files_of(folder, "", names, whole=whole)
    others = [
        name
        for name in names
        if not (name in old or name.startswith(STAGING) or _BESIDE.fullmatch(name))
    ]
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        problem = (
            f"the folder holds something else than a checkpoint: "
            f"{', '.join(map(repr, others[:_NAMED]))}{more}; nothing was written. Save into a "
            "new folder, or move that away"
        )
        raise SaveError(folder.location, problem)
    return old


def _listed(folder: Folder, at: str) -> frozenset[str]:
    """Return the shard files that the old `index` names, also those with names of their own."""
    try:
        names = dict(orjson.loads(folder.read(f"{at}/{INDEX}".lstrip("/")))["file_index"])
    except (ValueError, TypeError, KeyError):
        return frozenset()  # damaged: it is replaced all the same
    return frozenset(name for name in names if _LISTED.fullmatch(str(name)))


def left_of_saves(folder: Folder) -> tuple[str, ...]:
    """Return what saves that are under way, or dead, have in a folder: files and folders (`…/`)."""
    try:
        files, folders = folder.files(""), folder.folders("")
    except FileNotFoundError:  # it was removed meanwhile
        return ()
    listed = _listed(folder, "") if INDEX in files else frozenset()
    # An `index` that cannot be read may name any of them.
    known = listed or INDEX not in files
    shards = [name for name in files if known and is_shard(name) and name not in listed]
    names = [*files, *(f"{name}/" for name in folders)]
    return tuple(sorted([*shards, *(name for name in names if name.startswith(STAGING))]))


def _told(folder: WritableFolder, at: str) -> frozenset[str]:
    """Return the files that the old sidecar has digests of."""
    try:
        sidecar = dict(orjson.loads(folder.read(f"{at}/{SIDECAR}".lstrip("/"))))
        return frozenset((*sidecar["shards"], *sidecar["files"]))
    except (ValueError, TypeError, KeyError):
        return frozenset()


def moved_away(folder: WritableFolder) -> str | None:
    """Return the staging folder of a save that was cut off while the old checkpoint was in it.

    Its files are to be put back. Where there is an `index`, what others had moved away is out of
    date, and is removed. So there is never more than one old checkpoint moved away.
    """
    names = folder.names("")
    dead = [staging for staging in _stagings(names) if f"{OLD}/" in folder.names(staging)]
    if INDEX in names:
        for staging in dead:
            _remove_old(folder, staging)
        return None
    for staging in dead:
        if INDEX in folder.names(f"{staging}/{OLD}"):
            return staging
    return None


def put_back(folder: RenamingFolder, staging: str) -> None:
    """Make a checkpoint again of the files that a dead save had moved away.

    `tensorkey.json` went last, and comes back first: while it is away, and only then, what is in
    place is the dead save's own. So this may be cut off at any point, and begin anew.
    """
    old = f"{staging}/{OLD}"
    aside = folder.names(old)
    if TENSORKEY in aside:
        brought = _brought(folder, staging) & set(folder.names(""))
        for name in sorted({*old_files(folder), *brought}):
            folder.move(name, f"{staging}/{name}")
        folder.move(f"{old}/{TENSORKEY}", TENSORKEY)
        folder.sync("")
    for name in aside:
        if name not in {INDEX, TENSORKEY}:
            folder.move(f"{old}/{name}", name)
    folder.sync("")
    folder.move(f"{old}/{INDEX}", INDEX)
    folder.sync("")


def _brought(folder: WritableFolder, staging: str) -> set[str]:
    """Return the files that the ranks of a dead save have staged, `model.pt` perhaps."""
    names: set[str] = set()
    for part in folder.names(staging):
        if part.startswith("part-") and part.endswith(".json"):
            with contextlib.suppress(ValueError):  # damaged
                names |= parse_part(folder.read(f"{staging}/{part}")).sizes.keys()
    return names


def _remove_old(folder: WritableFolder, staging: str) -> None:
    """Remove the old checkpoint; `index` first, or a reader might take the rest for whole."""
    old = f"{staging}/{OLD}"
    names = folder.names(old)
    if INDEX in names:
        folder.remove(f"{old}/{INDEX}")
        folder.sync(old)
    for name in names:
        if name != INDEX:
            folder.remove(f"{old}/{name}")


def _stagings(names: Iterable[str]) -> list[str]:
    """Return the staging folders among a folder's names, without their slash."""
    return [name[:-1] for name in names if name.startswith(STAGING) and name.endswith("/")]


def remove_dead(folder: WritableFolder, mine: str | None, told: list[str], *, now: float) -> None:
    """Remove staging folders of dead saves, all but `mine`; tell what went wrong.

    The caller holds the folder's lock, so a save of one rank is dead if it is not the caller's.
    `now` is the time by the folder's clock.
    """
    with telling(told, "left-overs could not be removed"):
        for staging in _stagings(folder.names("")):
            alone = staging.startswith(f"{STAGING}1-")
            if staging != mine and (alone or now - folder.changed_at(staging) > _DEAD_AFTER):
                remove_staging(folder, staging, told)


def remove_staging(
    folder: WritableFolder, staging: str, told: list[str], *, keep_old: bool = False
) -> None:
    """Remove a staging folder, and tell what went wrong.

    With `keep_old` it stays if it holds an old checkpoint.
    """
    with telling(told, "left-overs could not be removed"):
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
def telling(told: list[str], what: str) -> Iterator[None]:
    """Keep a warning for the thread that saves.

    A handler of a signal may save while that thread writes a log line; no other thread can then.
    """
    try:
        yield
    except OSError as error:
        told.append(f"{what}: {error}")
