"""Finding the newest checkpoint of a run."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from asyncloader import (
    CheckpointError,
    CheckpointNotFoundError,
    Live,
    Loader,
    alatest,
    latest,
    load_tensors,
)
from asyncloader.runs import Version, versions
from tests.oracle import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run folder: three checkpoints, `b` the newest, and one that is not finished."""
    for time, name in enumerate(["c", "a", "b"]):
        commit(tmp_path / name, time)
    (tmp_path / "unfinished").mkdir()
    os.utime(tmp_path / "unfinished", (900, 900))
    (tmp_path / "model.pt").touch()
    return tmp_path


def commit(path: Path, time: float) -> None:
    write_checkpoint(path, {}, {})
    os.utime(path / "index", (time, time))


def test_the_newest_is_the_last_that_the_list_names(run: Path) -> None:
    (run / "checkpoint").write_text("b\na\nc\n")
    assert latest(run) == latest(str(run)) == run / "c"
    Loader(latest(run)).load()


@pytest.mark.both_loops
async def test_the_newest_can_be_awaited(run: Path) -> None:
    """The loop's tests fail if a look blocks it."""
    assert await alatest(run) == await alatest(str(run)) == run / "b"
    (run / "checkpoint").write_text("a\n")
    assert await alatest(run) == run / "a"
    with pytest.raises(CheckpointNotFoundError, match="no run folder"):
        await alatest(run / "elsewhere")
    with pytest.raises(TypeError, match="run_folder must be a path"):
        await alatest(3)  # type: ignore[call-overload]  # the very thing


@pytest.mark.parametrize(
    "end",
    [
        "",
        "\n\n",
        "unfinished\n",
        "removed\nmodel.pt\n",
        "../elsewhere\n",
        "/etc\n./b\nb/\nb/.\n",
        "..\n.\n",
        "b\0\n",
        "\\b\n",
        "n" * 5000 + "\n",
        "\N{SNOWMAN}\ud800\n",
        "\x1b[2J\n",
    ],
)
def test_lines_that_name_no_finished_checkpoint_are_passed_over(run: Path, end: str) -> None:
    commit(run.parent / "elsewhere", 10)
    (run / "checkpoint").write_bytes(b"b\r\n a \n" + end.encode(errors="surrogatepass"))
    assert latest(run) == run / "a"


@pytest.mark.parametrize("name", [b"\xff\xfe", "\u00e9 \u00fc".encode()])
def test_a_name_is_found_as_the_file_system_has_it(run: Path, name: bytes) -> None:
    """Whatever encoding the names are in, the list and the folder agree byte by byte."""
    commit(run / os.fsdecode(name), -1)
    (run / "checkpoint").write_bytes(b"a\n" + name + b"\n")
    assert latest(run) == run / os.fsdecode(name)


@pytest.mark.parametrize("size", [10, 64 << 10, (64 << 10) + 1, 3 << 20])
def test_a_list_of_any_length_is_read_from_its_end(run: Path, size: int) -> None:
    (run / "checkpoint").write_bytes(b"x\n" * size + b"a\n")
    assert latest(run) == run / "a"


def test_half_a_line_is_no_name(run: Path) -> None:
    """Where the end of a long list begins, a name may be cut in two."""
    name = "x" * 200 + "c"
    commit(run / name, -1)
    (run / "checkpoint").write_bytes(b"y" * 70_000 + b"c\n" + b"\n" * ((64 << 10) - 2))
    assert latest(run) == run / "b"


def without(_: Path) -> None:
    pass


def with_an_empty_one(path: Path) -> None:
    path.touch()


def with_a_folder(path: Path) -> None:
    path.mkdir()


def with_a_fifo(path: Path) -> None:
    os.mkfifo(path)


