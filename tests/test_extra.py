"""What a trainer saves beside a model, and what a file must not make us do."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import io
import json
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asyncloader import (
    CheckpointError,
    CheckpointNotFoundError,
    Loader,
    RunSummary,
    Saver,
    aread_extra,
    aread_io_state,
    inspect,
    read_extra,
    read_io_state,
)
from asyncloader.cli._app import run as run_here
from tests.genuine import NAMES, NEWEST, RUN, copy_of_run, truth
from tests.support import flat_tensors, raw

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader._tools.beside import Beside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of_run(tmp_path) / NEWEST


def same(found: object, wanted: object) -> bool:
    """Say whether two nested values agree, tensors bit for bit."""
    if isinstance(wanted, torch.Tensor):
        return isinstance(found, torch.Tensor) and raw(found) == raw(wanted)
    if isinstance(wanted, dict):
        assert isinstance(found, dict)
        return list(found) == list(wanted) and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        assert isinstance(found, list | tuple)
        pairs = zip(found, wanted, strict=True)
        return type(found) is type(wanted) and all(same(*pair) for pair in pairs)
    return type(found) is type(wanted) and found == wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_genuine_checkpoint_gives_what_the_trainer_had(name: str) -> None:
    found = read_extra(RUN / name)
    for key, value in truth(name).extra.items():
        assert any(torch.equal(one, value) for _, one in flat_tensors(found)), key
    assert same(found, torch.load(RUN / name / "extra.pt", weights_only=True))
    assert same(read_io_state(RUN / name), torch.load(RUN / name / "io_state_0.pt"))


def test_the_dense_optimizer_goes_on_from_it() -> None:
    extra = read_extra(RUN)
    states = extra["dense_optimizer"]["state"]
    parameters = [nn.Parameter(torch.zeros_like(one["exp_avg"])) for one in states.values()]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.load_state_dict(extra["dense_optimizer"])
    assert all(raw(optimizer.state[one]["step"]) == raw(torch.tensor(30.0)) for one in parameters)
    assert raw(optimizer.state[parameters[0]]["exp_avg"]) == raw(states[0]["exp_avg"])


def test_of_a_run_folder_the_newest_finished_checkpoint_is_read(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    assert read_extra(run)["global_step"] == 30
    (run / NEWEST / "extra.pt").write_bytes((run / NEWEST / "extra.pt").read_bytes()[:-30])
    assert read_extra(run)["global_step"] == 20


async def test_both_are_awaited_on_the_caller_s_loop() -> None:
    assert (await aread_extra(RUN))["global_step"] == 30
    assert list(await aread_io_state(RUN)) == ["train_io"]


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
    st.binary(min_size=1, max_size=5),  # torch refuses the empty one
)  # fmt: skip
TENSORS = st.builds(
    lambda dtype, shape, start: (torch.arange(start, start + 24) % 7).reshape(shape).to(dtype),
    st.sampled_from([torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.uint8]),
    st.sampled_from([(24,), (2, 3, 4), (24, 1)]),
    st.integers(0, 3),
)
VALUES = st.recursive(
    PLAIN | TENSORS | st.builds(lambda one: one.flatten()[3:11:2], TENSORS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=4) | st.integers(-5, 5), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4), st.booleans())
def test_what_torch_reads_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], compressed: bool
) -> None:
    folder = tmp_path_factory.mktemp("x")
    shutil.copytree(RUN / NEWEST, folder, dirs_exist_ok=True)
    path = folder / "extra.pt"
    torch.save(values, path)
    if compressed:
        pack(path)
    assert same(read_extra(folder), torch.load(path, weights_only=True))


def pack(path: Path) -> None:
    """Compress the files in an archive."""
    with zipfile.ZipFile(path) as archive:
        files = [(one.filename, archive.read(one)) for one in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)


class Called:
    """Would be called by `pickle`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Called(os.mkdir, "called"), r"posix\.mkdir"),
        (Called(eval, "1"), r"(builtins\.)?eval"),
        (Called(io.open, "called", "w"), r"(io|_io)\.open"),
        (Called(functools.partial, print), r"functools\.partial"),
        (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), r"datetime\.datetime"),
        (nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (torch.zeros(2).numpy(), r"numpy\.\S+"),
    ],
)
def test_more_than_plain_values_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, value: object, name: str
) -> None:
    monkeypatch.chdir(folder)
    torch.save({"x": value}, "io_state_0.pt")
    with pytest.raises(CheckpointError, match=rf"io_state_0\.pt: asks for '{name}'.*called") as one:
        read_io_state(folder)
    assert "add_safe_globals" in str(one.value)
    assert not os.path.exists("called")  # noqa: PTH110  # a fresh folder's


