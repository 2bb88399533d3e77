"""A load that is cancelled or times out, wherever it stands, leaves nothing behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncloader import HashTable, Loader, LoadTimeoutError, Slice
from tests.oracle import write_checkpoint
from tests.steps import Steps
from tests.support import (
    MemoryStorage,
    Run,
    data,
    debug_off,
    nothing_left_behind,
    poison,
    raw,
    rows_in,
    rows_on_disk,
    table_for,
    unchanged,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.both_loops

CONTENT = data(list(range(-30, 30)), exp_avg=1)
STORED = {"plain": torch.arange(40.0), "turned": torch.arange(12.0).view(3, 4)}
THIRD = Slice(0, 33, 99)


@dataclass
class Case:
    """A checkpoint of several shards, read in all ways there are."""

    folder: Path
    tables: dict[str, HashTable] = field(init=False)
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        write_checkpoint(self.folder, {"t": CONTENT, "u": CONTENT}, STORED, ranks=2, writers=2)
        self.tables = {"t": table_for(CONTENT), "u": table_for(CONTENT, name="u", slice=THIRD)}
        self.tables["t"].insert(torch.tensor([5]), torch.full((1, 2), -1.0))
        self.tensors = {"plain": torch.zeros(40), "turned": torch.zeros(4, 3).T}

    def loader(self, **how: Any) -> Loader:  # noqa: ANN401  # of Loader
        """Return a loader that takes several reads."""
        return Loader(self.folder, self.tables, self.tensors, parallel=2, chunk_bytes=300, **how)

    def is_loaded(self) -> bool:
        """Tell whether everything is as it was written."""
        return (
            rows_in(self.tables["t"]) == rows_on_disk(CONTENT)
            and rows_in(self.tables["u"]) == rows_on_disk(CONTENT, keep=THIRD.accepts)
            and all(raw(self.tensors[name]) == raw(stored) for name, stored in STORED.items())
        )

    async def check_poison_stays(self) -> None:
        """Check that nobody writes to the tensors any more."""
        poisoned = [raw(poison(self.tensors["plain"])), raw(self.tensors["turned"].fill_(-3))]
        for _ in range(20):
            await asyncio.sleep(0)
        assert [raw(tensor) for tensor in self.tensors.values()] == poisoned


@pytest.mark.parametrize("again", [False, True], ids=["once", "again and again"])
async def test_a_load_cancelled_at_any_await_leaves_nothing_behind(
    tmp_path: Path, *, again: bool
) -> None:
    case = Case(tmp_path)
    step = 0
    while True:
        steps = Steps(range(step, step + (10**9 if again else 1)))
        with debug_off(), nothing_left_behind(*case.tables.values()):
            held = [rows_in(table) for table in case.tables.values()]
            if not await steps.run(case.loader().aload):
                break
        assert [rows_in(table) for table in case.tables.values()] == held
        await case.check_poison_stays()
        step += 3 if again else 1
    assert step > 30, "there were awaits to cancel"
    assert steps.count <= step, "the last load ended before the step at which to cancel it"
    assert case.is_loaded()


async def test_a_plan_cancelled_at_any_await_leaves_nothing_behind(tmp_path: Path) -> None:
    case = Case(tmp_path)
    step = 0
    with debug_off(), unchanged(*case.tables.values(), tensors=case.tensors):
        while await Steps(range(step, step + 1)).run(case.loader().plan):
            step += 1
    assert step > 5, "there were awaits to cancel"


@dataclass
class StuckStorage(MemoryStorage):
    """Serves everything but the data of shards, for which it waits until it is let go."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        if offset:
            self.reached.set()
            await self.go.wait()
        return await super().readinto(name, offset, views)


async def test_a_load_whose_storage_never_answers_can_be_cancelled(tmp_path: Path) -> None:
    case = Case(tmp_path)
    storage = StuckStorage(MemoryStorage.of(tmp_path).files)
    run = Run(storage=storage, tables=case.tables, tensors=case.tensors)
    with unchanged(*case.tables.values(), tensors=case.tensors):
        loading = asyncio.create_task(run.load())
        await storage.reached.wait()
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading

    assert (run.budget.in_use, storage.in_flight) == (0, 0)


async def test_a_load_whose_storage_answers_late_is_right(tmp_path: Path) -> None:
    case = Case(tmp_path)
    storage = StuckStorage(MemoryStorage.of(tmp_path).files)
    loading = asyncio.create_task(
        Run(storage=storage, tables=case.tables, tensors=case.tensors).load()
    )
    await storage.reached.wait()
    storage.go.set()

    await loading

    assert case.is_loaded()


async def test_a_load_that_takes_too_long_says_so_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path)
    timeout, failures = 1e-6, 0
    while True:
        with debug_off(), nothing_left_behind(*case.tables.values()):
            held = [rows_in(table) for table in case.tables.values()]
            failure = None
            try:
                await case.loader(timeout=timeout).aload()
            except LoadTimeoutError as error:
                failure = error
        if failure is None:
            break
        assert isinstance(failure, TimeoutError)
        assert (failure.location, failure.seconds) == (str(tmp_path), timeout)
        assert f"{tmp_path}: not loaded within {timeout:g} seconds" in str(failure)
        assert [rows_in(table) for table in case.tables.values()] == held
        await case.check_poison_stays()
        timeout, failures = timeout * 1.5, failures + 1
    assert failures
    assert case.is_loaded()


async def test_planning_keeps_to_the_timeout_too(tmp_path: Path) -> None:
    case = Case(tmp_path)

    with unchanged(*case.tables.values()), pytest.raises(LoadTimeoutError):
        await case.loader(timeout=1e-9).plan()


async def test_a_timeout_of_the_callers_own_is_not_taken_for_ours(tmp_path: Path) -> None:
    case = Case(tmp_path)

    with unchanged(*case.tables.values()), pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0):
            await case.loader(timeout=1e6).aload()

    assert not isinstance(caught.value, LoadTimeoutError)


async def test_a_timeout_raised_by_the_callers_code_is_not_taken_for_ours(tmp_path: Path) -> None:
    def late(_: object) -> dict[str, dict[str, list[str]]]:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine") as caught:
        await Case(tmp_path).loader(timeout=1e6, filter_func=late).aload()

    assert not isinstance(caught.value, LoadTimeoutError)


async def test_a_load_that_was_cancelled_can_be_done_again(tmp_path: Path) -> None:
    case = Case(tmp_path)
    loader = case.loader()
    for step in 3, 20, 50:
        await Steps(range(step, step + 1)).run(loader.aload)

    await loader.aload()

    assert case.is_loaded()
