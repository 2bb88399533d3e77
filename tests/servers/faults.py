"""A proxy that does to the connections through it what a script says, and leaves the bytes alone.

It forwards TCP, so a request's Host header, and with it the signature, names this proxy and stays
valid: a store is opened with the endpoint of the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.servers.child import HOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_BLOCK = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one connection. Without arguments: nothing.

    Attributes:
        latency: Seconds before the first byte of the server's answer is passed on.
        bandwidth: Bytes a second that the server's answer may have.
        reset_at: The bytes of the server's answer after which the connection is reset.
        status: The status that the client gets without the server being asked.
        slow_close: Seconds for which the connection stays open after the server has closed it.
    """

    latency: float = 0.0
    bandwidth: float | None = None
    reset_at: int | None = None
    status: int | None = None
    slow_close: float = 0.0


@dataclass(slots=True)
class FaultyProxy:
    """The proxy, and how many connections it has taken."""

    port: int
    script: Callable[[int], Fault]
    counted: bytes = b""
    endpoint: str = ""
    connections: int = 0
    serving: set[asyncio.Task[None]] = field(default_factory=set)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward a connection meanwhile."""
        task = asyncio.ensure_future(self.serve(reader, writer))
        self.serving.add(task)
        task.add_done_callback(self.serving.discard)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        with contextlib.closing(writer), contextlib.suppress(EOFError, ConnectionError):
            begin = await reader.read(_BLOCK)
            fault = Fault()
            if self.counted in begin:
                fault = self.script(self.connections)
                self.connections += 1
            if fault.status is not None:
                head = f"HTTP/1.1 {fault.status} As told\r\nContent-Length: 0\r\n"
                writer.write(f"{head}Connection: close\r\n\r\n".encode())
                await writer.drain()
                return
            upstream, to_server = await asyncio.open_connection(HOST, self.port)
            with contextlib.closing(to_server):
                to_server.write(begin)
                asking = asyncio.create_task(_forward(reader, to_server))
                try:
                    await _answer(upstream, writer, fault)
                finally:
                    asking.cancel()
                    await asyncio.wait([asking])


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while block := await reader.read(_BLOCK):
            writer.write(block)
            await writer.drain()
        writer.write_eof()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
    passed = 0
    while block := await reader.read(_BLOCK):
        if passed == 0:
            await asyncio.sleep(fault.latency)
        if fault.reset_at is not None and passed + len(block) >= fault.reset_at:
            writer.write(block[: fault.reset_at - passed])
            await writer.drain()
            return
        passed += len(block)
        writer.write(block)
        await writer.drain()
        if fault.bandwidth is not None:
            await asyncio.sleep(len(block) / fault.bandwidth)
    await asyncio.sleep(fault.slow_close)


@contextlib.asynccontextmanager
async def faulty_proxy(
    port: int, script: Callable[[int], Fault], counted: bytes = b""
) -> AsyncIterator[FaultyProxy]:
    """Stand before the server at a port of this machine, on this loop.

    Args:
        port: The server's.
        script: Gives the fault of the connection of that number; the first is 0.
        counted: Connections whose first request does not hold this have no number, and no fault.
    """
    proxy = FaultyProxy(port, script, counted)
    server = await asyncio.start_server(proxy.accept, HOST, 0)
    proxy.endpoint = f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        for task in (left := list(proxy.serving)):  # of clients that have died, say
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
