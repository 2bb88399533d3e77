"""How ids of several children share one table.

An id is encoded as `(id & (2**52 - 1)) | (child << 52)`, as RecIS does. A table that is not
coalesced keeps ids as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


_BITS = 52
_MASK = 2**_BITS - 1
_MAX_CHILDREN = 4094  # RecIS's limit; 12 bits would hold two more


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

    def bits(self, child: str) -> tuple[int, int]:
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

    def encode(self, ids: NDArray[np.int64], child: str | None) -> NDArray[np.int64]:
        """Return the table's ids for a child's; those of no child are taken as they are."""
        if child is None:
            return ids
        mask, bits = self.bits(child)
        return ids if mask == -1 else (ids & np.int64(mask)) | np.int64(bits)

    def decode(self, ids: NDArray[np.int64], child: str | None) -> NDArray[np.int64]:
        """Return a child's ids for the table's; for no child as they are."""
        if child is None or not self.coalesced:
            return ids
        return ids & np.int64(_MASK)

    def plain(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the table's ids as they stand on disk."""
        return ids & np.int64(_MASK) if self.coalesced else ids

    def are_of(self, ids: NDArray[np.int64], child: str) -> NDArray[np.bool_]:
        """Say which of the table's ids are a child's."""
        mask, bits = self.bits(child)
        if mask == -1:
            return np.ones(len(ids), np.bool_)
        same: NDArray[np.bool_] = (ids & np.int64(~mask)) == np.int64(bits)
        return same


def as_ids(ids: torch.Tensor) -> tuple[NDArray[np.int64], torch.Size]:
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
