"""Many loads in one process, many at a time, savers beside them. `make soak` does more of it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncloader import Loader, Runtime
from asyncloader._memory.allowance import processors
from tests.oracle import write_checkpoint
from tests.processes import apart
from tests.soak import soak
from tests.storages import Through
from tests.support import debug_off, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncloader import Span

smaps = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="measures memory as Linux tells it"
)
FLAT = 0.01
# The C library gives each of a load's threads one of up to eight arenas a processor, and each keeps
# what fragments it has: 5 % in the first forty loads, little after these. With one arena, what is
# left is ours: 0.1 % in 2000 loads.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@smaps
def test_a_process_that_loads_again_and_again_does_not_grow(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    loads = request.config.getoption("soak_loads")

    found: dict[str, Any] = apart(soak, tmp_path, loads, 7, timeout=None, environment=ONE_ARENA)

    before, after, outcomes = found["before"], found["after"], found["outcomes"]
    assert abs(after["kib"] - before["kib"]) < FLAT * before["kib"], found
    # A tenth of that in what was asked for: 200 bytes a load would show.
    for what in "allocated", "blocks":
        assert abs(after[what] - before[what]) <= FLAT * before[what] / 10, found
    assert after["descriptors"] == before["descriptors"]
    assert after["threads"] == before["threads"]
    assert sum(outcomes.values()) == loads
    for outcome in "whole, loaded", "cancelled, cancelled", "damaged, failed", "failing, failed":
        assert outcomes[outcome] > loads // 10, outcomes


# --- many at a time

MANY, PARALLEL, CHUNK = 32, 4, 64 << 10
BUDGET = 8 * CHUNK
CHUNKS = 20  # of each load


@dataclass
class Gauge:
    """What all loads have in flight together."""

    slow: str = ""
    """Of the files of this folder no read comes back before `go`, after the first ones."""

    bytes: int = 0
    peak: int = 0
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, count: int) -> None:
        self.bytes += count
        self.peak = max(self.peak, self.bytes)


@dataclass
class GaugedStorage(Through):
    """Tells how much is being read."""

    gauge: Gauge

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        count = sum(view.nbytes for view in views) if offset else 0  # headers do not count
        self.gauge.add(count)
        try:
            if self.location == self.gauge.slow and offset > 2 * CHUNK:
                if self.gauge.bytes == PARALLEL * CHUNK:
                    self.gauge.waiting.set()
                await self.gauge.go.wait()
            return await super().readinto(name, offset, views)
        finally:
            self.gauge.add(-count)


def runtime_with(gauge: Gauge) -> Runtime:
    wrap = partial(GaugedStorage, gauge=gauge)
    return Runtime(parallel=PARALLEL, max_inflight_bytes=BUDGET, wrap_storage=wrap)


@dataclass
class Crowd:
    """Loads that share a runtime, and what becomes of them."""

    folder: Path
    runtime: Runtime
    threads: set[int] = field(default_factory=set)
    turns: list[int] = field(default_factory=list)
    """Who has read a chunk, one after the other."""

    through: list[int] = field(default_factory=list)

    async def load(self, number: int, chunks: int = CHUNKS) -> None:
        """Load the tensor of that number, and check it."""
        path = self.folder / str(number)
        write_checkpoint(path, {}, {"w": torch.full((chunks * CHUNK // 4,), float(number))})
        tensors = {"w": torch.zeros(chunks * CHUNK // 4)}
        loader = Loader(
            path,
            tensors=tensors,
            parallel=PARALLEL,
            chunk_bytes=CHUNK,
            runtime=self.runtime,
            trace=partial(self._note, number),
        )
        await loader.aload()
        self.through.append(number)
        assert bool((tensors["w"] == number).all())

    def _note(self, number: int, span: Span) -> None:
        if span.step == "read":
            self.turns.append(number)
        ours = [one for one in threading.enumerate() if one.name.startswith("asyncloader-")]
        self.threads.update(one.ident for one in ours if one.ident)  # it is being started if not


async def test_many_loads_share_one_pool_and_one_budget_and_none_starves(tmp_path: Path) -> None:
    with debug_off(), nothing_left_behind():
        async with runtime_with(gauge := Gauge()) as runtime:
            crowd = Crowd(tmp_path, runtime)
            async with asyncio.TaskGroup() as group:
                for number in range(MANY):
                    group.create_task(crowd.load(number))

    assert len(crowd.through) == MANY
    assert 2 * CHUNK <= gauge.peak <= BUDGET
    assert len(crowd.threads) <= PARALLEL + processors()
    assert len(crowd.turns) == MANY * CHUNKS
    for number in range(MANY):
        # First come, first served: whoever asks waits for what the others have asked for before.
        turns = [turn for turn, who in enumerate(crowd.turns) if who == number]
        waited = max(after - before for before, after in itertools.pairwise(turns))
        assert waited <= (MANY + 1) * PARALLEL


async def test_a_load_that_does_not_get_on_keeps_no_other_waiting(tmp_path: Path) -> None:
    """Its readers wait for a slow disk, all of them, with the bytes that they were granted."""
    with debug_off(), nothing_left_behind():
        async with runtime_with(gauge := Gauge(slow=str(tmp_path / "0"))) as runtime:
            crowd = Crowd(tmp_path, runtime)
            async with asyncio.TaskGroup() as group:
                group.create_task(crowd.load(0))
                await gauge.waiting.wait()
                async with asyncio.TaskGroup() as others:
                    for number in range(1, MANY):
                        others.create_task(crowd.load(number, chunks=3))
                assert sorted(crowd.through) == [*range(1, MANY)]
                gauge.go.set()

    assert crowd.through[-1] == 0
    assert gauge.peak <= BUDGET
