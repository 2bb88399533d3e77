"""Whatever a storage does to a load: it is right, or our error, and nothing is half-changed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import (
    AsyncLoaderError,
    CheckpointChangedError,
    CheckpointError,
    Loader,
    LoadTimeoutError,
    ReadError,
    ReadStalledError,
    Runtime,
    Saver,
)
from asyncloader._storage.retrying import RetryingStorage
from tests.faulty import FaultyStorage, Stuck, flips_a_bit, raises
from tests.forks import python
from tests.oracle import write_checkpoint
from tests.support import (
    MemoryStorage,
    data,
    debug_off,
    nothing_left_behind,
    poison,
    raw,
    rows_in,
    rows_on_disk,
    table_for,
    unchanged,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from asyncloader._storage.protocol import ThreadedStorage
    from tests.faulty import Read

pytestmark = pytest.mark.both_loops

CONTENT = data(range(300), width=4, exp_avg=4)
STORED = {"w": torch.arange(900.0), "v": torch.tensor([True, False])}
CHUNK = 2_000
SHARD = "model-000000-of-000001.safetensors"


def is_data(read: Read) -> bool:
    """Tell reads of blocks from those of headers and names."""
    return read.name.startswith("model-") and read.offset > 0


@contextlib.asynccontextmanager
async def faulty(
    fault: Callable[[Read], int | None], *, at_most: int = 1 << 60
) -> AsyncIterator[Runtime]:
    """Give a runtime all of whose reads go by way of a fault."""

    def wrap(storage: ThreadedStorage) -> ThreadedStorage:
        return FaultyStorage(storage, fault, at_most)

    async with Runtime(wrap_storage=wrap, parallel=3) as runtime:
        yield runtime


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, {"t": CONTENT}, STORED, writers=1)
    return tmp_path


class Into:
    """A table with a row of its own, and poisoned tensors."""

    def __init__(self) -> None:
        self.table = table_for(CONTENT)
        self.table.insert(torch.tensor([5]), torch.full((1, 4), -1.0))
        self.tensors = {name: poison(torch.empty_like(one)) for name, one in STORED.items()}

    def loader(self, folder: Path, runtime: Runtime, **how: Any) -> Loader:  # noqa: ANN401  # Loader's
        return Loader(
            folder, {"t": self.table}, self.tensors, chunk_bytes=CHUNK, runtime=runtime, **how
        )

    def check(self) -> None:
        assert rows_in(self.table) == rows_on_disk(CONTENT)
        for name, stored in STORED.items():
            assert raw(self.tensors[name]) == raw(stored)


# --- what passes


@pytest.mark.parametrize("code", ["EIO", "ETIMEDOUT", "ESTALE", "EAGAIN", "EINTR"])
async def test_what_fails_for_a_moment_is_read_again_and_counted(written: Path, code: str) -> None:
    moments = itertools.count()
    error = OSError(getattr(errno, code), "for a moment")
    into = Into()
    async with faulty(raises(error, at=lambda read: is_data(read) and next(moments) < 2)) as some:
        report = await into.loader(written, some).aload()
    into.check()
    assert report.retries == 2
    assert "2 retried" in str(report)


@pytest.mark.parametrize("what", ["tables", "tensors"])
async def test_the_first_retry_of_a_load_is_a_line_in_the_log(
    written: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    moments, into = itertools.count(), Into()
    error = OSError(errno.EIO, "for a moment")
    tables = {"t": into.table} if what == "tables" else {}
    tensors = into.tensors if what == "tensors" else {}
    async with faulty(raises(error, at=lambda read: is_data(read) and next(moments) < 2)) as some:
        report = await Loader(written, tables, tensors, runtime=some).aload()
    assert report.retries == 2
    [line] = [one for one in caplog.messages if "trying again" in one]
    assert line.endswith("for a moment; trying again, 1 of 4")


async def test_a_load_whose_storage_never_failed_has_not_retried(written: Path) -> None:
    into = Into()
    async with faulty(lambda _: None) as runtime:
        report = await into.loader(written, runtime).aload()
    into.check()
    assert report.retries == 0
    assert "retried" not in str(report)


class Pauses:
    """Passes no time, and counts it."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def rest(self, seconds: float) -> None:
        self.pauses.append(seconds)


@given(failures=st.integers(0, 6), code=st.sampled_from([errno.EIO, errno.ESTALE, errno.EPERM]))
async def test_a_read_is_tried_five_times_with_growing_pauses(failures: int, code: int) -> None:
    pauses = Pauses()
    error = OSError(code, "no")
    memory = MemoryStorage({"f": b"abc"}, lambda number: error if number < failures else None)
    storage = RetryingStorage(memory, sleep=pauses.sleep)
    buffer = bytearray(3)
    most = 5 if code != errno.EPERM else 1
    if failures >= most:
        with pytest.raises(OSError, match="no") as caught:
            await storage.readinto("f", 0, [memoryview(buffer)])
        assert caught.value is error
    else:
        assert await storage.readinto("f", 0, [memoryview(buffer)]) == 3
        assert buffer == b"abc"
    assert len(memory.reads) == min(failures + 1, most)
    assert storage.retries == len(pauses.pauses) == min(failures, most - 1)
    bounds = [0.1, 0.2, 0.4, 0.8]
    assert all(pause <= bound for pause, bound in zip(pauses.pauses, bounds, strict=False))


