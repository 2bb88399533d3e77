"""How two checkpoints differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncloader._checkpoint.stored import Stored

    from .comparison import Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What only one of them holds."""

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
class TensorDifference:
    """A dense tensor that both have."""

    name: str
    a: Kind
    b: Kind

    elements: int
    """That were compared; none if the kinds differ. Bytes, where an element is no whole ones."""

    change: Change

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return self.a == self.b and not self.change.different


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDifference:
    """A slot, of a table that both have."""

    name: str
    a: Kind
    b: Kind

    rows: int
    """That were compared: of ids that both have; none if the kinds differ."""

    different: int
    """Rows that differ in some element."""

    change: Change

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return self.a == self.b and not self.change.different


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
    """All of it."""

    a: str
    b: str
    equal: bool
    only_in_a: Names
    only_in_b: Names
    tables: tuple[TableDifference, ...]
    """Those that both have, equal ones too."""

    tensors: tuple[TensorDifference, ...]
    """Likewise."""

    notes: tuple[str, ...]
    """What is odd about one of them."""

    seconds: float
