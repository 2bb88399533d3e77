"""Any checkpoint, loaded in any way, is what the model in plain dicts says it is, bit for bit."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.lowlevel
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from asyncloader import DiskTable, HashTable, Loader, LoadPlan, LoadReport, UpdateCounts, gen_slice
from asyncloader import Slice as TableSlice
from asyncloader._loading.destinations import describe_tensors
from asyncloader._loading.load import Load
from asyncloader._loading.progress import Meter
from asyncloader._loading.session import Session
from asyncloader._loading.transaction import complete
from asyncloader._storage.kept import KeptFile
from asyncloader._storage.unpacking import UnpackingStorage
from asyncloader._threads.disk import Disk
from asyncloader._threads.jobs import ByteBudget
from asyncloader._threads.pool import Threads
from asyncloader.options import ReadOptions
from tests.oracle import (
    DTYPES,
    Block,
    ModelTable,
    Part,
    Slice,
    TableData,
    dense_block,
    encode_id,
    flat_bytes,
    rows_of,
    sparse_block,
    split_slices,
    write_checkpoint,
    write_ranks,
)
from tests.support import debug_off

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from asyncloader._storage.protocol import ReadInto

T = TypeVar("T")
Shape = tuple[int, ...]
Spec = tuple[Shape, torch.dtype, float]

ODD_NAMES = [
    "",
    " ",
    ".",
    "a",
    "a.b",
    "a.b/c d",
    'quo"te\\\t\n',
    "späß 火 \U0001f600",
    "m@n@o",
    "m.n@o",
    "c^ar^et",
    "x/part_0",
    "x/part_0_1",
    "layer1",
    "layer10",
    "id",
    "embedding",
    "a@embedding",
    "00000@65536@65536",
    "\x7f",
    *(f"layer.{number}.weight" for number in range(8)),
]
SLOT_NAMES = ["exp_avg", "exp_avg_sq", "step filter", "ä.b/c^d", ""]
EXTREMES = [-(2**63), 2**63 - 1, -1, 0, 1, 2**52 - 1, 2**52, 2**52 + 1, -(2**52), 65535, 65536]

# RecIS cannot tell `x/part_0^ ` from what it makes of `x/part_0`.
names = st.text(max_size=6).filter(lambda name: not name.endswith("^ "))
dtypes = st.sampled_from([torch.float32, torch.int64, *DTYPES.values()])
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
seeds = st.integers(0, 2**32)
NOTHING = UpdateCounts(rows=0, new=0, replaced=0, duplicates=0, dropped=0)


def filled(rng: random.Random, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Random bytes as a tensor: NaNs, infinities and denormal numbers among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = bytearray(rng.randbytes(count))
    if not raw:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def some_ids(rng: random.Random, count: int, *, crowded: bool = False) -> list[int]:
    if crowded:
        return [rng.randrange(-4, 20) for _ in range(count)]
    kinds = (
        lambda: rng.choice(EXTREMES),
        lambda: rng.randrange(-8, 40),
        lambda: rng.randrange(-(2**63), 2**63),
        lambda: rng.randrange(40) * 65536,
    )
    return [rng.choice(kinds)() for _ in range(count)]


def raw(tensor: Tensor) -> tuple[torch.dtype, Shape, bytes]:
    """Return what must agree, NaN bit for bit."""
    return tensor.dtype, tuple(tensor.shape), flat_bytes(tensor).numpy().tobytes()


@dataclass(kw_only=True)
class Family:
    """A table in memory, and the tables on disk that may feed it."""

    name: str
    children: list[str]
    coalesced: bool
    slice: Slice
    spec: dict[str, Spec]
    sources: dict[str, list[Part]] = field(repr=False)
    held: list[tuple[str, list[int], dict[str, Tensor]]] = field(repr=False)
    info: dict[str, dict[str, list[str]]]
    on_disk: bool = False
    cache_bytes: int = 0

    def table(self) -> HashTable | DiskTable:
        shape, dtype, initial = self.spec["embedding"]
        if self.on_disk:
            return self.disk_table()
        table = HashTable(
            shape,
            block_size=7,
            dtype=dtype,
            coalesced=self.coalesced,
            children=self.children if self.coalesced else None,
            slice=TableSlice(*self.slice),
            initializer=initial,
            name=self.name if self.coalesced else self.children[0],
        )
        for slot, (shape, dtype, initial) in list(self.spec.items())[1:]:
            table.add_slot(slot, shape, dtype, initial)
        for child, ids, slots in self.held:
            for slot, rows in slots.items():
                table.insert(torch.tensor(ids, dtype=torch.int64), rows, slot, child)
        return table

    def disk_table(self) -> DiskTable:
        shape, dtype, _ = self.spec["embedding"]
        table = DiskTable(
            shape,
            dtype=dtype,
            coalesced=self.coalesced,
            children=self.children if self.coalesced else None,
            slice=TableSlice(*self.slice),
            name=self.name if self.coalesced else self.children[0],
            cache_bytes=self.cache_bytes,
        )
        for slot, (shape, dtype, _) in list(self.spec.items())[1:]:
            table.add_slot(slot, shape, dtype)
        return table

    def read(self, source: str) -> list[Part]:
        """Return the parts that may hold ids of the table's slice, in the order in which they win.

        Slices of one size that do not meet have no id in common.
        """
        begin, end, size = self.slice
        return [
            part
            for part in sorted(self.sources.get(source, []), key=lambda part: part.claim)
            if part.claim.begin < part.claim.end and begin < end
            if part.claim.size != size or (part.claim.begin < end and begin < part.claim.end)
        ]

    def expected(self) -> tuple[ModelTable, UpdateCounts]:
        slots = {
            slot: (shape, dtype, torch.tensor(initial).to(dtype))
            for slot, (shape, dtype, initial) in self.spec.items()
        }
        model = ModelTable(
            slots=slots, slice=self.slice, children=self.children, coalesced=self.coalesced
        )
        for child, ids, held in self.held:
            model.put(torch.tensor([self.key(child, i) for i in ids], dtype=torch.int64), held)
        before = set(model.rows)
        touched: set[int] = set()
        rows = dropped = 0
        for child, sources in self.info.items():
            for source, listed in sources.items():
                parts = self.read(source)
                outcome = model.apply(child, parts, listed)
                rows += outcome.loaded
                dropped += outcome.dropped
                touched |= {
                    self.key(child, id_)
                    for part in parts
                    for id_ in part.ids.tolist()
                    if part.claim.accepts(id_) and self.slice.accepts(id_)
                }
        new, replaced = len(touched - before), len(touched & before)
        counts = UpdateCounts(
            rows=rows,
            new=new,
            replaced=replaced,
            duplicates=rows - new - replaced,
            dropped=dropped,
        )
        return model, counts

    def key(self, child: str, id_: int) -> int:
        return encode_id(id_, self.children.index(child)) if self.coalesced else id_

    def missing(self) -> set[str]:
        """Say what load_info lists and no source has."""
        lacking = set()
        for sources in self.info.values():
            for source, listed in sources.items():
                if source not in self.sources:
                    lacking.add(source)
                    continue
                have = self.sources[source][0].slots
                lacking |= {f"{source}@{s}" for s in listed if s != "id" and s not in have}
        return lacking


@dataclass(kw_only=True)
class Dense:
    """Tensors on disk and in memory."""

    stored: dict[str, Tensor]
    wanted: dict[str, Tensor]
    info: dict[str, dict[str, list[str]]]


@dataclass(kw_only=True)
class Case:
    """A checkpoint, what to load it into, and how."""

    ranks: int
    writers: int
    spelling: str
    pad_header: bool
    shuffled_blocks: bool
    families: list[Family]
    dense: Dense = field(repr=False)
    rng: random.Random = field(repr=False)
    how: dict[str, Any] = field(default_factory=dict)

    def blocks(self) -> list[list[Block]]:
        ranks: list[list[Block]] = [[] for _ in range(self.ranks)]
        for family in self.families:
            for source, parts in family.sources.items():
                for rank, part in enumerate(parts):
                    ranks[rank] += [
                        sparse_block(
                            source,
                            slot,
                            rows,
                            rank=rank,
                            ranks=self.ranks,
                            claim=part.claim,
                            bool_spelling=self.spelling,
                        )
                        for slot, rows in {"id": part.ids, **part.slots}.items()
                    ]
        ranks[0] += [
            dense_block(*item, bool_spelling=self.spelling) for item in self.dense.stored.items()
        ]
        if self.shuffled_blocks:
            for blocks in ranks:
                self.rng.shuffle(blocks)
        return ranks

    def missing(self) -> set[str]:
        """Say what load_info asks for and is not on disk, ranges of ids apart."""
        sources = {source for sources in self.dense.info.values() for source in sources}
        lacking = [family.missing() for family in self.families]
        return set().union(*lacking, sources - set(self.dense.stored))


@st.composite
def families(draw: st.DrawFn, fresh: Iterator[str], rng: random.Random, ranks: int) -> Family:
    coalesced = draw(st.booleans())
    children = [next(fresh) for _ in range(draw(st.integers(1, 3)) if coalesced else 1)]
    spec: dict[str, Spec] = {}
    on_disk = draw(st.booleans())
    for slot in ["embedding", *draw(st.lists(st.sampled_from(SLOT_NAMES), unique=True))]:
        initial = 0.0 if on_disk else draw(st.sampled_from([0.0, -0.0, 1.0]))
        spec[slot] = (draw(shapes), draw(dtypes), initial)
    crowded = draw(st.booleans())  # many sources of the same few ids
    size = draw(st.one_of(st.integers(ranks, 64), st.just(65536)))
    readers = draw(st.sampled_from([1, 1, 2, 3, 4]))
    read_size = draw(st.sampled_from([size, size, 1000, 65536]))
    readers = min(readers, read_size)
    mine = split_slices(read_size, readers)[draw(st.integers(0, readers - 1))]
    sources = {
        name: draw(written_parts(spec, rng, ranks, size, crowded=crowded))
        for name in [*children, *(next(fresh) for _ in range(draw(st.integers(0, 3))))]
        if draw(st.integers(0, 9))
    }
    held = []
    for child in children:
        ids = some_ids(rng, 40, crowded=crowded)
        ids = [id_ % 2**52 if coalesced else id_ for id_ in ids]
        ids = [id_ for id_ in dict.fromkeys(ids) if mine.accepts(id_)]
        if not on_disk and draw(st.booleans()):
            slots = {
                slot: filled(rng, (len(ids), *shape), dtype)
                for slot, (shape, dtype, _) in spec.items()
            }
            held.append((child, ids, slots))
    return Family(
        name=next(fresh),
        children=children,
        coalesced=coalesced,
        slice=mine,
        spec=spec,
        sources=sources,
        held=held,
        info=draw(infos(children, sources, spec)),
        on_disk=on_disk,
        cache_bytes=draw(st.sampled_from([0, 1, 1000, 1 << 20])),
    )


@st.composite
def written_parts(
    draw: st.DrawFn,
    spec: dict[str, Spec],
    rng: random.Random,
    ranks: int,
    size: int,
    *,
    crowded: bool,
) -> list[Part]:
    ids = some_ids(rng, draw(st.sampled_from([0, 1, 5, 60, 200])), crowded=crowded)
    size = draw(st.sampled_from([size, size, 65536]))
    if draw(st.booleans()):
        ids = list(dict.fromkeys(ids))
    claims = split_slices(size, ranks)
    if draw(st.integers(0, 4)):
        of_rank = [[id_ for id_ in ids if claim.accepts(id_)] for claim in claims]
    else:  # a writer that does not keep to what its blocks say
        of_rank = [ids[rank::ranks] for rank in range(ranks)]
        sizes = st.sampled_from([size, 1, 3, 65536])
        claims = draw(st.lists(any_slice(sizes), min_size=ranks, max_size=ranks, unique_by=tuple))
    slots = [slot for slot in spec if draw(st.integers(0, 9))]
    if draw(st.booleans()):
        of_rank = [sorted(ids, key=lambda id_: (id_ % 2**64 % size, id_)) for ids in of_rank]
    return [
        Part(
            claim=claim,
            ids=torch.tensor(ids, dtype=torch.int64),
            slots={slot: filled(rng, (len(ids), *spec[slot][0]), spec[slot][1]) for slot in slots},
        )
        for claim, ids in zip(claims, of_rank, strict=True)
    ]


@st.composite
def any_slice(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> Slice:
    size = draw(sizes)
    begin = draw(st.integers(0, size))
    return Slice(begin, draw(st.integers(begin, size)), size)


@st.composite
def infos(
    draw: st.DrawFn, children: list[str], sources: dict[str, list[Part]], spec: dict[str, Spec]
) -> dict[str, dict[str, list[str]]]:
    default = {child: {child: ["id", *spec]} for child in children}
    if draw(st.booleans()):
        return default
    subsets = st.lists(st.sampled_from(list(spec)), unique=True).map(lambda slots: ["id", *slots])
    listed = st.sampled_from([["id", *spec], draw(subsets), draw(subsets)])
    feeds = st.dictionaries(st.sampled_from([*children, *sources]), listed, max_size=4)
    changed = {child: draw(feeds) for child in children}
    return draw(st.permutations(list(changed.items())).map(dict))


@st.composite
def dense_tensors(draw: st.DrawFn, fresh: Iterator[str], rng: random.Random) -> Dense:
    stored, wanted, info = {}, {}, {}
    with_empty = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    for _ in range(draw(st.integers(0, 5))):
        shape, dtype = draw(with_empty), draw(dtypes)
        source = destination = next(fresh)
        if draw(st.booleans()):
            destination = next(fresh)  # renamed
        kind = draw(st.sampled_from(["loaded"] * 6 + ["missing", "unexpected", "left out"]))
        if kind != "missing":
            stored[source] = filled(rng, shape, dtype)
        if kind != "unexpected":
            wanted[destination] = draw(laid_out(filled(rng, shape, dtype)))
        if kind in {"loaded", "missing"}:
            info[destination] = {source: list[str]()}
    return Dense(stored=stored, wanted=wanted, info=info)


@st.composite
def laid_out(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Return the same values, laid out in memory in one way or another."""
    layout = draw(st.sampled_from(["plain", "transposed", "gaps", "shifted"]))
    memory = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype)
    if layout == "transposed":
        dims = range(tensor.dim())
        order = draw(st.permutations(list(dims)))
        memory = torch.zeros([tensor.shape[dim] for dim in order], dtype=tensor.dtype)
        memory = memory.permute([order.index(dim) for dim in dims])
    elif layout == "gaps":
        memory = memory[tuple(slice(1, None, 2) for _ in tensor.shape)]
    elif layout == "shifted":
        memory = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)[3:].view(tensor.shape)
    else:
        memory = torch.zeros(tensor.shape, dtype=tensor.dtype)
    memory.copy_(tensor)
    return memory


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = random.Random(draw(seeds))
    unused = list(dict.fromkeys([*ODD_NAMES, *draw(st.lists(names, max_size=3))]))
    rng.shuffle(unused)
    fresh = iter(unused)
    ranks = draw(st.integers(1, 4))
    case = Case(
        ranks=ranks,
        writers=draw(st.integers(1, 5)),
        spelling=draw(st.sampled_from(["BOOL", "bool"])),
        pad_header=draw(st.booleans()),
        shuffled_blocks=draw(st.booleans()),
        families=[draw(families(fresh, rng, ranks)) for _ in range(draw(st.integers(0, 2)))],
        dense=draw(dense_tensors(fresh, rng)),
        rng=rng,
    )
    case.how = {
        "parallel": draw(st.integers(1, 8)),
        "chunk_bytes": draw(st.one_of(st.integers(16, 4096), st.integers(1, 16), st.just(8 << 20))),
        "max_inflight_bytes": draw(st.sampled_from([1, 100, 4096, 128 << 20])),
    }
    blocks = [block for rank in case.blocks() for block in rank]
    # Some names give the same key: `a@b` with the slot `c`, `a` with `b@c`.
    assume(len({block.key for block in blocks}) == len(blocks))
    assume(len({block.index_key or block.key for block in blocks}) == len(blocks))
    return case


