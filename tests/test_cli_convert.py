"""`asyncloader convert`: there and back, other ranks, fewer slots, and nothing left behind."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from asyncloader import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    Conversion,
    Progress,
    SaveError,
    aconvert,
)
from asyncloader._loading.opening import open_session
from asyncloader._tools.source import read_source
from asyncloader._tools.target import target_of
from asyncloader._tools.writing import write_file
from asyncloader.cli._app import run as command
from asyncloader.tools import averify
from tests.checkpoints import GENUINE, LIMITS, TABLES, TENSORS, everything, flip, run, save
from tests.forks import Forked
from tests.genuine import NEWEST, RUN
from tests.oracle import Block as RawBlock
from tests.oracle import (
    TableData,
    dense_block,
    read_checkpoint,
    read_parts,
    shard_header,
    shard_holding,
    sparse_block,
    split_slices,
    truncate,
    write_checkpoint,
    write_ranks,
    write_shard,
)
from tests.processes import apart
from tests.steps import Steps
from tests.support import data, debug_off, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

CHUNK = 8 << 20


async def convert(
    source: Path,
    destination: Path,
    *,
    shards: int | None = None,
    slots: Collection[str] | None = None,
    tables: Collection[str] | None = None,
    parallel: int = 2,
    overwrite: bool = False,
    progress: Callable[[Progress], object] | None = None,
) -> Conversion:
    with nothing_left_behind():
        return await aconvert(
            source,
            destination,
            shards=shards,
            slots=slots,
            tables=tables,
            parallel=parallel,
            overwrite=overwrite,
            progress=progress,
            options=LIMITS,
        )


def names_below(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*"))


SOURCES = ["small_4shards", "optim_slots", "saved", "whole ids"]


def source_called(name: str, path: Path) -> Path:
    """Make a checkpoint, or find one."""
    if (GENUINE / name).exists():
        return GENUINE / name
    if name == "saved":
        return save(path, ranks=3)
    write_checkpoint(
        path,
        TABLES | {"": data([1]), "empty": data([])},
        TENSORS,
        ranks=2,
        slice_size=7,
        shuffle_seed=1,
        bool_spelling="bool",
    )
    return path


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("shards", [1, 2, 5])
async def test_a_plain_file_turns_back_into_the_checkpoint_that_it_was(
    tmp_path: Path, name: str, shards: int
) -> None:
    source = source_called(name, tmp_path / "a")
    await convert(source, tmp_path / "b.safetensors")
    report = await convert(tmp_path / "b.safetensors", tmp_path / "c", shards=shards)
    want = read_checkpoint(source)
    assert everything(read_checkpoint(tmp_path / "c")) == everything(want)
    assert (report.ranks, report.kind) == (shards, "RecIS checkpoint")
    assert {table.name: table.ids for table in report.tables} == {
        table: len(content.ids) for table, content in want[0].items()
    }


@pytest.mark.parametrize("name", SOURCES)
async def test_the_plain_file_is_what_safetensors_reads(tmp_path: Path, name: str) -> None:
    source = source_called(name, tmp_path / "a")
    report = await convert(source, tmp_path / "b.safetensors")
    tables, tensors = read_checkpoint(source)
    want = dict(tensors)
    for table, content in tables.items():
        want |= {f"{table}.id": content.ids}
        want |= {f"{table}.{slot}": rows for slot, rows in content.slots.items()}
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert set(file.keys()) == set(want)
        for key, tensor in want.items():
            assert file.get_tensor(key).equal(tensor), key
            assert file.get_tensor(key).dtype == tensor.dtype
    assert report.bytes_written == (tmp_path / "b.safetensors").stat().st_size
    assert report.files == ("b.safetensors",)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("shards", [1, 4, 7])
async def test_another_number_of_ranks_changes_nothing_but_where_rows_stand(
    tmp_path: Path, name: str, shards: int
) -> None:
    source = source_called(name, tmp_path / "a")
    await convert(source, tmp_path / "b", shards=shards)
    assert everything(read_checkpoint(tmp_path / "b")) == everything(read_checkpoint(source))
    parts, _ = read_parts(tmp_path / "b")
    before, _ = read_parts(source)
    for table, of_table in parts.items():
        size = before[table][0].claim.size
        assert [part.claim for part in of_table] == split_slices(size, shards)


async def test_as_many_ranks_are_written_as_there_were(tmp_path: Path) -> None:
    report = await convert(save(tmp_path / "a", ranks=3), tmp_path / "b")
    assert report.ranks == 3
    assert report.bytes_written == sum(
        file.stat().st_size for file in (tmp_path / "b").glob("*.safetensors")
    )


async def test_the_ids_and_some_slots_can_be_kept(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    for destination, slots in (("b", ["embedding"]), ("c", ["exp_avg", "id"]), ("d", [])):
        await convert(source, tmp_path / destination, slots=slots)
        tables, tensors = read_checkpoint(tmp_path / destination)
        for name, content in TABLES.items():
            kept = {slot: rows for slot, rows in content.slots.items() if slot in slots}
            want = TableData(ids=content.ids, slots=kept)
            assert everything(({name: tables[name]}, {})) == everything(({name: want}, {}))
        assert tensors.keys() == TENSORS.keys()
    report = await convert(source, tmp_path / "e.safetensors", slots=["embedding"])
    keys = set(shard_header(tmp_path / "e.safetensors")) - {"__metadata__"} - TENSORS.keys()
    assert keys == {f"{table}.{slot}" for table in TABLES for slot in ("id", "embedding")}
    assert {table.slots for table in report.tables} == {("embedding",)}


async def test_a_slot_that_no_table_has_is_an_error(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no table has the slot 'emb'; the slots are 'emb"):
        await convert(source, tmp_path / "b", slots=["emb"])
    assert names_below(tmp_path) == ["a", *(f"a/{name}" for name in names_below(source))]


async def test_tables_of_a_plain_file_are_recognized_by_their_names(tmp_path: Path) -> None:
    ids = torch.tensor([5, -1, 65536])
    tables = {
        "t": TableData(ids=ids, slots={"embedding": torch.rand(3, 2), "a.b": torch.ones(3)}),
        "t.u": TableData(ids=torch.tensor([5, 6]), slots={"embedding": torch.rand(2, 1)}),
    }
    plain = {
        "t.few": torch.ones(2),
        "t.x@y": torch.ones(3),
        "v.id": torch.tensor([1]),
        "w.id": torch.tensor([1.0]),
        "w.embedding": torch.ones(1, 1),
        "x.id": torch.tensor([1, 2]),
        "x.embedding": torch.ones(3, 1),
        "id": torch.tensor([1]),
        "embedding": torch.ones(1, 1),
        "tt.embedding": torch.ones(3, 1),
    }
    keys = {f"{name}.{slot}": rows for name, table in tables.items()
            for slot, rows in {"id": table.ids, **table.slots}.items()}  # fmt: skip
    save_file(keys | plain, tmp_path / "a.safetensors")
    await convert(tmp_path / "a.safetensors", tmp_path / "b", shards=2)
    assert everything(read_checkpoint(tmp_path / "b")) == everything((tables, plain))


NO_TABLES = {
    "pos.id": torch.tensor([0, 0, 1]),
    "pos.embedding": torch.rand(3, 2),
    "t.id": torch.tensor([7, 8]),
    "t.embedding": torch.rand(2, 1),
}


async def test_what_holds_an_id_twice_is_no_table_and_loses_no_row(tmp_path: Path) -> None:
    save_file(NO_TABLES, tmp_path / "a.safetensors")

    done = await convert(tmp_path / "a.safetensors", tmp_path / "b")

    assert [table.name for table in done.tables] == ["t"]
    tables, tensors = read_checkpoint(tmp_path / "b")
    assert tensors["pos.id"].tolist() == [0, 0, 1]
    assert torch.equal(tensors["pos.embedding"], NO_TABLES["pos.embedding"])
    assert tables["t"].ids.tolist() == [7, 8]


async def test_from_plain_file_to_plain_file_nothing_is_taken_for_a_table(tmp_path: Path) -> None:
    save_file(NO_TABLES, tmp_path / "a.safetensors")
    done = await convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (done.tables, set(done.tensors)) == ((), set(NO_TABLES))
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert "asyncloader" not in file.metadata()
        assert all(torch.equal(file.get_tensor(key), NO_TABLES[key]) for key in NO_TABLES)
    done = await convert(tmp_path / "b.safetensors", tmp_path / "c")
    assert [table.name for table in done.tables] == ["t"]


async def test_ids_of_what_may_be_a_table_have_to_fit_into_memory(tmp_path: Path) -> None:
    rows = 1 << 39
    blocks = [
        RawBlock(key="t.id", dtype="I64", shape=(rows,), data=b""),
        RawBlock(key="t.embedding", dtype="F32", shape=(rows, 0), data=b""),
    ]
    path, nbytes = tmp_path / "a.safetensors", 8 * rows
    offsets = {"t.id": (0, nbytes), "t.embedding": (nbytes, nbytes)}
    write_shard(path, blocks, data_offsets=offsets)
    with path.open("ab") as shard:
        shard.truncate(path.stat().st_size + nbytes)
    with pytest.raises(MemoryError, match=r"'t\.id'.* takes 4\.40 TB, .* are free"):
        await convert(path, tmp_path / "b")
    assert names_below(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
async def test_a_safetensors_file_may_be_called_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    path, to = tmp_path / "a" / "index", tmp_path / "b"
    path.parent.mkdir()
    save_file(NO_TABLES | {"w": torch.ones(2).to(dtype)}, path)
    assert await asyncio.to_thread(command, ["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "safetensors file"
    assert await asyncio.to_thread(command, ["verify", str(path)]) == 0
    assert "safetensors file" in capsys.readouterr().out
    done = await convert(path, to)
    assert [table.name for table in done.tables] == ["t"]


async def test_a_safetensors_file_called_index_obeys_safetensors_rules(tmp_path: Path) -> None:
    path = tmp_path / "index"
    header = {
        "w": {"dtype": "bool", "shape": [1], "data_offsets": [0, 1]}
    }  # which only RecIS writes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1")
    with pytest.raises(CheckpointError, match="unknown dtype 'bool'"):
        await convert(path, tmp_path / "b.safetensors")
    assert await asyncio.to_thread(command, ["verify", str(path)]) == 1


@pytest.mark.parametrize(("tables", "found"), [((), []), (("t",), ["t"])])
async def test_which_tensors_are_tables_can_be_said(
    tmp_path: Path, tables: tuple[str, ...], found: list[str]
) -> None:
    save_file(NO_TABLES, tmp_path / "a.safetensors")
    done = await convert(tmp_path / "a.safetensors", tmp_path / "b", tables=tables)
    assert [table.name for table in done.tables] == found


@pytest.mark.parametrize(
    ("name", "problem"),
    [("pos", "1 stand there twice"), ("w", r"'w' is no table: that takes 'w.id'")],
)
async def test_what_is_no_table_cannot_be_made_one(tmp_path: Path, name: str, problem: str) -> None:
    save_file(NO_TABLES, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=problem):
        await convert(tmp_path / "a.safetensors", tmp_path / "b", tables=(name,))
    assert names_below(tmp_path) == ["a.safetensors"]


async def test_a_hugging_face_folder_becomes_a_checkpoint_or_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {"t.id": torch.tensor([3, 4]), "t.embedding": torch.rand(2, 2), "w": torch.rand(3)}
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"{number}.safetensors")
    names = {name: f"{number}.safetensors" for number, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    await convert(folder, tmp_path / "b")
    table = TableData(ids=tensors["t.id"], slots={"embedding": tensors["t.embedding"]})
    want = everything(({"t": table}, {"w": tensors["w"]}))
    assert everything(read_checkpoint(tmp_path / "b")) == want
    await convert(folder, tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert {key: file.get_tensor(key).tolist() for key in file.keys()} == {  # noqa: SIM118
            name: tensor.tolist() for name, tensor in tensors.items()
        }


async def test_what_else_a_file_says_of_itself_is_kept(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", {"format": "np", "by": "me"})
    await convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    header = shard_header(tmp_path / "b.safetensors")
    assert header["__metadata__"] == {"format": "np", "by": "me"}


@pytest.mark.parametrize(
    "text", ["no JSON", "{}", '{"format": 2, "tables": {}}', '{"format":1,"tables":{"t":{}}}',
             '{"format":1,"tables":{"t":{"slice_size":4,"slots":{"id":"absent"}}}}',
             '{"format":1,"tables":{"t":{"slice_size":0,"slots":{"id":"w"}}}}', "[]"]
)  # fmt: skip
async def test_metadata_that_is_no_good_is_an_error(tmp_path: Path, text: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", {"asyncloader": text})
    with pytest.raises(CheckpointError, match="__metadata__ 'asyncloader' is damaged"):
        await convert(tmp_path / "a.safetensors", tmp_path / "b")


@pytest.mark.parametrize(
    ("tables", "tensors", "want"),
    [
        ({"t": data([1])}, {"t.id": torch.ones(1)}, "'t@id' and 't.id' would both stand under"),
        ({"a.b": TableData(ids=torch.tensor([1]), slots={"c": torch.ones(1, 1)}),
          "a": TableData(ids=torch.tensor([1]), slots={"b.c": torch.ones(1, 1)})}, {},
         "would both stand under 'a.b.c'"),
        ({}, {"__metadata__": torch.ones(1)}, "which is no tensor's name"),
    ],
)  # fmt: skip
async def test_names_that_a_plain_file_cannot_tell_apart_are_an_error(
    tmp_path: Path, tables: dict[str, TableData], tensors: dict[str, torch.Tensor], want: str
) -> None:
    blocks = [
        sparse_block(table, slot, rows, rank=number, claim=split_slices(65536, 1)[0])
        for number, (table, content) in enumerate(tables.items())
        for slot, rows in {"id": content.ids, **content.slots}.items()
    ]
    blocks += [dense_block(name, tensor) for name, tensor in tensors.items()]
    write_ranks(tmp_path / "a", [blocks])
    before = names_below(tmp_path)
    with pytest.raises(ValueError, match=want):
        await convert(tmp_path / "a", tmp_path / "b.safetensors")
    assert names_below(tmp_path) == before


async def test_rows_that_nobody_could_load_are_counted(tmp_path: Path) -> None:
    content = data([1, 2, 1, 40000, 3])
    slots = {"id": content.ids, **content.slots}
    claim = split_slices(65536, 2)[0]
    blocks = [sparse_block("t", slot, rows, claim=claim) for slot, rows in slots.items()]
    other = [sparse_block("t", slot, rows[:0], rank=1, ranks=2) for slot, rows in slots.items()]
    write_ranks(tmp_path / "a", [blocks, other])
    [table] = (await convert(tmp_path / "a", tmp_path / "b", shards=3)).tables
    assert (table.ids, table.duplicates, table.strays) == (3, 1, 1)
    with pytest.raises(CheckpointError, match="1 ids outside the slices"):
        await convert(tmp_path / "a", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    [table] = (await convert(tmp_path / "b", tmp_path / "b.safetensors")).tables
    assert (table.ids, table.duplicates, table.strays) == (3, 0, 0)


@pytest.mark.parametrize("destination", ["b", "b.safetensors"])
async def test_what_is_there_is_replaced_only_where_that_was_asked_for(
    tmp_path: Path, destination: str
) -> None:
    source, path = save(tmp_path / "a"), tmp_path / destination
    await convert(source, path)
    with pytest.raises(SaveError, match="is there already; give another place, or --overwrite"):
        await convert(source, path)
    await convert(source, path, slots=["embedding"], overwrite=True)
    if path.is_dir():
        tables, _ = read_checkpoint(path)
        assert list(tables["user@emb"].slots) == ["embedding"]
    else:
        assert "user@emb.exp_avg" not in shard_header(path)
    assert sorted(os.listdir(tmp_path)) == ["a", destination]  # noqa: PTH208


async def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("dear")
    with pytest.raises(SaveError, match=r"something else than a checkpoint: 'thesis.tex'"):
        await convert(source, tmp_path / "b", overwrite=True, shards=2)
    assert names_below(tmp_path / "b") == ["thesis.tex"]


async def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    await convert(save(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / "index").exists()


@pytest.mark.parametrize(
    ("destination", "want"),
    [
        ("a", "is the source itself"),
        ("a/../a", "is the source itself"),
        ("link", "is the source itself"),
        ("a/b", "lies within the source"),
        ("a/b.safetensors", "lies within the source"),
        (".", "holds the source"),
        ("folder.safetensors", "is a folder"),
        ("file", "is a file, but a checkpoint is a folder"),
    ],
)
async def test_a_destination_that_would_do_harm_is_refused(
    tmp_path: Path, destination: str, want: str
) -> None:
    source = save(tmp_path / "a")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    before = names_below(tmp_path)
    with pytest.raises(SaveError, match=want):
        await convert(source, tmp_path / destination, overwrite=True)
    assert names_below(tmp_path) == before


async def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "a", size=4)
    with pytest.raises(SaveError, match="--shards is for folders"):
        await convert(source, tmp_path / "b.safetensors", shards=2)
    with pytest.raises(CheckpointError, match="slice size of 4, so at most as many"):
        await convert(source, tmp_path / "b", shards=5)
    for shards, parallel in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="must be positive"):
            await convert(source, tmp_path / "b", shards=shards, parallel=parallel)
    with pytest.raises(CheckpointNotFoundError):
        await convert(tmp_path / "absent", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


@pytest.mark.parametrize("destination", ["b", "b.safetensors"])
async def test_tables_that_do_not_fit_together_are_an_error(
    tmp_path: Path, destination: str
) -> None:
    write_ranks(tmp_path / "a", [[sparse_block("t", "embedding", torch.ones(2, 2))]])
    with pytest.raises(CheckpointError, match="'t': the table has no ids"):
        await convert(tmp_path / "a", tmp_path / destination)
    ids = sparse_block("t", "id", torch.tensor([1, 2]))
    write_ranks(tmp_path / "a", [[ids, sparse_block("t", "embedding", torch.ones(1, 2))]])
    with pytest.raises(CheckpointError, match="t@embedding has 1 rows, but there are 2 ids"):
        await convert(tmp_path / "a", tmp_path / destination)
    odd = sparse_block("t", "id", torch.tensor([1]), rank=1, claim=split_slices(10, 2)[1])
    write_ranks(tmp_path / "a", [[ids], [odd]])
    with pytest.raises(CheckpointError, match="slices are of different sizes"):
        await convert(tmp_path / "a", tmp_path / destination)
    half = sparse_block("t", "id", torch.tensor([1]), claim=split_slices(10, 2)[0])
    write_ranks(tmp_path / "a", [[half]])
    with pytest.raises(CheckpointError, match=r"\[5, 10\) lie in no slice: the part of a rank"):
        await convert(tmp_path / "a", tmp_path / destination)


async def test_a_tensor_that_is_called_like_a_table_fits_into_a_plain_file_only(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path / "a", {"t": data([1])}, {"t": torch.ones(1)})
    with pytest.raises(CheckpointError, match="both a tensor and a table are called 't'"):
        await convert(tmp_path / "a", tmp_path / "b")
    await convert(tmp_path / "a", tmp_path / "b.safetensors")
    assert set(shard_header(tmp_path / "b.safetensors")) == {
        "__metadata__", "t", "t.id", "t.embedding"
    }  # fmt: skip


async def test_rows_of_nothing_are_an_error(tmp_path: Path) -> None:
    ids = sparse_block("t", "id", torch.tensor([1, 2]))
    write_ranks(tmp_path / "a", [[ids, sparse_block("t", "embedding", torch.ones(2, 0))]])
    with pytest.raises(CheckpointError, match="these are no rows"):
        await convert(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("destination", ["b/c", "b/c.safetensors"])
async def test_a_source_that_is_damaged_leaves_nothing(tmp_path: Path, destination: str) -> None:
    source = save(tmp_path / "a", ranks=3)
    flip(shard_holding(source, "user.emb@embedding/part_0_3"), -1)
    before = names_below(tmp_path)
    with pytest.raises(CheckpointError, match="are not those that were written"):
        await convert(source, tmp_path / destination, shards=3 if destination == "b/c" else None)
    assert names_below(tmp_path) == before


async def test_a_source_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", TABLES, TENSORS)
    for shard in (tmp_path / "a").glob("*.safetensors"):
        truncate(shard, by=1)
    with pytest.raises(CheckpointError, match="are not there: the file ends at"):
        await convert(tmp_path / "a", tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


@pytest.mark.parametrize("destination", ["b/c", "b/c.safetensors"])
async def test_cancelled_at_any_await_it_leaves_nothing_or_all(
    tmp_path: Path, destination: str
) -> None:
    source = save(tmp_path / "a", tensors={"w": torch.ones(3)}, tables={"t": data([1, 40000])})
    target = tmp_path / destination
    outcomes = []
    with debug_off():
        for at in range(0, 2000, 2):
            steps = Steps(cancel_at=range(at, at + 1))
            cancelled = await steps.run(partial(convert, source, target))
            outcomes.append(target.exists())
            if not cancelled:
                break
            if target.exists():
                assert (await averify(str(target), options=LIMITS)).ok
                shutil.rmtree(target.parent)
            assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208
    assert len(outcomes) > 10
    assert outcomes[-1]


async def test_a_replaced_checkpoint_survives_a_conversion_that_fails(tmp_path: Path) -> None:
    source, old = save(tmp_path / "a", ranks=3), save(tmp_path / "b", tensors={}, ranks=1)
    flip(shard_holding(source, "w^ "), -1)
    want = {name: (old / name).read_bytes() for name in names_below(old)}
    with pytest.raises(CheckpointError, match="are not those that were written"):
        await convert(source, old, overwrite=True)
    assert {name: (old / name).read_bytes() for name in names_below(old)} == want


def drop_privileges() -> None:
    """Let modes of files count for root, too: in this thread, and in those that it starts."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    capabilities = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, capabilities) == 0
    for kind in range(3):
        capabilities[kind] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, capabilities) == 0


