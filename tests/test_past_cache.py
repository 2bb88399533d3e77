"""Each read goes through the page cache or past it, whichever pays."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Literal

import pytest
import torch

from asyncloader import Loader, load_tensors
from asyncloader._storage.past_cache import ChoosingReader, Company, is_cached, open_past_cache
from asyncloader._threads.call import Reading
from tests.oracle import shard_holding, write_checkpoint
from tests.support import open_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MANY = 4 << 20
STORED = {"w": torch.arange(MANY // 4, dtype=torch.float32), "small": torch.ones(3)}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Return a shard of a checkpoint, on a file system whose page cache can be emptied."""
    write_checkpoint(tmp_path, {}, STORED, writers=1)
    shard = shard_holding(tmp_path, "w^ ")
    forget(shard)
    if in_cache(shard, 0.9):
        pytest.skip("this file system does not let go of what is in its page cache")
    with shard.open("rb") as file:
        past = open_past_cache(file.fileno())
    if past is None:
        pytest.skip("this file system reads all files through its cache")
    os.close(past[0])
    return shard


def forget(shard: Path) -> None:
    with shard.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_cache(shard: Path, place: float = 0.3) -> bool:
    """Say whether a place of a file is in the page cache; to ask brings it in."""
    with shard.open("rb") as file:
        return is_cached(file.fileno(), int(shard.stat().st_size * place), 1)


async def loaded(shard: Path, direct_io: bool | Literal["auto"] = "auto") -> torch.Tensor:
    w = torch.zeros(MANY // 4)
    await Loader(shard.parent, tensors={"w": w}, direct_io=direct_io).aload()
    return w


async def test_what_is_not_in_the_cache_does_not_get_there(shard: Path) -> None:
    assert torch.equal(await loaded(shard), STORED["w"])
    assert not in_cache(shard)
    assert not [name for name in open_files() if name == str(shard)]


async def test_it_gets_there_if_that_is_wanted(shard: Path) -> None:
    assert torch.equal(await loaded(shard, direct_io=False), STORED["w"])
    assert in_cache(shard)


async def test_several_loads_of_one_file_share_the_cache(shard: Path) -> None:
    other = Company(shard.parent, ["index"])
    await asyncio.to_thread(other.join, shard)
    assert torch.equal(await loaded(shard), STORED["w"])
    assert in_cache(shard)
    other.close()


def test_of_two_none_is_alone(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    one, other = Company(tmp_path, ["gone", "a"]), Company(tmp_path, ["gone"])
    assert not one.is_alone(), "it has not joined"
    one.join(tmp_path / "b")
    assert one.is_alone()
    other.join(tmp_path / "a")
    assert not one.is_alone()
    assert not other.is_alone()
    one.close()
    assert other.is_alone()
    other.close()
    other.join(tmp_path / "a")
    assert not other.is_alone(), "it is closed"


def test_blocking_calls_do_the_same(shard: Path) -> None:
    assert torch.equal(load_tensors(shard.parent, direct_io="auto")["w"], STORED["w"])
    assert not in_cache(shard)


WAYS = {
    "in the cache": (True, True, 5, "through"),
    "not in it": (False, True, 5, "past"),
    "others read it": (False, False, 5, "through"),
    "nothing to read it by": (False, True, None, "through"),
}


@pytest.mark.parametrize(("cached", "alone", "past", "way"), WAYS.values(), ids=WAYS)
def test_a_large_read_goes_the_way_that_pays(
    cached: bool, alone: bool, past: int | None, way: str
) -> None:
    went: list[str] = []

    def reads(name: str, fd: int) -> object:
        def preadv(given: int, views: Sequence[memoryview], offset: int, _: Reading) -> int:
            assert (given, offset) == (fd, 7)
            went.append(name)
            return sum(view.nbytes for view in views)

        return preadv

    choosing = ChoosingReader(
        lambda: alone,
        cached=lambda *_: cached,
        through=reads("through", 3),  # type: ignore[arg-type]
        past=reads("past", 5),  # type: ignore[arg-type]
    )
    for length, expected in ((2 << 20, way), (1000, "through")):
        views = [memoryview(bytearray(length))]
        count = choosing.preadv(3, lambda: past, views, 7, Reading("f", 7, views))
        assert (count, went.pop()) == (length, expected)


async def test_many_loads_at_a_time_are_right(shard: Path) -> None:
    found = await asyncio.gather(*(loaded(shard) for _ in range(4)))
    assert all(torch.equal(one, STORED["w"]) for one in found)
