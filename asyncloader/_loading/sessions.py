"""Sessions for several calls."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from .hold import Hold
from .session import open_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asyncloader.options import ReadOptions

    from .session import Session


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
        self._held: Hold[Session] | None = None

    async def __aenter__(self) -> None:
        if self._held is not None:
            raise RuntimeError(f"{self._path}: is open already")
        self._held = await Hold.open(self._open(replace(self._options, timeout=None)))

    async def __aexit__(self, *_: object) -> None:
        held, self._held = self._held, None
        if held is not None:
            await held.close()

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        """Lend a session for the length of the block."""
        held = self._held
        if held is None or held.loop is not asyncio.get_running_loop():
            async with self._open(self._options) as session:
                yield session
            return
        with held.use() as session:
            async with session.in_time(self._options.timeout):
                yield session

    def _open(self, options: ReadOptions) -> contextlib.AbstractAsyncContextManager[Session]:
        return open_session(self._path, options, seen=self._seen)
