from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import CheckpointError, Slice, TruncatedShardError, gen_slice
from asyncloader._checkpoint.header import header_length, parse_header
from asyncloader._checkpoint.index import Place, parse_catalog
from asyncloader._checkpoint.problems import Problems

SLICES = st.integers(1, 40).flatmap(
    lambda size: st.tuples(st.integers(0, size), st.integers(0, size)).map(
        lambda pair: Slice(min(pair), max(pair), size)
    )
)
IDS = [-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1, *range(-50, 50)]


@given(SLICES)
def test_a_slice_is_read_back_as_it_was_written(slice_: Slice) -> None:
    assert Slice.parse(str(slice_)) == slice_


def test_a_slice_is_written_padded_to_the_width_of_its_size() -> None:
    assert str(Slice(16384, 32768, 65536)) == "16384@32768@65536"
    assert str(gen_slice()) == "00000@65536@65536"


@pytest.mark.parametrize(
    "text",
    ["", "1@2", "1@2@3@4", "a@2@3", "-1@2@3", "2@1@3", "0@4@3", "0@0@0", "1 @2@3", "\u0661@2@3"],
)
def test_what_is_no_slice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="slice"):
        Slice.parse(text)


@pytest.mark.parametrize("bounds", [(0.0, 1, 2), (True, 1, 2), ("0", 1, 2)])
def test_bounds_of_a_slice_are_ints(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(TypeError, match="int"):
        Slice(*bounds)


@given(st.integers(1, 200), st.data())
def test_ranks_split_all_positions_the_first_ones_one_larger(
    size: int, data: st.DataObject
) -> None:
    ranks = data.draw(st.integers(1, size))
    slices = [gen_slice(rank, ranks, size) for rank in range(ranks)]
    lengths = [slice_.end - slice_.begin for slice_ in slices]
    assert [s.begin for s in slices] == [0, *(s.end for s in slices[:-1])]
    assert slices[-1].end == size
    assert lengths == [size // ranks + (rank < size % ranks) for rank in range(ranks)]


@pytest.mark.parametrize("arguments", [(-1, 1, 8), (1, 1, 8), (0, 0, 8), (0, 9, 8)])
def test_ranks_that_make_no_sense_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="gen_slice"):
        gen_slice(*arguments)


@given(SLICES)
def test_an_id_belongs_by_its_unsigned_remainder(slice_: Slice) -> None:
    for id_ in IDS:
        position = (id_ if id_ >= 0 else id_ + 2**64) % slice_.size
        assert slice_.accepts(id_) == (slice_.begin <= position < slice_.end)


@given(SLICES, SLICES)
def test_what_slices_say_of_each_other_holds_for_every_id(one: Slice, other: Slice) -> None:
    ours = [one.accepts(id_) for id_ in IDS if other.accepts(id_)]
    if one.covers(other):
        assert all(ours)
        assert one.share_of(other) == 1.0
    if one.disjoint(other):
        assert not any(ours)
    assert 0.0 <= one.share_of(other) <= 1.0


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(*[st.integers(0, n)] * 4, st.just(n))))
def test_the_share_of_a_slice_of_the_same_size_is_exact(bounds: tuple[int, ...]) -> None:
    a, b, c, d, size = bounds
    one, other = Slice(min(a, b), max(a, b), size), Slice(min(c, d), max(c, d), size)
    theirs = range(other.begin, other.end)
    common = [position for position in theirs if one.begin <= position < one.end]
    if theirs and not one.is_whole:
        assert one.share_of(other) == pytest.approx(len(common) / len(theirs))


