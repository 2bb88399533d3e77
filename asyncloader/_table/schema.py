"""The slots of a table, and its children, whose ids it encodes.

An id of a child is encoded as `(id & (2**52 - 1)) | (child << 52)`, as RecIS does. A table that is
not coalesced keeps ids as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from asyncloader._arguments import check_callable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from asyncloader._checkpoint.slices import Slice

    Flags = NDArray[np.bool_]
    Longs = NDArray[np.int64]
    Words = NDArray[np.uint64]


Initializer = float | Callable[[torch.Tensor], object]
"""A number, or a function that fills a `[n, *shape]` tensor in place, as `torch.nn.init` has."""

_BITS = 52
_MASK = 2**_BITS - 1
_MAX_CHILDREN = 4094  # RecIS's limit; 12 bits would hold two more
_WINDOW = 1 << 15  # ids that fit into the processor's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One value for each id: its embedding, or a state of its optimizer.

    Attributes:
        name: Its name, on disk too.
        shape: The shape of one row.
        dtype: The dtype of the elements.
        initializer: The value of a row before it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    initializer: Initializer = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"a slot's name is text, got {self.name!r}")
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"slot {self.name!r}: {self.dtype!r} is not a torch.dtype")
        if callable(self.initializer):
            check_callable(self.initializer, f"slot {self.name!r}: the initializer")
        elif not isinstance(self.initializer, int | float):
            raise TypeError(
                f"slot {self.name!r}: the initializer is a number or a function that fills a "
                f"tensor in place, got {self.initializer!r}"
            )
        if any(type(size) is not int or size <= 0 for size in self.shape):
            raise ValueError(f"slot {self.name!r}: sizes must be positive ints, got {self.shape}")

    def check_rows(self, rows: torch.Tensor, count: int) -> None:
        """Refuse rows of another dtype, of another shape, or of another number than `count`.

        Raises:
            TypeError: If the dtype does not fit.
            ValueError: If the shape does not fit.
        """
        if rows.dtype != self.dtype:
            raise TypeError(f"slot {self.name!r} is {self.dtype}, got rows of {rows.dtype}")
        if tuple(rows.shape) != (count, *self.shape):
            raise ValueError(
                f"slot {self.name!r}: {count} ids need rows of shape "
                f"{[count, *self.shape]}, got {list(rows.shape)}"
            )

    def initialize(self, rows: torch.Tensor) -> None:
        if callable(self.initializer):
            self.initializer(rows)
        else:
            rows.fill_(self.initializer)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def starts_as_zero(self) -> bool:
        """Whether fresh memory, which reads as zero, is right as it is."""
        # -0.0 is equal to 0.0 but has a bit set.
        return not callable(self.initializer) and str(float(self.initializer)) == "0.0"


class Children(tuple[str, ...]):
    """The names of a table's children.

    Calling it is what `torch.nn.Module.children()` is: a table has no submodules, but `to`,
    `train` and `apply` of the module around it ask.
    """

    __slots__ = ()

    def __call__(self) -> Iterator[torch.nn.Module]:
        return iter(())


@dataclass(frozen=True, slots=True)
class Encoding:
    """Turns ids of children into ids of the table, and back."""

    BITS: ClassVar = _BITS

    table: str
    children: Children
    coalesced: bool

    @classmethod
    def of(cls, table: str, children: Sequence[str] | None, *, coalesced: bool) -> Encoding:
        """Check the names of a table's children; without any, the table is its own only child."""
        if isinstance(children, str):
            raise TypeError(f"table {table!r}: children are a list of names, got {children!r}")
        names = Children([table] if children is None else children)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"table {table!r}: children are a list of names, got {names}")
        if len(set(names)) != len(names) or not 0 < len(names) <= _MAX_CHILDREN:
            raise ValueError(
                f"table {table!r} needs 1 to {_MAX_CHILDREN} children of different names, "
                f"got {len(names)}"
            )
        if len(names) > 1 and not coalesced:
            raise ValueError(f"table {table!r} has several children; it needs coalesced=True")
        return cls(table, names, coalesced)

    def _bits(self, child: str) -> tuple[int, int]:
        """Return a mask of the bits of an id that stay, and the bits that are set, as int64.

        Raises:
            KeyError: If there is no such child.
        """
        if child not in self.children:
            shown = ", ".join(self.children[:10])
            raise KeyError(f"table {self.table!r} has no child {child!r}, only {shown}")
        if not self.coalesced:
            return -1, 0
        bits = self.children.index(child) << _BITS
        return _MASK, bits - 2**64 if bits >= 2**63 else bits

    def encode(self, ids: Longs, child: str | None) -> Longs:
        """Return the table's ids for ids of a child; without a child, `ids` are encoded already."""
        if child is None:
            return ids
        mask, bits = self._bits(child)
        return ids if mask == -1 else (ids & np.int64(mask)) | np.int64(bits)

    def decode(self, ids: Longs) -> Longs:
        """Return the table's ids as they stand on disk."""
        return ids & np.int64(_MASK) if self.coalesced else ids

    def are_of(self, ids: Longs, child: str) -> Flags:
        mask, bits = self._bits(child)
        if mask == -1:
            return np.ones(len(ids), np.bool_)
        same: Flags = (ids & np.int64(~mask)) == np.int64(bits)
        return same

    def are_of_any(self, ids: Longs, children: Sequence[str]) -> Flags:
        if not self.coalesced:
            return np.ones(len(ids), np.bool_)
        known = np.zeros(1 << (64 - _BITS), np.bool_)
        known[[self.children.index(child) for child in children]] = True
        found: Flags = known[ids.view(np.uint64) >> np.uint64(_BITS)]
        return found

    # numpy does the following in windows that fit into the cache: about as fast as a kernel, which
    # would take long to compile, and hardly ever with the GIL.

    def admit(self, ids: Longs, child: str, claimed: Slice) -> tuple[Flags | None, int]:
        """Encode ids in place. See `TableUpdate.admit`."""
        mask, bits = self._bits(child)
        if claimed.is_whole and mask == -1:
            return None, 0
        refused = np.empty(len(ids), np.bool_)
        for start in range(0, len(ids), _WINDOW):
            window = ids[start : start + _WINDOW]
            refused[start : start + _WINDOW] = claimed.strays(window)
            if mask != -1:
                window &= mask
                window |= bits
        dropped = int(np.count_nonzero(refused))
        return (refused, dropped) if dropped else (None, 0)

    def select(
        self, ids: Longs, child: str, claimed: Slice, wanted: Slice
    ) -> tuple[Longs, Longs, int]:
        """Pick ids of a block. See `TableUpdate.select`."""
        mask, bits = self._bits(child)
        rows = np.empty(len(ids), np.int64)
        count = 0
        outside = 0
        for start in range(0, len(ids), _WINDOW):
            window = ids[start : start + _WINDOW]
            refused = wanted.strays(window)
            if not claimed.is_whole:
                lying = claimed.strays(window)
                outside += int(np.count_nonzero(lying))
                refused |= lying
            found = np.flatnonzero(~refused)
            rows[count : count + len(found)] = found + start
            count += len(found)
        rows = rows[:count]
        return rows, (ids[rows] & mask) | bits, outside


