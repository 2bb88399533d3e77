"""Stands in for a trainer: commits a version of the model to a run folder every so many seconds.

python -m examples.serve.writer RUN --every 20 --ids 1000000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

import torch
import uvloop

from asyncloader import Saver
from examples.serve.model import build, fill, name_of, number_of, tower

KEPT = 4
"""Versions that stay on the disk."""

_AT_ONCE = 1 << 16


async def write(run: Path, *, every: float, ids: int) -> None:
    """Commit versions for ever, numbered on from the last one that is there."""
    loop = asyncio.get_running_loop()
    tables, _ = build()
    for version in count(max(map(_number, _versions(run)), default=0) + 1):
        began = loop.time()
        for first in range(0, ids, _AT_ONCE):
            fill(tables, version, range(first, min(first + _AT_ONCE, ids)))
            await asyncio.sleep(0)  # may be told to stop here
        # The folder counts as a checkpoint from the moment that its `index` is there.
        saver = Saver(path=run / name_of(version), hashtables=tables, tensors=tower(version))
        await saver.asave()
        remove_old(run)
        await asyncio.sleep(max(began + every - loop.time(), 0))


def remove_old(run: Path, kept: int = KEPT) -> None:
    """Remove all but the last versions; readers see each of them whole, or not at all."""
    for path in sorted(_versions(run), key=_number)[:-kept]:
        # Files that vanish one by one would look like damage. Who has them open reads on.
        hidden = path.rename(path.with_name(f".{path.name}"))
        shutil.rmtree(hidden)


def _versions(run: Path) -> list[Path]:
    return [path for path in run.glob("v*") if path.name[1:].isdecimal()]


def _number(path: Path) -> int:
    return number_of(path.name)


async def write_until_told(run: Path, *, every: float, ids: int, attached: bool) -> None:
    """Write until a signal comes.

    Args:
        run: The run folder.
        every: Seconds between two versions.
        ids: How many each table has.
        attached: End also when whoever holds the other end of stdin is gone.
    """
    loop = asyncio.get_running_loop()
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(write(run, every=every, ids=ids), name="write")
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, writing.cancel)
            if attached:
                loop.add_reader(sys.stdin.fileno(), writing.cancel)


def main() -> None:
    """Read the command line, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run folder, made if need be")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two versions")
    parser.add_argument("--ids", type=int, default=1_000_000, help="of each of two tables")
    parser.add_argument("--attached", action="store_true", help="end when stdin does")
    given = parser.parse_args()
    # A trainer has a machine of its own; this one must not slow down the service.
    os.nice(10)
    torch.set_num_threads(1)
    given.run.mkdir(parents=True, exist_ok=True)
    uvloop.run(
        write_until_told(given.run, every=given.every, ids=given.ids, attached=given.attached)
    )


if __name__ == "__main__":
    main()
