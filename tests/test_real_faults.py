"""Faults of a real system: full disks, read-only ones, few descriptors, little memory, forks."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import os
import sys
import tempfile
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import pytest
import torch

from asyncloader import (
    AsyncLoaderError,
    CheckpointReader,
    HashTable,
    Loader,
    ReadError,
    SaveError,
    Saver,
    load_tensors,
)
from asyncloader._memory.allowance import processors
from asyncloader._serving.model import row_bytes
from asyncloader.tools import averify
from tests.checkpoints import LIMITS
from tests.folders import content
from tests.mounts import make_read_only, resize, small_disk, used
from tests.oracle import TableData, write_checkpoint
from tests.processes import apart_each
from tests.support import FDS, nothing_left_behind, rows_in
from tests.test_save_faults import is_version, model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

MEMORY = Path("/dev/shm")  # noqa: S108  # a folder of our own within it
Found: TypeAlias = "Mapping[Callable[..., object], Any]"
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs limits as Linux has them")


def save(path: Path, version: int, **how: Any) -> None:  # noqa: ANN401  # of Saver
    tables, tensors = model(version)
    Saver(path=path, hashtables=tables, tensors=tensors, parallel=3, **how).save()


def loads(path: Path, version: int) -> bool:
    """Say whether a load finds all of a version that `model` made."""
    tables, tensors = model(0)
    Loader(path, tables, tensors, strict=True).load()
    wanted, values = model(version)
    found = {id_: row["embedding"] for id_, row in rows_in(tables["t"]).items()}
    return (
        found == {id_: row["embedding"] for id_, row in rows_in(wanted["t"]).items()}
        and all(torch.equal(tensors[name], value) for name, value in values.items())
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Found:
    """Try in processes of their own what needs that, and return what each has found."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.exists() else None) as base:
        Path(base).chmod(0o755)  # for nobody
        each = [as_nobody, with_few_descriptors, with_little_memory, around_forks]
        return dict(zip(each, apart_each([(one, [base]) for one in each]), strict=True))


# --- a full disk


@pytest.mark.parametrize("overwriting", [False, True])
def test_a_save_to_a_disk_with_any_too_little_room_leaves_what_was_there_and_says_so(
    tmp_path: Path, *, overwriting: bool
) -> None:
    """The error names the file that had no room; with room, the next save works."""
    for room in range(0, 200, 4):
        with small_disk(tmp_path / "disk", 4096) as disk:
            path = disk / "checkpoint"
            if overwriting:
                save(path, 1)
            old = content(path) if overwriting else {}
            resize(disk, max(used(disk) + room, 4))
            try:
                save(path, 2)
            except SaveError as error:
                failure = error
            else:
                assert is_version(path, 2)
                break
            assert isinstance(failure.__cause__, OSError)
            assert "No space left on device" in str(failure)
            assert "what was there before is as it was" in str(failure)
            assert failure.file is not None
            assert failure.file.startswith(".saving-1-")
            assert [*disk.rglob("*")] == [path, *map(path.joinpath, old)]
            assert content(path) == old
            resize(disk, 4096)
            save(path, 2)
            assert is_version(path, 2)
    else:
        pytest.fail("it never had room enough")
    assert room >= 24


# --- a folder that may not be written to, or not be read


def test_a_save_to_a_read_only_disk_says_so_and_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4096) as disk:
        save(disk / "old", 1)
        (disk / "empty").mkdir()
        old = content(disk / "old")
        make_read_only(disk)
        for name in "old", "empty", "new":
            with nothing_left_behind(), pytest.raises(SaveError, match="Read-only file") as caught:
                save(disk / name, 2)
            assert caught.value.location == str(disk / name)
        assert content(disk / "old") == old


def test_a_checkpoint_on_a_read_only_disk_loads(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4096) as disk:
        save(disk, 1)
        make_read_only(disk)
        assert loads(disk, 1)


