"""What there is to save: tables and tensors as blocks, and the sources of their bytes."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, SUB_SLICES, PartRows
from asyncloader._loading.buffers import boxes, plain_bytes

from .layout import WriteBlock
from .recis import RESERVED_IDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.buffers import Arena
    from asyncloader._table.protocol import SavableSnapshot
    from asyncloader._table.snapshot import SortedRows


CHUNK = 2 * DIGEST_CHUNK
"""Bytes of one read of a source, and of one write, at most."""


class TensorSource:
    """The bytes of a dense tensor, on any device."""

    slack = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self._memory = plain_bytes(tensor)
        self._version = _version_of(tensor)
        self._place = _place_of(self._tensor)

    def read(self, begin: int, end: int, arena: Arena, /) -> memoryview:
        if self._memory is not None:
            if self._place != _place_of(self._tensor):
                raise RuntimeError("a tensor got other memory while it was being saved")
            return self._memory[begin:end]
        out = arena.take(end - begin)
        values = out.view(self._tensor.dtype)
        for box, part in boxes(self._tensor, begin // self._tensor.itemsize, values):
            part.copy_(box)
        return out.numpy().data

    def done(self) -> None:
        """Let nothing go: the memory is the user's."""

    def changed(self) -> bool:
        """Say whether the tensor was written to since; of some tensors torch does not tell."""
        moved = self._memory is not None and self._place != _place_of(self._tensor)
        return moved or self._version != _version_of(self._tensor)


def _place_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return address and size of a tensor's memory: resizing its storage changes them."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001  # torch has no other


@dataclass(slots=True)
class _RowOrder:
    """The order in which the rows of one child are saved: sorted when first needed, then shared."""

    snapshot: SavableSnapshot
    child: str
    pending: int = 0  # reads that are still to come; afterwards the order is let go
    offsets: tuple[int, ...] = ()  # known once the rows were sorted
    reserved: tuple[int, ...] = ()  # ids that RecIS keeps for itself; known then, too
    _sorted: SortedRows | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self) -> SortedRows:
        """Return the order. May take long, and belongs on a thread."""
        with self._lock:
            if self._sorted is None:
                self._sorted = self.snapshot.sorted_rows(self.child, sub_slices=SUB_SLICES)
                self.offsets = self._sorted.offsets
                ids = self._sorted.ids
                self.reserved = tuple(one for one in RESERVED_IDS if (ids == one).any())
            return self._sorted

    def done(self) -> None:
        """Take note that one of the pending reads is over."""
        with self._lock:
            self.pending -= 1
            assert self.pending >= 0, "a read is over once"
            if not self.pending:
                self._sorted = None


