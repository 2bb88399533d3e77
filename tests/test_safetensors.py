"""Plain safetensors files, and folders of them as Hugging Face's are."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from asyncloader import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    Loader,
    PlanError,
    TruncatedShardError,
    latest,
    load_tensors,
)
from asyncloader._checkpoint.catalog import SHARDED
from asyncloader._checkpoint.index import parse_weight_map
from asyncloader._checkpoint.problems import Problems
from tests.oracle import truncate, write_checkpoint
from tests.support import data, nothing_left_behind, raw, table_for, unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

STORED = {
    "model.embed.weight": torch.arange(12.0).view(4, 3),
    "model.norm": torch.tensor([True, False, True]),
    "model.half": torch.arange(5).to(torch.bfloat16),
    "scalar": torch.tensor(-3),
    "empty": torch.zeros(0, 7),
    "w^ ": torch.tensor([7]),
    "x/part_0^ ": torch.tensor([8]),
    "t.id/part_0_1": torch.tensor([9]),
}


def one_file(folder: Path) -> Path:
    save_file(STORED, folder / "anything.safetensors", metadata={"format": "pt"})
    return folder / "anything.safetensors"


def a_folder_of_one(folder: Path) -> Path:
    save_file(STORED, folder / "model.safetensors")
    return folder


def a_folder_of_several(folder: Path) -> Path:
    save_shards(folder, STORED)
    return folder


def save_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int = 3) -> dict[str, str]:
    """Write shards and their index; return its weight_map."""
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = dict(list(tensors.items())[number::shards])
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / SHARDED).write_text(json.dumps(index))


KINDS = [one_file, a_folder_of_one, a_folder_of_several]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_text", [True, False])
async def test_every_kind_of_source_fills_tensors(
    tmp_path: Path, kind: Callable[[Path], Path], as_text: bool
) -> None:
    path = kind(tmp_path)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in STORED.items()}

    with nothing_left_behind():
        loader = Loader(str(path) if as_text else path, tensors=tensors, strict=True)
        report = await loader.aload()

    assert {name: raw(tensor) for name, tensor in tensors.items()} == {
        name: raw(tensor) for name, tensor in STORED.items()
    }
    assert set(report.tensors.values()) == {"loaded"}
    assert (report.missing, report.unexpected) == ((), ())
    assert report.location == str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_is_the_name_as_it_stands(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    """`^ ` and `/part_` mean something in RecIS's files; here they are letters like others."""
    path = kind(tmp_path)

    assert sorted(CheckpointReader(path).tensor_names()) == sorted(STORED)
    with pytest.raises(KeyError):
        load_tensors(path, ["w"])


def test_a_file_may_be_named_from_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert set(load_tensors("anything.safetensors")) == set(STORED)


