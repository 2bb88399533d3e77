"""Copies of objects on the local disk: what is read once is not asked for again."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from asyncloader import (
    CheckpointChangedError,
    Loader,
    LoadReport,
    ReadOptions,
    ReadStalledError,
    Saver,
    load_tensors,
)
from asyncloader._storage.cache import Cache, Object
from asyncloader._storage.cached_pieces import Piece, Pieces
from asyncloader.tools import verify
from tests.genuine import NEWEST, truth
from tests.servers.liar import Answer, liar
from tests.support import open_files, rows_in, rows_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.liar import Asked, Liar
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


def test_what_was_read_along_is_kept_as_it_is(cache: Path) -> None:
    """All gaps of a read are received into one memory, which holds the last of them then."""
    tensors = {f"{at:03}": torch.full([1000 + at], float(at)) for at in range(300)}
    with liar({FILE: save(tensors)}) as server:
        for names in ([*tensors][::3], [*tensors], [*tensors][1::3]):
            into = {name: torch.zeros_like(tensors[name]) for name in names}
            report = Loader(f"{server.url}/{FILE}", tensors=into, cache_dir=cache).load()
            for name, tensor in into.items():
                assert torch.equal(tensor, tensors[name]), name
        assert report.bytes_cached >= report.bytes_read


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


def test_programming_errors_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without cache_dir"):
        ReadOptions(cache_bytes=5)
    with pytest.raises(ValueError, match="cache_bytes must be positive"):
        ReadOptions(cache_dir=tmp_path, cache_bytes=0)
    with pytest.raises(ValueError, match="cache_dir is empty"):
        ReadOptions(cache_dir="")
    with pytest.raises(ValueError, match="cache_dir is a URL"):
        ReadOptions(cache_dir="s3://models/cache")
    with pytest.raises(TypeError, match="cache_dir must be a path"):
        ReadOptions(cache_dir=5)  # type: ignore[arg-type]


# What is in the folder need not be what was put there.


@pytest.mark.parametrize("how", ["a byte", "cut", "gone", "zeros"])
@pytest.mark.parametrize("then", ["ab", "b"])
def test_what_a_copy_holds_is_compared(server: Liar, cache: Path, how: str, then: str) -> None:
    """The rest of it is read anew first, so that the file is as long again as it was."""
    url = f"{server.url}/{FILE}"
    load(url, cache_dir=cache)
    [copy] = copies(cache)
    if how == "a byte":
        damaged = bytearray(copy.read_bytes())
        damaged[-5] ^= 1
        copy.write_bytes(damaged)
    elif how == "cut":
        os.truncate(copy, 100_000)
    elif how == "gone":
        copy.unlink()
    else:
        copy.write_bytes(bytes(copy.stat().st_size))
    for name in then:
        load(url, name, cache_dir=cache)
    for _ in range(2):
        load(url, cache_dir=cache)
    so_far = len(server.asked)
    load(url, cache_dir=cache)
    assert len(server.asked) == so_far


def test_verify_reads_past_the_copies(tmp_path: Path, cache: Path) -> None:
    Saver.to(tmp_path / "ckpt", {}, TENSORS, parallel=1).save()
    files = {f"c/{path.name}": path.read_bytes() for path in (tmp_path / "ckpt").iterdir()}
    with liar(files) as server:
        load(url := f"{server.url}/c", cache_dir=cache)
        shard = next(name for name in server.files if name.endswith(".safetensors"))
        damaged = bytearray(server.files[shard])
        damaged[-5] ^= 1
        server.files[shard] = bytes(damaged)
        assert verify(url, options=ReadOptions(cache_dir=cache)).problems


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b'{"pieces": [[0]]}', b'{"pieces": [["x", 1, ""]]}', b'{"pieces": {}}',
     b'{"pieces": [[0, 99999999999, ""]]}', b'{"pieces": [[-5, 7, ""], [7, 6, ""]]}'],
)  # fmt: skip
def test_a_record_that_makes_no_sense_fails_no_load(server: Liar, cache: Path, text: bytes) -> None:
    url = f"{server.url}/{FILE}"
    load(url, cache_dir=cache)
    [record] = cache.glob("*.json")
    record.write_bytes(text)
    load(url, cache_dir=cache)
    load(url, cache_dir=cache)
    so_far = len(server.asked)
    load(url, cache_dir=cache)
    assert len(server.asked) == so_far


@pytest.mark.parametrize("what", ["a file", "no lock", "a loop", "open to all", "locked"])
def test_a_folder_that_cannot_be_used_fails_no_load(
    server: Liar, cache: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    held = contextlib.ExitStack()
    if what == "a file":
        cache.touch()
    elif what == "a loop":
        cache.symlink_to(cache)
    else:
        cache.mkdir()
        cache.chmod(0o777 if what == "open to all" else 0o700)
        if what == "locked":  # by a process that is stopped, say
            lock = held.enter_context((cache / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        elif what == "no lock":
            (cache / ".lock").mkdir()
    with held:
        report = load(f"{server.url}/{FILE}", cache_dir=cache, stall_timeout=30)
    assert report.bytes_cached == 0
    [line] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert str(cache) in line.getMessage()
    assert "not all was kept" in line.getMessage()


def test_only_this_user_may_read_it_and_no_link_is_followed(
    server: Liar, cache: Path, tmp_path: Path
) -> None:
    url, victim = f"{server.url}/{FILE}", tmp_path / "victim"
    victim.write_text("mine")
    load(url, "a", cache_dir=cache)
    [copy] = copies(cache)
    copy.with_suffix(".new").symlink_to(victim)
    load(url, cache_dir=cache)
    assert victim.read_text() == "mine"
    assert {stat.S_IMODE(path.lstat().st_mode) for path in cache.iterdir()} == {0o600}
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_files_of_others_stay(server: Liar, cache: Path) -> None:
    cache.mkdir(mode=0o700)
    for name in ("tokens.bytes", "tokens.json"):
        (cache / name).write_bytes(bytes(9 << 20))
    load(f"{server.url}/{FILE}", cache_dir=cache, cache_bytes=4 << 20)
    assert len(list(cache.glob("tokens.*"))) == 2


def test_where_there_is_no_room_the_rest_is_read_from_the_store(
    server: Liar, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{server.url}/{FILE}"
    for _ in range(2):
        report = load(url, cache_dir=cache, cache_bytes=2 << 20, chunk_bytes=1 << 20)
        assert sum(copy.stat().st_blocks * 512 for copy in copies(cache)) <= 2 << 20
    assert report.bytes_cached > 0
    assert "full of what is being loaded" in caplog.text


def test_what_another_load_uses_stays(cache: Path) -> None:
    """Else the disk would hold it all the same, and nobody would count it."""
    content = save(TENSORS)
    with liar(dict.fromkeys(("a.safetensors", "b.safetensors"), content)) as server:

        def meanwhile(asked: Asked) -> Answer:
            if asked.path.startswith("a") and asked.begin:
                server.script = lambda _: Answer()
                load(f"{server.url}/b.safetensors", cache_dir=cache, cache_bytes=4 << 20)
            return Answer()

        load(f"{server.url}/a.safetensors", "a", cache_dir=cache, cache_bytes=4 << 20)
        server.script = meanwhile
        load(f"{server.url}/a.safetensors", "b", cache_dir=cache, cache_bytes=4 << 20)
        so_far = len(server.asked)
        load(f"{server.url}/a.safetensors", cache_dir=cache, cache_bytes=4 << 20)
        assert len(server.asked) == so_far


def test_a_read_that_was_given_up_leaves_no_byte(server: Liar, cache: Path) -> None:
    """Its thread comes back when the memory is another's."""
    url, come_back = f"{server.url}/{FILE}", threading.Event()

    def script(asked: Asked) -> Answer:
        return Answer(waits=come_back if asked.begin else None)

    server.script = script
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    with pytest.raises(ReadStalledError):
        Loader(url, tensors=into, cache_dir=cache, stall_timeout=0.5).load()
    for tensor in into.values():
        tensor.fill_(-1)
    come_back.set()
    server.script = lambda _: Answer()
    load(url, cache_dir=cache)
    load(url, cache_dir=cache)


