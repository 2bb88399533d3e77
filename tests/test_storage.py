from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import ReadError
from asyncloader._storage.descriptors import Descriptors
from asyncloader._storage.local import LocalStorage
from asyncloader._storage.preadv import DirectReader, preadv
from asyncloader._storage.protocol import ThreadedStorage, fill, read_exactly, read_small, read_text
from asyncloader._storage.retrying import ThreadedRetryingStorage
from asyncloader._threads.call import Reading
from asyncloader._threads.disk import Disk
from asyncloader._threads.gate import Gate
from asyncloader._threads.pool import WorkerPool
from tests.support import open_files, running_pool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncloader._storage.protocol import ReadInto

pytestmark = pytest.mark.both_loops

CONTENT = bytes(range(256)) * 128
DEEP = 1 + (20 << 10)
"""Where bytes are that opening has not read along; they are those of `CONTENT` again."""


@pytest.fixture
def disk() -> Iterator[Disk]:
    with WorkerPool(4, name="test") as pool:
        yield Disk(pool)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        (tmp_path / f"f{number}").write_bytes(bytes([number]) + CONTENT)
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "f"
    path.write_bytes(random.Random(0).randbytes(50_001))
    return path


def opened(folder: Path) -> list[str]:
    return [name for name in open_files() if name.startswith(str(folder))]


@pytest.mark.parametrize("offset", [1, DEEP, DEEP - (4 << 10) - 10], ids=["start", "deep", "both"])
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
async def test_a_read_scatters_into_its_views(
    folder: Path, disk: Disk, offset: int, *, direct: bool
) -> None:
    first, second = bytearray(3), bytearray(5)
    async with LocalStorage(folder, disk=disk, direct_io=direct) as storage:
        views = [memoryview(first), memoryview(second)]
        assert await storage.readinto("f2", offset + 7, views) == 8
    assert first + second == CONTENT[offset - 1 + 7 :][:8]


async def test_only_the_first_read_gets_what_was_there_when_the_file_was_opened(
    folder: Path, disk: Disk
) -> None:
    async with LocalStorage(folder, disk=disk) as storage:
        await storage.size("f1")
        with (folder / "f1").open("r+b") as file:
            file.write(b"new")
        first, second = bytearray(3), bytearray(3)
        await storage.readinto("f1", 0, [memoryview(first)])
        await storage.readinto("f1", 0, [memoryview(second)])
    assert first == b"\1" + CONTENT[:2]
    assert second == b"new"


async def test_a_read_at_the_end_is_short_and_then_empty(folder: Path, disk: Disk) -> None:
    buffer = bytearray(10)
    async with LocalStorage(folder, disk=disk) as storage:
        size = await storage.size("f0")
        assert size == 1 + len(CONTENT)
        assert await storage.readinto("f0", size - 4, [memoryview(buffer)]) == 4
        assert buffer[:4] == CONTENT[-4:]
        assert await storage.readinto("f0", size, [memoryview(buffer)]) == 0


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
async def test_a_read_longer_than_one_step_is_whole(
    tmp_path: Path, disk: Disk, *, direct: bool
) -> None:
    data = os.urandom(9 << 20)
    (tmp_path / "big").write_bytes(data)
    buffer = bytearray(len(data) + 10)
    async with LocalStorage(tmp_path, disk=disk, direct_io=direct) as storage:
        assert await storage.readinto("big", 0, [memoryview(buffer)]) == len(data)
    assert buffer[: len(data)] == data


async def test_few_descriptors_serve_many_files(folder: Path, disk: Disk) -> None:
    async with LocalStorage(folder, disk=disk, descriptors=Descriptors(2)) as storage:

        async def first_byte(number: int) -> int:
            buffer = bytearray(1)
            await storage.readinto(f"f{number}", 0, [memoryview(buffer)])
            return buffer[0]

        for number in [0, 1, 2, 3, 4, 5, 0, 3]:
            assert await first_byte(number) == number
            assert len(opened(folder)) <= 2
        async with asyncio.TaskGroup() as group:
            many = [group.create_task(first_byte(number % 6)) for number in range(60)]
        assert [one.result() for one in many] == [number % 6 for number in range(60)]
    assert opened(folder) == []