def failure_without_privileges(source: str, destination: str) -> str:
    """Convert, and return what the error says."""
    drop_privileges()
    with pytest.raises(SaveError) as caught:
        asyncio.run(aconvert(source, destination, overwrite=True, options=LIMITS))
    return str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_file_that_is_in_its_place_is_written_even_if_that_cannot_be_synced(
    tmp_path: Path,
) -> None:
    source, folder = tmp_path / "a.safetensors", tmp_path / "b"
    save_file({"w": torch.ones(4)}, source)
    folder.mkdir()
    save_file({"w": torch.zeros(4)}, folder / "w.safetensors")
    folder.chmod(0o300)  # names can be changed, but it cannot be opened, to be synced
    said = apart(failure_without_privileges, str(source), str(folder / "w.safetensors"))
    folder.chmod(0o700)
    assert "is written, but may not outlive a power loss: " in said
    assert names_below(folder) == ["w.safetensors"]
    with safe_open(folder / "w.safetensors", "pt") as file:
        assert file.get_tensor("w").tolist() == [1] * 4


async def test_where_nothing_can_be_written_the_error_says_so(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    (tmp_path / "file").write_text("")
    for destination in ("file/b", "file/b.safetensors"):
        with pytest.raises(SaveError, match="could not be written"):
            await convert(source, tmp_path / destination)


async def test_all_bytes_are_verified_whatever_the_parts(tmp_path: Path) -> None:
    """Parts begin and end within chunks that have digests, and writes do too."""
    ids = list(range(5 * CHUNK // 64))
    table = TableData(ids=torch.tensor(ids), slots={"embedding": torch.rand(len(ids), 16)})
    source = save(tmp_path / "a", tables={"t": table}, ranks=3, tensors={}, parallel=1)
    report = await convert(source, tmp_path / "b.safetensors")
    assert report.bytes_verified == len(ids) * (64 + 8)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        order = torch.argsort(file.get_tensor("t.id"))
        assert file.get_tensor("t.embedding")[order].equal(table.slots["embedding"])
    shard = shard_holding(source, "t.embedding/part_2_3")
    for offset in (-1, -(shard.stat().st_size // 2)):
        flip(shard, offset)
        with pytest.raises(CheckpointError, match="are not those that were written"):
            await convert(source, tmp_path / "c.safetensors")
        flip(shard, offset)


async def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    for destination in ("b", "b.safetensors"):
        told: list[Progress] = []
        await convert(source, tmp_path / destination, progress=told.append)
        assert told[-1].bytes_done == told[-1].bytes_total > 0
        assert [moment.bytes_done for moment in told] == sorted(m.bytes_done for m in told)


async def test_digests_are_written_along(tmp_path: Path) -> None:
    await convert(GENUINE / "optim_slots", tmp_path / "b", shards=2)
    sidecar = json.loads((tmp_path / "b" / "asyncloader.json").read_bytes())
    assert len(sidecar["parts"]["user_emb"]) == 2


@pytest.mark.parametrize("becomes", ["another version", "a link", "nothing"])
async def test_a_source_that_changes_once_its_headers_are_known_is_an_error(
    tmp_path: Path, becomes: str
) -> None:
    """A file of two versions would look like any other: there are no digests to tell."""
    for name, value in (("a", 1.0), ("next", 2.0)):
        write_checkpoint(tmp_path / name, {}, {"v": torch.ones(9), "w": torch.full((9,), value)})
    shard = shard_holding(tmp_path / "a", "w^ ")
    newer = shard_holding(tmp_path / "next", "w^ ")
    async with open_session(str(tmp_path / "a"), LIMITS) as session:
        content = await read_source(session, None)
        if becomes == "another version":
            newer.replace(shard)
        else:
            shard.unlink()
        if becomes == "a link":
            shard.symlink_to(newer)
        path = str(tmp_path / "b.safetensors")
        find = partial(target_of, session.location, path, None, overwrite=False)
        target = await asyncio.to_thread(find)
        with pytest.raises(CheckpointChangedError, match="was replaced, removed or written to"):
            await write_file(content, target, parallel=2, progress=None)
    assert sorted(os.listdir(tmp_path)) == ["a", "next"]  # noqa: PTH208


def test_the_command_says_what_it_has_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a[b]")
    assert (
        command(["convert", str(source), str(tmp_path / "c"), "--slots", "embedding,filter"]) == 0
    )
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.strip("│ ").split()) for line in out.splitlines()]
    rows = sum(len(table.ids) for table in TABLES.values())
    for line in (
        f"path {tmp_path / 'c'}",
        f"from {source}",
        f"holds 2 tables of {rows} ids, 6 tensors",
        "slots embedding, filter",
        "digests compared",
    ):
        assert line in lines, out
    assert f"{len(list((tmp_path / 'c').glob('*.safetensors')))} files, as 2 ranks would" in out


def test_the_command_says_what_it_has_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = data([1, 2, 1, 40000, 3])
    slots = {"id": content.ids, **content.slots}
    first, second = split_slices(65536, 2)
    blocks = [sparse_block("t", slot, rows, claim=first) for slot, rows in slots.items()]
    empty = [
        sparse_block("t", slot, rows[:0], rank=1, claim=second) for slot, rows in slots.items()
    ]
    write_ranks(tmp_path / "a", [blocks, empty])
    assert command(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out, _ = capsys.readouterr()
    assert "t: 1 row of which a later one has the same id" in out
    assert "t: 1 row whose id is not in the slice of its block" in out


def test_the_processes_convert_there_and_back(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    code, out, err = run("convert", source, tmp_path / "b.safetensors", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["kind"] == "safetensors file"
    assert run("convert", tmp_path / "b.safetensors", tmp_path / "c", "--parallel", "1")[0] == 0
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 1
    assert everything(read_checkpoint(tmp_path / "c")) == everything(read_checkpoint(source))
    code, out, err = run("convert", source, tmp_path / "c")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is there already" in err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT there")
def test_a_process_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    ids = torch.arange(3_000_000)
    table = TableData(ids=ids, slots={"embedding": torch.zeros(len(ids), 16)})
    write_checkpoint(tmp_path / "a", {"t": table}, {})
    into = [str(tmp_path / name) for name in "ab"]
    process = Forked(["-m", "asyncloader", "convert", *into, "--shards", "50"])
    deadline = time.monotonic() + 30
    while not (tmp_path / "b").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


async def test_files_beside_the_tensors_are_left_out_and_named(tmp_path: Path) -> None:
    for target in ("folder", "file.safetensors"):
        done = await aconvert(RUN / NEWEST, tmp_path / target)
        assert done.left_out == ("extra.pt", "io_state_0.pt")


def test_files_that_are_left_out_are_shown(tmp_path: Path) -> None:
    code, out, _ = run("convert", RUN / NEWEST, tmp_path / "again")
    assert code == 0
    assert "extra.pt, io_state_0.pt: copy what you need" in out
