"""`asyncloader inspect`, and what all commands have in common."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file

from asyncloader import CheckpointNotFoundError, __version__, ainspect
from asyncloader._display import escaped
from asyncloader._tools.inspecting import (
    CheckpointSummary,
    TableSummary,
    TensorSummary,
)
from asyncloader._tools.run_summary import RunSummary, VersionSummary
from asyncloader.cli._app import run as run_here
from asyncloader.cli._common import print_json
from asyncloader.cli._content_views import checkpoint_view
from asyncloader.cli._run_view import run_view
from asyncloader.cli._terminal import middle_cut, shown
from tests.checkpoints import GENUINE, save
from tests.oracle import (
    dense_block,
    edit_json,
    read_checkpoint,
    shard_holding,
    sparse_block,
    truncate,
    write_checkpoint,
    write_ranks,
)
from tests.support import data, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from rich.console import RenderableType
    from torch import Tensor

    from tests.oracle import TableData

ODD = [
    "[bold]x[/]",
    "a\nb",
    "\x1b[31mred",
    "\N{ROCKET}\N{ROCKET}",
    ":smile:",
    "",
    " lead",
    "\u202e",
]


# Readline sets COLUMNS behind Python's back, in tests only: processes get what Python knows.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line as a process; return its exit code, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "asyncloader", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    return done.returncode, done.stdout, done.stderr


async def inspect(path: Path | str) -> CheckpointSummary:
    found = await ainspect(path)
    assert isinstance(found, CheckpointSummary)
    return found


def tensor_of(name: str, tensor: Tensor) -> TensorSummary:
    return TensorSummary(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        bytes=tensor.numel() * tensor.element_size(),
    )


def check(found: CheckpointSummary, path: Path) -> None:
    """Compare a summary with what the oracle reads."""
    tables, tensors = read_checkpoint(path)
    assert {one.name: one for one in found.tensors} == {
        name: tensor_of(name, tensor) for name, tensor in tensors.items()
    }
    assert {one.name for one in found.tables} == set(tables)
    for one in found.tables:
        check_table(one, tables[one.name])
    tables_bytes = sum(table.bytes for table in found.tables)
    assert found.bytes == tables_bytes + sum(tensor.bytes for tensor in found.tensors)
    assert found.ids == sum(len(table.ids) for table in tables.values())


def check_table(found: TableSummary, table: TableData) -> None:
    slots = {"id": table.ids, **table.slots}
    assert found.ids == len(table.ids)
    assert {slot.name for slot in found.slots} == set(slots)
    assert found.slots[0].name == "id"
    for slot in found.slots:
        whole = tensor_of(slot.name, slots[slot.name])
        assert (slot.dtype, (slot.rows, *slot.shape), slot.bytes) == (
            whole.dtype,
            whole.shape,
            whole.bytes,
        )
    assert found.bytes == sum(slot.bytes for slot in found.slots)


@pytest.mark.parametrize(
    ("name", "parts", "shards"), [("optim_slots", 1, 4), ("small_4shards", 4, 8)]
)
async def test_a_genuine_checkpoint_holds_what_it_holds(name: str, parts: int, shards: int) -> None:
    found = await inspect(GENUINE / name)
    check(found, GENUINE / name)
    assert (found.kind, found.committed, found.shards) == ("RecIS checkpoint", True, shards)
    assert {table.parts for table in found.tables} == {parts}
    assert (found.digests, found.saving, found.warnings) == ("absent", (), ())


def test_json_is_what_the_checkpoint_holds() -> None:
    code, out, err = run("inspect", GENUINE / "optim_slots", "--json")
    assert (code, err) == (0, "")
    tables, tensors = read_checkpoint(GENUINE / "optim_slots")
    document = json.loads(out)
    assert document["location"] == str(GENUINE / "optim_slots")
    assert {one["name"]: one["ids"] for one in document["tables"]} == {
        name: len(table.ids) for name, table in tables.items()
    }
    assert {one["name"]: (one["dtype"], one["shape"]) for one in document["tensors"]} == {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors.items()
    }


async def test_digests_are_present_if_they_belong_to_this_index(tmp_path: Path) -> None:
    found = await inspect(save(tmp_path))
    check(found, tmp_path)
    assert (found.digests, found.warnings) == ("present", ())


async def test_digests_of_another_save_are_none(tmp_path: Path) -> None:
    """RecIS's saver leaves the file behind: nobody may think that it verifies the new bytes."""
    save(tmp_path)
    edit_json(tmp_path / "index", lambda index: index.update(other=1))
    found = await inspect(tmp_path)
    assert found.digests == "ignored"
    assert "another save" in found.warnings[0]