async def test_readers_of_one_file_share_its_descriptor(folder: Path, disk: Disk) -> None:
    async with LocalStorage(folder, disk=disk) as storage:
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(storage.size("f1"))
        assert len(opened(folder)) == 1
        assert "1 open, 0 reading" in repr(storage)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.skipif(sys.platform == "win32", reason="has no FIFOs")
@pytest.mark.parametrize("make", [os.mkfifo, make_folder, make_loop, make_dangling])
async def test_only_regular_files_are_opened(tmp_path: Path, disk: Disk, make: object) -> None:
    make(tmp_path / "odd")  # type: ignore[operator]  # one of the above
    async with LocalStorage(tmp_path, disk=disk) as storage:
        with pytest.raises(OSError, match=r"regular file|symbolic link|[Nn]o such file|directory"):
            await storage.size("odd")
    assert opened(tmp_path) == []


async def test_a_missing_folder_is_told_from_a_missing_file(folder: Path, disk: Disk) -> None:
    for root, problem in ((folder / "x", "no such folder"), (folder / "f0", "not a folder")):
        async with LocalStorage(root, disk=disk) as storage:
            with pytest.raises((FileNotFoundError, NotADirectoryError), match=problem):
                await storage.size("index")
    async with LocalStorage(folder, disk=disk) as storage:
        with pytest.raises(FileNotFoundError, match="No such file"):
            await storage.size("index")


