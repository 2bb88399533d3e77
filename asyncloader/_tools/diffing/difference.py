"""How two checkpoints differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncloader._checkpoint.manifest import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names that only one of two checkpoints holds."""

    tables: tuple[str, ...]

    slots: tuple[str, ...]
    """`table@slot`, of tables that both have."""

    tensors: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.tables or self.slots or self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Dtype and shape of a tensor, or of a row of a slot."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, stored: Stored) -> Kind:
        """Return that of a tensor."""
        return cls(dtype=stored.dtype.torch, shape=stored.shape)

    @classmethod
    def of_row(cls, stored: Stored) -> Kind:
        """Return that of a row of a slot."""
        return cls(dtype=stored.dtype.torch, shape=stored.shape[1:])

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How values differ."""

    different: int
    """Elements. Those with the same bits do not, nor do two NaN; 0.0 and -0.0 do."""

    largest: float | None = None
    """Absolute change among those whose change is a finite number; exact for integers. `None` if
    there are none, as with dtypes that torch knows no numbers of."""

    infinite: int = 0
    """Elements whose change is infinite."""

    nans: int = 0
    """Elements of which one is NaN and the other is not."""

    @classmethod
    def sum(cls, changes: Sequence[Change]) -> Change:
        """Sum up what was found of some values at a time."""
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
    """A dense tensor that both have."""

    elements: int
    """Elements that were compared: 0 if the kinds differ. Bytes, where an element takes no whole
    number of bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDifference(_Both):
    """A slot, of a table that both have."""

    rows: int
    """Rows that were compared, one for each id that both have: 0 if the kinds differ."""

    different: int
    """Rows that differ in some element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDifference:
    """A table that both have."""

    name: str

    lost: int
    """Ids that only A has."""

    gained: int
    """Ids that only B has."""

    kept: int
    """Ids that both have."""

    slots: tuple[SlotDifference, ...]

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return not self.lost and not self.gained and all(slot.equal for slot in self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The difference between two checkpoints."""

    a: str
    b: str
    equal: bool
    only_in_a: Names
    only_in_b: Names
    tables: tuple[TableDifference, ...]
    """Tables that both have, equal ones too."""

    tensors: tuple[TensorDifference, ...]
    """Tensors that both have, equal ones too."""

    notes: tuple[str, ...]
    """Oddities of one of them."""

    seconds: float