def as_nobody(base: str) -> list[str] | None:
    """Save into and load from folders that somebody else owns; return what that says."""
    path = Path(base) / "nobody"
    if os.geteuid() != 0:
        return None
    save(path / "warm", 1)
    loads(path / "warm", 1)  # whatever is imported for it is, now
    save(path / "shut", 1)
    [shard, *_] = sorted((path / "shut").glob("*.safetensors"))
    shard.chmod(0)
    os.seteuid(65534)
    told = []
    for work in (
        lambda: save(path / "warm", 2),
        lambda: save(path / "new", 2),
        lambda: loads(path / "shut", 1),
    ):
        try:
            work()
        except AsyncLoaderError as error:
            told.append(str(error))
    assert loads(path / "warm", 1)
    return told


@pytest.mark.slow
@linux
def test_who_may_not_write_or_read_is_told_where(found: Found) -> None:
    told = found[as_nobody]
    if told is None:
        pytest.skip("only root can become somebody else")
    assert all("Permission denied" in text for text in told)
    assert "/warm: .saving-" in told[0]
    assert "/new" in told[1]
    assert "/shut: model-0" in told[2]


# --- few descriptors

SHARDS, DESCRIPTORS = 500, 32
MANY = {f"w{number}": torch.full((3,), float(number)) for number in range(SHARDS)}


def with_few_descriptors(base: str) -> dict[str, str]:
    """Do things with many shards; return what went wrong with each, and what stayed open."""
    import resource  # noqa: PLC0415  # not everywhere

    path, new = f"{base}/many", f"{base}/new"
    Saver(path=path, tensors=MANY, parallel=SHARDS).save()
    works: Mapping[str, Callable[[], object]] = {
        "load": lambda: load_all(path),
        "load_tensors": lambda: load_tensors(path),
        "read": lambda: asyncio.run(read_all(path)),
        "verify": lambda: verify(path),
        "save": lambda: Saver(path=new, tensors=MANY, parallel=SHARDS).save(),
        "save again": lambda: Saver(path=path, tensors=MANY, parallel=SHARDS).save(),
    }
    load_few(path)
    before = sorted(os.listdir(FDS))  # noqa: PTH208
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wrong = {}
    for what, work in works.items():
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
        wrong[what] = ""
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # the test says which is right
            wrong[what] = repr(error)[:500]
        if sorted(os.listdir(FDS)) != before:  # noqa: PTH208
            wrong[what] += " some stayed open"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    load_all(new)
    load_all(path)
    return wrong


def load_all(path: str) -> None:
    tensors = {name: torch.zeros(3) for name in MANY}
    Loader(path, tensors=tensors, strict=True).load()
    assert all(torch.equal(tensors[name], value) for name, value in MANY.items())


def load_few(path: str) -> None:
    tensors = {"w7": torch.zeros(3)}
    Loader(path, tensors=tensors, strict=True).load()
    assert torch.equal(tensors["w7"], MANY["w7"])


async def read_all(path: str) -> None:
    async with CheckpointReader(path) as reader, asyncio.TaskGroup() as group:
        reads = {name: group.create_task(reader.aread_tensor(name)) for name in MANY}
    assert all(torch.equal(reads[name].result(), value) for name, value in MANY.items())


def verify(path: str) -> None:
    found = asyncio.run(averify(path, options=LIMITS))
    assert found.ok, found.problems[:1]
    assert found.tensors == SHARDS


@linux
@pytest.mark.parametrize(
    "what",
    [
        "load",
        "load_tensors",
        "read",
        "verify",
        "save",
        "save again",
    ],
)
def test_few_descriptors_are_enough_for_many_shards(found: Found, what: str) -> None:
    assert not found[with_few_descriptors][what]


# --- little memory

MIB = 1 << 20
ROWS, WIDTH, READERS = 400_000, 16, 2
INFLIGHT, STACK = 32 * MIB, 8 * MIB