def test_what_the_program_allows_is_read(folder: Path) -> None:
    when = dt.timedelta(1)
    torch.save({"x": when}, folder / "extra.pt")
    with torch.serialization.safe_globals([dt.timedelta]):
        assert read_extra(folder) == {"x": when}


@pytest.mark.parametrize("value", [torch.ones(2), [1], None])
def test_a_file_that_holds_no_dict_is_refused(folder: Path, value: object) -> None:
    torch.save(value, folder / "extra.pt")
    with pytest.raises(CheckpointError, match=r"extra\.pt: holds a \w+, not a dict"):
        read_extra(folder)


def test_an_instruction_that_torch_does_not_know_is_told(folder: Path) -> None:
    torch.save({"x": b"y"}, folder / "extra.pt", pickle_protocol=0)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(CheckpointError, match=r"plain values: .*save it anew"),
    ):
        read_extra(folder)


def flipped(content: bytes) -> bytes:
    at = content.index(b"data/0") + 200
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("spoilt", "match"),
    [
        pytest.param(lambda _: b"", "cut short", id="empty"),
        pytest.param(lambda content: content[:-40], "cut short", id="short"),
        pytest.param(lambda content: bytes(len(content)), "cut short", id="zeros"),
        pytest.param(lambda _: pickle.dumps({"a": 1}), "torch before 1.6", id="pickle"),
        (flipped, r"'data/\w+' in it is damaged; copy it again"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(
    folder: Path, spoilt: Callable[[bytes], bytes], match: str
) -> None:
    path = folder / "extra.pt"
    path.write_bytes(spoilt(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"extra\.pt: .*{match}"):
        read_extra(folder)


@settings(max_examples=150)
@given(st.data())
def test_a_spoilt_pickle_is_values_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("x")
    shutil.copytree(RUN / NEWEST, folder, dirs_exist_ok=True)
    with zipfile.ZipFile(folder / "extra.pt") as archive:
        files = {one: archive.read(one) for one in archive.namelist()}
    name = next(one for one in files if one.endswith("data.pkl"))
    text = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with zipfile.ZipFile(folder / "extra.pt", "w") as archive:
        for one, content in (files | {name: bytes(text)}).items():
            archive.writestr(one, content)
    with contextlib.suppress(CheckpointError):
        assert isinstance(read_extra(folder), dict)


def test_a_long_name_does_not_fill_the_message(folder: Path) -> None:
    torch.save({"x": Called(eval, "1")}, folder / "extra.pt")
    with zipfile.ZipFile(folder / "extra.pt") as archive:
        files = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(folder / "extra.pt", "w") as archive:
        for one, content in files.items():
            archive.writestr(one, content.replace(b"\neval\n", b"\n" + b"e" * 9999 + b"\n"))
    with pytest.raises(CheckpointError, match=r"asks for '\w+\.?e+'") as refused:
        read_extra(folder)
    assert len(str(refused.value)) < 1000


def test_a_file_larger_than_the_limit_is_not_read(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"extra\.pt: holds 7,335 bytes.*limit="):
        read_extra(folder, limit=7334)
    assert read_extra(folder, limit=7335)


def test_a_bomb_is_refused_by_what_it_unpacks_to(folder: Path) -> None:
    torch.save({"x": torch.zeros(1 << 20)}, folder / "extra.pt")
    pack(folder / "extra.pt")
    assert (folder / "extra.pt").stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match=r"extra\.pt: holds 4,19\d,\d+ bytes.*limit="):
        read_extra(folder, limit=1 << 22)


def test_a_bomb_that_denies_its_size_is_damaged(folder: Path) -> None:
    torch.save({"x": torch.zeros(1 << 20)}, folder / "extra.pt")
    pack(folder / "extra.pt")
    content = bytearray((folder / "extra.pt").read_bytes())
    at = content.rindex(b"data/0") - 46
    at = content.rindex(b"PK\x01\x02", 0, at + 46)
    content[at + 24 : at + 28] = struct.pack("<I", 4090)
    (folder / "extra.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'data/0' in it is damaged"):
        read_extra(folder, limit=1 << 22)


def test_a_second_list_of_files_does_not_count(folder: Path) -> None:
    """Readers differ in which list they take; torch gets an archive with the checked one only."""
    small, large = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.zeros(1)}, small)
    torch.save({"x": torch.ones(1 << 20)}, large)
    (folder / "extra.pt").write_bytes(large.getvalue() + small.getvalue())
    assert read_extra(folder)["x"].shape == (1,)