async def test_what_stays_broken_is_an_error_with_its_range(written: Path) -> None:
    into = Into()
    error = OSError(errno.EIO, "a bad sector")
    with unchanged(into.table), pytest.raises(ReadError, match="a bad sector") as caught:
        async with faulty(raises(error, at=is_data)) as runtime:
            await into.loader(written, runtime).aload()
    assert caught.value.shard == SHARD
    assert caught.value.__cause__ is error


@given(at_most=st.integers(1, 3000))
async def test_short_reads_of_any_length_give_every_byte(at_most: int) -> None:
    into = Into()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoint(folder, {"t": CONTENT}, STORED, writers=1)
        async with faulty(lambda _: None, at_most=max(at_most, 50)) as runtime:
            stack.enter_context(debug_off())
            await into.loader(folder, runtime).aload()
    into.check()


async def test_wrong_bytes_of_the_right_number_are_found_where_there_are_digests(
    written: Path, tmp_path: Path
) -> None:
    into = Into()
    async with faulty(lambda _: None) as runtime:
        await into.loader(written, runtime).aload()
    saved = tmp_path / "saved"
    await Saver(path=saved, hashtables={"t": into.table}, tensors=into.tensors).asave()
    other = Into()
    with unchanged(other.table), pytest.raises(CheckpointError, match="digest"):
        async with faulty(flips_a_bit(at=is_data)) as runtime:
            await other.loader(saved, runtime).aload()


# --- files that change meanwhile


def shrinks(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 100)


def grows(shard: Path) -> None:
    with shard.open("ab") as file:
        file.write(b"more")


def is_replaced(shard: Path) -> None:
    twin = shard.with_suffix(".new")
    twin.write_bytes(shard.read_bytes())
    twin.replace(shard)


def is_written_to(shard: Path) -> None:
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    with shard.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")


def vanishes(shard: Path) -> None:
    shard.unlink()


@pytest.mark.parametrize("change", [shrinks, grows, is_replaced, is_written_to, vanishes])
async def test_a_file_that_changes_during_a_load_is_an_error_that_names_it(
    written: Path, change: Callable[[Path], None]
) -> None:
    for at in range(3):
        numbers = itertools.count()

        def fault(read: Read, at: int = at, numbers: itertools.count[int] = numbers) -> None:
            if is_data(read) and next(numbers) == at:
                change(written / SHARD)

        write_checkpoint(written, {"t": CONTENT}, STORED, writers=1)
        into = Into()
        with unchanged(into.table), pytest.raises(CheckpointChangedError) as caught:
            async with faulty(fault, at_most=2_000) as runtime:
                await into.loader(written, runtime).aload()
        assert caught.value.shard == SHARD
        assert "load the checkpoint anew" in str(caught.value)


# --- reads that never return


@contextlib.contextmanager
def released(stuck: Stuck) -> Iterator[Stuck]:
    try:
        yield stuck
    finally:
        stuck.release()
        for _ in stuck.stuck:
            stuck.late.acquire()


@pytest.mark.parametrize("wanted", ["table", "tensor"])
async def test_a_read_that_never_returns_is_an_error_that_names_it(
    written: Path, wanted: str
) -> None:
    into = Into()
    before = rows_in(into.table)
    stuck = Stuck(at=is_data)
    with released(stuck):
        async with faulty(stuck) as runtime:
            loader = Loader(
                written,
                {"t": into.table} if wanted == "table" else {},
                into.tensors if wanted == "tensor" else {},
                runtime=runtime,
                stall_timeout=0.05,
            )
            with pytest.raises(ReadStalledError, match="no answer from the storage") as caught:
                await loader.aload()
        error = caught.value
        assert isinstance(error, TimeoutError)
        assert (error.shard, error.location) == (SHARD, str(written))
        assert any(read.offset == error.offset for read in stuck.stuck)
        assert rows_in(into.table) == before
        assert ("w" in error.touched) == (wanted == "tensor")


async def test_what_a_lost_thread_writes_at_last_is_seen_by_nobody(written: Path) -> None:
    """Not by the next load of the same table either, which begins where the lost one did."""
    into = Into()
    into.table.reserve(10_000)  # or every load takes new memory anyway
    stuck = Stuck(at=is_data)
    async with faulty(stuck) as runtime:
        loader = Loader(written, {"t": into.table}, runtime=runtime, stall_timeout=0.05)
        with pytest.raises(ReadStalledError):
            await loader.aload()
    other = tmp_copy(written, -1.0)
    await Loader(other, {"t": into.table}).aload()
    loaded = rows_in(into.table)
    with released(stuck):
        assert stuck.stuck
    assert rows_in(into.table) == loaded


