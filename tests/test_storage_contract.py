"""What `Storage` promises, of all that promise it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from asyncloader._storage.joined import JoinedStorage
from asyncloader._storage.local import LocalStorage
from asyncloader._storage.protocol import ThreadedStorage, fill, read_exactly
from asyncloader._storage.retrying import RetryingStorage, ThreadedRetryingStorage
from asyncloader._threads.disk import Disk
from tests.faulty import FaultyStorage, raises
from tests.storages import Through
from tests.support import MemoryStorage, open_files, running_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from asyncloader._storage.protocol import ReadInto, Storage
    from tests.faulty import Read

pytestmark = pytest.mark.both_loops

CONTENT = bytes(range(251)) * 300


def for_a_moment() -> Callable[[Read], None]:
    """Return a fault: the first read at each place fails."""
    places: set[int] = set()

    def at(read: Read) -> bool:
        is_first = read.offset not in places
        places.add(read.offset)
        return is_first

    return raises(OSError(5, "for a moment"), at=at)


async def no_pause(_: float) -> None:
    await asyncio.sleep(0)


def retrying(inner: ThreadedStorage) -> ThreadedStorage:
    return ThreadedRetryingStorage(inner, sleep=no_pause, rest=lambda _: None)


class OneOfTwo(Through):
    """A folder among two that are joined."""

    async def size(self, name: str, /) -> int:
        return await self.inner.size(f"a/b/{name}")

    async def changed(self, names: Sequence[str], /) -> list[str]:
        found = await self.inner.changed([f"a/b/{name}" for name in names])
        return [name.removeprefix("a/b/") for name in found]

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        return await self.inner.readinto(f"a/b/{name}", offset, views)

    async def on_thread(self, name: str, job: Callable[[ReadInto], Any], /) -> Any:  # noqa: ANN401  # the job's
        return await self.inner.on_thread(f"a/b/{name}", job)


def joined(local: LocalStorage) -> ThreadedStorage:
    other = MemoryStorage({"f": b"another", "h": b"here alone"})
    return OneOfTwo(JoinedStorage({"a/b": local, "a": other}, "both"))


BACKENDS: dict[str, Callable[[LocalStorage], Storage]] = {
    "local": lambda local: local,
    "retrying": retrying,
    "short reads": lambda local: FaultyStorage(local, at_most=1000),
    "failing for a moment": lambda local: retrying(FaultyStorage(local, for_a_moment())),
    "joined": joined,
    "memory": lambda _: RetryingStorage(MemoryStorage({"f": CONTENT, "g": b""})),
}


@pytest.fixture(params=BACKENDS)
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    (tmp_path / "f").write_bytes(CONTENT)
    (tmp_path / "g").write_bytes(b"")
    async with running_pool(3) as pool, LocalStorage(tmp_path, disk=Disk(pool)) as local:
        yield BACKENDS[request.param](local)
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]


async def test_a_file_has_a_size(storage: Storage) -> None:
    assert await storage.size("f") == len(CONTENT)
    assert await storage.size("g") == 0
    assert storage.location
    assert storage.lost == 0


async def test_a_file_that_is_missing_is_an_error_of_the_system(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError, match="No such file"):
        await storage.size("none")


@pytest.mark.parametrize("offset", [0, 1, 20_000, len(CONTENT) - 50])
async def test_a_range_scatters_into_views(storage: Storage, offset: int) -> None:
    parts = [bytearray(7), bytearray(0), bytearray(40), bytearray(3)]
    await read_exactly(storage, "f", offset, [memoryview(part) for part in parts])
    assert b"".join(parts) == CONTENT[offset : offset + 50]


async def test_all_of_a_file_can_be_read_at_once(storage: Storage) -> None:
    whole = bytearray(len(CONTENT))
    await read_exactly(storage, "f", 0, [memoryview(whole)])
    assert whole == CONTENT


async def test_beyond_the_end_there_is_nothing(storage: Storage) -> None:
    buffer = bytearray(10)
    assert await storage.readinto("f", len(CONTENT), [memoryview(buffer)]) == 0
    assert await storage.readinto("f", len(CONTENT) - 4, [memoryview(buffer)]) == 4
    assert buffer[:4] == CONTENT[-4:]
    assert await storage.readinto("g", 0, [memoryview(buffer)]) == 0


async def test_nothing_has_changed_that_is_as_it_was(storage: Storage) -> None:
    await storage.size("f")
    assert await storage.changed(["f"]) == []
    assert await storage.changed([]) == []


async def test_any_number_may_read_at_once(storage: Storage) -> None:
    parts = [bytearray(100) for _ in range(50)]
    async with asyncio.TaskGroup() as group:
        for number, part in enumerate(parts):
            offset = number * 1400
            group.create_task(read_exactly(storage, "f", offset, [memoryview(part)]))
    assert parts == [CONTENT[number * 1400 :][:100] for number in range(50)]


async def test_who_is_cancelled_leaves_buffers_alone_from_then_on(storage: Storage) -> None:
    for steps in range(8):
        buffer = bytearray(50_000)
        read = partial(read_exactly, storage, "f", 0, [memoryview(buffer)])
        task = asyncio.ensure_future(read())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        held = bytes(buffer)
        await storage.size("f")
        assert buffer == held
        assert task.cancelled() or buffer == CONTENT[:50_000]


async def test_a_thread_that_is_lent_reads_the_same(storage: Storage) -> None:
    if not isinstance(storage, ThreadedStorage):
        pytest.skip("lends no thread")

    def job(read: ReadInto) -> bytes:
        buffer = bytearray(3000)
        fill(read, "f", 20_000, memoryview(buffer))
        return bytes(buffer)

    assert await storage.on_thread("f", job) == CONTENT[20_000:23_000]
