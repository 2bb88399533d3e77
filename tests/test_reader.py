"""Reading single tensors, and windows of their rows."""

from __future__ import annotations

import asyncio
import itertools
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from asyncloader import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    ReadError,
)
from tests.oracle import (
    Block,
    TableData,
    edit_header,
    read_checkpoint,
    rows_of,
    shard_holding,
    sparse_block,
    split_slices,
    write_checkpoint,
    write_ranks,
)
from tests.steps import Steps
from tests.support import data, debug_off, nothing_left_behind, open_files, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

GENUINE = Path(__file__).parent / "data" / "recis"
CONTENT = data(list(range(-20, 20)), width=3, exp_avg=1, exp_avg_sq=2)
DENSE = {
    "layer1": torch.arange(6.0).view(3, 2),
    "layer10": torch.arange(4.0),
    "scalar": torch.tensor(5),
    "flags": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 3),
}
RANKS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, {"t": CONTENT}, DENSE, ranks=RANKS, writers=2, shuffle_seed=1)
    return path


def stored(checkpoint: Path, name: str) -> Tensor:
    """Return what the oracle finds under a name."""
    if "@" not in name:
        return DENSE[name]
    table, _, slot = name.rpartition("@")
    found = read_checkpoint(checkpoint)[0][table]
    return found.ids if slot == "id" else found.slots[slot]


NAMES = [*DENSE, "t@id", "t@embedding", "t@exp_avg", "t@exp_avg_sq"]


def test_all_names_are_listed(checkpoint: Path) -> None:
    names = CheckpointReader(checkpoint).tensor_names()
    assert isinstance(names, list)
    assert sorted(names) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_bytes", [1, 20, 1 << 20])
async def test_a_tensor_is_read_as_it_was_written(
    checkpoint: Path, name: str, chunk_bytes: int
) -> None:
    """`layer1` is not `layer10`, nor is `exp_avg` also `exp_avg_sq`: names are whole."""
    expected = stored(checkpoint, name)
    reader = CheckpointReader(checkpoint, chunk_bytes=chunk_bytes)
    with nothing_left_behind():
        found = await reader.aread_tensor(name)
        shape, dtype = await reader.atensor_shape(name), await reader.atensor_dtype(name)
    assert raw(found) == raw(expected)
    assert (shape, dtype) == (expected.shape, expected.dtype)
    assert isinstance(shape, torch.Size)


def test_row_i_of_each_slot_belongs_to_id_i(checkpoint: Path) -> None:
    with CheckpointReader(checkpoint) as reader:
        ids = reader.read_tensor("t@id")
        slots = {slot: reader.read_tensor(f"t@{slot}") for slot in CONTENT.slots}
    assert rows_of(ids, slots) == rows_of(CONTENT.ids, CONTENT.slots)
    owners = [
        next(rank for rank, part in enumerate(split_slices(65536, RANKS)) if part.accepts(id_))
        for id_ in ids.tolist()
    ]
    assert owners == sorted(owners), "in the order of slices"


@pytest.mark.parametrize("name", ["small_4shards", "optim_slots"])
def test_a_checkpoint_of_recis_is_read_bit_for_bit(name: str) -> None:
    truth: dict[str, Any] = torch.load(GENUINE / name / "truth.pt", weights_only=True)
    with CheckpointReader(GENUINE / name) as reader:
        names = set(reader.tensor_names())
        for key, tensor in truth["dense"].items():
            assert raw(reader.read_tensor(key)) == raw(tensor)
            names.remove(key)
        for table, held in truth["tables"].items():
            slots = {slot: reader.read_tensor(f"{table}@{slot}") for slot in held["slots"]}
            ids = reader.read_tensor(f"{table}@id")
            assert rows_of(ids, slots) == rows_of(held["ids"], held["slots"])
            names -= {f"{table}@{slot}" for slot in ("id", *slots)}
    assert names == set()


