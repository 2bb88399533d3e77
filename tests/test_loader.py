from __future__ import annotations

import asyncio
import dataclasses
import errno
import inspect
import io
import itertools
import os
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from asyncloader import HashTable, Loader, LoadReport, PlanError, Progress, Runtime
from asyncloader._loading.progress import Meter
from tests.faulty import FaultyStorage, Stuck
from tests.oracle import write_checkpoint
from tests.support import (
    MemoryStorage,
    Run,
    data,
    nothing_left_behind,
    rows_in,
    rows_on_disk,
    table_for,
    unchanged,
)

if TYPE_CHECKING:
    from pathlib import Path

    from asyncloader._planning.targets import LoadInfo
    from tests.faulty import Read

pytestmark = pytest.mark.both_loops

CONTENT = data([1, 2, -1, 2**40], m=1)
DENSE = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, {"t": CONTENT}, DENSE, ranks=2)
    return path


def targets() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in DENSE.items()}


def test_the_first_arguments_are_those_of_recis() -> None:
    parameters = list(inspect.signature(Loader).parameters.values())
    assert [p.name for p in parameters[:5]] == [
        "checkpoint_path",
        "hashtables",
        "tensors",
        "parallel",
        "filter_func",
    ]
    assert Loader("anywhere").options.parallel == 16
    assert not any(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters[5:])


