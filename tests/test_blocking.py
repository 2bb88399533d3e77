from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from asyncloader import CheckpointNotFoundError, Loader
from asyncloader.streaming import run_blocking
from tests.oracle import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "c", {}, {"w": torch.arange(1000.0)})
    return tmp_path / "c"


def loads_right(checkpoint: Path) -> bool:
    tensor = torch.zeros(1000)
    report = Loader(checkpoint, tensors={"w": tensor}).load()
    return report.tensors == {"w": "loaded"} and bool((tensor == torch.arange(1000.0)).all())


def test_load_works_where_no_loop_runs(checkpoint: Path) -> None:
    before = threading.enumerate()
    assert loads_right(checkpoint)
    assert threading.enumerate() == before


async def test_load_works_within_a_running_loop(checkpoint: Path) -> None:
    before = threading.enumerate()
    assert loads_right(checkpoint)
    assert threading.enumerate() == before


def test_load_works_on_any_thread(checkpoint: Path) -> None:
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(loads_right(checkpoint))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 3


def test_a_load_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.enumerate()
    with pytest.raises(CheckpointNotFoundError):
        Loader(tmp_path).load()
    assert threading.enumerate() == before


async def test_a_load_that_fails_within_a_running_loop_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.enumerate()
    with pytest.raises(CheckpointNotFoundError):
        Loader(tmp_path).load()
    assert threading.enumerate() == before


async def test_the_private_loop_is_another_one_and_closed_afterwards() -> None:
    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    private = run_blocking(loop)
    assert private is not asyncio.get_running_loop()
    assert private.is_closed()


# Loads in tiny reads, which takes many seconds; says when it is at it, and who is left afterwards.
SCRIPT = """
    import asyncio, sys, threading
    import torch
    from asyncloader import Loader

    tensor = torch.zeros(4 << 20)

    def load():
        begun = lambda progress: print("loading", flush=True)
        Loader(sys.argv[1], tensors={"w": tensor}, chunk_bytes=128, progress=begun).load()

    async def in_a_loop():
        load()

    try:
        asyncio.run(in_a_loop()) if sys.argv[2] == "loop" else load()
    except KeyboardInterrupt:
        names = [thread.name for thread in threading.enumerate()]
        print("interrupted", names, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT to send")
@pytest.mark.parametrize("where", ["plain", "loop"])
def test_control_c_ends_a_load_and_its_threads(tmp_path: Path, where: str) -> None:
    write_checkpoint(tmp_path / "c", {}, {"w": torch.zeros(4 << 20)})
    script = textwrap.dedent(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "c"), where],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    assert out.splitlines()[-1] == "interrupted ['MainThread']"
