"""What there is to save: tables and tensors as blocks, and where the bytes of each come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader.checkpoint import BY_TORCH, DTYPES, SUB_SLICES, PartRows
from asyncloader.planning import ID, WriteBlock

from ._sources import IdSource, RowOrder, RowSource, TensorSource
from ._writing import CHUNK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from asyncloader.checkpoint import DType
    from asyncloader.table import SavableSnapshot

    from ._sources import ByteSource

__all__ = ["Contents"]


@dataclass(slots=True)
class Contents:
    """Blocks in the order in which they are dealt out, and their sources."""

    sources: dict[WriteBlock, ByteSource] = field(default_factory=dict)
    orders: dict[str, RowOrder] = field(default_factory=dict)
    """By child."""

    def add_table(self, snapshot: SavableSnapshot) -> None:
        """Add all that a table holds. May take long, and belongs on a thread.

        Raises:
            ValueError: If some of it cannot be saved.
        """
        for child, count in snapshot.counts().items():
            order = RowOrder(snapshot, child)
            self.orders[child] = order
            self._add(child, ID, order, DTYPES["I64"], (count,), IdSource(order))
            for slot in snapshot.slots.values():
                dtype = dtype_of(f"slot {slot.name!r} of table {child!r}", slot.dtype)
                rows = RowSource(order, slot.name)
                self._add(child, slot.name, order, dtype, (count, *slot.shape), rows)

    def _add(  # noqa: PLR0917
        self,
        child: str,
        slot: str,
        order: RowOrder,
        dtype: DType,
        shape: tuple[int, ...],
        source: ByteSource,
    ) -> None:
        block = WriteBlock(
            name=f"{child}@{slot}",
            table=child,
            slice=order.snapshot.slice,
            dtype=dtype,
            shape=shape,
        )
        self.sources[block] = source

    def add_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add dense tensors.

        Raises:
            ValueError: If one has a dtype that no checkpoint can hold.
        """
        for name, tensor in tensors.items():
            dtype = dtype_of(f"tensors[{name!r}]", tensor.dtype)
            shape = tuple(tensor.shape)
            block = WriteBlock(name=name, table=None, slice=None, dtype=dtype, shape=shape)
            self.sources[block] = TensorSource(tensor)

    def keep(self, blocks: Sequence[WriteBlock]) -> None:
        """Forget all blocks but these; nothing is read before."""
        self.sources = {block: self.sources[block] for block in blocks}
        for block in blocks:
            if block.table is not None:
                self.orders[block.table].pending += -(-block.nbytes // CHUNK)
        self.orders = {child: order for child, order in self.orders.items() if order.pending}

    def part_rows(self) -> dict[str, PartRows]:
        """Say how the rows that were saved are spread over their slices, by child."""
        rows = {}
        for block in self.sources:
            if block.table is not None and block.slot == ID and block.slice is not None:
                order = self.orders.get(block.table)
                offsets = order.offsets if order else (0,) * (SUB_SLICES + 1)
                rows[block.table] = PartRows(block.slice, block.shape[0], offsets)
        return rows


def dtype_of(what: str, dtype: torch.dtype) -> DType:
    """Return the dtype as checkpoints know it.

    Raises:
        ValueError: If they do not.
    """
    known = BY_TORCH.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ValueError(f"{what} is {dtype}, which no checkpoint can hold")
    return known
