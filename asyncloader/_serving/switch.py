"""Loads a version beside those in memory, and lets it serve or gives its memory back."""

from __future__ import annotations

import asyncio
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asyncloader._display import size_text
from asyncloader._memory.allocation import SPARE
from asyncloader._threads.jobs import raising_first, run_jobs
from asyncloader.errors import CheckpointChangedError, CheckpointError

from .events import (
    LoadCancelled,
    LoadFailed,
    LoadFinished,
    LoadStarted,
    RolledBack,
    Swapped,
    VersionRefused,
)
from .model import RefusedError, built_model, pass_check, row_bytes, tensor_bytes
from .shelf import Freeing, Held, Shelf
from .sought import again

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Executor

    from asyncloader._loading.progress import Progress
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._storage.looks import Looks
    from asyncloader.loader import Loader

    from .events import Teller
    from .model import Model, Settings
    from .sought import Sought
    from .source import Candidate


T = TypeVar("T")


class Switch:
    """Loads versions, one at a time, and swaps them. Belongs to one event loop.

    Following, a command, or the end holds `turn` while it changes the version. Threads of the
    executor build, check, and give memory back.
    """

    def __init__(
        self,
        settings: Settings,
        sought: Sought,
        executor: Executor,
        looks: Looks,
        teller: Teller,
    ) -> None:
        self._settings = settings
        self._sought = sought
        self._executor = executor
        self._looks = looks
        self.teller = teller
        self._freeing = Freeing(executor, teller.tell)
        self.shelf = Shelf(keep=settings.keep, let_go=self._freeing.let_go)
        self.turn = asyncio.Lock()
        self.loading: Candidate | None = None
        self.progress: Progress | None = None
        self._predicted = 0

    def open(self) -> None:
        self._freeing.begin()
        SPARE.allow(self, 0)  # memory is reserved with room for a next version

    async def close(self) -> None:
        """Let all versions go, and wait until memory without users is given back."""
        self.shelf.close()
        await self._freeing.wait()
        SPARE.forget(self)

    async def load_once(self, wanted: Candidate) -> Held:
        """Load a version for a caller that waits, and gets a `CheckpointError` if it is refused."""
        try:
            return await self.load(wanted, 1)
        except RefusedError as refused:
            raise CheckpointError(wanted.location, str(refused)) from refused.__cause__
        except Exception as error:
            self.failed(wanted, error, 1, None)
            raise

    def failed(
        self, wanted: Candidate, error: Exception, attempt: int, retry_in: float | None
    ) -> None:
        self.teller.tell(
            LoadFailed(**wanted.names, error=error, attempt=attempt, retry_in=retry_in)
        )

    async def load(self, wanted: Candidate, attempt: int) -> Held:
        """Return a version that may serve; its memory is given back if that fails.

        Raises:
            RefusedError: If it shall not serve; an event has said so.
            Exception: Each error of building and loading.
        """
        self.loading, self.progress = wanted, None
        self.teller.tell(LoadStarted(**wanted.names, attempt=attempt))
        model = None
        try:
            model = await built_model(self._settings, wanted, self._executor)
            return await self._fill(model, wanted)
        except BaseException as error:
            _clear_frames(error)  # they know the model
            if model is not None:
                self._freeing.free(model, None)
            if isinstance(error, asyncio.CancelledError):
                self.teller.tell(LoadCancelled(**wanted.names))
            elif isinstance(error, RefusedError):
                refused = VersionRefused(**wanted.names, reason=str(error), error=error.error)
                self.teller.tell(refused)
            raise
        finally:
            del model
            self.loading = self.progress = None

    async def _fill(self, model: Model, wanted: Candidate) -> Held:
        prepare = partial(self._prepare, model, wanted)
        [loader] = await run_jobs(self._executor, [prepare])
        model.report = report = await loader.aload()
        held = Held(model, wanted, self._predicted, time.time())
        self.teller.tell(LoadFinished(**wanted.names, report=report, nbytes=held.nbytes))
        self._keep_spare(held.nbytes)
        await pass_check(self._settings, model, self._executor)
        if (await again(self._looks, wanted)).files != wanted.files:
            problem = "was written to while it was being loaded"
            raise CheckpointChangedError(wanted.location, problem)
        return held

    def _prepare(self, model: Model, wanted: Candidate) -> Loader:
        """Look at every tensor; belongs on a thread: there may be very many."""
        self._must_be_fresh(model)
        options: dict[str, Any] = {**self._settings.loader_options}
        if not self.shelf.held:  # no request is served yet that a load could hold up
            options |= {"max_loop_lag": None, "pressure": None}
        predict = partial(self._predict, model, tensor_bytes(model))
        options |= {"progress": self._note_progress, "on_plan": predict}
        return self._sought.loader(wanted, model, options)

    def _must_be_fresh(self, model: Model) -> None:
        """Refuse tables and tensors of another version: loading into them would change it."""
        for name, table in model.tables.items():
            if hasattr(table, "__len__") and len(table):
                raise TypeError(f"build() made a table {name!r} that holds ids: make new ones")
        for held in self.shelf.held:
            if model.shares_memory_with(held.model):
                raise TypeError(
                    f"build() returned tables or tensors of version {held.candidate.name!r} again: "
                    "make new ones each time"
                )

    def _predict(self, model: Model, dense: int, plan: LoadPlan) -> None:
        """Compute the memory of a version, or refuse it. Versions without users give way."""
        self._predicted = nbytes = dense + row_bytes(plan, model)
        most = self._settings.max_memory
        if most is None:
            return
        inflight = min(self._settings.read.max_inflight_bytes, plan.nbytes)
        beside = self.shelf.needed
        if beside + nbytes + inflight > most:
            reason = (
                f"it takes {size_text(nbytes)} beside the {size_text(beside)} of versions in use "
                f"and {size_text(inflight)} of reads under way: more than max_memory, "
                f"{size_text(most)}"
            )
            raise RefusedError(reason, beside=beside)
        while self.shelf.nbytes + nbytes + inflight > most and self.shelf.spare():
            pass

    def _keep_spare(self, nbytes: int) -> None:
        """Have the memory of a version kept for the next one, as far as there is room."""
        spare = nbytes + nbytes // 4  # tables reserve more than they fill
        if self._settings.max_memory is not None:
            spare = min(spare, max(self._settings.max_memory - self.shelf.keep * nbytes, 0))
        SPARE.allow(self, spare)

    def _note_progress(self, progress: Progress) -> None:
        self.progress = progress
        SPARE.allow(self, 0)  # all memory is reserved: memory that is still kept will never fit
        listener = self._settings.loader_options.get("progress")
        if callable(listener):
            listener(progress)

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
        """Give back a version that was loaded, and is not wanted any more."""
        if isinstance(loaded, Held):
            self.teller.tell(LoadCancelled(**loaded.candidate.names))
            self._freeing.free(loaded.model, loaded)

    async def attempted(
        self, work: Coroutine[Any, Any, T], among: set[asyncio.Task[Any]]
    ) -> T | None:
        """Await work in a task that others may cancel, without cancelling the caller.

        Args:
            work: A version that it returns to no caller is given back.
            among: Holds the task meanwhile.

        Returns:
            The result of the work; `None` if its task was cancelled.
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
    for task in tasks:
        task.cancel()


def _clear_frames(error: BaseException) -> None:
    """Have an error, which may be kept for long, hold on to no memory."""
    known: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in known:
            known.add(id(one))
            traceback.clear_frames(one.__traceback__)
            todo += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
