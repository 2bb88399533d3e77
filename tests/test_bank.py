"""One model from several checkpoints, loaded at once."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncloader import (
    AsyncLoaderError,
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    Loader,
    PlanError,
    ReadError,
    Runtime,
    Saver,
    UpdateCounts,
)
from tests.faulty import FaultyStorage
from tests.genuine import NAMES, NEWEST, RUN, Truth, copy_of_run, truth
from tests.oracle import write_checkpoint
from tests.support import data, nothing_left_behind, rows_in, rows_on_disk, table_for, unchanged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from tests.faulty import Read

pytestmark = pytest.mark.both_loops

OLD, NEW = (truth(name) for name in NAMES)
FROM_OLD, FROM_NEW = (str(RUN / name) for name in NAMES)


@pytest.mark.parametrize(
    ("bank", "user", "others"),
    [
        ([FROM_OLD, {"path": FROM_NEW, "load": ["user*"]}], NEW, OLD),
        ([{"path": FROM_OLD, "load": ["user*"]}, FROM_NEW], NEW, NEW),
        ([FROM_NEW, {"path": FROM_OLD, "load": ["user"]}], OLD, NEW),
        ([str(RUN)], NEW, NEW),
    ],
)
def test_tables_and_tensors_come_from_the_entries_that_give_them(
    bank: Sequence[Any],
    user: Truth,
    others: Truth,
) -> None:
    tables, tensors = NEW.destinations()
    report = Loader.from_bank(bank, tables, tensors).load()
    assert rows_in(tables["user"]) == rows_on_disk(user.tables["user"])
    assert rows_in(tables["shop"]) == rows_on_disk(others.tables["shop"])
    assert rows_in(tables["item"]) == rows_on_disk(others.tables["item"])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others.tensors[name])
    folder = FROM_NEW if user is NEW else FROM_OLD
    assert report.sources["user@id"].path == folder
    assert torch.equal(report.extra["global_step"], others.extra["global_step"])


def test_what_an_entry_excludes_comes_from_the_one_before() -> None:
    tables, tensors = NEW.destinations()
    bank = [FROM_OLD, {"path": FROM_NEW, "exclude": ["user@*avg*", "tower*"]}]
    report = Loader.from_bank(bank, tables, tensors).load()
    for name, tensor in tensors.items():
        of = OLD if name.startswith("tower") else NEW
        assert torch.equal(tensor, of.tensors[name]), name
    old, new, held = (
        rows_on_disk(OLD.tables["user"]),
        rows_on_disk(NEW.tables["user"]),
        rows_in(tables["user"]),
    )
    assert isinstance(old, dict)
    assert isinstance(new, dict)
    assert held.keys() == new.keys()
    for id_, row in held.items():
        for slot, value in row.items():
            wanted = old.get(id_, {}).get(slot, bytes(16)) if "avg" in slot else new[id_][slot]
            assert value == wanted
    assert report.sources["recis.dense.optim."].path == FROM_NEW


def test_tensors_that_are_gathered_come_from_any_entry(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    turned = torch.arange(12.0).view(3, 4).t()
    for number, name in enumerate(NAMES):
        torch.save({"a": turned + number, "b": turned - number}, run / name / "model.pt")
    into = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}
    bank = [run / NAMES[0], {"path": run / NAMES[1], "load": ["b"]}]
    Loader.from_bank(bank, tensors=into).load()
    assert torch.equal(into["a"], turned)
    assert torch.equal(into["b"], turned - 1)


def test_tensors_of_another_model_come_under_their_new_names() -> None:
    into = {f"net.{n}.weight": torch.zeros_like(NEW.dense[f"tower.{n}.weight"]) for n in range(3)}
    entry = {"path": FROM_NEW, "oname": [{"net.*.weight": "tower.*.weight"}]}
    Loader.from_bank([entry], tensors=into).load()
    for n in range(3):
        assert torch.equal(into[f"net.{n}.weight"], NEW.dense[f"tower.{n}.weight"])


def test_patterns_choose_some_biases_and_ids() -> None:
    tables, tensors = NEW.destinations()
    entry = {"path": FROM_NEW, "load": ["tower.?.bias*", "[us]*@id*"]}
    report = Loader.from_bank([entry], tables, tensors).load()
    taken = {f"tower.{n}.bias" for n in range(3)} | {"user@id", "shop@id", "recis.dense.optim."}
    assert set(report.sources) == taken
    assert report.filled == 3


def test_two_tables_swap_their_names() -> None:
    tables, _ = NEW.destinations()
    oname = [{"user*": "shop*"}, {"shop*": "user*"}]
    Loader.from_bank([{"path": FROM_NEW, "oname": oname}], tables).load()
    assert rows_in(tables["user"]) == rows_on_disk(NEW.tables["shop"])
    assert rows_in(tables["shop"]) == rows_on_disk(NEW.tables["user"])


def test_a_run_is_resumed_before_all_entries_and_the_callers_list_stays_as_it_is() -> None:
    tables, tensors = NEW.destinations()
    bank = [{"path": FROM_OLD, "load": ["*"]}]
    report = Loader.from_bank(bank, tables, tensors, resume=RUN).load()
    assert bank == [{"path": FROM_OLD, "load": ["*"]}]
    assert {origin.path for origin in report.sources.values()} == {FROM_NEW}
    assert {origin.entry for origin in report.sources.values()} == {-1}


def test_a_run_without_a_list_is_nothing_to_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables, tensors = NEW.destinations()
    report = Loader.from_bank([FROM_OLD], tables, tensors, resume=tmp_path / "none").load()
    assert {origin.path for origin in report.sources.values()} == {FROM_OLD}
    assert "none: no checkpoint is listed there, so nothing is resumed" in caplog.text


def test_an_empty_bank_loads_nothing() -> None:
    tables, tensors = NEW.destinations()
    with unchanged(*tables.values(), tensors=tensors):
        report = Loader.from_bank([], tables, tensors).load()
    assert (report.filled, report.sources, report.extra) == (0, {}, {})


def test_extra_values_are_those_of_the_entries_that_give_them() -> None:
    bank = [FROM_OLD, {"path": FROM_NEW, "load": ["train_io"]}]
    report = Loader.from_bank(bank).load()
    assert set(report.extra) == {"global_step", "recis.dense.optim.", "train_io", "train_window_io"}
    assert torch.equal(report.extra["global_step"], OLD.extra["global_step"])
    assert report.sources["train_io"].path == FROM_NEW
    assert Loader.from_bank(bank, load_conf={"load": ["io_state"]}).load().extra.keys() == {
        "train_io"
    }


def test_an_extra_file_that_no_entry_wants_is_not_read(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    (run / NEWEST / "extra.pt").write_bytes(b"damaged")
    tables, _ = NEW.destinations()
    Loader.from_bank([{"path": run, "load": ["user"]}], tables).load()
    with pytest.raises(CheckpointError, match=r"ckpt_30: extra\.pt"):
        Loader.from_bank([run], tables).load()


def test_an_extra_file_of_which_later_entries_have_all_is_not_read(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    (run / NAMES[0] / "extra.pt").write_bytes(b"damaged")
    tables, tensors = NEW.destinations()
    words = {"path": run / NAMES[0], "load": ["global_step", "tower*"]}
    report = Loader.from_bank([words, run / NAMES[1]], tables, tensors).load()
    assert {"global_step", "recis.dense.optim."} <= report.extra.keys()
    with pytest.raises(CheckpointError, match=r"ckpt_20: extra\.pt"):
        Loader.from_bank([words, {"path": run, "load": ["tower*"]}], tables).load()


def test_every_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    for name in "ab":
        publish_half(tmp_path / name)
    with pytest.raises(CheckpointNotFoundError) as error:
        Loader.from_bank([tmp_path / "a", tmp_path / "b"]).load()
    assert error.value.location == str(tmp_path / "a")
    assert str(tmp_path / "b") in error.value.__notes__[0]


def publish_half(run: Path) -> None:
    write_checkpoint(run / "v1", {"t": data([1])}, {})
    for shard in (run / "v1").glob("*.safetensors"):
        shard.unlink()


# Checkpoints made here


def saved(path: Path, content: Mapping[str, Any], dense: Mapping[str, Tensor] | None = None) -> str:
    write_checkpoint(path, dict(content), dict(dense or {}), ranks=2)
    return str(path)


def test_slots_of_one_table_from_two_checkpoints_keep_the_ids_of_one(tmp_path: Path) -> None:
    """Ids that only the other checkpoint has would have rows that no trainer made."""
    base, other = data([1, 2, 3], m=1), data([4, 3, 2], m=1)
    bank = [
        saved(tmp_path / "base", {"t": base}),
        {"path": saved(tmp_path / "other", {"t": other}), "load": ["t@m"]},
    ]
    table = table_for(base)
    report = Loader.from_bank(bank, {"t": table}).load()
    held = rows_in(table)
    assert held.keys() == {1, 2, 3}
    given, mine = rows_on_disk(base), rows_on_disk(other)
    assert isinstance(given, dict)
    assert isinstance(mine, dict)
    assert {n: row["embedding"] for n, row in held.items()} == {
        n: row["embedding"] for n, row in given.items()
    }
    assert held[2]["m"] == mine[2]["m"]
    assert held[3]["m"] == mine[3]["m"]
    assert held[1]["m"] == bytes(4)  # the initial value
    assert report.tables["t"] == UpdateCounts(rows=3, new=3, replaced=0, duplicates=0, dropped=1)


def test_ids_alone_from_one_checkpoint_and_rows_from_another(tmp_path: Path) -> None:
    base, other = data([1, 2]), data([2, 3])
    bank = [
        saved(tmp_path / "other", {"t": other}),
        {"path": saved(tmp_path / "base", {"t": base}), "load": ["t@id"]},
    ]
    table = table_for(base)
    Loader.from_bank(bank, {"t": table}).load()
    row = other.slots["embedding"][0].tolist()
    assert table.lookup(torch.tensor([1, 2])).tolist() == [[0, 0], row]
    assert len(table) == 2


def test_a_slot_without_ids_fills_the_rows_that_are_there(tmp_path: Path) -> None:
    first, second = data([1, 2], m=1), data([2, 3], m=1)
    table = table_for(first)
    Loader(saved(tmp_path / "a", {"t": first}), {"t": table}).load()
    bank = [{"path": saved(tmp_path / "b", {"t": second}), "load": ["t@m"]}]
    report = Loader.from_bank(bank, {"t": table}).load()
    given = rows_on_disk(second)
    assert isinstance(given, dict)
    held = rows_in(table)
    assert held.keys() == {1, 2}
    assert held[2]["m"] == given[2]["m"]
    assert report.tables["t"] == UpdateCounts(rows=1, new=0, replaced=1, duplicates=0, dropped=1)


@pytest.mark.parametrize("clear", [True, False])
def test_a_table_is_emptied_before_unless_the_entry_merges(tmp_path: Path, *, clear: bool) -> None:
    first, second = data([1, 2]), data([2, 3])
    table = table_for(first)
    Loader(saved(tmp_path / "a", {"t": first}), {"t": table}).load()
    bank = [{"path": saved(tmp_path / "b", {"t": second}), "hashtable_clear": clear}]
    report = Loader.from_bank(bank, {"t": table}).load()
    kept = {} if clear else rows_on_disk(first, keep=lambda id_: id_ == 1)
    assert rows_in(table) == kept | rows_on_disk(second)  # type: ignore[operator]
    counts = report.tables["t"]
    assert (counts.cleared, counts.new, counts.replaced) == ((2, 2, 0) if clear else (0, 1, 1))


def test_only_the_child_of_that_very_name_is_emptied(tmp_path: Path) -> None:
    """RecIS compares by prefix: a load of `t1` would empty `t10`, too."""
    content = {"t1": data([1, 2]), "t10": data([3])}
    table = table_for(content["t1"], children=["t1", "t10"])
    Loader(saved(tmp_path / "a", content), {"t": table}).load()
    bank = [{"path": saved(tmp_path / "b", {"t1": data([7])}), "load": ["t1"]}]
    Loader.from_bank(bank, {"t": table}).load()
    assert table.ids("t1").tolist() == [7]
    assert table.ids("t10").tolist() == [3]


def test_a_table_without_rows_in_the_checkpoint_is_emptied(tmp_path: Path) -> None:
    table = table_for(data([1]))
    Loader(saved(tmp_path / "a", {"t": data([1])}), {"t": table}).load()
    path = saved(tmp_path / "b", {"t": data([])})
    assert Loader.from_bank([path], {"t": table}).load().tables["t"].cleared == 1
    assert len(table) == 0
    table.insert(torch.tensor([5]), torch.ones(1, 2))
    assert table.ids().tolist() == [5]


def test_two_children_of_one_table_come_from_two_ranks_of_two_checkpoints(tmp_path: Path) -> None:
    left, right = data([1, 2, -1], m=1), data([1, 5], m=1)
    table = table_for(left, children=["l", "r"])
    bank = [
        saved(tmp_path / "a", {"l": left, "r": left}),
        {"path": saved(tmp_path / "b", {"r": right}), "load": ["r"]},
    ]
    Loader.from_bank(bank, {"t": table}).load()
    assert sorted(table.ids("r").tolist()) == [1, 5]
    assert len(table) == 5


def test_what_is_missing_keeps_its_values_and_strict_makes_it_an_error(tmp_path: Path) -> None:
    bank = [saved(tmp_path / "a", {}, {"w": torch.ones(2)})]
    into = {"w": torch.zeros(2), "v": torch.zeros(2)}
    report = Loader.from_bank(bank, {"t": table_for(data([1]))}, into).load()
    assert report.missing == ("v", "t")
    assert report.tensors == {"w": "loaded", "v": "missing"}
    with pytest.raises(PlanError, match="'t' is asked for but not in the checkpoint"):
        Loader.from_bank(bank, {"t": table_for(data([1]))}, into, strict=True).load()


def test_a_tied_tensor_that_only_one_name_has_is_not_missing(tmp_path: Path) -> None:
    w = torch.zeros(2)
    bank = [saved(tmp_path / "a", {}, {"w": torch.ones(2)})]
    report = Loader.from_bank(bank, tensors={"w": w, "v": w}).load()
    assert (report.missing, w.tolist()) == ((), [1, 1])


def test_all_problems_of_names_and_of_shapes_are_in_one_error(tmp_path: Path) -> None:
    bank = [
        {"path": saved(tmp_path / "a", {"t": data([1])}), "load": ["t", "nope"]},
        {"path": saved(tmp_path / "b", {}, {"w": torch.ones(2)}), "load": ["w"]},
    ]
    tables, tensors = {"t": table_for(data([1], width=3))}, {"w": torch.zeros(3)}
    with unchanged(*tables.values(), tensors=tensors), pytest.raises(PlanError) as error:
        Loader.from_bank(bank, tables, tensors).load()
    assert [problem.split(",")[0] for problem in error.value.problems] == [
        f"entry 0 ({tmp_path / 'a'}): the model has no 'nope'",
        "tensor 'w' is float32 [3]",
        "slot 'embedding' of table 't' has rows of float32 [3]",
    ]
    assert str(tmp_path / "b") in error.value.problems[1]


def test_every_checkpoint_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "index").write_bytes(b"{")
        (tmp_path / name / "tensorkey.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as error:
        Loader.from_bank([tmp_path / "a", {"path": tmp_path / "b", "ignore_error": True}]).load()
    assert error.value.location == str(tmp_path / "a")
    assert str(tmp_path / "b") in error.value.__notes__[0]


def test_checkpoints_of_our_saver_are_verified_by_their_digests(tmp_path: Path) -> None:
    for name, values in (("a", 1.0), ("b", 2.0)):
        tensors = {"w": torch.full((4,), values), "v": torch.ones(4)}
        Saver(path=tmp_path / name, tensors=tensors).save()
    into = {"w": torch.zeros(4), "v": torch.zeros(4)}
    bank = [tmp_path / "a", {"path": tmp_path / "b", "load": ["w"]}]
    report = Loader.from_bank(bank, tensors=into, verify="require").load()
    assert report.bytes_verified == report.bytes_wanted == 32
    assert (into["w"].tolist(), into["v"].tolist()) == ([2] * 4, [1] * 4)


# All or nothing


def bank_of_both() -> list[Any]:
    return [FROM_OLD, {"path": FROM_NEW, "load": ["user"]}]


async def test_a_fault_in_the_last_source_leaves_all_tables_as_they_were() -> None:
    tables, tensors = NEW.destinations()
    Loader(FROM_OLD, tables, tensors).load()
    names: list[str] = []

    def wrapped(storage: Any) -> FaultyStorage:  # noqa: ANN401  # a storage
        names.append(storage.location)
        last = storage.location == FROM_NEW

        def fault(read: Read) -> None:
            if last and read.offset > 0 and "model-" in read.name:
                raise OSError(5, "gone")

        return FaultyStorage(storage, fault)

    with unchanged(*tables.values()):
        async with Runtime(wrap_storage=wrapped) as runtime:
            loader = Loader.from_bank(bank_of_both(), tables, runtime=runtime)
            with pytest.raises(ReadError) as error:
                await loader.aload()
    assert set(names) == {FROM_OLD, FROM_NEW}
    assert error.value.shard.startswith(f"{FROM_NEW}/model-")


def counting(fails: int) -> tuple[list[str], Any]:
    """Return the names of reads, and a wrapper of all storages, one read of which fails."""
    names: list[str] = []

    def fault(read: Read) -> None:
        names.append(read.name)
        if len(names) == fails:
            raise OSError(2, "gone")  # not tried again

    return names, partial(FaultyStorage, fault=fault)


async def test_whichever_read_fails_all_tables_stay_as_they_were() -> None:
    reads, wrap = counting(fails=0)
    async with Runtime(wrap_storage=wrap) as runtime:
        await Loader.from_bank(bank_of_both(), NEW.destinations()[0], runtime=runtime).aload()
    assert len({*reads}) > 4
    tables, _ = NEW.destinations()
    Loader(FROM_OLD, tables).load()
    with unchanged(*tables.values()):
        for number in range(1, len(reads) + 1):
            _, wrap = counting(fails=number)
            async with Runtime(wrap_storage=wrap) as runtime:
                with pytest.raises(AsyncLoaderError, match="gone"):
                    await Loader.from_bank(bank_of_both(), tables, runtime=runtime).aload()


async def test_a_cancelled_load_leaves_all_tables_as_they_were() -> None:
    tables, _ = NEW.destinations()
    Loader(FROM_OLD, tables).load()
    loop, begun, released = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def wait(read: Read) -> None:
        if read.offset > 0 and "model-" in read.name:
            loop.call_soon_threadsafe(begun.set)
            released.wait()

    with unchanged(*tables.values()):
        async with Runtime(wrap_storage=partial(FaultyStorage, fault=wait)) as runtime:
            loader = Loader.from_bank(bank_of_both(), tables, runtime=runtime)
            task = asyncio.ensure_future(loader.aload())
            await begun.wait()
            task.cancel()
            released.set()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_a_shard_that_is_replaced_meanwhile_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    tables, _ = NEW.destinations()
    replaced = run / NEWEST / "model-000000-of-000004.safetensors"

    async def replace(_: object) -> None:
        await asyncio.to_thread(lambda: replaced.write_bytes(replaced.read_bytes()))

    loader = Loader.from_bank([FROM_OLD, {"path": run, "load": ["user"]}], tables, on_plan=replace)
    with pytest.raises(CheckpointChangedError) as error:
        await loader.aload()
    assert error.value.shard == str(replaced)
    assert not len(tables["user"])


async def test_a_plan_reads_names_and_writes_nothing() -> None:
    tables, tensors = NEW.destinations()
    with nothing_left_behind(*tables.values()), unchanged(*tables.values(), tensors=tensors):
        plan = await Loader.from_bank(bank_of_both(), tables, tensors).plan()
    assert plan.bank is not None
    assert plan.bank.cleared == ("item", "user", "shop")
    assert str(plan).startswith(f"0: {FROM_OLD}\n1: {FROM_NEW}\n")


def test_a_filter_func_beside_a_bank_is_refused() -> None:
    how: dict[str, Any] = {"filter_func": lambda info: info}
    with pytest.raises(TypeError, match="a bank has no filter_func"):
        Loader.from_bank([], **how)


@pytest.mark.parametrize("rank", [-1, "0", True])
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="rank is a number from 0 on"):
        Loader.from_bank([], rank=rank)
