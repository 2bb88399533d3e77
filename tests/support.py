"""What several tests need: small checkpoints, destinations for them, and what must hold after."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from asyncloader import DiskTable, HashTable, Slice
from asyncloader._checkpoint.catalog import read_catalog
from asyncloader._checkpoint.manifest import read_manifest
from asyncloader._loading.checks import describe_tables
from asyncloader._loading.destinations import describe_tensors
from asyncloader._loading.load import Load
from asyncloader._loading.progress import Meter
from asyncloader._loading.session import Session
from asyncloader._loading.transaction import complete
from asyncloader._planning.choice import choose
from asyncloader._planning.planner import plan_load
from asyncloader._planning.targets import Targets, default_load_info
from asyncloader._storage.unpacking import UnpackingStorage
from asyncloader._threads.disk import Disk
from asyncloader._threads.jobs import ByteBudget
from asyncloader._threads.pool import Threads, WorkerPool
from asyncloader.options import ReadOptions
from tests.oracle import TableData, flat_bytes, rows_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from asyncloader import UpdateCounts
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._planning.targets import LoadInfo, TensorTargets
    from asyncloader._storage.protocol import ReadInto, ThreadedStorage
    from asyncloader._threads.gate import Gate

T = TypeVar("T")
FDS = Path("/proc/self/fd")
POISON = 0xA5

HashTable([1])  # imports numba, which is slow and reads files: not on a test's event loop


def raw(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Return what must agree, NaN bit for bit."""
    return tensor.dtype, tuple(tensor.shape), flat_bytes(tensor).numpy().tobytes()


