"""Commands, failures and the end of a service, as they come in each other's way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import (
    CheckpointError,
    CheckpointNotFoundError,
    LoadCancelled,
    LoadFailed,
    LoadStarted,
    Swapped,
    VersionRefused,
)
from asyncloader._serving.following import may_pass
from asyncloader._threads.jobs import raising_first
from tests.live import Events, build, live, looked, publish, serving, state, version_in
from tests.support import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from asyncloader import Live, Model

pytestmark = pytest.mark.both_loops

SOON = 5.0


class Failing:
    """Builds; the second time it fails, and takes its time to wind up, deaf to cancellation."""

    def __init__(self) -> None:
        self.calls = 0
        self.winding_up, self.gate = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> object:
        self.calls += 1
        if self.calls != 2:
            return build()
        with raising_first():
            async with asyncio.TaskGroup() as group:
                group.create_task(self._wind_up())
                await asyncio.sleep(0)
                raise OSError(errno.EIO, "the disk has a bad day")

    async def _wind_up(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.winding_up.set()
            await self.gate.wait()


@pytest.mark.parametrize("what", ["load", "leave"])
async def test_nobody_waits_for_the_tries_of_a_load_that_was_cancelled_while_it_failed(
    tmp_path: Path, what: str
) -> None:
    """A task group that is failing already forgets that it was cancelled."""
    publish(tmp_path, 1)
    events, failing = Events(), Failing()
    it = await live(tmp_path, events, failing, retry_pause=3600).__aenter__()
    publish(tmp_path, 2)
    await failing.winding_up.wait()
    commands: dict[str, Callable[[], Awaitable[object]]] = {
        "load": partial(it.load, "v1"),  # serves already
        "leave": partial(it.__aexit__, None, None, None),
    }
    acting = asyncio.ensure_future(commands[what]())
    await asyncio.sleep(0)
    failing.gate.set()
    async with asyncio.timeout(SOON):
        await acting
        await it.__aexit__(None, None, None)
    starts = [event.version for event in events.seen if isinstance(event, LoadStarted)]
    assert starts == ["v1", "v2"]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, ""), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("a bug"), False),
        (ValueError(), False),
        (CheckpointError("here", "corrupt"), False),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception, *, passes: bool) -> None:
    assert may_pass(error) is passes


async def test_a_shard_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        staged = publish(tmp_path / "..", 2)
        shard = next(staged.glob("*.safetensors"))
        hidden = shard.rename(staged / "hidden")
        shard.symlink_to(shard.name)  # to itself
        staged.rename(tmp_path / "v2")
        failed = await events.until(LoadFailed)
        assert failed.retry_in is not None
        (tmp_path / "v2" / hidden.name).replace(tmp_path / "v2" / shard.name)
        await events.until(Swapped, version="v2")
        assert serving(it) == 2


async def test_a_version_that_is_withdrawn_is_not_tried_again(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    calls = 0

    def failing() -> object:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.EIO, "the disk has a bad day")
        return build()

    async with live(tmp_path, events, failing, retry_pause=0.001) as it:
        path = publish(tmp_path, 2)
        await events.until(LoadFailed)
        path.rename(tmp_path / ".v2")
        publish(tmp_path, 0, name="v0")
        while True:  # until two looks at the folder have found no reason to try
            seen = calls
            await looked(it)
            if calls == seen:
                break
        assert serving(it) == 1


class Held:
    """A check that holds a version back until it is told what to say."""

    def __init__(self, version: int, *, good: bool = True) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()
        self._version, self._good = version, good

    async def __call__(self, model: Model) -> None:
        if version_in(model) == self._version:
            self.reached.set()
            await self.open.wait()
            if not self._good:
                raise ValueError("no")


async def test_a_command_that_fails_does_not_undo_the_one_behind_it(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    elsewhere = publish(tmp_path / "..", 9)
    events, check = Events(), Held(9, good=False)
    async with live(tmp_path, events, keep=2, check=check) as it:
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        first = asyncio.ensure_future(it.load(elsewhere))
        await check.reached.wait()
        second = asyncio.ensure_future(it.rollback())
        await asyncio.sleep(0)
        check.open.set()
        with pytest.raises(CheckpointError, match="check raised ValueError: no"):
            await first
        assert (await second).version == "v1"
        events.seen.clear()
        publish(tmp_path, 3)
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert serving(it) == 1
        assert not state(it).following
        assert not events.seen


async def test_a_version_chosen_right_after_resuming_stays(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    async with live(tmp_path) as it:
        await it.load("v1")
        await it.resume()
        await it.load("v1")
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert serving(it) == 1


async def test_following_that_is_resumed_during_a_command_goes_on_after_it(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    events, check = Events(), Held(1)
    async with live(tmp_path, events, check=check) as it:
        loading = asyncio.ensure_future(it.load("v1"))
        await check.reached.wait()
        await it.resume()
        check.open.set()
        assert (await loading).version == "v1"
        events.seen.clear()
        await events.until(Swapped, version="v2")


async def test_leaving_begins_no_load_for_a_command(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    events = Events()
    with nothing_left_behind():
        async with live(tmp_path, events) as it:
            loading = asyncio.ensure_future(it.load("v1"))
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="within its `async with` block"):
            await loading
    assert "LoadStarted v1" not in events.kinds()


async def test_going_back_does_not_wait_for_what_cannot_be_interrupted(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    reached, gate = threading.Event(), threading.Event()

    def check(model: Model) -> None:
        if version_in(model) == 3:
            reached.set()
            gate.wait()

    async with live(tmp_path, events, keep=2, check=check) as it:
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        publish(tmp_path, 3)
        await asyncio.to_thread(reached.wait)
        assert (await it.rollback()).version == "v1"
        assert serving(it) == 1
        gate.set()
        await events.until(LoadCancelled, version="v3")
        assert serving(it) == 1
        assert not state(it).following


async def test_commands_wait_for_the_first_version(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    check = Held(2)
    at_once = most = 0

    async def building() -> object:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return build()

    it = live(tmp_path, build=building, check=check)
    entering = asyncio.ensure_future(it.__aenter__())
    await check.reached.wait()
    loading = asyncio.ensure_future(it.load("v1"))
    await asyncio.sleep(0)
    check.open.set()
    await entering
    assert (await loading).version == "v1"
    assert most == 1
    await it.__aexit__(None, None, None)


async def test_entering_that_is_cancelled_at_once_leaves_nothing_behind(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    with nothing_left_behind():
        entering = asyncio.create_task(live(tmp_path).__aenter__())
        await asyncio.sleep(0)  # it starts its threads
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering


async def test_entering_that_is_cancelled_twice_leaves_nothing_behind(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    check = Held(1)
    with nothing_left_behind():
        entering = asyncio.ensure_future(live(tmp_path, check=check).__aenter__())
        await check.reached.wait()
        for _ in range(3):
            entering.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([entering])
        assert entering.cancelled()


async def test_what_could_never_fit_makes_nobody_go(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    options = {"strict": False}  # of what is asked for, not all is there
    async with live(tmp_path) as it:
        size = it.current.nbytes
    events = Events()
    sizes = [64, 64, 1 << 20]

    def growing() -> object:
        tables, _ = build()
        return tables, {"w": torch.zeros(64), "more": torch.empty(sizes.pop(0))}

    most = 5 * size
    how = {"loader_options": options, "max_memory": most, "keep": 3}
    async with live(tmp_path, events, growing, **how) as it:
        for version in (2, 3):
            publish(tmp_path, version)
            await events.until(Swapped if version == 2 else VersionRefused, version=f"v{version}")
        assert [one.version for one in it.versions] == ["v1", "v2"]


async def test_a_refused_version_is_not_kept_alive_by_what_refused_it(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    tables: list[weakref.ref[object]] = []

    async def check(model: Model) -> None:
        if version_in(model) == 2:
            async with asyncio.TaskGroup() as group:
                group.create_task(refuse(model.tables["user"]))

    async def refuse(table: object) -> None:
        tables.append(weakref.ref(table))
        raise ValueError("no")

    async with live(tmp_path, events, check=check) as it:
        publish(tmp_path, 2)
        refused = await events.until(VersionRefused)
        await it.resume()
        publish(tmp_path, 3)
        await events.until(Swapped, version="v3")
        gc.collect()
        assert isinstance(refused.error, ExceptionGroup)
        assert [table() for table in tables] == [None]


async def test_a_check_that_cancels_itself_refuses(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()

    async def check(model: Model) -> None:
        if version_in(model) == 2:
            raise asyncio.CancelledError

    async with live(tmp_path, events, check=check) as it:
        publish(tmp_path, 2)
        assert "was cancelled" in (await events.until(VersionRefused)).reason
        assert serving(it) == 1


async def test_a_name_that_is_wrong_gives_no_load_up(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events, check = Events(), Held(2)
    async with live(tmp_path, events, check=check) as it:
        publish(tmp_path, 2)
        await check.reached.wait()
        with pytest.raises(CheckpointError):
            await it.load("v7")
        check.open.set()
        await events.until(Swapped, version="v2")


class Remembers:
    """Builds, and knows which tables are still in memory."""

    def __init__(self) -> None:
        self._tables: list[weakref.ref[object]] = []

    def __call__(self) -> object:
        tables, tensors = build()
        self._tables.append(weakref.ref(tables["user"]))
        return tables, tensors

    def alive(self) -> list[bool]:
        gc.collect()
        return [table() is not None for table in self._tables]


async def test_a_version_that_was_given_up_at_its_last_look_gives_its_memory_back(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    events, remembers = Events(), Remembers()
    loop = asyncio.get_running_loop()

    async def check(model: Model) -> None:
        if version_in(model) == 3:
            loop.call_soon(go_back)  # the check is over then, and a thread looks at the files

    def go_back() -> None:
        with contextlib.suppress(StopIteration):  # at once: what it goes back to is in memory
            it.rollback().send(None)

    async with live(tmp_path, events, remembers, keep=2, check=check) as it:
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        publish(tmp_path, 3)
        async with asyncio.timeout(SOON):
            await events.until(LoadCancelled, version="v3")
        await looked_without_following(it)
        assert serving(it) == 1
        assert remembers.alive() == [True, True, False]


async def looked_without_following(it: Live) -> None:
    """Have whoever was cancelled come to an end."""
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert not state(it).following


async def test_a_version_whose_last_look_fails_gives_its_memory_back(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events, remembers = Events(), Remembers()

    def check(model: Model) -> None:
        if version_in(model) == 2:
            (tmp_path / "v2").rename(tmp_path / ".gone")

    async with live(tmp_path, events, remembers, check=check, retry_pause=3600) as it:
        publish(tmp_path, 2)
        failed = await events.until(LoadFailed, version="v2")
        assert isinstance(failed.error, CheckpointNotFoundError)
        await looked(it)
        assert remembers.alive() == [True, False]
        assert serving(it) == 1


async def test_building_that_cancels_itself_fails_once(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    calls = 0

    async def builds() -> object:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise asyncio.CancelledError
        return build()

    async with live(tmp_path, events, builds) as it, asyncio.timeout(SOON):
        publish(tmp_path, 2)
        failed = await events.until(LoadFailed, version="v2")
        assert failed.retry_in is None
        assert state(it).problem is failed
        with pytest.raises(RuntimeError, match=r"build\(\) was cancelled by something of its own"):
            await it.load("v2")
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert calls == 3