async def test_blocking_methods_work_where_a_loop_runs(checkpoint: Path) -> None:
    with nothing_left_behind(), CheckpointReader(checkpoint) as reader:
        assert sorted(reader.tensor_names()) == sorted(NAMES)
        assert reader.tensor_shape("layer1") == (3, 2)
        assert reader.tensor_dtype("flags") == torch.bool
        assert raw(reader.read_tensor("scalar")) == raw(DENSE["scalar"])
        assert raw(reader.read_rows("layer1", 1, 2)) == raw(DENSE["layer1"][1:2])


def test_one_reader_serves_several_threads(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    found: dict[str, Tensor] = {}

    def read(name: str) -> None:
        found[name] = reader.read_tensor(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: raw(found[name]) for name in NAMES} == {
        name: raw(stored(checkpoint, name)) for name in NAMES
    }


# --- windows of rows


@given(st.data())
def test_a_window_is_that_part_of_the_whole(checkpoint: Path, draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from([name for name in NAMES if name != "scalar"]))
    whole = stored(checkpoint, name)
    begin, end = sorted(draw.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    chunk = draw.draw(st.integers(1, 40))
    found = CheckpointReader(checkpoint, chunk_bytes=chunk).read_rows(name, begin, end)
    assert raw(found) == raw(whole[begin:end])


async def test_windows_side_by_side_are_the_whole(checkpoint: Path) -> None:
    async with CheckpointReader(checkpoint) as reader:
        [rows, *_] = await reader.atensor_shape("t@embedding")
        bounds = itertools.pairwise([*range(0, rows, 7), rows])
        windows = [await reader.aread_rows("t@embedding", *pair) for pair in bounds]
    assert raw(torch.cat(windows)) == raw(stored(checkpoint, "t@embedding"))


@pytest.mark.parametrize(
    ("name", "bounds", "says"),
    [
        ("t@id", (0, 41), r"'t@id' has 40 rows, not \[0, 41\)"),
        ("t@id", (-1, 3), "has 40 rows"),
        ("t@id", (3, 2), "has 40 rows"),
        ("none", (0, 1), "has 0 rows"),
        ("scalar", (0, 1), "is a scalar"),
        ("scalar", (0, 0), "is a scalar"),
    ],
)
async def test_rows_that_are_not_there_are_refused(
    checkpoint: Path, name: str, bounds: tuple[int, int], says: str
) -> None:
    with nothing_left_behind(), pytest.raises(ValueError, match=says):
        await CheckpointReader(checkpoint).aread_rows(name, *bounds)


async def test_rows_are_counted_in_integers(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    bounds = torch.tensor([1, 2])
    assert raw(await reader.aread_rows("layer1", *bounds)) == raw(DENSE["layer1"][1:2])
    with pytest.raises(TypeError):
        await reader.aread_rows("layer1", 0, 1.0)  # type: ignore[arg-type]  # the very thing


# --- what stands there oddly


def test_names_that_hold_at_signs_are_split_at_the_last(tmp_path: Path) -> None:
    one, other = data([1]), data([2, 3])
    write_checkpoint(tmp_path, {"a@b": one, "a": other, "": data([4])}, {})
    reader = CheckpointReader(tmp_path)
    assert reader.read_tensor("a@b@id").tolist() == [1]
    assert reader.read_tensor("a@id").tolist() == [2, 3]
    assert reader.read_tensor("@id").tolist() == [4]


def test_a_tensor_that_is_called_like_a_slot_is_read_in_its_place(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data([1])}, {"t@id": torch.tensor([7.0])})
    reader = CheckpointReader(tmp_path)
    assert sorted(reader.tensor_names()) == ["t@embedding", "t@id"]
    assert reader.read_tensor("t@id").tolist() == [7.0]


def test_a_table_without_rows_has_empty_tensors(tmp_path: Path) -> None:
    empty = TableData(ids=torch.zeros(0, dtype=torch.int64), slots={"embedding": torch.ones(0, 4)})
    write_checkpoint(tmp_path, {"t": empty}, {}, ranks=3)
    reader = CheckpointReader(tmp_path)
    assert reader.tensor_shape("t@embedding") == (0, 4)
    assert raw(reader.read_tensor("t@embedding")) == raw(torch.ones(0, 4))
    assert raw(reader.read_rows("t@embedding", 0, 0)) == raw(torch.ones(0, 4))


def test_one_rank_may_have_no_rows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data([0, 1])}, {}, ranks=4)
    assert CheckpointReader(tmp_path).read_tensor("t@id").tolist() == [0, 1]


