"""Which kind of pages fresh memory is made of."""

from __future__ import annotations

import gc
import mmap
import resource
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from asyncloader._memory.allocation import Spare, zeros
from asyncloader._memory.pages import BLOCK, PageChooser, is_read_only, map_fresh, touch, wipe

if TYPE_CHECKING:
    from collections.abc import Callable

FAST, SLOW = 0.0003, 0.005  # seconds a block


def spend(
    chooser: PageChooser, seconds: float, cost: Callable[[bool], float]
) -> tuple[float, float]:
    """Touch blocks for some time; return what huge and what small pages took of it."""
    spent = {True: 0.0, False: 0.0}
    while sum(spent.values()) < seconds:
        huge = chooser.choose()
        spent[huge] += cost(huge)
        chooser.note(huge=huge, seconds=cost(huge))
    return spent[True], spent[False]


def test_huge_pages_come_first_and_small_ones_are_tried_next() -> None:
    chooser = PageChooser()

    assert chooser.prefers_huge
    assert chooser.choose()
    chooser.note(huge=True, seconds=FAST)
    assert not chooser.choose()


@pytest.mark.parametrize("huge_is_fast", [True, False])
def test_the_cheaper_kind_is_taken_and_looking_at_the_other_is_cheap(huge_is_fast: bool) -> None:
    chooser = PageChooser()

    huge, small = spend(chooser, 10, lambda huge: FAST if huge is huge_is_fast else SLOW)

    assert chooser.prefers_huge is huge_is_fast
    share = (small if huge_is_fast else huge) / (huge + small)
    assert 0 < share < 0.06


def test_what_has_changed_is_noticed() -> None:
    chooser = PageChooser()
    spend(chooser, 1, lambda huge: SLOW if huge else FAST)
    assert not chooser.prefers_huge

    spend(chooser, 1, lambda huge: FAST if huge else SLOW)

    assert chooser.prefers_huge


def test_small_pages_have_to_be_cheaper_by_far() -> None:
    chooser = PageChooser()
    chooser.note(huge=True, seconds=0.0011)
    chooser.note(huge=False, seconds=0.001)

    assert chooser.prefers_huge


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux touches pages on request")
def test_what_was_touched_is_there_before_it_is_written_to() -> None:
    tensor = zeros((128 * BLOCK,), torch.uint8)
    array = tensor.numpy()

    touch([array[: 64 * BLOCK].data, array[64 * BLOCK :].data])

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array[:] = 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 64  # of huge pages there would be 128


@pytest.mark.parametrize("offset", [0, 1, BLOCK - 1, BLOCK + 1])
def test_touching_changes_no_byte(offset: int) -> None:
    tensor = zeros((8 * BLOCK + 5,), torch.uint8)
    tensor[::7] = 3
    before = tensor.clone()

    touch([tensor.numpy()[offset:].data])
    touch([tensor.numpy()[offset : offset + BLOCK].data])

    assert torch.equal(tensor, before)


