"""Looks at folders without blocking the event loop, on threads of its own."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from asyncloader._threads.call import Reading, StalledError
from asyncloader._threads.disk import Disk
from asyncloader._threads.pool import WorkerPool
from asyncloader.errors import CheckpointError

from .folder import is_unclear
from .folders import Folders

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from .folder import Folder


T = TypeVar("T")
P = ParamSpec("P")


class Looks:
    """Looks at a folder and reads small files in it, on a thread of its own.

    The event loop's own threads would not do: the end of the program waits for them, though the
    disk is gone. Belongs to one event loop.

    Args:
        location: What is looked at, for messages.
        stall_timeout: Seconds after which a look is given up if the disk gives no answer; `None`
            waits for ever.
        storage_options: Of URLs, as `ReadOptions` has them.
        threads: Looks at a time.
    """

    def __init__(
        self,
        location: str,
        *,
        stall_timeout: float | None,
        storage_options: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> None:
        self._location = location
        self._folders = Folders(storage_options)
        self._is_closed = False
        self._workers = WorkerPool(threads, name="asyncloader-look")
        self._disk = Disk(self._workers, seconds=stall_timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Look no more; wait for the thread to end, which it does at once if it is idle."""
        self._is_closed = True
        # A command may still look at a disk that gives no answer: it will be given up.
        self._workers.shutdown(wait=self._disk.is_idle)

    def folder(self, location: str) -> Folder:
        """Return the folder of a path or URL. Looks at nothing yet."""
        return self._folders.at(location)

    async def __call__(self, look: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `look` returns. A caller that is cancelled does not wait for it.

        Raises:
            CheckpointError: If there was no answer, or an `OSError`.
            RuntimeError: If this is closed.
            Exception: What else `look` raises.
        """
        return await self._answered(partial(look, *args, **kwargs), None)

    async def at_many(self, look: Callable[[Callable[[], None]], T]) -> T:
        """Return what a look at many files returns; each gets the whole stall time-out.

        Args:
            look: Gets a function to call before each file.

        Raises:
            Exception: What a call raises.
        """
        reading = Reading(self._location)
        tick = partial(reading.begin, 0, ())
        return await self._answered(partial(look, tick), reading)

    async def read(self, folder: Folder, name: str, *, last: int) -> bytes:
        """Return the end of a file, at most `last` bytes of it.

        Raises:
            CheckpointError: If there was no answer.
            RuntimeError: If this is closed.
            OSError: If it is no file, or cannot be read.
        """
        executor = self._disk.executor(f"{folder.location}/{name}")
        try:
            return await self._answer(folder.aread(name, executor, last=last))
        except OSError as error:
            if is_unclear(error):
                raise self._trouble(error) from error
            raise

    async def _answered(self, look: Callable[[], T], reading: Reading | None) -> T:
        try:
            return await self._answer(self._looked(look, reading))
        except CheckpointError:  # some of which are of a kind of `OSError`, too
            raise
        except OSError as error:
            raise self._trouble(error) from error

    async def _looked(self, look: Callable[[], T], reading: Reading | None) -> T:
        executor = self._disk.executor(self._location, reading)
        return await asyncio.get_running_loop().run_in_executor(executor, look)

    def _trouble(self, error: OSError) -> CheckpointError:
        where = "" if error.filename in {None, self._location} else f" ({error.filename})"
        problem = f"cannot be looked at: {error.strerror or error}{where}"
        return CheckpointError(self._location, problem)

    async def _answer(self, look: Awaitable[T]) -> T:
        try:
            return await look
        except StalledError as error:
            raise CheckpointError(self._location, f"cannot be looked at: {error}") from error
        except RuntimeError as error:
            if not self._is_closed:
                raise
            problem = f"{self._location!r}: left: use it within its `async with` block"
            raise RuntimeError(problem) from error
