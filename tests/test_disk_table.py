"""Tables whose rows stay on the disk: what lookups give, and what they do when things fail."""

from __future__ import annotations

import asyncio
import copy
import errno
import gc
import os
import pickle
import random
import shutil
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import (
    CheckpointChangedError,
    CheckpointError,
    DiskTable,
    HashTable,
    Live,
    Loader,
    PlanError,
    ReadError,
    Runtime,
    Saver,
    gen_slice,
    open_table,
)
from asyncloader._disk_table.readers import RowReaders
from tests.checkpoints import flip
from tests.oracle import TableData, shard_holding, write_checkpoint
from tests.processes import apart
from tests.support import data, open_files, table_for
from tests.system_calls import FakeReads, no_such_call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

DiskTable([1])  # the first one imports numba, for which an event loop has no time

EXTREMES = [-(2**63), 2**63 - 1, -1, 0, 65535, 65536, 2**52]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64]
CONTENT = data([7, -1, 65543, *range(100, 3000)], width=3, exp_avg=2)


class Handed:
    """Readers that a test has made, as a `Runtime` has them."""

    def __init__(self, **how: Any) -> None:  # noqa: ANN401  # of RowReaders
        self.row_readers = RowReaders(**how)


def disk_table(content: TableData = CONTENT, **how: Any) -> DiskTable:  # noqa: ANN401  # of DiskTable
    first, *others = content.slots
    rows = content.slots[first]
    table = DiskTable(rows.shape[1:], **{"dtype": rows.dtype, "name": "t", **how})
    for slot in others:
        table.add_slot(slot, content.slots[slot].shape[1:], content.slots[slot].dtype)
    return table


async def loaded(path: Path, content: TableData = CONTENT, **how: Any) -> DiskTable:  # noqa: ANN401
    table = disk_table(content, **how)
    await Loader(path, {"t": table}, strict=True).aload()
    return table


def wanted(content: TableData, ids: Tensor, slot: str = "embedding") -> Tensor:
    """Return what a lookup is to give."""
    rows = content.slots[slot]
    known = {id_: row for row, id_ in enumerate(content.ids.tolist())}  # the last of equal ones
    out = torch.zeros((ids.numel(), *rows.shape[1:]), dtype=rows.dtype)
    for at, id_ in enumerate(ids.reshape(-1).tolist()):
        if id_ in known:
            out[at] = rows[known[id_]]
    return out.view(*ids.shape, *rows.shape[1:])


def same(a: Tensor, b: Tensor) -> bool:
    shapes = (a.dtype, a.shape) == (b.dtype, b.shape)
    return shapes and bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "c", {"t": CONTENT}, {}, ranks=2, shuffle_seed=1)
    return tmp_path / "c"


def files_of(path: Path) -> list[str]:
    """Return the files of a folder that are open."""
    return [name for name in open_files() if f"{path}/" in name]


SOME = torch.tensor([[7, 8, 65543], [-1, 150, 7]])


# --- what lookups give


@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    dim=st.sampled_from([1, 3, 64, 512]),
    count=st.sampled_from([0, 1, 2, 300]),
    written=st.tuples(st.integers(1, 3), st.booleans()),
    cache_bytes=st.sampled_from([0, 1, 5000, 1 << 20]),
    rank=st.sampled_from([(0, 1), (0, 1), (1, 3)]),
    direct_io=st.booleans(),
)
async def test_many_lookups_at_once_give_what_a_dict_gives(  # noqa: PLR0917  # what is drawn
    seed: int,
    dtype: torch.dtype,
    dim: int,
    count: int,
    written: tuple[int, bool],
    cache_bytes: int,
    rank: tuple[int, int],
    direct_io: bool,
) -> None:
    rng = random.Random(seed)
    kinds = (
        lambda: rng.choice(EXTREMES),
        lambda: rng.randrange(-5, 60),
        lambda: rng.randrange(-(2**63), 2**63),
    )
    ids = [rng.choice(kinds)() for _ in range(count)]
    rows = torch.frombuffer(
        bytearray(rng.randbytes(dim * count * dtype.itemsize) or b"\0" * 8), dtype=dtype
    )
    content = TableData(
        ids=torch.tensor(ids, dtype=torch.int64),
        slots={"embedding": rows[: count * dim].reshape(count, dim)},
    )
    mine = gen_slice(*rank)
    asked = [
        torch.tensor(
            rng.choices([*ids, *EXTREMES, 3], k=rng.choice([0, 1, 5, 700])), dtype=torch.int64
        )
        for _ in range(12)
    ]
    with tempfile.TemporaryDirectory() as folder:
        await asyncio.to_thread(
            write_checkpoint, Path(folder), {"t": content}, {},
            ranks=written[0], sort=written[1],
        )  # fmt: skip
        table = disk_table(content, slice=mine, cache_bytes=cache_bytes, direct_io=direct_io)
        await Loader(folder, {"t": table}).aload()
        found = await asyncio.gather(*(table.alookup(one) for one in asked))
        again = await asyncio.gather(*(table.alookup(one) for one in asked))
    for one, *got in zip(asked, found, again, strict=True):
        there = torch.tensor([mine.accepts(id_) for id_ in one.tolist()], dtype=torch.bool)
        expected = wanted(content, one)
        expected[~there] = 0
        assert all(same(each, expected) for each in got)
        known = torch.isin(one, content.ids) & there
        assert torch.equal(table.contains(one), known)
    assert sorted(table.ids().tolist()) == sorted({i for i in ids if mine.accepts(i)})


