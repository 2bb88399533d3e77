"""Values are converted on their way, if that was asked for, as `Tensor.to()` would convert them."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import Cast, HashTable, Loader, PlanError, Saver, Slice, gen_slice
from asyncloader._checkpoint.dtypes import BY_TORCH
from tests.checkpoints import run
from tests.live import Events, live, publish
from tests.oracle import TableData, edit_header, rows_of, write_checkpoint
from tests.support import data, raw, rows_in, unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from asyncloader._planning.targets import LoadInfo


FLOATS = tuple(
    getattr(torch, name)
    for name in BY_TORCH
    if name.startswith(("float", "bfloat"))
    and name != "float4_e2m1fn_x2"  # two values to an element, which torch itself cannot convert
    and hasattr(torch, name)
)
INTEGERS = (
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)
NEVER = (torch.bool, torch.complex64)
EVERY = (*FLOATS, *INTEGERS, *NEVER)
PAIRS = [*itertools.permutations(FLOATS, 2), *itertools.permutations(INTEGERS, 2)]
OTHERS = [pair for pair in itertools.permutations(EVERY, 2) if pair not in PAIRS]


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pair_name(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return " to ".join(map(word, pair))


def values(dtype: torch.dtype, count: int = 1000) -> Tensor:
    """Return any bits at all: NaN, infinity, subnormal numbers, the smallest and the largest."""
    width = dtype.itemsize
    random = torch.randint(0, 256, (count * width,), dtype=torch.uint8)
    if width == 1:
        random = torch.arange(256, dtype=torch.uint8)
    if not dtype.is_floating_point:
        return random.view(dtype)
    ends = torch.finfo(dtype)
    odd = [0.0, -0.0, ends.max, ends.min, ends.tiny, ends.smallest_normal / 2, 1 / 3]
    odd += [float("nan"), float("inf"), float("-inf")]
    return torch.cat([random.view(dtype), torch.tensor(odd, dtype=torch.float64).to(dtype)])


def agree(one: Tensor, other: Tensor) -> bool:
    """Compare bit for bit; of NaN torch itself makes other bits in long tensors than in short."""

    def plain(tensor: Tensor) -> object:
        tensor = tensor.contiguous()
        nan = tensor != tensor  # noqa: PLR0124
        if tensor.dtype.is_floating_point:
            wide = tensor.double()
            nan = wide.isnan()
            tensor = torch.where(nan, 0.0, wide).to(tensor.dtype)
        return raw(tensor), nan.tolist()

    return plain(one) == plain(other)


def is_exact(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value survives the way there and back; tried, not reasoned."""
    tried = values(source, 20_000)
    wide = tried.to(target)
    if source.is_floating_point:
        return agree(wide.to(source), tried)
    signed = target.is_signed or not source.is_signed
    return (
        signed and agree(wide.to(source), tried) and bool((wide.double() == tried.double()).all())
    )


def asking(pairs: Sequence[tuple[torch.dtype, torch.dtype]]) -> LoadInfo:
    """Name the source of each pair's destination."""
    return {pair_name(pair): {word(pair[0]): []} for pair in pairs}


# --- which


async def test_widening_is_what_loses_no_value(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {word(one): torch.zeros(3).to(one) for one in EVERY})
    exact = [pair for pair in PAIRS if is_exact(*pair)]
    tensors = {pair_name(pair): torch.zeros(3).to(pair[1]) for pair in PAIRS}
    load = partial(Loader, tmp_path, tensors=tensors)

    plan = await load(filter_func=lambda _: asking(exact), cast="widen").plan()
    assert plan.casts == tuple(
        Cast(name=pair_name(pair), source=word(pair[0]), target=word(pair[1])) for pair in exact
    )
    lossy = [pair for pair in PAIRS if pair not in exact]
    with pytest.raises(PlanError, match=r'cast="any".*may lose values') as caught:
        await load(filter_func=lambda _: asking(lossy), cast="widen").plan()
    assert len(caught.value.problems) == len(lossy)
    plan = await load(filter_func=lambda _: asking(PAIRS), cast="any").plan()
    assert len(plan.casts) == len(PAIRS)