WORKER = """
import random, signal, sys, threading, os
import torch
from asyncloader import Loader
url, cache, seed = sys.argv[1:]
choose = random.Random(int(seed))
if choose.random() < 0.5:
    threading.Timer(choose.random() * 0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
for _ in range(6):
    number = choose.randrange(4)
    wanted = {name: torch.arange(400_000.0) + at for at, name in enumerate("ab")}
    names = choose.choice(["ab", "a", "b"])
    into = {name: torch.zeros(400_000) for name in names}
    Loader(
        f"{url}/{number}.safetensors", tensors=into, cache_dir=cache,
        cache_bytes=choose.choice([4, 8, 40]) << 20, chunk_bytes=choose.choice([1, 3, 16]) << 20,
    ).load()
    for name, tensor in into.items():
        assert torch.equal(tensor, wanted[name]), "wrong bytes"
print("fine")
os._exit(0)
"""


def test_processes_share_it_and_are_killed_at_any_time(cache: Path) -> None:
    """They fill it at once, and remove each other's copies."""
    content = save(TENSORS)
    with liar({f"{at}.safetensors": content for at in range(4)}) as server:
        start = [sys.executable, "-c", WORKER, server.url, str(cache)]
        to: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running = [subprocess.Popen([*start, str(at)], **to) for at in range(4)]
        said = [process.communicate(timeout=100) for process in running]
        codes = [process.returncode for process in running]
        assert {*codes} <= {0, -signal.SIGKILL}, said
        for at in range(4):
            load(f"{server.url}/{at}.safetensors", cache_dir=cache)