def with_a_huge_one(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def with_another_format(path: Path) -> None:
    path.write_text('model_checkpoint_path: "c"\n')


@pytest.mark.parametrize(
    "prepare",
    [without, with_an_empty_one, with_a_folder, with_a_fifo, with_a_huge_one, with_another_format],
)
def test_without_a_list_the_newest_is_that_whose_index_is(
    run: Path, prepare: Callable[[Path], None]
) -> None:
    prepare(run / "checkpoint")
    assert latest(run) == run / "b"


def test_of_the_same_moment_the_highest_number_is_the_newest(tmp_path: Path) -> None:
    for name in ["step-9", "step-10", "step-2"]:
        commit(tmp_path / name, 5)
    assert latest(tmp_path).name == "step-10"


def test_a_link_that_goes_round_in_circles_does_no_harm(run: Path) -> None:
    (run / "loop").symlink_to("loop")
    (run / "dangling").symlink_to("nowhere")
    (run / "newest").symlink_to("a")
    (run / "checkpoint").write_text("newest\nloop\n")
    assert latest(run) == run / "newest"


def test_all_versions_are_listed_the_newest_last(run: Path) -> None:
    (run / "10").mkdir()
    os.utime(run / "10", (0.5, 0.5))
    assert versions(run) == (
        Version(name="c", committed=True, modified=0.0),
        Version(name="10", committed=False, modified=0.5),
        Version(name="a", committed=True, modified=1.0),
        Version(name="b", committed=True, modified=2.0),
        Version(name="unfinished", committed=False, modified=900.0),
    )


def empty(path: Path) -> Path:
    return path


def unfinished_only(path: Path) -> Path:
    (path / "1").mkdir()
    (path / "checkpoint").write_text("1\n")
    return path


def missing(path: Path) -> Path:
    return path / "nowhere"


def a_file(path: Path) -> Path:
    (path / "file").touch()
    return path / "file"


def a_checkpoint(path: Path) -> Path:
    write_checkpoint(path, {}, {})
    return path


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (empty, "looked for sub-folders that hold 'index'.*'checkpoint' names"),
        (unfinished_only, "looked for sub-folders that hold 'index'"),
        (missing, "No such file or directory"),
        (a_file, "Not a directory"),
        (a_checkpoint, "a checkpoint itself"),
    ],
)
def test_where_no_checkpoint_is_the_error_says_what_was_looked_for(
    tmp_path: Path, prepare: Callable[[Path], Path], says: str
) -> None:
    path = prepare(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=says) as caught:
        latest(path)
    assert caught.value.filename == str(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_an_error(run: Path) -> None:
    run.chmod(0o000)
    try:
        with pytest.raises(CheckpointError, match="cannot be listed"):
            latest(run)
    finally:
        run.chmod(0o700)


def test_a_path_that_no_folder_can_have_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="cannot be listed"):
        latest("x" * 5000)


def without_a_shard(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def with_half_a_shard(path: Path) -> None:
    shard = next(path.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)


def with_an_empty_shard(path: Path) -> None:
    os.truncate(next(path.glob("*.safetensors")), 0)


def with_a_shard_whose_room_was_taken(path: Path) -> None:
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(bytes(shard.stat().st_size))


def with_half_an_index(path: Path) -> None:
    os.truncate(path / "index", (path / "index").stat().st_size // 2)
    os.utime(path / "index", (9, 9))


def with_an_empty_index(path: Path) -> None:
    os.truncate(path / "index", 0)
    os.utime(path / "index", (9, 9))


def without_the_names_of_tables(path: Path) -> None:
    (path / "tensorkey.json").unlink()


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    "cut",
    [
        without_a_shard,
        with_half_a_shard,
        with_an_empty_shard,
        with_a_shard_whose_room_was_taken,
        with_half_an_index,
        with_an_empty_index,
        without_the_names_of_tables,
    ],
)
def test_a_version_that_is_still_being_copied_is_passed_over(
    tmp_path: Path, cut: Callable[[Path], None], listed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        write_checkpoint(tmp_path / f"v{number}", {}, {"w": torch.ones(3)})
        os.utime(tmp_path / f"v{number}" / "index", (number, number))
    if listed:
        (tmp_path / "checkpoint").write_text("v1\nv2\n")
    assert latest(tmp_path) == tmp_path / "v2"

    cut(tmp_path / "v2")

    assert latest(tmp_path) == tmp_path / "v1"
    assert "v2 is passed over, not all of it is there" in caplog.text
    cut(tmp_path / "v1")
    with pytest.raises(CheckpointNotFoundError, match=r"no finished checkpoint here.*'v2'.*'v1'"):
        latest(tmp_path)


def test_a_model_of_which_a_shard_is_still_to_come_is_passed_over(tmp_path: Path) -> None:
    names = {name: f"{name}.safetensors" for name in ("a", "b")}
    for number in (1, 2):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        for name, file in names.items():
            save_file({name: torch.ones(2)}, folder / file)
        weights = folder / "model.safetensors.index.json"
        weights.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        os.utime(weights, (number, number))
    assert latest(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "b.safetensors").unlink()
    assert latest(tmp_path).name == "checkpoint-1"


@pytest.mark.parametrize("name", ["model.safetensors", "model.fp16.safetensors"])
def test_versions_may_be_folders_of_safetensors(tmp_path: Path, name: str) -> None:
    """As a trainer with Hugging Face's libraries leaves them."""
    for number in (9, 10):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        save_file({"w": torch.full((2,), float(number))}, folder / name)
        os.utime(folder / name, (number, number))
    (tmp_path / "logs").mkdir()

    assert latest(tmp_path) == tmp_path / "checkpoint-10"
    found = [(version.name, version.committed) for version in versions(tmp_path)]
    assert found[:2] == [("checkpoint-9", True), ("checkpoint-10", True)]
    assert ("logs", False) in found
    with pytest.raises(CheckpointError, match=r"latest\(\) of it"):
        load_tensors(tmp_path)

    async def serve() -> tuple[str, list[float]]:
        async with Live(tmp_path, lambda: ({}, {"w": torch.zeros(2)})) as live:
            with live.use() as model:
                return model.version, model.tensors["w"].tolist()

    assert asyncio.run(serve()) == ("checkpoint-10", [10.0, 10.0])
