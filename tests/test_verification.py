"""What is read is compared with the digests that were written along, and the report is honest."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch

from asyncloader import (
    AsyncLoaderError,
    CheckpointChangedError,
    CheckpointError,
    CheckpointReader,
    HashTable,
    Loader,
    ReadError,
    Saver,
    gen_slice,
    load_tensors,
)
from asyncloader._checkpoint.sidecar import parse_sidecar
from asyncloader._storage.local import LocalStorage
from asyncloader._threads.disk import Disk
from asyncloader._threads.pool import Threads
from tests.oracle import TableData, edit_json, shard_header, write_checkpoint
from tests.support import Run, data, rows_in, rows_on_disk, table_for, unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from asyncloader._storage.protocol import ReadInto

T = TypeVar("T")
CONTENT = data(list(range(500)), width=4, exp_avg=4)
CHUNK = 8 << 20


def save(path: Path, *, ranks: int = 1) -> Path:
    for rank in reversed(range(ranks)):
        part = gen_slice(rank, ranks)
        table = table_for(CONTENT, slice=part)
        mine = [row for row, id_ in enumerate(CONTENT.ids.tolist()) if part.accepts(id_)]
        for slot, rows in CONTENT.slots.items():
            table.insert(CONTENT.ids[mine], rows[mine], slot)
        Saver(rank, ranks, 2, path, {"t": table}, {"w": torch.arange(100.0)}, save_id=1).save()
    return path


def flip(path: Path, key: str, at: int) -> tuple[str, int]:
    """Flip a bit of a block; return its shard and where in the file it is."""
    index = json.loads((path / "index").read_bytes())
    number = index["block_index"][key]
    shard = next(name for name, n in index["file_index"].items() if n == number)
    raw = bytearray((path / shard).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    offset = start + shard_header(path / shard)[key]["data_offsets"][0] + at
    raw[offset] ^= 1
    (path / shard).write_bytes(raw)
    return shard, offset


def everything(path: Path, **how: Any) -> tuple[Loader, HashTable, dict[str, torch.Tensor]]:  # noqa: ANN401
    table, tensors = table_for(CONTENT), {"w": torch.zeros(100)}
    return Loader(path, {"t": table}, tensors, **how), table, tensors


@pytest.mark.parametrize("verify", ["auto", "require"])
@pytest.mark.parametrize("chunk_bytes", [100, 16 << 20])
def test_all_of_a_whole_load_is_verified(tmp_path: Path, verify: str, chunk_bytes: int) -> None:
    loader, table, tensors = everything(save(tmp_path), verify=verify, chunk_bytes=chunk_bytes)
    report = loader.load()
    assert report.bytes_verified == report.bytes_wanted == 500 * (8 + 16 + 16) + 400
    assert "all verified" in str(report)
    assert rows_in(table) == rows_on_disk(CONTENT)
    assert torch.equal(tensors["w"], torch.arange(100.0))


def test_with_off_nothing_is_verified_and_the_report_says_so(tmp_path: Path) -> None:
    flip(save(tmp_path), "w^ ", 3)
    loader, _, tensors = everything(tmp_path, verify="off")
    report = loader.load()
    assert (report.bytes_verified, report.verified) == (0, "not verified")
    assert not torch.equal(tensors["w"], torch.arange(100.0))


@pytest.mark.parametrize("verify", ["auto", "require"])
@pytest.mark.parametrize(
    ("key", "at"),
    [("t.id/part_0_1", 9), ("t.embedding/part_0_1", 0), ("t.exp_avg/part_0_1", 7999), ("w^ ", 5)],
)
async def test_a_flipped_bit_is_an_error_that_says_where_and_no_table_changes(
    tmp_path: Path, verify: str, key: str, at: int
) -> None:
    shard, _ = flip(save(tmp_path), key, at)
    loader, table, tensors = everything(tmp_path, verify=verify)
    begin = 8 + int.from_bytes((tmp_path / shard).read_bytes()[:8], "little")
    begin += shard_header(tmp_path / shard)[key]["data_offsets"][0]
    with (
        unchanged(table),
        pytest.raises(CheckpointError, match="not those that were written") as caught,
    ):
        await loader.aload()
    assert (caught.value.shard, caught.value.key) == (shard, key)
    assert f"bytes [{begin}, " in caught.value.problem
    assert set(caught.value.touched) <= set(tensors)


def test_a_checkpoint_without_digests_loads_unless_they_are_required(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": CONTENT}, {"w": torch.arange(100.0)})
    report = everything(tmp_path)[0].load()
    assert (report.bytes_verified, "verified" in str(report)) == (0, False)
    loader, table, tensors = everything(tmp_path, verify="require")
    with (
        unchanged(table, tensors=tensors),
        pytest.raises(CheckpointError, match=r"no digests.*asyncloader.Saver"),
    ):
        loader.load()


def test_a_sidecar_that_a_later_save_of_another_program_has_left_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RecIS writes the same names and other values, and leaves our sidecar where it is."""
    save(tmp_path)
    newer = data([id_ + 1 for id_ in range(500)], width=4, exp_avg=4)
    write_checkpoint(tmp_path, {"t": newer}, {"w": torch.ones(100)}, writers=2)
    loader, table, _ = everything(tmp_path)
    report = loader.load()
    assert rows_in(table) == rows_on_disk(newer)
    assert report.bytes_verified == 0
    assert "belongs to another save" in report.warnings[0]
    assert "belongs to another save" in caplog.text
    with pytest.raises(CheckpointError, match="no digests that belong to it"):
        everything(tmp_path, verify="require")[0].load()


