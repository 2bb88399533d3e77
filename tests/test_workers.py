"""Threads that can be given up on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import pytest

from asyncloader._threads.patience import Errand, Patience, Pulse, StalledError
from asyncloader._threads.pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

Side: TypeAlias = "Callable[[WorkerPool], Callable[[threading.Thread], object]]"


def replace(pool: WorkerPool, thread: threading.Thread) -> None:
    """Have another thread take a thread's place."""
    if pool.strike_off(thread):
        pool.start()


def nothing() -> None:
    """Do nothing."""


@pytest.fixture
def side() -> Iterator[Side]:
    """Give what replaces threads elsewhere: starting one means waiting for it."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(nothing).result()
        yield lambda pool: lambda thread: executor.submit(replace, pool, thread)


def pool_of(size: int) -> WorkerPool:
    return WorkerPool(size, name="test", initializer=nothing)


@contextlib.asynccontextmanager
async def running_pool(size: int) -> AsyncIterator[WorkerPool]:
    pool = pool_of(size)
    await asyncio.to_thread(pool.start)
    try:
        yield pool
    finally:
        await asyncio.to_thread(pool.shutdown)


def test_jobs_are_run_by_a_few_threads_and_return_or_raise() -> None:
    begun: list[None] = []
    with WorkerPool(3, name="test", initializer=partial(begun.append, None)) as pool:
        results = [pool.submit(divmod, number, 7) for number in range(50)]
        wrong = pool.submit(divmod, 1, 0)
        assert [one.result() for one in results] == [divmod(number, 7) for number in range(50)]
        with pytest.raises(ZeroDivisionError):
            wrong.result()
        assert repr(pool) == "<WorkerPool 'test': 3 of 3 threads>"
    assert len(begun) == 3


def test_all_threads_can_be_started_at_once() -> None:
    with pool_of(4) as pool:
        pool.start()
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
    pool.start()
    assert repr(pool) == "<WorkerPool 'test': 0 of 1 threads>"


def test_a_job_that_is_cancelled_before_it_begins_is_not_run() -> None:
    with pool_of(1) as pool:
        gate, ran = threading.Event(), threading.Event()
        pool.submit(gate.wait)
        waiting = pool.submit(ran.set)
        assert waiting.cancel()
        gate.set()
    assert not ran.is_set()


def test_a_thread_that_does_not_come_back_is_replaced_and_not_waited_for() -> None:
    pool = pool_of(1)
    gate, ended = threading.Event(), threading.Event()
    stuck: list[threading.Thread] = []
    begun = threading.Event()

    def wait() -> None:
        stuck.append(threading.current_thread())
        begun.set()
        gate.wait()
        ended.set()

    pool.submit(wait)
    begun.wait()
    replace(pool, stuck[0])
    replace(pool, stuck[0])  # once is enough
    other = pool.submit(threading.current_thread).result()
    assert other is not stuck[0]
    pool.shutdown()  # returns
    assert not ended.is_set()
    gate.set()
    stuck[0].join()
    assert ended.is_set()


def test_a_thread_that_comes_back_just_before_it_is_replaced_does_one_more_job_at_most() -> None:
    for _ in range(50):
        pool = pool_of(1)
        thread = pool.submit(threading.current_thread).result()
        replace(pool, thread)
        assert pool.submit(int, "7").result() == 7
        pool.shutdown()
        thread.join()


async def test_an_errand_that_ends_in_time_is_not_given_up(side: Side) -> None:
    async with running_pool(2) as pool:
        patience = Patience(60, replace=side(pool))
        errand = Errand(partial(int, "7"))
        pool.submit(errand.run)
        assert await patience.wait_for(errand) == 7
        wrong = Errand(partial(int, "x"))
        pool.submit(wrong.run)
        with pytest.raises(ValueError, match="invalid literal"):
            await patience.wait_for(wrong)
        assert repr(patience) == "<Patience 60 s: 0 under way, 0 lost>"
        patience.close()


async def test_an_errand_that_takes_too_long_is_given_up_and_its_result_is_late(side: Side) -> None:
    gate, late = threading.Event(), threading.Event()
    slow: list[str] = []
    async with running_pool(1) as pool:
        patience = Patience(0.05, replace=side(pool))
        errand = Errand(gate.wait, late=lambda _: late.set())
        pool.submit(errand.run)
        with pytest.raises(StalledError, match=r"no answer from the storage for 0\.05 seconds"):
            await patience.wait_for(errand, on_slow=partial(slow.append, "slow"))
        assert (slow, patience.lost) == (["slow"], 1)
        # There is a thread for it.
        assert await patience.run(pool, partial(int, "7")) == 7
        assert not late.is_set()
        gate.set()
        await asyncio.to_thread(late.wait)
        patience.close()


async def test_who_is_slow_is_waited_for_but_keeps_no_other_waiting(side: Side) -> None:
    gate, slow = threading.Event(), asyncio.Event()
    clock = itertools.count(step=0.4)  # each look comes so much later
    async with running_pool(1) as pool:
        patience = Patience(None, replace=side(pool), clock=lambda: next(clock))
        errand = Errand(gate.wait, label="a file")
        pool.submit(errand.run)
        waiting = asyncio.create_task(patience.wait_for(errand, on_slow=slow.set))
        await slow.wait()
        assert await patience.run(pool, partial(int, "7")) == 7
        assert not waiting.done()
        assert patience.under_way() == ["a file"]
        gate.set()
        assert await waiting
        assert patience.lost == 0
        patience.close()


async def test_time_in_which_nobody_looked_does_not_count(side: Side) -> None:
    """The process was stopped, or its event loop was busy; the disk may have answered at once."""
    gate, slow = threading.Event(), asyncio.Event()
    clock = itertools.count(step=1000)
    async with running_pool(1) as pool:
        patience = Patience(4, replace=side(pool), clock=lambda: next(clock))
        errand = Errand(gate.wait)
        pool.submit(errand.run)
        waiting = asyncio.create_task(patience.wait_for(errand, on_slow=slow.set))
        await slow.wait()  # after three looks, not at the first
        assert errand.waited < 4
        gate.set()
        assert await waiting
        patience.close()


def test_an_errand_of_several_calls_is_waited_for_call_by_call() -> None:
    pulse = Pulse()
    errand = Errand(threading.get_ident, pulse=pulse)
    assert errand.passed(1) == 0  # nobody has begun
    errand.thread = threading.current_thread()
    assert errand.passed(1) == 1
    assert errand.passed(1) == 2
    pulse.beat()
    assert errand.passed(1) == 1
    assert errand.passed(1) == 2


async def test_an_errand_that_nobody_has_begun_is_not_given_up(side: Side) -> None:
    """It waits for others, who may be given up on; then its turn comes."""
    gate = threading.Event()
    async with running_pool(1) as pool:
        patience = Patience(0.03, replace=side(pool))
        stuck, behind = Errand(gate.wait), Errand(partial(int, "7"))
        pool.submit(stuck.run)
        pool.submit(behind.run)
        first = asyncio.create_task(patience.wait_for(stuck))
        assert await patience.wait_for(behind) == 7
        with pytest.raises(StalledError):
            await first
        gate.set()
        patience.close()


async def test_an_error_that_comes_too_late_is_of_no_interest(side: Side) -> None:
    gate, ended = threading.Event(), threading.Event()

    def fail() -> None:
        gate.wait()
        ended.set()
        raise ValueError("nobody hears this")

    async with running_pool(1) as pool:
        patience = Patience(0.02, replace=side(pool))
        errand = Errand(fail)
        running = pool.submit(errand.run)
        with pytest.raises(StalledError):
            await patience.wait_for(errand)
        gate.set()
        await asyncio.wrap_future(running)
        assert ended.is_set()
        patience.close()


async def test_what_hangs_is_given_up_though_its_thread_cannot_be_replaced() -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, facts: told.append(facts))
    gate = threading.Event()
    async with running_pool(1) as pool:
        patience = Patience(0.02, replace=fail)
        with pytest.raises(StalledError):
            await patience.run(pool, gate.wait)
        gate.set()
        patience.close()
    assert [str(facts["exception"]) for facts in told] == ["can't start new thread"]


async def test_who_waits_for_ever_does(side: Side) -> None:
    gate = threading.Event()
    async with running_pool(1) as pool:
        patience = Patience(None)
        errand = Errand(gate.wait)
        pool.submit(errand.run)
        waiting = asyncio.create_task(patience.wait_for(errand))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        gate.set()
        assert await waiting


def test_a_pool_that_has_lost_a_thread_and_gets_no_other_goes_on_with_those_it_has() -> None:
    limit = Limit()
    pool = WorkerPool(2, name="test", initializer=nothing, start=limit.start)
    pool.start()
    threads = list(pool._threads)
    limit.reached = True
    replace(pool, threads[0])
    assert pool.submit(int, "7").result() == 7
    pool.shutdown()


def test_a_pool_that_has_no_thread_at_all_says_so_to_those_who_wait() -> None:
    limit = Limit()
    pool = WorkerPool(1, name="test", initializer=nothing, start=limit.start)
    gate = waiting_at_a_gate(pool)
    behind = pool.submit(int, "7")
    [thread] = pool._threads
    limit.reached = True
    with pytest.raises(RuntimeError, match="can't start new thread"):
        replace(pool, thread)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        behind.result()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        pool.submit(int, "7")
    limit.reached = False
    assert pool.submit(int, "7").result() == 7
    gate.set()
    pool.shutdown()


def test_a_thread_that_is_struck_off_while_a_pool_shuts_down_is_not_waited_for() -> None:
    pool = pool_of(1)
    gate = waiting_at_a_gate(pool)
    [thread] = pool._threads
    closing = threading.Thread(target=pool.shutdown)
    closing.start()
    pool.strike_off(thread)
    closing.join()
    gate.set()
    thread.join()


def waiting_at_a_gate(pool: WorkerPool) -> threading.Event:
    """Have a thread of a pool wait, and return what lets it go on."""
    gate, begun = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait()

    pool.submit(wait)
    begun.wait()
    return gate


class Limit:
    """Starts threads, or none, as where a limit has been reached."""

    def __init__(self) -> None:
        self.reached = False

    def start(self, thread: threading.Thread) -> None:
        if self.reached:
            raise RuntimeError("can't start new thread")
        thread.start()
