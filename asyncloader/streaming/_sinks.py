"""Where bytes go once they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from ._tensors import copy_flat, plain_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._staging import Arena

__all__ = ["DirectSink", "IdSink", "Sink", "StagedSink", "sink_for"]


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
    """A tensor that does not take bytes as they lie: they stop over in host memory."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self._tensor = tensor.detach()

    def open(self, _position: int, length: int, arena: Arena, /) -> memoryview:
        """Lend staging memory, until its bytes are copied."""
        return arena.take(length).numpy().data

    def filled(self, position: int, view: memoryview, /) -> Callable[[], None]:
        """Copy what is there to the tensor."""
        tensor = self._tensor

        def copy() -> None:
            values = torch.frombuffer(view, dtype=tensor.dtype)
            with torch.inference_mode(tensor.is_inference()):  # else torch refuses to write to it
                copy_flat(tensor, position // tensor.itemsize, values)

        return copy


def sink_for(name: str, tensor: torch.Tensor) -> DirectSink | StagedSink:
    """Return the cheapest sink that gives a tensor the right values."""
    memory = plain_bytes(tensor)
    return StagedSink(name, tensor) if memory is None else DirectSink(name, memory)
