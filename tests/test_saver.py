"""What a saver writes, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rich
import torch
from safetensors import safe_open

from asyncloader import (
    HashTable,
    Loader,
    Progress,
    SaveError,
    Saver,
    SaveTimeoutError,
    Slice,
    WriteBlock,
    gen_slice,
    load_tensors,
)
from asyncloader._saving.part import check_sizes
from asyncloader._storage.local_folder import LocalFolder
from tests.folders import WatchedFolder, content, save_into
from tests.oracle import (
    TableData,
    edit_json,
    read_checkpoint,
    read_parts,
    shard_header,
    write_checkpoint,
)
from tests.support import data, nothing_left_behind, raw, rows_in, rows_on_disk, table_for

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from asyncloader._table.snapshot import TableSnapshot

IDS = [5, -1, 65536, 3, 2**63 - 1, -(2**63), 0, 65535]
CONTENT = data(IDS, width=3, exp_avg=3)
DESCRIPTION = "torch_rank_weights_embs_table_multi_shard.json"


def filled(content: TableData, **how: object) -> HashTable:
    table = table_for(content, **how)  # type: ignore[arg-type]
    for slot, rows in content.slots.items():
        table.insert(content.ids, rows, slot)
    return table


def test_it_writes_the_files_that_recis_writes_under_the_same_names(tmp_path: Path) -> None:
    """The same blocks in the same shards, compared with a writer made from the format alone."""
    dense = {
        "w": torch.arange(6.0).view(2, 3),
        "mask": torch.tensor([True, False]),
        "s": torch.tensor(1),
    }
    Saver(
        path=tmp_path / "ours", hashtables={"t": filled(CONTENT)}, tensors=dense, parallel=2
    ).save()
    write_checkpoint(tmp_path / "theirs", {"t": CONTENT}, dense, writers=2, sort=True)

    ours, theirs = content(tmp_path / "ours"), content(tmp_path / "theirs")
    sidecar = ours.pop("asyncloader.json")
    assert json.loads(sidecar)["format"] == 1
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".safetensors"):
            assert ours[name] == theirs[name]
        else:
            assert json.loads(ours[name]) == json.loads(theirs[name])


def test_rows_are_sorted_by_slice_position_then_id(tmp_path: Path) -> None:
    Saver(path=tmp_path, hashtables={"t": filled(CONTENT)}).save()
    tables, _ = read_checkpoint(tmp_path)
    want = sorted(IDS, key=lambda id_: (id_ % 2**64 % 65536, id_ % 2**64))
    assert tables["t"].ids.tolist() == want
    assert rows_on_disk(tables["t"]) == rows_on_disk(CONTENT)


def test_the_sidecar_says_where_the_rows_of_each_sub_slice_begin(tmp_path: Path) -> None:
    part = gen_slice(1, 3)
    ids = [id_ for id_ in range(-4000, 4000, 7) if part.accepts(id_)]
    stored = data(ids)
    Saver(1, 3, path=tmp_path, hashtables={"t": filled(stored, slice=part)}, save_id=1).save()
    others = [filled(data([]), slice=gen_slice(rank, 3)) for rank in range(3)]
    Saver(2, 3, path=tmp_path, hashtables={"t": others[2]}, save_id=1).save()
    Saver(0, 3, path=tmp_path, hashtables={"t": others[0]}, save_id=1).save()
    empty, ours, _ = json.loads((tmp_path / "asyncloader.json").read_bytes())["parts"]["t"]
    assert (ours["slice"], ours["rows"]) == (str(part), len(ids))
    assert empty["offsets"] == [0] * 257
    positions = np.array(sorted(id_ % 2**64 % 65536 for id_ in ids))
    for number in range(256):
        begin = part.begin + (part.end - part.begin) * number // 256
        assert ours["offsets"][number] == int((positions < begin).sum())
    assert ours["offsets"][256] == len(ids)


def test_children_of_a_coalesced_table_are_saved_one_by_one(tmp_path: Path) -> None:
    merged = HashTable([2], coalesced=True, children=["shop", "brand"], name="merged")
    merged.insert(torch.tensor([7, 8]), torch.ones(2, 2), child="brand")
    merged.insert(torch.tensor([7]), torch.zeros(1, 2), child="shop")
    report = Saver(path=tmp_path, hashtables={"any": merged}).save()
    assert report.tables == {"shop": 1, "brand": 2}
    tables, _ = read_checkpoint(tmp_path)
    assert tables["brand"].ids.tolist() == [7, 8]
    assert tables["shop"].slots["embedding"].tolist() == [[0.0, 0.0]]


def test_ids_of_no_child_are_not_lost_in_silence(tmp_path: Path) -> None:
    merged = HashTable([2], coalesced=True, children=["a", "b"], name="merged")
    merged.insert(torch.tensor([5 | 9 << 52]), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"1 ids of child number 9.*child="):
        Saver(path=tmp_path, hashtables={"m": merged}).save()
    assert content(tmp_path) == {}


def test_a_table_is_saved_as_it_is_when_the_save_begins(tmp_path: Path) -> None:
    table = filled(CONTENT)
    saver = Saver(path=tmp_path, hashtables={"t": table})

    async def save_and_change() -> None:
        saving = saver.asave()
        table.insert(torch.tensor([5, 1234]), torch.full((2, 3), -9.0))
        table.delete(torch.tensor([3, 0]))
        await saving

    asyncio.run(save_and_change())
    tables, _ = read_checkpoint(tmp_path)
    assert rows_on_disk(tables["t"]) == rows_on_disk(CONTENT)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(20)[::3],
        torch.ones(1, dtype=torch.float64).expand(5),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.empty(0, 3),
        torch.tensor(4, dtype=torch.int8),
        torch.nn.Parameter(torch.arange(3.0)),
    ],
    ids=["permuted", "strided", "expanded", "conjugated", "empty", "scalar", "parameter"],
)
def test_a_tensor_is_saved_as_it_reads_however_it_lies(tmp_path: Path, tensor: Tensor) -> None:
    Saver(path=tmp_path, tensors={"x": tensor}).save()
    _, tensors = read_checkpoint(tmp_path)
    assert raw(tensors["x"]) == raw(tensor.detach().resolve_conj().contiguous())


async def test_a_tensor_that_is_written_to_meanwhile_makes_the_save_fail(tmp_path: Path) -> None:
    """Or its digests might be of other bytes than those on the disk."""
    Saver(path=tmp_path, tensors={"old": torch.ones(2)}).save()
    before, tensor = content(tmp_path), torch.ones(2)

    def train(_: int, what: str) -> None:
        if what.startswith("sync .saving-1-x/model"):
            tensor.add_(1)

    with pytest.raises(SaveError, match="written to while they were saved: x"):
        await save_into(WatchedFolder.at(tmp_path, train), {}, {"x": tensor}, save_id="x")
    assert content(tmp_path) == before


def test_a_tensor_can_be_resized_after_it_was_saved(tmp_path: Path) -> None:
    tensor, left_out = torch.ones(2), torch.ones(2)
    tensors = {"x": tensor, "y": left_out}
    Saver(path=tmp_path, tensors=tensors, filter_func=lambda blocks: blocks[:1]).save()
    tensor.resize_(5)
    left_out.untyped_storage().resize_(0)


@pytest.mark.gpu
def test_rows_and_tensors_on_a_gpu_are_saved(tmp_path: Path) -> None:
    table = table_for(CONTENT)
    on_gpu = HashTable([3], name="t", device="cuda")
    on_gpu.add_slot("exp_avg", [3])
    for slot, rows in CONTENT.slots.items():
        on_gpu.insert(CONTENT.ids, rows.cuda(), slot)
    Saver(path=tmp_path, hashtables={"t": on_gpu}, tensors={"w": torch.ones(3).cuda()}).save()
    Loader(tmp_path, {"t": table}).load()
    assert rows_in(table) == rows_on_disk(CONTENT)


def test_safetensors_own_reader_opens_every_shard(tmp_path: Path) -> None:
    dense = {"mask": torch.tensor([True]), "x/part_0": torch.ones(3), 'q"\t火': torch.ones(2)}
    report = Saver(
        path=tmp_path, hashtables={"t": filled(CONTENT)}, tensors=dense, parallel=3
    ).save()
    keys = set()
    for shard in report.shards:
        with safe_open(tmp_path / shard, "pt") as opened:
            keys |= set(opened.keys())
            header = shard_header(tmp_path / shard)
            assert all(
                opened.get_tensor(key).shape == tuple(header[key]["shape"]) for key in header
            )
    assert keys == json.loads((tmp_path / "index").read_bytes())["block_index"].keys()


def test_fewer_blocks_than_writers_are_no_problem(tmp_path: Path) -> None:
    report = Saver(path=tmp_path, tensors={"x": torch.ones(1)}, parallel=8).save()
    assert report.shards == ("model-000000-of-000008.safetensors",)
    assert Saver(path=tmp_path / "empty").save().shards == ()
    assert Loader(tmp_path / "empty").load().bytes_read == 0


def test_a_table_without_ids_is_there_after_loading(tmp_path: Path) -> None:
    Saver(path=tmp_path, hashtables={"t": table_for(CONTENT)}).save()
    report = Loader(tmp_path, {"t": table_for(CONTENT)}, strict=True).load()
    assert (report.missing, report.bytes_read) == ((), 0)


def test_saving_over_a_checkpoint_replaces_all_of_it(tmp_path: Path) -> None:
    """RecIS's saver leaves old shards behind."""
    write_checkpoint(tmp_path, {"gone": CONTENT}, {"w": torch.ones(2)}, writers=7)
    (tmp_path / "model.pt").write_bytes(b"RecIS's trainer puts it here")
    (tmp_path / "io_state_0.pt").write_bytes(b"and this")
    Saver(path=tmp_path, tensors={"x": torch.ones(1)}, parallel=2).save()
    names = {
        "asyncloader.json",
        "index",
        "tensorkey.json",
        DESCRIPTION,
        "model.pt",
        "io_state_0.pt",
    }
    assert content(tmp_path).keys() == names | {"model-000000-of-000002.safetensors"}
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "model.safetensors", "a folder/", "index", "model-000000-of-000001.safetensors/"],
)
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"dear")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SaveError, match=f"something else.*{name.rstrip('/')}.*nothing was written"):
        Saver(path=tmp_path, tensors={"x": torch.ones(1)}).save()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "index", [b"{", b"[1]", b'{"file_index": 5}', b'{"file_index": {"../x": 0}}']
)
def test_a_damaged_checkpoint_is_replaced_all_the_same(tmp_path: Path, index: bytes) -> None:
    Saver(path=tmp_path, tensors={"old": torch.ones(2)}, parallel=3).save()
    (tmp_path / "index").write_bytes(index)
    Saver(path=tmp_path, tensors={"x": torch.ones(1)}, parallel=1).save()
    assert list(read_checkpoint(tmp_path)[1]) == ["x"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_lock_does_not_outlive_its_save_in_a_process_that_was_forked_meanwhile(
    tmp_path: Path,
) -> None:
    folder = LocalFolder(tmp_path)
    with folder.hold() as alone:
        assert alone
        child = subprocess.Popen(["sleep", "60"], close_fds=False)  # noqa: S607
    try:
        with folder.hold() as alone:
            assert alone
    finally:
        child.kill()
        child.wait()


def test_a_file_in_the_place_of_the_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "ck").write_bytes(b"")
    with pytest.raises(SaveError, match=r"could not be written.*ck"):
        Saver(path=tmp_path / "ck", tensors={"x": torch.ones(1)}).save()


