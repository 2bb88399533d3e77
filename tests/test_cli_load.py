"""`asyncloader load`: making room for a checkpoint, filling it, tracing that."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from asyncloader import CheckpointError, Loader, Progress, aempty_like, gen_slice
from asyncloader._loading.progress import Span
from asyncloader._tools.allocation import allocate
from asyncloader._tools.content import check_room
from asyncloader.cli._app import run as run_here
from asyncloader.cli._common import trace_of
from asyncloader.cli._moving import Loaded, load_all
from asyncloader.cli._terminal import bar
from tests.checkpoints import GENUINE, LIMITS, save
from tests.forks import Forked, python
from tests.oracle import (
    DTYPES,
    read_checkpoint,
    rows_of,
    sparse_block,
    write_checkpoint,
    write_ranks,
    write_shard,
)
from tests.oracle import Block as RawBlock
from tests.support import data, nothing_left_behind, raw, rows_in

if TYPE_CHECKING:
    from torch import Tensor

    from asyncloader._loading.progress import Step
    from asyncloader.options import Verify


async def check(path: Path) -> None:
    """Allocate, load, and compare with what the oracle reads."""
    tables, tensors = await aempty_like(path)
    report = await Loader(path, tables, tensors, strict=True).aload()
    assert (report.missing, report.unexpected) == ((), ())
    wanted_tables, wanted_tensors = read_checkpoint(path)
    assert {name: raw(tensor) for name, tensor in tensors.items()} == {
        name: raw(tensor) for name, tensor in wanted_tensors.items()
    }
    assert {name: rows_in(table) for name, table in tables.items()} == {
        name: rows_of(table.ids, table.slots) for name, table in wanted_tables.items()
    }


@pytest.mark.parametrize("name", ["optim_slots", "small_4shards"])
async def test_what_was_allocated_takes_all_of_a_genuine_checkpoint(name: str) -> None:
    await check(GENUINE / name)


async def test_what_was_allocated_takes_all_of_a_checkpoint_of_several_ranks(
    tmp_path: Path,
) -> None:
    await check(save(tmp_path, ranks=3, size=1000))


async def test_slots_keep_the_checkpoints_order_behind_the_embedding(tmp_path: Path) -> None:
    content = data(range(9), zeta=1, alpha=2)
    write_checkpoint(tmp_path, {"t": content}, {}, slice_size=1000, ranks=2)
    tables, _ = await aempty_like(tmp_path)
    assert tables["t"].name == "t"
    assert next(iter(tables["t"].slots())) == "embedding"
    assert set(tables["t"].slots()) == {"embedding", "zeta", "alpha"}
    assert tables["t"].slice == gen_slice(0, 1, 1000)
    assert len(tables["t"]) == 0


async def test_every_dtype_and_shape_is_allocated(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1), "none": torch.zeros(0, 4)}
    write_checkpoint(tmp_path, {}, tensors)
    await check(tmp_path)
    file = tmp_path / "any.safetensors"
    save_file({"w": torch.ones(3)}, file)
    tables, allocated = await aempty_like(file)
    assert (tables, raw(allocated["w"])) == ({}, raw(torch.zeros(3)))


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ({"id": torch.arange(2)}, "table 't' has no slot 'embedding'"),
        ({"embedding": torch.ones(2, 1)}, "'t': the table has no ids"),
        ({"id": torch.arange(2), "embedding": torch.ones(2, 0)}, r"has the shape \[2, 0\]"),
        ({"id": torch.arange(2), "embedding": torch.tensor(1.0)}, r"has the shape \[\]"),
    ],
)
async def test_what_is_no_table_is_an_error(
    tmp_path: Path, slots: dict[str, Tensor], says: str
) -> None:
    write_ranks(tmp_path, [[sparse_block("t", slot, rows) for slot, rows in slots.items()]])
    with nothing_left_behind(), pytest.raises(CheckpointError, match=says):
        await aempty_like(tmp_path)


async def test_kernels_are_timed_where_there_are_tables(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "any.safetensors")
    assert (await allocate(str(tmp_path / "any.safetensors"), LIMITS)).kernels_seconds == 0
    assert (await allocate(str(GENUINE / "optim_slots"), LIMITS)).kernels_seconds > 0


def test_what_does_not_fit_into_memory_is_refused() -> None:
    """The system would say yes, and end the process when the memory is used."""
    check_room("x", 10, 10)
    check_room("x", 10**18, None)
    with pytest.raises(MemoryError, match=r"x takes 2\.00 kB, 1\.00 kB are free"):
        check_room("x", 2000, 1000)


def huge(path: Path, dtype: str = "U8", itemsize: int = 1) -> Path:
    """Make a file that is larger than any memory, on paper."""
    nbytes = 1 << 42
    block = RawBlock(key="w", dtype=dtype, shape=(nbytes // itemsize,), data=b"")
    file = path / "huge.safetensors"
    write_shard(file, [block], data_offsets={"w": (0, nbytes)})
    with file.open("ab") as shard:
        shard.truncate(file.stat().st_size + nbytes)
    return file


def test_more_than_memory_is_one_line_and_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here(["load", str(huge(tmp_path))]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.match(r"asyncloader: not enough memory: .*huge.* takes 4\.40 TB, .* are free", err)


@pytest.mark.parametrize(
    ("dtype", "itemsize", "cast", "size"),
    [("BF16", 2, "float64", "17.59 TB"), ("F64", 8, "bfloat16", "1.10 TB")],
)
def test_what_a_cast_makes_of_it_has_to_fit(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    dtype: str,
    itemsize: int,
    *,
    cast: str,
    size: str,
) -> None:
    assert run_here(["load", str(huge(tmp_path, dtype, itemsize)), "--cast", cast]) == 2
    assert f"takes {size}" in capfd.readouterr().err


# The trace.


def span(step: Step, name: str, lane: str, *, start: float, seconds: float) -> Span:
    return Span(step=step, name=name, lane=lane, start=start, seconds=seconds, nbytes=len(name))


def test_a_trace_is_what_perfetto_reads() -> None:
    spans = [
        span("copy", "w", "read-0", start=10.5, seconds=0.25),
        span("read", "a.bin", "read-0", start=10.0, seconds=1.0),
        span("plan", "names", "main", start=9.0, seconds=0.5),
    ]
    assert trace_of("/some\udcff", spans, process=7) == {
        "displayTimeUnit": "ms",
        "traceEvents": [
            naming("process_name", 0, "asyncloader load /some\\xff"),
            naming("thread_name", 1, "main"),
            naming("thread_name", 2, "read-0"),
            complete("plan", "names", lane=1, at=0, duration=500_000),
            complete("read", "a.bin", lane=2, at=1_000_000, duration=1_000_000),
            complete("copy", "w", lane=2, at=1_500_000, duration=250_000),
        ],
    }
    assert len(trace_of("/some", [], process=7)["traceEvents"]) == 1


def naming(what: str, lane: int, name: str) -> dict[str, object]:
    return {"name": what, "ph": "M", "pid": 7, "tid": lane, "args": {"name": name}}


def complete(step: str, name: str, *, lane: int, at: float, duration: float) -> dict[str, object]:
    return {
        "name": f"{step} {name}",
        "cat": step,
        "ph": "X",
        "ts": at,
        "dur": duration,
        "pid": 7,
        "tid": lane,
        "args": {"name": name, "bytes": len(name)},
    }


def test_a_load_is_traced_step_by_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, trace = save(tmp_path / "checkpoint"), tmp_path / "trace.json"
    with nothing_left_behind():
        assert run_here(["load", str(path), "--trace", str(trace), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)["report"]
    events = json.loads(trace.read_bytes())["traceEvents"]
    lanes = {one["tid"]: one["args"]["name"] for one in events if one["name"] == "thread_name"}
    spans = [one for one in events if one["ph"] == "X"]
    assert {one["ph"] for one in events} == {"M", "X"}
    assert {one["cat"] for one in spans} >= {"plan", "read", "verify", "index", "commit"}
    assert {one["tid"] for one in spans} == set(lanes)
    assert (
        sum(one["args"]["bytes"] for one in spans if one["cat"] == "read") == (report["bytes_read"])
    )
    for lane in lanes:
        check_nesting([one for one in spans if one["tid"] == lane])


def check_nesting(spans: list[dict[str, Any]]) -> None:
    """Perfetto shows steps of one lane below each other if each lies within the one above."""
    open_: list[float] = []
    for one in spans:
        while open_ and open_[-1] <= one["ts"]:
            open_.pop()
        end = one["ts"] + one["dur"]
        assert not open_ or end <= open_[-1] + 1  # rounded to nanoseconds
        open_.append(end)
    assert min(one["ts"] for one in spans) >= 0


def test_a_load_that_fails_leaves_its_trace(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, trace = save(tmp_path / "checkpoint"), tmp_path / "trace.json"
    shard = next(path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run_here(["load", str(path), "--trace", str(trace)]) == 2
    assert "bytes [" in capfd.readouterr().err
    assert {one.get("cat") for one in json.loads(trace.read_bytes())["traceEvents"]} >= {"read"}


def test_a_trace_that_cannot_be_written_is_said_before_anything_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path, tmp_path / "nowhere" / "trace.json"):
        assert run_here(["load", str(tmp_path / "absent"), "--trace", str(file)]) == 2
        err = capfd.readouterr().err
        assert (err.count("\n"), str(file) in err) == (1, True)


# The report.


async def load(
    path: Path, *, verify: Verify = "auto", told: list[Progress] | None = None
) -> Loaded:
    with nothing_left_behind():
        options = replace(LIMITS, verify=verify)
        progress = None if told is None else told.append
        return await load_all(str(path), options, progress=progress)


async def test_all_of_a_checkpoint_is_loaded() -> None:
    loaded = await load(GENUINE / "optim_slots")
    tables, tensors = read_checkpoint(GENUINE / "optim_slots")
    assert {name: counts.new for name, counts in loaded.report.tables.items()} == {
        name: len(table.ids) for name, table in tables.items()
    }
    assert loaded.report.tensors == dict.fromkeys(tensors, "loaded")
    assert (loaded.report.missing, loaded.report.unexpected) == ((), ())
    assert min(loaded.kernels_seconds, loaded.allocation_seconds) > 0


async def test_progress_is_told_from_beginning_to_end(tmp_path: Path) -> None:
    told: list[Progress] = []
    loaded = await load(save(tmp_path), told=told)
    wanted = loaded.report.bytes_wanted
    assert (told[-1].bytes_done, told[-1].bytes_total) == (wanted, wanted)


def moment(done: int, total: int, name: str) -> Progress:
    return Progress(bytes_done=done, bytes_total=total, seconds=0, current=name)


def test_a_bar_shows_where_it_stands_and_goes_away(tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("w+") as file:
        out = Console(file=file, force_terminal=True, width=100)
        with bar("loading", out) as tell:
            tell(moment(1, 2, "too early to show anything"))
            assert file.tell() == 0
            tell(moment(0, 0, "a[bold]\x1b[31mname"))
            tell(moment(1_000_000, 2_000_000, "x" * 100))
        assert file.tell() > 0
        file.seek(0)
        text = file.read()
    assert "a[bold]\\x1b[31mname" in text
    assert "xx…xx" in text
    assert "1.0/2.0 MB" in text


async def test_digests_are_compared_if_asked_for(tmp_path: Path) -> None:
    save(tmp_path)
    report = (await load(tmp_path, verify="require")).report
    assert report.bytes_verified == report.bytes_wanted > 0
    assert (await load(tmp_path, verify="off")).report.bytes_verified == 0
    with pytest.raises(CheckpointError, match="no digests"):
        await load(GENUINE / "optim_slots", verify="require")


def test_the_report_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "[bold]t[/]\x1b[31m"
    write_checkpoint(tmp_path, {name: data([1, 2])}, {"w": torch.ones(2)})
    assert run_here(["load", str(tmp_path), "--parallel", "2", "--chunk-bytes", "5"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "[bold]t[/]\\x1b[31m" in out
    assert re.search(r"time +[0-9.]+ s, [0-9.]+ GB/s", out)
    assert re.search(r"before that: [0-9.]+ s for kernels, [0-9.]+ s for names and memory", out)


def test_a_table_and_a_tensor_of_the_same_name_are_one_line_and_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, {"t": data([1])}, {"t": torch.ones(2)})
    code = run_here(["load", str(tmp_path)])
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'t'" in err


def test_a_checkpoint_that_contradicts_itself_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error that lists all problems has a line for each."""
    write_ranks(
        tmp_path,
        [
            [
                sparse_block("t", "id", torch.arange(3)),
                sparse_block("t", "embedding", torch.ones(2, 4)),
                sparse_block("u", "id", torch.arange(4)),
                sparse_block("u", "embedding", torch.ones(2, 4)),
            ]
        ],
    )
    assert run_here(["load", str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "t@embedding" in err
    assert "u@embedding" in err


# Processes.


@pytest.mark.parametrize("flags", [[], ["--direct-io"]])
def test_json_says_what_was_loaded(flags: list[str]) -> None:
    done = python("-m", "asyncloader", "load", GENUINE / "small_4shards", "--json", *flags)
    document = json.loads(done.stdout)
    tables, tensors = read_checkpoint(GENUINE / "small_4shards")
    assert done.stderr == ""
    assert set(document) == {"report", "kernels_seconds", "allocation_seconds"}
    assert document["report"]["tables"]["item_emb"]["rows"] == len(tables["item_emb"].ids)
    assert document["report"]["tensors"] == dict.fromkeys(tensors, "loaded")


def test_ctrl_c_ends_it_quietly_with_exit_code_130(tmp_path: Path) -> None:
    file = huge(tmp_path)
    process = Forked(["-m", "asyncloader", "show", file, "w"])
    deadline = time.monotonic() + 30
    while str(file) not in files_of(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # another process: there is nothing to wait for
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def files_of(process: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except OSError:  # closed meanwhile
            continue
    return found


def test_a_terminal_gets_a_bar_and_colours_and_keeps_stdout_clean(tmp_path: Path) -> None:
    terminal, other = pty.openpty()
    received = bytearray()

    def receive() -> None:
        while True:
            try:
                received.extend(os.read(terminal, 1 << 16))
            except OSError:  # nobody has the other end any more
                return

    reader = threading.Thread(target=receive)
    reader.start()
    path = save(tmp_path)
    good = python("-m", "asyncloader", "load", path, "--json", stderr=other)
    bad = python("-m", "asyncloader", "load", tmp_path / "absent", stderr=other)
    os.close(other)
    reader.join()
    os.close(terminal)
    assert (good.returncode, bad.returncode, bad.stdout) == (0, 2, "")
    assert json.loads(good.stdout)["report"]["location"] == str(path)
    text = received.decode()
    assert "preparing" in text
    assert "\x1b[" in text
    assert "no such file or folder" in text
