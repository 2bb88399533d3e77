"""Checkpoints of a run, as RecIS's trainer has them: `layout="run"`."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncloader import HashTable, Loader, SaveError, Saver, gen_slice, latest, load_tensors
from tests.folders import FAILURES, WatchedFolder, content, save_into, sites
from tests.oracle import rows_of
from tests.steps import Steps
from tests.support import debug_off, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Callable

GENUINE = Path(__file__).parent / "data" / "recis_run"
STATES = {"extra.pt", "io_state_0.pt", "io_state_count", "model.pt"}


def table(version: int = 1, *, name: str = "t", rank: int = 0, ranks: int = 1) -> HashTable:
    part = gen_slice(rank, ranks)
    made = HashTable([4], name=name, slice=part)
    made.add_slot("sparse_adamw_exp_avg", [4])
    ids = torch.tensor([id_ for id_ in range(0, 60_000, 1013) if part.accepts(id_)])
    made.insert(ids, torch.full((len(ids), 4), float(version)))
    return made


def dense(version: int = 1) -> dict[str, torch.Tensor]:
    return {
        "tower.weight": torch.full((3, 2), float(version)),
        "calls": torch.tensor(version),
        "t@filter_global_step": torch.tensor([version]),
        "sparse_adamw_beta1": torch.tensor(0.9),
        "sparse_adamw_step": torch.tensor([version]),
    }


def save(path: Path, version: int = 1, **options: Any) -> Any:  # noqa: ANN401  # of Saver
    states = {"extra": {"global_step": torch.tensor(version)}, "io_state": {"train_io": {0: b"x"}}}
    how: dict[str, Any] = {"hashtables": {"t": table(version)}, "tensors": dense(version)}
    return Saver(path=path, layout="run", **(how | states | options)).save()


def test_a_plain_save_over_it_leaves_no_tensor_of_it_behind(tmp_path: Path) -> None:
    """But what another program has put there since stays, as it belongs to that."""
    path = tmp_path / "run" / "ckpt_1"
    save(path)
    Saver(path=path, tensors={"w": torch.ones(1)}).save()
    assert set(load_tensors(path)) == {"w"}
    torch.save({"theirs": torch.ones(1)}, path / "model.pt")
    Saver(path=path, tensors={"w": torch.ones(1)}).save()
    assert set(load_tensors(path)) == {"w", "theirs"}


def unpickled(path: Path) -> Any:  # noqa: ANN401  # any value
    return torch.load(path, weights_only=True)


def lines(run: Path) -> list[str]:
    return (run / "checkpoint").read_text().split("\n")[:-1]


def recis_load(run: Path) -> dict[str, Any]:
    """Read a run's newest checkpoint in the order of RecIS's `Saver.load`, by its files' facts."""
    path = run / (run / "checkpoint").read_text().strip().rsplit("\n", 1)[-1].strip()
    index = json.loads((path / "index").read_bytes())
    keys = json.loads((path / "tensorkey.json").read_bytes())
    assert all((path / file).is_file() for file in index["file_index"])
    found: dict[str, Any] = {"blocks": set(), "tables": set(keys.values())}
    for key in index["block_index"]:
        found["blocks"].add(keys.get(key, key))
    found["model"] = unpickled(path / "model.pt")
    found["extra"] = unpickled(path / "extra.pt")
    ranks = int((path / "io_state_count").read_text())
    found["io"] = [unpickled(path / f"io_state_{rank}.pt") for rank in range(ranks)]
    return found


