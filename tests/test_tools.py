"""The tools as functions, and what each of them imports."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncloader
from asyncloader import (
    CheckpointSummary,
    Conversion,
    Difference,
    Loader,
    Progress,
    ReadOptions,
    RunSummary,
    Verification,
    convert,
    diff,
    empty_like,
    inspect,
    verify,
)
from tests.checkpoints import GENUINE, TABLES, TENSORS, everything, flip, save
from tests.oracle import read_checkpoint, shard_holding, write_checkpoint
from tests.support import raw, rows_in

if TYPE_CHECKING:
    from pathlib import Path


def test_inspect_says_what_there_is(tmp_path: Path) -> None:
    save(tmp_path / "run" / "1", ranks=2)
    (tmp_path / "run" / "checkpoint").write_text("1\n")
    found = inspect(tmp_path / "run" / "1")
    assert isinstance(found, CheckpointSummary)
    assert {table.name: table.ids for table in found.tables} == {
        name: len(table.ids) for name, table in TABLES.items()
    }
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    run = inspect(tmp_path / "run")
    assert isinstance(run, RunSummary)
    assert (run.latest, len(run.versions)) == ("1", 1)


def test_verify_lists_what_is_wrong(tmp_path: Path) -> None:
    told: list[Progress] = []
    found = verify(save(tmp_path), progress=told.append)
    assert isinstance(found, Verification)
    assert (found.ok, found.problems) == (True, ())
    assert told[-1].bytes_done == told[-1].bytes_total == found.bytes_read
    flip(shard_holding(tmp_path, "w^ "), -1)
    [problem] = verify(tmp_path).problems
    assert "are not those that were written" in problem.text


def test_diff_says_what_differs(tmp_path: Path) -> None:
    a = save(tmp_path / "a")
    b = save(tmp_path / "b", tensors=TENSORS | {"w": TENSORS["w"] + 1}, ranks=1)
    found = diff(a, b, budget=1 << 20)
    assert isinstance(found, Difference)
    assert [tensor.name for tensor in found.tensors if not tensor.equal] == ["w"]
    assert not found.equal
    assert diff(a, a).equal


def test_convert_goes_there_and_back(tmp_path: Path) -> None:
    source = save(tmp_path / "a")
    done = convert(source, tmp_path / "b.safetensors")
    assert isinstance(done, Conversion)
    assert (done.kind, done.files) == ("safetensors file", ("b.safetensors",))
    assert convert(tmp_path / "b.safetensors", tmp_path / "c", shards=3).ranks == 3
    assert everything(read_checkpoint(tmp_path / "c")) == everything(read_checkpoint(source))


def test_empty_like_makes_what_takes_all_of_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TABLES, TENSORS, ranks=2)
    tables, tensors = empty_like(tmp_path)
    assert all(len(table) == 0 for table in tables.values())
    Loader(tmp_path, tables, tensors, strict=True).load()
    assert {name: raw(tensor) for name, tensor in tensors.items()} == {
        name: raw(tensor) for name, tensor in TENSORS.items()
    }
    assert {name: len(rows_in(table)) for name, table in tables.items()} == {
        name: len(set(table.ids.tolist())) for name, table in TABLES.items()
    }


@pytest.mark.parametrize("tool", ["inspect", "verify", "empty_like"])
async def test_each_tool_can_be_awaited(tool: str, tmp_path: Path) -> None:
    save(tmp_path)
    assert await getattr(asyncloader, f"a{tool}")(tmp_path)


@pytest.mark.parametrize("tool", ["diff", "convert"])
async def test_each_tool_of_two_can_be_awaited(tool: str, tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), tmp_path / "b.safetensors"
    await getattr(asyncloader, f"a{tool}")(a, a if tool == "diff" else b)


CALLS: dict[str, int] = {"inspect": 1, "verify": 1, "empty_like": 1, "diff": 2, "convert": 2}


@pytest.mark.parametrize(("tool", "paths"), CALLS.items())
def test_links_out_of_a_checkpoint_are_followed_only_if_asked_for(
    tool: str, paths: int, tmp_path: Path
) -> None:
    """Each tool passes its options on."""
    source = write_checkpoint_with_a_link(tmp_path)
    targets = [source, tmp_path / "out.safetensors" if tool == "convert" else source][:paths]
    call: Any = getattr(asyncloader, tool)
    if tool == "verify":
        assert not call(*targets).ok
    else:
        with pytest.raises(asyncloader.AsyncLoaderError, match="link"):
            call(*targets)
    found = call(*targets, options=ReadOptions(follow_symlinks=True))
    assert tool != "verify" or found.ok


def write_checkpoint_with_a_link(path: Path) -> Path:
    write_checkpoint(path / "a", {}, {"w": torch.ones(3)})
    shard = shard_holding(path / "a", "w^ ")
    shard.rename(path / "elsewhere")
    shard.symlink_to(path / "elsewhere")
    return path / "a"


@pytest.mark.parametrize("tool", ["verify", "diff", "convert"])
def test_what_is_no_listener_is_refused(tool: str) -> None:
    call: Any = getattr(asyncloader, tool)
    with pytest.raises(TypeError, match="progress must be callable"):
        call(*["x"] * CALLS[tool], progress="yes")


@pytest.mark.parametrize("tool", CALLS)
def test_options_that_are_none_are_refused(tool: str) -> None:
    call: Any = getattr(asyncloader, tool)
    with pytest.raises(TypeError, match="options must be ReadOptions"):
        call(*["x"] * CALLS[tool], options={"verify": "off"})


COMMANDS = ["inspect", "show", "load", "verify", "diff", "convert"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        ["inspect", str(GENUINE / "optim_slots")],
        ["inspect", str(GENUINE / "optim_slots"), "--json"],
        ["inspect", "nowhere"],
        ["verify", str(GENUINE / "optim_slots")],
        ["verify", "nowhere"],
    ],
    ids=" ".join,
)
def test_what_makes_no_tensors_imports_no_torch(arguments: list[str]) -> None:
    """It takes seconds; a shell that completes a help text, or lists a folder, does not wait."""
    code = (
        "import sys; from asyncloader.cli import run; run(sys.argv[1:]);"
        "print(sorted({'torch', 'numba'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["inspect", "--help"]])
def test_help_draws_nothing(arguments: list[str]) -> None:
    code = (
        "import sys; from asyncloader.cli import run; run(sys.argv[1:]);"
        "sys.exit(not {'rich', 'numpy'}.isdisjoint(sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True)


def test_an_error_about_arguments_names_the_function_that_was_called() -> None:
    with pytest.raises(TypeError, match=r"^diff\(\): missing a required argument: 'b'"):
        diff("a")  # type: ignore[call-arg]  # the very thing
    with pytest.raises(
        TypeError, match=r"^inspect\(\): got an unexpected keyword argument 'paralel'"
    ):
        inspect("a", paralel=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["slots", "tables"])
async def test_a_text_is_no_list_of_names(tmp_path: Path, name: str) -> None:
    """Its letters would be."""
    with pytest.raises(TypeError, match=rf"{name} is a list of names.*write \['embedding'\]"):
        await asyncloader.aconvert(tmp_path, tmp_path / "b", **{name: "embedding"})  # type: ignore[arg-type]
