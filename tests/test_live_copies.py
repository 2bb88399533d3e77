"""Versions that are still being written to: what is waited for, for how long, and who ends that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from asyncloader import CheckpointError, Live, LoadStarted, Saver, Swapped
from asyncloader._serving.source import Rest, candidate
from asyncloader._storage.looks import Looks
from tests.live import Events, build, live, looked, publish, serving, state
from tests.support import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from asyncloader._serving.source import Candidate

pytestmark = pytest.mark.both_loops

SOON = 20.0
SLOWLY = 0.3
"""A `poll` of seconds, and so the time for which files have to stay as they are."""


@contextlib.asynccontextmanager
async def growing(path: Path) -> AsyncIterator[None]:
    """Write to a version, as `rsync` does, all the time."""
    file = path / ".model.safetensors.Xy12z9"

    async def write() -> None:
        while True:
            with file.open("ab") as staged:
                staged.write(b"x")
            await asyncio.sleep(0.02)

    writing = asyncio.create_task(write())
    await asyncio.sleep(0)
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.wait([writing])
        file.unlink(missing_ok=True)


async def waits_or_loads(it: Live, events: Events, version: str) -> str:
    """Return what is in the way of a version, once something is; nothing if it is loaded."""
    async with asyncio.timeout(SOON):
        while not (trouble := state(it).trouble):
            if f"LoadStarted {version}" in events.kinds():
                return ""
            await asyncio.sleep(0.001)
    return trouble


def loads(events: Events) -> int:
    return sum(isinstance(event, LoadStarted) for event in events.seen)


def copied(source: Path, target: Path) -> Callable[[], object]:
    """Copy a checkpoint but for its last shard; return what copies that."""
    target.mkdir(exist_ok=True)
    *files, last = sorted(source.iterdir(), key=lambda file: (file.suffix, file.name))
    assert last.suffix == ".safetensors"
    for file in files:
        shutil.copy(file, target / file.name)
    return lambda: shutil.copy(last, target / last.name)


async def test_digests_do_not_make_a_version_that_is_written_to_one_at_rest(
    tmp_path: Path,
) -> None:
    """Of a sliced table, few of them are compared; and they may be those of another checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    publish(run, 1)
    tables, tensors = build()
    await Saver.to(tmp_path / "v2", tables, tensors).asave()
    assert (tmp_path / "v2" / "asyncloader.json").exists()
    events = Events()
    async with live(run, events, poll=SLOWLY) as it, growing((tmp_path / "v2").rename(run / "v2")):
        assert ".model.safetensors.Xy12z9" in await waits_or_loads(it, events, "v2")
        assert "LoadStarted v2" not in events.kinds()


