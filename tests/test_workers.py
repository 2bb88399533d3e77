"""Threads that can be given up on, and how long they are waited for."""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from functools import partial

import numpy as np
import pytest

from asyncloader._threads.call import Call, Reading, StalledError
from asyncloader._threads.disk import Disk
from asyncloader._threads.gate import Gate
from asyncloader._threads.pool import WorkerPool
from tests.support import running_pool


def pool_of(size: int) -> WorkerPool:
    return WorkerPool(size, name="test")


def test_jobs_are_run_by_a_few_threads_and_return_or_raise() -> None:
    begun: list[None] = []
    with WorkerPool(3, name="test", initializer=partial(begun.append, None)) as pool:
        all_of_them = threading.Barrier(3)
        for one in [pool.submit(all_of_them.wait) for _ in range(3)]:
            one.result()
        results = [pool.submit(divmod, number, 7) for number in range(50)]
        wrong = pool.submit(divmod, 1, 0)
        assert [one.result() for one in results] == [divmod(number, 7) for number in range(50)]
        with pytest.raises(ZeroDivisionError):
            wrong.result()
        assert repr(pool) == "<WorkerPool 'test': 3 of 3 threads>"
    assert len(begun) == 3


def test_all_threads_can_be_started_at_once() -> None:
    with pool_of(4) as pool:
        together = threading.Barrier(4)
        for one in [pool.submit(together.wait) for _ in range(4)]:
            one.result()


def test_jobs_of_a_pool_that_shuts_down_are_done_and_no_more_are_taken() -> None:
    pool = pool_of(1)
    gate = threading.Event()
    pool.submit(gate.wait)
    last = pool.submit(int, "7")
    gate.set()
    pool.shutdown()
    assert last.result() == 7
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(int)
    assert repr(pool) == "<WorkerPool 'test': 0 of 1 threads>"


def test_a_result_that_comes_too_late_may_fail_to_be_put_away() -> None:
    """As closing a file does whose disk is gone: the thread goes on."""
    begun, gate = threading.Event(), threading.Event()

    def read() -> bool:
        begun.set()
        return gate.wait()

    def close(_: object) -> None:
        raise OSError(107, "Transport endpoint is not connected")

    with pool_of(1) as pool:
        call = Call(read, late=close)
        pool.put(call)
        begun.wait()
        assert call.give_up(1)
        gate.set()
        assert pool.submit(int, "7").result() == 7


def test_a_job_that_is_cancelled_before_it_begins_is_not_run() -> None:
    with pool_of(1) as pool:
        gate, ran = threading.Event(), threading.Event()
        pool.submit(gate.wait)
        waiting = pool.submit(ran.set)
        assert waiting.cancel()
        gate.set()
    assert not ran.is_set()


class Held:
    """A call whose thread waits until it is let go on."""

    def __init__(self, pool: WorkerPool) -> None:
        self.go_on, self.begun = threading.Event(), threading.Event()
        self.call = Call(self._wait)
        pool.put(self.call)
        self.begun.wait()
        assert self.call.thread is not None
        self.thread = self.call.thread

    def _wait(self) -> None:
        self.begun.set()
        self.go_on.wait()

    def end(self) -> None:
        self.go_on.set()
        self.thread.join()


class Limit:
    """Starts threads, or none, as where a limit has been reached."""

    def __init__(self) -> None:
        self.reached = False

    def start(self, thread: threading.Thread) -> None:
        if self.reached:
            raise RuntimeError("can't start new thread")
        thread.start()


def test_a_thread_that_does_not_come_back_is_replaced_and_not_waited_for() -> None:
    pool = pool_of(1)
    held = Held(pool)
    pool.replace(held.call)
    pool.replace(held.call)  # once is enough
    other = pool.submit(threading.current_thread).result()
    assert other is not held.thread
    pool.shutdown()  # returns
    assert not held.call.is_over
    held.end()
    assert held.call.is_over


def test_a_thread_that_comes_back_just_before_it_is_replaced_stays() -> None:
    for _ in range(50):
        pool = pool_of(1)
        call = Call(threading.current_thread)
        pool.put(call)
        thread = call.future.result()
        pool.replace(call)
        assert pool.submit(threading.current_thread).result() is thread
        pool.shutdown()
        assert not thread.is_alive()