def test_a_rank_that_was_not_saved_is_told_how_many_there_are(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"io_state_3\.pt: is not there: 1 rank saved"):
        read_io_state(folder, 3)
    (folder / "io_state_count").write_text("4\n")
    with pytest.raises(CheckpointError, match=r"says that there were 4 ranks: copy it, or wait"):
        read_io_state(folder, 3)
    shutil.copy(folder / "io_state_0.pt", folder / "io_state_7.pt")
    (folder / "io_state_count").unlink()
    with pytest.raises(CheckpointError, match=r"place in the data: 0, 7"):
        read_io_state(folder, 3)
    assert read_io_state(folder, 7) == read_io_state(folder)


@pytest.mark.parametrize("text", [b"", b"many", b"\0\0", b"9" * 100])
def test_a_count_that_is_no_number_is_not_believed(folder: Path, text: bytes) -> None:
    (folder / "io_state_count").write_bytes(text)
    with pytest.raises(CheckpointError):
        read_io_state(folder, 3)


def test_a_missing_extra_file_is_named(folder: Path) -> None:
    (folder / "extra.pt").unlink()
    with pytest.raises(CheckpointError, match=r"ckpt_30: extra\.pt: is not there"):
        read_extra(folder)


def test_a_bare_pickle_is_not_read(folder: Path) -> None:
    (folder / "extra.pt").rename(folder / "extra.pkl")
    with pytest.raises(CheckpointError, match=r"extra\.pkl: is a bare pickle.*as 'extra\.pt'"):
        read_extra(folder)
    with pytest.raises(CheckpointError, match=r"extra\.pkl: is a bare pickle"):
        Loader.from_bank([{"path": folder, "load": ["global_step"]}]).load()
    assert read_io_state(folder)


