"""Measures a load and its yardstick in turn."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, TypeVar

import torch

from asyncloader._memory import zeros

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

T = TypeVar("T")


def alternate(
    benchmark: BenchmarkFixture,
    *,
    rounds: int,
    fresh: int,
    raw: Callable[[], float],
    prepare: Callable[[], T],
    load: Callable[[T], object],
    check: Callable[[T], None],
) -> tuple[list[float], list[float]]:
    """Read and load in turn, once to warm up and then `rounds` times.

    Args:
        benchmark: pytest-benchmark's fixture.
        rounds: How often.
        fresh: Bytes of fresh memory that either of the two takes.
        raw: Reads the same bytes, and returns the seconds that took.
        prepare: Makes the destination.
        load: Loads into it; this is what is timed.
        check: Fails if the destination is not what it should be.

    Returns:
        Seconds of every load, and of every read.
    """
    loads: list[float] = []
    raws: list[float] = []

    def setup() -> tuple[tuple[list[T]], dict[str, object]]:
        fault_in(fresh)
        raws.append(raw())
        held = [prepare()]
        gc.collect()  # or what earlier rounds left behind is cleared away within this one
        fault_in(fresh)
        return (held,), {}

    def timed(held: list[T]) -> list[T]:
        start = time.perf_counter()
        load(held[0])
        loads.append(time.perf_counter() - start)
        return held

    def teardown(held: list[T]) -> None:
        check(held.pop())  # the only reference: its memory is free for the next round

    last: list[T] = benchmark.pedantic(  # type: ignore[no-untyped-call]
        timed, setup=setup, teardown=teardown, rounds=rounds, warmup_rounds=1, iterations=1
    )
    if benchmark.disabled:
        teardown(last)
        return loads, raws
    return loads[1:], raws[1:]


def fault_in(size: int) -> None:
    """Take so many bytes of fresh memory, touch them, and give them back.

    A virtual machine may give memory that has been free for some seconds back to its host. Then
    whoever takes it first pays for its return, ten times the price of reading a page into it.
    """
    if size:
        zeros((size,), torch.uint8).fill_(1)
