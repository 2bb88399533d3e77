"""As many threads run at a time as are of use, and as are allowed."""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import math
import threading
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import pytest

from asyncloader._threads.call import Reading
from asyncloader._threads.disk import Disk
from asyncloader._threads.gate import Gate, Ran
from asyncloader._threads.pool import WorkerPool
from tests.support import running_pool

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

pytestmark = pytest.mark.both_loops

CORES, MOST = 4, 9


async def read(disk: Disk, job: Callable[[Reading], T]) -> T:
    """Have a thread do a job that counts as a large read."""
    reading = Reading()
    return await disk.call(partial(job, reading), reading=reading)


def noted(reading: Reading, *, waited: bool) -> int:
    reading.waited = waited
    return 7


# --- as many reads as are of use


@pytest.mark.parametrize(
    ("waits", "running", "limits"),
    [
        pytest.param(True, 1.0, [5, 6, 7, 8, 9, 9], id="a device is waited for"),
        pytest.param(True, 0.2, [5, 6, 7, 8, 9, 9], id="a device and others"),
        pytest.param(False, 1.0, [4, 4], id="nothing is waited for"),
        pytest.param(False, 0.2, [3, 2, 2], id="others are waited for"),
    ],
)
async def test_as_many_read_as_are_of_use(
    *, waits: bool, running: float, limits: list[int]
) -> None:
    moments = itertools.count()

    def clock() -> Ran:
        moment = next(moments)
        return Ran(int(moment * running * 1e6), int(moment * (1 - running) * 1e6))

    gate = Gate(most=MOST, cores=CORES, clock=clock)
    assert gate.useful == CORES
    async with running_pool(4, gate) as pool:
        for limit in limits:
            await read(Disk(pool), partial(noted, waited=waits))
            assert gate.useful == limit


async def test_the_gate_goes_back_to_the_usual_from_either_side() -> None:
    gate = Gate(most=MOST, cores=CORES, clock=lambda: None)
    limits = []
    async with running_pool(4, gate) as pool:
        for waited in (True, True, False, False, False):
            await read(Disk(pool), partial(noted, waited=waited))
            limits.append(gate.useful)
    assert limits == [5, 6, 5, 4, 4]


@pytest.mark.parametrize(("seconds", "limit"), [(1000, 2), (0, 3)], ids=["ran", "waited"])
async def test_where_the_system_cannot_tell_what_a_read_waited_for_its_thread_does(
    seconds: int, limit: int
) -> None:
    calls = itertools.count()

    def clock() -> Ran:
        return Ran(next(calls) * seconds * 10**9, 0)

    def job(reading: Reading) -> None:
        reading.unsure = True

    gate = Gate(most=9, cores=2, clock=clock)
    async with running_pool(4, gate) as pool:
        await read(Disk(pool), job)
    assert gate.useful == limit


async def test_as_many_threads_read_as_the_gate_says_after_it_has_changed_too() -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def held(reading: Reading, *, waited: bool) -> None:
        reading.waited = waited
        begun.release()
        go_on.acquire()

    gate = Gate(most=4, cores=1, clock=lambda: None)
    async with running_pool(6, gate) as pool:
        disk = Disk(pool)
        for waited, limit in ((True, 4), (False, 1), (True, 4)):
            for _ in range(4):
                await read(disk, partial(noted, waited=waited))
            assert gate.useful == limit
            jobs = [asyncio.create_task(read(disk, partial(held, waited=waited))) for _ in range(9)]
            for _ in range(limit):
                await asyncio.to_thread(begun.acquire)
            assert not begun.acquire(blocking=False)
            go_on.release(9)
            await asyncio.gather(*jobs)
            for _ in range(9 - limit):
                begun.acquire()


