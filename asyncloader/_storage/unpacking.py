"""Shows tensors that a file has in pieces, or compressed, as if their bytes lay behind its end.

An archive of `torch.save` holds whole storages: a tensor that is a transposed, strided or expanded
view of one has no bytes of its own there; and another program may have compressed the archive. Such
tensors get an offset beyond the file's end. All that is above reads them as it reads the others;
here their bytes are gathered. That is slower, and takes a few MiB a thread, however large they are.
"""

from __future__ import annotations

import asyncio
import errno
import math
import threading
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from asyncloader._threads.jobs import settled

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from numpy.typing import NDArray

    from .protocol import ReadInto, ThreadedStorage


T = TypeVar("T")

_SPAN = 1 << 20  # bytes gathered from at once
# Of a span of more bytes than this, so many times as many as are wanted, a half is read by itself.
_SMALL, _THIN = 16 << 10, 8
_INPUT = 16 << 10  # compressed bytes read at once: a mark keeps as many
_MARK = 8 << 20  # bytes from one place where decompressing can begin to the next, at least
_MARKS = 256  # of which each takes 60 KiB


@dataclass(frozen=True, slots=True)
class Deflated:
    """Bytes that are compressed: any of them can be had, after those since the last mark.

    Attributes:
        name: For messages.
        begin: The first compressed byte in the file.
        end: One past the last.
        size: Bytes that they are, not compressed.
    """

    name: str
    begin: int
    end: int
    size: int
    # Positions in ascending order: where the input goes on there, and the state of zlib.
    _marks: list[tuple[int, int, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fill(self, read: ReadInto, position: int, view: memoryview) -> None:
        """Fill a view with the bytes from `position` on; raise `OSError` if they are damaged."""
        with self._lock:
            try:
                self._fill(read, position, view)
            except zlib.error as error:
                raise self._damaged(str(error)) from error

    def _fill(self, read: ReadInto, position: int, view: memoryview) -> None:
        marks = self._marks or [(0, self.begin, zlib.decompressobj(-zlib.MAX_WBITS))]
        done, offset, kept = marks[bisect_right(marks, position, key=lambda mark: mark[0]) - 1]
        machine, end = kept.copy(), position + view.nbytes
        while done < end:
            packed = memoryview(bytearray(min(_INPUT, self.end - offset)))
            if machine.eof or not packed:
                raise self._damaged("they end early")
            _fill(read, offset, packed)
            offset += len(packed)
            left: Any = packed
            while done < end and (some := machine.decompress(left, _SPAN)):
                left = machine.unconsumed_tail
                low, high = max(done, position), min(done + len(some), end)
                if low < high:
                    view[low - position : high - position] = some[low - done : high - done]
                done += len(some)
                if done >= marks[-1][0] + max(_MARK, self.size // _MARKS):
                    marks.append((done, offset - len(left), machine.copy()))
        self._marks[:] = marks

    def _damaged(self, why: str) -> OSError:
        return OSError(errno.EBADMSG, f"the compressed bytes of {self.name!r} are damaged: {why}")


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor whose bytes are gathered.

    Attributes:
        offset: The first byte of where it seems to lie, behind the file's end.
        nbytes: Of all elements.
        storage: Its elements' storage: compressed, or its first byte in the file.
        itemsize: Bytes an element.
        first: Its first element in the storage.
        shape: Its dimensions.
        stride: Elements from one to the next, by dimension.
    """

    offset: int
    nbytes: int
    storage: Deflated | int
    itemsize: int
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def fill(self, read: ReadInto, position: int, view: memoryview) -> None:
        """Fill a view with the bytes from `position` on; raise `OSError` if that fails."""
        wide = self.itemsize
        if not isinstance(self.storage, int) and self._is_contiguous:
            self.storage.fill(read, self.first * wide + position, view)
            return
        end = position + view.nbytes
        low, high = -(-position // wide), end // wide  # the elements that are wanted whole
        if low > high or low * wide > position or high * wide < end:
            begin, stop = position // wide, -(-end // wide)
            for one in (begin, stop - 1)[: stop - begin]:  # of the others only a part
                part = bytearray(wide)
                self._elements(read, one, one + 1, memoryview(part))
                at = max(one * wide, position)
                until = min((one + 1) * wide, end)
                view[at - position : until - position] = part[at - one * wide : until - one * wide]
        if low < high:
            self._elements(read, low, high, view[low * wide - position : high * wide - position])

    @property
    def _is_contiguous(self) -> bool:
        steps = (*(math.prod(self.shape[axis:]) for axis in range(1, len(self.shape))), 1)
        return self.stride == steps[: len(self.shape)]

    def _elements(self, read: ReadInto, low: int, high: int, view: memoryview) -> None:
        """Fill a view with the elements `[low, high)`, in row-major order."""
        out = np.frombuffer(view, np.dtype((np.void, self.itemsize)))
        for first, shape, stride, at in _boxes(self.shape, self.stride, self.first, low, high):
            box = out[at : at + math.prod(shape)].reshape(shape)
            self._gather(read, first, stride, box)

    def _gather(
        self, read: ReadInto, first: int, stride: tuple[int, ...], box: NDArray[np.void]
    ) -> None:
        """Fill a box with elements from `first` on; of a wide span, one half and then the other."""
        reach = [(n - 1) * step for n, step in zip(box.shape, stride, strict=True)]
        span, wide = sum(reach) + 1, self.itemsize
        is_thin = span * wide > _SMALL and span > _THIN * box.size
        if span * wide > _SPAN or is_thin:
            axis = reach.index(max(reach))
            half = box.shape[axis] // 2
            one, other = np.split(box, [half], axis)
            self._gather(read, first, stride, one)
            self._gather(read, first + half * stride[axis], stride, other)
            return
        found = np.empty(span, box.dtype)
        bytes_ = found.view(np.uint8).data
        if isinstance(self.storage, int):
            _fill(read, self.storage + first * wide, bytes_)
        else:
            self.storage.fill(read, first * wide, bytes_)
        steps = tuple(step * wide for step in stride)
        box[...] = np.ndarray(box.shape, box.dtype, found.data, 0, steps)


def _boxes(
    shape: tuple[int, ...], stride: tuple[int, ...], first: int, low: int, high: int, *, at: int = 0
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...], int]]:
    """Cut the elements `[low, high)`, in row-major order, into boxes.

    Yields of each box its first element, its shape and strides, and where it lies in the result.
    """
    if not shape:
        yield first, (), (), at
        return
    inner, rest = math.prod(shape[1:]), (shape[1:], stride[1:])
    row, column = divmod(low, inner)
    if column:
        end = min(column + high - low, inner)
        yield from _boxes(*rest, first + row * stride[0], column, end, at=at)
        low, at, row = low + end - column, at + end - column, row + 1
    if rows := (high - low) // inner:
        yield first + row * stride[0], (rows, *shape[1:]), stride, at
        low, at, row = low + rows * inner, at + rows * inner, row + rows
    if low < high:
        yield from _boxes(*rest, first + row * stride[0], 0, high - low, at=at)


def _fill(read: ReadInto, offset: int, view: memoryview) -> None:
    """Fill all of a view; raise `OSError` if the file ends before."""
    while view:
        if not (count := read(offset, [view])):
            raise OSError(errno.ENODATA, f"the file ends at byte {offset}")
        offset, view = offset + count, view[count:]


class UnpackingStorage:
    """A storage whose files go on behind their end, where `unpack` was told so."""

    def __init__(self, inner: ThreadedStorage) -> None:
        self._inner = inner
        self._packed: dict[str, Sequence[PackedTensor]] = {}
        self.size = inner.size
        self.changed = inner.changed

    def __repr__(self) -> str:
        return f"<UnpackingStorage {self._inner!r}>"

    @property
    def location(self) -> str:
        return self._inner.location

    @property
    def lost(self) -> int:
        return self._inner.lost

    @property
    def retries(self) -> int:
        """How often a failed read was tried again."""
        count: int = getattr(self._inner, "retries", 0)
        return count

    def unpack(self, name: str, packed: Sequence[PackedTensor]) -> None:
        """Show tensors, in the order of their offsets, behind the end of a file."""
        if packed:
            self._packed[name] = packed

    def readinto(
        self, name: str, offset: int, views: Sequence[memoryview], /
    ) -> Coroutine[Any, Any, int]:
        """Fill `views` from `offset` on; see `Storage`."""
        packed = self._packed.get(name)
        if packed is None or offset < packed[0].offset:
            return self._inner.readinto(name, offset, views)
        return self._gather(name, lambda read: _fill_views(packed, read, offset, views))

    def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> Coroutine[Any, Any, T]:
        """Run `job` on a thread; see `ThreadedStorage`."""
        packed = self._packed.get(name)
        if packed is None:
            return self._inner.on_thread(name, job)
        return self._gather(name, lambda read: job(partial(_read, packed, read)))

    async def _gather(self, name: str, job: Callable[[ReadInto], T]) -> T:
        """Run a job that may read a million times; it ends soon after it is cancelled."""
        given_up = threading.Event()

        def reading(read: ReadInto) -> T:
            def unless_given_up(offset: int, views: Sequence[memoryview]) -> int:
                if given_up.is_set():
                    raise OSError(errno.ECANCELED, "the read was given up")
                return read(offset, views)

            return job(unless_given_up)

        work = asyncio.ensure_future(self._inner.on_thread(name, reading))
        return await settled(work, withdraw=given_up.set)


def _read(
    packed: Sequence[PackedTensor], read: ReadInto, offset: int, views: Sequence[memoryview]
) -> int:
    if offset < packed[0].offset:
        return read(offset, views)
    return _fill_views(packed, read, offset, views)


def _fill_views(
    packed: Sequence[PackedTensor], read: ReadInto, offset: int, views: Sequence[memoryview]
) -> int:
    """Fill views from `offset` on, as far as there is a tensor; return the bytes filled."""
    start = offset
    for view in views:
        left = view
        while left:
            tensor = packed[bisect_right(packed, offset, key=lambda one: one.offset) - 1]
            position = offset - tensor.offset
            length = min(len(left), tensor.nbytes - position)
            if length <= 0:
                return offset - start
            tensor.fill(read, position, left[:length])
            offset, left = offset + length, left[length:]
    return offset - start