def tmp_copy(folder: Path, factor: float) -> Path:
    """Write the same ids with other rows."""
    other = folder / "other"
    slots = {name: rows * factor for name, rows in CONTENT.slots.items()}
    write_checkpoint(other, {"t": type(CONTENT)(ids=CONTENT.ids, slots=slots)}, {})
    return other


async def test_others_go_on_while_reads_are_stuck(written: Path, tmp_path: Path) -> None:
    """Though at first they have all the threads of a runtime; and so does the event loop."""
    write_checkpoint(tmp_path / "sound", {"t": CONTENT}, STORED, writers=1)
    stuck = Stuck(at=is_data)
    lost, sound = [Into() for _ in range(4)], [Into() for _ in range(4)]

    def wrap(storage: ThreadedStorage) -> ThreadedStorage:
        return FaultyStorage(storage, stuck) if storage.location == str(written) else storage

    async def fails(into: Into, runtime: Runtime) -> None:
        with pytest.raises(ReadStalledError):
            await into.loader(written, runtime, stall_timeout=0.05).aload()

    with released(stuck):
        async with Runtime(wrap_storage=wrap, parallel=3) as runtime, asyncio.TaskGroup() as group:
            for into in lost:
                group.create_task(fails(into, runtime))
            for into in sound:
                group.create_task(into.loader(tmp_path / "sound", runtime).aload())
        for into in sound:
            into.check()
        assert len(stuck.stuck) >= len(lost)


async def test_a_time_out_says_what_was_being_read(written: Path) -> None:
    into = Into()
    stuck = Stuck(at=is_data)
    with released(stuck), pytest.raises(LoadTimeoutError) as caught:
        async with faulty(stuck) as runtime:
            await into.loader(written, runtime, timeout=0.2, stall_timeout=0.3).aload()
    assert caught.value.under_way
    assert f"reading then: {SHARD}" in str(caught.value)


async def test_a_load_that_is_cancelled_waits_for_a_stuck_read_no_longer_than_it_would(
    written: Path,
) -> None:
    into = Into()
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()

    def at(read: Read) -> bool:
        if is_data(read):
            loop.call_soon_threadsafe(arrived.set)
        return is_data(read)

    stuck = Stuck(at=at)
    before = rows_in(into.table)
    with released(stuck):
        async with faulty(stuck) as runtime:
            loading = asyncio.create_task(into.loader(written, runtime, stall_timeout=0.1).aload())
            await arrived.wait()
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
        assert rows_in(into.table) == before


STUCK_AT_EXIT = """
    import sys, torch
    sys.path.insert(0, {root!r})
    import asyncio, threading
    import asyncloader
    from tests.faulty import FaultyStorage, Stuck

    stuck = Stuck(at=lambda read: read.name.endswith("safetensors") and read.offset > 0)

    async def main():
        async with asyncloader.Runtime(wrap_storage=lambda one: FaultyStorage(one, stuck)) as some:
            try:
                await asyncloader.Loader(
                    {folder!r}, tensors={{"w": torch.zeros(900)}}, runtime=some, stall_timeout=0.1
                ).aload()
            except asyncloader.ReadStalledError as error:
                print(error.touched)

    asyncio.run(main())
"""


def test_a_program_with_a_thread_that_never_returns_still_ends(written: Path) -> None:
    """Python waits for all threads but daemons when it ends."""
    root = str(Path(__file__).parents[1])
    code = textwrap.dedent(STUCK_AT_EXIT.format(root=root, folder=str(written)))
    done = python("-c", code, timeout=50)
    assert (done.returncode, done.stdout) == (0, "('w',)\n"), done.stderr


# --- any of it


FAULTS = st.sampled_from(["none"] * 2 + ["EIO", "EPERM", "short", "shrinks", "is_replaced"])


@given(plan=st.lists(FAULTS, max_size=9))
async def test_whatever_happens_a_load_is_right_or_our_error(plan: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_checkpoint(path, {"t": CONTENT}, STORED, writers=1)
        numbers = itertools.count()

        def fault(read: Read) -> int | None:
            number = next(numbers)
            what = plan[number] if number < len(plan) else "none"
            if what in {"EIO", "EPERM"}:
                raise OSError(getattr(errno, what), "injected")
            if what == "short":
                piece = (path / read.name).read_bytes()[read.offset :][:1]
                read.views[0][: len(piece)] = piece
                return len(piece)
            if what in {"shrinks", "is_replaced"} and (path / SHARD).exists():
                {"shrinks": shrinks, "is_replaced": is_replaced}[what](path / SHARD)
            return None

        into = Into()
        before = rows_in(into.table)
        with debug_off(), nothing_left_behind(into.table):
            async with faulty(fault) as runtime:
                try:
                    await into.loader(path, runtime).aload()
                except AsyncLoaderError:
                    assert rows_in(into.table) == before
                else:
                    into.check()
