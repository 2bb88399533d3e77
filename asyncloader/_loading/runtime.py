"""Opens checkpoints, with threads, a byte budget and descriptors, which loads may share."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from asyncloader._addresses import is_url
from asyncloader._arguments import check_callable, check_row_options
from asyncloader._checkpoint.catalog import is_weight_map
from asyncloader._checkpoint.format import INDEX, MODEL, SIDECAR, TENSORKEY
from asyncloader._storage.descriptors import Descriptors
from asyncloader._storage.local import LocalStorage
from asyncloader._storage.objects import ObjectStorage, open_objects
from asyncloader._storage.protocol import ThreadedStorage
from asyncloader._storage.retrying import ThreadedRetryingStorage
from asyncloader._storage.unpacking import UnpackingStorage
from asyncloader._threads.disk import Disk
from asyncloader._threads.gate import Gate
from asyncloader._threads.jobs import ByteBudget
from asyncloader._threads.lag import LagWatch
from asyncloader._threads.pool import Threads
from asyncloader.options import ReadOptions

from .hold import Hold
from .session import Session, in_time, on_disk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asyncloader._disk_table.readers import RowReaders


_LEAST_REQUEST = 1 << 20
# What cannot be looked up is told by its name: in a store, all is a file.


def _as_it_is(storage: ThreadedStorage) -> ThreadedStorage:
    return storage


class Runtime:
    """Threads and an allowance of bytes that any number of loads share.

    A load makes its own, and lets go of them when it ends; so 32 loads at a time have 32 times the
    threads and 32 times `max_inflight_bytes`. Loads that are given a runtime share them.
    Reads of all of them take turns, first come, first served: none waits for another to end.

    ```python
    async with asyncloader.Runtime(max_inflight_bytes=256 << 20) as runtime:
        async with asyncio.TaskGroup() as group:
            for path, tensors in models.items():
                loader = asyncloader.Loader(path, tensors=tensors, runtime=runtime)
                group.create_task(loader.aload())
    ```

    Belongs to the event loop, and to the process, in which it was entered. Leaving waits for the
    loads that use it; a load that begins afterwards is a `RuntimeError`. Can be entered again.

    Args:
        parallel: Reads at a time, of all loads, as far as `max_inflight_bytes` has room for them.
        max_inflight_bytes: Memory for reads under way, of all loads, in bytes.
        max_loop_lag: As in `ReadOptions`, for all loads.
        pressure: As in `ReadOptions`, for all loads.
        wrap_storage: Gets the files of each checkpoint, a `protocols.ThreadedStorage`, and returns
            what is read from in their place: one that counts, say, or that fails, to see what your
            service does then.
        row_cache_bytes: Memory for hot rows of all `DiskTable`s that are made with this runtime, in
            bytes; 0 is none. It outlives a version of a model: while the next one comes in, both
            share it.
        row_concurrency: Lookups in all those tables that read at a time.
        row_stall_timeout: Seconds after which such a lookup is given up; `None` waits for ever.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        *,
        parallel: int = 16,
        max_inflight_bytes: int = 128 << 20,
        max_loop_lag: float | None = None,
        pressure: Callable[[], float] | None = None,
        wrap_storage: Callable[[ThreadedStorage], ThreadedStorage] = _as_it_is,
        row_cache_bytes: int = 0,
        row_concurrency: int = 8,
        row_stall_timeout: float | None = 120.0,
    ) -> None:
        check_callable(wrap_storage, "wrap_storage")
        check_row_options(row_concurrency, row_cache_bytes, row_stall_timeout, prefix="row_")
        self._row_options = row_concurrency, row_cache_bytes, row_stall_timeout
        self._options = ReadOptions(
            parallel=parallel,
            max_inflight_bytes=max_inflight_bytes,
            max_loop_lag=max_loop_lag,
            pressure=pressure,
        )
        # It is not known yet how large chunks are: small ones may have use for all threads.
        self._held = Hold(partial(open_resources, self._options, reads=parallel, wrap=wrap_storage))

    def __repr__(self) -> str:
        held = self._held
        if held.value is None:
            return "<Runtime: not entered>"
        return f"<Runtime: {held.users} loads, {held.value.budget!r}>"

    @functools.cached_property
    def row_readers(self) -> RowReaders:
        """What all `DiskTable`s of this runtime share; on any thread, entered or not."""
        from asyncloader._disk_table.readers import RowReaders  # noqa: PLC0415  # numba

        concurrency, cache_bytes, seconds = self._row_options
        return RowReaders(concurrency=concurrency, cache_bytes=cache_bytes, stall_timeout=seconds)

    async def __aenter__(self) -> Self:
        if self._held.is_entered:
            raise RuntimeError(f"{self!r} is entered already")
        await self._held.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._held.close()

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[Resources]:
        """Lend resources to a load, for the length of the block."""
        held = self._held
        if held.value is None:
            raise RuntimeError("the runtime is not entered: async with Runtime() as runtime: ...")
        if held.process != os.getpid():
            raise RuntimeError("the runtime was entered in another process; make one in this one")
        if held.loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "the runtime was entered on another event loop; load() has one of its own, so it "
                "cannot share: await aload()"
            )
        with held.use() as resources:
            yield resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The threads and memory of one load, or of many at a time, on one event loop."""

    options: ReadOptions  # the limits of all loads together
    threads: Threads
    budget: ByteBudget
    descriptors: Descriptors
    watch: LagWatch | None  # keeps the promises to the event loop, if there are any
    wrap: Callable[[ThreadedStorage], ThreadedStorage]


@contextlib.asynccontextmanager
async def open_resources(
    options: ReadOptions,
    *,
    reads: int | None = None,
    wrap: Callable[[ThreadedStorage], ThreadedStorage] = _as_it_is,
) -> AsyncIterator[Resources]:
    """Start threads for the length of the block, `reads` of them for reads.

    `None` is as many as are of use for chunks of the usual size.
    """
    # No more threads than whole chunks fit into memory: the others would wait.
    count = max(options.max_inflight_bytes // options.read_bytes, 1)
    count = min(options.parallel, count) if reads is None else reads
    gate = Gate(most=count)
    watching: contextlib.AbstractAsyncContextManager[LagWatch | None] = contextlib.nullcontext()
    if options.promises:
        bound = math.inf if options.max_loop_lag is None else options.max_loop_lag
        watching = LagWatch(gate, bound=bound, pressure=options.pressure)
    async with watching as watch, Threads(reads=count, gate=gate) as threads:
        yield Resources(
            options=options,
            threads=threads,
            budget=ByteBudget(options.max_inflight_bytes),
            descriptors=Descriptors(),
            watch=watch,
            wrap=wrap,
        )


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
        files, file = open_objects(path, options, disk, seen)
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
            keep_open=files.keep,
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
        # A file that the user has named may be a link to anywhere: the user chose it.
        follow_symlinks=options.follow_symlinks or trusted,
    )
    return files, file


def _root_and_file(path: str) -> tuple[Path, str | None]:
    """Return the folder to look into, and the name of the file if it is one."""
    whole = Path(path)
    # `os.path`, unlike `Path`, never raises.
    is_file = os.path.isfile(whole)  # noqa: PTH113
    if is_file or (whole.name.endswith(".safetensors") and not os.path.isdir(whole)):  # noqa: PTH112
        return whole.parent, whole.name
    return whole, None
