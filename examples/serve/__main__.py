"""Starts a writer and a service that follows it, and stops both on Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, NoReturn

import torch
import uvicorn
import uvloop

from asyncloader import CheckpointNotFoundError, latest
from examples.serve.app import Server, create_app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

HOST = "127.0.0.1"
_PATIENCE = 10.0
_GRACE = 5
"""Seconds that requests under way may take when the service is to stop."""

_LOOK_EVERY = 0.05


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.serve",
        description="Serve a made-up model while new versions of it come in.",
    )
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two versions")
    parser.add_argument("--ids", type=int, default=1_000_000, help="of each of two tables")
    parser.add_argument("--poll", type=float, default=1.0, help="seconds between looks for one")
    parser.add_argument("--disk", action="store_true", help="leave the rows of tables on the disk")
    parser.add_argument("--cache", type=int, default=16, help="MiB for rows of --disk; 0 for none")
    parser.add_argument("--run", help="the run folder, or its URL; without: one that is removed")
    return parser.parse_args()


def main() -> int:
    """Write and serve until told to stop, and return the exit code."""
    given = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    # A request is too small to be shared out: on two processors, which loads are busy with as well,
    # two threads took eight times as long for it as one.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    try:
        listener = socket.create_server((HOST, given.port))
    except OSError as error:
        print(f"port {given.port} cannot be had: {error.strerror}", file=sys.stderr)
        return 1
    with listener, run_folder(given.run) as run, writing(run, given.every, given.ids) as writer:
        wait_for_a_version(run, writer)
        app = create_app(run, poll=given.poll, disk=given.disk, cache_bytes=given.cache << 20)
        server = server_of(app, listener)
        uvloop.run(server.serve(sockets=[listener]))
    return 0 if server.started else 1


def server_of(app: FastAPI, listener: socket.socket) -> Server:
    """Return what serves an app."""
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", timeout_graceful_shutdown=_GRACE
    )
    address = f"http://{HOST}:{listener.getsockname()[1]}"
    return Server(
        config,
        feed=app.state.service.feed,
        started=lambda: print(f"Serving on {address}", flush=True),
    )


def leave(*_: object) -> NoReturn:
    """Unwind all blocks; nothing interrupts that a second time."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


@contextlib.contextmanager
def run_folder(chosen: str | None) -> Iterator[str]:
    """Yield the folder or URL that was chosen, or a folder that is removed at the end."""
    if chosen is not None:
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="asyncloader-serve-") as folder:
        yield folder


@contextlib.contextmanager
def writing(run: str, every: float, ids: int) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process write versions. It ends with the block, and also if this process is killed."""
    command = [sys.executable, "-m", "examples.serve.writer", run, "--attached"]
    sizes = [f"--every={every}", f"--ids={ids}"]
    writer = subprocess.Popen([*command, *sizes], stdin=subprocess.PIPE)
    try:
        yield writer
    finally:
        try:
            writer.communicate(timeout=_PATIENCE)  # closes its stdin
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()


def wait_for_a_version(run: str, writer: subprocess.Popen[bytes]) -> None:
    """Return when the run folder holds a version."""
    print("Waiting for the first version", flush=True)
    while True:
        try:
            latest(run)
        except CheckpointNotFoundError:
            if writer.poll() is not None:
                sys.exit(f"the writer has failed with exit code {writer.returncode}")
            time.sleep(_LOOK_EVERY)
        else:
            return


if __name__ == "__main__":
    sys.exit(main())
