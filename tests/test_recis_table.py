"""RecIS's own tables, filled and saved: a stand-in for them against our own table."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncloader import (
    CheckpointError,
    HashTable,
    Loader,
    PlanError,
    RecISTable,
    SaveError,
    Saver,
    Slice,
    gen_slice,
)
from asyncloader._threads.jobs import ByteBudget
from asyncloader.protocols import PlacingUpdate
from tests.oracle import TableData, rows_of, write_checkpoint
from tests.recis_table import StandIn
from tests.support import MemoryStorage, Run, data, debug_off, table_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asyncloader import LoadPlan
    from asyncloader._planning.targets import LoadInfo
    from asyncloader._storage.protocol import ReadInto

T = TypeVar("T")
GENUINE = Path(__file__).parent / "data" / "recis"


def stand_in(*args: Any, **options: Any) -> Any:  # noqa: ANN401  # RecIS's has no type either
    """Return a stand-in for a table of RecIS."""
    return StandIn(*args, **options)


def stand_in_for(table: HashTable, **options: Any) -> Any:  # noqa: ANN401  # of several types
    """Return an empty stand-in that can take what a table of ours can."""
    slots = dict(table.slots())
    first = slots.pop("embedding")
    children, coalesced = list(table.children), table.coalesced
    made = stand_in(first.shape, first.dtype, children=children, coalesced=coalesced, **options)
    for slot in slots.values():
        made.append(slot.name, slot.shape, slot.dtype)
    return made


def held(table: HashTable) -> dict[int, dict[str, bytes]]:
    """Return all that a table holds, by encoded id."""
    return rows_of(table.ids(), {slot: table.rows(slot) for slot in table.slots()})


def pair(like: TableData, **options: Any) -> tuple[HashTable, Any]:  # noqa: ANN401  # of several types
    ours = table_for(like, **options)
    return ours, stand_in_for(ours)


@st.composite
def contents(draw: st.DrawFn) -> dict[str, TableData]:
    """Draw two tables of like slots, which have ids in common; one may have an id twice."""
    ids = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 60), max_size=80)
    return {name: data(draw(ids), width=draw(st.just(3)), m=2) for name in ("a", "b")}


@settings(max_examples=60, deadline=None)
@given(
    tables=contents(),
    ranks=st.integers(1, 3),
    part=st.sampled_from([gen_slice(), gen_slice(1, 3), gen_slice(1, 4)]),
    coalesced=st.booleans(),
    infos=st.lists(
        st.dictionaries(
            st.sampled_from(["a", "b"]),
            st.dictionaries(
                st.sampled_from(["a", "b"]),
                st.sampled_from([["id"], ["id", "embedding"], ["id", "embedding", "m"]]),
                min_size=1,
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    shuffled=st.booleans(),
    newer=st.booleans(),
    chunk_bytes=st.sampled_from([4096, 1 << 20]),
)
def test_any_loads_one_after_the_other_leave_what_they_leave_in_our_own_table(  # noqa: PLR0917
    tables: dict[str, TableData],
    ranks: int,
    part: Slice,
    coalesced: bool,
    infos: list[dict[str, dict[str, list[str]]]],
    shuffled: bool,
    newer: bool,
    chunk_bytes: int,
) -> None:
    children = ["a", "b"] if coalesced else None
    ours = table_for(tables["a"], name="a", slice=part, children=children)
    theirs = stand_in_for(ours, shuffled=shuffled, newer=newer)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), tables, {}, ranks=ranks, writers=2)
        for info in infos:
            chosen = {child: info[child] for child in ours.children if child in info}
            load = partial(Loader, folder, parallel=3, chunk_bytes=chunk_bytes)

            def choose(_: LoadInfo, chosen: LoadInfo = chosen) -> LoadInfo:
                return chosen

            mine = load({"x": ours}, filter_func=choose).load()
            their = RecISTable(theirs, slice=part)
            report = load({"x": their}, filter_func=choose).load()

            assert theirs.held() == held(ours)
            assert report.tables == mine.tables
            assert report.missing == mine.missing


@pytest.mark.parametrize("name", ["small_4shards", "optim_slots"])
def test_a_checkpoint_of_recis_comes_back_bit_for_bit_into_its_table_and_out_again(
    tmp_path: Path, name: str
) -> None:
    expected = torch.load(GENUINE / name / "truth.pt", weights_only=True)["tables"]
    tables = {}
    for child, content in expected.items():
        slots = dict(content["slots"])
        first = slots.pop("embedding")
        tables[child] = stand_in(first.shape[1:], first.dtype, children=[child])
        for slot, rows in slots.items():
            tables[child].append(slot, rows.shape[1:], rows.dtype)

    report = Loader(GENUINE / name, tables).load()

    assert set(report.in_place) == set(tables)
    assert report.missing == ()
    truth = {child: rows_of(one["ids"], one["slots"]) for child, one in expected.items()}
    assert {child: table.held() for child, table in tables.items()} == truth

    Saver.to(tmp_path / "again", tables).save()
    for child, table in tables.items():
        empty = HashTable(table.shape, dtype=table.dtype, name=child)
        for slot in list(table.slot_group().slots())[1:]:
            empty.add_slot(slot.name(), slot.shape, slot.dtype)
        loaded = Loader(tmp_path / "again", {child: empty}, verify="require").load()
        assert loaded.verified == "all verified"
        assert held(empty) == truth[child]


@pytest.mark.parametrize("version", ["ckpt_20", "ckpt_30"])
def test_a_run_of_recis_fills_a_coalesced_table_of_its_own_and_a_plain_one(version: str) -> None:
    folder = GENUINE.parent / "recis_run" / version
    expected = torch.load(folder / "truth.pt", weights_only=True)["tables"]
    children = ["user", "shop"]
    theirs = {
        "engine": stand_in([4], children=children, coalesced=True, initial=7.0),
        "item": stand_in([6], children=["item"], newer=True, shuffled=True),
    }
    for name, child in (("engine", "user"), ("item", "item")):
        for slot, rows in expected[child]["slots"].items():
            if slot != "embedding":
                theirs[name].append(slot, rows.shape[1:], rows.dtype)

    report = Loader(folder, theirs).load()

    found = {name: table.held() for name, table in theirs.items()}
    truth = {name: rows_of(one["ids"], one["slots"]) for name, one in expected.items()}
    low = 2**52 - 1
    for number, child in enumerate(children):
        mine = {id_: row for id_, row in found["engine"].items() if id_ >> 52 == number}
        known = {(id_ & low) | number << 52: row for id_, row in truth[child].items()}
        assert mine == known
    assert found["item"] == truth["item"]
    assert report.tables["engine"].new == len(truth["user"]) + len(truth["shop"])


def test_all_ranks_of_a_save_are_loaded_into_other_slices(tmp_path: Path) -> None:
    content = data(range(3000), m=1)
    for rank in (1, 0):
        part = gen_slice(rank, 2)
        ours = table_for(content, slice=part)
        write_checkpoint(tmp_path / "from", {"t": content}, {})
        theirs = RecISTable(stand_in_for(ours, block_size=100), slice=part)
        Loader(tmp_path / "from", {"t": theirs}).load()
        Saver(rank, 2, 2, tmp_path / "to", {"t": theirs}, save_id="1").save()

    ours, other = pair(content, slice=gen_slice(1, 3))
    Loader(tmp_path / "to", {"t": ours}, verify="require").load()
    report = Loader(
        tmp_path / "to", {"t": RecISTable(other, slice=ours.slice)}, verify="require"
    ).load()

    assert other.held() == held(ours)
    assert report.verified == "all verified"


def test_rows_of_rank_two_and_converted_rows_are_right(tmp_path: Path) -> None:
    """RecIS's own lookup returns a part of such rows only."""
    rows = torch.arange(60.0).view(10, 3, 2)
    content = TableData(
        ids=torch.arange(10),
        slots={"embedding": rows, "m": torch.ones(10, 1, dtype=torch.bfloat16)},
    )
    write_checkpoint(tmp_path, {"t": content}, {})
    theirs = stand_in([3, 2], children=["t"])
    theirs.append("m", [1], torch.float32)

    report = Loader(tmp_path, {"t": theirs}, cast="widen").load()

    wanted = rows_of(content.ids, {"embedding": rows, "m": torch.ones(10, 1)})
    assert theirs.held() == wanted
    assert [str(cast) for cast in report.casts] == ["t@m: bfloat16 to float32"]


