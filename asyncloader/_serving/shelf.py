"""The versions of a model in memory: one serves, some are used, others give their memory back."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from asyncloader._memory.allocation import SPARE

from .events import Freed, LiveVersion

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from .events import Event
    from .model import Model
    from .source import Candidate


_REMEMBERED = 32


@dataclass(slots=True, eq=False)
class Held:
    """A version in memory."""

    model: Model
    candidate: Candidate
    nbytes: int
    loaded_at: float
    leaving: bool = False  # it has left the shelf, or is about to
    pins: deque[None] = field(default_factory=deque)  # one a user; they come and go without a lock

    def shown(self, *, serving: bool) -> LiveVersion:
        """Describe the version as it is now."""
        return LiveVersion(
            **self.candidate.names,
            serving=serving,
            users=len(self.pins),
            nbytes=self.nbytes,
            seconds=self.model.report.seconds,
            loaded_at=self.loaded_at,
        )


class Shelf:
    """Knows which version serves, how many users each version has, and which may go.

    The `keep` versions that served last stay; others go once they have no users. A version is in
    use from `pin` to `unpin`. Any thread may call the two, and they never wait: the garbage
    collector, or the handler of a signal, may call them on a thread that is changing the shelf. A
    `pin` while another version is put gets the one or the other, whole.

    Args:
        keep: Versions that stay; the one that serves is the first of them.
        let_go: Called with each version that has left the shelf, on the thread that made it go, at
            any moment.

    Attributes:
        now: The versions in memory, in the order in which they last began to serve, and the one
            that serves, at one moment.
        served: The versions that served lately, without versions that were rolled back; the last
            one serves.
    """

    def __init__(self, *, keep: int, let_go: Callable[[Held], object]) -> None:
        self.keep = keep
        self.now: tuple[tuple[Held, ...], Held | None] = (), None
        self.served: tuple[Candidate, ...] = ()
        self._let_go = let_go
        self._lock = threading.Lock()  # for changes of the two; reading them takes none
        self._unsettled = False
        self._closed = False

    def __repr__(self) -> str:
        users = sum(len(held.pins) for held in self.held)
        return f"<Shelf: {len(self.held)} versions, {users} users>"

    @property
    def serving(self) -> Held:
        """The version that serves; `RuntimeError` if there is none, yet or any more."""
        serving = self.now[1]
        if serving is None:
            state = "was left" if self._closed else "was not entered"
            raise RuntimeError(f"no version serves: the `async with Live(...)` block {state}")
        return serving

    @property
    def needed(self) -> int:
        """Memory of the versions that serve or have users, in bytes."""
        held, serving = self.now
        return sum(one.nbytes for one in held if one.pins or one is serving)

    @property
    def held(self) -> tuple[Held, ...]:
        return self.now[0]

    @property
    def nbytes(self) -> int:
        """Memory of all versions, in bytes."""
        return sum(held.nbytes for held in self.held)

    @property
    def before(self) -> Candidate | None:
        """The version that served before the one that serves, in memory or not."""
        served = self.served
        return served[-2] if len(served) > 1 else None

    def find(self, candidate: Candidate) -> Held | None:
        """Return a version if it is in memory as a load would find it now."""
        found = (one for one in reversed(self.held) if not candidate.brings_news_to(one.candidate))
        return next(found, None)

    def pin(self) -> Held:
        """Return the version that serves; it stays until it is unpinned."""
        while True:
            held = self.serving
            held.pins.append(None)
            if not held.leaving:  # `_leaves` looks the other way round: one sees the other
                return held
            self.unpin(held)

    def unpin(self, held: Held) -> None:
        held.pins.pop()
        if held is not self.now[1]:  # the version that serves stays anyway
            self._settle()

    def put(self, held: Held, *, back: bool = False) -> bool:
        """Let a version serve from now on, unless it has left the shelf; say whether it does.

        With `back` it takes the place of the version that served after it.
        """
        with self._lock:
            if held.leaving:
                return False
            served = self.served[:-1] if back else self.served
            if served and served[-1] == held.candidate:  # gone back to, or loaded again
                served = served[:-1]
            self.served = (*served, held.candidate)[-_REMEMBERED:]
            others = tuple(one for one in self.held if one is not held)
            self.now = (*others, held), held
            gone = self._take_surplus()
        self._dismiss(gone)
        return True

    def spare(self) -> bool:
        """Let a version go that has no users and does not serve; say whether there was one."""
        with self._lock:
            gone = [*islice(filter(_leaves, self.held[:-1]), 1)]
            self._remove(gone)
        self._dismiss(gone)
        return bool(gone)

    def close(self) -> None:
        """Let each version go once it has no users. No user comes any more."""
        with self._lock:
            self.now, self._closed, self.keep = (self.held, None), True, 0
            gone = self._take_surplus()
        self._dismiss(gone)

    def _take_surplus(self) -> list[Held]:
        """Take versions off the shelf, and return them. The caller holds the lock."""
        staying: dict[Candidate, Held] = {}
        for one in reversed(self.held):
            # One of a version that was loaded again, as more of its files had come, will do.
            if len(staying) < self.keep:
                staying.setdefault(one.candidate, one)
        kept = staying.values()
        gone = [one for one in self.held if one not in kept and _leaves(one)]
        self._remove(gone)
        return gone

    def _remove(self, gone: list[Held]) -> None:
        held, serving = self.now
        self.now = tuple(one for one in held if one not in gone), serving

    def _settle(self) -> None:
        """Let versions go that have lost their last user, or leave that to the lock's holder."""
        self._unsettled = True
        while self._unsettled and self._lock.acquire(blocking=False):
            try:
                self._unsettled = False
                gone = self._take_surplus()
            finally:
                self._lock.release()
            for held in gone:
                self._let_go(held)

    def _dismiss(self, gone: list[Held]) -> None:
        """Let versions go, and those that lost their last user meanwhile. Without the lock."""
        for held in gone:
            self._let_go(held)
        if self._unsettled:
            self._settle()