def test_a_pool_that_has_lost_a_thread_and_gets_no_other_goes_on_with_those_it_has() -> None:
    limit = Limit()
    pool = WorkerPool(2, name="test", start=limit.start)
    both = threading.Barrier(2)
    for one in [pool.submit(both.wait) for _ in range(2)]:
        one.result()
    held = Held(pool)
    limit.reached = True
    pool.replace(held.call)
    assert pool.submit(int, "7").result() == 7
    held.end()
    pool.shutdown()


def test_a_pool_that_has_no_thread_at_all_says_so_to_those_that_wait() -> None:
    limit = Limit()
    pool = WorkerPool(1, name="test", start=limit.start)
    held = Held(pool)
    behind = pool.submit(int, "7")
    limit.reached = True
    pool.replace(held.call)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        behind.result()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        pool.submit(int, "7").result()
    limit.reached = False
    assert pool.submit(int, "7").result() == 7
    held.end()
    pool.shutdown()


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_a_pool_goes_on_after_a_thread_could_not_be_started(kind: type[Exception]) -> None:
    """Python raises either where the system has no room for a thread."""
    failures = [kind("no thread")]

    def start(thread: threading.Thread) -> None:
        if failures:
            raise failures.pop()
        thread.start()

    with WorkerPool(1, name="test", start=start) as pool:
        with pytest.raises(kind, match="no thread"):
            pool.submit(int).result()
        assert pool.submit(int, "7").result() == 7


def test_a_call_that_waits_at_the_gate_fails_where_its_pool_gets_no_thread() -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    gate, begun, go = Gate(most=2, cores=2), threading.Event(), threading.Event()
    gate.allowed = 0.5  # one at a time

    def hold() -> None:
        begun.set()
        go.wait()

    with (
        WorkerPool(1, name="reads", gate=gate) as reads,
        WorkerPool(1, name="kernels", gate=gate, start=no_thread) as kernels,
    ):
        held = reads.submit(hold)
        begun.wait()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            kernels.submit(int).result(timeout=30)
        go.set()
        held.result()


def test_a_call_that_is_withdrawn_lets_go_of_its_memory() -> None:
    memory = np.zeros(8, np.uint8)
    alive = weakref.ref(memory)
    reading = Reading("file", 0, [memory.data])
    call = Call(int, reading=reading, label=reading)
    del memory, reading
    call.withdraw()
    assert alive() is None