@pytest.mark.parametrize(
    "other",
    [torch.ones(2, 3), torch.ones(2, 2, 1), torch.ones(2, 2).double(), torch.tensor(1.0)],
    ids=["width", "rank", "dtype", "scalar"],
)
@pytest.mark.parametrize("method", ["atensor_shape", "atensor_dtype", "aread_tensor"])
async def test_parts_whose_rows_differ_are_refused(
    tmp_path: Path, other: Tensor, method: str
) -> None:
    blocks = [
        [sparse_block("t", "embedding", rows, rank=rank, ranks=2)]
        for rank, rows in enumerate([torch.ones(2, 2), other])
    ]
    write_ranks(tmp_path, blocks)
    with nothing_left_behind(), pytest.raises(CheckpointError, match="their rows differ") as caught:
        await getattr(CheckpointReader(tmp_path), method)("t@embedding")
    assert caught.value.key == "t.embedding/part_1_2"
    assert "'t.embedding/part_0_2'" in str(caught.value)


def test_a_block_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(1)})
    shard = shard_holding(tmp_path, "w^ ")
    edit_header(shard, lambda header: header.update({"v^ ": header.pop("w^ ")}))
    with pytest.raises(CheckpointError, match="index says that it stands here") as caught:
        CheckpointReader(tmp_path).tensor_shape("w")
    assert (caught.value.shard, caught.value.key) == (shard.name, "w^ ")


def test_rows_that_take_no_bytes_are_read_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(5, 0)})
    assert CheckpointReader(tmp_path).read_rows("w", 1, 4).shape == (3, 0)


def test_only_the_shards_that_are_needed_are_opened(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    kept = shard_holding(tmp_path, "layer1^ ")
    for path in tmp_path.glob("*.safetensors"):
        if path != kept:
            path.unlink()
    reader = CheckpointReader(tmp_path)
    assert raw(reader.read_tensor("layer1")) == raw(DENSE["layer1"])
    with pytest.raises(CheckpointError, match="the file is missing, but index names it"):
        reader.read_tensor("t@id")


# --- names that are not there


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("layer", "did you mean 'layer1'"),
        ("layer11", "did you mean 'layer1"),
        ("t@exp_av", "did you mean 't@exp_avg'"),
        ("t", "a table: read 't@embedding', 't@exp_avg', 't@exp_avg_sq', 't@id'"),
        ("layer1^ ", "did you mean 'layer1'"),
        ("", "not in .*: ''; "),
        ("x" * 1000, "not in .*tensor_names\\(\\) lists what there is"),
    ],
)
@pytest.mark.parametrize("method", ["atensor_shape", "atensor_dtype", "aread_tensor", "aread_rows"])
async def test_an_unknown_name_is_a_key_error_that_guesses(
    checkpoint: Path, name: str, says: str, method: str
) -> None:
    arguments = (name, 0, 1) if method == "aread_rows" else (name,)
    with nothing_left_behind(), pytest.raises(KeyError, match=says):
        await getattr(CheckpointReader(checkpoint), method)(*arguments)


async def test_a_name_is_text(checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="got 3"):
        await CheckpointReader(checkpoint).aread_tensor(3)  # type: ignore[arg-type]  # the very thing


# --- what stays open, and what is remembered


async def test_within_async_with_files_and_threads_are_kept(checkpoint: Path) -> None:
    with nothing_left_behind():
        async with CheckpointReader(checkpoint) as reader:
            await reader.aread_tensor("t@id")
            files, threads = open_files(), set(threading.enumerate())
            assert any(name.endswith(".safetensors") for name in files)
            await reader.aread_tensor("t@id")
            assert open_files() == files
            # Others of the same pool may only be starting.
            assert threads <= set(threading.enumerate())


