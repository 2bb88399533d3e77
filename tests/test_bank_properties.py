"""Random banks of random checkpoints, against dictionaries."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import HashTable, Loader, Slice, gen_slice
from tests.oracle import TableData, write_checkpoint

CHILDREN = ("l", "lr")  # one begins with the other's name
SLOTS = ("embedding", "m")
IDS = st.lists(st.integers(-3, 12), unique=True, max_size=10)
SIZE = 65536
SLICES = st.sampled_from([gen_slice(), Slice(0, 6, SIZE), Slice(4, SIZE, SIZE)])
PATTERNS = st.sampled_from(["*", "l", "lr", "l@id", "l@embedding", "*@m", "l*@id", "lr@*"])

Rows = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """What a table holds, what checkpoints hold, by child; and the bank."""

    slice: Slice
    before: dict[str, list[int]]
    checkpoints: list[dict[str, list[int]]]
    ranks: list[int]
    entries: list[dict[str, Any]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tables = st.fixed_dictionaries(dict.fromkeys(CHILDREN, IDS))
    count = draw(st.integers(1, 3))
    entries = [
        {
            "load": draw(st.lists(PATTERNS, min_size=1, max_size=3)),
            "exclude": draw(st.lists(PATTERNS, max_size=1)),
            "hashtable_clear": draw(st.booleans()),
        }
        for _ in range(count)
    ]
    return Case(
        slice=draw(SLICES),
        before=draw(tables),
        checkpoints=[draw(tables) for _ in range(count)],
        ranks=[draw(st.integers(1, 3)) for _ in range(count)],
        entries=entries,
    )


def value(checkpoint: int, slot: str, id_: int) -> float:
    return 100.0 * (checkpoint + 1) + 1000 * SLOTS.index(slot) + id_


def accepted(table_slice: Slice, ids: list[int]) -> list[int]:
    return [id_ for id_ in ids if table_slice.begin <= id_ % SIZE < table_slice.end]


def content(checkpoint: int, ids: list[int]) -> TableData:
    slots = {
        slot: torch.tensor([[value(checkpoint, slot, id_)] for id_ in ids]).view(-1, 1)
        for slot in SLOTS
    }
    return TableData(ids=torch.tensor(ids, dtype=torch.int64), slots=slots)


def made(case: Case) -> HashTable:
    """Return the table before the load; its own values are those of a checkpoint -1."""
    table = HashTable(
        [1], block_size=4, coalesced=True, children=CHILDREN, slice=case.slice, name="t"
    )
    table.add_slot("m", [1])
    for child, ids in case.before.items():
        kept = accepted(case.slice, ids)
        for slot in SLOTS:
            rows = torch.tensor([[value(-1, slot, id_)] for id_ in kept]).view(-1, 1)
            table.insert(torch.tensor(kept, dtype=torch.int64), rows, slot, child)
    return table


def matches(name: str, patterns: list[str]) -> bool:
    table, _, slot = name.partition("@")
    meanings = {
        "*": True,
        "l": table == "l",
        "lr": table == "lr",
        "lr@*": table == "lr",
        "*@m": slot == "m",
        "l*@id": slot == "id",
        "l@id": name == "l@id",
        "l@embedding": name == "l@embedding",
    }
    return any(meanings[pattern] for pattern in patterns)


def origin(case: Case, name: str) -> int | None:
    """Return the number of the entry that a name comes from: every checkpoint has every name."""
    for number in reversed(range(len(case.entries))):
        entry = case.entries[number]
        if matches(name, entry["load"]) and not matches(name, entry["exclude"]):
            return number
    return None


def expected(case: Case, child: str) -> Rows:
    rows: Rows = {
        id_: {slot: value(-1, slot, id_) for slot in SLOTS}
        for id_ in accepted(case.slice, case.before[child])
    }
    ids = origin(case, f"{child}@id")
    if ids is not None:
        if case.entries[ids]["hashtable_clear"]:
            rows = {}
        for id_ in accepted(case.slice, case.checkpoints[ids][child]):
            rows.setdefault(id_, dict.fromkeys(SLOTS, 0.0))
    for slot in SLOTS:
        number = origin(case, f"{child}@{slot}")
        if number is not None:
            for id_ in rows.keys() & set(case.checkpoints[number][child]):
                rows[id_][slot] = value(number, slot, id_)
    return rows


def held(table: HashTable, child: str) -> Rows:
    ids = table.ids(child).tolist()
    rows = {slot: table.rows(slot, child).flatten().tolist() for slot in SLOTS}
    as_disk = [id_ - 2**52 if id_ >= 2**51 else id_ for id_ in ids]
    return {id_: {s: rows[s][n] for s in SLOTS} for n, id_ in enumerate(as_disk)}


def write(folder: Path, case: Case) -> list[dict[str, Any]]:
    """Write the checkpoints; return the bank."""
    bank = []
    for number, tables in enumerate(case.checkpoints):
        path = folder / str(number)
        data = {child: content(number, ids) for child, ids in tables.items()}
        write_checkpoint(path, data, {}, ranks=case.ranks[number])
        bank.append({"path": str(path), **case.entries[number]})
    return bank


@pytest.mark.slow
@given(cases())
def test_a_table_holds_what_dictionaries_hold(case: Case) -> None:
    table = made(case)
    with tempfile.TemporaryDirectory() as folder:
        bank = write(Path(folder), case)
        report = Loader.from_bank(bank, {"t": table}, chunk_bytes=4096).load()
        assert {child: held(table, child) for child in CHILDREN} == {
            child: expected(case, child) for child in CHILDREN
        }
        counts = report.tables["t"]
        assert counts.rows == counts.new + counts.replaced + counts.duplicates
        again = Loader.from_bank(bank, {"t": table}).load().tables["t"]  # it can be changed again
        assert again.cleared + again.replaced <= len(table) + again.cleared
