"""What there is to fill, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader.checkpoint import DType, Slice

__all__ = ["RowType", "TableTarget", "Targets", "TensorTarget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowType:
    """Shape and dtype of one row of a slot, or of a whole dense tensor."""

    shape: tuple[int, ...]
    dtype: DType

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTarget:
    """A dense tensor."""

    name: str
    type: RowType

    memory: int
    """Tensors of the same number are the same memory under several names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTarget:
    """A hash table."""

    name: str
    children: tuple[str, ...]
    slice: Slice
    slots: Mapping[str, RowType]
    """All but the ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """All that a load may fill. No tensor has the name of a table's child."""

    tensors: Mapping[str, TensorTarget]
    tables: Mapping[str, TableTarget]
    """By the name of each child, so a coalesced table stands here several times."""
