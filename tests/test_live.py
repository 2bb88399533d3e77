"""A service's model: versions come in, are swapped, refused, taken back, and let go."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from asyncloader import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    Freed,
    HashTable,
    Live,
    LoadCancelled,
    Loader,
    LoadFailed,
    LoadFinished,
    LoadStarted,
    PlanError,
    RolledBack,
    Saver,
    Swapped,
    TruncatedShardError,
    VersionRefused,
    targets,
)
from asyncloader._memory.allocation import SPARE
from tests.live import Events, build, damage, live, looked, publish, serving, state, version_in
from tests.support import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from asyncloader import LoadPlan, Model

pytestmark = pytest.mark.both_loops


async def test_entering_waits_for_the_newest_version(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    events = Events()

    async with live(tmp_path, events) as it:
        assert serving(it) == 2
        assert it.current.version == "v2"
        assert it.current.location == str(tmp_path / "v2")
        assert [one.version for one in it.versions] == ["v2"]

    assert events.kinds() == ["LoadStarted v2", "LoadFinished v2", "Swapped v2", "Freed v2"]


async def test_a_new_version_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        publish(tmp_path, 2)

        swapped = await events.until(Swapped, version="v2")

        assert swapped.previous == "v1"
        assert serving(it) == 2
        freed = await events.until(Freed, version="v1")
        assert freed.nbytes > 0
        assert [one.version for one in it.versions] == ["v2"]


async def test_one_checkpoint_is_loaded_again_when_it_is_replaced(tmp_path: Path) -> None:
    path = publish(tmp_path, 1, name="same")
    events = Events()
    async with live(path, events) as it:
        assert serving(it) == 1
        publish(tmp_path, 2, name="same")
        await events.until(Freed)
        assert serving(it) == 2


async def test_a_module_is_built_and_loaded(tmp_path: Path) -> None:
    publish(tmp_path, 1)

    def module() -> torch.nn.Module:
        model = torch.nn.Module()
        model.tables = torch.nn.ModuleList([HashTable([4], name=name) for name in ("user", "item")])
        model.w = torch.nn.Parameter(torch.zeros(64), requires_grad=False)
        return model

    async with live(tmp_path, build=module) as it:
        assert serving(it) == 1
        with it.use() as model:
            assert model.module.get_parameter("w")[0] == 1

    async with live(tmp_path) as it:
        with it.use() as model, pytest.raises(AttributeError, match=r"not a torch\.nn\.Module"):
            _ = model.module


async def test_building_may_be_awaited(tmp_path: Path) -> None:
    publish(tmp_path, 1)

    async def awaited() -> object:
        await asyncio.sleep(0)
        return build()

    async with live(tmp_path, build=awaited) as it:
        assert serving(it) == 1


async def test_building_and_checking_run_on_a_thread(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    ran_on = []

    def note(_: object = None) -> object:
        ran_on.append(threading.current_thread())
        return build()

    async with live(tmp_path, build=note, check=lambda model: note(model) is not None):
        pass

    assert len(ran_on) == 2
    assert threading.main_thread() not in ran_on


async def test_what_is_pinned_stays_whole_until_it_is_let_go(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        with it.use() as old:
            publish(tmp_path, 2)
            await events.until(Swapped, version="v2")
            assert serving(it) == 2
            assert version_in(old) == 1
            states = [(one.version, one.users, one.serving) for one in it.versions]
            assert states == [("v1", 1, False), ("v2", 0, True)]
        await events.until(Freed, version="v1")
        with pytest.raises(RuntimeError, match=r"'v1' was let go.*`with live\.use\(\)`"):
            _ = old.tables
        assert "given back" in repr(old)


async def test_any_thread_may_use_it(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    async with live(tmp_path) as it:
        assert await asyncio.to_thread(serving, it) == 1


@pytest.mark.parametrize("how", ["before", "after"])
async def test_nobody_uses_it_outside_of_its_block(tmp_path: Path, how: str) -> None:
    publish(tmp_path, 1)
    it = live(tmp_path)
    if how == "after":
        async with it:
            pass
        with pytest.raises(RuntimeError, match="enter it once"):
            await it.__aenter__()
    for ask in (lambda: it.current, it.use().__enter__):
        with pytest.raises(RuntimeError, match=f"block was {'left' if how == 'after' else 'not'}"):
            ask()
    for act in (it.rollback, it.resume):
        with pytest.raises(RuntimeError, match="within its `async with` block"):
            await act()


async def test_a_failing_first_load_raises(tmp_path: Path) -> None:
    with nothing_left_behind():
        with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
            async with live(tmp_path):
                pass
        damage(publish(tmp_path, 1))
        events = Events()
        with pytest.raises(TruncatedShardError):
            async with live(tmp_path, events):
                pass
        assert events.kinds() == ["LoadStarted v1", "LoadFailed v1"]
        assert (await events.until(LoadFailed)).retry_in is None


async def test_a_corrupt_version_leaves_the_old_one_and_does_not_stop_the_next(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        damage(publish(tmp_path / "..", 2).rename(tmp_path / "v2"))
        failed = await events.until(LoadFailed, retry_in=None)
        assert isinstance(failed.error, TruncatedShardError)
        assert state(it).problem is failed
        assert serving(it) == 1
        publish(tmp_path, 3)
        await events.until(Swapped, version="v3")
        assert state(it).problem is None
    assert events.kinds().count("LoadStarted v2") == 1


@pytest.mark.parametrize("index_first", [True, False])
async def test_a_version_that_is_still_being_copied_serves_once_it_is_all_there(
    tmp_path: Path, index_first: bool
) -> None:
    """File by file, each a half first: it is tried and fails, but is not given up."""
    publish(tmp_path, 1)
    whole = publish(tmp_path / "..", 2)
    events = Events()
    async with live(tmp_path, events) as it:
        target = tmp_path / "v2"
        target.mkdir()
        read = [file for file in whole.iterdir() if not file.name.startswith("torch_rank")]
        for file in sorted(read, reverse=not index_first):
            for share in (2, 1):
                content = file.read_bytes()
                (target / file.name).write_bytes(content[: len(content) // share])
                if "index" in {one.name for one in target.iterdir()}:
                    events.seen.clear()
                    await events.either(LoadFailed, Swapped)
        await events.until(Swapped, version="v2")
        assert serving(it) == 2


async def test_a_version_that_was_given_up_is_tried_anew_when_its_files_change(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        staged = publish(tmp_path / "..", 2)
        shard = max(staged.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        content = shard.read_bytes()
        damage(staged)
        staged.rename(tmp_path / "v2")
        await events.until(LoadFailed, retry_in=None)
        (tmp_path / "v2" / shard.name).write_bytes(content)
        await events.until(Swapped, version="v2")
        assert serving(it) == 2


async def test_a_folder_of_shards_that_changes_during_a_load_is_loaded_again(
    tmp_path: Path,
) -> None:
    """Without digests nothing in it tells a mixture of two models."""

    def save(value: float, shard: str) -> None:
        save_file({shard: torch.full((4,), float(value))}, tmp_path / f"{shard}.safetensors")

    def check(model: Model) -> None:
        seen.append({*model.tensors["a"].tolist(), *model.tensors["b"].tolist()})
        if seen[-1] == {1.0, 2.0}:  # the second shard comes when the first one was loaded
            save(2, "b")

    seen: list[set[float]] = []
    served: list[set[float]] = []
    names = {name: f"{name}.safetensors" for name in ("a", "b")}
    weights = json.dumps({"metadata": {}, "weight_map": names})
    (tmp_path / "model.safetensors.index.json").write_text(weights)
    save(1, "a")
    save(1, "b")
    events = Events()
    async with live(
        tmp_path,
        events,
        lambda: ({}, {name: torch.zeros(4) for name in names}),
        check=check,
    ) as it:
        save(2, "a")
        await events.until(Swapped, previous=tmp_path.name)
        with it.use() as model:
            served.append({*model.tensors["a"].tolist(), *model.tensors["b"].tolist()})
    assert served == [{2.0}]
    assert {1.0, 2.0} in seen


async def test_a_version_that_is_chosen_while_it_is_written_to_is_loaded_when_it_stands_still(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        shard = next(publish(tmp_path, 2).glob("*.safetensors"))
        loading = asyncio.create_task(it.load("v2"))
        for _ in range(30):  # looks in between find other times of the last change
            os.utime(shard)
            await asyncio.sleep(0.002)
        assert (await loading).version == "v2"
        assert serving(it) == 2


async def test_what_was_copied_while_a_version_was_refused_is_tried(tmp_path: Path) -> None:
    """It is the old files that were given up, not those that came during the check."""
    publish(tmp_path, 1)
    whole = publish(tmp_path / "..", 7)
    events = Events()

    def check(model: Model) -> bool:
        if model.version == "v1" or model.tensors["w"][0] == 7:
            return True
        for file in whole.glob("*.safetensors"):
            (tmp_path / "v2" / file.name).write_bytes(file.read_bytes())
        return False

    async with live(tmp_path, events, check=check) as it:
        publish(tmp_path, 2)
        await events.until(VersionRefused)
        await events.until(Swapped, version="v2")
        with it.use() as model:
            assert version_in(model) == 7


async def test_a_shard_that_grows_under_another_name_is_waited_for(tmp_path: Path) -> None:
    """`rsync` writes to `.NAME.Xy12z9`; meanwhile the shards that have names stand still."""

    def save(value: float, name: str, file: Path) -> None:
        save_file({name: torch.full((4,), float(value))}, file)

    def both() -> set[float]:
        with it.use() as model:
            return {*model.tensors["a"].tolist(), *model.tensors["b"].tolist()}

    names = {name: f"{name}.safetensors" for name in ("a", "b")}
    for name, file in names.items():
        save(1, name, tmp_path / file)
    weights = json.dumps({"metadata": {}, "weight_map": names})
    (tmp_path / "model.safetensors.index.json").write_text(weights)
    events = Events()
    growing = tmp_path / ".b.safetensors.Xy12z9"
    async with live(tmp_path, events, lambda: ({}, {name: torch.zeros(4) for name in names})) as it:
        growing.touch()
        save(2, "a", tmp_path / names["a"])
        for _ in range(200):
            with growing.open("ab") as staged:
                staged.write(b"x")
            await asyncio.sleep(0.001)
        assert both() == {1.0}
        save(2, "b", growing)
        growing.rename(tmp_path / names["b"])
        await events.until(Swapped, previous=tmp_path.name)
        assert both() == {2.0}


async def test_a_version_that_the_list_has_last_is_the_newest_whatever_its_time(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    (tmp_path / "checkpoint").write_text("v1\nv2\n")
    events = Events()
    async with live(tmp_path, events) as it:
        publish(tmp_path, 3, when=0)  # as `cp -p` leaves it, from a machine whose clock is behind
        (tmp_path / "checkpoint").write_text("v1\nv2\nv3\n")
        await events.until(Swapped, version="v3")
        shutil.rmtree(tmp_path / "v3")
        await looked(it)
        assert serving(it) == 3


async def test_what_the_list_has_last_is_new_unless_it_served_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its time: `rsync -t` keeps that of a trainer whose clock is behind."""
    publish(tmp_path, 1)
    names = tmp_path / "checkpoint"
    names.write_text("v1\n")
    events = Events()
    async with live(tmp_path, events) as it, asyncio.timeout(20):
        publish(tmp_path, 2)
        names.write_text("v1\nv2\n")
        await events.until(Swapped, version="v2")
        names.write_text("v1\n")  # the operator takes the newest one off the list
        while not state(it).trouble:  # noqa: ASYNC110  # nobody tells us
            await asyncio.sleep(0)
        assert f"{tmp_path / 'v1'}: is the newest version that is there" in state(it).trouble
        assert serving(it) == 2
        publish(tmp_path, 3, when=1.5)
        names.write_text("v1\nv3\n")
        await events.until(Swapped, version="v3")
        assert not state(it).trouble
    assert caplog.text.count("is the newest version that is there") == 1


