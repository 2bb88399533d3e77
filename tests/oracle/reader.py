"""A slow reader of whole checkpoints, to compare with. Trusts what it reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from .values import Part, Slice, TableData

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

_DTYPES = {
    "BOOL": torch.bool,
    "bool": torch.bool,
    "C64": torch.complex64,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
}


def read_checkpoint(path: Path) -> tuple[dict[str, TableData], dict[str, Tensor]]:
    """Return all tables, their parts merged in slice order, and all dense tensors.

    Tables, slots and tensors come in the order in which they were written.
    """
    parts, tensors = read_parts(path)
    return {name: _merge(table) for name, table in parts.items()}, tensors


def read_parts(path: Path) -> tuple[dict[str, list[Part]], dict[str, Tensor]]:
    """Return every table's parts in slice order, and all dense tensors."""
    names = json.loads((path / "tensorkey.json").read_bytes())
    tables: dict[str, dict[Slice, dict[str, Tensor]]] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in _blocks(path):
        if key not in names:
            tensors[key.removesuffix("^ ")] = tensor
            continue
        slot_name, _, bounds = names[key].rpartition("^")
        table, _, slot = slot_name.rpartition("@")
        begin, end, size = map(int, bounds.split("@"))
        tables.setdefault(table, {}).setdefault(Slice(begin, end, size), {})[slot] = tensor
    for table in [name for name, held in tables.items() if "id" not in next(iter(held.values()))]:
        words = table.split("@")  # its slots' names hold `@`
        heads = ["@".join(words[:at]) for at in range(1, len(words))]
        owner = max((head for head in heads if head in tables), key=len)
        for claim, slots in tables.pop(table).items():
            middle = table.removeprefix(f"{owner}@")
            tables[owner][claim] |= {f"{middle}@{slot}": held for slot, held in slots.items()}
    parts = {
        table: [
            Part(claim=claim, ids=slots["id"], slots={s: slots[s] for s in slots if s != "id"})
            for claim, slots in sorted(by_claim.items(), key=lambda item: item[0])
        ]
        for table, by_claim in tables.items()
    }
    return parts, tensors


def _blocks(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Give every block of the checkpoint with its key in `index`, undoing the round robin."""
    index = json.loads((path / "index").read_bytes())
    found: list[tuple[int, int, str, Tensor]] = []
    for file, number in index["file_index"].items():
        raw = (path / file).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        for key in (key for key, at in index["block_index"].items() if at == number):
            actual = key if key in header else key.removesuffix("^ ")
            tensor = _tensor(raw[start:], header[actual])
            found.append((list(header).index(actual), number, key, tensor))
    for _, _, key, tensor in sorted(found, key=lambda item: item[:2]):
        yield key, tensor


def _tensor(data: bytes, entry: dict[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    if begin == end:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).reshape(entry["shape"])


def _merge(parts: list[Part]) -> TableData:
    return TableData(
        ids=torch.cat([part.ids for part in parts]),
        slots={slot: _concatenate([part.slots[slot] for part in parts]) for slot in parts[0].slots},
    )


def _concatenate(tensors: list[Tensor]) -> Tensor:
    """Concatenate rows; `torch.cat` does not know every dtype."""
    if len(tensors) == 1:
        return tensors[0]
    first = tensors[0]
    joined = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    rows = sum(len(tensor) for tensor in tensors)
    return joined.view(first.dtype).reshape(rows, *first.shape[1:])