async def test_plain_safetensors_are_told_apart(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2, 3), "half": torch.ones(4).half()}
    save_file(tensors, tmp_path / "any.safetensors")
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    file = await inspect(tmp_path / "any.safetensors")
    folder = await inspect(tmp_path / "hf")
    assert (file.kind, folder.kind) == ("safetensors file", "Hugging Face folder")
    assert {one.name: one for one in file.tensors} == {one.name: one for one in folder.tensors}
    assert {one.name: one for one in file.tensors} == {
        name: tensor_of(name, tensor) for name, tensor in tensors.items()
    }


async def test_a_tensor_with_the_name_of_a_slot_does_not_hide_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data([1, 2])}, {"t@embedding": torch.ones(7)})
    check(await inspect(tmp_path), tmp_path)


async def test_a_table_that_cannot_be_loaded_is_pointed_out(tmp_path: Path) -> None:
    blocks = [
        sparse_block("t", "id", torch.arange(3)),
        sparse_block("t", "embedding", torch.ones(2, 4)),
        sparse_block("u", "embedding", torch.ones(2, 4)),
    ]
    write_ranks(tmp_path, [blocks])
    found = await inspect(tmp_path)
    assert found.warnings == ("table 't' has 3 ids, but 2 'embedding'", "table 'u' has no ids")


async def test_another_save_into_the_same_folder_is_mentioned(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / ".saving-2-abc").mkdir()
    assert (await inspect(tmp_path)).saving == (".saving-2-abc",)


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """Make a run folder: the list says that `1`, the older one, is the one to load."""
    for time, name in enumerate(["1", "2"]):
        write_checkpoint(tmp_path / name, {}, {"w": torch.ones(3)})
        os.utime(tmp_path / name / "index", (time, time))
    (tmp_path / "3" / ".saving-1-x").mkdir(parents=True)
    (tmp_path / "3" / ".saving-1-x" / "part").write_bytes(b"four")
    os.utime(tmp_path / "3", (7, 7))
    (tmp_path / "checkpoint").write_text("2\n1\n")
    return tmp_path


async def test_a_run_folder_lists_its_versions_the_newest_last(a_run: Path) -> None:
    nbytes = sum(path.stat().st_size for path in (a_run / "1").iterdir())
    versions = [("1", True, 0.0, nbytes), ("2", True, 1.0, nbytes), ("3", False, 7.0, 4)]
    assert await ainspect(a_run) == RunSummary(
        location=str(a_run),
        latest="1",
        versions=tuple(
            VersionSummary(
                name=name,
                committed=done,
                modified=time,
                bytes=size,
                latest=name == "1",
                saving=() if done else (".saving-1-x/",),
            )
            for name, done, time, size in versions
        ),
    )


async def test_a_run_folder_may_have_nothing_to_load(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "checkpoint").write_text("1\n")
    found = await ainspect(tmp_path)
    assert isinstance(found, RunSummary)
    assert (found.latest, len(found.versions)) == (None, 1)
    assert "none" in drawn(run_view(found, everything=False), 80)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model-000000-of-000002.safetensors"], "1 shard file but no 'index'"),
        ([".saving-1-abc"], ".saving-1-abc but no 'index'"),
        (
            [*(f"model-00000{n}-of-000002.safetensors" for n in range(2)), ".saving-x"],
            "2 shard files, .saving-x but",
        ),
    ],
)
async def test_what_was_not_committed_is_called_so(
    tmp_path: Path, names: list[str], said: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointNotFoundError, match="not committed: holds") as caught:
        await ainspect(tmp_path)
    assert said in str(caught.value)


# How it looks.


