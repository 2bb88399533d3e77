"""A table that wants some rows of a block gets these, whatever the sidecar says of their order."""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from asyncloader import CheckpointError, HashTable, Loader, ReadError, Saver, Slice, gen_slice
from asyncloader._checkpoint.blocks import Block
from asyncloader._checkpoint.dtypes import DTYPES
from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, PartRows
from asyncloader._loading.filling import Filling, row_groups
from asyncloader._loading.verifier import Verifier
from asyncloader._threads.jobs import ByteBudget
from tests.oracle import TableData, edit_json, shard_holding, write_checkpoint
from tests.support import MemoryStorage, Run, data, rows_in, rows_on_disk, table_for, unchanged
from tests.test_load_properties import some_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncloader import LoadReport
    from asyncloader._storage.protocol import ReadInto

T = TypeVar("T")
SUB_SLICES = 256


def save(path: Path, content: TableData, *, ranks: int = 1, size: int = 65536) -> Path:
    """Save the table `t` as so many ranks do."""
    for rank in reversed(range(ranks)):
        part = gen_slice(rank, ranks, size)
        table = table_for(content, slice=part)
        mine = [row for row, id_ in enumerate(content.ids.tolist()) if part.accepts(id_)]
        for slot, rows in content.slots.items():
            table.insert(content.ids[mine], rows[mine], slot)
        Saver(rank, ranks, 2, path, {"t": table}, save_id="s").save()
    return path


def load(path: Path, content: TableData, wanted: Slice, **how: Any) -> LoadReport:  # noqa: ANN401
    """Load what a slice wants, and check that this, and nothing else, was loaded."""
    table = table_for(content, slice=wanted)
    report = Loader(path, {"t": table}, strict=True, **how).load()
    assert rows_in(table) == rows_on_disk(content, keep=wanted.accepts)
    return report


@st.composite
def contents(draw: st.DrawFn) -> TableData:
    rng = random.Random(draw(st.integers(0, 2**32)))
    ids = some_ids(rng, draw(st.sampled_from([0, 1, 2, 60, 600])))
    return data(list(dict.fromkeys(ids)), width=3, exp_avg=1)


@st.composite
def slices(draw: st.DrawFn, size: int) -> Slice:
    begin = draw(st.integers(0, size))
    return Slice(begin, draw(st.integers(begin, size)), size)


hows = st.fixed_dictionaries(
    {
        "verify": st.sampled_from(["auto", "require", "off"]),
        "chunk_bytes": st.sampled_from([1, 50, 3000, 16 << 20]),
        "max_inflight_bytes": st.sampled_from([1, 5000, 128 << 20]),
    }
)
sizes = st.sampled_from([65536, 1000, 256, 97, 7])


@given(
    content=contents(), size=sizes, other=sizes, ranks=st.integers(1, 3), how=hows, draw=st.data()
)
def test_any_slice_of_what_any_ranks_saved_is_loaded_whole(  # noqa: PLR0917
    content: TableData, size: int, other: int, ranks: int, how: dict[str, Any], draw: st.DataObject
) -> None:
    wanted = draw.draw(slices(draw.draw(st.sampled_from([size, size, other]))))
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), content, ranks=ranks, size=size)
        report = load(Path(folder), content, wanted, **how)
    if how["verify"] == "require":
        assert report.bytes_verified == report.bytes_wanted
    assert report.bytes_verified <= report.bytes_wanted <= report.bytes_read


@given(
    content=contents(),
    size=sizes,
    ranks=st.integers(1, 3),
    verify=st.sampled_from(["auto", "require"]),
    draw=st.data(),
)
def test_offsets_that_lie_are_found_out_or_do_no_harm(
    content: TableData, size: int, ranks: int, verify: str, draw: st.DataObject
) -> None:
    wanted = draw.draw(slices(size))
    rng = random.Random(draw.draw(st.integers(0, 2**32)))
    lies = draw.draw(st.sampled_from([lie_all, lie_once, shift]))

    def change(sidecar: Any) -> None:  # noqa: ANN401  # JSON
        for part in sidecar["parts"]["t"]:
            part["offsets"] = lies(part["offsets"], rng)

    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), content, ranks=ranks, size=size)
        edit_json(path / "asyncloader.json", change)
        table = table_for(content, slice=wanted)
        try:
            Loader(path, {"t": table}, verify=verify).load()  # type: ignore[arg-type]
        except CheckpointError as error:
            assert "belongs to other ids" in str(error)  # noqa: PT017
            assert not len(table)
        else:
            assert rows_in(table) == rows_on_disk(content, keep=wanted.accepts)
        load(path, content, wanted, verify="off")