def write_large(path: Path) -> None:
    ids = torch.arange(ROWS) * 7919
    rows = torch.arange(ROWS, dtype=torch.float32).view(-1, 1).expand(-1, WIDTH).contiguous()
    table = TableData(ids=ids, slots={"embedding": rows})
    write_checkpoint(path, {"t": table}, {"w": torch.arange(4 * MIB, dtype=torch.float32)})


def address_space() -> int:
    [size] = (
        line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize:")
    )
    return int(size) << 10


@contextlib.contextmanager
def room_for(more: int) -> Iterator[None]:
    """Let the process take so many bytes more of address space, and not one besides."""
    import resource  # noqa: PLC0415  # not everywhere

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def empty() -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    return {"t": HashTable([WIDTH], name="t")}, {"w": torch.ones(4 * MIB)}


def loader(path: str, tables: Mapping[str, HashTable], tensors: Mapping[str, Tensor]) -> Loader:
    return Loader(path, tables, tensors, parallel=READERS, max_inflight_bytes=INFLIGHT)


def predicted(path: str) -> int:
    """Return what a load takes above what there is: rows, index, reads under way, stacks."""
    tables, tensors = empty()
    plan = asyncio.run(loader(path, tables, tensors).plan())
    made = cast("Any", SimpleNamespace(tables=tables, tensors=tensors))
    return row_bytes(plan, made) + INFLIGHT + STACK * (READERS + processors())


def is_loaded(tables: Mapping[str, HashTable], tensors: Mapping[str, Tensor]) -> bool:
    rows = tables["t"].lookup(torch.tensor([0, 7919, 7919 * (ROWS - 1)]))
    return (
        len(tables["t"]) == ROWS
        and rows[:, 0].tolist() == [0, 1, ROWS - 1]
        and torch.equal(tensors["w"], torch.arange(4 * MIB, dtype=torch.float32))
    )


def load_with(path: str, room: int) -> str:
    """Load with so much room, and return what went wrong, if anything."""
    tables, tensors = empty()
    tables["t"].insert(torch.tensor([-5]), torch.ones(1, WIDTH))
    held = rows_in(tables["t"])
    load, threads = loader(path, tables, tensors).load, threading.active_count()
    with room_for(room):
        try:
            load()
        except (MemoryError, RuntimeError, AsyncLoaderError) as error:
            failure = f"{type(error).__name__}: {error}"
        else:
            tables["t"].delete(torch.tensor([-5]))
            assert is_loaded(tables, tensors)
            return ""
    assert rows_in(tables["t"]) == held
    stayed = threading.active_count() - threads
    load()  # what was in the way is gone
    return f"{failure}, {stayed} threads stayed"


_ARENA_MAX = -8  # M_ARENA_MAX of the C library


def with_little_memory(base: str) -> dict[str, Any]:
    """Load under the prediction, then with less and less, then with no room for stacks either."""
    path = f"{base}/large"
    write_large(Path(path))
    # Or a thread that happens to find the heap busy takes 64 MiB of addresses for one of its own.
    ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    HashTable([1]).insert(torch.tensor([1]), torch.ones(1, 1))  # imports and compiles
    threading.stack_size(STACK)
    enough = predicted(path) * 11 // 10
    how: dict[str, Any] = {"enough": load_with(path, enough)}
    how["less"] = [load_with(path, room * MIB) for room in range(1, 40, 3)]
    threading.stack_size(64 * MIB)  # larger than any that the C library has kept
    how["no stacks"] = [load_with(path, room * MIB) for room in (1, 40, 70, 100, 150)]
    return how


@linux
def test_a_load_keeps_to_what_was_predicted(found: Found) -> None:
    assert not found[with_little_memory]["enough"]