def test_recis_finds_each_thing_where_it_looks_for_it(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    save(tmp_path / "ckpt_1", extra={"global_step": torch.tensor(1), "dense_optimizer": optimizer})
    found = recis_load(tmp_path)
    whole = "00000@65536@65536"
    slots = {f"t@{slot}^{whole}" for slot in ("id", "embedding", "sparse_adamw_exp_avg")}
    assert found["tables"] == slots
    assert found["blocks"] == slots | {"sparse_adamw_beta1^ ", "sparse_adamw_step^ "}
    assert isinstance(found["model"], OrderedDict)
    assert list(found["model"]) == ["tower.weight", "calls", "t@filter_global_step"]
    for name, tensor in found["model"].items():
        assert torch.equal(tensor, dense()[name])
    assert found["extra"]["dense_optimizer"] == optimizer.state_dict()
    assert found["io"] == [{"train_io": {0: b"x"}}]
    assert lines(tmp_path) == ["ckpt_1"]


def test_a_genuine_run_that_is_loaded_and_saved_again_is_the_same(tmp_path: Path) -> None:
    genuine = GENUINE / "ckpt_30"
    truth = unpickled(genuine / "truth.pt")
    tables = {}
    for name, one in truth["tables"].items():
        made = HashTable(list(one["slots"]["embedding"].shape[1:]), name=name)
        for slot, rows in one["slots"].items():
            if slot != "embedding":
                made.add_slot(slot, rows.shape[1:], rows.dtype)
        tables[name] = made
    tensors = {n: torch.zeros_like(x) for n, x in (truth["dense"] | truth["scalars"]).items()}
    Loader(genuine, tables, tensors, strict=True).load()
    extra, io_state = unpickled(genuine / "extra.pt"), unpickled(genuine / "io_state_0.pt")
    Saver(
        path=tmp_path / "ckpt_30", hashtables=tables, tensors=tensors, layout="run", extra=extra,
        io_state=io_state, parallel=4, for_recis=True,
    ).save()  # fmt: skip

    found = recis_load(tmp_path)
    assert found["model"].keys() == truth["dense"].keys()
    assert all(torch.equal(x, truth["dense"][n]) for n, x in found["model"].items())
    assert {"model.pt", "io_state_count"} <= {file.name for file in genuine.iterdir()}
    assert str(found["extra"]) == str(extra)
    assert found["io"] == [io_state]
    index = json.loads((genuine / "index").read_bytes())["block_index"]
    keys = json.loads((tmp_path / "ckpt_30" / "index").read_bytes())["block_index"]
    assert keys.keys() == index.keys()
    for name, made in tables.items():
        there = truth["tables"][name]
        again = {slot: made.rows(slot) for slot in made.slots()}
        assert rows_of(made.ids(), again) == rows_of(there["ids"], there["slots"])


def kinds() -> dict[str, torch.Tensor]:
    """Make tensors of every dtype that torch.save and RecIS's torch know, and of every layout."""
    made = {
        f"dtype.{dtype}": torch.randint(0, 2, (3, 5)).to(dtype)
        for dtype in (
            torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
            torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint16,
            torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.complex64,
        )
    }  # fmt: skip
    wide = torch.arange(5_000_000.0)  # more than one piece
    return made | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "wide": wide,
        "tied": wide,
        "cut": torch.arange(100)[7:9],
        "turned": torch.arange(6_000_000).view(2000, 3000).t(),
        "spread": torch.ones(1).expand(4, 4),
        "conjugate": torch.tensor([1 + 2j, 3j], dtype=torch.complex64).conj(),
        "grad": torch.nn.Parameter(torch.ones(2)),
        "ünï .ode\n": torch.ones(1),
        "": torch.ones(2),
    }


def test_torch_reads_every_kind_of_tensor_back_and_each_checksum_fits(tmp_path: Path) -> None:
    tensors = kinds()
    save(tmp_path / "1", tensors=tensors)
    path = tmp_path / "1" / "model.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    found = unpickled(path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tolist() == tensor.tolist()
        assert found[name].is_contiguous()
        size = found[name].untyped_storage().nbytes()
        assert size == tensor.numel() * tensor.itemsize, "no more than its own bytes"
    assert found["tied"].data_ptr() == found["wide"].data_ptr()
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(mapped["turned"], tensors["turned"])


@pytest.mark.slow
@pytest.mark.every_step
def test_tens_of_thousands_of_tensors_are_one_archive(tmp_path: Path) -> None:
    """More than 65,535 entries need the long form of a zip's end."""
    tensors = {f"w{number}": torch.tensor(number) for number in range(65_600)}
    save(tmp_path / "1", tensors=tensors)
    found = unpickled(tmp_path / "1" / "model.pt")
    assert {name: int(one) for name, one in found.items()} == dict(
        zip(tensors, range(65_600), strict=True)
    )


def test_what_was_saved_is_loaded_and_every_byte_verified(tmp_path: Path) -> None:
    tensors = {name: one for name, one in kinds().items() if not one.is_conj()}
    save(tmp_path / "1", tensors=tensors | dense())
    fresh = {name: torch.zeros_like(one) for name, one in (tensors | dense()).items()}
    fresh["spread"] = torch.zeros(4, 4)
    loaded = HashTable([4], name="t")
    loaded.add_slot("sparse_adamw_exp_avg", [4])
    report = Loader(latest(tmp_path), {"t": loaded}, fresh, strict=True, verify="require").load()
    assert report.bytes_verified == report.bytes_wanted
    for name, one in (tensors | dense()).items():
        assert fresh[name].tolist() == one.tolist()


