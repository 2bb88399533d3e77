from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import PlanError, Slice, gen_slice
from asyncloader._checkpoint.blocks import Block, Blocks, numbered
from asyncloader._checkpoint.dtypes import DTYPES, TensorType
from asyncloader._checkpoint.header import ShardHeader
from asyncloader._checkpoint.index import Catalog, Part, Place, Places
from asyncloader._checkpoint.manifest import Manifest
from asyncloader._planning.choice import choose
from asyncloader._planning.planner import plan_load
from asyncloader._planning.reads import GAP, Extent, Extents, plan_reads
from asyncloader._planning.targets import (
    TableTarget,
    Targets,
    TensorTargets,
    checked_load_info,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._planning.plan import LoadPlan
    from asyncloader._planning.targets import LoadInfo

F32 = TensorType(DTYPES["F32"], (2,))


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    """Ranges that lie apart in a few shards, one sink each."""
    made = []
    ends = {"a": 0, "b": 0}
    for sink in range(draw(st.integers(0, 30))):
        shard = draw(st.sampled_from(["a", "b"]))
        offset = ends[shard] + draw(st.sampled_from([0, 0, 1, 7, 100]))
        grain = draw(st.sampled_from([1, 2, 8]))
        length = grain * draw(st.integers(1, 40))
        ends[shard] = offset + length
        made.append(Extent(shard, offset, length, sink, grain))
    return draw(st.permutations(made))


@given(extents(), st.integers(1, 200), st.integers(0, 50))
def test_reads_bring_every_byte_to_its_place_once(
    wanted: list[Extent], chunk: int, gap: int
) -> None:
    reads = plan_reads(Extents.of(wanted), chunk_bytes=chunk, gap_bytes=gap)
    brought: dict[tuple[int, int], tuple[str, int]] = {}
    for read in reads:
        assert sum(piece.length for piece in read.pieces) == read.length
        offset = read.offset
        for piece in read.pieces:
            for step in range(piece.length if piece.sink != GAP else 0):
                assert (piece.sink, piece.position + step) not in brought
                brought[piece.sink, piece.position + step] = (read.shard, offset + step)
            offset += piece.length
    assert brought == {
        (extent.sink, step): (extent.shard, extent.offset + step)
        for extent in wanted
        for step in range(extent.length)
    }


@given(extents(), st.integers(1, 200), st.integers(0, 50))
def test_reads_keep_to_chunks_grains_and_gaps(wanted: list[Extent], chunk: int, gap: int) -> None:
    grains = {extent.sink: extent.grain for extent in wanted}
    for read in plan_reads(Extents.of(wanted), chunk_bytes=chunk, gap_bytes=gap):
        assert read.length <= max(chunk, *(grains.get(p.sink, 1) for p in read.pieces))
        assert read.pieces[0].sink != GAP
        assert read.pieces[-1].sink != GAP
        for piece in read.pieces:
            if piece.sink == GAP:
                assert 0 < piece.length <= gap
            else:
                assert piece.position % grains[piece.sink] == 0
                assert piece.length % grains[piece.sink] == 0


def test_a_read_has_no_more_pieces_than_the_kernel_takes() -> None:
    wanted = [Extent("a", 3 * n, 2, n, 1) for n in range(5000)]
    reads = plan_reads(Extents.of(wanted), chunk_bytes=1 << 20, gap_bytes=64)
    assert max(len(read.pieces) for read in reads) <= 1024
    assert len(reads) < 12


def test_a_block_for_two_destinations_is_read_for_each() -> None:
    wanted = [Extent("a", 0, 8, 0, 1), Extent("a", 0, 8, 1, 1)]
    reads = plan_reads(Extents.of(wanted), chunk_bytes=1 << 20, gap_bytes=64)
    assert sorted(piece.sink for read in reads for piece in read.pieces) == [0, 1]


def part(slice_: Slice, key: str, shard: str) -> Part:
    return Part(slice_, Place(key, shard))


class Disk:
    """A checkpoint of tables with the slots id and embedding, as names and headers."""

    def __init__(self, tensors: Mapping[str, Block] | None = None) -> None:
        self.blocks: dict[str, dict[str, Block]] = {}
        self.tables: dict[str, dict[str, tuple[Part, ...]]] = {}
        self.tensors: dict[str, Place] = {}
        for name, block in (tensors or {}).items():
            self.blocks.setdefault(block.shard, {})[block.key] = block
            self.tensors[name] = Place(block.key, block.shard)

    def add(self, table: str, slice_: Slice, rows: int, *slots: str) -> None:
        """Write one part of a table into a shard of its own."""
        shard = f"{table}-{slice_}"
        held = self.tables.setdefault(table, {})
        for slot in ("id", *slots):
            key = f"{table}.{slot}-{slice_}"
            dtype = DTYPES["I64" if slot == "id" else "F32"]
            shape = (rows,) if slot == "id" else (rows, 2)
            block = Block(shard, key, dtype, shape, 100, rows * 8)
            self.blocks.setdefault(shard, {})[key] = block
            parts = [*held.get(slot, ()), part(slice_, key, shard)]
            held[slot] = tuple(sorted(parts, key=lambda one: one.slice))

    def plan(
        self, targets: Targets, info: LoadInfo | None = None, *, strict: bool = False
    ) -> LoadPlan:
        """Plan, with the headers of the shards that are asked for."""
        catalog = Catalog(Places.of(self.tensors), self.tables)
        choice = choose(catalog, info, targets)
        headers = {
            shard: ShardHeader(blocks_of(shard, self.blocks[shard]), 0) for shard in choice.shards()
        }
        return plan_load(Manifest("here", catalog, headers), choice, strict=strict)


def blocks_of(shard: str, blocks: Mapping[str, Block]) -> Blocks:
    types, kinds = numbered(TensorType(block.dtype, block.shape) for block in blocks.values())
    offsets = np.array([block.offset for block in blocks.values()])
    nbytes = np.array([block.nbytes for block in blocks.values()])
    return Blocks(list(blocks), types, kinds, shard=shard, offsets=offsets, nbytes=nbytes)


def tensors_of(*names: str) -> TensorTargets:
    kinds = np.zeros(len(names), np.int64)
    return TensorTargets(names, [F32], kinds, memory=range(len(names)))


def table(*children: str, slice_: Slice | None = None, slots: tuple[str, ...] = ()) -> Targets:
    target = TableTarget(
        name="table",
        children=children,
        slice=slice_ or gen_slice(),
        slots=dict.fromkeys(["embedding", *slots], F32),
    )
    return Targets(tensors=TensorTargets(()), tables=dict.fromkeys(children, target))


def test_only_the_shards_that_a_slice_needs_are_asked_for() -> None:
    disk = Disk()
    for rank in range(4):
        disk.add("t", gen_slice(rank, 4), 10, "embedding")
    plan = disk.plan(table("t", slice_=gen_slice(1, 4)))
    assert plan.shards == (f"t-{gen_slice(1, 4)}",)
    assert [one.certain for one in plan.tables[0].parts] == [True]


def test_a_block_that_is_partly_wanted_is_no_certain_one() -> None:
    disk = Disk()
    disk.add("t", gen_slice(), 900, "embedding")
    [load] = disk.plan(table("t", slice_=gen_slice(0, 3))).tables
    assert [one.certain for one in load.parts] == [False]
    assert (load.most, load.expected) == (900, 300)


def test_sources_of_the_same_slots_share_a_layer_and_rank_in_order() -> None:
    disk = Disk()
    disk.add("a", gen_slice(), 10, "embedding")
    disk.add("b", gen_slice(), 5, "embedding")
    slots = ["id", "embedding"]
    [load] = disk.plan(table("t"), {"t": {"b": slots, "a": slots}}).tables
    assert load.layers == (frozenset({"embedding"}),)
    assert [(one.source, one.layer, one.rank) for one in load.parts] == [("b", 0, 0), ("a", 0, 5)]


def test_sources_of_other_slots_lie_above_one_another() -> None:
    disk = Disk()
    disk.add("a", gen_slice(), 10, "embedding", "m")
    disk.add("b", gen_slice(), 5, "embedding", "m")
    info = {"t": {"a": ["id", "embedding"], "b": ["id", "m"]}}
    [load] = disk.plan(table("t", slots=("m",)), info).tables
    assert load.layers == (frozenset({"embedding"}), frozenset({"m"}))
    assert [one.layer for one in load.parts] == [0, 1]


def test_children_never_hold_the_same_ids_so_two_layers_do() -> None:
    disk = Disk()
    info: LoadInfo = {}
    children = [f"c{number}" for number in range(6)]
    for number, child in enumerate(children):
        disk.add(child, gen_slice(), 3, "embedding", "m")
        info[child] = {child: ["id", ["embedding", "m"][number % 2]]}
    [load] = disk.plan(table(*children, slots=("m",)), info).tables
    assert len(load.layers) == 2


def test_positions_that_no_part_claims_are_missing() -> None:
    disk = Disk()
    for rank in (0, 2, 3):
        disk.add("t", gen_slice(rank, 4, 8), 10, "embedding")
    assert disk.plan(table("t", slice_=gen_slice(0, 1, 8))).missing == ("t@id[2, 4) of 8",)
    assert disk.plan(table("t", slice_=gen_slice(0, 4, 8))).missing == ()
    assert disk.plan(table("t", slice_=gen_slice(0, 2, 9))).missing == ("t@id[2, 4) of 8",)


def test_what_nobody_asks_for_is_unexpected() -> None:
    block = Block("s", "w^ ", DTYPES["F32"], (2,), 0, 8)
    disk = Disk({"w": block, "v": block})
    disk.add("t", gen_slice(), 1, "embedding", "m")
    disk.add("u", gen_slice(), 1, "embedding")
    targets = Targets(
        tensors=tensors_of("w"),
        tables=table("t").tables,
    )
    assert disk.plan(targets).unexpected == ("t@m", "u", "v")


def test_all_problems_come_in_one_error() -> None:
    block = Block("s", "w^ ", DTYPES["I8"], (2,), 0, 2)
    disk = Disk({"w": block})
    disk.add("t", gen_slice(), 1, "embedding")
    targets = Targets(
        tensors=tensors_of("w", "v"),
        tables=table("t").tables,
    )
    info: LoadInfo = {
        "t": {"t": ["embedding", "m"]},
        "w": {"w": []},
        "v": {"v": ["x"]},
        "y": {"w": []},
    }
    with pytest.raises(PlanError) as caught:
        disk.plan(targets, info, strict=True)
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    for what in ("must list 'id'", "no slot 'm'", "has no slots", "'y'", "int8 [2]"):
        assert what in text


@pytest.mark.parametrize(
    "info", [None, [], {1: {}}, {"t": []}, {"t": {"t": "id"}}, {"t": {"t": [1]}}, {"t": {1: []}}]
)
def test_a_filter_that_returns_something_else_is_told_the_form(info: object) -> None:
    with pytest.raises(TypeError, match=r"\{destination: \{source"):
        checked_load_info(info)
