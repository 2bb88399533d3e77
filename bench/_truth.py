"""What checkpoints hold: random bits, cheaply made.

Every tensor is a window of its own into one buffer of random bits, so that it takes no time and no
memory worth speaking of to have gigabytes of them; no two are alike. The bits make floats of all
kinds, NaN among them, so tensors are compared bit for bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from examples.made_up import SLOTS
from tests.oracle import TableData

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from asyncloader import HashTable

SEED = 7
STRIDE = 62
"""Elements from one window's start to the next's: no multiple of any row, and whole words."""


def windows(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return float32 tensors of these shapes."""
    most = max(math.prod(shape) for shape in shapes.values())
    bits = np.random.Generator(np.random.SFC64(SEED)).integers(
        2**64, size=(most + STRIDE * len(shapes)) // 2 + 1, dtype=np.uint64
    )
    buffer = torch.from_numpy(bits.view(np.float32))
    return {
        name: buffer[number * STRIDE :][: math.prod(shape)].view(shape)
        for number, (name, shape) in enumerate(shapes.items())
    }


def table_rows(ids: int, width: int, slots: tuple[str, ...] = SLOTS) -> TableData:
    """Return rows `[ids, width]` of each slot, for random ids all over int64."""
    generator = np.random.Generator(np.random.SFC64(SEED + 1))
    drawn = generator.integers(2**64, size=ids, dtype=np.uint64).view(np.int64)
    rows = windows(dict.fromkeys(slots, (ids, width)))
    return TableData(ids=torch.from_numpy(drawn), slots=rows)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are alike to the last bit, eight bytes at a time."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(_words(one), _words(other))


def _words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.int64)


def holds_exactly(table: HashTable, data: TableData) -> bool:
    """Say whether a table holds these rows, bit for bit, and no others."""
    return (
        len(table) == len(data.ids)
        and bool(table.contains(data.ids).all())
        and all(same_bits(table.lookup(data.ids, slot), rows) for slot, rows in data.slots.items())
    )
