"""Whoever loads while somebody saves has one version, or is told to look again."""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import CheckpointChangedError, HashTable, Loader, Runtime
from tests.storages import Through
from tests.versions import WIDE, Finder, Savers, save, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEMORY = Path("/dev/shm")  # noqa: S108  # folders of our own within it


@pytest.fixture
def base() -> Iterator[Path]:
    """Make a folder, in memory where there is such: the less is waited for, the more meets."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.exists() else None) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_load_beside_a_saving_process_is_of_one_version(
    base: Path, request: pytest.FixtureRequest
) -> None:
    """In a run folder whose old versions are removed, and again and again in the same folder."""
    finders = [Finder(base, in_run=in_run) for in_run in (True, False)]
    with Savers(base) as savers:
        end = math.inf
        while time.monotonic() < end or not all(len({*one.versions}) > 2 for one in finders):
            assert savers.alive
            for finder in finders:
                finder.look()
            if end == math.inf and finders[0].versions:
                end = time.monotonic() + request.config.getoption("soak_seconds")

    for finder in finders:
        finder.look()
        assert finder.versions == sorted(finder.versions)


@dataclass
class SavedMeanwhile(Through):
    """Has another version saved the first time that a file is wanted."""

    name: str
    save: Callable[[], None]
    saved: asyncio.Event

    async def size(self, name: str, /) -> int:
        if name.startswith(self.name) and not self.saved.is_set():
            self.saved.set()
            await asyncio.to_thread(self.save)
        return await super().size(name)


@pytest.mark.parametrize(
    "name",
    [
        "index",
        "tensorkey.json",
        "asyncloader.json",
        "model-000000-",
        "model-000001-",
    ],
)
async def test_a_checkpoint_that_is_replaced_before_any_of_its_files_is_read_is_loaded_again(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path, 1)
    table = HashTable([4], name="t")
    tensors = {key: torch.zeros(WIDE) for key in ("w", "v")}
    saving = partial(save, tmp_path, 6)
    wrap = partial(SavedMeanwhile, name=name, save=saving, saved=asyncio.Event())
    async with Runtime(wrap_storage=wrap) as runtime:
        loader = Loader(tmp_path, {"t": table}, tensors, strict=True, runtime=runtime)
        if name != "index":
            with pytest.raises(CheckpointChangedError):
                await loader.aload()
            assert not len(table)

        await loader.aload()

    assert version_of(table, tensors) == 6
