"""Decides which version serves: follows what is new, and does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from asyncloader._threads.jobs import raising_first, settled
from asyncloader._threads.pool import WorkerPool
from asyncloader.errors import CheckpointChangedError, CheckpointError

from .events import LoadCancelled, LoadFailed, RolledBack, Swapped
from .freeing import Freeing
from .loading import RefusedError
from .looking import Looks
from .rest import Rest
from .retry import Copying, pause_after
from .shelf import Held
from .state import LiveVersion

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

    from .loading import VersionLoader
    from .shelf import Shelf
    from .source import Candidate, Files
    from .telling import Teller


_log = logging.getLogger("asyncloader")

T = TypeVar("T")

# One builds and checks; one gives memory back meanwhile.
_THREADS = 2
_REMEMBERED = 100
_LOOK = 1.0
"""Seconds for which files have to stay as they are; `poll`, if that is less."""

_COPIED = "was written to while it was being loaded"
_OVERTAKEN = "was still being written to when another command came, which took its place"
_SOURCE, _OLDER = "source", "older"


class _SupersededError(Exception):
    """There is a newer version than the one that is tried, or nobody wants one."""


class Switch:
    """Takes turns among following, commands, and the end. Belongs to one event loop.

    Whoever changes the version holds a lock. What follows is cancelled by commands, which would
    otherwise wait for a load, or for the pause before the next try; whether it is still wanted it
    looks up before it swaps, as a cancellation can get lost: a task group that is failing forgets
    it. Who loads on purpose waits for the end of a copy before it takes the lock, and the next
    command ends that wait. `Live` documents arguments and commands.
    """

    def __init__(
        self,
        source: Path,
        *,
        shelf: Shelf,
        loader: VersionLoader,
        teller: Teller,
        poll: float,
        retry_pause: float,
        stall_timeout: float | None,
    ) -> None:
        self._source = source
        self._shelf = shelf
        self._loader = loader
        self._teller = teller
        self._poll = poll
        self._retry_pause = retry_pause
        self._stall_timeout = stall_timeout
        self._opened = False
        self._closing = False
        self._following = asyncio.Event()
        self._following.set()
        self._poke = asyncio.Event()
        self._changing = asyncio.Lock()
        self._rest = Rest(min(poll, _LOOK), note=teller.note)
        self._catching_up: set[asyncio.Task[Any]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()  # to load on purpose, for a copy to end
        self._loading: set[asyncio.Task[Any]] = set()  # on purpose
        self._orders = 0
        self._commands = 0  # that change the version, or wait for their turn
        self._resumed = 0
        self._given_up: deque[tuple[Path, Files]] = deque(maxlen=_REMEMBERED)
        self._too_large: tuple[Path, Files, int] | None = None

    def __repr__(self) -> str:
        return f"<Switch {self.description}>"

    @property
    def description(self) -> str:
        """Its source, and whether it is open."""
        state = "left" if self._closing else "open" if self._opened else "not entered"
        return f"{str(self._source)!r}: {state}"

    @property
    def following(self) -> bool:
        """Whether new versions are taken in."""
        return self._following.is_set()

    async def open(self) -> None:
        """Load the first version, and begin to follow.

        Raises:
            RuntimeError: If this is not the first time.
            Exception: What kept the first version from serving.
        """
        if self._opened:
            raise RuntimeError(f"{self.description}: enter it once; make another one")
        self._opened = True
        self._loop = asyncio.get_running_loop()
        self._pool = WorkerPool(_THREADS, name="asyncloader-live")
        self._looks = Looks(self._source, stall_timeout=self._stall_timeout)
        self._freeing = Freeing(self._pool, self._teller.tell)
        self._shelf.let_go = self._freeing.let_go
        self._loader.start(self._pool, self._freeing)
        async with self._changing:  # or commands would load beside it
            try:
                first = await self._rest.reached(self._looks.newest)
                self._swap(await self._load_once(first))
            except BaseException:
                await settled(asyncio.ensure_future(self._wind_up()))
                raise
        self._follower = self._loop.create_task(self._follow(), name="asyncloader-live")

    async def close(self) -> None:
        """End whatever is under way, and let all versions go."""
        self._closing = True
        await settled(asyncio.ensure_future(self._stop()))

    async def _stop(self) -> None:
        self._follower.cancel()
        _cancel(self._waiting | self._loading)
        for event in (self._following, self._poke):  # if that gets lost
            event.set()
        await asyncio.wait([self._follower])
        async with self._changing:  # whoever was at it has wound up
            await self._wind_up()

    async def _wind_up(self) -> None:
        self._closing = True
        self._shelf.close()
        await self._freeing.wait()
        self._loader.stop()
        self._looks.close()
        self._pool.shutdown()  # its threads are idle

    async def rollback(self) -> LiveVersion:
        """Go back to the version that served before, and stay there."""
        self._must_be_open()
        held = self._shelf.find(self._before())  # before a load is given up for nothing
        self._order()
        if held is not None and not self._commands:
            # Following sees that it is not wanted any more, however long it takes to stop.
            self._stop_following()
            if self._swap(held, back=True):
                return LiveVersion.of(held, serving=True)
        async with self._on_purpose():
            before = self._before()
            if self._shelf.find(before) is None:
                before = await self._still_there(before)
            return await self._bring(before, back=True)

    async def load(self, version: str) -> LiveVersion:
        """Let a version serve that was chosen on purpose, and stay there."""
        self._must_be_open()
        path = await self._looks.named(version)
        look = partial(self._looks.at, path)
        found = await look()  # before a load is given up for nothing
        self._must_be_open()
        order = self._order()
        wanted: Candidate | None = found
        if self._shelf.find(found) is None:
            wanted = await self._attempted(self._rest.reached(look), self._waiting)
        self._must_be_open()
        if wanted is None or order != self._orders:
            raise CheckpointError(str(path), _OVERTAKEN)
        async with self._on_purpose():
            return await self._bring(wanted)

    def resume(self) -> None:
        """Follow again."""
        self._must_be_open()
        self._order()
        self._given_up.clear()
        self._resumed += 1
        self._following.set()
        self._poke.set()
        _log.info("%s: follows the newest version again", self._source)

    # Following

    async def _follow(self) -> None:
        """Take in what is new, for ever."""
        while not self._closing:  # a cancellation can get lost in a load that is failing
            await self._following.wait()
            try:
                await self._attempted(self._catch_up(), self._catching_up)
            except Exception:  # noqa: BLE001  # whatever it was, what serves goes on serving
                _log.exception("%s: following stumbled, and goes on", self._source)
            await self._pause(self._poll)

    async def _catch_up(self) -> None:
        async with self._changing:
            while self._wanted() and (new := await self._news()) is not None:
                held = self._shelf.find(new)
                if held is not None:
                    if self._wanted() and not self._swap(held):
                        continue
                    return
                with contextlib.suppress(_SupersededError):
                    await self._take_in(new)
                    return

    def _wanted(self) -> bool:
        """Say whether following still is; it may have been cancelled without noticing."""
        return self._following.is_set() and not self._closing

    async def _newest(self) -> Candidate | None:
        """Return the newest version; `None` where nobody knows."""
        try:
            found = await self._looks.newest()
        except CheckpointError as error:
            self._teller.note(_SOURCE, str(error))  # a run folder that is gone is so for a while
            return None
        self._teller.note(_SOURCE, "")
        return found

    async def _news(self) -> Candidate | None:
        """Return the newest version, unless it serves already or will not do."""
        found = await self._newest()
        serving = self._shelf.serving.candidate
        # Of what serves, files may be removed. Where some have come, it was being copied.
        if found is None or not found.brings_news_to(serving):
            self._teller.note(_OLDER, "")
            return None
        older = await self._looks.is_older(found, serving, self._shelf.served)
        self._teller.note(_OLDER, _older(found, serving) if older else "")
        # What was too large is looked at again once there is more room.
        if older or self._too_large == (found.path, found.files, self._shelf.needed):
            return None
        # What was given up is looked at again once its files have changed.
        return None if (found.path, found.files) in self._given_up else found

    async def _still_newest(self, tried: Candidate) -> Candidate | None:
        """Return what is tried as it is now; `None` where nobody knows.

        Raises:
            _SupersededError: If it is not wanted any more.
        """
        found = await self._newest()
        if not self._wanted() or (found is not None and found != tried):
            raise _SupersededError
        return found

    async def _load(self, wanted: Candidate, attempt: int) -> Held:
        """Load a version of which no file changes meanwhile."""

        async def confirm() -> None:
            found = await self._looks.at(wanted.path)
            if found.files != wanted.files:
                raise CheckpointChangedError(str(wanted.path), _COPIED)

        return await self._loader.load(wanted, attempt, confirm)

    async def _take_in(self, new: Candidate) -> None:
        """Load a version and let it serve."""
        held = await self._loaded(new)
        if held is not None and self._wanted():
            self._swap(held)
        elif held is not None:
            self._drop(held)

    async def _loaded(self, tried: Candidate) -> Held | None:
        """Load a version, however often that has to be tried; `None` if it will not do."""
        new, copying = tried, Copying()
        for number in itertools.count(1):
            try:
                new = await self._rest.reached(partial(self._still_newest, new))
                with copying.of(new.files):
                    return await self._load(new, number)
            except RefusedError as refused:
                if refused.beside is None:
                    self._given_up.append((new.path, new.files))
                else:
                    self._too_large = new.path, new.files, refused.beside
                break
            except _SupersededError:
                raise
            except Exception as error:  # noqa: BLE001  # build() may raise anything
                if not copying.may_pass(error):
                    self._given_up.append((new.path, new.files))
                    self._tell_failure(new, error, number, None)
                    break
                seconds = pause_after(number, self._retry_pause)
                self._tell_failure(tried, error, number, seconds)
            await self._pause_unless_newer(tried, seconds)
        return None

    async def _pause_unless_newer(self, tried: Candidate, seconds: float) -> None:
        """Wait before the next try, and look for newer versions meanwhile."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        while (left := until - clock()) > 0:
            await self._pause(min(left, self._poll))
            await self._still_newest(tried)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless there is something to do."""
        if self._closing:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poke.wait()
        self._poke.clear()

    # On purpose

    def _order(self) -> int:
        """Take the place of a command that waits for a copy to end; return our number."""
        self._orders += 1
        _cancel(self._waiting)
        return self._orders

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
        if self._following.is_set():
            _log.info("%s: follows no more, until resume()", self._source)
        self._following.clear()
        self._poke.set()  # in a pause, too
        _cancel(self._catching_up)

    def _before(self) -> Candidate:
        before = self._shelf.before
        if before is None:
            raise LookupError(f"no version served before {self._shelf.serving.candidate.name!r}")
        return before

    async def _bring(self, wanted: Candidate, *, back: bool = False) -> LiveVersion:
        self._must_be_open()
        held = self._shelf.find(wanted)
        if held is None or not self._swap(held, back=back):
            held = await self._attempted(self._load_once(wanted), self._loading)
            if held is None:
                raise RuntimeError(f"{self.description}: left meanwhile")
            self._swap(held, back=back)
        return LiveVersion.of(held, serving=True)

    async def _still_there(self, wanted: Candidate) -> Candidate:
        """Return a version as it is now: what has not changed since it served is at rest."""
        found = await self._looks.at(wanted.path)
        if found.brings_news_to(wanted):
            raise CheckpointChangedError(
                str(wanted.path),
                "another checkpoint has taken the place of the one that served before; "
                "load(version) takes what is there now",
            )
        return found

    def _must_be_open(self) -> None:
        if self._opened and asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                f"{self.description}: belongs to the event loop that it was entered on, and was "
                "called on another one"
            )
        if self._closing or not self._opened:
            raise RuntimeError(f"{self.description}: use it within its `async with` block")

    # Loading

    async def _attempted(
        self, work: Coroutine[Any, Any, T], among: set[asyncio.Task[Any]]
    ) -> T | None:
        """Await what others may cancel without cancelling us; `None` if they did."""
        task: asyncio.Task[T] | None = None
        try:
            with raising_first():
                async with asyncio.TaskGroup() as group:
                    task = group.create_task(work, name="asyncloader-live-load")
                    among.add(task)
                    task.add_done_callback(among.discard)
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
            return await self._load(wanted, 1)
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

    def _swap(self, held: Held, *, back: bool = False) -> bool:
        """Let a version serve from now on, unless it was let go meanwhile; say whether it does."""
        if held is self._shelf.now[1]:
            return True
        version, location = held.candidate.name, str(held.candidate.path)
        previous = self._shelf.held[-1].candidate.name if self._shelf.held else None
        if not self._shelf.put(held, back=back):
            return False
        self._teller.note(_OLDER, "")
        if back and previous is not None:
            self._teller.tell(RolledBack(version=version, location=location, previous=previous))
        else:
            self._teller.tell(Swapped(version=version, location=location, previous=previous))
        return True


def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()


def _older(found: Candidate, serving: Candidate) -> str:
    return (
        f"{found.path}: is the newest version that is there, and older than {serving.name!r}, "
        "which goes on serving; load(version) takes it"
    )
