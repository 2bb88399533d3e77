"""Two loads into one memory never mix, and what a lost read may write to is known."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from asyncloader import Loader, LoadPlan, LoadReport
from asyncloader._storage.local import LocalStorage
from asyncloader._threads.call import lost_memory
from asyncloader._threads.disk import Disk
from tests.oracle import write_checkpoint
from tests.support import running_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

FAR = 1 << 16
"""An offset that no file is read at when it is opened."""


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of the same names, one of ones, one of twos."""
    for value in (1, 2):
        stored = {"w": torch.full((4, 4), float(value)), "v": torch.full((4,), float(value))}
        write_checkpoint(tmp_path / str(value), {}, stored)
    return tmp_path / "1", tmp_path / "2"


OTHERS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "the same": lambda w: {"w": w},
    "an alias": lambda w: {"w": w.detach().view(4, 4)},
    "part of it": lambda w: {"v": w[2]},
    "turned": lambda w: {"w": w.T},
    "a column of it": lambda w: {"v": w[:, 1]},
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_load_into_memory_that_another_one_fills_is_refused(
    two: tuple[Path, Path], make: Callable[[Tensor], dict[str, Tensor]]
) -> None:
    """It runs on another thread and another loop, as loads of several requests do."""
    w = torch.zeros(4, 4)
    second = Loader(two[1], tensors=make(w))
    refused: list[str] = []

    def meanwhile(_: object) -> None:
        with pytest.raises(RuntimeError, match="is being filled by another load") as caught:
            second.load()
        refused.append(str(caught.value))

    Loader(two[0], tensors={"w": w}, progress=meanwhile).load()

    assert w.eq(1).all()
    assert str(two[0]) in refused[0]
    assert "tensors['" in refused[0]
    second.load()
    assert w.eq(2).any()


def test_loads_into_views_that_interleave_go_side_by_side(two: tuple[Path, Path]) -> None:
    matrix = torch.zeros(4, 2)
    second = Loader(two[1], tensors={"v": matrix[:, 1]})
    reports: list[LoadReport] = []

    def meanwhile(_: object) -> None:
        if not reports:
            reports.append(second.load())

    Loader(two[0], tensors={"v": matrix[:, 0]}, progress=meanwhile).load()

    assert matrix.tolist() == [[1, 2]] * 4


def test_loads_into_many_columns_of_one_matrix_go_side_by_side(tmp_path: Path) -> None:
    """Each of one load's columns lies between two of the other's, and is compared with all."""
    columns = [str(number) for number in range(60)]
    write_checkpoint(tmp_path, {}, {name: torch.full((4,), float(name)) for name in columns})
    matrix = torch.zeros(4, len(columns))
    into = {name: matrix[:, int(name)] for name in columns}
    even = Loader(tmp_path, tensors={name: into[name] for name in columns[::2]})
    odd = Loader(tmp_path, tensors={name: into[name] for name in columns[1::2]})
    clash = Loader(tmp_path, tensors={"7": into["8"]})

    def meanwhile(_: object) -> None:
        odd.load()
        with pytest.raises(RuntimeError, match=r"tensors\['7'\] is being filled .*it is '8'"):
            clash.load()

    assert even.load().filled == 30
    Loader(tmp_path, tensors={name: into[name] for name in columns[::2]}, progress=meanwhile).load()

    assert matrix.eq(torch.arange(60.0)).all()


def test_a_load_is_refused_if_another_one_came_first_since_it_began(
    two: tuple[Path, Path],
) -> None:
    """Else the order in which two loads end would decide what a model holds."""
    w = torch.zeros(4, 4)

    def meanwhile(_: LoadPlan) -> None:
        Loader(two[1], tensors={"w": w}).load()

    with pytest.raises(RuntimeError, match="is being filled by another load"):
        Loader(two[0], tensors={"w": w}, on_plan=meanwhile).load()

    assert w.eq(2).all()
    Loader(two[0], tensors={"w": w}).load()
    assert w.eq(1).all()


def test_a_long_load_does_not_hold_on_to_what_others_have_filled(two: tuple[Path, Path]) -> None:
    """Or versions that a service has let go of would stay in memory."""
    memory: list[weakref.ref[object]] = []
    gone: list[bool] = []

    def meanwhile(_: object) -> None:
        array = np.zeros((4, 4), np.float32)
        memory.append(weakref.ref(array))
        Loader(two[1], tensors={"w": torch.from_numpy(array)}).load()
        del array
        gc.collect()
        gone.append(memory[-1]() is None)

    Loader(two[0], tensors={"w": torch.zeros(4, 4)}, progress=meanwhile).load()

    assert gone
    assert all(gone)