def test_a_job_that_no_thread_can_take_does_not_run_later() -> None:
    limit, ran = Limit(), threading.Event()
    limit.reached = True
    pool = WorkerPool(1, name="test", start=limit.start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        pool.submit(ran.set).result()
    limit.reached = False
    assert pool.submit(int, "7").result() == 7
    pool.shutdown()
    assert not ran.is_set()


def test_a_thread_that_is_given_up_on_while_a_pool_shuts_down_is_not_waited_for() -> None:
    pool = pool_of(1)
    held = Held(pool)
    closing = threading.Thread(target=pool.shutdown)
    closing.start()
    pool.replace(held.call)
    closing.join()
    held.end()


# --- the disk


async def test_a_call_that_ends_in_time_is_not_given_up() -> None:
    async with running_pool(2) as pool:
        disk = Disk(pool, seconds=60)
        assert await disk.call(partial(int, "7")) == 7
        with pytest.raises(ValueError, match="invalid literal"):
            await disk.call(partial(int, "x"))
        assert repr(disk) == "<Disk 60 s: 0 under way, 0 lost>"
        disk.close()


async def test_a_call_that_takes_too_long_is_given_up_and_its_result_is_late() -> None:
    go_on, late = threading.Event(), threading.Event()
    async with running_pool(1) as pool:
        disk = Disk(pool, seconds=0.05)
        with pytest.raises(StalledError, match=r"no answer from the storage for 0\.05 seconds"):
            await disk.call(go_on.wait, late=lambda _: late.set())
        assert disk.lost == 1
        # There is a thread for it.
        assert await disk.call(partial(int, "7")) == 7
        assert not late.is_set()
        go_on.set()
        await asyncio.to_thread(late.wait)
        disk.close()


async def test_a_result_that_comes_when_its_caller_was_cancelled_is_late_too() -> None:
    begun, go_on = asyncio.Event(), threading.Event()
    late: list[int] = []
    loop = asyncio.get_running_loop()

    def job() -> int:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        return 7

    async with running_pool(1) as pool:
        disk = Disk(pool)
        call = asyncio.ensure_future(disk.call(job, late=late.append))
        await begun.wait()
        call.cancel()
        loop.call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await call
        assert late == [7]
        disk.close()


async def test_a_slow_call_is_waited_for_but_keeps_no_other_waiting() -> None:
    go_on = threading.Event()
    clock = itertools.count(step=0.4)  # each look comes so much later
    async with running_pool(1) as pool:
        disk = Disk(pool, clock=lambda: next(clock))
        waiting = asyncio.create_task(disk.call(go_on.wait, label="a file"))
        await asyncio.sleep(0)
        assert await disk.call(partial(int, "7")) == 7  # on another thread
        assert not waiting.done()
        assert disk.under_way() == ["a file"]
        go_on.set()
        assert await waiting
        assert disk.lost == 0
        disk.close()


async def test_time_in_which_nobody_looked_does_not_count() -> None:
    """The process was stopped, or its event loop was busy; the disk may have answered at once."""
    go_on = threading.Event()
    clock = itertools.count(step=1000)
    async with running_pool(1) as pool:
        disk = Disk(pool, seconds=4, clock=lambda: next(clock))
        waiting = asyncio.create_task(disk.call(go_on.wait))
        await asyncio.sleep(0)
        # Its thread is replaced after three looks, and not given up at the first.
        assert await disk.call(partial(int, "7")) == 7
        assert disk.lost == 0
        go_on.set()
        assert await waiting
        disk.close()


def test_a_call_of_several_reads_is_waited_for_read_by_read() -> None:
    reading = Reading("a file")
    call = Call(threading.get_ident, reading=reading)
    assert call.passed(1) == 0  # no thread has begun
    call.thread = threading.current_thread()
    assert call.passed(1) == 1
    assert call.passed(1) == 2
    reading.begin(7, [memoryview(bytearray(3))])
    assert call.passed(1) == 1
    assert call.passed(1) == 2
    assert str(reading) == "a file: bytes [7, 10)"


async def test_a_call_that_no_thread_has_begun_is_not_given_up() -> None:
    """It waits for others, which may be given up; then its turn comes."""
    go_on = threading.Event()
    async with running_pool(1) as pool:
        disk = Disk(pool, seconds=0.03)
        first = asyncio.create_task(disk.call(go_on.wait))
        await asyncio.sleep(0)
        assert await disk.call(partial(int, "7")) == 7
        with pytest.raises(StalledError):
            await first
        go_on.set()
        disk.close()


async def test_an_error_that_comes_too_late_is_of_no_interest() -> None:
    go_on = threading.Event()
    threads: list[threading.Thread] = []

    def fail() -> None:
        threads.append(threading.current_thread())
        go_on.wait()
        raise ValueError("no caller hears this")

    async with running_pool(1) as pool:
        disk = Disk(pool, seconds=0.02)
        with pytest.raises(StalledError):
            await disk.call(fail)
        go_on.set()
        await asyncio.to_thread(threads[0].join)
        disk.close()


async def test_a_call_that_hangs_is_given_up_though_its_thread_cannot_be_replaced() -> None:
    limit, go_on = Limit(), threading.Event()
    pool = WorkerPool(1, name="test", start=limit.start)
    pool.submit(int).result()
    limit.reached = True
    disk = Disk(pool, seconds=0.02)
    with pytest.raises(StalledError):
        await disk.call(go_on.wait)
    go_on.set()
    disk.close()
    pool.shutdown()


async def test_a_disk_without_a_time_out_waits_for_ever() -> None:
    go_on = threading.Event()
    async with running_pool(1) as pool:
        disk = Disk(pool)
        waiting = asyncio.create_task(disk.call(go_on.wait))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        go_on.set()
        assert await waiting
        disk.close()


async def test_a_disk_is_an_executor_whose_jobs_are_given_up_as_well() -> None:
    go_on = threading.Event()
    loop = asyncio.get_running_loop()
    async with running_pool(1) as pool:
        disk = Disk(pool, seconds=0.05)
        executor = disk.executor("a small file")
        assert await loop.run_in_executor(executor, int, "7") == 7
        stuck = loop.run_in_executor(executor, go_on.wait)
        await asyncio.sleep(0)
        assert disk.under_way() in ([], ["a small file"])
        with pytest.raises(StalledError):
            await stuck
        assert disk.lost == 1
        assert await loop.run_in_executor(executor, int, "8") == 8
        assert not executor.submit(int).exception()
        go_on.set()
        disk.close()