def lie_all(offsets: Sequence[int], rng: random.Random) -> list[int]:
    rows = offsets[-1]
    return [0, *sorted(rng.randint(0, rows) for _ in range(SUB_SLICES - 1)), rows]


def lie_once(offsets: Sequence[int], rng: random.Random) -> list[int]:
    lied = list(offsets)
    at = rng.randrange(1, SUB_SLICES)
    lied[at] = rng.randint(lied[at - 1], lied[at + 1])
    return lied


def shift(offsets: Sequence[int], rng: random.Random) -> list[int]:
    """As a part's that another save has written, of a few ids more or less at the front."""
    by = rng.randint(-3, 3)
    return [0, *(min(max(one + by, 0), offsets[-1]) for one in offsets[1:-1]), offsets[-1]]


CONTENT = data(range(2000), width=8, exp_avg=8)
HALF = gen_slice(0, 2, 1000)


def moved(by: int) -> Callable[[Any], None]:
    """Move where the rows begin at which `HALF` ends."""

    def change(sidecar: Any) -> None:  # noqa: ANN401  # JSON
        part = sidecar["parts"]["t"][0]
        number = SUB_SLICES // 2
        middle = min(max(part["offsets"][number] + by, 0), 2000)
        below = [min(one, middle) for one in part["offsets"][:number]]
        above = [max(one, middle) for one in part["offsets"][number + 1 :]]
        part["offsets"] = [*below, middle, *above]

    return change


@pytest.mark.parametrize("by", [-1, -2, -500, -2000])
@pytest.mark.parametrize("verify", ["auto", "require"])
async def test_rows_that_the_sidecar_passes_over_are_missed(
    tmp_path: Path,
    by: int,
    verify: Any,  # noqa: ANN401  # a literal
) -> None:
    edit_json(save(tmp_path, CONTENT, size=1000) / "asyncloader.json", moved(by))
    table = table_for(CONTENT, slice=HALF)
    table.insert(torch.tensor([3]), torch.ones(1, 8))
    with unchanged(table), pytest.raises(CheckpointError, match="belongs to other ids") as caught:
        await Loader(tmp_path, {"t": table}, verify=verify).aload()
    assert caught.value.key == "t.id/part_0_1"
    assert "verify='off'" in caught.value.problem


def test_rows_too_many_that_the_sidecar_offers_are_left(tmp_path: Path) -> None:
    edit_json(save(tmp_path, CONTENT, size=1000) / "asyncloader.json", moved(300))
    load(tmp_path, CONTENT, HALF)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda part: part.update(rows=1999, offsets=[0] * 256 + [1999]), "2000 ids.*says 1999"),
        (lambda part: part.update(offsets=[0, 2000]), "not those of 256 sub-slices"),
        (lambda part: part.pop("offsets"), "damaged: 'offsets'"),
        (lambda part: part.update(rows="2000"), "not a part"),
    ],
)
async def test_a_sidecar_whose_offsets_are_none_is_an_error_for_who_needs_them(
    tmp_path: Path, change: Callable[[Any], object], match: str
) -> None:
    edit_json(
        save(tmp_path, CONTENT, size=1000) / "asyncloader.json",
        lambda it: change(it["parts"]["t"][0]),
    )
    table = table_for(CONTENT, slice=HALF)
    with unchanged(table), pytest.raises(CheckpointError, match=match):
        await Loader(tmp_path, {"t": table}).aload()
    load(tmp_path, CONTENT, HALF, verify="off")
    load(tmp_path, CONTENT, gen_slice(0, 1, 1000))  # who wants all rows need not know
    load(tmp_path, CONTENT, gen_slice(0, 2, 999))  # who counts in another way cannot


@pytest.mark.parametrize("parts", [{}, {"t": []}, {"u": 3}, {"t": [{"slice": 5}, {}]}])
def test_without_offsets_ids_say_what_is_wanted(tmp_path: Path, parts: object) -> None:
    edit_json(save(tmp_path, CONTENT) / "asyncloader.json", lambda it: it.update(parts=parts))
    report = load(tmp_path, CONTENT, gen_slice(0, 4))
    assert report.bytes_read >= 2000 * 8