async def test_no_number_becomes_one_of_another_kind(tmp_path: Path) -> None:
    stored = {pair_name(pair): torch.zeros(3).to(pair[0]) for pair in OTHERS}
    write_checkpoint(tmp_path, {}, stored)
    tensors = {pair_name(pair): torch.zeros(3).to(pair[1]) for pair in OTHERS}
    with pytest.raises(PlanError) as caught:
        await Loader(tmp_path, tensors=tensors, cast="any").plan()
    assert len(caught.value.problems) == len(OTHERS)
    assert all("only floats to floats" in problem for problem in caught.value.problems)


async def test_by_default_another_dtype_is_an_error_that_says_how_to_convert(
    tmp_path: Path,
) -> None:
    content = data(range(5))
    stored = {"wide": torch.ones(2).bfloat16(), "narrow": torch.ones(2), "shape": torch.ones(3)}
    write_checkpoint(tmp_path, {"t": content}, stored)
    table = HashTable([2], dtype=torch.float64, name="t")
    tensors = {
        "wide": torch.zeros(2),
        "narrow": torch.zeros(2, dtype=torch.float16),
        "shape": torch.zeros(2, dtype=torch.float16),
    }
    with unchanged(table, tensors=tensors), pytest.raises(PlanError) as caught:
        await Loader(tmp_path, {"t": table}, tensors).aload()
    [wide, narrow, shape, slot] = caught.value.problems
    assert 'cast="widen"' in wide
    assert 'cast="widen"' in slot
    assert 'cast="any"' in narrow
    assert "cast" not in shape  # of another shape: a conversion would not help


@pytest.mark.parametrize("cast", ["narrow", "", 1, True])
def test_what_is_no_way_to_convert_is_refused_at_construction(cast: object) -> None:
    with pytest.raises(ValueError, match="'widen', 'any' or None"):
        Loader("anywhere", cast=cast)  # type: ignore[arg-type]


async def test_ids_are_never_converted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data(range(5))}, {}, writers=1)
    [shard] = tmp_path.glob("*.safetensors")

    def unsigned(header: Any) -> None:  # noqa: ANN401  # JSON
        [ids] = [entry for key, entry in header.items() if "@id" in key or ".id" in key]
        ids["dtype"] = "U64"

    edit_header(shard, unsigned)
    with pytest.raises(PlanError, match=r"ids are int64"):
        await Loader(tmp_path, {"t": HashTable([2], name="t")}, cast="any").aload()


# --- dense tensors


LAYOUTS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "contiguous": lambda count, dtype: torch.zeros(count, dtype=dtype),
    "strided": lambda count, dtype: torch.zeros(count, 3, dtype=dtype)[:, 1],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("chunk_bytes", "verify"), [(1, "off"), (30, "auto"), (16 << 20, "off"), (30, "require")]
)
def test_every_pair_is_converted_as_torch_does_it(
    tmp_path: Path,
    layout: Callable[[int, torch.dtype], Tensor],
    chunk_bytes: int,
    verify: Literal["auto", "require", "off"],
) -> None:
    stored = {word(dtype): values(dtype, 100)[-25:] for dtype in (*FLOATS, *INTEGERS)}
    Saver(path=tmp_path, tensors=stored).save()
    tensors = {pair_name(pair): layout(25, pair[1]) for pair in PAIRS}

    report = Loader(
        tmp_path,
        tensors=tensors,
        filter_func=lambda _: asking(PAIRS),
        chunk_bytes=chunk_bytes,
        verify=verify,
        cast="any",
    ).load()

    for source, target in PAIRS:
        name = pair_name((source, target))
        assert agree(tensors[name], stored[word(source)].to(target)), name
    assert {str(cast) for cast in report.casts} == {f"{name}: {name}" for name in tensors}
    assert set(report.tensors.values()) == {"copied"}
    if verify == "require":
        assert report.bytes_verified == report.bytes_wanted
    assert f"{len(PAIRS)} cast" in str(report)


async def test_what_needs_no_conversion_is_loaded_as_ever_beside_what_does(tmp_path: Path) -> None:
    stored = {"same": torch.randn(7), "half": torch.randn(7).half(), "one": torch.tensor(3).int()}
    write_checkpoint(tmp_path, {}, stored)
    tensors = {
        "same": torch.zeros(7),
        "half": torch.zeros(7),
        "one": torch.zeros((), dtype=torch.int64),
    }
    loader = Loader(tmp_path, tensors=tensors, cast="widen")
    plan = await loader.plan()
    report = await loader.aload()
    assert [cast.name for cast in plan.casts] == ["half", "one"]
    assert report.casts == plan.casts
    assert report.tensors == {"same": "loaded", "half": "copied", "one": "copied"}
    assert all(agree(tensors[name], one.to(tensors[name].dtype)) for name, one in stored.items())
    assert "2 cast" in str(plan)


