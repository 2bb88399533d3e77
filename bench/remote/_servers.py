"""What is loaded from and saved to: Swift and nginx, and a slow link before Swift."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.servers.child import HOST

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 64 << 10


class Link:
    """A rate that all connections share.

    Args:
        rate: Bytes a second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0

    async def pass_on(self, nbytes: int) -> None:
        """Wait until so many bytes have had their turn."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now - 0.01) + nbytes / self._rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


async def serve(port: int, latency: float, each: float, link: Link) -> None:
    """Forward connections to a port; print our own."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, to_server = await asyncio.open_connection(HOST, port)
        own = Link(each)

        async def ask() -> None:
            while block := await reader.read(_BLOCK):
                await asyncio.sleep(latency)  # a request, as a client sends no other meanwhile
                to_server.write(block)
                await to_server.drain()

        asking = asyncio.ensure_future(ask())
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while block := await upstream.read(_BLOCK):
                await asyncio.gather(own.pass_on(len(block)), link.pass_on(len(block)))
                writer.write(block)
                await writer.drain()
        asking.cancel()
        to_server.close()

    server = await asyncio.start_server(forward, HOST, 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def slow_link(port: int, *, latency: float, each: float, rate: float) -> Iterator[str]:
    """Stand before a server, in a process of its own; yield the endpoint.

    Args:
        port: The server's.
        latency: Seconds that each request takes more.
        each: Bytes a second of one connection.
        rate: Bytes a second of all.
    """
    command = [sys.executable, "-m", "bench.remote._servers", port, latency, each, rate]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None, "it is a pipe"
        yield f"http://{HOST}:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    given = sys.argv[1:]
    asyncio.run(serve(int(given[0]), float(given[1]), float(given[2]), Link(float(given[3]))))
