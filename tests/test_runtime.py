"""Loads that share threads and memory."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncloader
from asyncloader import HashTable, Loader, Runtime
from tests.faulty import FaultyStorage
from tests.oracle import write_checkpoint
from tests.support import (
    data,
    debug_off,
    nothing_left_behind,
    raw,
    rows_in,
    rows_on_disk,
    table_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader._storage.protocol import ThreadedStorage
    from tests.faulty import Read

pytestmark = pytest.mark.both_loops

CONTENT = data(range(500), width=4)
STORED = {"w": torch.arange(1500.0)}
CHUNK = 1000


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, {"t": CONTENT}, STORED, writers=2)
    return tmp_path


class One:
    """A load of all there is."""

    def __init__(self, folder: Path, runtime: Runtime, **how: Any) -> None:  # noqa: ANN401  # Loader's
        self.table = table_for(CONTENT)
        self.tensor = torch.empty_like(STORED["w"])
        tables = {"t": self.table}
        tensors = {"w": self.tensor}
        self.loader = Loader(folder, tables, tensors, chunk_bytes=CHUNK, runtime=runtime, **how)

    def check(self) -> None:
        assert rows_in(self.table) == rows_on_disk(CONTENT)
        assert raw(self.tensor) == raw(STORED["w"])


class Counted:
    """Counts the bytes that are being read, of all loads of a runtime, and notes whose they are."""

    def __init__(self, then: Callable[[Read], None] = lambda _: None) -> None:
        self._lock = threading.Lock()
        self._then = then
        self.in_flight = self.peak = self.reads = 0
        self.threads: set[threading.Thread] = set()

    def wrap(self, storage: ThreadedStorage) -> ThreadedStorage:
        return FaultyStorage(storage, self)

    def __call__(self, read: Read) -> int:
        length = sum(view.nbytes for view in read.views)
        with self._lock:
            self.reads += 1
            self.in_flight += length
            self.peak = max(self.peak, self.in_flight)
            self.threads.add(threading.current_thread())
        try:
            self._then(read)
            return read.really()
        finally:
            with self._lock:
                self.in_flight -= length


async def test_many_loads_share_threads_and_bytes(written: Path) -> None:
    counted = Counted()
    threads = threading.active_count()
    async with Runtime(
        parallel=3, max_inflight_bytes=4 * CHUNK, wrap_storage=counted.wrap
    ) as runtime:
        loads = [One(written, runtime) for _ in range(32)]
        with debug_off():
            async with asyncio.TaskGroup() as group:
                for one in loads:
                    group.create_task(one.loader.aload())
        assert repr(runtime).startswith("<Runtime: 0 loads, <ByteBudget 0/4000 in use")
    for one in loads:
        one.check()
    # What was counted besides blocks: headers and names, which are not of the budget.
    assert counted.peak <= 4 * CHUNK + 3 * (16 << 10)
    assert 1 <= len(counted.threads) <= 3
    assert threading.active_count() == threads


async def test_a_small_load_does_not_wait_for_a_large_one_to_end(
    written: Path, tmp_path: Path
) -> None:
    """Reads of both take turns: the small one is done before half of the large one is."""
    many = {f"w{number}": torch.full((250,), float(number)) for number in range(400)}
    write_checkpoint(tmp_path / "large", {}, many, writers=1)
    counted: dict[str, int] = {"large": 0}
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wrap(storage: ThreadedStorage) -> ThreadedStorage:
        def count(read: Read) -> None:
            counted["large"] += 1
            loop.call_soon_threadsafe(begun.set)

        return FaultyStorage(storage, count) if storage.location.endswith("large") else storage

    async with (
        Runtime(parallel=2, max_inflight_bytes=2 * CHUNK, wrap_storage=wrap) as runtime,
        asyncio.TaskGroup() as group,
    ):
        into = {name: torch.empty(250) for name in many}
        large = Loader(tmp_path / "large", tensors=into, chunk_bytes=CHUNK, runtime=runtime)
        loading = group.create_task(large.aload())
        await begun.wait()
        small = {"w": torch.empty(1500)}
        await Loader(written, tensors=small, chunk_bytes=10_000, runtime=runtime).aload()
        assert not loading.done()
        seen = counted["large"]
    assert seen < counted["large"]
    assert raw(small["w"]) == raw(STORED["w"])


async def test_a_load_that_fails_or_is_cancelled_leaves_the_others_and_the_runtime_alone(
    written: Path, tmp_path: Path
) -> None:
    async with Runtime(parallel=2, max_inflight_bytes=2 * CHUNK) as runtime:
        with pytest.raises(asyncloader.CheckpointNotFoundError):
            await One(tmp_path / "none", runtime).loader.aload()
        for steps in range(1, 40, 3):
            other, cancelled = One(written, runtime), One(written, runtime)
            going = asyncio.create_task(other.loader.aload())
            task = asyncio.create_task(cancelled.loader.aload())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await going
            other.check()
            assert task.cancelled() or task.result().reads
            assert "0 loads, <ByteBudget 0/" in repr(runtime)
            assert len(cancelled.table) in {0, len(CONTENT.ids)}


async def test_a_runtime_can_be_entered_again_and_leaves_nothing_behind(written: Path) -> None:
    runtime = Runtime(parallel=2)
    for _ in range(2):
        with nothing_left_behind():
            async with runtime:
                one = One(written, runtime)
                await one.loader.aload()
            one.check()


async def test_leaving_waits_for_loads_that_go_on(written: Path) -> None:
    gate, arrived = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait(_: Read) -> None:
        loop.call_soon_threadsafe(arrived.set)
        gate.wait()

    runtime = Runtime(wrap_storage=Counted(wait).wrap)
    await runtime.__aenter__()
    one = One(written, runtime)
    loading = asyncio.create_task(one.loader.aload())
    await arrived.wait()
    leaving = asyncio.create_task(runtime.__aexit__(None, None, None))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not leaving.done()
    with pytest.raises(RuntimeError, match="not entered"):
        await One(written, runtime).loader.aload()
    gate.set()
    await loading
    await leaving
    one.check()


async def test_a_runtime_that_is_not_entered_or_entered_twice_is_an_error(written: Path) -> None:
    runtime = Runtime()
    assert repr(runtime) == "<Runtime: not entered>"
    with pytest.raises(RuntimeError, match="async with Runtime"):
        await One(written, runtime).loader.aload()
    async with runtime:
        with pytest.raises(RuntimeError, match="entered already"):
            await runtime.__aenter__()


async def test_a_runtime_is_of_one_event_loop(written: Path) -> None:
    async with Runtime() as runtime:
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(One(written, runtime).loader.load)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
async def test_a_runtime_is_of_one_process(written: Path) -> None:
    async with Runtime() as runtime:
        one = One(written, runtime)
        child = os.fork()
        if not child:
            try:
                asyncio.run(one.loader.aload())
            except RuntimeError as error:
                os._exit(0 if "another process" in str(error) else 1)
            finally:
                os._exit(2)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        await one.loader.aload()
    one.check()


@pytest.mark.parametrize("how", [{"max_loop_lag": 0.01}, {"pressure": lambda: 0.0}])
def test_what_is_promised_the_event_loop_is_the_runtimes(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="for all loads of a runtime"):
        Loader("x", runtime=Runtime(), **how)


@pytest.mark.parametrize("wrong", [{"parallel": 0}, {"max_inflight_bytes": -1}])
def test_a_limit_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Runtime(**wrong)  # type: ignore[arg-type]


def test_what_is_no_runtime_is_refused() -> None:
    with pytest.raises(TypeError, match="runtime must be a Runtime"):
        Loader("x", runtime=object())  # type: ignore[arg-type]


async def test_a_runtime_that_keeps_to_a_lag_reports_it(written: Path) -> None:
    async with Runtime(max_loop_lag=0.5, pressure=lambda: 0.0) as runtime:
        one = One(written, runtime)
        report = await one.loader.aload()
    one.check()
    assert report.lag is not None
    assert report.lag.bound == 0.5


async def test_live_can_use_one(written: Path) -> None:
    def build() -> tuple[dict[str, HashTable], dict[str, torch.Tensor]]:
        return {"t": table_for(CONTENT)}, {"w": torch.empty(1500)}

    counted = Counted()
    async with Runtime(wrap_storage=counted.wrap) as runtime:
        options = {"runtime": runtime}
        async with asyncloader.Live(written, build, loader_options=options) as live:
            with live.use() as model:
                assert rows_in(model.tables["t"]) == rows_on_disk(CONTENT)
            assert "<Runtime: 0 loads" in repr(runtime)
        assert counted.reads


@pytest.mark.both_loops
@pytest.mark.parametrize("kind", ["runtime", "reader"])
async def test_what_is_cancelled_while_it_closes_can_be_entered_again(
    tmp_path: Path, kind: str
) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(2)})
    held = Runtime() if kind == "runtime" else asyncloader.CheckpointReader(tmp_path)
    entered = asyncio.Event()

    async def enter() -> None:
        async with held:
            entered.set()

    entering = asyncio.ensure_future(enter())
    await entered.wait()
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    async with held:
        pass