async def test_much_is_converted_a_part_at_a_time(tmp_path: Path) -> None:
    content = TableData(
        ids=torch.arange(3000), slots={"embedding": torch.randn(3000, 200).bfloat16()}
    )
    stored = torch.randn(300_000).bfloat16()
    write_checkpoint(tmp_path, {"t": content}, {"w": stored})
    tensors = {"w": torch.zeros(300_000, 2)[:, 1]}
    table = HashTable([200], slice=Slice(100, 2900, 65536), name="t")

    await Loader(tmp_path, {"t": table}, tensors, cast="widen").aload()

    assert agree(tensors["w"], stored.float())
    ids = table.ids()
    assert len(ids) == 2800
    assert agree(table.rows(), content.slots["embedding"][ids].float())


async def test_tensors_that_share_memory_are_converted_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"a": torch.ones(3).half(), "b": torch.ones(3).half()})
    shared = torch.zeros(3)
    report = await Loader(tmp_path, tensors={"a": shared, "b": shared}, cast="widen").aload()
    assert shared.tolist() == [1, 1, 1]
    assert [cast.name for cast in report.casts] == ["b"]


async def test_a_cast_keeps_to_the_view_and_tells_autograd(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(3).half(), "v": torch.ones(3).half()})
    whole = torch.full((9,), -1.0)
    parameter = torch.nn.Parameter(torch.zeros(3))
    before = parameter._version  # torch's own
    await Loader(tmp_path, tensors={"w": whole[3:6], "v": parameter}, cast="widen").aload()
    assert whole.tolist() == [-1, -1, -1, 1, 1, 1, -1, -1, -1]
    assert parameter.tolist() == [1, 1, 1]
    assert parameter._version > before


@pytest.mark.gpu
async def test_values_are_converted_on_their_way_to_a_gpu(tmp_path: Path) -> None:
    stored = torch.randn(200_000).bfloat16()
    content = TableData(ids=torch.arange(50), slots={"embedding": torch.randn(50, 3).half()})
    write_checkpoint(tmp_path, {"t": content}, {"w": stored})
    tensor = torch.zeros(200_000, device="cuda")
    table = HashTable([3], device="cuda", name="t")
    await Loader(tmp_path, {"t": table}, {"w": tensor}, cast="widen").aload()
    assert agree(tensor.cpu(), stored.float())
    assert rows_in(table) == rows_of(content.ids, {"embedding": content.slots["embedding"].float()})


# --- tables


def table_of(content: TableData, target: torch.dtype, wanted: Slice) -> HashTable:
    table = HashTable([3], dtype=target, slice=wanted, block_size=8, name="t")
    table.add_slot("exp_avg", [2], torch.float64)
    assert {"embedding", "exp_avg"} == content.slots.keys()
    return table


@given(
    pair=st.sampled_from(PAIRS),
    rows=st.integers(1, 200),
    ranks=st.integers(1, 3),
    share=st.sampled_from([(0, 65536), (0, 30), (17, 90), (100, 65536)]),
    chunk_bytes=st.sampled_from([1, 50, 3000, 16 << 20]),
    verify=st.sampled_from(["auto", "require", "off"]),
    inference=st.booleans(),
)
def test_rows_of_any_slice_are_converted_as_torch_does_it(  # noqa: PLR0917
    pair: tuple[torch.dtype, torch.dtype],
    rows: int,
    ranks: int,
    share: tuple[int, int],
    chunk_bytes: int,
    verify: Any,  # noqa: ANN401
    inference: bool,
) -> None:
    source, target = pair
    embedding = values(source, 600)
    embedding = embedding.repeat(-(-rows * 3 // len(embedding)))[: rows * 3].view(rows, 3)
    slots = {"embedding": embedding, "exp_avg": torch.randn(rows, 2)}
    content = TableData(ids=torch.arange(rows), slots=slots)
    wanted = Slice(*share, 65536)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), content, ranks)
        with torch.inference_mode(inference):
            table = table_of(content, target, wanted)
        report = Loader(
            folder, {"t": table}, cast="any", chunk_bytes=chunk_bytes, verify=verify
        ).load()
    ids = table.ids()
    assert sorted(ids.tolist()) == [id_ for id_ in range(rows) if wanted.accepts(id_)]
    assert agree(table.rows(), embedding[ids].to(target))
    assert agree(table.rows("exp_avg"), slots["exp_avg"][ids].double())
    if len(ids):
        assert report.casts == (
            Cast(name="t@embedding", source=word(source), target=word(target)),
            Cast(name="t@exp_avg", source="float32", target="float64"),
        )
    if verify == "require":
        assert report.bytes_verified == report.bytes_wanted