async def test_a_version_that_is_listed_again_is_in_nobodys_way(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    second = publish(tmp_path, 2)
    async with live(tmp_path) as it, asyncio.timeout(20):
        second.rename(tmp_path / ".v2")
        while not state(it).trouble:  # noqa: ASYNC110  # nobody tells us
            await asyncio.sleep(0)
        (tmp_path / ".v2").rename(second)
        while state(it).trouble:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert serving(it) == 2


async def test_an_older_version_never_serves_unasked_where_versions_are_links(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for number in (1, 2):
        store = tmp_path / f"store{number}"
        store.mkdir()
        (run / f"v{number}").symlink_to(publish(store, number))
    async with live(run) as it:
        (run / "v2").unlink()
        await looked(it)
        assert serving(it) == 2


async def test_a_link_that_is_the_source_may_lead_back_to_an_older_version(tmp_path: Path) -> None:
    """Somebody has asked for it."""
    for number in (1, 2):
        publish(tmp_path, number)
    (tmp_path / "current").symlink_to("v2")
    events = Events()
    async with live(tmp_path / "current", events) as it:
        (tmp_path / "next").symlink_to("v1")
        (tmp_path / "next").replace(tmp_path / "current")
        await events.until(Swapped, version="v1")
        assert serving(it) == 1


async def test_an_older_version_never_serves_unasked(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    events = Events()
    async with live(tmp_path, events) as it:
        shutil.rmtree(tmp_path / "v2")
        await looked(it)
        assert serving(it) == 2
        publish(tmp_path, 3)
        await events.until(Swapped, version="v3")
    assert events.kinds().count("LoadStarted v1") == 0


async def test_a_version_stays_where_it_was_found_though_the_link_to_the_run_leads_elsewhere(
    tmp_path: Path,
) -> None:
    runs = [tmp_path / "blue", tmp_path / "green"]
    for number, run in enumerate(runs, 1):
        run.mkdir()
        publish(run, number)
    link = tmp_path / "current"
    link.symlink_to(runs[0])
    events = Events()
    async with live(link, events) as it:
        other = tmp_path / "next"
        other.symlink_to(runs[1])
        other.replace(link)
        await events.until(Swapped, version="v2")
        back = await it.rollback()  # loaded again: keep is 1
        assert (back.version, back.location) == ("v1", str((runs[0] / "v1").resolve()))
        assert serving(it) == 1


@pytest.mark.parametrize(
    ("verdict", "passes"),
    [
        (None, True),
        (True, True),
        (np.True_, True),
        (torch.tensor(True), True),
        (1, True),
        (False, False),
        (np.False_, False),
        (torch.tensor(False), False),
        (torch.tensor([0.0]), False),
        (0, False),
    ],
)
async def test_a_check_says_no_by_anything_that_is_false(
    tmp_path: Path, verdict: object, passes: bool
) -> None:
    publish(tmp_path, 1)
    if passes:
        async with live(tmp_path, check=lambda _: verdict) as it:
            assert serving(it) == 1
    else:
        with pytest.raises(CheckpointError, match="check returned"):
            await live(tmp_path, check=lambda _: verdict).__aenter__()


@pytest.mark.parametrize("verdict", ["no", [], {}, object(), torch.ones(2), np.zeros(3)])
async def test_what_is_no_truth_value_is_an_error(tmp_path: Path, verdict: object) -> None:
    publish(tmp_path, 1)
    with nothing_left_behind(), pytest.raises(TypeError, match="neither true nor false"):
        await live(tmp_path, check=lambda _: verdict).__aenter__()


async def test_a_version_that_is_written_anew_is_tried_anew(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        damage(publish(tmp_path / "..", 2).rename(tmp_path / "same"))
        await events.until(LoadFailed)
        publish(tmp_path, 3, name="same")
        await events.until(Swapped, version="same")
        assert serving(it) == 3


class Flaky:
    """Builds, but fails a number of times before."""

    def __init__(self, *, good: int, failures: int) -> None:
        self.calls = 0
        self._good, self._failures = good, failures

    def __call__(self) -> object:
        self.calls += 1
        if self._good < self.calls <= self._good + self._failures:
            raise OSError(errno.EIO, "the disk has a bad day")
        return build()


async def test_a_fault_that_may_pass_is_tried_again_with_growing_pauses(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    flaky = Flaky(good=1, failures=4)
    async with live(tmp_path, events, flaky) as it:
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        assert serving(it) == 2
    failures = [event for event in events.seen if isinstance(event, LoadFailed)]
    assert [event.attempt for event in failures] == [1, 2, 3, 4]
    pauses = [event.retry_in for event in failures if event.retry_in is not None]
    assert [pause >= 0.01 * 2**number for number, pause in enumerate(pauses)] == [True] * 4
    starts = [event for event in events.seen if isinstance(event, LoadStarted)]
    assert [event.attempt for event in starts] == [1, 1, 2, 3, 4, 5]


async def test_a_newer_version_ends_the_tries_of_the_one_before(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    flaky = Flaky(good=1, failures=1)
    async with live(tmp_path, events, flaky, retry_pause=3600) as it:
        publish(tmp_path, 2)
        failed = await events.until(LoadFailed, version="v2")
        assert failed.retry_in is not None
        publish(tmp_path, 3)
        await events.until(Swapped, version="v3")
        assert serving(it) == 3


async def test_what_build_raises_is_told_and_not_tried_again(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    results: list[object] = [build(), 1, build()]
    async with live(tmp_path, events, partial(results.pop, 0)) as it:
        publish(tmp_path, 2)
        failed = await events.until(LoadFailed)
        assert isinstance(failed.error, TypeError)
        assert "(hashtables, tensors)" in str(failed.error)
        publish(tmp_path, 3)
        await events.until(Swapped, version="v3")
        assert serving(it) == 3


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_version_that_does_not_pass_the_check_does_not_serve(
    tmp_path: Path, *, awaited: bool
) -> None:
    publish(tmp_path, 1)
    events = Events()

    def check(model: Model) -> None:
        assert model.report.tables["user"].rows == 200
        if version_in(model) == 2:
            raise ValueError("scores have drifted")

    async def slowly(model: Model) -> None:
        await asyncio.sleep(0)
        check(model)

    async with live(tmp_path, events, check=slowly if awaited else check) as it:
        publish(tmp_path, 2)
        refused = await events.until(VersionRefused)
        assert "scores have drifted" in refused.reason
        assert isinstance(refused.error, ValueError)
        assert state(it).problem is refused
        publish(tmp_path, 3)
        await events.until(Swapped, version="v3")
    assert events.kinds().count("LoadStarted v2") == 1


async def test_a_refused_first_version_raises(tmp_path: Path) -> None:
    publish(tmp_path, 1)

    def check(model: Model) -> None:
        raise ValueError("no")

    with pytest.raises(CheckpointError, match="check raised ValueError: no") as caught:
        async with live(tmp_path, check=check):
            pass
    assert isinstance(caught.value.__cause__, ValueError)


async def test_back_to_the_version_before_and_on_again(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events, keep=2) as it:
        with pytest.raises(LookupError, match="no version served before 'v1'"):
            await it.rollback()
        assert state(it).following
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        loads = events.kinds().count("LoadStarted v1")

        back = await it.rollback()

        assert (back.version, serving(it)) == ("v1", 1)
        assert (await events.until(RolledBack)).previous == "v2"
        assert events.kinds().count("LoadStarted v1") == loads  # it was still in memory
        assert not state(it).following
        publish(tmp_path, 3)
        with pytest.raises(LookupError):  # v1 was the first
            await it.rollback()
        assert not state(it).following
        await it.resume()
        await events.until(Swapped, version="v3")
        assert serving(it) == 3


async def test_back_to_a_version_that_is_not_in_memory_loads_it_again(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        for version in (2, 3):
            publish(tmp_path, version)
            await events.until(Swapped, version=f"v{version}")
        assert (await it.rollback()).version == "v2"
        assert (await it.rollback()).version == "v1"
        assert serving(it) == 1
        events.seen.clear()
        await it.resume()
        await events.until(Swapped, version="v3")
        assert serving(it) == 3


async def test_back_to_a_version_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    first = publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        publish(tmp_path, 0, name="v1")
        with pytest.raises(CheckpointChangedError, match="has taken the place"):
            await it.rollback()
        first.rename(tmp_path / ".gone")
        with pytest.raises(CheckpointNotFoundError):
            await it.rollback()
        assert serving(it) == 2
        assert state(it).following


async def test_a_version_is_loaded_on_purpose(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    elsewhere = publish(tmp_path / "..", 9)
    async with live(tmp_path) as it:
        assert (await it.load("v1")).version == "v1"
        assert serving(it) == 1
        assert not state(it).following
        assert (await it.load(elsewhere)).location == str(elsewhere.resolve())
        assert serving(it) == 9
        assert (await it.rollback()).version == "v1"
        with pytest.raises(CheckpointNotFoundError, match="holds neither"):
            await it.load("v7")
        assert serving(it) == 1


class Gate:
    """A check that holds a version back until the test has seen it there."""

    def __init__(self, version: int) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()
        self._version = version

    async def __call__(self, model: Model) -> None:
        if version_in(model) == self._version:
            self.reached.set()
            await self.open.wait()


async def test_going_back_gives_up_the_load_that_is_under_way(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events, gate = Events(), Gate(3)
    async with live(tmp_path, events, keep=2, check=gate) as it:
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        publish(tmp_path, 3)
        await gate.reached.wait()
        assert state(it).loading == "v3"
        assert (await it.rollback()).version == "v1"
        assert serving(it) == 1
        await events.until(LoadCancelled, version="v3")
        assert state(it).loading is None
        assert serving(it) == 1
    assert "Swapped v3" not in events.kinds()


@pytest.mark.parametrize("purpose", [False, True])
async def test_leaving_ends_what_is_under_way(tmp_path: Path, *, purpose: bool) -> None:
    publish(tmp_path, 1)
    gate = Gate(2)
    loading = None
    with nothing_left_behind():
        async with live(tmp_path, check=gate) as it:
            path = publish(tmp_path / ".." if purpose else tmp_path, 2)
            if purpose:
                loading = asyncio.ensure_future(it.load(path))
            await gate.reached.wait()
        if loading is not None:
            with pytest.raises(RuntimeError, match="left meanwhile"):
                await loading


async def test_an_error_in_the_block_comes_out_as_it_is(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    with nothing_left_behind(), pytest.raises(KeyError, match="mine"):
        async with live(tmp_path):
            raise KeyError("mine")


async def test_what_is_pinned_when_the_block_is_left_stays_until_it_is_let_go(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    it = live(tmp_path)
    async with it:
        block = it.use()
        model = block.__enter__()
    assert version_in(model) == 1
    block.__exit__(None, None, None)
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="let go"):
        version_in(model)


async def test_a_version_that_would_not_fit_is_refused_before_it_takes_memory(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path) as it:
        size = it.current.nbytes
    assert 2 * 200 * 4 * 4 < size < 40_000

    most = 2 * size
    async with live(tmp_path, events, max_memory=most) as it:
        publish(tmp_path, 2)
        refused = await events.until(VersionRefused)
        assert "max_memory" in refused.reason
        assert serving(it) == 1
    assert events.kinds() == [
        *("LoadStarted v1", "LoadFinished v1", "Swapped v1"),
        *("LoadStarted v2", "VersionRefused v2", "Freed v1"),
    ]


async def test_a_version_that_nobody_uses_makes_room(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    async with live(tmp_path) as it:
        size = it.current.nbytes
    events = Events()
    most = 3 * size
    how: dict[str, Any] = {"max_memory": most, "keep": 3}
    async with live(tmp_path, events, **how) as it:
        with it.use():  # v1
            publish(tmp_path, 2)
            await events.until(Swapped, version="v2")
            publish(tmp_path, 3)
            await events.until(VersionRefused, version="v3")
            assert [one.version for one in it.versions] == ["v1", "v2"]
        publish(tmp_path, 4)
        await events.until(Swapped, version="v4")
        assert [one.version for one in it.versions] == ["v2", "v4"]


async def test_what_was_refused_for_memory_is_tried_again_when_some_is_free(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    async with live(tmp_path) as it:
        size = it.current.nbytes
    events = Events()
    most = 3 * size
    async with live(tmp_path, events, max_memory=most) as it:
        with it.use():  # v1
            publish(tmp_path, 2)
            await events.until(Swapped, version="v2")
            publish(tmp_path, 3)
            await events.until(VersionRefused, version="v3")
        await events.until(Swapped, version="v3")


async def test_progress_can_be_seen(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    states, told = [], []
    holder: list[Live] = []

    def listen(progress: object) -> None:
        told.append(progress)
        states.append(state(holder[0]))

    holder.append(live(tmp_path, loader_options={"progress": listen}))
    async with holder[0] as it:
        assert {one.loading for one in states} == {"v1"}
        assert [one.progress for one in states] == told
        assert state(it).loading is None
        assert state(it).progress is None
        assert state(it).nbytes == it.current.nbytes


async def test_what_on_event_raises_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, 1)

    def fail(event: object) -> None:
        raise ValueError("a listener")

    async with live(tmp_path, on_event=fail) as it:
        assert serving(it) == 1
    assert "on_event failed" in caplog.text


async def test_a_run_folder_that_is_gone_is_looked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    publish(run, 1)
    events = Events()
    async with live(run, events) as it:
        run.rename(tmp_path / "away")
        while "no run folder" not in caplog.text:  # noqa: ASYNC110  # nobody tells us
            await asyncio.sleep(0)
        assert "no run folder" in state(it).trouble
        assert serving(it) == 1
        publish(tmp_path / "away", 2)
        (tmp_path / "away").rename(run)
        await events.until(Swapped, version="v2")
    assert caplog.text.count("no run folder") == 1


async def test_events_read_as_sentences(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events, keep=2) as it:
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        await it.rollback()
    path = tmp_path / "v1"
    finished = next(event for event in events.seen if isinstance(event, LoadFinished))
    assert str(events.seen[0]) == f"{path}: loading"
    assert str(finished) == str(finished.report)
    assert f"{tmp_path / 'v2'}: serves in place of 'v1'" in map(str, events.seen)
    assert f"{path}: serves again, in place of 'v2'" in map(str, events.seen)
    assert any(str(event).startswith(f"{path}: gave back") for event in events.seen)


async def never_called(event: object) -> None:
    raise AssertionError


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"keep": 0}, ValueError, "keep must be positive, got 0"),
        ({"keep": 1.0}, TypeError, "keep must be an int"),
        ({"source": None}, TypeError, "source must be a path"),
        ({"on_event": never_called}, TypeError, "not awaited"),
        ({"loader_options": ["strict"]}, TypeError, "loader_options maps"),
        ({"loader_options": {"max_loop_lag": "5ms"}}, TypeError, "max_loop_lag is a number"),
        ({"poll": 0}, ValueError, "poll must be positive"),
        ({"retry_pause": -1}, ValueError, "retry_pause must be positive"),
        ({"max_memory": 0}, ValueError, "max_memory"),
        ({"check": 1}, TypeError, "check must be callable"),
        ({"on_event": 1}, TypeError, "on_event must be callable"),
        ({"build": None}, TypeError, "build must be callable"),
        ({"loader_options": {"tensors": {}}}, TypeError, "'tensors' is given by Live"),
        ({"loader_options": {"parallel": 0}}, ValueError, "parallel"),
        ({"loader_options": {"paralel": 1}}, TypeError, "paralel"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path, wrong: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Live(**{"source": tmp_path, "build": build, **wrong})


async def test_a_plan_can_be_refused_before_anything_is_written(tmp_path: Path) -> None:
    from asyncloader import Loader  # noqa: PLC0415

    path = publish(tmp_path, 1)
    tables, tensors = build()

    def refuse(plan: LoadPlan) -> None:
        assert plan.nbytes > 0
        raise MemoryError("too much")

    with pytest.raises(MemoryError, match="too much"):
        await Loader(path, tables, tensors, on_plan=refuse).aload()
    assert len(tables["user"]) == 0
    assert not tensors["w"].any()


async def test_a_version_that_lacks_something_does_not_serve(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()

    def more() -> object:
        tables, tensors = build()
        return tables, {**tensors, "bias": torch.empty(3)}

    with pytest.raises(PlanError, match="bias"):
        async with live(tmp_path, events, more):
            pass
    async with live(tmp_path, events, more, loader_options={"strict": False}) as it:
        assert it.current.version == "v1"


async def test_what_is_built_has_to_be_new(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    once = build()
    others = [once, once, (once[0], build()[1]), (build()[0], once[1])]
    async with live(tmp_path, events, partial(others.pop, 0)) as it:
        for version in (2, 3, 4):
            publish(tmp_path, version)
            failed = await events.until(LoadFailed, version=f"v{version}")
            assert isinstance(failed.error, TypeError)
            assert "make new ones" in str(failed.error)
            assert serving(it) == 1


async def test_a_check_may_say_no_by_false(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events, check=lambda model: version_in(model) != 2) as it:
        publish(tmp_path, 2)
        assert (await events.until(VersionRefused)).reason == "check returned False"
        assert serving(it) == 1
        assert state(it).problem is not None


async def test_commands_belong_to_the_loop_of_the_block(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    async with live(tmp_path) as it:
        with pytest.raises(RuntimeError, match="event loop that it was entered on"):
            await asyncio.to_thread(lambda: asyncio.run(it.rollback()))
        with pytest.raises(ValueError, match="version is empty"):
            await it.load("")


async def test_the_first_version_is_not_paced(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events, loader_options={"max_loop_lag": 0.005}):
        publish(tmp_path, 2)
        second = await events.until(LoadFinished, version="v2")
        assert second.report.lag is not None
    assert (await events.until(LoadFinished, version="v1")).report.lag is None


async def test_what_a_user_s_code_raises_is_logged_with_where_it_did(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, 1)

    def broken() -> object:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        async with live(tmp_path, build=broken):
            pass
    assert "raised by build()" in caplog.text
    assert "in broken" in caplog.text


class Watched(torch.Tensor):
    """Notes on which threads somebody looks at a tensor."""

    threads: ClassVar[set[int]] = set()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        cls.threads.add(threading.get_ident())
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


async def test_no_tensor_is_looked_at_on_the_event_loops_thread(tmp_path: Path) -> None:
    """There may be very many, and `max_loop_lag` knows nothing of what stands on the loop."""
    publish(tmp_path, 1)
    events = Events()

    def watched() -> object:
        tables, tensors = build()
        return tables, {name: one.as_subclass(Watched) for name, one in tensors.items()}

    Watched.threads.clear()
    async with live(tmp_path, events, watched, keep=2):
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        assert threading.get_ident() not in Watched.threads
        assert Watched.threads


async def test_a_report_as_text_does_not_walk_all_tensors(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    tables, tensors = build()
    report = await Loader(tmp_path / "v1", tables, tensors).aload()

    class Closed(dict[str, str]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError

        values = items = keys = __iter__  # type: ignore[assignment]

    assert report.filled == 1
    assert "1 tensor," in str(replace(report, tensors=Closed(report.tensors)))


async def test_memory_is_kept_for_the_next_version_as_long_as_it_is_followed(
    tmp_path: Path,
) -> None:
    """Where fresh memory is dear; how much is in `docs/serving.md`."""
    publish(tmp_path, 1)
    async with live(tmp_path) as it:
        assert not repr(SPARE).endswith(" of 0>")
        assert it.state.versions[0].nbytes <= int(repr(SPARE).split()[-1][:-1])
    assert repr(SPARE).endswith("<Spare: 0 bytes of 0>")
    async with live(tmp_path, max_memory=1 << 30, keep=1):
        assert 0 < int(repr(SPARE).split()[-1][:-1]) < 1 << 30


def test_a_module_is_no_function_that_builds_one(tmp_path: Path) -> None:
    """It can be called, and so would be."""
    with pytest.raises(TypeError, match="build is a function that makes a new model"):
        Live(tmp_path, torch.nn.Linear(1, 1))


async def test_a_class_builds_a_model(tmp_path: Path) -> None:
    class Ranker(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

    Saver.to(tmp_path / "run" / "v1", *targets(Ranker())).save()
    async with Live(tmp_path / "run", Ranker, poll=60) as it:
        with it.use() as model:
            assert isinstance(model.module, Ranker)
