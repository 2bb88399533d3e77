"""Where bytes go once they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK
from asyncloader._planning.reads import Extent, Extents

from .tensors import copy_flat, plain_bytes, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._planning.reads import Piece, Read
    from asyncloader._planning.tensor_loads import TensorLoads

    from .destinations import Destinations
    from .staging import Arena

# Elements: half a megabyte, even of float64.
_CAST_STEP = 64 << 10


class Sink(Protocol):
    """A range of bytes to be filled, in pieces, in any order."""

    @property
    def name(self) -> str:
        """The tensor or table that it belongs to."""
        ...

    def open(self, position: int, length: int, arena: Arena, /) -> memoryview:
        """Lend memory for `length` bytes from `position` on, of its own or of the read's."""
        ...

    def filled(self, position: int, view: memoryview, /) -> Callable[[], None] | None:
        """Take note that a view is filled; return what is left to do, for a kernel thread."""
        ...


class DirectSink:
    """Memory that takes a file's bytes as they lie."""

    def __init__(self, name: str, memory: memoryview) -> None:
        self.name = name
        self._memory = memory

    @property
    def nbytes(self) -> int:
        """Length of the memory."""
        return self._memory.nbytes

    def open(self, position: int, length: int, _arena: Arena, /) -> memoryview:
        """Lend the memory itself."""
        return self._memory[position : position + length]

    def filled(self, position: int, view: memoryview, /) -> None:
        """Nothing is left to do."""


