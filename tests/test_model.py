"""What of a model can be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from asyncloader import HashTable, Loader, targets
from tests.oracle import write_checkpoint
from tests.support import data, rows_in, rows_on_disk, table_for

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = data([1, -2, 3])


class Tower(nn.Module):
    """A model in the making: tables, parameters, buffers, and other state."""

    def __init__(self, *tables: HashTable) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)
        self.dense = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("forgotten", torch.zeros(1), persistent=False)

    def get_extra_state(self) -> object:
        return {"step": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_a_models_tables_go_by_their_names_and_its_tensors_as_in_its_state_dict() -> None:
    t, u = HashTable([2], name="t"), HashTable([2], name="u")
    model = nn.ModuleDict({"tower": Tower(t, u)})
    tables, tensors = targets(model)
    assert tables == {"t": t, "u": u}
    assert set(tensors) == model.state_dict().keys() - {"tower._extra_state"}
    assert {"tower.dense.weight", "tower.norm.running_mean"} <= set(tensors)


async def test_what_is_loaded_into_them_is_in_the_model(tmp_path: Path) -> None:
    model = Tower(table_for(CONTENT))
    stored = {
        name: torch.full_like(value, 3)
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    write_checkpoint(tmp_path, {"t": CONTENT}, stored)

    await Loader(tmp_path, *targets(model), strict=True).aload()

    assert isinstance(model.tables[0], HashTable)
    assert rows_in(model.tables[0]) == rows_on_disk(CONTENT)
    assert model.dense.weight.eq(3).all()
    assert model.dense.weight.requires_grad
    assert model.norm.num_batches_tracked == 3


def test_a_table_is_a_model_too() -> None:
    table = HashTable([2], name="t")
    assert targets(table) == ({"t": table}, {})


def test_a_model_without_tables_has_tensors_only() -> None:
    tables, tensors = targets(nn.Linear(2, 2, bias=False))
    assert tables == {}
    assert list(tensors) == ["weight"]


def test_a_table_that_is_reached_twice_is_one() -> None:
    table = HashTable([2], name="t")
    assert targets(nn.ModuleDict({"one": Tower(table), "other": Tower(table)}))[0] == {"t": table}


def test_two_tables_of_one_name_are_refused() -> None:
    """On disk they would be one: what is loaded into which?"""
    model = nn.ModuleDict({"one": HashTable([2], name="t"), "other": HashTable([2], name="t")})
    with pytest.raises(ValueError, match="named 't', 'one' and 'other'"):
        targets(model)


def test_a_tied_tensor_has_both_its_names(tmp_path: Path) -> None:
    one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    other.weight = one.weight
    model = nn.ModuleDict({"one": one, "other": other})
    write_checkpoint(tmp_path, {}, {"one.weight": torch.ones(2, 2), "other.bias": torch.ones(2)})
    report = Loader(tmp_path, *targets(model)).load()
    assert report.missing == ("other.weight",)
    assert other.weight.eq(1).all()


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="dict"):
        targets({"w": torch.ones(1)})  # type: ignore[arg-type]  # the very thing