def test_a_flipped_bit_in_model_pt_is_found(tmp_path: Path) -> None:
    save(tmp_path / "1")
    path = tmp_path / "1" / "model.pt"
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(torch.ones(6).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(Exception, match=r"model\.pt.*tower\.weight"):
        load_tensors(tmp_path / "1")


def test_without_dense_state_and_extra_there_are_no_files_for_them(tmp_path: Path) -> None:
    save(tmp_path / "1", tensors={}, extra=None, io_state=None)
    assert not STATES & content(tmp_path / "1").keys()


def test_without_tables_the_names_are_empty(tmp_path: Path) -> None:
    save(tmp_path / "1", hashtables={}, tensors={"w": torch.ones(1)})
    index = json.loads((tmp_path / "1" / "index").read_bytes())
    assert index == {"file_index": {}, "block_index": {}}
    assert load_tensors(tmp_path / "1").keys() == {"w"}


def test_an_older_checkpoint_in_the_folder_is_replaced_whole(tmp_path: Path) -> None:
    save(tmp_path / "1")
    save(tmp_path / "1", tensors={}, extra=None, io_state=None)
    assert not STATES & content(tmp_path / "1").keys()
    assert lines(tmp_path) == ["1"]


# The list, and what is removed.


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, ["b"]),
        ("", ["b"]),
        ("\n\n  \n", ["b"]),
        ("a\nb\nc\n", ["a", "c", "b"]),
        ("b\nb\n", ["b"]),
        ("a", ["a", "b"]),
        ("gone\r\n a \n", ["gone", "a", "b"]),
    ],
)
def test_the_id_becomes_the_last_line_once(
    tmp_path: Path, before: str | None, after: list[str]
) -> None:
    if before is not None:
        (tmp_path / "checkpoint").write_bytes(before.encode())
    save(tmp_path / "b")
    assert lines(tmp_path) == after
    assert {entry.name for entry in tmp_path.iterdir()} == {"b", "checkpoint"}


def test_the_newest_stay_and_the_line_of_the_others_goes_with_them(tmp_path: Path) -> None:
    for version in range(4):
        report = save(tmp_path / f"v{version}", version, max_keep=2)
    assert report.evicted == ("v1",)
    assert lines(tmp_path) == ["v2", "v3"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"v2", "v3", "checkpoint"}


def test_the_same_id_twice_never_removes_what_was_just_written(tmp_path: Path) -> None:
    """RecIS counts it twice, and deletes it."""
    for _ in range(3):
        save(tmp_path / "last", max_keep=1)
    assert lines(tmp_path) == ["last"]
    assert recis_load(tmp_path)["extra"]


def test_nothing_is_removed_that_no_saver_wrote(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("of_recis", "with_notes", "half_gone", "plain"):
        save(tmp_path / name)
    (tmp_path / "of_recis" / "asyncloader.json").unlink()
    (tmp_path / "with_notes" / "notes.txt").touch()
    (tmp_path / "half_gone" / "index").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("plain")
    with (tmp_path / "checkpoint").open("a") as names:
        names.write("link\n../plain\n.\n\n")
    report = save(tmp_path / "new", max_keep=1)
    assert report.evicted == ("plain", "half_gone")
    there = {entry.name for entry in tmp_path.iterdir()}
    assert there == {"of_recis", "with_notes", "elsewhere", "link", "new", "checkpoint"}
    assert "'with_notes' is kept" in caplog.text
    assert "notes.txt" in caplog.text


# What is refused.


class OfTheirOwn:
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {"step": OfTheirOwn()}}, r"extra\.pt would hold an object of [\w.]*OfTheirOwn"),
        ({"extra": {"step": object()}}, r"extra\.pt would hold an object of object"),
        ({"io_state": {"x": [Path("a")]}}, r"io_state_0\.pt would hold an object of pathlib"),
        ({"extra": {"f": lambda: 0}}, r"extra\.pt: torch cannot save"),
    ],
)
def test_what_weights_only_would_not_read_back_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "1", **options)
    assert list(tmp_path.iterdir()) == []


