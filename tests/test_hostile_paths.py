"""Whoever made a checkpoint does not choose which files of this machine are read.

`test_faults.py` has the other half: a shard, or an index, that is a folder, a FIFO, a dangling or
circular link, a device, or empty; names that no file can have.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from asyncloader import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    Loader,
    LoadReport,
    Saver,
    latest,
    load_tensors,
)
from asyncloader.runs import versions
from asyncloader.tools import averify
from tests.checkpoints import LIMITS
from tests.hostile import untouched
from tests.oracle import edit_json, write_checkpoint
from tests.support import nothing_left_behind
from tests.test_faults import STORED, Destination, written

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

unix = pytest.mark.skipif(sys.platform == "win32", reason="needs links and special files")
SHARDED = "model.safetensors.index.json"
SIDECAR = "asyncloader.json"


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """Make a checkpoint, and beside it a folder with a sound shard and a secret."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside").mkdir()
    shard = written(tmp_path / "inside")
    (tmp_path / "outside" / "shard.safetensors").write_bytes(shard.read_bytes())
    (tmp_path / "outside" / "secret").write_text("secret")
    return tmp_path / "inside"


async def load(path: Path) -> object:
    return await Destination(path).attempt()


async def plan(path: Path) -> object:
    return await Destination(path).loader.plan()


async def read(path: Path) -> object:
    return await CheckpointReader(path).aread_tensor("w")


async def verify(path: Path) -> object:
    found = await averify(str(path), options=LIMITS)
    [problem, *_] = found.problems
    return CheckpointError(found.location, problem.text, problem.file)


EVERYBODY = [load, plan, read, verify]


def refusals(path: Path) -> Iterator[CheckpointError]:
    """Yield the errors by which everybody refuses a checkpoint; nothing outside is touched."""
    for reader in EVERYBODY:
        with untouched(path.parent / "outside"), nothing_left_behind():
            yield asyncio.run(refusal(reader, path))


async def refusal(reader: Callable[[Path], Awaitable[object]], path: Path) -> CheckpointError:
    try:
        outcome = await reader(path)
    except CheckpointError as error:
        outcome = error
    assert isinstance(outcome, CheckpointError), f"{reader.__name__}: {outcome}"
    return outcome


# --- names

