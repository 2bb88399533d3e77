"""The kernels of tables whose rows stay on the disk do what slow Python does."""

from __future__ import annotations

import bisect
import ctypes
import errno
import os
import random
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncloader._disk_table import hot_kernels, kernels, read_kernels
from asyncloader._disk_table.hot import HotRows, Owner
from asyncloader._disk_table.ids import SortedIds, bits_for
from asyncloader._disk_table.places import Places
from asyncloader._disk_table.reading import DirectReader, RowReader, read_slowly
from asyncloader._storage.kept import KeptFile
from asyncloader._table.native import SystemCalls
from tests.system_calls import FakeReads, no_such_call

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader._table.schema import Longs

EXTREMES = [-(2**63), 2**63 - 1, -1, 0, 1, 65535, 65536, 2**52, -(2**52)]
any_id = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-5, 200), st.sampled_from(EXTREMES),
    st.integers(0, 200).map(lambda n: n * 65536),
)  # fmt: skip
id_lists = st.lists(any_id, max_size=300)
UNSIGNED = 2**64
FADVISE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)


def key(id_: int) -> tuple[int, int]:
    return id_ % 65536, id_ % UNSIGNED


def longs(values: list[int]) -> Longs:
    return np.array(values, np.int64)


# --- ids


@given(ids=id_lists, wanted=id_lists, data=st.data())
def test_ids_are_found_where_they_stand_the_last_of_equal_ones(
    ids: list[int], wanted: list[int], data: st.DataObject
) -> None:
    rows = data.draw(st.permutations(range(len(ids))))
    last = dict(zip(ids, rows, strict=True))

    found = SortedIds.sorted(longs(ids), longs(rows))

    assert found.ids.tolist() == sorted(last, key=key)
    asked = [*wanted, *ids]
    places = found.find(longs(asked))
    assert found.numbers(places).tolist() == [last.get(id_, -1) for id_ in asked]
    kept = data.draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found)))
    some = found.only(np.array(kept, np.bool_))
    left = {int(id_) for id_, keep in zip(found.ids, kept, strict=True) if keep}
    assert some.numbers(some.find(longs(asked))).tolist() == [
        last[id_] if id_ in left else -1 for id_ in asked
    ]


def test_rows_take_four_bytes_where_their_numbers_fit() -> None:
    narrow = SortedIds.sorted(longs([5, 4]), longs([0, 2**32 - 1]))
    wide = SortedIds.sorted(longs([5, 4]), longs([0, 2**32]))
    assert narrow.rows is not None
    assert wide.rows is not None
    assert (narrow.rows.itemsize, wide.rows.itemsize) == (4, 8)
    assert narrow.numbers(longs([0, 1, -1])).tolist() == [2**32 - 1, 0, -1]
    assert wide.numbers(longs([0, 1, -1])).tolist() == [2**32, 0, -1]


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 5000, 200_000])
def test_ids_of_one_position_or_of_all_are_found(count: int) -> None:
    for ids in (np.arange(count) * 65536 + 7, np.arange(count)):
        ordered = ids[np.lexsort((ids, ids % 65536))]
        found = SortedIds.sorted(ids, np.arange(count))
        assert np.array_equal(found.ids, ordered)
        assert np.array_equal(found.numbers(found.find(ids)), np.arange(count))
        assert (found.find(ids + 1_000_000_007) < 0).all()


@given(ids=id_lists)
def test_it_is_seen_whether_ids_ascend_and_where_buckets_begin(ids: list[int]) -> None:
    ordered = sorted(set(ids), key=key)
    assert kernels.ascends(longs(ids)) == (ids == ordered)

    shift = 64 - bits_for(len(ordered))
    directory = np.empty((1 << bits_for(len(ordered))) + 1, np.int64)
    kernels.find_buckets(longs(ordered), np.uint64(shift), directory)

    keys = [((id_ % UNSIGNED) << 48 | (id_ % UNSIGNED) >> 16) % UNSIGNED for id_ in ordered]
    buckets = [one >> shift for one in keys]
    assert directory.tolist() == [bisect.bisect_left(buckets, n) for n in range(len(directory))]