@pytest.mark.parametrize(
    "arguments",
    [
        {"parallel": 0},
        {"parallel": -1},
        {"chunk_bytes": 0},
        {"max_inflight_bytes": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Loader("nowhere", **arguments)  # type: ignore[arg-type]  # the very thing


@pytest.mark.parametrize(
    "arguments",
    [
        {"parallel": 2.5},
        {"parallel": True},
        {"chunk_bytes": "8"},
        {"filter_func": 3},
        {"tensors": {"w": [1.0]}},
        {"tensors": {3: torch.zeros(1)}},
        {"hashtables": {"t": object()}},
        {"progress": 3},
    ],
)
def test_arguments_of_the_wrong_type_are_refused_at_once(arguments: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        Loader("nowhere", **arguments)  # type: ignore[arg-type]  # the very thing


def test_destinations_that_cannot_be_told_apart_are_refused() -> None:
    table = HashTable([1], name="t")
    with pytest.raises(ValueError, match="'t'"):
        Loader("nowhere", {"a": table, "b": table})
    with pytest.raises(ValueError, match="'t'"):
        Loader("nowhere", {"a": table, "b": HashTable([2], name="t")})
    with pytest.raises(ValueError, match="'t'"):
        Loader("nowhere", {"a": table}, {"t": torch.zeros(1)})


def test_the_default_load_info_is_plain_data_and_fresh_each_time() -> None:
    table = HashTable([1], name="t")
    table.add_slot("m", [1])
    family = HashTable([1], name="x", coalesced=True, children=["u", "v"])
    loader = Loader("nowhere", {"t": table, "x": family}, {"w": torch.zeros(1)})
    info = loader.default_load_info()
    assert info == {
        "t": {"t": ["id", "embedding", "m"]},
        "u": {"u": ["id", "embedding"]},
        "v": {"v": ["id", "embedding"]},
        "w": {"w": []},
    }
    info.clear()
    assert loader.default_load_info() != {}


@pytest.mark.parametrize("result", [None, 3, {"t": "t"}])
async def test_a_filter_that_returns_no_load_info_is_an_error(
    checkpoint: Path, result: object
) -> None:
    loader = Loader(checkpoint, filter_func=lambda _: result)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="filter_func must return"):
        await loader.aload()


async def test_a_plan_touches_nothing_and_says_what_would_be_read(checkpoint: Path) -> None:
    table, tensors = table_for(CONTENT), targets()
    plan = await Loader(checkpoint, {"t": table}, tensors).plan()
    assert len(table) == 0
    assert all(bool((tensor == 0).all()) for tensor in tensors.values())
    on_disk = sum(t.nbytes for t in (*DENSE.values(), CONTENT.ids, *CONTENT.slots.values()))
    assert plan.nbytes == on_disk
    assert [load.name for load in plan.tensors] == ["w", "b"]
    assert "2 tensors, 1 tables (about 4 rows)" in str(plan)


async def test_a_report_tells_all_that_was_done(checkpoint: Path) -> None:
    table, tensors = table_for(CONTENT, only=["embedding"]), targets()
    tensors["new"] = torch.ones(2)
    tensors["left"] = torch.ones(2)
    table.add_slot("extra", [1])

    def without_left(info: LoadInfo) -> LoadInfo:
        del info["left"]
        return info

    loader = Loader(checkpoint, {"t": table}, tensors, filter_func=without_left)
    report = await loader.aload()
    assert report.tensors == {
        "w": "loaded",
        "b": "loaded",
        "new": "missing",
        "left": "not asked for",
    }
    counts = report.tables["t"]
    assert (counts.rows, counts.new, counts.replaced) == (4, 4, 0)
    assert (counts.duplicates, counts.dropped) == (0, 0)
    assert set(report.missing) == {"new", "t@extra"}
    assert report.unexpected == ("t@m",)
    assert report.bytes_read >= report.bytes_wanted > 0
    assert report.reads > 0
    assert report.seconds > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.reads = 0  # type: ignore[misc]  # the very thing


def test_a_report_is_one_line_as_text_and_a_table_for_rich(checkpoint: Path) -> None:
    report = Loader(checkpoint, {"t": table_for(CONTENT)}, {**targets(), "x": torch.ones(1)}).load()
    assert "\n" not in str(report)
    assert "2 tensors, 4 rows of 1 table, 1 missing" in str(report)
    console = Console(file=io.StringIO(), width=100)
    console.print(report)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO
    for what in ("checkpoint", "2 loaded", "1 missing", "rows", "missing: x"):
        assert what in text


async def test_loading_twice_replaces_every_row(checkpoint: Path) -> None:
    table = table_for(CONTENT)
    loader = Loader(checkpoint, {"t": table})
    await loader.aload()
    counts = (await loader.aload()).tables["t"]
    assert (counts.new, counts.replaced) == (0, 4)
    assert rows_in(table) == rows_on_disk(CONTENT)


async def test_two_loads_of_other_tables_share_a_loop(checkpoint: Path) -> None:
    tables = [table_for(CONTENT) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for table in tables:
            group.create_task(Loader(checkpoint, {"t": table}).aload())
    assert all(rows_in(table) == rows_on_disk(CONTENT) for table in tables)


async def test_a_table_takes_one_load_at_a_time(checkpoint: Path) -> None:
    table = table_for(CONTENT)
    update = table.begin(most=1, expected=1)
    with pytest.raises(RuntimeError, match="one update at a time"):
        await Loader(checkpoint, {"t": table}).aload()
    assert len(table) == 0
    update.abort()
    await Loader(checkpoint, {"t": table}).aload()
    assert rows_in(table) == rows_on_disk(CONTENT)


async def test_of_two_loads_into_one_table_at_once_one_is_refused_and_the_other_is_right(
    checkpoint: Path,
) -> None:
    table = table_for(CONTENT)
    loop, reading = asyncio.get_running_loop(), asyncio.Event()

    def rows(read: Read) -> bool:  # by then the load has taken its table
        return read.name.startswith("model-") and read.offset > 0

    def fault(read: Read) -> int | None:
        if rows(read):
            loop.call_soon_threadsafe(reading.set)
        return stuck(read)

    stuck = Stuck(at=rows)

    with nothing_left_behind(table):
        wrap = partial(FaultyStorage, fault=fault)
        async with Runtime(wrap_storage=wrap) as runtime, asyncio.TaskGroup() as group:
            first = group.create_task(Loader(checkpoint, {"t": table}, runtime=runtime).aload())
            await reading.wait()
            with pytest.raises(RuntimeError, match="one update at a time"):
                await Loader(checkpoint, {"t": table}).aload()
            stuck.release()
    assert first.result().tables["t"].new == 4
    assert rows_in(table) == rows_on_disk(CONTENT)


async def test_a_table_that_is_refused_takes_no_other_table_with_it(checkpoint: Path) -> None:
    other, table = table_for(CONTENT, name="other"), table_for(CONTENT)
    update = table.begin(most=1, expected=1)
    info = {name: {"t": ["id", "embedding"]} for name in ("other", "t")}
    loader = Loader(checkpoint, {"other": other, "t": table}, filter_func=lambda _: info)
    with unchanged(other), pytest.raises(RuntimeError, match="one update at a time"):
        await loader.aload()
    update.abort()


@pytest.mark.parametrize(
    ("path", "kind"),
    [(b"/tmp", TypeError), (None, TypeError), (7, TypeError), ("a\0b", ValueError)],
)
def test_what_is_no_path_is_refused_at_construction(path: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        Loader(path)


async def test_progress_never_goes_back(checkpoint: Path) -> None:
    seen: list[Progress] = []
    ticks = itertools.count()
    run = Run(
        storage=MemoryStorage.of(checkpoint),
        tables={"t": table_for(CONTENT)},
        tensors=targets(),
        chunk_bytes=8,
        meter=Meter(0, seen.append, clock=lambda: float(next(ticks))),
    )
    await run.load()
    assert len(seen) == run.meter.reads + 1
    for one, next_ in itertools.pairwise(seen):
        assert one.bytes_done <= next_.bytes_done
        assert one.seconds < next_.seconds
    assert seen[-1].bytes_done == seen[-1].bytes_total == run.meter.wanted


async def test_a_slot_added_after_the_loader_was_made_is_loaded(checkpoint: Path) -> None:
    table = table_for(CONTENT, only=["embedding"])
    loader = Loader(checkpoint, {"t": table})
    table.add_slot("m", [1])
    await loader.aload()
    assert rows_in(table) == rows_on_disk(CONTENT)


async def test_progress_ends_with_all_bytes(checkpoint: Path) -> None:
    seen: list[Progress] = []
    report = await Loader(checkpoint, {"t": table_for(CONTENT)}, progress=seen.append).aload()
    last = seen[-1]
    assert last.bytes_done == last.bytes_total == report.bytes_wanted
    assert last.current == "t"
    with pytest.raises(dataclasses.FrozenInstanceError):
        last.seconds = 0.0  # type: ignore[misc]  # the very thing


async def test_a_listener_that_fails_stops_the_load(checkpoint: Path) -> None:
    def fail(_: Progress) -> None:
        raise LookupError("no")

    table = table_for(CONTENT)
    with pytest.raises(LookupError):
        await Loader(checkpoint, {"t": table}, progress=fail).aload()
    assert len(table) == 0
    table.insert(torch.tensor([1]), torch.ones(1, 2))


def test_progress_is_told_at_most_ten_times_a_second() -> None:
    now, seen = [0.0], list[Progress]()
    meter = Meter(1000, seen.append, clock=lambda: now[0])
    for _ in range(1000):
        now[0] += 0.001
        meter.note(read=2, wanted=1, current="t")
    meter.finish()
    assert 9 <= len(seen) <= 11
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    assert seen[-1] == Progress(bytes_done=1000, bytes_total=1000, seconds=now[0], current="t")
    assert (meter.read, meter.reads) == (2000, 1000)


def test_progress_true_shows_a_bar(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Loader(checkpoint, {"t": table_for(CONTENT)}, progress=True).load()
    assert isinstance(report, LoadReport)
    assert "t" in capsys.readouterr().err


def test_a_path_may_be_any_path(checkpoint: Path) -> None:
    for path in (str(checkpoint), checkpoint, os.fspath(checkpoint) + "/"):
        assert Loader(path, {"t": table_for(CONTENT)}).load().tables["t"].rows == 4


def test_a_loader_shows_what_it_fills(checkpoint: Path) -> None:
    loader = Loader(checkpoint, {"t": table_for(CONTENT)}, targets())
    assert repr(loader) == f"<Loader {str(checkpoint)!r}: 1 tables, 2 tensors>"


async def test_a_loader_of_nothing_loads_nothing(checkpoint: Path) -> None:
    report = await Loader(checkpoint).aload()
    assert (report.bytes_read, report.reads, report.tables, report.tensors) == (0, 0, {}, {})
    assert set(report.unexpected) == {"t", "w", "b"}


async def test_one_source_may_feed_several_destinations(checkpoint: Path) -> None:
    one, other = table_for(CONTENT, name="one"), table_for(CONTENT, name="other")
    tensors = {"v": torch.zeros(2, 3), "w": torch.zeros(3, 2).T}
    slots = ["id", "embedding", "m"]
    info: LoadInfo = {"one": {"t": slots}, "other": {"t": slots}, "v": {"w": []}, "w": {"w": []}}
    await Loader(
        checkpoint, {"one": one, "other": other}, tensors, filter_func=lambda _: info
    ).aload()
    assert rows_in(one) == rows_in(other) == rows_on_disk(CONTENT)
    assert all(torch.equal(tensor, DENSE["w"]) for tensor in tensors.values())


async def test_tensors_are_taken_as_they_are_when_the_load_begins(checkpoint: Path) -> None:
    tensors = {"w": torch.zeros(2, 3)}
    loader = Loader(checkpoint, tensors=tensors)
    tensors["w"].data = torch.zeros(2, 3, dtype=torch.float16)
    with pytest.raises(PlanError, match="'w' is float16"):
        await loader.aload()
    tensors["w"].data = torch.zeros(2, 3)
    await loader.aload()
    assert torch.equal(tensors["w"], DENSE["w"])


def test_a_bar_takes_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, {}, {"t[/x]": torch.ones(2)})
    tensor = torch.zeros(2)
    Loader(tmp_path, tensors={"t[/x]": tensor}, progress=True).load()
    assert tensor.tolist() == [1.0, 1.0]
    assert "t[/x]" in capsys.readouterr().err


async def test_a_listener_that_counts_as_false_is_told_too(checkpoint: Path) -> None:
    class Seen(list[Progress]):
        def __call__(self, progress: Progress) -> None:
            self.append(progress)

    seen = Seen()
    await Loader(checkpoint, {"t": table_for(CONTENT)}, progress=seen).aload()
    assert seen


async def test_every_name_of_tied_memory_has_to_fit(checkpoint: Path) -> None:
    tied = torch.zeros(2, 3)
    with pytest.raises(PlanError, match="'b' is float32"):
        await Loader(checkpoint, tensors={"b": tied, "w": tied}).aload()
    assert not tied.any()


def test_overlaps_and_mismatches_come_in_one_error(checkpoint: Path) -> None:
    memory = torch.zeros(8)
    tensors = {"w": memory[:6].view(2, 3), "b": memory[5:6]}
    with pytest.raises(PlanError) as caught:
        Loader(checkpoint, tensors=tensors).load()
    assert len(caught.value.problems) == 2


def test_a_missing_checkpoint_has_the_facts_of_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Loader(tmp_path / "x").load()
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "x")


async def test_a_misspelt_name_is_guessed(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"bb": torch.zeros((), dtype=torch.int64), "www": torch.zeros(2, 3)}
    table = table_for(CONTENT, name="tt")
    await Loader(checkpoint, {"t": table}, tensors).aload()
    assert "'bb' (did you mean 'b'?)" in caplog.text
    with pytest.raises(PlanError, match=r"'tt' is asked for .* \(did you mean 't'\?\)"):
        await Loader(checkpoint, {"t": table}, strict=True).aload()


@pytest.mark.parametrize("what", ["hashtables", "tensors"])
def test_targets_are_mappings(what: str) -> None:
    with pytest.raises(TypeError, match=what):
        Loader("nowhere", **{what: [torch.zeros(1)]})  # type: ignore[arg-type]  # the very thing
