"""Where the bytes of a block come from."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from asyncloader._checkpoint.sidecar import SUB_SLICES
from asyncloader._loading.buffers import boxes, plain_bytes

if TYPE_CHECKING:
    import torch

    from asyncloader._loading.buffers import Arena
    from asyncloader._table.protocol import SavableSnapshot
    from asyncloader._table.snapshot import SortedRows


class ByteSource(Protocol):
    """The bytes of one block."""

    @property
    def slack(self) -> int:
        """Bytes by which `read` may need more staging memory than it returns."""
        ...

    def read(self, begin: int, end: int, arena: Arena, /) -> memoryview:
        """Return the bytes `[begin, end)`, in place or in memory of the arena.

        Called on a thread, by several at a time.
        """
        ...

    def done(self) -> None:
        """Take note that one more `read` has been written, and is not needed any more."""
        ...


class TensorSource:
    """A dense tensor, wherever it lies."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self._memory = plain_bytes(tensor)
        self._version = _version_of(tensor)
        self._place = _place_of(self._tensor)
        self.slack = 0

    def read(self, begin: int, end: int, arena: Arena, /) -> memoryview:
        """Lend the tensor's own memory, or copy from it."""
        if self._memory is not None:
            if self._place != _place_of(self._tensor):
                raise RuntimeError("a tensor got other memory while it was being saved")
            return self._memory[begin:end]
        itemsize = self._tensor.itemsize
        out = arena.take(end - begin)
        values = out.view(self._tensor.dtype)
        for box, part in boxes(self._tensor, begin // itemsize, values):
            part.copy_(box)
        return out.numpy().data

    def done(self) -> None:
        """Nothing is kept."""

    def changed(self) -> bool:
        """Say whether the tensor was written to since; of some tensors torch does not tell."""
        moved = self._memory is not None and self._place != _place_of(self._tensor)
        return moved or self._version != _version_of(self._tensor)


def _place_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Say where a tensor's memory lies, and how much it is: resizing its storage changes that."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001  # torch has no other


@dataclass(slots=True)
class RowOrder:
    """The order in which the rows of one child are saved: sorted when first needed, then shared."""

    snapshot: SavableSnapshot
    child: str
    pending: int = 0
    """Reads that are still to come; afterwards the order is let go."""

    offsets: tuple[int, ...] = ()
    """Known once it was sorted."""

    _sorted: SortedRows | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self) -> SortedRows:
        """Return it. May take long, and belongs on a thread."""
        with self._lock:
            if self._sorted is None:
                self._sorted = self.snapshot.sorted_rows(self.child, sub_slices=SUB_SLICES)
                self.offsets = self._sorted.offsets
            return self._sorted

    def done(self) -> None:
        """Take note that one of the pending reads is over."""
        with self._lock:
            self.pending -= 1
            assert self.pending >= 0, "a read is over once"
            if not self.pending:
                self._sorted = None


class IdSource:
    """The ids of one child."""

    def __init__(self, order: RowOrder) -> None:
        self._order = order
        self.slack = 0

    def read(self, begin: int, end: int, _arena: Arena, /) -> memoryview:
        """Lend the sorted ids."""
        return self._order.get().ids.data.cast("B")[begin:end]

    def done(self) -> None:
        """Let the order go after the last one."""
        self._order.done()


class RowSource:
    """The rows of one slot of one child."""

    def __init__(self, order: RowOrder, slot: str) -> None:
        self._order = order
        self._slot = slot
        self._row_bytes = order.snapshot.slots[slot].row_bytes
        self.slack = 2 * self._row_bytes  # the first and the last row may be cut

    def read(self, begin: int, end: int, arena: Arena, /) -> memoryview:
        """Gather rows."""
        width = self._row_bytes
        first, last = begin // width, -(-end // width)
        out = arena.take((last - first) * width)
        rows = self._order.get().rows[first:last]
        self._order.snapshot.copy_rows(self._slot, rows, out.view(last - first, width))
        return out.numpy().data[begin - first * width : end - first * width]

    def done(self) -> None:
        """Let the order go after the last one."""
        self._order.done()