def test_values_that_hold_themselves_are_refused(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["again"] = endless
    with pytest.raises(ValueError, match="holds itself"):
        save(tmp_path / "1", extra=endless)


@pytest.mark.parametrize(
    ("path", "options", "error"),
    [
        ("run/1", {"layout": "other"}, ValueError),
        ("run/1", {"extra": {}}, ValueError),
        ("run/1", {"io_state": {}}, ValueError),
        ("run/1", {"max_keep": 1}, ValueError),
        ("run/1", {"layout": "run", "max_keep": 0}, ValueError),
        ("run/1", {"layout": "run", "extra": []}, TypeError),
        ("run/.1", {"layout": "run"}, ValueError),
        ("run/checkpoint", {"layout": "run"}, ValueError),
        ("run/a ", {"layout": "run"}, ValueError),
        ("run/a\nb", {"layout": "run"}, ValueError),
        ("run/..", {"layout": "run"}, ValueError),
        ("/", {"layout": "run"}, ValueError),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    path: str, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        Saver(path=path, **options)


def test_values_are_those_of_the_moment_when_the_save_was_asked_for(tmp_path: Path) -> None:
    extra = {"deep": [{"step": 1}]}
    saver = Saver(path=tmp_path / "1", layout="run", extra=extra)

    async def save_and_go_on() -> None:
        saving = saver.asave()
        extra["deep"][0]["step"] = 2
        await saving

    asyncio.run(save_and_go_on())
    assert unpickled(tmp_path / "1" / "extra.pt") == {"deep": [{"step": 1}]}


async def test_a_tensor_of_extra_that_is_written_to_meanwhile_ends_the_save(
    tmp_path: Path,
) -> None:
    moment = torch.ones(3)

    def train(_: int, what: str) -> None:
        if what.endswith("extra.pt") and what.startswith("sync"):
            moment.add_(1)

    folder = WatchedFolder.at(tmp_path / "1", train)
    with pytest.raises(SaveError, match=r"written to while they were saved.*extra\.pt"):
        await save_into(folder, {}, {}, layout="run", extra={"moment": moment})
    assert content(tmp_path / "1") == {}


# What RecIS could not read.


def odd_tables() -> dict[str, HashTable]:
    square, caret = HashTable([2, 2], name="square"), HashTable([2], name="a^b")
    reserved = HashTable([2], name="reserved")
    reserved.insert(torch.tensor([5, -1]), torch.ones(2, 2))
    return {"square": square, "a^b": caret, "reserved": reserved}


def test_what_recis_cannot_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"u": torch.ones(1, dtype=torch.uint16), "fine": torch.ones(1)}
    report = Saver(path=tmp_path, hashtables=odd_tables(), tensors=tensors, parallel=1).save()
    said = "\n".join(report.recis_problems)
    assert len(report.recis_problems) == 4
    assert "all of model-000000-of-000001.safetensors" in said
    assert "'u' (uint16)" in said
    assert "'a^b'" in said
    assert "'square@embedding'" in said
    assert "keeps -1 for itself: table 'reserved'" in said
    assert all(problem in caplog.text for problem in report.recis_problems)
    assert report.to_dict()["recis_problems"]


def test_what_torch_reads_in_model_pt_is_no_problem_of_recis(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    report = save(tmp_path / "1", tensors={"u": torch.ones(1, dtype=torch.uint16)}, for_recis=True)
    assert report.recis_problems == ()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("what", "written"), [("square", False), ("a^b", False), ("reserved", True)]
)
def test_a_save_for_recis_refuses_what_recis_cannot_read(
    tmp_path: Path, what: str, *, written: bool
) -> None:
    """Ids are known while they are written; nothing of that is committed, or left."""
    path = tmp_path / "1"
    with pytest.raises(SaveError, match=f"for_recis: RecIS.*{what}".replace("^", r"\^")):
        Saver(path=path, hashtables={what: odd_tables()[what]}, for_recis=True).save()
    assert path.exists() == written
    assert not written or list(path.iterdir()) == []


def test_io_state_without_extra_is_nothing_to_recis(tmp_path: Path) -> None:
    report = save(tmp_path / "1", extra=None)
    [problem] = report.recis_problems
    assert "no io_state without extra.pt" in problem


# Several ranks.


def save_rank(path: Path, rank: int, **options: object) -> None:
    how = {"io_state": {"train_io": {0: rank}}, "extra": {"of": rank}, "timeout": 0.1}
    tables, tensors = {"t": table(rank=rank, ranks=2)}, dense() if rank == 0 else {}
    saver = Saver(
        rank, 2, 2, path, tables, tensors, save_id="x", layout="run",
        **(how | options),  # type: ignore[arg-type]
    )  # fmt: skip
    saver.save()


def test_each_rank_writes_its_io_state_and_rank_0_the_rest(tmp_path: Path) -> None:
    for rank in (1, 0):
        save_rank(tmp_path / "1", rank)
    found = recis_load(tmp_path)
    assert found["io"] == [{"train_io": {0: 0}}, {"train_io": {0: 1}}]
    assert found["extra"] == {"of": 0}
    assert load_tensors(tmp_path / "1").keys() == dense().keys()


def test_a_rank_without_io_state_beside_others_is_an_error(tmp_path: Path) -> None:
    save_rank(tmp_path / "1", 1, io_state=None)
    with pytest.raises(SaveError, match=r"ranks \[1\] gave no io_state"):
        save_rank(tmp_path / "1", 0)
    assert content(tmp_path / "1") == {}
    assert not (tmp_path / "checkpoint").exists()


def test_a_rank_whose_io_state_cannot_be_saved_tells_rank_0(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"io_state_1\.pt"):
        save_rank(tmp_path / "1", 1, io_state={"x": OfTheirOwn()})
    with pytest.raises(SaveError, match=r"rank 1 gave up.*io_state_1\.pt"):
        save_rank(tmp_path / "1", 0)


# Faults at every step: the run is what it was, or what it shall be.


async def save_new(path: Path, fault: Callable[[int, str], str | None]) -> WatchedFolder:
    folder = WatchedFolder.at(path, fault)
    folder.give_up = broken
    await save_into(
        folder, {"t": table(9)}, dense(9), layout="run", parallel=2, max_keep=2,
        extra={"global_step": torch.tensor(9)}, io_state={},
    )  # fmt: skip
    return folder


def broken() -> None:
    raise OSError(5, "I/O error")


def version_of(path: Path) -> int | None:
    """Return the version of a checkpoint, all of which is of it; `None` if it is none."""
    if not (path / "index").exists():
        return None
    loaded = HashTable([4], name="t")
    tensors = {name: torch.zeros_like(one) for name, one in dense().items()}
    Loader(path, {"t": loaded}, tensors, verify="require").load()
    found = {int(unpickled(path / "extra.pt")["global_step"]), int(tensors["calls"])}
    found |= {*loaded.rows().int().flatten().tolist(), *tensors["tower.weight"].int()[0].tolist()}
    [version] = found
    return version


def check_run(run: Path, *, overwriting: bool) -> str:
    """Fail unless each listed checkpoint is whole, and the run is the old one or the new."""
    listed = lines(run)
    versions = {name: version_of(run / name) for name in ("a", "b", "c")}
    old = {"a": 1, "b": 2, "c": None}
    if overwriting:  # b, the last, is saved again, so nothing has to go
        assert listed == ["a", "b"]
        assert versions["a"] == 1
        assert versions["b"] in {2, 9, None}
        return {2: "old", 9: "new", None: "none"}[versions["b"]]
    if listed == ["a", "b"]:  # c may be there, whole, and not listed yet
        assert versions in (old, old | {"c": 9})
        return "old" if versions == old else "unlisted"
    assert listed in (["a", "b", "c"], ["b", "c"])  # a keeps its line until it is gone
    assert (versions["b"], versions["c"]) == (2, 9)
    assert versions["a"] in ({1, None} if "a" in listed else {None})
    return "new"


def failing(number: int, how: str) -> Callable[[int, str], str | None]:
    def fault(at: int, what: str) -> str | None:
        if at == number and "after" in how:
            return "after"
        if at == number or (at > number and how == "for good"):
            raise OSError(5, f"I/O error in {what}")
        return None

    return fault


def save_old(run: Path) -> None:
    save(run / "a", 1)
    save(run / "b", 2)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("overwriting", [False, True])
@pytest.mark.parametrize("how", FAILURES)
def test_a_run_of_which_any_call_fails_is_the_old_one_or_the_new(
    tmp_path: Path, overwriting: bool, how: str, every_step: bool
) -> None:
    """And the next save of that id puts everything right."""

    async def try_all() -> set[str]:
        name = "b" if overwriting else "c"
        save_old(tmp_path / "clean")
        calls = (await save_new(tmp_path / "clean" / name, lambda *_: None)).calls
        assert check_run(tmp_path / "clean", overwriting=overwriting) == "new"
        outcomes = set()
        share = FAILURES.index(how) + len(FAILURES) * overwriting
        for number in sites(calls, every=every_step, share=share, shares=6):
            run = tmp_path / str(number)
            save_old(run)
            failure = None
            with nothing_left_behind():
                try:
                    await save_new(run / name, failing(number, how))
                except SaveError as error:
                    failure = error
            outcome = check_run(run, overwriting=overwriting)
            if failure is None:
                assert outcome == "new", calls[number]
            elif "is saved, whole" in str(failure):
                assert outcome in {"unlisted", "new"}, calls[number]
            elif how != "for good" and not overwriting:
                assert outcome == "old", calls[number]
            outcomes.add(outcome)
            await save_new(run / name, lambda *_: None)
            assert check_run(run, overwriting=overwriting) == "new", calls[number]
        return outcomes

    outcomes = asyncio.run(try_all())
    assert {"old", "new"} <= outcomes


@pytest.mark.both_loops
@pytest.mark.slow
async def test_a_run_whose_save_is_cancelled_at_any_await_is_the_old_one_or_the_new(
    tmp_path: Path,
) -> None:
    """A commit that has begun is carried through, the list included."""
    outcomes = []
    tables = {"t": table(9)}
    with debug_off():
        for at in range(1000):
            run = tmp_path / str(at)
            save_old(run)
            steps = Steps(cancel_at=range(at, at + 1))
            saver = Saver(
                path=run / "c", hashtables=tables, tensors=dense(9), layout="run", max_keep=2,
                extra={"global_step": torch.tensor(9)}, io_state={}, parallel=2,
            )  # fmt: skip
            with nothing_left_behind(tables["t"]):
                cancelled = await steps.run(saver.asave)
            outcomes.append(check_run(run, overwriting=False))
            assert outcomes[-1] in {"old", "new"}
            if not cancelled:
                break
    assert len(outcomes) > 10
    assert set(outcomes) == {"old", "new"}


async def test_what_a_crash_has_moved_away_is_put_back_without_the_new_ones_model_pt(
    tmp_path: Path,
) -> None:
    """Or the old tables would be served with the dense parameters of a save that never was."""
    path = tmp_path / "1"
    Saver(path=path, hashtables={"t": table(1)}).save()
    old, dead = content(path), False

    def die(_: int, what: str) -> None:
        nonlocal dead
        dead = dead or what == "move .saving-1-x/index index"
        if dead:
            broken()

    folder = WatchedFolder.at(path, die)
    with pytest.raises(SaveError, match="no checkpoint now"):
        await save_into(folder, {"t": table(2)}, dense(2), layout="run", extra={}, save_id="x")
    assert {"model.pt", "extra.pt", "io_state_count"} < content(path).keys()

    def full(_: int, what: str) -> None:
        if what.startswith("create"):
            broken()

    with pytest.raises(SaveError, match="as it was"):
        await save_into(WatchedFolder.at(path, full), {"t": table(3)}, {})
    assert content(path) == old


async def test_what_a_crash_has_moved_away_comes_back_however_often_that_is_cut_off(
    tmp_path: Path,
) -> None:
    """Files that are back already must not be taken for those of the dead save."""

    def dying(path: Path, when: Callable[[str], bool]) -> WatchedFolder:
        """Return a folder that is as dead as the process once something happens."""
        dead = False

        def fault(_: int, what: str) -> None:
            nonlocal dead
            dead = dead or when(what)
            if dead:
                broken()

        return WatchedFolder.at(path, fault)

    moves = 0
    for at in range(100):
        path = tmp_path / str(at)
        Saver(path=path, hashtables={"t": table(1)}, tensors=dense(1), layout="run").save()
        old = content(path)
        folder = dying(path, lambda what: what == "move .saving-1-x/index index")
        with pytest.raises(SaveError, match="no checkpoint now"):
            await save_into(folder, {"t": table(2)}, dense(2), layout="run", extra={}, save_id="x")
        moves = 0

        def when(what: str, at: int = at) -> bool:
            nonlocal moves
            moves += what.startswith("move ")
            return moves > at or what.startswith("create")

        with pytest.raises(SaveError) as error:
            await save_into(dying(path, when), {"t": table(3)}, {})
        is_back = moves <= at
        assert ("not all back yet" in str(error.value)) == (not is_back)
        folder = dying(path, lambda what: what.startswith("create"))
        with pytest.raises(SaveError, match="as it was"):
            await save_into(folder, {"t": table(4)}, {})
        assert content(path) == old
        if is_back:
            break
    assert at > 10


def test_what_a_crash_has_not_evicted_goes_after_the_next_save(tmp_path: Path) -> None:
    """Also where the dead save has left its staging folder behind."""
    for name in "ab":
        save(tmp_path / name)
    (tmp_path / "b" / ".saving-1-dead").mkdir()
    (tmp_path / "b" / ".saving-1-dead" / "part-000000.json").write_bytes(b"")
    report = save(tmp_path / "c", max_keep=1)
    assert set(report.evicted) == {"a", "b"}
    assert lines(tmp_path) == ["c"]
    assert {path.name for path in tmp_path.iterdir()} == {"c", "checkpoint"}


@pytest.mark.parametrize(
    "what", ["remove a: index", "remove a: model", "remove a: asyncloader.json"]
)
def test_an_eviction_that_dies_at_any_step_is_carried_on_by_the_next_save(
    tmp_path: Path, what: str
) -> None:
    for name in "ab":
        save(tmp_path / name)
    before, dead = content(tmp_path / "a"), False

    def die(_: int, call: str) -> None:
        nonlocal dead
        step = call.removeprefix("run: ")
        dead = dead or step.replace("a: remove ", "remove a: ").startswith(what)
        if dead:
            broken()

    folder = WatchedFolder.at(tmp_path / "c", die)
    report = asyncio.run(save_into(folder, {"t": table(1)}, {}, layout="run", max_keep=2))
    assert dead
    assert report.evicted == ()
    assert lines(tmp_path) == ["a", "b", "c"]
    assert content(tmp_path / "a").keys() <= before.keys()
    assert save(tmp_path / "c", max_keep=2).evicted == ("a",)
    assert lines(tmp_path) == ["b", "c"]
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_that_another_saves_anew_meanwhile_is_not_evicted(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name)
    seen: list[str] = []

    def meanwhile(_: int, what: str) -> None:
        if what == "run: hold" and "move" in seen:  # the list is out, the eviction about to begin
            seen.clear()
            save(tmp_path / "a", 7)
        if what.startswith("run: move"):
            seen.append("move")

    folder = WatchedFolder.at(tmp_path / "c", meanwhile)
    report = asyncio.run(save_into(folder, {"t": table(1)}, {}, layout="run", max_keep=2))
    assert report.evicted == ("b",)
    assert lines(tmp_path) == ["c", "a"]
    assert (tmp_path / "a" / "index").exists()


def test_an_old_checkpoint_that_cannot_be_looked_at_is_left_alone(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name)

    def refuse(_: int, what: str) -> None:
        if what == "run: names a":
            broken()

    folder = WatchedFolder.at(tmp_path / "c", refuse)
    report = asyncio.run(save_into(folder, {"t": table(1)}, {}, layout="run", max_keep=1))
    assert report.evicted == ("b",)
    assert lines(tmp_path) == ["a", "c"]


def test_a_list_that_is_a_pipe_does_not_hang_a_save(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "checkpoint")
    with pytest.raises(SaveError, match="not a regular file"):
        save(tmp_path / "1")


def test_a_full_disk_within_extra_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    writes = 0

    def full(_: int, what: str) -> None:
        nonlocal writes
        writes += "extra.pt" in what and what.startswith("write")
        if writes == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "1/extra.pt"))

    large = {"x": torch.rand(1 << 20)}
    folder = WatchedFolder.at(tmp_path / "1", full)
    with pytest.raises(SaveError, match=r"extra\.pt: could not be written: No space left"):
        asyncio.run(save_into(folder, {"t": table(1)}, {}, layout="run", extra=large))
    assert writes == 2


def test_sets_and_bytearrays_are_those_of_the_moment(tmp_path: Path) -> None:
    values = {"s": {1}, "b": bytearray(b"a")}
    path = tmp_path / "1"
    saver = Saver(path=path, tensors={"w": torch.ones(1)}, layout="run", extra=values)

    async def run() -> None:
        task = saver.asave()
        values["s"].add(2)  # type: ignore[attr-defined]
        values["b"][:] = b"z"  # type: ignore[index]
        await task

    asyncio.run(run())
    assert unpickled(path / "extra.pt") == {"s": {1}, "b": bytearray(b"a")}