async def test_many_calls_share_one_reader(checkpoint: Path) -> None:
    with nothing_left_behind():
        async with (
            CheckpointReader(checkpoint, max_inflight_bytes=50) as reader,
            asyncio.TaskGroup() as group,
        ):
            calls = {name: group.create_task(reader.aread_tensor(name)) for name in NAMES}
    for name, call in calls.items():
        assert raw(call.result()) == raw(stored(checkpoint, name))


async def test_leaving_waits_for_calls_that_are_under_way(checkpoint: Path) -> None:
    """Files that are closed too early may be another's when they are read."""
    slow = CheckpointReader(checkpoint, parallel=2, chunk_bytes=2)
    with nothing_left_behind():
        async with asyncio.TaskGroup() as group, slow as reader:
            await reader.aread_tensor("layer1")
            calls = []
            for steps in range(5):
                calls.append(group.create_task(reader.aread_tensor("t@embedding")))
                for _ in range(steps):
                    await asyncio.sleep(0)
            assert not calls[-1].done()
    for call in calls:
        assert raw(call.result()) == raw(stored(checkpoint, "t@embedding"))


async def test_who_is_cancelled_while_leaving_still_leaves_nothing_behind(
    checkpoint: Path,
) -> None:
    async def leave() -> None:
        async with asyncio.TaskGroup() as group, CheckpointReader(checkpoint) as reader:
            group.create_task(reader.aread_tensor("t@embedding"))
            await asyncio.sleep(0)

    step = 0
    while True:
        with debug_off(), nothing_left_behind():
            if not await Steps(range(step, step + 1)).run(leave):
                break
        step += 1
    assert step > 10, "there were awaits to cancel"


async def test_blocking_calls_within_async_with_do_not_disturb_it(checkpoint: Path) -> None:
    async with CheckpointReader(checkpoint) as reader:
        assert raw(reader.read_tensor("layer1")) == raw(DENSE["layer1"])
        assert raw(await reader.aread_tensor("layer1")) == raw(DENSE["layer1"])


async def test_a_reader_can_be_opened_again_but_not_twice_at_once(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    for _ in range(2):
        with nothing_left_behind():
            async with reader:
                await reader.aread_tensor("layer1")
    async with reader:
        with pytest.raises(RuntimeError, match="open already"):
            await reader.__aenter__()
        await reader.aread_tensor("layer1")


async def test_a_reader_that_two_tasks_open_at_a_time_is_opened_once(checkpoint: Path) -> None:
    """The files and threads of the other one were never let go."""
    reader = CheckpointReader(checkpoint)
    with nothing_left_behind():
        opened, refused = await asyncio.gather(
            reader.__aenter__(), reader.__aenter__(), return_exceptions=True
        )
        assert opened is reader
        assert "open already" in str(refused)
        await reader.__aexit__()


def test_names_and_headers_are_read_once(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    reader = CheckpointReader(tmp_path)
    reader.tensor_shape("t@id")
    known = repr(reader)
    for path in tmp_path.iterdir():
        path.unlink()
    assert sorted(reader.tensor_names()) == sorted(NAMES)
    assert reader.tensor_shape("t@id") == (40,)
    assert repr(reader) == known
    assert str(tmp_path) in known


async def test_a_file_that_was_replaced_meanwhile_is_not_read(tmp_path: Path) -> None:
    """Its header is another one, so the bytes would be anything."""
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(4)}, file)
    reader = CheckpointReader(file)
    assert (await reader.aread_tensor("w")).tolist() == [1, 1, 1, 1]
    save_file({"v": torch.zeros(2), "w": torch.ones(4)}, file)

    with nothing_left_behind(), pytest.raises(CheckpointChangedError) as caught:
        await reader.aread_tensor("w")

    assert (caught.value.location, caught.value.shard) == (str(file), file.name)
    assert (await CheckpointReader(file).aread_tensor("w")).tolist() == [1, 1, 1, 1]