class IdSink(DirectSink):
    """Memory of ids, which are to be indexed when they are there."""

    def __init__(self, name: str, memory: memoryview, arrived: Callable[[int, int], None]) -> None:
        super().__init__(name, memory)
        self._arrived = arrived

    def filled(self, position: int, view: memoryview, /) -> None:
        """Pass on which rows have their ids."""
        self._arrived(position // 8, view.nbytes // 8)


class StagedSink:
    """A tensor that does not take bytes as they lie: they stop over in host memory.

    Args:
        name: The tensor or table that it belongs to.
        tensor: What is filled.
        dtype: Of the elements in the file. Positions are bytes of these.
    """

    def __init__(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        self.name = name
        self._tensor = tensor.detach()
        self._dtype = dtype

    def open(self, _position: int, length: int, arena: Arena, /) -> memoryview:
        """Lend staging memory, until its bytes are copied."""
        return arena.take(length).numpy().data

    def filled(self, position: int, view: memoryview, /) -> Callable[[], None]:
        """Copy what is there to the tensor."""
        tensor, dtype = self._tensor, self._dtype
        start = position // dtype.itemsize

        def copy() -> None:
            values = torch.frombuffer(view, dtype=dtype)
            # For another device torch converts in host memory first, of its own: a part at a time.
            step = len(values) if dtype == tensor.dtype else _CAST_STEP
            with torch.inference_mode(tensor.is_inference()):  # else torch refuses to write to it
                for low in range(0, len(values), step):
                    copy_flat(tensor, start + low, values[low : low + step])

        return copy


def sink_for(name: str, tensor: torch.Tensor, stored: DType) -> DirectSink | StagedSink:
    """Return the cheapest sink that gives a tensor the right values."""
    dtype = torch_dtype(stored)
    memory = plain_bytes(tensor) if tensor.dtype == dtype else None
    return StagedSink(name, tensor, dtype) if memory is None else DirectSink(name, memory)


class Sinks:
    """All that a load fills, by number: the dense tensors of its plan, then parts of tables.

    Tensors that take bytes as they lie need no object each: they are addresses.
    """

    def __init__(self, loads: TensorLoads, into: Destinations) -> None:
        chosen = np.array(into.targets.numbers(loads.names), np.int64)
        span, base = into.span()
        plain = into.plain[chosen] & ~loads.cast
        begin = into.begin[chosen]
        into.check_memory(chosen)
        into.check_writable(chosen[~plain])
        if ((into.end[chosen] - begin != loads.nbytes) & plain).any():
            raise RuntimeError("blocks were planned for tensors of another size")
        self._span = span
        self._begin = begin - base
        self._loads = loads
        self._simple = plain & ~loads.digested
        self._plain = plain.tolist()
        self._staged = {
            number: StagedSink(
                loads.names[number],
                into.held[chosen[number]],
                torch_dtype(loads.block(number).dtype),
            )
            for number in np.flatnonzero(~plain).tolist()
        }
        self._others: list[tuple[Sink, Block]] = []
        self.ids: set[int] = set()
        """The numbers of the sinks that take ids."""

    def __len__(self) -> int:
        return len(self._loads) + len(self._others)

    def add(self, sink: Sink, block: Block) -> Extent | None:
        """Take in a part of a table, which a block fills; return what is to be read."""
        number = len(self)
        if isinstance(sink, IdSink):
            self.ids.add(number)
        self._others.append((sink, block))
        if not block.nbytes:
            return None
        grain = torch_dtype(block.dtype).itemsize if isinstance(sink, StagedSink | IdSink) else 1
        if block.digests is not None:  # whatever is read can be compared then
            grain = DIGEST_CHUNK
        return Extent(block.shard, block.offset, block.nbytes, number, 0, grain)

    def dense_extents(self) -> Extents:
        """Return what is to be read for the dense tensors."""
        loads = self._loads
        grain = np.ones(len(loads), np.int64)
        for number in self._staged:
            grain[number] = torch_dtype(loads.block(number).dtype).itemsize
        grain[loads.digested] = DIGEST_CHUNK
        filled = np.flatnonzero(loads.nbytes)
        return Extents(
            shards=loads.shards,
            shard=loads.shard[filled],
            offset=loads.offsets[filled],
            length=loads.nbytes[filled],
            sink=filled,
            position=np.zeros(len(filled), np.int64),
            grain=grain[filled],
        )

    def name(self, number: int) -> str:
        """Return the tensor or table that it belongs to."""
        if number < len(self._loads):
            return self._loads.names[number]
        return self._others[number - len(self._loads)][0].name

    def block(self, number: int) -> Block:
        """Return the block that fills it."""
        if number < len(self._loads):
            return self._loads.block(number)
        return self._others[number - len(self._loads)][1]

    def views(self, read: Read) -> list[memoryview] | None:
        """Return the memory of all pieces of a read, if nothing is left to do once it is filled."""
        sinks = read.sinks
        if sinks[0] >= len(self._loads) or sinks.max() >= len(self._loads) or sinks.min() < 0:
            return None
        if not self._simple[sinks].all():
            return None
        begin = self._begin[sinks] + read.positions
        span = self._span
        ranges = zip(begin.tolist(), (begin + read.lengths).tolist(), strict=True)
        return [span[low:high] for low, high in ranges]

    def tensors(self, read: Read) -> dict[str, bool]:
        """Return the tensors that a read writes to, and whether by way of staging memory."""
        names, staged = self._loads.names, self._staged
        count = len(names)
        return {names[n]: n in staged for n in read.sinks.tolist() if 0 <= n < count}

    def open(self, piece: Piece, arena: Arena) -> memoryview:
        """Lend memory for one piece."""
        number = piece.sink
        if number < len(self._loads) and self._plain[number]:
            begin = int(self._begin[number]) + piece.position
            return self._span[begin : begin + piece.length]
        return self._sink(number).open(piece.position, piece.length, arena)

    def filled(self, piece: Piece, view: memoryview) -> Callable[[], None] | None:
        """Take note that a piece is there; return what is left to do, for a kernel thread."""
        number = piece.sink
        if number < len(self._loads) and self._plain[number]:
            return None
        return self._sink(number).filled(piece.position, view)

    def _sink(self, number: int) -> Sink:
        if number < len(self._loads):
            return self._staged[number]
        return self._others[number - len(self._loads)][0]
