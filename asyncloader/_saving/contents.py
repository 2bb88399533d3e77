"""What there is to save: tables and tensors as blocks, and where the bytes of each come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.sidecar import SUB_SLICES, PartRows

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

    def gather(
        self,
        snapshots: Sequence[SavableSnapshot],
        tensors: Mapping[str, torch.Tensor],
        rank: int,
        ranks: int,
    ) -> None:
        """Add all that this rank saves. May take long, and belongs on a thread.

        Raises:
            ValueError: If some of it cannot be saved.
        """
        devices = {tensor.device for tensor in tensors.values()}
        _wait_for_devices(devices | {snapshot.device for snapshot in snapshots})
        for snapshot in snapshots:
            if ranks == 1 and not snapshot.slice.is_whole:
                raise ValueError(
                    f"table {snapshot.name!r} holds the ids of slice {snapshot.slice} alone, "
                    "but shard_num is 1: pass this rank's shard_index and shard_num"
                )
            self._add_table(snapshot)
        if rank == 0:
            self._add_tensors(tensors)

    def _add_table(self, snapshot: SavableSnapshot) -> None:
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

    def _add_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
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
        """Name the tensors that were written to since `keep`."""
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
                # Without rows there was nothing to sort.
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


def _wait_for_devices(devices: set[torch.device]) -> None:
    """Wait for what the caller has left to do on GPUs, on any stream: we read on others."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
