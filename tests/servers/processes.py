"""Processes of servers: free ports, a wait until they answer, an end that comes for certain."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PATIENCE = 60.0


class UnavailableError(Exception):
    """A server that this machine cannot have; says why."""


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(
    commands: Mapping[int, Sequence[str]], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run commands, by the port that each listens on, until the block is left.

    Raises:
        UnavailableError: If one ends, or does not answer.
    """
    started = []
    try:
        for command in commands.values():
            with log.open("ab") as out:
                started.append(
                    subprocess.Popen(
                        command,
                        stdout=out,
                        stderr=out,
                        env=None if env is None else {**os.environ, **env},
                        preexec_fn=_die_with_parent,  # noqa: PLW1509  # no threads yet
                    )
                )
        for port, process in zip(commands, started, strict=True):
            _wait_for(port, process, log)
        yield
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    text = log.read_text("utf-8", "replace")[-2000:]
    raise UnavailableError(f"no answer of {process.args!r} on port {port}: {text}")