async def test_a_gate_that_narrows_ends_readers_while_others_wait() -> None:
    begun, order = threading.Semaphore(0), itertools.count()
    crowded = itertools.count()  # each look at the clock finds that much more of waiting
    # One for each round: a second read must not take what the first of another needs.
    first, second = threading.Event(), threading.Event()

    def job(_: Reading) -> None:
        event = first if next(order) < 4 else second
        begun.release()
        event.wait()

    gate = Gate(most=4, cores=4, clock=lambda: Ran(0, next(crowded)))
    async with running_pool(4, gate) as pool:
        disk = Disk(pool)
        reads = [asyncio.create_task(read(disk, job)) for _ in range(9)]
        try:
            for _ in range(4):
                await asyncio.to_thread(begun.acquire)
            first.set()  # they have waited for a processor, so that two go on
            await asyncio.gather(*reads[:4])
            for _ in range(2):
                await asyncio.to_thread(begun.acquire)
            assert gate.useful == 2
            assert not begun.acquire(blocking=False)
        finally:
            first.set()
            second.set()
        await asyncio.gather(*reads)


async def test_readers_that_have_all_threads_let_others_have_a_turn() -> None:
    order: list[str] = []
    async with running_pool(1, Gate(most=1, cores=1)) as pool:
        disk, go_on = Disk(pool), threading.Event()
        first = asyncio.create_task(read(disk, lambda _: go_on.wait()))
        reads = [asyncio.create_task(read(disk, lambda _: order.append("read"))) for _ in range(5)]
        await asyncio.sleep(0)
        other = asyncio.create_task(disk.call(partial(order.append, "other")))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(first, other, *reads)
    assert "read" in order[order.index("other") :]


async def test_a_read_that_fails_or_never_begins_leaves_its_place() -> None:
    def fail(_: Reading) -> None:
        raise OSError(errno.EIO, "I/O error")

    gate = Gate(most=1, cores=1)
    async with running_pool(4, gate) as pool:
        disk = Disk(pool)
        for _ in range(3):
            with pytest.raises(OSError, match="I/O error"):
                await read(disk, fail)
        jobs = [asyncio.create_task(read(disk, lambda _: 7)) for _ in range(3)]
        await asyncio.sleep(0)
        jobs[1].cancel()
        done = await asyncio.gather(*jobs, return_exceptions=True)
        assert [done[0], done[2]] == [7, 7]
        assert gate.useful == 1
        assert await read(disk, lambda _: 7) == 7


async def test_an_error_of_a_read_holds_on_to_nothing() -> None:
    buffer = bytearray(10)

    def fail(_: Reading, view: memoryview) -> None:
        raise OSError(errno.EIO, f"no {len(view)} bytes")

    async with running_pool(1) as pool:
        gc.disable()
        try:
            with pytest.raises(OSError, match="no 10 bytes"):
                await read(Disk(pool), partial(fail, view=memoryview(buffer)))
            assert (
                await read(Disk(pool), lambda _: 7) == 7
            )  # the thread is done with the one before
            buffer.clear()  # fails where a view is left
        finally:
            gc.enable()


async def test_a_read_that_no_thread_can_take_is_an_error_and_not_kept() -> None:
    gate = Gate(most=2, cores=2)
    async with running_pool(1, gate) as pool:
        pass
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shut down"):
            await read(Disk(pool), lambda _: 7)
    assert repr(gate) == "<Gate 1.00: 0 working, 0 waiting>"


# --- as many threads as are allowed


class Times:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("share", "rest"), [(0.1, 4.0), (0.25, 1.0), (0.5, 0.0), (0.98, 0.0)])
async def test_below_one_processor_each_job_is_followed_by_a_rest(
    share: float, rest: float
) -> None:
    """Of two processors, on a clock that only jobs and looks at it move."""
    times, worked, step = Times(), 0.01, 0.001
    ends: list[float] = []

    def now() -> float:
        times.now += step
        return times.now

    def job() -> None:
        ends.append(times.now)
        times.now += worked
        ends.append(times.now)

    gate = Gate(most=1, cores=2, now=now)
    gate.allowed = share
    async with running_pool(2, gate) as pool:
        both = [asyncio.wrap_future(pool.submit(job)) for _ in range(2)]
        await asyncio.gather(*both)
    assert rest * worked <= ends[2] - ends[1] < rest * (worked + 2 * step) + 6 * step


