"""What a program that is written for RecIS finds under RecIS's names."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncloader
from asyncloader import HashTable, gen_slice
from asyncloader.recis import CheckpointReader, Loader, Saver
from tests.genuine import NEWEST, RUN, truth
from tests.recis_table import StandIn

if TYPE_CHECKING:
    from pathlib import Path


def names_of(call: object) -> list[str]:
    """Return the names of a function's positional arguments."""
    parameters = inspect.signature(call).parameters.values()  # type: ignore[arg-type]
    return [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]


def filled(ids: torch.Tensor) -> Any:  # noqa: ANN401  # RecIS's has no type either
    table: Any = StandIn([4], torch.float32, children=["t"])
    places, _ = table.embedding_lookup(ids.clone(), False)
    slot = table.slot_group().slot_by_name("embedding")
    for row, place in enumerate(places.tolist()):
        block = slot.values()[place // slot.block_size()]
        block[place % slot.block_size()] = torch.arange(4.0 * row, 4.0 * row + 4)
    return table


def test_arguments_are_recis_s_in_its_order() -> None:
    assert names_of(Loader) == [
        "checkpoint_path", "hashtables", "tensors", "parallel", "filter_func",
    ]  # fmt: skip
    assert names_of(Loader.load) == ["self", "print_load_summary"]
    assert names_of(Saver) == [
        "shard_index", "shard_num", "parallel", "path", "hashtables", "tensors", "filter_func",
    ]  # fmt: skip
    assert CheckpointReader is asyncloader.CheckpointReader


@pytest.mark.parametrize("awaited", [False, True])
async def test_what_is_saved_is_loaded_and_nothing_is_returned(
    tmp_path: Path, awaited: bool
) -> None:
    ids, w = torch.tensor([3, 5, 70_000]), torch.ones(2)
    saver = Saver(0, 1, 2, tmp_path / "c", {"any": filled(ids)}, {"w": w})
    assert (await saver.asave() if awaited else saver.save()) is None  # type: ignore[func-returns-value]
    assert saver.report is not None
    assert saver.report.tables == {"t": 3}
    table, found = StandIn([4], torch.float32, children=["t"]), torch.zeros(2)
    loader = Loader(tmp_path / "c", {"any": table}, {"w": found})
    assert (await loader.aload() if awaited else loader.load()) is None  # type: ignore[func-returns-value]
    index, rows = table.embedding_lookup(ids, True)
    assert (index >= 0).all()
    assert torch.equal(rows, torch.arange(12.0).view(3, 4))
    assert torch.equal(found, w)
    assert loader.report is not None
    assert loader.report.in_place == ("any",)


def test_by_default_a_table_of_recis_has_the_slice_of_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(0, 65536, 999)
    Saver(path=tmp_path / "c", hashtables={"t": filled(ids)}).save()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = {}
    for name, part in {"default": None, "whole": gen_slice()}.items():
        table: Any = StandIn([4], torch.float32, children=["t"])
        Loader(tmp_path / "c", {"t": table}, slice=part).load()
        found[name] = set(table.ids().tolist())
    mine = gen_slice(1, 2)
    assert found["whole"] == set(ids.tolist())
    assert found["default"] == {one for one in ids.tolist() if mine.begin <= one < mine.end}


def test_a_rank_without_a_number_of_ranks_is_an_error_where_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Loader(tmp_path, {"t": HashTable([4], name="t")})
    with pytest.raises(ValueError, match="RANK='3' and WORLD_SIZE='1'"):
        Loader(tmp_path, {"t": StandIn([4], torch.float32, children=["t"])})


def test_a_filter_renames_and_tables_of_ours_are_taken_too(tmp_path: Path) -> None:
    Saver(path=tmp_path / "c", hashtables={"t": filled(torch.tensor([1, 2]))}).save()
    table = HashTable([4], name="other")
    Loader(
        tmp_path / "c",
        {"other": table},
        filter_func=lambda _: {"other": {"t": ["id", "embedding"]}},
    ).load()
    assert len(table) == 2


def test_a_summary_is_logged_if_it_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    held = truth()
    tables, tensors = held.destinations()
    tensors["absent"] = torch.zeros(1)
    loader = Loader(str(RUN / NEWEST), tables, tensors)
    with caplog.at_level(logging.INFO, "asyncloader.recis"):
        loader.load()
        assert not [one for one in caplog.messages if one.startswith("table ")]
        loader.load(print_load_summary=True)
    assert "table user: 111 rows" in caplog.messages
    assert "missing: absent" in caplog.messages
    assert loader.default_load_info().keys() == tables.keys() | tensors.keys()


def test_a_framework_that_has_them_in_the_place_of_its_own_saves_and_loads(tmp_path: Path) -> None:
    """As RecIS's: tables and scalars by these, then its own files into the same folder."""
    folder, ids = tmp_path / "ckpt_1", torch.tensor([4, 9])
    for step in (1, 2):  # the same id twice, as at the end of a run
        folder.mkdir(exist_ok=True)
        Saver(
            shard_index=0, shard_num=1, parallel=2, hashtables={"t": filled(ids)},
            tensors={"sparse_adamw_step": torch.tensor([step])}, path=str(folder),
        ).save()  # fmt: skip
        torch.save({"w": torch.full((2,), float(step))}, folder / "model.pt")
        torch.save({"global_step": torch.tensor(step)}, folder / "extra.pt")
        torch.save({"train_io": {}}, folder / "io_state_0.pt")
        (folder / "io_state_count").write_text("1", encoding="ascii")
    table, found = StandIn([4], torch.float32, children=["t"]), torch.zeros(1, dtype=torch.int64)
    Loader(
        checkpoint_path=str(folder), hashtables={"t": table}, tensors={"sparse_adamw_step": found}
    ).load()
    assert found.item() == 2
    assert torch.equal(asyncloader.load_tensors(folder, ["w"])["w"], torch.full((2,), 2.0))
