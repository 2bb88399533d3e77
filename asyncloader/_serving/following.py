"""Follows the source: loads the newest version, again if need be, and lets it serve."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from asyncloader._checkpoint.format import INDEX
from asyncloader._storage.folder import is_unclear
from asyncloader.errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    PlanError,
    ReadError,
)

from .model import RefusedError
from .switch import cancel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncloader._storage.looks import Looks

    from .model import Settings
    from .shelf import Held
    from .sought import Sought
    from .source import Candidate, Files, Rest
    from .switch import Switch


_log = logging.getLogger("asyncloader")

_REMEMBERED = 100
_LONGEST = 60.0
_DOUBLINGS = 64  # a float would end at 1023
_LOOKS = 6
"""At a damaged version, each after twice the pause of the one before: a minute in all, if the first
pause is a second. No version is given up for good: once its files change, it is tried anew."""
# Messages of torch on the host, and of Python's threads, whose errors have no class of their own.
_NO_ROOM = ("not enough memory", "can't allocate memory", "can't start new thread")


class _SupersededError(Exception):
    """There is a newer version than the one that is tried, or following has stopped."""


class Follower:
    """Follows the newest version while it is on. Belongs to one event loop.

    It stops in the middle of its work when it is turned off. A cancellation can get lost, since a
    task group that is failing forgets it; so before a swap it looks whether it is still on.
    """

    def __init__(
        self, settings: Settings, sought: Sought, switch: Switch, looks: Looks, rest: Rest
    ) -> None:
        self._sought = sought
        self._source = sought.location
        self._poll = settings.poll
        self._retry_pause = settings.retry_pause
        self._switch = switch
        self._shelf = switch.shelf
        self._note = switch.teller.note
        self._looks = looks
        self._rest = rest
        self._ended = False
        self._on = asyncio.Event()
        self._on.set()
        self._poke = asyncio.Event()
        self._catching_up: set[asyncio.Task[Any]] = set()
        self._unanswered = 0  # looks, one after the other
        self._given_up: deque[tuple[str, Files]] = deque(maxlen=_REMEMBERED)
        self._too_large: tuple[str, Files, int] | None = None

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
        """Give up the load under way, and take no new version in. Does not wait."""
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
        """Take new versions in, until the end."""
        while not self._ended:
            await self._on.wait()
            try:
                await self._switch.attempted(self._catch_up(), self._catching_up)
            except Exception:  # noqa: BLE001  # after any error the version that serves goes on
                _log.exception("%s: following stumbled, and goes on", self._source)
            # A store that throttles gets fewer requests for a while.
            slower = self._poll * 2.0 ** min(self._unanswered, _DOUBLINGS)
            await self._pause(min(slower, max(self._poll, _LONGEST)))

    def _wanted(self) -> bool:
        """Say whether to go on; following may have been cancelled without noticing."""
        return self._on.is_set() and not self._ended

    async def _catch_up(self) -> None:
        async with self._switch.turn:
            while self._wanted() and (new := await self._news()) is not None:
                held = self._shelf.find(new)
                if held is None:
                    with contextlib.suppress(_SupersededError):
                        await self._take_in(new)
                        return
                elif not self._wanted() or self._switch.swap(held):
                    return

    async def _newest(self) -> Candidate | None:
        """Return the newest version; `None` where a look does not tell."""
        try:
            found = await self._sought.newest(self._looks)
        except CheckpointError as error:
            self._note("source", str(error))  # a run folder that is gone is so for a while
            cause = error.__cause__
            self._unanswered += isinstance(cause, OSError) and is_unclear(cause)
            return None
        self._unanswered = 0
        self._note("source", "")
        return found

    async def _news(self) -> Candidate | None:
        """Return the newest version, unless it serves already or will not do."""
        found = await self._newest()
        serving = self._shelf.serving.candidate
        # Of the version that serves, files may be removed. If some have come, it was being copied.
        if found is None or not found.brings_news_to(serving):
            self._note("older", "")
            return None
        is_older = await found.is_older_than(serving, self._shelf.served, self._looks)
        older = (
            f"{found.location}: is the newest version that is there, and older than "
            f"{serving.name!r}, which goes on serving; load(version) takes it"
        )
        self._note("older", older if is_older else "")
        # A version that was too large is looked at again once there is more room.
        if is_older or self._too_large == (found.location, found.files, self._shelf.needed):
            return None
        # A version that was given up is looked at again once its files have changed.
        return None if (found.location, found.files) in self._given_up else found

    async def _still_newest(self, tried: Candidate) -> Candidate | None:
        """Return the version that is tried as it is now; `None` where a look does not tell.

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
        new, copying = tried, _Copying()
        for number in itertools.count(1):
            try:
                new = await self._rest.reached(partial(self._still_newest, new))
                with copying.of(new.files):
                    return await self._switch.load(new, number)
            except RefusedError as refused:
                if refused.beside is None:
                    self._given_up.append((new.location, new.files))
                else:
                    self._too_large = new.location, new.files, refused.beside
                break
            except _SupersededError:
                raise
            except Exception as error:  # noqa: BLE001  # build() may raise anything
                if not copying.may_pass(error):
                    self._given_up.append((new.location, new.files))
                    self._switch.failed(new, error, number, None)
                    break
                seconds = _pause_after(number, self._retry_pause)
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


class _Copying:
    """Tells a version that is damaged from one that is still being copied.

    `rsync`, `cp` and object stores bring `index` before the shards. A version whose files are
    missing, short or damaged is loaded again once they have changed, and given up once they have
    stood still for long.
    """

    def __init__(self) -> None:
        self._failed: Files | None = None
        self._error: Exception | None = None
        self._looks = 0

    @contextlib.contextmanager
    def of(self, files: Files) -> Iterator[None]:
        """Note the error of a load of these files, within the block.

        Raises:
            Exception: The error of the last load, if they are as they were then: so would the next
                load end.
        """
        if self._error is not None and self._failed == files:
            self._looks += 1
            raise self._error
        self._looks = 0
        try:
            yield
        except Exception as error:
            # Where no file says which shards there are, a missing one looks like a smaller model.
            has_index = any(name.rpartition("/")[2] == INDEX for name in files)
            is_smaller = isinstance(error, PlanError) and not has_index
            if is_smaller or (isinstance(error, CheckpointError) and not may_pass(error)):
                self._failed, self._error = files, error
            raise

    def may_pass(self, error: BaseException) -> bool:
        """Say whether to look again after an error."""
        return self._looks < _LOOKS if error is self._error else may_pass(error)


def may_pass(error: BaseException) -> bool:
    """Say whether a fault may be gone the next time.

    Storage fails and recovers, a checkpoint that was replaced meanwhile can be read anew, memory
    becomes free. A corrupt file stays corrupt, and a checkpoint that does not fit the model will
    not fit later.
    """
    if isinstance(error, CheckpointError):
        # The cause says why a file cannot be opened or read; a file that is missing stays so.
        cause = error.__cause__
        storage = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        return storage or isinstance(error, CheckpointChangedError | CheckpointNotFoundError)
    if isinstance(error, OSError | MemoryError | ReadError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_ROOM)


def _pause_after(attempt: int, pause: float) -> float:
    """Return the seconds between a failed attempt, the first of which is 1, and the next.

    Each pause is twice as long as the one before, a minute at most. To each up to a second is added
    at random, so that many services do not try at once.
    """
    longer = pause * 2.0 ** min(attempt - 1, _DOUBLINGS)
    return min(longer, _LONGEST) + random.uniform(0, min(pause, 1))  # noqa: S311  # no secret