KILLED = """
import os, signal, sys
from asyncloader import load_tensors
from asyncloader._storage import cached_copy
how = sys.argv[3]
record = cached_copy.Copy.record
def dying(copy):
    if how == "after":
        record(copy)
    os.kill(os.getpid(), signal.SIGKILL)
cached_copy.Copy.record = dying
load_tensors(sys.argv[1], cache_dir=sys.argv[2])
"""


@pytest.mark.parametrize("how", ["before", "after"])
def test_of_a_process_that_is_killed_what_it_recorded_counts(
    server: Liar, cache: Path, how: str
) -> None:
    url = f"{server.url}/{FILE}"
    command = [sys.executable, "-c", KILLED, url, str(cache), how]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    assert (load(url, cache_dir=cache).bytes_cached > 0) == (how == "after")


def test_no_descriptor_stays_open(server: Liar, cache: Path) -> None:
    load(f"{server.url}/{FILE}", cache_dir=cache)
    assert copies(cache)
    assert not [file for file in open_files() if str(cache) in file]


@pytest.fixture
def two(cache: Path) -> tuple[Cache, Cache]:
    """Return the caches of two loads, which have a copy of `OBJECT` open already."""
    found = Cache(cache, None), Cache(cache, None)
    for each in found:
        each.open()
        assert each.read(OBJECT, 0, [memoryview(bytearray(5))]) == 0
    return found


OBJECT = Object("s3://models/shard", "tag", 3 << 20)
RIGHT, WRONG = bytes(range(256)) * (12 << 10), bytes(3 << 20)
ALL = [(0, len(RIGHT))]


def content(fd: int) -> bytes:
    return os.pread(fd, len(RIGHT), 0)


