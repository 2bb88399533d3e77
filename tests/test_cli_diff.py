"""`asyncloader diff`: what differs is found exactly, and where nothing does, nothing is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from asyncloader import (
    CheckpointError,
    CheckpointNotFoundError,
    Difference,
    Progress,
    adiff,
)
from asyncloader._tools.difference import Change, Kind, Names, compare
from asyncloader.cli._app import run as command
from tests.checkpoints import GENUINE, LIMITS, TABLES, TENSORS, flip, run, save
from tests.oracle import (
    TableData,
    shard_holding,
    sparse_block,
    split_slices,
    write_checkpoint,
    write_ranks,
)
from tests.support import data, nothing_left_behind

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NOTHING = Change(different=0, largest=None, infinite=0, nans=0)
NO_NAMES = Names(tables=(), slots=(), tensors=())


async def diff(a: Path, b: Path, budget: int = 1 << 20) -> Difference:
    with nothing_left_behind():
        return await adiff(a, b, options=LIMITS, budget=budget)


@pytest.mark.parametrize("budget", [100_000, 1 << 30])
@pytest.mark.parametrize("name", ["small_4shards", "optim_slots"])
async def test_a_checkpoint_equals_itself(name: str, budget: int) -> None:
    found = await diff(GENUINE / name, GENUINE / name, budget)
    assert found.equal
    assert all(slot.rows == table.kept for table in found.tables for slot in table.slots)
    assert (found.only_in_a, found.only_in_b, found.notes) == (NO_NAMES, NO_NAMES, ())


@pytest.mark.parametrize("size", [65536, 1000, 7])
async def test_other_ranks_other_slices_and_another_order_are_no_difference(
    tmp_path: Path, size: int
) -> None:
    write_checkpoint(tmp_path / "a", TABLES, TENSORS, ranks=3, shuffle_seed=1)
    write_checkpoint(tmp_path / "b", TABLES, TENSORS, ranks=2, slice_size=size, shuffle_seed=2)
    for a, b in (("a", "b"), ("b", "a")):
        found = await diff(tmp_path / a, tmp_path / b, 20_000)
        assert found.equal, found
        assert {table.name: table.kept for table in found.tables} == {
            name: len(table.ids) for name, table in TABLES.items()
        }
        assert {tensor.name: tensor.elements for tensor in found.tensors} == {
            name: tensor.numel() for name, tensor in TENSORS.items()
        }


BASE = TABLES["user@emb"]


def changed(content: TableData, **slots: Tensor) -> TableData:
    return replace(content, slots=content.slots | slots)


@pytest.mark.parametrize("budget", [1000, 20_000, 1 << 30])
async def test_changes_of_a_table_are_counted_exactly(tmp_path: Path, budget: int) -> None:
    """The budget decides into how many pieces the tables are cut, and nothing else."""
    embedding, average = BASE.slots["embedding"].clone(), BASE.slots["exp_avg"].clone()
    embedding[5] += torch.tensor([1.0, 0.0, -3.5])
    embedding[200, 2] += 0.25
    average[17, 0] = math.nan
    average[18, 0] = -math.inf
    other = changed(BASE, embedding=embedding, exp_avg=average)
    keep = torch.ones(len(BASE.ids), dtype=torch.bool)
    keep[[0, 7, 100]] = False
    other = TableData(
        ids=torch.cat([other.ids[keep], torch.tensor([10_001, 10_002])]),
        slots={slot: torch.cat([rows[keep], rows[:2]]) for slot, rows in other.slots.items()},
    )
    save(tmp_path / "a", tables={"t": BASE}, ranks=3)
    save(tmp_path / "b", tables={"t": other}, ranks=1)
    found = await diff(tmp_path / "a", tmp_path / "b", budget)
    [table] = found.tables
    assert (table.lost, table.gained, table.kept) == (3, 2, len(BASE.ids) - 3)
    slots = {slot.name: (slot.rows, slot.different, slot.change) for slot in table.slots}
    assert slots == {
        "embedding": (table.kept, 2, Change(different=3, largest=3.5, infinite=0, nans=0)),
        "exp_avg": (table.kept, 2, Change(different=2, largest=None, infinite=1, nans=1)),
        "filter": (table.kept, 0, NOTHING),
    }
    assert not found.equal
    assert all(tensor.equal for tensor in found.tensors)


async def test_names_that_only_one_has_are_listed(tmp_path: Path) -> None:
    few = {slot: rows for slot, rows in BASE.slots.items() if slot != "filter"}
    tables = {"user@emb": replace(BASE, slots=few), "new": data([1])}
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "w"}
    save(tmp_path / "a")
    save(tmp_path / "b", tables=tables, tensors=tensors | {"v": torch.ones(1)})
    found = await diff(tmp_path / "a", tmp_path / "b")
    assert found.only_in_a == Names(tables=("item",), slots=("user@emb@filter",), tensors=("w",))
    assert found.only_in_b == Names(tables=("new",), slots=(), tensors=("v",))
    assert not found.equal
    assert all(table.equal for table in found.tables)
    assert all(tensor.equal for tensor in found.tensors)


async def test_other_dtypes_and_shapes_are_named_and_not_compared(tmp_path: Path) -> None:
    count = len(BASE.ids)
    other = changed(BASE, embedding=torch.ones(count, 5), exp_avg=BASE.slots["exp_avg"].double())
    save(tmp_path / "a", tables={"t": BASE})
    save(tmp_path / "b", tables={"t": other}, tensors={"w": torch.ones(2), "step": torch.ones(())})
    found = await diff(tmp_path / "a", tmp_path / "b")
    [table] = found.tables
    assert {slot.name: (str(slot.a), str(slot.b), slot.rows) for slot in table.slots} == {
        "embedding": ("float32 [3]", "float32 [5]", 0),
        "exp_avg": ("float32 [3]", "float64 [3]", 0),
        "filter": ("float32 [1]", "float32 [1]", count),
    }
    kinds = {tensor.name: (tensor.a, tensor.b) for tensor in found.tensors}
    assert kinds["w"] == (Kind(dtype="float32", shape=(20, 3)), Kind(dtype="float32", shape=(2,)))
    assert (found.equal, table.equal, table.kept) == (False, False, count)


async def test_slots_of_which_nothing_can_be_loaded_do_not_keep_the_rest(tmp_path: Path) -> None:
    blocks = [
        sparse_block("t", "id", torch.tensor([1, 2])),
        sparse_block("t", "embedding", torch.ones(2, 0)),
    ]
    write_ranks(tmp_path, [blocks])
    found = await diff(tmp_path, tmp_path)
    assert (found.equal, found.tables[0].kept) == (True, 2)


async def test_a_slot_that_is_a_scalar_is_an_error_and_not_equal(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        blocks = [
            sparse_block("t", "id", torch.tensor([1])),
            sparse_block("t", "embedding", torch.ones(1, 1)),
            sparse_block("t", "s", torch.tensor(float(number))),
        ]
        write_ranks(tmp_path / name, [blocks])
    with pytest.raises(CheckpointError, match="no rows"):
        await diff(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("budget", [1, 7, 1 << 20])
async def test_changes_of_tensors_are_counted_exactly(tmp_path: Path, budget: int) -> None:
    other = {name: tensor.clone() for name, tensor in TENSORS.items()}
    other["w"][3, 1] -= 2
    other["w"][19, 2] += 5
    other["step"] += 3
    other["mask"][5] ^= True
    other["half"][2] = 7
    save_file(dict(TENSORS), tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    found = await diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", budget)
    changes = {one.name: (one.change.different, one.change.largest) for one in found.tensors}
    assert changes == {
        "w": (2, 5.0),
        "step": (1, 3),
        "mask": (1, 1),
        "half": (1, 5.0),
        "layer/part_0": (0, None),
        "none": (0, None),
    }
    assert (found.equal, found.tables) == (False, ())


async def test_rows_that_nobody_could_load_are_noted(tmp_path: Path) -> None:
    content = data([1, 2, 1, 40000])
    slots = {"id": content.ids, **content.slots}
    first, second = split_slices(65536, 2)
    write_ranks(
        tmp_path,
        [
            [sparse_block("t", slot, rows, claim=first) for slot, rows in slots.items()],
            [sparse_block("t", s, r[:0], rank=1, ranks=2, claim=second) for s, r in slots.items()],
        ],
    )
    found = await diff(tmp_path, tmp_path)
    assert (found.equal, found.tables[0].kept) == (True, 2)
    assert [note.partition(": ")[2] for note in found.notes] == 2 * [
        "1 rows of 't' gave way to a later one of their id",
        "1 ids of 't' lie outside the slice that their block claims",
    ]


async def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    with pytest.raises(CheckpointNotFoundError):
        await diff(path, tmp_path / "absent")
    write_ranks(tmp_path / "b", [[sparse_block("t", "embedding", torch.ones(1, 1))]])
    with pytest.raises(CheckpointError, match="'t': the table has no ids"):
        await diff(tmp_path / "b", path)
    flip(shard_holding(path, "user.emb@embedding/part_0_2"), -1)
    with pytest.raises(CheckpointError, match="are not those that were written"):
        await diff(path, path)


async def test_progress_counts_both_sides(tmp_path: Path) -> None:
    told: list[Progress] = []
    a, b = save(tmp_path / "a", ranks=1), save(tmp_path / "b")
    await adiff(a, b, options=LIMITS, budget=1 << 20, progress=told.append)
    blocks = [file.stat().st_size for path in (a, b) for file in path.glob("*.safetensors")]
    assert 0.7 * sum(blocks) < told[-1].bytes_done == told[-1].bytes_total < sum(blocks)


F8 = [torch.float8_e4m3fn, torch.float8_e5m2]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [*F8, *FLOATS])
def test_floats_are_compared_as_numbers_once_their_bits_differ(dtype: torch.dtype) -> None:
    one = torch.tensor([0.0, 1.0, math.nan, math.nan, 2.0, 4.0]).to(dtype)
    other = torch.tensor([-0.0, 1.0, -math.nan, 1.0, math.nan, 1.5]).to(dtype)
    change, where = compare(one, other)
    assert change == Change(different=4, largest=2.5, infinite=0, nans=2)
    assert where.tolist() == [0, 3, 4, 5]


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinite_changes_are_counted_apart(dtype: torch.dtype) -> None:
    one = torch.tensor([math.inf, math.inf, 1.0, math.nan]).to(dtype)
    other = torch.tensor([math.inf, -math.inf, -math.inf, math.inf]).to(dtype)
    change, _ = compare(one, other)
    assert change == Change(different=3, largest=None, infinite=2, nans=1)


def test_a_change_beyond_the_largest_number_is_infinite() -> None:
    most = torch.finfo(torch.float64).max
    change, _ = compare(torch.tensor([most]).double(), torch.tensor([-most]).double())
    assert change == Change(different=1, largest=None, infinite=1, nans=0)


def test_complex_numbers_are_apart_by_the_length_between_them() -> None:
    change, _ = compare(torch.tensor([1 + 1j, 2j]), torch.tensor([4 + 5j, 2j]))
    assert change == Change(different=1, largest=5.0, infinite=0, nans=0)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


@given(data=st.data(), dtype=st.sampled_from(INTEGERS))
def test_integers_are_compared_exactly(data: st.DataObject, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    pairs = data.draw(st.lists(st.tuples(*2 * [st.integers(info.min, info.max)]), min_size=1))
    one, other = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
    change, where = compare(one, other)
    apart = [abs(a - b) for a, b in pairs]
    assert change.different == sum(distance > 0 for distance in apart)
    assert (change.largest or 0) == max(apart)
    assert where.tolist() == [row for row, distance in enumerate(apart) if distance]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_are_compared_exactly(dtype: torch.dtype) -> None:
    one = torch.tensor([0, 255]).to(dtype)
    other = torch.tensor([-1, 254]).to(dtype)
    most = int(torch.iinfo(dtype).max)
    assert compare(one, other)[0] == Change(different=2, largest=most, infinite=0, nans=0)


def test_views_scalars_and_nothing_can_be_compared() -> None:
    grid = torch.arange(6.0).view(2, 3)
    assert compare(grid.T, grid.T.contiguous())[0] == NOTHING
    assert compare(torch.tensor(1), torch.tensor(-1))[0].largest == 2
    assert compare(torch.zeros(0, 3), torch.zeros(0, 3))[0] == NOTHING


def test_changes_add_up() -> None:
    one = Change(different=2, largest=1.0, infinite=1, nans=0)
    other = Change(different=1, largest=None, infinite=0, nans=1)
    assert Change.sum([one, other, NOTHING]) == Change(different=3, largest=1.0, infinite=1, nans=1)
    assert Change.sum([]) == NOTHING


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Two checkpoints that differ in everything in which they can."""
    count = len(BASE.ids)
    embedding = BASE.slots["embedding"].clone()
    embedding[3, 1] += 4
    embedding[4, :2] = torch.tensor([math.nan, math.inf])
    other = changed(BASE, embedding=embedding, exp_avg=torch.ones(count, 2).double())
    tensors = {"w": TENSORS["w"] + 1, "step": TENSORS["step"], "new": torch.ones(1)}
    a = save(tmp_path / "a", tables={"t": BASE, "old": data([1])})
    b = save(tmp_path / "b", tables={"t": other}, tensors=tensors, ranks=1)
    return str(a), str(b)