@pytest.mark.parametrize("how", [{}, {"cache_bytes": 1 << 20}, {"direct_io": True}], ids=str)
async def test_ids_of_any_shape_and_slot_have_their_rows(path: Path, how: dict[str, Any]) -> None:
    table = await loaded(path, **how)
    for _ in range(3):
        for slot in CONTENT.slots:
            assert same(await table.alookup(SOME, slot), wanted(CONTENT, SOME, slot))
        assert same(await asyncio.to_thread(table.lookup, SOME), wanted(CONTENT, SOME))
        assert same(await asyncio.to_thread(table, SOME.int()), wanted(CONTENT, SOME.int()))
    assert len(table) == len(CONTENT.ids)
    assert same(await asyncio.to_thread(table.rows), wanted(CONTENT, table.ids()))


async def test_rows_go_where_the_caller_wants_them(path: Path) -> None:
    table = await loaded(path)
    out = torch.full((2, 3, 3), -5.0)
    assert await table.alookup(SOME, out=out) is out
    assert same(out, wanted(CONTENT, SOME))
    with pytest.raises(ValueError, match=r"out has shape \[3\], the rows have \[2, 3, 3\]"):
        await table.alookup(SOME, out=torch.zeros(3))
    with pytest.raises(TypeError, match=r"out is torch\.float64, the rows are torch\.float32"):
        await table.alookup(SOME, out=torch.zeros(2, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous host memory"):
        await table.alookup(SOME, out=torch.zeros(3, 3, 2).permute(2, 1, 0))
    with pytest.raises(KeyError, match=r"has no slot 'x', only embedding, exp_avg"):
        await table.alookup(SOME, "x")
    with pytest.raises(TypeError, match=r"ids are int64, got torch\.float32"):
        await table.alookup(SOME.float())


async def test_children_of_a_coalesced_table_have_ids_of_their_own(tmp_path: Path) -> None:
    one, other = data([1, 2, 70000]), data([2, 3], width=2)
    write_checkpoint(tmp_path, {"shop": one, "brand": other}, {})
    table = DiskTable(
        [2], coalesced=True, children=["shop", "brand"], name="merged", cache_bytes=99
    )
    await Loader(tmp_path, {"merged": table}).aload()
    ids = torch.tensor([1, 2, 3, 70000])
    for _ in range(2):
        assert same(await table.alookup(ids, child="shop"), wanted(one, ids))
        assert same(await table.alookup(ids, child="brand"), wanted(other, ids))
    assert sorted(table.ids("brand").tolist()) == [2, 3]
    assert same(await table.alookup(torch.tensor([3 | 1 << 52])), wanted(other, torch.tensor([3])))
    assert table.contains(ids, "shop").tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_halves_are_widened_while_they_are_looked_up(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    rows = torch.randn(50, 5).to(dtype)
    content = TableData(ids=torch.arange(50), slots={"embedding": rows})
    write_checkpoint(tmp_path, {"t": content}, {})
    table = DiskTable([5], name="t", cache_bytes=200)
    report = await Loader(tmp_path, {"t": table}, cast="widen").aload()
    assert [str(cast) for cast in report.casts] == [
        f"t@embedding: {str(dtype).removeprefix('torch.')} to float32"
    ]
    ids = torch.tensor([3, 99, 49, 3])
    expected = torch.cat([rows, torch.zeros(1, 5, dtype=dtype)])[[3, 50, 49, 3]].float()
    for _ in range(3):
        assert same(await table.alookup(ids), expected)


async def test_rows_of_another_dtype_may_take_the_place_of_all_that_go(tmp_path: Path) -> None:
    whole, half = data(range(50)), data(range(20, 80))
    half = TableData(ids=half.ids, slots={"embedding": half.slots["embedding"].half()})
    write_checkpoint(tmp_path / "whole", {"t": whole}, {})
    write_checkpoint(tmp_path / "half", {"t": half}, {})
    table = disk_table(whole)
    await Loader(tmp_path / "whole", {"t": table}).aload()
    entry = {"path": str(tmp_path / "half"), "load": ["*"], "hashtable_clear": False}
    with pytest.raises(ValueError, match=r"holds rows of torch.float32, .* has float16"):
        await Loader.from_bank([entry], {"t": table}, cast="widen").aload()
    assert same(await table.alookup(whole.ids), whole.slots["embedding"])
    cleared = entry | {"hashtable_clear": True}
    await Loader.from_bank([cleared], {"t": table}, cast="widen").aload()
    assert same(await table.alookup(half.ids), half.slots["embedding"].float())
    assert len(table) == len(half.ids)


async def test_a_second_load_is_on_top_of_the_first(tmp_path: Path) -> None:
    old, new = data(list(range(100)), exp_avg=1), data([*range(50, 150), 50])
    write_checkpoint(tmp_path / "a", {"t": old}, {})
    write_checkpoint(tmp_path / "b", {"t": new}, {}, sort=True)
    table, twin = disk_table(old), table_for(old)
    for folder in ("a", "b"):
        counts = [
            (await Loader(tmp_path / folder, {"t": each}).aload()).tables["t"]
            for each in (table, twin)
        ]
        assert counts[0] == counts[1]
    ids = torch.arange(-3, 160)
    assert same(await table.alookup(ids), twin.lookup(ids))
    held = torch.arange(100)  # of new ids the load has brought no row of this slot
    assert same(await table.alookup(held, "exp_avg"), twin.lookup(held, "exp_avg"))
    assert len(table) == len(twin) == len(set(table.ids().tolist()))


# --- caches


async def test_rows_that_were_read_are_hits_from_then_on(path: Path) -> None:
    table = await loaded(path, cache_bytes=1 << 20)
    ids = CONTENT.ids[:300]
    for _ in range(2):
        assert same(await table.alookup(ids), wanted(CONTENT, ids))
    stats = table.stats()
    assert (stats.lookups, stats.ids, stats.hits, stats.rows_read) == (2, 600, 300, 300)
    assert stats.hit_rate == 0.5
    assert stats.bytes_read == 300 * 12
    assert sum(stats.latency.values()) == 2


async def test_an_id_that_is_there_twice_is_read_once(path: Path) -> None:
    table = await loaded(path)
    ids = torch.tensor([7, 7, 5, 7, -1, 5])
    assert same(await table.alookup(ids), wanted(CONTENT, ids))
    stats = table.stats()
    assert (stats.ids, stats.rows_read, stats.absent) == (6, 2, 2)


async def test_tables_of_one_runtime_share_a_cache_and_never_mix_rows(tmp_path: Path) -> None:
    runtime = Runtime(row_cache_bytes=20_000)
    contents = [
        data(list(range(number, 200 + number)), width=width)
        for number, width in enumerate((2, 2, 3))
    ]
    tables = []
    for number, content in enumerate(contents):
        write_checkpoint(tmp_path / str(number), {"t": content}, {})
        tables.append(await loaded(tmp_path / str(number), content, runtime=runtime))
    rng = random.Random(1)
    for _ in range(200):
        at = rng.randrange(3)
        ids = torch.tensor(rng.choices(range(210), k=20))
        assert same(await tables[at].alookup(ids), wanted(contents[at], ids))
    assert all(table.stats().hits for table in tables)
    assert [table.cache_bytes for table in tables] == [0, 0, 0], "it is the runtime's"


async def test_warm_rows_are_hits(path: Path) -> None:
    table = await loaded(path, cache_bytes=1 << 20)
    await table.awarm(CONTENT.ids[:100])
    assert same(await table.alookup(CONTENT.ids[:100]), wanted(CONTENT, CONTENT.ids[:100]))
    assert table.stats().hits == 100


async def test_without_a_cache_or_rows_there_is_nothing_to_warm(path: Path) -> None:
    with pytest.raises(RuntimeError, match="has no cache for rows: make it with cache_bytes="):
        await (await loaded(path)).awarm(SOME)
    with pytest.raises(RuntimeError, match="has no rows yet: load it first"):
        await disk_table(cache_bytes=1000).aload_hot(path / "hot")
    with pytest.raises(ValueError, match="cache_bytes is the runtime's"):
        disk_table(cache_bytes=1000, runtime=Runtime())


async def test_a_prefetch_waits_for_nothing(path: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def answer(_number: int, may_wait: bool) -> int | None:
        began.set()
        go_on.wait(20)
        return None

    fake = FakeReads(answer)
    table = await loaded(path, runtime=Handed(cache_bytes=1 << 20, calls=fake.calls))
    table.prefetch(CONTENT.ids[:5])
    await asyncio.to_thread(began.wait, 20)
    go_on.set()
    assert same(await table.alookup(CONTENT.ids[:5]), wanted(CONTENT, CONTENT.ids[:5]))


@pytest.mark.parametrize("coalesced", [False, True])
async def test_hot_ids_survive_a_restart(tmp_path: Path, coalesced: bool) -> None:
    one, other = data(list(range(40))), data(list(range(20, 60)))
    write_checkpoint(tmp_path / "c", {"x": one, "y": other}, {})

    async def table(children: Sequence[str]) -> DiskTable:
        new = DiskTable(
            [2], name=children[0], coalesced=coalesced, cache_bytes=1 << 20,
            children=children if coalesced else None,
        )  # fmt: skip
        await Loader(tmp_path / "c", {new.name: new}).aload()
        return new

    before = await table(["x", "y"])
    for _ in range(3):
        await before.alookup(torch.arange(10), child="x")
    if coalesced:
        await before.alookup(torch.arange(30, 35), child="y")
    saved = await before.asave_hot(tmp_path / "hot")
    assert saved == (15 if coalesced else 10)
    assert {one.name for one in tmp_path.iterdir()} == {"c", "hot"}

    after = await table(["y", "x"] if coalesced else ["x"])
    assert await after.aload_hot(tmp_path / "hot") == saved
    assert same(await after.alookup(torch.arange(10), child="x"), wanted(one, torch.arange(10)))
    assert after.stats().hits == 10
    if coalesced:
        ids = torch.arange(30, 35)
        assert same(await after.alookup(ids, child="y"), wanted(other, ids))
        assert after.stats().hits == 15


def arrays(save: Callable[..., None] = np.savez, **named: Any) -> Callable[[Path], None]:  # noqa: ANN401
    def spoil(path: Path) -> None:
        with path.open("wb") as file:
            save(file, **named)

    return spoil


def declare_more(path: Path) -> None:
    """Have an array say that it takes a petabyte."""
    arrays(names=HOT, ids0=np.zeros(3, np.int64), counts0=np.zeros(3, np.uint8))(path)
    header = b"'shape': (3,), }"
    text = path.read_bytes().replace(header, b"'shape': (1%s,), }" % (b"0" * 15), 1)
    path.write_bytes(text.replace(b" " * 15 + b"\n", b"\n", 1))


HOT = np.array(["1", "embedding"])
SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hot ids"),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "compressed": arrays(np.savez_compressed, names=np.array(["0"])),
    "pickled": arrays(names=np.array([{}], object)),
    "other arrays": arrays(x=np.zeros(3)),
    "too short": arrays(names=HOT, ids0=np.zeros(3, np.int64), counts0=np.zeros(2, np.uint8)),
    "floats": arrays(names=HOT, ids0=np.zeros(3), counts0=np.zeros(3, np.uint8)),
    "counts below 0": arrays(names=HOT, ids0=np.zeros(3, np.int64), counts0=np.full(3, -(2**32))),
    "more than there is": declare_more,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
async def test_a_spoilt_file_of_hot_ids_is_refused(
    path: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    table = await loaded(path, cache_bytes=1 << 20)
    await table.alookup(SOME)
    await table.asave_hot(tmp_path / "hot")
    await asyncio.to_thread(spoil, tmp_path / "hot")
    with pytest.raises(ValueError, match=r"hot is no file of hot ids: "):
        await table.aload_hot(tmp_path / "hot")
    with pytest.raises(FileNotFoundError):
        await table.aload_hot(tmp_path / "none")


async def test_a_cache_is_shared_out_among_the_tables_that_are_left(tmp_path: Path) -> None:
    runtime = Runtime(row_cache_bytes=40_000)
    for width in (3, 4, 5, 6):
        content = data(list(range(300)), width=width)
        write_checkpoint(tmp_path / str(width), {"t": content}, {})
        table = await loaded(tmp_path / str(width), content, runtime=runtime)
        for _ in range(2):
            await table.alookup(content.ids)
        table.close()  # its rows are nobody's by the time the next one joins
    assert table.stats().hits > 250


async def test_a_copy_has_the_same_rows_and_loads_by_itself(path: Path, tmp_path: Path) -> None:
    table = await loaded(path, cache_bytes=1000)
    for other in (copy.deepcopy(table), copy.copy(table)):
        assert same(await other.alookup(SOME), wanted(CONTENT, SOME))
        write_checkpoint(tmp_path / "new", {"t": data([7], width=3)}, {})
        await Loader(tmp_path / "new", {"t": other}).aload()
        assert (await other.alookup(torch.tensor([7]))).tolist() == [[1, 2, 3]]
        assert same(await table.alookup(SOME), wanted(CONTENT, SOME))
        other.close()
    with pytest.raises(TypeError, match="holds files open"):
        pickle.dumps(table)


# --- loads


async def test_loads_of_the_same_ids_do_not_pile_up(path: Path) -> None:
    table = await loaded(path)
    before = table.stats().nbytes, len(files_of(path))
    for _ in range(5):
        await Loader(path, {"t": table}).aload()
        gc.collect()
        assert (table.stats().nbytes, len(files_of(path))) == before
    assert same(await table.alookup(SOME), wanted(CONTENT, SOME))


async def test_only_ids_are_read_and_verified(tmp_path: Path) -> None:
    full = HashTable([8], name="t")
    full.insert(torch.arange(5000) * 31, torch.randn(5000, 8))
    Saver.to(tmp_path / "c", {"t": full}).save()
    rows = shard_holding(tmp_path / "c", "t.embedding/part_0_1")
    table = DiskTable([8], name="t")
    report = await Loader(tmp_path / "c", {"t": table}).aload()
    assert report.bytes_read == report.bytes_verified == 5000 * 8
    assert same(await table.alookup(full.ids()), full.rows())

    report = await Loader(tmp_path / "c", {"t": DiskTable([8], name="t")}, verify="require").aload()
    assert report.bytes_verified == 5000 * 8 * 5, "then rows are compared, too"
    flip(rows, rows.stat().st_size - 3)
    with pytest.raises(CheckpointError, match="are not those that were written"):
        await Loader(tmp_path / "c", {"t": DiskTable([8], name="t")}, verify="require").aload()
    with pytest.raises(CheckpointChangedError, match="was written to while rows were read from it"):
        await table.alookup(full.ids()[:3])


async def test_sorted_ids_take_eight_bytes_each(tmp_path: Path) -> None:
    full = HashTable([1], name="t")
    full.insert(torch.arange(100_000) * 7919, torch.zeros(100_000, 1))
    Saver.to(tmp_path / "c", {"t": full}).save()
    table = DiskTable([1], name="t")
    await Loader(tmp_path / "c", {"t": table}).aload()
    assert table.stats().nbytes <= 8.5 * 100_000


@pytest.mark.parametrize("fault", ["a file that is gone", "another dtype", "half the ids"])
async def test_a_load_that_fails_leaves_the_table_as_it_was(
    path: Path, tmp_path: Path, fault: str
) -> None:
    table = await loaded(path)
    write_checkpoint(tmp_path / "new", {"t": CONTENT}, {}, writers=3)
    shard = shard_holding(tmp_path / "new", "t.embedding/part_0_1")
    match fault:
        case "a file that is gone":
            shard.unlink()
        case "half the ids":
            os.truncate(shard_holding(tmp_path / "new", "t.id/part_0_1"), 3000)
        case _:
            other = data([1, 2], width=3)
            other.slots["embedding"] = other.slots["embedding"].double()
            write_checkpoint(tmp_path / "new", {"t": other}, {}, writers=3)
    with pytest.raises((CheckpointError, PlanError)):
        await Loader(tmp_path / "new", {"t": table}).aload()
    assert same(await table.alookup(SOME), wanted(CONTENT, SOME))
    assert not files_of(tmp_path / "new")
    await Loader(path, {"t": table}).aload()  # no update is under way


async def test_what_cannot_stay_where_it_is_is_refused_in_the_plan(tmp_path: Path) -> None:
    content = TableData(ids=torch.arange(5), slots={"embedding": torch.zeros(5, 2)})
    write_checkpoint(tmp_path, {"t": content}, {})
    table = DiskTable([2], dtype=torch.float64, name="t")
    with pytest.raises(PlanError, match="from bfloat16 and float16 to float32 only"):
        await Loader(tmp_path, {"t": table}, cast="widen").aload()
    with pytest.raises(PlanError, match="from bfloat16 and float16 to float32 only"):
        await Loader(tmp_path, {"t": table}).aload()


@pytest.mark.parametrize("name", ["insert", "delete", "clear"])
async def test_a_table_on_disk_is_read_only(path: Path, name: str) -> None:
    table = await loaded(path)
    with pytest.raises(TypeError, match="a DiskTable is read-only"):
        getattr(table, name)(torch.tensor([1]))
    with pytest.raises(TypeError, match="its rows are in a checkpoint already"):
        await Saver.to(path.parent / "x", {"t": table}).asave()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "cache_bytes below 0": ({"cache_bytes": -1}, "cache_bytes is 0 or more"),
    "no concurrency": ({"concurrency": 0}, "concurrency must be positive"),
    "no patience": ({"stall_timeout": 0}, "stall_timeout must be positive"),
}


@pytest.mark.parametrize(("how", "problem"), WRONG.values(), ids=WRONG)
def test_arguments_that_make_no_sense_are_refused_at_once(
    how: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        DiskTable([1], **how)
    with pytest.raises(ValueError, match=f"row_{problem}"):
        Runtime(**{f"row_{name}": value for name, value in how.items()})


async def test_a_table_is_opened_without_a_loader(path: Path) -> None:
    async with open_table(path, "t", slots=["exp_avg"], cache_bytes=1000) as table:
        assert same(await table.alookup(SOME), wanted(CONTENT, SOME))
        assert same(await table.alookup(SOME, "exp_avg"), wanted(CONTENT, SOME, "exp_avg"))
        late = asyncio.create_task(table.alookup(SOME))
        await asyncio.sleep(0)
    assert same(await late, wanted(CONTENT, SOME)), "it had begun"
    assert len(table) == 0
    with pytest.raises(RuntimeError, match="table 't' is closed"):
        await table.alookup(SOME)
    assert not files_of(path)
    with pytest.raises(KeyError, match=r"no table 'u', there is: t"):
        async with open_table(path, "u"):
            pass
    with pytest.raises(KeyError, match=r"has no slot 'm', it has: embedding, exp_avg"):
        async with open_table(path, "t", slots=["m"]):
            pass


async def test_a_table_may_be_closed_while_lookups_wait_for_a_thread(path: Path) -> None:
    table = await loaded(path, concurrency=1)
    asked = [CONTENT.ids[at : at + 500] for at in range(0, 2500, 500)]
    tasks = [asyncio.create_task(table.alookup(ids)) for ids in asked]
    await asyncio.sleep(0)
    table.close()
    for ids, task in zip(asked, tasks, strict=True):
        assert same(await task, wanted(CONTENT, ids))


# --- faults


async def test_a_failure_of_what_nobody_awaits_is_counted(path: Path) -> None:
    failed = threading.Event()

    def answer(_number: int, may_wait: bool) -> int | None:
        if may_wait:
            failed.set()
        return -errno.EACCES if may_wait else -errno.EAGAIN

    fake = FakeReads(answer)
    table = await loaded(path, runtime=Handed(calls=fake.calls, concurrency=1))
    table.prefetch(SOME)
    await asyncio.to_thread(failed.wait, 20)
    with pytest.raises(ReadError):  # on the one thread, so behind it
        await table.alookup(SOME)
    assert table.stats().failures == 2


def test_who_waits_for_a_thread_is_not_given_up_and_a_slow_disk_is_no_dead_one(
    path: Path,
) -> None:
    """Each read takes a fifth of the time-out; all of a lookup, and the wait, take longer."""

    def answer(_number: int, may_wait: bool) -> int | None:
        if may_wait:
            time.sleep(0.05)
        return no_such_call(0, may_wait)

    fake = FakeReads(answer)
    table = asyncio.run(
        loaded(path, runtime=Handed(calls=fake.calls, concurrency=1, stall_timeout=0.25))
    )
    found: list[Tensor] = []
    ids = CONTENT.ids[:12]
    threads = [threading.Thread(target=lambda: found.append(table.lookup(ids))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(same(rows, wanted(CONTENT, ids)) for rows in found)


@pytest.mark.parametrize("bad", range(6))
@pytest.mark.parametrize("times", [1, 4])
async def test_a_read_that_fails_for_a_moment_is_tried_again(
    path: Path, bad: int, times: int
) -> None:
    failed: list[int] = []

    def answer(number: int, may_wait: bool) -> int | None:
        if may_wait and number >= bad and len(failed) < times:
            failed.append(number)
            return -errno.EIO
        return no_such_call(number, may_wait)

    fake = FakeReads(answer)
    table = await loaded(path, runtime=Handed(calls=fake.calls))
    assert same(await table.alookup(SOME), wanted(CONTENT, SOME))
    assert table.stats().retries == times


async def test_a_read_that_always_fails_names_file_range_and_table(path: Path) -> None:
    fake = FakeReads(lambda _, may_wait: -errno.EIO if may_wait else -errno.EAGAIN)
    table = await loaded(path, runtime=Handed(calls=fake.calls, cache_bytes=1000))
    out = torch.full((2, 3, 3), 5.0)
    with pytest.raises(
        ReadError,
        match=r"bytes \[\d+, \d+\): Input/output error, 5 times in a row; .* \(wanted by 't'\)",
    ) as caught:
        await table.alookup(SOME, out=out)
    assert caught.value.location == str(path)
    assert caught.value.length == 12
    assert isinstance(caught.value.__cause__, OSError)
    assert bool((out == 5).all()), "nothing of it was handed out"
    assert table.stats().failures == 1


async def test_an_error_that_does_not_pass_is_not_tried_again(path: Path) -> None:
    fake = FakeReads(lambda _, may_wait: -errno.EACCES if may_wait else -errno.EAGAIN)
    table = await loaded(path, runtime=Handed(calls=fake.calls))
    with pytest.raises(ReadError, match="Permission denied"):
        await table.alookup(SOME)
    assert table.stats().retries == 0


@pytest.mark.parametrize("direct_io", [False, True])
async def test_a_file_that_is_cut_short_is_an_error_and_no_zeros(
    path: Path, direct_io: bool
) -> None:
    table = await loaded(path, direct_io=direct_io)
    for shard in path.glob("*.safetensors"):
        os.truncate(shard, 4096)
    with pytest.raises(CheckpointChangedError):
        await table.alookup(CONTENT.ids[-500:])


async def test_a_checkpoint_that_is_removed_goes_on_being_read(path: Path) -> None:
    table = await loaded(path)
    await asyncio.to_thread(shutil.rmtree, path)
    assert same(await table.alookup(SOME), wanted(CONTENT, SOME))


async def test_a_checkpoint_that_is_replaced_goes_on_being_read(path: Path, tmp_path: Path) -> None:
    table = await loaded(path)
    other = data([7, -1, 65543, *range(100, 3000)], width=3)
    write_checkpoint(tmp_path / "other", {"t": other}, {}, ranks=2, shuffle_seed=9)
    for shard in (tmp_path / "other").glob("*.safetensors"):
        shard.replace(path / shard.name)
    assert same(await table.alookup(SOME), wanted(CONTENT, SOME))


async def test_rows_are_right_or_there_is_an_error_while_a_file_is_written_to(path: Path) -> None:
    table = await loaded(path, cache_bytes=2000)
    shards = list(path.glob("*.safetensors"))
    stop = threading.Event()

    def spoil() -> None:
        for shard in shards:
            flip(shard, shard.stat().st_size - 1)
        stop.wait(20)

    spoiling = asyncio.create_task(asyncio.to_thread(spoil))
    rng, outcomes = random.Random(1), set()
    for _ in range(300):
        ids = CONTENT.ids[rng.choices(range(len(CONTENT.ids)), k=40)]
        try:
            assert same(await table.alookup(ids), wanted(CONTENT, ids))
            outcomes.add("right")
        except CheckpointChangedError:
            outcomes.add("changed")
    stop.set()
    await spoiling
    assert "changed" in outcomes


@pytest.mark.parametrize("how", [{}, {"cache_bytes": 3000}, {"direct_io": True}], ids=str)
async def test_lookups_that_are_cancelled_at_any_moment_leave_nothing_behind(
    path: Path, how: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    others = set(threading.enumerate())
    table = await loaded(path, **how)
    rounds = 10_000 if request.config.getoption("every_step") else 100
    rng = random.Random(3)
    await table.alookup(SOME)
    files = files_of(path)
    for _ in range(rounds // 10):
        asked = [
            CONTENT.ids[rng.choices(range(len(CONTENT.ids)), k=rng.choice([1, 30, 2900]))]
            for _ in range(10)
        ]
        tasks = [asyncio.create_task(table.alookup(ids)) for ids in asked]
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        for task in rng.sample(tasks, 5):
            task.cancel()
        for ids, outcome in zip(
            asked, await asyncio.gather(*tasks, return_exceptions=True), strict=True
        ):
            if not isinstance(outcome, asyncio.CancelledError):
                assert isinstance(outcome, torch.Tensor), outcome
                assert same(outcome, wanted(CONTENT, ids))
    assert same(await table.alookup(SOME), wanted(CONTENT, SOME))
    assert files_of(path) == files
    mine = set(threading.enumerate()) - others
    table.close()
    for thread in mine:
        await asyncio.to_thread(thread.join, 20)
        assert not thread.is_alive()


async def test_small_lookups_are_not_stuck_behind_large_ones(path: Path) -> None:
    """Two threads: one is for small lookups only, however many large ones wait for the disk."""
    hangs, go_on = threading.Event(), threading.Event()

    def answer(_number: int, may_wait: bool) -> int | None:  # as it is called
        if not hangs.is_set():
            hangs.set()
            go_on.wait(20)
        return None

    fake = FakeReads(answer)
    table = await loaded(path, runtime=Handed(concurrency=2, calls=fake.calls))
    many = CONTENT.ids.repeat(2)
    large = [asyncio.create_task(table.alookup(many)) for _ in range(4)]
    await asyncio.to_thread(hangs.wait, 20)
    assert same(await table.alookup(SOME), wanted(CONTENT, SOME))
    assert not any(task.done() for task in large)
    go_on.set()
    for task in large:
        assert same(await task, wanted(CONTENT, many))


def lookups_of_a_child(path: str) -> bool:
    table = disk_table(cache_bytes=1000)
    Loader(path, {"t": table}).load()
    right = same(table.lookup(SOME), wanted(CONTENT, SOME))
    if not (pid := os.fork()):
        os._exit(0 if same(table.lookup(SOME), wanted(CONTENT, SOME)) else 3)
    return right and os.waitpid(pid, 0)[1] == 0


def test_a_forked_process_has_threads_of_its_own(path: Path) -> None:
    assert apart(lookups_of_a_child, path) is True


def test_loops_that_come_and_go_may_share_a_table(path: Path) -> None:
    table = asyncio.run(loaded(path, cache_bytes=1000))
    loops = []

    async def look() -> Tensor:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        return await table.alookup(CONTENT.ids)

    for _ in range(5):
        assert same(asyncio.run(look()), wanted(CONTENT, CONTENT.ids))
    gc.collect()
    assert sum(loop() is not None for loop in loops) <= 1, "none is kept but the last"
    assert same(table.lookup(SOME), wanted(CONTENT, SOME))


# --- a model that is served


async def test_versions_are_swapped_and_rolled_back_while_rows_are_read(tmp_path: Path) -> None:
    contents = {step: data(list(range(step, 500 + step))) for step in (1, 2)}
    runtime = Runtime(row_cache_bytes=50_000)

    def publish(step: int) -> None:
        write_checkpoint(tmp_path / f"ckpt_{step}", {"t": contents[step]}, {})
        with (tmp_path / "checkpoint").open("a") as file:
            file.write(f"ckpt_{step}\n")

    def build() -> tuple[dict[str, DiskTable], None]:
        return {"t": DiskTable([2], name="t", runtime=runtime)}, None

    await asyncio.to_thread(publish, 1)
    served: set[str] = set()
    second = asyncio.Event()

    async def look() -> None:
        while served != {"ckpt_1", "ckpt_2", "back"}:
            with live.use() as model:
                ids = torch.randint(0, 520, (30,))
                rows = await model.tables["t"].alookup(ids)
                step = int(model.version.removeprefix("ckpt_"))
                assert same(rows, wanted(contents[step], ids)), "of one version"
                served.add("back" if "ckpt_2" in served and step == 1 else model.version)
                if step == 2:
                    second.set()
            await asyncio.sleep(0)

    async with Live(tmp_path, build, poll=0.01) as live, asyncio.timeout(30):
        lookers = [asyncio.create_task(look()) for _ in range(4)]
        await asyncio.to_thread(publish, 2)
        await second.wait()
        with live.use() as model:
            await asyncio.to_thread(shutil.rmtree, tmp_path / "ckpt_2")
            ids = torch.tensor([2, 501, 3])
            assert same(await model.tables["t"].alookup(ids), wanted(contents[2], ids))
        await live.rollback()
        await asyncio.gather(*lookers)
    assert not files_of(tmp_path)


def lookups_with_little_memory(path: str, rows: int) -> int:
    """Look up rows of a table in 64 MiB more than its ids and its cache; return all of that."""
    import resource  # noqa: PLC0415  # of Unix

    threading.stack_size(256 << 10)  # all of a stack counts
    warm = DiskTable([256], name="t")
    Loader(path, {"t": warm}, parallel=2).load()  # all that a first load and lookup import
    warm.lookup(torch.arange(10))
    [held] = [
        int(line.split()[1]) << 10
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("VmData:")
    ]
    more = 8 * rows + (4 << 20) + (64 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (held + more, held + more))
    table = DiskTable([256], name="t", cache_bytes=4 << 20, concurrency=2)
    Loader(path, {"t": table}, parallel=2, max_inflight_bytes=8 << 20).load()
    for seed in range(20):
        ids = torch.randint(0, rows, (4000,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(table.lookup(ids)[:, 0], ids.float())
    return more


def test_a_table_need_not_fit_into_memory(tmp_path: Path) -> None:
    rows = 200_000
    ids = torch.arange(rows)
    content = TableData(
        ids=ids, slots={"embedding": ids.float()[:, None].expand(rows, 256).contiguous()}
    )
    write_checkpoint(tmp_path, {"t": content}, {}, sort=True)
    del content
    assert apart(lookups_with_little_memory, tmp_path, rows) < rows * 1024 // 2
