"""The versions of a model that are in memory."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

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
    users: int = 0


class Shelf:
    """Knows which version serves, who uses which, and which may go.

    The `keep` versions that served last stay; others go once nobody uses them. A version is in use
    from `pin` to `unpin`, which any thread may call. Who pins while another version is put gets the
    one or the other, whole.

    Args:
        keep: Versions that stay; the one that serves is the first of them.
    """

    let_go: Callable[[Held], object]
    """Set before the first version is put. Called with each that has left the shelf, on whatever
    thread made it go."""

    def __init__(self, *, keep: int) -> None:
        self.keep = keep
        self._lock = threading.Lock()
        self._held: list[Held] = []  # in the order in which they last began to serve
        self._serving: Held | None = None
        self._served: deque[Candidate] = deque(maxlen=_REMEMBERED)  # the last one serves
        self._closed = False

    def __repr__(self) -> str:
        users = sum(held.users for held in self._held)
        return f"<Shelf: {len(self._held)} versions, {users} users>"

    @property
    def serving(self) -> Held:
        """The version that serves.

        Raises:
            RuntimeError: If there is none, yet or any more.
        """
        serving = self._serving
        if serving is None:
            state = "was left" if self._closed else "was not entered"
            raise RuntimeError(f"no version serves: the `async with Live(...)` block {state}")
        return serving

    @property
    def now(self) -> tuple[tuple[Held, ...], Held | None]:
        """All that are in memory, and the one that serves, at one moment."""
        with self._lock:
            return tuple(self._held), self._serving

    @property
    def needed(self) -> int:
        """Memory of those that serve or are used, in bytes."""
        with self._lock:
            return sum(one.nbytes for one in self._held if one.users or one is self._serving)

    @property
    def held(self) -> tuple[Held, ...]:
        """All that are in memory, in the order in which they last began to serve."""
        with self._lock:
            return tuple(self._held)

    @property
    def nbytes(self) -> int:
        """Memory of all of them, in bytes."""
        return sum(held.nbytes for held in self.held)

    @property
    def before(self) -> Candidate | None:
        """The version that served before this one, in memory or not."""
        with self._lock:
            return self._served[-2] if len(self._served) > 1 else None

    @property
    def served(self) -> tuple[Candidate, ...]:
        """The versions that served lately, the last one serves; not those that were left."""
        with self._lock:
            return tuple(self._served)

    def find(self, candidate: Candidate) -> Held | None:
        """Return a version if it is in memory as it would be loaded now."""
        held = reversed(self.held)
        return next((one for one in held if not candidate.brings_news_to(one.candidate)), None)

    def pin(self) -> Held:
        """Return the version that serves; it stays until it is unpinned.

        Raises:
            RuntimeError: If there is none.
        """
        with self._lock:
            held = self.serving
            held.users += 1
            return held

    def unpin(self, held: Held) -> None:
        """Let go of a version."""
        with self._lock:
            held.users -= 1
            gone = self._take_surplus()
        self._dismiss(gone)

    def put(self, held: Held, *, back: bool = False) -> None:
        """Let a version serve from now on.

        Args:
            held: One that is on the shelf already, or a new one.
            back: Whether it takes the place of the one that served after it.
        """
        with self._lock:
            if held in self._held:
                self._held.remove(held)
            self._held.append(held)
            if back:
                self._served.pop()
            if self._served and self._served[-1] == held.candidate:  # gone back to, or loaded again
                self._served.pop()
            self._served.append(held.candidate)
            self._serving = held
            gone = self._take_surplus()
        self._dismiss(gone)

    def spare(self) -> bool:
        """Let a version go that stays only because it served lately; say whether there was one."""
        with self._lock:
            idle = next((held for held in self._held[:-1] if not held.users), None)
            if idle is None:
                return False
            self._held.remove(idle)
        self._dismiss([idle])
        return True

    def close(self) -> None:
        """Let all versions go as soon as nobody uses them. Nobody gets one any more."""
        with self._lock:
            self._serving, self._closed, self.keep = None, True, 0
            gone = self._take_surplus()
        self._dismiss(gone)

    def _take_surplus(self) -> list[Held]:
        staying: dict[Candidate, Held] = {}
        for held in reversed(self._held):
            # Of a version that was loaded again, since more of its files had come, one will do.
            if len(staying) < self.keep:
                staying.setdefault(held.candidate, held)
        kept = staying.values()
        gone = [held for held in self._held if held not in kept and not held.users]
        for held in gone:
            self._held.remove(held)
        return gone

    def _dismiss(self, gone: list[Held]) -> None:
        for held in gone:
            self.let_go(held)
