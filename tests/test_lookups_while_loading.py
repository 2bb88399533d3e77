"""A table that is being loaded into serves lookups, each from one version of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import anyio.lowlevel
import pytest
import torch

from asyncloader import HashTable, Loader
from tests.oracle import TableData, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

# Enough for an index of several parts, so that kernels share the work.
ROWS = 70_000
VERSIONS = 3
OTHERS = 50


def ids() -> Tensor:
    """Return the ids of every version."""
    return torch.arange(ROWS) * 7919 - 10**9


def other_ids() -> Tensor:
    """Return ids that come and go."""
    return torch.arange(OTHERS) * 2 + 10**15


def rows(version: int, count: int = ROWS) -> Tensor:
    return torch.full((count, 4), float(version))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write one for each version; each row of it holds the version's number."""
    folders = [tmp_path_factory.mktemp(f"version{number}") for number in range(VERSIONS)]
    for version, folder in enumerate(folders):
        step = torch.full((ROWS,), version)
        data = TableData(ids=ids(), slots={"embedding": rows(version), "step": step})
        write_checkpoint(folder, {"t": data}, {}, ranks=2, shuffle_seed=version)
    return folders


@pytest.fixture
def table(checkpoints: list[Path]) -> HashTable:
    """Return a table that holds version 0."""
    table = HashTable([4], name="t")
    table.add_slot("step", [], torch.int64)
    Loader(checkpoints[0], {"t": table}).load()
    return table


def version_of(found: Tensor) -> float:
    """Return the version of which a lookup's rows all are."""
    version = found.flatten()[0].item()
    assert (found == version).all(), f"rows of versions {set(found.flatten().tolist())} at once"
    return version


class Looker:
    """Looks all ids up, over and over, on a thread of its own."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._stop = threading.Event()
        self._looked = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._work = self._pool.submit(self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._work.result()

    def await_lookup(self) -> None:
        """Wait until a lookup that began after this call is done."""
        for _ in range(2):  # the first may have begun before
            self._looked.clear()
            while not self._looked.wait(0.1):
                if self._work.done():
                    self._work.result()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._looked.set()


@pytest.mark.slow
def test_a_thread_sees_one_version_at_a_time_while_loads_go_on(
    table: HashTable, checkpoints: list[Path]
) -> None:
    loaders = [Loader(path, {"t": table}, chunk_bytes=1 << 18) for path in checkpoints]
    wanted = ids()[torch.randperm(ROWS)]
    seen: set[float] = set()

    def look() -> None:
        seen.add(version_of(table(wanted)))
        seen.add(version_of(table.lookup(wanted[:100], "step")))
        found = table.ids()
        assert len(found) == ROWS
        assert table.contains(wanted[:1000]).all()

    with Looker(look) as looker:
        for turn in range(1, 16):
            report = loaders[turn % VERSIONS].load()
            assert (report.tables["t"].new, report.tables["t"].replaced) == (0, ROWS)
            looker.await_lookup()
    assert seen == set(range(VERSIONS))
    assert version_of(table.rows()) == 15 % VERSIONS


def test_a_thread_sees_ids_come_and_go_as_a_whole_while_loads_go_on(
    table: HashTable, checkpoints: list[Path]
) -> None:
    loaders = [Loader(path, {"t": table}) for path in checkpoints]
    wanted = torch.cat([other_ids(), ids()[::70]])
    seen: set[float] = set()

    def look() -> None:
        found = table(wanted)
        version_of(found[OTHERS:])
        seen.add(version_of(found[:OTHERS]))

    with Looker(look) as looker:
        for turn in range(1, 9):
            table.insert(other_ids(), rows(turn, OTHERS))
            looker.await_lookup()
            loaders[turn % VERSIONS].load()
            if turn % 2:
                assert table.delete(other_ids()) == OTHERS
                looker.await_lookup()
            if turn % 4 == 0:
                table.reserve(ROWS + turn)
                table.add_slot(f"slot {turn}", [2], initializer=float(turn))
    assert {0, 1, 3, 5, 7} <= seen
    assert len(table) == ROWS + OTHERS
    assert version_of(table.rows("slot 4")) == 4


def test_each_of_several_threads_sees_one_version_at_a_time(
    table: HashTable, checkpoints: list[Path]
) -> None:
    loaders = [Loader(path, {"t": table}) for path in checkpoints]
    wanted = ids()[::7]

    def look() -> None:
        version_of(table(wanted))

    with Looker(look) as one, Looker(look) as other:
        for turn in range(1, 6):
            loaders[turn % VERSIONS].load()
            one.await_lookup()
            other.await_lookup()


async def test_a_coroutine_sees_one_version_at_a_time_while_a_load_goes_on(
    table: HashTable, checkpoints: list[Path]
) -> None:
    loaders = [Loader(path, {"t": table}, chunk_bytes=1 << 18) for path in checkpoints]
    wanted = ids()[::700]
    loading = True
    during = 0

    async def load() -> None:
        nonlocal loading
        for turn in range(1, 5):
            await loaders[turn % VERSIONS].aload()
        loading = False

    async with anyio.create_task_group() as group:
        group.start_soon(load)
        while loading:
            version_of(table(wanted))
            during += 1
            await anyio.lowlevel.checkpoint()
    assert during > 4
    assert version_of(table(wanted)) == 4 % VERSIONS
