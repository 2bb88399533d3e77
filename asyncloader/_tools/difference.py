"""How two checkpoints differ, and how two tensors do.

Values of any dtype are compared bit for bit first, and values that differ then as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._loading.reading import has_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from asyncloader._checkpoint.manifest import Stored

    from .content import Content


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names that only one of two checkpoints holds.

    Attributes:
        slots: `table@slot`, of tables that both have.
    """

    tables: tuple[str, ...]
    slots: tuple[str, ...]
    tensors: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.tables or self.slots or self.tensors)

    @classmethod
    def only_in(cls, one: Content, other: Content) -> Names:
        """Name the tables, slots and tensors that one of them holds and the other does not."""
        return cls(
            tables=tuple(name for name in one.tables if name not in other.tables),
            slots=tuple(
                f"{name}@{slot}"
                for name, table in one.tables.items()
                if name in other.tables
                for slot in table.slots
                if slot not in other.tables[name].slots
            ),
            tensors=tuple(name for name in one.tensors if name not in other.tensors),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Dtype and shape of a tensor, or of a row of a slot."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, stored: Stored) -> Kind:
        """Return the kind of a tensor."""
        return cls(dtype=stored.dtype.torch, shape=stored.shape)

    @classmethod
    def of_row(cls, stored: Stored) -> Kind:
        """Return the kind of a row of a slot."""
        return cls(dtype=stored.dtype.torch, shape=stored.shape[1:])

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How values differ.

    Attributes:
        different: Elements that differ: not two with the same bits or two NaN, but 0.0 and -0.0.
        largest: The largest absolute change that is a finite number; exact for integers.
            `None` if there is none, as with dtypes that torch knows no numbers of.
        infinite: Elements whose change is infinite.
        nans: Elements of which one is NaN and the other is not.
    """

    different: int
    largest: float | None = None
    infinite: int = 0
    nans: int = 0

    @classmethod
    def sum(cls, changes: Sequence[Change]) -> Change:
        """Sum up the changes of some values at a time."""
        largest = [change.largest for change in changes if change.largest is not None]
        return cls(
            different=sum(change.different for change in changes),
            largest=max(largest, default=None),
            infinite=sum(change.infinite for change in changes),
            nans=sum(change.nans for change in changes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Both:
    """A tensor or slot that both have."""

    name: str
    a: Kind
    b: Kind
    change: Change

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return self.a == self.b and not self.change.different


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference(_Both):
    """A dense tensor that both have.

    Attributes:
        elements: Elements that were compared: 0 if the kinds differ. Bytes, where an element takes
            no whole number of bytes.
    """

    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDifference(_Both):
    """A slot, of a table that both have.

    Attributes:
        rows: Rows that were compared, one for each id that both have: 0 if the kinds differ.
        different: Rows that differ in some element.
    """

    rows: int
    different: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDifference:
    """A table that both have.

    Attributes:
        lost: Ids that only A has.
        gained: Ids that only B has.
        kept: Ids that both have.
    """

    name: str
    lost: int
    gained: int
    kept: int
    slots: tuple[SlotDifference, ...]

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return not self.lost and not self.gained and all(slot.equal for slot in self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The difference between two checkpoints.

    Attributes:
        tables: Tables that both have, equal ones too.
        tensors: Tensors that both have, equal ones too.
        notes: Oddities of one of them.
    """

    a: str
    b: str
    equal: bool
    only_in_a: Names
    only_in_b: Names
    tables: tuple[TableDifference, ...]
    tensors: tuple[TensorDifference, ...]
    notes: tuple[str, ...]
    seconds: float


def compare(one: Tensor, other: Tensor) -> tuple[Change, NDArray[np.int64]]:
    """Compare two tensors of the same dtype and shape.

    Returns:
        How they differ, and which elements do, as ascending positions in row-major order.
    """
    left, right = _bits(one), _bits(other)
    where = np.flatnonzero(left != right)
    if not len(where) or not has_numbers(BY_TORCH[str(one.dtype).removeprefix("torch.")]):
        return Change(different=len(where)), where
    a, b = left[where], right[where]
    if one.dtype == torch.bool:
        return Change(different=len(where), largest=1), where
    if not one.dtype.is_floating_point and not one.dtype.is_complex:
        return _integers(a, b, signed=one.dtype.is_signed), where
    return _numbers(_wide(a, one.dtype), _wide(b, one.dtype), where)


def compare_bits(one: Tensor, other: Tensor) -> Change:
    """Compare elements without numbers, `[n, size]` bytes."""
    return Change(different=int((one != other).any(dim=1).count_nonzero()))


def _bits(tensor: Tensor) -> NDArray[np.unsignedinteger]:
    """Return the elements in one dimension, as unsigned integers of their width."""
    flat = tensor.contiguous().reshape(-1)
    if not flat.numel():
        return np.zeros(0, np.uint8)
    return flat.view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _integers(
    a: NDArray[np.unsignedinteger], b: NDArray[np.unsignedinteger], *, signed: bool
) -> Change:
    width = a.dtype.itemsize
    if signed:
        a, b = a.view(f"i{width}"), b.view(f"i{width}")
    high, low = np.maximum(a, b), np.minimum(a, b)
    # The distance of two signed numbers may need the sign's bit.
    distance = high.view(f"u{width}") - low.view(f"u{width}")
    return Change(different=len(a), largest=int(distance.max()))


def _wide(bits: NDArray[np.unsignedinteger], dtype: torch.dtype) -> NDArray[np.inexact]:
    plain = torch.from_numpy(bits.view(f"i{bits.dtype.itemsize}")).view(dtype)
    return plain.to(torch.complex128 if dtype.is_complex else torch.float64).numpy()


def _numbers(
    a: NDArray[np.inexact], b: NDArray[np.inexact], where: NDArray[np.int64]
) -> tuple[Change, NDArray[np.int64]]:
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    differ = ~(nan_a & nan_b)
    known = ~(nan_a | nan_b)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a[known] - b[known])
    finite = distance[np.isfinite(distance)]
    different = int(np.count_nonzero(differ))
    change = Change(
        different=different,
        largest=float(finite.max()) if len(finite) else None,
        infinite=len(distance) - len(finite),
        nans=different - len(distance),
    )
    return change, where[differ]
