"""Stands in for a trainer: commits a version of the model to a run folder every so many seconds.

python -m examples.serve.writer RUN --every 20 --ids 1000000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from itertools import count

import torch
import uvloop

from asyncloader import CheckpointNotFoundError, Saver
from asyncloader.runs import aversions
from examples.serve.model import build, fill, name_of, number_of, tower

KEPT = 4
"""Versions that stay."""

_AT_ONCE = 1 << 16


async def write(run: str, *, every: float, ids: int) -> None:
    """Commit versions for ever, numbered on from the last one that is there."""
    loop = asyncio.get_running_loop()
    tables, _ = build()
    for version in count(await _last(run) + 1):
        began = loop.time()
        for first in range(0, ids, _AT_ONCE):
            fill(tables, version, range(first, min(first + _AT_ONCE, ids)))
            await asyncio.sleep(0)  # may be told to stop here
        # As RecIS's trainer does: the newest version is the last line of the list beside it.
        path, tensors = f"{run}/{name_of(version)}", tower(version)
        await Saver.to(path, tables, tensors, layout="run", max_keep=KEPT).asave()
        await asyncio.sleep(max(began + every - loop.time(), 0))


async def _last(run: str) -> int:
    """Return the number of the newest version; 0 if there is none."""
    try:
        found = await aversions(run)
    except CheckpointNotFoundError:
        return 0
    return max((number_of(one.name) for one in found if one.name[1:].isdecimal()), default=0)


async def write_until_told(run: str, *, every: float, ids: int, attached: bool) -> None:
    """Write until a signal comes.

    Args:
        run: The run folder, or its URL.
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
    parser.add_argument("run", help="the run folder, made if need be; or its URL")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two versions")
    parser.add_argument("--ids", type=int, default=1_000_000, help="of each of two tables")
    parser.add_argument("--attached", action="store_true", help="end when stdin does")
    given = parser.parse_args()
    # A trainer has a machine of its own; this one must not slow down the service.
    os.nice(10)
    torch.set_num_threads(1)
    uvloop.run(
        write_until_told(given.run, every=given.every, ids=given.ids, attached=given.attached)
    )


if __name__ == "__main__":
    main()