@given(wanted=st.lists(any_id, min_size=1, max_size=100), data=st.data())
def test_different_ids_are_told_apart(wanted: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(wanted) - 1), unique=True).map(sorted))
    buckets = np.full(1 << (2 * len(chosen)).bit_length(), -1, np.int64)
    which, ids, counts = np.empty((3, len(chosen)), np.int64)
    different = kernels.unify(longs(wanted), longs(chosen), buckets, which, ids, counts)

    asked = [wanted[at] for at in chosen]
    assert ids[:different].tolist() == list(dict.fromkeys(asked))
    assert [int(ids[at]) for at in which] == asked
    assert dict(zip(ids[:different].tolist(), counts[:different].tolist(), strict=True)) == Counter(
        asked
    )


# --- rows


@pytest.mark.parametrize(("form", "dtype"), [(1, torch.bfloat16), (2, torch.float16)])
def test_all_halves_are_widened_as_torch_does_it(form: int, dtype: torch.dtype) -> None:
    halves = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype)
    wide = torch.empty(2**16)
    every = np.arange(2**16)
    kernels.spread(every, every, every, halves.data_ptr(), 2, wide.data_ptr(), 4, form)
    wanted = halves.to(torch.float32)
    same = wide.view(torch.int32) == wanted.view(torch.int32)
    quiet = wanted.isnan() & wide.isnan()  # of NaNs, processors set the bit that makes them quiet
    assert bool((same | quiet).all())


@given(rows=st.integers(1, 20), width=st.integers(1, 40), data=st.data())
def test_rows_are_spread_to_all_that_want_them(rows: int, width: int, data: st.DataObject) -> None:
    source = np.frombuffer(random.Random(rows).randbytes(rows * width), np.uint8).copy()
    slots = data.draw(st.lists(st.integers(-1, rows - 1), min_size=1, max_size=30))
    which = data.draw(st.lists(st.integers(0, len(slots) - 1), max_size=40))
    chosen = data.draw(st.permutations(range(len(which))))
    out = np.full((len(which), width), 7, np.uint8)
    kernels.spread(
        longs(chosen), longs(which), longs(slots), source.ctypes.data, width, out.ctypes.data,
        width, 0,
    )  # fmt: skip
    for at, one in zip(chosen, which, strict=True):
        row = source[slots[one] * width :][:width] if slots[one] >= 0 else np.zeros(width, np.uint8)
        assert np.array_equal(out[at], row)


# --- the cache of hot rows


@given(
    nbytes=st.sampled_from([1, 200, 2000, 100_000]),
    rounds=st.lists(st.lists(any_id, min_size=1, max_size=60), min_size=1, max_size=8),
    owners=st.integers(1, 2),
)
def test_what_the_cache_gives_is_what_it_was_given(
    nbytes: int, rounds: list[list[int]], owners: int
) -> None:
    """Owners have other rows for the same ids; rows of 16 bytes."""
    hot = HotRows(nbytes)
    known = [hot.join(16) for _ in range(owners)]

    def rows(owner: Owner, ids: list[int]) -> bytes:
        return b"".join(random.Random(f"{owner.number} {id_}").randbytes(16) for id_ in ids)

    for number, ids in enumerate(rounds):
        owner = known[number % owners]
        out = np.full(len(ids) * 16, 1, np.uint8)
        missed = hot.take(owner, 16, longs(ids), (out.ctypes.data, 16), 0)
        assert missed is not None
        for at in set(range(len(ids))) - set(missed.tolist()):
            assert out[16 * at : 16 * at + 16].tobytes() == rows(owner, [ids[at]])
        new = list(dict.fromkeys(ids[at] for at in missed))
        source = np.frombuffer(rows(owner, new), np.uint8)
        hot.offer(owner, 16, longs(new), np.ones(len(new), np.int64), source.ctypes.data)
        held = hot.of(owner, 16)
        assert len(set(held.ids.tolist())) == len(held.ids)
        assert set(held.ids.tolist()) <= {id_ for each in rounds[: number + 1] for id_ in each}