async def test_two_saves_into_one_folder_at_a_time_are_refused(tmp_path: Path) -> None:
    first = WatchedFolder.at(tmp_path, lambda *_: None)
    with first.real.hold(), pytest.raises(SaveError, match="another process is saving"):
        await save_into(WatchedFolder.at(tmp_path, lambda *_: None), {}, {"x": torch.ones(1)})
    assert (await save_into(first, {}, {"x": torch.ones(1)})).committed


def test_every_file_and_name_is_on_the_disk_before_the_next_step_relies_on_it(
    tmp_path: Path,
) -> None:
    """What a loss of power may undo is what was not synced: look at the order of the calls."""
    Saver(path=tmp_path, tensors={"old": torch.ones(2)}, parallel=1).save()
    folder = WatchedFolder.at(tmp_path, lambda *_: None)
    tables = {"t": filled(CONTENT)}
    asyncio.run(save_into(folder, tables, {"x": torch.ones(9)}, parallel=2, save_id=7))
    calls = folder.calls
    at = {call: number for number, call in enumerate(calls)}
    staging = ".saving-1-7"
    published = at[f"move {staging}/part-000000.json.tmp {staging}/part-000000.json"]
    for shard in ("model-000000-of-000002.safetensors", "model-000001-of-000002.safetensors"):
        writes = [n for n, call in enumerate(calls) if call == f"write {staging}/{shard}"]
        assert max(writes) < at[f"sync {staging}/{shard}"] < published
    assert calls[published - 1] == f"sync {staging}/"
    moves = [n for n, call in enumerate(calls) if call.startswith("move ") and "part-" not in call]
    assert calls[moves[0]] == f"move index {staging}/old/index"
    assert calls[moves[0] + 1 : moves[0] + 3] == [f"sync {staging}/old/", "sync /"]
    for text in ("tensorkey.json", DESCRIPTION, "asyncloader.json", "index"):
        assert at[f"write {staging}/{text}"] < at[f"sync {staging}/{text}"] < at[f"sync {staging}/"]
    assert at[f"sync {staging}/"] < moves[0]
    assert calls[moves[-1]] == f"move {staging}/index index"
    assert calls[moves[-1] - 2 : moves[-1]] == [f"sync {staging}/old/", "sync /"]
    assert calls[moves[-1] + 1] == "sync /"


