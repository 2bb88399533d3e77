"""What there is to fill, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTarget:
    """A dense tensor."""

    name: str
    type: RowType

    memory: int
    """Tensors of the same number are the same memory under several names."""


class TensorTargets(Mapping[str, TensorTarget]):
    """Dense tensors by name, as columns. A `TensorTarget` is made when it is asked for.

    Args:
        names: `[n]`, all different.
        types: The different dtypes and shapes that there are.
        kinds: int64 `[n]`; which of `types` each has.
        memory: `[n]`; equal numbers are the same memory. `None` where all are different.
    """

    __slots__ = ("_numbers", "kinds", "memory", "types")

    def __init__(
        self,
        names: Iterable[str],
        types: Sequence[BlockType] = (),
        kinds: NDArray[np.int64] | None = None,
        memory: Sequence[int] | None = None,
    ) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self.types = types
        self.kinds = np.zeros(0, np.int64) if kinds is None else kinds
        self.memory = memory

    @classmethod
    def of(cls, targets: Iterable[TensorTarget]) -> TensorTargets:
        """Return targets as columns."""
        known = list(targets)
        types: dict[BlockType, int] = {}
        kinds = [types.setdefault((t.type.dtype, t.type.shape), len(types)) for t in known]
        return cls(
            [one.name for one in known],
            tuple(types),
            np.array(kinds, np.int64),
            [one.memory for one in known],
        )

    def __repr__(self) -> str:
        return f"<TensorTargets {len(self)} tensors>"

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __getitem__(self, name: str) -> TensorTarget:
        number = self._numbers[name]
        dtype, shape = self.types[self.kinds[number]]
        kind = RowType(shape=shape, dtype=dtype)
        memory = number if self.memory is None else self.memory[number]
        return TensorTarget(name=name, type=kind, memory=memory)

    def names(self) -> AbstractSet[str]:
        """Return all names, as a set."""
        return self._numbers.keys()

    def numbers(self, names: Iterable[str]) -> list[int]:
        """Return where in the columns each name stands."""
        return list(map(self._numbers.__getitem__, names))


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
