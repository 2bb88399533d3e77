"""Asks at fixed times, however long answers take, and notes when each came.

    python -m bench.serving._client URL --rate 200 --seconds 30

Latency counts from when a request was due, not from when it could be sent: a server that stops for
a second makes two hundred requests late, not one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvloop

_LATEST = 30.0
_AHEAD = 0.5
_ITEMS = 50


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    due: float,
    items: list[int],
    late: list[float],
) -> bool:
    """Send one request when it is due, note how late its answer is; say whether there was one."""
    body = {"user": random.randrange(1000), "items": items}
    number = len(late)
    late.append(0.0)
    await asyncio.sleep(due - time.perf_counter())
    try:
        async with session.post(url, json=body) as answer:
            await answer.read()
            good = bool(answer.status == 200)
    except (aiohttp.ClientError, TimeoutError):
        good = False
    late[number] = time.perf_counter() - due
    return good


async def ask_at(
    url: str, *, rate: float, seconds: float, ids: np.ndarray[Any, Any] | None
) -> dict[str, object]:
    """Ask for so many seconds; for these items, 50 at a time, or any of the first 100,000.

    Returns:
        When the first request was due, how late the answers were, in seconds and in the order of
        their requests, and how many failed.
    """
    count = int(rate * seconds)
    wanted = [
        random.sample(range(100_000), _ITEMS)
        if ids is None
        else ids[_ITEMS * number : _ITEMS * (number + 1)].tolist()
        for number in range(count)
    ]
    late: list[float] = []
    timeout = aiohttp.ClientTimeout(total=_LATEST)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begin = time.perf_counter() + _AHEAD
        began = time.time() + _AHEAD
        asked = [
            asyncio.ensure_future(ask(session, url, begin + number / rate, wanted[number], late))
            for number in range(count)
        ]
        good = await asyncio.gather(*asked)
    return {"began": began, "late": late, "failed": len(good) - sum(good)}


def main() -> None:
    """Read the command line, ask, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--ids", type=Path, help="of items, int64, one after the other")
    given = parser.parse_args()
    ids = None if given.ids is None else np.fromfile(given.ids, np.int64)
    asked = ask_at(given.url, rate=given.rate, seconds=given.seconds, ids=ids)
    print(json.dumps(uvloop.run(asked)))


if __name__ == "__main__":
    main()
