"""Commands on a real file system whose reads fail, come late, or never."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
import uvloop

from asyncloader import CheckpointChangedError, Conversion, ReadStalledError, aconvert, averify
from tests.checkpoints import LIMITS, everything
from tests.hanging_disk import NotMountableError, hanging_disk
from tests.oracle import read_checkpoint, shard_holding, write_checkpoint
from tests.support import data

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.hanging_disk import HangingDisk

EIO = 5
PATIENCE = 20
STALL = 0.3
FAR = 20_000  # beyond what is read when a file is opened
TABLES = {"t": data(list(range(5000)))}
TENSORS = {"w": torch.arange(300_000.0), "v": torch.ones(300_000)}


@dataclass
class Case:
    """A checkpoint on a disk that is at a test's mercy, and where it shall go."""

    disk: HangingDisk
    source: Path
    """The folder that the disk serves."""

    target: Path

    def shard(self, name: str) -> str:
        return shard_holding(self.source, f"{name}^ ").name

    async def convert(self, stall_timeout: float = PATIENCE) -> Conversion:
        return await aconvert(
            self.disk.path,
            self.target,
            parallel=1,
            options=replace(LIMITS, stall_timeout=stall_timeout),
        )

    def is_untouched(self) -> bool:
        return not list(self.target.parent.iterdir())


@pytest.fixture(scope="module")
def anyio_backend() -> object:
    """Return one loop: what each of them does is shown elsewhere, without a disk."""
    return "asyncio", {"debug": True, "loop_factory": uvloop.new_event_loop}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "folder"
    write_checkpoint(path, TABLES, TENSORS, writers=4)
    return path


@pytest.fixture(scope="module")
def disk(source: Path) -> Iterator[HangingDisk]:
    try:
        with hanging_disk(source, source.with_name("disk")) as disk:
            yield disk
    except NotMountableError as error:
        pytest.skip(f"no file system of one's own here: {error}")


@pytest.fixture
def case(disk: HangingDisk, source: Path, tmp_path: Path) -> Iterator[Case]:
    threads = set(threading.enumerate())
    yield Case(disk, source, tmp_path / "b.safetensors")
    disk.heal()
    for thread in set(threading.enumerate()) - threads:  # those that were given up on
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture(params=["b", "b.safetensors"])
def either(case: Case, request: pytest.FixtureRequest) -> Case:
    """Return a case for each of the forms that are written."""
    case.target = case.target.with_name(request.param)
    return case


async def test_a_fault_that_passes_keeps_no_conversion(case: Case) -> None:
    case.disk.hang(case.shard("w"), begin=FAR)
    async with asyncio.TaskGroup() as group:
        group.create_task(case.convert())
        await asyncio.to_thread(case.disk.until_somebody_waits)
        await asyncio.to_thread(case.disk.fail, case.shard("w"), EIO, times=2)
    await aconvert(case.target, case.target.with_name("back"), shards=1, parallel=1, options=LIMITS)
    back = read_checkpoint(case.target.with_name("back"))
    assert everything(back) == everything((TABLES, TENSORS))


async def test_a_conversion_gives_up_what_never_comes(either: Case) -> None:
    either.disk.hang(either.shard("w"), begin=FAR)

    with pytest.raises(ReadStalledError, match="no answer from the storage") as caught:
        await either.convert(STALL)

    assert caught.value.shard == either.shard("w")
    assert either.is_untouched()


async def test_a_conversion_of_a_disk_that_hangs_can_be_cancelled(either: Case) -> None:
    either.disk.hang(either.shard("w"), begin=FAR)
    converting = asyncio.ensure_future(either.convert(STALL))
    await asyncio.to_thread(either.disk.until_somebody_waits)
    converting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await converting
    assert either.is_untouched()


@pytest.mark.parametrize("name", ["v", "w"])
async def test_two_versions_are_never_mixed(either: Case, name: str) -> None:
    """Another save writes to a shard once the headers are known; what is read may be either."""
    either.disk.hang(either.shard("w"), begin=FAR)
    converting = asyncio.ensure_future(either.convert())
    await asyncio.to_thread(either.disk.until_somebody_waits)
    shard = either.source / either.shard(name)
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns - 10**9))
    await asyncio.to_thread(either.disk.heal)

    with pytest.raises(CheckpointChangedError, match="was replaced, removed or written to"):
        await converting
    assert either.is_untouched()


async def test_names_that_never_come_are_given_up_by_verify(case: Case) -> None:
    case.disk.hang("", on="list")

    with pytest.raises(ReadStalledError, match="no answer from the storage"):
        await averify(case.disk.path, options=replace(LIMITS, stall_timeout=STALL))