def _leaves(held: Held) -> bool:
    """Have a version leave the shelf unless it has users; say whether it does."""
    held.leaving = True  # before the look: a user that comes now sees it, and takes another one
    if held.pins:
        held.leaving = False
    return held.leaving


class Freeing:
    """Gives memory back on an executor: for the event loop, 3 ms a gigabyte would be long.

    Belongs to the event loop on which it begins, which hears of it by `Freed` events.
    """

    def __init__(self, executor: Executor, tell: Callable[[Event], object]) -> None:
        self._executor = executor
        self._tell = tell
        self._under_way: set[asyncio.Future[None]] = set()

    def begin(self) -> None:
        self._loop = asyncio.get_running_loop()

    def let_go(self, held: Held) -> None:
        """Give a version without users back. Any thread may call this, at any moment."""
        contents = [held.model.take_contents()]
        # Not at once, even on the loop's thread: a signal's handler or the garbage collector may
        # end the last use within the executor, whose locks this would wait for. If the loop is
        # closed, the caller gives the memory back.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._free, contents, held)

    def free(self, model: Model, held: Held | None) -> None:
        """Give a model's memory back, on the loop; `held` if the model could have served."""
        self._free([model.take_contents()], held)

    def _free(self, contents: list[object], held: Held | None) -> None:
        try:
            freeing = self._loop.run_in_executor(self._executor, _give_back, contents)
        except RuntimeError:  # the service is over: it was pinned until now
            contents.clear()
            self._freed(held)
            return
        self._under_way.add(freeing)
        freeing.add_done_callback(self._under_way.discard)
        freeing.add_done_callback(partial(self._freed, held))

    def _freed(self, held: Held | None, _: object = None) -> None:
        if held is not None:
            self._tell(Freed(**held.candidate.names, nbytes=held.nbytes))

    async def wait(self) -> None:
        """Wait until all memory is given back."""
        await asyncio.sleep(0)  # so that a version that was let go just now is under way
        while self._under_way:
            await asyncio.wait(self._under_way)


def _give_back(contents: list[object]) -> None:
    contents.clear()
    SPARE.wipe()  # memory that is kept for the next version
