"""Cancels a task at any chosen one of its suspensions, and of those of the tasks it starts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator


@dataclass
class Steps:
    """Counts how often tasks suspend, those included that they start, and cancels one of them."""

    cancel_at: range
    """At which of the suspensions."""

    count: int = 0
    main: asyncio.Task[object] | None = None

    async def run(self, main: Callable[[], Coroutine[Any, Any, object]]) -> bool:
        """Run `main()` as a task that is cancelled at the chosen steps; tell whether it was."""
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        loop.set_task_factory(self._make_task)
        try:
            self.main = loop.create_task(main())
            await asyncio.wait([self.main])
        finally:
            loop.set_task_factory(before)
        if self.main.cancelled():
            return True
        self.main.result()
        return False

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        **how: Any,  # noqa: ANN401  # of Task
    ) -> asyncio.Task[Any]:
        assert asyncio.iscoroutine(coroutine)
        return asyncio.Task(self._watch(coroutine), loop=loop, **how)

    async def _watch(self, coroutine: Coroutine[Any, Any, object]) -> object:
        return await _Watched(coroutine, self._suspended)

    def _suspended(self) -> None:
        if self.count in self.cancel_at and self.main is not None:
            self.main.cancel()
        self.count += 1


@dataclass
class _Watched:
    coroutine: Coroutine[Any, Any, object]
    suspended: Callable[[], None]

    def __await__(self) -> Generator[Any, Any, object]:
        step = partial(self.coroutine.send, None)
        while True:
            try:
                future = step()
            except StopIteration as end:
                return end.value
            self.suspended()
            try:
                yield future
            except BaseException as error:  # noqa: BLE001  # the coroutine's to judge
                step = partial(self.coroutine.throw, error)
            else:
                step = partial(self.coroutine.send, None)
