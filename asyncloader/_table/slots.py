"""What a table keeps for each id besides the id itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from asyncloader._arguments import check_callable

Initializer = float | Callable[[torch.Tensor], object]
"""A number, or a function that fills a `[n, *shape]` tensor in place, as `torch.nn.init` has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One value an id: its embedding, or a state of its optimizer.

    Attributes:
        name: Its name, on disk too.
        shape: Of one row.
        dtype: Of the elements.
        initializer: What rows hold before they are written.
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
        if not callable(self.initializer) and not isinstance(self.initializer, int | float):
            raise TypeError(
                f"slot {self.name!r}: the initializer is a number or a function that fills a "
                f"tensor in place, got {self.initializer!r}"
            )
        if callable(self.initializer):
            check_callable(self.initializer, f"slot {self.name!r}: the initializer")
        if any(type(size) is not int or size <= 0 for size in self.shape):
            raise ValueError(f"slot {self.name!r}: sizes must be positive ints, got {self.shape}")

    def check_rows(self, rows: torch.Tensor, count: int) -> None:
        """Refuse rows that are not of this slot, or not so many.

        Raises:
            TypeError: If their dtype is another one.
            ValueError: If their shape does not fit.
        """
        if rows.dtype != self.dtype:
            raise TypeError(f"slot {self.name!r} is {self.dtype}, got rows of {rows.dtype}")
        if tuple(rows.shape) != (count, *self.shape):
            raise ValueError(
                f"slot {self.name!r}: {count} ids need rows of shape "
                f"{[count, *self.shape]}, got {list(rows.shape)}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def starts_as_zero(self) -> bool:
        """Whether fresh memory, which reads as zero, is right as it is."""
        # -0.0 is equal to 0.0 but has a bit set.
        return not callable(self.initializer) and str(float(self.initializer)) == "0.0"


def as_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a tuple.

    Raises:
        TypeError: If it is no sequence.
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"a shape is a sequence of sizes, as [16], got {shape!r}")
    return tuple(shape)


def fill(rows: torch.Tensor, initializer: Initializer) -> None:
    """Give rows, `[n, *shape]`, their initial values."""
    if callable(initializer):
        initializer(rows)
    else:
        rows.fill_(initializer)