@linux
def test_a_load_with_too_little_memory_is_an_error_and_changes_no_table(found: Found) -> None:
    less = found[with_little_memory]["less"]
    assert sum("MemoryError: no room for" in failure for failure in less) >= 5
    assert not {failure.split(":")[0] for failure in less} - {"", "MemoryError", "RuntimeError"}


@linux
def test_where_no_thread_can_be_started_a_load_says_so_and_changes_no_table(found: Found) -> None:
    assert "can't start new thread" in found[with_little_memory]["no stacks"][0]


@linux
def test_where_no_thread_can_be_started_none_stays(found: Found) -> None:
    failures = [failure for failure in found[with_little_memory]["no stacks"] if failure]
    assert all(failure.endswith(", 0 threads stayed") for failure in failures), failures


# --- fork

FORKS, PATIENCE = 20, 20


def in_a_child(work: Callable[[], object]) -> str:
    """Do something in a process forked from this one; return how that ended, if not well."""
    pid = os.fork()
    if not pid:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            work()
        except BaseException:  # noqa: BLE001  # nobody else would tell
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return f"status {status}" if status else ""


def around_forks(base: str) -> dict[str, list[str]]:
    """Load before, after and during forks, in parent and child; return what went wrong."""
    path = f"{base}/forked"
    checkpoint = Path(path)
    in_a_child(partial(save, checkpoint, 1))
    ended: dict[str, list[str]] = {}
    ended["after import"] = [in_a_child(partial(check, checkpoint))]
    tables, tensors = model(0)
    loader = Loader(path, tables, tensors)
    reader = CheckpointReader(path)
    loader.load()
    reader.read_tensor("w")
    ended["after a load"] = [
        in_a_child(partial(check, checkpoint)),
        in_a_child(loader.load),
        in_a_child(partial(reader.read_tensor, "b")),
    ]
    ended["while a thread loads"] = while_a_thread_loads(checkpoint)
    ended["within a load"] = within_a_load(checkpoint)
    check(checkpoint)
    loader.load()
    return ended


def check(path: Path) -> None:
    assert loads(path, 1)
    assert gc.isenabled()


def while_a_thread_loads(path: Path) -> list[str]:
    over = threading.Event()

    def load_on() -> None:
        while not over.is_set():
            check_loaded(path)

    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load_on)
        ended = [in_a_child(partial(check, path)) for _ in range(FORKS)]
        over.set()
        loading.result()
    return ended


def check_loaded(path: Path) -> None:
    assert loads(path, 1)


def within_a_load(path: Path) -> list[str]:
    """Fork on the event loop that loads, at each of its steps."""
    ended = []
    tables, tensors = model(0)

    def fork(_: object) -> None:
        ended.append(in_a_child(partial(check, path)))

    asyncio.run(Loader(path, tables, tensors, trace=fork).aload())
    return ended


@linux
@pytest.mark.parametrize(
    ("when", "count"),
    [
        ("after import", 1),
        ("after a load", 3),
        ("while a thread loads", FORKS),
        ("within a load", 5),
    ],
)
def test_a_forked_process_loads_and_so_does_its_parent(found: Found, when: str, count: int) -> None:
    assert not any(found[around_forks][when])
    assert len(found[around_forks][when]) >= count


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_cannot_be_written_to_is_an_error_that_says_so(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Where values are converted, a copy into it would end the process."""
    np.zeros(4, np.float32).tofile(tmp_path / "mapped")
    mapped = np.memmap(tmp_path / "mapped", np.float32, "r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, which comes once a process
        tensor = torch.from_numpy(mapped)
    write_checkpoint(tmp_path / "c", {}, {"w": torch.ones(4, dtype=dtype)})

    with pytest.raises((ValueError, ReadError), match=r"cannot be written to.*clone"):
        Loader(tmp_path / "c", tensors={"w": tensor}, cast="widen").load()

    assert not tensor.any()
    copy = tensor.clone()
    Loader(tmp_path / "c", tensors={"w": copy}, cast="widen").load()
    assert copy.eq(1).all()