async def test_a_command_does_not_shorten_the_time_between_two_looks(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    events = Events()
    async with live(tmp_path, events, poll=SLOWLY, keep=2) as it:
        await it.load("v1")
        events.seen.clear()
        async with growing(tmp_path / "v2"):
            loading = asyncio.ensure_future(it.load("v2"))
            publish(tmp_path, 3, name="v2")
            assert await waits_or_loads(it, events, "v2")
            assert "LoadStarted v2" not in events.kinds()
        async with asyncio.timeout(SOON):
            assert (await loading).version == "v2"


async def test_what_comes_after_a_copy_has_stalled_is_taken_in(tmp_path: Path) -> None:
    """Until then the version that serves is a mixture: nothing in it told so."""
    path = publish(tmp_path, 1, name="same")
    whole = publish(tmp_path / "..", 2)
    events = Events()
    async with live(path, events, keep=2) as it, asyncio.timeout(SOON):
        copy_last = copied(whole, path)
        await events.until(Swapped, previous="same")
        events.seen.clear()
        copy_last()
        await events.until(Swapped, previous="same")
        assert serving(it) == 2
        begun = loads(events)
        await looked(it)
        assert loads(events) == begun
        assert len(it.versions) == 2  # the mixture has no place beside the version before it
        await it.rollback()
        assert serving(it) == 1


async def test_a_version_that_is_loaded_again_serves_though_the_mixture_is_still_used(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    path = publish(tmp_path, 2)
    shard = next(path.glob("*.safetensors"))
    whole = shard.read_bytes()
    shutil.copy(publish(tmp_path / "..", 9) / shard.name, shard)
    events = Events()
    async with live(tmp_path, events) as it, asyncio.timeout(SOON):
        with it.use() as mixture:
            await it.load("v1")
            with it.use():
                shard.write_bytes(whole)
                await it.resume()
                await events.until(Swapped, previous="v1")
                assert serving(it) == 2
                assert [one.version for one in it.versions] == ["v2", "v1", "v2"]
            assert mixture.version == "v2"
        await looked(it)
        assert serving(it) == 2
        assert [one.version for one in it.versions] == ["v2"]


async def test_files_that_are_removed_from_what_serves_are_no_news(tmp_path: Path) -> None:
    files = {name: tmp_path / "v2" / f"{name}.safetensors" for name in ("a", "b")}
    files["a"].parent.mkdir()
    for name, file in files.items():
        save_file({name: torch.ones(4)}, file)
    weights = {"metadata": {}, "weight_map": {name: file.name for name, file in files.items()}}
    (tmp_path / "v2" / "model.safetensors.index.json").write_text(json.dumps(weights))
    events = Events()

    def fresh() -> object:
        return {}, {name: torch.zeros(4) for name in files}

    async with live(tmp_path / "v2", events, fresh) as it:
        files["a"].unlink()
        await looked(it)
        shutil.rmtree(tmp_path / "v2")
        await looked(it)
        assert it.current.version == "v2"
    assert loads(events) == 1


async def test_a_shard_that_is_replaced_is_news_where_the_source_is_a_weight_map(
    tmp_path: Path,
) -> None:
    weights = {"metadata": {}, "weight_map": {"a": "a.safetensors"}}
    source = tmp_path / "model.safetensors.index.json"
    source.write_text(json.dumps(weights))
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    events = Events()
    async with live(source, events, lambda: ({}, {"a": torch.zeros(4)})) as it:
        save_file({"a": torch.full((4,), 2.0)}, tmp_path / "a.safetensors")
        async with asyncio.timeout(SOON):
            await events.until(Swapped, previous=source.name)
        with it.use() as model:
            assert set(model.tensors["a"].tolist()) == {2.0}


async def test_it_is_the_process_s_own_clock_that_says_for_how_long_files_were_as_they_are(
    tmp_path: Path,
) -> None:
    """A file server's clock may be an hour behind: its files look old that were written now."""
    path = publish(tmp_path, 1)
    for file in path.iterdir():
        os.utime(file, (1, 1))
    now, looks = 0.0, 0
    disk = Looks(str(path), stall_timeout=60)

    async def look() -> Candidate:
        nonlocal now, looks
        looks += 1
        if looks == 3:
            os.utime(path / "index", (2, 2))
        if looks > 5:
            now = 1.0
        return await candidate(disk, str(path))

    rest = Rest(0.001, note=lambda *_: None, clock=lambda: now)
    assert (await rest.reached(look)).location == str(path)
    assert looks > 5
    seen, looks = looks, 10
    await rest.reached(look)
    assert looks == 11, f"known to be at rest, and looked at as often as {seen} times"


async def test_going_back_does_not_wait_for_a_copy_that_somebody_wants(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events, poll=SLOWLY, keep=2) as it, asyncio.timeout(SOON):
        publish(tmp_path, 2)
        await events.until(Swapped, version="v2")
        path = publish(tmp_path, 0)
        async with growing(path):
            loading = asyncio.ensure_future(it.load("v0"))
            await waits_or_loads(it, events, "v0")
            assert (await it.rollback()).version == "v1"
            assert serving(it) == 1
            with pytest.raises(CheckpointError, match="another command came"):
                await loading
        assert serving(it) == 1
        assert not state(it).following
        assert not state(it).trouble


@pytest.mark.parametrize("other", ["load", "resume"])
async def test_the_next_command_takes_the_place_of_one_that_waits(
    tmp_path: Path, other: str
) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    events = Events()
    async with live(tmp_path, events, poll=SLOWLY) as it, asyncio.timeout(SOON):
        path = publish(tmp_path, 0)
        async with growing(path):
            loading = asyncio.ensure_future(it.load("v0"))
            await waits_or_loads(it, events, "v0")
            await (it.load("v1") if other == "load" else it.resume())
            with pytest.raises(CheckpointError, match="another command came"):
                await loading
        assert serving(it) == (1 if other == "load" else 2)


async def test_leaving_ends_the_wait_for_a_copy(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    with nothing_left_behind():
        async with live(tmp_path, events, poll=SLOWLY) as it:
            path = publish(tmp_path, 0)
            async with growing(path):
                loading = asyncio.ensure_future(it.load("v0"))
                await waits_or_loads(it, events, "v0")
                await it.__aexit__(None, None, None)
                with pytest.raises(RuntimeError, match="within its `async with` block"):
                    await loading


async def test_entering_says_what_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = publish(tmp_path, 1)
    events = Events()
    it = live(tmp_path, events, poll=SLOWLY)
    async with growing(path):
        entering = asyncio.ensure_future(it.__aenter__())
        trouble = await waits_or_loads(it, events, "v1")
        assert str(path) in trouble
        assert "'.model.safetensors.Xy12z9'" in trouble
        assert not entering.done()
    async with asyncio.timeout(SOON):
        await entering
    assert serving(it) == 1
    assert not state(it).trouble
    await it.__aexit__(None, None, None)
    assert caplog.text.count("is being written to") == 1


async def test_a_version_that_never_stands_still_does_not_keep_newer_ones_from_serving(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events, poll=SLOWLY) as it, asyncio.timeout(SOON):
        async with growing(publish(tmp_path, 2)):
            await waits_or_loads(it, events, "v2")
            publish(tmp_path, 3)
            await events.until(Swapped, version="v3")
            assert serving(it) == 3
        assert "LoadStarted v2" not in events.kinds()
        assert not state(it).trouble
