"""JSON that means harm, one kind at a time, in each of the files that hold some."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import tracemalloc
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import CheckpointError, Loader, Slice, TruncatedShardError
from asyncloader._checkpoint.index import Catalog, Places
from asyncloader._checkpoint.manifest import read_manifest
from asyncloader._checkpoint.strict_json import BadJsonError, has_negative_zero, parse_object
from asyncloader._threads.pool import Threads
from tests.checkpoints import save
from tests.fuzz.drafts import INDEX, SHARDED, SIDECAR, TENSORKEY
from tests.fuzz.trees import Members, rendered
from tests.fuzz.watch import watched
from tests.oracle.strict import Refused, strict_json
from tests.support import MemoryStorage, data, poison, unchanged

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncloader._checkpoint.header import ShardHeader

MIB = 1 << 20
HEADER = "model-000000-of-000001.safetensors"
TABLES = {"t": data([1, 2])}
TENSORS = {"w": torch.arange(2.0)}


# --- the files, and where in them a value can be put


@cache
def files_of_recis() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, tables=TABLES, tensors=TENSORS, ranks=1, parallel=1)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def recis(folder: Path) -> Path:
    for name, content in files_of_recis().items():
        (folder / name).write_bytes(content)
    return folder


def hugging_face(folder: Path) -> Path:
    (folder / SHARDED).write_text('{"metadata": {}, "weight_map": {"w": "model.safetensors"}}')
    return folder


def text_of(path: Path, *, is_shard: bool) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")] if is_shard else content


def put_text(path: Path, text: bytes, *, is_shard: bool) -> None:
    if is_shard:
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        text = len(text).to_bytes(8, "little") + text + content[start:]
    path.write_bytes(text)


Place = tuple["Callable[[Path], Path]", str, "str | None", "tuple[str | int, ...]"]
PLACES: dict[str, Place] = {
    "index: a file's number": (recis, INDEX, None, ("file_index", HEADER)),
    "index: a block's number": (recis, INDEX, "w^ ", ("block_index", "w^ ")),
    "index: all blocks": (recis, INDEX, None, ("block_index",)),
    "tensorkey.json: a name": (recis, TENSORKEY, "t.id/part_0_1", ("t.id/part_0_1",)),
    "header: a dtype": (recis, HEADER, "w^ ", ("w^ ", "dtype")),
    "header: a size": (recis, HEADER, "w^ ", ("w^ ", "shape", 0)),
    "header: a shape": (recis, HEADER, "w^ ", ("w^ ", "shape")),
    "header: an offset": (recis, HEADER, "w^ ", ("w^ ", "data_offsets", 1)),
    "header: offsets": (recis, HEADER, "w^ ", ("w^ ", "data_offsets")),
    "header: an entry": (recis, HEADER, "w^ ", ("w^ ",)),
    "sidecar: its format": (recis, SIDECAR, None, ("format",)),
    "sidecar: the digest of a header": (recis, SIDECAR, None, ("shards", HEADER, "header")),
    "sidecar: a digest": (recis, SIDECAR, None, ("files", "index")),
    "sidecar: digests": (recis, SIDECAR, None, ("shards",)),
    "weight map: a file": (hugging_face, SHARDED, "w", ("weight_map", "w")),
    "weight map: all of it": (hugging_face, SHARDED, None, ("weight_map",)),
}
VALUES = {
    "negative": "-7",
    "minus one": "-1",
    "minus 2^63": "-9223372036854775808",
    "2^64": "18446744073709551616",
    "a float": "8.0",
    "a float of zero": "0.0",
    "an exponent": "8e0",
    "a large exponent": "1e300",
    "infinite": "1e400",
    "five thousand digits": "9" * 5000,
    "hexadecimal": "0x8",
    "with a leading zero": "08",
    "with a plus": "+8",
    "not a number": "NaN",
    "infinity": "Infinity",
    "true": "true",
    "false": "false",
    "null": "null",
    "a list of lists": "[[[]]]",
    "nested deeply": "[" * 1000 + "]" * 1000,
    "nested too deeply": "[" * 100_000 + "]" * 100_000,
    "nested objects": '{"a":' * 900 + "1" + "}" * 900,
    "a lone surrogate": '"\\ud800"',
    "a control character": '"a\nb"',
    "a text cut off": '"a',
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_value_that_makes_no_sense_is_an_error_that_names_file_and_key(
    tmp_path: Path, place: Place
) -> None:
    write, file, key, where = place
    for value in VALUES.values():
        if where == ("format",) and value.lstrip("-").isdecimal() and len(value) <= len(str(2**64)):
            continue  # a format that is not known is none that is wrong
        folder = write(tmp_path)
        put_at(folder / file, where, value, is_shard=file == HEADER)

        error = refused(folder)

        assert error.shard == file, value
        assert key is None or error.key == key or "is not JSON" in str(error), value
        assert len(str(error)) < 2000, value


def put_at(path: Path, where: tuple[str | int, ...], value: str, *, is_shard: bool) -> None:
    """Put a value as it stands in place of one in a document; the sidecar knows nothing of it."""
    document = json.loads(text_of(path, is_shard=is_shard))
    here = document
    for step in where[:-1]:
        here = here[step]
    here[where[-1]] = "PUT IT HERE"
    text = json.dumps(document, ensure_ascii=False).replace('"PUT IT HERE"', value)
    put_text(path, text.encode("utf-8"), is_shard=is_shard)
    if path.name != SIDECAR:
        (path.parent / SIDECAR).unlink(missing_ok=True)


def refused(folder: Path) -> CheckpointError:
    """Load, and return the error; nothing may have been written."""
    tensors = {"w": poison(torch.empty(2))}
    with unchanged(tensors=tensors), pytest.raises(CheckpointError) as caught:
        Loader(folder, tensors=tensors).load()
    return caught.value


# --- texts

FILES = {
    "index": (recis, INDEX),
    "tensorkey.json": (recis, TENSORKEY),
    "header": (recis, HEADER),
    "sidecar": (recis, SIDECAR),
    "weight map": (hugging_face, SHARDED),
}
TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.decode().encode("utf-16-le"),
    "no UTF-8": lambda text: b'{"\xff":1,' + text.lstrip()[1:],
    "overlong UTF-8": lambda text: b'{"\xc0\x80":1,' + text.lstrip()[1:],
    "half a character": lambda text: b'{"\xed\xa0\x80":1,' + text.lstrip()[1:],
    "half a character, escaped": lambda text: b'{"\\udc00":1,' + text.lstrip()[1:],
    "zeros behind": lambda text: text + b"\0\0",
    "a comma too many": lambda text: text.rstrip()[:-1] + b",}",
    "a comment": lambda text: b"/* a */" + text,
    "two documents": lambda text: text.rstrip() + b"{}",
    "a list": lambda text: b"[" + text + b"]",
    "a text": lambda text: b'"a"',
    "cut": lambda text: text.rstrip()[:-1],
    "spaces only": lambda text: b" " * len(text),
    "no-break spaces": lambda text: b"\xc2\xa0" + text,
    "brackets": lambda _: b"[" * 1000,
    "closing brackets": lambda text: text.rstrip() + b"}" * 1000,
}


@pytest.mark.parametrize("place", FILES.values(), ids=FILES)
def test_a_text_that_is_no_json_object_is_an_error_that_names_the_file(
    tmp_path: Path, place: tuple[Callable[[Path], Path], str]
) -> None:
    write, file = place
    is_shard = file == HEADER
    for kind, change in TEXTS.items():
        folder = write(tmp_path)
        text = change(text_of(folder / file, is_shard=is_shard))
        put_text(folder / file, text, is_shard=is_shard)

        assert refused(folder).shard == file, kind


DOUBLED = {
    "index": (recis, INDEX, b'"block_index"', b'"block_index":{},'),
    "index: a file": (recis, INDEX, b'"model-', b'"model-000000-of-000001.safetensors":7,'),
    "index: a block": (recis, INDEX, b'"w^ "', b'"w^ ":0,'),
    "index: a block, escaped": (recis, INDEX, b'"w^ "', b'"\\u0077^\\u0020" : 0,'),
    "tensorkey.json": (recis, TENSORKEY, b'"t.id/part_0_1"', b'"t.id/part_0_1":"t@id^0@1@1",'),
    "header: a tensor": (recis, HEADER, b'"w^ "', b'"w^ ":{},'),
    "header: a field": (recis, HEADER, b'"dtype"', b'"dtype":"U8",'),
    "header: an unknown field": (recis, HEADER, b'"dtype"', b'"a":{"b":1,"b":1},'),
    "header: metadata": (recis, HEADER, b'"w^ "', b'"__metadata__":{"a":"b","a":"b"},'),
    "sidecar": (recis, SIDECAR, b'"files"', b'"files":{},'),
    "sidecar: a digest": (recis, SIDECAR, b'"header"', b'"header":"",'),
    "sidecar: a part": (recis, SIDECAR, b'"slice"', b'"slice":"",'),
    "weight map": (hugging_face, SHARDED, b'"w"', b'"w":"model.safetensors",'),
    "weight map: other things": (hugging_face, SHARDED, b'"metadata"', b'"metadata":{},'),
}


@pytest.mark.parametrize("case", DOUBLED.values(), ids=DOUBLED)
def test_a_key_that_stands_twice_is_an_error_that_names_it(
    tmp_path: Path, case: tuple[Callable[[Path], Path], str, bytes, bytes]
) -> None:
    write, file, before, again = case
    folder, is_shard = write(tmp_path), file == HEADER
    text = text_of(folder / file, is_shard=is_shard)
    assert before in text
    put_text(folder / file, text.replace(before, again + before, 1), is_shard=is_shard)
    if file != SIDECAR:
        (folder / SIDECAR).unlink(missing_ok=True)

    error = refused(folder)

    assert error.shard == file
    assert "twice in one object" in str(error)
    assert error.key is not None
    assert repr(error.key) in str(error)


def test_an_empty_sidecar_is_no_reason_not_to_verify(tmp_path: Path) -> None:
    """It was taken for none, so whoever cut it off switched the comparison off."""
    folder = recis(tmp_path)
    (folder / SIDECAR).write_bytes(b"")
    assert refused(folder).shard == SIDECAR


# --- shapes and sizes


def header_of(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


IMMENSE = [[0, 2**62, 2**62], [2**62, 4, 0], [2**63 - 1, 0, 3], [2**32, 2**32, 0]]


@pytest.mark.parametrize("shape", IMMENSE, ids=str)
def test_a_shape_beyond_64_bits_is_an_error_even_if_it_takes_no_bytes(
    tmp_path: Path, shape: list[int]
) -> None:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
    (tmp_path / "model.safetensors").write_bytes(header_of(w=entry))
    error = refused(tmp_path)
    assert (error.shard, error.key) == ("model.safetensors", "w")
    assert "64 bits" in str(error)


def test_a_negative_zero_is_an_error_as_it_is_to_safetensors(tmp_path: Path) -> None:
    text = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}'
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "-0" in str(refused(tmp_path))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b"[-0]", True),
        (b"[1, -0 ,2]", True),
        (b'{"a":-0}', True),
        (b"[-0.0]", False),
        (b"[-0e1]", False),
        (b"[-1]", False),
        (b'["-0"]', False),
        (b'["a,-0", "[-0", ":-0", "\\"-0"]', False),
        (b"{}", False),
        (b"", False),
    ],
)
def test_a_negative_zero_is_found_outside_of_names(text: bytes, *, wanted: bool) -> None:
    assert has_negative_zero(text) is wanted


# --- the fast way and the exact one

KEYS = ["a", "b", "a:b", ":", '":', " :", "", "\u0061", "[", "{,"]
values = st.recursive(
    st.sampled_from(["0", "-1", "1.5", "true", "null", '"a"', '"a:b"', '"\\":"', '":"']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=3).map(
            lambda pairs: Members([json.dumps(key), node] for key, node in pairs)
        )
    ),
    max_leaves=8,
)


def members(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(members, value.values()))
    return sum(map(members, value)) if isinstance(value, list) else 0


@given(
    node=st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=4),
    space=st.sampled_from(["", " ", "\n"]),
    part=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_however_it_is_counted_a_key_that_stands_twice_is_found(
    node: list[tuple[str, Any]], space: str, part: float
) -> None:
    text = rendered(Members([json.dumps(key), one] for key, one in node), space).encode()
    try:
        wanted = strict_json(text)
    except Refused:
        wanted = None

    try:
        found = parse_object(text, lambda value: int(part * members(value)))
    except BadJsonError as error:
        assert wanted is None
        assert "twice" in str(error)  # noqa: PT017
    else:
        assert found == wanted


@pytest.mark.parametrize("depth", [0, 50, 1000])
def test_a_key_that_stands_twice_is_found_at_any_depth(depth: int) -> None:
    """Deeper than the parser that says which one goes, the error does without its name."""
    text = b'{"a":' * depth + b'{"b":1,"b":2}' + b"}" * depth
    with pytest.raises(BadJsonError, match="twice in one object") as caught:
        parse_object(text, len)
    assert caught.value.key in ({"b"} if depth < 100 else {"b", None})


# --- a hundred megabytes

SIZE = 99_000_000
BOMBS: dict[str, bytes] = {
    "empty lists": b"[],",
    "objects": b'{"":0},',
}


@pytest.mark.parametrize("piece", BOMBS.values(), ids=BOMBS)
def test_a_hundred_megabytes_of_brackets_are_refused_before_they_become_objects(
    piece: bytes,
) -> None:
    text = b'{"a":[' + piece * (SIZE // len(piece)) + b"0]}"
    tracemalloc.start()
    try:
        with pytest.raises(BadJsonError, match="mostly brackets"):
            parse_object(text, len)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(text) + 16 * MIB  # copies to count in
    finally:
        tracemalloc.stop()


def test_a_load_of_such_a_file_takes_its_text_and_little_more(tmp_path: Path) -> None:
    text = b'{"a":[' + b"[]," * (SIZE // 3) + b"0]}"
    folder = tmp_path / "inside"
    folder.mkdir()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with watched().within(folder, most=2 * len(text) + 64 * MIB):
        assert "mostly brackets" in str(refused(folder))


def test_names_may_be_full_of_brackets() -> None:
    """A name such as `layers[0]{1}` is no bomb, however many there are."""
    names = [f"[[[[{{{{{{{{{number}]]]]" for number in range(40_000)]
    entry = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    text = json.dumps(dict.fromkeys(names, entry), separators=(",", ":")).encode()
    assert len(text) > MIB
    assert len(parse_object(text, len)) == len(names)


def test_a_header_of_a_hundred_thousand_short_names_is_no_bomb() -> None:
    entry = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    text = json.dumps({f"{n:x}": entry for n in range(100_000)}, separators=(",", ":")).encode()
    assert len(parse_object(text, lambda value: 4 * len(value))) == 100_000


MASK, ONE, TWO, FIVE = (
    2**64 - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261
)  # fmt: skip
"""What Python makes the hash of a tuple with, from the hashes of its items."""


def of_one_hash(count: int, first: int) -> list[tuple[int, ...]]:
    """Return tuples of numbers that Python cannot tell apart by their hash.

    The hash of a number below 2^61 is the number, and what is made of these can be turned around:
    a last item brings the hash to where it is wanted. They begin with `first` zeros and ones.
    """
    back = 12345 * pow(ONE, -1, 1 << 64) & MASK
    back = (back >> 31 | back << 33) & MASK
    inverse = pow(TWO, -1, 1 << 64)
    found: list[tuple[int, ...]] = []
    for number in itertools.count(1):
        items, state = (*range(first), number), FIVE
        for item in items:
            state = (state + item * TWO) & MASK
            state = ((state << 31 | state >> 33) & MASK) * ONE & MASK
        last = (back - state) * inverse & MASK
        if last < 2**61 - 1:
            found.append((*items, last))
        if len(found) == count:
            break
    assert len(set(map(hash, found[:100]))) == 1
    return found


def test_shapes_of_one_hash_do_not_keep_a_load_busy() -> None:
    """Thirty thousand of these took half a minute; a million, which fit into a header, hours."""
    entries = {
        f"{number}": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
        for number, shape in enumerate(of_one_hash(30_000, first=0))
    }
    storage = MemoryStorage({"model.safetensors": header_of(**entries)})
    with pytest.raises(CheckpointError) as caught:
        asyncio.run(_headers(storage, ["model.safetensors"]))
    assert caught.value.key == "0"


def test_slices_of_one_hash_do_not_keep_a_load_busy() -> None:
    """As with shapes: nobody has so many, but a file may say so."""
    slices = [Slice(*numbers) for numbers in of_one_hash(30_000, first=1)]
    assert len(dict.fromkeys(slices)) == len(slices)
    assert len(set(map(hash, slices))) > len(slices) // 2


# --- large headers


async def _headers(storage: MemoryStorage, shards: list[str]) -> dict[str, ShardHeader]:
    catalog = Catalog(Places({}, {}), {}, shards[0])
    async with Threads(reads=1) as threads:
        manifest = await read_manifest(
            storage, catalog, shards, parallel=4, executor=threads.kernels
        )
    return dict(manifest.headers)


async def test_large_headers_are_read_one_at_a_time() -> None:
    """Of each, the objects take ten times the room of the text."""
    large = 9_000
    text = json.dumps(
        {
            f"{number:0100}": {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]}
            for number in range(large)
        }
    ).encode()
    assert len(text) > MIB
    names = [f"{number}.safetensors" for number in range(4)]
    content = len(text).to_bytes(8, "little") + text + bytes(large)
    storage = MemoryStorage(dict.fromkeys(names, content))

    headers = await _headers(storage, names)

    assert [len(headers[name].blocks) for name in names] == [large] * 4
    rest = [name for name, offset, _ in storage.reads if offset]
    changes = sum(one != other for one, other in itertools.pairwise(rest))
    assert changes == len(names) - 1


def test_a_header_that_is_cut_off_is_truncated_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((100).to_bytes(8, "little") + b'{"a":')
    assert isinstance(refused(tmp_path), TruncatedShardError)
