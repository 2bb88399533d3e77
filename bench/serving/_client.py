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

import aiohttp
import uvloop

_LATEST = 30.0
_AHEAD = 0.5


async def ask(
    session: aiohttp.ClientSession, url: str, due: float, late: list[float], number: int
) -> bool:
    """Send one request when it is due, note how late its answer is; say whether there was one."""
    body = {"user": random.randrange(1000), "items": random.sample(range(100_000), 50)}
    await asyncio.sleep(due - time.perf_counter())
    try:
        async with session.post(url, json=body) as answer:
            await answer.read()
            good = bool(answer.status == 200)
    except (aiohttp.ClientError, TimeoutError):
        good = False
    late[number] = time.perf_counter() - due
    return good


async def ask_at(url: str, *, rate: float, seconds: float) -> dict[str, object]:
    """Ask for so many seconds.

    Returns:
        When the first request was due, how late the answers were, in seconds and in the order of
        their requests, and how many failed.
    """
    count = int(rate * seconds)
    late = [0.0] * count
    timeout = aiohttp.ClientTimeout(total=_LATEST)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begin = time.perf_counter() + _AHEAD
        began = time.time() + _AHEAD
        asked = [
            asyncio.ensure_future(ask(session, url, begin + number / rate, late, number))
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
    given = parser.parse_args()
    print(json.dumps(uvloop.run(ask_at(given.url, rate=given.rate, seconds=given.seconds))))


if __name__ == "__main__":
    main()
