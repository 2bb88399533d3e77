"""Servers in processes of their own: started, waited for, and ended with the tests."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")

HOST = "127.0.0.1"
PATIENCE = 30.0
"""Seconds for a server to start."""


class UnavailableError(Exception):
    """A server that this machine cannot have, and why."""


def free_port() -> int:
    """Find a port that is free now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def child(
    command: Sequence[str | os.PathLike[str]],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a process group of its own, which is killed at the end of the block.

    On Linux the command is killed when these tests are, too. Call it from a thread that lives as
    long as the server: that promise is about the thread.

    Args:
        command: The program and its arguments.
        log: The file that gets what it writes to standard error.
        environment: Variables besides those of this process.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*_dying_with_parent(), *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _dying_with_parent() -> list[str]:
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def first_line(process: subprocess.Popen[str], log: Path) -> str:
    """Wait for the first line that a server writes to standard output.

    Raises:
        RuntimeError: It has ended, or takes too long.
    """
    output: IO[str] | None = process.stdout
    assert output is not None
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        line = output.readline() if selector.select(PATIENCE) else ""
    if not line:
        raise RuntimeError(_said(process, log))
    return line.strip()


def until_it_answers(process: subprocess.Popen[str], port: int, log: Path) -> None:
    """Wait until a server takes connections.

    Raises:
        RuntimeError: It has ended, or takes too long.
    """
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        # An attempt costs next to nothing, but what starts needs the processor more.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
            break
    raise RuntimeError(_said(process, log))


def _said(process: subprocess.Popen[str], log: Path) -> str:
    code = process.poll()
    state = "does not answer" if code is None else f"has ended with {code}"
    return f"{process.args!r} {state}: {log.read_text(errors='replace')[-1500:]}"


@contextlib.contextmanager
def or_skip(server: contextlib.AbstractContextManager[T]) -> Iterator[T]:
    """Run a server, or skip the tests that want it."""
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(server)
        except UnavailableError as error:
            pytest.skip(str(error))
        yield started
