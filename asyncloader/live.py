"""What users import to serve a model while its next version comes in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

from ._arguments import check_callable, checked_path
from ._concurrency import raising_first, run_jobs, settled
from .errors import CheckpointChangedError, CheckpointError
from .serving import (
    Freeing,
    Held,
    LiveState,
    LiveVersion,
    LoadCancelled,
    LoadFailed,
    RefusedError,
    RolledBack,
    Shelf,
    Swapped,
    Teller,
    VersionLoader,
    candidate,
    check_options,
    named,
    newest,
    retrying,
)

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping

    from tenacity import RetryCallState
    from torch import Tensor, nn

    from .serving import Candidate, Event, Model
    from .table import HashTable

__all__ = ["Live"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
_Built: TypeAlias = "tuple[Mapping[str, HashTable] | None, Mapping[str, Tensor] | None] | nn.Module"

# One builds, checks, looks at the folder; one gives memory back meanwhile.
_THREADS = 2
_REMEMBERED = 100


class _SupersededError(Exception):
    """There is a newer version than the one that is tried again."""


class Live:
    """One model, and its versions: the newest one serves, the next one comes in beside it.

    Follows a run folder: each new checkpoint is loaded into what `build()` makes, then checked,
    then swapped for the one that serves, by one reference. Whoever asks gets all tables and tensors
    of one version. A version that cannot be loaded, or does not pass, leaves the old one serving.

    ```python
    async with asyncloader.Live("/runs/ctr", build) as live:
        with live.use() as model:
            rows = model.tables["item_emb"].lookup(ids)
    ```

    Entering waits for the first version, and raises if it cannot be loaded. Leaving cancels what is
    under way, waits for its threads, and gives all memory back but what `use()` blocks still pin.
    `use`, `current`, `state` and `versions` may be asked from any thread; everything else belongs
    to the event loop on which the block was entered.

    Args:
        source: A run folder, whose newest committed checkpoint is followed (see `latest`), or one
            checkpoint, which is loaded again when it is replaced.
        build: Makes what a version is loaded into, fresh and empty: `(hashtables, tensors)`, or a
            `torch.nn.Module`, of which all tables and the `state_dict()` are loaded. Called on a
            thread, unless it is a coroutine function.
        keep: Versions that stay in memory: the one that serves, and those that served before it.
            With 2, going back takes no load.
        poll: Seconds between two looks at the folder.
        loader_options: Further arguments of `Loader`, such as `max_loop_lag`, `verify`, `strict`,
            `timeout`.
        check: Gets a version that was loaded, before it serves; what it raises keeps it from
            serving. Called on a thread, unless it is a coroutine function.
        on_event: Called on the event loop with what happens, an `Event`. What it raises is logged.
        max_memory: Bytes that all versions in memory, the one to be loaded, and the reads under way
            may take together, as predicted from its plan; versions that nobody uses give way first.
            One that would not fit is refused before it is read. What `build` itself touches comes
            before that: make tensors with `torch.empty`.
        retry_pause: Seconds after which a load is tried again whose fault may pass (storage, no
            memory, replaced meanwhile); twice as long before each next try, a minute at most. A
            newer version is taken at once.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        build: Callable[[], _Built | Awaitable[_Built]],
        *,
        keep: int = 1,
        poll: float = 5.0,
        loader_options: Mapping[str, Any] | None = None,
        check: Callable[[Model], object] | None = None,
        on_event: Callable[[Event], object] | None = None,
        max_memory: int | None = None,
        retry_pause: float = 1.0,
    ) -> None:
        self._source = Path(checked_path(source, "source"))
        check_callable(build, "build")
        for name, function in (("check", check), ("on_event", on_event)):
            if function is not None:
                check_callable(function, name)
        for name, value in (("poll", poll), ("retry_pause", retry_pause)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, count in (("keep", keep), ("max_memory", max_memory)):
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{name} must be a positive int, got {count!r}")
        options = dict(loader_options or {})
        check_options(self._source, options)
        self._poll = poll
        self._retry_pause = retry_pause
        self._teller = Teller(on_event)
        self._shelf = Shelf(keep=keep, let_go=self._let_go)
        self._loader = VersionLoader(
            build,
            check,
            options=options,
            max_memory=max_memory,
            shelf=self._shelf,
            tell=self._teller.tell,
        )
        self._entered = False
        self._closing = False
        self._following = asyncio.Event()
        self._following.set()
        self._poke = asyncio.Event()
        self._changing = asyncio.Lock()
        self._attempts: set[asyncio.Task[Any]] = set()
        self._catching_up: asyncio.Task[Any] | None = None
        self._commands = 0
        self._resumed = 0
        self._given_up: deque[Candidate] = deque(maxlen=_REMEMBERED)
        self._too_large: tuple[Candidate, int] | None = None
        self._trouble = ""

    def __repr__(self) -> str:
        state = "left" if self._closing else "open" if self._entered else "not entered"
        return f"<Live {str(self._source)!r}: {state}, {self._shelf!r}>"

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError(f"{self!r}: enter it once; make another one")
        self._entered = True
        self._pool = ThreadPoolExecutor(_THREADS, "asyncloader-live")
        self._freeing = Freeing(self._pool, self._teller.tell)
        self._loader.start(self._pool, self._freeing)
        async with self._changing:  # or commands would load beside it
            try:
                first = await self._on_thread(partial(newest, self._source))
                self._swap(await self._load_once(first))
            except BaseException:
                await settled(asyncio.ensure_future(self._close()))
                raise
        loop = asyncio.get_running_loop()
        self._follower = loop.create_task(self._follow(), name="asyncloader-live")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        await settled(asyncio.ensure_future(self._stop()))

    async def _stop(self) -> None:
        self._follower.cancel()
        for attempt in self._attempts:
            attempt.cancel()
        await asyncio.wait([self._follower])
        async with self._changing:  # whoever was at it has wound up
            await self._close()

    async def _close(self) -> None:
        self._closing = True
        self._shelf.close()
        await self._freeing.wait()
        self._pool.shutdown()  # its threads are idle

    @contextlib.contextmanager
    def use(self) -> Iterator[Model]:
        """Yield the version that serves; it stays as it is until the block ends.

        Takes no time to speak of, and may be called on any thread. A version that is replaced
        meanwhile is freed when the last block that uses it ends.

        Raises:
            RuntimeError: If the `async with` block was not entered, or was left.
        """
        held = self._shelf.pin()
        try:
            yield held.model
        finally:
            self._shelf.unpin(held)

    @property
    def current(self) -> LiveVersion:
        """The version that serves.

        Raises:
            RuntimeError: If the `async with` block was not entered, or was left.
        """
        return LiveVersion.of(self._shelf.serving, serving=True)

    @property
    def versions(self) -> tuple[LiveVersion, ...]:
        """All versions in memory, in the order in which they last began to serve."""
        held, serving = self._shelf.now
        return tuple(LiveVersion.of(one, serving=one is serving) for one in held)

    @property
    def state(self) -> LiveState:
        """All that a status page shows."""
        versions, loading = self.versions, self._loader.loading
        return LiveState(
            versions=versions,
            following=self._following.is_set(),
            loading=None if loading is None else loading.name,
            progress=self._loader.progress,
            problem=self._teller.problem,
            nbytes=sum(version.nbytes for version in versions),
        )

    async def rollback(self) -> LiveVersion:
        """Go back to the version that served before, and stay there until `resume()`.

        At once if it is still in memory (`keep`); otherwise it is loaded again from its folder,
        while the present one serves. A load that following has begun is given up. Called again, it
        goes further back.

        Returns:
            The version that serves now.

        Raises:
            LookupError: If none served before.
            CheckpointNotFoundError: If it is neither in memory nor on the disk any more.
            CheckpointChangedError: If its folder holds another checkpoint by now.
            Exception: What loading it, or `check`, raised. Nothing has changed then.
        """
        self._must_be_open()
        held = self._shelf.find(self._before())  # before a load is given up for nothing
        if held is not None and not self._commands:
            # Whoever follows sees that it is not wanted any more, however long it takes to stop.
            self._stop_following()
            self._swap(held, back=True)
            return LiveVersion.of(held, serving=True)
        async with self._on_purpose():
            before = self._before()
            if self._shelf.find(before) is None:
                await self._still_there(before)
            return await self._bring(before, back=True)

    async def load(self, version: str | os.PathLike[str]) -> LiveVersion:
        """Let a version serve that was chosen on purpose, and stay there until `resume()`.

        Args:
            version: The name of a sub-folder of the run folder, or the path of a checkpoint.

        Returns:
            The version that serves now.

        Raises:
            CheckpointNotFoundError: If there is no such checkpoint.
            Exception: What loading it, or `check`, raised. Nothing has changed then.
        """
        name = checked_path(version, "version")
        self._must_be_open()
        path = await self._on_thread(partial(named, self._source, name))
        wanted = await self._on_thread(partial(candidate, path))
        async with self._on_purpose():
            return await self._bring(wanted)

    async def resume(self) -> None:
        """Follow the newest version again, also one that was given up. Does not wait for it."""
        self._must_be_open()
        self._given_up.clear()
        self._resumed += 1
        self._following.set()
        self._poke.set()

    # Following

    async def _follow(self) -> None:
        """Take in what is new, for ever."""
        while not self._closing:  # a cancellation can get lost in a load that is failing
            await self._following.wait()
            try:
                await self._attempted(self._catch_up(), follows=True)
            except Exception:  # noqa: BLE001  # whatever it was, what serves goes on serving
                _log.exception("%s: following stumbled, and goes on", self._source)
            await self._pause(self._poll)

    async def _catch_up(self) -> None:
        async with self._changing:
            while self._wanted() and (new := await self._news()) is not None:
                try:
                    await self._take_in(new)
                except _SupersededError:
                    continue
                return

    def _wanted(self) -> bool:
        """Say whether following still is; it may have been cancelled without noticing."""
        return self._following.is_set() and not self._closing

    async def _newest(self) -> Candidate | None:
        """Return the newest version; `None` where nobody knows."""
        try:
            found = await self._on_thread(partial(newest, self._source))
        except CheckpointError as error:
            if str(error) != self._trouble:  # a run folder that is gone is gone for a while
                self._trouble = str(error)
                _log.warning("%s", error)
            return None
        self._trouble = ""
        return found

    async def _news(self) -> Candidate | None:
        """Return the newest version, unless it serves already or will not do."""
        found = await self._newest()
        if found is None:
            return None
        old = found == self._shelf.serving.candidate or found in self._given_up
        # What was too large is looked at again once there is more room.
        full = self._too_large == (found, self._shelf.needed)
        return None if old or full else found

    async def _take_in(self, new: Candidate) -> None:
        """Load a version and let it serve, however often that has to be tried."""
        held = self._shelf.find(new)
        if held is not None:
            self._swap(held)
            return
        tries = retrying(
            pause=self._retry_pause,
            sleep=partial(self._pause_unless_newer, new),
            failed=partial(self._failed, new),
        )
        try:
            async for attempt in tries:
                with attempt:
                    held = await self._loader.load(new, attempt.retry_state.attempt_number)
        except RefusedError as refused:
            if refused.beside is None:
                self._given_up.append(new)
            else:
                self._too_large = new, refused.beside
        except _SupersededError:
            raise
        except Exception as error:  # noqa: BLE001  # build() may raise anything
            self._given_up.append(new)
            self._tell_failure(new, error, tries.statistics["attempt_number"], None)
        else:
            if held is not None and self._wanted():
                self._swap(held)
            elif held is not None:
                self._drop(held)

    def _failed(self, new: Candidate, tries: RetryCallState) -> None:
        error = tries.outcome.exception() if tries.outcome is not None else None
        if isinstance(error, Exception):
            self._tell_failure(new, error, tries.attempt_number, tries.upcoming_sleep)

    async def _pause_unless_newer(self, tried: Candidate, seconds: float) -> None:
        """Wait before the next try, and look for newer versions meanwhile."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        while (left := until - clock()) > 0:
            await self._pause(min(left, self._poll))
            found = await self._newest()
            if not self._wanted() or (found is not None and found != tried):
                raise _SupersededError

    async def _pause(self, seconds: float) -> None:
        """Wait, unless there is something to do."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poke.wait()
        self._poke.clear()

    # On purpose

    @contextlib.asynccontextmanager
    async def _on_purpose(self) -> AsyncIterator[None]:
        """Have nobody else change the version, and nobody follow afterwards if it went well."""
        self._must_be_open()
        followed, resumed = self._following.is_set(), self._resumed
        self._stop_following()
        self._commands += 1
        try:
            async with self._changing:
                self._must_be_open()
                yield
        except BaseException:
            if followed:
                self._following.set()
            raise
        else:
            if self._resumed == resumed:  # one before us may have failed, and set it again
                self._following.clear()
        finally:
            self._commands -= 1

    def _stop_following(self) -> None:
        self._following.clear()
        if self._catching_up is not None:
            self._catching_up.cancel()

    def _before(self) -> Candidate:
        before = self._shelf.before
        if before is None:
            raise LookupError(f"no version served before {self.current.version!r}")
        return before

    async def _bring(self, wanted: Candidate, *, back: bool = False) -> LiveVersion:
        self._must_be_open()
        held = self._shelf.find(wanted) or await self._attempted(self._load_once(wanted))
        if held is None:
            raise RuntimeError(f"{self!r}: left meanwhile")
        if held is not self._shelf.serving:
            self._swap(held, back=back)
        return LiveVersion.of(held, serving=True)

    async def _still_there(self, wanted: Candidate) -> None:
        found = await self._on_thread(partial(candidate, wanted.path))
        if found != wanted:
            raise CheckpointChangedError(
                str(wanted.path),
                "another checkpoint has taken the place of the one that served before; "
                "load(version) takes what is there now",
            )

    def _must_be_open(self) -> None:
        if self._closing or not self._entered:
            raise RuntimeError(f"{self!r}: use it within its `async with` block")

    # Loading

    async def _attempted(self, work: Coroutine[Any, Any, T], *, follows: bool = False) -> T | None:
        """Await what others may cancel without cancelling us; `None` if they did."""
        task: asyncio.Task[T] | None = None
        try:
            with raising_first():
                async with asyncio.TaskGroup() as group:
                    task = group.create_task(work, name="asyncloader-live-load")
                    self._attempts.add(task)
                    task.add_done_callback(self._attempts.discard)
                    if follows:
                        self._catching_up = task
        except asyncio.CancelledError:
            # Cancelled when it had just been loaded: nobody takes it.
            if task is not None and not task.cancelled() and task.exception() is None:
                self._drop(task.result())
            raise
        return None if task.cancelled() else task.result()

    def _drop(self, loaded: object) -> None:
        """Give back a version that was loaded, and is not wanted any more."""
        if isinstance(loaded, Held):
            name, location = loaded.candidate.name, str(loaded.candidate.path)
            self._teller.tell(LoadCancelled(version=name, location=location))
            self._freeing.free(loaded.model, loaded)

    async def _load_once(self, wanted: Candidate) -> Held:
        """Load a version that somebody waits for, who hears of what goes wrong."""
        try:
            return await self._loader.load(wanted, 1)
        except RefusedError as refused:
            raise CheckpointError(str(wanted.path), refused.reason) from refused.__cause__
        except Exception as error:
            self._tell_failure(wanted, error, 1, None)
            raise

    def _tell_failure(
        self, wanted: Candidate, error: Exception, attempt: int, retry_in: float | None
    ) -> None:
        self._teller.tell(
            LoadFailed(
                version=wanted.name,
                location=str(wanted.path),
                error=error,
                attempt=attempt,
                retry_in=retry_in,
            )
        )

    def _swap(self, held: Held, *, back: bool = False) -> None:
        """Let a version serve from now on."""
        version, location = held.candidate.name, str(held.candidate.path)
        previous = self._shelf.held[-1].candidate.name if self._shelf.held else None
        self._shelf.put(held, back=back)
        if back and previous is not None:
            self._teller.tell(RolledBack(version=version, location=location, previous=previous))
        else:
            self._teller.tell(Swapped(version=version, location=location, previous=previous))

    def _let_go(self, held: Held) -> None:
        self._freeing.let_go(held)

    async def _on_thread(self, job: Callable[[], T]) -> T:
        [result] = await run_jobs(self._pool, [job])
        return result
