"""Looks at the source on a thread, which is given up if the disk gives no answer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from asyncloader._threads.call import StalledError
from asyncloader._threads.disk import Disk
from asyncloader._threads.pool import WorkerPool
from asyncloader.errors import CheckpointError

from .source import candidate, named, newest

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection
    from pathlib import Path

    from .source import Candidate


T = TypeVar("T")


class Looks:
    """Says which versions there are. Belongs to one event loop.

    All of it raises `CheckpointError` if it got no answer, and `RuntimeError` once it is closed.

    Args:
        source: A run folder, or a checkpoint.
        stall_timeout: Seconds after which a look without an answer is given up.
    """

    def __init__(self, source: Path, *, stall_timeout: float | None) -> None:
        self._source = source
        self._closed = False
        self._workers = WorkerPool(1, name="asyncloader-look")
        self._disk = Disk(self._workers, seconds=stall_timeout)

    def close(self) -> None:
        """Look no more. Waits for a look that is under way if nobody waits for it any more."""
        self._closed = True
        # A command may still look at a disk that gives no answer: it will be given up.
        self._workers.shutdown(wait=self._disk.is_idle)

    async def newest(self) -> Candidate:
        """Return the newest version.

        Raises:
            CheckpointNotFoundError: If there is none.
        """
        return await self._run(partial(newest, self._source))

    async def at(self, path: Path) -> Candidate:
        """Return the version at a path.

        Raises:
            CheckpointNotFoundError: If there is none.
        """
        return await self._run(partial(candidate, path))

    async def named(self, version: str | os.PathLike[str]) -> Path:
        """Return where a version is: a sub-folder of the source, or any other path."""
        return await self._run(partial(named, self._source, version))

    async def is_older(
        self, found: Candidate, serving: Candidate, served: Collection[Candidate]
    ) -> bool:
        """Say whether what was found came before what serves; see `Candidate.is_older_than`."""
        return await self._run(partial(found.is_older_than, serving, served))

    async def _run(self, job: Callable[[], T]) -> T:
        try:
            return await self._disk.call(job)
        except StalledError as error:
            raise CheckpointError(str(self._source), f"cannot be looked at: {error}") from error
        except RuntimeError as error:
            if not self._closed:
                raise
            problem = f"{str(self._source)!r}: left: use it within its `async with` block"
            raise RuntimeError(problem) from error
