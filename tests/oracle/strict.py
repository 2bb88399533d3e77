"""A strict reader, to judge by: what a folder holds, or `Refused`. Slow, and obviously right.

Written from `docs/format.md` in plain Python. Shares no code with the package, nor with the slow
reader beside it, which trusts what it reads.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = [
    "Refused",
    "StrictBlock",
    "StrictFolder",
    "StrictPart",
    "strict_header",
    "strict_index",
    "strict_json",
    "strict_sidecar",
    "strict_weight_map",
]

BITS = {
    "BOOL": 8, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
CHUNK = 8 << 20
HEADER = 100_000_000
NESTED = 1024
_UNKNOWN = re.compile(r"[A-Z][A-Z0-9_]{0,31}", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")
_OUTSIDE = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SLICE = re.compile(r"([0-9]{1,19})@([0-9]{1,19})@([0-9]{1,19})", re.ASCII)


class Refused(Exception):  # noqa: N818  # it is a verdict
    """Not to be loaded."""


class NegativeZero(float):
    """The number `-0`."""


class StrictBlock(NamedTuple):
    """One entry of a header, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class StrictPart(NamedTuple):
    """One rank's part of a slot: the ids it claims, and where it stands."""

    claim: tuple[int, int, int]
    key: str
    file: str


# --- JSON


def strict_json(text: bytes) -> dict[str, Any]:
    """Return an object of which no key stands twice, nor in any object within."""
    try:
        string = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("no UTF-8") from error
    if _depth(string) > NESTED:
        raise Refused("nested too deeply")
    try:
        with _deep():
            value = json.loads(
                string,
                object_pairs_hook=_object,
                parse_int=_integer,
                parse_float=_number,
                parse_constant=_constant,
            )
    except ValueError as error:
        raise Refused(str(error)) from error
    if type(value) is not dict:
        raise Refused("no object")
    _check_text(value)
    return value


@contextmanager
def _deep() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 4 * NESTED)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _depth(string: str) -> int:
    if string.count("[") + string.count("{") <= NESTED:
        return 0
    deepest = depth = 0
    for character in _OUTSIDE.sub("", string):
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise Refused("a key twice")
    return value


def _integer(text: str) -> float:
    if text == "-0":
        return NegativeZero(0)
    if len(text) <= len(str(-(2**63))) and -(2**63) <= int(text) < 2**64:
        return int(text)
    return _number(text)


def _number(text: str) -> float:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        raise Refused("a number beyond all")
    return value


def _constant(text: str) -> float:
    raise Refused(text)


def _check_text(value: object) -> None:
    left = [value]
    while left:
        here = left.pop()
        if isinstance(here, dict):
            left += [*here, *here.values()]
        elif isinstance(here, list):
            left += here
        elif isinstance(here, str) and _SURROGATE.search(here):
            raise Refused("half a character")


def _need(condition: object, problem: str) -> None:
    if not condition:
        raise Refused(problem)


def _is_size(value: object, limit: int = 2**63) -> bool:
    return type(value) is int and 0 <= value < limit


# --- shards


def strict_header(content: bytes, *, recis: bool) -> dict[str, StrictBlock]:
    """Return the blocks of a safetensors file, their offsets counted from its first byte."""
    _need(len(content) >= 8, "no header")
    length = int.from_bytes(content[:8], "little")
    _need(2 <= length <= min(HEADER, len(content) - 8), "no such header")
    _need(content[8:9] in {b"{", b" "}, "no object")
    entries = strict_json(content[8 : 8 + length])
    metadata = entries.pop("__metadata__", None)
    if metadata is not None:
        _need(type(metadata) is dict, "metadata are no object")
        _need(all(type(value) is str for value in metadata.values()), "metadata are no text")
    blocks = {key: _block(entry, 8 + length, recis=recis) for key, entry in entries.items()}
    end = 8 + length
    for block in sorted(blocks.values(), key=lambda block: (block.begin, block.end)):
        _need(block.begin == end, "blocks are not back to back")
        end = block.end
    _need(end <= len(content), "cut off")
    _need(recis or end == len(content), "bytes of no block")
    return blocks


