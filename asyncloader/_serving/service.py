"""A service's model: its beginning and end, and the commands that choose a version on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from asyncloader._storage.looks import Looks
from asyncloader._threads.jobs import settled
from asyncloader._threads.pool import WorkerPool
from asyncloader.errors import CheckpointChangedError, CheckpointError, PlanError, ReadError

from .events import LiveState, LiveVersion, Teller
from .following import Follower
from .sought import again
from .source import Rest, candidate, named
from .switch import Switch, cancel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .model import Settings
    from .shelf import Held
    from .sought import Sought
    from .source import Candidate


_log = logging.getLogger("asyncloader")

# One builds and checks; one gives memory back meanwhile.
_THREADS = 2
_LOOK = 1.0
"""Seconds for which files have to stay as they are; `poll`, if that is less."""

_OVERTAKEN = "was still being written to when another command came, which took its place"


class Service:
    """Takes turns among following, commands, and the end. Belongs to one event loop.

    A command stops following first, or it would wait for a load, or for the pause before the next
    try. A command that loads waits for the end of a copy before its turn, and the next command ends
    that wait. `Live` documents the commands.
    """

    def __init__(self, settings: Settings, sought: Sought) -> None:
        self._sought = sought
        self._source = sought.location
        self._pool = WorkerPool(_THREADS, name="asyncloader-live")
        self._looks = Looks(
            self._source,
            stall_timeout=settings.read.stall_timeout,
            storage_options=settings.read.storage_options,
        )
        self._teller = Teller(settings.on_event)
        self._rest = Rest(min(settings.poll, _LOOK), note=self._teller.note)
        self._switch = Switch(settings, sought, self._pool, self._looks, self._teller)
        self.shelf = self._switch.shelf
        self._follower = Follower(settings, sought, self._switch, self._looks, self._rest)
        self._opened = False
        self._closing = False
        self._waiting: set[asyncio.Task[Any]] = set()  # for a copy to end, for a command
        self._loading: set[asyncio.Task[Any]] = set()  # for a command
        self._orders = 0
        self._commands = 0  # that change the version, or wait for their turn
        self._resumed = 0

    def __repr__(self) -> str:
        state = "left" if self._closing else "open" if self._opened else "not entered"
        return f"{self._source!r}: {state}"

    @property
    def state(self) -> LiveState:
        """The state now. Any thread may ask for it."""
        (held, serving), loading = self.shelf.now, self._switch.loading
        versions = tuple(one.shown(serving=one is serving) for one in held)
        return LiveState(
            versions=versions,
            following=self._follower.is_on,
            loading=None if loading is None else loading.name,
            progress=self._switch.progress,
            problem=self._teller.problem,
            trouble=self._teller.trouble,
            nbytes=sum(version.nbytes for version in versions),
            tables={} if serving is None else serving.model.table_stats(),
        )

    async def open(self) -> None:
        """Load the first version, and begin to follow."""
        if self._opened:
            raise RuntimeError(f"{self!r}: enter it once; make another one")
        self._opened = True
        self._loop = asyncio.get_running_loop()
        self._switch.open()
        async with self._switch.turn:  # or commands would load beside it
            try:
                self._switch.swap(await self._first())
            except BaseException:
                await settled(asyncio.ensure_future(self._wind_up()))
                raise
        self._following = self._loop.create_task(self._follower.run(), name="asyncloader-live")

    async def _first(self) -> Held:
        """Load the newest version; a newer one, if that fails and one has come meanwhile.

        A trainer removes the older versions: maybe the one that is being loaded.
        """
        while True:
            newest = await self._rest.reached(lambda: self._sought.newest(self._looks))
            try:
                return await self._switch.load_once(newest)
            except (CheckpointError, PlanError, ReadError):  # an event has said so
                if not await self._has_newer(newest):
                    raise
            _log.info("%s: a newer version than %s has come", self._source, newest.name)

    async def _has_newer(self, tried: Candidate) -> bool:
        """Say whether the newest version is another one by now."""
        with contextlib.suppress(CheckpointError):
            return await self._sought.newest(self._looks) != tried
        return False

    async def close(self) -> None:
        """End all that is under way, and let all versions go."""
        self._closing = True
        await settled(asyncio.ensure_future(self._stop()))

    async def _stop(self) -> None:
        self._following.cancel()
        cancel(self._waiting | self._loading)
        self._follower.end()  # if that gets lost
        await asyncio.wait([self._following])
        async with self._switch.turn:  # a task that had it has wound up
            await self._wind_up()

    async def _wind_up(self) -> None:
        self._closing = True
        await self._switch.close()
        self._looks.close()
        self._pool.shutdown()  # its threads are idle

    async def rollback(self) -> LiveVersion:
        self._must_be_open()
        held = self.shelf.find(self._before())  # before a load is given up for nothing
        self._order()
        if held is not None and not self._commands:
            # Following sees that it is not wanted any more, however long it takes to stop.
            self._follower.turn_off()
            if self._switch.swap(held, back=True):
                return held.shown(serving=True)
        async with self._on_purpose():
            before = self._before()
            if self.shelf.find(before) is None:
                before = await self._still_there(before)
            return await self._bring(before, back=True)

    async def load(self, version: str) -> LiveVersion:
        if not version:
            raise ValueError("version is empty: it names a sub-folder, or is a path")
        if len(self._sought.paths) > 1:
            raise ValueError(f"a version is one of each run of {self._source}: it has no one path")
        self._must_be_open()
        path = await named(self._looks, self._source, version)
        found = await candidate(self._looks, path)  # before a load is given up for nothing
        self._must_be_open()
        order = self._order()
        wanted: Candidate | None = found
        if self.shelf.find(found) is None:
            at_rest = self._rest.reached(lambda: candidate(self._looks, path))
            wanted = await self._switch.attempted(at_rest, self._waiting)
        self._must_be_open()
        if wanted is None or order != self._orders:
            raise CheckpointError(path, _OVERTAKEN)
        async with self._on_purpose():
            return await self._bring(wanted)

    def resume(self) -> None:
        self._must_be_open()
        self._order()
        self._resumed += 1
        self._follower.turn_on(anew=True)
        _log.info("%s: follows the newest version again", self._source)

    def _order(self) -> int:
        """End the wait of an earlier command for a copy to end; return this command's number."""
        self._orders += 1
        cancel(self._waiting)
        return self._orders

    @contextlib.asynccontextmanager
    async def _on_purpose(self) -> AsyncIterator[None]:
        """Have a turn, during which following is off; it stays off if all went well."""
        self._must_be_open()
        followed, resumed = self._follower.is_on, self._resumed
        self._follower.turn_off()
        self._commands += 1
        try:
            async with self._switch.turn:
                self._must_be_open()
                yield
        except BaseException:
            if followed:
                self._follower.turn_on()
            raise
        else:
            if self._resumed == resumed:  # an earlier command may have failed, and set it again
                self._follower.turn_off()
        finally:
            self._commands -= 1

    def _before(self) -> Candidate:
        before = self.shelf.before
        if before is None:
            raise LookupError(f"no version served before {self.shelf.serving.candidate.name!r}")
        return before

    async def _bring(self, wanted: Candidate, *, back: bool = False) -> LiveVersion:
        self._must_be_open()
        held = self.shelf.find(wanted)
        if held is None or not self._switch.swap(held, back=back):
            load = self._switch.load_once(wanted)
            held = await self._switch.attempted(load, self._loading)
            if held is None:
                raise RuntimeError(f"{self!r}: left meanwhile")
            self._switch.swap(held, back=back)
        return held.shown(serving=True)

    async def _still_there(self, wanted: Candidate) -> Candidate:
        """Return a version as it is now. If it has not changed since it served, it is at rest."""
        found = await again(self._looks, wanted)
        if found.brings_news_to(wanted):
            raise CheckpointChangedError(
                wanted.location,
                "another checkpoint has taken the place of the one that served before; "
                "load(version) takes what is there now",
            )
        return found

    def _must_be_open(self) -> None:
        if self._opened and asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                f"{self!r}: belongs to the event loop that it was entered on, and was called on "
                "another one"
            )
        if self._closing or not self._opened:
            raise RuntimeError(f"{self!r}: use it within its `async with` block")
