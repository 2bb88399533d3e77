"""Run folders, in which a trainer keeps its checkpoints: one sub-folder each.

RecIS's trainer lists the sub-folders' names in a text file, `checkpoint`, a line each, the newest
last.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, overload

from ._addresses import as_path
from ._arguments import check_storage_options
from ._checkpoint.run_folder import Version, find_versions, newest_version, sub_folder
from ._ready_stores import source_of
from ._storage.looks import Looks
from ._threads.blocking import run_blocking

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    from ._ready_stores import Source

__all__ = ["Version", "alatest", "aversions", "latest", "versions"]

_STALL_TIMEOUT = 120.0
_THREADS = 8


@overload
def latest(
    run_folder: os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> Path: ...
@overload
def latest(
    run_folder: Source, *, storage_options: Mapping[str, Any] | None = None
) -> Path | str: ...
def latest(run_folder: Source, *, storage_options: Mapping[str, Any] | None = None) -> Path | str:
    """Return the newest finished checkpoint of a run folder: its path, or its URL.

    That is the last line of its text file `checkpoint` that names a sub-folder with `index`, or
    with a model as Hugging Face has it. Where no line does, it is the sub-folder whose `index`, or
    model, is the newest; in an object store, whose folders have no time, the last one by name,
    numbers counted as such. A checkpoint is passed over, with a warning, if `index` or
    `tensorkey.json` is no JSON, or if a shard, `model.pt` or `extra.pt` is not written to its end:
    it is still copied, or was removed meanwhile. Blocks; `alatest` does not.

    Args:
        run_folder: A path, a URL, or a store of obstore, whose options the URL then needs. Of
            HTTP, where no names are listed, a run with a `checkpoint`.
        storage_options: Of a URL, as `ReadOptions` has them.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If the folder cannot be listed, or there is no answer for two minutes.
        OSError: If there are too few descriptors for an event loop.
    """
    return run_blocking(partial(alatest, run_folder, storage_options=storage_options))


@overload
async def alatest(
    run_folder: os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> Path: ...
@overload
async def alatest(
    run_folder: Source, *, storage_options: Mapping[str, Any] | None = None
) -> Path | str: ...
async def alatest(
    run_folder: Source, *, storage_options: Mapping[str, Any] | None = None
) -> Path | str:
    """Return what `latest` returns, without blocking the event loop; raises what it does."""
    check_storage_options(storage_options)
    location, storage_options = source_of(run_folder, "run_folder", storage_options)
    with Looks(location, stall_timeout=_STALL_TIMEOUT, storage_options=storage_options) as looks:
        name = await newest_version(looks, looks.folder(location), finished=True)
    return as_path(sub_folder(location, name))


def versions(
    run_folder: Source, *, storage_options: Mapping[str, Any] | None = None
) -> tuple[Version, ...]:
    """Return all sub-folders of a run folder, the newest last; see `aversions`."""
    return run_blocking(partial(aversions, run_folder, storage_options=storage_options))


async def aversions(
    run_folder: Source, *, storage_options: Mapping[str, Any] | None = None
) -> tuple[Version, ...]:
    """Return all sub-folders of a run folder, the newest last.

    Args:
        run_folder: A path, or the URL of a store that lists its objects.
        storage_options: Of a URL, as `ReadOptions` has them.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointError: If it cannot be listed, or there is no answer for two minutes.
    """
    check_storage_options(storage_options)
    location, storage_options = source_of(run_folder, "run_folder", storage_options)
    with Looks(
        location,
        stall_timeout=_STALL_TIMEOUT,
        storage_options=storage_options,
        threads=_THREADS,
    ) as looks:
        return await find_versions(looks, looks.folder(location))
