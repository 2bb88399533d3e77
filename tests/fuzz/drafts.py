"""Small checkpoints of every kind, and how they are spoiled."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import xxhash

from .choices import Choices
from .mutations import change_bytes, hostile_text
from .trees import Node, tree

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX, TENSORKEY, SIDECAR = "index", "tensorkey.json", "asyncloader.json"
SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"

TENSORS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "w": ("F32", (3,), 4),
    "v": ("BOOL", (2,), 1),
    "empty": ("F32", (0, 4), 4),
    "x/part_0": ("I64", (), 8),
    "half": ("BF16", (2, 1), 2),
    "eighth:0": ("F8_E4M3", (3,), 1),
    "pair": ("C64", (1,), 8),
}
"""dtype, shape and bytes an element, by name: what destinations are made for."""

SLOTS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "id": ("I64", (), 8),
    "embedding": ("F32", (2,), 4),
    "s": ("U8", (3,), 1),
}
"""Of a row of each table."""

TABLES = ("t", "a.b")
IDS = (0, 1, 5, -1, 2**63 - 1, -(2**63), 40000, 65536, 5)


@dataclass
class Draft:
    """A checkpoint that is being made: documents, and shards as header and data."""

    names: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of tables, how rows are spread over sub-slices: for the sidecar."""

    @cached_property
    def trees(self) -> dict[str, Node]:
        """All documents, by file."""
        return {name: tree(value) for name, value in (self.names | self.headers).items()}

    def add(self, file: str, key: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        begin = len(self.data.get(file, b""))
        self.data[file] = self.data.get(file, b"") + data
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + len(data)]}
        self.headers.setdefault(file, {})[key] = entry


def some_bytes(dtype: str, count: int, itemsize: int, seed: int) -> bytes:
    """Return the bytes of a tensor, no two tensors alike."""
    if dtype == "BOOL":
        return bytes((seed + at) % 2 for at in range(count))
    return bytes((seed * 7 + at) % 120 + 1 for at in range(count * itemsize))


@lru_cache(maxsize=512)
def draft_of(kind: str, number: int) -> Draft:
    """Return one of 256 checkpoints of a kind."""
    choices = Choices(random.Random(number).randbytes(64) if number else b"")
    return _recis(choices) if kind == "recis" else _plain(choices)