def test_the_command_shows_what_differs(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["diff", *pair]) == 1
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert err == ""
    for line in (
        "only in A table old",
        "only in A tensor mask",
        "only in B tensor new",
        "t 0 0 311",
        "embedding 2 4, 1 infinite, 1 NaN",
        "exp_avg float32 3 → float64 2",
        "w 60 60 1",
    ):
        assert line in lines, out
    assert not any(line.startswith(("filter", "step")) for line in lines)
    assert command(["diff", *pair, "--all"]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "filter 0" in lines
    assert "step 1 0" in lines


def test_long_lists_are_cut_unless_all_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"w{number:02}" for number in range(25)]
    for file, number, prefix in (("a", 1.0, ""), ("b", 2.0, ""), ("c", 1.0, "x")):
        tensors = {prefix + name: torch.full((1,), number) for name in names}
        save_file(tensors, tmp_path / f"{file}.safetensors")
    for other, what in (("b", "5 more tensors"), ("c", "30 more names")):
        paths = [str(tmp_path / "a.safetensors"), str(tmp_path / f"{other}.safetensors")]
        command(["diff", *paths])
        out = capsys.readouterr().out
        assert what in out
        assert "w24" not in out
        command(["diff", *paths, "--all"])
        assert "w24" in capsys.readouterr().out