class Destinations:
    """What a case is loaded into, once."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case = case
        write_ranks(Path(folder), case.blocks(), writers=case.writers, pad_header=case.pad_header)
        self.tables = {family.name: family.table() for family in case.families}
        self.tensors = case.dense.wanted
        self.before = {name: raw(tensor) for name, tensor in self.tensors.items()}
        info = case.dense.info
        for family in case.families:
            info = info | family.info
        self.loader = Loader(
            folder, self.tables, self.tensors, filter_func=lambda _: info, **case.how
        )

    def check(self, counts: Mapping[str, UpdateCounts]) -> None:
        for family in self.case.families:
            table = self.tables[family.name]
            model, expected = family.expected()
            assert counts.get(family.name, NOTHING) == expected
            ids, slots = table.ids(), table.slots()
            assert len(table) == len(ids) == len(model.rows)
            if isinstance(table, HashTable):
                assert rows_of(ids, {slot: table.rows(slot) for slot in slots}) == model.rows
            assert bool(table.contains(ids).all())
            assert rows_of(ids, {slot: table.lookup(ids, slot) for slot in slots}) == model.rows
        dense = self.case.dense
        for name, tensor in self.tensors.items():
            [source] = dense.info.get(name, {None: []})
            stored = dense.stored.get(source) if source is not None else None
            assert raw(tensor) == (self.before[name] if stored is None else raw(stored))

    def check_report(self, report: LoadReport) -> None:
        self.check(report.tables)
        assert {name for name in report.missing if "@id[" not in name} == self.case.missing()


class Unruly:
    """A storage in memory whose reads end in any order, many of them short."""

    location = "memory"
    lost = 0

    def __init__(self, folder: str, rng: random.Random) -> None:
        self._folder = Path(folder)
        self._files = {file.name: file.read_bytes() for file in self._folder.iterdir()}
        self._rng = rng

    async def size(self, name: str, /) -> int:
        return len(self._files[name])

    async def changed(self, names: Sequence[str], /) -> list[str]:
        return []

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        await self._later()
        return self._read(name, offset, views)

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        await self._later()
        return job(partial(self._read, name))

    async def hold_open(self, name: str, _: Sequence[tuple[int, int]]) -> KeptFile:
        return await asyncio.to_thread(kept, self._folder / name)

    async def _later(self) -> None:
        for _ in range(self._rng.choice([0, 0, 1, 3, 9])):
            await anyio.lowlevel.checkpoint()

    def _read(self, name: str, offset: int, views: Sequence[memoryview]) -> int:
        most = self._rng.choice([9, 1 << 30, 1 << 30, 1 << 30])
        done = 0
        for view in views:
            data = self._files[name][offset + done :][: min(view.nbytes, most - done)]
            view[: len(data)] = data
            done += len(data)
            if len(data) < view.nbytes:
                break
        return done


def kept(path: Path) -> KeptFile:
    return KeptFile("memory", path.name, os.open(path, os.O_RDONLY), path.stat())


async def load_from(
    storage: Unruly, plan: LoadPlan, destinations: Destinations
) -> dict[str, UpdateCounts]:
    how = destinations.case.how
    async with Threads(reads=1) as threads:
        session = Session(
            location="memory",
            file=None,
            storage=UnpackingStorage(storage),
            threads=threads,
            disk=Disk(threads.reads),
            options=ReadOptions(parallel=how["parallel"], chunk_bytes=how["chunk_bytes"]),
            budget=ByteBudget(how["max_inflight_bytes"]),
            keep_open=storage.hold_open,
        )
        into = describe_tensors(destinations.tensors)
        load = Load(session, plan, into, destinations.tables, meter=Meter(0, None))
        return await complete(load)


HashTable([1])  # the first ones import numba, for which an event loop has no time
DiskTable([1])


@given(case=cases())
async def test_a_load_does_what_the_model_says(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder, debug_off():
        destinations = Destinations(case, folder)
        report = await destinations.loader.aload()
        await asyncio.to_thread(destinations.check_report, report)


@given(case=cases())
def test_a_load_from_synchronous_code_does_what_the_model_says(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        destinations = Destinations(case, folder)
        destinations.check_report(destinations.loader.load())


@given(case=cases())
async def test_what_a_load_does_is_the_same_in_whatever_order_reads_end(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder, debug_off():
        destinations = Destinations(case, folder)
        plan = await destinations.loader.plan()
        storage = Unruly(folder, case.rng)
        counts = await load_from(storage, plan, destinations)
        await asyncio.to_thread(destinations.check, counts)


EVERYTHING = ["id", "embedding", "s"]
LISTED = {
    "everything each time": [EVERYTHING] * 3,
    "less from the second": [EVERYTHING, ["id", "embedding"], EVERYTHING],
    "ids only from the second": [EVERYTHING, ["id"], EVERYTHING],
    "nothing in common": [["id", "embedding"], ["id", "s"], ["id", "embedding"]],
    "ever less": [EVERYTHING, ["id", "s"], ["id"]],
}


@pytest.mark.parametrize("listed", LISTED.values(), ids=LISTED)
@pytest.mark.parametrize("seed", range(3))
async def test_of_several_sources_of_the_same_ids_the_later_one_wins(
    tmp_path: Path, listed: list[list[str]], seed: int
) -> None:
    """Each source holds each id several times, and some of their blocks are wanted in part only."""
    rng = random.Random(seed)
    mine = Slice(0, 10, 65536)
    halves = [mine, Slice(10, 65536, 65536)]
    spec: dict[str, Spec] = {"embedding": ((2,), torch.float32, 0.0), "s": ((), torch.int8, 1.0)}
    claims = [split_slices(7, 2), halves, split_slices(65536, 2)]
    rng.shuffle(claims)
    sources = {
        name: [
            Part(
                claim=claim,
                ids=torch.tensor(some_ids(rng, 60, crowded=True)),
                slots={slot: filled(rng, (60, *spec[slot][0]), spec[slot][1]) for slot in spec},
            )
            for claim in claims
        ]
        for name, claims in zip("abc", claims, strict=True)
    }
    family = Family(
        name="t",
        children=["t"],
        coalesced=False,
        slice=mine,
        spec=spec,
        sources=sources,
        held=[],
        info={"t": dict(zip("abc", listed, strict=True))},
    )
    case = Case(
        ranks=2,
        writers=2,
        spelling="BOOL",
        pad_header=True,
        shuffled_blocks=False,
        families=[family],
        dense=Dense(stored={}, wanted={}, info={}),
        rng=rng,
        how={"parallel": 5, "chunk_bytes": 100, "max_inflight_bytes": 1 << 20},
    )
    destinations = Destinations(case, str(tmp_path))
    plan = await destinations.loader.plan()
    destinations.check(await load_from(Unruly(str(tmp_path), rng), plan, destinations))


@given(
    seed=seeds,
    written_by=st.integers(1, 4),
    size=st.one_of(st.integers(4, 64), st.just(65536)),
    read=st.tuples(
        st.integers(1, 4),
        st.sampled_from([None, 4, 1000, 65536]),
        st.sampled_from([24, 1000, 8 << 20]),
    ),
)
def test_readers_share_all_rows_out_among_them(
    seed: int, written_by: int, size: int, read: tuple[int, int | None, int]
) -> None:
    rng = random.Random(seed)
    read_by, read_size, chunk_bytes = read
    ids = torch.tensor(list(dict.fromkeys(some_ids(rng, rng.randrange(150)))), dtype=torch.int64)
    data = TableData(ids=ids, slots={"embedding": filled(rng, (len(ids), 3), torch.float16)})
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            Path(folder), {"t": data}, {}, ranks=written_by, slice_size=size, shuffle_seed=seed
        )
        for rank in range(read_by):
            mine = gen_slice(rank, read_by, read_size or size)
            table = HashTable([3], dtype=torch.float16, name="t", slice=mine)
            report = Loader(folder, {"t": table}, strict=True, chunk_bytes=chunk_bytes).load()
            counts = report.tables["t"]
            assert (counts.new, counts.rows, counts.dropped) == (len(table), len(table), 0)
            assert all(mine.accepts(id_) for id_ in table.ids().tolist())
            shares.append(rows_of(table.ids(), {"embedding": table.rows()}))
    assert sum(map(len, shares)) == len(ids)
    assert {key: row for share in shares for key, row in share.items()} == rows_of(ids, data.slots)