async def test_a_file_that_shrinks_is_named_with_what_was_wanted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(10)})
    shard = shard_holding(tmp_path, "w^ ")
    with nothing_left_behind():
        async with CheckpointReader(tmp_path) as reader:
            assert await reader.atensor_shape("w") == (10,)
            with shard.open("r+b") as file:
                file.truncate(shard.stat().st_size - 4)
            with pytest.raises(CheckpointChangedError) as caught:
                await reader.aread_tensor("w")
    assert (caught.value.location, caught.value.shard) == (str(tmp_path), shard.name)
    cause = caught.value.__cause__
    assert isinstance(cause, ReadError)
    assert cause.names == ("w",)


def test_a_checkpoint_that_is_not_there_may_come(tmp_path: Path) -> None:
    """What failed is not remembered."""
    reader = CheckpointReader(tmp_path / "late")
    with pytest.raises(CheckpointNotFoundError):
        reader.tensor_names()
    write_checkpoint(tmp_path / "late", {}, {"w": torch.ones(1)})
    assert reader.tensor_names() == ["w"]


# --- cancellation


def read_tensor(reader: CheckpointReader) -> partial[Any]:
    return partial(reader.aread_tensor, "t@embedding")


def read_rows(reader: CheckpointReader) -> partial[Any]:
    return partial(reader.aread_rows, "t@embedding", 3, 35)


def tensor_shape(reader: CheckpointReader) -> partial[Any]:
    return partial(reader.atensor_shape, "t@embedding")


def unknown(reader: CheckpointReader) -> partial[Any]:
    async def fail() -> None:
        with pytest.raises(KeyError):
            await reader.atensor_dtype("t@embeding")

    return partial(fail)


@pytest.mark.parametrize("call", [read_tensor, read_rows, tensor_shape, unknown])
async def test_a_call_cancelled_at_any_await_leaves_nothing_behind(
    checkpoint: Path, call: Callable[[CheckpointReader], partial[Any]]
) -> None:
    reader, step = CheckpointReader(checkpoint, parallel=2, chunk_bytes=100), 0
    while True:
        with debug_off(), nothing_left_behind():
            if not await Steps(range(step, step + 1)).run(call(reader)):
                break
        step += 1
    assert step > 5, "there were awaits to cancel"


async def test_a_call_cancelled_at_any_await_does_not_spoil_the_others(checkpoint: Path) -> None:
    step = 0
    with nothing_left_behind():
        while True:
            async with CheckpointReader(checkpoint, parallel=2, chunk_bytes=100) as reader:
                with debug_off():
                    cancelled = await Steps(range(step, step + 1)).run(read_tensor(reader))
                found = await reader.aread_tensor("t@id")
            assert raw(found) == raw(stored(checkpoint, "t@id"))
            if not cancelled:
                break
            step += 1
    assert step > 5, "there were awaits to cancel"


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"checkpoint_path": b"x"}, TypeError),
        ({"checkpoint_path": "a\0b"}, ValueError),
        ({"parallel": 0}, ValueError),
        ({"parallel": 1.0}, TypeError),
        ({"chunk_bytes": 0}, ValueError),
        ({"max_inflight_bytes": True}, TypeError),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(
    arguments: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=next(iter(arguments))):
        CheckpointReader(**{"checkpoint_path": "nowhere", **arguments})


@pytest.mark.parametrize("rows", [[0, 3, 0, 2], [0, 0], [5]])
def test_parts_of_any_length_are_joined(tmp_path: Path, rows: Sequence[int]) -> None:
    parts = [torch.full((count, 2), float(rank)) for rank, count in enumerate(rows)]
    blocks: list[list[Block]] = [
        [sparse_block("t", "s", part, rank=rank, ranks=len(rows))]
        for rank, part in enumerate(parts)
    ]
    write_ranks(tmp_path, blocks)
    assert raw(CheckpointReader(tmp_path).read_tensor("t@s")) == raw(torch.cat(parts))
