"""Changes the version that serves: loads another one, swaps it in, or gives it back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from asyncloader._threads.jobs import raising_first
from asyncloader.errors import CheckpointError

from .events import LoadCancelled, LoadFailed, RolledBack, Swapped
from .loading import RefusedError
from .shelf import Held

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from .events import Teller
    from .loading import VersionLoader
    from .shelf import Freeing, Shelf
    from .source import Candidate


T = TypeVar("T")


class Switch:
    """Loads versions and swaps them. Belongs to one event loop; a caller holds `turn` meanwhile."""

    def __init__(
        self, shelf: Shelf, loader: VersionLoader, freeing: Freeing, teller: Teller
    ) -> None:
        self.shelf = shelf
        self.loader = loader
        self.teller = teller
        self._freeing = freeing
        self.turn = asyncio.Lock()
        """Held by what changes the version: following, a command, or the end."""

    async def load_once(self, wanted: Candidate) -> Held:
        """Load a version for a caller that waits for it, and that hears of what goes wrong.

        Raises:
            CheckpointError: If the version was refused.
            Exception: What building and loading raise.
        """
        try:
            return await self.loader.load(wanted, 1)
        except RefusedError as refused:
            raise CheckpointError(str(wanted.path), refused.reason) from refused.__cause__
        except Exception as error:
            self.failed(wanted, error, 1, None)
            raise

    def failed(
        self, wanted: Candidate, error: Exception, attempt: int, retry_in: float | None
    ) -> None:
        """Tell that a load has failed."""
        self.teller.tell(
            LoadFailed(**wanted.names, error=error, attempt=attempt, retry_in=retry_in)
        )

    def swap(self, held: Held, *, back: bool = False) -> bool:
        """Let a version serve from now on, unless it was let go meanwhile; say whether it does."""
        if held is self.shelf.now[1]:
            return True
        previous = self.shelf.held[-1].candidate.name if self.shelf.held else None
        if not self.shelf.put(held, back=back):
            return False
        self.teller.note("older", "")
        if back and previous is not None:
            self.teller.tell(RolledBack(**held.candidate.names, previous=previous))
        else:
            self.teller.tell(Swapped(**held.candidate.names, previous=previous))
        return True

    def drop(self, loaded: object) -> None:
        """Give a version back that was loaded, and is not wanted any more."""
        if isinstance(loaded, Held):
            self.teller.tell(LoadCancelled(**loaded.candidate.names))
            self._freeing.free(loaded.model, loaded)

    async def attempted(
        self, work: Coroutine[Any, Any, T], among: set[asyncio.Task[Any]]
    ) -> T | None:
        """Await work in a task that others may cancel, without cancelling the caller.

        Args:
            work: What to await; a version that it returns to no caller is given back.
            among: Holds the task meanwhile.

        Returns:
            What the work returned; `None` if its task was cancelled.
        """
        task: asyncio.Task[T] | None = None
        try:
            with raising_first():
                async with asyncio.TaskGroup() as group:
                    task = group.create_task(work, name="asyncloader-live-load")
                    among.add(task)
                    task.add_done_callback(among.discard)
        except asyncio.CancelledError:
            # The caller was cancelled, maybe when a version had just been loaded.
            if task is not None and not task.cancelled() and task.exception() is None:
                self.drop(task.result())
            raise
        return None if task.cancelled() else task.result()


def cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel all of some tasks."""
    for task in tasks:
        task.cancel()
