"""The yardstick: the same bytes, read by two plain threads that do nothing else."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

STEP = 8 << 20
THREADS = 2


def shards(path: Path) -> list[Path]:
    """Return the shard files of a checkpoint."""
    return sorted(path.glob("*.safetensors"))


def steps(files: Sequence[Path]) -> int:
    """Return how many reads take in all of these files."""
    return sum(-(-file.stat().st_size // STEP) for file in files)


def read_raw(files: Sequence[Path], memory: memoryview) -> float:
    """Read whole files into memory, and return the seconds that took.

    Memory shorter than the files, but at least one step, is filled over and over.
    """
    with contextlib.ExitStack() as stack:
        jobs = iter(list(_jobs(stack, files, memory)))
        threads = [threading.Thread(target=_read_all, args=(jobs,)) for _ in range(THREADS)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start


def _jobs(
    stack: contextlib.ExitStack, files: Sequence[Path], memory: memoryview
) -> Iterator[tuple[int, memoryview, int]]:
    """Yield descriptor, memory and offset of every read."""
    places = len(memory) // STEP
    number = 0
    for file in files:
        fd = stack.enter_context(file.open("rb", buffering=0)).fileno()
        size = file.stat().st_size
        for offset in range(0, size, STEP):
            start = number % places * STEP
            yield fd, memory[start : start + min(STEP, size - offset)], offset
            number += 1


def _read_all(jobs: Iterator[tuple[int, memoryview, int]]) -> None:
    for fd, view, offset in jobs:  # shared: one call of next() on a list's iterator is atomic
        done = 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                raise EOFError(f"descriptor {fd} ends at {offset + done}")
            done += count