@pytest.mark.parametrize("parts", [[], {"t": 5}, {"t": [7]}, None])
def test_offsets_of_another_form_are_an_error(tmp_path: Path, parts: object) -> None:
    edit_json(save(tmp_path, CONTENT) / "asyncloader.json", lambda it: it.update(parts=parts))
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path, CONTENT, gen_slice(0, 4))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("wanted", [gen_slice(0, 4), gen_slice(1, 4), gen_slice(4, 5)], ids=str)
def test_hardly_more_is_read_than_is_wanted(tmp_path: Path, ranks: int, wanted: Slice) -> None:
    rng = np.random.default_rng(3)
    ids = np.unique(rng.integers(-(2**63), 2**63 - 1, 30_000))
    content = data(ids.tolist(), width=32, exp_avg=32)
    path = save(tmp_path, content, ranks=ranks)
    table = table_for(content, slice=wanted)
    report = Loader(path, {"t": table}).load()
    owned = len(table) * 264
    all_ids = 8 * len(ids)  # so few are read whole, to verify them
    assert owned <= report.bytes_read <= 1.05 * owned + all_ids
    plain = load(path, content, wanted, verify="off")
    assert plain.bytes_wanted > report.bytes_wanted


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 25])  # 25: rows lie across the borders of chunks
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 16 << 20])
def test_of_rows_that_stand_side_by_side_all_chunks_between_are_verified(
    tmp_path: Path, width: int, chunk_bytes: int
) -> None:
    row = 4 * width
    count = 5 * DIGEST_CHUNK // row
    table = HashTable([width], name="t", block_size=1 << 16)
    ids = torch.arange(count)
    table.insert(ids, ids[:, None].expand(count, width).float())
    Saver(path=tmp_path, hashtables={"t": table}, parallel=1).save()
    part = gen_slice(1, 5)
    for verify in ("auto", "require"):
        some = HashTable([width], name="t", slice=part)
        how: Any = {"verify": verify, "chunk_bytes": chunk_bytes}
        report = Loader(tmp_path, {"t": some}, **how).load()
        assert torch.equal(some.rows()[:, 0], some.ids().float())
        if verify == "require":
            assert report.bytes_verified == report.bytes_wanted
        else:
            rows = report.bytes_read - 8 * count  # one chunk of ids, read whole
            assert len(some) * row <= rows <= 1.05 * len(some) * row
    some = HashTable([width], name="t", slice=gen_slice(1, 2))
    report = Loader(tmp_path, {"t": some}).load()
    first = (count - len(some)) * row
    whole = count * row - -(-first // DIGEST_CHUNK) * DIGEST_CHUNK
    assert report.bytes_verified >= whole - (0 if DIGEST_CHUNK % row == 0 else DIGEST_CHUNK)


async def load_from(storage: Any, content: TableData, wanted: Slice, chunk_bytes: int) -> Any:  # noqa: ANN401
    table = table_for(content, slice=wanted)
    budget = ByteBudget(1 << 20)
    await Run(storage=storage, tables={"t": table}, chunk_bytes=chunk_bytes, budget=budget).load()
    assert budget.in_use == 0
    return rows_in(table)


@pytest.mark.parametrize(("chunk_bytes", "at_most"), [(40, 1000), (1000, 7), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("saved", [True, False])
async def test_short_reads_give_the_same(
    tmp_path: Path, chunk_bytes: int, at_most: int, saved: bool
) -> None:
    content = data([*range(-50, 150, 3), 2**63 - 1, -(2**63)], width=3, exp_avg=1)
    if saved:
        save(tmp_path, content)
    else:
        write_checkpoint(tmp_path, {"t": content}, {}, ranks=2, shuffle_seed=1)
    for wanted in (gen_slice(0, 4), Slice(0, 100, 65536), Slice(1, 2, 3)):
        storage = MemoryStorage.of(tmp_path)
        storage.at_most = at_most
        found = await load_from(storage, content, wanted, chunk_bytes)
        assert found == rows_on_disk(content, keep=wanted.accepts)
        load(tmp_path, content, wanted, chunk_bytes=chunk_bytes)


@dataclass
class Lending(MemoryStorage):
    """Lends a thread, on which something may go wrong."""

    fault: OSError | None = None
    ends: bool = False

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        await asyncio.sleep(0)
        if self.fault is not None:
            raise self.fault
        return job(lambda at, to: 0 if self.ends else self._fill(self.files[name][at:], to))


@pytest.mark.parametrize(
    ("how", "match"),
    [({"ends": True}, "bytes early"), ({"fault": OSError(5, "gone")}, "gone")],
    ids=["ends", "gone"],
)
async def test_what_goes_wrong_on_a_lent_thread_names_the_table(
    tmp_path: Path, how: dict[str, Any], match: str
) -> None:
    write_checkpoint(tmp_path, {"t": CONTENT}, {})
    table = table_for(CONTENT, slice=HALF)
    storage = Lending.of(tmp_path)
    await Run(storage=storage, tables={"t": table}).load()
    assert rows_in(table) == rows_on_disk(CONTENT, keep=HALF.accepts)
    storage = Lending(files=storage.files, **how)
    with unchanged(table), pytest.raises(ReadError, match=match) as caught:
        await Run(storage=storage, tables={"t": table}).load()
    assert caught.value.names == ("t",)


@given(
    rows=st.lists(st.integers(0, 60), unique=True, min_size=1).map(sorted),
    most=st.integers(1, 20),
    gap=st.integers(0, 5),
    runs=st.booleans(),
    window=st.none() | st.integers(1, 30),
)
@example(rows=[0, 1, 2, 3], most=2, gap=0, runs=True, window=2)
def test_groups_hold_every_row_once_and_keep_to_their_limits(
    rows: list[int], most: int, gap: int, runs: bool, window: int | None
) -> None:
    array = np.array(rows)
    windows = None if window is None else array // window
    groups = list(row_groups(array, most=most, gap=gap, runs=runs, windows=windows))
    assert [i for one in groups for i in range(*one)] == list(range(len(rows)))
    for low, high in groups:
        span = rows[high - 1] - rows[low] + 1
        if runs and span == high - low:
            continue
        assert span <= most
        assert np.diff(rows[low:high]).max(initial=0) <= gap + 1
        assert windows is None or len(set(windows[low:high].tolist())) == 1


def test_memory_that_takes_no_bytes_as_they_lie_gets_its_rows() -> None:
    """As that of a GPU, which not every machine has."""
    stored = torch.arange(60).view(20, 3).float()
    raw = memoryview(stored.numpy().tobytes())
    block = table_block(rows=20, row_bytes=12)
    rows = np.array([1, 2, 3, 9, 17])
    target = torch.zeros(5, 6)[:, ::2]
    filling = Filling(block, rows, target, Verifier("here", widen=False))
    assert filling.memory is None
    buffer = torch.zeros(1000, dtype=torch.uint8)
    for step in filling.steps(most=40, gap=24):
        view = filling.view(step, buffer)
        view[:] = raw[step.first : step.last]
        filling.take(step, view)
    assert torch.equal(target, stored[rows])


def table_block(*, rows: int, row_bytes: int) -> Block:
    return Block("f", "k", DTYPES["F32"], (rows, row_bytes // 4), 0, rows * row_bytes)


@given(
    begin=st.integers(0, 300), share=st.integers(1, 700), draw=st.data(), seed=st.integers(0, 2**32)
)
def test_rows_of_a_wanted_slice_are_among_those_that_the_offsets_say(
    begin: int, share: int, draw: st.DataObject, seed: int
) -> None:
    size = begin + share + 50
    rng = random.Random(seed)
    # Some outside of what the part claims: they stand at its ends.
    positions = sorted(rng.randrange(size) for _ in range(rng.randrange(200)))
    cuts = [begin + share * number // SUB_SLICES for number in range(1, SUB_SLICES)]
    offsets = tuple(sum(one < cut for one in positions) for cut in cuts)
    part = PartRows(
        Slice(begin, begin + share, size), len(positions), (0, *offsets, len(positions))
    )
    wanted = draw.draw(slices(size))
    assume(not wanted.disjoint(part.slice))
    among = part.among(wanted)
    inside = [
        row
        for row, one in enumerate(positions)
        if wanted.begin <= one < wanted.end and begin <= one < begin + share
    ]
    assert set(inside) <= set(among)
    step = -(-share // SUB_SLICES)
    for row in among:  # and hardly others
        outside = not begin <= positions[row] < begin + share
        assert outside or wanted.begin - step <= positions[row] < wanted.end + step


@pytest.mark.parametrize("damage", ["a bit", "two ids change places"])
def test_an_id_that_would_be_missed_by_nobody_is_verified(tmp_path: Path, damage: str) -> None:
    """Whichever chunks are read whole anyway: where ids stand is believed of verified ones only."""
    content = data(list(range(20_000)))
    path = save(tmp_path, content)
    shard = shard_holding(path, "t.id/part_0_1")
    with shard.open("r+b") as file:
        text = bytearray(file.read())
        start = bytes(text).index(np.array([0, 1, 2, 3]).tobytes())
        at, other = start + 8 * 5, start + 8 * 15_000
        if damage == "a bit":
            text[at + 1] ^= 0x80
        else:
            one, two = text[at : at + 8], text[other : other + 8]
            text[at : at + 8], text[other : other + 8] = two, one
        file.seek(0)
        file.write(text)
    table = table_for(content, slice=Slice(0, 10_000, 65536))

    with pytest.raises(CheckpointError, match="not those that were written"):
        Loader(path, {"t": table}).load()

    assert not len(table)
