"""Sessions for several calls."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from asyncloader._threads.jobs import settled

from .session import open_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncloader.options import ReadOptions

    from .session import Session


@dataclass(slots=True)
class _Held:
    """A session that several tasks use."""

    session: Session
    stack: contextlib.AsyncExitStack
    loop: asyncio.AbstractEventLoop
    users: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Sessions:
    """Gives every call a session: the one that `async with` holds open, or one of its own.

    All of them see the same files: one that is replaced after it was first opened is an error.

    Args:
        path: As for `open_session`.
        options: For each session; `timeout` is for each call.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._seen: dict[str, tuple[int, ...]] = {}
        self._held: _Held | None = None

    async def __aenter__(self) -> None:
        if self._held is not None:
            raise RuntimeError(f"{self._path}: is open already")
        stack = contextlib.AsyncExitStack()
        session = await stack.enter_async_context(self._open(replace(self._options, timeout=None)))
        self._held = _Held(session, stack, asyncio.get_running_loop())

    async def __aexit__(self, *_: object) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        try:
            # Their threads may be writing to memory: what they read from cannot be closed yet.
            if held.users:
                held.idle.clear()  # set whenever nobody used it for a moment
                await settled(asyncio.ensure_future(held.idle.wait()))
        finally:
            await held.stack.aclose()

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        """Lend a session for the length of the block."""
        held = self._held
        if held is None or held.loop is not asyncio.get_running_loop():
            async with self._open(self._options) as session:
                yield session
            return
        held.users += 1
        try:
            async with held.session.in_time(self._options.timeout):
                yield held.session
        finally:
            held.users -= 1
            if not held.users:
                held.idle.set()

    def _open(self, options: ReadOptions) -> contextlib.AbstractAsyncContextManager[Session]:
        return open_session(self._path, options, seen=self._seen)
