"""Loads from a real file system whose reads fail, give little, come late, or never."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
import uvloop

from asyncloader import (
    AsyncLoaderError,
    CheckpointError,
    CheckpointReader,
    DiskTable,
    HashTable,
    Live,
    Loader,
    LoadTimeoutError,
    PlanError,
    ReadError,
    ReadStalledError,
    Runtime,
    Span,
)
from tests.forks import python
from tests.hanging_disk import NotMountableError, hanging_disk
from tests.oracle import shard_holding, write_checkpoint
from tests.support import data, nothing_left_behind, open_files, rows_in, rows_on_disk, table_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.hanging_disk import HangingDisk

EIO = 5
PATIENCE = 20
CONTENT = data(list(range(5000)), exp_avg=1)
STORED = {"w": torch.arange(300_000.0)}
STALL = 0.3
FAR = 20_000  # beyond what is read when a file is opened


@dataclass
class Case:
    """A checkpoint on a disk that is at a test's mercy, and what it is loaded into."""

    disk: HangingDisk
    shard: str
    """The file that holds the tensor."""

    table: HashTable = field(default_factory=lambda: table_for(CONTENT))
    tensors: dict[str, torch.Tensor] = field(default_factory=lambda: {"w": torch.zeros(300_000)})

    def __post_init__(self) -> None:
        self.table.insert(torch.tensor([5, -7]), torch.full((2, 2), -1.0))
        self.held = rows_in(self.table)

    def loader(self, **how: Any) -> Loader:  # noqa: ANN401  # of Loader
        return Loader(self.disk.path, {"t": self.table}, self.tensors, **how)

    def is_loaded(self) -> bool:
        self.table.delete(torch.tensor([-7]))
        return rows_in(self.table) == rows_on_disk(CONTENT) and torch.equal(
            self.tensors["w"], STORED["w"]
        )


@pytest.fixture(scope="module")
def anyio_backend() -> object:
    """Return one loop: what each of them does is shown by test_resilience.py, without a disk."""
    return "asyncio", {"debug": True, "loop_factory": uvloop.new_event_loop}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HangingDisk]:
    base = tmp_path_factory.mktemp("disk")
    write_checkpoint(base / "folder", {"t": CONTENT}, STORED, writers=4)
    try:
        with hanging_disk(base / "folder", base / "disk") as disk:
            yield disk
    except NotMountableError as error:
        pytest.skip(f"no file system of one's own here: {error}")


@pytest.fixture
def case(disk: HangingDisk) -> Iterator[Case]:
    DiskTable([1])  # which imports kernels: no test is to do that on its loop
    threads = set(threading.enumerate())
    yield Case(disk, shard_holding(disk.path, "w^ ").name)
    disk.heal()
    for thread in set(threading.enumerate()) - threads:  # those that were given up on
        thread.join(PATIENCE)
        assert not thread.is_alive()


def readers() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("asyncloader-read")}


async def end_of(threads: set[threading.Thread]) -> None:
    for thread in threads:
        await asyncio.to_thread(thread.join, PATIENCE)
        assert not thread.is_alive()


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that nothing tells of."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < PATIENCE
        time.sleep(0.01)


def is_open(name: str) -> bool:
    return any(one.endswith(name) for one in open_files())


async def test_a_file_that_was_given_up_on_is_closed_when_its_thread_is_back(case: Case) -> None:
    before = readers()
    case.disk.hang(case.shard, begin=FAR)
    with pytest.raises(ReadStalledError):
        await case.loader(stall_timeout=STALL).aload()
    case.disk.heal()
    await end_of(readers() - before)

    # What no read holds open is closed by a thread that nothing waits for, and that tells nobody.
    await asyncio.to_thread(until, lambda: not is_open(case.shard))


async def test_a_disk_that_falls_silent_at_the_end_of_a_load_keeps_no_loop(case: Case) -> None:
    """Files are closed then, and a lock on one of them is let go of."""
    dead = asyncio.Event()

    def die() -> None:
        case.disk.die()
        dead.set()

    def listen(span: Span) -> None:
        if "join" in str(span) and not dead.is_set():  # all is read
            asyncio.get_running_loop().call_soon(die)

    async def heal() -> None:
        await dead.wait()
        await asyncio.to_thread(case.disk.until_somebody_waits)
        case.disk.heal()

    healing = asyncio.ensure_future(heal())
    await case.loader(trace=listen).aload()
    await healing
    assert case.is_loaded()


