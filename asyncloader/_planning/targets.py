"""Describes destinations, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.blocks import Columns
from asyncloader._checkpoint.parts import ID

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import BlockType
    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._checkpoint.slices import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class RowType:
    """Shape and dtype of one row of a slot, or of a whole dense tensor."""

    shape: tuple[int, ...]
    dtype: DType

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class TensorTargets(Columns[RowType]):
    """Dense tensors by name.

    Args:
        names: `[n]`, all different.
        types: The different dtypes and shapes that there are.
        kinds: int64 `[n]`; which of `types` each has.
        memory: `[n]`; equal numbers are the same memory. `None` where all are different.
    """

    __slots__ = ("kinds", "memory", "types")

    def __init__(
        self,
        names: Iterable[str],
        types: Sequence[BlockType] = (),
        kinds: NDArray[np.int64] | None = None,
        memory: Sequence[int] | None = None,
    ) -> None:
        super().__init__(names)
        self.types = types
        self.kinds = np.zeros(0, np.int64) if kinds is None else kinds
        self.memory = memory
        assert len(self.kinds) == len(self)
        assert memory is None or len(memory) == len(self)

    def at(self, number: int) -> RowType:
        """Return the type of the tensor in that place of the columns."""
        dtype, shape = self.types[self.kinds[number]]
        return RowType(shape=shape, dtype=dtype)


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

    tensors: TensorTargets
    tables: Mapping[str, TableTarget]
    """By the name of each child, so a coalesced table stands here several times."""


LoadInfo = dict[str, dict[str, list[str]]]
"""The plan that a `filter_func` may change: `{destination: {source: [slot, …]}}`."""


def default_load_info(targets: Targets) -> LoadInfo:
    """Map every child of every table, and every tensor, to itself."""
    info: LoadInfo = {
        child: {child: [ID, *target.slots]} for child, target in targets.tables.items()
    }
    return info | {name: {name: []} for name in targets.tensors}


def checked_load_info(info: object) -> LoadInfo:
    """Return the value of a `filter_func`, if it is of the right form.

    Raises:
        TypeError: If it is something else.
    """
    form = "{destination: {source: [slot, ...]}}"
    if not isinstance(info, dict):
        raise TypeError(f"filter_func must return the dict {form}, got {type(info).__name__}")
    for destination, sources in info.items():
        if not isinstance(destination, str) or not isinstance(sources, dict):
            raise TypeError(f"filter_func must return {form}, got {destination!r}: {sources!r}")
        for source, slots in sources.items():
            names = isinstance(slots, list | tuple) and all(isinstance(s, str) for s in slots)
            if not isinstance(source, str) or not names:
                got = f"{destination!r}: {{{source!r}: {slots!r}}}"
                raise TypeError(f"filter_func must return {form}, got {got}")
    return info
