"""`Live` on a run that RecIS itself wrote: `model.pt` and all, and what RecIS does meanwhile."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import Live, LoadFailed, Swapped
from tests.genuine import NAMES, NEWEST, copy_of_run, truth
from tests.live import Events, live

if TYPE_CHECKING:
    from pathlib import Path

    from asyncloader import Model

OLDER = NAMES[0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copy_of_run(tmp_path)


def holds(model: Model, name: str) -> bool:
    """Say whether a model is all of a checkpoint."""
    known = truth(name)
    tables = all(
        torch.equal(model.tables[table].lookup(data.ids), data.slots["embedding"])
        for table, data in known.tables.items()
    )
    return tables and all(
        torch.equal(model.tensors[one], value) for one, value in known.tensors.items()
    )


def of_run(run: Path, events: Events) -> Live:
    return live(run, events, lambda: truth().destinations())


def only_older(run: Path) -> None:
    """Have the run be as it was before its newest checkpoint."""
    (run / NEWEST).rename(run / ".later")
    (run / "checkpoint").write_text(f"{OLDER}\n")


def save_and_evict(run: Path) -> None:
    """Do what RecIS does at its next save, if it keeps one checkpoint."""
    (run / ".later").rename(run / NEWEST)
    (run / "checkpoint").write_text(f"{OLDER}\n{NEWEST}\n")
    shutil.rmtree(run / OLDER)
    (run / "checkpoint").write_text(f"{NEWEST}\n")


async def test_a_run_is_served_whole_and_followed(run: Path) -> None:
    events = Events()
    only_older(run)
    async with of_run(run, events) as it:
        with it.use() as model:
            assert holds(model, OLDER)
            save_and_evict(run)
            await events.until(Swapped, version=NEWEST)
            assert holds(model, OLDER)  # in use
        with it.use() as model:
            assert holds(model, NEWEST)


async def test_a_model_that_comes_after_its_index_is_waited_for(run: Path) -> None:
    events = Events()
    only_older(run)
    (run / ".later" / "model.pt").rename(run / ".model")
    async with of_run(run, events) as it:
        (run / ".later").rename(run / NEWEST)
        (run / "checkpoint").write_text(f"{OLDER}\n{NEWEST}\n")
        await events.until(LoadFailed, version=NEWEST)
        assert it.current.version == OLDER
        (run / ".model").rename(run / NEWEST / "model.pt")
        await events.until(Swapped, version=NEWEST)
        with it.use() as model:
            assert holds(model, NEWEST)


async def test_a_model_that_changes_is_news(run: Path) -> None:
    events = Events()
    async with of_run(run, events) as it:
        other = {name: value + 1 for name, value in truth().dense.items()}
        torch.save(other, run / NEWEST / ".model.pt.Xy12z9")  # as rsync brings it
        (run / NEWEST / ".model.pt.Xy12z9").rename(run / NEWEST / "model.pt")
        await events.until(Swapped, previous=NEWEST)
        with it.use() as model:
            assert all(torch.equal(model.tensors[name], value) for name, value in other.items())


async def test_a_first_version_that_is_removed_gives_way_to_the_newer_one(run: Path) -> None:
    only_older(run)
    events = Events()
    times = 0

    def build() -> object:
        nonlocal times
        times += 1
        if times == 1:
            save_and_evict(run)
        return truth().destinations()

    async with live(run, events, build) as it:
        assert (it.current.version, times) == (NEWEST, 2)
        with it.use() as model:
            assert holds(model, NEWEST)
    [failed] = [event for event in events.seen if isinstance(event, LoadFailed)]
    assert failed.version == OLDER


async def test_a_first_version_that_cannot_be_loaded_is_told_if_it_is_the_newest(run: Path) -> None:
    (run / NEWEST / "model.pt").unlink()
    with pytest.raises(Exception, match="tower"):
        async with of_run(run, Events()):
            pass


async def test_a_file_called_like_a_model_beside_plain_safetensors_is_no_part_of_it(
    tmp_path: Path,
) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    events = Events()
    async with live(tmp_path, events, lambda: ({}, {"w": torch.zeros(3)})) as it:
        before = it.current
        (tmp_path / "model.pt").write_bytes(b"of another program")
        save_file({"w": torch.ones(3) * 2}, tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "model.safetensors")
        await events.until(Swapped, previous=before.version)
        with it.use() as model:
            assert model.tensors["w"].tolist() == [2] * 3
