"""Gives the memory of versions back, on a thread."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._memory.allocation import SPARE

from .events import Freed

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from .events import Event
    from .model import Model
    from .shelf import Held


class Freeing:
    """Gives memory back without the event loop having to wait: three milliseconds a gigabyte.

    Belongs to one event loop.

    Args:
        executor: Its threads do it.
        tell: Gets `Freed` events, on the event loop.
    """

    def __init__(self, executor: Executor, tell: Callable[[Event], object]) -> None:
        self._executor = executor
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._under_way: set[asyncio.Future[None]] = set()

    def let_go(self, held: Held) -> None:
        """Give a version back that is used no more. May be called on any thread, at any moment."""
        contents = [held.model.take_contents()]
        # Not at once, even on the loop's thread: that may be within the executor, whose locks this
        # would wait for, when a signal's handler or the garbage collector ends the last use. If the
        # loop is closed, the caller gives the memory back.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._free, contents, held)

    def free(self, model: Model, held: Held | None) -> None:
        """Give back what a model takes; `held` if it could have served. Called on the loop."""
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
            version, location = held.candidate.name, str(held.candidate.path)
            self._tell(Freed(version=version, location=location, nbytes=held.nbytes))

    async def wait(self) -> None:
        """Wait until all is given back."""
        await asyncio.sleep(0)  # what was let go just now begins
        while self._under_way:
            await asyncio.wait(self._under_way)


def _give_back(contents: list[object]) -> None:
    contents.clear()
    SPARE.wipe()  # what of it is kept for the next version