def test_paths_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        read_extra(tmp_path)
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        read_extra(RUN / NEWEST / "extra.pt")
    with pytest.raises(TypeError, match="limit"):
        read_extra(RUN, limit=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rank"):
        read_io_state(RUN, "0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank"):
        read_io_state(RUN, -1)


@pytest.fixture
def digested(tmp_path: Path) -> Path:
    """Return a checkpoint of a run that `Saver` wrote."""
    extra, io_state = {"global_step": torch.tensor(7)}, {"train_io": {0: b"x"}}
    tensors = {"w": torch.ones(2)}
    Saver(
        path=tmp_path / "run" / "c", tensors=tensors, layout="run", extra=extra, io_state=io_state
    ).save()
    return tmp_path / "run" / "c"


def test_what_a_saver_wrote_is_read_and_verified(digested: Path) -> None:
    assert read_extra(digested.parent, verify="require") == {"global_step": torch.tensor(7)}
    assert read_io_state(digested, verify="require") == {"train_io": {0: b"x"}}
    assert beside(digested).global_step == 7


def test_a_file_with_a_digest_is_compared(digested: Path) -> None:
    assert read_extra(digested, verify="require")["global_step"] == 7
    torch.save({"global_step": torch.tensor(8)}, digested / "extra.pt")
    with pytest.raises(CheckpointError, match=r"extra\.pt: is not what was written"):
        read_extra(digested)
    with pytest.raises(CheckpointError, match=r"extra\.pt: is not what was written"):
        Loader.from_bank([{"path": digested, "load": ["global_step"]}]).load()
    assert read_extra(digested, verify="off")["global_step"] == 8


def test_without_a_digest_required_verification_is_an_error(digested: Path) -> None:
    torch.save({}, digested / "io_state_1.pt")
    assert read_io_state(digested, 1) == {}
    with pytest.raises(CheckpointError, match=r"io_state_1\.pt: asyncloader\.json has no digest"):
        read_io_state(digested, 1, verify="require")
    with pytest.raises(CheckpointError, match="no digests"):
        read_extra(RUN, verify="require")


def test_a_bank_opens_only_the_files_whose_values_it_wants(folder: Path) -> None:
    (folder / "extra.pt").write_bytes(b"damaged")
    report = Loader.from_bank([{"path": folder, "load": ["train_io"]}]).load()
    assert report.extra == read_io_state(folder)
    with pytest.raises(CheckpointError, match=r"extra\.pt"):
        Loader.from_bank([{"path": folder, "load": ["global_step"]}]).load()


def beside(folder: Path) -> Beside:
    found = inspect(folder)
    assert not isinstance(found, RunSummary)
    assert found.beside.warnings == found.warnings
    return found.beside


def test_inspect_lists_the_files_and_the_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = beside(folder)
    assert found.global_step == 30
    assert {file.name: file.bytes for file in found.files} == {
        name: (folder / name).stat().st_size for name in ("extra.pt", "io_state_0.pt")
    }
    for rank in range(1, 5):
        shutil.copy(folder / "io_state_0.pt", folder / f"io_state_{rank}.pt")
    assert run_here(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "io_state_….pt of 5 ranks" in shown
    assert re.search(r"global step +30", shown)
    assert run_here(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["beside"]["global_step"] == 30


@pytest.mark.parametrize(
    "step", [torch.tensor([7]), torch.tensor([0, 7])[1], torch.tensor([7, 7])[:1]]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_inspect_finds_a_step_wherever_it_lies(
    folder: Path, step: torch.Tensor, compressed: bool
) -> None:
    torch.save({"x": torch.ones(3), "global_step": step}, folder / "extra.pt")
    if compressed:
        pack(folder / "extra.pt")
    assert beside(folder).global_step == 7


@pytest.mark.parametrize(
    "step", [torch.tensor([7, 8]), torch.tensor(7.0), torch.tensor(7).int(), 7]
)
def test_inspect_takes_nothing_else_for_a_step(folder: Path, step: object) -> None:
    torch.save({"global_step": step}, folder / "extra.pt")
    assert beside(folder).global_step is None


def test_inspect_warns_of_what_cannot_be_read(folder: Path) -> None:
    torch.save({"x": Called(eval, "1")}, folder / "extra.pt")
    assert "eval" in beside(folder).warnings[0]
    (folder / "extra.pt").write_bytes(b"PK")
    assert beside(folder).warnings[0].startswith("extra.pt: is damaged")
    (folder / "extra.pt").rename(folder / "extra.pkl")
    found = beside(folder)
    assert [file.name for file in found.files] == ["extra.pkl", "io_state_0.pt"]
    assert found.global_step is None