def test_memory_of_a_load_that_failed_can_be_filled_again(two: tuple[Path, Path]) -> None:
    w = torch.zeros(4, 4)
    with pytest.raises(ZeroDivisionError):
        Loader(two[0], tensors={"w": w}, progress=lambda _: divmod(1, 0)).load()

    Loader(two[1], tensors={"w": w}).load()

    assert w.eq(2).all()


async def test_of_many_loads_at_once_one_wins_whole(two: tuple[Path, Path]) -> None:
    into = {"w": torch.zeros(4, 4), "v": torch.zeros(4)}
    loads = (Loader(path, tensors=into).aload() for path in two * 4)

    results = await asyncio.gather(*loads, return_exceptions=True)

    done = [one for one in results if isinstance(one, LoadReport)]
    assert len(done) == 1
    assert {type(one) for one in results} == {LoadReport, RuntimeError}
    assert into["w"].eq(int(done[0].location[-1])).all()
    assert into["v"].eq(int(done[0].location[-1])).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_meanwhile_may_load(two: tuple[Path, Path]) -> None:
    w = torch.zeros(4, 4)
    codes: list[int] = []

    def meanwhile(_: object) -> None:
        if codes:
            return
        child = os.fork()
        if not child:
            try:
                Loader(two[1], tensors={"w": w}).load()
            finally:
                os._exit(0 if w.eq(2).all() else 1)
        codes.append(os.waitpid(child, 0)[1])

    Loader(two[0], tensors={"w": w}, progress=meanwhile).load()

    assert codes == [0]
    assert w.eq(1).all()


# --- reads that were given up


class Gate:
    """Reads that wait until a test lets them go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.opened = threading.Event()

    def preadv(self, fd: int, views: Sequence[memoryview], offset: int, _: object) -> int:
        """Read; beyond the start of the file, when the gate is open."""
        if offset >= FAR:
            self.thread = threading.current_thread()
            self.begun.set()
            self.opened.wait()
        return os.preadv(fd, views, offset)


@pytest.mark.parametrize("lent", [False, True], ids=["read", "read on a lent thread"])
@pytest.mark.parametrize("size", [1 << 10, 1 << 21], ids=["small", "large"])
async def test_memory_of_a_lost_read_is_known_though_who_waited_was_cancelled(
    tmp_path: Path, size: int, *, lent: bool
) -> None:
    """Or the next load would be let into it, and overwritten when the disk is back."""
    (tmp_path / "file").write_bytes(bytes(FAR) + b"\1" * size)
    gate, buffer = Gate(), memoryview(bytearray(size))
    address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    async with running_pool(4) as pool:
        storage = LocalStorage(tmp_path, disk=Disk(pool, seconds=0.05), preadv=gate.preadv)
        async with storage:
            reading = asyncio.ensure_future(
                storage.on_thread("file", lambda read: read(FAR, [buffer]))
                if lent
                else storage.readinto("file", FAR, [buffer])
            )
            await asyncio.to_thread(gate.begun.wait)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert storage.lost == 1
            assert lost_memory() == [(address, address + size)]
        gate.opened.set()
        await asyncio.to_thread(gate.thread.join)
    assert not lost_memory()


async def test_a_lost_thread_begins_no_other_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(FAR) + b"\1" * 8)
    gate, buffer, later = Gate(), memoryview(bytearray(8)), bytearray(8)
    async with running_pool(4) as pool:
        storage = LocalStorage(tmp_path, disk=Disk(pool, seconds=0.05), preadv=gate.preadv)
        async with storage:
            job: Callable[[Callable[[int, list[memoryview]], int]], int] = lambda read: (  # noqa: E731
                read(FAR, [buffer]) + read(FAR, [memoryview(later)])
            )
            with pytest.raises(TimeoutError):
                await storage.on_thread("file", job)
        gate.opened.set()
        await asyncio.to_thread(gate.thread.join)
    assert bytes(buffer) == b"\1" * 8
    assert bytes(later) == bytes(8)
