"""Small files, read whole by aiofiles on threads that may be given up on."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import pytest

from asyncloader import CheckpointError
from asyncloader._storage.looks import Looks
from asyncloader._storage.small_files import read_file
from asyncloader._threads.disk import Disk
from tests.hanging_disk import NotMountableError, hanging_disk
from tests.support import nothing_left_behind, open_files, running_pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


T = TypeVar("T")


class Steps(Executor):
    """A thread that does something else before a step: the open, the read, the close of a file."""

    def __init__(self, before: Callable[[int], object]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._before = before
        self.count = 0

    def submit(self, job: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        number = self.count
        self.count += 1

        def run() -> T:
            self._before(number)
            return job(*args, **kwargs)

        return self._thread.submit(run)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._thread.shutdown(wait, cancel_futures=cancel_futures)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    return path


def nothing(_: int) -> None:
    pass


@pytest.mark.parametrize(
    ("last", "expected"),
    [(-1, b"0123456789"), (3, b"789"), (10, b"0123456789"), (99, b"0123456789"), (0, b"")],
)
async def test_a_file_is_read_whole_or_its_end(file: Path, last: int, expected: bytes) -> None:
    with Steps(nothing) as steps:
        assert await read_file(file, steps, last=last) == expected


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
async def test_what_is_no_file_is_not_opened(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "odd")
    with Steps(nothing) as steps, pytest.raises(OSError, match="not a regular file"):
        await read_file(tmp_path / "odd", steps)


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_file_is_closed_where_a_step_fails(file: Path, failing: int) -> None:
    def fail(number: int) -> None:
        if number == failing:
            raise OSError(5, "Input/output error")

    broken = pytest.raises(OSError, match="Input/output error")
    with nothing_left_behind(), Steps(fail) as steps, broken:
        await read_file(file, steps)


@pytest.mark.both_loops
@pytest.mark.parametrize("step", [0, 1, 2])
async def test_a_caller_that_is_cancelled_waits_until_the_file_is_closed(
    file: Path, step: int
) -> None:
    loop = asyncio.get_running_loop()
    begun, gate = asyncio.Event(), threading.Event()

    def hold(number: int) -> None:
        if number == step:
            loop.call_soon_threadsafe(begun.set)
            gate.wait()

    with nothing_left_behind(), Steps(hold) as steps:
        reading = asyncio.ensure_future(read_file(file, steps))
        await begun.wait()
        reading.cancel()
        await asyncio.sleep(0)
        assert not reading.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert steps.count == 3
        assert str(file) not in open_files()


@pytest.fixture
def mounts(tmp_path: Path) -> tuple[Path, Path]:
    folder, at = tmp_path / "folder", tmp_path / "disk"
    for path in (folder, at):
        path.mkdir()
    return folder, at


@pytest.mark.parametrize("step", ["open", "read"])
async def test_a_disk_that_gives_no_answer_is_given_up(
    mounts: tuple[Path, Path], step: str
) -> None:
    """The file is closed when the thread comes back."""
    folder, at = mounts
    (folder / "checkpoint").write_bytes(b"ckpt_1\n")
    try:
        with hanging_disk(folder, at) as disk, Looks("a run", stall_timeout=0.2) as looks:
            assert await looks.read(looks.folder(str(at)), "checkpoint", last=100) == b"ckpt_1\n"
            (folder / "list").write_bytes(b"ckpt_1\n")
            disk.hang("list", on=step)
            with pytest.raises(CheckpointError, match="a run: cannot be looked at: no answer"):
                await looks.read(looks.folder(str(at)), "list", last=100)
    except NotMountableError as error:
        pytest.skip(str(error))


async def test_the_threads_of_a_disk_read_a_file(file: Path) -> None:
    async with running_pool(2) as pool:
        disk = Disk(pool, seconds=60)
        assert await read_file(file, disk.executor(file)) == b"0123456789"
        assert disk.is_idle
        disk.close()


async def test_looks_that_are_over_say_so(file: Path) -> None:
    with Looks("a run", stall_timeout=60) as looks:
        assert await looks(file.stat) == file.stat()
    with pytest.raises(RuntimeError, match="a run': left"):
        await looks.read(looks.folder(str(file.parent)), file.name, last=1)
