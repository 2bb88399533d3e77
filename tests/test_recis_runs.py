"""When a checkpoint of a run is finished: a run of RecIS's own, and what can be wrong with it."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from asyncloader import (
    CheckpointNotFoundError,
    CheckpointSummary,
    RunSummary,
    inspect,
    latest,
)
from asyncloader._checkpoint.run_folder import newest_version
from asyncloader._storage.looks import Looks
from asyncloader.cli._run_view import run_view
from asyncloader.runs import versions
from tests.genuine import NAMES, NEWEST, RUN, copy_of_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader._storage.folder import Folder

OLDER = NAMES[0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copy_of_run(tmp_path)


def test_all_of_a_genuine_run_is_finished() -> None:
    assert latest(RUN) == RUN / NEWEST
    assert {(one.name, one.committed, one.lack) for one in versions(RUN)} == {
        (name, True, "") for name in NAMES
    }


@pytest.mark.parametrize(
    "text",
    [
        "ckpt_20\nckpt_30",
        "ckpt_20\nckpt_30\n\n\n",
        "ckpt_20\nckpt_30\n   \n",
        "ckpt_20\r\nckpt_30\r\n",
        "ckpt_20\nckpt_30\nckpt_30\n",
        "ckpt_20\nckpt_30\nckpt_4",
        "ckpt_20\nckpt_30\nckpt_40\n",
        "ckpt_30\n",
    ],
)
def test_the_list_may_be_half_written_doubled_or_blank(run: Path, text: str) -> None:
    (run / "checkpoint").write_text(text)
    assert latest(run) == run / NEWEST


@pytest.mark.parametrize("text", ["", "\n", "   \n", "ckpt_10\n"])
def test_without_a_line_that_counts_the_newest_index_does(run: Path, text: str) -> None:
    """Saving one name twice makes RecIS empty its list."""
    (run / "checkpoint").write_text(text)
    for when, name in enumerate((NEWEST, OLDER)):
        os.utime(run / name / "index", (when, when))
    assert latest(run) == run / OLDER


def test_half_of_the_last_line_is_not_taken_for_an_older_checkpoint(run: Path) -> None:
    shutil.copytree(run / OLDER, run / "ckpt_3")
    (run / "checkpoint").write_text("ckpt_3\nckpt_20\nckpt_3")  # of ckpt_30
    assert latest(run) == run / OLDER
    (run / "checkpoint").write_text("ckpt_3")  # as a user may write it, to go back
    assert latest(run) == run / "ckpt_3"


@dataclass(frozen=True)
class Change:
    """Writes to a file of a checkpoint; its text is the test's name."""

    name: str
    how: str
    content: Callable[[bytes], bytes]

    def __call__(self, path: Path) -> None:
        file = path / self.name
        file.write_bytes(self.content(file.read_bytes()))

    def __str__(self) -> str:
        return f"{self.how} {self.name}"


def cut(name: str, keep: float = 0.5) -> Change:
    return Change(name, f"{keep} of", lambda old: old[: int(len(old) * keep)])


def zeros(name: str) -> Change:
    return Change(name, "zeros in", lambda old: bytes(len(old)))


def text(name: str, content: str) -> Change:
    return Change(name, f"{content} in", lambda _: content.encode())


