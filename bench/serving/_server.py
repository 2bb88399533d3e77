"""The service of the examples, and other ways to take in a new version, as a process.

python -m bench.serving._server RUN --port 8000 --how contract
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import uvicorn
from safetensors.torch import load_file

from examples.serve import model
from examples.serve.app import Server, create_app

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_LOOP_LAG = 0.005


def add_load(app: FastAPI, file: Path, *, blocking: bool) -> None:
    """Let a request take in as many bytes as is done without us: load a file, copy it into place.

    What answers does not look there: no index is made of it, and nobody minds that it is half old
    and half new meanwhile.
    """
    memory = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}

    def load() -> float:
        start = time.perf_counter()
        for name, tensor in load_file(file).items():
            memory[name].copy_(tensor)
        return time.perf_counter() - start

    @app.post("/load")
    async def take_in() -> float:
        return load() if blocking else await asyncio.to_thread(load)


def main() -> None:
    """Read the command line, and serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run folder to follow")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--full-speed", action="store_true", help="take no care of the event loop")
    parser.add_argument("--file", type=Path, help="load this instead, when told to")
    parser.add_argument("--blocking", action="store_true", help="on the event loop")
    parser.add_argument("--disk", action="store_true", help="leave rows on the disk")
    parser.add_argument("--cache", type=int, default=0, help="MiB for hot rows")
    parser.add_argument("--width", type=int, default=model.WIDTH, help="of a row, in floats")
    given = parser.parse_args()
    model.WIDTH = given.width
    torch.set_num_threads(1)
    app = create_app(
        given.run,
        keep=1,
        poll=0.2,
        max_loop_lag=None if given.full_speed else MAX_LOOP_LAG,
        disk=given.disk,
        cache_bytes=given.cache << 20,
    )
    if given.file is not None:
        add_load(app, given.file, blocking=given.blocking)
    config = uvicorn.Config(
        app, port=given.port, loop="uvloop", log_level="warning", access_log=False
    )
    service = app.state.service
    Server(config, feed=service.feed, started=lambda: print("serving", flush=True)).run()


if __name__ == "__main__":
    main()