def test_what_a_table_has_open_is_not_written_to_by_others(
    two: tuple[Cache, Cache], cache: Path
) -> None:
    """Those have had other bytes from the store, though it is the same object there."""
    one, other = two
    fd, again = one.hold(OBJECT, ALL), other.hold(OBJECT, ALL)
    one.keep(OBJECT, 0, [memoryview(RIGHT)])
    one.ensure(OBJECT)
    other.keep(OBJECT, 0, [memoryview(WRONG)])
    assert content(fd) == RIGHT
    with pytest.raises(OSError, match="could not be kept"):
        other.ensure(OBJECT)
    other.close()
    assert content(fd) == RIGHT
    third = Cache(cache, None)
    third.open()
    assert third.read(OBJECT, 0, [memoryview(found := bytearray(len(RIGHT)))]) == len(RIGHT)
    assert found == RIGHT
    for each in (one, third):
        each.close()
    os.close(fd)
    os.close(again)


def test_what_others_wrote_before_is_noticed(two: tuple[Cache, Cache]) -> None:
    one, other = two
    fd = one.hold(OBJECT, ALL)
    one.keep(OBJECT, 0, [memoryview(RIGHT)])
    other.keep(OBJECT, 0, [memoryview(WRONG)])
    with pytest.raises(OSError, match="could not be kept"):
        one.ensure(OBJECT)
    os.close(fd)
    for each in two:
        each.close()


@pytest.mark.parametrize("starts", [[0, 0], [0, 500_000], [700_000, 0], [1 << 20, 5]])
def test_two_loads_that_fill_a_copy_at_once_both_have_it(
    two: tuple[Cache, Cache], starts: list[int]
) -> None:
    fds = []
    for each, start in zip(two, starts, strict=True):
        fds.append(each.hold(OBJECT, [(start, len(RIGHT))]))
        each.keep(OBJECT, start, [memoryview(RIGHT)[start:]])
        each.ensure(OBJECT)
    for fd, start in zip(fds, starts, strict=True):
        assert content(fd)[start:] == RIGHT[start:]
        os.close(fd)
    for each in two:
        each.close()


def test_a_damaged_piece_does_not_come_back_from_the_record(cache: Path) -> None:
    """Though there is no room for other bytes in its place."""
    first = Cache(cache, None)
    first.open()
    first.keep(OBJECT, 0, [memoryview(RIGHT)])
    first.close()
    [copy] = copies(cache)
    damaged = bytearray(copy.read_bytes())
    damaged[1 << 20 : 2 << 20] = bytes(1 << 20)
    copy.write_bytes(damaged)
    for most in (1, None):
        cached = Cache(cache, most)
        cached.open()
        fd = cached.hold(OBJECT, ALL)
        assert cached.read(OBJECT, 0, [memoryview(bytearray(len(RIGHT)))]) == 1 << 20
        assert cached.read(OBJECT, 2 << 20, [memoryview(bytearray(1 << 20))]) == 1 << 20
        part = memoryview(RIGHT)[1 << 20 : 2 << 20]
        if most is not None:
            with pytest.raises(OSError, match=r"could not be kept .* give more cache_bytes"):
                cached.keep(OBJECT, 1 << 20, [part])
            with pytest.raises(OSError, match="could not be kept"):
                cached.ensure(OBJECT)
        else:
            cached.keep(OBJECT, 1 << 20, [part])
            cached.ensure(OBJECT)
            assert content(fd) == RIGHT
        os.close(fd)
        cached.close()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.booleans())))
def test_pieces_are_what_a_set_of_bytes_is(steps: list[tuple[int, int, bool]]) -> None:
    pieces, there = Pieces(), dict[int, Piece]()
    for begin, end, add in steps:
        piece, bytes_ = Piece(begin, end, ""), range(begin, end)
        is_free = begin < end and not there.keys() & {*bytes_}
        if add:
            assert pieces.add(piece) == is_free
            there |= dict.fromkeys(bytes_, piece) if is_free else {}
        else:
            pieces.drop(piece)
            there = {at: one for at, one in there.items() if one != piece}
        assert pieces.all() == sorted({*there.values()})
        for at in range(31):
            next_ = min((one.begin for one in there.values() if one.begin > at), default=40)
            assert pieces.next_after(at, 40) == next_
            run = []
            for byte in range(at, 25):
                if byte not in there:
                    break
                run.append(there[byte])
            assert pieces.following(at, 25) == list(dict.fromkeys(run))