def test_a_link_out_of_the_folder_is_followed_for_who_trusts_it(tmp_path: Path) -> None:
    """Hugging Face's cache holds nothing else."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    one_file(tmp_path / "blobs").rename(tmp_path / "blobs" / "0af3")
    link = tmp_path / "snapshot" / "model.safetensors"
    link.symlink_to("../blobs/0af3")
    with pytest.raises(CheckpointError, match="follow_symlinks=True") as caught:
        load_tensors(link.parent)
    assert str(tmp_path / "blobs" / "0af3") in str(caught.value)
    assert set(load_tensors(link.parent, follow_symlinks=True)) == set(STORED)


def test_a_file_that_the_user_names_may_be_a_link_to_anywhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    one_file(tmp_path).rename(tmp_path / "elsewhere" / "x")
    link = tmp_path / "model.safetensors"
    link.symlink_to("elsewhere/x")
    assert set(load_tensors(link)) == set(STORED)


@pytest.mark.parametrize("others", [a_folder_of_one, a_folder_of_several])
def test_a_folder_with_index_is_one_of_recis(
    tmp_path: Path, others: Callable[[Path], Path]
) -> None:
    others(tmp_path)
    write_checkpoint(tmp_path, {"t": data([1, 2])}, {"w": torch.ones(2)})
    assert set(CheckpointReader(tmp_path).tensor_names()) == {"w", "t@id", "t@embedding"}


def test_a_map_of_several_files_goes_before_a_single_one(tmp_path: Path) -> None:
    save_file({"old": torch.ones(1)}, tmp_path / "model.safetensors")
    save_shards(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, shards=2)
    assert set(load_tensors(tmp_path)) == {"a", "b"}


async def test_tables_are_missing_from_such_a_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, table = a_folder_of_one(tmp_path), table_for(data([1]))

    with unchanged(table):
        report = await Loader(path, {"t": table}).aload()
        with pytest.raises(PlanError, match="'t' is asked for but not in the checkpoint"):
            await Loader(path, {"t": table}, strict=True).aload()

    assert report.missing == ("t",)
    assert "'t'" in caplog.text


def test_what_does_not_fit_is_said_of_the_file(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    with pytest.raises(PlanError, match="'scalar' is float32") as caught:
        Loader(path, tensors={"scalar": torch.zeros(())}).load()
    assert caught.value.location == str(path)


HOSTILE: dict[str, tuple[object, str]] = {
    "no map": (None, "its weight_map is None"),
    "a list": ([], "its weight_map is \\[\\]"),
    "a number": ({"w": 3}, "its file 3 is not a plain file name"),
    "a map in it": ({"w": {"w": "f"}}, "not a plain file name"),
    "a folder up": ({"w": "../model.safetensors"}, "not a plain file name"),
    "elsewhere": ({"w": "/etc/passwd"}, "not a plain file name"),
    "a NUL": ({"w": "a\0b"}, "not a plain file name"),
    "the folder": ({"w": "."}, "not a plain file name"),
    "nothing": ({"w": ""}, "not a plain file name"),
}


@pytest.mark.parametrize(("weight_map", "says"), HOSTILE.values(), ids=HOSTILE)
async def test_a_map_that_means_harm_is_refused(
    tmp_path: Path, weight_map: object, says: str
) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    write_index(folder, weight_map)

    with nothing_left_behind(), pytest.raises(CheckpointError, match=says) as caught:
        await Loader(folder, tensors={"w": torch.zeros(1)}).aload()

    assert caught.value.location == str(folder)
    assert caught.value.shard == SHARDED


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"{}\0", b"[" * 3000 + b"]" * 3000])
def test_a_map_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / SHARDED).write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        load_tensors(tmp_path)
    assert caught.value.shard == SHARDED


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    st.binary(max_size=20)
    | st.builds(
        lambda value: json.dumps(value).encode(),
        JSON | st.fixed_dictionaries({"weight_map": JSON}),
    )
)
def test_any_map_is_read_or_refused(text: bytes) -> None:
    try:
        catalog = parse_weight_map(Problems("here"), text, SHARDED)
    except CheckpointError as error:
        assert error.shard == SHARDED  # noqa: PT017  # that, or nothing is raised
    else:
        assert catalog.tables == {}
        assert {name: (place.key, place.shard) for name, place in catalog.tensors.items()} == {
            name: (name, shard) for name, shard in json.loads(text)["weight_map"].items()
        }


async def test_a_shard_that_is_missing_is_named_with_the_file_that_names_it(
    tmp_path: Path,
) -> None:
    weight_map = save_shards(tmp_path, STORED)
    lost = weight_map["scalar"]
    (tmp_path / lost).unlink()

    with pytest.raises(CheckpointError, match=SHARDED) as caught:
        await Loader(tmp_path, tensors={"scalar": torch.tensor(0)}).aload()
    assert caught.value.shard == lost

    needed = {"w^ ": torch.tensor([0])}
    assert weight_map["w^ "] != lost
    await Loader(tmp_path, tensors=needed, strict=True).aload()


@pytest.mark.parametrize("key", ["gone", "gone^ ", "x/part_0^ "])
async def test_a_key_that_its_shard_lacks_is_named_with_the_file_that_names_it(
    tmp_path: Path, key: str
) -> None:
    save_file({"x/part_0": torch.ones(1)}, tmp_path / "f.safetensors")
    write_index(tmp_path, {key: "f.safetensors"})

    with pytest.raises(CheckpointError, match=SHARDED) as caught:
        await Loader(tmp_path, tensors={key: torch.zeros(1)}).aload()

    assert (caught.value.shard, caught.value.key) == ("f.safetensors", key)


def empty(path: Path) -> Path:
    return path


def with_other_files(path: Path) -> Path:
    save_file(STORED, path / "other.safetensors")
    (path / "config.json").write_text("{}")
    return path


def missing_folder(path: Path) -> Path:
    return path / "nowhere"


def missing_file(path: Path) -> Path:
    return path / "nowhere.safetensors"


def missing_file_in_a_missing_folder(path: Path) -> Path:
    return path / "nowhere" / "model.safetensors"


def another_file(path: Path) -> Path:
    torch.save({}, path / "model.pt")
    return path / "model.pt"


def a_file_in_a_file(path: Path) -> Path:
    return another_file(path) / "x.safetensors"


def an_empty_folder_named_like_a_file(path: Path) -> Path:
    (path / "x.safetensors").mkdir()
    return path / "x.safetensors"


LOOKED_FOR = f"looked for 'index'.*'{SHARDED}'.*'model.safetensors'"
NOTHING_THERE = [
    (empty, LOOKED_FOR),
    (with_other_files, LOOKED_FOR),
    (missing_folder, "no such folder"),
    (missing_file, r"nowhere\.safetensors: cannot be opened: No such file"),
    (missing_file_in_a_missing_folder, "no such folder"),
    (a_file_in_a_file, "not a folder"),
    (an_empty_folder_named_like_a_file, LOOKED_FOR),
]


@pytest.mark.parametrize(("prepare", "says"), NOTHING_THERE)
async def test_where_nothing_is_the_error_says_what_was_looked_for(
    tmp_path: Path, prepare: Callable[[Path], Path], says: str
) -> None:
    path = prepare(tmp_path)

    with nothing_left_behind(), pytest.raises(CheckpointNotFoundError, match=says) as caught:
        await Loader(path).aload()

    assert caught.value.filename == str(path)
    assert isinstance(caught.value.__cause__, OSError)
    assert "latest" not in str(caught.value)


def with_a_list_of_none(path: Path) -> Path:
    """TensorFlow writes such a list, too."""
    (path / "checkpoint").write_text("1\n")
    return path


def with_a_save_under_way(path: Path) -> Path:
    write_checkpoint(path / ".saving-1-x" / "old", {}, {})
    write_checkpoint(path / ".saving-1-x", {}, {})
    return path


@pytest.mark.parametrize("prepare", [with_a_list_of_none, with_a_save_under_way])
async def test_what_is_no_folder_of_checkpoints_is_not_taken_for_one(
    tmp_path: Path, prepare: Callable[[Path], Path]
) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        await Loader(prepare(tmp_path)).aload()
    assert "latest" not in str(caught.value)
    with pytest.raises(CheckpointNotFoundError):
        await asyncio.to_thread(latest, tmp_path)


async def test_who_gives_a_folder_of_checkpoints_is_told_how_to_find_the_newest(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path / "7", {}, {})
    with pytest.raises(CheckpointNotFoundError, match=r"take asyncloader\.latest\(\)") as caught:
        await Loader(tmp_path).aload()
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors", SHARDED])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    path = tmp_path / name if name == "x.safetensors" else tmp_path
    with pytest.raises(CheckpointError, match="not a regular file") as caught:
        load_tensors(path)
    assert caught.value.shard == name


def test_a_file_that_was_cut_off_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    truncate(path, by=1)
    tensors = {name: torch.ones_like(tensor) for name, tensor in STORED.items()}
    with unchanged(tensors=tensors), pytest.raises(TruncatedShardError):
        Loader(path, tensors=tensors).load()
