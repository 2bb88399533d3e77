"""Nothing about a table changes with its size: none of its ids, or millions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from asyncloader import HashTable, Loader, UpdateCounts, gen_slice
from tests.oracle import TableData, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MANY = 5_000_000
_ODD = -7046029254386353131  # multiplying by it gives every number of 64 bits once


def ids_from(first: int, count: int) -> Tensor:
    """Return ids that all differ and lie anywhere; `count` is of any size."""
    return torch.arange(first, first + count) * _ODD


def rows_of(ids: Tensor) -> Tensor:
    """Return the rows that belong to ids: their bits, twice over, the second time mixed."""
    return torch.stack([ids, ids * _ODD ^ 12345], dim=1).view(torch.float32)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def checksum(ids: Tensor) -> tuple[int, int, int]:
    array = ids.numpy()
    return len(array), int(np.bitwise_xor.reduce(array)), int(array.sum())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    ids = ids_from(0, MANY)
    tables = {
        "many": TableData(ids=ids, slots={"embedding": rows_of(ids)}),
        "none": TableData(ids=ids[:0], slots={"embedding": rows_of(ids[:0])}),
    }
    write_checkpoint(folder, tables, {}, ranks=2)
    return folder


@pytest.mark.slow
def test_millions_of_ids_are_loaded_whole_and_again_over_what_is_there(checkpoint: Path) -> None:
    table = HashTable([4], name="many")
    # One id in five is there before, and as many that are not in the checkpoint.
    held = ids_from(MANY - MANY // 5, 2 * MANY // 5)
    table.insert(held, torch.zeros(len(held), 4))
    report = Loader(checkpoint, {"many": table}).load()
    assert report.tables["many"] == UpdateCounts(
        rows=MANY, new=MANY - MANY // 5, replaced=MANY // 5, duplicates=0, dropped=0
    )
    everything = ids_from(0, MANY + MANY // 5)
    found = table.ids()
    assert checksum(found) == checksum(everything)
    probe = everything[:: MANY // 1000]
    there = probe[: 1000 * MANY // MANY]
    assert same_bits(table(there), rows_of(there))
    assert not table(ids_from(MANY, 1000)).any()
    rows = table.rows()
    loaded = rows.view(torch.int32).any(dim=1)
    assert same_bits(rows[loaded], rows_of(found[loaded]))
    assert int(loaded.sum()) == MANY
    assert not table.contains(ids_from(2 * MANY, 1000)).any()


@pytest.mark.slow
def test_one_of_three_ranks_loads_its_third_of_millions_of_ids(checkpoint: Path) -> None:
    mine = gen_slice(1, 3)
    table = HashTable([4], name="many", slice=mine)
    report = Loader(checkpoint, {"many": table}).load()
    everything = ids_from(0, MANY)
    position = everything.numpy().view(np.uint64) % np.uint64(mine.size)
    wanted = everything[torch.from_numpy((position >= mine.begin) & (position < mine.end))]
    assert report.tables["many"].new == len(wanted)
    assert checksum(table.ids()) == checksum(wanted)
    assert same_bits(table.rows(), rows_of(table.ids()))
    assert same_bits(table(wanted), rows_of(wanted))


@pytest.mark.parametrize("held", [0, 3])
def test_a_table_without_ids_is_loaded_and_changes_nothing(tmp_path: Path, held: int) -> None:
    empty = ids_from(0, 0)
    data = TableData(ids=empty, slots={"embedding": rows_of(empty)})
    write_checkpoint(tmp_path, {"none": data}, {}, ranks=2)
    table = HashTable([4], name="none")
    ids = ids_from(0, held)
    table.insert(ids, rows_of(ids))
    report = Loader(tmp_path, {"none": table}, strict=True).load()
    nothing = UpdateCounts(rows=0, new=0, replaced=0, duplicates=0, dropped=0)
    assert report.tables == {"none": nothing}
    assert torch.equal(table.ids(), ids)
    assert same_bits(table(ids), rows_of(ids))