def test_a_sidecar_of_a_later_format_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    edit_json(save(tmp_path) / "asyncloader.json", lambda it: it.update(format=2))
    report = everything(tmp_path)[0].load()
    assert (report.bytes_verified, len(report.warnings)) == (0, 1)
    assert "format that is not known" in report.warnings[0]


@pytest.mark.parametrize(
    "change", [{"digest": "xxh3-129"}, {"chunk_bytes": 4}, {"digest": None}, {"chunk_bytes": True}]
)
def test_a_sidecar_whose_digests_are_others_than_its_format_has_is_damaged(
    tmp_path: Path, change: dict[str, object]
) -> None:
    """One bit there would otherwise be enough for nothing to be verified any more."""
    edit_json(save(tmp_path) / "asyncloader.json", lambda it: it.update(change))
    with pytest.raises(CheckpointError, match="damaged: its digests are") as caught:
        everything(tmp_path)[0].load()
    assert caught.value.shard == "asyncloader.json"


def drop(*path: str) -> Callable[[Any], object]:
    def change(value: Any) -> None:  # noqa: ANN401  # JSON
        for part in path[:-1]:
            value = value[part]
        del value[path[-1]]

    return change


SHARD = "model-000000-of-000002.safetensors"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda it: it.pop("files"), "damaged"),
        (lambda it: it.update(files=[]), "damaged.*not an object"),
        (lambda it: it["shards"][SHARD].update(header=5), "damaged.*not a digest"),
        (lambda it: it["shards"][SHARD].update(header="0" * 32), "its header, are not those"),
        (lambda it: it["shards"][SHARD].update(blocks={}), "0 digests for its"),
        (lambda it: it["shards"][SHARD]["blocks"].update(x=3), "damaged: 3 is not a list"),
        (lambda it: it["files"].update({"tensorkey.json": "0" * 32}), "not what was written"),
        (lambda it: it.update(format="1"), "lacks the number of its format"),
        (drop("shards", SHARD), "has no digests of it"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verify", ["auto", "require"])
def test_a_sidecar_that_contradicts_itself_or_the_checkpoint_is_an_error(
    tmp_path: Path, verify: str, change: Callable[[Any], object], match: str
) -> None:
    edit_json(save(tmp_path) / "asyncloader.json", change)
    loader, table, tensors = everything(tmp_path, verify=verify)
    with unchanged(table, tensors=tensors), pytest.raises(CheckpointError, match=match):
        loader.load()
    everything(tmp_path, verify="off")[0].load()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda it: it["parts"]["t"][0].update(offsets=[0, 500]), "sub-slices"),
        (lambda it: it["parts"]["t"][0].update(slice=3), "not a part"),
        (lambda it: it["parts"]["t"][0].update(slice="1@0@9"), "slice needs"),
        (lambda it: it.update(parts={"t": 1}), "1 is not a list"),
    ],
)
def test_where_sub_slices_begin_is_checked_when_somebody_asks_for_it(
    tmp_path: Path, change: Callable[[Any], object], match: str
) -> None:
    """No load of all rows does, and there may be many of them."""
    sidecar = save(tmp_path) / "asyncloader.json"
    edit_json(sidecar, change)
    everything(tmp_path, verify="require")[0].load()
    read = parse_sidecar("here", sidecar.read_bytes())
    assert read is not None
    with pytest.raises(CheckpointError, match=match):
        read.all_spread("here")


