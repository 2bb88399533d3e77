"""Opens checkpoints for reading: for one block, or for each of several calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader._checkpoint.safetensors import is_weight_map
from asyncloader._storage.local import LocalStorage
from asyncloader._storage.protocol import ThreadedStorage
from asyncloader._storage.retrying import ThreadedRetryingStorage
from asyncloader._threads.disk import Disk
from asyncloader.errors import LoadTimeoutError

from .runtime import Hold, open_resources
from .session import Session, on_disk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asyncloader.options import ReadOptions

    from .runtime import Resources, Runtime

_SUFFIX = ".safetensors"
_JUST_BEFORE = 1e-6
"""Seconds."""


class Sessions:
    """Gives every call a session: the one that `async with` holds open, or one of its own.

    All of them see the same files: one that is replaced after it was first opened is an error.

    Args:
        path: As for `open_session`.
        options: For each session; `timeout` is for each call.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._seen: dict[str, tuple[int, ...]] = {}
        self._held: Hold[Session] | None = None

    async def __aenter__(self) -> None:
        if self._held is not None:
            raise RuntimeError(f"{self._path}: is open already")
        self._held = await Hold.open(self._open(replace(self._options, timeout=None)))

    async def __aexit__(self, *_: object) -> None:
        held, self._held = self._held, None
        if held is not None:
            await held.close()

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        """Lend a session for the length of the block."""
        held = self._held
        if held is None or held.loop is not asyncio.get_running_loop():
            async with self._open(self._options) as session:
                yield session
            return
        with held.use() as session:
            async with _in_time(self._path, self._options.timeout) as late:
                with late.noting(session.disk):
                    async with session.explaining():
                        yield session

    def _open(self, options: ReadOptions) -> contextlib.AbstractAsyncContextManager[Session]:
        return open_session(self._path, options, seen=self._seen)


@contextlib.asynccontextmanager
async def open_session(
    path: str,
    options: ReadOptions,
    *,
    seen: dict[str, tuple[int, ...]] | None = None,
    runtime: Runtime | None = None,
) -> AsyncIterator[Session]:
    """Hold descriptors and threads for the length of the block, and keep to a time-out.

    Args:
        path: A folder, a safetensors file, or a weight map.
        options: How to read; `timeout` is for the block. As far as a shared runtime allows.
        seen: Which files there were when they were first opened; see `LocalStorage`.
        runtime: Whose threads, bytes and promises to use, in place of such of its own.

    Raises:
        LoadTimeoutError: If `timeout` passed.
    """
    holding = open_resources(options) if runtime is None else runtime.lend()
    async with _in_time(path, options.timeout) as late, holding as resources:
        disk = Disk(resources.threads.reads, seconds=options.stall_timeout)
        look = partial(_root_and_file, path)
        root, file = await on_disk(disk, look, path)
        # Of a weight map's files, the map chooses which.
        trusted = file is not None and not is_weight_map(file)
        files = LocalStorage(
            root,
            disk=disk,
            descriptors=resources.descriptors,
            seen=seen,
            direct_io=options.direct_io,
            # A file that the user has named may be a link to anywhere: nobody else chose it.
            follow_symlinks=options.follow_symlinks or trusted,
        )
        async with files:
            storage = _retrying(files, resources)
            session = Session(
                location=str(Path(path)),
                file=file,
                storage=storage,
                retrying=storage,
                threads=resources.threads,
                disk=disk,
                options=_within(options, resources.options),
                budget=resources.budget,
                watch=resources.watch,
            )
            with late.noting(disk):
                async with session.explaining():
                    yield session


def _within(options: ReadOptions, shared: ReadOptions) -> ReadOptions:
    """Return options that keep to the limits that several loads have together."""
    return replace(
        options,
        parallel=min(options.parallel, shared.parallel),
        chunk_bytes=min(options.read_bytes, shared.read_bytes),
        max_inflight_bytes=shared.max_inflight_bytes,
    )


def _retrying(files: LocalStorage, resources: Resources) -> ThreadedRetryingStorage:
    storage = resources.wrap(files)
    if not isinstance(storage, ThreadedStorage):
        raise TypeError(f"wrap_storage returned {storage!r}, which is no ThreadedStorage")
    # Of what threads may still write to, what is wrapped around the files need not know.
    return ThreadedRetryingStorage(storage, lost=lambda: files.lost)


@contextlib.asynccontextmanager
async def _in_time(path: str, seconds: float | None) -> AsyncIterator[_Lateness]:
    late = _Lateness(path, seconds)
    try:
        async with late.limit:
            yield late
    except TimeoutError as error:
        late.explain(error)
        raise


class _Lateness:
    """A time-out that knows what was being read when it passed."""

    def __init__(self, path: str, seconds: float | None) -> None:
        self.limit = asyncio.timeout(seconds)
        self._path = path
        self._seconds = seconds
        self._under_way: list[str] = []

    @contextlib.contextmanager
    def noting(self, disk: Disk) -> Iterator[None]:
        """Look what is being read just before the time-out passes."""

        def look() -> None:
            self._under_way = disk.under_way()

        when = self.limit.when()
        if when is None:
            yield
            return
        timer = asyncio.get_running_loop().call_at(when - _JUST_BEFORE, look)
        try:
            yield
        finally:
            timer.cancel()

    def explain(self, error: TimeoutError) -> None:
        """Say so, if it was this that has passed.

        Raises:
            LoadTimeoutError: If it was.
        """
        if self._seconds is not None and self.limit.expired():
            raise LoadTimeoutError(self._path, self._seconds, self._under_way) from error


def _root_and_file(path: str) -> tuple[Path, str | None]:
    """Say which folder to look into, and at which file alone, if it is one."""
    whole = Path(path)
    if whole.name.endswith(_SUFFIX) and not os.path.isdir(whole):  # noqa: PTH112  # never raises
        return whole.parent, whole.name
    if os.path.isfile(whole):  # noqa: PTH113  # never raises
        return whole.parent, whole.name
    return whole, None