@pytest.mark.parametrize("how", [{}, {"direct_io": True}], ids=["", "direct_io"])
async def test_a_sound_disk_is_read(case: Case, how: dict[str, Any]) -> None:
    with nothing_left_behind(case.table):
        report = await case.loader(**how).aload()

    assert report.retries == 0
    assert case.is_loaded()


async def test_reads_that_give_little_are_gone_on_with(case: Case) -> None:
    case.disk.give(case.shard, 9_999)

    await case.loader().aload()

    assert case.is_loaded()


@pytest.mark.parametrize("on", ["read", "open"])
@pytest.mark.parametrize("times", [2, 4])
async def test_a_fault_that_passes_is_counted_and_does_no_harm(
    case: Case, times: int, on: str
) -> None:
    case.disk.fail(case.shard, EIO, times=times, on=on)

    with nothing_left_behind(case.table):
        report = await case.loader().aload()

    assert 1 <= report.retries <= times
    assert case.is_loaded()


@pytest.mark.parametrize("on", ["read", "open"])
async def test_a_fault_that_stays_is_an_error_that_names_the_file(case: Case, on: str) -> None:
    case.disk.fail(case.shard, EIO, on=on)

    with (
        nothing_left_behind(case.table),
        pytest.raises(AsyncLoaderError, match="Input/output error") as caught,
    ):
        await case.loader().aload()

    assert isinstance(caught.value, ReadError | CheckpointError)
    assert caught.value.shard == case.shard
    assert rows_in(case.table) == case.held


async def test_a_read_that_never_comes_back_is_given_up(case: Case) -> None:
    """The loop goes on meanwhile; the tables are as they were, and stay so if it does come."""
    case.disk.hang(case.shard, begin=FAR)
    with pytest.raises(ReadStalledError, match="no answer from the storage") as caught:
        await case.loader(stall_timeout=STALL).aload()

    assert caught.value.shard == case.shard
    assert caught.value.touched == ("w",)
    assert rows_in(case.table) == case.held
    case.disk.heal()
    case.tensors["w"] = torch.zeros(300_000)
    await case.loader(stall_timeout=PATIENCE).aload()
    assert case.is_loaded()


@pytest.mark.parametrize("name", ["index", "tensorkey.json"])
@pytest.mark.parametrize("on", ["read", "open"])
async def test_a_file_that_cannot_be_opened_or_begun_is_given_up(
    case: Case, name: str, on: str
) -> None:
    case.disk.hang(name, on=on)

    with pytest.raises(ReadStalledError, match=f"{name}: no answer from the storage"):
        await case.loader(stall_timeout=STALL).aload()

    assert rows_in(case.table) == case.held


async def test_an_answer_that_comes_late_is_waited_for(case: Case) -> None:
    case.disk.hang(case.shard, begin=FAR)
    async with asyncio.TaskGroup() as group:
        loading = group.create_task(case.loader(stall_timeout=PATIENCE).aload())
        await asyncio.to_thread(case.disk.until_somebody_waits)
        case.disk.heal()

    assert loading.result().retries == 0
    assert case.is_loaded()


async def test_a_load_of_a_disk_that_hangs_can_be_cancelled(case: Case) -> None:
    case.disk.hang(case.shard, begin=FAR)
    loading = asyncio.ensure_future(case.loader(stall_timeout=STALL).aload())
    await asyncio.to_thread(case.disk.until_somebody_waits)
    loading.cancel()

    with pytest.raises(asyncio.CancelledError):
        await loading
    assert rows_in(case.table) == case.held


async def test_a_load_of_a_disk_that_hangs_keeps_to_its_timeout(case: Case) -> None:
    case.disk.hang(case.shard, begin=FAR)

    with pytest.raises(LoadTimeoutError) as caught:
        await case.loader(timeout=STALL, stall_timeout=STALL).aload()

    assert case.shard in str(caught.value)
    assert rows_in(case.table) == case.held
    assert any("take new ones" in note for note in caught.value.__notes__)


async def test_a_tensor_of_a_cancelled_load_that_a_lost_thread_may_write_to_is_refused(
    case: Case, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "sound", {}, STORED)
    case.disk.hang(case.shard, begin=FAR)
    before = readers()
    loading = asyncio.ensure_future(case.loader(stall_timeout=STALL).aload())
    await asyncio.to_thread(case.disk.until_somebody_waits)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    again = Loader(tmp_path / "sound", tensors=case.tensors)

    with pytest.raises(PlanError, match="may still be written to by a read that was given up"):
        await again.aload()

    case.disk.heal()
    await end_of(readers() - before)
    await again.aload()
    assert torch.equal(case.tensors["w"], STORED["w"])