def _recis(choices: Choices) -> Draft:
    """Make a checkpoint of up to two tables and some tensors, by one or two ranks."""
    draft = Draft()
    ranks, shards = 1 + choices.below(2), 1 + choices.below(3)
    is_sorted = choices.below(2) == 1
    block_index: dict[str, int] = {}
    tensorkey: dict[str, str] = {}
    files = [f"model-{number:06d}-of-{shards:06d}.safetensors" for number in range(shards)]

    def place(key: str, index_key: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        number = len(block_index) % shards
        block_index[index_key] = number
        draft.add(files[number], key, dtype, shape, data)

    for table in TABLES[: choices.below(3)]:
        for rank in range(ranks):
            rows, width = choices.below(4), 65536 // ranks
            held = [choices.of(IDS) for _ in range(rows)]
            if is_sorted:
                held.sort(key=lambda id_: (id_ % 65536, id_ % 2**64))
                part = _part(held, rank * width, rank * width + width)
                draft.parts.setdefault(table, []).append(part)
            ids = struct.pack(f"<{rows}q", *held)
            for slot, (dtype, row, itemsize) in SLOTS.items():
                key = f"{table}@{slot}".replace("@", ".", 1) + f"/part_{rank}_{ranks}"
                count = rows * (row[0] if row else 1)
                data = ids if slot == "id" else some_bytes(dtype, count, itemsize, rank + 1)
                place(key, key, dtype, (rows, *row), data)
                claim = f"{rank * width:05d}@{rank * width + width:05d}@65536"
                tensorkey[key] = f"{table}@{slot}^{claim}"
    for seed, (name, (dtype, shape, itemsize)) in enumerate(TENSORS.items()):
        if choices.once_in(2):
            continue
        count = _count(shape)
        key = name if "/part_" in name else f"{name}^ "
        spelled = dtype.lower() if dtype == "BOOL" and choices.below(2) else dtype
        place(key, f"{name}^ ", spelled, shape, some_bytes(dtype, count, itemsize, seed))
    used = set(block_index.values())
    file_index = {file: number for number, file in enumerate(files) if number in used}
    draft.names = {
        INDEX: {"block_index": block_index, "file_index": file_index},
        TENSORKEY: tensorkey,
    }
    return draft


def _part(ids: list[int], begin: int, end: int) -> dict[str, Any]:
    """Return what the sidecar says of sorted ids."""
    cuts = [begin + (end - begin) * number // 256 for number in range(1, 256)]
    offsets = [sum(id_ % 65536 < cut for id_ in ids) for cut in cuts]
    claim = f"{begin:05d}@{end:05d}@65536"
    return {"slice": claim, "rows": len(ids), "offsets": [0, *offsets, len(ids)]}


def _plain(choices: Choices) -> Draft:
    """Make one safetensors file, or a Hugging Face folder of several."""
    draft = Draft()
    shards = choices.below(3)
    files = [f"model-{number}.safetensors" for number in range(shards)] or [SINGLE]
    weight_map = {}
    for seed, (name, (dtype, shape, itemsize)) in enumerate(TENSORS.items()):
        if choices.once_in(2):
            continue
        file = files[seed % len(files)]
        weight_map[name] = file
        draft.add(file, name, dtype, shape, some_bytes(dtype, _count(shape), itemsize, seed))
    for header in draft.headers.values():
        if choices.below(2):
            header["__metadata__"] = {"format": "pt", "x:y": "-0"}
    if shards:
        draft.names = {SHARDED: {"metadata": {"total_size": 8}, "weight_map": weight_map}}
    return draft


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def spoiled(draft: Draft, choices: Choices) -> dict[str, bytes]:
    """Return a checkpoint's files, with something wrong about some of them."""
    which = [*draft.names, *draft.headers, SIDECAR, "nothing"]
    victims = {choices.of(which) for _ in range(1 + choices.below(2))}
    quiet = Choices(b"")
    files: dict[str, bytes] = {}
    for name in draft.names:
        text = hostile_text(draft.trees[name], choices if name in victims else quiet)
        files[name] = text + b"\n" * (name == INDEX and choices.below(2))
    for file, data in draft.data.items():
        header = draft.trees[file]
        files[file] = shard_of(header, data, choices if file in victims else quiet)
    if INDEX in files and choices.below(2):
        sidecar = sidecar_of(files, draft.headers, draft.parts)
        files[SIDECAR] = hostile_text(tree(sidecar), choices if SIDECAR in victims else quiet)
    if choices.once_in(4):
        _spoil_files(files, choices)
    return files


def shard_of(header: Node, data: bytes, choices: Choices) -> bytes:
    """Return a shard's bytes, its header spoiled."""
    text = hostile_text(header, choices)
    text += b" " * choices.below(9)
    length = len(text)
    if choices.once_in(8):
        length = choices.of([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1])
    content = max(length, 0).to_bytes(8, "little") + text + data
    return change_bytes(content, choices) if choices.once_in(8) else content


def sidecar_of(
    files: Mapping[str, bytes], headers: Mapping[str, Any], parts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a sidecar as one would write it who knows of what was spoiled."""
    shards = {}
    for file, header in headers.items():
        content = files[file]
        start = 8 + int.from_bytes(content[:8], "little")
        blocks = {}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            data = content[start + begin : start + end]
            blocks[key] = [_digest(data)] if data else []
        shards[file] = {"header": _digest(content[:start]), "blocks": blocks}
    return {
        "format": 1,
        "digest": "xxh3-128",
        "chunk_bytes": 8 << 20,
        "files": {name: _digest(files[name]) for name in (INDEX, TENSORKEY)},
        "shards": shards,
        "parts": parts,
    }


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _spoil_files(files: dict[str, bytes], choices: Choices) -> None:
    one, other = choices.of(sorted(files)), choices.of(sorted(files))
    kind = choices.below(5)
    if kind == 0:
        del files[one]
    elif kind == 1:
        files[one], files[other] = files[other], files[one]
    elif kind == 2:
        files[one] = b""
    elif kind == 3:
        files[one] = change_bytes(files[one], choices)
    else:
        files[one] += files[other]
