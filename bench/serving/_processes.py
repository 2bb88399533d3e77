"""Processes that serve and that ask, and what is said between them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

RATE = 200
DEADLINE = 60.0


@contextlib.contextmanager
def serving(run: Path, arguments: Sequence[str], *, within: Sequence[str] = ()) -> Iterator[str]:
    """Serve a run folder from a process of its own; yield the URL.

    Args:
        run: The run folder.
        arguments: Further ones of `_server`.
        within: A command that runs the one that follows it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("-m", "bench.serving._server", str(run), "--port", str(port), *arguments)
    with subprocess.Popen(
        [*within, sys.executable, *command], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().strip() == "serving"
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def asking(url: str, seconds: float, *arguments: str) -> Callable[[], Any]:
    """Ask from a process of its own; return what waits for the answers.

    Args:
        url: What to ask.
        seconds: How long.
        arguments: Further ones of `_client`.
    """
    how = ("--rate", str(RATE), "--seconds", str(seconds), *arguments)
    command = ("-m", "bench.serving._client", url, *how)
    client = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    out: list[str] = []
    reading = threading.Thread(target=lambda: out.append(client.communicate()[0]))
    reading.start()

    def answers() -> Any:  # noqa: ANN401  # JSON
        reading.join()
        return json.loads(out[0])

    return answers


def fetch(url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, data=body)  # noqa: S310  # our own server
    with urllib.request.urlopen(request, timeout=DEADLINE) as answer:  # noqa: S310
        return bytes(answer.read())