async def test_a_reader_of_a_disk_that_hangs_gives_up_and_others_read_on(case: Case) -> None:
    case.disk.hang(case.shard, begin=FAR)
    async with CheckpointReader(case.disk.path, stall_timeout=STALL) as reader:
        with pytest.raises(ReadStalledError):
            await reader.aread_tensor("w")
        ids = await reader.aread_tensor("t@id")

    assert torch.equal(ids, CONTENT.ids)


# --- a disk that answers nothing any more: no look at a file either, and no closing of one


async def test_a_disk_that_dies_during_a_load_is_given_up_whatever_it_is_asked(case: Case) -> None:
    case.disk.hang(case.shard, begin=FAR)
    loading = asyncio.ensure_future(case.loader(stall_timeout=STALL).aload())
    await asyncio.to_thread(case.disk.until_somebody_waits)
    await asyncio.to_thread(case.disk.die)

    with pytest.raises(ReadStalledError):
        await loading
    assert rows_in(case.table) == case.held


@pytest.mark.parametrize("what", ["folder", "file", "nothing"])
async def test_a_dead_disk_is_given_up_whatever_is_looked_for_there(case: Case, what: str) -> None:
    path = {
        "folder": case.disk.path,
        "file": case.disk.path / case.shard,
        "nothing": case.disk.path / "none",
    }[what]
    await asyncio.to_thread(case.disk.die)

    with pytest.raises(ReadStalledError, match="no answer from the storage"):
        await Loader(path, tensors=case.tensors, stall_timeout=STALL).aload()


async def test_of_many_shards_on_a_dead_disk_few_are_waited_for(case: Case, tmp_path: Path) -> None:
    many = {f"w{number}": torch.zeros(3) for number in range(100)}
    (tmp_path / "many").mkdir()
    (tmp_path / "disk").mkdir()
    write_checkpoint(tmp_path / "many", {}, many, writers=100)
    before = readers()
    with hanging_disk(tmp_path / "many", tmp_path / "disk") as disk:
        await asyncio.to_thread(disk.hang, shard_holding(tmp_path / "many", "w7^ ").name, on="open")
        loading = asyncio.ensure_future(
            Loader(disk.path, tensors=many, stall_timeout=STALL, parallel=4).aload()
        )
        await asyncio.to_thread(disk.until_somebody_waits)
        await asyncio.to_thread(disk.die)
        with pytest.raises(ReadStalledError):
            await loading
        assert len(readers() - before) <= 5
    await end_of(readers() - before)


async def test_loads_that_share_threads_with_one_of_a_dead_disk_go_on(
    case: Case, tmp_path: Path
) -> None:
    """It would be waited for very long, and asks for more than there are threads."""
    write_checkpoint(tmp_path / "sound", {"t": CONTENT}, STORED, writers=4)
    case.disk.hang(case.shard, begin=FAR)
    async with Runtime(parallel=2) as runtime:
        lost = [
            asyncio.ensure_future(
                Loader(
                    case.disk.path,
                    tensors={"w": torch.zeros(300_000)},
                    chunk_bytes=1 << 18,
                    runtime=runtime,
                    stall_timeout=PATIENCE,
                ).aload()
            )
            for _ in range(3)
        ]
        await asyncio.to_thread(case.disk.until_somebody_waits)

        await Loader(
            tmp_path / "sound",
            {"t": case.table},
            case.tensors,
            chunk_bytes=1 << 16,
            runtime=runtime,
        ).aload()

        assert case.is_loaded()
        assert not any(one.done() for one in lost)
        case.disk.heal()
        await asyncio.gather(*lost)


async def test_a_tensor_that_a_lost_thread_may_write_to_cannot_be_loaded_into(
    case: Case, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "sound", {}, STORED)
    case.disk.hang(case.shard, begin=FAR)
    before = readers()
    with pytest.raises(ReadStalledError) as caught:
        await case.loader(stall_timeout=STALL).aload()
    assert any("take new ones" in note for note in caught.value.__notes__)
    again = Loader(tmp_path / "sound", tensors=case.tensors)

    with pytest.raises(PlanError, match="may still be written to by a read that was given up"):
        await again.aload()

    case.disk.heal()
    await end_of(readers() - before)
    await again.aload()
    assert torch.equal(case.tensors["w"], STORED["w"])