def test_places_of_deleted_ids_are_filled_again(tmp_path: Path) -> None:
    content = data(range(20))
    ours, theirs = pair(content)
    ids = torch.arange(100, 110)
    index, _ = theirs.embedding_lookup(ids.clone(), readonly=False)
    theirs.delete(ids[::2].clone(), index[::2].clone(), "")
    ours.insert(ids[1::2], torch.zeros(5, 2))
    write_checkpoint(tmp_path, {"t": content}, {})

    counts = Loader(tmp_path, {"t": theirs}).load().tables["t"]

    Loader(tmp_path, {"t": ours}).load()
    assert theirs.held() == held(ours)
    assert (counts.new, counts.replaced) == (20, 0)


@dataclass
class Slow(MemoryStorage):
    """Holds the first read after the first lookup back, until long after the second lookup."""

    lookups: int = 0
    is_held: bool = False
    second: asyncio.Event = field(default_factory=asyncio.Event)

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        if self.lookups and not self.is_held:
            self.is_held = True
            await self.second.wait()
            for _ in range(1000):
                await asyncio.sleep(0)
        return await super().on_thread(name, job)


async def test_the_later_row_stays_however_slowly_the_earlier_one_comes(tmp_path: Path) -> None:
    first, last = data([1, 2, 3]), data([3, 2, 1])
    write_checkpoint(tmp_path, {"a": first, "b": last}, {})
    loop, storage = asyncio.get_running_loop(), Slow(MemoryStorage.of(tmp_path).files)

    def count(number: int) -> None:
        storage.lookups = number
        if number == 2:
            loop.call_soon_threadsafe(storage.second.set)

    theirs = stand_in([2], children=["t"], before_lookup=count)
    every = ["id", "embedding"]
    run = Run(
        storage=storage,
        tables={"t": RecISTable(theirs)},  # type: ignore[dict-item]
        budget=ByteBudget(1 << 26),
        filter_func=lambda _: {"t": {"a": every, "b": every}},
    )

    counts = await run.load()

    assert storage.is_held
    assert theirs.held() == rows_of(last.ids, last.slots)
    assert (counts["t"].new, counts["t"].duplicates) == (3, 3)


