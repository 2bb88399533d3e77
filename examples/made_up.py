"""Made-up tables and tensors: something to write, to load, and to compare with what was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader import HashTable
from tests.oracle import TableData, flat_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from asyncloader import Slice

SLOTS = ("embedding", "sparse_adamw_exp_avg", "sparse_adamw_exp_avg_sq")
"""What a table keeps for each id when AdamW trains it."""


def random_tensor(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return a tensor of normally distributed floats, whole numbers, or bools."""
    if dtype.is_floating_point:
        normal = np.asarray(rng.standard_normal(shape, np.float32))
        return torch.from_numpy(normal).to(dtype)
    return torch.from_numpy(
        np.asarray(rng.integers(2 if dtype == torch.bool else 1000, size=shape))
    ).to(dtype)


def random_table(rng: np.random.Generator, ids: int, width: int) -> TableData:
    """Return rows of `SLOTS`, `[ids, width]` float32 each, for ids all over int64."""
    limits = np.iinfo(np.int64)
    drawn = rng.integers(limits.min, limits.max, size=ids, dtype=np.int64, endpoint=True)
    slots = {slot: random_tensor(rng, (ids, width)) for slot in SLOTS}
    return TableData(ids=torch.from_numpy(drawn), slots=slots)


def empty_table(name: str, data: TableData, part: Slice | None = None) -> HashTable:
    """Return a table that can take such rows."""
    shape = data.slots["embedding"].shape[1:]
    table = HashTable(shape, block_size=1 << 14, name=name, slice=part)
    for slot, rows in data.slots.items():
        if slot != "embedding":
            table.add_slot(slot, rows.shape[1:], rows.dtype)
    return table


def filled_table(name: str, data: TableData, part: Slice | None = None) -> HashTable:
    """Return a table that holds such rows, or those of them that belong to a slice."""
    table = empty_table(name, data, part)
    position = data.ids.numpy().view(np.uint64) % np.uint64(table.slice.size)
    inside = (position >= np.uint64(table.slice.begin)) & (position < np.uint64(table.slice.end))
    mine = torch.from_numpy(np.flatnonzero(inside))
    for slot, rows in data.slots.items():
        table.insert(data.ids[mine], rows[mine], slot)
    return table


def empty_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same shapes and dtypes, all zero."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are alike to the last bit: NaN is NaN, and -0.0 is not 0.0."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(flat_bytes(one), flat_bytes(other))


def holds_exactly(table: HashTable, data: TableData) -> bool:
    """Say whether a table holds these rows, bit for bit, and no others."""
    return (
        len(table) == len(data.ids)
        and bool(table.contains(data.ids).all())
        and all(same_bits(table.lookup(data.ids, slot), rows) for slot, rows in data.slots.items())
    )