async def test_who_is_cancelled_while_opening_leaves_no_descriptor(
    folder: Path, disk: Disk
) -> None:
    async with LocalStorage(folder, disk=disk) as storage:
        task = asyncio.ensure_future(storage.size("f1"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert opened(folder) == []
        assert await storage.size("f1") == 1 + len(CONTENT)


class Stingy:
    """Gives at most a few bytes a call, and then maybe fails."""

    location = "here"
    lost = 0

    def __init__(self, content: bytes, at_most: int, error: OSError | None = None) -> None:
        self.content = content
        self.at_most = at_most
        self.error = error

    async def size(self, name: str, /) -> int:
        return len(self.content)

    async def changed(self, names: Sequence[str], /) -> list[str]:
        return []

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        if self.error and offset > len(self.content) // 2:
            raise self.error
        part = self.content[offset : offset + self.at_most]
        done = 0
        for view in views:
            piece = part[done : done + view.nbytes]
            view[: len(piece)] = piece
            done += len(piece)
        return done


@pytest.mark.parametrize("at_most", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("cuts", [(20,), (1, 19), (3, 4, 13), (5, 5, 5, 5)])
async def test_short_reads_are_gone_on_with(at_most: int, cuts: tuple[int, ...]) -> None:
    content = bytes(range(30))
    buffers = [bytearray(size) for size in cuts]
    await read_exactly(Stingy(content, at_most), "f", 4, [memoryview(b) for b in buffers])
    assert b"".join(buffers) == content[4:24]


async def test_a_file_that_ends_early_is_an_error_with_its_range() -> None:
    with pytest.raises(ReadError, match=r"f: bytes \[5, 25\): .* 15 bytes early"):
        await read_exactly(Stingy(bytes(10), 3), "f", 5, [memoryview(bytearray(20))])


async def test_what_the_storage_says_is_the_cause() -> None:
    fault = OSError(errno.EIO, "I/O error")
    with pytest.raises(ReadError, match=r"f: bytes \[0, 10\): .*I/O error") as caught:
        await read_exactly(Stingy(bytes(10), 3, fault), "f", 0, [memoryview(bytearray(10))])
    assert caught.value.__cause__ is fault


async def test_a_small_file_is_read_whole_and_a_large_one_refused() -> None:
    assert await read_small(Stingy(b"abcdefgh", 3), "f", limit=8) == b"abcdefgh"
    with pytest.raises(OSError, match="at most 7"):
        await read_small(Stingy(b"abcdefgh", 3), "f", limit=7)


async def test_a_read_of_what_is_in_memory_knows_that_it_did_not_wait(
    folder: Path, disk: Disk
) -> None:
    """And one that did not get everything at once waits for the rest, and knows that."""
    await asyncio.to_thread((folder / "f2").read_bytes)
    parts = [bytearray(3), bytearray(len(CONTENT) - 12)]

    def read() -> tuple[int, bool, int, bool]:
        fd = os.open(folder / "f2", os.O_RDONLY)
        try:
            first, late = Reading(), Reading()
            count = preadv(fd, [memoryview(part) for part in parts], 6, first)
            beyond = preadv(fd, [memoryview(bytearray(10))], len(CONTENT) - 3, late)
            return count, first.waited, beyond, late.waited
        finally:
            os.close(fd)

    count, waited, beyond, late = await asyncio.to_thread(read)
    assert count == len(CONTENT) - 9
    assert b"".join(parts) == CONTENT[5:-4]
    assert (beyond, late) == (4, True)
    if sys.platform == "linux":
        assert not waited


@pytest.mark.skipif(sys.platform != "linux", reason="has no O_DIRECT")
async def test_what_is_read_past_the_page_cache_was_opened_for_it(folder: Path, disk: Disk) -> None:
    async with LocalStorage(folder, disk=disk, direct_io=True) as storage:
        await storage.size("f1")
        [number] = [
            int(entry.name)
            for entry in Path("/proc/self/fd").iterdir()
            if entry.is_symlink() and entry.exists() and entry.resolve() == folder / "f1"
        ]
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT


async def test_large_reads_go_by_the_gate_and_take_back_what_has_not_begun(
    tmp_path: Path,
) -> None:
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    buffers = [bytearray(b"x" * (2 << 20)) for _ in range(8)]
    reads = GatedReads()
    async with (
        running_pool(4, Gate(most=1)) as pool,
        LocalStorage(tmp_path, disk=Disk(pool), preadv=reads) as storage,
    ):
        await storage.size("big")
        reads.arrived.acquire()
        reads.gate.clear()
        tasks = [
            asyncio.create_task(storage.readinto("big", DEEP, [memoryview(buffer)]))
            for buffer in buffers
        ]
        await asyncio.to_thread(reads.arrived.acquire)
        assert not reads.arrived.acquire(blocking=False)
        for task in tasks[1:]:
            task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [False] + [True] * 7
        reads.gate.set()
        assert await tasks[0] == 2 << 20
    assert [buffer[:1] for buffer in buffers] == [b"\0"] + [b"x"] * 7


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="has no O_DIRECT")
@given(data=st.data())
def test_a_direct_read_gives_what_a_plain_one_does(shared: Path, data: st.DataObject) -> None:
    size = shared.stat().st_size
    sizes = data.draw(st.lists(st.integers(0, 9000), max_size=8))
    offset = data.draw(st.integers(0, size + 10))
    fd = os.open(shared, os.O_RDONLY | os.O_DIRECT)
    plain = os.open(shared, os.O_RDONLY)
    try:
        both = [[memoryview(bytearray(size)) for size in sizes] for _ in range(2)]
        count = DirectReader(step=8 << 10).preadv(fd, both[0], offset, Reading())
        assert count == preadv(plain, both[1], offset, Reading())
        assert both[0] == both[1]
    finally:
        os.close(fd)
        os.close(plain)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="has no O_DIRECT")
def test_a_file_whose_system_refuses_a_direct_read_is_read_all_the_same(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "f").write_bytes(data)
    fd = os.open(tmp_path / "f", os.O_RDONLY | os.O_DIRECT)
    try:
        target = bytearray(len(data))
        reader, gate = DirectReader(block=1), threading.Barrier(4)

        def read(number: int) -> int:
            gate.wait()
            begin = 5 + number
            return reader.preadv(fd, [memoryview(target)[begin : begin + 100]], begin, Reading())

        with ThreadPoolExecutor(4) as together:  # all of them find out at the same time
            assert list(together.map(read, range(0, 400, 100))) == [100] * 4
        assert target[5:405] == data[5:405]
    finally:
        os.close(fd)


class GatedReads:
    """Reads files, but each thread waits at a gate first."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        self.done = 0

    def __call__(self, fd: int, views: Sequence[memoryview], offset: int, reading: Reading) -> int:
        self.arrived.release()
        self.gate.wait()
        count = preadv(fd, views, offset, reading)
        self.done += 1
        return count


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("size", [4, 1 << 20], ids=["small", "large"])
async def test_who_is_cancelled_while_reading_waits_until_nobody_writes_any_more(
    tmp_path: Path, disk: Disk, times: int, size: int
) -> None:
    (tmp_path / "f").write_bytes(CONTENT * 40)
    buffer, reads = bytearray(size), GatedReads()
    async with LocalStorage(tmp_path, disk=disk, preadv=reads) as storage:
        await storage.size("f")  # open
        reads.arrived.acquire()
        reads.gate.clear()
        reading = asyncio.create_task(storage.readinto("f", DEEP - 1, [memoryview(buffer)]))
        await asyncio.to_thread(reads.arrived.acquire)
        for _ in range(times):
            reading.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
        still_waiting = not reading.done()
        reads.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert still_waiting
        assert bytes(buffer[:4]) == CONTENT[:4]
    assert opened(tmp_path) == []


@pytest.mark.parametrize("size", [4, 1 << 20], ids=["small", "large"])
async def test_who_is_cancelled_before_a_thread_has_begun_waits_for_nobody(
    tmp_path: Path, size: int
) -> None:
    (tmp_path / "f").write_bytes(CONTENT * 40)
    buffer, reads = bytearray(size), GatedReads()
    async with (
        running_pool(1) as pool,
        LocalStorage(tmp_path, disk=Disk(pool), preadv=reads) as storage,
    ):
        await storage.size("f")
        busy = threading.Event()
        pool.submit(busy.wait)
        reading = asyncio.create_task(storage.readinto("f", DEEP - 1, [memoryview(buffer)]))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        busy.set()
    assert reads.done == 1  # when it was opened
    assert not any(buffer)


async def test_a_reader_that_is_cancelled_disturbs_no_other(folder: Path) -> None:
    buffers = [bytearray(4) for _ in range(4)]
    async with running_pool(1) as pool, LocalStorage(folder, disk=Disk(pool)) as storage:
        busy = threading.Event()
        pool.submit(busy.wait)
        readers = [
            asyncio.create_task(storage.readinto("f3", DEEP, [memoryview(buffer)]))
            for buffer in buffers
        ]
        await asyncio.sleep(0)
        readers[0].cancel()  # the one that is opening the file for all
        await asyncio.sleep(0)
        busy.set()
        results = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [4, 4, 4]
    assert {bytes(buffer) for buffer in buffers[1:]} == {CONTENT[:4]}
    assert opened(folder) == []


@pytest.mark.parametrize("max_open", [1, 2, 5])
async def test_whoever_comes_and_goes_reads_right_and_leaves_no_descriptor(
    folder: Path, disk: Disk, max_open: int
) -> None:
    rng = random.Random(max_open)

    async def use(storage: LocalStorage, number: int) -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if rng.randrange(3):
            assert await storage.size(f"f{number}") == 1 + len(CONTENT)
            return
        buffer, offset = bytearray(3), rng.choice([0, DEEP])
        assert await storage.readinto(f"f{number}", offset, [memoryview(buffer)]) == 3
        assert buffer == (CONTENT[:3] if offset else bytes([number]) + CONTENT[:2])

    for _ in range(10):
        async with LocalStorage(folder, disk=disk, descriptors=Descriptors(max_open)) as storage:
            users = [asyncio.create_task(use(storage, rng.randrange(6))) for _ in range(30)]
            for user in users:
                if not rng.randrange(5):
                    await asyncio.sleep(0)
                    user.cancel()
            results = await asyncio.gather(*users, return_exceptions=True)
            assert [result for result in results if isinstance(result, Exception)] == []
        assert opened(folder) == []


async def test_a_file_replaced_during_a_load_is_not_read_on(folder: Path, disk: Disk) -> None:
    async with LocalStorage(folder, disk=disk, descriptors=Descriptors(1)) as storage:
        await storage.size("f0")
        (folder / "new").write_bytes(b"other content")
        (folder / "new").rename(folder / "f0")
        assert await storage.size("f0") == 1 + len(CONTENT)  # the old one is still open
        await storage.size("f1")
        with pytest.raises(OSError, match="replaced"):
            await storage.size("f0")
    assert opened(folder) == []


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
async def test_many_views_are_filled_step_by_step(
    tmp_path: Path, disk: Disk, *, direct: bool
) -> None:
    data = os.urandom(11 << 20)
    (tmp_path / "big").write_bytes(data)
    buffers = [bytearray(size) for size in (3 << 20, 1, 5 << 20, 0, 3 << 20)]
    async with LocalStorage(tmp_path, disk=disk, direct_io=direct) as storage:
        count = await storage.readinto("big", 0, [memoryview(buffer) for buffer in buffers])
    assert count == len(data)
    assert b"".join(buffers)[: len(data)] == data


async def test_text_is_not_read_beyond_its_first_zero_byte() -> None:
    assert await read_text(Stingy(b"{ab}", 3), "f", 1, 2) == b"ab"
    with pytest.raises(ValueError, match="byte 3 is zero"):
        await read_text(Stingy(b"{ab\0}", 3), "f", 1, 4)


async def test_a_file_has_changed_once_it_is_another_one_or_gone(folder: Path, disk: Disk) -> None:
    async with LocalStorage(folder, disk=disk) as storage:
        await storage.size("f1")
        assert await storage.changed(["f1", "f2"]) == []
        (folder / "new").write_bytes((folder / "f1").read_bytes())
        (folder / "new").replace(folder / "f1")
        assert await storage.changed(["f1", "f2"]) == ["f1"]
        (folder / "f1").unlink()
        assert await storage.changed(["f2", "f1"]) == ["f1"]


async def test_a_thread_that_is_lent_reads_as_often_as_it_likes(folder: Path, disk: Disk) -> None:
    """And what it is lent for runs there, not on the event loop's thread."""

    def job(read: ReadInto) -> tuple[bytes, threading.Thread]:
        first, second = bytearray(3), bytearray(4)
        fill(read, "f3", 1, memoryview(first))
        fill(read, "f3", 11, memoryview(second))
        return bytes(first + second), threading.current_thread()

    async with LocalStorage(folder, disk=disk) as storage:
        assert isinstance(storage, ThreadedStorage)
        found, thread = await storage.on_thread("f3", job)
    assert found == CONTENT[:3] + CONTENT[10:14]
    assert thread is not threading.current_thread()
    assert not isinstance(Stingy(b"", 1), ThreadedStorage)


async def test_who_is_cancelled_waits_for_the_thread_that_is_lent(folder: Path, disk: Disk) -> None:
    started, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    done = []

    def job(_: ReadInto) -> None:
        loop.call_soon_threadsafe(started.set)
        go_on.wait()
        done.append(True)

    async with LocalStorage(folder, disk=disk) as storage:
        task = asyncio.ensure_future(storage.on_thread("f1", job))
        await started.wait()
        task.cancel()
        loop.call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == [True]
        with pytest.raises(FileNotFoundError, match="No such file"):
            await storage.on_thread("index", job)


@pytest.mark.parametrize("at_most", [1, 3, 100])
def test_a_thread_goes_on_with_short_reads_and_says_what_went_wrong(at_most: int) -> None:
    content = bytes(range(30))
    fault = OSError(errno.EIO, "I/O error")

    def read(offset: int, views: Sequence[memoryview]) -> int:
        if offset == 29:
            raise fault
        piece = content[offset : offset + at_most][: views[0].nbytes]
        views[0][: len(piece)] = piece
        return len(piece)

    buffer = bytearray(20)
    fill(read, "f", 4, memoryview(buffer))
    assert buffer == content[4:24]
    fill(read, "f", 4, memoryview(b""))
    with pytest.raises(ReadError, match=r"f: bytes \[30, 50\): .* 20 bytes early"):
        fill(read, "f", 30, memoryview(buffer))
    with pytest.raises(ReadError, match=r"f: bytes \[29, 49\): .*I/O error") as caught:
        fill(read, "f", 29, memoryview(buffer))
    assert caught.value.__cause__ is fault


async def test_a_read_takes_few_calls_until_the_system_reads(folder: Path, disk: Disk) -> None:
    """So that a reader of the code can hold them in mind; `stream` adds three."""
    depths: list[int] = []

    def spy(fd: int, views: Sequence[memoryview], offset: int, reading: Reading) -> int:
        if offset == DEEP:
            frame, calls = sys._getframe(), 0
            while frame.f_back is not None and frame.f_code.co_filename != threading.__file__:
                frame, calls = frame.f_back, calls + 1
            waiting: Any = task.get_coro()
            while waiting is not None and hasattr(waiting, "cr_await"):
                waiting, calls = waiting.cr_await, calls + 1
            depths.append(calls)
        return preadv(fd, views, offset, reading)

    async with LocalStorage(folder, disk=disk, preadv=spy) as local:
        storage = ThreadedRetryingStorage(local)
        buffer = memoryview(bytearray(100))
        task = asyncio.ensure_future(read_exactly(storage, "f1", DEEP, [buffer]))
        await task
    assert depths
    assert max(depths) <= 9
