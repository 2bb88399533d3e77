"""Loads a version beside the versions that are in memory."""

from __future__ import annotations

import asyncio
import inspect
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncloader._display import size_text
from asyncloader._memory.allocation import SPARE
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointChangedError
from asyncloader.loader import Loader

from .events import LoadCancelled, LoadFinished, LoadStarted, VersionRefused
from .model import model_of, row_bytes, tensor_bytes
from .shelf import Held
from .source import candidate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor
    from pathlib import Path

    from asyncloader._loading.progress import Progress
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._storage.small_files import Looks
    from asyncloader.options import ReadOptions

    from .events import Event
    from .model import Model
    from .shelf import Freeing, Shelf
    from .source import Candidate


_SHORT = 80
_COPIED = "was written to while it was being loaded"


class RefusedError(Exception):
    """A version will not serve.

    Attributes:
        reason: Why.
        beside: The bytes of versions in memory beside which it would not fit, if that is why.
        error: What `check` raised, if that is why.
    """

    def __init__(
        self, reason: str, *, beside: int | None = None, error: Exception | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.beside = beside
        self.error = error


def check_options(source: Path, options: Mapping[str, Any]) -> ReadOptions:
    """Return how versions are read; refuse now what would fail at the first load.

    Raises:
        TypeError: If there is no such option, or it is not for the user to give.
        ValueError: If a value makes no sense.
    """
    for reserved in ("checkpoint_path", "hashtables", "tensors", "on_plan"):
        if reserved in options:
            raise TypeError(f"loader_options: {reserved!r} is given by Live itself")
    return Loader(source, **options).options


class VersionLoader:
    """Builds, loads and checks versions, one at a time. `Live` documents the arguments."""

    def __init__(
        self,
        build: Callable[[], object],
        check: Callable[[Model], object] | None,
        *,
        options: Mapping[str, Any],
        inflight_bytes: int,
        max_memory: int | None,
        executor: Executor,
        shelf: Shelf,
        freeing: Freeing,
        looks: Looks,
        tell: Callable[[Event], object],
    ) -> None:
        self._build = build
        self._check = check
        self._options = options
        self._inflight_bytes = inflight_bytes
        self._max_memory = max_memory
        self._executor = executor
        self._shelf = shelf
        self._freeing = freeing
        self._looks = looks
        self._tell = tell
        self.loading: Candidate | None = None
        """The version that is being loaded."""

        self.progress: Progress | None = None
        """How far that has come."""

    def start(self) -> None:
        """Have memory reserved with room for a next version."""
        SPARE.allow(self, 0)

    def stop(self) -> None:
        """Let go of the memory that is kept for the next version."""
        SPARE.forget(self)

    async def load(self, wanted: Candidate, attempt: int) -> Held:
        """Return a version that may serve; its memory is given back if that fails.

        Args:
            wanted: The version.
            attempt: 1 for the first try.

        Raises:
            RefusedError: If it shall not serve; an event has said so.
            CheckpointChangedError: If a file of it changed meanwhile.
            Exception: What building and loading raise.
        """
        self.loading, self.progress = wanted, None
        self._tell(LoadStarted(**wanted.names, attempt=attempt))
        model = None
        try:
            model = await self._built(wanted)
            return await self._fill(model, wanted)
        except BaseException as error:
            _clear_frames(error)  # they know the model
            if model is not None:
                self._freeing.free(model, None)
            if isinstance(error, asyncio.CancelledError):
                self._tell(LoadCancelled(**wanted.names))
            elif isinstance(error, RefusedError):
                refused = VersionRefused(**wanted.names, reason=error.reason, error=error.error)
                self._tell(refused)
            raise
        finally:
            del model
            self.loading = self.progress = None

    async def _built(self, wanted: Candidate) -> Model:
        try:
            built = await self._call(self._build)
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            raise RuntimeError("build() was cancelled by something of its own") from error
        except Exception as error:
            error.add_note("raised by build()")
            raise
        [model] = await run_jobs(self._executor, [partial(model_of, wanted.path, built)])
        return model

    def _must_be_fresh(self, model: Model) -> None:
        """Refuse what belongs to another version: loading into it would change that one."""
        for name, table in model.tables.items():
            if hasattr(table, "__len__") and len(table):
                raise TypeError(f"build() made a table {name!r} that holds ids: make new ones")
        for held in self._shelf.held:
            if model.shares_memory_with(held.model):
                raise TypeError(
                    f"build() returned tables or tensors of version {held.candidate.name!r} again: "
                    "make new ones each time"
                )

    async def _fill(self, model: Model, wanted: Candidate) -> Held:
        predicted: list[int] = []
        options = self._options
        if not self._shelf.held:  # no request is served yet that a load could hold up
            options = {**options, "max_loop_lag": None, "pressure": None}
        prepare = partial(self._prepare, model, wanted, options, predicted)
        [loader] = await run_jobs(self._executor, [prepare])
        model.report = report = await loader.aload()
        held = Held(model, wanted, predicted[0], time.time())
        self._tell(LoadFinished(**wanted.names, report=report, nbytes=held.nbytes))
        self._keep_spare(held.nbytes)
        await self._pass_check(model)
        if (await candidate(self._looks, wanted.path)).files != wanted.files:
            raise CheckpointChangedError(str(wanted.path), _COPIED)
        return held

    def _prepare(
        self, model: Model, wanted: Candidate, options: Mapping[str, Any], predicted: list[int]
    ) -> Loader:
        """Look at every tensor; belongs on a thread: there may be very many."""
        self._must_be_fresh(model)
        dense = tensor_bytes(model)

        def on_plan(plan: LoadPlan) -> None:
            predicted.append(self._predict(plan, dense + row_bytes(plan, model)))

        own = {"progress": self._note_progress, "on_plan": on_plan}
        return Loader(wanted.path, model.tables, model.tensors, **{**options, **own})

    def _predict(self, plan: LoadPlan, nbytes: int) -> int:
        """Return what a version will take, or refuse it. Versions without users give way."""
        inflight = min(self._inflight_bytes, plan.nbytes)
        most = self._max_memory
        if most is None:
            return nbytes
        beside = self._shelf.needed
        if beside + nbytes + inflight > most:
            reason = (
                f"it takes {size_text(nbytes)} beside the {size_text(beside)} of versions in use "
                f"and {size_text(inflight)} of reads under way: more than max_memory, "
                f"{size_text(most)}"
            )
            raise RefusedError(reason, beside=beside)
        while self._shelf.nbytes + nbytes + inflight > most and self._shelf.spare():
            pass
        return nbytes

    def _keep_spare(self, nbytes: int) -> None:
        """Have the memory of a version kept for the next one, as far as there is room."""
        spare = nbytes + nbytes // 4  # tables reserve more than they fill
        if self._max_memory is not None:
            spare = min(spare, max(self._max_memory - self._shelf.keep * nbytes, 0))
        SPARE.allow(self, spare)

    async def _pass_check(self, model: Model) -> None:
        if self._check is None:
            return
        try:
            verdict = await self._call(partial(self._check, model))
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            raise RefusedError("check was cancelled by something of its own") from error
        except Exception as error:
            reason = f"check raised {type(error).__name__}: {error}"
            raise RefusedError(reason, error=error) from error
        if not passed(verdict):
            reason = f"check returned {shortened(verdict)}"
            raise RefusedError(reason, error=ValueError(reason))

    async def _call(self, function: Callable[[], object]) -> object:
        """Call a user's function on a thread; await on the event loop what it returns."""
        [result] = await run_jobs(self._executor, [function])
        return await result if inspect.isawaitable(result) else result

    def _note_progress(self, progress: Progress) -> None:
        self.progress = progress
        SPARE.allow(self, 0)  # all memory is reserved: what has not been taken will never fit
        listener = self._options.get("progress")
        if callable(listener):
            listener(progress)


def _is_cancelled() -> bool:
    """Say whether this task was cancelled; otherwise a user's code raised that by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def passed(verdict: object) -> bool:
    """Say whether what a check returned lets a version serve: `None`, or anything that is true.

    Raises:
        TypeError: If it is no truth value: of text or a list, `bool` says whether it is empty.
    """
    if verdict is None:
        return True
    try:
        if hasattr(type(verdict), "__bool__"):
            return bool(verdict)
    except (RuntimeError, ValueError):  # of tensors and arrays of several values
        pass
    raise TypeError(
        f"check returned {shortened(verdict)}, which is neither true nor false: return True, "
        "False or None"
    )


def shortened(value: object) -> str:
    """Return a value's text, or its type where that is long."""
    text = repr(value)
    return text if len(text) <= _SHORT else f"a {type(value).__name__}"


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