def flat_tensors(value: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of nested values, by the names that we give them."""
    if isinstance(value, torch.Tensor):
        yield prefix[:-1], value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from flat_tensors(one, f"{prefix}{key}.")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from flat_tensors(one, f"{prefix}{number}.")


def poison(tensor: Tensor) -> Tensor:
    """Fill a contiguous tensor with bytes that no checkpoint here holds, and return it."""
    flat_bytes(tensor).fill_(1 if tensor.dtype == torch.bool else POISON)
    return tensor


def data(ids: Sequence[int], *, width: int = 2, **slots: int) -> TableData:
    """Make a table whose rows tell their slot and their position: no two values agree.

    Args:
        ids: As they stand on disk.
        width: Of the embedding.
        slots: The widths of further slots.
    """
    widths = {"embedding": width, **slots}
    count = len(ids)
    return TableData(
        ids=torch.tensor(ids, dtype=torch.int64),
        slots={
            name: 1000.0 * number + torch.arange(count * wide).view(count, wide).float() + 1
            for number, (name, wide) in enumerate(widths.items())
        },
    )


def table_for(
    like: TableData,
    *,
    name: str = "t",
    slice: Slice | None = None,  # noqa: A002  # the table's name for it
    children: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
) -> HashTable:
    """Make an empty table that can take what is on disk, or only some slots of it."""
    slots = {slot: rows for slot, rows in like.slots.items() if only is None or slot in only}
    first = slots.pop("embedding")
    table = HashTable(
        first.shape[1:],
        block_size=8,
        dtype=first.dtype,
        coalesced=children is not None,
        children=children,
        slice=slice,
        name=name,
    )
    for slot, rows in slots.items():
        table.add_slot(slot, rows.shape[1:], rows.dtype)
    return table


def rows_in(table: HashTable | DiskTable, child: str | None = None) -> dict[int, dict[str, bytes]]:
    """Return all that a table holds, by id."""
    return rows_of(table.ids(child), {slot: table.rows(slot, child) for slot in table.slots()})


def rows_on_disk(content: TableData, *, keep: Callable[[int], bool] = lambda _: True) -> object:
    """Return what a table holds once all of this is loaded, by id."""
    rows = rows_of(content.ids, content.slots)
    return {id_: row for id_, row in rows.items() if keep(id_)}


def open_files() -> list[str]:
    """Name the files that this process has open."""
    names = []
    for fd in FDS.iterdir() if FDS.exists() else ():
        with contextlib.suppress(OSError):  # the descriptor that listed them
            names.append(str(fd.readlink()))
    return sorted(name for name in names if name.startswith("/") and not name.startswith("/proc/"))


def running_tasks() -> set[asyncio.Task[object]]:
    """Return the tasks of the event loop, if one is running here."""
    try:
        return asyncio.all_tasks()
    except RuntimeError:
        return set()


@contextlib.asynccontextmanager
async def running_pool(size: int, gate: Gate | None = None) -> AsyncIterator[WorkerPool]:
    """Hold threads that run; those that were given up on are not waited for."""
    pool = WorkerPool(size, name="test", gate=gate)
    try:
        yield pool
    finally:
        await asyncio.to_thread(pool.shutdown)


@contextlib.contextmanager
def debug_off() -> Iterator[None]:
    """Let the event loop take no stack trace of every callback, where a test loads many times."""
    loop = asyncio.get_running_loop()
    debug = loop.get_debug()
    loop.set_debug(False)
    try:
        yield
    finally:
        loop.set_debug(debug)


@contextlib.contextmanager
def nothing_left_behind(*tables: HashTable) -> Iterator[None]:
    """Check that no file stays open, no thread or task alive, and no table locked."""
    files, threads, tasks = Counter(open_files()), set(threading.enumerate()), running_tasks()
    try:
        yield
    finally:
        assert not Counter(open_files()) - files  # what tests before have left may go meanwhile
        assert set(threading.enumerate()) <= threads
        assert running_tasks() <= tasks
        for table in tables:
            before = rows_in(table)
            table.reserve(1)  # raises if an update is under way
            assert rows_in(table) == before


@contextlib.contextmanager
def unchanged(*tables: HashTable, tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Check that tables and tensors hold what they held, and that nothing is left behind."""
    held = [rows_in(table) for table in tables]
    bytes_ = {name: raw(tensor) for name, tensor in (tensors or {}).items()}
    with nothing_left_behind(*tables):
        yield
    assert [rows_in(table) for table in tables] == held
    assert {name: raw(tensor) for name, tensor in (tensors or {}).items()} == bytes_


@dataclass
class MemoryStorage:
    """Serves files from memory, counts what is asked of it, and can be told to go wrong."""

    files: dict[str, bytes]
    before_read: Callable[[int], BaseException | None] = lambda _: None
    """Gets the number of the read, and returns what to raise in its place."""

    at_most: int = 1 << 30
    """Bytes that one read gives."""

    reads: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, offset and length of each."""

    in_flight: int = 0
    peak: int = 0
    location: str = "memory"
    lost: int = 0

    @classmethod
    def of(cls, folder: Path) -> MemoryStorage:
        """Take a folder's files into memory."""
        return cls({path.name: path.read_bytes() for path in folder.iterdir()})

    async def size(self, name: str, /) -> int:
        await asyncio.sleep(0)
        if name not in self.files:
            raise FileNotFoundError(2, "No such file", name)
        return len(self.files[name])

    async def changed(self, names: Sequence[str], /) -> list[str]:
        return [name for name in names if name not in self.files]

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        with self._counted(name, offset, views) as number:
            await asyncio.sleep(0)
            return self._read(number, name, offset, views)

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        def read(offset: int, views: Sequence[memoryview]) -> int:
            with self._counted(name, offset, views) as number:
                return self._read(number, name, offset, views)

        await asyncio.sleep(0)
        return job(read)

    @contextlib.contextmanager
    def _counted(self, name: str, offset: int, views: Sequence[memoryview]) -> Iterator[int]:
        length = sum(view.nbytes for view in views)
        self.reads.append((name, offset, length))
        self.in_flight += length
        self.peak = max(self.peak, self.in_flight)
        try:
            yield len(self.reads) - 1
        finally:
            self.in_flight -= length

    def _read(self, number: int, name: str, offset: int, views: Sequence[memoryview]) -> int:
        if (error := self.before_read(number)) is not None:
            raise error
        return self._fill(self.files[name][offset:], views)

    def _fill(self, content: bytes, views: Sequence[memoryview]) -> int:
        left = content[: self.at_most]
        done = 0
        for view in views:
            part = left[done : done + view.nbytes]
            view[: len(part)] = part
            done += len(part)
        return done


@dataclass(kw_only=True)
class Run:
    """A load from a storage of one's own, which `Loader` does not take."""

    storage: ThreadedStorage
    tables: Mapping[str, HashTable] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    parallel: int = 4
    chunk_bytes: int = 1 << 20
    filter_func: Callable[[LoadInfo], LoadInfo] = lambda info: info
    meter: Meter = field(default_factory=lambda: Meter(0))
    budget: ByteBudget = field(default_factory=lambda: ByteBudget(1 << 20))
    touched: dict[str, bool] = field(default_factory=dict)

    async def load(self) -> dict[str, UpdateCounts]:
        """Plan, read, commit; on failure, abort."""
        async with Threads(reads=1) as threads:
            into = describe_tensors(self.tensors)
            session = Session(
                location=self.storage.location,
                file=None,
                storage=UnpackingStorage(self.storage),
                threads=threads,
                disk=Disk(threads.reads),
                options=ReadOptions(parallel=self.parallel, chunk_bytes=self.chunk_bytes),
                budget=self.budget,
            )
            plan = await self._plan(threads, into.targets)
            load = Load(session, plan, into, self.tables, meter=self.meter)
            self.touched = load.touched
            return await complete(load)

    async def _plan(self, threads: Threads, tensors: TensorTargets) -> LoadPlan:
        targets = Targets(tensors=tensors, tables=describe_tables(self.tables))
        info = self.filter_func(default_load_info(targets))
        catalog = await read_catalog(
            self.storage, lambda parse: parse(), executor=threads.kernels, verify="auto"
        )
        choice = choose(catalog, info, targets)
        manifest = await read_manifest(
            self.storage, catalog, choice.shards(), parallel=4, executor=threads.kernels
        )
        return plan_load(manifest, choice, strict=False)