def faults_of(write: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    write()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def small_pages(blocks: int) -> mmap.mmap:
    memory = mmap.mmap(-1, blocks * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux touches pages on request")
def test_memory_of_others_is_left_alone() -> None:
    others = small_pages(4)

    touch([memoryview(others), memoryview(b""), memoryview(bytes(8))])

    assert faults_of(partial(others.write, bytes(4 * BLOCK))) >= 4 * BLOCK // mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux touches pages on request")
def test_memory_that_is_no_more_is_forgotten_before_others_get_its_addresses() -> None:
    tensor = zeros((4 * BLOCK,), torch.uint8)
    address = tensor.data_ptr()
    del tensor
    gc.collect()
    others = small_pages(5)  # as large as what was given back, which has room for alignment
    begin = np.frombuffer(others, np.uint8).ctypes.data
    if not begin <= address < begin + 5 * BLOCK:
        pytest.skip("the kernel has given it another address")

    touch([memoryview(others)])

    assert faults_of(partial(others.write, bytes(5 * BLOCK))) >= 5 * BLOCK // mmap.PAGESIZE


def test_the_longer_one_kind_is_the_dearer_one_the_less_often_it_is_tried() -> None:
    """Each try splits a mapping, of which a process may have 65,530."""
    chooser = PageChooser()
    tried = 0
    for _ in range(100_000):  # 200 GB
        huge = chooser.choose()
        tried += not huge
        chooser.note(huge=huge, seconds=FAST)

    assert 100 < tried < 300


def yes() -> bool:
    return True


def addresses(tensors: list[torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.skipif(sys.platform == "win32", reason="has no private mappings")
@pytest.mark.parametrize("wiped_before", [True, False])
def test_memory_that_is_given_back_is_lent_again_and_reads_as_zero(wiped_before: bool) -> None:
    spare = Spare(yes)
    spare.allow("me", 64 * BLOCK)
    sizes = [4 * BLOCK + 5, 9 * BLOCK]
    first = [zeros((size,), torch.uint8, spare=spare) for size in sizes]
    touch([first[1].numpy()[: 2 * BLOCK].data])
    first[0].fill_(7)
    first[1][:BLOCK] = 7  # touched
    first[1][5 * BLOCK : 5 * BLOCK + 9] = 7  # by one who reads little
    before = addresses(first)

    first.clear()
    if wiped_before:
        spare.wipe()
    second = [zeros((size + BLOCK // 4,), torch.uint8, spare=spare) for size in sizes]  # has grown

    assert addresses(second) == before
    assert not any(tensor.any() for tensor in second)
    assert spare.nbytes == 0


@pytest.mark.skipif(sys.platform == "win32", reason="has no private mappings")
def test_what_was_written_after_memory_was_lent_again_is_wiped_too() -> None:
    spare = Spare(yes)
    spare.allow("me", 64 * BLOCK)
    for size in (8 * BLOCK, 5 * BLOCK, 8 * BLOCK):
        tensor = zeros((size,), torch.uint8, spare=spare)
        assert not tensor.any()
        tensor.fill_(7)
        del tensor


def test_no_more_is_kept_than_is_allowed_and_what_came_last() -> None:
    spare = Spare(yes)
    spare.allow("me", 10 * BLOCK)
    spare.allow("you", 10 * BLOCK)
    for blocks in (3, 5, 6, 30):
        zeros((blocks * BLOCK,), torch.uint8, spare=spare)

    assert 9 * BLOCK <= spare.nbytes <= 20 * BLOCK  # of 5 and 6, but for what aligns them
    spare.forget("you")
    assert 4 * BLOCK <= spare.nbytes <= 10 * BLOCK
    spare.forget("me")
    assert spare.nbytes == 0
    zeros((4 * BLOCK,), torch.uint8, spare=spare)
    assert spare.nbytes == 0


def test_nothing_is_kept_where_fresh_memory_is_cheap() -> None:
    spare = Spare(lambda: False)
    spare.allow("me", 64 * BLOCK)

    zeros((4 * BLOCK,), torch.uint8, spare=spare)

    assert spare.nbytes == 0


def test_memory_that_is_much_too_large_is_left_to_others() -> None:
    spare = Spare(yes)
    spare.allow("me", 64 * BLOCK)
    zeros((20 * BLOCK,), torch.uint8, spare=spare)

    small = zeros((4 * BLOCK,), torch.uint8, spare=spare)

    assert spare.nbytes >= 20 * BLOCK
    assert not small.any()


@pytest.mark.skipif(sys.platform == "win32", reason="has no private mappings")
def test_wiping_ends_where_it_was_told_to() -> None:
    """What lies behind the last byte may be another mapping, with values that somebody needs."""
    memory, start = map_fresh(2 * BLOCK)
    array = np.frombuffer(memory, np.uint8)[start:]
    end = BLOCK + 4096
    array[end - 1], array[end] = 7, 7  # of a block that nothing has touched as a whole

    wipe(memory, start, end)

    assert array[end - 1] == 0
    assert array[end] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes pages back on request")
def test_what_is_lent_again_takes_no_more_memory_than_was_asked_for() -> None:
    """A version may be half as large as the one before; `max_memory` counts what it asks for."""
    spare = Spare(yes)
    spare.allow("me", 64 * BLOCK)
    memory, start = spare.map(15 * BLOCK)
    old = np.frombuffer(memory, np.uint8)[start : start + 15 * BLOCK]
    touch([old.data])
    old[:] = 7
    spare.give(memory, start, 15 * BLOCK)
    spare.wipe()

    again, _ = spare.map(10 * BLOCK)

    assert again is memory
    assert faults_of(partial(old[: 10 * BLOCK].fill, 1)) < 5
    assert faults_of(partial(old[10 * BLOCK :].fill, 1)) >= 5  # huge pages: one fault each


@pytest.mark.skipif(sys.platform == "win32", reason="has no private mappings")
def test_what_is_being_wiped_is_not_kept_if_nothing_is_allowed_any_more() -> None:
    def forget_meanwhile(memory: mmap.mmap, start: int, size: int) -> None:
        spare.forget("me")
        wipe(memory, start, size)

    spare = Spare(yes, wipe=forget_meanwhile)
    spare.allow("me", 64 * BLOCK)
    zeros((4 * BLOCK,), torch.uint8, spare=spare)
    assert spare.nbytes

    spare.wipe()

    assert spare.nbytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what can be written to")
def test_what_is_mapped_read_only_is_told_from_what_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    assert is_read_only(np.frombuffer(mapped, np.uint8).ctypes.data)
    assert not is_read_only(np.zeros(1).ctypes.data)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what can be written to")
def test_memory_that_the_kernel_does_not_populate_is_not_called_read_only() -> None:
    """Memory that CUDA has pinned belongs to a device, too, and can well be written to."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    of_device = [int(line.split("-")[0], 16) for line in lines if line.endswith("[vvar]")]
    if not of_device:
        pytest.skip("there is no such memory")

    assert not is_read_only(of_device[0])
