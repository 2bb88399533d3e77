"""`asyncloader verify`: one damage at a time, several at once, and none."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from asyncloader import CheckpointError, CheckpointNotFoundError, Progress, ReadOptions
from asyncloader._loading.progress import Meter
from asyncloader._loading.session import Session
from asyncloader._storage.unpacking import UnpackingStorage
from asyncloader._threads.disk import Disk
from asyncloader._threads.jobs import ByteBudget
from asyncloader._threads.pool import Threads
from asyncloader._tools.verifying import verify_session
from asyncloader.cli._app import run as command
from asyncloader.tools import averify
from tests.checkpoints import GENUINE, LIMITS, TABLES, TENSORS, flip, run, save
from tests.oracle import (
    TableData,
    append,
    declare_header_length,
    dense_block,
    edit_header,
    edit_json,
    shard_header,
    shard_holding,
    sparse_block,
    split_slices,
    truncate,
    write_checkpoint,
    write_ranks,
)
from tests.support import MemoryStorage, data, debug_off, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader._tools.verifying import Verification
    from tests.oracle import Block

NO_DIGESTS = "no digests: bytes cannot be verified, only the structure"


async def verify(path: Path, options: ReadOptions = LIMITS) -> Verification:
    with nothing_left_behind():
        return await averify(str(path), options=options)


def problems(found: Verification) -> list[str]:
    return [str(problem) for problem in found.problems]


def notes(found: Verification) -> list[str]:
    return [str(note) for note in found.notes]


def block_at(path: Path, key: str) -> tuple[Path, int, int]:
    """Return the file of a block, its first byte there, and its length."""
    shard = shard_holding(path, key)
    begin, end = shard_header(shard)[key]["data_offsets"]
    start = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    return shard, start + begin, end - begin


@pytest.mark.parametrize("name", ["small_4shards", "optim_slots"])
async def test_checkpoints_that_recis_wrote_have_no_problems(name: str) -> None:
    found = await verify(GENUINE / name)
    assert (problems(found), notes(found)) == ([], [NO_DIGESTS])


@pytest.mark.parametrize("ranks", [1, 3])
async def test_what_the_saver_wrote_has_no_problems(tmp_path: Path, ranks: int) -> None:
    found = await verify(save(tmp_path, ranks=ranks))
    shards = list(tmp_path.glob("*.safetensors"))
    blocks = [entry for shard in shards for entry in shard_header(shard).values()]
    assert (problems(found), notes(found), found.kind) == ([], [], "RecIS checkpoint")
    assert (found.tables, found.tensors) == (len(TABLES), len(TENSORS))
    assert found.ids == sum(len(table.ids) for table in TABLES.values())
    assert (found.files, found.blocks) == (len(shards) + 4, len(blocks))
    lengths = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in blocks]
    assert found.bytes_read == sum(lengths)
    assert found.digests == sum(length > 0 for length in lengths)


async def test_a_safetensors_file_has_no_problems(tmp_path: Path) -> None:
    save_file(dict(TENSORS), tmp_path / "any.safetensors")
    found = await verify(tmp_path / "any.safetensors")
    assert (problems(found), notes(found), found.kind) == ([], [NO_DIGESTS], "safetensors file")
    assert (found.files, found.tensors, found.blocks) == (1, len(TENSORS), len(TENSORS))


def hugging_face(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    for number, name in enumerate(("w", "mask")):
        save_file({name: TENSORS[name]}, path / f"model-{number}.safetensors")
    names = {"w": "model-0.safetensors", "mask": "model-1.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return path


async def test_a_hugging_face_folder_has_no_problems(tmp_path: Path) -> None:
    found = await verify(hugging_face(tmp_path))
    assert (problems(found), found.kind) == ([], "Hugging Face folder")
    assert (found.files, found.tensors) == (3, 2)


async def test_a_hugging_face_folder_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path)
    save_file({"old": TENSORS["w"]}, folder / "model-2.safetensors")
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda value: value["weight_map"].update(v="model-0.safetensors"))
    edit_json(index, lambda value: value["weight_map"].update(u="model-3.safetensors"))
    truncate(folder / "model-1.safetensors", by=1)
    found = await verify(folder)
    assert [(one.file, one.name) for one in found.problems] == [
        ("model-0.safetensors", "v"),
        ("model-1.safetensors", "mask"),
        ("model-3.safetensors", None),
    ]
    assert [one.file for one in found.notes] == [None, "model-2.safetensors"]


async def test_a_hugging_face_index_that_is_no_good_does_not_hide_bad_shards(
    tmp_path: Path,
) -> None:
    folder = hugging_face(tmp_path)
    edit_json(folder / "model.safetensors.index.json", lambda value: value.clear())
    declare_header_length(folder / "model-1.safetensors", 1 << 40)
    found = await verify(folder)
    assert [one.file for one in found.problems] == [
        "model-1.safetensors",
        "model.safetensors.index.json",
    ]


async def test_where_there_is_nothing_the_error_is_that_of_a_load(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointNotFoundError):
            await verify(path)


Damage = tuple[str, "Callable[[Path], object]", str]


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Damage] = [
    ("index is no JSON", lambda p: truncate(p / "index", by=3), "index: is not JSON"),
    (
        "index lacks its lists",
        lambda p: edit_json(p / "index", lambda index: index.pop("file_index")),
        "index: lacks file_index",
    ),
    (
        "tensorkey.json is no JSON",
        lambda p: truncate(p / "tensorkey.json", by=3),
        "tensorkey.json: is not JSON",
    ),
    (
        "tensorkey.json is missing",
        lambda p: (p / "tensorkey.json").unlink(),
        "tensorkey.json: cannot be opened: No such file",
    ),
    (
        "a name is no name",
        lambda p: edit_json(p / "tensorkey.json", lambda k: k.update({"item.id/part_0_2": "x"})),
        "tensorkey.json: 'item.id/part_0_2': 'x' is not of the form table@slot",
    ),
    (
        "a key is not in the index",
        lambda p: edit_json(p / "tensorkey.json", lambda k: k.update({"u": "t@id^0@1@1"})),
        "tensorkey.json: 'u': is named here but not in index",
    ),
    (
        "a key is not in tensorkey.json",
        lambda p: edit_json(p / "tensorkey.json", lambda k: k.pop("item.embedding/part_0_2")),
        "index: 'item.embedding/part_0_2': looks like a rank's part of a table",
    ),
    (
        "a shard's number is unknown",
        lambda p: edit_json(p / "index", lambda i: i["block_index"].update({"w^ ": 9})),
        "index: 'w^ ': points to shard number 9",
    ),
    (
        "a number twice",
        lambda p: edit_json(p / "index", lambda i: i["file_index"].update({"z.safetensors": 0})),
        "which is not its own: 'model-000000-of-000004.safetensors' has it",
    ),
    (
        "a file outside the folder",
        lambda p: edit_json(p / "index", lambda i: i["file_index"].update({"../a": 77})),
        "index: '../a' is not a plain file name",
    ),
    (
        "a tensor twice",
        lambda p: edit_json(p / "index", lambda i: i["block_index"].update({"w": 0})),
        "index: 'w': tensor 'w' stands here twice",
    ),
    (
        "a shard is missing",
        lambda p: shard_holding(p, "w^ ").unlink(),
        "the file is missing, but index names it",
    ),
    (
        "a shard is a folder",
        lambda p: replace_by_folder(shard_holding(p, "w^ ")),
        "is not a regular file",
    ),
    (
        "a shard is empty",
        lambda p: shard_holding(p, "w^ ").write_bytes(b""),
        "bytes [0, 8) are not there",
    ),
    (
        "a shard's header is absurd",
        lambda p: declare_header_length(shard_holding(p, "w^ "), 1 << 50),
        "this is not a safetensors file",
    ),
    (
        "a shard's header is no JSON",
        lambda p: flip(shard_holding(p, "w^ "), 9),
        "its header is not JSON",
    ),
    (
        "a shard is cut off",
        lambda p: truncate(shard_holding(p, "mask^ "), by=1),
        "are not there: the file ends at",
    ),
    (
        "offsets disagree",
        lambda p: edit_header(shard_holding(p, "w^ "), lambda h: h["w^ "]["shape"].append(2)),
        "'w^ ': data_offsets",
    ),
    (
        "an unknown dtype",
        lambda p: edit_header(shard_holding(p, "w^ "), lambda h: h["w^ "].update(dtype="f1")),
        "'w^ ': unknown dtype 'f1'",
    ),
    (
        "blocks overlap",
        lambda p: edit_header(
            shard_holding(p, "w^ "), lambda h: h["w^ "].update(data_offsets=[1, 241])
        ),
        "overlap those of",
    ),
    (
        "a block is not in its shard",
        lambda p: edit_header(shard_holding(p, "w^ "), lambda h: h.pop("w^ ")),
        "'w^ ': index says that it stands here",
    ),
    (
        "a block is not in the index",
        lambda p: edit_json(p / "index", lambda i: i["block_index"].pop("w^ ")),
        "'w^ ': stands in the shard, but index does not name it",
    ),
]


@pytest.mark.parametrize(("damage", "want"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
async def test_each_damage_is_found(
    tmp_path: Path, damage: Callable[[Path], object], want: str
) -> None:
    found = await verify(save(tmp_path / "all"))
    assert found.ok
    damage(tmp_path / "all")
    (tmp_path / "all" / "asyncloader.json").unlink()  # which would tell of all of these
    found = await verify(tmp_path / "all")
    assert any(want in problem for problem in problems(found)), problems(found)
    assert not found.ok


def rank(number: int, ids: list[int], **changed: Block) -> list[Block]:
    """Make the blocks that one of two ranks writes of a table `t`, some of them changed."""
    content = data(ids, slot=1)
    slots = {"id": content.ids, **content.slots}
    blocks = {
        slot: sparse_block("t", slot, tensor, rank=number, ranks=2)
        for slot, tensor in slots.items()
    }
    return list((blocks | changed).values())


FIRST, SECOND = [1, 2, 65536], [40000, 40001]
WHOLE = [rank(0, FIRST), rank(1, SECOND)]


def other(slot: str, tensor: torch.Tensor, begin: int = 32768, end: int = 65536) -> Block:
    claim = split_slices(65536, 1)[0]._replace(begin=begin, end=end)
    return sparse_block("t", slot, tensor, rank=1, ranks=2, claim=claim)


IDS = torch.tensor(SECOND)
UNSOUND: list[tuple[str, list[list[Block]], list[str]]] = [
    ("nothing", WHOLE, []),
    (
        "a slot has too few rows",
        [WHOLE[0], rank(1, SECOND, slot=other("slot", torch.ones(1, 1)))],
        ["'t.slot/part_1_2': t@slot has 1 rows, but there are 2 ids"],
    ),
    (
        "a part is of another dtype",
        [WHOLE[0], rank(1, SECOND, slot=other("slot", torch.ones(2, 1).double()))],
        ["'t.slot/part_1_2': is float64 [2, 1], but another part of 't@slot'"],
    ),
    (
        "a part is of another shape",
        [WHOLE[0], rank(1, SECOND, slot=other("slot", torch.ones(2, 2)))],
        ["'t.slot/part_1_2': is float32 [2, 2], but another part of 't@slot'"],
    ),
    (
        "a part is a scalar",
        [WHOLE[0], rank(1, SECOND, slot=other("slot", torch.tensor(1.0)))],
        ["'t.slot/part_1_2': is float32 [], but another part of 't@slot'"],
    ),
    (
        "a slot lacks a part",
        [WHOLE[0], WHOLE[1][:-1]],
        ["'t@slot': has no part for slice 32768@65536@65536"],
    ),
    (
        "a slot has a part of another slice",
        [WHOLE[0], rank(1, SECOND, slot=other("slot", torch.ones(2, 1), end=65535))],
        [
            "'t@slot': has a part for slice 32768@65535@65536",
            "'t@slot': has no part for slice 32768@65536@65536",
        ],
    ),
    (
        "there are no ids",
        [WHOLE[0][1:], WHOLE[1][1:]],
        ["'t': the table has no ids"],
    ),
    (
        "ids are no ids",
        [WHOLE[0], rank(1, SECOND, id=other("id", IDS.int()))],
        [
            "'t.id/part_1_2': is int32 [2], but another part",
            "'t.id/part_1_2': t@id is int32 [2]; ids are int64 [n]",
        ],
    ),
    (
        "a rank is missing",
        [WHOLE[0], [dense_block("w", torch.ones(1))]],
        ["'t': positions [32768, 65536) lie in no slice"],
    ),
    (
        "the first rank is missing",
        [[dense_block("w", torch.ones(1))], WHOLE[1]],
        ["'t': positions [0, 32768) lie in no slice"],
    ),
    (
        "slices overlap",
        [
            WHOLE[0],
            [other(slot, tensor, begin=32000) for slot, tensor in (
                ("id", IDS), ("embedding", torch.ones(2, 2)), ("slot", torch.ones(2, 1))
            )],
        ],
        ["'t': positions [32000, 32768) lie in several slices"],
    ),
    (
        "ids lie outside of their slice",
        [rank(0, [1, 40000, 2, 40001, -1]), WHOLE[1]],
        [
            "'t': 2 of 7 ids come twice or more, such as 40000",
            "'t.id/part_0_2': 3 of 5 ids do not lie in its slice 00000@32768@65536, such as 40000",
        ],
    ),
    (
        "an id comes twice",
        [rank(0, [1, 2, 1, 1]), WHOLE[1]],
        ["'t': 2 of 6 ids come twice or more, such as 1"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("blocks", "want"), [u[1:] for u in UNSOUND], ids=[u[0] for u in UNSOUND])
async def test_each_way_in_which_a_table_does_not_fit_together_is_found(
    tmp_path: Path, blocks: list[list[Block]], want: list[str]
) -> None:
    write_ranks(tmp_path, blocks)
    found = problems(await verify(tmp_path))
    assert len(found) == len(want), found
    for text in want:
        assert any(text in problem for problem in found), found


async def test_slices_of_different_sizes_are_found(tmp_path: Path) -> None:
    claim = split_slices(100, 2)[1]
    content = data([51])
    slots = {"id": content.ids, **content.slots}
    odd = [sparse_block("t", s, x, rank=1, ranks=2, claim=claim) for s, x in slots.items()]
    write_ranks(tmp_path, [[block for block in WHOLE[0] if "slot" not in block.key], odd])
    assert "its slices are of different sizes" in problems(await verify(tmp_path))[0]


async def test_two_parts_of_one_slice_are_found(tmp_path: Path) -> None:
    again = [other(slot, x, 0, 32768) for slot, x in (("id", IDS), ("embedding", torch.ones(2, 2)))]
    write_ranks(tmp_path, [[block for block in WHOLE[0] if "slot" not in block.key], again])
    found = problems(await verify(tmp_path))
    assert sum("claims slice 00000@32768@65536, as 't." in problem for problem in found) == 2


@pytest.mark.parametrize("limits", [LIMITS, ReadOptions(parallel=1, chunk_bytes=7,
                                                   max_inflight_bytes=100)])  # fmt: skip
async def test_bytes_of_bools_that_are_neither_0_nor_1_are_found(
    tmp_path: Path, limits: ReadOptions
) -> None:
    write_checkpoint(tmp_path, {}, {"mask": torch.zeros(21, dtype=torch.bool)})
    shard, offset, _ = block_at(tmp_path, "mask^ ")
    flip(shard, offset + 5, by=2)
    flip(shard, offset + 20, by=255)
    [found] = problems(await verify(tmp_path, limits))
    assert f"2 bytes of a bool tensor are neither 0 nor 1, the first at byte {offset + 5}" in found


async def test_bytes_that_nobody_reads_are_notes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"a": torch.ones(3), "b": torch.ones(3)}, writers=1)
    [shard] = tmp_path.glob("*.safetensors")
    append(shard, b"abc" * 4)
    (tmp_path / "model-000007-of-000008.safetensors").write_bytes(b"old")
    found = await verify(tmp_path)
    assert problems(found) == []
    assert [note.partition(",")[0] for note in notes(found)] == [
        NO_DIGESTS.partition(",")[0],
        f"{shard.name}: 12 bytes after the last block",
        "model-000007-of-000008.safetensors: index does not name this file",
    ]


async def test_bytes_between_blocks_are_a_problem_as_a_load_refuses_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"a": torch.ones(3), "b": torch.ones(3)}, writers=1)
    [shard] = tmp_path.glob("*.safetensors")
    append(shard, b"abc" * 4)
    edit_header(shard, lambda header: header["b^ "].update(data_offsets=[16, 28]))
    [found] = problems(await verify(tmp_path))
    assert found.startswith(f"{shard.name}: 'b^ ': begins at byte ")


async def test_bytes_after_the_last_block_of_a_plain_file_are_a_problem(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    append(tmp_path / "a.safetensors", b"abcd")
    [found] = problems(await verify(tmp_path / "a.safetensors"))
    assert found.startswith("a.safetensors: 4 bytes after its last block")


@pytest.mark.parametrize("file", ["index", "tensorkey.json", "asyncloader.json", "shard"])
async def test_a_key_that_stands_twice_is_found(tmp_path: Path, file: str) -> None:
    save(tmp_path, ranks=1, parallel=1)
    path = shard_holding(tmp_path, "w^ ") if file == "shard" else tmp_path / file
    text = path.read_bytes()
    start = text.index(b"{")
    end = text.index(b",", start)
    first = text[start + 1 : end + 1]
    if file == "shard":
        end = text.index(b"},", start)
        first = text[start + 1 : end + 2]
        length = (int.from_bytes(text[:8], "little") + len(first)).to_bytes(8, "little")
        text = length + text[8:]
    elif file == "index":
        first = b'"file_index":{},'
    path.write_bytes(text[: start + 1] + first + text[start + 1 :])
    found = problems(await verify(tmp_path))
    assert any(path.name in one and "twice in one object" in one for one in found), found


@pytest.mark.parametrize("key", ["w^ ", "item.id/part_0_2", "user.emb@embedding/part_0_2"])
async def test_one_flipped_bit_is_found(tmp_path: Path, key: str) -> None:
    path = save(tmp_path)
    shard, offset, length = block_at(path, key)
    flip(shard, offset + length - 1)
    found = await verify(path)
    [changed] = [p for p in found.problems if "are not those that were written" in p.text]
    assert (changed.file, changed.name) == (shard.name, key)
    assert f"bytes [{offset}, {offset + length})" in changed.text


async def test_of_a_long_block_the_damaged_ranges_are_named(tmp_path: Path) -> None:
    """A digest is of 8 MiB: a user may want to copy only what is damaged."""
    chunk = 8 << 20
    path = save(tmp_path, tables={}, tensors={"w": torch.zeros(5 * chunk + 5).byte()}, ranks=1)
    shard, offset, _ = block_at(path, "w^ ")
    for at in (0, 2 * chunk, 4 * chunk - 1, 5 * chunk + 1):
        flip(shard, offset + at)
    found = await verify(path)
    ranges = [(0, chunk), (2 * chunk, 4 * chunk), (5 * chunk, 5 * chunk + 5)]
    text = ", ".join(f"[{offset + begin}, {offset + end})" for begin, end in ranges)
    assert f"bytes {text} are not" in problems(found)[0]
    assert (found.digests, len(found.problems)) == (6, 1)


async def test_a_changed_header_is_found_though_all_in_it_is_possible(tmp_path: Path) -> None:
    path = save(tmp_path)
    edit_header(shard_holding(path, "w^ "), lambda h: h["w^ "].update(shape=[3, 20]))
    [found] = problems(await verify(path))
    assert "its header, are not those that were written" in found


def sidecar(change: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda path: edit_json(path / "asyncloader.json", change)


SIDECARS: list[Damage] = [
    ("no JSON", lambda p: truncate(p / "asyncloader.json", by=1), "asyncloader.json: is not JSON"),
    ("damaged", sidecar(lambda s: s.pop("parts")), "asyncloader.json: damaged"),
    (
        "another tensorkey.json",
        sidecar(lambda s: s["files"].update({"tensorkey.json": "0" * 32})),
        "tensorkey.json: is not what was written",
    ),
    (
        "another index",
        lambda p: append(p / "index", b" \n"),
        "index: is not what was written: asyncloader.json has",
    ),
    (
        "no digests of a shard",
        sidecar(lambda s: s["shards"].pop("model-000001-of-000004.safetensors")),
        "000001-of-000004.safetensors: index names it, but asyncloader.json has no digests of it",
    ),
    (
        "digests of no shard",
        sidecar(lambda s: s["shards"].update(x={"header": "0" * 32, "blocks": {}})),
        "has digests of 'x', which index does not name",
    ),
    (
        "no digests of a block",
        sidecar(lambda s: [one["blocks"].pop("w^ ", 0) for one in s["shards"].values()]),
        "'w^ ': asyncloader.json has 0 digests for its 240 bytes",
    ),
    (
        "digests of no block",
        sidecar(lambda s: [one["blocks"].update(x=[]) for one in s["shards"].values()]),
        "'x': has digests of this block, which",
    ),
    (
        "too few digests of a block",
        sidecar(lambda s: [one["blocks"].update({"w^ ": []}) for one in s["shards"].values()
                           if "w^ " in one["blocks"]]),
        "'w^ ': asyncloader.json has 0 digests for its 240 bytes",
    ),
    (
        "does not know a table",
        sidecar(lambda s: s["parts"].pop("item")),
        "'item': does not tell of its part 00000@32768@65536",
    ),
    (
        "knows another table",
        sidecar(lambda s: s["parts"].update(x=s["parts"]["item"])),
        "'x': tells of this table, which index does not name",
    ),
    (
        "knows another part",
        sidecar(lambda s: s["parts"]["item"][0].update(slice="0@1@65536")),
        "'item': tells of a part 00000@00001@65536",
    ),
    (
        "other rows",
        sidecar(lambda s: s["parts"]["item"].__setitem__(
            0, {"slice": "0@32768@65536", "rows": 256, "offsets": list(range(257))})),
        "has 250 ids of slice 00000@32768@65536, but asyncloader.json says 256",
    ),
    (
        "other offsets",
        sidecar(lambda s: s["parts"]["item"][0]["offsets"].__setitem__(1, 3)),
        "sub-slice 1 of 256 begins at row 64, but the sidecar says 3; offsets that are wrong: 1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "want"), [d[1:] for d in SIDECARS], ids=[d[0] for d in SIDECARS]
)
async def test_each_way_in_which_digests_do_not_fit_is_found(
    tmp_path: Path, damage: Callable[[Path], object], want: str
) -> None:
    path = save(tmp_path)
    damage(path)
    found = problems(await verify(path))
    assert any(want in problem for problem in found), found


async def test_rows_that_are_not_sorted_as_the_sidecar_says_are_found(tmp_path: Path) -> None:
    """With digests that are right: only what the file says of itself is wrong."""
    path = save(tmp_path, tables={"item": TABLES["item"]}, tensors={}, ranks=1, parallel=1)
    shard, offset, length = block_at(path, "item.id/part_0_1")
    content = bytearray(shard.read_bytes())
    content[offset : offset + 16] = content[offset + 8 : offset + 16] + content[offset : offset + 8]
    shard.write_bytes(content)
    block = bytes(content[offset : offset + length])
    from asyncloader._checkpoint.sidecar import digest_of  # noqa: PLC0415

    edit_json(
        path / "asyncloader.json",
        lambda s: s["shards"][shard.name]["blocks"].update(
            {"item.id/part_0_1": [digest_of(block)]}
        ),
    )
    [found] = problems(await verify(path))
    assert "its ids are not sorted by slice position" in found


async def test_digests_of_an_older_save_are_no_problem(tmp_path: Path) -> None:
    """RecIS saves over a checkpoint of ours, and leaves the file with our digests there."""
    path = save(tmp_path, ranks=1)
    write_checkpoint(path, TABLES, TENSORS)
    found = await verify(path)
    assert problems(found) == []
    assert any("belongs to another save than index" in note for note in notes(found))
    assert found.digests == 0


async def test_a_format_of_digests_that_is_not_known_is_no_problem(tmp_path: Path) -> None:
    path = save(tmp_path)
    edit_json(path / "asyncloader.json", lambda s: s.update(format=2))
    found = await verify(path)
    assert problems(found) == []
    assert any("is of a format that is not known here" in note for note in notes(found))


async def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    path = save(tmp_path, ranks=3)
    missing = shard_holding(path, "item.id/part_2_3")
    missing.unlink()
    header = shard_holding(path, "user.emb@id/part_1_3")
    declare_header_length(header, 5)
    shard, offset, _ = block_at(path, "w^ ")
    flip(shard, offset)
    edit_json(path / "tensorkey.json", lambda names: names.update(x="y"))
    found = problems(await verify(path))
    for want in (
        f"{missing.name}: the file is missing",
        f"{header.name}: its header is not JSON",
        f"{shard.name}: 'w^ ': bytes [{offset}",
        "tensorkey.json: 'x': is named here but not in index",
        "tensorkey.json: is not what was written",
    ):
        assert any(want in problem for problem in found), (want, found)
    assert len(found) == 5


async def test_all_bad_entries_of_one_file_are_listed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {f"w{n}": torch.ones(2) for n in range(9)}, writers=1)
    [shard] = tmp_path.glob("*.safetensors")

    def change(header: dict[str, dict[str, object]]) -> None:
        header["w0^ "]["dtype"] = "f1"
        header["w1^ "]["shape"] = [3]
        header["w2^ "]["data_offsets"] = [0, 8]
        header["w3^ "]["data_offsets"] = [0, 8]
        header["w8^ "]["data_offsets"] = [1000, 1008]

    edit_header(shard, change)
    edit_json(tmp_path / "index", lambda index: index["block_index"].update({"w4^ ": 7, "v": "x"}))
    found = problems(await verify(tmp_path))
    assert len(found) == 6, found
    for want in ("'w0^ ': unknown", "'w1^ ': data_off", "overlap those of 'w2^ '", "'w8^ ': bytes",
                 "'w4^ ': points to shard number 7", "'v': shard 'x' is not a number"):  # fmt: skip
        assert any(want in problem for problem in found), (want, found)


async def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    save_file(dict(TENSORS), tmp_path / "model.safetensors")
    found = await verify(tmp_path)
    assert (found.kind, found.tensors, problems(found)) == ("safetensors file", len(TENSORS), [])


async def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be listed: File name too long"):
        await verify(tmp_path / ("x" * 300))


async def verify_from(storage: MemoryStorage) -> Verification:
    async def entries() -> dict[str, int | None]:
        return {name: len(content) for name, content in storage.files.items()}

    async with Threads(reads=2) as threads:
        session = Session(
            location=storage.location,
            file=None,
            storage=UnpackingStorage(storage),
            threads=threads,
            disk=Disk(threads.reads),
            options=replace(LIMITS, verify="off"),
            budget=ByteBudget(LIMITS.max_inflight_bytes),
            entries=entries,
        )
        return await verify_session(session, Meter(0))


async def test_wherever_reading_fails_the_rest_is_looked_at(tmp_path: Path) -> None:
    """A disk with a bad sector: what is on the others, a user will want to know."""
    path = save(tmp_path, ranks=1)
    whole = MemoryStorage.of(path)
    whole.location = str(path)
    clean = await verify_from(whole)
    assert clean.ok
    with debug_off():
        for number in range(len(whole.reads)):
            storage = replace(whole, reads=[])
            storage.before_read = {number: OSError(5, "bad")}.get
            found = await verify_from(storage)
            assert any("bad" in problem for problem in problems(found)), problems(found)
            assert found.files >= clean.files - 1


def test_names_and_headers_are_looked_at_without_torch_and_numba() -> None:
    """Importing them takes longer than looking at names and headers does."""
    code = (
        "import sys, asyncloader._tools.structure; "
        "sys.exit(bool({'torch', 'numba'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    told: list[Progress] = []
    found = await averify(str(save(tmp_path)), options=LIMITS, progress=told.append)
    assert told[-1].bytes_done == told[-1].bytes_total == found.bytes_read


async def test_names_may_be_anything(tmp_path: Path) -> None:
    names = {"", "a@b^c", "x/part_0", 'q"\t', "日本"}
    tables = {name: TableData(ids=torch.tensor([1]), slots={"e": torch.ones(1, 1)})
              for name in names}  # fmt: skip
    write_checkpoint(tmp_path, tables, {f"w{name}": torch.ones(1) for name in names})
    assert problems(await verify(tmp_path)) == []


def test_the_command_lists_all_and_then_sums_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "a[red]\n")
    assert command(["verify", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "a[red]\\n" in out
    assert "no problems" in out
    shard_holding(path, "w^ ").unlink()
    (path / "model-000009-of-000009.safetensors").touch()
    assert command(["verify", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("problem  model-000000-of-000004.safetensors: the file is missing")
    assert lines[1].startswith("note     model-000009-of-000009.safetensors: index does not name")
    assert any("1 problem" in line for line in lines[2:])
    assert command(["verify", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_names_are_shown_for_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that a checkpoint holds must not be able to paint the terminal."""
    odd = "[bold]\x1b[31m:smile:\n"
    write_checkpoint(tmp_path, {}, {odd: torch.ones(1)})
    edit_json(tmp_path / "index", lambda index: index["block_index"].pop(f"{odd}^ "))
    assert command(["verify", str(tmp_path)]) == 1
    out, _ = capsys.readouterr()
    assert "[bold]\\x1b[31m:smile:\\n^ " in out
    assert "\x1b" not in out


def test_the_process_says_by_its_exit_code_whether_all_is_well(tmp_path: Path) -> None:
    code, out, err = run("verify", GENUINE / "small_4shards")
    assert (code, err) == (0, "")
    assert "14 blocks" in out
    path = save(tmp_path)
    flip(shard_holding(path, "w^ "), -1)
    code, out, err = run("verify", path, "--json")
    found = json.loads(out)
    assert (code, err, found["ok"], found["kind"]) == (1, "", False, "RecIS checkpoint")
    [problem] = found["problems"]
    assert (problem["severity"], problem["file"]) == ("problem", shard_holding(path, "w^ ").name)


def test_where_there_is_nothing_the_process_says_so_in_one_line(tmp_path: Path) -> None:
    code, out, err = run("verify", tmp_path / "absent", "--json")
    assert (code, json.loads(out)["error"]["type"], err.count("\n")) == (
        2,
        "CheckpointNotFoundError",
        1,
    )
    assert err.startswith(f"asyncloader: {tmp_path / 'absent'}")
