"""Copies of objects on the local disk: what is read once is not asked for again."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from asyncloader import (
    CheckpointChangedError,
    CheckpointError,
    Loader,
    LoadReport,
    ReadOptions,
    Saver,
    load_tensors,
)
from asyncloader._storage.extents import Extents
from asyncloader.tools import verify
from tests.genuine import NEWEST, truth
from tests.servers.liar import Answer, liar
from tests.support import rows_in, rows_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.liar import Liar
    from tests.servers.places import Place

pytest.importorskip("obstore")

FILE = "model.safetensors"
# More than comes along with the first look.
TENSORS = {name: torch.arange(400_000.0) + at for at, name in enumerate("ab")}


@pytest.fixture
def server() -> Iterator[Liar]:
    with liar({FILE: save(TENSORS)}) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(url: str, names: str = "ab", **options: Any) -> LoadReport:  # noqa: ANN401  # of Loader
    """Load tensors, and fail unless they are those of `TENSORS`."""
    into = {name: torch.zeros_like(TENSORS[name]) for name in names}
    report = Loader(url, tensors=into, **options).load()
    for name, tensor in into.items():
        assert torch.equal(tensor, TENSORS[name])
    return report


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.bytes"))


def test_a_second_load_asks_only_whether_objects_are_the_same(place: Place, tmp_path: Path) -> None:
    held = truth(NEWEST)
    reports = []
    for _ in range(2):
        tables, tensors = held.destinations()
        loader = Loader(
            place.url, tables, tensors, strict=True, storage_options=place.options,
            cache_dir=tmp_path / "cache",
        )  # fmt: skip
        reports.append(loader.load())
        for name, table in tables.items():
            assert rows_in(table) == rows_on_disk(held.tables[name])
        for name, tensor in tensors.items():
            assert torch.equal(tensor, held.tensors[name])
    first, second = reports
    assert first.bytes_cached == 0
    assert second.bytes_cached >= second.bytes_read == first.bytes_read
    assert second.requests <= first.requests


def test_no_byte_comes_twice(server: Liar, cache: Path) -> None:
    url = f"{server.url}/{FILE}"
    load(url, "a", cache_dir=cache)
    so_far = len(server.asked)
    report = load(url, "a", cache_dir=cache)
    assert len(server.asked) == so_far
    assert report.bytes_cached >= report.bytes_read
    report = load(url, cache_dir=cache)  # the rest alone is asked for
    got = sum(asked.end - asked.begin for asked in server.asked)
    assert got <= len(server.files[FILE]) + len(server.asked)
    assert 0 < report.bytes_cached < report.bytes_read
    so_far = len(server.asked)
    assert load(url, cache_dir=cache).bytes_cached >= report.bytes_read
    assert len(server.asked) == so_far
    assert len(copies(cache)) == 1


def test_another_object_of_that_name_is_read_anew(server: Liar, cache: Path) -> None:
    url = f"{server.url}/{FILE}"
    load(url, cache_dir=cache)
    server.files[FILE] = save({name: tensor + 5 for name, tensor in TENSORS.items()})
    found = load_tensors(url, cache_dir=cache)
    assert torch.equal(found["a"], TENSORS["a"] + 5)
    assert len(copies(cache)) == 2


def test_an_object_that_is_replaced_meanwhile_is_no_mixture(server: Liar, cache: Path) -> None:
    url = f"{server.url}/{FILE}"
    load(url, "a", cache_dir=cache)
    other = save({name: tensor + 5 for name, tensor in TENSORS.items()})

    def script(_: object) -> Answer:
        server.files[FILE] = other
        return Answer()

    server.script = script
    with pytest.raises(CheckpointChangedError):
        load(url, cache_dir=cache)


def test_what_has_no_strong_etag_is_not_kept(server: Liar, cache: Path) -> None:
    server.tag = "W/"
    for _ in range(2):
        assert load(f"{server.url}/{FILE}", cache_dir=cache).bytes_cached == 0
    assert copies(cache) == []


@pytest.mark.parametrize("what", ["a file", "shut", "a loop"])
def test_a_folder_that_cannot_be_used_fails_no_load(
    server: Liar, cache: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    if what == "a file":
        cache.touch()
    elif what == "a loop":
        cache.symlink_to(cache)
    else:
        cache.mkdir()
        (cache / ".lock").mkdir()
    report = load(f"{server.url}/{FILE}", cache_dir=cache)
    assert report.bytes_cached == 0
    [line] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert str(cache) in line.getMessage()
    assert "copies were not used" in line.getMessage()


def test_after_a_new_start_of_the_machine_nothing_counts(server: Liar, cache: Path) -> None:
    """What a record says may not have come to the disk then."""
    url = f"{server.url}/{FILE}"
    load(url, cache_dir=cache)
    [record] = cache.glob("*.json")
    said = json.loads(record.read_bytes())
    assert said["url"] == url
    record.write_text(json.dumps(said | {"boot": "another"}))
    assert load(url, cache_dir=cache).bytes_cached == 0
    assert load(url, cache_dir=cache).bytes_cached > 0


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"ranges": [[0]], "boot": null}', b'{"ranges": [["x", 1]]}']
)
def test_a_record_that_makes_no_sense_counts_for_nothing(
    server: Liar, cache: Path, text: bytes
) -> None:
    url = f"{server.url}/{FILE}"
    load(url, cache_dir=cache)
    [record] = cache.glob("*.json")
    record.write_bytes(text)
    assert load(url, cache_dir=cache).bytes_cached == 0
    assert load(url, cache_dir=cache).bytes_cached > 0


def test_a_copy_that_was_cut_is_not_believed(server: Liar, cache: Path) -> None:
    url = f"{server.url}/{FILE}"
    load(url, cache_dir=cache)
    [copy] = copies(cache)
    os.truncate(copy, 1_000_000)
    assert load(url, cache_dir=cache).bytes_cached == 0


def test_what_does_not_fit_its_digest_is_forgotten(tmp_path: Path, cache: Path) -> None:
    Saver.to(tmp_path / "ckpt", {}, TENSORS, parallel=1).save()
    files = {f"c/{path.name}": path.read_bytes() for path in (tmp_path / "ckpt").iterdir()}
    with liar(files) as server:
        url = f"{server.url}/c"
        load(url, cache_dir=cache)
        kept = len(copies(cache))
        largest = max(copies(cache), key=lambda copy: copy.stat().st_size)
        damaged = bytearray(largest.read_bytes())
        damaged[-5] ^= 1
        largest.write_bytes(damaged)
        assert verify(url, options=ReadOptions(cache_dir=cache)).problems == ()
        with pytest.raises(CheckpointError, match="are not those that were written"):
            load(url, cache_dir=cache)
        assert len(copies(cache)) == kept - 1
        assert load(url, cache_dir=cache).bytes_cached > 0  # of the others


def test_what_was_not_used_for_longest_goes_first(cache: Path) -> None:
    content = save(TENSORS)
    with liar(dict.fromkeys(("1.pt", "a.safetensors", "b.safetensors"), content)) as server:
        room = 2 * len(content) + (1 << 20)
        server.files["c.safetensors"] = content
        for name in "ab":
            load(f"{server.url}/{name}.safetensors", cache_dir=cache, cache_bytes=room)
        for at, copy in enumerate(
            sorted(cache.glob("*.json"), key=lambda one: one.stat().st_mtime)
        ):
            os.utime(copy, (at, at))  # clocks of files may be coarse
        load(f"{server.url}/a.safetensors", cache_dir=cache, cache_bytes=room)
        load(f"{server.url}/c.safetensors", cache_dir=cache, cache_bytes=room)
        so_far = len(server.asked)
        load(f"{server.url}/a.safetensors", cache_dir=cache, cache_bytes=room)
        assert len(server.asked) == so_far
        load(f"{server.url}/b.safetensors", cache_dir=cache, cache_bytes=room)
        assert len(server.asked) > so_far
        assert sum(copy.stat().st_blocks * 512 for copy in copies(cache)) <= room


def test_where_there_is_no_room_the_rest_is_read_from_the_store(server: Liar, cache: Path) -> None:
    url = f"{server.url}/{FILE}"
    for _ in range(2):
        load(url, cache_dir=cache, cache_bytes=1 << 20)
    assert sum(copy.stat().st_blocks * 512 for copy in copies(cache)) <= 1 << 20


async def test_loads_at_once_fill_it_together(server: Liar, cache: Path) -> None:
    url = f"{server.url}/{FILE}"
    for names in ("ab", "ba", "a", "b"):
        jobs = [asyncio.to_thread(load, url, name, cache_dir=cache) for name in names]
        await asyncio.gather(*jobs)
    assert (await asyncio.to_thread(load, url, cache_dir=cache)).bytes_cached > 0


KILLED = """
import os, signal, sys
from asyncloader import load_tensors
from asyncloader._storage import cached_copy
how = sys.argv[3]
taking = cached_copy.Copy.record
def dying(copy):
    if how == "after":
        taking(copy)
    os.kill(os.getpid(), signal.SIGKILL)