# What cannot be loaded.


def test_late_slots_and_all_else_that_is_wrong_come_in_one_error_before_a_byte(
    tmp_path: Path,
) -> None:
    content = data(range(10), m=1, n=2)
    write_checkpoint(tmp_path, {"t": content}, {"d": torch.zeros(2)})
    theirs = stand_in([2], children=["t"])
    theirs.append("n", [3], torch.float32)
    theirs.embedding_lookup(torch.arange(100, 110), readonly=False)
    theirs.append("m", [1], torch.float32)
    before = theirs.held() if theirs.slot_group().slot_by_name("m").blocks else None

    with pytest.raises(PlanError) as caught:
        Loader(tmp_path, {"t": theirs}, {"d": torch.zeros(3)}).load()

    assert before is None
    assert sorted(theirs.ids().tolist()) == list(range(100, 110))
    text = "\n".join(caught.value.problems)
    assert "slot 'm' of table 't' was appended after the first id: it has 0 blocks" in text
    assert "slot 'n' of table 't' has rows of" in text
    assert "tensor 'd'" in text


def test_a_late_slot_that_is_left_out_keeps_the_others_from_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data(range(10), m=1)}, {})
    theirs = stand_in([2], children=["t"])
    theirs.embedding_lookup(torch.arange(100, 110), readonly=False)
    theirs.append("m", [1], torch.float32)

    def without(info: LoadInfo) -> LoadInfo:
        return {"t": {"t": ["id", "embedding"]}} if "m" in info["t"]["t"] else info

    assert Loader(tmp_path, {"t": theirs}, filter_func=without).load().tables["t"].new == 10


