"""Readers in threads and coroutines never see a mixture, whatever happens to the versions.

`make soak` does it a thousand times.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
import torch
import uvloop

from asyncloader import AsyncLoaderError, LoadFailed, Swapped, VersionRefused
from tests.live import Events, damage, live, publish, serving, version_in
from tests.support import nothing_left_behind

if TYPE_CHECKING:
    from asyncloader import Live, Model

SMAPS = Path("/proc/self/smaps_rollup")
MANY = torch.arange(20_000)
# A version takes 1.6 MB or more: of those that are not given back, one in ten would show. The C
# library takes its time to have enough memory for threads that come and go, hence the rest.
LEEWAY, A_TENTH = 24 << 20, 160 << 10
KEPT = 5


def memory() -> int:
    """Return what this process takes of memory of its own, in bytes.

    Not its share of libraries: that grows whenever another process that uses them ends.
    """
    match = re.search(r"^Anonymous: *(\d+) kB", SMAPS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) << 10


class Readers:
    """Look everything up, all the time, and remember what was wrong."""

    def __init__(self, it: Live) -> None:
        self._live = it
        self._over = threading.Event()
        self.wrong: list[BaseException] = []
        self.looks = 0
        self._threads = [threading.Thread(target=self._in_a_thread) for _ in range(2)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Have all of them end."""
        self._over.set()

    def _in_a_thread(self) -> None:
        while not self._over.is_set():
            try:
                with self._live.use() as model:
                    first = version_in(model)
                    assert version_in(model) == first
            except BaseException as error:  # noqa: BLE001  # the test raises it
                self.wrong.append(error)
                return
            self.looks += 1

    async def in_a_coroutine(self) -> None:
        """Keep a version for longer than it serves, now and then."""
        while not self._over.is_set():
            with self._live.use() as model:
                first = version_in(model)
                await asyncio.sleep(random.random() / 50)
                assert version_in(model) == first


def check(model: Model) -> None:
    if version_in(model) % 7 == 0:
        raise ValueError("not this one")


async def take_in(it: Live, events: Events, run: Path, version: int) -> str:
    """Have a version come in, good or bad; wait for it, or do something else meanwhile."""
    events.seen.clear()
    staged = publish(run / "..", version, name=f"staged-{version}", ids=MANY)
    bad = version % 5 == 0
    if bad:
        damage(staged)
    staged.rename(run / f"v{version}")
    act = random.choice(["wait", "wait", "back", "cancel", "load"])
    if act == "wait":
        kind = LoadFailed if bad else VersionRefused if version % 7 == 0 else Swapped
        await events.until(kind, version=f"v{version}")
        return act
    await asyncio.sleep(random.random() / 100)
    command = asyncio.ensure_future(it.load(f"v{version}") if act == "load" else it.rollback())
    if act == "cancel":
        await asyncio.sleep(random.random() / 100)
        command.cancel()
    [outcome] = await asyncio.gather(command, return_exceptions=True)
    expected = (AsyncLoaderError, LookupError, asyncio.CancelledError)
    assert not isinstance(outcome, BaseException) or isinstance(outcome, expected), outcome
    await it.resume()
    return act


@pytest.mark.slow
@pytest.mark.skipif(not SMAPS.exists(), reason="measures memory as Linux tells it")
def test_swaps_under_readers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """On one of the loops: it takes long."""
    uvloop.run(swap_under_readers(tmp_path, request.config.getoption("soak_swaps")))


async def swap_under_readers(tmp_path: Path, swaps: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    publish(run, 1, ids=MANY)
    events = Events()
    options = {"pressure": random.random}
    before = 0
    with nothing_left_behind():
        async with live(run, events, keep=2, check=check, loader_options=options) as it:
            with Readers(it) as readers:
                async with asyncio.TaskGroup() as group:
                    for _ in range(3):
                        group.create_task(readers.in_a_coroutine())
                    for version in range(2, swaps + 2):
                        await take_in(it, events, run, version)
                        if version == KEPT:
                            before = memory()
                        elif version > KEPT:
                            (run / f"v{version - KEPT}").rename(run / f".v{version}")
                    readers.stop()
            assert not readers.wrong
            assert readers.looks > swaps
            assert memory() - before < LEEWAY + swaps * A_TENTH
            assert serving(it) > 0
            assert len(it.versions) <= 2