def drawn(view: RenderableType, width: int, *, colour: bool = False) -> str:
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Make a checkpoint of 2,000 tensors and 3 tables, with names that are too long."""
    names = [f"tower.layers.{n}.{'block.' * 12}weight" for n in range(2000)]
    tables: Mapping[str, TableData] = {
        name: data(range(100_000 * (name == "b") + 5), exp_avg=2) for name in ("a", "b", "t" * 150)
    }
    write_checkpoint(tmp_path, tables, {name: torch.ones(1) for name in names}, ranks=2)
    return tmp_path


@pytest.mark.parametrize("width", [80, 120])
async def test_long_names_lose_their_middle_and_numbers_nothing(large: Path, width: int) -> None:
    text = drawn(checkpoint_view(await inspect(large), everything=False), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert sum("weight" in line for line in text.splitlines()) == 20
    assert "and 1,980 more tensors; --all shows them" in text
    assert "100,005" in text
    assert text.count("ttt…ttt") == 1


async def test_everything_is_shown_on_request(large: Path) -> None:
    found = await inspect(large)
    text = drawn(checkpoint_view(found, everything=True), 1 << 14)
    assert "more" not in text
    assert all(table.name in text for table in found.tables)
    assert all(tensor.name in text for tensor in found.tensors)


def test_a_long_list_of_versions_loses_the_oldest() -> None:
    versions = tuple(
        VersionSummary(name=f"v{n:03}", committed=True, modified=n, bytes=n, latest=n == 99)
        for n in range(100)
    )
    run_ = RunSummary(location="run", latest="v099", versions=versions)
    text = drawn(run_view(run_, everything=False), 80)
    assert "v079" not in text
    listed = [line.strip() for line in text.splitlines() if line.strip().startswith("v0")]
    assert [line[:4] for line in listed] == [f"v{n:03}" for n in range(80, 100)]
    assert [line[:4] for line in listed if line.endswith("← latest")] == ["v099"]
    assert "and 80 older ones" in text
    assert "v000" in drawn(run_view(run_, everything=True), 80)


@pytest.mark.parametrize("colour", [False, True])
async def test_names_are_never_obeyed(tmp_path: Path, colour: bool) -> None:
    """A name with rich's markup, an emoji code or an escape sequence is shown as it is."""
    write_checkpoint(
        tmp_path, {name: data([1]) for name in ODD}, {name: torch.ones(1) for name in ODD}
    )
    text = drawn(checkpoint_view(await inspect(tmp_path), everything=False), 200, colour=colour)
    assert "\x1b[31mred" not in text
    for name in ("[bold]x[/]", "a\\nb", "\\x1b[31mred", "\N{ROCKET}\N{ROCKET}", ":smile:"):
        assert text.count(name) == 2
    for name in ('""', '" lead"', "\\u202e"):
        assert text.count(name) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain/name-1 2", "plain/name-1 2"),
        ("back\\slash", "back\\slash"),
        ("back\\slash\n", "back\\\\slash\\n"),
        ("é\N{ROCKET}漢", "é\N{ROCKET}漢"),
        ("\udcff", "\\udcff"),
        ("\u2028", "\\u2028"),
        ("", '""'),
        ("a ", '"a "'),
    ],
)
def test_a_name_is_shown_with_what_cannot_be_seen_escaped(name: str, text: str) -> None:
    assert shown(name) == text


@given(st.text(st.characters(codec=None)), st.integers(1, 30))
def test_a_name_that_was_cut_fits_and_keeps_its_ends(name: str, width: int) -> None:
    text = escaped(name)
    cut = middle_cut(text, width)
    assert text.isprintable()
    assert cell_len(cut) <= width
    head, _, tail = cut.rpartition("…") if cut != text else (text, "", "")
    assert text.startswith(head)
    assert text.endswith(tail)


# What goes wrong.


def nothing(_: Path) -> None:
    """Leave the folder empty."""


def no_folder(path: Path) -> None:
    path.rmdir()


def a_fifo(path: Path) -> None:
    path.rmdir()
    os.mkfifo(path)


def a_fifo_for_an_index(path: Path) -> None:
    os.mkfifo(path / "index")


def a_folder_for_an_index(path: Path) -> None:
    (path / "index").mkdir()


def a_loop_of_links(path: Path) -> None:
    path.rmdir()
    path.symlink_to(path)


def bad_json(path: Path) -> None:
    save(path)
    (path / "index").write_bytes(b'{"file_index":')


def a_truncated_shard(path: Path) -> None:
    write_checkpoint(path, {}, {"w": torch.ones(100)})
    truncate(path / shard_holding(path, "w^ "), by=8)


def a_missing_shard(path: Path) -> None:
    write_checkpoint(path, {}, {"w": torch.ones(100)})
    (path / shard_holding(path, "w^ ")).unlink()


def a_name_with_line_breaks(path: Path) -> None:
    write_ranks(path, [[dense_block("a\n\x1b[2Jb", torch.ones(3))]])
    truncate(next(path.glob("*.safetensors")), by=1)