@pytest.mark.parametrize(
    ("name", "match"),
    [("index", "index: is not what was written"), ("tensorkey.json", "is not what was written")],
)
def test_a_flipped_bit_in_a_file_of_names_is_found(tmp_path: Path, name: str, match: str) -> None:
    """In `index` too: it is not taken for another program's, which would end without a newline."""
    text = (save(tmp_path) / name).read_bytes()
    (tmp_path / name).write_bytes(text.replace(b"exp_avg", b"exp_avh"))
    with pytest.raises(CheckpointError, match=match):
        everything(tmp_path)[0].load()


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"{}", b"\0\0"])
def test_a_sidecar_that_is_no_json_object_is_an_error(tmp_path: Path, text: bytes) -> None:
    (save(tmp_path) / "asyncloader.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"asyncloader\.json"):
        everything(tmp_path)[0].load()


def test_verify_is_one_of_three_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'auto', 'require', 'off'"):
        Loader(tmp_path, verify="on")  # type: ignore[arg-type]


def test_readers_verify_too(tmp_path: Path) -> None:
    flip(save(tmp_path), "w^ ", 3)
    with pytest.raises(CheckpointError, match="not those that were written"):
        load_tensors(tmp_path, ["w"])
    with pytest.raises(CheckpointError, match="not those that were written"):
        CheckpointReader(tmp_path).read_tensor("w")
    assert len(load_tensors(tmp_path, ["w"], verify="off")["w"]) == 100
    assert CheckpointReader(tmp_path, verify="require").read_tensor("t@id").tolist() == list(
        range(500)
    )


def big(path: Path) -> tuple[torch.Tensor, Path]:
    """Save a table whose slot takes four chunks and a bit; return its ids in the file's order."""
    count = 4 * CHUNK // 64 + 1000
    table = HashTable([16], name="t", block_size=1 << 16)
    ids = torch.arange(count)
    table.insert(ids, ids[:, None].expand(count, 16).float())
    Saver(path=path, hashtables={"t": table}, parallel=1).save()
    return CheckpointReader(path).read_tensor("t@id"), path


def load_part(path: Path, part: tuple[int, int], **how: Any) -> tuple[Any, HashTable]:  # noqa: ANN401
    table = HashTable([16], name="t", slice=gen_slice(*part))
    report = Loader(path, {"t": table}, **how).load()
    assert torch.equal(table.rows()[:, 0], table.ids().float())
    return report, table


@pytest.mark.slow
def test_of_a_part_of_the_rows_what_is_read_whole_is_verified_and_require_reads_the_rest(
    tmp_path: Path,
) -> None:
    ids, path = big(tmp_path)
    auto, table = load_part(path, (0, 3))
    want = len(table) * 72
    assert want <= auto.bytes_wanted < want * 1.01 < len(ids) * 72
    assert 0 < auto.bytes_verified < want
    require, _ = load_part(path, (0, 3), verify="require")
    assert require.bytes_verified == require.bytes_wanted == auto.bytes_wanted
    assert require.bytes_read > auto.bytes_read

    # A bit in a row that is not wanted, but in a chunk of which some are.
    row = len(table)  # the first row of the next slice
    assert row * 64 % CHUNK > 64
    flip(path, "t.embedding/part_0_1", row * 64)
    again, _ = load_part(path, (0, 3))
    assert again.bytes_verified == auto.bytes_verified
    with pytest.raises(CheckpointError, match="not those that were written"):
        load_part(path, (0, 3), verify="require")


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [1 << 16, 10 << 20, 64 << 20])
def test_chunks_of_any_size_are_verified(tmp_path: Path, chunk_bytes: int) -> None:
    ids, path = big(tmp_path)
    report, _ = load_part(path, (0, 1), chunk_bytes=chunk_bytes)
    assert report.bytes_verified == report.bytes_wanted == len(ids) * 72
    for at in (0, CHUNK - 1, CHUNK, 4 * CHUNK + 999 * 64):
        broken = tmp_path.with_name("broken")
        shutil.copytree(path, broken)
        flip(broken, "t.embedding/part_0_1", at)
        with pytest.raises(CheckpointError, match="not those that were written"):
            load_part(broken, (0, 1), chunk_bytes=chunk_bytes)
        shutil.rmtree(broken)


