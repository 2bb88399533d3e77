"""A load that watches its loop goes slower while that is late, and says so."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncloader import Loader
from asyncloader._threads.gate import Gate
from asyncloader._threads.lag import LagWatch
from tests.live import build, publish
from tests.support import nothing_left_behind

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.both_loops

BOUND = 0.005


@dataclass
class Times:
    """A clock that the test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Watched:
    """A watch whose ticks come when the test says."""

    pressure: Any = None
    bound: float = BOUND
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        self.gate = Gate(most=1, cores=2)
        self.watch = LagWatch(self.gate, bound=self.bound, pressure=self.pressure, clock=self.times)

    def ticks(self, lag: float, *, seconds: float) -> float:
        """Have ticks come so late for a while; return the pace after that."""
        for _ in range(round(seconds / 0.01)):
            self.times.now += 0.01
            self.watch.note(lag, self.times.now)
        return self.gate.allowed


async def test_a_loop_that_is_on_time_gets_full_speed_by_and_by() -> None:
    watched = Watched()
    async with watched.watch:
        assert watched.gate.allowed == pytest.approx(0.3)
        paces = [watched.ticks(0.001, seconds=0.5) for _ in range(8)]
        assert paces == sorted(paces)
        assert 0.3 < paces[0] < 0.6
        assert paces[-1] == 1
        lag = watched.watch.lag
    assert lag.p50 == lag.p99 == pytest.approx(0.001, abs=2e-4)
    assert lag.worst == pytest.approx(0.001)
    assert [pace for _, pace in lag.paces] == sorted(pace for _, pace in lag.paces)
    assert 0.3 < lag.held_back < 0.7 * 4


async def test_a_loop_that_is_late_has_the_load_go_slower_at_once() -> None:
    watched = Watched()
    async with watched.watch:
        assert watched.ticks(0.001, seconds=4) == 1
        assert watched.ticks(0.02, seconds=0.06) == 0.5
        assert watched.ticks(0.02, seconds=0.05) == 0.25
        pace = watched.ticks(0.003, seconds=0.06)  # neither late nor early from here on
        assert watched.ticks(0.003, seconds=0.5) == pace
        assert watched.watch.lag.worst == pytest.approx(0.02)


@pytest.mark.parametrize("lag", [0.02, 0.003])
async def test_a_load_that_is_not_in_the_way_goes_no_slower_than_a_quarter(lag: float) -> None:
    watched = Watched()
    async with watched.watch:
        assert watched.ticks(0.02, seconds=0.3) == pytest.approx(0.1)
        assert watched.ticks(lag, seconds=60) == pytest.approx(0.25)


async def test_pressure_leaves_what_it_leaves() -> None:
    pressures = [0.75]
    watched = Watched(pressure=lambda: pressures[0], bound=math.inf)
    async with watched.watch:
        assert watched.ticks(0.001, seconds=4) == pytest.approx(0.25)
        pressures[0] = 0.0
        assert watched.ticks(1.0, seconds=4) == 1
        for full, pace in ((1.0, 0.1), (7.0, 0.1), (-1.0, 0.12)):
            pressures[0] = full
            assert watched.ticks(0.001, seconds=0.05) == pytest.approx(pace)


async def test_pressure_that_raises_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> float:
        raise ValueError("no metrics")

    watched = Watched(pressure=fail)
    async with watched.watch:
        assert watched.ticks(0.001, seconds=4) == 1
    assert caplog.text.count("pressure failed") == 1


async def test_paces_do_not_grow_for_ever() -> None:
    watched = Watched()
    async with watched.watch:
        for _ in range(3000):
            watched.ticks(0.02, seconds=0.11)
            watched.ticks(0.001, seconds=0.11)
        paces = watched.watch.lag.paces
    assert 400 < len(paces) <= 1024
    assert [when for when, _ in paces] == sorted(when for when, _ in paces)


@pytest.mark.parametrize("how", [{"max_loop_lag": 0.005}, {"pressure": lambda: 0.5}])
async def test_a_paced_load_loads_the_same(tmp_path: Path, how: dict[str, Any]) -> None:
    path = publish(tmp_path, 3)
    tables, tensors = build()
    with nothing_left_behind():
        report = await Loader(path, tables, tensors, **how).aload()
    assert set(tables["user"].lookup(torch.arange(200)).flatten().tolist()) == {3.0}
    assert set(tensors["w"].tolist()) == {3.0}
    assert report.lag is not None
    assert report.lag.bound == how.get("max_loop_lag", math.inf)
    assert 0 <= report.lag.p50 <= report.lag.p99 <= report.lag.worst
    assert report.lag.paces[0][1] == pytest.approx(0.3)
    assert "loop late by" in str(report)
    tables, tensors = build()
    assert (await Loader(path, tables, tensors).aload()).lag is None


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"max_loop_lag": 0}, ValueError),
        ({"max_loop_lag": -1.0}, ValueError),
        ({"max_loop_lag": math.nan}, ValueError),
        ({"pressure": 0.5}, TypeError),
    ],
)
def test_a_contract_that_makes_no_sense_is_refused(
    tmp_path: Path, wrong: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"max_loop_lag|pressure"):
        Loader(tmp_path, **wrong)


async def test_a_paced_load_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    for steps in range(0, 120, 7):
        tables, tensors = build()
        with nothing_left_behind():
            loading = asyncio.ensure_future(
                Loader(path, tables, tensors, max_loop_lag=0.001).aload()
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            loading.cancel()
            await asyncio.wait([loading])
        if loading.cancelled():
            assert len(tables["user"]) == 0
