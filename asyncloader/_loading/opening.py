"""Opens checkpoints for reading."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader._addresses import FILES, address_of, is_url
from asyncloader._checkpoint.catalog import SHARDED, SINGLE, is_weight_map
from asyncloader._checkpoint.format import INDEX, MODEL, SIDECAR, TENSORKEY
from asyncloader._storage.cache import Cache
from asyncloader._storage.local import LocalStorage
from asyncloader._storage.objects import ObjectStorage
from asyncloader._storage.protocol import ThreadedStorage
from asyncloader._storage.retrying import ThreadedRetryingStorage
from asyncloader._storage.store_ranges import StoreRanges
from asyncloader._storage.stores import open_store
from asyncloader._storage.unpacking import UnpackingStorage
from asyncloader._threads.disk import Disk

from .runtime import Resources, Runtime, open_resources
from .session import Session, in_time, is_here, on_disk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncloader._storage.descriptors import Descriptors
    from asyncloader.options import ReadOptions


_LEAST_REQUEST = 1 << 20


def checked_runtime(runtime: object, options: ReadOptions) -> Runtime | None:
    """Return a runtime that keeps the promises of `options`, or `None`."""
    if runtime is not None and not isinstance(runtime, Runtime):
        raise TypeError(f"runtime must be a Runtime or None, got {runtime!r}")
    if runtime is not None and options.promises:
        raise ValueError("max_loop_lag and pressure are for all loads of a runtime: give it them")
    return runtime


@contextlib.asynccontextmanager
async def open_session(
    path: str,
    options: ReadOptions,
    *,
    seen: dict[str, tuple[object, ...]] | None = None,
    runtime: Runtime | None = None,
) -> AsyncIterator[Session]:
    """Hold descriptors and threads for the length of the block, and keep to `options.timeout`.

    Args:
        path: A folder, a safetensors file, or a weight map.
        options: How to read, as far as a shared runtime allows.
        seen: Which files there were when they were first opened; see `LocalStorage`.
        runtime: Its threads, bytes and promises are used, in place of such of its own.
    """
    if is_url(path):  # one request waits for its bytes: many at a time, or the link is idle
        most = max(options.max_inflight_bytes // options.parallel, _LEAST_REQUEST)
        options = replace(options, chunk_bytes=min(options.chunk_bytes, most))
    async with holding(path, options, runtime) as (resources, watched):
        opening = open_files(path, options, resources, watched, seen=seen)
        async with opening as session, session.explaining():
            yield session


@contextlib.asynccontextmanager
async def holding(
    path: str, options: ReadOptions, runtime: Runtime | None
) -> AsyncIterator[tuple[Resources, list[Disk]]]:
    """Hold threads and bytes for the length of the block, and keep to `options.timeout`.

    Yields also the list of disks that the time-out asks what was being read.
    """
    held = open_resources(options) if runtime is None else runtime.lend()
    async with in_time(path, options.timeout) as watched, held as resources:
        yield resources, watched


@contextlib.asynccontextmanager
async def open_files(
    path: str,
    options: ReadOptions,
    resources: Resources,
    watched: list[Disk],
    *,
    seen: dict[str, tuple[object, ...]] | None = None,
) -> AsyncIterator[Session]:
    """Hold the files of one checkpoint open; errors are explained by `Session.explaining`."""
    disk = Disk(resources.threads.reads, seconds=options.stall_timeout)
    files: LocalStorage | ObjectStorage
    if is_url(path):
        files, file = _open_objects(path, options, disk, seen)
    else:
        files, file = await _open_local(path, options, disk, seen, resources.descriptors)
    async with files:
        storage, shared = resources.wrap(files), resources.options
        if not isinstance(storage, ThreadedStorage):
            raise TypeError(f"wrap_storage returned {storage!r}, which is no ThreadedStorage")
        watched.append(disk)
        if isinstance(files, ObjectStorage):
            if not shared.promises:
                resources.threads.gate.expect_waiting()
            if file is None:
                await files.find_ahead((INDEX, TENSORKEY, SIDECAR, MODEL))
        yield Session(
            location=path if is_url(path) else str(Path(path)),
            file=file,
            entries=files.entries,
            keep_open=files.hold_open,
            ensure=files.ensure if isinstance(files, ObjectStorage) else is_here,
            is_remote=lambda _: isinstance(files, ObjectStorage),
            gap_bytes=files.gap_bytes,
            traffic=files.traffic,
            # A wrapper need not count lost reads: the files do.
            storage=UnpackingStorage(
                ThreadedRetryingStorage(storage, lost=lambda: files.lost, attempts=files.attempts)
            ),
            threads=resources.threads,
            disk=disk,
            options=replace(
                options,
                parallel=min(options.parallel, shared.parallel),
                chunk_bytes=min(options.read_bytes, shared.read_bytes),
                max_inflight_bytes=shared.max_inflight_bytes,
            ),
            budget=resources.budget,
            watch=resources.watch,
        )


async def _open_local(
    path: str,
    options: ReadOptions,
    disk: Disk,
    seen: dict[str, tuple[object, ...]] | None,
    descriptors: Descriptors,
) -> tuple[LocalStorage, str | None]:
    """Return the folder to look into, and the name of the file if it is one."""
    root, file = await on_disk(disk, partial(_root_and_file, path), path)
    # Of a weight map's files, the map chooses which.
    trusted = file is not None and not is_weight_map(file)
    files = LocalStorage(
        root,
        disk=disk,
        descriptors=descriptors,
        seen=seen,
        direct_io=options.direct_io,
        names=(INDEX, SHARDED, SINGLE) if file is None else (file,),
        # A file that the user has named may be a link to anywhere: the user chose it.
        follow_symlinks=options.follow_symlinks or trusted,
    )
    return files, file


def _open_objects(
    url: str, options: ReadOptions, disk: Disk, seen: dict[str, tuple[object, ...]] | None
) -> tuple[ObjectStorage, str | None]:
    """Return the objects to look into, and the name of the one if it is a file's."""
    address = address_of(url, "path")
    given = options.storage_options or {}
    store = open_store(address, given, read_bytes=options.read_bytes)
    above, _, name = address.key.rpartition("/")
    is_file = name.endswith(FILES)
    prefix = above if is_file else address.key
    prefix = f"{prefix}/" if prefix else ""
    folder = options.cache_dir
    storage = ObjectStorage(
        store,
        prefix,
        address.url.rpartition("/")[0] if is_file else address.url,
        disk=disk,
        ranges=StoreRanges(store, prefix, given.get("client_options")),
        cache=None if folder is None else Cache(Path(folder), options.cache_bytes),
        stall_timeout=options.stall_timeout,
        seen=seen,
    )
    return storage, name if is_file else None


def _root_and_file(path: str) -> tuple[Path, str | None]:
    """Return the folder to look into, and the name of the file if it is one."""
    whole = Path(path)
    # `os.path`, unlike `Path`, never raises.
    is_file = os.path.isfile(whole)  # noqa: PTH113
    if is_file or (whole.name.endswith(".safetensors") and not os.path.isdir(whole)):  # noqa: PTH112
        return whole.parent, whole.name
    return whole, None