def header(**blocks: object) -> bytes:
    return orjson.dumps(blocks)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = [
    pytest.param({}, 0, 0, id="no block"),
    pytest.param({"a": entry("F32", [], 0, 4)}, 4, 0, id="scalar"),
    pytest.param({"a": entry("bool", [3], 0, 3)}, 3, 0, id="RecIS's bool"),
    pytest.param({"a": entry("BOOL", [3], 0, 3)}, 3, 0, id="bool"),
    pytest.param({"a": entry("I64", [0, 7], 0, 0)}, 0, 0, id="empty"),
    pytest.param({"a": entry("BOOL", [3], 0, 3), "b": entry("F32", [1], 3, 7)}, 7, 0, id="odd"),
    pytest.param({"b": entry("F32", [1], 4, 8), "a": entry("F32", [1], 0, 4)}, 8, 0, id="order"),
    pytest.param({"a": entry("F32", [1], 0, 4), "__metadata__": {"x": "y"}}, 4, 0, id="metadata"),
    pytest.param({"a": entry("F32", [1], 0, 4), "b": entry("I8", [0], 4, 4)}, 4, 0, id="nothing"),
    pytest.param({"a": entry("F32", [1], 0, 4)}, 9, 5, id="more bytes after"),
]


@pytest.mark.parametrize(("blocks", "length", "surplus"), GOOD)
@pytest.mark.parametrize("padding", [b"", b"   "])
def test_a_header_says_where_blocks_stand(
    blocks: dict[str, dict[str, object]], length: int, surplus: int, padding: bytes
) -> None:
    text = header(**blocks) + padding
    parsed = parse_header(Problems("here"), "shard", text, 8 + len(text) + length, recis=True)
    blocks.pop("__metadata__", None)
    assert parsed.surplus == surplus
    assert list(parsed.blocks) == list(blocks)
    for key, block in parsed.blocks.items():
        begin, end = orjson.loads(orjson.dumps(blocks[key]["data_offsets"]))
        assert (block.offset, block.nbytes) == (8 + len(text) + begin, end - begin)
        assert list(block.shape) == blocks[key]["shape"]


BAD = [
    pytest.param(b"[]", "not a JSON object", id="list"),
    pytest.param(b"{", "not JSON", id="cut"),
    pytest.param(b"\xff\xfe{}", "not JSON", id="no text"),
    pytest.param(header(a=3), "lacks dtype", id="no object"),
    pytest.param(header(a={"dtype": "F32", "shape": []}), "lacks dtype", id="no offsets"),
    pytest.param(header(a=entry("f31", [], 0, 4)), "unknown dtype", id="dtype"),
    pytest.param(header(a=entry("F32", [-1], 0, 4)), "not a list of sizes", id="negative"),
    pytest.param(header(a=entry("F32", [True], 0, 4)), "not a list of sizes", id="bool size"),
    pytest.param(header(a=entry("F32", [1.0], 0, 4)), "not a list of sizes", id="float size"),  # type: ignore[list-item]
    pytest.param(header(a=entry("F32", [1], 4, 0)), "not .begin, end", id="backwards"),
    pytest.param(header(a=entry("F32", [2], 0, 4)), "hold 4 bytes", id="lies"),
    pytest.param(header(a=entry("F32", [2**62, 2**62], 0, 4)), "hold 4 bytes", id="overflow"),
    pytest.param(
        header(a=entry("F32", [1], 0, 4), b=entry("F32", [1], 2, 6)), "overlap", id="overlap"
    ),
    pytest.param(
        header(a=entry("F32", [1], 0, 4), b=entry("F32", [1], 0, 4)), "overlap", id="twice"
    ),
]