def test_a_late_slot_is_not_saved_in_part(tmp_path: Path) -> None:
    theirs = stand_in([2], children=["t"])
    theirs.embedding_lookup(torch.arange(10), readonly=False)
    theirs.append("m", [1], torch.float32)

    with pytest.raises(ValueError, match="slot 'm' of table 't' was appended after the first id"):
        Saver.to(tmp_path / "c", {"t": theirs}).save()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stand_in([1], children=["a", "b"]), "needs coalesced=True"),
        (lambda: stand_in([1], children=["a", "a"], coalesced=True), "numbered one by one"),
    ],
)
def test_children_that_cannot_be_told_apart_are_refused(
    make: Callable[[], Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Loader("nowhere", {"t": make()})


def test_a_child_that_child_index_has_made_up_is_refused() -> None:
    theirs = stand_in([1], children=["a", "b"], coalesced=True)
    theirs.children_info().child_index("c")
    with pytest.raises(ValueError, match="number 0"):
        RecISTable(theirs)


def test_no_child_is_made_up_by_asking(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"other": data([1])}, {})
    theirs = stand_in([2], children=["t"])
    Loader(tmp_path, {"t": theirs}).load()
    assert theirs.children_info().children() == ["t"]


def test_anything_but_a_table_of_recis_is_refused() -> None:
    with pytest.raises(TypeError, match="hashtable_tag"):
        RecISTable(torch.zeros(1))
    with pytest.raises(TypeError, match="slice must be a Slice"):
        RecISTable(stand_in([1]), slice=(0, 1, 2))  # type: ignore[arg-type]


# Failures and cancellations.


def interrupted(
    folder: Path, theirs: StandIn, at: int, act: Callable[[], BaseException | None]
) -> Run:
    """Return a load into a table at whose read number `at` something happens."""
    storage = MemoryStorage.of(folder)
    storage.before_read = lambda number: act() if number == at else None
    return Run(storage=storage, tables={"t": RecISTable(theirs)}, chunk_bytes=4096)  # type: ignore[dict-item]


def prepared(folder: Path) -> tuple[HashTable, Any]:
    """Write a checkpoint of 300 ids; return tables that hold 100 of them, and 50 others."""
    write_checkpoint(folder, {"t": data(range(300), m=1)}, {}, ranks=3, writers=2)
    ours, theirs = pair(data([0], m=1))
    ids = torch.arange(100 + 50) + 200
    for low in (0, 75):
        index, _ = theirs.embedding_lookup(ids[low : low + 75].clone(), readonly=False)
        for place in index.tolist():
            theirs.get_slot("embedding").blocks[place // 4][place % 4] = -5.0
    ours.insert(ids, torch.full((150, 2), -5.0))
    assert theirs.held() == held(ours)
    return ours, theirs


def check_taken_back(ours: HashTable, theirs: StandIn, folder: Path) -> None:
    """Check that ids are those that were there, and that the next load is as good as ever."""
    left, before = theirs.held(), held(ours)
    assert left.keys() == before.keys()
    assert all(left[id_] == before[id_] for id_ in left if id_ >= 300)
    Loader(folder, {"t": RecISTable(theirs)}).load()
    Loader(folder, {"t": ours}).load()
    assert theirs.held() == held(ours)


async def test_whichever_read_fails_no_new_id_stays(tmp_path: Path) -> None:
    with debug_off():
        for at in range(1000):
            ours, theirs = prepared(tmp_path)
            run = interrupted(tmp_path, theirs, at, lambda: OSError(5, "no such luck"))
            try:
                await run.load()
            except Exception:  # noqa: BLE001
                await asyncio.to_thread(check_taken_back, ours, theirs, tmp_path)
            else:
                break
    assert at > 10


async def test_whenever_a_load_is_cancelled_no_new_id_stays(tmp_path: Path) -> None:
    with debug_off():
        for at in range(1000):
            ours, theirs = prepared(tmp_path)
            task: list[asyncio.Task[Mapping[str, object]]] = []

            def cancel(task: list[asyncio.Task[Mapping[str, object]]] = task) -> None:
                task[0].cancel()

            run = interrupted(tmp_path, theirs, at, cancel)
            task.append(asyncio.create_task(run.load()))
            try:
                await task[0]
            except asyncio.CancelledError:
                await asyncio.to_thread(check_taken_back, ours, theirs, tmp_path)
            else:
                break
    assert at > 10


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("when", ["before_lookup", "after_lookup"])
def test_ids_of_a_lookup_that_fails_are_taken_out(tmp_path: Path, at: int, when: str) -> None:
    """Also those that came in before it failed, with places that nobody was told of."""
    write_checkpoint(tmp_path, {"t": data(range(300))}, {}, ranks=3)

    def fail(number: int) -> None:
        if number == at:
            raise MemoryError("of RecIS")

    theirs = stand_in([2], children=["t"], **{when: fail})
    with pytest.raises(MemoryError, match="of RecIS"):
        Loader(tmp_path, {"t": theirs}, chunk_bytes=4096).load()
    assert theirs.held() == {}


def test_the_error_names_what_was_taken_out_and_what_was_overwritten(tmp_path: Path) -> None:
    content = data(range(100))
    full = table_for(content)
    write_checkpoint(tmp_path / "from", {"t": content}, {})
    Loader(tmp_path / "from", {"t": full}).load()
    Saver(parallel=1, path=tmp_path / "to", hashtables={"t": full}).save()
    [shard] = (tmp_path / "to").glob("*.safetensors")
    text = bytearray(shard.read_bytes())
    text[-1] ^= 1
    shard.write_bytes(text)
    theirs = stand_in([2], children=["t"])
    theirs.append("m", [1], torch.float32)
    theirs.embedding_lookup(torch.tensor([5, 7, 1000]), readonly=False)

    with pytest.raises(CheckpointError, match="not those that were written") as caught:
        Loader(tmp_path / "to", {"t": theirs}).load()

    [note] = [note for note in caught.value.__notes__ if "taken out" in note]
    assert "table 't': 98 ids that came in were taken out" in note
    assert sorted(theirs.ids().tolist()) == [5, 7, 1000]


def test_a_thread_that_comes_back_late_writes_nothing() -> None:
    theirs = stand_in([2], children=["t"])
    update = RecISTable(theirs).begin(most=3, expected=3)
    places = update.place(torch.tensor([1, 2, 3]).numpy(), ["embedding"], fills=False).places
    left = update.abort()

    with pytest.raises(RuntimeError, match="given up"):
        update.write("embedding", places, torch.ones(3, 2))

    assert isinstance(update, PlacingUpdate)
    assert "3 ids that came in were taken out" in left
    assert update.abort() == left
    assert not theirs.get_slot("embedding").value().any()


def test_of_two_loads_into_one_table_the_second_is_refused() -> None:
    theirs = stand_in([2], children=["t"])
    update = RecISTable(theirs).begin(most=1, expected=1)
    with pytest.raises(RuntimeError, match="is being loaded"):
        RecISTable(theirs).begin(most=1, expected=1)
    update.abort()
    RecISTable(theirs).begin(most=1, expected=1).commit()


def test_of_two_loads_at_a_time_the_one_that_came_second_is_refused(tmp_path: Path) -> None:
    """Also where the other one has ended by then, and each has a wrapper of its own."""
    write_checkpoint(tmp_path / "a", {"t": data([1, 2])}, {})
    write_checkpoint(tmp_path / "b", {"t": data([3])}, {})
    theirs = stand_in([2], children=["t"])

    def meanwhile(_: LoadPlan) -> None:
        Loader(tmp_path / "b", {"t": theirs}).load()

    with pytest.raises(RuntimeError, match="table 't' is being filled by another load"):
        Loader(tmp_path / "a", {"t": theirs}, on_plan=meanwhile).load()
    assert theirs.ids().tolist() == [3]


# Saving.


def test_ids_that_come_in_during_a_save_make_it_fail(tmp_path: Path) -> None:
    theirs = stand_in([2], children=["t"])
    theirs.embedding_lookup(torch.arange(10), readonly=False)

    def meanwhile(blocks: list[Any]) -> list[Any]:
        theirs.embedding_lookup(torch.tensor([77]), readonly=False)
        return blocks

    with pytest.raises(SaveError, match="written to while they were saved: t"):
        Saver.to(tmp_path / "c", {"t": theirs}, filter_func=meanwhile).save()
    assert not (tmp_path / "c" / "index").exists()


def test_children_are_saved_each_under_its_name(tmp_path: Path) -> None:
    tables = {"a": data([1, -2, 3]), "b": data([3, 4])}
    write_checkpoint(tmp_path / "from", tables, {})
    ours, theirs = pair(tables["a"], name="x", children=["a", "b"])
    Loader(tmp_path / "from", {"x": theirs}).load()

    Saver.to(tmp_path / "to", {"x": theirs}).save()

    Loader(tmp_path / "from", {"x": ours}).load()
    again = table_for(tables["a"], name="x", children=["a", "b"])
    Loader(tmp_path / "to", {"x": again}).load()
    assert held(again) == held(ours) == theirs.held()


# Banks.


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("load", [["t"], ["t@id", "t@embedding"], ["t@m"]])
def test_a_bank_leaves_what_it_leaves_in_our_own_table(
    tmp_path: Path, load: list[str], *, clear: bool
) -> None:
    first, second = data([1, 2, 3], m=1), data([2, 3, 4, 5], m=1)
    write_checkpoint(tmp_path / "a", {"t": first}, {})
    write_checkpoint(tmp_path / "b", {"t": second}, {})
    ours, theirs = pair(first)
    bank = [{"path": str(tmp_path / "b"), "load": load, "hashtable_clear": clear}]
    reports = []
    for table in (ours, theirs):
        Loader(tmp_path / "a", {"t": table}).load()
        reports.append(Loader.from_bank(bank, {"t": table}).load())
    assert theirs.held() == held(ours)
    assert reports[1].tables == reports[0].tables


def test_a_bank_that_fails_leaves_the_ids_that_were_to_be_cleared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data([1, 2, 3], m=1)}, {})
    _, theirs = pair(data([1], m=1))
    Loader(tmp_path, {"t": theirs}).load()
    update = RecISTable(theirs).begin(most=2, expected=2)
    update.clear(["t"])
    update.place(torch.tensor([3, 4]).numpy(), ["embedding"], fills=False)
    update.finish()
    update.abort()
    assert sorted(theirs.ids().tolist()) == [1, 2, 3]
