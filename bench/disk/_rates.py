"""How many rows a second come, from whoever gives them; and what the device could do."""

from __future__ import annotations

import asyncio
import resource
import shutil
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    import torch

DEPTH = 64
BLOCK = 512


@dataclass(slots=True)
class Rate:
    """What came of asking for a while."""

    rows: int = 0
    seconds: float = 0.0
    processor: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return self.rows / self.seconds

    @property
    def micros(self) -> float:
        """Processor time a row, of all threads, in microseconds."""
        return self.processor / self.rows * 1e6

    @property
    def p50(self) -> float:
        return statistics.median(self.latencies)


def device(file: Path, seconds: float) -> float:
    """Return how many blocks a second fio reads at random places of a file, past the page cache."""
    if (fio := shutil.which("fio")) is None:
        pytest.skip("the yardstick is fio: apt-get install fio")
    done = subprocess.run(
        [
            fio, "--name=rows", f"--filename={file}", "--rw=randread", f"--bs={BLOCK}",
            "--direct=1", "--ioengine=libaio", f"--iodepth={DEPTH}", f"--runtime={seconds}",
            "--time_based", "--readonly", "--minimal",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split(";")[7])


async def asked(
    ask: Callable[[torch.Tensor], Awaitable[object]],
    batches: Iterator[torch.Tensor],
    *,
    seconds: float,
    at_once: int = 1,
) -> Rate:
    """Ask for batches of ids, some at a time, for so long."""
    rate = Rate()
    start, before = time.perf_counter(), _processor()

    async def one() -> None:
        while not rate.rows or time.perf_counter() - start < seconds:
            ids = next(batches)
            began = time.perf_counter()
            await ask(ids)
            rate.latencies.append(time.perf_counter() - began)
            rate.rows += len(ids)

    await asyncio.gather(*(one() for _ in range(at_once)))
    rate.seconds, rate.processor = time.perf_counter() - start, _processor() - before
    return rate


def asked_by_threads(
    ask: Callable[[torch.Tensor], object],
    batches: Iterator[torch.Tensor],
    *,
    seconds: float,
    at_once: int = 1,
) -> Rate:
    """Do the same with what blocks, each asker on a thread of its own."""
    rate, lock = Rate(), threading.Lock()
    start, before = time.perf_counter(), _processor()

    def one() -> None:
        while not rate.rows or time.perf_counter() - start < seconds:
            with lock:
                ids = next(batches)
            began = time.perf_counter()
            ask(ids)
            with lock:
                rate.latencies.append(time.perf_counter() - began)
                rate.rows += len(ids)

    threads = [threading.Thread(target=one) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate.seconds, rate.processor = time.perf_counter() - start, _processor() - before
    return rate


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