SHARD = "model-000002-of-000004.safetensors"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut("index"), "'index' is not written to its end"),
        (zeros("index"), "'index' is not written to its end"),
        (text("index", "[]"), "'index' is not a JSON object"),
        (cut("tensorkey.json", 0), "'tensorkey.json' is not written to its end"),
        (zeros("tensorkey.json"), "'tensorkey.json' is not written to its end"),
        (text("tensorkey.json", '{"a":}'), "'tensorkey.json' is not JSON"),
        (cut(SHARD), "the file ends at"),
        (cut("model.pt"), "'model.pt' is not written to its end"),
        (cut("model.pt", 0.99), "'model.pt' is not written to its end"),
        (cut("model.pt", 0), "'model.pt' is not written to its end"),
        (zeros("model.pt"), "'model.pt' is not written to its end"),
        (cut("extra.pt"), "'extra.pt' is not written to its end"),
    ],
    ids=str,
)
def test_a_checkpoint_of_which_a_file_is_short_is_passed_over(
    run: Path, change: Change, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(run / NEWEST)

    assert latest(run) == run / OLDER
    assert f"{NEWEST} is passed over" in caplog.text
    assert says in caplog.text
    [lack] = [one.lack for one in versions(run) if one.name == NEWEST]
    assert says in lack
    found = inspect(run)
    assert isinstance(found, RunSummary)
    assert (found.latest, {one.name: one.lack for one in found.versions}[NEWEST]) == (OLDER, lack)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(run_view(found, everything=True))
    assert "incomplete" in shown.get()
    assert lack[:40] in shown.get()


@pytest.mark.parametrize("name", [SHARD, "tensorkey.json"])
def test_a_checkpoint_of_which_a_file_is_missing_is_passed_over(run: Path, name: str) -> None:
    (run / NEWEST / name).unlink()
    assert latest(run) == run / OLDER
    assert [one.lack for one in versions(run) if one.name == NEWEST] == [f"{name!r} is missing"]


@pytest.mark.parametrize("name", ["io_state_0.pt", "io_state_count", "model.pt", "extra.pt"])
def test_files_that_need_not_be_there_are_not_waited_for(run: Path, name: str) -> None:
    """Other ranks than the first write the states of their data later than the list."""
    (run / NEWEST / name).unlink()
    assert latest(run) == run / NEWEST


def test_a_model_in_an_old_format_is_told_by_the_load(run: Path) -> None:
    (run / NEWEST / "model.pt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    assert latest(run) == run / NEWEST


def test_a_checkpoint_without_tables_is_finished(run: Path) -> None:
    """RecIS writes both files of names empty then, and the model is in `model.pt`."""
    for shard in (run / NEWEST).glob("*.safetensors"):
        shard.unlink()
    (run / NEWEST / "index").write_text('{"file_index": {}, "block_index": {}}')
    (run / NEWEST / "tensorkey.json").write_text("{}")
    assert latest(run) == run / NEWEST
    found = inspect(run / NEWEST)
    assert isinstance(found, CheckpointSummary)
    assert not found.tables


class Meanwhile(Looks):
    """Looks at a folder which changes after the first look at its list."""

    def __init__(self, folder: Path, change: Callable[[], object]) -> None:
        super().__init__(str(folder), stall_timeout=None)
        self._change = change
        self.reads = 0

    async def read(self, folder: Folder, name: str, *, last: int) -> bytes:
        found = await super().read(folder, name, last=last)
        self.reads += 1
        if self.reads == 1:
            await asyncio.to_thread(self._change)
        return found


async def test_a_checkpoint_that_is_removed_meanwhile_gives_way_to_the_newer_one(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RecIS lists the new checkpoint, then removes the old one, then its line."""
    (run / NEWEST).rename(run / ".later")
    (run / "checkpoint").write_text(f"{OLDER}\n")

    def save() -> None:
        (run / ".later").rename(run / NEWEST)
        shutil.rmtree(run / OLDER)
        (run / "checkpoint").write_text(f"{NEWEST}\n")

    with Meanwhile(run, save) as looks:
        assert await newest_version(looks, looks.folder(str(run)), finished=True) == NEWEST
    assert looks.reads == 3
    assert "'checkpoint' was written to meanwhile, looking again" in caplog.text


async def test_a_list_that_is_empty_for_a_moment_is_looked_at_again(run: Path) -> None:
    """It is written anew in place; what is not listed yet may lack its model."""
    under_way = shutil.copytree(run / NEWEST, run / "ckpt_40")
    (under_way / "model.pt").unlink()
    whole = (run / "checkpoint").read_text()
    (run / "checkpoint").write_text("")

    def write() -> None:
        (run / "checkpoint").write_text(whole)

    with Meanwhile(run, write) as looks:
        assert await newest_version(looks, looks.folder(str(run)), finished=True) == NEWEST


async def test_a_run_whose_checkpoints_are_all_gone_says_so(run: Path) -> None:
    def evict() -> None:
        for name in NAMES:
            shutil.rmtree(run / name)

    with (
        Meanwhile(run, evict) as looks,
        pytest.raises(CheckpointNotFoundError, match="no committed checkpoint here"),
    ):
        await newest_version(looks, looks.folder(str(run)), finished=True)