def test_what_dead_saves_have_left_behind_is_cleared_away(tmp_path: Path) -> None:
    dead = tmp_path / ".saving-1-dead"
    (dead / "old").mkdir(parents=True)
    (dead / "model-000000-of-000001.safetensors").write_bytes(b"half")
    (dead / "old" / "tensorkey.json").write_bytes(b"{}")
    stuck = tmp_path / ".saving-1-stuck" / "of" / "what nobody here makes"
    stuck.mkdir(parents=True)
    living = tmp_path / ".saving-2-alive"  # of several ranks: perhaps the others are still at it
    living.mkdir()
    (living / "model-000000-of-000002.safetensors").write_bytes(b"being written")
    os.utime(living, (0, 0))  # which a folder does not notice
    forgotten = tmp_path / ".saving-2-forgotten"
    forgotten.mkdir()
    (forgotten / "model-000000-of-000002.safetensors").write_bytes(b"half")
    os.utime(forgotten / "model-000000-of-000002.safetensors", (0, 0))
    os.utime(forgotten, (0, 0))
    Saver(path=tmp_path, tensors={"x": torch.ones(1)}).save()
    assert [path.exists() for path in (dead, forgotten, living, stuck)] == [
        False,
        False,
        True,
        True,
    ]
    assert len(list(tmp_path.glob(".saving-*"))) == 2, "its own is still there"


