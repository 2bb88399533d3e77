"""Whatever is done to a service's model in whatever order, it is what a plain list says.

The event loop stands still between two steps, so that nothing happens that was not asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from asyncloader import (
    AsyncLoaderError,
    LoadFailed,
    RolledBack,
    Swapped,
    VersionRefused,
)
from tests.live import Events, damage, live, publish, version_in
from tests.support import FDS, nothing_left_behind

if TYPE_CHECKING:
    from asyncloader import Live, Model

REFUSED = 1000
"""Versions from this number on do not pass the check."""


def check(model: Model) -> None:
    if version_in(model) >= REFUSED:
        raise ValueError("not this one")


class LiveMachine(RuleBasedStateMachine):
    """A service beside a list of what served, and a set of what will not do."""

    @initialize(keep=st.integers(1, 3))
    def enter(self, keep: int) -> None:
        self.stack = contextlib.ExitStack()
        self.run = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.stack.enter_context(nothing_left_behind())
        self.runner = self.stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        self.events = Events()
        self.keep = keep
        self.newest = 1
        self.bad: set[int] = set()
        publish(self.run, 1)
        self.runner.run(self._enter())
        self.served = [1]
        self.recent = [1]
        self.following = True
        self.pinned: list[tuple[contextlib.AbstractContextManager[Model], Model, int]] = []

    async def _enter(self) -> None:
        self.live: Live = await live(
            self.run, self.events, keep=self.keep, check=check, poll=0.001
        ).__aenter__()

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        while self.pinned:
            self.let_go(0)
        self.runner.run(self.live.__aexit__(None, None, None))
        self.stack.close()

    def _serves(self, version: int, *, back: bool = False) -> None:
        if back:
            self.served.pop()
        elif self.served[-1] != version:
            self.served.append(version)
        if version in self.recent:
            self.recent.remove(version)
        self.recent.append(version)

    def _in_memory(self) -> set[int]:
        pinned = {version for *_, version in self.pinned}
        return {*self.recent[-self.keep :], *pinned}

    @rule(kind=st.sampled_from(["good", "corrupt", "refused"]))
    def commit(self, kind: str) -> None:
        """Be a trainer; whoever follows looks."""
        self.newest += 1
        number = self.newest + (REFUSED if kind == "refused" else 0)
        elsewhere = self.run / ".."
        staged = publish(elsewhere, number, name=f"{self.run.name}-{number}", when=self.newest)
        if kind == "corrupt":
            damage(staged)
        self.events.seen.clear()
        staged.rename(self.run / f"v{number}")
        if kind != "good":
            self.bad.add(number)
        self._look(number)

    def _look(self, number: int) -> None:
        if not self.following or self.served[-1] == number:
            return
        if number in self.bad:
            wanted = VersionRefused if number >= REFUSED else LoadFailed
            self.runner.run(self.events.until(wanted, version=f"v{number}"))
        else:
            self.runner.run(self.events.until(Swapped, version=f"v{number}"))
            self._serves(number)

    @rule()
    def pin(self) -> None:
        block = self.live.use()
        self.pinned.append((block, block.__enter__(), self.served[-1]))

    @precondition(lambda self: self.pinned)
    @rule(which=st.integers(0, 10))
    def let_go(self, which: int) -> None:
        block, _, _ = self.pinned.pop(which % len(self.pinned))
        block.__exit__(None, None, None)

    @rule()
    def roll_back(self) -> None:
        if len(self.served) == 1:
            with pytest.raises(LookupError):
                self.runner.run(self.live.rollback())
            return
        before = self.served[-2]
        self.events.seen.clear()
        assert self.runner.run(self.live.rollback()).version == f"v{before}"
        assert any(isinstance(event, RolledBack) for event in self.events.seen)
        self._serves(before, back=True)
        self.following = False

    @rule(which=st.integers(0, 30))
    def load(self, which: int) -> None:
        names = sorted(path.name for path in self.run.glob("v*"))
        name = names[which % len(names)]
        number = int(name[1:])
        if number in self.bad:
            with pytest.raises(AsyncLoaderError):
                self.runner.run(self.live.load(name))
            return
        assert self.runner.run(self.live.load(name)).version == name
        self._serves(number)
        self.following = False

    @rule(steps=st.integers(0, 30))
    def load_and_think_better_of_it(self, steps: int) -> None:
        """Whoever is cancelled while a version comes in has changed it, or has not."""
        if self.following:
            return

        async def cancelled() -> bool:
            loading = asyncio.ensure_future(self.live.load("v1"))
            for _ in range(steps):
                await asyncio.sleep(0)
            loading.cancel()
            await asyncio.wait([loading])
            return not loading.cancelled()

        if self.runner.run(cancelled()) or self.live.current.version == "v1":
            self._serves(1)

    @rule()
    def resume(self) -> None:
        self.events.seen.clear()
        was, self.following = self.following, True
        self.runner.run(self.live.resume())
        if not was:
            newest = max(self.run.glob("v*/index"), key=lambda index: index.stat().st_mtime)
            self._look(int(newest.parent.name[1:]))

    @invariant()
    def it_is_as_the_list_says(self) -> None:
        if not hasattr(self, "live"):
            return
        with self.live.use() as model:
            assert version_in(model) == self.served[-1]
        for _, model, version in self.pinned:
            assert version_in(model) == version
        held = {int(one.version[1:]) for one in self.live.versions}
        assert held == self._in_memory()
        assert self.live.state.following == self.following


LiveMachine.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


TestLive = pytest.mark.slow(
    pytest.mark.skipif(not FDS.exists(), reason="counts descriptors as Linux lists them")(
        LiveMachine.TestCase
    )
)
