"""A service's model from several checkpoints: its dynamic entries are followed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from asyncloader import Live, LoadFailed, Swapped
from tests.genuine import NEWEST, copy_of_run, truth
from tests.live import IDS, TABLES, Events, build, damage, publish
from tests.recis_table import StandIn

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.both_loops


def live(bank: list[Any], events: Events, **how: Any) -> Live:  # noqa: ANN401  # of Live
    return Live(
        bank=bank, build=build, **{"poll": 0.01, "retry_pause": 0.01, **how}, on_event=events
    )


def serving(it: Live) -> dict[str, float]:
    """Return the version that each table is of, looked up in all of it, and that of the tensor."""
    with it.use() as model:
        seen = {name: {*model.tables[name].lookup(IDS).flatten().tolist()} for name in TABLES}
        seen["w"] = {*model.tensors["w"].tolist()}
        assert all(len(values) == 1 for values in seen.values()), f"a mixture: {seen}"
        return {name: values.pop() for name, values in seen.items()}


async def test_a_new_version_of_a_dynamic_entry_brings_the_whole_bank_in(tmp_path: Path) -> None:
    for name in ("base", "users"):
        publish(tmp_path / name, 1)
    bank = [
        tmp_path / "base" / "v1",
        {"path": f"{tmp_path / 'users'}/", "load": ["user"], "is_dynamic": True},
    ]
    events = Events()
    async with live(bank, events, keep=2) as it:
        assert serving(it) == {"user": 1, "item": 1, "w": 1}
        publish(tmp_path / "users", 2)
        await events.until(Swapped, version="v2")
        assert serving(it) == {"user": 2, "item": 1, "w": 1}
        with it.use() as model:
            assert model.report.sources["user@id"].path == str(tmp_path / "users" / "v2")
        await it.rollback()
        assert serving(it) == {"user": 1, "item": 1, "w": 1}


async def test_what_only_training_needs_is_not_held_for_each_version(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    bank = [{"path": str(run), "is_dynamic": True}]
    async with Live(bank=bank, build=truth(NEWEST).destinations) as it:
        with it.use() as model:
            assert model.report.extra.keys() == {"global_step"}
            assert "recis.dense.optim." not in model.report.sources


async def test_rows_of_a_version_in_a_table_of_recis_would_show_before_it_serves(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)

    def built() -> tuple[Any, None]:
        return {"user": StandIn([2], children=["user"])}, None

    with pytest.raises(TypeError, match="'user', a table of RecIS"):
        async with Live(tmp_path, built):
            pass


async def test_the_runs_of_several_dynamic_entries_are_one_version(tmp_path: Path) -> None:
    for name in ("base", "users"):
        publish(tmp_path / name, 1)
    bank = [
        {"path": str(tmp_path / "base"), "is_dynamic": True},
        {"path": str(tmp_path / "users"), "load": ["user"], "is_dynamic": True},
    ]
    events = Events()
    async with live(bank, events) as it:
        assert it.current.version == "v1 + v1"
        publish(tmp_path / "users", 2)
        await events.until(Swapped, version="v1 + v2")
        assert serving(it) == {"user": 2, "item": 1, "w": 1}
        publish(tmp_path / "base", 3)
        await events.until(Swapped, version="v3 + v2")
        assert serving(it) == {"user": 2, "item": 3, "w": 3}
        await it.rollback()  # loaded again
        assert serving(it) == {"user": 2, "item": 1, "w": 1}
        with pytest.raises(ValueError, match="it has no one path"):
            await it.load("v1")


async def test_a_damaged_version_of_one_run_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    for name in ("base", "users"):
        publish(tmp_path / name, 1)
    bank = [
        str(tmp_path / "base"),
        {"path": str(tmp_path / "users"), "load": ["user"], "is_dynamic": True},
    ]
    events = Events()
    async with live(bank, events) as it:
        damaged = publish(tmp_path, 2)
        damage(damaged)
        damaged.rename(tmp_path / "users" / "v2")
        failed = await events.until(LoadFailed, version="v2")
        assert str(tmp_path / "users" / "v2") in str(failed.error)
        assert serving(it) == {"user": 1, "item": 1, "w": 1}


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"bank": ["a"]}, ValueError, "no entry of the bank has is_dynamic=True"),
        ({"bank": [{"path": "a", "is_dynamic": 1}]}, ValueError, "is_dynamic is True or False"),
        ({"bank": [], "source": "a"}, TypeError, "Live follows one of them"),
        ({}, TypeError, "Live follows one of them"),
        (
            {"bank": [{"path": "a", "is_dynamic": True}], "loader_options": {"filter_func": 1}},
            TypeError,
            "filter_func",
        ),
    ],
)
def test_a_bank_that_cannot_be_followed_is_refused(
    how: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Live(build=build, **how)