def test_filter_func_gets_blocks_and_returns_those_to_write(tmp_path: Path) -> None:
    seen: list[WriteBlock] = []

    def embeddings_only(blocks: list[WriteBlock]) -> list[WriteBlock]:
        seen.extend(blocks)
        return [block for block in blocks if block.tensor_name() in {"t@id", "t@embedding"}]

    tables = {"t": filled(CONTENT)}
    Saver(
        path=tmp_path, hashtables=tables, tensors={"w": torch.ones(1)}, filter_func=embeddings_only
    ).save()
    whole = "00000@65536@65536"
    facts = [(block.tensor_name(), block.slice_info(), block.nbytes) for block in seen]
    assert facts == [
        ("t@id", whole, 64), ("t@embedding", whole, 96), ("t@exp_avg", whole, 96), ("w", "", 4),
    ]  # fmt: skip
    tables_found, tensors = read_checkpoint(tmp_path)
    assert (list(tables_found["t"].slots), tensors) == (["embedding"], {})


@pytest.mark.parametrize(
    ("chosen", "error", "match"),
    [
        (lambda _: None, TypeError, "must return a list of blocks"),
        (lambda _: ["t@id"], TypeError, "out of those that it was given"),
        (lambda _: [["t@id"]], TypeError, "out of those that it was"),
        (lambda blocks: blocks[1:], ValueError, "'t@embedding' but not 't@id'"),
    ],
)
def test_a_filter_func_that_makes_no_sense_is_an_error_before_anything_is_written(
    tmp_path: Path, chosen: object, error: type[Exception], match: str
) -> None:
    saver = Saver(path=tmp_path / "x", hashtables={"t": filled(CONTENT)}, filter_func=chosen)  # type: ignore[arg-type]
    with pytest.raises(error, match=match):
        saver.save()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("tables", "tensors", "match"),
    [
        ([("a.b", "c"), ("a", "b.c")], {}, "both stand under the key 'a.b.c/part_0_1'"),
        ([("t", "m@n")], {}, "'m@n' of table 't'"),
        ([], {"\ud800": torch.ones(1)}, "cannot be written"),
    ],
)
def test_names_that_could_not_be_told_apart_on_disk_are_refused(
    tmp_path: Path, tables: list[tuple[str, str]], tensors: dict[str, Tensor], match: str
) -> None:
    made = {}
    for name, slot in tables:
        made[name] = HashTable([1], name=name)
        made[name].add_slot(slot, [1])
    with pytest.raises(ValueError, match=match):
        Saver(path=tmp_path / "x", hashtables=made, tensors=tensors).save()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"shard_index": 2, "shard_num": 2}, ValueError, "0 to shard_num - 1"),
        ({"shard_index": -1}, ValueError, "0 to shard_num - 1"),
        ({"shard_num": 0}, ValueError, "shard_num must be positive"),
        ({"parallel": 0}, ValueError, "parallel must be positive"),
        ({"parallel": 1.5}, TypeError, "parallel must be an int"),
        ({"max_inflight_bytes": 0}, ValueError, "max_inflight_bytes"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"filter_func": 1}, TypeError, "filter_func"),
        ({"progress": 1}, TypeError, "progress"),
        ({"path": b"x"}, TypeError, "path must be text"),
        ({"path": "a\0b"}, ValueError, "NUL"),
        ({"save_id": "a/b"}, ValueError, "save_id"),
        ({"save_id": 1.5}, TypeError, "save_id"),
        ({"hashtables": [1]}, TypeError, "hashtables maps"),
        ({"hashtables": {"t": 1}}, TypeError, "hashtables maps"),
        ({"tensors": {"t": 1}}, TypeError, "tensors maps"),
        ({"tensors": {"t": torch.eye(2).to_sparse()}}, ValueError, "only plain strided"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(
    how: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Saver(**how)  # type: ignore[arg-type]


def test_a_dtype_that_no_checkpoint_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex128, which no checkpoint can hold"):
        Saver(path=tmp_path / "x", tensors={"z": torch.ones(1, dtype=torch.complex128)}).save()


def test_only_rank_0_writes_dense_tensors(tmp_path: Path) -> None:
    part = gen_slice(1, 2)
    table = filled(data([id_ for id_ in IDS if part.accepts(id_)]), slice=part)
    report = Saver(
        1, 2, path=tmp_path, hashtables={"t": table}, tensors={"w": torch.ones(1)}, save_id="a"
    ).save()
    assert (report.tensors, report.committed) == ((), False)
    assert "rank 0 commits" in str(report)


def test_ranks_whose_slices_overlap_make_no_checkpoint(tmp_path: Path) -> None:
    Saver(1, 2, path=tmp_path, hashtables={"t": filled(CONTENT)}, save_id="a").save()
    with pytest.raises(SaveError, match=r"table 't'.*overlap.*gen_slice"):
        Saver(0, 2, path=tmp_path, hashtables={"t": filled(CONTENT)}, save_id="a").save()
    assert content(tmp_path) == {}


def test_ranks_with_different_parallel_make_no_checkpoint(tmp_path: Path) -> None:
    """Two of their shards would have the same number."""
    Saver(path=tmp_path, tensors={"old": torch.ones(2)}).save()
    before = content(tmp_path)
    slices = [gen_slice(rank, 2) for rank in range(2)]
    tables = [HashTable([3], name="t", slice=part) for part in slices]
    Saver(1, 2, 2, tmp_path, {"t": tables[1]}, save_id="a").save()
    with pytest.raises(SaveError, match="the same parallel"):
        Saver(0, 2, 8, tmp_path, {"t": tables[0]}, save_id="a").save()
    assert content(tmp_path) == before


def test_a_slice_alone_is_refused_where_there_is_one_rank(tmp_path: Path) -> None:
    """Whoever forgets shard_index and shard_num would lose all other ranks' ids."""
    table = HashTable([3], name="t", slice=gen_slice(0, 2))
    with pytest.raises(ValueError, match="pass this rank's shard_index and shard_num"):
        Saver(path=tmp_path / "x", hashtables={"t": table}).save()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (None, r"leave ids out.*save it on every rank"),
        (HashTable([3], name="t", slice=gen_slice(1, 3)), "which overlap"),
        (HashTable([3], name="t", slice=gen_slice(1, 4)), "which overlap"),
        (HashTable([3], name="t", slice=gen_slice(2, 3)), "leave ids out"),
        (HashTable([3], name="t", slice=gen_slice(1, 2, 100)), "which overlap"),
        (HashTable([4], name="t", slice=gen_slice(1, 2)), r"float32 \[3\].*float32 \[4\]"),
        (HashTable([3], name="t", slice=gen_slice(1, 2), dtype=torch.float64), r"float64 \[3\]"),
    ],
    ids=["none", "a third", "a quarter", "a gap", "another size", "another shape", "another dtype"],
)
def test_parts_that_do_not_fit_together_make_no_checkpoint(
    tmp_path: Path, other: HashTable | None, match: str
) -> None:
    """And leave the one that is there alone."""
    Saver(path=tmp_path, tensors={"old": torch.ones(2)}).save()
    before = content(tmp_path)
    Saver(1, 2, path=tmp_path, hashtables={"t": other} if other else {}, save_id="a").save()
    mine = HashTable([3], name="t", slice=gen_slice(0, 2))
    with pytest.raises(SaveError, match=match):
        Saver(0, 2, path=tmp_path, hashtables={"t": mine}, save_id="a").save()
    assert content(tmp_path) == before