def save(path: Path, content: TableData, ranks: int) -> None:
    for rank in reversed(range(ranks)):
        part = gen_slice(rank, ranks)
        table = HashTable([3], dtype=content.slots["embedding"].dtype, slice=part, name="t")
        table.add_slot("exp_avg", [2])
        mine = [row for row, id_ in enumerate(content.ids.tolist()) if part.accepts(id_)]
        for slot, rows in content.slots.items():
            table.insert(content.ids[mine], rows[mine], slot)
        Saver(rank, ranks, 2, path, {"t": table}, save_id="s").save()


async def test_children_of_a_merged_table_may_each_be_of_another_dtype(tmp_path: Path) -> None:
    rows = torch.randn(4, 2)
    stored = {
        name: TableData(ids=torch.arange(4), slots={"embedding": rows.to(dtype)})
        for name, dtype in (("a", torch.float16), ("b", torch.bfloat16), ("c", torch.float32))
    }
    write_checkpoint(tmp_path, stored, {})
    table = HashTable([2], coalesced=True, children=["a", "b", "c"], name="merged")
    report = await Loader(tmp_path, {"merged": table}, cast="widen").aload()
    for name, content in stored.items():
        assert agree(table.lookup(content.ids, child=name), content.slots["embedding"].float())
    assert [str(cast) for cast in report.casts] == [
        "a@embedding: float16 to float32",
        "b@embedding: bfloat16 to float32",
    ]


async def test_a_damaged_byte_is_found_before_it_is_converted(tmp_path: Path) -> None:
    Saver(path=tmp_path, tensors={"w": torch.ones(1000).half()}).save()
    [shard] = tmp_path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    tensors = {"w": torch.zeros(1000)}
    with pytest.raises(Exception, match="not those that were written"), unchanged(tensors=tensors):
        await Loader(tmp_path, tensors=tensors, cast="widen").aload()


# --- who passes it on


def wide_build() -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    tables = {name: HashTable([4], dtype=torch.float64, name=name) for name in ("user", "item")}
    return tables, {"w": torch.zeros(64, dtype=torch.float64)}


async def test_live_converts_if_its_loader_options_say_so(tmp_path: Path) -> None:
    publish(tmp_path, 3)
    async with live(tmp_path, Events(), build=wide_build, loader_options={"cast": "widen"}) as it:
        with it.use() as model:
            assert set(model.tensors["w"].tolist()) == {3.0}
            assert set(model.tables["user"].rows().flatten().tolist()) == {3.0}
            assert {cast.name for cast in model.report.casts} == {
                "w",
                "user@embedding",
                "item@embedding",
            }


async def test_the_command_line_loads_all_floats_as_one_dtype(tmp_path: Path) -> None:
    content = data(range(6), exp_avg=1)
    stored = {"half": torch.ones(4).bfloat16(), "same": torch.ones(2), "count": torch.tensor([3])}
    write_checkpoint(tmp_path, {"t": content}, stored)

    code, out, _ = await asyncio.to_thread(run, "load", tmp_path, "--cast", "float32")
    assert code == 0
    assert "half: bfloat16 to float32" in out

    code, out, _ = await asyncio.to_thread(run, "load", tmp_path, "--cast", "bfloat16", "--json")
    casts = {one["name"]: one["target"] for one in json.loads(out)["report"]["casts"]}
    assert casts == dict.fromkeys(["t@embedding", "t@exp_avg", "same"], "bfloat16")