def as_slot(name: str, shape: Sequence[int], dtype: torch.dtype, initializer: Initializer) -> Slot:
    """Return a slot. Its shape may be any sequence."""
    if not isinstance(shape, Sequence):
        raise TypeError(f"a shape is a sequence of sizes, as [16], got {shape!r}")
    return Slot(name=name, shape=tuple(shape), dtype=dtype, initializer=initializer)


def as_ids(ids: torch.Tensor) -> tuple[Longs, torch.Size]:
    """Return ids as int64 `[n]`, and the shape that they came in.

    Raises:
        TypeError: If they are not integers.
    """
    tensor = torch.as_tensor(ids)
    if tensor.numel() and (tensor.dtype.is_floating_point or tensor.dtype.is_complex
                           or tensor.dtype == torch.bool):  # fmt: skip
        raise TypeError(f"ids are int64, got {tensor.dtype}")
    flat = tensor.detach().to("cpu", torch.int64).reshape(-1).contiguous()
    return flat.numpy(), tensor.shape


def checked_out(out: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the memory for a result: new, or the caller's, if it fits."""
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype)
    if out.dtype != dtype:
        raise TypeError(f"out is {out.dtype}, the rows are {dtype}")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out has shape {list(out.shape)}, the rows have {list(shape)}")
    if not out.is_cpu or not out.is_contiguous() or out.requires_grad:
        raise ValueError("out must be contiguous host memory that needs no gradient")
    return out


def shown(name: str, count: int, slots: Iterable[Slot], slice_: Slice, encoding: Encoding) -> str:
    """Describe a table, in the `repr` of its module."""
    rows = ", ".join(
        f"{slot.name}: {list(slot.shape)} {str(slot.dtype).removeprefix('torch.')}"
        for slot in slots
    )
    family = f", children={list(encoding.children)}" if encoding.coalesced else ""
    return f"{name!r}, {count} ids, slots=({rows}), slice={slice_}{family}"
