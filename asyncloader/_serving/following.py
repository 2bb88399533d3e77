"""Follows the source: loads the newest version, and lets it serve."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncloader.errors import CheckpointError

from .loading import RefusedError
from .retry import Copying, pause_after
from .source import newest
from .switch import cancel

if TYPE_CHECKING:
    from pathlib import Path

    from asyncloader._storage.small_files import Looks

    from .rest import Rest
    from .shelf import Held
    from .source import Candidate, Files
    from .switch import Switch


_log = logging.getLogger("asyncloader")

_REMEMBERED = 100


class _SupersededError(Exception):
    """There is a newer version than the one that is tried, or following has stopped."""


class Follower:
    """Follows the newest version while it is on. Belongs to one event loop.

    It stops whatever it is at when it is turned off. A cancellation can get lost, since a task
    group that is failing forgets it; so before a swap it looks whether it is still on.

    Args:
        source: A run folder, or a checkpoint.
        switch: Loads and swaps.
        looks: Looks at the source.
        rest: Waits until files stand still.
        poll: Seconds between two looks for it.
        retry_pause: Seconds before a load that failed is tried again.
    """

    def __init__(
        self,
        source: Path,
        switch: Switch,
        looks: Looks,
        rest: Rest,
        *,
        poll: float,
        retry_pause: float,
    ) -> None:
        self._source = source
        self._switch = switch
        self._shelf = switch.shelf
        self._teller = switch.teller
        self._looks = looks
        self._rest = rest
        self._poll = poll
        self._retry_pause = retry_pause
        self._ended = False
        self._on = asyncio.Event()
        self._on.set()
        self._poke = asyncio.Event()
        self._catching_up: set[asyncio.Task[Any]] = set()
        self._given_up: deque[tuple[Path, Files]] = deque(maxlen=_REMEMBERED)
        self._too_large: tuple[Path, Files, int] | None = None

    @property
    def is_on(self) -> bool:
        """Whether new versions are taken in."""
        return self._on.is_set()

    def turn_on(self, *, anew: bool = False) -> None:
        """Take new versions in; if `anew`, at once, and versions that were given up, too."""
        self._on.set()
        if anew:
            self._given_up.clear()
            self._poke.set()

    def turn_off(self) -> None:
        """Give up what is under way, and take no new version in. Does not wait."""
        if self.is_on:
            _log.info("%s: follows no more, until resume()", self._source)
        self._on.clear()
        self._poke.set()  # in a pause, too
        cancel(self._catching_up)

    def end(self) -> None:
        """Let `run` return; its task is to be cancelled, too."""
        self._ended = True
        self._on.set()
        self._poke.set()

    async def run(self) -> None:
        """Take in what is new, until the end."""
        while not self._ended:
            await self._on.wait()
            try:
                await self._switch.attempted(self._catch_up(), self._catching_up)
            except Exception:  # noqa: BLE001  # whatever it was, what serves goes on serving
                _log.exception("%s: following stumbled, and goes on", self._source)
            await self._pause(self._poll)

    def _wanted(self) -> bool:
        """Say whether to go on; following may have been cancelled without noticing."""
        return self._on.is_set() and not self._ended

    async def _catch_up(self) -> None:
        async with self._switch.turn:
            while self._wanted() and (new := await self._news()) is not None:
                held = self._shelf.find(new)
                if held is not None:
                    if self._wanted() and not self._switch.swap(held):
                        continue
                    return
                with contextlib.suppress(_SupersededError):
                    await self._take_in(new)
                    return

    async def _newest(self) -> Candidate | None:
        """Return the newest version; `None` where a look does not tell."""
        try:
            found = await newest(self._looks, self._source)
        except CheckpointError as error:
            self._teller.note("source", str(error))  # a run folder that is gone is so for a while
            return None
        self._teller.note("source", "")
        return found

    async def _news(self) -> Candidate | None:
        """Return the newest version, unless it serves already or will not do."""
        found = await self._newest()
        serving = self._shelf.serving.candidate
        # Of what serves, files may be removed. Where some have come, it was being copied.
        if found is None or not found.brings_news_to(serving):
            self._teller.note("older", "")
            return None
        is_older = await found.is_older_than(serving, self._shelf.served, self._looks)
        self._teller.note("older", _older(found, serving) if is_older else "")
        # What was too large is looked at again once there is more room.
        if is_older or self._too_large == (found.path, found.files, self._shelf.needed):
            return None
        # What was given up is looked at again once its files have changed.
        return None if (found.path, found.files) in self._given_up else found

    async def _still_newest(self, tried: Candidate) -> Candidate | None:
        """Return what is tried as it is now; `None` where a look does not tell.

        Raises:
            _SupersededError: If it is not wanted any more.
        """
        found = await self._newest()
        if not self._wanted() or (found is not None and found != tried):
            raise _SupersededError
        return found

    async def _take_in(self, new: Candidate) -> None:
        """Load a version and let it serve."""
        held = await self._loaded(new)
        if not self._wanted():
            self._switch.drop(held)
        elif held is not None:
            self._switch.swap(held)

    async def _loaded(self, tried: Candidate) -> Held | None:
        """Load a version, however often that has to be tried; `None` if it will not do."""
        new, copying = tried, Copying()
        for number in itertools.count(1):
            try:
                new = await self._rest.reached(partial(self._still_newest, new))
                with copying.of(new.files):
                    return await self._switch.loader.load(new, number)
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
                    self._switch.failed(new, error, number, None)
                    break
                seconds = pause_after(number, self._retry_pause)
                self._switch.failed(tried, error, number, seconds)
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
        if self._ended:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poke.wait()
        self._poke.clear()


def _older(found: Candidate, serving: Candidate) -> str:
    return (
        f"{found.path}: is the newest version that is there, and older than {serving.name!r}, "
        "which goes on serving; load(version) takes it"
    )