NAMES = {
    "above": "../outside/shard.safetensors",
    "far above": "../" * 40 + "etc/passwd",
    "down and up": "x/../../outside/shard.safetensors",
    "up": "..",
    "here": ".",
    "nothing": "",
    "a path": "x/shard.safetensors",
    "from the root": "/etc/passwd",
    "twice from the root": "//etc/passwd",
    "back slashes": "..\\outside\\shard.safetensors",
    "a drive": "C:\\shard.safetensors",
    "a share": "\\\\server\\share\\shard.safetensors",
    "a zero byte": "shard.safetensors\0",
    "a zero byte within": "../outside/shard.safetensors\0.safetensors",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_in_the_index_that_leads_out_of_the_folder_is_refused(
    inside: Path, name: str
) -> None:
    edit_json(inside / "index", lambda index: index.update(file_index={name: 0}))

    for error in refusals(inside):
        assert "not a plain file name" in str(error)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
async def test_a_name_in_a_weight_map_that_leads_out_of_the_folder_is_refused(
    tmp_path: Path, name: str
) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    folder.mkdir()
    save_file({"w": torch.ones(3)}, outside / "shard.safetensors")
    (folder / SHARDED).write_text('{"weight_map": {"w": "x"}}')
    edit_json(folder / SHARDED, lambda content: content.update(weight_map={"w": name}))
    loader = Loader(folder, tensors={"w": torch.zeros(3)})

    with untouched(outside), pytest.raises(CheckpointError, match="not a plain file name"):
        await loader.aload()


async def test_names_that_differ_only_in_case_are_two_files(tmp_path: Path) -> None:
    shard, other = "Model.safetensors", "mODEL.safetensors"
    write_checkpoint(tmp_path, {}, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, writers=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    first.rename(tmp_path / shard)
    if (tmp_path / other).exists():
        pytest.skip("this file system takes them for one")
    second.rename(tmp_path / other)
    edit_json(tmp_path / "index", lambda index: index.update(file_index={shard: 0, other: 1}))
    tensors = {"a": torch.zeros(()), "b": torch.zeros(())}

    await Loader(tmp_path, tensors=tensors, strict=True).aload()

    assert [tensor.item() for tensor in tensors.values()] == [1, 2]


async def test_a_name_in_another_case_than_the_files_is_missing_or_that_file(inside: Path) -> None:
    """The first where the file system tells them apart."""
    [shard] = inside.glob("*.safetensors")
    name = shard.name.upper()
    edit_json(inside / "index", lambda index: index.update(file_index={name: 0}))

    outcome = await load(inside)

    if (inside / name).exists():
        assert isinstance(outcome, LoadReport)
    else:
        assert isinstance(outcome, CheckpointError)
        assert (outcome.shard, "missing" in str(outcome)) == (name, True)


# --- links


def absolute(file: Path, target: Path) -> None:
    file.symlink_to(target)


def relative(file: Path, target: Path) -> None:
    file.symlink_to(Path("..") / target.relative_to(target.parents[1]))


def by_way_of_a_link_inside(file: Path, target: Path) -> None:
    relative(file.with_name("hop"), target)
    file.symlink_to("hop")


def by_way_of_a_folder_inside(file: Path, target: Path) -> None:
    file.with_name("folder").symlink_to(target.parent, target_is_directory=True)
    file.symlink_to(Path("folder") / target.name)


def out_and_in_and_out(file: Path, target: Path) -> None:
    file.symlink_to(Path("..") / file.parent.name / ".." / target.parent.name / target.name)


LEADING_OUT = [
    absolute,
    relative,
    by_way_of_a_link_inside,
    by_way_of_a_folder_inside,
    out_and_in_and_out,
]


def linked(inside: Path, name: str, link: Callable[[Path, Path], None]) -> None:
    """Move a file out of the checkpoint, and have a link lead to it."""
    target = inside.parent / "outside" / name
    (inside / name).rename(target)
    link(inside / name, target)


@unix
@pytest.mark.parametrize("link", LEADING_OUT)
def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(
    inside: Path,
    link: Callable[[Path, Path], None],
) -> None:
    [shard] = inside.glob("*.safetensors")
    linked(inside, shard.name, link)

    for error in refusals(inside):
        assert "symbolic link" in str(error)
        assert error.shard == shard.name


@unix
@pytest.mark.parametrize("name", ["index", "tensorkey.json", SIDECAR])
@pytest.mark.parametrize("link", LEADING_OUT)
def test_another_file_that_is_a_link_out_of_the_folder_is_refused(
    inside: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    if name == SIDECAR:
        (inside / SIDECAR).write_text("{}")
    linked(inside, name, link)

    for error in refusals(inside):
        assert name in str(error)
        assert "symbolic link" in str(error)


@unix
@pytest.mark.parametrize("target", ["/proc/self/mem", "/proc/self/environ", "/etc/passwd"])
def test_a_shard_that_is_a_link_to_a_file_of_the_system_is_refused(
    inside: Path, target: str
) -> None:
    [shard] = inside.glob("*.safetensors")
    shard.unlink()
    shard.symlink_to(target)

    for error in refusals(inside):
        assert "symbolic link" in str(error)


@unix
@pytest.mark.parametrize("link", LEADING_OUT)
async def test_who_trusts_the_links_follows_them(
    inside: Path, link: Callable[[Path, Path], None]
) -> None:
    for name in [file.name for file in inside.iterdir()]:
        linked(inside, name, link)
        for hop in "hop", "folder":
            if (inside / hop).is_symlink():
                (inside / hop).rename(inside / f"{hop}-{name}")
                link_to = f"{hop}-{name}" + (f"/{name}" if hop == "folder" else "")
                (inside / name).unlink()
                (inside / name).symlink_to(link_to)
    destination = Destination(inside, follow_symlinks=True)

    assert isinstance(await destination.attempt(), LoadReport)
    assert destination.is_loaded()
    assert torch.equal(
        await CheckpointReader(inside, follow_symlinks=True).aread_tensor("w"), STORED["w"]
    )


@unix
async def test_a_link_within_the_folder_is_followed(inside: Path) -> None:
    [shard] = inside.glob("*.safetensors")
    shard.rename(inside / "real")
    shard.symlink_to("real")
    (inside / "index").rename(inside / "index.1")
    (inside / "index").symlink_to(inside / "index.1")
    destination = Destination(inside)

    assert isinstance(await destination.attempt(), LoadReport)
    assert destination.is_loaded()


@unix
async def test_a_folder_that_is_a_link_itself_is_the_users_choice(inside: Path) -> None:
    (inside.parent / "newest").symlink_to("inside")
    destination = Destination(inside.parent / "newest")

    assert isinstance(await destination.attempt(), LoadReport)
    assert destination.is_loaded()


@unix
def test_a_file_that_was_named_may_be_a_link_to_anywhere(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "outside" / "blob")
    (tmp_path / "inside").mkdir()
    link = tmp_path / "inside" / "mine.safetensors"
    link.symlink_to("../outside/blob")

    assert torch.equal(load_tensors(link)["w"], torch.ones(3))


@unix
async def test_a_link_that_is_put_there_later_is_not_followed_out_of_the_folder(
    inside: Path,
) -> None:
    write_checkpoint(inside, {}, {"a": torch.ones(9), "b": torch.ones(9)}, writers=2)
    _, second = sorted(inside.glob("model-*-of-000002.safetensors"))
    async with CheckpointReader(inside) as reader:
        await reader.aread_tensor("a")
        linked(inside, second.name, absolute)
        with untouched(inside.parent / "outside"), pytest.raises(CheckpointError, match="link"):
            await reader.aread_tensor("b")


# --- what is no file


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's name may not be long
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def make_node(kind: int, major: int, minor: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        try:
            os.mknod(path, 0o600 | kind, os.makedev(major, minor))
        except PermissionError:
            pytest.skip("who is not root makes no devices")

    return make


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


NO_FILES = {
    "a socket": make_socket,
    "a character device": make_node(0o020000, 1, 5),  # /dev/zero
    "a block device": make_node(0o060000, 7, 0),  # the first loop device
    "a FIFO": make_fifo,
    "a folder": Path.mkdir,
}


@unix
@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_a_shard_that_is_no_file_is_refused(inside: Path, make: Callable[[Path], None]) -> None:
    [shard] = inside.glob("*.safetensors")
    shard.unlink()
    make(shard)

    for error in refusals(inside):
        assert error.shard == shard.name


@unix
@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("name", ["index", "tensorkey.json", SIDECAR])
def test_another_file_that_is_none_is_refused(
    inside: Path, name: str, make: Callable[[Path], None]
) -> None:
    (inside / name).unlink(missing_ok=True)
    make(inside / name)

    for error in refusals(inside):
        assert name in str(error)


# --- run folders


@unix
@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_a_version_whose_index_is_no_file_is_not_committed(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    write_checkpoint(tmp_path / "old", {}, {})
    (tmp_path / "new").mkdir()
    make(tmp_path / "new" / "index")
    (tmp_path / "checkpoint").write_text("old\nnew\n")

    assert latest(tmp_path) == tmp_path / "old"
    committed = {version.name: version.committed for version in versions(tmp_path)}
    assert committed == {"old": True, "new": False}


@unix
@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_a_version_that_is_no_folder_is_none(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "new")
    (tmp_path / "checkpoint").write_text("new\n")

    with pytest.raises(CheckpointNotFoundError):
        latest(tmp_path)
    assert all(not version.committed for version in versions(tmp_path))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_line_of_a_run_folders_list_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "run" / "old", {}, {})
    write_checkpoint(tmp_path / "outside" / "shard.safetensors", {}, {})
    (tmp_path / "run" / "checkpoint").write_text(f"old\n{name}\n")

    with untouched(tmp_path / "outside"):
        assert latest(tmp_path / "run") == tmp_path / "run" / "old"


# --- saving over it


@unix
def test_a_save_over_links_replaces_them_and_not_what_they_lead_to(inside: Path) -> None:
    for name in [file.name for file in inside.iterdir()]:
        linked(inside, name, absolute)
    outside = {file: file.read_bytes() for file in (inside.parent / "outside").iterdir()}

    Saver(path=inside, tensors={"w": torch.ones(2)}).save()

    assert {file: file.read_bytes() for file in outside} == outside
    assert not any(file.is_symlink() for file in inside.iterdir())
    assert torch.equal(load_tensors(inside)["w"], torch.ones(2))


@pytest.mark.parametrize("name", ["../outside/shard.safetensors", "/etc/passwd", "..", "a\0b"])
def test_a_save_over_an_index_that_leads_out_of_the_folder_removes_nothing_there(
    inside: Path, name: str
) -> None:
    outside = inside.parent / "outside"
    held = {file: file.read_bytes() for file in outside.iterdir()}
    edit_json(inside / "index", lambda index: index["file_index"].update({name: 1}))

    Saver(path=inside, tensors={"w": torch.ones(2)}).save()

    assert {file: file.read_bytes() for file in outside.iterdir()} == held
    assert torch.equal(load_tensors(inside)["w"], torch.ones(2))