def test_an_empty_slice_between_two_hides_no_overlap(tmp_path: Path) -> None:
    slices = [Slice(0, 40000, 65536), Slice(30000, 30000, 65536), Slice(30000, 65536, 65536)]
    for rank in (1, 2):
        table = HashTable([1], name="t", slice=slices[rank])
        Saver(rank, 3, path=tmp_path, hashtables={"t": table}, save_id="a").save()
    with pytest.raises(SaveError, match="which overlap"):
        Saver(
            0,
            3,
            path=tmp_path,
            hashtables={"t": HashTable([1], name="t", slice=slices[0])},
            save_id="a",
        ).save()


async def test_rank_0_does_not_wait_for_a_rank_that_has_given_up(tmp_path: Path) -> None:
    def fail(_: int, what: str) -> None:
        if what.startswith("sync .saving-2-a/model"):
            raise OSError(28, "No space left on device")

    part = gen_slice(1, 2)
    table = HashTable([1], name="t", slice=part)
    with pytest.raises(SaveError, match="No space left"):
        await save_into(
            WatchedFolder.at(tmp_path, fail),
            {"t": table},
            {},
            save_id="a",
            shard_index=1,
            shard_num=2,
        )
    with pytest.raises(SaveError, match=r"rank 1 gave up.*No space left"):
        await Saver(0, 2, path=tmp_path, save_id="a").asave()
    Saver(1, 2, path=tmp_path, save_id="a").save()  # tries again
    Saver(0, 2, path=tmp_path, save_id="a").save()