cached_copy.Copy.record = dying
load_tensors(sys.argv[1], cache_dir=sys.argv[2])
"""


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_process_that_is_killed_leaves_nothing_that_misleads(
    server: Liar, cache: Path, how: str
) -> None:
    url = f"{server.url}/{FILE}"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, url, str(cache), how], check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    report = load(url, cache_dir=cache)
    assert (report.bytes_cached > 0) == (how == "after")
    assert load(url, cache_dir=cache).bytes_cached > report.bytes_cached * (how == "before")


def test_programming_errors_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without cache_dir"):
        ReadOptions(cache_bytes=5)
    with pytest.raises(ValueError, match="cache_bytes must be positive"):
        ReadOptions(cache_dir=tmp_path, cache_bytes=0)
    with pytest.raises(ValueError, match="cache_dir is a URL"):
        ReadOptions(cache_dir="s3://models/cache")
    with pytest.raises(TypeError, match="cache_dir must be a path"):
        ReadOptions(cache_dir=5)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))))
def test_extents_are_what_a_set_of_bytes_is(ranges: list[tuple[int, int]]) -> None:
    extents, there = Extents(), set[int]()
    for begin, end in ranges:
        extents.add(begin, end)
        there |= {*range(begin, end)}
        assert {at for pair in extents.pairs() for at in range(*pair)} == there
        edges = [edge for pair in extents.pairs() for edge in pair]
        assert edges == sorted({*edges})  # none touch
        for at in range(31):
            if at in there:
                assert extents.end_of(at) == min({*range(at, 32)} - there)
            else:
                assert extents.end_of(at) is None
                assert extents.next_after(at, 40) == min({*range(at, 31)} & there, default=40)