def _block(entry: Any, start: int, *, recis: bool) -> StrictBlock:  # noqa: ANN401  # JSON
    _need(type(entry) is dict and set(entry) == {"dtype", "shape", "data_offsets"}, "no entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if recis and dtype == "bool":
        dtype = "BOOL"
    _need(type(dtype) is str and (dtype in BITS or _UNKNOWN.fullmatch(dtype)), "no dtype")
    _need(type(shape) is list and all(map(_is_size, shape)), "no shape")
    _need(type(offsets) is list and len(offsets) == 2, "no offsets")
    _need(all(_is_size(offset, 2**63 - 2**30) for offset in offsets), "no offsets")
    count = counted = 1
    for size in shape:
        count, counted = count * size, counted * (size or 1)
        _need(counted < 2**63, "beyond 64 bits")
    length = offsets[1] - offsets[0]
    _need(length >= 0, "no offsets")
    _need(dtype not in BITS or length * 8 == count * BITS[dtype], "offsets and shape disagree")
    return StrictBlock(dtype, tuple(shape), start + offsets[0], start + offsets[1])


# --- names


def _is_file_name(name: object) -> bool:
    return type(name) is str and name not in {"", ".", ".."} and not re.search(r"[/\\\0]", name)


def strict_index(
    index: bytes, tensorkey: bytes
) -> tuple[dict[str, tuple[str, str]], dict[str, dict[str, list[StrictPart]]]]:
    """Return key and file of each dense tensor, and the parts of each table's slots."""
    value = strict_json(index)
    files, blocks = value.get("file_index"), value.get("block_index")
    if type(files) is not dict or type(blocks) is not dict:
        raise Refused("no index")
    numbers: dict[int, str] = {}
    for name, number in files.items():
        _need(_is_file_name(name), "a file elsewhere")
        number = 0 if isinstance(number, NegativeZero) else number  # noqa: PLW2901
        _need(_is_size(number, 2**64) and number not in numbers, "no number of its own")
        numbers[number] = name
    for number in blocks.values():
        _need(isinstance(number, NegativeZero) or type(number) is int, "no number")
        _need(number in numbers, "a file that is not there")
    names = strict_json(tensorkey)
    _need(names.keys() <= blocks.keys(), "names of nothing")
    tables: dict[str, dict[str, list[StrictPart]]] = {}
    tensors: dict[str, tuple[str, str]] = {}
    for key, number in blocks.items():
        if key in names:
            table, slot, claim = _sparse(names[key])
            part = StrictPart(claim, key, numbers[number])
            tables.setdefault(table, {}).setdefault(slot, []).append(part)
        else:
            name = key.removesuffix("^ ")
            _need(name not in tensors, "a tensor twice")
            tensors[name] = key, numbers[number]
    return tensors, _regrouped(tables)


def _regrouped(
    tables: dict[str, dict[str, list[StrictPart]]],
) -> dict[str, dict[str, list[StrictPart]]]:
    """Give each slot to the table with ids that is the longest beginning of its name."""
    result: dict[str, dict[str, list[StrictPart]]] = {}
    for table, slots in tables.items():
        for slot, parts in slots.items():
            words = [*table.split("@"), slot]
            ends = [
                at for at in range(1, len(words)) if "id" in tables.get("@".join(words[:at]), {})
            ]
            end = max(ends, default=len(words) - 1)
            name, rest = "@".join(words[:end]), "@".join(words[end:])
            result.setdefault(name, {})[rest] = parts
    return result


def _sparse(name: Any) -> tuple[str, str, tuple[int, int, int]]:  # noqa: ANN401  # JSON
    _need(type(name) is str and "^" in name, "no name")
    full, _, where = name.rpartition("^")
    _need("@" in full, "no slot")
    table, _, slot = full.rpartition("@")
    match = _SLICE.fullmatch(where)
    if match is None:
        raise Refused("no slice")
    begin, end, size = map(int, match.groups())
    _need(begin <= end <= size and 0 < size <= 2**62, "no slice")
    return table, slot, (begin, end, size)


def strict_weight_map(text: bytes) -> dict[str, str]:
    """Return the file of each tensor."""
    found = strict_json(text).get("weight_map")
    if type(found) is not dict:
        raise Refused("no map")
    _need(all(map(_is_file_name, found.values())), "a file elsewhere")
    return found


# --- the sidecar


def strict_sidecar(text: bytes) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Return the digests of files and of shards; `None` if it is of a format of its own."""
    value = strict_json(text)
    form = value.get("format")
    _need(type(form) is int or isinstance(form, NegativeZero), "no format")
    if form != 1:
        return None
    _need(value.get("digest") == "xxh3-128", "another digest")
    _need(type(value.get("chunk_bytes")) is int and value["chunk_bytes"] == CHUNK, "other chunks")
    _need({"files", "shards", "parts"} <= value.keys(), "a part of it")
    files, shards = value["files"], value["shards"]
    _need(type(files) is dict and all(map(_is_digest, files.values())), "no digests")
    _need(type(shards) is dict, "no shards")
    for shard in shards.values():
        _need(type(shard) is dict and {"header", "blocks"} <= shard.keys(), "no shard")
        _need(_is_digest(shard["header"]) and type(shard["blocks"]) is dict, "no digests")
        for digests in shard["blocks"].values():
            _need(type(digests) is list and all(map(_is_digest, digests)), "no digests")
    return files, shards


def _is_digest(value: object) -> bool:
    return type(value) is str and len(value) == 32


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


# --- folders


@dataclass
class StrictFolder:
    """What stands in a folder. Whatever is asked for is read then, and may be refused then."""

    files: Mapping[str, bytes]
    """Content by name."""

    verify: bool = True
    """Whether to compare digests."""

    tensors: dict[str, tuple[str, str]] = field(default_factory=dict)
    tables: dict[str, dict[str, list[StrictPart]]] = field(default_factory=dict)
    digests: dict[str, Any] | None = None
    recis: bool = False
    headers: dict[str, dict[str, StrictBlock]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = {"model.safetensors.index.json", "model.safetensors"} & self.files.keys()
        if "index" in self.files and ("tensorkey.json" in self.files or not plain):
            self._open_recis()
        elif "model.safetensors.index.json" in self.files:
            found = strict_weight_map(self.files["model.safetensors.index.json"])
            self.tensors = {name: (name, file) for name, file in found.items()}
        else:
            _need("model.safetensors" in self.files, "nothing here")
            blocks = self._header("model.safetensors")
            self.tensors = {name: (name, "model.safetensors") for name in blocks}

    def _open_recis(self) -> None:
        self.recis = True
        _need("tensorkey.json" in self.files, "no names of tables")
        index, names = self.files["index"], self.files["tensorkey.json"]
        self.tensors, self.tables = strict_index(index, names)
        if self.verify and "asyncloader.json" in self.files:
            found = strict_sidecar(self.files["asyncloader.json"])
            if found is None:
                return
            if found[0].get("index") != _digest(index) and not index.endswith(b"\n"):
                return
            _need(found[0].get("index") == _digest(index), "another index")
            _need(found[0].get("tensorkey.json") == _digest(names), "other names")
            self.digests = found[1]

    def _header(self, file: str) -> dict[str, StrictBlock]:
        if file not in self.headers:
            _need(file in self.files, "no such file")
            content = self.files[file]
            self.headers[file] = strict_header(content, recis=self.recis)
            if self.digests is not None:
                _need(file in self.digests, "no digests")
                start = 8 + int.from_bytes(content[:8], "little")
                _need(self.digests[file]["header"] == _digest(content[:start]), "another header")
        return self.headers[file]

    def block(self, key: str, file: str) -> tuple[str, tuple[int, ...], bytes]:
        """Return dtype, shape and bytes of a block."""
        header = self._header(file)
        actual = key
        if key not in header and self.recis and "/part_" in key:
            actual = key.removesuffix("^ ")
        _need(actual in header, "no such block")
        dtype, shape, begin, end = header[actual]
        data = self.files[file][begin:end]
        if self.digests is not None:
            chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
            known = self.digests[file]["blocks"].get(actual, [])
            _need(known == [_digest(chunk) for chunk in chunks], "other bytes")
        return dtype, shape, data

    def tensor(self, name: str) -> tuple[str, tuple[int, ...], bytes] | None:
        """Return dtype, shape and bytes of a dense tensor; `None` if there is none."""
        return self.block(*self.tensors[name]) if name in self.tensors else None

    def parts(
        self, table: str, slots: Collection[str], wanted: tuple[int, int, int]
    ) -> list[tuple[tuple[int, int, int], dict[str, tuple[str, tuple[int, ...], bytes]]]]:
        """Return claim and slots of a table's parts, in the order of their slices.

        Rows whose ids are missing, where others are there, are left out: a load reports that.

        Args:
            table: Its name.
            slots: Those to look at, `id` among them.
            wanted: The slice that is asked for: parts that can have no id of it are left out.
        """
        by_claim: dict[tuple[int, int, int], dict[str, tuple[str, tuple[int, ...], bytes]]] = {}
        for slot, parts in self.tables.get(table, {}).items():
            for claim, key, file in parts:
                if slot in slots and _meet(claim, wanted):
                    _need(slot not in by_claim.setdefault(claim, {}), "a part twice")
                    by_claim[claim][slot] = self.block(key, file)
        _need(table not in self.tables or "id" in self.tables[table], "no ids")
        by_claim = {claim: found for claim, found in by_claim.items() if "id" in found}
        for found in by_claim.values():
            _need(found["id"][0] == "I64", "no ids")
            rows = found["id"][1]
            _need(len(rows) == 1, "no ids")
            _need(all(shape[:1] == rows for _, shape, _ in found.values()), "other rows")
        return sorted(by_claim.items())


def _meet(claim: tuple[int, int, int], wanted: tuple[int, int, int]) -> bool:
    if claim[0] == claim[1]:
        return False
    return claim[2] != wanted[2] or (claim[0] < wanted[1] and wanted[0] < claim[1])
