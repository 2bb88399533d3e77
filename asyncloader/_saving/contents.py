"""What there is to save: tables and tensors as blocks, and where the bytes of each come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._checkpoint.sidecar import SUB_SLICES, PartRows
from asyncloader._planning.load_info import ID

from .layout import WriteBlock
from .sources import IdSource, RowOrder, RowSource, TensorSource
from .writing import CHUNK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._table.protocol import SavableSnapshot

    from .sources import ByteSource


@dataclass(slots=True)
class Contents:
    """Blocks in the order in which they are dealt out, and their sources."""

    blocks: list[WriteBlock] = field(default_factory=list)
    sources: dict[WriteBlock, ByteSource] = field(default_factory=dict)
    """Of the blocks that are kept."""

    _orders: dict[str, RowOrder] = field(default_factory=dict)
    """By child."""

    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def add_table(self, snapshot: SavableSnapshot) -> None:
        """Add all that a table holds. May take long, and belongs on a thread.

        Raises:
            ValueError: If some of it cannot be saved.
        """
        for child, count in snapshot.counts().items():
            self._orders[str(child)] = RowOrder(snapshot, child)
            self._add(child, ID, snapshot.slice, torch.int64, (count,))
            for slot in snapshot.slots.values():
                self._add(child, slot.name, snapshot.slice, slot.dtype, (count, *slot.shape))

    def _add(
        self, child: str, slot: str, part: Slice, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        # str(): a name may be a subclass of it, which JSON does not take.
        name, table = f"{child}@{slot}", str(child)
        self.blocks.append(
            WriteBlock(
                name=name,
                table=table,
                slice=part,
                dtype=dtype_of(f"slot {slot!r} of table {child!r}", dtype),
                shape=shape,
                nbytes=math.prod(shape) * dtype.itemsize,
            )
        )

    def add_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add dense tensors.

        Raises:
            ValueError: If one has a dtype that no checkpoint can hold.
        """
        for name, tensor in tensors.items():
            dtype = dtype_of(f"tensors[{name!r}]", tensor.dtype)
            self.blocks.append(
                WriteBlock(
                    name=name,
                    table=None,
                    slice=None,
                    dtype=dtype,
                    shape=tuple(tensor.shape),
                    nbytes=tensor.numel() * tensor.itemsize,
                )
            )
        self._tensors |= tensors

    def keep(self, blocks: Sequence[WriteBlock]) -> None:
        """Make sources for these blocks, and forget all others; nothing is read before."""
        self.blocks = list(blocks)
        for block in blocks:
            self.sources[block] = self._source(block)

    def _source(self, block: WriteBlock) -> ByteSource:
        if block.table is None:
            return TensorSource(self._tensors[block.name])
        order = self._orders[block.table]
        order.pending += -(-block.nbytes // CHUNK)
        return IdSource(order) if block.slot == ID else RowSource(order, block.slot)

    def changed(self) -> tuple[str, ...]:
        """Name the tensors that somebody has written to since `keep`."""
        return tuple(
            block.name
            for block, source in self.sources.items()
            if isinstance(source, TensorSource) and source.changed()
        )

    def part_rows(self) -> dict[str, PartRows]:
        """Say how the rows are spread over their slices, by child, once they have been read."""
        rows = {}
        for block in self.blocks:
            if block.table is not None and block.slot == ID and block.slice is not None:
                count = block.shape[0]
                # Without rows nobody has sorted them.
                offsets = self._orders[block.table].offsets if count else (0,) * (SUB_SLICES + 1)
                rows[block.table] = PartRows(block.slice, count, offsets)
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
