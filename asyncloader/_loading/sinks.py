"""Where bytes go once they are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK
from asyncloader._planning.reads import GAP, Extent, Extents

from .buffers import boxes, plain_bytes, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import TensorLoads
    from asyncloader._planning.reads import Piece, Read

    from .buffers import Arena
    from .destinations import Destinations

# Elements: half a megabyte, even of float64.
_CAST_STEP = 64 << 10


@dataclass(frozen=True, slots=True)
class Sink:
    """Memory that a block fills, in pieces, in any order. Positions are bytes of the block.

    Where a file's bytes cannot go as they lie, they stop over in staging memory.
    """

    name: str  # the tensor or table that the memory belongs to
    block: Block
    tensor: torch.Tensor | None  # `None` where bytes are only compared with their digests
    memory: memoryview | None  # the tensor's, if a file's bytes can go there as they lie
    arrived: Callable[[int, int], None] | None = None  # gets the first row with ids, and how many

    @classmethod
    def of(
        cls,
        name: str,
        tensor: torch.Tensor,
        block: Block,
        arrived: Callable[[int, int], None] | None = None,
    ) -> Sink:
        """Return the cheapest sink that gives rows of a table the right values."""
        memory = plain_bytes(tensor) if tensor.dtype == torch_dtype(block.dtype) else None
        if memory is not None and memory.nbytes != block.nbytes:
            raise RuntimeError(f"{name!r} got other memory while it was being loaded")
        return cls(name, block, tensor.detach(), memory, arrived)

    @property
    def grain(self) -> int:
        """The sink takes multiples of so many bytes."""
        if self.block.digests is not None:  # so that every read can be verified
            return DIGEST_CHUNK
        whole = self.memory is None or self.arrived is not None
        return torch_dtype(self.block.dtype).itemsize if whole else 1

    def open(self, position: int, length: int, arena: Arena) -> memoryview:
        """Lend memory for `length` bytes from `position` on."""
        if self.memory is None:
            return arena.take(length).numpy().data
        return self.memory[position : position + length]

    def filled(self, position: int, view: memoryview) -> Callable[[], None] | None:
        """Take note that a view is filled; return the rest of the work, for a kernel thread."""
        if self.tensor is None:
            return None
        if self.memory is None:
            return partial(self._copy, self.tensor, position, view)
        if self.arrived is not None:
            self.arrived(position // 8, view.nbytes // 8)
        return None

    def _copy(self, tensor: torch.Tensor, position: int, view: memoryview) -> None:
        dtype = torch_dtype(self.block.dtype)
        start = position // dtype.itemsize
        values = torch.frombuffer(view, dtype=dtype)
        # For another device torch converts in host memory first, of its own: a part at a time.
        step = len(values) if dtype == tensor.dtype else _CAST_STEP
        with torch.inference_mode(tensor.is_inference()):  # else torch refuses to write to it
            for low in range(0, len(values), step):
                for box, part in boxes(tensor, start + low, values[low : low + step]):
                    box.copy_(part)


class Sinks:
    """All that a load fills, by number: the dense tensors of its plan, then parts of tables.

    Tensors that take bytes as they lie need no object each: they are addresses.

    Attributes:
        ids: The numbers of the sinks that take ids.
    """

    def __init__(self, loads: TensorLoads, into: Destinations, *, gap_bytes: int = 0) -> None:
        chosen = np.array(into.targets.numbers(loads.names), np.int64)
        span, base = into.span()
        plain = into.plain[chosen] & ~loads.cast
        begin = into.begin[chosen]
        into.check_memory(chosen, chosen[~plain])
        if ((into.end[chosen] - begin != loads.nbytes) & plain).any():
            raise RuntimeError("blocks were planned for tensors of another size")
        self.ids: set[int] = set()
        self._loads = loads
        self._count = len(loads)
        self._span = span
        self._begin = begin - base
        self._simple = plain & ~loads.digested
        self._gap = memoryview(bytearray(gap_bytes))  # reads write to it, and nothing reads it
        self._tables: list[Extent] = []
        self._next = len(loads)
        self._sinks = {  # all but tensors that take bytes as they lie
            number: Sink(loads.names[number], loads.block(number), into.held[chosen[number]], None)
            for number in np.flatnonzero(~plain).tolist()
        }

    def add(self, sink: Sink) -> None:
        number, block = self._next, sink.block
        self._next += 1
        self._sinks[number] = sink
        if sink.arrived is not None:
            self.ids.add(number)
        if block.nbytes:
            extent = Extent(block.shard, block.offset, block.nbytes, number, sink.grain)
            self._tables.append(extent)

    def extents(self) -> Extents:
        loads = self._loads
        grain = np.ones(self._count, np.int64)
        for number, sink in self._sinks.items():
            if number < self._count:
                grain[number] = sink.grain
        grain[loads.digested] = DIGEST_CHUNK
        filled = np.flatnonzero(loads.nbytes)
        columns = [loads.offsets[filled], loads.nbytes[filled], filled, grain[filled]]
        dense = Extents(loads.shards, loads.shard[filled], np.stack(columns))
        return dense + Extents.of(self._tables)

    def name(self, number: int) -> str:
        """Return the tensor or table that a sink belongs to."""
        sink = self._sinks.get(number)
        return self._loads.names[number] if sink is None else sink.name

    def block(self, number: int) -> Block | None:
        """Return the block that fills a sink; a gap has none."""
        if number == GAP:
            return None
        sink = self._sinks.get(number)
        return self._loads.block(number) if sink is None else sink.block

    def views(self, read: Read) -> list[memoryview] | None:
        """Return the memory of all pieces of a read, if all of them only have to be filled."""
        sinks = read.sinks
        if sinks[0] >= self._count or sinks.max() >= self._count or sinks.min() < 0:
            return None
        if not self._simple[sinks].all():
            return None
        begin = self._begin[sinks] + read.positions
        span = self._span
        ranges = zip(begin.tolist(), (begin + read.lengths).tolist(), strict=True)
        return [span[low:high] for low, high in ranges]

    def tensors(self, read: Read) -> dict[str, bool]:
        """Return the tensors that a read writes to, and whether by way of staging memory."""
        names, staged, count = self._loads.names, self._sinks, self._count
        return {names[n]: n in staged for n in read.sinks.tolist() if 0 <= n < count}

    def open(self, piece: Piece, arena: Arena) -> memoryview:
        """Lend memory for one piece, of its sink or of the read."""
        if piece.sink == GAP:
            return self._gap[: piece.length]
        sink = self._sinks.get(piece.sink)
        if sink is not None:
            return sink.open(piece.position, piece.length, arena)
        begin = int(self._begin[piece.sink]) + piece.position
        return self._span[begin : begin + piece.length]

    def filled(self, piece: Piece, view: memoryview) -> Callable[[], None] | None:
        """Take note that a piece is filled; return the rest of the work, for a kernel thread."""
        sink = self._sinks.get(piece.sink)
        return None if sink is None else sink.filled(piece.position, view)