class RowSource:
    """The bytes of one slot of one child, or of its ids."""

    def __init__(self, order: _RowOrder, slot: str, nbytes: int) -> None:
        self._order = order
        self._slot = slot
        self._row_bytes = 0 if slot == ID else order.snapshot.slots[slot].row_bytes
        self.slack = 2 * self._row_bytes  # the first and the last row may be cut
        order.pending += -(-nbytes // CHUNK)

    def read(self, begin: int, end: int, arena: Arena, /) -> memoryview:
        order, width = self._order.get(), self._row_bytes
        if self._slot == ID:
            return order.ids.data.cast("B")[begin:end]
        first, last = begin // width, -(-end // width)
        out = arena.take((last - first) * width)
        rows = order.rows[first:last]
        self._order.snapshot.copy_rows(self._slot, rows, out.view(last - first, width))
        return out.numpy().data[begin - first * width : end - first * width]

    def done(self) -> None:
        self._order.done()


ByteSource: TypeAlias = TensorSource | RowSource
"""The bytes of one block.

`read(begin, end, arena)` returns those bytes, in place or in memory of the arena, of which it may
take `slack` bytes more than it returns. It belongs on a thread; several may call it at a time.
`done()` is called once for each `read`, when its bytes are written.
"""


class Contents:
    """Blocks in the order in which they are dealt out, and the sources of those that are kept.

    Made on a thread: it may wait for devices, and looks at every tensor.

    Raises:
        ValueError: If a table or a tensor cannot be saved.
    """

    def __init__(
        self,
        snapshots: Sequence[SavableSnapshot],
        tensors: Mapping[str, torch.Tensor],
        rank: int,
        ranks: int,
    ) -> None:
        self.blocks: list[WriteBlock] = []
        self.sources: dict[WriteBlock, ByteSource] = {}
        self._orders: dict[str, _RowOrder] = {}  # by child
        self._tensors = tensors
        self._snapshots = snapshots
        # What the caller has left to do on GPUs, on any stream: we read on others.
        devices = {tensor.device for tensor in tensors.values()}
        for device in devices | {snapshot.device for snapshot in snapshots}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        for snapshot in snapshots:
            if ranks == 1 and not snapshot.slice.is_whole:
                raise ValueError(
                    f"table {snapshot.name!r} holds the ids of slice {snapshot.slice} alone, "
                    "but shard_num is 1: pass this rank's shard_index and shard_num"
                )
            self._add_table(snapshot)
        for name, tensor in tensors.items() if rank == 0 else ():
            shape = tuple(tensor.shape)
            self.blocks.append(_block(f"tensors[{name!r}]", name, tensor.dtype, shape))

    def _add_table(self, snapshot: SavableSnapshot) -> None:
        slots = [(slot.name, slot.dtype, slot.shape) for slot in snapshot.slots.values()]
        for child, count in snapshot.counts().items():
            table = str(child)  # a name may be a subclass of it, which JSON does not take
            self._orders[table] = _RowOrder(snapshot, child)
            for slot, dtype, shape in ((ID, torch.int64, ()), *slots):
                what, name = f"slot {slot!r} of table {child!r}", f"{child}@{slot}"
                self.blocks.append(
                    _block(what, name, dtype, (count, *shape), table=table, part=snapshot.slice)
                )

    def keep(self, blocks: Sequence[WriteBlock]) -> None:
        """Make sources for these blocks, and forget all others."""
        self.blocks = list(blocks)
        for block in blocks:
            if block.table is None:
                self.sources[block] = TensorSource(self._tensors[block.name])
            else:
                order = self._orders[block.table]
                self.sources[block] = RowSource(order, block.slot, block.nbytes)

    def tied(self, blocks: Sequence[WriteBlock]) -> dict[WriteBlock, WriteBlock]:
        """Return which of these dense tensors have the very bytes of an earlier one."""
        first: dict[object, WriteBlock] = {}
        tied = {}
        for block in blocks:
            tensor = self._tensors[block.name]
            place = tensor.device, tensor.data_ptr() or block.name, tensor.stride()
            how = block.dtype, block.shape, tensor.is_conj(), tensor.is_neg()
            other = first.setdefault((place, how), block)
            if other is not block:
                tied[block] = other
        return tied

    def reserved_ids(self) -> dict[str, tuple[int, ...]]:
        """Return ids that RecIS keeps for itself, by child; after all rows were read."""
        return {child: order.reserved for child, order in self._orders.items() if order.reserved}

    def changed(self) -> tuple[str, ...]:
        """Return the names of tensors and tables that were changed since."""
        tensors = (
            block.name
            for block, source in self.sources.items()
            if isinstance(source, TensorSource) and source.changed()
        )
        return (*tensors, *(table.name for table in self._snapshots if table.changed()))

    def part_rows(self) -> dict[str, PartRows]:
        """Return how rows are spread over their slices, by child; after all rows were read."""
        rows = {}
        for block in self.blocks:
            if block.table is not None and block.slot == ID and block.slice is not None:
                count = block.shape[0]
                # Without rows there was nothing to sort.
                offsets = self._orders[block.table].offsets if count else (0,) * (SUB_SLICES + 1)
                rows[block.table] = PartRows(block.slice, count, offsets)
        return rows


def _block(
    what: str,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    table: str | None = None,
    part: Slice | None = None,
) -> WriteBlock:
    known = BY_TORCH.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ValueError(f"{what} is {dtype}, which no checkpoint can hold")
    nbytes = math.prod(shape) * dtype.itemsize
    return WriteBlock(name=name, table=table, slice=part, dtype=known, shape=shape, nbytes=nbytes)