async def test_a_rank_that_is_through_may_begin_the_next_save_before_rank_0_commits(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(1)})
    (tmp_path / "model-000000-of-000002.safetensors").rename(tmp_path / "odd.safetensors")
    edit_json(tmp_path / "index", lambda it: it.update(file_index={"odd.safetensors": 0}))
    await Saver(1, 2, path=tmp_path, save_id="a").asave()
    started: list[Exception | None] = []

    def begin_next(_: int, what: str) -> None:
        if what.startswith("move .saving-2-a/tensorkey.json"):
            try:
                Saver(1, 2, path=tmp_path, save_id="b").save()
            except Exception as error:  # noqa: BLE001  # whatever it is
                started.append(error)
            else:
                started.append(None)

    folder = WatchedFolder.at(tmp_path, begin_next)
    report = await save_into(folder, {}, {"x": torch.ones(1)}, save_id="a", shard_num=2)
    assert (report.committed, started) == (True, [None])
    assert (await Saver(0, 2, path=tmp_path, save_id="b").asave()).committed


def test_a_part_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    Saver(1, 2, path=tmp_path, save_id="a").save()
    (tmp_path / ".saving-2-a" / "part-000001.json").write_bytes(b'{"rank": 1}')
    with pytest.raises(SaveError, match=r"part-000001\.json: damaged"):
        Saver(0, 2, path=tmp_path, save_id="a").save()


def test_more_names_than_a_header_may_hold_are_refused(tmp_path: Path) -> None:
    tensors = {f"{number}{'x' * 30_000_000}": torch.ones(1) for number in range(4)}
    with pytest.raises(ValueError, match=r"save to more shards \(parallel\)"):
        Saver(path=tmp_path / "x", tensors=tensors, parallel=1).save()
    assert not (tmp_path / "x").exists()


def test_names_may_be_of_a_class_of_their_own(tmp_path: Path) -> None:
    table = HashTable([1], name=np.str_("t"))
    table.add_slot(np.str_("m"), [1])
    Saver(path=tmp_path, hashtables={"t": table}).save()
    assert list(read_checkpoint(tmp_path)[0]["t"].slots) == ["embedding", "m"]


def test_a_listener_that_fails_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    def closed_pipe(_: Progress) -> None:
        raise BrokenPipeError("nobody listens")

    with pytest.raises(RuntimeError, match="progress raised BrokenPipeError"):
        Saver(path=tmp_path, tensors={"x": torch.ones(1)}, progress=closed_pipe).save()
    assert content(tmp_path) == {}


def test_a_relative_path_is_that_of_the_moment_when_the_save_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def leave(_: Progress) -> None:
        os.chdir(tmp_path / "elsewhere")

    Saver(path="ck", tensors={"x": torch.ones(1)}, progress=leave).save()
    assert (tmp_path / "ck" / "index").exists()


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    Saver(2, 4, path=tmp_path, hashtables={}, save_id="a").save()
    with (
        nothing_left_behind(),
        pytest.raises(SaveTimeoutError, match=r"ranks 1, 3 did not") as caught,
    ):
        Saver(0, 4, path=tmp_path, save_id="a", timeout=0.05).save()
    assert (caught.value.ranks, caught.value.seconds) == ((1, 3), 0.05)
    assert isinstance(caught.value, TimeoutError)
    copied = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # our own
    assert (str(copied), copied.ranks) == (str(caught.value), (1, 3))
    assert not list(tmp_path.iterdir())


def test_several_ranks_without_a_common_save_id_are_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pass save_id.*or initialise torch.distributed"):
        Saver(0, 2, path=tmp_path / "x").save()
    assert not (tmp_path / "x").exists()