@pytest.mark.parametrize(("text", "problem"), BAD)
def test_a_header_that_contradicts_itself_is_refused(text: bytes, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as caught:
        parse_header(Problems("here"), "shard", text, 8 + len(text) + 1000, recis=True)
    assert caught.value.shard == "shard"


GAPS = [
    pytest.param({"a": entry("F32", [1], 8, 12)}, "a", id="before the first"),
    pytest.param({"a": entry("U8", [4], 0, 4), "b": entry("U8", [2], 6, 8)}, "b", id="between"),
    pytest.param({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, "b", id="within one"),
    pytest.param({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 6, 6)}, "b", id="behind"),
]


@pytest.mark.parametrize(("blocks", "key"), GAPS)
@pytest.mark.parametrize("recis", [False, True])
def test_bytes_of_no_block_are_refused(
    blocks: dict[str, dict[str, object]], key: str, *, recis: bool
) -> None:
    text = header(**blocks)
    with pytest.raises(CheckpointError, match="back to back") as caught:
        parse_header(Problems("here"), "shard", text, 8 + len(text) + 100, recis=recis)
    assert (caught.value.shard, caught.value.key) == ("shard", key)


def test_a_block_beyond_the_file_is_named_with_its_range() -> None:
    text = header(a=entry("F32", [1], 0, 4), b=entry("F32", [4], 4, 20))
    start = 8 + len(text)
    with pytest.raises(TruncatedShardError) as caught:
        parse_header(Problems("here"), "shard", text, start + 19, recis=True)
    error = caught.value
    assert (error.key, error.begin, error.end, error.size) == (
        "b",
        start + 4,
        start + 20,
        start + 19,
    )


@pytest.mark.parametrize(
    ("length", "size", "kind"),
    [
        (0, 100, CheckpointError),
        (1, 100, CheckpointError),
        (2**64 - 1, 100, CheckpointError),
        (2**40, 2**41, CheckpointError),
        (93, 100, TruncatedShardError),
    ],
)
def test_an_impossible_header_length_is_refused(
    length: int, size: int, kind: type[CheckpointError]
) -> None:
    with pytest.raises(kind):
        header_length("here", "shard", length.to_bytes(8, "little"), size)


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_its_prefix_is_truncated(size: int) -> None:
    with pytest.raises(TruncatedShardError):
        header_length("here", "shard", bytes(size), size)


def catalog_of(files: object, blocks: object, sparse: object) -> object:
    index = orjson.dumps({"file_index": files, "block_index": blocks})
    return parse_catalog(Problems("here"), index, orjson.dumps(sparse))


def test_names_are_split_at_their_last_caret_and_at_sign() -> None:
    keys = {"a.b@c.d/part_0_1": "a@b@c.d^0@4@4", "w^^ ": None, "x/part_0^ ": None, "^ ": None}
    sparse = {key: name for key, name in keys.items() if name}
    catalog = parse_catalog(
        Problems("here"),
        orjson.dumps({"file_index": {"f": 7}, "block_index": dict.fromkeys(keys, 7)}),
        orjson.dumps(sparse),
    )
    assert list(catalog.tables) == ["a@b"]
    [part] = catalog.tables["a@b"]["c.d"]
    assert (part.slice, part.place) == (Slice(0, 4, 4), Place("a.b@c.d/part_0_1", "f"))
    assert list(catalog.tensors) == ["w^", "x/part_0", ""]


@pytest.mark.parametrize(
    ("files", "blocks", "sparse", "problem"),
    [
        ([], {}, {}, "lacks file_index"),
        ({"f": 0}, None, {}, "lacks file_index"),
        ({"../f": 0}, {}, {}, "plain file name"),
        ({"/etc/passwd": 0}, {}, {}, "plain file name"),
        ({"a\0b": 0}, {}, {}, "plain file name"),
        ({"..": 0}, {}, {}, "plain file name"),
        ({"f": 0, "g": 0}, {}, {}, "not its own"),
        ({"f": "0"}, {}, {}, "not its own"),
        ({"f": 0}, {"w^ ": "0"}, {}, "not a number"),
        ({"f": 0}, {"w^ ": 1}, {}, "does not name"),
        ({"f": 0}, {"k": 0}, {"k": 3}, "not text"),
        ({"f": 0}, {"k": 0}, {"k": "t@id"}, "not of the form"),
        ({"f": 0}, {"k": 0}, {"k": "id^0@1@1"}, "not of the form"),
        ({"f": 0}, {"k": 0}, {"k": "t@id^1@0@1"}, "slice"),
        ({"f": 0}, {}, {"k": "t@id^0@1@1"}, "not in index"),
        ({"f": 0}, {}, [], "not a JSON object"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(
    files: object, blocks: object, sparse: object, problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        catalog_of(files, blocks, sparse)


def test_a_tensor_that_stands_twice_in_the_index_is_refused() -> None:
    with pytest.raises(CheckpointError, match="stands here twice"):
        catalog_of({"f": 0}, {"w": 0, "w^ ": 0}, {})