def test_notes_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ranks(
        tmp_path, [[sparse_block("t", "id", torch.tensor([1, 1])),
                    sparse_block("t", "embedding", torch.ones(2, 1))]]
    )  # fmt: skip
    assert command(["diff", str(tmp_path), str(tmp_path)]) == 0
    out, _ = capsys.readouterr()
    assert "1 rows of 't' gave way to a later one of their id" in out
    assert "equal" in out
    assert command(["diff", str(tmp_path), str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


def test_the_process_says_by_its_exit_code_whether_they_differ(pair: tuple[str, str]) -> None:
    a, b = pair
    code, out, err = run("diff", a, b, "--json")
    found = json.loads(out)
    assert (code, err, found["equal"]) == (1, "", False)
    assert found["only_in_a"]["tables"] == ["old"]
    slots = {slot["name"]: slot for slot in found["tables"][0]["slots"]}
    assert slots["embedding"]["change"] == {"different": 3, "largest": 4, "infinite": 1, "nans": 1}
    assert run("diff", a, a)[0] == 0
    code, out, err = run("diff", a, b + "c")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_changes_that_doubles_would_round_are_text_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, number in (("a", 0), ("b", 2**53 + 1)):
        save_file({"w": torch.tensor([number])}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert command(["diff", *paths, "--json"]) == 1
    [tensor] = json.loads(capsys.readouterr().out)["tensors"]
    assert tensor["change"]["largest_text"] == str(2**53 + 1)