def test_tensors_that_stop_over_in_staging_memory_are_verified(tmp_path: Path) -> None:
    save(tmp_path)
    tensors = {"w": torch.zeros(100, 2)[:, 0]}
    assert Loader(tmp_path, tensors=tensors).load().verified == "all verified"
    flip(tmp_path, "w^ ", 3)
    with unchanged(tensors=tensors), pytest.raises(CheckpointError, match="not those that were"):
        Loader(tmp_path, tensors=tensors).load()


@dataclass
class Replaced:
    """Local files, and a save that comes between one of the reads and the next."""

    real: LocalStorage
    at: int
    save: Callable[[], object]
    reads: int = 0

    @property
    def location(self) -> str:
        return self.real.location

    async def _count(self) -> None:
        if self.reads == self.at:
            await asyncio.to_thread(self.save)
        self.reads += 1

    async def size(self, name: str, /) -> int:
        await self._count()
        return await self.real.size(name)

    @property
    def lost(self) -> int:
        return self.real.lost

    async def changed(self, names: Sequence[str], /) -> list[str]:
        return await self.real.changed(names)

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        await self._count()
        return await self.real.readinto(name, offset, views)

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        await self._count()
        return await self.real.on_thread(name, job)


OLD = data(range(50), width=4, exp_avg=4)
NEW = TableData(ids=OLD.ids + 50, slots={name: rows + 5000 for name, rows in OLD.slots.items()})
OLD_TENSORS = {name: torch.full((3,), float(value)) for value, name in enumerate("abc")}
NEW_TENSORS = {name: tensor + 100 for name, tensor in OLD_TENSORS.items()}


async def load_while_replaced(path: Path, at: int) -> tuple[str, int]:
    """Load while another checkpoint takes its place; return what was loaded, and the reads."""
    write_checkpoint(path, {"t": OLD}, OLD_TENSORS, writers=5)
    after = table_for(NEW)
    for slot, rows in NEW.slots.items():
        after.insert(NEW.ids, rows, slot)
    saver = Saver(path=path, hashtables={"t": after}, tensors=NEW_TENSORS, parallel=5)
    table, tensors = table_for(OLD), {name: torch.zeros(3) for name in OLD_TENSORS}
    async with Threads(reads=2) as threads, LocalStorage(path, disk=Disk(threads.reads)) as real:
        storage = Replaced(real, at, saver.save)
        try:
            await Run(storage=storage, tables={"t": table}, tensors=tensors).load()
        except (AsyncLoaderError, OSError) as error:
            assert not len(table)
            return type(error).__name__, storage.reads
    outcomes = {"old": (OLD, OLD_TENSORS), "new": (NEW, NEW_TENSORS)}
    [outcome] = [
        name
        for name, (content, values) in outcomes.items()
        if rows_in(table) == rows_on_disk(content)
        and all(torch.equal(tensors[key], values[key]) for key in tensors)
    ]
    return outcome, storage.reads


async def test_a_load_sees_one_checkpoint_though_another_takes_its_place_at_any_moment(
    tmp_path: Path,
) -> None:
    """Names and shapes are the same, and there are no digests to tell the two apart."""
    outcomes = set()
    for at in range(100):
        outcome, reads = await load_while_replaced(tmp_path / str(at), at)
        outcomes.add(outcome)
        if reads < at:
            break
    assert {"old", "new", "CheckpointChangedError"} <= outcomes


def test_a_reader_does_not_mix_two_checkpoints(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path))
    reader.read_tensor("t@id")
    Saver(path=tmp_path, hashtables={"t": table_for(CONTENT)}, parallel=2).save()
    for name in ("t@embedding", "t@id"):
        with pytest.raises((CheckpointChangedError, ReadError), match="replaced"):
            reader.read_tensor(name)
