"""What RecIS 1.2 writes, and names that its reader takes: `@` in odd places, all in `model.pt`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import (
    CheckpointReader,
    CheckpointSummary,
    HashTable,
    Loader,
    PlanError,
    Saver,
    inspect,
    load_tensors,
    verify,
)
from tests.genuine import NEWEST, copy_of_run
from tests.oracle import edit_header, read_checkpoint, shard_holding, write_checkpoint
from tests.support import data, rows_in, rows_on_disk

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.oracle import TableData


def without_tables(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write what RecIS does if a model has no table: all of it is in `model.pt`."""
    path.mkdir()
    (path / "index").write_text('{"file_index":{},"block_index":{}}')
    (path / "tensorkey.json").write_text("{}")
    torch.save(tensors, path / "model.pt")
    return path


def with_slots(table: HashTable, content: TableData) -> HashTable:
    for slot, rows in content.slots.items():
        if slot != "embedding":
            table.add_slot(slot, rows.shape[1:], rows.dtype)
    return table


def test_a_checkpoint_without_tables_is_all_in_its_model(tmp_path: Path) -> None:
    tensors = {"net.weight": torch.randn(3, 4), "user@filter_global_step": torch.tensor([7])}
    path = without_tables(tmp_path / "ckpt", tensors)

    into = {name: torch.zeros_like(value) for name, value in tensors.items()}
    report = Loader(path, tensors=into).load()

    assert not report.warnings
    for held in (into, load_tensors(path)):
        assert all(torch.equal(held[name], value) for name, value in tensors.items())
    assert verify(path).ok
    found = inspect(path)
    assert isinstance(found, CheckpointSummary)
    assert {one.name for one in found.tensors} == tensors.keys()


def test_a_step_of_a_filter_is_a_tensor_beside_its_table(tmp_path: Path) -> None:
    content, step = data([1, 2, 3]), torch.tensor([41])
    name = "user@filter_global_step"
    write_checkpoint(tmp_path, {"user": content}, {name: step})
    table, into = HashTable([content.slots["embedding"].shape[1]], name="user"), torch.tensor([0])

    report = Loader(tmp_path, {"user": table}, {name: into}).load()

    assert (into.item(), report.missing, report.unexpected) == (41, (), ())
    assert rows_in(table) == rows_on_disk(content)
    assert verify(tmp_path).ok


def test_a_description_may_be_merged_with_that_of_the_model(tmp_path: Path) -> None:
    path = copy_of_run(tmp_path) / NEWEST
    description = path / "torch_rank_weights_embs_table_multi_shard.json"
    held = json.loads(description.read_text())
    held["tower.0.weight"] = {
        "name": "tower.0.weight",
        "dense": True,
        "dimension": 0,
        "is_hashmap": False,
        "dtype": "float32",
        "shape": [8, 8],
    }
    description.write_text(json.dumps(held))
    assert verify(path).ok
    assert load_tensors(path).keys() >= {"tower.0.weight"}


def test_a_gap_among_the_blocks_of_a_table_says_what_may_have_left_it(tmp_path: Path) -> None:
    """RecIS keeps two slots of one name, and its header can hold one of them."""
    write_checkpoint(tmp_path, {"t": data([1, 2, 3], s=2)}, {})
    shard = shard_holding(tmp_path, "t.s/part_0_1")
    edit_header(shard, lambda entries: entries.pop("t.id/part_0_1"))
    [problem] = [str(one) for one in verify(tmp_path).problems if "back to back" in str(one)]
    assert "two slots of one name" in problem


# --- one value, with a dimension or without


@pytest.mark.parametrize("cast", [None, "widen"])
def test_one_value_in_a_model_fills_a_scalar(tmp_path: Path, cast: str | None) -> None:
    path = without_tables(tmp_path / "ckpt", {"scale": torch.tensor([2.5]), "w": torch.ones(2)})
    into = {"scale": torch.tensor(0.0), "w": torch.zeros(2)}
    if cast:
        into["scale"] = into["scale"].double()

    report = Loader(path, tensors=into, cast=cast).load()  # type: ignore[arg-type]

    assert (into["scale"].item(), into["w"].tolist()) == (2.5, [1, 1])
    assert "'scale'" in str(report.warnings)
    assert "its value is taken" in str(report.warnings)
    assert len(report.casts) == bool(cast)


@pytest.mark.parametrize(
    ("have", "want"), [([], [1]), ([2], []), ([1, 1], []), ([1], [1, 1])], ids=str
)
def test_no_other_shapes_are_taken_for_each_other(
    tmp_path: Path, have: list[int], want: list[int]
) -> None:
    path = without_tables(tmp_path / "ckpt", {"scale": torch.ones(have)})
    with pytest.raises(PlanError, match="'scale'"):
        Loader(path, tensors={"scale": torch.zeros(want)}).load()


def test_a_value_in_a_shard_keeps_its_shape(tmp_path: Path) -> None:
    """RecIS itself compares the shapes of what it reads from shards."""
    write_checkpoint(tmp_path, {}, {"scale": torch.ones(1)})
    with pytest.raises(PlanError, match="'scale'"):
        Loader(tmp_path, tensors={"scale": torch.tensor(0.0)}).load()


# --- slots whose names hold `@`


@pytest.mark.parametrize("slot", ["a@b", "a@b@c", "@", "t@embedding"])
@pytest.mark.parametrize("name", ["t", "t@u"])
async def test_a_slot_may_have_an_at_sign_in_its_name(tmp_path: Path, slot: str, name: str) -> None:
    content = data([1, 2, 3], **{slot: 2})
    write_checkpoint(tmp_path, {name: content, "other": data([4])}, {})
    table = HashTable([content.slots["embedding"].shape[1]], name=name)

    report = await Loader(tmp_path, {name: with_slots(table, content)}).aload()

    assert (report.missing, rows_in(table)) == ((), rows_on_disk(content))
    [tables, _] = read_checkpoint(tmp_path)
    assert torch.equal(tables[name].slots[slot], content.slots[slot])
    full = f"{name}@{slot}"
    read = await CheckpointReader(tmp_path).aread_tensor(full)
    assert torch.equal(read, content.slots[slot])
    assert verify(tmp_path).ok


def test_a_table_with_ids_of_its_own_is_no_slot(tmp_path: Path) -> None:
    """`t@a@b` is the slot `b` of `t@a`, for that is a table."""
    one, two = data([1, 2]), data([3], b=1)
    write_checkpoint(tmp_path, {"t": one, "t@a": two}, {})
    width = one.slots["embedding"].shape[1]
    tables = {"t": HashTable([width], name="t"), "t@a": HashTable([width], name="t@a")}
    with_slots(tables["t@a"], two)

    Loader(tmp_path, tables).load()

    assert rows_in(tables["t"]) == rows_on_disk(one)
    assert rows_in(tables["t@a"]) == rows_on_disk(two)


def test_such_a_slot_cannot_be_saved(tmp_path: Path) -> None:
    """`Saver` writes only names of which every part is told at its last `@`."""
    table = with_slots(HashTable([4], name="t"), data([1], **{"a@b": 2}))
    with pytest.raises(ValueError, match="a@b"):
        Saver(path=tmp_path / "b", hashtables={"t": table}).save()
