"""Checkpoints that RecIS itself wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asyncloader import HashTable, Loader, LoadReport, gen_slice, load_tensors
from tests.oracle import flat_bytes, rows_of

DATA = Path(__file__).parent / "data" / "recis"
NAMES = ["small_4shards", "optim_slots"]


def truth(name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(DATA / name / "truth.pt", weights_only=True)
    return found


def load(
    name: str, rank: int, ranks: int, *, direct_io: bool = False
) -> tuple[dict[str, HashTable], dict[str, torch.Tensor]]:
    """Load everything, as one of some ranks, into tables and tensors made for it."""
    expected = truth(name)
    tables = {}
    for table_name, table in expected["tables"].items():
        slots = table["slots"]
        width = slots["embedding"].shape[1:]
        made = HashTable(list(width), name=table_name, slice=gen_slice(rank, ranks))
        for slot, rows in slots.items():
            if slot != "embedding":
                made.add_slot(slot, rows.shape[1:], rows.dtype, initializer=1)
        tables[table_name] = made
    tensors = {key: torch.full_like(tensor, 7) for key, tensor in expected["dense"].items()}
    report = Loader(DATA / name, tables, tensors, strict=True, direct_io=direct_io).load()
    check_report(report, tables)
    return tables, tensors


def check_report(report: LoadReport, tables: dict[str, HashTable]) -> None:
    assert (report.missing, report.unexpected, report.warnings) == ((), (), ())
    assert set(report.tensors.values()) == {"loaded"}
    for name, counts in report.tables.items():
        assert (counts.rows, counts.new, counts.dropped) == (len(tables[name]),) * 2 + (0,)


def check_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(flat_bytes(tensors[key]), flat_bytes(tensor))


def content(table: HashTable) -> dict[int, dict[str, bytes]]:
    return rows_of(table.ids(), {slot: table.rows(slot) for slot in table.slots()})


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_recis_is_loaded_bit_for_bit(name: str, ranks: int) -> None:
    expected = truth(name)
    found: dict[str, dict[int, dict[str, bytes]]] = {table: {} for table in expected["tables"]}
    for rank in range(ranks):
        tables, tensors = load(name, rank, ranks)
        check_tensors(tensors, expected["dense"])
        for table_name, table in tables.items():
            mine = content(table)
            assert all(gen_slice(rank, ranks).accepts(id_) for id_ in mine)
            assert not mine.keys() & found[table_name].keys()
            found[table_name] |= mine
    for table_name, table in expected["tables"].items():
        assert found[table_name] == rows_of(table["ids"], table["slots"])


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_recis_is_loaded_past_the_page_cache(name: str) -> None:
    expected = truth(name)
    tables, tensors = load(name, 0, 1, direct_io=True)
    check_tensors(tensors, expected["dense"])
    check_tensors(load_tensors(DATA / name, direct_io=True), expected["dense"])
    for table_name, table in expected["tables"].items():
        assert content(tables[table_name]) == rows_of(table["ids"], table["slots"])