def test_a_part_of_a_dead_earlier_try_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    slices = [gen_slice(rank, 2) for rank in range(2)]

    def table(rank: int, value: float) -> HashTable:
        made = HashTable([1], name="t", slice=slices[rank])
        made.insert(torch.tensor([rank * 40000]), torch.tensor([[value]]))
        return made

    Saver(1, 2, path=tmp_path, hashtables={"t": table(1, 1.0)}, save_id="first").save()
    with pytest.raises(SaveTimeoutError, match="rank 1 did not"):
        Saver(
            0, 2, path=tmp_path, hashtables={"t": table(0, 2.0)}, save_id="2nd", timeout=0.02
        ).save()
    Saver(1, 2, path=tmp_path, hashtables={"t": table(1, 2.0)}, save_id="2nd").save()
    Saver(0, 2, path=tmp_path, hashtables={"t": table(0, 2.0)}, save_id="2nd").save()
    parts, _ = read_parts(tmp_path)
    assert [part.slots["embedding"].item() for part in parts["t"]] == [2.0, 2.0]


def test_a_shard_that_was_cut_after_its_rank_wrote_it_is_no_part(tmp_path: Path) -> None:
    Saver(
        1, 2, 1, tmp_path, {"t": filled(data([40000]), slice=gen_slice(1, 2))}, save_id="a"
    ).save()
    shard = tmp_path / ".saving-2-a" / "model-000001-of-000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SaveError, match="bytes long, but rank 1 wrote"):
        Saver(0, 2, 1, tmp_path, save_id="a").save()


def test_the_report_says_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments: list[Progress] = []
    saver = Saver(
        path=tmp_path / "ck",
        hashtables={"t": filled(CONTENT)},
        tensors={"w": torch.ones(10)},
        progress=moments.append,
    )
    assert "1 tables, 1 tensors" in repr(saver)
    report = saver.save()
    sizes = [(tmp_path / "ck" / shard).stat().st_size for shard in report.shards]
    assert report.bytes_written == sum(sizes)
    assert (report.tables, report.tensors, report.committed) == ({"t": len(IDS)}, ("w",), True)
    assert "8 rows of 1 table" in str(report)
    rich.print(report)
    assert "t (8 rows)" in capsys.readouterr().out
    total = len(IDS) * (8 + 12 + 12) + 40
    assert (moments[-1].bytes_done, moments[-1].bytes_total) == (total, total)


def test_the_progress_bar_is_shown_and_goes_away(tmp_path: Path) -> None:
    Saver(path=tmp_path, tensors={"w": torch.ones(10)}, progress=True).save()
    assert (tmp_path / "index").exists()


async def test_it_saves_on_a_loop_that_is_running_awaited_or_not(tmp_path: Path) -> None:
    report = await Saver(path=tmp_path, hashtables={"t": filled(CONTENT)}).asave()
    assert report.committed
    assert Saver(path=tmp_path, hashtables={"t": filled(CONTENT)}).save().committed


def test_more_than_a_chunk_of_every_kind_is_cut_and_put_together_again(tmp_path: Path) -> None:
    """Rows of 12 and 7 bytes do not fit evenly into chunks of 16 MiB."""
    count = 3_000_000
    table = HashTable([3], name="t", block_size=1 << 20)
    table.add_slot("odd", [7], torch.uint8)
    ids = torch.randperm(count)
    table.insert(ids, (ids[:, None] * torch.tensor([1, 2, 3])).float())
    table.insert(ids, (ids[:, None] + torch.arange(7)).to(torch.uint8), "odd")
    turned = torch.arange(5_000_000, dtype=torch.int32).view(2500, 2000).t()
    Saver(path=tmp_path, hashtables={"t": table}, tensors={"turned": turned}, parallel=2).save()
    tables, tensors = read_checkpoint(tmp_path)
    found = tables["t"]
    assert torch.equal(found.ids.sort().values, torch.arange(count))
    want = (found.ids[:, None] * torch.tensor([1, 2, 3])).float()
    assert torch.equal(found.slots["embedding"], want)
    assert torch.equal(found.slots["odd"], (found.ids[:, None] + torch.arange(7)).to(torch.uint8))
    assert torch.equal(tensors["turned"], turned)


def test_rows_of_several_segments_are_gathered(tmp_path: Path) -> None:
    table = HashTable([2], name="t", block_size=4)
    for start in range(0, 60, 5):
        ids = torch.arange(start, start + 5)
        table.insert(ids, ids[:, None].expand(5, 2).float())
    assert len(table) == 60
    Saver(path=tmp_path, hashtables={"t": table}).save()
    tables, _ = read_checkpoint(tmp_path)
    assert torch.equal(tables["t"].slots["embedding"][:, 0], tables["t"].ids.float())


@pytest.mark.parametrize("name", ["index", "tensorkey.json", "asyncloader.json"])
def test_a_file_that_no_load_would_read_is_not_written(name: str) -> None:
    sizes = {"index": 10, "tensorkey.json": 10, "asyncloader.json": 10}
    check_sizes(sizes)
    with pytest.raises(ValueError, match=f"{name} would take 268435457 bytes, and at most"):
        check_sizes(sizes | {name: (256 << 20) + 1})


