"""The async planner asks threads for pure work as seldom as it can."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from asyncloader import ReadOptions
from asyncloader._loading.load import Load
from asyncloader._loading.opening import open_session
from asyncloader._loading.planner import Planner, identity
from asyncloader._loading.progress import Meter, Tracer
from tests.oracle import write_checkpoint
from tests.support import data, rows_in, table_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader._planning.targets import LoadInfo
    from asyncloader._threads.pool import Threads

T = TypeVar("T")
CONTENT = data([5, -6, 7], exp_avg=1)


class Counting(Executor):
    """Counts the jobs that it passes on."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.jobs = 0

    def submit(self, job: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        self.jobs += 1
        return self.inner.submit(job, *args, **kwargs)


@dataclass
class CountingThreads:
    """Stands for the threads of a load."""

    kernels: Counting
    reads: Executor
    kernel_count: int


async def jobs_before_the_first_byte(
    path: Path, filter_func: Callable[[LoadInfo], LoadInfo]
) -> int:
    write_checkpoint(path, {"t": CONTENT}, {"w": torch.ones(3), "v": torch.ones(2)}, writers=2)
    tables, tensors = {"t": table_for(CONTENT)}, {"w": torch.zeros(3), "v": torch.zeros(2)}
    planner = Planner(
        tables=tables,
        tensors=tensors,
        filter_func=filter_func,
        strict=True,
        cast=None,
        tracer=Tracer(None),
    )
    async with open_session(str(path), ReadOptions()) as session:
        real = session.threads
        counting = Counting(real.kernels)
        threads = CountingThreads(counting, real.reads, real.kernel_count)
        counted = replace(session, threads=cast("Threads", cast("Any", threads)))
        plan, into = await planner.plan(counted)
        load = Load(counted, plan, into, tables, meter=Meter(0))
        await load.prepare()
        load.abort()
    assert rows_in(tables["t"]) == {}
    return counting.jobs


async def test_pure_work_is_handed_to_a_thread_three_times_before_the_first_byte(
    tmp_path: Path,
) -> None:
    """Choosing, planning, making room. Each more would be two turns of a busy event loop."""
    assert await jobs_before_the_first_byte(tmp_path, identity) == 3


async def test_a_filter_asks_for_three_more(tmp_path: Path) -> None:
    assert await jobs_before_the_first_byte(tmp_path, lambda info: info) == 6