def test_rows_that_are_asked_for_often_are_not_pushed_out_by_one_scan() -> None:
    hot, width = HotRows(1 << 20), 64
    owner = hot.join(width)
    often, memory = np.arange(1000), np.zeros(10**6 * width // 10, np.uint8)
    for _ in range(4):
        out = np.empty(len(often) * width, np.uint8)
        missed = hot.take(owner, width, often, (out.ctypes.data, width), 0)
        assert missed is not None
        hot.offer(owner, width, often[missed], np.ones(len(missed), np.int64), memory.ctypes.data)
    once = np.arange(10**6, 10**6 + 50_000)
    hot.offer(owner, width, once, np.ones(len(once), np.int64), memory.ctypes.data)

    out = np.empty(len(often) * width, np.uint8)
    missed = hot.take(owner, width, often, (out.ctypes.data, width), 0)

    assert missed is not None
    assert len(missed) < len(often) // 2


def test_a_line_of_64_bytes_holds_a_set() -> None:
    assert 8 * hot_kernels.WAYS + 4 * hot_kernels.WAYS <= 64


# --- reads


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Two files, three parts, rows of 24 bytes at odd places; the last one ends its file."""
    width, kept = 24, []
    for number, size in enumerate((10_000, 24 * 200 + 3)):
        path = tmp_path / f"{number}"
        path.write_bytes(random.Random(number).randbytes(size))
        fd = os.open(path, os.O_RDONLY)
        kept.append(KeptFile("here", path.name, fd, path.stat()))
    parts = [(0, kept[0], 5), (100, kept[1], 3), (300, kept[0], 5000)]
    return Places.of(torch.float32, width, parts)


def numbers(count: int) -> Longs:
    every = [*range(100), *range(100, 300), *range(300, 500)]
    return longs(random.Random(count).choices(every, k=count))


def slow(places: Places, wanted: Longs) -> bytes:
    rows = np.zeros(len(wanted) * places.width, np.uint8)
    assert read_slowly(places, wanted, rows.ctypes.data, np.zeros(2, np.int64))[0] == 0
    return rows.tobytes()


READERS = {
    "ahead": lambda: RowReader(SystemCalls.of_system()),
    "a window of one": lambda: RowReader(SystemCalls.of_system(), window=1),
    "past the cache": lambda: DirectReader(SystemCalls.of_system()),
    "past the cache, one by one": lambda: DirectReader(SystemCalls.of_system(), depth=1),
    "no such calls": lambda: RowReader(None),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 127, 128, 129, 1000])
def test_rows_are_read_as_the_slow_version_reads_them(
    reader: Callable[[], RowReader], count: int, places: Places
) -> None:
    wanted = numbers(count)
    rows = np.zeros(count * places.width + 1, np.uint8)
    error, _, _ = reader()(places, wanted, rows.ctypes.data, np.zeros(2, np.int64))
    assert error == 0
    assert rows[:-1].tobytes() == slow(places, wanted)
    assert rows[-1] == 0, "nothing is written behind them"


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_row_behind_the_end_of_its_file_is_told(
    reader: Callable[[], RowReader], places: Places
) -> None:
    cut = Places.of(torch.float32, 24, [(0, places.files[1], 3)])
    wanted = longs([0, 199, 200, 5])
    rows = np.zeros(4 * 24, np.uint8)
    error, at, _ = reader()(cut, wanted, rows.ctypes.data, np.zeros(2, np.int64))
    assert (error, at) == (read_kernels.ENDS_EARLY, 2)
    assert rows[:48].tobytes() == slow(cut, wanted[:2])


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_read_that_is_no_longer_wanted_ends(
    reader: Callable[[], RowReader], places: Places
) -> None:
    rows = np.zeros(1000 * 24, np.uint8)
    error, _, _ = reader()(places, numbers(1000), rows.ctypes.data, np.ones(2, np.int64))
    assert error == read_kernels.STOPPED


@pytest.mark.parametrize("window", [1, 2, 128])
@given(at_most=st.lists(st.integers(1, 30), min_size=1, max_size=20), refuse=st.booleans())
def test_short_reads_and_interrupted_ones_are_gone_on_with(
    window: int, at_most: list[int], refuse: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("short") / "f"
    path.write_bytes(random.Random(1).randbytes(24 * 50))
    kept = KeptFile("here", "f", os.open(path, os.O_RDONLY), path.stat())
    one = Places.of(torch.float32, 24, [(0, kept, 0)])

    def answer(number: int, may_wait: bool) -> int | None:
        if refuse and not may_wait:
            return -errno.EAGAIN
        if may_wait and number % 3 == 0:
            return -errno.EINTR
        return at_most[number % len(at_most)]

    fake = FakeReads(answer)
    wanted = longs([*range(50), 3, 3])
    rows = np.zeros(52 * 24, np.uint8)
    error, _, _ = RowReader(fake.calls, window=window)(
        one, wanted, rows.ctypes.data, np.zeros(2, np.int64)
    )
    assert error == 0
    assert rows.tobytes() == slow(one, wanted)


@pytest.mark.parametrize("bad", range(12))
def test_of_a_failing_read_it_is_told_which_row_and_all_before_it_are_there(
    bad: int, places: Places
) -> None:
    seen: list[int] = []

    def answer(number: int, may_wait: bool) -> int | None:
        if may_wait:
            seen.append(number)
            return -errno.EIO if len(seen) == bad + 1 else None
        return no_such_call(number, may_wait)

    wanted = numbers(12)
    rows = np.zeros(12 * 24, np.uint8)
    fake = FakeReads(answer)
    error, at, waited = RowReader(fake.calls, window=4)(
        places, wanted, rows.ctypes.data, np.zeros(2, np.int64)
    )
    assert (error, at) == (errno.EIO, bad)
    assert rows[: bad * 24].tobytes() == slow(places, wanted[:bad])
    assert waited >= bad


def test_where_a_refused_read_begins_nothing_the_device_is_told(places: Places) -> None:
    told: list[int] = []

    def advise(_fd: int, _begin: int, length: int, _advice: int) -> int:
        told.append(length)
        return 0

    fadvise = FADVISE(advise)
    address = ctypes.cast(fadvise, ctypes.c_void_p).value or 0
    fake = FakeReads(no_such_call)
    calls = fake.calls._replace(fadvise=address)
    wanted = numbers(20)
    rows = np.zeros(20 * 24, np.uint8)
    error, _, waited = RowReader(calls)(places, wanted, rows.ctypes.data, np.zeros(2, np.int64))
    assert (error, waited, told) == (0, 20, [24] * 20)
    assert rows.tobytes() == slow(places, wanted)


def test_after_a_failure_to_collect_reads_past_the_cache_no_late_one_is_taken_for_another(
    places: Places,
) -> None:
    real = SystemCalls.of_system()
    if real is None:
        pytest.skip("no system calls by number here")
    kind = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 6, use_errno=True)
    call, failures = kind(real.syscall), [1]

    def answer(number: int, *rest: int) -> int:
        if len(rest) == 5 and rest[1] == 1 and failures:  # io_getevents waits for one at least
            failures.pop()
            ctypes.set_errno(errno.EIO)
            return -1
        return int(call(number, *rest))

    fake = kind(answer)
    address = ctypes.cast(fake, ctypes.c_void_p).value or 0
    reader = DirectReader(real._replace(syscall=address))
    one, other = numbers(60), numbers(61)
    rows = np.zeros(61 * 24, np.uint8)
    reader(places, one, rows.ctypes.data, np.zeros(2, np.int64))
    error, _, _ = reader(places, other, rows.ctypes.data, np.zeros(2, np.int64))
    assert (error, failures) == (0, [])
    assert rows.tobytes() == slow(places, other)