BAD = [
    (nothing, "no finished checkpoint here"),
    (no_folder, "no such file or folder"),
    (a_fifo, "not a folder"),
    (a_fifo_for_an_index, "not a regular file"),
    (a_folder_for_an_index, "not a regular file"),
    (a_loop_of_links, "no finished checkpoint|Too many levels"),
    (bad_json, "index: is not JSON"),
    (a_truncated_shard, r"bytes \[.*\) are not there"),
    (a_missing_shard, "the file is missing"),
    (a_name_with_line_breaks, r"a\\\\n\\\\x1b\[2Jb|a\\n\\x1b\[2Jb"),
]


@pytest.mark.parametrize("arguments", [["inspect"], ["show", "w"], ["load"]])
@pytest.mark.parametrize(("spoil", "says"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_what_is_no_good_is_one_line_and_exit_code_2(
    tmp_path: Path,
    arguments: list[str],
    spoil: Callable[[Path], None],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    spoil(path)
    command, *others = arguments
    with nothing_left_behind():
        code = run_here([command, str(path), *others])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(f"asyncloader: {path}: ")
    assert err.count("\n") == 1
    assert err.removesuffix("\n").isprintable()
    if spoil is not a_name_with_line_breaks or command != "show":  # which has no 'w' to show
        assert_matches(err, says)


def assert_matches(text: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_a_run_folder_is_no_checkpoint_but_the_newest_in_it_is_named(
    a_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here(["load", str(a_run)]) == 2
    assert f"the newest is {a_run / '1'}\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect"], "Missing argument 'PATH'"),
        (["inspect", ""], "it is empty"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["inspect", "x", "--frob"], "No such option: --frob"),
        (["load", "x", "--parallel", "many"], "--parallel"),
        (["load", "x", "--parallel", "0"], "parallel must be positive, got 0"),
        (["load", "x", "--verify", "maybe"], "--verify"),
        (["show", "x", "w", "--id", str(2**64)], "--id"),
        (["inspect", "x" * 5000], "File name too long|no such file"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line_and_exit_code_2(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here(arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), err[:13]) == ("", 1, "asyncloader: ")
    assert_matches(err, says)


def test_a_path_that_is_not_utf_8_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\n")
    write_checkpoint(path, {}, {"w": torch.ones(1)})
    code, out, _ = run("inspect", path, "--json")
    assert (code, json.loads(out)["location"]) == (0, str(path))
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "\\udcff\\n" in out


def test_the_command_prints_what_was_found(a_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here(["inspect", str(a_run)]) == 0
    assert "3 versions, 2 committed" in capfd.readouterr().out
    assert run_here(["inspect", str(a_run / "1")]) == 0
    assert "RecIS checkpoint" in capfd.readouterr().out
    assert run_here(["inspect", str(a_run), "--json"]) == 0
    out, err = capfd.readouterr()
    assert ([one["name"] for one in json.loads(out)["versions"]], err) == (["1", "2", "3"], "")


def test_without_a_command_there_is_help(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert run_here(arguments) == 0
        out, err = capfd.readouterr()
        assert (out[:18], err) == ("Usage: asyncloader", "")
    assert run_here(["--version"]) == 0
    assert capfd.readouterr().out == f"asyncloader {__version__}\n"


def test_json_takes_any_name(capfd: pytest.CaptureFixture[str]) -> None:
    print_json({"a": (1, None), "\N{ROCKET}": True})
    assert json.loads(capfd.readouterr().out) == {"a": [1, None], "\N{ROCKET}": True}


# Processes.


def test_output_into_a_pipe_is_plain_and_whole(large: Path) -> None:
    code, out, err = run("inspect", large, "--all")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "…" not in out
    assert sum("weight" in line for line in out.splitlines()) == 2000


def test_help_says_what_the_exit_codes_mean() -> None:
    code, out, err = run("show", "--help")
    assert (code, err) == (0, "")
    assert "Examples:" in out
    assert "Exit codes: 0" in out
    assert max(map(len, out.splitlines())) <= 90


def test_whoever_stops_reading_ends_it_quietly(large: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncloader", "inspect", large, "--all"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    with process.stderr as err:
        assert err.read() == b""
    assert process.wait() == 141


def test_closed_streams_do_no_harm() -> None:
    """The event loop would take their numbers for its own files, and then die of it."""
    command = f'"{sys.executable}" -m asyncloader inspect "{GENUINE / "optim_slots"}" >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == 0


def test_the_package_does_not_import_what_only_the_command_line_needs() -> None:
    code = "import sys, asyncloader; print({'typer', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
