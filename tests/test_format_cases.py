"""FORMAT.md, section 6, line by line: where checkpoints are odd, and what we make of them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Literal

import pytest
import torch

from asyncloader import (
    CheckpointError,
    HashTable,
    Loader,
    PlanError,
    Slice,
    TruncatedShardError,
    UpdateCounts,
    gen_slice,
)
from tests.oracle import Slice as Claim
from tests.oracle import (
    append,
    declare_header_length,
    dense_block,
    edit_header,
    encode_id,
    rows_of,
    shard_header,
    shard_holding,
    shard_name,
    sparse_block,
    truncate,
    write_checkpoint,
    write_ranks,
)
from tests.support import (
    data,
    nothing_left_behind,
    poison,
    raw,
    rows_in,
    rows_on_disk,
    table_for,
    unchanged,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader._planning.targets import LoadInfo

IDS = [3, -1, 2**63 - 1, -(2**63), 70_000]
EMBEDDING = {"t": {"t": ["id", "embedding"]}}


def always(info: LoadInfo) -> Callable[[LoadInfo], LoadInfo]:
    return lambda _: info


# --- rename a table through filter_func


async def test_a_renamed_table_loads_the_ids_of_its_source(tmp_path: Path) -> None:
    content = data(IDS, exp_avg=2)
    write_checkpoint(tmp_path, {"old": content, "new": data([1, 2])}, {})
    table = table_for(content, name="new")

    info = {"new": {"old": ["id", "embedding", "exp_avg"]}}
    await Loader(tmp_path, {"new": table}, filter_func=always(info)).aload()

    assert rows_in(table) == rows_on_disk(content)


async def test_a_renamed_child_of_a_coalesced_table_keeps_its_own_place(tmp_path: Path) -> None:
    old, one = data([5, 6]), data([5, 7])
    write_checkpoint(tmp_path, {"old": old, "a": one}, {})
    table = table_for(old, children=["a", "b"])

    info = {"a": {"a": ["id", "embedding"]}, "b": {"old": ["id", "embedding"]}}
    await Loader(tmp_path, {"t": table}, filter_func=always(info)).aload()

    assert rows_in(table, "a") == rows_on_disk(one)
    assert rows_in(table, "b") == rows_on_disk(old)
    assert sorted(table.ids().tolist()) == sorted([5, 7, encode_id(5, 1), encode_id(6, 1)])


async def test_a_renamed_tensor_gets_the_values_of_its_source(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"old": torch.arange(4.0), "new": torch.ones(4)})
    new = torch.zeros(4)

    await Loader(tmp_path, tensors={"new": new}, filter_func=always({"new": {"old": []}})).aload()

    assert new.tolist() == [0, 1, 2, 3]


async def test_several_sources_may_feed_one_table_and_the_last_wins(tmp_path: Path) -> None:
    one, other = data([1, 2]), data([2, 3], width=2)
    other.slots["embedding"] += 500
    write_checkpoint(tmp_path, {"one": one, "other": other}, {})
    table = table_for(one)

    info = {"t": {"other": ["id", "embedding"], "one": ["id", "embedding"]}}
    report = await Loader(tmp_path, {"t": table}, filter_func=always(info)).aload()

    assert table.lookup(torch.tensor([1, 2, 3])).tolist() == [[1, 2], [3, 4], [503, 504]]
    assert report.tables["t"] == UpdateCounts(rows=4, new=3, replaced=0, duplicates=1, dropped=0)


# --- filter_func keeps a subset of the slots


@pytest.mark.parametrize(
    "listed",
    [["id"], ["id", "embedding"], ["id", "exp_avg"], ["exp_avg_sq", "id"], ["id", "id"]],
    ids="+".join,
)
async def test_only_listed_slots_are_loaded(tmp_path: Path, listed: list[str]) -> None:
    content = data(IDS, exp_avg=2, exp_avg_sq=1)
    write_checkpoint(tmp_path, {"t": content}, {})
    table = table_for(content)

    await Loader(tmp_path, {"t": table}, filter_func=always({"t": {"t": listed}})).aload()

    for slot, rows in content.slots.items():
        expected = rows if slot in listed else torch.zeros_like(rows)
        assert raw(table.lookup(content.ids, slot)) == raw(expected)


async def test_ids_must_be_listed(tmp_path: Path) -> None:
    content = data(IDS)
    write_checkpoint(tmp_path, {"t": content}, {})
    table = table_for(content)

    with unchanged(table), pytest.raises(PlanError, match=r"table 't' from 't'.* must list 'id'"):
        await Loader(
            tmp_path, {"t": table}, filter_func=always({"t": {"t": ["embedding"]}})
        ).aload()


# --- filter_func lists a slot that the destination lacks


async def test_a_listed_slot_that_the_destination_lacks_is_named(tmp_path: Path) -> None:
    content = data(IDS, exp_avg=2)
    write_checkpoint(tmp_path, {"t": content}, {})
    table = table_for(content, only=["embedding"])

    info = {"t": {"t": ["id", "embedding", "exp_avg", "nonsense"]}}
    with unchanged(table), pytest.raises(PlanError) as caught:
        await Loader(tmp_path, {"t": table}, filter_func=always(info)).aload()

    assert len(caught.value.problems) == 2
    assert all(slot in str(caught.value) for slot in ["'exp_avg'", "'nonsense'", "add_slot()"])


# --- a source slot or tensor is not in the checkpoint


async def test_a_missing_source_is_warned_of_and_reported_and_the_destination_keeps_its_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = data(IDS, exp_avg=2)
    write_checkpoint(tmp_path, {"t": data(IDS)}, {"here": torch.ones(2)})
    table, absent = table_for(content), HashTable([2], name="gone")
    table.insert(torch.tensor([3]), torch.full((1, 2), 7.0), "exp_avg")
    tensors = {"here": torch.zeros(2), "there": poison(torch.empty(3))}
    before = raw(tensors["there"])

    with caplog.at_level(logging.WARNING, "asyncloader"):
        report = await Loader(tmp_path, {"t": table, "gone": absent}, tensors).aload()

    assert set(report.missing) == {"t@exp_avg", "gone", "there"}
    assert raw(tensors["there"]) == before
    assert table.lookup(torch.tensor([3, -1]), "exp_avg").tolist() == [[7, 7], [0, 0]]
    assert len(absent) == 0
    assert report.tensors == {"here": "loaded", "there": "missing"}
    [message] = [one.getMessage() for one in caplog.records if one.name.startswith("asyncloader")]
    assert all(name in message for name in ["t@exp_avg", "gone", "there", str(tmp_path)])


async def test_a_missing_source_is_an_error_before_anything_is_written_if_strict(
    tmp_path: Path,
) -> None:
    content = data(IDS, exp_avg=2)
    write_checkpoint(tmp_path, {"t": data(IDS)}, {"here": torch.ones(2)})
    table, absent = table_for(content), HashTable([2], name="gone")
    tensors = {"here": poison(torch.empty(2)), "there": poison(torch.empty(3))}

    with unchanged(table, absent, tensors=tensors), pytest.raises(PlanError) as caught:
        await Loader(tmp_path, {"t": table, "gone": absent}, tensors, strict=True).aload()

    assert len(caught.value.problems) == 3
    assert all(name in str(caught.value) for name in ["'t@exp_avg'", "'gone'", "'there'"])


async def test_a_source_named_in_load_info_that_is_missing_is_reported_by_its_own_name(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(2)})
    loader = Loader(tmp_path, tensors={"w": torch.zeros(2)}, filter_func=always({"w": {"v": []}}))

    assert (await loader.aload()).missing == ("v",)


# --- load_info names a destination that does not exist


async def test_an_unknown_destination_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data(IDS)}, {"w": torch.ones(2)})
    tensors = {"w": poison(torch.empty(2))}

    info: LoadInfo = {"w": {"w": []}, "v": {"w": []}, "t": {"t": ["id"]}}
    with unchanged(tensors=tensors), pytest.raises(PlanError) as caught:
        await Loader(tmp_path, tensors=tensors, filter_func=always(info)).aload()

    assert [
        repr(name) in problem for name, problem in zip("vt", caught.value.problems, strict=True)
    ]


# --- table's slice size differs from the checkpoint's


@pytest.mark.parametrize(
    "mine",
    [gen_slice(1, 3, 1000), gen_slice(0, 1, 7), Slice(5, 6, 65536), Slice(4, 4, 9)],
    ids=str,
)
async def test_another_slice_size_loads_every_id_that_the_table_accepts(
    tmp_path: Path, mine: Slice
) -> None:
    content = data([*range(-50, 50), 2**63 - 1, -(2**63)], exp_avg=1)
    write_checkpoint(tmp_path, {"t": content}, {}, ranks=3, slice_size=64)
    table = table_for(content, slice=mine)

    await Loader(tmp_path, {"t": table}).aload()

    assert rows_in(table) == rows_on_disk(content, keep=mine.accepts)


# --- dtype or shape differs


async def test_every_mismatch_is_listed_in_one_error_before_anything_is_written(
    tmp_path: Path,
) -> None:
    write_checkpoint(
        tmp_path,
        {"t": data(IDS, exp_avg=2), "u": data(IDS)},
        {"shape": torch.ones(2, 3), "dtype": torch.ones(2), "good": torch.ones(2)},
    )
    table, other = HashTable([3], name="t"), HashTable([2], dtype=torch.float64, name="u")
    table.add_slot("exp_avg", [1])
    good = HashTable([2], name="good table")
    for held in table, other, good:
        held.insert(torch.tensor([3]), torch.ones_like(held.lookup(torch.tensor([3]))))
    tensors = {
        "shape": poison(torch.empty(3, 2)),
        "dtype": poison(torch.empty(2, dtype=torch.int32)),
        "good": poison(torch.empty(2)),
    }

    with unchanged(table, other, good, tensors=tensors), pytest.raises(PlanError) as caught:
        await Loader(tmp_path, {"t": table, "u": other, "good table": good}, tensors).aload()

    expected = [
        ("'shape'", "float32 [3, 2]", "float32 [2, 3]"),
        ("'dtype'", "int32 [2]", "float32 [2]"),
        ("'t'", "'embedding'", "float32 [3]", "float32 [2]"),
        ("'t'", "'exp_avg'", "float32 [1]", "float32 [2]"),
        ("'u'", "'embedding'", "float64 [2]", "float32 [2]"),
    ]
    assert len(caught.value.problems) == len(expected)
    for problem, facts in zip(caught.value.problems, expected, strict=True):
        assert [fact for fact in facts if fact not in problem] == []
    assert "nothing was loaded" in str(caught.value)


async def test_ids_of_another_dtype_are_a_mismatch(tmp_path: Path) -> None:
    blocks = [
        sparse_block("t", "id", torch.arange(3, dtype=torch.int32)),
        sparse_block("t", "embedding", torch.ones(3, 2)),
    ]
    write_ranks(tmp_path, [blocks])
    table = HashTable([2], name="t")

    with unchanged(table), pytest.raises(PlanError, match=r"t@id is int32 \[3\]"):
        await Loader(tmp_path, {"t": table}).aload()


# --- a shard file is missing that this table's slice does not need


async def test_a_shard_that_the_slice_does_not_need_may_be_missing(tmp_path: Path) -> None:
    content = data(list(range(-50, 50)))
    write_checkpoint(tmp_path, {"t": content}, {}, ranks=2, writers=2)
    for number in 2, 3:
        (tmp_path / shard_name(number, 4)).unlink()
    mine = gen_slice(0, 2)
    table = table_for(content, slice=mine)

    report = await Loader(tmp_path, {"t": table}, strict=True).aload()

    assert rows_in(table) == rows_on_disk(content, keep=mine.accepts)
    assert (report.missing, report.warnings) == ((), ())


async def test_a_shard_that_load_info_does_not_need_may_be_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"a": torch.ones(2), "b": torch.ones(2)}, writers=2)
    shard_holding(tmp_path, "b^ ").unlink()
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}

    report = await Loader(tmp_path, tensors=tensors, filter_func=always({"a": {"a": []}})).aload()

    assert [tensor.tolist() for tensor in tensors.values()] == [[1, 1], [0, 0]]
    assert report.tensors == {"a": "loaded", "b": "not asked for"}


async def test_ids_of_a_rank_that_never_wrote_are_reported_as_missing(tmp_path: Path) -> None:
    first, _ = gen_slice(0, 2), gen_slice(1, 2)
    claim = Claim(first.begin, first.end, first.size)
    blocks = [
        sparse_block("t", slot, rows, rank=0, ranks=2, claim=claim)
        for slot, rows in [("id", torch.arange(3)), ("embedding", torch.ones(3, 2))]
    ]
    write_ranks(tmp_path, [blocks])
    table = HashTable([2], name="t")

    report = await Loader(tmp_path, {"t": table}).aload()

    assert report.missing == ("t@id[32768, 65536) of 65536",)
    assert sorted(table.ids().tolist()) == [0, 1, 2]


# --- more bytes after the last block


async def test_bytes_after_the_last_block_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(2)}, writers=1)
    [shard] = tmp_path.glob("*.safetensors")
    append(shard, b"\1\2\3")
    wanted = torch.zeros(2)

    report = await Loader(tmp_path, tensors={"w": wanted}).aload()

    assert wanted.tolist() == [1, 1]
    [warning] = report.warnings
    assert warning.startswith(f"{shard.name}: 3 bytes after the last block")
    assert warning in caplog.text


# --- offsets overlap or disagree with shape and dtype


@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ([0, 8], "overlap"),
        ([4, 12], "overlap"),
        ([8, 12], "4 bytes"),
        ([8, 20], "12 bytes"),
        ([16, 8], r"\[begin, end\]"),
        ([-8, 0], r"\[begin, end\]"),
        ([16, 24], "there: the file ends"),
        ([2**62, 2**62 + 8], "there: the file ends"),
        ([2**64, 2**64 + 8], r"\[begin, end\]"),
        ([8.0, 16.0], r"\[begin, end\]"),
        ([8], r"\[begin, end\]"),
        ([8, 16, 24], r"\[begin, end\]"),
        ("8,16", r"\[begin, end\]"),
        (None, r"\[begin, end\]"),
    ],
    ids=str,
)
async def test_lying_offsets_are_an_error_that_names_shard_key_and_offsets(
    tmp_path: Path, offsets: object, says: str
) -> None:
    stored = {"a": torch.ones(2), "b": torch.ones(2)}
    write_checkpoint(tmp_path, {}, stored, writers=1)
    [shard] = tmp_path.glob("*.safetensors")
    edit_header(shard, lambda header: header["b^ "].update(data_offsets=offsets))
    tensors = {name: poison(torch.empty(2)) for name in stored}

    with unchanged(tensors=tensors), pytest.raises(CheckpointError, match=says) as caught:
        await Loader(tmp_path, tensors=tensors).aload()

    assert (caught.value.shard, caught.value.key) == (shard.name, "b^ ")
    assert shard.name in str(caught.value)
    assert repr("b^ ") in str(caught.value)


@pytest.mark.parametrize(
    "shape", [[3], [], [2, 2], [2**62, 2], [2**63 - 1] * 400], ids=lambda s: str(s)[:40]
)
async def test_a_shape_that_disagrees_with_the_offsets_is_an_error(
    tmp_path: Path, shape: list[int]
) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(2)}, writers=1)
    [shard] = tmp_path.glob("*.safetensors")
    edit_header(shard, lambda header: header["w^ "].update(shape=shape))

    with unchanged(), pytest.raises(CheckpointError, match=r"\[0, 8\]") as caught:
        await Loader(tmp_path, tensors={"w": torch.zeros(2)}).aload()

    assert (caught.value.shard, caught.value.key) == (shard.name, "w^ ")


# --- ids block truncated


async def test_truncated_ids_are_an_error_that_names_shard_key_and_range(tmp_path: Path) -> None:
    content = data(IDS)
    write_checkpoint(tmp_path, {"t": content}, {}, writers=2)
    shard = shard_holding(tmp_path, "t.id/part_0_1")
    truncate(shard, by=1)
    table = table_for(content)

    with unchanged(table), pytest.raises(TruncatedShardError) as caught:
        await Loader(tmp_path, {"t": table}).aload()

    error, size = caught.value, shard.stat().st_size
    assert (error.shard, error.key) == (shard.name, "t.id/part_0_1")
    assert (error.begin, error.end, error.size) == (size + 1 - 8 * len(IDS), size + 1, size)
    assert f"[{error.begin}, {error.end})" in str(error)


# --- header length absurd


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 2**31, 2**40, 2**63 - 1, 2**64 - 1], ids=hex)
@pytest.mark.parametrize("sparse", [False, True], ids=["as it is", "a sparse file of a tebibyte"])
async def test_an_absurd_header_length_is_an_error(
    tmp_path: Path, length: int, *, sparse: bool
) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(2)}, writers=1)
    [shard] = tmp_path.glob("*.safetensors")
    declare_header_length(shard, length)
    if sparse:
        os.truncate(shard, 1 << 40)
    tensors = {"w": poison(torch.empty(2))}

    with unchanged(tensors=tensors), pytest.raises(CheckpointError) as caught:
        await Loader(tmp_path, tensors=tensors).aload()

    assert caught.value.shard == shard.name


# --- id and a slot disagree on the number of rows


@pytest.mark.parametrize("rows", [0, 2, 4])
async def test_another_number_of_rows_than_ids_is_an_error(tmp_path: Path, rows: int) -> None:
    blocks = [
        sparse_block("t", "id", torch.arange(3)),
        sparse_block("t", "embedding", torch.ones(3, 2)),
        sparse_block("t", "exp_avg", torch.ones(rows, 2)),
    ]
    write_ranks(tmp_path, [[*blocks, dense_block("w", torch.ones(2))]])
    table = HashTable([2], name="t")
    table.add_slot("exp_avg", [2])
    tensors = {"w": poison(torch.empty(2))}

    says = rf"t@exp_avg has {rows} rows, but there are 3 ids"
    with unchanged(table, tensors=tensors), pytest.raises(PlanError, match=says):
        await Loader(tmp_path, {"t": table}, tensors).aload()


@pytest.mark.parametrize("slot", ["id", "embedding"])
async def test_two_blocks_that_claim_one_slice_of_one_slot_are_an_error(
    tmp_path: Path, slot: str
) -> None:
    whole = Claim(0, 65536, 65536)
    blocks = [
        sparse_block("t", "id", torch.arange(3)),
        sparse_block("t", "embedding", torch.ones(3, 2)),
        sparse_block("t", slot, torch.zeros((3, 2) if slot != "id" else 3).to(
            torch.int64 if slot == "id" else torch.float32
        ), rank=1, ranks=2, claim=whole),
    ]  # fmt: skip
    write_ranks(tmp_path, [blocks])
    table = HashTable([2], name="t")

    with (
        unchanged(table),
        pytest.raises(PlanError, match=rf"t@{slot}: claims slice .*, as 't\.{slot}/part_0_1'"),
    ):
        await Loader(tmp_path, {"t": table}).aload()


async def test_ids_without_the_rows_of_their_slice_are_an_error(tmp_path: Path) -> None:
    blocks = [
        [
            sparse_block("t", slot, rows, rank=rank, ranks=2)
            for slot, rows in [("id", torch.tensor([rank])), ("embedding", torch.ones(1, 2))]
            if (rank, slot) != (1, "embedding")
        ]
        for rank in range(2)
    ]
    write_ranks(tmp_path, blocks)
    table = HashTable([2], name="t")

    says = "'t@embedding': has no part for slice 32768@65536@65536, of which there are ids"
    with unchanged(table), pytest.raises(PlanError, match=says):
        await Loader(tmp_path, {"t": table}).aload()


async def test_rows_without_ids_are_an_error(tmp_path: Path) -> None:
    write_ranks(tmp_path, [[sparse_block("t", "embedding", torch.ones(1, 2))]])
    table = HashTable([2], name="t")

    with unchanged(table), pytest.raises(PlanError, match="has table 't' but not its ids"):
        await Loader(tmp_path, {"t": table}).aload()


# --- the same id twice in one checkpoint


async def test_of_an_id_that_comes_twice_the_later_row_wins(tmp_path: Path) -> None:
    content = data([7, 8, 7, -1, 7])
    write_checkpoint(tmp_path, {"t": content}, {})
    table = table_for(content)

    report = await Loader(tmp_path, {"t": table}).aload()

    assert table.lookup(torch.tensor([7, 8, -1])).tolist() == [[9, 10], [3, 4], [7, 8]]
    assert report.tables["t"] == UpdateCounts(rows=5, new=3, replaced=0, duplicates=2, dropped=0)


# --- destination tensor not contiguous


async def test_a_tensor_that_is_not_contiguous_gets_the_right_values(tmp_path: Path) -> None:
    stored = torch.arange(12.0).view(3, 4)
    write_checkpoint(tmp_path, {}, {"w": stored})
    wanted = torch.zeros(4, 3).T

    report = await Loader(tmp_path, tensors={"w": wanted}).aload()

    assert raw(wanted) == raw(stored)
    assert report.tensors == {"w": "copied"}


# --- load after clear()


async def test_a_table_can_be_loaded_again_after_clear(tmp_path: Path) -> None:
    content = data(IDS)
    write_checkpoint(tmp_path, {"t": content}, {})
    table = table_for(content)
    loader = Loader(tmp_path, {"t": table})

    await loader.aload()
    table.clear()
    report = await loader.aload()

    assert rows_in(table) == rows_on_disk(content)
    assert report.tables["t"].new == len(IDS)


# --- parallel=0


@pytest.mark.parametrize("name", ["parallel", "chunk_bytes", "max_inflight_bytes"])
@pytest.mark.parametrize(
    ("value", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_number_that_makes_no_sense_is_refused_at_construction(
    name: str, value: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=name):
        Loader("anywhere", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_that_makes_no_sense_is_refused_at_construction(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        Loader("anywhere", timeout=timeout)


# --- table already holds ids


async def test_rows_of_ids_in_the_checkpoint_are_replaced_and_the_others_kept(
    tmp_path: Path,
) -> None:
    content = data([1, 2, 3], exp_avg=2)
    write_checkpoint(tmp_path, {"t": data([1, 2, 3])}, {})
    table = table_for(content)
    for slot, value in ("embedding", -7.0), ("exp_avg", -8.0):
        table.insert(torch.tensor([3, 4]), torch.full((2, 2), value), slot)

    info = {"t": {"t": ["id", "embedding"]}}
    report = await Loader(tmp_path, {"t": table}, filter_func=always(info)).aload()

    asked = torch.tensor([1, 2, 3, 4])
    assert table.lookup(asked).tolist() == [[1, 2], [3, 4], [5, 6], [-7, -7]]
    assert table.lookup(asked, "exp_avg").tolist() == [[0, 0], [0, 0], [-8, -8], [-8, -8]]
    assert report.tables["t"] == UpdateCounts(rows=3, new=2, replaced=1, duplicates=0, dropped=0)


# --- bool tensors


@pytest.mark.parametrize("spelling", ["BOOL", "bool"])
async def test_bool_is_read_in_both_spellings(
    tmp_path: Path, spelling: Literal["BOOL", "bool"]
) -> None:
    stored = torch.tensor([True, False, True])
    content = data([1, 2, 3])
    content.slots["flag"] = stored.view(3, 1)
    write_checkpoint(tmp_path, {"t": content}, {"w": stored}, writers=1, bool_spelling=spelling)
    [shard] = tmp_path.glob("*.safetensors")
    assert shard_header(shard)["w^ "]["dtype"] == spelling
    table, wanted = table_for(content), torch.zeros(3, dtype=torch.bool)

    await Loader(tmp_path, {"t": table}, {"w": wanted}).aload()

    assert wanted.tolist() == [True, False, True]
    assert rows_in(table) == rows_on_disk(content)


# --- ids no rank accepts, or outside the slice their block claims


@pytest.mark.parametrize("mine", [gen_slice(), Slice(0, 40000, 65536), Slice(0, 90, 100)], ids=str)
async def test_ids_outside_the_slice_that_their_block_claims_are_dropped_and_counted(
    tmp_path: Path, mine: Slice
) -> None:
    content = data([5, 40_000, 70_000, -1])  # the second and the last lie in the upper half
    blocks = [
        sparse_block("t", slot, rows, claim=Claim(0, 32768, 65536))
        for slot, rows in [("id", content.ids), *content.slots.items()]
    ]
    write_ranks(tmp_path, [blocks])
    table = table_for(content, slice=mine)

    report = await Loader(tmp_path, {"t": table}).aload()

    assert rows_in(table) == rows_on_disk(content, keep=lambda id_: id_ in {5, 70_000})
    counts = UpdateCounts(rows=2, new=2, replaced=0, duplicates=0, dropped=2)
    assert report.tables["t"] == counts


# --- a slot's rows of rank 2 or 3


@pytest.mark.parametrize("shape", [(3, 2), (2, 1, 3), ()], ids=str)
async def test_rows_of_any_rank_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    content = data(IDS)
    content.slots["embedding"] = torch.randn(len(IDS), *shape)
    write_checkpoint(tmp_path, {"t": content}, {}, ranks=2)
    table = table_for(content)

    await Loader(tmp_path, {"t": table}).aload()

    assert rows_in(table) == rows_on_disk(content)


async def test_too_few_bytes_for_rows_of_rank_2_are_an_error_that_says_so(tmp_path: Path) -> None:
    content = data(IDS)
    content.slots["embedding"] = torch.ones(len(IDS), 3, 2)
    write_checkpoint(tmp_path, {"t": content}, {}, writers=2)
    key = "t.embedding/part_0_1"
    shard = shard_holding(tmp_path, key)
    edit_header(shard, lambda header: header[key].update(data_offsets=[0, len(IDS) * 3 * 4]))
    table = table_for(content)

    with unchanged(table), pytest.raises(CheckpointError, match="rank 2 or 3") as caught:
        await Loader(tmp_path, {"t": table}).aload()

    assert (caught.value.shard, caught.value.key) == (shard.name, key)


# --- a name that is a prefix of another


async def test_a_name_that_is_a_prefix_of_another_finds_its_own(tmp_path: Path) -> None:
    ones = {name: data(ids) for name, ids in {"layer": [1], "layer1": [2], "layer10": [3]}.items()}
    stored = {"w": torch.ones(1), "w1": torch.ones(1) * 2, "w1/part_0": torch.ones(1) * 3}
    write_checkpoint(tmp_path, ones, stored, ranks=2)
    tables = {name: table_for(content, name=name) for name, content in ones.items()}
    tensors = {name: torch.zeros(1) for name in stored}

    await Loader(tmp_path, tables, tensors, strict=True).aload()

    assert [table.ids().tolist() for table in tables.values()] == [[1], [2], [3]]
    assert [tensor.item() for tensor in tensors.values()] == [1, 2, 3]


async def test_a_slot_that_is_a_prefix_of_another_finds_its_own(tmp_path: Path) -> None:
    content = data(IDS, exp_avg=2, exp_avg_sq=2, exp=2)
    write_checkpoint(tmp_path, {"t": content}, {})
    table = table_for(content)

    await Loader(tmp_path, {"t": table}).aload()

    assert rows_of(table.ids(), {slot: table.rows(slot) for slot in content.slots}) == (
        rows_on_disk(content)
    )


# --- fewer blocks than writers


async def test_writers_without_a_block_are_not_missed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data(IDS)}, {"w": torch.ones(2)}, ranks=2, writers=16)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    table, wanted = HashTable([2], name="t"), torch.zeros(2)

    with nothing_left_behind(table):
        await Loader(tmp_path, {"t": table}, {"w": wanted}, strict=True).aload()

    assert rows_in(table) == rows_on_disk(data(IDS))
    assert wanted.tolist() == [1, 1]
