"""Whatever fails, and whenever the process dies: the old checkpoint whole, or none, or the new."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import HashTable, Loader, SaveError, Saver, gen_slice
from tests.folders import FAILURES, WatchedFolder, content, save_into, sites
from tests.forks import python
from tests.oracle import read_checkpoint
from tests.support import nothing_left_behind, open_files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
EIO, ENOSPC = 5, 28
# What a disk that is full refuses: names are changed and removed all the same.
TAKES_ROOM = ("write ", "create ", "make ")


def model(version: int) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    """Make a small model whose every value tells its version."""
    table = HashTable([4], name="t", block_size=16)
    table.add_slot("m", [2])
    ids = torch.arange(10 + version, dtype=torch.int64) * 7919
    table.insert(ids, torch.full((len(ids), 4), float(version)))
    return {"t": table}, {"w": torch.full((3,), float(version)), "b": torch.tensor(version)}


def save_old(path: Path) -> dict[str, bytes]:
    tables, tensors = model(1)
    Saver(path=path, hashtables=tables, tensors=tensors, parallel=2).save()
    return content(path)


async def save_new(path: Path, fault: Callable[[int, str], str | None]) -> WatchedFolder:
    tables, tensors = model(2)
    folder = WatchedFolder.at(path, fault)
    folder.give_up = broken
    await save_into(folder, tables, tensors, parallel=3)
    return folder


def is_version(path: Path, version: int) -> bool:
    """Say whether the folder holds this version, whole, as an independent reader sees it."""
    _, tensors = model(version)
    found_tables, found_tensors = read_checkpoint(path)
    return (
        len(found_tables["t"].ids) == 10 + version
        and bool((found_tables["t"].slots["embedding"] == version).all())
        and all(torch.equal(found_tensors[name], tensor) for name, tensor in tensors.items())
    )


def check_all_or_nothing(path: Path, old: Mapping[str, bytes]) -> str:
    """Fail unless the folder holds the old checkpoint bit for bit, none, or the new one whole."""
    found = content(path)
    if "index" not in found:
        return "none"
    if found == old:
        return "old"
    assert is_version(path, 2)
    return "new"


def check_next_save_heals(path: Path, *, leftovers: bool = False) -> None:
    """Whatever was left behind, the next save works and clears it away.

    But for what other ranks have staged, unless it is old: they might still be at it.
    """
    tables, tensors = model(3)
    Saver(path=path, hashtables=tables, tensors=tensors, parallel=2).save()
    assert is_version(path, 3)
    assert leftovers or not list(path.glob(".saving*"))
    fresh, _ = model(0)
    report = Loader(path, fresh, verify="require").load()
    assert report.bytes_verified == report.bytes_wanted


async def failure_of(saving: Awaitable[object]) -> SaveError | None:
    try:
        await saving
    except SaveError as error:
        return error
    return None


# On one loop only: how saves end on each of them is shown by the tests of cancellation.
@pytest.mark.parametrize("overwriting", [False, True])
@pytest.mark.parametrize("how", FAILURES)
def test_a_save_of_which_any_call_fails_leaves_the_old_checkpoint_or_none(
    tmp_path: Path, overwriting: bool, how: str, every_step: bool
) -> None:
    async def try_all() -> set[str]:
        path = tmp_path / "clean"
        if overwriting:
            save_old(path)
        calls = (await save_new(path, lambda *_: None)).calls
        outcomes = set()
        for number in sites(calls, every=every_step, share=overwriting, shares=2):
            path = tmp_path / str(number)
            old = save_old(path) if overwriting else {}
            with nothing_left_behind():
                failure = await failure_of(save_new(path, failing(number, how)))
            if failure is not None:
                assert isinstance(failure.__cause__, OSError)
                assert "I/O error" in str(failure)
            path.mkdir(exist_ok=True)  # it failed before it was made
            outcome = check_all_or_nothing(path, old)
            if failure is None:
                assert outcome == "new", calls[number]
            elif how != "for good":  # what failed once is undone
                assert outcome == ("old" if overwriting else "none"), calls[number]
                assert "what was there before is as it was" in str(failure)
            outcomes.add(outcome)
            check_next_save_heals(path)
            shutil.rmtree(path)
        return outcomes

    outcomes = asyncio.run(try_all())
    assert len(outcomes) == (3 if overwriting and how == "for good" else 2)


def fine(_number: int, _what: str) -> None:
    """Let every call be."""


def full_from(number: int, *, half: bool) -> Callable[[int, str], str | None]:
    """Have room for nothing more from a call on, or after half of it if it is a write."""

    def fault(at: int, what: str) -> str | None:
        if half and at == number and what.startswith("write "):
            return "half"
        if at >= number and what.startswith(TAKES_ROOM):
            raise OSError(ENOSPC, "No space left on device")
        return None

    return fault


@pytest.mark.parametrize("half", [False, True], ids=["nothing written", "half written"])
@pytest.mark.parametrize("overwriting", [False, True])
def test_a_disk_that_is_full_from_any_write_on_leaves_what_was_there(
    tmp_path: Path, *, overwriting: bool, half: bool, every_step: bool
) -> None:
    """And nothing of the save, so that the room is there for the next one."""

    async def try_all() -> int:
        clean = tmp_path / "clean"
        if overwriting:
            save_old(clean)
        calls = (await save_new(clean, fine)).calls
        chosen = sites(calls, every=every_step)
        numbers = [at for at in chosen if calls[at].startswith(TAKES_ROOM)]
        for number in numbers:
            path = tmp_path / str(number)
            old = save_old(path) if overwriting else {}
            with nothing_left_behind():
                failure = await failure_of(save_new(path, full_from(number, half=half)))
            assert "what was there before is as it was" in str(failure)
            path.mkdir(exist_ok=True)  # it failed before it was made
            assert content(path) == old
            assert not list(path.glob(".saving*"))
            check_next_save_heals(path)
        return len(numbers)

    assert asyncio.run(try_all()) > 8


def half_of_model(version: int, rank: int) -> dict[str, HashTable]:
    """Make the table of `model` as one of two ranks holds it."""
    whole = model(version)[0]["t"]
    part = gen_slice(rank, 2)
    mine = [row for row, id_ in enumerate(whole.ids().tolist()) if part.accepts(id_)]
    table = HashTable([4], name="t", block_size=16, slice=part)
    table.add_slot("m", [2])
    table.insert(whole.ids()[mine], whole.rows()[mine])
    return {"t": table}


async def save_rank(
    path: Path, rank: int, fault: Callable[[int, str], str | None]
) -> WatchedFolder:
    folder = WatchedFolder.at(path, fault)
    folder.give_up = broken
    tables, tensors = half_of_model(2, rank), model(2)[1] if rank == 0 else {}
    how = {"shard_index": rank, "shard_num": 2, "parallel": 2, "save_id": "x", "timeout": 0.05}
    await save_into(folder, tables, tensors, **how)
    return folder


async def save_ranks(path: Path, failing_rank: int, number: int, how: str) -> None:
    """Let rank 1 save, then rank 0, one of which fails; check what they leave."""
    old = save_old(path)
    failures = []
    with nothing_left_behind():
        for rank in (1, 0):
            fault = failing(number, how) if rank == failing_rank else fine
            failures.append(await failure_of(save_rank(path, rank, fault)))
    outcome = check_all_or_nothing(path, old)
    if failures[1] is None:
        assert (outcome, failures) == ("new", [None, None])
    elif how != "for good" or failing_rank == 1:
        assert outcome == "old"
    if failures[0] is not None:
        assert "rank 1 " in str(failures[1])  # it gave up, or never began
    check_next_save_heals(path, leftovers=True)
    shutil.rmtree(path)


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("how", FAILURES)
def test_a_save_of_two_ranks_of_which_any_call_fails_leaves_the_old_checkpoint_or_none(
    tmp_path: Path, failing_rank: int, how: str, every_step: bool
) -> None:
    async def try_all() -> None:
        save_old(tmp_path / "clean")
        calls = [(await save_rank(tmp_path / "clean", rank, fine)).calls for rank in (1, 0)]
        share = FAILURES.index(how)
        for number in sites(calls[1 - failing_rank], every=every_step, share=share, shares=3):
            await save_ranks(tmp_path / str(number), failing_rank, number, how)

    asyncio.run(try_all())


def failing(number: int, how: str) -> Callable[[int, str], str | None]:
    """Fail a call, before or after it took effect, or that call and all that follow it."""

    def fault(at: int, what: str) -> str | None:
        if at == number and "after" in how:
            return "after"
        if at == number or (at > number and how == "for good"):
            raise OSError(EIO, f"I/O error in {what}")
        return None

    return fault


def broken() -> None:
    raise OSError(EIO, "I/O error")


async def test_a_failed_commit_is_undone(tmp_path: Path) -> None:
    """One rename fails, in the middle of all: the old checkpoint is back, bit for bit."""
    old = save_old(tmp_path)

    def fail(_: int, what: str) -> None:
        if what == "move .saving-1-x/tensorkey.json tensorkey.json":
            raise OSError(EIO, "I/O error")

    tables, tensors = model(2)
    folder = WatchedFolder.at(tmp_path, fail)
    with pytest.raises(SaveError, match="what was there before is as it was"):
        await save_into(folder, tables, tensors, parallel=3, save_id="x")
    assert content(tmp_path) == old
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(old)


async def test_where_undoing_fails_too_the_error_says_where_the_files_are(tmp_path: Path) -> None:
    save_old(tmp_path)
    dead = False

    def fail(_: int, what: str) -> None:
        nonlocal dead
        dead = dead or what.startswith("move tensorkey.json")
        if dead:
            raise OSError(EIO, "I/O error")

    tables, tensors = model(2)
    with pytest.raises(SaveError, match=r"no checkpoint now.*\.saving-1-x") as caught:
        await save_into(WatchedFolder.at(tmp_path, fail), tables, tensors, save_id="x")
    assert isinstance(caught.value.__cause__, OSError)
    assert any("undoing it failed too" in note for note in caught.value.__cause__.__notes__)
    assert "index" not in content(tmp_path)
    assert "index" in content(tmp_path / ".saving-1-x" / "old")


def nothing_but_index(path: Path) -> list[str]:
    """Return what a crash after the first step has moved away."""
    return ["index"]


def all_of_it(path: Path) -> list[str]:
    """Return what a crash just before the last step has: the new files are there, but `index`."""
    return [entry.name for entry in path.iterdir() if entry.is_file()]


@pytest.mark.parametrize("moved", [nothing_but_index, all_of_it])
@pytest.mark.parametrize("save_id", ["x", "y"], ids=["the same save_id", "another"])
async def test_what_a_crash_has_moved_away_is_put_back_by_the_next_save_even_if_that_fails(
    tmp_path: Path, save_id: str, moved: Callable[[Path], list[str]]
) -> None:
    """Or a retry on a full disk would remove the only copy."""
    old = save_old(tmp_path)
    aside = tmp_path / ".saving-1-x" / "old"
    names = moved(tmp_path)
    aside.mkdir(parents=True)
    for name in names:
        (tmp_path / name).rename(aside / name)
    if len(names) > 1:
        (tmp_path / "tensorkey.json").write_bytes(b"the new one's")
        (tmp_path / "model-000000-of-000009.safetensors").write_bytes(b"the new one's")

    def fail(_: int, what: str) -> None:
        if what.startswith("create"):
            raise OSError(28, "No space left on device")

    tables, tensors = model(2)
    with pytest.raises(SaveError, match=r"No space left.*as it was"):
        await save_into(WatchedFolder.at(tmp_path, fail), tables, tensors, save_id=save_id)
    assert content(tmp_path) == old
    check_next_save_heals(tmp_path)


async def test_what_a_save_that_was_killed_before_it_cleaned_up_has_left_is_never_put_back(
    tmp_path: Path,
) -> None:
    """Not even if the next one is killed in its commit: it is older than what that one moved."""
    newer = save_old(tmp_path)
    aside = tmp_path / ".saving-1-a" / "old"
    tables, tensors = model(3)
    Saver(path=aside, hashtables=tables, tensors=tensors, parallel=2).save()

    def fail(_: int, what: str) -> None:
        if what.startswith("move .saving-1-b/tensorkey.json"):
            raise OSError(EIO, "I/O error")

    tables, tensors = model(2)
    with pytest.raises(SaveError, match="I/O error"):
        await save_into(WatchedFolder.at(tmp_path, fail), tables, tensors, save_id="b")
    assert content(tmp_path) == newer
    assert not aside.exists() or not list(aside.iterdir())


KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
import asyncio
from tests.test_save_faults import save_new, save_old

base = Path(sys.argv[1])


def child(path, number, half):
    folder = []

    def fault(at, what):
        if at == number:
            if half:
                if what.startswith("write"):
                    return "half"
                os._exit(77)  # nothing that could be done by half
            os.kill(os.getpid(), signal.SIGKILL)

    async def main():
        from tests.folders import WatchedFolder, save_into
        from tests.test_save_faults import model
        tables, tensors = model(2)
        watched = WatchedFolder.at(path, fault)
        watched.give_up = lambda: os.kill(os.getpid(), signal.SIGKILL)
        await save_into(watched, tables, tensors, parallel=3)

    asyncio.run(main())


results = []
for number in json.loads(sys.argv[2]):
    for half in (False, True):
        path = base / f"{number}-{half}"
        shutil.copytree(base / "old", path)
        pid = os.fork()
        if not pid:
            child(path, number, half)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 77:
            shutil.rmtree(path, ignore_errors=True)
            continue
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and os.WEXITSTATUS(status):
            raise SystemExit(f"call {number}: status {status}")
        results.append([path.name, killed])
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_saver_that_is_killed_at_any_call_leaves_the_old_checkpoint_or_none(
    tmp_path: Path, every_step: bool
) -> None:
    """Real processes, really killed: before each call, and in the middle of each write."""
    old = save_old(tmp_path / "old")
    save_old(tmp_path / "clean")
    calls = asyncio.run(save_new(tmp_path / "clean", fine)).calls
    numbers = [*sites(calls, every=every_step), len(calls)]  # at the last one it is not killed
    done = python("-c", KILLER, tmp_path, json.dumps(numbers))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    outcomes = []
    for name, killed in results:
        path = tmp_path / name
        path.mkdir(exist_ok=True)  # killed before it was made
        outcome = check_all_or_nothing(path, old)
        assert killed or outcome == "new"
        outcomes.append(outcome)
        check_next_save_heals(path)
    assert sum(killed for _, killed in results) > 25
    assert set(outcomes) == {"old", "none", "new"}


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    """ENOSPC at every write of the real thing: /dev/full takes nothing."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    full = tmp_path / ".saving-1-x"
    full.mkdir()
    (full / "model-000000-of-000002.safetensors").symlink_to("/dev/full")
    tables, tensors = model(1)
    with pytest.raises(SaveError, match="No space left"):
        Saver(path=tmp_path, hashtables=tables, tensors=tensors, parallel=2, save_id="x").save()
    assert content(tmp_path) == {}


def test_nothing_stays_open_after_a_save(tmp_path: Path) -> None:
    before = open_files()
    save_old(tmp_path / "a")
    assert open_files() == before