async def test_a_service_goes_on_and_ends_though_the_disk_of_its_versions_is_dead(
    case: Case,
) -> None:
    def build() -> tuple[dict[str, HashTable], dict[str, torch.Tensor]]:
        return {}, {"w": torch.zeros(300_000)}

    options = {"stall_timeout": STALL, "strict": False}
    live = Live(case.disk.path, build, poll=0.001, loader_options=options)
    async with live:
        await asyncio.to_thread(case.disk.die)
        await asyncio.to_thread(case.disk.until_somebody_waits)
        with live.use() as model:
            assert torch.equal(model.tensors["w"], STORED["w"])
    await asyncio.to_thread(case.disk.heal)


async def test_a_service_ends_though_a_command_waits_for_a_dead_disk(case: Case) -> None:
    def build() -> tuple[dict[str, HashTable], dict[str, torch.Tensor]]:
        return {}, {"w": torch.zeros(300_000)}

    options = {"stall_timeout": STALL, "strict": False}
    live = Live(case.disk.path, build, poll=1000, loader_options=options)
    async with live:
        await asyncio.to_thread(case.disk.die)
        command = asyncio.ensure_future(live.load(case.disk.path.name))
        await asyncio.to_thread(case.disk.until_somebody_waits)
    with pytest.raises(CheckpointError, match="cannot be looked at"):
        await command
    await asyncio.to_thread(case.disk.heal)


ENDS = """
import asyncio, sys, torch, asyncloader
async def main():
    loader = asyncloader.Loader(sys.argv[1], tensors={"w": torch.zeros(9)}, stall_timeout=0.2)
    try:
        await loader.aload()
    except asyncloader.ReadStalledError:
        print("given up")
asyncio.run(main())
"""


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_program_ends_though_its_threads_wait_for_a_dead_disk(case: Case, what: str) -> None:
    path = case.disk.path / ("" if what == "folder" else case.shard)
    with case.disk.stopped():
        done = python("-c", ENDS, path, timeout=40)
    assert (done.returncode, done.stdout) == (0, "given up\n"), done.stderr


async def on_disk(case: Case, **how: Any) -> DiskTable:  # noqa: ANN401  # of DiskTable
    table = DiskTable([2], name="t", **how)
    await Loader(case.disk.path, {"t": table}).aload()
    return table


async def test_a_lookup_on_a_disk_that_gives_no_answer_is_given_up(case: Case) -> None:
    shard = shard_holding(case.disk.path, "t.embedding/part_0_1").name
    table = await on_disk(case, stall_timeout=STALL)
    ids, out = torch.tensor([3, 4000]), torch.full((2, 2), -1.0)
    case.disk.hang(shard)
    with pytest.raises(ReadStalledError, match=r"no answer from the storage for 0\.3 seconds"):
        await table.alookup(ids, out=out)
    with pytest.raises(ReadStalledError, match=r"wanted by 't'"):
        await asyncio.to_thread(table.lookup, ids, out=out)
    case.disk.heal()
    assert torch.equal(await table.alookup(ids), CONTENT.slots["embedding"][ids])
    assert bool((out == -1).all()), "a thread that was given up hands nothing out"
    table.close()


async def test_a_lookup_that_is_cancelled_waits_for_its_thread_as_long_as_for_any(
    case: Case,
) -> None:
    shard = shard_holding(case.disk.path, "t.embedding/part_0_1").name
    table = await on_disk(case, stall_timeout=STALL)
    case.disk.hang(shard)
    looking = asyncio.create_task(table.alookup(torch.tensor([3])))
    await asyncio.to_thread(case.disk.until_somebody_waits)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    case.disk.heal()
    assert (await table.alookup(torch.tensor([3]))).tolist() == [
        CONTENT.slots["embedding"][3].tolist()
    ]
    table.close()


@pytest.mark.parametrize("direct_io", [False, True])
async def test_rows_come_from_a_disk_that_gives_little_and_fails_for_a_moment(
    case: Case, direct_io: bool
) -> None:
    shard = shard_holding(case.disk.path, "t.embedding/part_0_1").name
    table = await on_disk(case, direct_io=direct_io)
    ids = torch.arange(0, 5000, 37)
    case.disk.fail(shard, EIO, times=2)
    assert torch.equal(await table.alookup(ids), CONTENT.slots["embedding"][ids])
    assert table.stats().retries >= 1
    table.close()