async def test_as_many_work_at_a_time_as_there_are_places_for() -> None:
    gate = Gate(most=4, cores=4)
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def job() -> None:
        begun.release()
        go_on.acquire()

    async with running_pool(4, gate) as pool:
        gate.allowed = 0.3
        done = [asyncio.wrap_future(pool.submit(job)) for _ in range(4)]
        await asyncio.to_thread(begun.acquire)
        assert not begun.acquire(blocking=False)
        gate.allowed = 0.6
        await asyncio.to_thread(begun.acquire)
        assert not begun.acquire(blocking=False)
        gate.allowed = 1
        for _ in range(2):
            await asyncio.to_thread(begun.acquire)
        go_on.release(4)
        await asyncio.gather(*done)
    assert repr(gate) == "<Gate 1.00: 0 working, 0 waiting>"


async def test_the_gate_is_one_for_all_pools_and_calls_of_the_file_system_pass_it() -> None:
    gate = Gate(most=4, cores=2)
    gate.allowed = 0.5
    go_on, ran = threading.Event(), threading.Event()
    async with running_pool(2, gate) as reads, running_pool(2, gate) as kernels:
        held = asyncio.wrap_future(kernels.submit(go_on.wait))
        waiting = asyncio.create_task(read(Disk(reads), lambda _: ran.set()))
        assert await Disk(reads).call(lambda: 7) == 7
        assert not ran.is_set()
        go_on.set()
        await asyncio.gather(held, waiting)


async def test_a_rest_ends_when_full_speed_is_wanted() -> None:
    times = Times()
    gate = Gate(most=1, cores=1, now=times)
    gate.allowed = 0.5

    def job() -> int:
        times.now += 1.0  # a rest on a clock that stands still: for ever
        return 7

    async with running_pool(2, gate) as pool:
        assert await asyncio.wrap_future(pool.submit(job)) == 7
        second = pool.submit(lambda: 8)
        gate.allowed = 1
        assert await asyncio.wrap_future(second) == 8


async def test_a_job_that_fails_gives_its_place_back() -> None:
    gate = Gate(most=1, cores=1)
    gate.allowed = 0.9

    def fail() -> None:
        raise OSError("no")

    async with running_pool(1, gate) as pool:
        for _ in range(3):
            with pytest.raises(OSError, match="no"):
                await asyncio.wrap_future(pool.submit(fail))
        assert await asyncio.wrap_future(pool.submit(lambda: 7)) == 7


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_a_share_that_makes_no_sense_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="at most 1"):
        Gate(most=1, cores=1).allowed = share


async def test_a_read_that_waits_for_its_turn_can_be_taken_back() -> None:
    gate = Gate(most=4, cores=1, clock=lambda: None)
    gate.allowed = 0.9
    held, go_on = threading.Event(), threading.Event()
    ran: list[int] = []

    def hold(_: Reading) -> None:
        held.set()
        go_on.wait()

    async with running_pool(4, gate) as pool:
        disk = Disk(pool)
        first = asyncio.ensure_future(read(disk, hold))
        await asyncio.to_thread(held.wait)
        others = [
            asyncio.ensure_future(read(disk, lambda _, n=n: ran.append(n)))  # type: ignore[misc]
            for n in range(3)
        ]
        await asyncio.sleep(0)
        for other in others:
            other.cancel()
        await asyncio.wait(others)
        assert not first.done()
        go_on.set()
        await first
    assert not ran


# --- threads that there are too few of


async def test_reads_that_wait_where_the_last_thread_is_lost_fail_and_are_not_cancelled() -> None:
    """Else a task group would take them for well done."""
    reached = False

    def start(thread: threading.Thread) -> None:
        if reached:
            raise RuntimeError("can't start new thread")
        thread.start()

    go_on = threading.Event()
    pool = WorkerPool(1, name="test", gate=Gate(most=1, cores=1), start=start)
    pool.submit(int).result()
    reached = True
    disk = Disk(pool, seconds=0.02)
    reads = [asyncio.create_task(read(disk, lambda _: go_on.wait())) for _ in range(4)]
    outcomes = await asyncio.gather(*reads, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == ["StalledError"] + [
        "RuntimeError"
    ] * 3
    go_on.set()
    disk.close()
    pool.shutdown()