@pytest.mark.parametrize(
    ("of_rank_1", "problem"),
    [
        ({"mine": torch.ones(2)}, r"'mine' of rank 1 \(float32 \[2\]\).*rank 0 has none"),
        ({"w": torch.ones(3)}, r"'w' of rank 1 \(float32 \[3\]\).*rank 0 has float32 \[2\]"),
        ({"w": torch.ones(2).int()}, r"'w' of rank 1 \(int32 \[2\]\).*rank 0 has float32 \[2\]"),
    ],
)
def test_a_tensor_of_another_rank_that_would_be_in_no_file_is_an_error(
    tmp_path: Path, of_rank_1: dict[str, torch.Tensor], problem: str
) -> None:
    Saver(1, 2, path=tmp_path, tensors=of_rank_1, save_id="x").save()

    with pytest.raises(SaveError, match=problem):
        Saver(0, 2, path=tmp_path, tensors={"w": torch.ones(2)}, save_id="x").save()

    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("of_rank_1", [{}, {"w": torch.zeros(2)}])
def test_other_ranks_may_have_the_tensors_of_rank_0_or_none(
    tmp_path: Path, of_rank_1: dict[str, torch.Tensor]
) -> None:
    Saver(1, 2, path=tmp_path, tensors=of_rank_1, save_id="x").save()
    Saver(0, 2, path=tmp_path, tensors={"w": torch.ones(2)}, save_id="x").save()

    assert load_tensors(tmp_path)["w"].tolist() == [1.0, 1.0]


LEFT_BY_SYSTEMS = [
    "lost+found/", ".snapshot/", ".DS_Store", "_SUCCESS", "Thumbs.db", "desktop.ini", ".Trash-0/",
    "$RECYCLE.BIN/", "System Volume Information/", ".fseventsd/", "._index",
]  # fmt: skip


def test_what_systems_leave_in_a_folder_is_in_the_way_of_no_save_and_stays(tmp_path: Path) -> None:
    for name in LEFT_BY_SYSTEMS:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()

    for value in (1.0, 2.0):  # a second save replaces what the first has written, and no more
        Saver(path=tmp_path, tensors={"w": torch.full((2,), value)}).save()

    assert load_tensors(tmp_path)["w"].tolist() == [2.0, 2.0]
    assert all((tmp_path / name).exists() for name in LEFT_BY_SYSTEMS)


def test_arguments_in_the_order_of_the_loader_are_an_error_that_says_what_to_write(
    tmp_path: Path,
) -> None:
    tables, tensors = {"t": filled(CONTENT)}, {"w": torch.ones(2)}
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(TypeError, match=r"Saver\.to\(path, hashtables, tensors\)"):
            Saver(path, tables, tensors)  # type: ignore[arg-type]

    Saver.to(tmp_path, tables, tensors, parallel=2).save()

    assert load_tensors(tmp_path)["w"].tolist() == [1.0, 1.0]


def test_a_rank_that_fails_before_it_writes_tells_rank_0(tmp_path: Path) -> None:
    """Which would wait for it for half an hour."""

    def refuse(_: list[WriteBlock]) -> list[WriteBlock]:
        raise LookupError("no such slot")

    with pytest.raises(LookupError, match="no such slot"):
        Saver(1, 2, path=tmp_path, filter_func=refuse, save_id="x").save()
    with pytest.raises(SaveError, match=r"rank 1 .*LookupError: no such slot"):
        Saver(0, 2, path=tmp_path, tensors={"w": torch.ones(2)}, save_id="x", timeout=None).save()

    assert not (tmp_path / "index").exists()


class Failing(HashTable):
    """A table whose rows have gone elsewhere."""

    def snapshot(self) -> TableSnapshot:
        raise LookupError("its rows are elsewhere")


def test_a_rank_whose_table_gives_no_snapshot_tells_rank_0(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="its rows are elsewhere"):
        Saver(1, 2, path=tmp_path, hashtables={"t": Failing([2], name="t")}, save_id="x").save()
    with pytest.raises(SaveError, match=r"rank 1 .*LookupError: its rows are elsewhere"):
        Saver(0, 2, path=tmp_path, tensors={"w": torch.ones(2)}, save_id="x", timeout=None).save()

    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_another_rank_writes_nothing_into_a_folder_that_holds_something_else(
    tmp_path: Path, fails: bool
) -> None:
    def chosen(blocks: list[WriteBlock]) -> list[WriteBlock]:
        if fails:
            raise LookupError("no such slot")
        return blocks

    (tmp_path / "notes.txt").touch()
    with pytest.raises(LookupError if fails else SaveError):
        Saver(1, 2, path=tmp_path, filter_func=chosen, save_id="x").save()

    assert os.listdir(tmp_path) == ["notes.txt"]  # noqa: PTH208  # as text
